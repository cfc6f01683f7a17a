//! Bipartite soft matching of tokens (ToMe, section 3; MCTF, section 3.2).

use std::cmp::Ordering;

use rayon::prelude::*;

use super::{
    expect_shape,
    gemm::{Matrix, Threads, gemm},
    tokens_shape,
};
use crate::{
    Error, HostTensor, Result, TokenPlan,
    backend::{Attraction, Matching, Metric, Weighting},
};

/// The matching of one image, in the terms of the papers. Set A is the tokens at even positions (A index `i` is token
/// `2i`), set B those at odd positions (B index `j` is token `2j+1`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matches {
    /// The best score of each A token, `-inf` for special ones.
    pub best: Vec<f32>,
    /// The B index that score belongs to.
    pub best_in_b: Vec<usize>,
    /// A indices that stay: ascending if there are special tokens, else by descending score.
    pub kept: Vec<usize>,
    /// Merged pairs (A index, B index), by descending score.
    pub merged: Vec<(usize, usize)>,
    /// The second phase, from B into the A tokens that stayed.
    pub back: Option<BackMatches>,
}

/// The second phase of a matching in both directions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BackMatches {
    /// The best score of each B token, `-inf` for special ones.
    pub best: Vec<f32>,
    /// The position within [`Matches::kept`] that score belongs to.
    pub best_in_kept: Vec<usize>,
    /// B indices that stay, special ones excluded, by descending score.
    pub kept: Vec<usize>,
    /// Merged pairs (B index, position within [`Matches::kept`]), by descending score.
    pub merged: Vec<(usize, usize)>,
}

/// Descending by score, NaN last, then ascending by index: the one rule of precedence of this crate.
pub(crate) fn precedes(a: (f32, usize), b: (f32, usize)) -> Ordering {
    let by_score = match (a.0.is_nan(), b.0.is_nan()) {
        (false, false) => b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal),
        (a, b) => a.cmp(&b),
    };
    by_score.then(a.1.cmp(&b.1))
}

/// The index that [`precedes`] all others, and its score.
fn argmax(scores: impl Iterator<Item = (usize, f32)>) -> (usize, f32) {
    scores.min_by(|a, b| precedes((a.1, a.0), (b.1, b.0))).unwrap_or((0, f32::NEG_INFINITY))
}

/// How many of the special tokens 0..special stand in A, and in B.
fn special_in(special: usize) -> (usize, usize) {
    (special.div_ceil(2), special / 2)
}

/// Matches one image by its score matrix (ceil(N/2), floor(N/2)): `merges` tokens leave, of which half, rounded down,
/// from A if `both_ways`. Special tokens (the first ones) neither leave nor take others in.
///
/// # Errors
/// When `scores` does not fit `tokens`, or `merges` exceeds `(tokens - special)/2`.
pub fn match_scores(
    scores: &[f32],
    tokens: usize,
    special: usize,
    merges: usize,
    both_ways: bool,
) -> Result<Matches> {
    let (na, nb) = (tokens.div_ceil(2), tokens / 2);
    if scores.len() != na * nb || special > tokens || merges > (tokens - special) / 2 {
        return Err(Error::argument(
            "matching",
            format!(
                "{} scores and {merges} merges do not fit {tokens} tokens of which {special} are special; at most {} \
                 can be merged",
                scores.len(),
                tokens.saturating_sub(special) / 2
            ),
        ));
    }
    let (sa, sb) = special_in(special);
    let forward = if both_ways { merges / 2 } else { merges };
    let (best_in_b, best): (Vec<usize>, Vec<f32>) =
        (0..na)
            .map(|i| {
                if i < sa {
                    (0, f32::NEG_INFINITY)
                } else {
                    argmax((sb..nb).map(|j| (j, scores[i * nb + j])))
                }
            })
            .unzip();
    let mut order: Vec<usize> = (sa..na).collect();
    order.sort_unstable_by(|&a, &b| precedes((best[a], a), (best[b], b)));
    let merged = order[..forward].iter().map(|&i| (i, best_in_b[i])).collect();
    let mut kept = order.split_off(forward);
    if special > 0 {
        kept.extend(0..sa);
        kept.sort_unstable();
    }
    let back = both_ways.then(|| {
        let (best_in_kept, best): (Vec<usize>, Vec<f32>) = (0..nb)
            .map(|j| {
                let candidates = kept.iter().enumerate().filter(|&(_, &i)| i >= sa);
                let scores = candidates.map(|(at, &i)| (at, scores[i * nb + j]));
                if j < sb { (0, f32::NEG_INFINITY) } else { argmax(scores) }
            })
            .unzip();
        let mut order: Vec<usize> = (sb..nb).collect();
        order.sort_unstable_by(|&a, &b| precedes((best[a], a), (best[b], b)));
        let merged = order[..merges - forward].iter().map(|&j| (j, best_in_kept[j])).collect();
        BackMatches { best, best_in_kept, kept: order.split_off(merges - forward), merged }
    });
    Ok(Matches { best, best_in_b, kept, merged, back })
}

