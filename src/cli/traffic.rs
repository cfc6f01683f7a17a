//! Bytes that a forward pass cannot avoid moving, counted, not measured.
//!
//! The rule: every parameter once per batch, and of every operation its inputs and its output once per image, in the type
//! that weights and tokens have on the device (`value`: bytes of one); attention scores are `f32` always. Attention maps and similarity matrices are not counted: no operation writes them. Operations are those of the
//! model's forward pass; a merge that is followed by a LayerNorm does both in one pass.

use foveate::{
    Tensor,
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
    /// What reduction methods were trained with; no bytes are counted of them.
    pub(crate) reducers: u64,
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
            reducers: reducer_parameters(&params.reducers),
        }
    }

    /// All of them.
    pub(crate) fn total(&self) -> u64 {
        self.embed + self.blocks.iter().sum::<u64>() + self.head + self.reducers
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

fn reducer_parameters(reducers: &Reducers<Tensor>) -> u64 {
    let predictor = |p: &Predictor<Tensor>| {
        norm(&p.norm) + [&p.hidden, &p.first, &p.second, &p.last].into_iter().map(linear).sum::<u64>()
    };
    let layers = reducers.selector.iter().chain(&reducers.layer_selectors);
    reducers.predictors.iter().map(predictor).sum::<u64>()
        + layers.chain(reducers.projections.iter().map(|(_, layer)| layer)).map(linear).sum::<u64>()
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
    let decision = step.map_or(0, |step| if step.scores.class { 0 } else { n * c });
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
