//! LayerNorm of heads on a GPU.

mod gpu;

fn main() {
    gpu::run("head_norm");
}
