//! 3x3 convolutions of feature maps, on a GPU.

mod gpu;

fn main() {
    gpu::run("convolution");
}
