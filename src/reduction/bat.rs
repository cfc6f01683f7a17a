//! `BAT`: beyond attentive tokens (Long et al., CVPR 2023, arXiv 2211.11315).

use std::{fmt, ops::Range};

use super::{Cost, Evidence, Host, Keep, Method, Site, Step, quarter_blocks, spec, tome::MAX_R};
use crate::{
    Error, Result,
    backend::{Backend, Cluster, Inattentive, Pooling, ScoreRequest},
};

/// Tokens are decoupled by the class token's attention: attentive ones pair up where they resemble each other, inattentive
/// ones form clusters around the peaks of their density, and every group becomes its members' mean, weighted by attention.
///
/// The authors published figures and logs, but no code. Stated are the decoupling, the pairs, a simplified density-peak
/// clustering and weighted sums, in the 4th, 7th and 10th block between attention and MLP. **This crate's choices**: the mean
/// over heads of the scores, odd ranks proposing to even ones by cosine, the density `exp(-mean of squared distances/C)`,
/// nearest centres, and as many pairs as clusters, a tenth of the attentive tokens each, which leaves `ceil(keep·N)` tokens.
/// The authors' own numbers of pairs and clusters are not known, so their accuracies are not this implementation's.
#[derive(Clone, Debug, PartialEq)]
pub struct Bat {
    /// Shares of the tokens that are attentive, of those that are not special.
    pub keep: Keep,
    /// Reducing blocks for [`Keep::Rate`]; by default those at a quarter, half and three quarters of the depth.
    pub layers: Option<Vec<usize>>,
    /// Pairs merged in each reducing block, the last number for all that follow; by default a tenth of the attentive tokens,
    /// at least one.
    pub pairs: Option<Vec<usize>>,
    /// Clusters in each reducing block, likewise.
    pub clusters: Option<Vec<usize>>,
    /// Density from this many nearest tokens; 0 for all.
    pub neighbours: usize,
}

impl Default for Bat {
    /// Seven tenths attentive in blocks 3, 6 and 9 of 12.
    fn default() -> Self {
        Self { keep: Keep::Rate(0.7), layers: None, pairs: None, clusters: None, neighbours: 0 }
    }
}

/// What a reducing block does.
struct Counts {
    attentive: usize,
    pairs: usize,
    clusters: usize,
}

impl Bat {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        let (keep, layers) = Keep::from_fields(fields)?;
        let number = |v: &str| v.parse().ok().filter(|&n: &usize| n <= MAX_R);
        let numbers = |v: &str| match spec::list(v) {
            Some(items) => {
                items.into_iter().map(number).collect::<Option<Vec<_>>>().filter(|n| !n.is_empty())
            }
            None => number(v).map(|n| vec![n]),
        };
        let expected = "a whole number, or one per reducing block such as [4,3,2]";
        Ok(Self {
            keep: keep.unwrap_or(Self::default().keep),
            layers,
            pairs: fields.read("pairs", expected, numbers)?,
            clusters: fields.read("clusters", expected, numbers)?,
            neighbours: fields
                .read("neighbours", "a number of tokens, or 0 for all", number)?
                .unwrap_or_default(),
        })
    }

    fn share(&self, layer: usize, depth: usize) -> f64 {
        self.keep.share(self.layers.as_deref(), layer, depth)
    }

    /// How many reducing blocks come before `layer`.
    fn position(&self, layer: usize, depth: usize) -> usize {
        match (&self.keep, &self.layers) {
            (Keep::PerBlock(rates), _) => rates.iter().take(layer).filter(|&&rate| rate < 1.0).count(),
            (Keep::Rate(_), Some(layers)) => layers.iter().filter(|&&other| other < layer).count(),
            (Keep::Rate(_), None) => quarter_blocks(depth).iter().filter(|&&other| other < layer).count(),
        }
    }

    fn counts(&self, layer: usize, n: usize, depth: usize) -> Option<Counts> {
        let share = self.share(layer, depth);
        let attentive = Keep::count(share, n);
        if share >= 1.0 || attentive == 0 {
            return None;
        }
        let position = self.position(layer, depth);
        let asked = |given: &Option<Vec<usize>>| match given {
            Some(numbers) => numbers.get(position).or(numbers.last()).copied().unwrap_or(0),
            None => (attentive / 10).max(1),
        };
        let pairs = asked(&self.pairs).min(attentive / 2);
        let clusters = asked(&self.clusters).min(n - attentive);
        Some(Counts { attentive, pairs, clusters }).filter(|counts| counts.left() < n)
    }
}

impl Counts {
    fn left(&self) -> usize {
        self.attentive - self.pairs + self.clusters
    }
}

impl fmt::Display for Bat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = vec![self.keep.written()];
        parts.extend(self.layers.iter().map(|layers| format!("layers={}", spec::slashed(layers))));
        for (name, numbers) in [("pairs", &self.pairs), ("clusters", &self.clusters)] {
            match numbers.as_deref() {
                Some([one]) => parts.push(format!("{name}={one}")),
                Some(many) => {
                    let items: Vec<_> = many.iter().map(ToString::to_string).collect();
                    parts.push(format!("{name}=[{}]", items.join(",")));
                }
                None => {}
            }
        }
        if self.neighbours > 0 {
            parts.push(format!("neighbours={}", self.neighbours));
        }
        write!(f, "bat:{}", parts.join(","))
    }
}

impl Method for Bat {
    fn check(&self, host: &Host) -> Result<()> {
        self.keep.check(self, self.layers.as_deref(), 0, host)
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let n = tokens.saturating_sub(host.special);
        let counts = self.counts(layer, n, host.depth)?;
        let (k, b) = (counts.attentive, n - counts.attentive);
        let c = host.width as u64;
        Some(Step {
            site: Site::AfterAttention,
            tokens: host.special + counts.left(),
            scores: ScoreRequest { class: true, ..ScoreRequest::default() },
            pooling: Pooling::Weighted,
            cost: Cost {
                // Each source with each destination, each inattentive token with each other.
                similarity: ((k / 2) * k.div_ceil(2) + b * b) as u64 * c,
                scored: n as u64 + (counts.pairs + b) as u64 * c,
                ..Cost::default()
            },
        })
    }

    fn clusters(&self, layer: usize, tokens: usize, host: &Host) -> Range<usize> {
        let counts = self.counts(layer, tokens.saturating_sub(host.special), host.depth);
        counts.map_or(0..0, |counts| {
            let end = host.special + counts.left();
            end - counts.clusters..end
        })
    }

    fn proportional_attention(&self) -> bool {
        false
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let class_scores = evidence.scores.class.as_ref();
        let n = evidence.count - evidence.special;
        let counts = self.counts(evidence.layer, n, evidence.depth);
        let Counts { attentive, pairs, clusters } =
            counts.ok_or_else(|| Error::argument("bat", "this block does not reduce"))?;
        backend.cluster(&Cluster {
            tokens: evidence.tokens,
            class_scores: class_scores
                .ok_or_else(|| Error::argument("bat", "no class scores were handed in"))?,
            special: evidence.special,
            keep: attentive,
            inattentive: Inattentive::Peaks { pairs, clusters, neighbours: self.neighbours },
        })
    }
}
