//! `DynamicViT`'s predictor of who is kept (kernels/predictor.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr, SyncOnDrop};

use super::{
    DType, Device, DevicePointer, Element, PlanPointers, Strided,
    borrow::Borrow,
    image::{Kernel, Module, TypedKernels},
    launch::{Grid, int, launch_grid},
    nvtx,
    select::Selection,
    strided::{WIDE_BYTES, check_pointer, is_wide},
};
use crate::{
    Error, Result,
    backend::{Linear, Norm, Predictor},
};

const OP: &str = "keep_scores";

/// The widest tokens: a tile of the middle layer stays in shared memory.
pub const MOST_WIDTH: usize = 1024;

/// The most tokens of an image, special ones included, among which the second kernel selects.
pub const MOST_SELECTED: usize = 512;

/// Tokens of a block of each kernel, and columns of a tile.
const HIDDEN_ROWS: usize = 64;
const SCORE_ROWS: usize = 32;
const COLUMNS: usize = 64;
const THREADS: u32 = 128;
/// Two steps of 32 and of 64 rows of 128 bytes and 16 more.
const BUFFER_BYTES: usize = 2 * (SCORE_ROWS + COLUMNS) * (128 + WIDE_BYTES);

/// `HiddenParams` of kernels/predictor.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct HiddenParams {
    x: DevicePointer,
    norm_weight: DevicePointer,
    norm_bias: DevicePointer,
    weight: DevicePointer,
    bias: DevicePointer,
    local: DevicePointer,
    partial: DevicePointer,
    strides: [i64; 2],
    tokens: i32,
    width: i32,
    tiles: i32,
    eps: f32,
}

const _: () = assert!(
    size_of::<HiddenParams>() == 88
        && std::mem::offset_of!(HiddenParams, strides) == 56
        && std::mem::offset_of!(HiddenParams, tokens) == 72
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for HiddenParams {}

/// `ScoreParams` of kernels/predictor.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct ScoreParams {
    local: DevicePointer,
    partial: DevicePointer,
    /// Weight and bias of the first, second and last layer.
    layers: [[DevicePointer; 2]; 3],
    scores: DevicePointer,
    /// The plan's offsets, members, weights and groups, and the counters of arrivals.
    plan: [DevicePointer; 5],
    tokens: i32,
    width: i32,
    tiles: i32,
    special: i32,
    keep: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<ScoreParams>() == 136
        && std::mem::offset_of!(ScoreParams, scores) == 64
        && std::mem::offset_of!(ScoreParams, tokens) == 112
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for ScoreParams {}

/// The kernels of kernels/predictor.cu, with 16-byte accesses and with narrow ones.
#[derive(Debug)]
pub(super) struct PredictorKernels {
    hidden: [TypedKernels; 2],
    score: [TypedKernels; 2],
}

impl PredictorKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            hidden: TypedKernels::wide_and_narrow(module, "fv_predictor_hidden", "")?,
            score: TypedKernels::wide_and_narrow(module, "fv_predictor_score", "")?,
        })
    }

    /// The kernels with dynamic shared memory, and the most they are launched with.
    pub(super) fn dynamic(&self) -> impl Iterator<Item = (&Kernel, usize)> {
        let types = [DType::F32, DType::F16, DType::Bf16];
        let kernels = self.score.iter().flat_map(TypedKernels::all);
        kernels.zip(types.into_iter().cycle()).map(|(kernel, dtype)| (kernel, score_bytes(dtype, MOST_WIDTH)))
    }
}

/// Dynamic shared memory of the second kernel: the products' steps, the means, a tile of the first layer's outputs.
fn score_bytes(dtype: DType, width: usize) -> usize {
    let half = width / 2;
    let means = (width - half).div_ceil(4) * WIDE_BYTES;
    BUFFER_BYTES + means + SCORE_ROWS * (half.next_multiple_of(COLUMNS) * dtype.bytes() + WIDE_BYTES)
}

/// How much memory the operation wants between its two launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchExtents {
    /// Values of the tokens' type.
    pub local: usize,
    /// Values of `f32`.
    pub partial: usize,
}

impl ScratchExtents {
    /// For `batch` images of `tokens` tokens of `width` values, special ones left out.
    pub fn new(batch: usize, tokens: usize, width: usize) -> Self {
        let half = width / 2;
        Self {
            local: batch.saturating_mul(tokens).saturating_mul(half),
            partial: batch.saturating_mul(tokens.div_ceil(HIDDEN_ROWS)).saturating_mul(width - half),
        }
    }
}

