//! Norms of feature maps (`kernels/grid_norm.cu`).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtrMut, DeviceRepr, DeviceSlice};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, RowKernels, TypedKernels},
    launch::{Divisor, Shape, int, launch, rows},
    nvtx,
    strided::{WIDE_BYTES, check_pointer, is_wide},
};
use crate::{
    Error, Result,
    backend::{Norm, NormOver},
};

const OP: &str = "grid_norm";

/// Values and threads of a block.
const CHUNK: usize = 4096;
const THREADS: u32 = 256;

/// `GridNormParams` of `kernels/grid_norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    weight: DevicePointer,
    bias: DevicePointer,
    moments: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    units: Divisor,
    chunks: Divisor,
    accesses: i32,
    rows: i32,
    tokens: i32,
    width: i32,
    eps: f32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 120
        && std::mem::offset_of!(Params, x_strides) == 40
        && std::mem::offset_of!(Params, units) == 72
        && std::mem::offset_of!(Params, accesses) == 96
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of `kernels/grid_norm.cu`.
#[derive(Debug)]
pub(super) struct GridNormKernels {
    moments: [TypedKernels; 2],
    apply: [TypedKernels; 2],
    position: RowKernels,
}

impl GridNormKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            moments: TypedKernels::wide_and_narrow(module, "fv_image_moments", "")?,
            apply: TypedKernels::wide_and_narrow(module, "fv_image_norm", "")?,
            position: RowKernels::load(module, "fv_position_norm")?,
        })
    }
}

/// What [`grid_norm_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct GridNorm {
    /// The feature map, (B, N, C).
    pub x: Strided<DevicePointer>,
    /// Over what its statistics go.
    pub over: NormOver,
    /// Weight and bias, (C) each.
    pub norm: Norm<DevicePointer>,
    /// Where the result goes, (B, N, C).
    pub out: Strided<DevicePointer>,
    /// [`moments_length`] values of scratch memory, a multiple of 8; 0 without any.
    pub moments: DevicePointer,
    /// How many there are.
    pub moments_length: usize,
}

/// Values of scratch memory that a norm of (B, N, C) over whole images needs; the others need none.
pub fn moments_length(shape: [usize; 3]) -> usize {
    let [batch, tokens, width] = shape;
    tokens.saturating_mul(width).div_ceil(CHUNK).saturating_mul(batch).saturating_mul(2)
}

/// A norm of the feature maps `x` (B, N, C) into `out` (B, N, C), as
/// [`GridBackend::grid_norm`](crate::backend::GridBackend::grid_norm) says. Over images: two launches, with the moments of
/// parts in `moments` ([`moments_length`]).
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, an image has 2^31 values or more, `C` exceeds 4,096 for a norm over positions,
/// `moments` is too small, or an argument lives in another context; [`Error::Launch`] when the driver refuses.
pub fn grid_norm<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    over: NormOver,
    norm: &Norm<CudaView<'_, T>>,
    out: &mut Strided<CudaViewMut<'_, T>>,
    moments: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (norm, _norm) = borrow.read_norm(norm, x.shape[2])?;
    let (out, _out) = borrow.write("out", out)?;
    device.check_context(OP, "moments", moments.stream().context())?;
    let moments_length = moments.len();
    let (scratch, _scratch) = moments.device_ptr_mut(stream);
    let moments = if moments_length == 0 { 0 } else { scratch };
    let arguments = GridNorm { x, over, norm, out, moments, moments_length };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launches; `out` and `moments` are borrowed mutably, so they are none of the others.
    unsafe { grid_norm_raw(device, stream, T::DTYPE, &arguments) }
}

/// [`grid_norm`] over device pointers.
///
/// # Errors
/// As [`grid_norm`].
///
/// # Safety
/// On `stream`, until it has passed these launches: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and `dtype` lies, initialised where it is read; nobody else may write what is read, nor touch
/// `out` and `moments`, which must overlap no other tensor.
pub unsafe fn grid_norm_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &GridNorm,
) -> Result<()> {
    let GridNorm { x, over, norm, out, moments, moments_length: held } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    out.check_output(OP, "out", dtype)?;
    out.expect_shape(OP, "out", x.shape)?;
    check_pointer(OP, "weight", norm.weight, dtype.bytes())?;
    norm.bias.map_or(Ok(()), |bias| check_pointer(OP, "bias", bias, dtype.bytes()))?;

    let [images, tokens, width] = x.shape;
    let wide = x.wide(dtype) && out.wide(dtype) && is_wide(norm.weight) && norm.bias.is_none_or(is_wide);
    let params = Params {
        x: x.data,
        weight: norm.weight,
        bias: norm.bias.unwrap_or(0),
        out: out.data,
        x_strides: x.kernel_strides(),
        out_strides: out.kernel_strides(),
        tokens: int(OP, "tokens", tokens)?,
        width: int(OP, "values a row", width)?,
        eps: norm.eps,
        ..Params::zeroed()
    };
    let kernels = &device.kernels().grid_norm;
    if *over == NormOver::Position {
        let (kernel, row) = kernels.position.pick(OP, dtype, width, wide)?;
        let rows = rows(OP, images, tokens)?;
        let params = Params { rows, ..params };
        let grid = rows.unsigned_abs().div_ceil(row.rows());
        let shape = Shape { grid, block: row.threads(), shared_bytes: 0 };
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        return unsafe { launch(stream, kernel, shape, &params) };
    }
    let values = tokens.saturating_mul(width);
    // The last block counts up to a chunk too many.
    int(OP, "values an image", values.saturating_add(CHUNK))?;
    let units = if wide { width * dtype.bytes() / WIDE_BYTES } else { width };
    let chunks = values.div_ceil(CHUNK);
    let params = Params {
        units: Divisor::new(OP, "accesses a row", units)?,
        chunks: Divisor::new(OP, "chunks", chunks)?,
        accesses: int(OP, "accesses", tokens.saturating_mul(units))?,
        ..params
    };
    let grid = int(OP, "chunks", images.saturating_mul(chunks))?.unsigned_abs();
    let shape = Shape { grid, block: THREADS, shared_bytes: 0 };
    let apply = kernels.apply[usize::from(!wide)].pick(dtype);
    if *over == NormOver::Nothing {
        // SAFETY: as above.
        return unsafe { launch(stream, apply, shape, &params) };
    }
    let needed = moments_length(x.shape);
    if *held < needed {
        let what = format!("moments holds {held} values, {needed} are needed (`moments_length`)");
        return Err(Error::argument(OP, what));
    }
    check_pointer(OP, "moments", *moments, 8)?;
    let params = Params { moments: *moments, ..params };
    // SAFETY: as above.
    unsafe {
        launch(stream, kernels.moments[usize::from(!wide)].pick(dtype), shape, &params)?;
        launch(stream, apply, shape, &params)
    }
}
