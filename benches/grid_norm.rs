//! Norms of feature maps, on a GPU.

mod gpu;

fn main() {
    gpu::run("grid_norm");
}
