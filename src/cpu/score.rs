//! A linear score of every token (SViTE's selector).

use super::{
    Context, Tensor,
    check::{expect_shape, tokens_shape},
    pack::Shared,
    pairs::Dot,
};
use crate::{Result, backend::Linear};

const OP: &str = "token_scores";

/// Rows of one task.
const TASK_ROWS: usize = 32;

/// [`Backend::token_scores`](crate::backend::Backend::token_scores).
pub(super) fn token_scores(
    context: &Context,
    x: &Tensor,
    selector: &Linear<Tensor>,
    noise: Option<&Tensor>,
) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape(OP, "x", x)?;
    expect_shape(OP, "weight", &selector.weight, &[1, width])?;
    if let Some(bias) = &selector.bias {
        expect_shape(OP, "bias", bias, &[1])?;
    }
    noise.map_or(Ok(()), |noise| expect_shape(OP, "noise", noise, &[batch, n]))?;
    let bias = selector.bias.as_ref().map_or(0.0, |bias| bias.view()[0]);
    let (x, weight, noise) = (x.view(), selector.weight.view(), noise.map(Tensor::view));
    let rows = batch * n;
    let mut scores = context.pool.take(rows);
    let shared = Shared::of(scores.make_mut());
    context.threads.run(rows.div_ceil(TASK_ROWS), |_, task| {
        for at in task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS) {
            let product = context.kernels.run(Dot(&x[at * width..(at + 1) * width], &weight));
            // SAFETY: each row is one task's.
            let score = unsafe { shared.part(at, 1) };
            score[0] = product as f32 + bias + noise.as_ref().map_or(0.0, |noise| noise[at]);
        }
    });
    Ok(Tensor::pooled([batch, 1, n], scores))
}
