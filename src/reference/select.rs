//! Top-k selection by scores (EViT, section 3; SViTE, section 3.2).

use rayon::prelude::*;

use super::matching::{mean_over_heads, precedes};
use crate::{
    Error, HostTensor, Result, TokenPlan,
    backend::{KeepInPlace, Select},
};

/// [`Backend::select`](crate::backend::Backend::select).
///
/// # Errors
/// When the scores have another shape, or counts do not fit.
pub fn plan(select: &Select<'_, impl HostTensor>) -> Result<TokenPlan> {
    let [batch, _, n] = match *select.class_scores.shape() {
        [b, h, n] if b > 0 && h > 0 && n > 0 => [b, h, n],
        ref shape => {
            return Err(Error::argument(
                "select",
                format!("scores have shape {shape:?}, expected (images, heads, N)"),
            ));
        }
    };
    if select.special > n || select.keep > n - select.special {
        return Err(Error::argument(
            "select",
            format!("cannot keep {} of {n} tokens of which {} are special", select.keep, select.special),
        ));
    }
    let groups = (0..batch).into_par_iter().map(|image| {
        let scores = mean_over_heads(select.class_scores, image);
        let mut order: Vec<usize> = (select.special..n).collect();
        order.sort_unstable_by(|&a, &b| precedes((scores[a], a), (scores[b], b)));
        let mut rest = order.split_off(select.keep);
        let mut groups: Vec<Vec<(usize, f32)>> =
            (0..select.special).chain(order).map(|token| vec![(token, 1.0)]).collect();
        // A fused token of no members would be a made-up token: none is appended.
        if select.fuse && !rest.is_empty() {
            rest.sort_unstable();
            groups.push(rest.into_iter().map(|token| (token, scores[token])).collect());
        }
        groups
    });
    TokenPlan::from_groups(n, &groups.collect::<Vec<_>>())
}

/// [`Backend::keep_in_place`](crate::backend::Backend::keep_in_place).
///
/// # Errors
/// When the scores have another shape, or counts do not fit.
pub fn in_place(select: &KeepInPlace<'_, impl HostTensor>) -> Result<TokenPlan> {
    let [batch, n] = match *select.scores.shape() {
        [b, h, n] if b > 0 && h > 0 && n > 0 => [b, n],
        ref shape => {
            return Err(Error::argument(
                "keep_in_place",
                format!("scores have shape {shape:?}, expected (images, heads, N)"),
            ));
        }
    };
    if select.special > n || select.keep > n {
        return Err(Error::argument(
            "keep_in_place",
            format!("cannot keep {} of {n} tokens of which {} are special", select.keep, select.special),
        ));
    }
    let groups = (0..batch).into_par_iter().map(|image| {
        let scores = mean_over_heads(select.scores, image);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_unstable_by(|&a, &b| precedes((scores[a], a), (scores[b], b)));
        let mut goes = vec![false; n];
        order[select.keep..]
            .iter()
            .filter(|&&token| token >= select.special)
            .for_each(|&token| goes[token] = true);
        if select.masked {
            return (0..n).map(|token| vec![(token, if goes[token] { 0.0 } else { 1.0 })]).collect();
        }
        let mut groups: Vec<Vec<(usize, f32)>> =
            (0..n).filter(|&token| !goes[token]).map(|token| vec![(token, 1.0)]).collect();
        groups.resize((select.special + select.keep).min(n), Vec::new());
        groups
    });
    TokenPlan::from_groups(n, &groups.collect::<Vec<_>>())
}
