//! Windows over images and feature maps, on a GPU.

mod gpu;

fn main() {
    gpu::run("unfold");
}
