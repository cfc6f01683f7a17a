//! An affine layer over cuBLASLt on a GPU.

mod gpu;

fn main() {
    gpu::run("linear");
}
