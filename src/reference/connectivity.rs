//! Drop and grow of weights, neurons and heads (`SViTE`, sections 3.2 and 3.3 of arXiv 2106.04533).
//!
//! The rules of order are those of [`crate::connectivity`].

use std::cmp::Reverse;

use super::matching::precedes;
use crate::{
    Error, HostTensor, Result,
    connectivity::{Update, removals},
};

const OP: &str = "drop_and_grow";

/// The magnitude of a value as a number that sorts like it; NaN counts as zero.
fn magnitude(x: f32) -> u32 {
    if x.is_nan() { 0 } else { x.abs().to_bits() }
}

/// What the drop leaves of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivors {
    /// 1 where a weight survives.
    pub mask: Vec<u8>,
    /// What was asked for and what was dropped.
    pub update: Update,
}

/// Drops active weights of the smallest magnitude: those at most as large as the r-th smallest after the zeros, r = `rate` of
/// the active ones, rounded up. Ties all go. Weights outside `mask` count as zero, and so active weights of zero go besides.
/// A layer without holes, or without weights, is left alone.
///
/// # Errors
/// When lengths differ or `rate` is no share.
pub fn drop_smallest(weight: &[f32], mask: &[u8], rate: f64) -> Result<Survivors> {
    same_length("mask", mask.len(), weight.len())?;
    let active = mask.iter().filter(|&&bit| bit != 0).count();
    let asked = removals(rate, active)?;
    if active == mask.len() || asked == 0 {
        let mask = mask.iter().map(|&bit| u8::from(bit != 0)).collect();
        return Ok(Survivors { mask, update: Update { active, ..Update::default() } });
    }
    let key = |(&weight, &bit): (&f32, &u8)| if bit == 0 { 0 } else { magnitude(weight) };
    let keys: Vec<u32> = weight.iter().zip(mask).map(key).collect();
    let rank = weight.len() - active + asked - 1;
    let (_, &mut threshold, _) = keys.clone().select_nth_unstable(rank);
    let mask: Vec<u8> = keys.iter().map(|&key| u8::from(key > threshold)).collect();
    let survive = mask.iter().filter(|&&bit| bit != 0).count();
    Ok(Survivors { mask, update: Update { active, asked, dropped: active - survive } })
}

/// Adds to `survivors` the `count` others with the largest gradients; of equal ones those with the lower indices.
///
/// # Errors
/// When lengths differ or there are not so many others.
pub fn grow_largest(gradient: &[f32], survivors: &[u8], count: usize) -> Result<Vec<u8>> {
    same_length("gradient", gradient.len(), survivors.len())?;
    let candidates = survivors.iter().enumerate().filter(|&(_, &bit)| bit == 0);
    let mut order: Vec<_> = candidates.map(|(at, _)| (Reverse(magnitude(gradient[at])), at)).collect();
    if count > order.len() {
        let what = format!("cannot grow {count} weights where only {} are missing", order.len());
        return Err(Error::argument(OP, what));
    }
    if count < order.len() {
        order.select_nth_unstable(count);
    }
    let mut mask: Vec<u8> = survivors.iter().map(|&bit| u8::from(bit != 0)).collect();
    order[..count].iter().for_each(|&(_, at)| mask[at] = 1);
    Ok(mask)
}

/// An update of a layer: [`drop_smallest`], then [`grow_largest`] of as many. A weight that is dropped and grown at once keeps
/// its value, others start at zero.
///
/// `gradient` is that of the loss with respect to the masked weight, so it is there for weights that are not, too.
///
/// # Errors
/// When lengths differ or `rate` is no share; nothing is changed then.
pub fn drop_and_grow(weight: &mut [f32], gradient: &[f32], mask: &mut [u8], rate: f64) -> Result<Update> {
    same_length("gradient", gradient.len(), weight.len())?;
    let Survivors { mask: survivors, update } = drop_smallest(weight, mask, rate)?;
    let grown = grow_largest(gradient, &survivors, update.dropped)?;
    for ((weight, mask), &new) in weight.iter_mut().zip(mask).zip(&grown) {
        if new == 0 || *mask == 0 {
            *weight = 0.0;
        }
        *mask = new;
    }
    Ok(update)
}

fn same_length(name: &str, held: usize, expected: usize) -> Result<()> {
    if held == expected {
        return Ok(());
    }
    Err(Error::argument(OP, format!("{name} has {held} values, expected {expected}")))
}

/// The score of each neuron of an MLP, or how much its gradients call for it: the magnitudes of its row of `fc1` (n, C) and of
/// its column of `fc2` (C, n), added up.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn neuron_scores(fc1: &impl HostTensor, fc2: &impl HostTensor) -> Result<Vec<f32>> {
    let (&[neurons, width], &[outputs, inputs]) = (fc1.shape(), fc2.shape()) else {
        return Err(Error::argument("neuron_scores", "fc1 and fc2 are matrices"));
    };
    if inputs != neurons {
        let what = format!("fc1 has {neurons} rows, fc2 {inputs} columns; they are the same neurons");
        return Err(Error::argument("neuron_scores", what));
    }
    let mut scores: Vec<f64> = vec![0.0; neurons];
    for (neuron, score) in scores.iter_mut().enumerate() {
        let row = &fc1.data()[neuron * width..(neuron + 1) * width];
        *score = row.iter().map(|&x| f64::from(x.abs())).sum();
    }
    for output in 0..outputs {
        let row = &fc2.data()[output * neurons..(output + 1) * neurons];
        scores.iter_mut().zip(row).for_each(|(score, &x)| *score += f64::from(x.abs()));
    }
    Ok(scores.into_iter().map(|score| score as f32).collect())
}