impl Matches {
    /// The tokens that make up each output token, in output order: special tokens, then what stays of A, then what
    /// stays of B. One way, B stands in order of position; both ways, in order of descending score.
    pub fn groups(&self, tokens: usize, special: usize) -> Vec<Vec<usize>> {
        let nb = tokens / 2;
        let mut of_b: Vec<Vec<usize>> = (0..nb).map(|j| vec![2 * j + 1]).collect();
        for &(i, j) in &self.merged {
            of_b[j].push(2 * i);
        }
        let mut of_a: Vec<Vec<usize>> = self.kept.iter().map(|&i| vec![2 * i]).collect();
        let (sa, sb) = special_in(special);
        let tail: Vec<usize> = match &self.back {
            Some(back) => {
                for &(j, at) in &back.merged {
                    let absorbed = std::mem::take(&mut of_b[j]);
                    of_a[at].extend(absorbed);
                }
                back.kept.clone()
            }
            None => (sb..nb).collect(),
        };
        let mut groups: Vec<Vec<usize>> = (0..special).map(|token| vec![token]).collect();
        let stays = self.kept.iter().zip(&mut of_a).filter(|&(&i, _)| i >= sa);
        groups.extend(stays.map(|(_, group)| std::mem::take(group)));
        groups.extend(tail.into_iter().map(|j| std::mem::take(&mut of_b[j])));
        groups.iter_mut().for_each(|group| group.sort_unstable());
        groups
    }
}

/// ToMe's every-k-th matcher (merge.py, unused by its models): of each run of `every` tokens the last takes in the others'
/// choice of partner, the tail is dropped. Returns the groups of each output token.
///
/// # Errors
/// When `every` is 0 or the rows are not `tokens` rows of one width.
pub fn match_every_kth(metric: &[f32], tokens: usize, every: usize) -> Result<Vec<Vec<usize>>> {
    if every == 0 || tokens == 0 || metric.is_empty() || !metric.len().is_multiple_of(tokens) {
        return Err(Error::argument(
            "matching",
            format!("{} values are not {tokens} tokens to be merged by runs of {every}", metric.len()),
        ));
    }
    let width = metric.len() / tokens;
    let unit = normalised_rows(metric, width);
    let mut groups: Vec<Vec<usize>> = (0..tokens / every).map(|run| vec![run * every + every - 1]).collect();
    let targets: Vec<usize> = groups.iter().map(|group| group[0]).collect();
    let row = |token: usize| &unit[token * width..(token + 1) * width];
    for token in (0..tokens / every * every).filter(|token| token % every != every - 1) {
        let cosine = |&target: &usize| row(token).iter().zip(row(target)).map(|(a, b)| a * b).sum::<f32>();
        let (run, _) = argmax(targets.iter().map(cosine).enumerate());
        groups[run].push(token);
    }
    groups.iter_mut().for_each(|group| group.sort_unstable());
    Ok(groups)
}

