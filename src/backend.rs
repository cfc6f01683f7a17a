//! The operations a reduced vision transformer is made of, as one trait.
//!
//! Models and methods are written once, over [`Backend`]; the processor ([`crate::cpu::Cpu`]), the plain reference
//! ([`crate::reference::Reference`]) and the CUDA kernels implement it. Shapes in the documentation: `B` images, `N` tokens entering an operation, `M` tokens leaving it,
//! `C` the width, `H` heads, `D = C/H`. Every operation is deterministic: the same inputs give the same bits, for any
//! number of threads. Ties go to the lower token index; a NaN score ranks below every number.

mod grid;
mod mlp;
mod stem;

use std::ops::Range;

pub use grid::{Convolution, Depthwise, Frequency, GridBackend, NormOver};
pub use mlp::Mlp;
pub use stem::Window;

use crate::{Error, Images, Result, Tensor, TokenPlan, model::Activation};

/// An affine layer `y = x Wᵀ + b`.
#[derive(Clone, Debug)]
pub struct Linear<T> {
    /// (outputs, inputs).
    pub weight: T,
    /// (outputs).
    pub bias: Option<T>,
}

impl<T> Linear<T> {
    /// The layer with all its outputs.
    pub fn all(&self) -> LinearRows<'_, T> {
        LinearRows { layer: self, rows: None }
    }

    /// The layer with the outputs `rows` only, e.g. the values out of packed query, key and value rows.
    pub fn rows(&self, rows: Range<usize>) -> LinearRows<'_, T> {
        LinearRows { layer: self, rows: Some(rows) }
    }
}

/// Some outputs of a [`Linear`] layer.
#[derive(Clone, Debug)]
pub struct LinearRows<'a, T> {
    /// The layer.
    pub layer: &'a Linear<T>,
    /// The outputs to compute, all when absent.
    pub rows: Option<Range<usize>>,
}

/// What happens to a product before it is written.
#[derive(Clone, Debug)]
pub enum Epilogue<T> {
    /// Nothing.
    None,
    /// The nonlinearity; [`Activation::SwiGlu`] halves the width.
    Activation(Activation),
    /// The product is added to this tensor, which becomes the result (a residual connection).
    AddTo(T),
}

/// LayerNorm over the last axis: `(x - mean)/sqrt(variance + eps)·weight + bias`.
#[derive(Clone, Debug)]
pub struct Norm<T> {
    /// (C).
    pub weight: T,
    /// (C).
    pub bias: Option<T>,
    /// Added to the variance.
    pub eps: f32,
}

/// Queries and keys (and values) of all heads in one tensor.
#[derive(Debug)]
pub struct Heads<'a, T> {
    /// (B, N, parts·C) with parts in the order query, key, value; head `h` of a part in columns `h·D..(h+1)·D`.
    pub packed: &'a T,
    /// H.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
    /// Multiplies the products of queries and keys, `D^-1/2` usually.
    pub scale: f32,
    /// Sizes of the tokens, (B, N): proportional attention adds their logarithm to the key's scores.
    pub sizes: Option<&'a T>,
}

/// Which attention scores an operation hands out beside its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScoreRequest {
    /// The softmax row of the class token.
    pub class: bool,
    /// The attention each token receives, averaged over all queries.
    pub received: bool,
}

/// Attention scores, per head.
#[derive(Clone, Debug)]
pub struct Scores<T> {
    /// (B, H, N): the softmax row of query 0.
    pub class: Option<T>,
    /// (B, H, N): the mean over queries of the attention map's columns.
    pub received: Option<T>,
}

/// Scores, and the map that they are of where it was kept.
pub type ScoresAndMap<T> = (Scores<T>, Option<T>);

/// The rows whose cosine similarity decides who is merged.
#[derive(Debug)]
pub enum Metric<'a, T> {
    /// The mean over heads of the keys in a packed tensor (ToMe, section 3.1).
    Keys(&'a Heads<'a, T>),
    /// The rows of a tensor (B, N, C) themselves (MCTF: the residual stream).
    Rows(&'a T),
}