/// The new mask of an MLP's neurons, from the [`neuron_scores`] of its weights and those of their gradients.
///
/// r = `rate` of the active ones, rounded up: neurons whose score is above the r-th smallest after the missing ones stay, and
/// every other one comes (back) whose gradient is at least the r-th largest among those. So more may come than went when
/// gradients tie, all of them when fewer than r have any.
///
/// # Errors
/// When lengths differ or `rate` is no share.
pub fn update_neurons(scores: &[f32], gradients: &[f32], active: &[u8], rate: f64) -> Result<Vec<u8>> {
    const OP: &str = "update_neurons";
    let n = active.len();
    if scores.len() != n || gradients.len() != n {
        let what = format!("{} scores and {} gradients of {n} neurons", scores.len(), gradients.len());
        return Err(Error::argument(OP, what));
    }
    let count = active.iter().filter(|&&bit| bit != 0).count();
    let asked = removals(rate, count)?;
    if asked == 0 {
        return Ok(active.iter().map(|&bit| u8::from(bit != 0)).collect());
    }
    let keys: Vec<u32> =
        scores.iter().zip(active).map(|(&s, &bit)| if bit == 0 { 0 } else { magnitude(s) }).collect();
    let (_, &mut threshold, _) = keys.clone().select_nth_unstable(asked + n - count - 1);
    let stays = |neuron: usize| keys[neuron] > threshold;
    let calls: Vec<u32> =
        (0..n).map(|neuron| if stays(neuron) { 0 } else { magnitude(gradients[neuron]) }).collect();
    let (_, &mut enough, _) = calls.clone().select_nth_unstable(n - asked);
    Ok((0..n).map(|neuron| u8::from(stays(neuron) || calls[neuron] >= enough)).collect())
}

/// What the heads of an attention are worth, H values each.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadScores {
    /// `mean_b |Σ O·G|`: by how much the loss would change without a head, to first order.
    pub importance: Vec<f32>,
    /// `mean_b Σ |G|`: how much the gradients call for a head.
    pub call: Vec<f32>,
}

/// The scores of heads from what they put out and the gradient of the loss with respect to that, both (B, N, H, D), before the
/// projection.
///
/// # Errors
/// When the shapes differ or are empty.
pub fn head_scores(output: &impl HostTensor, gradient: &impl HostTensor) -> Result<HeadScores> {
    const OP: &str = "head_scores";
    let [batch, tokens, heads, dim] = match *output.shape() {
        [b, n, h, d] if b > 0 && n > 0 && h > 0 && d > 0 => [b, n, h, d],
        ref shape => {
            return Err(Error::argument(OP, format!("output has shape {shape:?}, expected (B, N, H, D)")));
        }
    };
    if gradient.shape() != output.shape() {
        let what = format!("gradient has shape {:?}, expected {:?}", gradient.shape(), output.shape());
        return Err(Error::argument(OP, what));
    }
    let (mut importance, mut call) = (vec![0.0_f64; heads], vec![0.0_f64; heads]);
    for image in 0..batch {
        let rows = output.item(image).chunks_exact(dim).zip(gradient.item(image).chunks_exact(dim));
        let (mut products, mut sizes) = (vec![0.0_f64; heads], vec![0.0_f64; heads]);
        for (at, (output, gradient)) in rows.enumerate().take(tokens * heads) {
            let pairs = output.iter().zip(gradient).map(|(&o, &g)| (f64::from(o), f64::from(g)));
            let (product, size) = pairs.fold((0.0, 0.0), |(p, s), (o, g)| (p + o * g, s + g.abs()));
            products[at % heads] += product;
            sizes[at % heads] += size;
        }
        importance.iter_mut().zip(&products).for_each(|(sum, product)| *sum += product.abs());
        call.iter_mut().zip(&sizes).for_each(|(sum, size)| *sum += size);
    }
    let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| (sum / batch as f64) as f32).collect();
    Ok(HeadScores { importance: mean(importance), call: mean(call) })
}

/// The new mask of an attention's heads: `rate` of the active ones, rounded up, are dropped, those of the smallest importance;
/// then as many come (back) that the gradients call for most.
///
/// # Errors
/// When lengths differ or `rate` is no share.
pub fn update_heads(scores: &HeadScores, active: &[u8], rate: f64) -> Result<Vec<u8>> {
    let heads = active.len();
    if scores.importance.len() != heads || scores.call.len() != heads {
        let what = format!("scores of {} heads, a mask of {heads}", scores.importance.len());
        return Err(Error::argument("update_heads", what));
    }
    let mut mask: Vec<u8> = active.iter().map(|&bit| u8::from(bit != 0)).collect();
    let mut present: Vec<usize> = (0..heads).filter(|&head| mask[head] != 0).collect();
    let count = removals(rate, present.len())?;
    let by = |scores: &[f32]| {
        let scores = scores.to_vec();
        move |&a: &usize, &b: &usize| precedes((scores[a], a), (scores[b], b))
    };
    present.sort_unstable_by(by(&scores.importance));
    present[present.len() - count..].iter().for_each(|&head| mask[head] = 0);
    let mut missing: Vec<usize> = (0..heads).filter(|&head| mask[head] == 0).collect();
    missing.sort_unstable_by(by(&scores.call));
    missing[..count].iter().for_each(|&head| mask[head] = 1);
    Ok(mask)
}
