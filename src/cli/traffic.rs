//! Bytes that a forward pass cannot avoid moving, counted, not measured.
//!
//! The rule: every parameter once per batch, and of every operation its inputs and its output once per image, in the type
//! that weights and tokens have on the device (`value`: bytes of one); scores are `f32` always. Attention maps and
//! similarity matrices are not counted: no operation writes them. Operations are those of the model's forward pass, those
//! of a method's own layers among them; a merge that is followed by a LayerNorm does both in one pass.

use foveate::{
    Reduction, Tensor,
    backend::{Linear, Norm, Predictor},
    model::{BlockParams, PoolParams, Readout, Reducers, VitConfig, VitParams},
    reduction::{Site, Step},
};

/// Bytes of a score.
const SCORE: u64 = 4;

/// Parameters of a model by place, in values.
pub(crate) struct Parameters {
    /// Patch projection, special tokens, positions, the norm before block 0.
    pub(crate) embed: u64,
    /// Each block.
    pub(crate) blocks: Vec<u64>,
    /// Final norms and heads.
    pub(crate) head: u64,
    /// What reduction methods were trained with.
    own: Own,
}

/// Parameters of reduction methods, in values.
struct Own {
    /// Each of DynamicViT's predictors.
    predictors: Vec<u64>,
    /// SViTE's selector.
    selector: u64,
    /// Those in the attentions.
    layer_selectors: Vec<u64>,
    /// MSTM's projections, each with its scale.
    projections: Vec<(usize, u64)>,
}

impl Own {
    fn of(reducers: &Reducers<Tensor>) -> Self {
        let predictor = |p: &Predictor<Tensor>| {
            norm(&p.norm) + [&p.hidden, &p.first, &p.second, &p.last].into_iter().map(linear).sum::<u64>()
        };
        Self {
            predictors: reducers.predictors.iter().map(predictor).collect(),
            selector: reducers.selector.as_ref().map_or(0, linear),
            layer_selectors: reducers.layer_selectors.iter().map(linear).collect(),
            projections: reducers.projections.iter().map(|(scale, layer)| (*scale, linear(layer))).collect(),
        }
    }

    fn total(&self) -> u64 {
        self.predictors.iter().chain(&self.layer_selectors).sum::<u64>()
            + self.selector
            + self.projections.iter().map(|(_, values)| values).sum::<u64>()
    }
}

impl Parameters {
    /// Counts them.
    pub(crate) fn of(params: &VitParams<Tensor>) -> Self {
        let norms =
            |norms: &[&Option<Norm<Tensor>>]| norms.iter().map(|n| n.as_ref().map_or(0, norm)).sum::<u64>();
        let heads = |heads: &[&Option<Linear<Tensor>>]| {
            heads.iter().map(|l| l.as_ref().map_or(0, linear)).sum::<u64>()
        };
        let tables = [&params.prefix, &params.position].into_iter().flatten().map(values).sum::<u64>();
        Self {
            embed: linear(&params.patch)
                + params.stem.tensors().into_iter().map(values).sum::<u64>()
                + tables
                + norms(&[&params.norm_pre]),
            blocks: params.blocks.iter().map(block_parameters).collect(),
            head: norms(&[&params.norm, &params.fc_norm])
                + heads(&[&params.head, &params.head_dist, &params.aux_head])
                + params.attn_pool.as_ref().map_or(0, pool_parameters),
            own: Own::of(&params.reducers),
        }
    }

    /// All of them.
    pub(crate) fn total(&self) -> u64 {
        self.embed + self.blocks.iter().sum::<u64>() + self.head + self.own.total()
    }
}

fn values(tensor: &Tensor) -> u64 {
    tensor.data().len() as u64
}

fn linear(layer: &Linear<Tensor>) -> u64 {
    values(&layer.weight) + layer.bias.as_ref().map_or(0, values)
}

fn norm(norm: &Norm<Tensor>) -> u64 {
    values(&norm.weight) + norm.bias.as_ref().map_or(0, values)
}

fn pool_parameters(pool: &PoolParams<Tensor>) -> u64 {
    values(&pool.latent)
        + [&pool.qkv, &pool.proj, &pool.fc1, &pool.fc2].into_iter().map(linear).sum::<u64>()
        + [&pool.q_norm, &pool.k_norm, &pool.norm].into_iter().flatten().map(norm).sum::<u64>()
}

