//! The CUDA backend behind the tensors of the host: what is written for those runs on the kernels, operation by operation.

use std::ops::Range;

use foveate::{
    Images, Result, Tensor, TokenPlan,
    backend::{
        Attraction, Backend, Cluster, Convolution, Depthwise, Epilogue, Frequency, GridBackend, Heads,
        KeepInPlace, Linear, LinearRows, Matching, Merged, Metric, Norm, NormOver, Pooling, Predictor,
        ScoreRequest, Scores, Select, Weighting, Window,
    },
    cuda::{Cuda, CudaTensor},
    model::Activation,
};

/// A backend over host tensors that moves each operation's arguments to the device and its results back. In `f32` neither
/// changes a bit: the results are those of a model that stays on the device.
#[derive(Clone, Debug)]
pub struct Mirror(pub Cuda);

impl Mirror {
    fn up(&self, tensor: &Tensor) -> Result<CudaTensor> {
        self.0.upload(tensor.clone())
    }

    fn up_maybe(&self, tensor: Option<&Tensor>) -> Result<Option<CudaTensor>> {
        tensor.map(|tensor| self.up(tensor)).transpose()
    }

    fn up_f32(&self, tensor: Option<&Tensor>) -> Result<Option<CudaTensor>> {
        tensor.map(|tensor| self.0.upload_f32(tensor.clone())).transpose()
    }

    fn up_norm(&self, norm: &Norm<Tensor>) -> Result<Norm<CudaTensor>> {
        let bias = self.up_maybe(norm.bias.as_ref())?;
        Ok(Norm { weight: self.up(&norm.weight)?, bias, eps: norm.eps })
    }

    fn up_predictor(&self, predictor: &Predictor<Tensor>) -> Result<Predictor<CudaTensor>> {
        let linear = |layer: &Linear<Tensor>| -> Result<Linear<CudaTensor>> {
            Ok(Linear { weight: self.up(&layer.weight)?, bias: self.up_maybe(layer.bias.as_ref())? })
        };
        Ok(Predictor {
            norm: self.up_norm(&predictor.norm)?,
            hidden: linear(&predictor.hidden)?,
            first: linear(&predictor.first)?,
            second: linear(&predictor.second)?,
            last: linear(&predictor.last)?,
        })
    }

    fn with_heads<R>(
        &self,
        heads: &Heads<'_, Tensor>,
        work: impl FnOnce(&Heads<'_, CudaTensor>) -> Result<R>,
    ) -> Result<R> {
        let packed = self.up(heads.packed)?;
        let sizes = self.up_f32(heads.sizes)?;
        let &Heads { heads, head_dim, scale, .. } = heads;
        work(&Heads { packed: &packed, heads, head_dim, scale, sizes: sizes.as_ref() })
    }

    fn down(&self, tensor: Option<CudaTensor>) -> Result<Option<Tensor>> {
        tensor.map(|tensor| self.0.download(&tensor)).transpose()
    }

    fn down_scores(&self, scores: Scores<CudaTensor>) -> Result<Scores<Tensor>> {
        Ok(Scores { class: self.down(scores.class)?, received: self.down(scores.received)? })
    }
}

impl Backend for Mirror {
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

    fn head_dim(&self, head_dim: usize) -> usize {
        self.0.head_dim(head_dim)
    }

    fn upload_plan(&self, plan: TokenPlan) -> Result<TokenPlan> {
        Ok(plan)
    }

    fn download_plan(&self, plan: &TokenPlan) -> Result<TokenPlan> {
        Ok(plan.clone())
    }

    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.0.download(&self.0.patches(images, patch, mean, std)?)
    }

    fn unfold_images(&self, images: &Images, window: Window, mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.0.download(&self.0.unfold_images(images, window, mean, std)?)
    }

    fn unfold(&self, x: &Tensor, grid: [usize; 2], window: Window) -> Result<Tensor> {
        self.0.download(&self.0.unfold(&self.up(x)?, grid, window)?)
    }

    fn convolve(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        window: Window,
        layer: &Linear<Tensor>,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        let layer = Linear { weight: self.up(&layer.weight)?, bias: self.up_maybe(layer.bias.as_ref())? };
        self.0.download(&self.0.convolve(&self.up(x)?, grid, window, &layer, activation)?)
    }

    fn embed(&self, patches: &Tensor, prefix: Option<&Tensor>, position: Option<&Tensor>) -> Result<Tensor> {
        let (prefix, position) = (self.up_maybe(prefix)?, self.up_maybe(position)?);
        self.0.download(&self.0.embed(&self.up(patches)?, prefix.as_ref(), position.as_ref())?)
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.0.download(&self.0.layer_norm(&self.up(x)?, &self.up_norm(norm)?)?)
    }

    fn head_norm(&self, packed: Tensor, part: usize, heads: usize, norm: &Norm<Tensor>) -> Result<Tensor> {
        let packed = self.0.upload(packed)?;
        self.0.download(&self.0.head_norm(packed, part, heads, &self.up_norm(norm)?)?)
    }

