//! Attention by positive random features (T2T-ViT's performer).

use rayon::prelude::*;

use super::{expect_shape, tokens_shape};
use crate::{Error, Result, Tensor};

/// Keeps the quotient finite where all features are 0.
const EPSILON: f32 = 1e-8;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `exp(w a - |a|²/2)/sqrt(m)` for every row of `w` (m, D).
fn features(a: &[f32], w: &Tensor) -> Vec<f32> {
    let (half, scale) = (dot(a, a) / 2.0, (w.dim(0) as f64).powf(-0.5) as f32);
    w.data().chunks(a.len()).map(|row| (dot(a, row) - half).exp() * scale).collect()
}

pub(super) fn performer(packed: &Tensor, w: &Tensor) -> Result<Tensor> {
    const OP: &str = "performer";
    let [batch, n, packed_width] = tokens_shape(OP, "packed", packed)?;
    let width = packed_width / 3;
    if width == 0 || !packed_width.is_multiple_of(3) {
        return Err(Error::argument(
            OP,
            format!("packed rows of {packed_width} values are no keys, queries and values of one width"),
        ));
    }
    let count = w.dim(0);
    expect_shape(OP, "the random features", w, &[count, width])?;
    if count == 0 {
        return Err(Error::argument(OP, "there are no random features"));
    }
    let mut out = Tensor::zeros(&[batch, n, width]);
    out.data_mut().par_chunks_mut(n * width).enumerate().for_each(|(image, out)| {
        let rows = || packed.item(image).chunks(packed_width);
        // Sums over the tokens of each feature times the values, and of the features themselves.
        let mut sums = vec![0.0_f32; count * width];
        let mut totals = vec![0.0_f32; count];
        for row in rows() {
            let (key, value) = (&row[..width], &row[2 * width..]);
            for (m, phi) in features(key, w).into_iter().enumerate() {
                totals[m] += phi;
                sums[m * width..(m + 1) * width].iter_mut().zip(value).for_each(|(sum, v)| *sum += phi * v);
            }
        }
        for (row, out) in rows().zip(out.chunks_mut(width)) {
            let phi = features(&row[width..2 * width], w);
            let below = dot(&phi, &totals) + EPSILON;
            for (m, phi) in phi.into_iter().enumerate() {
                out.iter_mut().zip(&sums[m * width..]).for_each(|(y, sum)| *y += phi * sum);
            }
            out.iter_mut().for_each(|y| *y /= below);
        }
    });
    Ok(out)
}
