//! Some tokens of every image, the mean of the others, and their largest values (kernels/tokens.cu).

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{CopyKernels, Module, TypedKernels},
    launch::{Divisor, ITEM_THREADS, Shape, images_a_launch, int, item_shape, launch, length},
    nvtx,
    strided::{WIDE_BYTES, check_pointer},
};
use crate::{Error, Result};

const TOKENS: &str = "tokens";
const MEAN: &str = "mean_tokens";
const MAX: &str = "max_tokens";

/// `CopyParams` of kernels/tokens.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct CopyParams {
    x: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    units: Divisor,
    tokens: Divisor,
    items: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<CopyParams>() == 80
        && std::mem::offset_of!(CopyParams, x_strides) == 16
        && std::mem::offset_of!(CopyParams, units) == 48
        && std::mem::offset_of!(CopyParams, items) == 72
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for CopyParams {}

/// `MeanParams` of kernels/tokens.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct MeanParams {
    x: DevicePointer,
    sizes: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_stride: i64,
    sizes_stride: i64,
    tokens: i32,
    width: i32,
    segments: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<MeanParams>() == 72
        && std::mem::offset_of!(MeanParams, x_strides) == 24
        && std::mem::offset_of!(MeanParams, tokens) == 56
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for MeanParams {}

/// The kernels of kernels/tokens.cu.
#[derive(Debug)]
pub(super) struct TokenKernels {
    copy: CopyKernels,
    mean: [TypedKernels; 2],
    max: [TypedKernels; 2],
}

impl TokenKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            copy: CopyKernels::load(module, "fv_tokens")?,
            mean: TypedKernels::wide_and_narrow(module, "fv_mean_tokens", "")?,
            max: TypedKernels::wide_and_narrow(module, "fv_max_tokens", "")?,
        })
    }
}

/// Columns that a block of kernels/include/column.cuh sums: 128 bytes of a row, or 32 values.
pub(super) fn columns_a_block(dtype: DType, wide: bool) -> usize {
    if wide { 8 * WIDE_BYTES / dtype.bytes() } else { 32 }
}

/// Copies rows `range` of every image, `x` (B, N, C), to `out` (B, range, C).
///
/// # Errors
/// [`Error::Argument`] when the range is empty or not among the tokens, shapes do not fit, or an argument lives in another
/// context; [`Error::Launch`] when the driver refuses.
pub fn tokens<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    range: Range<usize>,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: TOKENS, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (out, _out) = borrow.write("out", out)?;
    // SAFETY: both tensors lie within their views (checked above), which live in the device's context and whose guards
    // outlive the launch; `out` is borrowed mutably, so it is not `x`.
    unsafe { tokens_raw(device, stream, T::DTYPE, &x, range, &out) }
}

/// [`tokens()`] over device pointers.
///
/// # Errors
/// As [`tokens()`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both pointers must be addresses in the device's memory at which the tensors
/// of their shapes, strides and `dtype` lie, `x` initialised; nobody else may write `x`, nor touch `out`; they must not
/// overlap.
pub unsafe fn tokens_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: &Strided<DevicePointer>,
    range: Range<usize>,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(TOKENS);
    device.check_stream(TOKENS, stream)?;
    x.check(TOKENS, "x", dtype)?;
    let [batch, n, width] = x.shape;
    if range.start >= range.end || range.end > n {
        return Err(Error::argument(
            TOKENS,
            format!("tokens {range:?} are not among {n}; name one token at least"),
        ));
    }
    out.check_output(TOKENS, "out", dtype)?;
    out.expect_shape(TOKENS, "out", [batch, range.len(), width])?;

    let x = x.tokens(&range, dtype);
    let access = x.access(dtype).min(out.access(dtype));
    let units = width * dtype.bytes() / access;
    let strides = |tensor: &Strided<DevicePointer>| {
        let units = |stride: usize| i64::try_from(stride * dtype.bytes() / access).unwrap_or(i64::MAX);
        tensor.strides.map(units)
    };
    let mut params = CopyParams {
        x_strides: strides(&x),
        out_strides: strides(out),
        units: Divisor::new(TOKENS, "accesses a token", units)?,
        tokens: Divisor::new(TOKENS, "tokens", range.len())?,
        ..CopyParams::zeroed()
    };
    let kernel = device.kernels().tokens.copy.pick(access);
    let items = range.len().saturating_mul(units);
    let together = images_a_launch(TOKENS, items)?;
    for first in (0..batch).step_by(together) {
        let items = items * together.min(batch - first);
        params.x = x.image(first, dtype);
        params.out = out.image(first, dtype);
        params.items = int(TOKENS, "accesses", items)?;
        // SAFETY: `CopyParams` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(items), &params) }?;
    }
    Ok(())
}

/// The mean of the tokens of `x` (B, N, C) from `first` on, weighted by `sizes` (B, N) if given, to `out` (B, 1, C).
///
/// # Errors
/// [`Error::Argument`] when no tokens are left, shapes do not fit, or an argument lives in another context;
/// [`Error::Launch`] when the driver refuses.
pub fn mean_tokens<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    sizes: Option<&CudaView<'_, f32>>,
    first: usize,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    Columns::MEAN.run_views(device, stream, x, sizes, first, out)
}

