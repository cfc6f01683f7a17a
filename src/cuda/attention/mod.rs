//! Attention with its scores (kernels/attention*.cu).
//!
//! `softmax(QKᵀ·scale + log size) V` of every head; the N×N map is never written. On the way, or by a second pass over the
//! keys, come the softmax rows of the first tokens (the class token's is what EViT ranks by), the attention that each
//! token receives (MCTF) and the logarithm of each row's sum.
//!
//! | type, head dimension, tokens | kernels | scores |
//! | --- | --- | --- |
//! | f16, bf16; 64; up to 272 | all keys resident, scores in registers, exact softmax | on the way, received attention to 208 tokens |
//! | f16, bf16; 32, 40, 48, 64, 72, 80, 96, 128; any | keys streamed, running softmax | second pass |
//! | f32; multiples of 8 up to 128; any | the same with fused multiply-adds | second pass |
//!
//! A second pass needs room for [`ScorePointers::log_sum_exp`]; [`needs_log_sum_exp`] tells when. Sums and softmax are `f32`;
//! probabilities are rounded to the storage type before they multiply values, as on any tensor core.

mod fold;
mod kernels;
mod params;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, SyncOnDrop};

pub use fold::{Fold, attention_folded, attention_folded_raw};
use kernels::Pass;
pub(super) use kernels::{AttentionKernels, permit_shared_memory, widened};
use params::{launch_scores, launch_values};

use super::{
    DType, Device, DevicePlan, DevicePointer, Element, PlanPointers, Strided, borrow::Borrow, nvtx,
    strided::check_pointer,
};
use crate::{Error, Result};

const OP: &str = "attention";

/// The most softmax rows that are handed out.
pub const MOST_CLASS_ROWS: usize = 8;

/// The most images of one launch.
const MOST_IMAGES: usize = 65_535;

/// Queries and keys of all heads.
#[derive(Debug)]
pub struct Attention<'a, T> {
    /// (B, N, H·D): head `h` in columns `h·D..(h+1)·D`. A view of packed rows with their strides needs no copy.
    pub q: Strided<CudaView<'a, T>>,
    /// (B, N, H·D).
    pub k: Strided<CudaView<'a, T>>,
    /// H.
    pub heads: usize,
    /// Multiplies the products of queries and keys; positive.
    pub scale: f32,
    /// Sizes of the tokens, (B, N): proportional attention adds their logarithm to the key's scores. A size of 0 hides a
    /// key.
    pub sizes: Option<CudaView<'a, f32>>,
    /// How a head's queries are spread over blocks.
    pub split: Split,
}

/// How a head's queries are spread over blocks, where all keys are resident.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// As many blocks as keep the device busy.
    #[default]
    Auto,
    /// As few as possible: every key and value is read once. For benches, and for devices shared with other work.
    Least,
}

/// Where the scores asked for go.
#[derive(Debug, Default)]
pub struct Scores<'a> {
    /// (B, H, R, N): the softmax rows of the first R ≤ [`MOST_CLASS_ROWS`] queries, and R. With R = 1, (B, H, N).
    pub class_rows: Option<(CudaViewMut<'a, f32>, usize)>,
    /// (B, H, N): the mean over queries of the map's columns.
    pub received: Option<CudaViewMut<'a, f32>>,
    /// (B, H, N): the logarithm of the sum of each row's exponentials; `-inf` for rows in which no key counts.
    pub log_sum_exp: Option<CudaViewMut<'a, f32>>,
}

/// What [`attention_raw`] reads and writes; the fields of [`Attention`] and [`Scores`], with values and output.
#[derive(Clone, Debug)]
pub struct AttentionPointers {
    /// (B, N, H·D).
    pub q: Strided<DevicePointer>,
    /// (B, N, H·D).
    pub k: Strided<DevicePointer>,
    /// Values (B, N, H·D), or (B, M, H·D) with `groups`, and the output (B, N, H·D). Without them only scores are computed.
    pub values: Option<(Strided<DevicePointer>, Strided<DevicePointer>)>,
    /// The row of the values that each key has, (B, N) `i32`: the `groups` of a token plan. None where negative.
    pub groups: Option<DevicePointer>,
    /// H.
    pub heads: usize,
    /// Multiplies the products of queries and keys; positive.
    pub scale: f32,
    /// (B, N) `f32`.
    pub sizes: Option<DevicePointer>,
    /// How a head's queries are spread over blocks.
    pub split: Split,
    /// Where the scores go.
    pub scores: ScorePointers,
    /// What becomes of the output's rows in the same launch; not together with scores.
    pub pool: Option<PoolPointers>,
}

