//! Architectures by name, for counting and measuring without a checkpoint.

use super::{
    Activation, BlockParams, BlockSize, Readout, Reducers, StageParams, Stem, StemParams, TokensAttention,
    VitConfig, VitParams,
};
use crate::{
    Error, Result, Tensor,
    backend::{Linear, Norm, Predictor},
    image::Transform,
    reduction::{OwnWeights, SCALES},
};

/// (name, image, patch, width, depth, heads, LayerScale, registers, class token's own distillation)
const NAMES: [(&str, [usize; 5], Extra); 32] = [
    ("deit_tiny", [224, 16, 192, 12, 3], Extra::Nothing),
    ("deit_small", [224, 16, 384, 12, 6], Extra::Nothing),
    ("deit_base", [224, 16, 768, 12, 12], Extra::Nothing),
    ("deit_tiny_distilled", [224, 16, 192, 12, 3], Extra::Distilled),
    ("deit_small_distilled", [224, 16, 384, 12, 6], Extra::Distilled),
    ("deit_base_distilled", [224, 16, 768, 12, 12], Extra::Distilled),
    ("s2vite_tiny", [224, 16, 192, 12, 3], Extra::Structured(2, 7)),
    ("s2vite_small", [224, 16, 384, 12, 6], Extra::Structured(4, 6)),
    ("s2vite_base", [224, 16, 768, 12, 12], Extra::Structured(8, 6)),
    ("vit_tiny", [224, 16, 192, 12, 3], Extra::Nothing),
    ("vit_small", [224, 16, 384, 12, 6], Extra::Nothing),
    ("vit_base", [224, 16, 768, 12, 12], Extra::Nothing),
    ("vit_large", [224, 16, 1024, 24, 16], Extra::Nothing),
    ("dinov2_small", [518, 14, 384, 12, 6], Extra::Headless(0)),
    ("dinov2_base", [518, 14, 768, 12, 12], Extra::Headless(0)),
    ("dinov2_large", [518, 14, 1024, 24, 16], Extra::Headless(0)),
    ("dinov2_small_reg", [518, 14, 384, 12, 6], Extra::Headless(4)),
    ("dinov2_base_reg", [518, 14, 768, 12, 12], Extra::Headless(4)),
    ("clip_vit_b16", [224, 16, 768, 12, 12], Extra::Clip(512)),
    ("clip_vit_l14", [224, 14, 1024, 24, 16], Extra::Clip(768)),
    ("lvvit_t", [224, 16, 240, 12, 4], Extra::LvVit),
    ("lvvit_s", [224, 16, 384, 16, 6], Extra::LvVit),
    ("lvvit_m", [224, 16, 512, 20, 8], Extra::LvVit),
    ("t2t_vit_7", [224, 16, 256, 7, 4], Extra::T2t(PERFORMER, 2)),
    ("t2t_vit_10", [224, 16, 256, 10, 4], Extra::T2t(PERFORMER, 2)),
    ("t2t_vit_12", [224, 16, 256, 12, 4], Extra::T2t(PERFORMER, 2)),
    ("t2t_vit_14", [224, 16, 384, 14, 6], Extra::T2t(PERFORMER, 3)),
    ("t2t_vit_19", [224, 16, 448, 19, 7], Extra::T2t(PERFORMER, 3)),
    ("t2t_vit_24", [224, 16, 512, 24, 8], Extra::T2t(PERFORMER, 3)),
    ("t2t_vit_t_14", [224, 16, 384, 14, 6], Extra::T2t(TokensAttention::Transformer, 3)),
    ("t2t_vit_t_19", [224, 16, 448, 19, 7], Extra::T2t(TokensAttention::Transformer, 3)),
    ("t2t_vit_t_24", [224, 16, 512, 24, 8], Extra::T2t(TokensAttention::Transformer, 3)),
];

/// What all published T2T-ViTs with a performer have.
const PERFORMER: TokensAttention = TokensAttention::Performer { features: 32 };

