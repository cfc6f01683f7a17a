//! Token reduction: one file per method. A method decides where in the network tokens go and how many, and builds the
//! [`TokenPlan`](crate::TokenPlan) of each step out of backend operations. It knows no device.

mod bat;
mod dynamicvit;
mod evit;
mod fit;
mod keep;
mod mctf;
mod mstm;
mod spec;
mod svite;
mod tome;

use std::{fmt, ops::Range, str::FromStr};

pub use bat::Bat;
pub use dynamicvit::DynamicVit;
pub use evit::Evit;
pub use fit::{Backbone, matrix};
pub use keep::Keep;
pub use mctf::{Amount, LookAhead, Mctf, MctfPooling};
pub use mstm::Mstm;
pub(crate) use mstm::SCALES;
pub use svite::{Removal, Svite};
pub use tome::{Schedule, Tome};

use crate::{
    Error, Result,
    backend::{Backend, Heads, Pooling, ScoreRequest, Scores},
    model::Reducers,
};

/// What a method may know of the model it reduces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Number of blocks.
    pub depth: usize,
    /// Tokens at the front that are never reduced: class, distillation and register tokens.
    pub special: usize,
    /// Token 0 is a class token.
    pub class_token: bool,
    /// Width of the residual stream.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Rows and columns of patches that enter block 0.
    pub grid: [usize; 2],
    /// An auxiliary head reads the largest logits over all patches' tokens that are left.
    pub aux_head: bool,
    /// The weights of methods that the model has; `None` when only its shape is known, which refuses no method.
    pub weights: Option<OwnWeights>,
}

impl Host {
    /// Patches that enter block 0.
    pub fn patches(&self) -> usize {
        self.grid[0] * self.grid[1]
    }
}

/// Which weights of reduction methods a model has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnWeights {
    /// DynamicViT's predictors.
    pub predictors: usize,
    /// SViTE's selector.
    pub selector: bool,
    /// SViTE's selectors in the attentions.
    pub layer_selectors: usize,
    /// MSTM's projections: bit s for the scale s.
    pub projections: u64,
}

/// Where in a block tokens are reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// Before everything that the block does: no attention has been computed.
    BeforeBlock,
    /// Before the attention, on the strength of a look at its map; `reuse` folds that map over the groups and applies
    /// it, otherwise the attention is computed anew on the reduced tokens.
    BeforeAttention {
        /// Fold the map instead of computing another one.
        reuse: bool,
    },
    /// After the attention's residual, before the MLP.
    AfterAttention,
    /// After the whole block, with the scores of its attention.
    AfterBlock,
}

/// What a method does in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where.
    pub site: Site,
    /// Tokens that are left, special ones included.
    pub tokens: usize,
    /// The attention scores its decision needs.
    pub scores: ScoreRequest,
    /// How groups are combined.
    pub pooling: Pooling,
    /// What the decision takes, per image.
    pub cost: Cost,
}

/// Multiply-adds of a decision, per image, by what counting tools make of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Affine layers of the method's own.
    pub linear: u64,
    /// Similarities.
    pub similarity: u64,
    /// Tokens scored, and elements fused by a selection.
    pub scored: u64,
    /// Elements that pass a LayerNorm of the method's own.
    pub normalised: u64,
}

/// What a method sees when it decides.
pub struct Evidence<'a, B: Backend + ?Sized> {
    /// Block number, from 0.
    pub layer: usize,
    /// Blocks of the model.
    pub depth: usize,
    /// What [`Method::step`] said.
    pub step: Step,
    /// The residual stream, (B, N, C).
    pub tokens: &'a B::Tensor,
    /// Queries, keys and, after the attention, values of this block; absent before the block.
    pub heads: Option<Heads<'a, B::Tensor>>,
    /// The scores asked for.
    pub scores: &'a Scores<B::Tensor>,
    /// Sizes of the tokens, (B, N); absent before the first reduction.
    pub sizes: Option<&'a B::Tensor>,
    /// Tokens N.
    pub count: usize,
    /// Special tokens.
    pub special: usize,
    /// The weights of reduction methods that the model has.
    pub weights: &'a Reducers<B::Tensor>,
}

