//! The operations of [`Backend`].

use std::ops::Range;

use super::{
    Context, Cpu, Plan, Tensor, attention, cluster, folded, kept, linear, matching, merge, mlp, norm, patch,
    performer, predictor, readout, score, select, stem, timing::Kind, windows,
};
use crate::{
    Images, Result, TokenPlan,
    backend::{
        Backend, Cluster, Epilogue, Heads, KeepInPlace, Linear, LinearRows, Matching, Merged, Mlp, Norm,
        Pooling, Predictor, ScoreRequest, Scores, ScoresAndMap, Select, Window,
    },
    model::Activation,
};

impl Cpu {
    /// Runs an operation, and measures it if somebody wants to know.
    pub(super) fn timed<R>(&self, kind: Kind, run: impl FnOnce(&Context) -> R) -> R {
        self.context.timing.of(kind, || run(&self.context))
    }

    /// A host tensor's values in a buffer of this backend.
    pub(super) fn adopt(&self, tensor: &crate::Tensor) -> Result<Tensor> {
        let shape = super::tensor::Shape::new(tensor.shape())?;
        Ok(Tensor::pooled(shape, self.context.pool.copy(tensor.data())))
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Plan = Plan;

    fn upload(&self, tensor: crate::Tensor) -> Result<Tensor> {
        Tensor::from_host(tensor, &self.context.pool)
    }

    fn upload_f32(&self, tensor: crate::Tensor) -> Result<Tensor> {
        self.adopt(&tensor)
    }

    fn download(&self, tensor: &Tensor) -> Result<crate::Tensor> {
        tensor.view().to_host()
    }

    fn shape<'a>(&self, tensor: &'a Tensor) -> &'a [usize] {
        tensor.shape()
    }

    fn upload_plan(&self, plan: TokenPlan) -> Result<Plan> {
        Ok(Plan::new(plan, &self.context.pool))
    }

    fn download_plan(&self, plan: &Plan) -> Result<TokenPlan> {
        Ok(TokenPlan::clone(plan))
    }

    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.timed(Kind::Patches, |context| patch::patches(context, images, patch, mean, std))
    }

    fn unfold_images(&self, images: &Images, window: Window, mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.timed(Kind::Patches, |context| stem::unfold_images(context, images, window, mean, std))
    }

    fn unfold(&self, x: &Tensor, grid: [usize; 2], window: Window) -> Result<Tensor> {
        self.timed(Kind::Convolution, |context| stem::unfold(context, x, grid, window))
    }

    fn convolve(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        window: Window,
        layer: &Linear<Tensor>,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        self.timed(Kind::Convolution, |context| stem::convolve(context, x, grid, window, layer, activation))
    }

    fn embed(&self, patches: &Tensor, prefix: Option<&Tensor>, position: Option<&Tensor>) -> Result<Tensor> {
        self.timed(Kind::Patches, |context| patch::embed(context, patches, prefix, position))
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.timed(Kind::Norm, |context| norm::layer_norm(context, x, norm))
    }

    fn head_norm(&self, packed: Tensor, part: usize, heads: usize, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.timed(Kind::Norm, |context| norm::head_norm(context, packed, part, heads, norm))
    }

    fn linear(
        &self,
        x: &Tensor,
        layer: LinearRows<'_, Tensor>,
        epilogue: Epilogue<Tensor>,
    ) -> Result<Tensor> {
        self.timed(Kind::Linear, |context| linear::linear(context, x, &layer, epilogue))
    }

    fn norm_linear(&self, x: &Tensor, norm: &Norm<Tensor>, layer: LinearRows<'_, Tensor>) -> Result<Tensor> {
        self.timed(Kind::Linear, |context| linear::norm_linear(context, x, norm, &layer))
    }

    fn norms_on_the_way(&self) -> bool {
        true
    }

    fn mlp(&self, tokens: Tensor, normed: Option<Tensor>, network: &Mlp<'_, Tensor>) -> Result<Tensor> {
        if !mlp::fuses(network) {
            return network.composed(self, tokens, normed);
        }
        self.timed(Kind::Linear, |context| mlp::mlp(context, tokens, normed.as_ref(), network))
    }

    fn attention(&self, qkv: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<(Tensor, Scores<Tensor>)> {
        self.timed(Kind::Attention, |context| attention::attention(context, qkv, scores))
    }

    fn attention_scores(&self, qk: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<Scores<Tensor>> {
        self.timed(Kind::Attention, |context| attention::attention_scores(context, qk, scores))
    }

    fn attention_scores_and_map(
        &self,
        qk: &Heads<'_, Tensor>,
        scores: ScoreRequest,
    ) -> Result<ScoresAndMap<Tensor>> {
        self.timed(Kind::Attention, |context| attention::attention_scores_and_map(context, qk, scores))
    }

    fn attention_reduced_of(
        &self,
        map: Option<&Tensor>,
        qk: &Heads<'_, Tensor>,
        values: &Tensor,
        plan: &Plan,
        pooling: Pooling,
    ) -> Result<Tensor> {
        match map {
            Some(map) if pooling == Pooling::Weighted => {
                self.timed(Kind::Attention, |context| kept::attention_of_map(context, map, qk, values, plan))
            }
            _ => self.attention_reduced(qk, values, plan, pooling),
        }
    }

    fn attention_reduced(
        &self,
        qk: &Heads<'_, Tensor>,
        values: &Tensor,
        plan: &Plan,
        pooling: Pooling,
    ) -> Result<Tensor> {
        self.timed(Kind::Attention, |context| match pooling {
            Pooling::Weighted => attention::attention_grouped(context, qk, values, plan),
            Pooling::Max => folded::attention_folded(context, qk, values, plan),
        })
    }

    fn matching(&self, matching: &Matching<'_, Tensor>) -> Result<Plan> {
        self.timed(Kind::Matching, |context| matching::matching(context, matching))
    }

    fn keep_scores(&self, x: &Tensor, predictor: &Predictor<Tensor>, special: usize) -> Result<Tensor> {
        self.timed(Kind::Scores, |context| predictor::keep_scores(context, x, predictor, special))
    }

    fn keep_in_place(&self, keep: &KeepInPlace<'_, Tensor>) -> Result<Plan> {
        self.timed(Kind::Select, |context| select::in_place(context, keep))
    }

    fn token_scores(&self, x: &Tensor, selector: &Linear<Tensor>, noise: Option<&Tensor>) -> Result<Tensor> {
        self.timed(Kind::Scores, |context| score::token_scores(context, x, selector, noise))
    }

    fn cluster(&self, cluster: &Cluster<'_, Tensor>) -> Result<Plan> {
        self.timed(Kind::Cluster, |context| cluster::cluster(context, cluster))
    }

    fn pool_windows(&self, x: &Tensor, special: usize, grid: [usize; 2], scale: usize) -> Result<Tensor> {
        self.timed(Kind::Windows, |context| windows::pool_windows(context, x, special, grid, scale))
    }

    fn add_windows(
        &self,
        x: Tensor,
        pooled: &Tensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Tensor> {
        self.timed(Kind::Windows, |context| windows::add_windows(context, x, pooled, special, grid, scale))
    }

    fn select(&self, select: &Select<'_, Tensor>) -> Result<Plan> {
        self.timed(Kind::Select, |context| select::select(context, select))
    }

    fn merge(
        &self,
        x: &Tensor,
        sizes: Option<&Tensor>,
        plan: &Plan,
        pooling: Pooling,
        norm: Option<&Norm<Tensor>>,
    ) -> Result<Merged<Tensor>> {
        self.timed(Kind::Merge, |context| merge::merge(context, x, sizes, plan, pooling, norm))
    }

    fn unmerge(&self, x: &Tensor, plan: &Plan) -> Result<Tensor> {
        self.timed(Kind::Merge, |context| merge::unmerge(context, x, plan))
    }

    fn tokens(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| patch::tokens(context, x, range))
    }

    fn mean_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| patch::mean_tokens(context, x, sizes, first))
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| patch::columns(context, x, range))
    }

    fn performer(&self, packed: &Tensor, w: &Tensor) -> Result<Tensor> {
        self.timed(Kind::Performer, |context| performer::performer(context, packed, w))
    }

    fn max_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| patch::max_tokens(context, x, sizes, first))
    }

    fn concat(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| readout::concat(context, left, right))
    }

    fn average(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| readout::average(context, a, b))
    }

    fn hidden_sizes(&self, sizes: Option<&Tensor>, shape: [usize; 2], hidden: usize) -> Result<Tensor> {
        self.timed(Kind::Readout, |context| readout::hidden_sizes(context, sizes, shape, hidden))
    }
}
