//! `SViTE`+: a learned selector keeps the best tokens before the first block (Chen et al., `NeurIPS` 2021, arXiv 2106.04533).

use std::{fmt, sync::Arc};

use super::{Cost, Evidence, Host, Method, OwnWeights, Site, Step, spec, tome::MAX_R, unsuitable};
use crate::{
    Error, Result, Tensor,
    backend::{Backend, KeepInPlace, Linear, Pooling, ScoreRequest},
    model::Reducers,
};

/// What becomes of tokens that are not selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Removal {
    /// They leave: the blocks run on fewer tokens.
    #[default]
    Gather,
    /// They are multiplied by zero and stay, as in the official code, whose training and evaluation they are. Saves nothing.
    Mask,
}

/// The k best tokens by one linear score, before block 0; the class token competes, and stays whatever its score.
///
/// So k or k + 1 tokens survive, as it stands among the best or not. Gathered, there are always places for k + 1 (k and the
/// special tokens); a place too many holds a token of size 0, which no attention sees: the result is that of exactly the
/// selected tokens. The published runs differ from the default in two ways: they multiply by the mask ([`Removal::Mask`]) and
/// add fresh Gumbel noise to the scores also when they evaluate; without [`Svite::noise`] none is added here.
#[derive(Clone, Debug, PartialEq)]
pub struct Svite {
    /// k, the class token counted if it is among the best.
    pub tokens: usize,
    /// What becomes of the others.
    pub removal: Removal,
    /// Every attention has a selector of its own besides, which multiplies its input by a mask of the k best tokens (the
    /// official code's variant `*_data`); the residual stream keeps them.
    pub layerwise: bool,
    /// What is added to the scores, (B, N): the first before block 0, the others, if any, in each block's attention. Moved to
    /// the device on every pass.
    pub noise: Vec<Arc<Tensor>>,
}

impl Default for Svite {
    /// 138 of 197 tokens, gathered: the official scripts' 70 %.
    fn default() -> Self {
        Self { tokens: 138, removal: Removal::Gather, layerwise: false, noise: Vec::new() }
    }
}

impl Svite {
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<Self> {
        let default = Self::default();
        let count = |v: &str| v.parse().ok().filter(|k| (1..=MAX_R).contains(k));
        let tokens = fields.read("tokens", "a number of tokens from 1 to 65536", count)?;
        let removal = fields.read("mode", "gather or mask", |v| match v {
            "gather" => Some(Removal::Gather),
            "mask" => Some(Removal::Mask),
            _ => None,
        })?;
        Ok(Self {
            tokens: tokens.unwrap_or(default.tokens),
            removal: removal.unwrap_or_default(),
            layerwise: fields.flag("layerwise", false)?,
            noise: Vec::new(),
        })
    }

    pub(super) fn own_weights(&self, host: &Host) -> OwnWeights {
        let layer_selectors = if self.layerwise { host.depth } else { 0 };
        OwnWeights { selector: true, layer_selectors, ..OwnWeights::default() }
    }

    fn scores<B: Backend>(
        &self,
        backend: &B,
        tokens: &B::Tensor,
        selector: &Linear<B::Tensor>,
        noise: usize,
    ) -> Result<B::Tensor> {
        let noise =
            self.noise.get(noise).map(|noise| backend.upload_f32(Tensor::clone(noise))).transpose()?;
        backend.token_scores(tokens, selector, noise.as_ref())
    }
}

impl fmt::Display for Svite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "svite:tokens={}", self.tokens)?;
        if self.removal == Removal::Mask {
            f.write_str(",mode=mask")?;
        }
        if self.layerwise {
            f.write_str(",layerwise=true")?;
        }
        Ok(())
    }
}

impl Method for Svite {
    fn check(&self, host: &Host) -> Result<()> {
        if self.tokens == 0 {
            return Err(unsuitable(self, "keeps no token; keep 1 at least"));
        }
        if self.removal == Removal::Mask && host.aux_head {
            return Err(unsuitable(
                self,
                "tokens that are multiplied by zero stay in the sequence, where the maximum of the auxiliary head would read them; \
                 use mode=gather, or readout=class",
            ));
        }
        let Some(weights) = host.weights else { return Ok(()) };
        if !weights.selector {
            return Err(unsuitable(
                self,
                "needs the selector it was trained with (gumbel.weight and gumbel.bias), but the model has none; load a \
                 checkpoint that was trained with SViTE+",
            ));
        }
        if self.layerwise && weights.layer_selectors < host.depth {
            return Err(unsuitable(
                self,
                format!(
                    "needs a selector in every attention (blocks.0.attn.gumbel.* to blocks.{}.attn.gumbel.*), but the model \
                     has {}; leave layerwise out",
                    host.depth.saturating_sub(1),
                    weights.layer_selectors
                ),
            ));
        }
        Ok(())
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        let left = match self.removal {
            Removal::Gather => self.tokens.saturating_add(host.special).min(tokens),
            Removal::Mask => tokens,
        };
        (layer == 0 && self.tokens < tokens).then(|| Step {
            site: Site::BeforeBlock,
            tokens: left,
            scores: ScoreRequest::default(),
            pooling: Pooling::Weighted,
            cost: Cost { linear: (tokens * host.width) as u64, ..Cost::default() },
        })
    }

    /// So that nobody looks at places that stand for no token. All others have size 1, whose logarithm is 0.
    fn proportional_attention(&self) -> bool {
        self.removal == Removal::Gather
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let selector = evidence.weights.selector.as_ref();
        let selector = selector.ok_or_else(|| Error::argument("svite", "the model has no selector"))?;
        let scores = self.scores(backend, evidence.tokens, selector, 0)?;
        backend.keep_in_place(&KeepInPlace {
            scores: &scores,
            special: evidence.special,
            keep: self.tokens,
            masked: self.removal == Removal::Mask,
        })
    }

    fn masks_attention(&self, _layer: usize) -> bool {
        self.layerwise
    }

    fn attention_mask<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        normed: &B::Tensor,
        special: usize,
        weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Plan>> {
        let count = backend.shape(normed).get(1).copied().unwrap_or(0);
        let Some(selector) = weights.layer_selectors.get(layer).filter(|_| self.layerwise) else {
            return Ok(None);
        };
        if self.tokens >= count {
            return Ok(None);
        }
        let scores = self.scores(backend, normed, selector, layer + 1)?;
        let keep = KeepInPlace { scores: &scores, special, keep: self.tokens, masked: true };
        backend.keep_in_place(&keep).map(Some)
    }
}
