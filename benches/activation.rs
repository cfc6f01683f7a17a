//! Nonlinearities on a GPU.

mod gpu;

fn main() {
    gpu::run("activation");
}