/// A token reduction method.
pub trait Method: Sync {
    /// Whether the method can run on `host`.
    ///
    /// # Errors
    /// Says what does not fit.
    fn check(&self, host: &Host) -> Result<()>;

    /// What happens in block `layer` when `tokens` tokens enter it; nothing if `None`. Depends on counts alone, so
    /// every shape of a forward pass is known beforehand.
    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step>;

    /// Whether attention weighs keys by the number of patches they stand for.
    fn proportional_attention(&self) -> bool;

    /// The plan of a step.
    ///
    /// # Errors
    /// Those of the backend's operations.
    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan>;

    /// Which output tokens of the step in block `layer` are clusters of tokens that nobody attends to, when `tokens` tokens
    /// enter it: what a picture tells apart from merged ones.
    fn clusters(&self, _layer: usize, _tokens: usize, _host: &Host) -> Range<usize> {
        0..0
    }

    /// What the residual stream (B, N, C) becomes before block `layer`, as many tokens; nothing if it stays as it is.
    ///
    /// # Errors
    /// Those of the backend's operations.
    fn prepare<B: Backend>(
        &self,
        _backend: &B,
        _layer: usize,
        _tokens: &B::Tensor,
        _host: &Host,
        _weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Tensor>> {
        Ok(None)
    }

    /// Whether [`Method::attention_mask`] may have something for block `layer`. Where it never has, backends compute the LayerNorm
    /// before attention together with the layer after it.
    fn masks_attention(&self, _layer: usize) -> bool {
        true
    }

    /// What becomes of the input of block `layer`'s attention, `normed` (B, N, C): a plan of as many tokens, usually a mask,
    /// or nothing. The residual stream does not see it.
    ///
    /// # Errors
    /// Those of the backend's operations.
    fn attention_mask<B: Backend>(
        &self,
        _backend: &B,
        _layer: usize,
        _normed: &B::Tensor,
        _special: usize,
        _weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Plan>> {
        Ok(None)
    }
}

/// Any of this crate's methods, as written in a specification string.
///
/// ```
/// use foveate::Reduction;
/// let reduction: Reduction = "tome:r=16,schedule=decreasing".parse()?;
/// assert_eq!(reduction.to_string(), "tome:r=16,schedule=decreasing");
/// assert!("tome:r=many".parse::<Reduction>().is_err());
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Reduction {
    /// No reduction.
    #[default]
    None,
    /// Token Merging.
    Tome(Tome),
    /// Multi-criteria Token Fusion.
    Mctf(Mctf),
    /// Expediting ViTs via token reorganisations.
    Evit(Evit),
    /// Dynamic token sparsification.
    DynamicVit(DynamicVit),
    /// Sparse training with a token selector.
    Svite(Svite),
    /// Beyond attentive tokens.
    Bat(Bat),
    /// Multi-scale features and token mergence.
    Mstm(Mstm),
}

impl Reduction {
    /// The names that specification strings begin with.
    pub const NAMES: [&'static str; 8] =
        ["none", "tome", "mctf", "evit", "dynamicvit", "svite", "bat", "mstm"];

    /// Tokens entering block 0 and leaving each block.
    pub fn token_counts(&self, tokens: usize, host: &Host) -> Vec<usize> {
        token_counts(self, tokens, host)
    }

    /// The weights of its own that the method needs on `host`.
    pub fn own_weights(&self, host: &Host) -> OwnWeights {
        match self {
            Self::DynamicVit(m) => m.own_weights(host),
            Self::Svite(m) => m.own_weights(host),
            _ => OwnWeights::default(),
        }
    }
}

/// Tokens entering block 0 and leaving each block.
pub fn token_counts(method: &impl Method, tokens: usize, host: &Host) -> Vec<usize> {
    let mut counts = vec![tokens];
    let mut now = tokens;
    for layer in 0..host.depth {
        now = method.step(layer, now, host).map_or(now, |step| step.tokens);
        counts.push(now);
    }
    counts
}

impl FromStr for Reduction {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut fields = spec::Fields::parse(text)?;
        let reduction = match fields.name() {
            "none" => Self::None,
            "tome" => Self::Tome(Tome::from_fields(&mut fields)?),
            "mctf" => Self::Mctf(Mctf::from_fields(&mut fields)?),
            "evit" => Self::Evit(Evit::from_fields(&mut fields)?),
            "dynamicvit" => Self::DynamicVit(DynamicVit::from_fields(&mut fields)?),
            "svite" => Self::Svite(Svite::from_fields(&mut fields)?),
            "bat" => Self::Bat(Bat::from_fields(&mut fields)?),
            "mstm" => Self::Mstm(Mstm::from_fields(&mut fields)?),
            name => {
                return Err(
                    fields.error(format!("unknown method `{name}`; known are {}", Self::NAMES.join(", ")))
                );
            }
        };
        fields.finish()?;
        Ok(reduction)
    }
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Tome(tome) => tome.fmt(f),
            Self::Mctf(mctf) => mctf.fmt(f),
            Self::Evit(evit) => evit.fmt(f),
            Self::DynamicVit(m) => m.fmt(f),
            Self::Svite(m) => m.fmt(f),
            Self::Bat(m) => m.fmt(f),
            Self::Mstm(m) => m.fmt(f),
        }
    }
}

