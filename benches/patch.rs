//! Patch rows and sequences on a GPU.

mod gpu;

fn main() {
    gpu::run("patch");
}
