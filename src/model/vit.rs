//! The plain vision transformer: ViT, DeiT, DINOv2, CLIP's visual tower, LV-ViT, T2T-ViT.

use super::{BlockParams, BlockSize, Readout, VitConfig, VitParams, heads::padded};
use crate::{
    Error, Images, Result, SourceMap, Tensor,
    backend::{Backend, Epilogue, Heads, Linear, Merged, Mlp, Norm, Pooling, ScoreRequest, Scores},
    reduction::{Evidence, Host, Method, SCALES, Site, Step},
};

/// A plain vision transformer on a backend.
#[derive(Clone, Debug)]
pub struct Vit<B: Backend> {
    backend: B,
    config: VitConfig,
    params: VitParams<B::Tensor>,
    /// Values of a head in `params`: those of the model, and zeros up to what the backend has kernels for.
    head_dim: usize,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct Output<B: Backend> {
    /// All final tokens after the final LayerNorm, (B, M, C).
    pub tokens: B::Tensor,
    /// How many patches each final token stands for, (B, M); absent when nothing was reduced.
    pub sizes: Option<B::Tensor>,
    /// What the head reads, (B, C) or (B, 2C).
    pub features: B::Tensor,
    /// (B, classes), if the model has a head. With a distillation head the mean of both heads' logits.
    pub logits: Option<B::Tensor>,
    /// The logits of the class token's and the distillation token's head before they are averaged.
    pub head_logits: Option<[B::Tensor; 2]>,
    /// Tokens entering block 0 and leaving each block.
    pub token_counts: Vec<usize>,
    /// The plans that were applied, with the block they were applied in.
    pub plans: Vec<(usize, B::Plan)>,
}

/// Looks on while a model runs. All methods do nothing unless implemented.
pub trait Observer<B: Backend> {
    /// Tokens leaving a stage of a tokens-to-token stem, (B, N, T): stage 0, then stage 1.
    fn stage(&mut self, _stage: usize, _tokens: &B::Tensor) {}
    /// Tokens entering block 0, (B, N, C).
    fn embedded(&mut self, _tokens: &B::Tensor) {}
    /// A step: what the method saw, what it decided and what became of the tokens (before the MLP, for a step inside a
    /// block).
    fn reduced(&mut self, _evidence: &Evidence<'_, B>, _plan: &B::Plan, _merged: &Merged<B::Tensor>) {}
    /// Tokens leaving block `layer`.
    fn block(&mut self, _layer: usize, _tokens: &B::Tensor) {}
}

impl<B: Backend> Observer<B> for () {}

/// The state that travels from block to block.
struct Stream<T> {
    tokens: T,
    sizes: Option<T>,
    count: usize,
}

impl<B: Backend> Vit<B> {
    /// A model from host parameters, moved to `backend`.
    ///
    /// # Errors
    /// When the numbers of `config` contradict each other or a parameter has another shape than they say.
    pub fn new(backend: B, config: VitConfig, params: VitParams<Tensor>) -> Result<Self> {
        config.check()?;
        check_params(&config, &params)?;
        let (mut params, head_dim) = padded(params, &config, backend.head_dim(config.head_dim()))?;
        let features: Vec<Option<Tensor>> = params.stem.features_mut().map(Option::take).collect();
        let mut params = params.try_map(&mut |tensor| backend.upload(tensor))?;
        for (place, features) in params.stem.features_mut().zip(features) {
            *place = features.map(|features| backend.upload_f32(features)).transpose()?;
        }
        Ok(Self { backend, config, params, head_dim })
    }

    /// The same parameters on another backend that can use them.
    pub(crate) fn on(&self, backend: B) -> Self {
        Self { backend, config: self.config.clone(), params: self.params.clone(), head_dim: self.head_dim }
    }

    /// The model's numbers.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// The backend it runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    pub(super) fn params(&self) -> &VitParams<B::Tensor> {
        &self.params
    }

    /// What reduction methods may know of this model.
    pub fn host(&self) -> Host {
        self.params.host(&self.config)
    }

    /// Runs a batch of images of the model's input size.
    ///
    /// # Errors
    /// When the images have another size, or the method does not suit the model.
    pub fn forward(&self, images: &Images, method: &impl Method) -> Result<Output<B>> {
        self.forward_observed(images, method, &mut ())
    }