/// A plan by which the rows of the output are pooled, as [`merge`](super::merge) would: the second half of MCTF's attention of the
/// fused tokens (section 3.3). The output itself is written all the same: blocks pass rows to each other there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolPointers {
    /// From N tokens to M.
    pub plan: PlanPointers,
    /// (B, M, H·D).
    pub out: Strided<DevicePointer>,
    /// (B·H) `u32`: 0 before the launch, and 0 again after it.
    pub arrived: DevicePointer,
}

/// Where the scores asked for go, as addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScorePointers {
    /// (B, H, R, N) `f32`, and R.
    pub class_rows: Option<(DevicePointer, usize)>,
    /// (B, H, N) `f32`.
    pub received: Option<DevicePointer>,
    /// (B, H, N) `f32`.
    pub log_sum_exp: Option<DevicePointer>,
}

/// Whether there are kernels for heads of this many values.
///
/// # Errors
/// [`Error::Argument`], which names those that there are kernels for.
pub fn check_head_dim(dtype: DType, head_dim: usize) -> Result<()> {
    Pass::of(dtype, 1, head_dim).map(|_| ())
}

/// Whether an attention with these scores needs [`Scores::log_sum_exp`] as scratch: where a second pass computes them.
pub fn needs_log_sum_exp(
    dtype: DType,
    tokens: usize,
    head_dim: usize,
    class_rows: bool,
    received: bool,
) -> bool {
    match Pass::of(dtype, tokens, head_dim) {
        Ok(pass) => class_rows && !pass.hands_out_class_rows() || received && !pass.hands_out_received(),
        Err(_) => class_rows || received,
    }
}

/// Attention of `values` (B, N, H·D) into `out` (B, N, H·D), with the scores asked for.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit each other, no kernel has the head dimension, a row does not begin at a
/// multiple of 16 bytes, `log_sum_exp` is missing where a second pass needs it, or an argument lives in another
/// context; [`Error::Launch`] when the driver refuses.
pub fn attention<T: Element>(
    device: &Device,
    stream: &CudaStream,
    attention: &Attention<'_, T>,
    values: &Strided<CudaView<'_, T>>,
    out: &mut Strided<CudaViewMut<'_, T>>,
    scores: &mut Scores<'_>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (values, _values) = borrow.read("values", values)?;
    let (out, _out) = borrow.write("out", out)?;
    run(borrow, attention, Some((values, out)), None, scores)
}

/// The scores of an attention whose values are not known yet (the first half of MCTF's one-step-ahead attention, section
/// 3.3).
///
/// # Errors
/// As [`attention`].
pub fn attention_scores<T: Element>(
    device: &Device,
    stream: &CudaStream,
    attention: &Attention<'_, T>,
    scores: &mut Scores<'_>,
) -> Result<()> {
    run(Borrow { op: OP, device, stream }, attention, None, None, scores)
}

/// Attention in which every key has the values of its group: `values` (B, M, H·D) of a plan's output tokens, `out` (B, N,
/// H·D) for all its input tokens. Pooling these rows by the plan's weights ([`super::merge`]) is MCTF's attention of the
/// fused tokens (section 3.3), for rows are pooled linearly; for pooling by maximum there is [`attention_folded`].
///
/// # Errors
/// As [`attention`].
pub fn attention_grouped<T: Element>(
    device: &Device,
    stream: &CudaStream,
    attention: &Attention<'_, T>,
    values: &Strided<CudaView<'_, T>>,
    plan: &DevicePlan,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (plan, _plan) = plan.read(OP, "plan", device, stream)?;
    let (values, _values) = borrow.read("values", values)?;
    let (out, _out) = borrow.write("out", out)?;
    let [images, tokens, _] = attention.q.shape;
    if (plan.batch, plan.tokens_in) != (images, tokens) || values.shape[1] != plan.tokens_out {
        return Err(Error::argument(
            OP,
            format!(
                "the plan turns {} images of {} tokens into {}; the queries have {images} of {tokens}, the values {} tokens",
                plan.batch, plan.tokens_in, plan.tokens_out, values.shape[1]
            ),
        ));
    }
    run(borrow, attention, Some((values, out)), Some(plan.groups), &mut Scores::default())
}

