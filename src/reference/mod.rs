//! The reference backend: every operation in plain Rust, one file each, `f32` throughout.
//!
//! It is the oracle the CUDA kernels are held to, so it is written to be read next to the papers; what speed it has
//! comes from a GEMM library and from threads over images, heads and rows. Reductions run in a fixed order: results
//! are the same bits for any number of threads.
//!
//! [`Reference`] has them as a [`Backend`] of owned tensors. Those that token reduction is made of are also functions over any
//! [`HostTensor`], so that an engine can hand in memory of its own: they run on the threads of the rayon pool they are called
//! in.

mod arithmetic;
pub mod attention;
pub mod cluster;
pub mod connectivity;
mod convolution;
pub mod frequency;
mod gemm;
mod grid_norm;
mod linear;
pub mod matching;
pub mod merge;
pub mod norm;
mod patch;
mod performer;
pub mod predictor;
mod readout;
mod score;
pub mod select;
mod stem;
mod windows;

use std::{ops::Range, sync::Arc};

use crate::{
    Error, HostTensor, Images, Result, Tensor, TokenPlan,
    backend::{
        Backend, Cluster, Convolution, Depthwise, Epilogue, Frequency, GridBackend, Heads, KeepInPlace,
        Linear, LinearRows, Matching, Merged, Norm, NormOver, Pooling, Predictor, ScoreRequest, Scores,
        Select, Window,
    },
    model::Activation,
};

