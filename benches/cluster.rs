//! Decoupled tokens on a GPU.

mod gpu;

fn main() {
    gpu::run("cluster");
}
