//! Which weights, heads and neurons of a sparse network are there, and how that changes while it trains (SViTE and S2ViTE:
//! Chen et al., `NeurIPS` 2021, arXiv 2106.04533).
//!
//! A mask (0 or 1 for each weight of a layer) is replaced every few thousand iterations: the active weights of the smallest
//! magnitude are dropped, and as many are grown where the gradient is largest. The share that is dropped falls along a cosine
//! ([`DeathRate`]); how dense each layer is follows from its shape ([`erk_densities`]) and never changes. Whole attention heads
//! and MLP neurons have masks of their own and scores of their own.
//!
//! | operation | reference | CUDA |
//! | --- | --- | --- |
//! | drop and grow of single weights | [`reference::connectivity::drop_and_grow`] | `cuda::connectivity::drop_and_grow` |
//! | scores of neurons and their update | [`reference::connectivity::neuron_scores`], [`update_neurons`](reference::connectivity::update_neurons) | `cuda::structured::neuron_scores`, `update_neurons` |
//! | scores of heads and their update | [`reference::connectivity::head_scores`], [`update_heads`](reference::connectivity::update_heads) | `cuda::structured::head_sums`, `update_heads` |
//!
//! One rule for what has no order: a NaN weight or gradient counts as zero, infinities are the largest magnitude, and of equal
//! values the one with the lower index is kept or grown first.
//!
//! ```
//! use foveate::{connectivity::{DeathRate, erk_densities}, reference::connectivity::drop_and_grow};
//!
//! // Two layers, half of whose weights exist; a small layer is denser than a large one.
//! let densities = erk_densities(&[&[64, 16], &[64, 64]], 0.5)?;
//! assert!(densities[0] > densities[1]);
//!
//! // The smallest weight goes, and one comes back where the gradient is largest, starting at zero.
//! let (mut weight, mut mask) = (vec![0.5, -0.1, 0.0, 0.0, 0.9, 0.0], vec![1, 1, 0, 0, 1, 0]);
//! let gradient = [0.1, 0.2, -3.0, 0.3, 0.1, 0.2];
//! let rate = DeathRate::new(0.5, 1000)?.at(999);
//! let update = drop_and_grow(&mut weight, &gradient, &mut mask, rate)?;
//! assert_eq!((update.dropped, mask), (1, vec![1, 0, 1, 0, 1, 0]));
//! assert_eq!(weight, [0.5, 0.0, 0.0, 0.0, 0.9, 0.0]);
//! # Ok::<(), foveate::Error>(())
//! ```
//!
//! [`reference::connectivity::drop_and_grow`]: crate::reference::connectivity::drop_and_grow
//! [`reference::connectivity::neuron_scores`]: crate::reference::connectivity::neuron_scores
//! [`reference::connectivity::head_scores`]: crate::reference::connectivity::head_scores

use std::f64::consts::PI;

#[cfg(doc)]
use crate::reference;
use crate::{Error, Result};

/// The share of active elements that an update drops: falls from its initial value to 0.005 along half a cosine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeathRate {
    initial: f64,
    steps: usize,
}

impl DeathRate {
    /// What is left at the end.
    pub const LAST: f64 = 0.005;

    /// A rate that starts at `initial` (0.5 in the official scripts) and falls over all `steps` iterations of the training,
    /// those without updates at its end included.
    ///
    /// # Errors
    /// When `initial` is no share or there are no steps.
    pub fn new(initial: f64, steps: usize) -> Result<Self> {
        check_rate("death_rate", initial)?;
        if steps == 0 {
            return Err(Error::argument("death_rate", "0 steps; a training has 1 at least"));
        }
        Ok(Self { initial, steps })
    }

    /// The rate after `step` iterations.
    pub fn at(self, step: usize) -> f64 {
        let done = step.min(self.steps) as f64 / self.steps as f64;
        Self::LAST + (self.initial - Self::LAST) * f64::midpoint(1.0, (PI * done).cos())
    }
}

/// How many of `active` elements an update at `rate` drops: rounded up, so at least one.
///
/// # Errors
/// When `rate` is no share.
pub fn removals(rate: f64, active: usize) -> Result<usize> {
    check_rate("connectivity", rate)?;
    Ok((rate * active as f64).ceil() as usize)
}

/// What an update of a layer's mask did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// Active elements before and after.
    pub active: usize,
    /// How many the death rate asked to drop; 0 for a layer without holes, which is left alone.
    pub asked: usize,
    /// How many were dropped, and grown again elsewhere or where they were: more than asked when magnitudes tie or active
    /// weights are zero.
    pub dropped: usize,
}

