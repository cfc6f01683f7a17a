//! The one place that launches.

use bytemuck::Pod;
use cudarc::driver::{CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};

use super::image::Kernel;
use crate::{Error, Result};

/// Blocks, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) grid: u32,
    pub(super) block: u32,
    pub(super) shared_bytes: u32,
}

/// Launches `kernel` with its one parameter struct.
///
/// # Safety
/// `params` must be the struct that the kernel takes, and describe memory that is valid for what the kernel does with it
/// until the stream has got past the launch.
pub(super) unsafe fn launch<P: Pod + DeviceRepr>(
    stream: &CudaStream,
    kernel: &Kernel,
    shape: Shape,
    params: &P,
) -> Result<()> {
    let config = LaunchConfig {
        grid_dim: (shape.grid, 1, 1),
        block_dim: (shape.block, 1, 1),
        shared_mem_bytes: shape.shared_bytes,
    };
    let mut builder = stream.launch_builder(&kernel.function);
    builder.arg(params);
    // SAFETY: the caller vouches for the parameters; the driver checks grid, block and shared memory.
    let launched = unsafe { builder.launch(config) };
    launched.map(|_| ()).map_err(|error| Error::Launch {
        kernel: kernel.name.clone(),
        grid: shape.grid,
        block: shape.block,
        shared_bytes: shape.shared_bytes,
        what: format!("{error:?}"),
    })
}

/// `n` as the kernels' 32-bit integers, named when it does not fit.
pub(super) fn int(op: &'static str, what: &str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::argument(op, format!("{n} {what} are more than 2^31 - 1")))
}

/// Rows of all images as the kernels count them; the last block counts up to three rows too many.
pub(super) fn rows(op: &'static str, images: usize, tokens: usize) -> Result<i32> {
    let rows = images.saturating_mul(tokens);
    i32::try_from(rows).ok().filter(|&rows| rows <= i32::MAX - 3).ok_or_else(|| {
        Error::argument(op, format!("{images} images of {tokens} tokens are more than 2^31 - 4 rows"))
    })
}