/// Borrows what all forms share, and launches.
fn run<T: Element>(
    borrow: Borrow<'_>,
    attention: &Attention<'_, T>,
    values: Option<(Strided<DevicePointer>, Strided<DevicePointer>)>,
    groups: Option<DevicePointer>,
    scores: &mut Scores<'_>,
) -> Result<()> {
    let [images, tokens, _] = attention.q.shape;
    let maps = images.saturating_mul(attention.heads).saturating_mul(tokens);
    let (q, _q) = borrow.read("q", &attention.q)?;
    let (k, _k) = borrow.read("k", &attention.k)?;
    let sizes = attention.sizes.as_ref();
    let sizes =
        sizes.map(|sizes| borrow.read_row("sizes", sizes, images.saturating_mul(tokens))).transpose()?;
    let Scores { class_rows, received, log_sum_exp } = scores;
    let rows = class_rows.as_ref().map_or(0, |(_, rows)| *rows);
    let class_rows = class_rows
        .as_mut()
        .map(|(view, rows)| borrow.write_row("class rows", view, maps.saturating_mul(*rows)));
    let class_rows = class_rows.transpose()?;
    let received =
        received.as_mut().map(|view| borrow.write_row("received attention", view, maps)).transpose()?;
    let lse = log_sum_exp.as_mut().map(|view| borrow.write_row("log_sum_exp", view, maps)).transpose()?;
    let address = |guarded: &Option<(DevicePointer, SyncOnDrop<'_>)>| guarded.as_ref().map(|(at, _)| *at);
    let pointers = AttentionPointers {
        q,
        k,
        values,
        groups,
        heads: attention.heads,
        scale: attention.scale,
        sizes: address(&sizes),
        split: attention.split,
        scores: ScorePointers {
            class_rows: address(&class_rows).map(|at| (at, rows)),
            received: address(&received),
            log_sum_exp: address(&lse),
        },
        pool: None,
    };
    // SAFETY: every tensor lies within its view (checked above and by the callers), which lives in the device's context and
    // whose guard outlives the launches; outputs are borrowed mutably, so they are none of the others; groups come from a
    // `DevicePlan`, whose indices are in range.
    unsafe { attention_raw(borrow.device, borrow.stream, T::DTYPE, &pointers) }
}

/// All forms of attention, over device pointers.
///
/// # Errors
/// As [`attention`].
///
/// # Safety
/// On `stream`, until it has passed these launches: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read; `groups` must hold negative numbers and
/// rows of the values only; nobody else may write what is read, nor touch what is written; no output may overlap another
/// tensor.
pub unsafe fn attention_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &AttentionPointers,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    let head_dim = check(dtype, arguments)?;
    let pass = Pass::of(dtype, arguments.q.shape[1], head_dim)?;
    let ScorePointers { class_rows, received, log_sum_exp } = arguments.scores;
    let second = ScorePointers {
        class_rows: class_rows.filter(|_| !pass.hands_out_class_rows()),
        received: received.filter(|_| !pass.hands_out_received()),
        log_sum_exp,
    };
    let first = ScorePointers {
        class_rows: class_rows.filter(|_| pass.hands_out_class_rows()),
        received: received.filter(|_| pass.hands_out_received()),
        log_sum_exp,
    };
    let twice = second.class_rows.is_some() || second.received.is_some();
    if twice && log_sum_exp.is_none() {
        return Err(Error::argument(
            OP,
            format!(
                "scores of {} tokens with {dtype} heads of {head_dim} take a second pass, which needs log_sum_exp (B, H, N): \
                 give it room",
                arguments.q.shape[1]
            ),
        ));
    }
    // SAFETY: the caller's promise; `check` has looked at shapes and addresses.
    unsafe {
        launch_values(device, stream, dtype, &pass, arguments, first, head_dim)?;
        if twice { launch_scores(device, stream, dtype, arguments, second, head_dim) } else { Ok(()) }
    }
}

