//! Tokens by the class token's attention: the attentive ones stay or pair up, the others join them or form clusters (BAT,
//! arXiv 2211.11315; MSTM, arXiv 2306.04897).

use rayon::prelude::*;

use super::{
    expect_shape,
    matching::{mean_over_heads, precedes, weigh},
    tokens_shape,
};
use crate::{
    Error, Result, Tensor, TokenPlan,
    backend::{Cluster, Inattentive},
};

const OP: &str = "cluster";

/// What is decided of one image, in the terms of the papers. Tokens are positions in the input, special ones counted; ranks
/// are positions in `attentive`, places positions in `rest`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// The tokens with the highest scores, descending.
    pub attentive: Vec<usize>,
    /// The others, ascending.
    pub rest: Vec<usize>,
    /// MSTM: the rank that each of `rest` joins, and their similarity.
    pub targets: Vec<(usize, f32)>,
    /// BAT: merged pairs (source rank, destination rank, similarity), by descending similarity.
    pub merged: Vec<(usize, usize, f32)>,
    /// BAT: how near the others lie to each of `rest`.
    pub density: Vec<f32>,
    /// BAT: how far the next denser one is.
    pub delta: Vec<f32>,
    /// BAT: density times delta.
    pub gamma: Vec<f32>,
    /// BAT: the places that clusters form around, by descending gamma.
    pub centres: Vec<usize>,
    /// BAT: the position in `centres` of each of `rest`.
    pub clusters: Vec<usize>,
}

/// The rows of an image's tokens.
struct Rows<'a> {
    data: &'a [f32],
    width: usize,
}

impl Rows<'_> {
    fn row(&self, token: usize) -> &[f32] {
        &self.data[token * self.width..(token + 1) * self.width]
    }

    fn length(&self, token: usize) -> f64 {
        let square: f64 = self.row(token).iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        square.sqrt().max(1e-12)
    }

    fn cosine(&self, a: usize, b: usize) -> f32 {
        let pairs = self.row(a).iter().zip(self.row(b));
        let product: f64 = pairs.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
        (product / (self.length(a) * self.length(b))) as f32
    }

    /// The square of the distance over the root of the width; what is no number is infinitely far.
    fn distance_squared(&self, a: usize, b: usize) -> f64 {
        let pairs = self.row(a).iter().zip(self.row(b));
        let square = pairs.map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum::<f64>();
        if square.is_nan() { f64::INFINITY } else { square / self.width as f64 }
    }

    /// The rank among `others` that is most similar to `token`, ties to the lower one.
    fn nearest(&self, token: usize, others: impl Iterator<Item = (usize, usize)>) -> (usize, f32) {
        let scored = others.map(|(rank, other)| (rank, self.cosine(token, other)));
        scored.min_by(|a, b| precedes((a.1, a.0), (b.1, b.0))).unwrap_or((0, f32::NEG_INFINITY))
    }
}

/// Decides for one image.
///
/// # Errors
/// When the tensors of `cluster` do not fit each other.
pub fn decide(cluster: &Cluster<'_, Tensor>, image: usize) -> Result<Decision> {
    let [_, n, width] = check(cluster)?;
    let rows = Rows { data: cluster.tokens.item(image), width };
    let scores = mean_over_heads(cluster.class_scores, image);
    let mut attentive: Vec<usize> = (cluster.special..n).collect();
    attentive.sort_unstable_by(|&a, &b| precedes((scores[a], a), (scores[b], b)));
    let mut rest = attentive.split_off(cluster.keep);
    rest.sort_unstable();
    let ranked = || attentive.iter().copied().enumerate();
    let mut decision = Decision::default();
    match cluster.inattentive {
        Inattentive::Join => {
            decision.targets = rest.iter().map(|&token| rows.nearest(token, ranked())).collect();
        }
        Inattentive::Peaks { pairs, clusters, neighbours } => {
            // Odd ranks propose to even ones; the most similar proposals are accepted.
            let proposal = |(rank, token): (usize, usize)| {
                let even = ranked().filter(|(rank, _)| rank % 2 == 0);
                let (to, similarity) = rows.nearest(token, even);
                (rank, to, similarity)
            };
            let odd = ranked().filter(|(rank, _)| rank % 2 == 1);
            decision.merged = odd.map(proposal).collect();
            decision.merged.sort_by(|a, b| precedes((a.2, a.0), (b.2, b.0)));
            decision.merged.truncate(pairs);
            find_peaks(&rows, &rest, clusters, neighbours, &mut decision);
        }
    }
    Ok(Decision { attentive, rest, ..decision })
}

