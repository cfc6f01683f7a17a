//! Token reduction for [candle](https://github.com/huggingface/candle): the operations of [`foveate`] on candle tensors.
//!
//! A vision transformer in candle gets faster when it stops computing on tokens that do not matter. These operations find
//! such tokens and take them out, between the layers a model has already:
//!
//! | operation | what it gives | used by |
//! | --- | --- | --- |
//! | [`attention`], [`attention_parts`] | attention, and on request the class token's softmax row and the attention that each token receives, without the N×N map | all methods |
//! | [`attention_scores`] | those scores alone | MCTF |
//! | [`matching`] | who is merged with whom, a [`Plan`] | ToMe, MCTF |
//! | [`select`] | who is kept, a [`Plan`] | EViT |
//! | [`merge`] | tokens and sizes after a plan, with the LayerNorm that follows | all methods |
//! | [`unmerge`] | a value for every token there was before, for dense prediction | |
//!
//! Arguments are those of [`foveate::backend`], over [`candle_core::Tensor`]. What a ToMe block does, at the place where a
//! model has its attention and its second LayerNorm:
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use foveate_candle::{
//!     Attraction, Heads, Matching, Metric, Norm, Pooling, ScoreRequest, Weighting, attention, matching, merge,
//! };
//!
//! # fn main() -> Result<()> {
//! let device = Device::Cpu;
//! // 2 images of 197 tokens, 192 wide with 3 heads: the residual stream, and queries, keys and values of its LayerNorm.
//! let x = Tensor::randn(0_f32, 1.0, (2, 197, 192), &device)?;
//! let qkv = Tensor::randn(0_f32, 1.0, (2, 197, 3 * 192), &device)?;
//! # let norm2 = Norm { weight: Tensor::ones(192, DType::F32, &device)?, bias: None, eps: 1e-6 };
//!
//! let heads = Heads { packed: &qkv, heads: 3, head_dim: 64, scale: 0.125, sizes: None };
//! let (context, _scores) = attention(&heads, ScoreRequest::default())?;
//! # let x = (x + context)?;
//! // ... x = x + proj(context) ...
//! let plan = matching(&Matching {
//!     metric: Metric::Keys(&heads),
//!     attraction: Attraction::Cosine,
//!     weighting: Weighting::Size(None),
//!     special: 1,  // the class token
//!     merges: 13,
//!     both_ways: false,
//! })?;
//! let merged = merge(&x, None, &plan, Pooling::Weighted, Some(&norm2))?;
//! assert_eq!(merged.tokens.dims(), [2, 184, 192]);
//! // ... x = merged.tokens + mlp(merged.normed); merged.sizes go into the next block's heads, matching and merge ...
//! # Ok(())
//! # }
//! ```
//!
//! The example `reduced_vit` is a whole model: `cargo run --release -p foveate-candle --example reduced_vit`.
//!
//! # Devices, types and layouts
//! Tensors lie on the CPU, or with the feature `cuda` on a CUDA device; all of a call on the same one. On CUDA everything is
//! enqueued on the tensors' own stream, in candle's memory; nothing waits. The kernels are loaded at a device's first
//! operation and stay loaded.
//!
//! Tokens, queries, keys, values and LayerNorm parameters are `f32`, `f16` or `bf16`, all of a call the same. Token sizes and
//! attention scores are `f32` always, and so are all sums. On the CPU, half types are computed in `f32` and rounded.
//!
//! Any layout is read on the CPU, without a copy where rows follow each other. On CUDA rows may lie anywhere, but a row's
//! values must follow each other, and those of attention start at multiples of 16 bytes; what the kernels cannot read is
//! refused with a message, and `contiguous()` is the remedy.
//!
//! # Gradients
//! There are none: a backward pass that reaches one of these operations fails with
//! [`candle_core::Error::BackwardNotSupported`], it does not go on without them.

#[cfg(feature = "cuda")]
mod cuda;
mod host;
mod plan;
mod tensors;

use candle_core::{DType, Device, Result, Tensor};
pub use foveate::backend::{
    Attraction, Heads, Matching, Merged, Metric, Norm, Pooling, ScoreRequest, Scores, Select, Weighting,
};
pub use plan::Plan;
use tensors::{Arguments, check_float, tokens_shape, unsupported};

/// Queries, keys and values of all heads in tensors of their own, as models with separate projections have them.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Queries, (B, N, H·D): head `h` in columns `h·D..(h+1)·D`.
    pub q: &'a Tensor,
    /// Keys, (B, N, H·D).
    pub k: &'a Tensor,
    /// Values, (B, N, H·D).
    pub v: &'a Tensor,
    /// H.
    pub heads: usize,
    /// Multiplies the products of queries and keys, `D^-1/2` usually; positive.
    pub scale: f32,
    /// Sizes of the tokens, (B, N): proportional attention adds their logarithm to the key's scores.
    pub sizes: Option<&'a Tensor>,
}