    /// Runs a batch in place of an earlier one, whose results it drops first: their memory is used again. On
    /// [`Cpu`](crate::cpu::Cpu) nothing is allocated then.
    ///
    /// # Errors
    /// As [`Vit::forward`].
    pub fn forward_again(
        &self,
        images: &Images,
        method: &impl Method,
        earlier: Output<B>,
    ) -> Result<Output<B>> {
        let lists = earlier.into_lists();
        self.check_images(images, method)?;
        let outcome = self.input_rows(images).and_then(|rows| self.run(rows, method, &mut (), lists));
        outcome.map_err(|error| self.explain(error, images, method))
    }

    /// Runs a batch with someone looking on.
    ///
    /// # Errors
    /// As [`Vit::forward`].
    pub fn forward_observed(
        &self,
        images: &Images,
        method: &impl Method,
        observer: &mut impl Observer<B>,
    ) -> Result<Output<B>> {
        self.check_images(images, method)?;
        let outcome = self.input_rows(images).and_then(|rows| self.forward_patches(rows, method, observer));
        outcome.map_err(|error| self.explain(error, images, method))
    }

    /// An error of a pass over `images`.
    fn explain(&self, error: Error, images: &Images, method: &impl Method) -> Error {
        self.backend.explain(error, images.batch(), &|backend, batch| {
            let model = self.on(backend);
            model.forward_patches(model.input_rows(&images.blank(batch)?)?, method, &mut ()).map(drop)
        })
    }

    fn check_images(&self, images: &Images, method: &impl Method) -> Result<()> {
        method.check(&self.host())?;
        let [_, channels, height, width] = images.shape();
        let c = &self.config;
        if channels == c.channels && [height, width] == c.image {
            return Ok(());
        }
        Err(Error::model(format!(
            "the images are {height}x{width} with {channels} channels, the model takes {}x{} with {}",
            c.image[0], c.image[1], c.channels
        )))
    }

    /// Runs from rows of normalised pixels on, (B, patches, channels · patch height · patch width), or as the stem's first window
    /// sees them.
    pub(crate) fn forward_patches(
        &self,
        rows: B::Tensor,
        method: &impl Method,
        observer: &mut impl Observer<B>,
    ) -> Result<Output<B>> {
        self.run(rows, method, observer, (Vec::new(), Vec::new()))
    }

    fn run(
        &self,
        rows: B::Tensor,
        method: &impl Method,
        observer: &mut impl Observer<B>,
        (mut token_counts, mut plans): Lists<B>,
    ) -> Result<Output<B>> {
        let host = self.host();
        method.check(&host)?;
        let mut stream = self.embed(rows, observer)?;
        observer.embedded(&stream.tokens);
        token_counts.push(stream.count);
        for (layer, block) in self.params.blocks.iter().enumerate() {
            let step = method.step(layer, stream.count, &host);
            let pass = BlockPass { model: self, method, block, layer, step };
            let (next, plan) = pass.run(stream, observer)?;
            stream = next;
            observer.block(layer, &stream.tokens);
            token_counts.push(stream.count);
            plans.extend(plan.map(|plan| (layer, plan)));
        }
        self.read_out(stream, method.proportional_attention(), token_counts, plans)
    }

    fn embed(&self, rows: B::Tensor, observer: &mut impl Observer<B>) -> Result<Stream<B::Tensor>> {
        let patches = self.patch_tokens(rows, observer)?;
        let mut tokens =
            self.backend.embed(&patches, self.params.prefix.as_ref(), self.params.position.as_ref())?;
        drop(patches);
        if let Some(norm) = &self.params.norm_pre {
            tokens = self.backend.stream_norm(&tokens, norm)?;
        }
        Ok(Stream { tokens, sizes: None, count: self.config.tokens() })
    }

