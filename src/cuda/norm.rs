//! Residual addition and LayerNorm in one pass (kernels/norm.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::RowTypes,
    launch::{Shape, int, launch, rows},
    nvtx,
    strided::{check_pointer, is_wide},
};
#[cfg(doc)]
use crate::Error;
use crate::{Result, backend::Norm};

const OP: &str = "layer_norm";

/// `NormParams` of kernels/norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    residual: DevicePointer,
    weight: DevicePointer,
    bias: DevicePointer,
    sum: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    residual_strides: [i64; 2],
    sum_strides: [i64; 2],
    out_strides: [i64; 2],
    rows: i32,
    tokens: i32,
    width: i32,
    eps: f32,
}

const _: () = assert!(
    size_of::<Params>() == 128
        && std::mem::offset_of!(Params, x_strides) == 48
        && std::mem::offset_of!(Params, rows) == 112
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// What [`layer_norm_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// The rows, (B, N, C).
    pub x: Strided<DevicePointer>,
    /// Added to `x`, (B, N, C).
    pub residual: Option<Strided<DevicePointer>>,
    /// Where `x + residual` goes, (B, N, C). May be `x` or `residual` itself, with the same strides.
    pub sum: Option<Strided<DevicePointer>>,
    /// Weight and bias, (C) each.
    pub norm: Norm<DevicePointer>,
    /// Where the normalised rows go, (B, N, C).
    pub out: Strided<DevicePointer>,
}

/// LayerNorm of tokens `x` (B, N, C) into `out` (B, N, C), of one type, or from `f32` to 16 bits.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, `C` exceeds 4,096, or an argument lives in another context;
/// [`Error::Launch`] when the driver refuses.
pub fn layer_norm<T: Element, O: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    norm: &Norm<CudaView<'_, O>>,
    out: &mut Strided<CudaViewMut<'_, O>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (norm, _norm) = borrow.read_norm(norm, x.shape[2])?;
    let (out, _out) = borrow.write("out", out)?;
    let arguments = LayerNorm { x, residual: None, sum: None, norm, out };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; `out` is borrowed mutably, so it is none of the others.
    unsafe { layer_norm_raw(device, stream, RowTypes { rows: T::DTYPE, normed: O::DTYPE }, &arguments) }
}

/// The residual connection and the LayerNorm that follows: `x` (B, N, C) becomes `x + residual`, rounded to its type, and
/// `out` (B, N, C) the LayerNorm of that.
///
/// # Errors
/// As [`layer_norm`].
pub fn add_layer_norm<T: Element, O: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &mut Strided<CudaViewMut<'_, T>>,
    residual: &Strided<CudaView<'_, T>>,
    norm: &Norm<CudaView<'_, O>>,
    out: &mut Strided<CudaViewMut<'_, O>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (x, _x) = borrow.write("x", x)?;
    let (residual, _residual) = borrow.read("residual", residual)?;
    let (norm, _norm) = borrow.read_norm(norm, x.shape[2])?;
    let (out, _out) = borrow.write("out", out)?;
    let arguments = LayerNorm { x, residual: Some(residual), sum: Some(x), norm, out };
    // SAFETY: as in `layer_norm`; `x` is borrowed mutably as well, and the kernel allows its sum to be `x` itself.
    unsafe { layer_norm_raw(device, stream, RowTypes { rows: T::DTYPE, normed: O::DTYPE }, &arguments) }
}

/// [`layer_norm`] and [`add_layer_norm`] over device pointers.
///
/// # Errors
/// As [`layer_norm`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read; nobody else may write what is read, nor
/// touch what is written; `out` must not overlap any other tensor, `sum` none but `x` or `residual` with the same
/// address and strides.
pub unsafe fn layer_norm_raw(
    device: &Device,
    stream: &CudaStream,
    types: impl Into<RowTypes>,
    arguments: &LayerNorm,
) -> Result<()> {
    let types @ RowTypes { rows: dtype, normed } = types.into();
    let LayerNorm { x, residual, sum, norm, out } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    out.check_output(OP, "out", normed)?;
    out.expect_shape(OP, "out", x.shape)?;
    if let Some(residual) = residual {
        residual.check(OP, "residual", dtype)?;
        residual.expect_shape(OP, "residual", x.shape)?;
    }
    if let Some(sum) = sum {
        sum.check_output(OP, "sum", dtype)?;
        sum.expect_shape(OP, "sum", x.shape)?;
    }
    check_pointer(OP, "weight", norm.weight, normed.bytes())?;
    norm.bias.map_or(Ok(()), |bias| check_pointer(OP, "bias", bias, normed.bytes()))?;

    let [images, tokens, width] = x.shape;
    let tensors = [Some(x), residual.as_ref(), sum.as_ref()];
    let wide = tensors.into_iter().flatten().all(|tensor| tensor.wide(dtype))
        && out.wide(normed)
        && is_wide(norm.weight)
        && norm.bias.is_none_or(is_wide);
    let (kernel, row) = device.kernels().layer_norm.pick(OP, types, width, wide)?;
    let rows = rows(OP, images, tokens)?;
    let strides = |tensor: &Option<Strided<DevicePointer>>| tensor.map_or([0; 2], |t| t.kernel_strides());
    let params = Params {
        x: x.data,
        residual: residual.map_or(0, |residual| residual.data),
        weight: norm.weight,
        bias: norm.bias.unwrap_or(0),
        sum: sum.map_or(0, |sum| sum.data),
        out: out.data,
        x_strides: x.kernel_strides(),
        residual_strides: strides(residual),
        sum_strides: strides(sum),
        out_strides: out.kernel_strides(),
        rows,
        tokens: int(OP, "tokens", tokens)?,
        width: int(OP, "values a row", width)?,
        eps: norm.eps,
    };
    let shape =
        Shape { grid: rows.unsigned_abs().div_ceil(row.rows()), block: row.threads(), shared_bytes: 0 };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, kernel, shape, &params) }
}