/// Memory between the two launches, of [`ScratchExtents`], and of any content.
#[derive(Debug)]
pub struct Scratch<'a, T> {
    /// In the tokens' type.
    pub local: CudaViewMut<'a, T>,
    /// In `f32`.
    pub partial: CudaViewMut<'a, f32>,
}

/// What [`keep_scores_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct KeepScores {
    /// The tokens, (B, N, C).
    pub x: Strided<DevicePointer>,
    /// The weights.
    pub predictor: Predictor<DevicePointer>,
    /// Tokens at the front that are not looked at and get 0.
    pub special: usize,
    /// Room for [`ScratchExtents::local`] values of the tokens' type, 16-byte aligned.
    pub local: DevicePointer,
    /// Room for [`ScratchExtents::partial`] values of `f32`.
    pub partial: DevicePointer,
    /// Where the scores go, (B, N) of `f32`.
    pub scores: DevicePointer,
    /// Who is to be kept by them.
    pub keep: Option<KeepPlan>,
}

/// A selection by the scores in the launch that computes them, of up to [`MOST_SELECTED`] tokens: what
/// [`select`](super::select::select) would select, nobody fused.
#[derive(Clone, Copy, Debug)]
pub struct KeepPlan {
    /// Tokens to keep beside the special ones.
    pub keep: usize,
    /// The plan, from N to `special + keep` tokens.
    pub plan: PlanPointers,
    /// (B) `u32`: 0 before the launch, and 0 again after it.
    pub arrived: DevicePointer,
}

/// The logarithm of the probability with which each token of `x` (B, N, C) is to be kept, from token `special` on, into
/// `scores` (B, N); the tokens before it get 0. Two launches; `scratch` holds what passes between them.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, all tokens are special, C is below 4 or above [`MOST_WIDTH`], or an argument
/// lives in another context; [`Error::Launch`] when the driver refuses.
pub fn keep_scores<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    predictor: &Predictor<CudaView<'_, T>>,
    special: usize,
    scratch: &mut Scratch<'_, T>,
    scores: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let [batch, tokens, c] = x.shape;
    let (x, _x) = borrow.read("x", x)?;
    let (norm, _norm) = borrow.read_norm(&predictor.norm, c)?;
    let (hidden, _hidden) = read_linear(borrow, "the hidden", &predictor.hidden, [c, c])?;
    let (first, _first) = read_linear(borrow, "the first", &predictor.first, [c / 2, c])?;
    let (second, _second) = read_linear(borrow, "the second", &predictor.second, [c / 4, c / 2])?;
    let (last, _last) = read_linear(borrow, "the last", &predictor.last, [2, c / 4])?;
    let predictor = Predictor { norm, hidden, first, second, last };
    let extents = ScratchExtents::new(batch, tokens.saturating_sub(special), c);
    let (local, _local) = borrow.write_row("scratch", &mut scratch.local, extents.local)?;
    let (partial, _partial) = borrow.write_row("scratch", &mut scratch.partial, extents.partial)?;
    let (scores, _scores) = borrow.write_row("scores", scores, batch.saturating_mul(tokens))?;
    let arguments = KeepScores { x, predictor, special, local, partial, scores, keep: None };
    // SAFETY: every tensor lies within its view, or has as many values (checked above), and lives in the device's context;
    // what is written is borrowed mutably, so it is none of the others.
    unsafe { keep_scores_raw(device, stream, T::DTYPE, &arguments) }
}