/// [`mean_tokens`] over device pointers.
///
/// # Errors
/// As [`mean_tokens`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies (`sizes` without gaps), initialised where it is read; nobody else may write
/// what is read, nor touch `out`, which must not overlap the others.
pub unsafe fn mean_tokens_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: &Strided<DevicePointer>,
    sizes: Option<DevicePointer>,
    first: usize,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    // SAFETY: the caller's promise is the same.
    unsafe { Columns::MEAN.run(device, stream, dtype, x, sizes, first, out) }
}

/// The largest value of each column over the tokens of `x` (B, N, C) from `first` on, to `out` (B, 1, C). Tokens whose entry of
/// `sizes` (B, N) is 0 do not count; where none counts it is 0. A NaN among those that count is the result.
///
/// # Errors
/// As [`mean_tokens`].
pub fn max_tokens<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    sizes: Option<&CudaView<'_, f32>>,
    first: usize,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    Columns::MAX.run_views(device, stream, x, sizes, first, out)
}

/// [`max_tokens`] over device pointers.
///
/// # Errors
/// As [`mean_tokens`].
///
/// # Safety
/// As [`mean_tokens_raw`].
pub unsafe fn max_tokens_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: &Strided<DevicePointer>,
    sizes: Option<DevicePointer>,
    first: usize,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    // SAFETY: the caller's promise is the same.
    unsafe { Columns::MAX.run(device, stream, dtype, x, sizes, first, out) }
}

/// What goes down the columns of tokens.
#[derive(Clone, Copy)]
struct Columns {
    op: &'static str,
    kernels: fn(&TokenKernels) -> &[TypedKernels; 2],
}

impl Columns {
    const MEAN: Self = Self { op: MEAN, kernels: |kernels| &kernels.mean };
    const MAX: Self = Self { op: MAX, kernels: |kernels| &kernels.max };

    fn run_views<T: Element>(
        self,
        device: &Device,
        stream: &CudaStream,
        x: &Strided<CudaView<'_, T>>,
        sizes: Option<&CudaView<'_, f32>>,
        first: usize,
        out: &mut Strided<CudaViewMut<'_, T>>,
    ) -> Result<()> {
        let borrow = Borrow { op: self.op, device, stream };
        let count = x.shape[0].saturating_mul(x.shape[1]);
        let (x, _x) = borrow.read("x", x)?;
        let sizes = sizes.map(|sizes| borrow.read_row("sizes", sizes, count)).transpose()?;
        let (out, _out) = borrow.write("out", out)?;
        let sizes = sizes.as_ref().map(|sizes| sizes.0);
        // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
        // outlives the launch; `out` is borrowed mutably, so it is none of the others.
        unsafe { self.run(device, stream, T::DTYPE, &x, sizes, first, &out) }
    }

    /// # Safety
    /// As [`mean_tokens_raw`].
    #[expect(clippy::too_many_arguments, reason = "those of the operations")]
    unsafe fn run(
        self,
        device: &Device,
        stream: &CudaStream,
        dtype: DType,
        x: &Strided<DevicePointer>,
        sizes: Option<DevicePointer>,
        first: usize,
        out: &Strided<DevicePointer>,
    ) -> Result<()> {
        let op = self.op;
        let _range = nvtx::range(op);
        device.check_stream(op, stream)?;
        x.check(op, "x", dtype)?;
        let [batch, n, width] = x.shape;
        if first >= n {
            return Err(Error::argument(op, format!("no tokens are left from {first} on, of {n}")));
        }
        sizes.map_or(Ok(()), |sizes| check_pointer(op, "sizes", sizes, size_of::<f32>()))?;
        out.check_output(op, "out", dtype)?;
        out.expect_shape(op, "out", [batch, 1, width])?;

        let rest = x.tokens(&(first..n), dtype);
        let wide = rest.wide(dtype);
        let segments = width.div_ceil(columns_a_block(dtype, wide));
        let blocks = int(op, "blocks", batch.saturating_mul(segments))?;
        let params = MeanParams {
            x: rest.data,
            sizes: sizes.map_or(0, |sizes| sizes + (first * size_of::<f32>()) as u64),
            out: out.data,
            x_strides: rest.kernel_strides(),
            out_stride: out.kernel_strides()[0],
            sizes_stride: i64::try_from(n).unwrap_or(i64::MAX),
            tokens: length(op, "tokens", n - first)?,
            width: int(op, "values a token", width)?,
            segments: int(op, "blocks an image", segments)?,
            reserved: 0,
        };
        let shape = Shape { grid: blocks.unsigned_abs(), block: ITEM_THREADS as u32, shared_bytes: 0 };
        let kernel = (self.kernels)(&device.kernels().tokens)[usize::from(!wide)].pick(dtype);
        // SAFETY: `MeanParams` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, shape, &params) }
    }
}