    fn read_out(
        &self,
        stream: Stream<B::Tensor>,
        proportional: bool,
        token_counts: Vec<usize>,
        plans: Vec<(usize, B::Plan)>,
    ) -> Result<Output<B>> {
        let (backend, params, special) = (&self.backend, &self.params, self.config.special_tokens());
        let Stream { mut tokens, sizes, .. } = stream;
        if let Some(norm) = &params.norm {
            tokens = backend.layer_norm(&tokens, norm)?;
        }
        let token = |at: usize| {
            let row = backend.tokens(&tokens, at..at + 1)?;
            backend.mean_tokens(&row, None, 0)
        };
        let mean = || backend.mean_tokens(&tokens, sizes.as_ref(), special);
        let mut features = match self.config.readout {
            Readout::Class | Readout::ClassAndAux => token(0)?,
            Readout::Mean => mean()?,
            Readout::Attention => self.attention_pool(&tokens, sizes.as_ref(), proportional)?,
            Readout::ClassAndMean => backend.concat(&token(0)?, &mean()?)?,
        };
        if let Some(norm) = &params.fc_norm {
            features = backend.layer_norm(&features, norm)?;
        }
        let head = |head: &Linear<B::Tensor>, x: &B::Tensor| backend.linear(x, head.all(), Epilogue::None);
        let mut logits = match (&params.head, &params.aux_head) {
            (Some(layer), Some(aux)) if self.config.readout == Readout::ClassAndAux => {
                let dense = head(aux, &tokens)?;
                let largest = backend.max_tokens(&dense, sizes.as_ref(), special)?;
                drop(dense);
                Some(backend.linear(&features, layer.all(), Epilogue::AddTo(largest))?)
            }
            (layer, _) => layer.as_ref().map(|layer| head(layer, &features)).transpose()?,
        };
        let mut head_logits = None;
        if let (Some(class), Some(layer)) = (&logits, &params.head_dist) {
            let distilled = head(layer, &token(1)?)?;
            let mean = backend.average(class, &distilled)?;
            head_logits = Some([class.clone(), distilled]);
            logits = Some(mean);
        }
        Ok(Output { tokens, sizes, features, logits, head_logits, token_counts, plans })
    }
}

impl<B: Backend> Vit<B> {
    /// One learned query looks at all tokens, (B, M, C) → (B, C). The query is put in front of them as a token of size
    /// 0, which nobody attends to: so the ordinary attention does it, and the reduced tokens' sizes count.
    fn attention_pool(
        &self,
        tokens: &B::Tensor,
        sizes: Option<&B::Tensor>,
        proportional: bool,
    ) -> Result<B::Tensor> {
        let (backend, config) = (&self.backend, &self.config);
        let Some(pool) = &self.params.attn_pool else {
            return Err(Error::model("the readout is attention, but the model has no parameters for it"));
        };
        let (batch, n) = (backend.shape(tokens)[0], backend.shape(tokens)[1]);
        let sizes = backend.hidden_sizes(sizes.filter(|_| proportional), [batch, n], 1)?;
        let tokens = backend.embed(tokens, Some(&pool.latent), None)?;
        let mut packed = backend.linear(&tokens, pool.qkv.all(), Epilogue::None)?;
        for (part, norm) in [&pool.q_norm, &pool.k_norm].into_iter().enumerate() {
            if let Some(norm) = norm {
                packed = backend.head_norm(packed, part, config.heads, norm)?;
            }
        }
        let view = Heads {
            packed: &packed,
            heads: config.heads,
            head_dim: config.head_dim(),
            scale: config.attention_scale(),
            sizes: Some(&sizes),
        };
        let (context, _) = backend.attention(&view, ScoreRequest::default())?;
        let context = backend.mean_tokens(&backend.tokens(&context, 0..1)?, None, 0)?;
        let pooled = backend.linear(&context, pool.proj.all(), Epilogue::None)?;
        let normed = pool.norm.as_ref().map(|norm| backend.layer_norm(&pooled, norm)).transpose()?;
        let activation = Epilogue::Activation(config.activation);
        let hidden = backend.linear(normed.as_ref().unwrap_or(&pooled), pool.fc1.all(), activation)?;
        backend.linear(&hidden, pool.fc2.all(), Epilogue::AddTo(pooled))
    }
}

/// Token counts and plans of an output.
type Lists<B> = (Vec<usize>, Vec<(usize, <B as Backend>::Plan)>);

impl<B: Backend> Output<B> {
    /// The lists, emptied; everything else is dropped.
    fn into_lists(self) -> Lists<B> {
        let Self { mut token_counts, mut plans, .. } = self;
        token_counts.clear();
        plans.clear();
        (token_counts, plans)
    }

