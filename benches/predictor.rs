//! DynamicViT's predictor on a GPU.

mod gpu;

fn main() {
    gpu::run("predictor");
}
