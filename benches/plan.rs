//! Composition of plans on a GPU.

mod gpu;

fn main() {
    gpu::run("plan");
}
