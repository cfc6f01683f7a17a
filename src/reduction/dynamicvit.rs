//! `DynamicViT`: learned predictors say who is kept (Rao et al., `NeurIPS` 2021, arXiv 2106.02034).

use std::fmt;

use super::{Cost, Evidence, Host, Keep, Method, OwnWeights, Site, Step, quarter_blocks, spec, unsuitable};
use crate::{
    Error, Result,
    backend::{Backend, Pooling, ScoreRequest},
};

/// Tokens are cut before some blocks: a predictor of the method's own, trained with the model, scores them, and the best
/// stay, in descending order of score. What is dropped is lost.
///
/// The official code keeps the class token alone apart; here every special token (distillation, registers) is kept, too,
/// and the shares are those of the patches of the model's own input size, where the official DeiT always counts 196.
/// A cut that would keep everything is left out: it would change the order of the tokens only.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicVit {
    /// Which share of the initial patches is left: after cut `p` it is `rate` to the power of `p + 1` for [`Keep::Rate`],
    /// the entry `p` of [`Keep::PerBlock`].
    pub keep: Keep,
    /// The blocks before which tokens are cut; by default those at a quarter, half and three quarters of the depth.
    pub layers: Option<Vec<usize>>,
}

impl Default for DynamicVit {
    /// 0.7, 0.49 and 0.343 of the patches from blocks 3, 6 and 9 of 12 on: the published setting.
    fn default() -> Self {
        Self { keep: Keep::Rate(0.7), layers: None }
    }
}

impl DynamicVit {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        let rate = |v: &str| v.parse().ok().filter(|&k: &f64| k > 0.0 && k <= 1.0);
        let keep = fields.read(
            "keep",
            "a share above 0 and up to 1, or the share of the first patches left after each cut such as [0.7,0.5,0.3]",
            |v| match spec::list(v) {
                Some(items) => {
                    let rates = items.into_iter().map(rate).collect::<Option<Vec<_>>>()?;
                    (!rates.is_empty()).then_some(Keep::PerBlock(rates))
                }
                None => rate(v).map(Keep::Rate),
            },
        )?;
        let layers = fields.layers()?;
        if let Some(Keep::PerBlock(rates)) = &keep {
            let cuts = layers.as_ref().map_or(3, Vec::len);
            if rates.len() != cuts {
                return Err(fields.error(format!(
                    "{} shares for {cuts} cuts: give one for each of layers (three if there are none)",
                    rates.len()
                )));
            }
        }
        Ok(Self { keep: keep.unwrap_or(Keep::Rate(0.7)), layers })
    }

    /// The blocks before which tokens are cut, of a model whose [`quarter_blocks`] are `quarters`.
    fn cuts<'a>(&'a self, quarters: &'a [usize; 3]) -> &'a [usize] {
        self.layers.as_deref().unwrap_or(quarters)
    }

    fn share(&self, cut: usize) -> f64 {
        match &self.keep {
            Keep::Rate(rate) => rate.powf((cut + 1) as f64),
            Keep::PerBlock(shares) => shares.get(cut).copied().unwrap_or(1.0),
        }
    }

    /// Patches kept of `patches` at the start: the product truncated, both in double precision.
    pub fn count(share: f64, patches: usize) -> usize {
        (patches as f64 * share) as usize
    }

    pub(super) fn own_weights(&self, host: &Host) -> OwnWeights {
        OwnWeights { predictors: self.cuts(&quarter_blocks(host.depth)).len(), ..OwnWeights::default() }
    }
}

impl fmt::Display for DynamicVit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.keep {
            Keep::Rate(rate) => write!(f, "dynamicvit:keep={rate}")?,
            Keep::PerBlock(rates) => {
                let items: Vec<_> = rates.iter().map(ToString::to_string).collect();
                write!(f, "dynamicvit:keep=[{}]", items.join(","))?;
            }
        }
        match &self.layers {
            Some(layers) => write!(f, ",layers={}", spec::slashed(layers)),
            None => Ok(()),
        }
    }
}

impl Method for DynamicVit {
    fn check(&self, host: &Host) -> Result<()> {
        let quarters = quarter_blocks(host.depth);
        let cuts = self.cuts(&quarters);
        if let Some(layer) = cuts.iter().find(|&&layer| layer >= host.depth) {
            return Err(unsuitable(
                self,
                format!("layers: block {layer} does not exist, the model has {}", host.depth),
            ));
        }
        if cuts.windows(2).any(|two| two[0] >= two[1]) {
            return Err(unsuitable(
                self,
                format!("{} blocks have no three different places to cut at; give layers", host.depth),
            ));
        }
        if let Keep::PerBlock(shares) = &self.keep
            && shares.len() != cuts.len()
        {
            return Err(unsuitable(self, format!("{} shares for {} cuts", shares.len(), cuts.len())));
        }
        for (cut, layer) in cuts.iter().enumerate() {
            if Self::count(self.share(cut), host.patches()) == 0 {
                return Err(unsuitable(
                    self,
                    format!(
                        "keeps {} of {} patches before block {layer}: none",
                        self.share(cut),
                        host.patches()
                    ),
                ));
            }
        }
        let has = host.weights.map_or(usize::MAX, |weights| weights.predictors);
        if has < cuts.len() {
            return Err(unsuitable(
                self,
                format!(
                    "cuts {} times and needs a predictor each time (score_predictor.0.* to score_predictor.{}.*, each of \
                     in_conv.0, in_conv.1, out_conv.0, out_conv.2 and out_conv.4), but the model has {has}; load a \
                     checkpoint that was trained with DynamicViT",
                    cuts.len(),
                    cuts.len() - 1
                ),
            ));
        }
        Ok(())
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let cut = self.cuts(&quarter_blocks(host.depth)).iter().position(|&cut| cut == layer)?;
        let n = tokens.saturating_sub(host.special);
        let keep = Self::count(self.share(cut), host.patches());
        let (rows, c) = (n as u64, host.width as u64);
        let (half, quarter) = (c / 2, c / 4);
        (keep < n).then(|| Step {
            site: Site::BeforeBlock,
            tokens: host.special + keep,
            scores: ScoreRequest::default(),
            pooling: Pooling::Weighted,
            cost: Cost {
                linear: rows * (c * c + c * half + half * quarter + 2 * quarter),
                normalised: rows * c,
                ..Cost::default()
            },
        })
    }

    fn proportional_attention(&self) -> bool {
        false
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let predictors = &evidence.weights.predictors;
        // Layers ascend: as many cuts lie before this one as there are smaller numbers.
        let quarters = quarter_blocks(evidence.depth);
        let cut = self.cuts(&quarters).iter().filter(|&&cut| cut < evidence.layer).count();
        let predictor = predictors.get(cut);
        let predictor = predictor
            .ok_or_else(|| Error::argument("dynamicvit", format!("the model has no predictor {cut}")))?;
        let keep = evidence.step.tokens - evidence.special;
        backend.keep_predicted(evidence.tokens, predictor, evidence.special, keep)
    }
}
