//! The frequency filter, on a GPU.

mod gpu;

fn main() {
    gpu::run("frequency");
}