/// Rows divided by their length. A zero row stays zero: it is similar to nothing.
fn normalised_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut out = rows.to_vec();
    for row in out.chunks_mut(width) {
        let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        if square > 0.0 {
            let length = square.sqrt() as f32;
            row.iter_mut().for_each(|x| *x /= length);
        }
    }
    out
}

/// The rows that are compared, of one image, (N, width), and their width: the mean over heads of the keys for
/// [`Metric::Keys`].
pub fn metric_rows(metric: &Metric<'_, impl HostTensor>, image: usize) -> (Vec<f32>, usize) {
    match metric {
        Metric::Rows(rows) => (rows.item(image).to_vec(), rows.width()),
        Metric::Keys(heads) => {
            let (h, d) = (heads.heads, heads.head_dim);
            let rows = heads.packed.item(image).chunks(heads.packed.width()).flat_map(|token| {
                let keys = &token[h * d..2 * h * d];
                (0..d).map(move |c| keys.chunks(d).map(|key| key[c]).sum::<f32>() / h as f32)
            });
            (rows.collect(), d)
        }
    }
}

/// The mean over heads of (B, H, N) scores, for one image.
pub(super) fn mean_over_heads(scores: &impl HostTensor, image: usize) -> Vec<f32> {
    let n = scores.width();
    let heads = scores.item(image).len() / n;
    (0..n).map(|t| scores.item(image).chunks(n).map(|head| head[t]).sum::<f32>() / heads as f32).collect()
}

/// `(value/max)^exponent` of the inverse of each value: how MCTF turns attention received and size into a factor of the
/// attraction. Infinite and undefined ratios become 1, the neutral factor.
fn inverse_factor(values: &[f32], temperature: f64) -> Vec<f32> {
    if temperature == 0.0 {
        return vec![1.0; values.len()];
    }
    let inverse: Vec<f64> = values.iter().map(|&v| 1.0 / f64::from(v)).collect();
    let max = inverse.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let factor = |v: f64| (v / max).powf(1.0 / temperature) as f32;
    inverse.into_iter().map(|v| if (v / max).is_finite() { factor(v) } else { 1.0 }).collect()
}

/// The attraction of every A token and every B token of one image, (ceil(N/2), floor(N/2)).
///
/// # Errors
/// When the tensors of `matching` do not fit each other.
pub fn attractions(matching: &Matching<'_, impl HostTensor>, image: usize) -> Result<Vec<f32>> {
    check(matching)?;
    let (rows, width) = metric_rows(&matching.metric, image);
    let unit = normalised_rows(&rows, width);
    let tokens = rows.len() / width;
    let (na, nb) = (tokens.div_ceil(2), tokens / 2);
    let mut scores = vec![0.0; na * nb];
    if nb > 0 {
        let a = Matrix::rows(&unit, na, width, 2 * width);
        let b = Matrix::rows(&unit[width..], nb, width, 2 * width);
        gemm(&mut scores, nb, false, 1.0, a, b.transposed(), Threads::One);
    }
    if let Attraction::MultiCriteria { tau_similarity, informativeness, size } = matching.attraction {
        let received = inverse_factor(&mean_over_heads(informativeness.0, image), informativeness.1);
        let sizes = size.0.map(|sizes| inverse_factor(sizes.item(image), size.1));
        let criterion = |token: usize| received[token] * sizes.as_ref().map_or(1.0, |sizes| sizes[token]);
        for (i, row) in scores.chunks_mut(nb.max(1)).enumerate() {
            for (j, score) in row.iter_mut().enumerate() {
                let similarity = f32::midpoint(*score, 1.0).max(0.0);
                let similarity = match tau_similarity {
                    0.0 => 1.0,
                    1.0 => similarity,
                    tau => f64::from(similarity).powf(1.0 / tau) as f32,
                };
                *score = similarity * (criterion(2 * i) * criterion(2 * j + 1));
            }
        }
    }
    Ok(scores)
}