/// Runs `host` or `cuda`, by where the first argument lies.
macro_rules! on_device {
    ($arguments:expr, $host:expr, |$device:ident| $cuda:expr) => {
        match $arguments.device() {
            Device::Cpu => $host,
            #[cfg(feature = "cuda")]
            Device::Cuda($device) => $cuda,
            other => Err(unsupported($arguments.op, other)),
        }
    };
}

/// `softmax(QKᵀ·scale + log size) V` of packed queries, keys and values (B, N, 3C) → (B, N, C), and the scores asked for:
/// [`foveate::backend::Backend::attention`].
///
/// # Errors
/// When shapes, types or devices do not fit, no kernel has the head dimension, or the driver refuses.
pub fn attention(qkv: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<(Tensor, Scores<Tensor>)> {
    let arguments = heads_arguments("attention", qkv, 3)?;
    on_device!(arguments, host::attention(&arguments, qkv, scores), |device| {
        cuda::attention(&arguments, device, qkv, scores)
    })
}

/// [`attention`] of queries, keys and values that are not packed. On the CPU they are copied into one tensor first.
///
/// # Errors
/// As [`attention`].
pub fn attention_parts(parts: &Parts<'_>, scores: ScoreRequest) -> Result<(Tensor, Scores<Tensor>)> {
    let arguments = Arguments::new("attention", parts.q, check_float("attention", "q", parts.q)?)
        .with("k", parts.k)?
        .with("v", parts.v)?
        .with_f32("sizes", parts.sizes)?;
    on_device!(arguments, host::attention_parts(&arguments, parts, scores), |device| {
        cuda::attention_parts(&arguments, device, parts, scores)
    })
}

/// The scores of an attention whose values are not known yet, from packed queries and keys (B, N, 2C):
/// [`foveate::backend::Backend::attention_scores`].
///
/// # Errors
/// As [`attention`].
pub fn attention_scores(qk: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<Scores<Tensor>> {
    let arguments = heads_arguments("attention_scores", qk, 2)?;
    if scores == ScoreRequest::default() {
        return Ok(Scores { class: None, received: None });
    }
    on_device!(arguments, host::attention_scores(&arguments, qk, scores), |device| {
        cuda::attention_scores(&arguments, device, qk, scores)
    })
}

/// The plan of a bipartite matching: [`foveate::backend::Backend::matching`]. Models whose keys are not packed give their
/// mean over heads as [`Metric::Rows`].
///
/// # Errors
/// When shapes, counts, types or devices do not fit, or the driver refuses.
pub fn matching(matching: &Matching<'_, Tensor>) -> Result<Plan> {
    const OP: &str = "matching";
    let arguments = match &matching.metric {
        Metric::Keys(heads) => Arguments::new(OP, heads.packed, check_float(OP, "keys", heads.packed)?),
        Metric::Rows(rows) => Arguments::new(OP, rows, check_float(OP, "rows", rows)?),
    };
    let arguments = match &matching.attraction {
        Attraction::Cosine => arguments,
        Attraction::MultiCriteria { informativeness, size, .. } => arguments
            .with_f32("informativeness", Some(informativeness.0))?
            .with_f32("sizes of the attraction", size.0)?,
    };
    let arguments = match &matching.weighting {
        Weighting::Uniform => arguments,
        Weighting::Size(sizes) => arguments.with_f32("sizes", *sizes)?,
        Weighting::SizeAndReceived(sizes, received) => {
            arguments.with_f32("sizes", *sizes)?.with_f32("received attention", Some(received))?
        }
    };
    on_device!(arguments, host::matching(matching), |device| { cuda::matching(&arguments, device, matching) })
}

/// The plan of a top-k selection by class scores (B, H, N), `f32`: [`foveate::backend::Backend::select`].
///
/// # Errors
/// When shapes, counts, types or devices do not fit, or the driver refuses.
pub fn select(select: &Select<'_, Tensor>) -> Result<Plan> {
    const OP: &str = "select";
    let arguments = Arguments::new(OP, select.class_scores, DType::F32)
        .with_f32("class scores", Some(select.class_scores))?;
    on_device!(arguments, host::select(select), |device| cuda::select(&arguments, device, select))
}

/// Applies a plan to tokens (B, N, C) and their sizes (B, N; 1 when absent), with the LayerNorm that follows:
/// [`foveate::backend::Backend::merge`].
///
/// # Errors
/// When shapes, types or devices do not fit each other or the plan, or the driver refuses.
pub fn merge(
    x: &Tensor,
    sizes: Option<&Tensor>,
    plan: &Plan,
    pooling: Pooling,
    norm: Option<&Norm<Tensor>>,
) -> Result<Merged<Tensor>> {
    const OP: &str = "merge";
    tokens_shape(OP, "x", x)?;
    let mut arguments = Arguments::new(OP, x, check_float(OP, "x", x)?).with_f32("sizes", sizes)?;
    if let Some(norm) = norm {
        arguments = arguments.with("weight", &norm.weight)?;
        if let Some(bias) = &norm.bias {
            arguments = arguments.with("bias", bias)?;
        }
    }
    arguments.check_plan(plan)?;
    on_device!(arguments, host::merge(&arguments, x, sizes, plan, pooling, norm), |device| {
        cuda::merge(&arguments, device, x, sizes, plan, pooling, norm)
    })
}

/// Copies each output token (B, M, C) back to all members of its group, (B, N, C); dropped tokens become zero:
/// [`foveate::backend::Backend::unmerge`].
///
/// # Errors
/// When shapes or devices do not fit the plan, or the driver refuses.
pub fn unmerge(x: &Tensor, plan: &Plan) -> Result<Tensor> {
    const OP: &str = "unmerge";
    tokens_shape(OP, "x", x)?;
    let arguments = Arguments::new(OP, x, check_float(OP, "x", x)?);
    arguments.check_plan(plan)?;
    on_device!(arguments, host::unmerge(&arguments, x, plan), |device| {
        cuda::unmerge(&arguments, device, x, plan)
    })
}

/// Checks packed heads of `parts` parts.
fn heads_arguments<'a>(op: &'static str, heads: &Heads<'a, Tensor>, parts: usize) -> Result<Arguments<'a>> {
    let [_, _, row] = tokens_shape(op, "packed heads", heads.packed)?;
    let width = heads.heads.saturating_mul(heads.head_dim);
    if width == 0 || Some(row) != width.checked_mul(parts) {
        candle_core::bail!(
            "{op}: packed rows of {row} values are not {parts} parts of {} heads of {}",
            heads.heads,
            heads.head_dim
        );
    }
    Arguments::new(op, heads.packed, check_float(op, "packed heads", heads.packed)?)
        .with_f32("sizes", heads.sizes)
}

/// The README's example, compiled and run with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
