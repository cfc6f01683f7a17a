//! Windows over the grid of patches on a GPU.

mod gpu;

fn main() {
    gpu::run("windows");
}