/// (B, N) of a matching whose tensors fit each other.
fn check<T: HostTensor>(matching: &Matching<'_, T>) -> Result<[usize; 2]> {
    const OP: &str = "matching";
    let [batch, n, _] = match &matching.metric {
        Metric::Rows(rows) => tokens_shape(OP, "metric", *rows)?,
        Metric::Keys(heads) => {
            let shape = tokens_shape(OP, "packed heads", heads.packed)?;
            let width = heads.heads.saturating_mul(heads.head_dim);
            if width == 0 || shape[2] < width.saturating_mul(2) {
                return Err(Error::argument(
                    OP,
                    format!("packed rows of {} hold no keys of {} heads", shape[2], heads.heads),
                ));
            }
            shape
        }
    };
    let heads_shape = |t: &T| match *t.shape() {
        [b, h, m] if b == batch && m == n && h > 0 => Ok(()),
        _ => Err(Error::argument(
            OP,
            format!("scores have shape {:?}, expected ({batch}, heads, {n})", t.shape()),
        )),
    };
    if let Attraction::MultiCriteria { informativeness, size, .. } = &matching.attraction {
        heads_shape(informativeness.0)?;
        size.0.map_or(Ok(()), |sizes| expect_shape(OP, "sizes", sizes, &[batch, n]))?;
    }
    match &matching.weighting {
        Weighting::Uniform => {}
        Weighting::Size(sizes) => {
            sizes.map_or(Ok(()), |sizes| expect_shape(OP, "sizes", sizes, &[batch, n]))?;
        }
        Weighting::SizeAndReceived(sizes, received) => {
            heads_shape(received)?;
            sizes.map_or(Ok(()), |sizes| expect_shape(OP, "sizes", sizes, &[batch, n]))?;
        }
    }
    Ok([batch, n])
}

/// The groups with the weight of each member: in proportion to `weight`, or equal where those sum to nothing usable.
pub(super) fn weigh(groups: Vec<Vec<usize>>, weight: impl Fn(usize) -> f32) -> Vec<Vec<(usize, f32)>> {
    let weigh_group = |group: Vec<usize>| {
        // A lone token keeps its bits.
        if let [only] = group[..] {
            return vec![(only, 1.0)];
        }
        let total: f32 = group.iter().map(|&token| weight(token)).sum();
        let equal = 1.0 / group.len() as f32;
        let usable = total.is_finite() && total > 0.0;
        group.iter().map(|&t| (t, if usable { weight(t) / total } else { equal })).collect()
    };
    groups.into_iter().map(weigh_group).collect()
}

/// [`Backend::matching`](crate::backend::Backend::matching).
///
/// # Errors
/// When shapes or counts do not fit.
pub fn plan(matching: &Matching<'_, impl HostTensor>) -> Result<TokenPlan> {
    let [batch, n] = check(matching)?;
    let groups = (0..batch).into_par_iter().map(|image| {
        let scores = attractions(matching, image)?;
        let matches = match_scores(&scores, n, matching.special, matching.merges, matching.both_ways)?;
        let groups = matches.groups(n, matching.special);
        Ok(match matching.weighting {
            Weighting::Uniform | Weighting::Size(None) => weigh(groups, |_| 1.0),
            Weighting::Size(Some(sizes)) => weigh(groups, |token| sizes.item(image)[token]),
            Weighting::SizeAndReceived(sizes, received) => {
                let received = mean_over_heads(received, image);
                weigh(groups, |t| received[t] * sizes.map_or(1.0, |sizes| sizes.item(image)[t]))
            }
        })
    });
    TokenPlan::from_groups(n, &groups.collect::<Result<Vec<_>>>()?)
}
