//! Top-k selection by scores.

use super::{Context, Plan, Tensor, pack::Shared, plan::build};
use crate::{
    Error, Result,
    backend::{KeepInPlace, Select},
    reference::matching::precedes,
};

/// The mean over heads of (H, N) scores.
pub(super) fn mean_over_heads(scores: &[f32], mean: &mut [f32]) {
    let n = mean.len();
    let heads = scores.len() / n;
    mean.copy_from_slice(&scores[..n]);
    for head in scores[n..].chunks_exact(n) {
        mean.iter_mut().zip(head).for_each(|(sum, score)| *sum += score);
    }
    mean.iter_mut().for_each(|sum| *sum /= heads as f32);
}

/// Which of two tokens stands first.
pub(super) fn before(scores: &[f32]) -> impl Fn(&u32, &u32) -> std::cmp::Ordering {
    |&a, &b| precedes((scores[a as usize], a as usize), (scores[b as usize], b as usize))
}

/// Brings the `keep` tokens that stand first to the front, in any order.
pub(super) fn best_first(tokens: &mut [u32], keep: usize, scores: &[f32]) {
    if (1..tokens.len()).contains(&keep) {
        tokens.select_nth_unstable_by(keep, before(scores));
    }
}

/// (B, H, N) of scores.
fn scores_shape(op: &'static str, scores: &Tensor) -> Result<[usize; 3]> {
    match *scores.shape() {
        [b, h, n] if b > 0 && h > 0 && n > 0 => Ok([b, h, n]),
        ref shape => {
            Err(Error::argument(op, format!("scores have shape {shape:?}, expected (images, heads, N)")))
        }
    }
}

/// [`Backend::select`](crate::backend::Backend::select).
pub(super) fn select(context: &Context, select: &Select<'_, Tensor>) -> Result<Plan> {
    let [batch, heads, n] = scores_shape("select", select.class_scores)?;
    let Select { special, keep, fuse, .. } = *select;
    if special > n || keep > n - special {
        return Err(Error::argument(
            "select",
            format!("cannot keep {keep} of {n} tokens of which {special} are special"),
        ));
    }
    // A fused token of no members would be a made-up token: none is appended.
    let fused = fuse && special + keep < n;
    let m = special + keep + usize::from(fused);
    let scores = select.class_scores.view();
    let mut scratch = context.pool.take(context.threads.count() * 3 * n);
    let scratches = Shared::of(scratch.make_mut());
    let plan = build(context, [batch, n, m], |thread, image, mut part| {
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * 3 * n, 3 * n) };
        let (mean, rest) = scratch.split_at_mut(n);
        let (order, group_of) = bytemuck::cast_slice_mut::<f32, u32>(rest).split_at_mut(n);
        mean_over_heads(&scores[image * heads * n..(image + 1) * heads * n], mean);
        order.iter_mut().zip(0..).for_each(|(order, token)| *order = token);
        let order = &mut order[special..];
        best_first(order, keep, mean);
        // Only the kept ones need to be in order.
        order[..keep].sort_unstable_by(before(mean));
        group_of.fill((special + keep) as u32);
        group_of[..special].iter_mut().zip(0..).for_each(|(group, token)| *group = token);
        for (&token, group) in order[..keep].iter().zip(special as u32..) {
            group_of[token as usize] = group;
        }
        part.fill(group_of, false, |token| {
            if (group_of[token] as usize) < special + keep { 1.0 } else { mean[token] }
        });
    });
    drop(scratch);
    Ok(plan)
}

/// [`Backend::keep_in_place`](crate::backend::Backend::keep_in_place).
pub(super) fn in_place(context: &Context, select: &KeepInPlace<'_, Tensor>) -> Result<Plan> {
    let [batch, heads, n] = scores_shape("keep_in_place", select.scores)?;
    let KeepInPlace { special, keep, masked, .. } = *select;
    if special > n || keep > n {
        return Err(Error::argument(
            "keep_in_place",
            format!("cannot keep {keep} of {n} tokens of which {special} are special"),
        ));
    }
    let m = if masked { n } else { (special + keep).min(n) };
    let scores = select.scores.view();
    let mut scratch = context.pool.take(context.threads.count() * 3 * n);
    let scratches = Shared::of(scratch.make_mut());
    let plan = build(context, [batch, n, m], |thread, image, mut part| {
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * 3 * n, 3 * n) };
        let (mean, rest) = scratch.split_at_mut(n);
        let (order, group_of) = bytemuck::cast_slice_mut::<f32, u32>(rest).split_at_mut(n);
        mean_over_heads(&scores[image * heads * n..(image + 1) * heads * n], mean);
        order.iter_mut().zip(0..).for_each(|(order, token)| *order = token);
        best_first(order, keep, mean);
        let goes = &order[keep..];
        if masked {
            group_of.iter_mut().zip(0..).for_each(|(group, token)| *group = token);
            // What the scores were is not needed any more.
            mean.fill(1.0);
            goes.iter().filter(|&&token| token as usize >= special).for_each(|&t| mean[t as usize] = 0.0);
            return part.fill(group_of, false, |token| mean[token]);
        }
        group_of.fill(0);
        // Nobody's members.
        goes.iter().filter(|&&t| t as usize >= special).for_each(|&t| group_of[t as usize] = n as u32);
        let staying = group_of.iter_mut().filter(|group| **group == 0);
        staying.zip(0..).for_each(|(group, place)| *group = place);
        part.fill(group_of, false, |_| 1.0);
    });
    drop(scratch);
    Ok(plan)
}
