//! Attention by random features, on a GPU.

mod gpu;

fn main() {
    gpu::run("performer");
}