/// Density-peak clustering (BAT; equations 1 to 3 of SCE-MAE, which restates it).
fn find_peaks(rows: &Rows<'_>, rest: &[usize], clusters: usize, neighbours: usize, decision: &mut Decision) {
    let squares: Vec<Vec<f64>> =
        rest.iter().map(|&i| rest.iter().map(|&j| rows.distance_squared(i, j)).collect()).collect();
    let density = |row: &Vec<f64>| {
        let mut near = row.clone();
        if neighbours > 0 {
            near.sort_by(f64::total_cmp);
            near.truncate(neighbours);
        }
        (-near.iter().sum::<f64>() / near.len() as f64).exp() as f32
    };
    decision.density = squares.iter().map(density).collect();
    let density = &decision.density;
    let delta = |(i, row): (usize, &Vec<f64>)| {
        // Tokens infinitely far are nobody's neighbours, and nobody's farthest.
        let near = row.iter().zip(density).filter(|(d, _)| d.is_finite());
        let denser = near.clone().filter(|&(_, &rho)| rho > density[i]).map(|(&d, _)| d);
        let farthest = || near.map(|(&d, _)| d).max_by(f64::total_cmp);
        denser.min_by(f64::total_cmp).or_else(farthest).unwrap_or(0.0).sqrt() as f32
    };
    decision.delta = squares.iter().enumerate().map(delta).collect();
    decision.gamma = density.iter().zip(&decision.delta).map(|(rho, delta)| rho * delta).collect();
    let gamma = &decision.gamma;
    let mut centres: Vec<usize> = (0..rest.len()).collect();
    centres.sort_unstable_by(|&i, &j| precedes((gamma[i], i), (gamma[j], j)));
    centres.truncate(clusters);
    if centres.is_empty() {
        return;
    }
    let assign = |i: usize| {
        let own = centres.iter().position(|&centre| centre == i);
        // The first of equals: the lower rank.
        let by_distance = |&a: &usize, &b: &usize| squares[i][centres[a]].total_cmp(&squares[i][centres[b]]);
        own.or_else(|| (0..centres.len()).min_by(by_distance)).unwrap_or(0)
    };
    decision.clusters = (0..rest.len()).map(assign).collect();
    decision.centres = centres;
}

impl Decision {
    /// The tokens that make up each output token, in output order: special tokens, attentive ones that stay by rank, clusters.
    pub fn groups(&self, special: usize) -> Vec<Vec<usize>> {
        let mut joined: Vec<Vec<usize>> = self.attentive.iter().map(|&token| vec![token]).collect();
        for (&token, &(rank, _)) in self.rest.iter().zip(&self.targets) {
            joined[rank].push(token);
        }
        for &(source, destination, _) in &self.merged {
            joined[destination].push(self.attentive[source]);
        }
        let stays = |rank: usize| self.merged.iter().all(|&(source, _, _)| source != rank);
        let attentive =
            joined.into_iter().enumerate().filter(|&(rank, _)| stays(rank)).map(|(_, group)| group);
        let mut groups: Vec<Vec<usize>> = (0..special).map(|token| vec![token]).chain(attentive).collect();
        let first = groups.len();
        groups.resize(first + self.centres.len(), Vec::new());
        for (&token, &cluster) in self.rest.iter().zip(&self.clusters) {
            groups[first + cluster].push(token);
        }
        groups.iter_mut().for_each(|group| group.sort_unstable());
        groups
    }
}

/// (B, N, C) of tensors that fit each other.
fn check(cluster: &Cluster<'_, Tensor>) -> Result<[usize; 3]> {
    let [batch, n, width] = tokens_shape(OP, "tokens", cluster.tokens)?;
    let heads = cluster.class_scores.shape().get(1).copied().unwrap_or(0).max(1);
    expect_shape(OP, "class scores", cluster.class_scores, &[batch, heads, n])?;
    if cluster.special > n || cluster.keep == 0 || cluster.keep > n - cluster.special {
        return Err(Error::argument(
            OP,
            format!("cannot keep {} of {n} tokens of which {} are special", cluster.keep, cluster.special),
        ));
    }
    Ok([batch, n, width])
}

pub(super) fn plan(cluster: &Cluster<'_, Tensor>) -> Result<TokenPlan> {
    let [batch, n, _] = check(cluster)?;
    let groups = (0..batch).into_par_iter().map(|image| {
        let scores = mean_over_heads(cluster.class_scores, image);
        Ok(weigh(decide(cluster, image)?.groups(cluster.special), |token| scores[token]))
    });
    TokenPlan::from_groups(n, &groups.collect::<Result<Vec<_>>>()?)
}
