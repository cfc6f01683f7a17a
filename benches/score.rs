//! A selector's scores on a GPU.

mod gpu;

fn main() {
    gpu::run("score");
}