/// A layer's weight and bias, and their guards.
fn read_linear<'a, T>(
    borrow: Borrow<'a>,
    name: &str,
    layer: &'a Linear<CudaView<'_, T>>,
    [outputs, inputs]: [usize; 2],
) -> Result<(Linear<DevicePointer>, [Option<SyncOnDrop<'a>>; 2])> {
    let named = |part: &str| format!("{name} layer's {part}");
    let (weight, weight_guard) =
        borrow.read_row(&named("weight"), &layer.weight, outputs.saturating_mul(inputs))?;
    let bias = layer.bias.as_ref().map(|bias| borrow.read_row(&named("bias"), bias, outputs)).transpose()?;
    let (bias, bias_guard) = bias.unzip();
    Ok((Linear { weight, bias }, [Some(weight_guard), bias_guard]))
}

/// [`keep_scores`] over device pointers.
///
/// # Errors
/// As [`keep_scores`].
///
/// # Safety
/// On `stream`, until it has passed these launches: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read; nobody else may write what is read, nor touch
/// what is written; nothing that is written may overlap anything else.
pub unsafe fn keep_scores_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &KeepScores,
) -> Result<()> {
    let KeepScores { x, predictor, special, local, partial, scores, keep } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    let [batch, all, width] = x.shape;
    if *special >= all {
        return Err(Error::argument(
            OP,
            format!("{special} of {all} tokens are special: none is to be scored"),
        ));
    }
    if !(4..=MOST_WIDTH).contains(&width) {
        return Err(Error::argument(
            OP,
            format!("tokens of {width} values, the kernels take 4 to {MOST_WIDTH}"),
        ));
    }
    let Predictor { norm: Norm { weight: norm_weight, bias: norm_bias, eps }, hidden, .. } = predictor;
    let layers = [&predictor.first, &predictor.second, &predictor.last];
    let pointers = [Some(*norm_weight), *norm_bias, Some(hidden.weight), hidden.bias];
    let others = layers.into_iter().flat_map(|layer| [Some(layer.weight), layer.bias]);
    let mut wide = (width / 2 * dtype.bytes()).is_multiple_of(WIDE_BYTES) && is_wide(*local);
    for pointer in pointers.into_iter().chain(others).flatten() {
        check_pointer(OP, "a weight or bias", pointer, dtype.bytes())?;
        wide &= is_wide(pointer);
    }
    check_pointer(OP, "scratch", *local, dtype.bytes())?;
    check_pointer(OP, "scratch", *partial, 4)?;
    check_pointer(OP, "scores", *scores, 4)?;
    if let Some(keep) = keep {
        check_plan(keep, [batch, all], *special)?;
    }

    let patches = x.tokens(&(*special..all), dtype);
    wide &= patches.wide(dtype);
    let tokens = all - special;
    let tiles = tokens.div_ceil(HIDDEN_ROWS);
    let blocks =
        |tiles: usize| int(OP, "tiles of all images", batch.saturating_mul(tiles)).map(i32::unsigned_abs);
    let kernels = &device.kernels().predictor;
    let narrow = usize::from(!wide);
    let params = HiddenParams {
        x: patches.data,
        norm_weight: *norm_weight,
        norm_bias: norm_bias.unwrap_or(0),
        weight: hidden.weight,
        bias: hidden.bias.unwrap_or(0),
        local: *local,
        partial: *partial,
        strides: patches.kernel_strides(),
        tokens: int(OP, "tokens", tokens)?,
        width: int(OP, "values of a token", width)?,
        tiles: int(OP, "tiles", tiles)?,
        eps: *eps,
    };
    let columns = width.div_ceil(COLUMNS) as u32;
    let grid = Grid { blocks: [blocks(tiles)?, columns, 1], block: THREADS, shared_bytes: 0 };
    // SAFETY: `HiddenParams` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch_grid(stream, kernels.hidden[narrow].pick(dtype), grid, &params) }?;

    let params = ScoreParams {
        local: *local,
        partial: *partial,
        layers: layers.map(|layer| [layer.weight, layer.bias.unwrap_or(0)]),
        scores: *scores,
        plan: keep.map_or([0; 5], |KeepPlan { plan, arrived, .. }| {
            [plan.offsets, plan.members, plan.weights, plan.groups, arrived]
        }),
        tokens: params.tokens,
        width: params.width,
        tiles: params.tiles,
        special: int(OP, "special tokens", *special)?,
        keep: int(OP, "tokens to keep", keep.map_or(0, |keep| keep.keep))?,
        reserved: 0,
    };
    let shared_bytes = score_bytes(dtype, width) as u32;
    let grid = Grid { blocks: [blocks(tokens.div_ceil(SCORE_ROWS))?, 1, 1], block: THREADS, shared_bytes };
    // SAFETY: as above, for `ScoreParams`; what it reads of the first launch's has been written by then.
    unsafe { launch_grid(stream, kernels.score[narrow].pick(dtype), grid, &params) }
}

/// Checks a selection among `all` tokens.
fn check_plan(keep: &KeepPlan, [batch, all]: [usize; 2], special: usize) -> Result<()> {
    let &KeepPlan { keep, plan, arrived } = keep;
    if all > MOST_SELECTED {
        return Err(Error::argument(
            OP,
            format!("{all} tokens, at most {MOST_SELECTED} are selected among on the way"),
        ));
    }
    let left = Selection { special, keep, fuse: false }.tokens_out(all)?;
    plan.check(OP, "plan")?;
    if (plan.batch, plan.tokens_in, plan.tokens_out) != (batch, all, left) {
        return Err(Error::argument(
            OP,
            format!(
                "the plan holds {} images of {} tokens that become {}, expected {batch} of {all} that become {left}",
                plan.batch, plan.tokens_in, plan.tokens_out
            ),
        ));
    }
    check_pointer(OP, "arrived", arrived, 4)
}