/// How similarity turns into the attraction of two tokens.
#[derive(Debug)]
pub enum Attraction<'a, T> {
    /// The cosine itself (ToMe).
    Cosine,
    /// MCTF's product of criteria (section 3.2), each raised to one over its temperature; temperature 0 switches a
    /// criterion off.
    MultiCriteria {
        /// Temperature of `(cosine + 1)/2`.
        tau_similarity: f64,
        /// Attention received, (B, H, N), and the temperature of its inverse.
        informativeness: (&'a T, f64),
        /// Token sizes, (B, N), and the temperature of their inverse.
        size: (Option<&'a T>, f64),
    },
}

/// The weights with which the members of a group enter their output token.
#[derive(Debug)]
pub enum Weighting<'a, T> {
    /// The plain mean.
    Uniform,
    /// In proportion to size, (B, N); sizes are 1 when absent.
    Size(Option<&'a T>),
    /// In proportion to size times attention received, (B, N) and (B, H, N).
    SizeAndReceived(Option<&'a T>, &'a T),
}

/// Bipartite soft matching of the tokens at even positions (A) with those at odd positions (B).
#[derive(Debug)]
pub struct Matching<'a, T> {
    /// What is compared.
    pub metric: Metric<'a, T>,
    /// How attractive a similarity is.
    pub attraction: Attraction<'a, T>,
    /// How a group's members are averaged.
    pub weighting: Weighting<'a, T>,
    /// Tokens at the front that are neither merged away nor merged into.
    pub special: usize,
    /// Tokens to remove, at most `(N - special)/2`.
    pub merges: usize,
    /// Merge half of them from B into A, with the same scores (MCTF, section 3.2).
    pub both_ways: bool,
}

/// What predicts who is kept (DynamicViT, section 3.2), one at each place where tokens are cut. All of it but the mean over
/// tokens works on each token alone.
#[derive(Clone, Debug)]
pub struct Predictor<T> {
    /// LayerNorm of the tokens, (C).
    pub norm: Norm<T>,
    /// C to C, GELU. The second half of the outputs is replaced by its mean over the tokens.
    pub hidden: Linear<T>,
    /// C to C/2, GELU.
    pub first: Linear<T>,
    /// C/2 to C/4, GELU.
    pub second: Linear<T>,
    /// C/4 to 2: keep and drop.
    pub last: Linear<T>,
}

/// Top-k selection of tokens by scores: the class token's attention (EViT), a predictor's (DynamicViT).
#[derive(Debug)]
pub struct Select<'a, T> {
    /// (B, H, N), such as the class token's softmax row; the mean over heads decides.
    pub class_scores: &'a T,
    /// Tokens at the front that are kept unconditionally.
    pub special: usize,
    /// Other tokens to keep, in descending order of score.
    pub keep: usize,
    /// Append one token: the sum of the others, each times its score.
    pub fuse: bool,
}

/// The best tokens and the special ones, in order of index (SViTE): all tokens compete, special ones stay whatever their
/// scores.
#[derive(Debug)]
pub struct KeepInPlace<'a, T> {
    /// (B, H, N): the mean over heads decides.
    pub scores: &'a T,
    /// Tokens at the front that stay.
    pub special: usize,
    /// How many are the best, special ones among them or not.
    pub keep: usize,
    /// All tokens stay where they are, but those that would go have weight 0. Otherwise there are places for `special + keep`
    /// tokens (N at most); where special tokens are among the best, the last places stand for nothing: tokens of zeros and of
    /// size 0, which attention that knows sizes does not look at.
    pub masked: bool,
}

/// What becomes of tokens that the class token does not attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inattentive {
    /// Each joins the attentive token that it is most similar to, by cosine (MSTM).
    Join,
    /// They form clusters around the peaks of their density, and attentive tokens pair up (BAT).
    Peaks {
        /// Attentive tokens to merge into another, at most half of them: those of odd rank propose to those of even rank.
        pairs: usize,
        /// Clusters, as many as there are tokens at most; none drops the tokens.
        clusters: usize,
        /// How many nearest tokens make the density; 0 for all.
        neighbours: usize,
    },
}

/// Tokens decoupled by the class token's attention (BAT, MSTM). Members of a group weigh in proportion to their scores.
#[derive(Debug)]
pub struct Cluster<'a, T> {
    /// The tokens, (B, N, C): what is compared.
    pub tokens: &'a T,
    /// (B, H, N): the class token's softmax row; the mean over heads decides.
    pub class_scores: &'a T,
    /// Tokens at the front that stay as they are.
    pub special: usize,
    /// Attentive tokens: the others with the highest scores.
    pub keep: usize,
    /// What becomes of those that are left.
    pub inattentive: Inattentive,
}

/// How the members of a group are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The plan's weighted sum.
    Weighted,
    /// The elementwise maximum.
    Max,
}

