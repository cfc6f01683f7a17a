//! What a plain vision transformer is made of: its numbers, its parameters, its input transform.

use super::{Stem, StemParams};
use crate::{
    Error, Result,
    backend::{Linear, Norm, Predictor},
    image::Transform,
    reduction::{Host, OwnWeights, SCALES},
};

/// The nonlinearity of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Exact GELU, `x/2 (1 + erf(x/√2))`: DeiT, ViT, DINOv2.
    Gelu,
    /// GELU's tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `x·sigmoid(1.702 x)`: OpenAI's CLIP.
    QuickGelu,
    /// `x·sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `silu(first half)·second half`: the MLP's first layer is twice as wide as its second one expects (DINOv2-g).
    SwiGlu,
}

impl Activation {
    /// The name used in `config.json` overrides and by `foveate info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::QuickGelu => "quick_gelu",
            Self::Silu => "silu",
            Self::Relu => "relu",
            Self::SwiGlu => "swiglu",
        }
    }

    /// The activation that configuration files call `name`.
    ///
    /// # Errors
    /// When no activation is called that; the error lists the names.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "gelu" | "gelu_erf" => Self::Gelu,
            "gelu_tanh" | "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "quick_gelu" | "quickgelu" => Self::QuickGelu,
            "silu" | "swish" => Self::Silu,
            "relu" => Self::Relu,
            "swiglu" => Self::SwiGlu,
            _ => {
                return Err(Error::model(format!(
                    "activation `{name}` is unknown; use gelu, gelu_tanh, quick_gelu, silu, relu or swiglu"
                )));
            }
        })
    }
}

/// What the head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readout {
    /// The class token after the final LayerNorm.
    Class,
    /// The mean of the patch tokens, weighted by the number of patches each stands for.
    Mean,
    /// The class token and that mean, one after the other (Hugging Face's DINOv2 classifier).
    ClassAndMean,
    /// The attention of one learned query over all tokens, and an MLP (timm's `attn_pool`, SigLIP's head).
    Attention,
    /// The class token; half of the largest logits that an auxiliary head gives the patches' tokens that are left are added to
    /// the head's (LV-ViT).
    ClassAndAux,
}

impl Readout {
    const ALL: [Self; 5] = [Self::Class, Self::Mean, Self::ClassAndMean, Self::Attention, Self::ClassAndAux];

    /// The name used in overrides and by `foveate info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Class => "class",
            Self::Mean => "mean",
            Self::ClassAndMean => "class_and_mean",
            Self::Attention => "attention",
            Self::ClassAndAux => "class_and_aux",
        }
    }

    /// The readout that overrides call `name`.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|readout| readout.name() == name)
    }
}

/// How wide a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Attention heads, each as wide as those of the whole model.
    pub heads: usize,
    /// Inputs of the MLP's second layer.
    pub hidden: usize,
}

/// The numbers of a plain vision transformer (ViT, DeiT, DINOv2, CLIP's visual tower).
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Input height and width in pixels.
    pub image: [usize; 2],
    /// Patch height and width in pixels.
    pub patch: [usize; 2],
    /// How pixels become the patches' tokens.
    pub stem: Stem,
    /// Input channels: 3 or 1.
    pub channels: usize,
    /// Width C of the residual stream.
    pub width: usize,
    /// Number of blocks L.
    pub depth: usize,
    /// Attention heads H; the head dimension is C/H.
    pub heads: usize,
    /// Inputs of the MLP's second layer.
    pub hidden: usize,
    /// What each block has left of its heads and neurons where some were cut off (S2ViTE); empty when all have all of them.
    pub compact: Vec<BlockSize>,
    /// The MLP's nonlinearity.
    pub activation: Activation,
    /// LayerNorm's epsilon.
    pub norm_eps: f32,
    /// Token 0 is a class token.
    pub class_token: bool,
    /// Token 1 is a distillation token (needs a class token).
    pub distillation_token: bool,
    /// Register tokens, after the class token.
    pub registers: usize,
    /// What the head reads.
    pub readout: Readout,
    /// Outputs of the head; 0 when the checkpoint has none.
    pub classes: usize,
    /// How image files become inputs.
    pub transform: Transform,
    /// Class names, if the checkpoint brings them.
    pub labels: Option<Vec<String>>,
}

impl VitConfig {
    /// Tokens that are no patches: class, distillation and register tokens. They come first and are never reduced.
    pub fn special_tokens(&self) -> usize {
        usize::from(self.class_token) + usize::from(self.distillation_token) + self.registers
    }

