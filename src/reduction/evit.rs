//! `EViT`: attentive tokens are kept, inattentive ones fused (Liang et al., ICLR 2022, arXiv 2202.07800).

use std::fmt;

use super::{Cost, Evidence, Host, Method, Site, Step, quarter_blocks, spec, tome::MAX_R, unsuitable};
use crate::{
    Error, Result,
    backend::{Backend, Pooling, ScoreRequest, Select},
};

/// Which share of the tokens a block keeps.
#[derive(Clone, Debug, PartialEq)]
pub enum Keep {
    /// This share in the reducing blocks.
    Rate(f64),
    /// One share per block; 1 (or a missing entry) reduces nothing there.
    PerBlock(Vec<f64>),
}

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
        let rate = |v: &str| v.parse().ok().filter(|&k: &f64| k > 0.0 && k <= 1.0);
        let keep =
            fields.read("keep", "a share above 0 and up to 1, or one per block such as [1,0.7,1]", |v| {
                match spec::list(v) {
                    Some(items) => {
                        items.into_iter().map(rate).collect::<Option<Vec<_>>>().map(Keep::PerBlock)
                    }
                    None => rate(v).map(Keep::Rate),
                }
            })?;
        let layers = fields.layers()?;
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
        if matches!(keep, Some(Keep::PerBlock(_))) && layers.is_some() {
            return Err(fields.error("keep=[...] says what each block does already: leave layers out"));
        }
        let keep = match (keep, &tokens) {
            (Some(keep), _) => keep,
            // Counts alone mean just those counts.
            (None, Some(_)) => Keep::PerBlock(Vec::new()),
            (None, None) => Keep::Rate(0.7),
        };
        Ok(Self { keep, layers, tokens: tokens.unwrap_or_default(), fuse })
    }

    fn rate(&self, layer: usize, depth: usize) -> f64 {
        match &self.keep {
            Keep::PerBlock(rates) => rates.get(layer).copied().unwrap_or(1.0),
            &Keep::Rate(rate) => {
                let reduces = match &self.layers {
                    Some(layers) => layers.contains(&layer),
                    None => quarter_blocks(depth).contains(&layer),
                };
                if reduces { rate } else { 1.0 }
            }
        }
    }

    /// Tokens kept of `n` at a keep rate: the ceiling of the product, both in double precision.
    pub fn count(rate: f64, n: usize) -> usize {
        ((rate * n as f64).ceil() as usize).min(n)
    }
}

impl fmt::Display for Evit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        match &self.keep {
            Keep::Rate(rate) => parts.push(format!("keep={rate}")),
            Keep::PerBlock(rates) if rates.is_empty() && !self.tokens.is_empty() => {}
            Keep::PerBlock(rates) => {
                let items: Vec<_> = rates.iter().map(ToString::to_string).collect();
                parts.push(format!("keep=[{}]", items.join(",")));
            }
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
        if !host.class_token {
            return Err(unsuitable(self, "needs a class token to score the patches, and the model has none"));
        }
        let beyond = |count: usize| count > host.depth;
        let last = self.layers.iter().flatten().max().map_or(0, |l| l + 1);
        let listed = if let Keep::PerBlock(rates) = &self.keep { rates.len() } else { 0 };
        match [last, listed, self.tokens.len()].into_iter().find(|&count| beyond(count)) {
            Some(count) => Err(unsuitable(
                self,
                format!(
                    "block {} does not exist, the model has {}: blocks count from 0",
                    count - 1,
                    host.depth
                ),
            )),
            None => Ok(()),
        }
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let n = tokens.saturating_sub(host.special);
        let counted = self.tokens.get(layer).copied().flatten();
        let keep = counted.unwrap_or_else(|| Self::count(self.rate(layer, host.depth), n));
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
