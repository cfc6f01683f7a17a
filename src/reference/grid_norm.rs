//! Norms of feature maps.

use rayon::prelude::*;

use super::{expect_shape, tokens_shape};
use crate::{
    Result, Tensor,
    backend::{Norm, NormOver},
};

pub(super) fn grid_norm(x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
    const OP: &str = "grid_norm";
    let [_, positions, channels] = tokens_shape(OP, "x", x)?;
    expect_shape(OP, "weight", &norm.weight, &[channels])?;
    norm.bias.as_ref().map_or(Ok(()), |bias| expect_shape(OP, "bias", bias, &[channels]))?;
    let span = match over {
        NormOver::Image => positions * channels,
        NormOver::Position | NormOver::Nothing => channels,
    };
    let eps = f64::from(norm.eps);
    let mut out = Tensor::zeros(x.shape());
    let items = out.data_mut().par_chunks_mut(span).zip(x.data().par_chunks(span));
    items.for_each(|(out, x)| {
        let (mean, scale) = match over {
            NormOver::Nothing => (0.0, 1.0),
            NormOver::Image => {
                let (mean, variance) = moments(x);
                (mean, 1.0 / (variance + eps).sqrt())
            }
            NormOver::Position => {
                let (mean, variance) = moments(x);
                (mean, 1.0 / (variance.sqrt() + eps))
            }
        };
        for (out, x) in out.chunks_mut(channels).zip(x.chunks(channels)) {
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(norm.weight.data()) {
                *out = ((f64::from(x) - mean) * scale) as f32 * weight;
            }
            if let Some(bias) = &norm.bias {
                out.iter_mut().zip(bias.data()).for_each(|(out, bias)| *out += bias);
            }
        }
    });
    Ok(out)
}

/// Mean and variance (over n), in double precision: an image has up to millions of values.
fn moments(x: &[f32]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    (mean, x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n)
}
