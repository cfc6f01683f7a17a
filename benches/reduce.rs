//! Sums, maxima and means on a GPU.

mod gpu;

fn main() {
    gpu::run("reduce");
}
