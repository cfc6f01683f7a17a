//! LayerNorm, with and without the residual addition before it, on a GPU.

mod gpu;

fn main() {
    gpu::run("norm");
}
