//! `EViT`: attentive tokens are kept, inattentive ones fused (Liang et al., ICLR 2022, arXiv 2202.07800).

use std::fmt;

use super::{Cost, Evidence, Host, Keep, Method, Site, Step, spec, tome::MAX_R};
use crate::{
    Error, Result,
    backend::{Backend, Pooling, ScoreRequest, Select},
};

/// Top-k selection by the class token's attention inside some blocks, with or without one token that fuses the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Evit {
    /// Shares of the tokens that are not special.
    pub keep: Keep,
    /// Reducing blocks for [`Keep::Rate`]; by default those at a quarter, half and three quarters of the depth.
    pub layers: Option<Vec<usize>>,
    /// Explicit counts per block, instead of the share where there is one.
    pub tokens: Vec<Option<usize>>,
    /// Append the fused token.
    pub fuse: bool,
}

impl Default for Evit {
    /// Keep rate 0.7 in blocks 3, 6 and 9 of 12, with the fused token: the published setting for DeiT-S.
    fn default() -> Self {
        Self { keep: Keep::Rate(0.7), layers: None, tokens: Vec::new(), fuse: true }
    }
}

impl Evit {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        let (keep, layers) = Keep::from_fields(fields)?;
        let count = |v: &str| match v {
            "-" => Some(None),
            _ => v.parse().ok().filter(|&n| (1..=MAX_R).contains(&n)).map(Some),
        };
        let tokens = fields.read(
            "tokens",
            "one count (or - for none) per block in brackets, such as [-,40,-,25]",
            |v| spec::list(v)?.into_iter().map(count).collect::<Option<Vec<_>>>(),
        )?;
        let fuse = fields.flag("fuse", true)?;
        let keep = match (keep, &tokens) {
            (Some(keep), _) => keep,
            // Counts alone mean just those counts.
            (None, Some(_)) => Keep::PerBlock(Vec::new()),
            (None, None) => Keep::Rate(0.7),
        };
        Ok(Self { keep, layers, tokens: tokens.unwrap_or_default(), fuse })
    }

    /// Tokens kept of `n` at a keep rate: the ceiling of the product, both in double precision.
    pub fn count(rate: f64, n: usize) -> usize {
        Keep::count(rate, n)
    }
}

impl fmt::Display for Evit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        // Counts alone mean just those counts.
        let counts_alone =
            matches!(&self.keep, Keep::PerBlock(rates) if rates.is_empty()) && !self.tokens.is_empty();
        if !counts_alone {
            parts.push(self.keep.written());
        }
        if let Some(layers) = &self.layers {
            parts.push(format!("layers={}", spec::slashed(layers)));
        }
        if !self.tokens.is_empty() {
            let item = |count: &Option<usize>| count.map_or_else(|| "-".to_owned(), |n| n.to_string());
            parts.push(format!("tokens=[{}]", self.tokens.iter().map(item).collect::<Vec<_>>().join(",")));
        }
        if !self.fuse {
            parts.push("fuse=false".to_owned());
        }
        write!(f, "evit:{}", parts.join(","))
    }
}

impl Method for Evit {
    fn check(&self, host: &Host) -> Result<()> {
        self.keep.check(self, self.layers.as_deref(), self.tokens.len(), host)
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let n = tokens.saturating_sub(host.special);
        let counted = self.tokens.get(layer).copied().flatten();
        let keep = counted
            .unwrap_or_else(|| Self::count(self.keep.share(self.layers.as_deref(), layer, host.depth), n));
        // Keeping everything is an ordinary block: no selection and no fused token.
        (keep < n).then(|| Step {
            site: Site::AfterAttention,
            tokens: host.special + keep + usize::from(self.fuse),
            scores: ScoreRequest { class: true, ..ScoreRequest::default() },
            pooling: Pooling::Weighted,
            // One addition a score, and each fused token times its score.
            cost: Cost {
                scored: n as u64 + if self.fuse { ((n - keep) * host.width) as u64 } else { 0 },
                ..Cost::default()
            },
        })
    }

    fn proportional_attention(&self) -> bool {
        false
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let class_scores = evidence.scores.class.as_ref();
        backend.select(&Select {
            class_scores: class_scores
                .ok_or_else(|| Error::argument("evit", "no class scores were handed in"))?,
            special: evidence.special,
            keep: evidence.step.tokens - evidence.special - usize::from(self.fuse),
            fuse: self.fuse,
        })
    }
}