#[derive(Clone, Copy)]
enum Extra {
    Nothing,
    Distilled,
    /// No classifier; so many register tokens.
    Headless(usize),
    /// S2ViTE: so many heads and tenths of the neurons are left.
    Structured(usize, usize),
    /// CLIP's visual tower with a projection of this width.
    Clip(usize),
    /// A stem of convolutions with 64 filters, an auxiliary head, no bias of queries, keys and values.
    LvVit,
    /// Tokens to token before the blocks, and the MLP's width over the model's; no bias of queries, keys and values.
    T2t(TokensAttention, usize),
}

impl Extra {
    fn stem(self) -> Stem {
        match self {
            Self::LvVit => Stem::Convolutions { filters: 64 },
            Self::T2t(attention, _) => Stem::TokensToToken { width: 64, attention },
            _ => Stem::Patches,
        }
    }

    /// Outputs of the MLP's first layer for a model of this width.
    fn hidden(self, width: usize) -> usize {
        match self {
            Self::LvVit => 3 * width,
            Self::T2t(_, ratio) => ratio * width,
            _ => 4 * width,
        }
    }
}

/// The names that [`config`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    NAMES.iter().map(|entry| entry.0)
}

/// The numbers of a published architecture.
///
/// # Errors
/// When nothing is called `name`; the error lists the names.
pub fn config(name: &str) -> Result<VitConfig> {
    let Some(&(_, [image, patch, width, depth, heads], extra)) = NAMES.iter().find(|entry| entry.0 == name)
    else {
        return Err(Error::model(format!(
            "architecture `{name}` is unknown; known are {}",
            names().collect::<Vec<_>>().join(", ")
        )));
    };
    let clip = matches!(extra, Extra::Clip(_));
    Ok(VitConfig {
        image: [image; 2],
        patch: [patch; 2],
        stem: extra.stem(),
        channels: 3,
        width,
        depth,
        heads,
        hidden: extra.hidden(width),
        compact: match extra {
            Extra::Structured(heads, share) => {
                vec![BlockSize { heads, hidden: 4 * width * share / 10 }; depth]
            }
            _ => Vec::new(),
        },
        activation: if clip { Activation::QuickGelu } else { Activation::Gelu },
        norm_eps: if matches!(extra, Extra::Clip(_) | Extra::LvVit | Extra::T2t(..)) { 1e-5 } else { 1e-6 },
        class_token: true,
        distillation_token: matches!(extra, Extra::Distilled),
        registers: if let Extra::Headless(registers) = extra { registers } else { 0 },
        readout: if let Extra::LvVit = extra { Readout::ClassAndAux } else { Readout::Class },
        classes: match extra {
            Extra::Nothing | Extra::Distilled | Extra::Structured(..) | Extra::LvVit | Extra::T2t(..) => 1000,
            Extra::Headless(_) => 0,
            Extra::Clip(width) => width,
        },
        transform: if clip { Transform::clip() } else { Transform::imagenet() },
        labels: None,
    })
}

/// Random tensors of a shape and a scale.
fn random(seed: u64) -> impl FnMut(&[usize], f32) -> Tensor {
    let mut state = seed ^ 0x9E37_79B9_7F4A_7C15;
    // Sums of uniform numbers are normal enough here.
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    };
    move |shape, scale| {
        let mut tensor = Tensor::zeros(shape);
        tensor.data_mut().iter_mut().for_each(|x| *x = scale * (uniform() + uniform() + uniform()) * 2.0);
        tensor
    }
}

fn plain_norm(width: usize, eps: f32) -> Norm<Tensor> {
    Norm {
        weight: Tensor::new(&[width], vec![1.0; width]).unwrap_or_else(|_| Tensor::zeros(&[width])),
        bias: Some(Tensor::zeros(&[width])),
        eps,
    }
}

