//! A linear score of every token (kernels/score.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{Shape, int, launch, length, rows},
    nvtx,
    strided::{check_pointer, is_wide},
};
#[cfg(doc)]
use crate::Error;
use crate::{Result, backend::Linear};

const OP: &str = "token_scores";

/// Tokens of a block, and its threads.
const ROWS: u32 = 4;
const THREADS: u32 = 128;

/// `ScoreParams` of kernels/score.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    weight: DevicePointer,
    bias: DevicePointer,
    noise: DevicePointer,
    scores: DevicePointer,
    strides: [i64; 2],
    rows: i32,
    tokens: i32,
    width: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 72
        && std::mem::offset_of!(Params, strides) == 40
        && std::mem::offset_of!(Params, rows) == 56
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/score.cu, with 16-byte accesses and with narrow ones.
#[derive(Debug)]
pub(super) struct ScoreKernels([TypedKernels; 2]);

impl ScoreKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self(TypedKernels::wide_and_narrow(module, "fv_token_score", "")?))
    }
}

/// What [`token_scores_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct TokenScores {
    /// The tokens, (B, N, C).
    pub x: Strided<DevicePointer>,
    /// Weight (1, C) and bias (1).
    pub selector: Linear<DevicePointer>,
    /// Added to the scores, (B, N) of `f32`.
    pub noise: Option<DevicePointer>,
    /// Where the scores go, (B, N) of `f32`.
    pub scores: DevicePointer,
}

/// The score of each token of `x` (B, N, C) by a linear selector (weight (C), bias (1)), plus `noise` (B, N) if there is any,
/// into `scores` (B, N).
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn token_scores<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    selector: &Linear<CudaView<'_, T>>,
    noise: Option<&CudaView<'_, f32>>,
    scores: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let [batch, tokens, width] = x.shape;
    let count = batch.saturating_mul(tokens);
    let (x, _x) = borrow.read("x", x)?;
    let (weight, _weight) = borrow.read_row("weight", &selector.weight, width)?;
    let bias = selector.bias.as_ref().map(|bias| borrow.read_row("bias", bias, 1)).transpose()?;
    let (bias, _bias) = bias.unzip();
    let noise = noise.map(|noise| borrow.read_row("noise", noise, count)).transpose()?;
    let (noise, _noise) = noise.unzip();
    let (scores, _scores) = borrow.write_row("scores", scores, count)?;
    let arguments = TokenScores { x, selector: Linear { weight, bias }, noise, scores };
    // SAFETY: every tensor lies within its view, or has as many values (checked above), and lives in the device's context,
    // whose guard outlives the launch; `scores` is borrowed mutably, so it is none of the others.
    unsafe { token_scores_raw(device, stream, T::DTYPE, &arguments) }
}

/// [`token_scores`] over device pointers.
///
/// # Errors
/// As [`token_scores`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the tensor
/// of its shape, strides and type lies, initialised where it is read; nobody else may write what is read, nor touch the
/// scores, which overlap nothing else.
pub unsafe fn token_scores_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &TokenScores,
) -> Result<()> {
    let TokenScores { x, selector, noise, scores } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    check_pointer(OP, "weight", selector.weight, dtype.bytes())?;
    selector.bias.map_or(Ok(()), |bias| check_pointer(OP, "bias", bias, dtype.bytes()))?;
    noise.map_or(Ok(()), |noise| check_pointer(OP, "noise", noise, 4))?;
    check_pointer(OP, "scores", *scores, 4)?;
    let [images, tokens, width] = x.shape;
    let rows = rows(OP, images, tokens)?;
    let params = Params {
        x: x.data,
        weight: selector.weight,
        bias: selector.bias.unwrap_or(0),
        noise: noise.unwrap_or(0),
        scores: *scores,
        strides: x.kernel_strides(),
        rows,
        tokens: int(OP, "tokens", tokens)?,
        width: length(OP, "values of a token", width)?,
        reserved: 0,
    };
    let narrow = usize::from(!(x.wide(dtype) && is_wide(selector.weight)));
    let shape = Shape { grid: rows.unsigned_abs().div_ceil(ROWS), block: THREADS, shared_bytes: 0 };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, device.kernels().score.0[narrow].pick(dtype), shape, &params) }
}
