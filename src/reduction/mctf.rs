//! MCTF: multi-criteria token fusion (Lee et al., CVPR 2024, arXiv 2403.10030).

use std::fmt;

use super::{Cost, Evidence, Host, Method, Site, Step, quarter_blocks, spec, tome::MAX_R, unsuitable};
use crate::{
    Error, Result,
    backend::{Attraction, Backend, Matching, Metric, Pooling, ScoreRequest, Weighting},
};

/// Fusion stops here, whatever was asked for (a constant of the official code).
const FLOOR: usize = 10;

/// How many tokens an active block removes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// So many.
    Count(usize),
    /// This share of the tokens that are not special, in (0, 1).
    Share(f64),
}

/// Whose attention decides, and whether it is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookAhead {
    /// The attention of the block just run; fusion after it (mode 0).
    Off,
    /// The attention about to run, folded over the groups and applied (mode 1, the paper's method, section 3.3).
    Reuse,
    /// The attention about to run, computed again on the fused tokens (mode 2).
    Precise,
}

/// The weights of a group's members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MctfPooling {
    /// In proportion to size (type 0).
    Size,
    /// In proportion to size and attention received (type 1, the paper's).
    Attention,
    /// The elementwise maximum (type 2).
    Max,
    /// The plain mean (type 3).
    Mean,
}

/// Similarity, informativeness and size decide together; matching runs in both directions; the attention map is looked
/// at one step ahead.
#[derive(Clone, Debug, PartialEq)]
pub struct Mctf {
    /// Tokens to remove in each active block.
    pub amount: Amount,
    /// Active blocks; by default all but the first for a count, and those at a quarter, half and three quarters of the
    /// depth for a share (MCTF-Fast).
    pub layers: Option<Vec<usize>>,
    /// Whose attention decides.
    pub look_ahead: LookAhead,
    /// Temperatures of similarity, informativeness and size (section 3.2); 0 switches a criterion off.
    pub temperatures: [f64; 3],
    /// Match from A to B and from B to A (figure 3).
    pub both_ways: bool,
    /// How a group is averaged.
    pub pooling: MctfPooling,
    /// Add the logarithm of the size to the attention scores.
    pub proportional: bool,
}

impl Default for Mctf {
    /// r = 16 in all blocks but the first, temperatures 1, 20 and 40: the published setting for DeiT.
    fn default() -> Self {
        Self {
            amount: Amount::Count(16),
            layers: None,
            look_ahead: LookAhead::Reuse,
            temperatures: [1.0, 20.0, 40.0],
            both_ways: true,
            pooling: MctfPooling::Attention,
            proportional: true,
        }
    }
}

impl Mctf {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        let default = Self::default();
        let amount = |v: &str| {
            let share = |v: &str| v.parse().ok().filter(|&s: &f64| s > 0.0 && s < 1.0).map(Amount::Share);
            v.parse().ok().filter(|&r| (1..=MAX_R).contains(&r)).map(Amount::Count).or_else(|| share(v))
        };
        let amount = fields
            .read(
                "r",
                "a whole number of tokens from 1 to 65536, or a share of them between 0 and 1",
                amount,
            )?
            .unwrap_or(default.amount);
        let layers = fields.layers()?;
        let look_ahead =
            fields.read("ahead", "0 (off), 1 (reuse the attention) or 2 (precise)", |v| match v {
                "0" => Some(LookAhead::Off),
                "1" => Some(LookAhead::Reuse),
                "2" => Some(LookAhead::Precise),
                _ => None,
            })?;
        let temperatures =
            fields.read("tau", "three temperatures, 0 or at least 0.01, such as 1/20/40", |v| {
                let numbers: Option<Vec<f64>> = v.split('/').map(|t| t.trim().parse().ok()).collect();
                let sane = |t: &f64| *t == 0.0 || (0.01..=1e6).contains(t);
                <[f64; 3]>::try_from(numbers?).ok().filter(|t| t.iter().all(sane))
            })?;
        let both_ways = fields.flag("both", default.both_ways)?;
        let pooling = fields.read("pool", "attention, size, max or mean", |v| match v {
            "size" | "0" => Some(MctfPooling::Size),
            "attention" | "1" => Some(MctfPooling::Attention),
            "max" | "2" => Some(MctfPooling::Max),
            "mean" | "3" => Some(MctfPooling::Mean),
            _ => None,
        })?;
        Ok(Self {
            amount,
            layers,
            look_ahead: look_ahead.unwrap_or(default.look_ahead),
            temperatures: temperatures.unwrap_or(default.temperatures),
            both_ways,
            pooling: pooling.unwrap_or(default.pooling),
            proportional: fields.flag("proportional", default.proportional)?,
        })
    }

    fn active(&self, layer: usize, depth: usize) -> bool {
        match (&self.layers, self.amount) {
            (Some(layers), _) => layers.contains(&layer),
            (None, Amount::Count(_)) => layer > 0,
            (None, Amount::Share(_)) => quarter_blocks(depth).contains(&layer),
        }
    }

    /// Tokens that leave when `tokens` enter an active block, in the official order of the rules.
    pub fn merges(&self, tokens: usize, special: usize) -> usize {
        let free = tokens.saturating_sub(special);
        let room = tokens.saturating_sub(FLOOR);
        let r = match self.amount {
            Amount::Count(r) => r.min(room),
            // The official code compares T - share with the floor, which binds at T ≤ 10 only.
            Amount::Share(_) if room == 0 => 0,
            Amount::Share(share) => (free as f64 * share).trunc() as usize,
        };
        r.min(free / 2)
    }
}