fn block_parameters(block: &BlockParams<Tensor>) -> u64 {
    let optional = [&block.q_norm, &block.k_norm, &block.attn_norm, &block.mlp_norm];
    norm(&block.norm1)
        + norm(&block.norm2)
        + [&block.qkv, &block.proj, &block.fc1, &block.fc2].into_iter().map(linear).sum::<u64>()
        + optional.into_iter().flatten().map(norm).sum::<u64>()
}

/// Bytes of the embedding for a batch.
pub(crate) fn embed_bytes(config: &VitConfig, parameters: &Parameters, batch: u64, value: u64) -> u64 {
    let c = config.width as u64;
    let patches = (config.grid()[0] * config.grid()[1]) as u64;
    let pixels = (config.image[0] * config.image[1] * config.channels) as u64;
    // 8-bit pixels to rows; rows to patches; patches to tokens.
    let activations = config.stem_values() + patches * c + config.tokens() as u64 * c;
    value * (parameters.embed + batch * activations) + batch * pixels
}

/// Bytes of one block for a batch when `tokens` tokens enter it.
pub(crate) fn block_bytes(
    config: &VitConfig,
    (layer, parameters): (usize, u64),
    tokens: u64,
    step: Option<&Step>,
    batch: u64,
    value: u64,
) -> u64 {
    let size = config.block(layer);
    let (c, n, hidden) = (config.width as u64, tokens, size.hidden as u64);
    // Width of all heads together.
    let a = (size.heads * config.head_dim()) as u64;
    let m = step.map_or(n, |step| step.tokens as u64);
    let norm = |n: u64| 2 * n * c;
    let attention = |n: u64| n * (c + 3 * a) + 4 * n * a; // packed heads written; read and pooled
    let project = |n: u64| n * (a + 2 * c); // context, residual, sum
    let layers = |n: u64| n * (c + hidden) + n * (hidden + 2 * c);
    let scores = step
        .map_or(0, |step| if step.scores.class || step.scores.received { size.heads as u64 * n } else { 0 });
    // What tokens are compared by.
    let decision = step.map_or(0, |step| if step.cost.similarity > 0 { n * c } else { 0 });
    let merge = n * c + m * c;
    let (activations, twice) = match step.map(|step| step.site) {
        Some(Site::BeforeBlock) => {
            let block = attention(m) + project(m) + norm(m) + layers(m);
            (decision + merge + m * c + block, 0)
        }
        None => (norm(n) + attention(n) + project(n) + norm(n) + layers(n), 0),
        Some(Site::AfterAttention) => {
            (norm(n) + attention(n) + project(n) + decision + merge + m * c + layers(m), 0)
        }
        Some(Site::AfterBlock) => {
            (norm(n) + attention(n) + project(n) + norm(n) + layers(n) + decision + merge, 0)
        }
        Some(Site::BeforeAttention { reuse }) => {
            let look = norm(n) + n * (c + 2 * a) + 2 * n * a + decision + merge + m * c;
            let rest = project(m) + norm(m) + layers(m);
            if reuse {
                // Values of the merged tokens; the map is made again from queries and keys and folded.
                (look + m * (c + a) + 2 * n * a + 2 * m * a + rest, 0)
            } else {
                // Query and key weights are read a second time.
                (look + attention(m) + rest, 2 * a * c)
            }
        }
    };
    value * (parameters + twice + batch * activations) + SCORE * batch * scores
}

/// Bytes of the layers of a method's own in one block, for a batch when `tokens` tokens enter it.
pub(crate) fn own_bytes(
    (config, parameters): (&VitConfig, &Parameters),
    (method, layer): (&Reduction, usize),
    tokens: usize,
    step: Option<&Step>,
    batch: u64,
    value: u64,
) -> u64 {
    let (own, c, n) = (&parameters.own, config.width as u64, tokens as u64);
    let (mut weights, mut activations, mut scores) = (0, 0, 0);
    match (method, step) {
        (Reduction::DynamicVit(_), Some(_)) => {
            // All predictors of a model are alike; which one it is does not matter.
            weights = own.predictors.first().copied().unwrap_or(0);
            let n = n - config.special_tokens() as u64;
            let layers = [(c, c), (c, c), (c, c / 2), (c / 2, c / 4), (c / 4, 0)];
            activations = layers.iter().map(|(inputs, outputs)| n * (inputs + outputs)).sum();
            scores = n;
        }
        (Reduction::Svite(svite), _) => {
            if step.is_some() {
                (weights, activations, scores) = (own.selector, n * c, n);
            }
            let m = step.map_or(tokens, |step| step.tokens);
            if svite.layerwise && svite.tokens < m {
                // Scored, then multiplied by the mask.
                weights += own.layer_selectors.get(layer).copied().unwrap_or(0);
                activations += 3 * m as u64 * c;
                scores += m as u64;
            }
        }
        // Before the first cut, where all tokens are there.
        (Reduction::Mstm(mstm), Some(_)) if tokens == config.tokens() => {
            for &scale in &mstm.scales {
                let [rows, columns] = config.grid().map(|extent| extent.div_ceil(scale) as u64);
                let coarse = rows * columns * c;
                // Means of windows; spread back and added.
                activations += n * c + coarse + coarse + 2 * n * c;
                if let Some((_, projection)) = own.projections.iter().find(|(of, _)| *of == scale) {
                    weights += projection;
                    activations += 2 * coarse;
                }
            }
        }
        _ => {}
    }
    value * (weights + batch * activations) + SCORE * batch * scores
}

