//! A linear score of every token (SViTE's selector, section 3.2 of arXiv 2106.04533).

use rayon::prelude::*;

use super::{expect_shape, tokens_shape};
use crate::{Result, Tensor, backend::Linear};

const OP: &str = "token_scores";

pub(super) fn token_scores(x: &Tensor, selector: &Linear<Tensor>, noise: Option<&Tensor>) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape(OP, "x", x)?;
    expect_shape(OP, "weight", &selector.weight, &[1, width])?;
    if let Some(bias) = &selector.bias {
        expect_shape(OP, "bias", bias, &[1])?;
    }
    noise.map_or(Ok(()), |noise| expect_shape(OP, "noise", noise, &[batch, n]))?;
    let bias = selector.bias.as_ref().map_or(0.0, |bias| bias.data()[0]);
    let weight = selector.weight.data();
    let mut scores = Tensor::zeros(&[batch, 1, n]);
    let rows = scores.data_mut().par_iter_mut().zip(x.data().par_chunks(width));
    rows.enumerate().for_each(|(at, (score, row))| {
        let product: f64 = row.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
        *score = product as f32 + bias + noise.map_or(0.0, |noise| noise.data()[at]);
    });
    Ok(scores)
}
