//! Sums and maxima of rows, means of columns (kernels/reduce.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{ITEM_THREADS, Shape, images_a_launch, int, launch, length},
    nvtx,
    strided::check_pointer,
    tokens::columns_a_block,
};
#[cfg(doc)]
use crate::Error;
use crate::Result;

const OP: &str = "reduce";

/// Values of the longest row that one warp reduces.
const WARP_ROW: usize = 1024;

/// `ReduceParams` of kernels/reduce.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    out: DevicePointer,
    strides: [i64; 2],
    rows: i32,
    tokens: i32,
    width: i32,
    segments: i32,
}

const _: () = assert!(
    size_of::<Params>() == 48
        && std::mem::offset_of!(Params, strides) == 16
        && std::mem::offset_of!(Params, rows) == 32
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// What becomes of the values that are reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// The sum of each row, (B, N).
    RowSum,
    /// The largest value of each row, (B, N); NaN only where all are NaN.
    RowMax,
    /// The mean of each column over the rows of an image, (B, C).
    ColumnMean,
}

impl Reduction {
    /// Values of the result for one image of (N, C).
    fn results(self, [_, tokens, width]: [usize; 3]) -> usize {
        if self == Self::ColumnMean { width } else { tokens }
    }
}

/// The kernels of kernels/reduce.cu: with 16-byte accesses, with narrow ones.
#[derive(Debug)]
pub(super) struct ReduceKernels {
    /// By sum and maximum, then rows a warp reduces and longer ones.
    rows: [[[TypedKernels; 2]; 2]; 2],
    columns: [TypedKernels; 2],
}

impl ReduceKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |prefix: &str, suffix: &str| TypedKernels::wide_and_narrow(module, prefix, suffix);
        let rows = |prefix: &str| Ok([load(prefix, "")?, load(prefix, "_long")?]);
        Ok(Self {
            rows: [rows("fv_reduce_sum")?, rows("fv_reduce_max")?],
            columns: load("fv_reduce_columns", "")?,
        })
    }
}

/// Reduces the rows or columns of `x` (B, N, C) to `out`, in `f32` and in an order that depends on N, C and alignment alone.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn reduce<T: Element>(
    device: &Device,
    stream: &CudaStream,
    reduction: Reduction,
    x: &Strided<CudaView<'_, T>>,
    out: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let count = x.shape[0].saturating_mul(reduction.results(x.shape));
    let (x, _x) = borrow.read("x", x)?;
    let (out, _out) = borrow.write_row("out", out, count)?;
    // SAFETY: both lie within their views (checked above), which live in the device's context and whose guards outlive the
    // launch; `out` is borrowed mutably, so it is not `x`.
    unsafe { reduce_raw(device, stream, T::DTYPE, reduction, &x, out) }
}

/// [`reduce()`] over device pointers.
///
/// # Errors
/// As [`reduce()`].
///
/// # Safety
/// On `stream`, until it has passed this launch: `x` must be an address in the device's memory at which the tensor of its
/// shape, strides and `dtype` lies, initialised, and `out` one of as many `f32` as the reduction gives; nobody else may write
/// `x`, nor touch `out`; they must not overlap.
pub unsafe fn reduce_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    reduction: Reduction,
    x: &Strided<DevicePointer>,
    out: DevicePointer,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    check_pointer(OP, "out", out, size_of::<f32>())?;

    let [batch, tokens, width] = x.shape;
    let wide = x.wide(dtype);
    let narrow = usize::from(!wide);
    let kernels = &device.kernels().reduce;
    let segments = width.div_ceil(columns_a_block(dtype, wide));
    let long = width > WARP_ROW;
    // Blocks of so many images, and the kernel.
    let (kernel, blocks): (_, Box<dyn Fn(usize) -> usize>) = match reduction {
        Reduction::ColumnMean => (&kernels.columns[narrow], Box::new(|images| images * segments)),
        Reduction::RowSum | Reduction::RowMax => {
            let rows_a_block = if long { 1 } else { ITEM_THREADS / 32 };
            let kernel =
                &kernels.rows[usize::from(reduction == Reduction::RowMax)][usize::from(long)][narrow];
            (kernel, Box::new(move |images| (images * tokens).div_ceil(rows_a_block)))
        }
    };
    let mut params = Params {
        x: 0,
        out: 0,
        strides: x.kernel_strides(),
        rows: 0,
        tokens: length(OP, "rows", tokens)?,
        width: length(OP, "values a row", width)?,
        segments: int(OP, "blocks an image", segments)?,
    };
    let results = reduction.results(x.shape);
    let together = images_a_launch(OP, tokens.max(segments))?;
    for first in (0..batch).step_by(together) {
        let images = together.min(batch - first);
        params.x = x.image(first, dtype);
        params.out = out + (first * results * size_of::<f32>()) as u64;
        params.rows = int(OP, "rows", images * tokens)?;
        let shape = Shape { grid: blocks(images) as u32, block: ITEM_THREADS as u32, shared_bytes: 0 };
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel.pick(dtype), shape, &params) }?;
    }
    Ok(())
}
