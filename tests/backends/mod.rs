//! All that run operations on the processor, behind one face: what holds for the reference holds for the fast backend with
//! each set of instructions.

use std::{ops::Range, sync::LazyLock};

use foveate::{
    Images, Result, Tensor, TokenPlan,
    backend::{
        Attraction, Backend, Cluster, Convolution, Depthwise, Epilogue, Frequency, GridBackend, Heads,
        KeepInPlace, Linear, LinearRows, Matching, Merged, Metric, Mlp, Norm, NormOver, Pooling, Predictor,
        ScoreRequest, Scores, Select, Weighting, Window,
    },
    cpu::{self, Cpu, Instructions},
    model::Activation,
    reference::Reference,
};

/// A backend that takes and gives host tensors.
pub(crate) type Any = dyn GridBackend<Tensor = Tensor, Plan = TokenPlan>;

/// The reference, and the fast backend with each set of instructions that this processor has, two threads each.
#[allow(dead_code, reason = "golden_cpu.rs has its own")]
pub(crate) fn backends() -> impl Iterator<Item = &'static Any> {
    static ALL: LazyLock<Vec<Box<Any>>> = LazyLock::new(|| {
        let mut all: Vec<Box<Any>> = vec![Box::new(Reference::with_threads(2).unwrap())];
        for instructions in Instructions::ALL.into_iter().filter(|instructions| instructions.available()) {
            all.push(Box::new(Hosted(Cpu::with(2, instructions).unwrap())));
        }
        all
    });
    ALL.iter().map(|backend| &**backend)
}

/// Brings tensors to the fast backend and back around each operation.
#[derive(Clone, Debug)]
pub(crate) struct Hosted(pub(crate) Cpu);

impl Hosted {
    fn up(&self, tensor: &Tensor) -> Result<cpu::Tensor> {
        self.0.upload(tensor.clone())
    }

    fn maybe(&self, tensor: Option<&Tensor>) -> Result<Option<cpu::Tensor>> {
        tensor.map(|tensor| self.up(tensor)).transpose()
    }

    fn down(&self, tensor: Result<cpu::Tensor>) -> Result<Tensor> {
        self.0.download(&tensor?)
    }

    fn norm(&self, norm: &Norm<Tensor>) -> Result<Norm<cpu::Tensor>> {
        Ok(Norm { weight: self.up(&norm.weight)?, bias: self.maybe(norm.bias.as_ref())?, eps: norm.eps })
    }

    fn layer(&self, layer: &Linear<Tensor>) -> Result<Linear<cpu::Tensor>> {
        Ok(Linear { weight: self.up(&layer.weight)?, bias: self.maybe(layer.bias.as_ref())? })
    }

    fn scores(&self, scores: Scores<cpu::Tensor>) -> Result<Scores<Tensor>> {
        let down = |scores: Option<cpu::Tensor>| scores.map(|scores| self.0.download(&scores)).transpose();
        Ok(Scores { class: down(scores.class)?, received: down(scores.received)? })
    }

    fn with_heads<R>(
        &self,
        heads: &Heads<'_, Tensor>,
        run: impl FnOnce(&Heads<'_, cpu::Tensor>) -> Result<R>,
    ) -> Result<R> {
        let (packed, sizes) = (self.up(heads.packed)?, self.maybe(heads.sizes)?);
        let Heads { heads, head_dim, scale, .. } = *heads;
        run(&Heads { packed: &packed, heads, head_dim, scale, sizes: sizes.as_ref() })
    }

    fn match_with(
        &self,
        matching: &Matching<'_, Tensor>,
        metric: Metric<'_, cpu::Tensor>,
    ) -> Result<TokenPlan> {
        let (received, sizes, weigh_sizes, weigh_received);
        let attraction = match &matching.attraction {
            Attraction::Cosine => Attraction::Cosine,
            Attraction::MultiCriteria { tau_similarity, informativeness, size } => {
                (received, sizes) = (self.up(informativeness.0)?, self.maybe(size.0)?);
                Attraction::MultiCriteria {
                    tau_similarity: *tau_similarity,
                    informativeness: (&received, informativeness.1),
                    size: (sizes.as_ref(), size.1),
                }
            }
        };
        let weighting = match matching.weighting {
            Weighting::Uniform => Weighting::Uniform,
            Weighting::Size(sizes) => {
                weigh_sizes = self.maybe(sizes)?;
                Weighting::Size(weigh_sizes.as_ref())
            }
            Weighting::SizeAndReceived(sizes, received) => {
                (weigh_sizes, weigh_received) = (self.maybe(sizes)?, self.up(received)?);
                Weighting::SizeAndReceived(weigh_sizes.as_ref(), &weigh_received)
            }
        };
        let Matching { special, merges, both_ways, .. } = *matching;
        let matching = Matching { metric, attraction, weighting, special, merges, both_ways };
        self.0.download_plan(&self.0.matching(&matching)?)
    }
}

impl Backend for Hosted {
    type Tensor = Tensor;
    type Plan = TokenPlan;