impl fmt::Display for Mctf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::default();
        match self.amount {
            Amount::Count(r) => write!(f, "mctf:r={r}")?,
            Amount::Share(share) => write!(f, "mctf:r={share}")?,
        }
        if let Some(layers) = &self.layers {
            write!(f, ",layers={}", spec::slashed(layers))?;
        }
        match self.look_ahead {
            LookAhead::Off => f.write_str(",ahead=0")?,
            LookAhead::Reuse => {}
            LookAhead::Precise => f.write_str(",ahead=2")?,
        }
        if self.temperatures != default.temperatures {
            let [similarity, informativeness, size] = self.temperatures;
            write!(f, ",tau={similarity}/{informativeness}/{size}")?;
        }
        if !self.both_ways {
            f.write_str(",both=false")?;
        }
        match self.pooling {
            MctfPooling::Size => f.write_str(",pool=size")?,
            MctfPooling::Attention => {}
            MctfPooling::Max => f.write_str(",pool=max")?,
            MctfPooling::Mean => f.write_str(",pool=mean")?,
        }
        if !self.proportional {
            f.write_str(",proportional=false")?;
        }
        Ok(())
    }
}

impl Method for Mctf {
    fn check(&self, host: &Host) -> Result<()> {
        match self.layers.iter().flatten().find(|&&layer| layer >= host.depth) {
            Some(layer) => Err(unsuitable(
                self,
                format!("layers: block {layer} does not exist, the model has {}", host.depth),
            )),
            None => Ok(()),
        }
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        if !self.active(layer, host.depth) {
            return None;
        }
        let merges = self.merges(tokens, host.special);
        let (a, b) = (tokens.div_ceil(2) as u64, (tokens / 2) as u64);
        (merges > 0).then(|| Step {
            site: match self.look_ahead {
                LookAhead::Off => Site::AfterBlock,
                LookAhead::Reuse => Site::BeforeAttention { reuse: true },
                LookAhead::Precise => Site::BeforeAttention { reuse: false },
            },
            tokens: tokens - merges,
            scores: ScoreRequest { received: true, ..ScoreRequest::default() },
            pooling: if self.pooling == MctfPooling::Max { Pooling::Max } else { Pooling::Weighted },
            cost: Cost { similarity: a * b * host.width as u64, ..Cost::default() },
        })
    }

    fn proportional_attention(&self) -> bool {
        self.proportional
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let received = evidence.scores.received.as_ref();
        let received = received.ok_or_else(|| Error::argument("mctf", "no attention was handed in"))?;
        let [similarity, informativeness, size] = self.temperatures;
        backend.matching(&Matching {
            metric: Metric::Rows(evidence.tokens),
            attraction: Attraction::MultiCriteria {
                tau_similarity: similarity,
                informativeness: (received, informativeness),
                size: (evidence.sizes, size),
            },
            weighting: match self.pooling {
                MctfPooling::Size => Weighting::Size(evidence.sizes),
                MctfPooling::Attention => Weighting::SizeAndReceived(evidence.sizes, received),
                MctfPooling::Max | MctfPooling::Mean => Weighting::Uniform,
            },
            special: evidence.special,
            merges: evidence.count - evidence.step.tokens,
            both_ways: self.both_ways,
        })
    }
}
