//! Means over windows of the grid of patches, and their way back (kernels/windows.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{Divisor, images_a_launch, int, item_shape, launch},
    nvtx,
    strided::{WIDE_BYTES, check_pointer, is_wide},
};
use crate::{Error, Result};

const POOL: &str = "pool_windows";
const ADD: &str = "add_windows";

/// `WindowParams` of kernels/windows.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    pooled: DevicePointer,
    units: Divisor,
    places: Divisor,
    across: Divisor,
    scale: Divisor,
    special: i32,
    rows: i32,
    columns: i32,
    cell_columns: i32,
    cells: i32,
    items: i32,
}

const _: () = assert!(
    size_of::<Params>() == 88
        && std::mem::offset_of!(Params, units) == 16
        && std::mem::offset_of!(Params, special) == 64
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/windows.cu, with 16-byte accesses and with narrow ones.
#[derive(Debug)]
pub(super) struct WindowKernels {
    pool: [TypedKernels; 2],
    add: [TypedKernels; 2],
}

impl WindowKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            pool: TypedKernels::wide_and_narrow(module, "fv_windows_pool", "")?,
            add: TypedKernels::wide_and_narrow(module, "fv_windows_add", "")?,
        })
    }
}

/// A grid of patches behind special tokens, and the windows over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Images B.
    pub batch: usize,
    /// Tokens before the grid.
    pub special: usize,
    /// Rows and columns of patches.
    pub grid: [usize; 2],
    /// Values of a token, C.
    pub width: usize,
    /// Side of a window, in patches.
    pub scale: usize,
}

impl Windows {
    /// Rows and columns of windows; those at the border may be smaller.
    pub fn cells(&self) -> [usize; 2] {
        self.grid.map(|side| side.div_ceil(self.scale.max(1)))
    }

    /// Tokens N of an image.
    pub fn tokens(&self) -> usize {
        self.grid[0].saturating_mul(self.grid[1]).saturating_add(self.special)
    }

    fn lengths(&self) -> [usize; 2] {
        let [rows, columns] = self.cells();
        [self.tokens(), rows.saturating_mul(columns)]
            .map(|n| self.batch.saturating_mul(n).saturating_mul(self.width))
    }
}

/// Means over the windows of `x` (B, N, C), without gaps, into `pooled` (B, cells, C).
///
/// # Errors
/// [`Error::Argument`] when lengths do not fit, an extent is 0, or an argument lives in another context; [`Error::Launch`]
/// when the driver refuses.
pub fn pool_windows<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &CudaView<'_, T>,
    windows: Windows,
    pooled: &mut CudaViewMut<'_, T>,
) -> Result<()> {
    let borrow = Borrow { op: POOL, device, stream };
    let [length, cells] = windows.lengths();
    let (x, _x) = borrow.read_row("x", x, length)?;
    let (pooled, _pooled) = borrow.write_row("pooled", pooled, cells)?;
    // SAFETY: both have their lengths (checked above), in the device's context; `pooled` is borrowed mutably.
    unsafe { pool_windows_raw(device, stream, T::DTYPE, x, windows, pooled) }
}

/// Adds to each patch of `x` (B, N, C), without gaps, its window's row of `pooled` (B, cells, C).
///
/// # Errors
/// As [`pool_windows`].
pub fn add_windows<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &mut CudaViewMut<'_, T>,
    windows: Windows,
    pooled: &CudaView<'_, T>,
) -> Result<()> {
    let borrow = Borrow { op: ADD, device, stream };
    let [length, cells] = windows.lengths();
    let (x, _x) = borrow.write_row("x", x, length)?;
    let (pooled, _pooled) = borrow.read_row("pooled", pooled, cells)?;
    // SAFETY: as in `pool_windows`; `x` is borrowed mutably.
    unsafe { add_windows_raw(device, stream, T::DTYPE, x, windows, pooled) }
}

/// [`pool_windows`] over device pointers.
///
/// # Errors
/// As [`pool_windows`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both must be addresses in the device's memory at which tensors of these
/// shapes and `dtype` lie, `x` initialised; nobody else may write `x`, nor touch `pooled`; they must not overlap.
pub unsafe fn pool_windows_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: DevicePointer,
    windows: Windows,
    pooled: DevicePointer,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { run(POOL, device, stream, dtype, x, windows, pooled) }
}

/// [`add_windows`] over device pointers.
///
/// # Errors
/// As [`pool_windows`].
///
/// # Safety
/// As [`pool_windows_raw`], with `pooled` read and `x` read and written.
pub unsafe fn add_windows_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: DevicePointer,
    windows: Windows,
    pooled: DevicePointer,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { run(ADD, device, stream, dtype, x, windows, pooled) }
}

/// # Safety
/// As [`pool_windows_raw`] and [`add_windows_raw`].
unsafe fn run(
    op: &'static str,
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: DevicePointer,
    windows: Windows,
    pooled: DevicePointer,
) -> Result<()> {
    let _range = nvtx::range(op);
    device.check_stream(op, stream)?;
    check_pointer(op, "x", x, dtype.bytes())?;
    check_pointer(op, "pooled", pooled, dtype.bytes())?;
    let Windows { batch, special, grid: [rows, columns], width, scale } = windows;
    if [batch, rows, columns, width, scale].contains(&0) {
        return Err(Error::argument(
            op,
            format!(
                "{batch} images of {rows}x{columns} patches of {width} values in windows of {scale}: none may be 0"
            ),
        ));
    }
    let wide = (width * dtype.bytes()).is_multiple_of(WIDE_BYTES) && is_wide(x) && is_wide(pooled);
    let units = if wide { width * dtype.bytes() / WIDE_BYTES } else { width };
    let kernels = &device.kernels().windows;
    let [cell_rows, cell_columns] = windows.cells();
    let cells = cell_rows * cell_columns;
    let (kernels, places, across) = if op == POOL {
        (&kernels.pool, cells, cell_columns)
    } else {
        (&kernels.add, rows * columns, columns)
    };
    let together = images_a_launch(op, units.saturating_mul(places))?;
    for first in (0..batch).step_by(together) {
        let images = together.min(batch - first);
        let skip = |tokens: usize| (first * tokens * width * dtype.bytes()) as DevicePointer;
        let params = Params {
            x: x + skip(windows.tokens()),
            pooled: pooled + skip(cells),
            units: Divisor::new(op, "accesses", units)?,
            places: Divisor::new(op, "patches", places)?,
            across: Divisor::new(op, "columns", across)?,
            scale: Divisor::new(op, "patches a window", scale)?,
            special: int(op, "special tokens", special)?,
            rows: int(op, "rows", rows)?,
            columns: int(op, "columns", columns)?,
            cell_columns: int(op, "columns", cell_columns)?,
            cells: int(op, "windows", cells)?,
            items: int(op, "accesses", images * units * places)?,
        };
        let kernel = kernels[usize::from(!wide)].pick(dtype);
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(images * units * places), &params) }?;
    }
    Ok(())
}