/// Bytes of the final norms and heads for a batch when `tokens` tokens are left.
pub(crate) fn head_bytes(
    config: &VitConfig,
    parameters: &Parameters,
    tokens: u64,
    batch: u64,
    value: u64,
) -> u64 {
    let c = config.width as u64;
    let pooled = match config.readout {
        Readout::Class => c,
        Readout::Mean => tokens * c,
        Readout::ClassAndMean => (tokens + 1) * c,
        // The auxiliary head's outputs written and read.
        Readout::ClassAndAux => c + tokens * c + 2 * tokens * config.classes as u64,
        // Tokens and query in front of them read, packed heads written and read, a few rows.
        Readout::Attention => (2 * (tokens + 1) + 6 * (tokens + 1)) * c,
    };
    value * (parameters.head + batch * (2 * tokens * c + pooled + c + config.classes as u64))
}

#[cfg(test)]
mod tests {
    use foveate::{model::arch, reduction::Method};

    use super::*;

    /// What `method` moves in `layer` beside the block, for two images in f32.
    fn own(method: &str, layer: usize) -> u64 {
        let config = arch::config("deit_tiny").unwrap();
        let mut params = arch::random_params(&config, 0);
        let method: Reduction = method.parse().unwrap();
        let mut needed = method.own_weights(&config.host());
        needed.projections = 1 << 4;
        params.reducers = arch::random_reducers(&config, needed, 0);
        let host = params.host(&config);
        let tokens = method.token_counts(config.tokens(), &host)[layer];
        let step = method.step(layer, tokens, &host);
        let parameters = Parameters::of(&params);
        own_bytes((&config, &parameters), (&method, layer), tokens, step.as_ref(), 2, 4)
    }

    #[test]
    fn layers_of_a_methods_own_are_counted() {
        // LayerNorm, 192 to 192, to 96, to 48, to 2.
        let predictor = 2 * 192 + (192 + 1) * 192 + (192 + 1) * 96 + (96 + 1) * 48 + (48 + 1) * 2;
        let values = 192 + 192 + 192 + 192 + 192 + 96 + 96 + 48 + 48;
        // 196 patches, then 137.
        for (layer, n) in [(3, 196), (6, 137)] {
            assert_eq!(own("dynamicvit:keep=0.7", layer), 4 * (predictor + 2 * n * values) + 4 * 2 * n);
        }
        let selected = 4 * (193 + 2 * 197 * 192) + 4 * 2 * 197;
        assert_eq!(own("svite:tokens=138", 0), selected);
        let masked = 4 * (193 + 2 * 3 * 139 * 192) + 4 * 2 * 139;
        assert_eq!(own("svite:tokens=138,layerwise=true", 0), selected + masked);
        assert_eq!(own("svite:tokens=138,layerwise=true", 5), masked);
        // 7 x 7 windows of 2 x 2 and, with weights of their own, 4 x 4 of 4 x 4.
        let fused = |coarse: u64| 2 * (3 * 197 * 192 + 2 * coarse * 192);
        assert_eq!(own("mstm:scales=2", 3), 4 * fused(49));
        assert_eq!(own("mstm:scales=4", 3), 4 * (fused(16) + (192 + 1) * 192 + 2 * 2 * 16 * 192));
        assert_eq!(own("mstm:scales=2/4", 3), own("mstm:scales=2", 3) + own("mstm:scales=4", 3));
        for (method, layer) in [
            ("dynamicvit:keep=0.7", 4),
            ("svite:tokens=138", 1),
            ("mstm:scales=2", 6),
            ("mstm:scales=none", 3),
            ("evit:keep=0.5", 3),
        ] {
            assert_eq!(own(method, layer), 0, "{method} in block {layer}");
        }
    }
}