/// The densities of layers of these shapes by the Erdős-Rényi kernel rule (`fixed_ERK`): in proportion to the sum of a shape's
/// extents over their product, so that all layers together have `density`. Layers that would get more than they have are dense,
/// those with the largest ratio first.
///
/// # Errors
/// When a shape is empty, or `density` is not above 0 and at most 1.
pub fn erk_densities(shapes: &[&[usize]], density: f64) -> Result<Vec<f64>> {
    const OP: &str = "erk_densities";
    if !(density > 0.0 && density <= 1.0) {
        return Err(Error::argument(OP, format!("density {density} is not above 0 and at most 1")));
    }
    if let Some(shape) = shapes.iter().find(|shape| shape.is_empty() || shape.contains(&0)) {
        return Err(Error::argument(OP, format!("a layer of shape {shape:?} has no weights")));
    }
    let elements = |shape: &[usize]| shape.iter().map(|&extent| extent as f64).product::<f64>();
    let sizes: Vec<f64> = shapes.iter().map(|shape| elements(shape)).collect();
    let extents = shapes.iter().map(|shape| shape.iter().map(|&extent| extent as f64).sum::<f64>());
    let raw: Vec<f64> = extents.zip(&sizes).map(|(sum, size)| sum / size).collect();
    let mut dense = vec![false; shapes.len()];
    loop {
        let (mut wanted, mut weight, mut largest) = (0.0, 0.0, 0.0_f64);
        for ((&size, &raw), &dense) in sizes.iter().zip(&raw).zip(&dense) {
            if dense {
                wanted -= (1.0 - density) * size;
            } else {
                wanted += density * size;
                weight += raw * size;
                largest = largest.max(raw);
            }
        }
        let scale = wanted / weight;
        if weight == 0.0 || scale * largest <= 1.0 {
            let each = raw.iter().zip(&dense);
            return Ok(each.map(|(raw, &dense)| if dense { 1.0 } else { scale * raw }).collect());
        }
        dense.iter_mut().zip(&raw).for_each(|(dense, &raw)| *dense |= raw == largest);
    }
}

/// A share of what is there.
fn check_rate(op: &'static str, rate: f64) -> Result<()> {
    if (0.0..=1.0).contains(&rate) {
        return Ok(());
    }
    Err(Error::argument(op, format!("rate {rate} is not between 0 and 1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the paper's official code for DeiT-S, to its four digits.
    #[test]
    fn densities_of_deit_small() {
        let block: [&[usize]; 4] = [&[1152, 384], &[384, 384], &[1536, 384], &[384, 1536]];
        let shapes: Vec<&[usize]> = std::iter::once(&[384_usize, 3, 16, 16] as &[usize])
            .chain(std::iter::repeat_n(block, 12).flatten())
            .chain([&[1000_usize, 384] as &[usize]])
            .collect();
        for (density, [patch, qkv, proj, fc, head]) in [
            (0.3, [0.1237, 0.3022, 0.4533, 0.2833, 0.3137]),
            (0.6, [0.2473, 0.6044, 0.9066, 0.5666, 0.6274]),
            (0.7, [0.2907, 0.7105, 1.0, 0.6661, 0.7375]),
        ] {
            let got = erk_densities(&shapes, density).unwrap();
            for (got, want) in got.iter().zip([patch, qkv, proj, fc, fc]).chain([(&got[49], head)]) {
                assert!((got - want).abs() <= 0.5e-4, "{density}: {got} instead of {want}");
            }
            let sizes = || shapes.iter().map(|shape| shape.iter().product::<usize>() as f64);
            let kept: f64 = got.iter().zip(sizes()).map(|(density, size)| density * size).sum();
            assert!((kept / sizes().sum::<f64>() - density).abs() < 1e-12);
        }
        assert_eq!(erk_densities(&shapes, 1.0).unwrap(), vec![1.0; 50]);
    }

    #[test]
    fn the_rate_falls_along_a_cosine() {
        let rate = DeathRate::new(0.5, 100).unwrap();
        assert_eq!((rate.at(0), rate.at(100), rate.at(1000)), (0.5, 0.005, 0.005));
        assert!((rate.at(50) - 0.2525).abs() < 1e-12);
        assert_eq!(removals(0.005, 1).unwrap(), 1);
        assert_eq!(removals(0.5, 0).unwrap(), 0);
    }

    #[test]
    fn impossible_numbers_are_named() {
        let of = |error: Error| error.to_string();
        assert!(of(DeathRate::new(f64::NAN, 1).unwrap_err()).contains("rate NaN is not between 0 and 1"));
        assert!(of(DeathRate::new(0.5, 0).unwrap_err()).contains("0 steps"));
        assert!(of(removals(1.5, 3).unwrap_err()).contains("rate 1.5"));
        assert!(of(erk_densities(&[&[3, 0]], 0.5).unwrap_err()).contains("shape [3, 0]"));
        assert!(of(erk_densities(&[&[3, 2]], 0.0).unwrap_err()).contains("density 0"));
    }
}
