//! Top-k selection on a GPU.

mod gpu;

fn main() {
    gpu::run("select");
}