/// Checks shapes and addresses; gives the head dimension.
fn check(dtype: DType, arguments: &AttentionPointers) -> Result<usize> {
    let AttentionPointers { q, k, values, groups, heads, scale, sizes, scores, .. } = arguments;
    let head_dim = check_heads(OP, dtype, q, k, *heads, *scale)?;
    let [images, tokens, width] = q.shape;
    if let Some((values, out)) = values {
        check_rows(OP, "values", values, dtype)?;
        out.check_output(OP, "out", dtype)?;
        check_rows(OP, "out", out, dtype)?;
        out.expect_shape(OP, "out", q.shape)?;
        let rows = if groups.is_some() { values.shape[1] } else { tokens };
        values.expect_shape(OP, "values", [images, rows, width])?;
    } else if groups.is_some() {
        return Err(Error::argument(OP, "groups are given without the values they point into"));
    }
    let floats = [
        ("sizes", *sizes),
        ("groups", *groups),
        ("class rows", scores.class_rows.map(|(at, _)| at)),
        ("received attention", scores.received),
        ("log_sum_exp", scores.log_sum_exp),
    ];
    for (name, pointer) in floats {
        pointer.map_or(Ok(()), |pointer| check_pointer(OP, name, pointer, 4))?;
    }
    if let Some((_, rows)) = scores.class_rows
        && !(1..=MOST_CLASS_ROWS.min(tokens)).contains(&rows)
    {
        return Err(Error::argument(
            OP,
            format!(
                "{rows} softmax rows of {tokens} tokens are asked for: 1 to {MOST_CLASS_ROWS} can be handed out"
            ),
        ));
    }
    if values.is_none() && *scores == ScorePointers::default() {
        return Err(Error::argument(OP, "neither values nor scores are asked for"));
    }
    if let Some(pool) = &arguments.pool {
        check_pool(dtype, arguments, pool)?;
    }
    Ok(head_dim)
}

fn check_pool(dtype: DType, arguments: &AttentionPointers, pool: &PoolPointers) -> Result<()> {
    let [images, tokens, width] = arguments.q.shape;
    let PoolPointers { plan, out, arrived } = pool;
    if arguments.values.is_none() || arguments.scores != ScorePointers::default() {
        return Err(Error::argument(OP, "rows are pooled of an attention with values and without scores"));
    }
    plan.check(OP, "plan")?;
    if (plan.batch, plan.tokens_in) != (images, tokens) {
        return Err(Error::argument(
            OP,
            format!(
                "the plan takes {} images of {} tokens, not {images} of {tokens}",
                plan.batch, plan.tokens_in
            ),
        ));
    }
    out.check_output(OP, "pooled", dtype)?;
    check_rows(OP, "pooled", out, dtype)?;
    out.expect_shape(OP, "pooled", [images, plan.tokens_out, width])?;
    check_pointer(OP, "arrived", *arrived, 4)
}

/// Checks queries and keys; gives the head dimension.
fn check_heads(
    op: &'static str,
    dtype: DType,
    q: &Strided<DevicePointer>,
    k: &Strided<DevicePointer>,
    heads: usize,
    scale: f32,
) -> Result<usize> {
    check_rows(op, "q", q, dtype)?;
    check_rows(op, "k", k, dtype)?;
    k.expect_shape(op, "k", q.shape)?;
    let [images, _, width] = q.shape;
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::argument(op, format!("rows of {width} values are not {heads} heads")));
    }
    if !(scale.is_finite() && scale > 0.0) {
        return Err(Error::argument(op, format!("the scale is {scale}, expected a positive number")));
    }
    if images > MOST_IMAGES || heads > MOST_IMAGES {
        return Err(Error::argument(
            op,
            format!(
                "{images} images of {heads} heads: at most {MOST_IMAGES} of each fit one launch, split the batch"
            ),
        ));
    }
    Ok(width / heads)
}

fn check_rows(op: &'static str, name: &str, x: &Strided<DevicePointer>, dtype: DType) -> Result<()> {
    x.check(op, name, dtype)?;
    if x.wide(dtype) {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!(
            "{name} at {:#x} with shape {:?} and strides {:?} has rows that do not begin at multiples of 16 bytes: copy it to \
             where they do",
            x.data, x.shape, x.strides
        ),
    ))
}
