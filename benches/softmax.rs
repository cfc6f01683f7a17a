//! Softmax of rows in memory on a GPU.

mod gpu;

fn main() {
    gpu::run("softmax");
}
