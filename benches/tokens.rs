//! Parts of a sequence and their mean on a GPU.

mod gpu;

fn main() {
    gpu::run("tokens");
}
