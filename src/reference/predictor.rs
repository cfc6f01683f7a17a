//! DynamicViT's predictor (section 3.2 of arXiv 2106.02034).

use super::{expect_shape, linear::linear, norm::layer_norm, patch, tokens_shape};
use crate::{
    Error, Result, Tensor,
    backend::{Epilogue, Predictor},
    model::Activation,
};

const OP: &str = "keep_scores";

/// The logarithms of the probabilities of keeping each token from `special` on, (B, 1, N), 0 for those before. `present`,
/// (B, N), weighs the tokens in their mean: what training has for tokens that are dropped but still there; all ones if
/// absent.
///
/// # Errors
/// When shapes do not fit, or there are no tokens from `special` on.
pub fn keep_scores(
    x: &Tensor,
    predictor: &Predictor<Tensor>,
    special: usize,
    present: Option<&Tensor>,
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
    present.map_or(Ok(()), |present| expect_shape(OP, "present tokens", present, &[batch, n]))?;

    let gelu = || Epilogue::Activation(Activation::Gelu);
    let patches = patch::tokens(x, special..n)?;
    let normed = layer_norm(&patches, &predictor.norm)?;
    let mut hidden = linear(&normed, &predictor.hidden.all(), gelu())?;
    let count = (n - special) * width;
    for (image, rows) in hidden.data_mut().chunks_mut(count).enumerate() {
        let weight = |token: usize| present.map_or(1.0, |present| present.item(image)[special + token]);
        let mut mean = vec![0.0_f64; width - half];
        let mut total = 0.0_f64;
        for (token, row) in rows.chunks(width).enumerate() {
            total += f64::from(weight(token));
            mean.iter_mut().zip(&row[half..]).for_each(|(sum, &h)| *sum += f64::from(weight(token) * h));
        }
        for row in rows.chunks_mut(width) {
            row[half..].iter_mut().zip(&mean).for_each(|(h, sum)| *h = (sum / total) as f32);
        }
    }
    let first = linear(&hidden, &predictor.first.all(), gelu())?;
    let second = linear(&first, &predictor.second.all(), gelu())?;
    let logits = linear(&second, &predictor.last.all(), Epilogue::None)?;

    let mut scores = Tensor::zeros(&[batch, 1, n]);
    for (out, logits) in scores.data_mut().chunks_mut(n).zip(logits.data().chunks(2 * (n - special))) {
        for (score, logits) in out[special..].iter_mut().zip(logits.chunks(2)) {
            // log softmax of the first of two. As the logarithm of a quotient, all confident keeps would be 0.
            let behind = logits[1] - logits[0];
            *score = -(behind.max(0.0) + (-behind.abs()).exp().ln_1p());
        }
    }
    Ok(scores)
}