    fn linear(
        &self,
        x: &Tensor,
        layer: LinearRows<'_, Tensor>,
        epilogue: Epilogue<Tensor>,
    ) -> Result<Tensor> {
        let Linear { weight, bias } = layer.layer;
        let moved = Linear { weight: self.up(weight)?, bias: self.up_maybe(bias.as_ref())? };
        let epilogue = match epilogue {
            Epilogue::None => Epilogue::None,
            Epilogue::Activation(activation) => Epilogue::Activation(activation),
            Epilogue::AddTo(residual) => Epilogue::AddTo(self.0.upload(residual)?),
        };
        let rows = LinearRows { layer: &moved, rows: layer.rows };
        self.0.download(&self.0.linear(&self.up(x)?, rows, epilogue)?)
    }

    fn attention(&self, qkv: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<(Tensor, Scores<Tensor>)> {
        let (out, scores) = self.with_heads(qkv, |qkv| self.0.attention(qkv, scores))?;
        Ok((self.0.download(&out)?, self.down_scores(scores)?))
    }

    fn attention_scores(&self, qk: &Heads<'_, Tensor>, scores: ScoreRequest) -> Result<Scores<Tensor>> {
        self.down_scores(self.with_heads(qk, |qk| self.0.attention_scores(qk, scores))?)
    }

    fn attention_reduced(
        &self,
        qk: &Heads<'_, Tensor>,
        values: &Tensor,
        plan: &TokenPlan,
        pooling: Pooling,
    ) -> Result<Tensor> {
        let (values, plan) = (self.up(values)?, self.0.upload_plan(plan.clone())?);
        let out = self.with_heads(qk, |qk| self.0.attention_reduced(qk, &values, &plan, pooling))?;
        self.0.download(&out)
    }

    fn matching(&self, matching: &Matching<'_, Tensor>) -> Result<TokenPlan> {
        let &Matching { special, merges, both_ways, .. } = matching;
        let (factors, factor_sizes) = match matching.attraction {
            Attraction::Cosine => (None, None),
            Attraction::MultiCriteria { informativeness, size, .. } => {
                (self.up_f32(Some(informativeness.0))?, self.up_f32(size.0)?)
            }
        };
        let (sizes, received) = match matching.weighting {
            Weighting::Uniform => (None, None),
            Weighting::Size(sizes) => (self.up_f32(sizes)?, None),
            Weighting::SizeAndReceived(sizes, received) => {
                (self.up_f32(sizes)?, self.up_f32(Some(received))?)
            }
        };
        let attraction = || match (&matching.attraction, &factors) {
            (&Attraction::MultiCriteria { tau_similarity, informativeness, size }, Some(factors)) => {
                Attraction::MultiCriteria {
                    tau_similarity,
                    informativeness: (factors, informativeness.1),
                    size: (factor_sizes.as_ref(), size.1),
                }
            }
            _ => Attraction::Cosine,
        };
        let weighting = || match (&matching.weighting, &received) {
            (Weighting::Uniform, _) => Weighting::Uniform,
            (_, Some(received)) => Weighting::SizeAndReceived(sizes.as_ref(), received),
            (_, None) => Weighting::Size(sizes.as_ref()),
        };
        let run = |metric: Metric<'_, CudaTensor>| {
            let (attraction, weighting) = (attraction(), weighting());
            self.0.matching(&Matching { metric, attraction, weighting, special, merges, both_ways })
        };
        let plan = match &matching.metric {
            Metric::Rows(rows) => run(Metric::Rows(&self.up(rows)?))?,
            Metric::Keys(heads) => self.with_heads(heads, |heads| run(Metric::Keys(heads)))?,
        };
        self.0.download_plan(&plan)
    }

    fn keep_scores(&self, x: &Tensor, predictor: &Predictor<Tensor>, special: usize) -> Result<Tensor> {
        let predictor = self.up_predictor(predictor)?;
        self.0.download(&self.0.keep_scores(&self.up(x)?, &predictor, special)?)
    }

    fn keep_predicted(
        &self,
        x: &Tensor,
        predictor: &Predictor<Tensor>,
        special: usize,
        keep: usize,
    ) -> Result<TokenPlan> {
        let predictor = self.up_predictor(predictor)?;
        self.0.download_plan(&self.0.keep_predicted(&self.up(x)?, &predictor, special, keep)?)
    }

    fn token_scores(&self, x: &Tensor, selector: &Linear<Tensor>, noise: Option<&Tensor>) -> Result<Tensor> {
        let bias = self.up_maybe(selector.bias.as_ref())?;
        let selector = Linear { weight: self.up(&selector.weight)?, bias };
        self.0.download(&self.0.token_scores(&self.up(x)?, &selector, self.up_f32(noise)?.as_ref())?)
    }

    fn cluster(&self, cluster: &Cluster<'_, Tensor>) -> Result<TokenPlan> {
        let (tokens, scores) = (self.up(cluster.tokens)?, self.0.upload_f32(cluster.class_scores.clone())?);
        let &Cluster { special, keep, inattentive, .. } = cluster;
        let cluster = Cluster { tokens: &tokens, class_scores: &scores, special, keep, inattentive };
        self.0.download_plan(&self.0.cluster(&cluster)?)
    }