/// Random weights of reduction methods, for what a method costs: as [`random_params`], which leave them out.
pub fn random_reducers(config: &VitConfig, needed: OwnWeights, seed: u64) -> Reducers<Tensor> {
    let mut random = random(seed);
    let c = config.width;
    let mut linear = |outputs: usize, inputs: usize| Linear {
        weight: random(&[outputs, inputs], (inputs as f32).powf(-0.5)),
        bias: Some(Tensor::zeros(&[outputs])),
    };
    let predictor = |linear: &mut dyn FnMut(usize, usize) -> Linear<Tensor>| Predictor {
        norm: plain_norm(c, 1e-5),
        hidden: linear(c, c),
        first: linear(c / 2, c),
        second: linear(c / 4, c / 2),
        last: linear(2, c / 4),
    };
    let predictors = (0..needed.predictors).map(|_| predictor(&mut linear)).collect();
    let selector = needed.selector.then(|| linear(1, c));
    Reducers {
        predictors,
        selector,
        layer_selectors: (0..needed.layer_selectors).map(|_| linear(1, c)).collect(),
        projections: SCALES
            .filter(|scale| needed.projections >> scale & 1 == 1)
            .map(|scale| (scale, linear(c, c)))
            .collect(),
    }
}

/// Random parameters of the right shapes and of a sane scale: what a model costs does not depend on what it knows.
/// The same `seed` gives the same parameters.
pub fn random_params(config: &VitConfig, seed: u64) -> VitParams<Tensor> {
    let mut random = random(seed);
    let c = config.width;
    let norm = |width: usize| plain_norm(width, config.norm_eps);
    let mut linear = |outputs: usize, inputs: usize| Linear {
        weight: random(&[outputs, inputs], (inputs as f32).powf(-0.5)),
        bias: Some(Tensor::zeros(&[outputs])),
    };
    let stem = match config.stem {
        Stem::Patches => StemParams::Patches,
        Stem::Convolutions { filters } => StemParams::Convolutions([
            linear(filters, 49 * config.channels),
            linear(filters, 9 * filters),
            linear(filters, 9 * filters),
        ]),
        Stem::TokensToToken { width, attention } => {
            let mut stage = |inputs: usize| {
                let (features, packed) = match attention {
                    // Of unit scale, as the features that are drawn.
                    TokensAttention::Performer { features } => {
                        let drawn = linear(features, width).weight.into_data();
                        let drawn = drawn.into_iter().map(|v| v * (width as f32).sqrt()).collect();
                        (Tensor::new(&[features, width], drawn).ok(), linear(3 * width, inputs))
                    }
                    TokensAttention::Transformer => {
                        (None, Linear { bias: None, ..linear(3 * width, inputs) })
                    }
                };
                StageParams {
                    norm1: norm(inputs),
                    packed,
                    features,
                    proj: linear(width, width),
                    norm2: norm(width),
                    fc1: linear(width, width),
                    fc2: linear(width, width),
                }
            };
            let [first, second] = config.stage_inputs(width);
            StemParams::TokensToToken(Box::new([stage(first), stage(second)]))
        }
    };
    let patch = linear(c, config.stem.projected(config.channels, config.patch));
    let blocks = (0..config.depth).map(|layer| {
        let BlockSize { heads, hidden } = config.block(layer);
        let inner = heads * config.head_dim();
        let qkv = linear(3 * inner, c);
        BlockParams {
            norm1: norm(c),
            // LV-ViT's and T2T-ViT's have no bias there.
            qkv: if config.stem == Stem::Patches { qkv } else { Linear { bias: None, ..qkv } },
            q_norm: None,
            k_norm: None,
            attn_norm: None,
            proj: linear(c, inner),
            norm2: norm(c),
            fc1: linear(config.gates() * hidden, c),
            mlp_norm: None,
            fc2: linear(c, hidden),
        }
    });
    let blocks = blocks.collect();
    let features = if config.readout == Readout::ClassAndMean { 2 * c } else { c };
    let head = (config.classes > 0).then(|| linear(config.classes, features));
    let head_dist = (config.classes > 0 && config.distillation_token).then(|| linear(config.classes, c));
    let aux = config.classes > 0 && config.readout == Readout::ClassAndAux;
    let aux_head = aux.then(|| linear(config.classes, c));
    let special = config.special_tokens();
    VitParams {
        stem,
        patch,
        prefix: (special > 0).then(|| random(&[special, c], 0.02)),
        position: Some(random(&[config.tokens() - special, c], 0.02)),
        norm_pre: None,
        blocks,
        norm: Some(norm(c)),
        attn_pool: None,
        fc_norm: None,
        head,
        head_dist,
        aux_head,
        reducers: Reducers::default(),
    }
}
