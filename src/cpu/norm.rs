//! LayerNorm.

use super::{
    Context, Tensor,
    check::{expect_shape, tokens_shape},
    pack::Shared,
    pool::Buffer,
    simd::{Kernel, Simd},
};
use crate::{Error, Result, backend::Norm};

/// Rows of one task.
const TASK_ROWS: usize = 32;

pub(super) fn check(norm: &Norm<Tensor>, width: usize) -> Result<()> {
    if width == 0 {
        return Err(Error::argument("layer_norm", "rows of no values have no mean"));
    }
    expect_shape("layer_norm", "weight", &norm.weight, &[width])?;
    norm.bias.as_ref().map_or(Ok(()), |bias| expect_shape("layer_norm", "bias", bias, &[width]))
}

/// [`Backend::layer_norm`](crate::backend::Backend::layer_norm).
pub(super) fn layer_norm(context: &Context, x: &Tensor, norm: &Norm<Tensor>) -> Result<Tensor> {
    check(norm, x.width())?;
    Ok(Tensor::pooled(x.shape, normalised(context, x, [1, x.rows()], 0, norm)))
}

/// LayerNorm of the tokens from `first` on, (B, N, C) → (B, N - `first`, C).
pub(super) fn layer_norm_from(
    context: &Context,
    x: &Tensor,
    first: usize,
    norm: &Norm<Tensor>,
) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("layer_norm", "x", x)?;
    check(norm, width)?;
    let first = first.min(n);
    Ok(Tensor::pooled([batch, n - first, width], normalised(context, x, [batch, n], first, norm)))
}

/// The norms of the rows of `batch` images of `n` tokens, without each image's first ones.
fn normalised(
    context: &Context,
    x: &Tensor,
    [batch, n]: [usize; 2],
    first: usize,
    norm: &Norm<Tensor>,
) -> Buffer {
    let (width, count) = (x.width(), n - first);
    let (input, weight, bias) = (x.view(), norm.weight.view(), norm.bias.as_ref().map(Tensor::view));
    let rows = batch * count;
    let mut out = context.pool.take(rows * width);
    let shared = Shared::of(out.make_mut());
    context.threads.run(rows.div_ceil(TASK_ROWS), |_, task| {
        for row in task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS) {
            let from = (row / count * n + first + row % count) * width;
            // SAFETY: each row is one task's.
            let out = unsafe { shared.part(row * width, width) };
            context.kernels.run(Normalise {
                row: &input[from..from + width],
                weight: &weight,
                bias: bias.as_deref(),
                eps: norm.eps,
                out,
            });
        }
    });
    out
}

/// [`Backend::head_norm`](crate::backend::Backend::head_norm).
pub(super) fn head_norm(
    context: &Context,
    packed: Tensor,
    part: usize,
    heads: usize,
    norm: &Norm<Tensor>,
) -> Result<Tensor> {
    let [_, _, width] = tokens_shape("head_norm", "packed heads", &packed)?;
    let head_dim = norm.weight.width();
    check(norm, head_dim)?;
    let part_width = heads.saturating_mul(head_dim);
    if part_width == 0 || !width.is_multiple_of(part_width) || part >= width / part_width {
        return Err(Error::argument(
            "head_norm",
            format!("rows of {width} values have no part {part} of {heads} heads of {head_dim}"),
        ));
    }
    let (weight, bias) = (norm.weight.view(), norm.bias.as_ref().map(Tensor::view));
    let (shape, rows) = (packed.shape, packed.rows());
    let mut out = packed.into_buffer(&context.pool);
    let mut scratch = context.pool.take(context.threads.count() * head_dim);
    let (shared, scratches) = (Shared::of(out.make_mut()), Shared::of(scratch.make_mut()));
    context.threads.run(rows.div_ceil(TASK_ROWS), |thread, task| {
        let (first, last) = (task * TASK_ROWS, rows.min((task + 1) * TASK_ROWS));
        // SAFETY: each task has rows of its own, each thread a row of the scratch.
        let (out, scratch) = unsafe {
            (shared.part(first * width, (last - first) * width), scratches.part(thread * head_dim, head_dim))
        };
        for row in out.chunks_exact_mut(width) {
            for head in row[part * part_width..(part + 1) * part_width].chunks_exact_mut(head_dim) {
                let (weight, bias) = (&*weight, bias.as_deref());
                context.kernels.run(Normalise { row: head, weight, bias, eps: norm.eps, out: scratch });
                head.copy_from_slice(scratch);
            }
        }
    });
    Ok(Tensor::pooled(shape, out))
}

/// `out = (row - mean)/sqrt(variance + eps)·weight + bias`.
pub(super) struct Normalise<'a> {
    pub(super) row: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, weight, bias, eps, out } = self;
        let width = row.len();
        let whole = width / S::LANES * S::LANES;
        let (main, tail) = row.split_at(whole);
        let count = width as f32;
        let mut sums = [s.splat(0.0); 2];
        for (i, x) in main.chunks_exact(S::LANES).enumerate() {
            sums[i % 2] = s.add(sums[i % 2], s.load(x));
        }
        let mean = (s.sum(s.add(sums[0], sums[1])) + tail.iter().sum::<f32>()) / count;
        let centre = s.splat(mean);
        let mut sums = [s.splat(0.0); 2];
        for (i, x) in main.chunks_exact(S::LANES).enumerate() {
            let x = s.sub(s.load(x), centre);
            sums[i % 2] = s.fma(x, x, sums[i % 2]);
        }
        let square = |&x: &f32| (x - mean) * (x - mean);
        let variance = (s.sum(s.add(sums[0], sums[1])) + tail.iter().map(square).sum::<f32>()) / count;
        let scale = 1.0 / (variance + eps).sqrt();
        let scales = s.splat(scale);
        let (out, out_tail) = out.split_at_mut(whole);
        let (weight, weight_tail) = weight.split_at(whole);
        let rows = out.chunks_exact_mut(S::LANES).zip(main.chunks_exact(S::LANES));
        let rows = rows.zip(weight.chunks_exact(S::LANES));
        if let Some(bias) = bias {
            let (bias, bias_tail) = bias.split_at(whole);
            for (((out, x), w), b) in rows.zip(bias.chunks_exact(S::LANES)) {
                let y = s.mul(s.sub(s.load(x), centre), scales);
                s.store(out, s.fma(y, s.load(w), s.load(b)));
            }
            for (((out, x), w), b) in out_tail.iter_mut().zip(tail).zip(weight_tail).zip(bias_tail) {
                *out = (x - mean) * scale * w + b;
            }
        } else {
            for ((out, x), w) in rows {
                s.store(out, s.mul(s.mul(s.sub(s.load(x), centre), scales), s.load(w)));
            }
            for ((out, x), w) in out_tail.iter_mut().zip(tail).zip(weight_tail) {
                *out = (x - mean) * scale * w;
            }
        }
    }
}