impl Method for Reduction {
    fn check(&self, host: &Host) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Tome(m) => m.check(host),
            Self::Mctf(m) => m.check(host),
            Self::Evit(m) => m.check(host),
            Self::DynamicVit(m) => m.check(host),
            Self::Svite(m) => m.check(host),
            Self::Bat(m) => m.check(host),
            Self::Mstm(m) => m.check(host),
        }
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        match self {
            Self::None => None,
            Self::Tome(m) => m.step(layer, tokens, host),
            Self::Mctf(m) => m.step(layer, tokens, host),
            Self::Evit(m) => m.step(layer, tokens, host),
            Self::DynamicVit(m) => m.step(layer, tokens, host),
            Self::Svite(m) => m.step(layer, tokens, host),
            Self::Bat(m) => m.step(layer, tokens, host),
            Self::Mstm(m) => m.step(layer, tokens, host),
        }
    }

    fn proportional_attention(&self) -> bool {
        match self {
            Self::None => false,
            Self::Tome(m) => m.proportional_attention(),
            Self::Mctf(m) => m.proportional_attention(),
            Self::Evit(m) => m.proportional_attention(),
            Self::DynamicVit(m) => m.proportional_attention(),
            Self::Svite(m) => m.proportional_attention(),
            Self::Bat(m) => m.proportional_attention(),
            Self::Mstm(m) => m.proportional_attention(),
        }
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        match self {
            Self::None => Err(Error::argument("reduction", "`none` has no plan to build")),
            Self::Tome(m) => m.plan(backend, evidence),
            Self::Mctf(m) => m.plan(backend, evidence),
            Self::Evit(m) => m.plan(backend, evidence),
            Self::DynamicVit(m) => m.plan(backend, evidence),
            Self::Svite(m) => m.plan(backend, evidence),
            Self::Bat(m) => m.plan(backend, evidence),
            Self::Mstm(m) => m.plan(backend, evidence),
        }
    }

    fn clusters(&self, layer: usize, tokens: usize, host: &Host) -> Range<usize> {
        match self {
            Self::Bat(m) => m.clusters(layer, tokens, host),
            _ => 0..0,
        }
    }

    fn prepare<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        tokens: &B::Tensor,
        host: &Host,
        weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Tensor>> {
        match self {
            Self::Mstm(m) => m.prepare(backend, layer, tokens, host, weights),
            _ => Ok(None),
        }
    }

    fn masks_attention(&self, layer: usize) -> bool {
        matches!(self, Self::Svite(m) if m.masks_attention(layer))
    }

    fn attention_mask<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        normed: &B::Tensor,
        special: usize,
        weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Plan>> {
        match self {
            Self::Svite(m) => m.attention_mask(backend, layer, normed, special, weights),
            _ => Ok(None),
        }
    }
}

/// An error of a method that cannot run on a host.
fn unsuitable(method: &dyn fmt::Display, what: impl Into<String>) -> Error {
    Error::spec(method.to_string(), what)
}

/// The blocks at a quarter, half and three quarters of the depth: blocks 3, 6 and 9 of 12, as EViT and MCTF-Fast use.
fn quarter_blocks(depth: usize) -> [usize; 3] {
    [depth / 4, depth / 2, 3 * depth / 4]
}
