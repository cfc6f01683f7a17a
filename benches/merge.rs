//! Merging and its inverse on a GPU.

mod gpu;

fn main() {
    gpu::run("merge");
}
