//! `ToMe`: token merging (Bolya et al., ICLR 2023, arXiv 2210.09461).

use std::fmt;

use super::{Cost, Evidence, Host, Method, Site, Step, spec};
use crate::{
    Error, Result,
    backend::{Attraction, Backend, Matching, Metric, Pooling, ScoreRequest, Weighting},
};

/// The most tokens a block may be asked to remove; what is not there is not removed anyway.
pub(super) const MAX_R: usize = 65_536;

/// How many tokens each block removes.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// `r` on average, changing linearly over the blocks: from `r·(1 - inflection)` to `r·(1 + inflection)`. 0 is
    /// constant, -1 the paper's decreasing schedule (from 2r to 0), 1 its reverse.
    Inflected {
        /// Tokens removed on average.
        r: usize,
        /// Between -1 and 1.
        inflection: f64,
    },
    /// One number per block; blocks past the end remove nothing.
    List(Vec<usize>),
}

impl Schedule {
    /// The number for each of `depth` blocks, before it is clamped to what is there.
    pub fn per_block(&self, depth: usize) -> Vec<usize> {
        (0..depth).map(|block| self.in_block(block, depth)).collect()
    }

    /// The number for block `block` of `depth`.
    fn in_block(&self, block: usize, depth: usize) -> usize {
        match self {
            Self::List(list) => list.get(block).copied().unwrap_or(0),
            // One block has no slope: it removes the average.
            Self::Inflected { r, .. } if depth <= 1 => *r,
            &Self::Inflected { r, inflection } => {
                let r = r as f64;
                let low = (r * (1.0 - inflection)).trunc();
                let high = 2.0 * r - low;
                let step = (high - low) / (depth - 1) as f64;
                (low + step * block as f64).trunc().max(0.0) as usize
            }
        }
    }
}

/// Bipartite soft matching on the keys after every attention, size-weighted merging, proportional attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Tome {
    /// Tokens to remove in each block.
    pub schedule: Schedule,
    /// Add the logarithm of the size to the attention scores (equation 1).
    pub proportional: bool,
}

impl Default for Tome {
    /// r = 13 in every block: the headline setting for 12-block models of 197 tokens.
    fn default() -> Self {
        Self { schedule: Schedule::Inflected { r: 13, inflection: 0.0 }, proportional: true }
    }
}

impl Tome {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        enum R {
            One(usize),
            List(Vec<usize>),
        }
        let number = |v: &str| v.parse().ok().filter(|&r: &usize| r <= MAX_R);
        let r =
            fields.read("r", "a whole number from 0 to 65536, or a list of them such as [8,8,0,4]", |v| {
                match spec::list(v) {
                    Some(items) => items.into_iter().map(number).collect::<Option<Vec<_>>>().map(R::List),
                    None => number(v).map(R::One),
                }
            })?;
        let named = fields.read("schedule", "constant, decreasing or increasing", |v| match v {
            "constant" => Some(0.0),
            "decreasing" => Some(-1.0),
            "increasing" => Some(1.0),
            _ => None,
        })?;
        let number = |v: &str| v.parse().ok().filter(|f: &f64| (-1.0..=1.0).contains(f));
        let inflection =
            fields.read("inflection", "a number from -1 (decreasing) to 1 (increasing)", number)?;
        let proportional = fields.flag("proportional", true)?;
        if named.is_some() && inflection.is_some() {
            return Err(fields.error("schedule and inflection say the same thing: give one of them"));
        }
        let inflection = named.or(inflection);
        let schedule = match r {
            Some(R::List(_)) if inflection.is_some() => {
                return Err(
                    fields.error("a list of r is a schedule already: leave schedule and inflection out")
                );
            }
            Some(R::List(list)) => Schedule::List(list),
            Some(R::One(r)) => Schedule::Inflected { r, inflection: inflection.unwrap_or(0.0) },
            None => Schedule::Inflected { r: 13, inflection: inflection.unwrap_or(0.0) },
        };
        Ok(Self { schedule, proportional })
    }
}

impl fmt::Display for Tome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.schedule {
            Schedule::List(list) => {
                let items: Vec<_> = list.iter().map(ToString::to_string).collect();
                write!(f, "tome:r=[{}]", items.join(","))?;
            }
            Schedule::Inflected { r, inflection } => {
                write!(f, "tome:r={r}")?;
                match inflection {
                    0.0 => {}
                    -1.0 => f.write_str(",schedule=decreasing")?,
                    1.0 => f.write_str(",schedule=increasing")?,
                    other => write!(f, ",inflection={other}")?,
                }
            }
        }
        if !self.proportional {
            f.write_str(",proportional=false")?;
        }
        Ok(())
    }
}

impl Method for Tome {
    fn check(&self, _host: &Host) -> Result<()> {
        Ok(())
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let r = (layer < host.depth).then(|| self.schedule.in_block(layer, host.depth))?;
        let merges = r.min(tokens.saturating_sub(host.special) / 2);
        let (a, b) = (tokens.div_ceil(2) as u64, (tokens / 2) as u64);
        (merges > 0).then(|| Step {
            site: Site::AfterAttention,
            tokens: tokens - merges,
            scores: ScoreRequest::default(),
            pooling: Pooling::Weighted,
            cost: Cost { similarity: a * b * (host.width / host.heads) as u64, ..Cost::default() },
        })
    }

    fn proportional_attention(&self) -> bool {
        self.proportional
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let heads = evidence.heads.as_ref();
        backend.matching(&Matching {
            metric: Metric::Keys(heads.ok_or_else(|| Error::argument("tome", "no keys were handed in"))?),
            attraction: Attraction::Cosine,
            weighting: Weighting::Size(evidence.sizes),
            special: evidence.special,
            merges: evidence.count - evidence.step.tokens,
            both_ways: false,
        })
    }
}