/// The reference backend and its threads.
#[derive(Clone, Debug, Default)]
pub struct Reference {
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Reference {
    /// A backend that runs on rayon's global threads, one per core unless the program set them up otherwise.
    pub fn new() -> Self {
        Self::default()
    }

    /// A backend with `threads` threads of its own.
    ///
    /// # Errors
    /// When `threads` is 0 or the operating system refuses to start them.
    pub fn with_threads(threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::argument("threads", "0 threads compute nothing; ask for at least 1"));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| Error::argument("threads", format!("cannot start {threads} threads: {e}")))?;
        Ok(Self { pool: Some(Arc::new(pool)) })
    }

    /// How many threads the operations use.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    /// Runs something on this backend's threads.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Backend for Reference {
    type Tensor = Tensor;
    type Plan = TokenPlan;

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }

    fn upload_f32(&self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }

    fn download(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    fn shape<'a>(&self, tensor: &'a Tensor) -> &'a [usize] {
        tensor.shape()
    }

    fn upload_plan(&self, plan: TokenPlan) -> Result<TokenPlan> {
        Ok(plan)
    }

    fn download_plan(&self, plan: &TokenPlan) -> Result<TokenPlan> {
        Ok(plan.clone())
    }

    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.run(|| patch::patches(images, patch, mean, std))
    }

    fn unfold_images(&self, images: &Images, window: Window, mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.run(|| stem::unfold_images(images, window, mean, std))
    }

    fn unfold(&self, x: &Tensor, grid: [usize; 2], window: Window) -> Result<Tensor> {
        self.run(|| stem::unfold(x, grid, window))
    }

    fn embed(&self, patches: &Tensor, prefix: Option<&Tensor>, position: Option<&Tensor>) -> Result<Tensor> {
        self.run(|| patch::embed(patches, prefix, position))
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.run(|| norm::layer_norm(x, norm))
    }

    fn head_norm(&self, packed: Tensor, part: usize, heads: usize, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.run(|| norm::head_norm(packed, part, heads, norm))
    }

    fn linear(
        &self,
        x: &Tensor,
        layer: LinearRows<'_, Tensor>,
        epilogue: Epilogue<Tensor>,
    ) -> Result<Tensor> {
        self.run(|| linear::linear(x, &layer, epilogue))
    }

    fn attention(&self, qkv: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<(Tensor, Scores<Tensor>)> {
        self.run(|| attention::attention(qkv, scores))
    }

    fn attention_scores(&self, qk: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<Scores<Tensor>> {
        self.run(|| attention::attention_scores(qk, scores))
    }

    fn attention_reduced(
        &self,
        qk: &Heads<'_, Tensor>,
        values: &Tensor,
        plan: &TokenPlan,
        pooling: Pooling,
    ) -> Result<Tensor> {
        self.run(|| attention::attention_reduced(qk, values, plan, pooling))
    }

    fn matching(&self, matching: &Matching<'_, Tensor>) -> Result<TokenPlan> {
        self.run(|| matching::plan(matching))
    }

    fn keep_scores(&self, x: &Tensor, predictor: &Predictor<Tensor>, special: usize) -> Result<Tensor> {
        self.run(|| predictor::keep_scores(x, predictor, special, None))
    }

    fn token_scores(&self, x: &Tensor, selector: &Linear<Tensor>, noise: Option<&Tensor>) -> Result<Tensor> {
        self.run(|| score::token_scores(x, selector, noise))
    }

    fn cluster(&self, cluster: &Cluster<'_, Tensor>) -> Result<TokenPlan> {
        self.run(|| cluster::plan(cluster))
    }

    fn pool_windows(&self, x: &Tensor, special: usize, grid: [usize; 2], scale: usize) -> Result<Tensor> {
        self.run(|| windows::pool_windows(x, special, grid, scale))
    }

    fn add_windows(
        &self,
        x: Tensor,
        pooled: &Tensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Tensor> {
        self.run(|| windows::add_windows(x, pooled, special, grid, scale))
    }

    fn keep_in_place(&self, keep: &KeepInPlace<'_, Tensor>) -> Result<TokenPlan> {
        self.run(|| select::in_place(keep))
    }

    fn select(&self, select: &Select<'_, Tensor>) -> Result<TokenPlan> {
        self.run(|| select::plan(select))
    }

    fn merge(
        &self,
        x: &Tensor,
        sizes: Option<&Tensor>,
        plan: &TokenPlan,
        pooling: Pooling,
        norm: Option<&Norm<Tensor>>,
    ) -> Result<Merged<Tensor>> {
        self.run(|| merge::merge(x, sizes, plan, pooling, norm))
    }

    fn unmerge(&self, x: &Tensor, plan: &TokenPlan) -> Result<Tensor> {
        self.run(|| merge::unmerge(x, plan))
    }

    fn tokens(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        patch::tokens(x, range)
    }

    fn mean_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        patch::mean_tokens(x, sizes, first)
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        stem::columns(x, range)
    }

    fn performer(&self, packed: &Tensor, w: &Tensor) -> Result<Tensor> {
        self.run(|| performer::performer(packed, w))
    }

    fn max_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        stem::max_tokens(x, sizes, first)
    }

    fn concat(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        readout::concat(left, right)
    }

    fn average(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        readout::average(a, b)
    }

    fn hidden_sizes(&self, sizes: Option<&Tensor>, shape: [usize; 2], hidden: usize) -> Result<Tensor> {
        readout::hidden_sizes(sizes, shape, hidden)
    }
}

impl GridBackend for Reference {
    fn convolution(&self, x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
        self.run(|| convolution::convolution(x, grid, layer))
    }

    fn depthwise(&self, x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
        self.run(|| convolution::depthwise(x, grid, layer))
    }

    fn grid_norm(&self, x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.run(|| grid_norm::grid_norm(x, over, norm))
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        self.run(|| convolution::activate_all(x, activation))
    }

    fn frequency(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        filter: &Frequency<Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.run(|| frequency::frequency(x, grid, filter, residual))
    }
}

/// Checks that `tensor` has shape `expected` and names it if not.
fn expect_shape(op: &'static str, name: &str, tensor: &impl HostTensor, expected: &[usize]) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::argument(op, format!("{name} has shape {:?}, expected {expected:?}", tensor.shape())))
}

/// (B, N, C) of a tensor of tokens.
fn tokens_shape(op: &'static str, name: &str, tensor: &impl HostTensor) -> Result<[usize; 3]> {
    match *tensor.shape() {
        [b, n, c] if b > 0 && n > 0 && c > 0 => Ok([b, n, c]),
        _ => Err(Error::argument(
            op,
            format!(
                "{name} has shape {:?}, expected three axes (images, tokens, width), none empty",
                tensor.shape()
            ),
        )),
    }
}
