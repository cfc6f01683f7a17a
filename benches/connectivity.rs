//! Drop and grow of sparse layers on a GPU.

mod gpu;

fn main() {
    gpu::run("connectivity");
}
