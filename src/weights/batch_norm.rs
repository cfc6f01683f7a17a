//! Batch norms with running statistics, folded into the convolutions before them.

use crate::{Result, Tensor};

/// Epsilon of every batch norm, the framework's default.
const EPS: f64 = 1e-5;

/// The scale and the shift of each channel that weight, bias, running mean and running variance come to, or the negative
/// variance that there cannot be.
pub(super) fn scale_and_shift(
    [weight, bias, mean, variance]: &[Tensor; 4],
) -> std::result::Result<[Vec<f64>; 2], f32> {
    if let Some(&negative) = variance.data().iter().find(|value| **value < 0.0) {
        return Err(negative);
    }
    let wide = |tensor: &Tensor| tensor.data().iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
    let scale = wide(weight).into_iter().zip(wide(variance)).map(|(weight, v)| weight / (v + EPS).sqrt());
    let scale: Vec<f64> = scale.collect();
    let shift = wide(bias).into_iter().zip(wide(mean)).zip(&scale);
    let shift = shift.map(|((bias, mean), scale)| bias - mean * scale).collect();
    Ok([scale, shift])
}

/// Weight and bias of a layer (outputs, ...) that has no bias of its own, with the norm behind it folded in.
pub(super) fn fold(mut weight: Tensor, [scale, shift]: &[Vec<f64>; 2]) -> Result<(Tensor, Tensor)> {
    let row = weight.data().len() / scale.len().max(1);
    for (row, scale) in weight.data_mut().chunks_mut(row.max(1)).zip(scale) {
        row.iter_mut().for_each(|value| *value = (f64::from(*value) * scale) as f32);
    }
    let bias = Tensor::new(&[shift.len()], shift.iter().map(|&value| value as f32).collect())?;
    Ok((weight, bias))
}
