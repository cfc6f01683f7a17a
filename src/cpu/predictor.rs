//! DynamicViT's predictor.

use super::{
    Context, Tensor,
    check::{expect_shape, tokens_shape},
    linear::linear,
    norm::layer_norm_from,
    pack::Shared,
    simd::{Kernel, Simd},
};
use crate::{
    Error, Result,
    backend::{Epilogue, Predictor},
    model::Activation,
};

const OP: &str = "keep_scores";

/// [`Backend::keep_scores`](crate::backend::Backend::keep_scores).
pub(super) fn keep_scores(
    context: &Context,
    x: &Tensor,
    predictor: &Predictor<Tensor>,
    special: usize,
) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape(OP, "x", x)?;
    if special >= n {
        return Err(Error::argument(
            OP,
            format!("{special} of {n} tokens are special: none is to be scored"),
        ));
    }
    let (half, quarter) = (width / 2, width / 4);
    expect_shape(OP, "the hidden layer's weight", &predictor.hidden.weight, &[width, width])?;
    expect_shape(OP, "the first layer's weight", &predictor.first.weight, &[half, width])?;
    expect_shape(OP, "the second layer's weight", &predictor.second.weight, &[quarter, half])?;
    expect_shape(OP, "the last layer's weight", &predictor.last.weight, &[2, quarter])?;

    let gelu = || Epilogue::Activation(Activation::Gelu);
    let count = n - special;
    let normed = layer_norm_from(context, x, special, &predictor.norm)?;
    let hidden = linear(context, &normed, &predictor.hidden.all(), gelu())?;
    drop(normed);
    let mut hidden = hidden.into_buffer(&context.pool);
    let shared = Shared::of(hidden.make_mut());
    context.threads.run(batch, |_, image| {
        // SAFETY: each image is one task's.
        let rows = unsafe { shared.part(image * count * width, count * width) };
        context.kernels.run(ShareMean { rows, width, first: half });
    });
    let hidden = Tensor::pooled([batch, count, width], hidden);
    let first = linear(context, &hidden, &predictor.first.all(), gelu())?;
    drop(hidden);
    let second = linear(context, &first, &predictor.second.all(), gelu())?;
    let logits = linear(context, &second, &predictor.last.all(), Epilogue::None)?;

    let logits = logits.view();
    let mut scores = context.pool.take(batch * n);
    for (out, logits) in scores.make_mut().chunks_exact_mut(n).zip(logits.chunks_exact(2 * count)) {
        let (before, out) = out.split_at_mut(special);
        before.fill(0.0);
        for (score, logits) in out.iter_mut().zip(logits.chunks_exact(2)) {
            // log softmax of the first of two. As the logarithm of a quotient, all confident keeps would be 0.
            let behind = logits[1] - logits[0];
            *score = -(behind.max(0.0) + (-behind.abs()).exp().ln_1p());
        }
    }
    Ok(Tensor::pooled([batch, 1, n], scores))
}

/// The columns from `first` on become their means over the rows.
struct ShareMean<'a> {
    rows: &'a mut [f32],
    width: usize,
    first: usize,
}

impl Kernel for ShareMean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        /// Columns at a time: a cache line.
        const COLUMNS: usize = 16;
        let Self { rows, width, first } = self;
        let count = (rows.len() / width) as f64;
        for at in (first..width).step_by(COLUMNS) {
            let some = COLUMNS.min(width - at);
            let mut sums = [0.0_f64; COLUMNS];
            for row in rows.chunks_exact(width) {
                match row[at..].first_chunk::<COLUMNS>() {
                    // So that the compiler knows how many there are.
                    Some(row) => sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x)),
                    None => sums.iter_mut().zip(&row[at..]).for_each(|(sum, &x)| *sum += f64::from(x)),
                }
            }
            let means = sums.map(|sum| (sum / count) as f32);
            for row in rows.chunks_exact_mut(width) {
                row[at..at + some].copy_from_slice(&means[..some]);
            }
        }
    }
}