    fn pool_windows(&self, x: &Tensor, special: usize, grid: [usize; 2], scale: usize) -> Result<Tensor> {
        self.0.download(&self.0.pool_windows(&self.up(x)?, special, grid, scale)?)
    }

    fn add_windows(
        &self,
        x: Tensor,
        pooled: &Tensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Tensor> {
        self.0.download(&self.0.add_windows(self.0.upload(x)?, &self.up(pooled)?, special, grid, scale)?)
    }

    fn keep_in_place(&self, keep: &KeepInPlace<'_, Tensor>) -> Result<TokenPlan> {
        let scores = self.0.upload_f32(keep.scores.clone())?;
        let keep =
            KeepInPlace { scores: &scores, special: keep.special, keep: keep.keep, masked: keep.masked };
        self.0.download_plan(&self.0.keep_in_place(&keep)?)
    }

    fn select(&self, select: &Select<'_, Tensor>) -> Result<TokenPlan> {
        let &Select { class_scores, special, keep, fuse } = select;
        let class_scores = self.0.upload_f32(class_scores.clone())?;
        let select = Select { class_scores: &class_scores, special, keep, fuse };
        self.0.download_plan(&self.0.select(&select)?)
    }

    fn merge(
        &self,
        x: &Tensor,
        sizes: Option<&Tensor>,
        plan: &TokenPlan,
        pooling: Pooling,
        norm: Option<&Norm<Tensor>>,
    ) -> Result<Merged<Tensor>> {
        let (x, sizes, plan) = (self.up(x)?, self.up_f32(sizes)?, self.0.upload_plan(plan.clone())?);
        let norm = norm.map(|norm| self.up_norm(norm)).transpose()?;
        let merged = self.0.merge(&x, sizes.as_ref(), &plan, pooling, norm.as_ref())?;
        Ok(Merged {
            tokens: self.0.download(&merged.tokens)?,
            sizes: self.0.download(&merged.sizes)?,
            normed: self.down(merged.normed)?,
        })
    }

    fn unmerge(&self, x: &Tensor, plan: &TokenPlan) -> Result<Tensor> {
        self.0.download(&self.0.unmerge(&self.up(x)?, &self.0.upload_plan(plan.clone())?)?)
    }

    fn tokens(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.0.download(&self.0.tokens(&self.up(x)?, range)?)
    }

    fn mean_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        self.0.download(&self.0.mean_tokens(&self.up(x)?, self.up_f32(sizes)?.as_ref(), first)?)
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.0.download(&self.0.columns(&self.up(x)?, range)?)
    }

    fn performer(&self, packed: &Tensor, w: &Tensor) -> Result<Tensor> {
        self.0.download(&self.0.performer(&self.up(packed)?, &self.0.upload_f32(w.clone())?)?)
    }

    fn max_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        self.0.download(&self.0.max_tokens(&self.up(x)?, self.up_f32(sizes)?.as_ref(), first)?)
    }

    fn concat(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        self.0.download(&self.0.concat(&self.up(left)?, &self.up(right)?)?)
    }

    fn average(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.0.download(&self.0.average(&self.up(a)?, &self.up(b)?)?)
    }

    fn hidden_sizes(&self, sizes: Option<&Tensor>, shape: [usize; 2], hidden: usize) -> Result<Tensor> {
        self.0.download(&self.0.hidden_sizes(self.up_f32(sizes)?.as_ref(), shape, hidden)?)
    }
}

impl GridBackend for Mirror {
    fn convolution(&self, x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
        let &Convolution { ref weight, ref bias, stride, activation } = layer;
        let layer = Convolution { weight: self.up(weight)?, bias: self.up(bias)?, stride, activation };
        self.0.download(&self.0.convolution(&self.up(x)?, grid, &layer)?)
    }

    fn depthwise(&self, x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
        let &Depthwise { ref weight, ref bias, stride, before, activation } = layer;
        let layer = Depthwise { weight: self.up(weight)?, bias: self.up(bias)?, stride, before, activation };
        self.0.download(&self.0.depthwise(&self.up(x)?, grid, &layer)?)
    }

    fn grid_norm(&self, x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.0.download(&self.0.grid_norm(&self.up(x)?, over, &self.up_norm(norm)?)?)
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        self.0.download(&self.0.activate(self.0.upload(x)?, activation)?)
    }

    fn frequency(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        filter: &Frequency<Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let &Frequency { ref w1, ref b1, ref w2, ref b2, activation, threshold } = filter;
        let [w1, b1, w2, b2] = [self.up(w1)?, self.up(b1)?, self.up(w2)?, self.up(b2)?];
        let filter = Frequency { w1, b1, w2, b2, activation, threshold };
        let residual = self.up_maybe(residual)?;
        self.0.download(&self.0.frequency(&self.up(x)?, grid, &filter, residual.as_ref())?)
    }
}