    /// Where each token of the input ended up.
    ///
    /// # Errors
    /// Those of reading the plans from the device.
    pub fn source_map(&self, backend: &B) -> Result<SourceMap> {
        let batch = backend.shape(&self.tokens)[0];
        let mut map = SourceMap::identity(batch, self.token_counts[0]);
        for (_, plan) in &self.plans {
            map.apply(&backend.download_plan(plan)?)?;
        }
        Ok(map)
    }
}

impl<B: Backend> Output<B> {
    /// For each image which final tokens hold a cluster that `method` formed ([`Method::clusters`]).
    ///
    /// # Errors
    /// Those of reading the plans from the device.
    pub fn clustered(&self, backend: &B, method: &impl Method, host: &Host) -> Result<Vec<Vec<bool>>> {
        let batch = backend.shape(&self.tokens)[0];
        let mut clustered = vec![vec![false; self.token_counts[0]]; batch];
        for (layer, plan) in &self.plans {
            let plan = backend.download_plan(plan)?;
            let formed = method.clusters(*layer, plan.tokens_in(), host);
            for (image, flags) in clustered.iter_mut().enumerate() {
                let held = |token| plan.group(image, token).0.iter().any(|&member| flags[member as usize]);
                *flags = (0..plan.tokens_out()).map(|token| formed.contains(&token) || held(token)).collect();
            }
        }
        Ok(clustered)
    }
}

/// One block and what a method does in it.
struct BlockPass<'a, B: Backend, M> {
    model: &'a Vit<B>,
    method: &'a M,
    block: &'a BlockParams<B::Tensor>,
    layer: usize,
    step: Option<Step>,
}

type Stepped<B> = (Stream<<B as Backend>::Tensor>, Option<<B as Backend>::Plan>);