    /// Patches along the height and along the width.
    pub fn grid(&self) -> [usize; 2] {
        [self.image[0] / self.patch[0], self.image[1] / self.patch[1]]
    }

    /// What reduction methods may know of the model by its numbers; [`VitParams::host`] adds what its weights tell.
    pub fn host(&self) -> Host {
        Host {
            depth: self.depth,
            special: self.special_tokens(),
            class_token: self.class_token,
            width: self.width,
            heads: self.heads,
            grid: self.grid(),
            aux_head: self.readout == Readout::ClassAndAux,
            weights: None,
        }
    }

    /// The heads and neurons of block `layer`.
    pub fn block(&self, layer: usize) -> BlockSize {
        let whole = BlockSize { heads: self.heads, hidden: self.hidden };
        self.compact.get(layer).copied().unwrap_or(whole)
    }

    /// Tokens that enter block 0.
    pub fn tokens(&self) -> usize {
        let [rows, columns] = self.grid();
        self.special_tokens() + rows * columns
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// What multiplies the products of queries and keys: `D^-1/2`.
    pub fn attention_scale(&self) -> f32 {
        (self.head_dim() as f64).powf(-0.5) as f32
    }

    /// Rows of the MLP's first layer where nothing was cut off: twice `hidden` when it is gated.
    pub fn fc1_rows(&self) -> usize {
        self.gates() * self.hidden
    }

    /// Rows of the MLP's first layer for each of its neurons: two when it is gated.
    pub fn gates(&self) -> usize {
        if self.activation == Activation::SwiGlu { 2 } else { 1 }
    }

    /// The smallest and largest sizes this crate accepts, and whether the numbers agree with each other.
    ///
    /// # Errors
    /// Names the first number that is impossible and the remedy.
    pub fn check(&self) -> Result<()> {
        let fail = |what: String| Err(Error::model(what));
        if self.width == 0 || self.depth == 0 || self.hidden == 0 {
            return fail(format!(
                "a model of width {}, depth {} and MLP width {} computes nothing",
                self.width, self.depth, self.hidden
            ));
        }
        if self.heads == 0 || !self.width.is_multiple_of(self.heads) {
            return fail(format!(
                "{} heads do not divide the width {}; set heads to a divisor",
                self.heads, self.width
            ));
        }
        if !self.compact.is_empty() && self.compact.len() != self.depth {
            return fail(format!("sizes of {} blocks, depth {}", self.compact.len(), self.depth));
        }
        for (i, &BlockSize { heads, hidden }) in self.compact.iter().enumerate() {
            if !(1..=self.heads).contains(&heads) || !(1..=self.hidden).contains(&hidden) {
                return fail(format!(
                    "block {i} has {heads} of {} heads and {hidden} of {} neurons left; keep 1 of each at least",
                    self.heads, self.hidden
                ));
            }
        }
        if self.channels != 1 && self.channels != 3 {
            return fail(format!(
                "{} input channels; only grey (1) and RGB (3) images can be read",
                self.channels
            ));
        }
        for (axis, name) in ["height", "width"].iter().enumerate() {
            if self.patch[axis] == 0
                || self.image[axis] == 0
                || !self.image[axis].is_multiple_of(self.patch[axis])
            {
                return fail(format!(
                    "image {name} {} is not a positive multiple of the patch {name} {}; set the image size to a multiple",
                    self.image[axis], self.patch[axis]
                ));
            }
        }
        if self.distillation_token && !self.class_token {
            return fail("a distillation token needs a class token before it".into());
        }
        if matches!(self.readout, Readout::Class | Readout::ClassAndMean | Readout::ClassAndAux)
            && !self.class_token
        {
            return fail("the head reads a class token, but the model has none; set pool to mean".into());
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return fail(format!("LayerNorm epsilon {} must be a positive number", self.norm_eps));
        }
        self.check_stem()
    }
}

/// The parameters of one block. LayerScale is folded into `proj` and `fc2`. A = heads·D of the block ([`VitConfig::block`]), C
/// unless heads were cut off.
#[derive(Clone, Debug)]
pub struct BlockParams<T> {
    /// LayerNorm before the attention.
    pub norm1: Norm<T>,
    /// Query, key and value rows, (3A, C).
    pub qkv: Linear<T>,
    /// LayerNorm of each query head, over the head dimension.
    pub q_norm: Option<Norm<T>>,
    /// LayerNorm of each key head, over the head dimension.
    pub k_norm: Option<Norm<T>>,
    /// LayerNorm between attention and its projection.
    pub attn_norm: Option<Norm<T>>,
    /// Output projection of the attention, (C, A).
    pub proj: Linear<T>,
    /// LayerNorm before the MLP.
    pub norm2: Norm<T>,
    /// First layer of the MLP.
    pub fc1: Linear<T>,
    /// LayerNorm inside the MLP, after the nonlinearity.
    pub mlp_norm: Option<Norm<T>>,
    /// Second layer of the MLP, (C, hidden).
    pub fc2: Linear<T>,
}

/// The parameters of an attention pooling: one query looks at all tokens.
#[derive(Clone, Debug)]
pub struct PoolParams<T> {
    /// The query's token, (1, C).
    pub latent: T,
    /// Query rows for the latent, key and value rows for the tokens, (3C, C).
    pub qkv: Linear<T>,
    /// LayerNorm of the query's heads, over the head dimension.
    pub q_norm: Option<Norm<T>>,
    /// LayerNorm of the keys' heads, over the head dimension.
    pub k_norm: Option<Norm<T>>,
    /// Output projection, (C, C).
    pub proj: Linear<T>,
    /// LayerNorm before the MLP.
    pub norm: Option<Norm<T>>,
    /// First layer of the MLP.
    pub fc1: Linear<T>,
    /// Second layer of the MLP.
    pub fc2: Linear<T>,
}

/// The parameters of a plain vision transformer, over the tensors of some backend (or host tensors).
#[derive(Clone, Debug)]
pub struct VitParams<T> {
    /// What comes before the patch projection.
    pub stem: StemParams<T>,
    /// Patch projection as a matrix, (C, channels · patch height · patch width); behind a stem, (C, what it hands over), in the
    /// order of [`Backend::unfold`](crate::backend::Backend::unfold).
    pub patch: Linear<T>,
    /// Class, distillation and register tokens with their positions already added, (special, C); absent without any.
    pub prefix: Option<T>,
    /// Positions of the patches at the model's grid, (patches, C).
    pub position: Option<T>,
    /// LayerNorm before block 0 (CLIP).
    pub norm_pre: Option<Norm<T>>,
    /// The blocks.
    pub blocks: Vec<BlockParams<T>>,
    /// LayerNorm of all tokens after the last block.
    pub norm: Option<Norm<T>>,
    /// What [`Readout::Attention`] needs.
    pub attn_pool: Option<PoolParams<T>>,
    /// LayerNorm of the pooled features only (timm's `fc_norm`).
    pub fc_norm: Option<Norm<T>>,
    /// The classifier, or CLIP's projection.
    pub head: Option<Linear<T>>,
    /// The distillation token's classifier; its logits and the class token's are averaged.
    pub head_dist: Option<Linear<T>>,
    /// What [`Readout::ClassAndAux`] adds the largest outputs of: the auxiliary classifier, its weights and biases halved.
    pub aux_head: Option<Linear<T>>,
    /// What reduction methods were trained with.
    pub reducers: Reducers<T>,
}

impl<T> VitParams<T> {
    /// What reduction methods may know of a model with these numbers and parameters.
    pub fn host(&self, config: &VitConfig) -> Host {
        Host { weights: Some(self.reducers.own()), ..config.host() }
    }
}

/// The parameters of reduction methods that have some of their own.
#[derive(Clone, Debug)]
pub struct Reducers<T> {
    /// DynamicViT's, one for each place where tokens are cut.
    pub predictors: Vec<Predictor<T>>,
    /// SViTE's, before block 0: weight (1, C), bias (1).
    pub selector: Option<Linear<T>>,
    /// SViTE's in the attentions, one a block, if there are any.
    pub layer_selectors: Vec<Linear<T>>,
    /// MSTM's, one for each scale that has one: (C, C).
    pub projections: Vec<(usize, Linear<T>)>,
}

impl<T> Default for Reducers<T> {
    fn default() -> Self {
        Self { predictors: Vec::new(), selector: None, layer_selectors: Vec::new(), projections: Vec::new() }
    }
}

impl<T> Reducers<T> {
    fn own(&self) -> OwnWeights {
        OwnWeights {
            predictors: self.predictors.len(),
            selector: self.selector.is_some(),
            layer_selectors: self.layer_selectors.len(),
            projections: self
                .projections
                .iter()
                .filter(|(scale, _)| SCALES.contains(scale))
                .fold(0, |bits, (scale, _)| bits | 1 << scale),
        }
    }
}
