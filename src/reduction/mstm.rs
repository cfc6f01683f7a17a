//! `MSTM`: inattentive tokens join the attentive ones they resemble (Bian et al., 2023, arXiv 2306.04897).

use std::{fmt, ops::RangeInclusive};

use super::{Cost, Evidence, Host, Keep, Method, Site, Step, spec, unsuitable};
use crate::{
    Error, Result,
    backend::{Backend, Cluster, Epilogue, Inattentive, Pooling, ScoreRequest},
    model::Reducers,
};

/// Sides of windows: one of 1 is the grid itself, beyond the last they would hold all of it.
pub(crate) const SCALES: RangeInclusive<usize> = 2..=63;

/// Coarse copies of the grid are added to it before the first cut; then every cut merges each inattentive token into the
/// attentive one that it resembles most. Nothing is dropped.
///
/// The authors published no code, and an abstract is all that was at hand: that tokens are split by importance, that the
/// others are merged with more important ones by similarity, and that features of several scales are fused before. **All the
/// rest is this crate's choice**: the class token's attention as importance, cosines of the tokens after the attention,
/// means weighted by importance, `ceil(keep·N)` tokens kept in blocks 3, 6 and 9 of 12, windows of 2 x 2, averaged, projected
/// by `msf.{scale}.weight` and `.bias` where the model has them, and spread back. The authors' figures are not this
/// implementation's.
#[derive(Clone, Debug, PartialEq)]
pub struct Mstm {
    /// Shares of the tokens that are not special.
    pub keep: Keep,
    /// Reducing blocks for [`Keep::Rate`]; by default those at a quarter, half and three quarters of the depth.
    pub layers: Option<Vec<usize>>,
    /// Sides of the windows whose means are fused before the first cut; none for no fusion.
    pub scales: Vec<usize>,
}

impl Default for Mstm {
    /// Keep rate 0.7 in blocks 3, 6 and 9 of 12, one scale of 2.
    fn default() -> Self {
        Self { keep: Keep::Rate(0.7), layers: None, scales: vec![2] }
    }
}

impl Mstm {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        let (keep, layers) = Keep::from_fields(fields)?;
        let scales =
            fields.read("scales", "none, or ascending window sides from 2 to 63 such as 2/4", |v| {
                if v == "none" {
                    return Some(Vec::new());
                }
                let scales: Option<Vec<usize>> = v.split('/').map(|s| s.trim().parse().ok()).collect();
                scales.filter(|s| {
                    s.iter().all(|s| SCALES.contains(s)) && s.windows(2).all(|two| two[0] < two[1])
                })
            })?;
        let default = Self::default();
        Ok(Self { keep: keep.unwrap_or(default.keep), layers, scales: scales.unwrap_or(default.scales) })
    }

    fn share(&self, layer: usize, depth: usize) -> f64 {
        self.keep.share(self.layers.as_deref(), layer, depth)
    }

    /// The first block that reduces.
    fn first(&self, host: &Host) -> Option<usize> {
        (0..host.depth).find(|&layer| self.reduces(layer, host.patches(), host.depth))
    }

    fn reduces(&self, layer: usize, patches: usize, depth: usize) -> bool {
        Keep::count(self.share(layer, depth), patches) < patches
    }
}

impl fmt::Display for Mstm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = vec![self.keep.written()];
        parts.extend(self.layers.iter().map(|layers| format!("layers={}", spec::slashed(layers))));
        if self.scales.is_empty() {
            parts.push("scales=none".to_owned());
        } else if self.scales != [2] {
            parts.push(format!("scales={}", spec::slashed(&self.scales)));
        }
        write!(f, "mstm:{}", parts.join(","))
    }
}

impl Method for Mstm {
    fn check(&self, host: &Host) -> Result<()> {
        self.keep.check(self, self.layers.as_deref(), 0, host)?;
        match self.scales.iter().find(|scale| !SCALES.contains(scale)) {
            Some(scale) => Err(unsuitable(self, format!("scale {scale}: windows have sides from 2 to 63"))),
            None => Ok(()),
        }
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let n = tokens.saturating_sub(host.special);
        let keep = Keep::count(self.share(layer, host.depth), n);
        let fusion = || {
            let cells = |scale: &usize| host.grid[0].div_ceil(*scale) * host.grid[1].div_ceil(*scale);
            let projected =
                |scale: &&usize| host.weights.is_none_or(|own| own.projections >> **scale & 1 == 1);
            let scales = self.scales.iter().filter(|scale| SCALES.contains(scale));
            let cells: usize = scales.filter(projected).map(cells).sum();
            (cells * host.width * host.width) as u64
        };
        // Keeping everything is an ordinary block: the order would change and nothing else.
        (keep < n).then(|| Step {
            site: Site::AfterAttention,
            tokens: host.special + keep,
            scores: ScoreRequest { class: true, ..ScoreRequest::default() },
            pooling: Pooling::Weighted,
            cost: Cost {
                similarity: (keep * (n - keep) * host.width) as u64,
                scored: n as u64 + ((n - keep) * host.width) as u64,
                linear: if self.first(host) == Some(layer) { fusion() } else { 0 },
                ..Cost::default()
            },
        })
    }

    fn proportional_attention(&self) -> bool {
        false
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let class_scores = evidence.scores.class.as_ref();
        backend.cluster(&Cluster {
            tokens: evidence.tokens,
            class_scores: class_scores
                .ok_or_else(|| Error::argument("mstm", "no class scores were handed in"))?,
            special: evidence.special,
            keep: evidence.step.tokens - evidence.special,
            inattentive: Inattentive::Join,
        })
    }

    fn prepare<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        tokens: &B::Tensor,
        host: &Host,
        weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Tensor>> {
        if self.scales.is_empty() || self.first(host) != Some(layer) {
            return Ok(None);
        }
        let mut fused = tokens.clone();
        for &scale in &self.scales {
            let mut coarse = backend.pool_windows(tokens, host.special, host.grid, scale)?;
            if let Some((_, projection)) = weights.projections.iter().find(|(of, _)| *of == scale) {
                coarse = backend.linear(&coarse, projection.all(), Epilogue::None)?;
            }
            fused = backend.add_windows(fused, &coarse, host.special, host.grid, scale)?;
        }
        Ok(Some(fused))
    }
}