impl<B: Backend, M: Method> BlockPass<'_, B, M> {
    fn run(&self, stream: Stream<B::Tensor>, observer: &mut impl Observer<B>) -> Result<Stepped<B>> {
        let backend = &self.model.backend;
        let stream = self.prepared(stream)?;
        match self.step {
            Some(step @ Step { site: Site::BeforeBlock, .. }) => {
                let none = Scores { class: None, received: None };
                let norm = Some(&self.block.norm1);
                let (merged, plan) = self.reduce(&stream, &step, None, &none, norm, observer)?;
                drop(stream);
                let stream = Stream { tokens: merged.tokens, sizes: Some(merged.sizes), count: step.tokens };
                Ok((self.plain(stream, merged.normed)?, Some(plan)))
            }
            Some(step @ Step { site: Site::BeforeAttention { reuse }, .. }) => {
                self.reduce_before(stream, &step, reuse, observer)
            }
            Some(step @ Step { site: Site::AfterAttention, .. }) => {
                let qkv = self.heads(&stream.tokens, None, 0..3)?;
                let (context, scores) =
                    backend.attention(&self.view(&qkv, stream.sizes.as_ref()), step.scores)?;
                let Stream { tokens, sizes, count } = stream;
                let stream = Stream { tokens: self.project(&context, tokens)?, sizes, count };
                drop(context);
                let (merged, plan) =
                    self.reduce(&stream, &step, Some(&qkv), &scores, Some(&self.block.norm2), observer)?;
                drop((stream, qkv, scores));
                let normed = merged.normed;
                let tokens = self.mlp(merged.tokens, normed)?;
                Ok((Stream { tokens, sizes: Some(merged.sizes), count: step.tokens }, Some(plan)))
            }
            Some(step @ Step { site: Site::AfterBlock, .. }) => {
                let qkv = self.heads(&stream.tokens, None, 0..3)?;
                let (context, scores) =
                    backend.attention(&self.view(&qkv, stream.sizes.as_ref()), step.scores)?;
                let Stream { tokens, sizes, count } = stream;
                let tokens = self.project(&context, tokens)?;
                drop(context);
                let tokens = self.mlp(tokens, None)?;
                let stream = Stream { tokens, sizes, count };
                let (merged, plan) = self.reduce(&stream, &step, Some(&qkv), &scores, None, observer)?;
                Ok((
                    Stream { tokens: merged.tokens, sizes: Some(merged.sizes), count: step.tokens },
                    Some(plan),
                ))
            }
            None => Ok((self.plain(stream, None)?, None)),
        }
    }

    /// The block without reduction; `normed` is its first LayerNorm's result if it is known already.
    fn plain(&self, stream: Stream<B::Tensor>, normed: Option<B::Tensor>) -> Result<Stream<B::Tensor>> {
        let input = self.masked(&stream.tokens, normed)?;
        let qkv = self.heads(&stream.tokens, input.as_ref(), 0..3)?;
        // What is not needed any more makes room at once, here and below.
        drop(input);
        let (context, _) =
            self.model.backend.attention(&self.view(&qkv, stream.sizes.as_ref()), ScoreRequest::default())?;
        drop(qkv);
        let Stream { tokens, sizes, count } = stream;
        let tokens = self.project(&context, tokens)?;
        drop(context);
        Ok(Stream { tokens: self.mlp(tokens, None)?, sizes, count })
    }

    /// The tokens as the method wants them to enter the block.
    fn prepared(&self, stream: Stream<B::Tensor>) -> Result<Stream<B::Tensor>> {
        let (backend, weights) = (&self.model.backend, &self.model.params.reducers);
        let host = self.model.host();
        let prepared = self.method.prepare(backend, self.layer, &stream.tokens, &host, weights)?;
        Ok(match prepared {
            Some(tokens) => Stream { tokens, ..stream },
            None => stream,
        })
    }

    /// The attention's input after a method's mask, if it has one; else `normed` as it is.
    fn masked(&self, tokens: &B::Tensor, normed: Option<B::Tensor>) -> Result<Option<B::Tensor>> {
        if !self.method.masks_attention(self.layer) {
            return Ok(normed);
        }
        let (backend, weights) = (&self.model.backend, &self.model.params.reducers);
        let special = self.model.config.special_tokens();
        let normed = match normed {
            Some(normed) => normed,
            None => backend.layer_norm(tokens, &self.block.norm1)?,
        };
        match self.method.attention_mask(backend, self.layer, &normed, special, weights)? {
            Some(plan) => Ok(Some(backend.merge(&normed, None, &plan, Pooling::Weighted, None)?.tokens)),
            None => Ok(Some(normed)),
        }
    }

    /// MCTF's order: look at the attention map, reduce, then attend.
    fn reduce_before(
        &self,
        stream: Stream<B::Tensor>,
        step: &Step,
        reuse: bool,
        observer: &mut impl Observer<B>,
    ) -> Result<Stepped<B>> {
        let backend = &self.model.backend;
        let qk = self.heads(&stream.tokens, None, 0..2)?;
        let view = self.view(&qk, stream.sizes.as_ref());
        // A map that the reduced tokens attend by is looked at twice.
        let (scores, map) = if reuse && step.pooling == Pooling::Weighted {
            backend.attention_scores_and_map(&view, step.scores)?
        } else {
            (backend.attention_scores(&view, step.scores)?, None)
        };
        let (merged, plan) =
            self.reduce(&stream, step, Some(&qk), &scores, Some(&self.block.norm1), observer)?;
        drop(scores);
        let Stream { tokens, sizes, .. } = stream;
        drop(tokens);
        let reduced = Stream { tokens: merged.tokens, sizes: Some(merged.sizes), count: step.tokens };
        if !reuse {
            drop(qk);
            return Ok((self.plain(reduced, merged.normed)?, Some(plan)));
        }
        let values = self.heads(&reduced.tokens, merged.normed.as_ref(), 2..3)?;
        drop(merged.normed);
        // The map is the one of the tokens before the reduction, their sizes included.
        let view = self.view(&qk, sizes.as_ref());
        let context = backend.attention_reduced_of(map.as_ref(), &view, &values, &plan, step.pooling)?;
        drop((map, qk, values, sizes));
        let Stream { tokens, sizes, count } = reduced;
        let tokens = self.project(&context, tokens)?;
        drop(context);
        Ok((Stream { tokens: self.mlp(tokens, None)?, sizes, count }, Some(plan)))
    }

    fn reduce(
        &self,
        stream: &Stream<B::Tensor>,
        step: &Step,
        packed: Option<&B::Tensor>,
        scores: &Scores<B::Tensor>,
        norm: Option<&Norm<B::Tensor>>,
        observer: &mut impl Observer<B>,
    ) -> Result<(Merged<B::Tensor>, B::Plan)> {
        let backend = &self.model.backend;
        let evidence = Evidence {
            layer: self.layer,
            depth: self.model.config.depth,
            step: *step,
            tokens: &stream.tokens,
            heads: packed.map(|packed| self.view(packed, stream.sizes.as_ref())),
            scores,
            sizes: stream.sizes.as_ref(),
            count: stream.count,
            special: self.model.config.special_tokens(),
            weights: &self.model.params.reducers,
        };
        let plan = self.method.plan(backend, &evidence)?;
        let norm = norm.filter(|_| !backend.norms_on_the_way());
        let merged = backend.merge(&stream.tokens, stream.sizes.as_ref(), &plan, step.pooling, norm)?;
        observer.reduced(&evidence, &plan, &merged);
        Ok((merged, plan))
    }

    /// Parts `parts` of query (0), key (1) and value (2), packed; `normed` is the first LayerNorm of `tokens` if it is known already.
    fn heads(
        &self,
        tokens: &B::Tensor,
        normed: Option<&B::Tensor>,
        parts: std::ops::Range<usize>,
    ) -> Result<B::Tensor> {
        let backend = &self.model.backend;
        let (heads, inner) = (self.heads_here(), self.heads_here() * self.model.head_dim);
        let rows = self.block.qkv.rows(parts.start * inner..parts.end * inner);
        let mut packed = match normed {
            Some(normed) => backend.linear(normed, rows, Epilogue::None)?,
            None => backend.norm_linear(tokens, &self.block.norm1, rows)?,
        };
        for (part, norm) in [&self.block.q_norm, &self.block.k_norm].into_iter().enumerate() {
            if let (Some(norm), true) = (norm, parts.contains(&part)) {
                packed = backend.head_norm(packed, part - parts.start, heads, norm)?;
            }
        }
        Ok(packed)
    }

    /// The heads of this block.
    fn heads_here(&self) -> usize {
        self.model.config.block(self.layer).heads
    }

    fn view<'t>(&self, packed: &'t B::Tensor, sizes: Option<&'t B::Tensor>) -> Heads<'t, B::Tensor> {
        let config = &self.model.config;
        Heads {
            packed,
            heads: self.heads_here(),
            head_dim: self.model.head_dim,
            scale: config.attention_scale(),
            sizes: sizes.filter(|_| self.method.proportional_attention()),
        }
    }

    /// The attention's output projection, added to the residual stream.
    fn project(&self, context: &B::Tensor, residual: B::Tensor) -> Result<B::Tensor> {
        let backend = &self.model.backend;
        let add = Epilogue::AddTo(residual);
        match &self.block.attn_norm {
            Some(norm) => backend.linear(&backend.layer_norm(context, norm)?, self.block.proj.all(), add),
            None => backend.linear(context, self.block.proj.all(), add),
        }
    }

    /// The MLP, added to the residual stream; `normed` is its LayerNorm if it is known already.
    fn mlp(&self, tokens: B::Tensor, normed: Option<B::Tensor>) -> Result<B::Tensor> {
        let BlockParams { norm2, fc1, mlp_norm, fc2, .. } = self.block;
        let activation = self.model.config.activation;
        let mlp = Mlp { norm: norm2, fc1, activation, inner_norm: mlp_norm.as_ref(), fc2 };
        self.model.backend.mlp(tokens, normed, &mlp)
    }
}

