//! Multiply-adds of a reduced model, by the counting rules of the papers.

mod grid;
mod masked;
mod stem;

pub use grid::{GridConvention, GridMacs};
pub use masked::Densities;

use crate::{
    model::{BlockSize, Readout, VitConfig},
    reduction::{Cost, Host, Method, Site, Step},
};

/// How published figures count what is not a matrix product. Both count a multiply-add once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// fvcore (`ToMe`, MCTF): five per element of a LayerNorm, two of a batch norm; softmax and selection free.
    Fvcore,
    /// torchprofile (`EViT`): one per element of a norm, a softmax or a fused token and per scored token; matching is
    /// not counted.
    Torchprofile,
}

/// Counts of one block, or of everything outside the blocks, per image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Macs {
    /// Affine layers.
    pub linear: u64,
    /// Products of queries and keys, and of the map and the values.
    pub attention: u64,
    /// Similarities for matching.
    pub matching: u64,
    /// Elements that pass a LayerNorm.
    pub normalised: u64,
    /// Elements that pass a batch norm where it is not folded into the layer before it.
    pub batch_normalised: u64,
    /// Elements that pass a softmax.
    pub softmax: u64,
    /// Tokens scored for a selection, and elements fused by it.
    pub scored: u64,
}

impl Macs {
    /// The sum that a counting tool would print.
    pub fn total(&self, convention: Convention) -> u64 {
        let products = self.linear + self.attention;
        match convention {
            Convention::Fvcore => products + self.matching + 5 * self.normalised + 2 * self.batch_normalised,
            Convention::Torchprofile => {
                products + self.normalised + self.batch_normalised + self.softmax + self.scored
            }
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            linear: self.linear + other.linear,
            attention: self.attention + other.attention,
            matching: self.matching + other.matching,
            normalised: self.normalised + other.normalised,
            batch_normalised: self.batch_normalised + other.batch_normalised,
            softmax: self.softmax + other.softmax,
            scored: self.scored + other.scored,
        }
    }
}

/// The counts of a whole forward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelMacs {
    /// Patch projection, and the stem before it.
    pub embed: Macs,
    /// Each block, its reduction included.
    pub blocks: Vec<Macs>,
    /// Final LayerNorm and head.
    pub head: Macs,
    /// Tokens entering block 0 and leaving each block.
    pub token_counts: Vec<usize>,
}

impl ModelMacs {
    /// Counts one image through `config` reduced by `method`, whose own weights are taken to be there.
    pub fn of(config: &VitConfig, method: &impl Method) -> Self {
        Self::of_host(config, &config.host(), method)
    }

    /// As [`ModelMacs::of`], with those of a method's weights that the model has: what MSTM's missing projections would cost does
    /// not count. `host` is the model's ([`Vit::host`](crate::model::Vit::host), [`VitParams::host`](crate::model::VitParams::host)).
    pub fn of_host(config: &VitConfig, host: &Host, method: &impl Method) -> Self {
        let c = config.width as u64;
        let patches = (config.tokens() - config.special_tokens()) as u64;
        let project = config.stem.projected(config.channels, config.patch) as u64;
        let embed = stem::of(config).plus(Macs { linear: patches * project * c, ..Macs::default() });
        let mut token_counts = vec![config.tokens()];
        let mut now = config.tokens();
        let mut blocks = Vec::with_capacity(config.depth);
        for layer in 0..config.depth {
            let step = method.step(layer, now, host);
            blocks.push(block(config, layer, now as u64, step.as_ref()));
            now = step.map_or(now, |step| step.tokens);
            token_counts.push(now);
        }
        let features = if config.readout == Readout::ClassAndMean { 2 * c } else { c };
        let heads = if config.distillation_token { 2 } else { 1 };
        let n = now as u64;
        let mut head =
            Macs { linear: heads * features * config.classes as u64, normalised: n * c, ..Macs::default() };
        if config.readout == Readout::ClassAndAux {
            head.linear += (n - config.special_tokens() as u64) * c * config.classes as u64;
        }
        if config.readout == Readout::Attention {
            // Keys and values of all tokens; query, projection and MLP of one.
            head.linear += 2 * n * c * c + 2 * c * c + c * (config.hidden + config.fc1_rows()) as u64;
            head.attention = 2 * n * c;
            head.softmax = config.heads as u64 * n;
            head.normalised += c;
        }
        Self { embed, blocks, head, token_counts }
    }

    /// Everything added up.
    pub fn sum(&self) -> Macs {
        self.blocks.iter().fold(self.embed.plus(self.head), |sum, &block| sum.plus(block))
    }
}

fn block(config: &VitConfig, layer: usize, n: u64, step: Option<&Step>) -> Macs {
    let BlockSize { heads, hidden } = config.block(layer);
    let (c, h) = (config.width as u64, heads as u64);
    // Width of all heads together.
    let a = h * config.head_dim() as u64;
    let mlp = |m: u64| m * c * hidden as u64 * (config.gates() as u64 + 1);
    let m = step.map_or(n, |step| step.tokens as u64);
    let cost = step.map_or_else(Cost::default, |step| step.cost);
    let (attended, macs) = match step.map(|step| step.site) {
        None | Some(Site::AfterAttention) => {
            (n, Macs { linear: 4 * n * c * a + mlp(m), attention: 2 * n * n * a, ..Macs::default() })
        }
        // The whole block works on what is left.
        Some(Site::BeforeBlock) => {
            (m, Macs { linear: 4 * m * c * a + mlp(m), attention: 2 * m * m * a, ..Macs::default() })
        }
        Some(Site::AfterBlock) => {
            (n, Macs { linear: 4 * n * c * a + mlp(n), attention: 2 * n * n * a, ..Macs::default() })
        }
        // Queries, keys and scores of all tokens; values, product, projection and MLP of the reduced ones.
        Some(Site::BeforeAttention { reuse: true }) => (
            n,
            Macs {
                linear: 2 * n * c * a + 2 * m * c * a + mlp(m),
                attention: n * n * a + m * m * a,
                ..Macs::default()
            },
        ),
        // Queries, keys and scores of all tokens, then a whole attention of the reduced ones.
        Some(Site::BeforeAttention { reuse: false }) => (
            n,
            Macs {
                linear: 2 * n * c * a + 4 * m * c * a + mlp(m),
                attention: n * n * a + 2 * m * m * a,
                ..Macs::default()
            },
        ),
    };
    let normalised = match step.map(|step| step.site) {
        None | Some(Site::AfterBlock) => 2 * n,
        Some(Site::BeforeBlock) => 2 * m,
        Some(Site::AfterAttention) => n + m,
        Some(Site::BeforeAttention { .. }) => n + 2 * m,
    };
    Macs {
        linear: macs.linear + cost.linear,
        matching: cost.similarity,
        scored: cost.scored,
        normalised: normalised * c + cost.normalised,
        softmax: h * attended * attended,
        ..macs
    }
}