    fn upload(&self, tensor: Tensor) -> Result<Tensor> {
        self.down(self.0.upload(tensor))
    }

    fn upload_f32(&self, tensor: Tensor) -> Result<Tensor> {
        self.down(self.0.upload_f32(tensor))
    }

    fn download(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    fn shape<'a>(&self, tensor: &'a Tensor) -> &'a [usize] {
        tensor.shape()
    }

    fn upload_plan(&self, plan: TokenPlan) -> Result<TokenPlan> {
        self.0.download_plan(&self.0.upload_plan(plan)?)
    }

    fn download_plan(&self, plan: &TokenPlan) -> Result<TokenPlan> {
        Ok(plan.clone())
    }

    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.down(self.0.patches(images, patch, mean, std))
    }

    fn unfold_images(&self, images: &Images, window: Window, mean: &[f32], std: &[f32]) -> Result<Tensor> {
        self.down(self.0.unfold_images(images, window, mean, std))
    }

    fn unfold(&self, x: &Tensor, grid: [usize; 2], window: Window) -> Result<Tensor> {
        self.down(self.0.unfold(&self.up(x)?, grid, window))
    }

    fn convolve(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        window: Window,
        layer: &Linear<Tensor>,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        self.down(self.0.convolve(&self.up(x)?, grid, window, &self.layer(layer)?, activation))
    }

    fn embed(&self, patches: &Tensor, prefix: Option<&Tensor>, position: Option<&Tensor>) -> Result<Tensor> {
        let (prefix, position) = (self.maybe(prefix)?, self.maybe(position)?);
        self.down(self.0.embed(&self.up(patches)?, prefix.as_ref(), position.as_ref()))
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.down(self.0.layer_norm(&self.up(x)?, &self.norm(norm)?))
    }

    fn head_norm(&self, packed: Tensor, part: usize, heads: usize, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.down(self.0.head_norm(self.up(&packed)?, part, heads, &self.norm(norm)?))
    }

    fn linear(
        &self,
        x: &Tensor,
        layer: LinearRows<'_, Tensor>,
        epilogue: Epilogue<Tensor>,
    ) -> Result<Tensor> {
        let epilogue = match epilogue {
            Epilogue::None => Epilogue::None,
            Epilogue::Activation(activation) => Epilogue::Activation(activation),
            Epilogue::AddTo(residual) => Epilogue::AddTo(self.up(&residual)?),
        };
        let whole = self.layer(layer.layer)?;
        self.down(self.0.linear(&self.up(x)?, LinearRows { layer: &whole, rows: layer.rows }, epilogue))
    }

    fn norm_linear(&self, x: &Tensor, norm: &Norm<Tensor>, layer: LinearRows<'_, Tensor>) -> Result<Tensor> {
        let (norm, whole) = (self.norm(norm)?, self.layer(layer.layer)?);
        self.down(self.0.norm_linear(&self.up(x)?, &norm, LinearRows { layer: &whole, rows: layer.rows }))
    }

    fn mlp(&self, tokens: Tensor, normed: Option<Tensor>, mlp: &Mlp<'_, Tensor>) -> Result<Tensor> {
        let (norm, fc1, fc2) = (self.norm(mlp.norm)?, self.layer(mlp.fc1)?, self.layer(mlp.fc2)?);
        let inner = mlp.inner_norm.map(|norm| self.norm(norm)).transpose()?;
        let (tokens, normed) = (self.up(&tokens)?, self.maybe(normed.as_ref())?);
        let activation = mlp.activation;
        let mlp = Mlp { norm: &norm, fc1: &fc1, activation, inner_norm: inner.as_ref(), fc2: &fc2 };
        self.down(self.0.mlp(tokens, normed, &mlp))
    }

    fn attention(&self, qkv: &Heads<'_, Tensor>, request: ScoreRequest) -> Result<(Tensor, Scores<Tensor>)> {
        let (context, scores) = self.with_heads(qkv, |qkv| self.0.attention(qkv, request))?;
        Ok((self.0.download(&context)?, self.scores(scores)?))
    }

    fn attention_scores(&self, qk: &Heads<'_, Tensor>, request: ScoreRequest) -> Result<Scores<Tensor>> {
        self.scores(self.with_heads(qk, |qk| self.0.attention_scores(qk, request))?)
    }

    fn attention_reduced(
        &self,
        qk: &Heads<'_, Tensor>,
        values: &Tensor,
        plan: &TokenPlan,
        pooling: Pooling,
    ) -> Result<Tensor> {
        let (values, plan) = (self.up(values)?, self.0.upload_plan(plan.clone())?);
        self.down(self.with_heads(qk, |qk| self.0.attention_reduced(qk, &values, &plan, pooling)))
    }

    fn attention_scores_and_map(
        &self,
        qk: &Heads<'_, Tensor>,
        request: ScoreRequest,
    ) -> Result<(Scores<Tensor>, Option<Tensor>)> {
        let (scores, map) = self.with_heads(qk, |qk| self.0.attention_scores_and_map(qk, request))?;
        Ok((self.scores(scores)?, map.map(|map| self.0.download(&map)).transpose()?))
    }

    fn attention_reduced_of(
        &self,
        map: Option<&Tensor>,
        qk: &Heads<'_, Tensor>,
        values: &Tensor,
        plan: &TokenPlan,
        pooling: Pooling,
    ) -> Result<Tensor> {
        let (map, values) = (self.maybe(map)?, self.up(values)?);
        let plan = self.0.upload_plan(plan.clone())?;
        self.down(
            self.with_heads(qk, |qk| self.0.attention_reduced_of(map.as_ref(), qk, &values, &plan, pooling)),
        )
    }

    fn matching(&self, matching: &Matching<'_, Tensor>) -> Result<TokenPlan> {
        match matching.metric {
            Metric::Rows(rows) => self.match_with(matching, Metric::Rows(&self.up(rows)?)),
            Metric::Keys(heads) => {
                self.with_heads(heads, |heads| self.match_with(matching, Metric::Keys(heads)))
            }
        }
    }

    fn keep_scores(&self, x: &Tensor, predictor: &Predictor<Tensor>, special: usize) -> Result<Tensor> {
        let predictor = Predictor {
            norm: self.norm(&predictor.norm)?,
            hidden: self.layer(&predictor.hidden)?,
            first: self.layer(&predictor.first)?,
            second: self.layer(&predictor.second)?,
            last: self.layer(&predictor.last)?,
        };
        self.down(self.0.keep_scores(&self.up(x)?, &predictor, special))
    }

    fn keep_in_place(&self, keep: &KeepInPlace<'_, Tensor>) -> Result<TokenPlan> {
        let scores = self.up(keep.scores)?;
        let KeepInPlace { special, keep, masked, .. } = *keep;
        self.0.download_plan(&self.0.keep_in_place(&KeepInPlace {
            scores: &scores,
            special,
            keep,
            masked,
        })?)
    }

    fn token_scores(&self, x: &Tensor, selector: &Linear<Tensor>, noise: Option<&Tensor>) -> Result<Tensor> {
        let noise = self.maybe(noise)?;
        self.down(self.0.token_scores(&self.up(x)?, &self.layer(selector)?, noise.as_ref()))
    }

    fn cluster(&self, cluster: &Cluster<'_, Tensor>) -> Result<TokenPlan> {
        let (tokens, class_scores) = (self.up(cluster.tokens)?, self.up(cluster.class_scores)?);
        let Cluster { special, keep, inattentive, .. } = *cluster;
        let cluster = Cluster { tokens: &tokens, class_scores: &class_scores, special, keep, inattentive };
        self.0.download_plan(&self.0.cluster(&cluster)?)
    }

    fn pool_windows(&self, x: &Tensor, special: usize, grid: [usize; 2], scale: usize) -> Result<Tensor> {
        self.down(self.0.pool_windows(&self.up(x)?, special, grid, scale))
    }

    fn add_windows(
        &self,
        x: Tensor,
        pooled: &Tensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Tensor> {
        self.down(self.0.add_windows(self.up(&x)?, &self.up(pooled)?, special, grid, scale))
    }

    fn select(&self, select: &Select<'_, Tensor>) -> Result<TokenPlan> {
        let class_scores = self.up(select.class_scores)?;
        let Select { special, keep, fuse, .. } = *select;
        self.0.download_plan(&self.0.select(&Select { class_scores: &class_scores, special, keep, fuse })?)
    }

    fn merge(
        &self,
        x: &Tensor,
        sizes: Option<&Tensor>,
        plan: &TokenPlan,
        pooling: Pooling,
        norm: Option<&Norm<Tensor>>,
    ) -> Result<Merged<Tensor>> {
        let (x, sizes, plan) = (self.up(x)?, self.maybe(sizes)?, self.0.upload_plan(plan.clone())?);
        let norm = norm.map(|norm| self.norm(norm)).transpose()?;
        let merged = self.0.merge(&x, sizes.as_ref(), &plan, pooling, norm.as_ref())?;
        Ok(Merged {
            tokens: self.0.download(&merged.tokens)?,
            sizes: self.0.download(&merged.sizes)?,
            normed: merged.normed.map(|normed| self.0.download(&normed)).transpose()?,
        })
    }

    fn unmerge(&self, x: &Tensor, plan: &TokenPlan) -> Result<Tensor> {
        self.down(self.0.unmerge(&self.up(x)?, &self.0.upload_plan(plan.clone())?))
    }

    fn tokens(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.down(self.0.tokens(&self.up(x)?, range))
    }

    fn mean_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        let sizes = self.maybe(sizes)?;
        self.down(self.0.mean_tokens(&self.up(x)?, sizes.as_ref(), first))
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.down(self.0.columns(&self.up(x)?, range))
    }

    fn performer(&self, packed: &Tensor, w: &Tensor) -> Result<Tensor> {
        self.down(self.0.performer(&self.up(packed)?, &self.up(w)?))
    }

    fn max_tokens(&self, x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
        let sizes = self.maybe(sizes)?;
        self.down(self.0.max_tokens(&self.up(x)?, sizes.as_ref(), first))
    }

    fn concat(&self, left: &Tensor, right: &Tensor) -> Result<Tensor> {
        self.down(self.0.concat(&self.up(left)?, &self.up(right)?))
    }

    fn average(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.down(self.0.average(&self.up(a)?, &self.up(b)?))
    }

    fn hidden_sizes(&self, sizes: Option<&Tensor>, shape: [usize; 2], hidden: usize) -> Result<Tensor> {
        let sizes = self.maybe(sizes)?;
        self.down(self.0.hidden_sizes(sizes.as_ref(), shape, hidden))
    }
}