/// Checks every parameter's shape against the numbers.
fn check_params(config: &VitConfig, params: &VitParams<Tensor>) -> Result<()> {
    fn expect(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
        if tensor.shape() == shape {
            return Ok(());
        }
        Err(Error::model(format!(
            "parameter {name} has shape {:?}, the numbers say {shape:?}",
            tensor.shape()
        )))
    }
    fn linear(name: &str, layer: &Linear<Tensor>, outputs: usize, inputs: usize) -> Result<()> {
        expect(name, &layer.weight, &[outputs, inputs])?;
        layer.bias.as_ref().map_or(Ok(()), |bias| expect(name, bias, &[outputs]))
    }
    fn norm(name: &str, norm: Option<&Norm<Tensor>>, width: usize) -> Result<()> {
        let Some(norm) = norm else { return Ok(()) };
        expect(name, &norm.weight, &[width])?;
        norm.bias.as_ref().map_or(Ok(()), |bias| expect(name, bias, &[width]))
    }
    let (c, special) = (config.width, config.special_tokens());
    if params.blocks.len() != config.depth {
        return Err(Error::model(format!(
            "{} blocks of parameters, depth {}",
            params.blocks.len(),
            config.depth
        )));
    }
    params.stem.check(config, linear)?;
    linear("patch", &params.patch, c, config.stem.projected(config.channels, config.patch))?;
    match &params.prefix {
        Some(prefix) => expect("prefix", prefix, &[special, c])?,
        None if special > 0 => {
            return Err(Error::model(format!("{special} special tokens have no parameters")));
        }
        None => {}
    }
    if let Some(position) = &params.position {
        expect("position", position, &[config.grid()[0] * config.grid()[1], c])?;
    }
    norm("norm_pre", params.norm_pre.as_ref(), c)?;
    for (i, block) in params.blocks.iter().enumerate() {
        let name = |part: &str| format!("blocks.{i}.{part}");
        let BlockSize { heads, hidden } = config.block(i);
        let inner = heads * config.head_dim();
        norm(&name("norm1"), Some(&block.norm1), c)?;
        linear(&name("qkv"), &block.qkv, 3 * inner, c)?;
        norm(&name("q_norm"), block.q_norm.as_ref(), config.head_dim())?;
        norm(&name("k_norm"), block.k_norm.as_ref(), config.head_dim())?;
        norm(&name("attn_norm"), block.attn_norm.as_ref(), inner)?;
        linear(&name("proj"), &block.proj, c, inner)?;
        norm(&name("norm2"), Some(&block.norm2), c)?;
        linear(&name("fc1"), &block.fc1, config.gates() * hidden, c)?;
        norm(&name("mlp_norm"), block.mlp_norm.as_ref(), hidden)?;
        linear(&name("fc2"), &block.fc2, c, hidden)?;
    }
    norm("norm", params.norm.as_ref(), c)?;
    match (&params.attn_pool, config.readout) {
        (Some(pool), _) => {
            expect("attn_pool.latent", &pool.latent, &[1, c])?;
            linear("attn_pool.qkv", &pool.qkv, 3 * c, c)?;
            norm("attn_pool.q_norm", pool.q_norm.as_ref(), config.head_dim())?;
            norm("attn_pool.k_norm", pool.k_norm.as_ref(), config.head_dim())?;
            linear("attn_pool.proj", &pool.proj, c, c)?;
            norm("attn_pool.norm", pool.norm.as_ref(), c)?;
            linear("attn_pool.fc1", &pool.fc1, config.fc1_rows(), c)?;
            linear("attn_pool.fc2", &pool.fc2, c, config.hidden)?;
        }
        (None, Readout::Attention) => {
            return Err(Error::model(
                "the readout is attention, but the model has no parameters for it; set pool to class or mean",
            ));
        }
        (None, _) => {}
    }
    let features = if config.readout == Readout::ClassAndMean { 2 * c } else { c };
    norm("fc_norm", params.fc_norm.as_ref(), features)?;
    for (name, head) in
        [("head", &params.head), ("head_dist", &params.head_dist), ("aux_head", &params.aux_head)]
    {
        if let Some(head) = head {
            linear(name, head, config.classes, if name == "head" { features } else { c })?;
        }
    }
    if config.readout == Readout::ClassAndAux && (params.head.is_none() || params.aux_head.is_none()) {
        return Err(Error::model(
            "the readout adds an auxiliary head to the head, but the model lacks one of them; set readout to class",
        ));
    }
    for (i, predictor) in params.reducers.predictors.iter().enumerate() {
        let name = |part: &str| format!("predictors.{i}.{part}");
        norm(&name("norm"), Some(&predictor.norm), c)?;
        linear(&name("hidden"), &predictor.hidden, c, c)?;
        linear(&name("first"), &predictor.first, c / 2, c)?;
        linear(&name("second"), &predictor.second, c / 4, c / 2)?;
        linear(&name("last"), &predictor.last, 2, c / 4)?;
    }
    for selector in params.reducers.selector.iter().chain(&params.reducers.layer_selectors) {
        linear("selector", selector, 1, c)?;
    }
    for (scale, projection) in &params.reducers.projections {
        linear("projection", projection, c, c)?;
        if !SCALES.contains(scale) {
            return Err(Error::model(format!("a projection of scale {scale}: scales go from 2 to 63")));
        }
    }
    if params.head_dist.is_some() && !config.distillation_token {
        return Err(Error::model("a distillation head needs a distillation token"));
    }
    Ok(())
}
