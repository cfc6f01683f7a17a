//! The one place that launches.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};

use super::{image::Kernel, record};
use crate::{Error, Result};

/// Blocks, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) grid: u32,
    pub(super) block: u32,
    pub(super) shared_bytes: u32,
}

/// Blocks along three axes, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) blocks: [u32; 3],
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
    let Shape { grid, block, shared_bytes } = shape;
    // SAFETY: the caller's promise is the same.
    unsafe { launch_grid(stream, kernel, Grid { blocks: [grid, 1, 1], block, shared_bytes }, params) }
}

/// [`launch`] with blocks along three axes.
///
/// # Safety
/// As [`launch`].
pub(super) unsafe fn launch_grid<P: Pod + DeviceRepr>(
    stream: &CudaStream,
    kernel: &Kernel,
    shape: Grid,
    params: &P,
) -> Result<()> {
    let [x, y, z] = shape.blocks;
    let go_on = record::launch(stream, |record| {
        record.kernel.clone_from(&kernel.name);
        (record.grid, record.block, record.shared_bytes) = (shape.blocks, shape.block, shape.shared_bytes);
    });
    if !go_on {
        return Ok(());
    }
    let config = LaunchConfig {
        grid_dim: (x, y, z),
        block_dim: (shape.block, 1, 1),
        shared_mem_bytes: shape.shared_bytes,
    };
    let mut builder = stream.launch_builder(&kernel.function);
    builder.arg(params);
    // SAFETY: the caller vouches for the parameters; the driver checks grid, block and shared memory.
    let launched = unsafe { builder.launch(config) };
    launched.map(|_| ()).map_err(|error| Error::Launch {
        kernel: kernel.name.clone(),
        grid: x.saturating_mul(y).saturating_mul(z),
        block: shape.block,
        shared_bytes: shape.shared_bytes,
        what: format!("{error:?}"),
    })
}

/// `Divisor` of kernels/include/divide.cuh: quotients of numbers below 2^31 without a division.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Divisor {
    multiplier: u32,
    shift: u32,
    by: i32,
}

impl Divisor {
    /// Divides by `n`, the number of `what`.
    pub(super) fn new(op: &'static str, what: &str, n: usize) -> Result<Self> {
        let by = int(op, what, n.max(1))?;
        let n = u64::from(by.unsigned_abs());
        let shift = n.next_power_of_two().trailing_zeros();
        let multiplier = (1_u64 << (31 + shift)).div_ceil(n);
        Ok(Self { multiplier: u32::try_from(multiplier).unwrap_or(u32::MAX), shift, by })
    }

    /// What it divides by.
    pub(super) fn by(self) -> usize {
        self.by.unsigned_abs() as usize
    }
}

/// Threads of a block of the kernels that give each thread one item.
pub(super) const ITEM_THREADS: usize = 256;
/// Items of one launch: the last block counts up to a block too many.
const ITEMS: usize = i32::MAX as usize - ITEM_THREADS;

/// How many images fit into one launch at `items` an image (or a group of images). More images take more launches.
pub(super) fn images_a_launch(op: &'static str, items: usize) -> Result<usize> {
    match ITEMS / items.max(1) {
        0 => Err(Error::argument(op, format!("{items} accesses of one image are more than {ITEMS}"))),
        images => Ok(images),
    }
}

/// One thread for each of `items`.
pub(super) fn item_shape(items: usize) -> Shape {
    Shape { grid: items.div_ceil(ITEM_THREADS) as u32, block: ITEM_THREADS as u32, shared_bytes: 0 }
}

/// `n` as the kernels' 32-bit integers, named when it does not fit.
pub(super) fn int(op: &'static str, what: &str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::argument(op, format!("{n} {what} are more than 2^31 - 1")))
}

/// The length of a row or column that a block goes along in strides of up to 2^14, as the kernels' 32-bit integers.
pub(super) fn length(op: &'static str, what: &str, n: usize) -> Result<i32> {
    i32::try_from(n)
        .ok()
        .filter(|&n| n <= i32::MAX - (1 << 14))
        .ok_or_else(|| Error::argument(op, format!("{n} {what} are more than 2^31 - 2^14 - 1")))
}

/// Rows of all images as the kernels count them; the last block counts up to three rows too many.
pub(super) fn rows(op: &'static str, images: usize, tokens: usize) -> Result<i32> {
    let rows = images.saturating_mul(tokens);
    i32::try_from(rows).ok().filter(|&rows| rows <= i32::MAX - 3).ok_or_else(|| {
        Error::argument(op, format!("{images} images of {tokens} tokens are more than 2^31 - 4 rows"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The device's arithmetic, as kernels/include/divide.cuh has it.
    fn quotient(n: u32, divisor: Divisor) -> u32 {
        ((u64::from(2 * n) * u64::from(divisor.multiplier)) >> 32 >> divisor.shift) as u32
    }

    #[test]
    fn quotients_are_exact() {
        let last = i32::MAX.unsigned_abs();
        let powers = (0..31).flat_map(|bit| [(1_u32 << bit) - 1, 1 << bit, (1 << bit) + 1]);
        let divisors: Vec<u32> =
            (1..2000).chain(powers).chain([last - 1, last]).filter(|d| (1..=last).contains(d)).collect();
        for d in divisors {
            let divisor = Divisor::new("op", "things", d as usize).unwrap();
            let multiples = [1, 2, 3, last / d / 2, last / d].map(|k| k.min(last / d) * d);
            let near = multiples.into_iter().flat_map(|n| [n.saturating_sub(1), n, n + 1]);
            for n in near.chain(0..100).chain([last - 1, last]).filter(|&n| n <= last) {
                assert_eq!(quotient(n, divisor), n / d, "{n} by {d}");
            }
        }
        assert!(Divisor::new("op", "things", 1 << 31).is_err());
    }

    #[test]
    fn a_length_leaves_room_for_one_more_stride() {
        let longest = i32::MAX as usize - (1 << 14);
        assert!(length("op", "values", longest).is_ok());
        let message = length("op", "values", longest + 1).unwrap_err().to_string();
        assert!(message.contains("2147467264 values are more than"), "{message}");
        assert!(length("op", "values", usize::MAX).is_err());
    }

    #[test]
    fn a_launch_takes_no_more_items_than_its_integers_count() {
        assert_eq!(images_a_launch("op", 1).unwrap(), ITEMS);
        assert_eq!(images_a_launch("op", ITEMS).unwrap(), 1);
        assert_eq!(images_a_launch("op", ITEMS / 3).unwrap(), 3);
        let message = images_a_launch("op", ITEMS + 1).unwrap_err().to_string();
        assert!(message.contains("accesses of one image"), "{message}");
        let shape = item_shape(ITEMS);
        assert!(i32::try_from(shape.grid * shape.block).is_ok());
    }
}
