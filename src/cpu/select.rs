//! Top-k selection by scores.

use super::{Context, Plan, pack::Shared, plan::build};
use crate::{Error, Result, backend::Select, reference::matching::precedes};

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

/// [`Backend::select`](crate::backend::Backend::select).
pub(super) fn select(context: &Context, select: &Select<'_, super::Tensor>) -> Result<Plan> {
    let [batch, heads, n] = match *select.class_scores.shape() {
        [b, h, n] if b > 0 && h > 0 && n > 0 => [b, h, n],
        ref shape => {
            return Err(Error::argument(
                "select",
                format!("scores have shape {shape:?}, expected (images, heads, N)"),
            ));
        }
    };
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
        let before =
            |&a: &u32, &b: &u32| precedes((mean[a as usize], a as usize), (mean[b as usize], b as usize));
        // Only the kept ones need to be in order.
        if (1..order.len()).contains(&keep) {
            order.select_nth_unstable_by(keep, before);
        }
        order[..keep].sort_unstable_by(before);
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