/// A reduced residual stream.
#[derive(Clone, Debug)]
pub struct Merged<T> {
    /// (B, M, C).
    pub tokens: T,
    /// (B, M): how many input tokens each stands for.
    pub sizes: T,
    /// (B, M, C): the LayerNorm of `tokens`, if one was asked for.
    pub normed: Option<T>,
}

/// The operations of one device.
///
/// # Errors
/// Every operation returns [`crate::Error::Argument`] when shapes or ranges do not fit, and computes nothing then.
#[expect(clippy::missing_errors_doc, reason = "stated above, once for all operations")]
pub trait Backend: Send + Sync {
    /// A tensor on this device.
    type Tensor: Clone + Send + Sync;
    /// A token plan on this device.
    type Plan: Send + Sync;

    /// Moves a tensor to the device, in the type of its weights and tokens.
    fn upload(&self, tensor: Tensor) -> Result<Self::Tensor>;
    /// Moves token sizes, attention scores or a performer's random features to the device: in `f32`, whatever the type of
    /// weights and tokens, as operations write and read them.
    fn upload_f32(&self, tensor: Tensor) -> Result<Self::Tensor>;
    /// Copies a tensor to the host.
    fn download(&self, tensor: &Self::Tensor) -> Result<Tensor>;
    /// The extents of a tensor.
    fn shape<'a>(&self, tensor: &'a Self::Tensor) -> &'a [usize];
    /// How many values a head must have for this backend's attention to take heads of `head_dim`: as many or more. A model's
    /// heads are filled up with zeros, which change neither products nor cosines.
    fn head_dim(&self, head_dim: usize) -> usize {
        head_dim
    }
    /// Moves a plan to the device.
    fn upload_plan(&self, plan: TokenPlan) -> Result<Self::Plan>;
    /// Copies a plan to the host.
    fn download_plan(&self, plan: &Self::Plan) -> Result<TokenPlan>;

    /// What a failure of a pass over `batch` images is told as. `pass` runs one over a batch of another size on the backend it is
    /// given: a device without memory finds out with it which batch would fit.
    fn explain(&self, error: Error, batch: usize, pass: &dyn Fn(Self, usize) -> Result<()>) -> Error
    where
        Self: Sized,
    {
        let _ = (batch, pass);
        error
    }

    /// Cuts images into rows of normalised pixels, (B, patches, channels · patch height · patch width), row-major over
    /// the grid. `u8` pixels become `(p/255 - mean)/std`, per channel; `f32` pixels are taken as they are.
    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Self::Tensor>;
    /// What a window sees at each of its places over the normalised pixels, (B, places, channels · kernel · kernel), in the order
    /// channel, row, column; places row-major. Windows may overlap, and see zeros beyond the border. Pixels as for
    /// [`Backend::patches`].
    fn unfold_images(
        &self,
        images: &Images,
        window: Window,
        mean: &[f32],
        std: &[f32],
    ) -> Result<Self::Tensor>;
    /// What a window sees at each of its places over a feature map (B, H·W, C), position by position along the rows of `grid`
    /// (H, W): (B, places, kernel · kernel · C), in the order row, column, channel; places row-major.
    fn unfold(&self, x: &Self::Tensor, grid: [usize; 2], window: Window) -> Result<Self::Tensor>;
    /// A dense convolution of a feature map (B, H·W, C): `layer`, whose inputs are in the order of [`Backend::unfold`], of what
    /// the window sees, (B, places, outputs).
    fn convolve(
        &self,
        x: &Self::Tensor,
        grid: [usize; 2],
        window: Window,
        layer: &Linear<Self::Tensor>,
        activation: Option<Activation>,
    ) -> Result<Self::Tensor> {
        let rows = self.unfold(x, grid, window)?;
        self.linear(&rows, layer.all(), activation.map_or(Epilogue::None, Epilogue::Activation))
    }
    /// Puts the special tokens `prefix` (special, C) before each image's patch tokens (B, patches, C) and adds the
    /// patches' positions (patches, C).
    fn embed(
        &self,
        patches: &Self::Tensor,
        prefix: Option<&Self::Tensor>,
        position: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;

    /// LayerNorm over the last axis.
    fn layer_norm(&self, x: &Self::Tensor, norm: &Norm<Self::Tensor>) -> Result<Self::Tensor>;
    /// LayerNorm over the last axis where its result is the residual stream itself (CLIP's norm before the blocks).
    fn stream_norm(&self, x: &Self::Tensor, norm: &Norm<Self::Tensor>) -> Result<Self::Tensor> {
        self.layer_norm(x, norm)
    }
    /// LayerNorm over each head of part `part` (0 query, 1 key) of packed heads, in place of that part.
    fn head_norm(
        &self,
        packed: Self::Tensor,
        part: usize,
        heads: usize,
        norm: &Norm<Self::Tensor>,
    ) -> Result<Self::Tensor>;

    /// `x Wᵀ + b` over the last axis, with an epilogue.
    fn linear(
        &self,
        x: &Self::Tensor,
        layer: LinearRows<'_, Self::Tensor>,
        epilogue: Epilogue<Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// A layer of the rows' LayerNorm.
    fn norm_linear(
        &self,
        x: &Self::Tensor,
        norm: &Norm<Self::Tensor>,
        layer: LinearRows<'_, Self::Tensor>,
    ) -> Result<Self::Tensor> {
        self.linear(&self.layer_norm(x, norm)?, layer, Epilogue::None)
    }
    /// Whether [`Backend::norm_linear`] and [`Backend::mlp`] compute the norms on their way, without a tensor of them: then nobody
    /// needs to ask for one earlier.
    fn norms_on_the_way(&self) -> bool {
        false
    }
    /// A block's feed-forward network, added to the residual stream `tokens` (B, N, C); `normed` is its LayerNorm of them if that is
    /// known already.
    fn mlp(
        &self,
        tokens: Self::Tensor,
        normed: Option<Self::Tensor>,
        mlp: &Mlp<'_, Self::Tensor>,
    ) -> Result<Self::Tensor> {
        mlp.composed(self, tokens, normed)
    }

    /// `softmax(QKᵀ·scale + log size) V` of packed queries, keys and values (B, N, 3C) → (B, N, C), and the scores
    /// asked for. The N×N map is not written anywhere.
    fn attention(
        &self,
        qkv: &Heads<'_, Self::Tensor>,
        scores: ScoreRequest,
    ) -> Result<(Self::Tensor, Scores<Self::Tensor>)>;
    /// The scores of an attention whose values are not known yet, from packed queries and keys (B, N, 2C): the first
    /// half of MCTF's one-step-ahead attention (section 3.3).
    fn attention_scores(
        &self,
        qk: &Heads<'_, Self::Tensor>,
        scores: ScoreRequest,
    ) -> Result<Scores<Self::Tensor>>;
    /// [`Backend::attention_scores`] where the map will be needed again: beside the scores the map itself, (B, H, N, at least N), if
    /// this backend would rather keep it than compute it twice. For [`Backend::attention_reduced_of`].
    fn attention_scores_and_map(
        &self,
        qk: &Heads<'_, Self::Tensor>,
        scores: ScoreRequest,
    ) -> Result<ScoresAndMap<Self::Tensor>> {
        Ok((self.attention_scores(qk, scores)?, None))
    }
    /// The second half: the attention map of `qk` (B, N, 2C), columns summed and rows pooled over the groups of `plan`,
    /// times the reduced tokens' `values` (B, M, C).
    fn attention_reduced(
        &self,
        qk: &Heads<'_, Self::Tensor>,
        values: &Self::Tensor,
        plan: &Self::Plan,
        pooling: Pooling,
    ) -> Result<Self::Tensor>;

    /// [`Backend::attention_reduced`] of a map that [`Backend::attention_scores_and_map`] gave, if it gave one.
    fn attention_reduced_of(
        &self,
        map: Option<&Self::Tensor>,
        qk: &Heads<'_, Self::Tensor>,
        values: &Self::Tensor,
        plan: &Self::Plan,
        pooling: Pooling,
    ) -> Result<Self::Tensor> {
        let _ = map;
        self.attention_reduced(qk, values, plan, pooling)
    }

    /// The plan of a bipartite matching.
    fn matching(&self, matching: &Matching<'_, Self::Tensor>) -> Result<Self::Plan>;
    /// The logarithm of the probability with which each token of (B, N, C) is to be kept, (B, 1, N) in `f32`, from token
    /// `special` on; those before it are not looked at and have 0.
    fn keep_scores(
        &self,
        x: &Self::Tensor,
        predictor: &Predictor<Self::Tensor>,
        special: usize,
    ) -> Result<Self::Tensor>;
    /// The plan that keeps the special tokens and the `keep` others that [`Backend::keep_scores`] rates highest, in descending
    /// order: [`Backend::select`] by those scores, nobody fused.
    fn keep_predicted(
        &self,
        x: &Self::Tensor,
        predictor: &Predictor<Self::Tensor>,
        special: usize,
        keep: usize,
    ) -> Result<Self::Plan> {
        let class_scores = &self.keep_scores(x, predictor, special)?;
        self.select(&Select { class_scores, special, keep, fuse: false })
    }
    /// The plan of a selection in place.
    fn keep_in_place(&self, keep: &KeepInPlace<'_, Self::Tensor>) -> Result<Self::Plan>;
    /// What a linear selector (SViTE, its weight (1, C)) says of each token of (B, N, C), plus `noise` (B, N) if there is any:
    /// (B, 1, N), in `f32`.
    fn token_scores(
        &self,
        x: &Self::Tensor,
        selector: &Linear<Self::Tensor>,
        noise: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// The plan of decoupled tokens: special ones, attentive ones in descending order of score, clusters.
    fn cluster(&self, cluster: &Cluster<'_, Self::Tensor>) -> Result<Self::Plan>;
    /// Means over windows of `scale` x `scale` patches of a `grid` (rows, columns) behind `special` tokens, (B, N, C) →
    /// (B, windows, C) in order of rows. Windows at the border may be smaller.
    fn pool_windows(
        &self,
        x: &Self::Tensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Self::Tensor>;
    /// Adds to each patch its window's row of `pooled`, as [`Backend::pool_windows`] gives them. Special tokens stay.
    fn add_windows(
        &self,
        x: Self::Tensor,
        pooled: &Self::Tensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Self::Tensor>;
    /// The plan of a top-k selection.
    fn select(&self, select: &Select<'_, Self::Tensor>) -> Result<Self::Plan>;

    /// Applies a plan to tokens (B, N, C) and their sizes (B, N; 1 when absent), with the LayerNorm that follows.
    fn merge(
        &self,
        x: &Self::Tensor,
        sizes: Option<&Self::Tensor>,
        plan: &Self::Plan,
        pooling: Pooling,
        norm: Option<&Norm<Self::Tensor>>,
    ) -> Result<Merged<Self::Tensor>>;
    /// Copies each output token (B, M, C) back to all members of its group, (B, N, C); dropped tokens become zero.
    fn unmerge(&self, x: &Self::Tensor, plan: &Self::Plan) -> Result<Self::Tensor>;

    /// Rows `range` of every image, (B, N, C) → (B, range, C).
    fn tokens(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Self::Tensor>;
    /// The mean of the tokens from `first` on, weighted by `sizes` (B, N) if given, (B, N, C) → (B, C).
    fn mean_tokens(
        &self,
        x: &Self::Tensor,
        sizes: Option<&Self::Tensor>,
        first: usize,
    ) -> Result<Self::Tensor>;

    /// Columns `range` of every token, (B, N, C) → (B, N, range).
    fn columns(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Self::Tensor>;
    /// Attention by positive random features `w` (m, D), linear in the number of tokens (T2T-ViT's performer, Choromanski et al.,
    /// ICLR 2021): of `packed` keys, queries and values (B, N, 3D), in that order,
    /// `φ(q_t)·Σ φ(k_s) v_sᵀ / (φ(q_t)·Σ φ(k_s) + 1e-8)` with `φ(a) = exp(w a - |a|²/2)/√m`, (B, N, D). In `f32` throughout, `w`
    /// included ([`Backend::upload_f32`]).
    fn performer(&self, packed: &Self::Tensor, w: &Self::Tensor) -> Result<Self::Tensor>;
    /// The largest value of each column over the tokens from `first` on, (B, N, C) → (B, C). Tokens of size 0 (`sizes`, B and N)
    /// do not count; where none counts it is 0. A NaN among those that count is the result.
    fn max_tokens(
        &self,
        x: &Self::Tensor,
        sizes: Option<&Self::Tensor>,
        first: usize,
    ) -> Result<Self::Tensor>;

    /// Rows side by side, (B, C) and (B, K) → (B, C + K).
    fn concat(&self, left: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;
    /// The mean of two tensors (B, C).
    fn average(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;
    /// Token sizes (B, N; 1 when absent) of `shape` behind `hidden` sizes of 0, (B, hidden + N): proportional attention passes
    /// over tokens of size 0.
    fn hidden_sizes(
        &self,
        sizes: Option<&Self::Tensor>,
        shape: [usize; 2],
        hidden: usize,
    ) -> Result<Self::Tensor>;
}