impl GridBackend for Hosted {
    fn convolution(&self, x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
        let layer = Convolution {
            weight: self.up(&layer.weight)?,
            bias: self.up(&layer.bias)?,
            stride: layer.stride,
            activation: layer.activation,
        };
        self.down(self.0.convolution(&self.up(x)?, grid, &layer))
    }

    fn depthwise(&self, x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
        let layer = Depthwise {
            weight: self.up(&layer.weight)?,
            bias: self.up(&layer.bias)?,
            stride: layer.stride,
            before: layer.before,
            activation: layer.activation,
        };
        self.down(self.0.depthwise(&self.up(x)?, grid, &layer))
    }

    fn grid_norm(&self, x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.down(self.0.grid_norm(&self.up(x)?, over, &self.norm(norm)?))
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        self.down(self.0.activate(self.up(&x)?, activation))
    }

    fn frequency(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        filter: &Frequency<Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let filter = Frequency {
            w1: self.up(&filter.w1)?,
            b1: self.up(&filter.b1)?,
            w2: self.up(&filter.w2)?,
            b2: self.up(&filter.b2)?,
            activation: filter.activation,
            threshold: filter.threshold,
        };
        let residual = self.maybe(residual)?;
        self.down(self.0.frequency(&self.up(x)?, grid, &filter, residual.as_ref()))
    }
}
