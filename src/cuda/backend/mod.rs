//! Whole models on the kernels: [`Cuda`] implements [`Backend`], so models and methods are the code that runs on the CPU.
//!
//! Every operation is enqueued on one stream and returns at once; only downloads and uploads wait. Memory comes from the
//! driver's stream-ordered allocator and goes back when the last clone of a tensor is dropped.

mod attention;
mod limits;
mod matching;
mod memory;
mod predictor;
mod tensor;

use std::{ops::Range, sync::Arc};

use cudarc::driver::CudaStream;

pub use tensor::{CudaPlan, CudaTensor};

use matching::Counters;
use memory::Memory;

use super::{
    Blas, DType, Device, DevicePointer, PlanPointers, Strided,
    activation::activate_raw,
    device::driver,
    head_norm::{HeadNorm, head_norm_raw},
    linear::{AffinePointers, Fused, linear_raw},
    merge::{MergePointers, merge_raw, unmerge_raw},
    norm::{LayerNorm, layer_norm_raw},
    patch::{DeviceImages, PixelType, embed_raw, patches_raw},
    select::{Selection, select_raw},
    tokens::{mean_tokens_raw, tokens_raw},
};
use crate::{
    Error, Images, Pixels, Result, Tensor, TokenPlan,
    backend::{
        Backend, Epilogue, Heads, LinearRows, Matching, Merged, Norm, Pooling, Predictor, ScoreRequest,
        Scores, Select,
    },
    model::Activation,
};

/// The CUDA kernels as a backend, on a stream of its own. Clones share it and may be used from any thread.
///
/// Weights and tokens are stored as its type says; token sizes, attention scores and the weights of plans are `f32` always,
/// and so are all sums.
#[derive(Clone, Debug)]
pub struct Cuda {
    inner: Arc<Inner>,
    fused_gelu: bool,
}

#[derive(Debug)]
struct Inner {
    workspace: Memory,
    counters: Counters,
    blas: Blas,
    device: Device,
    stream: Arc<CudaStream>,
    dtype: DType,
}

impl Cuda {
    /// Device `ordinal` with tensors of type `dtype`.
    ///
    /// # Errors
    /// Those of [`Device::new`] and [`Blas::new`]; [`Error::OutOfMemory`] when there is none for cuBLASLt's workspace.
    pub fn new(ordinal: usize, dtype: DType) -> Result<Self> {
        Self::on(&Device::new(ordinal)?, dtype)
    }

    /// A device that is open already.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn on(device: &Device, dtype: DType) -> Result<Self> {
        let stream = device.context().new_stream().map_err(|error| driver("making a stream", error))?;
        let blas = Blas::new(device)?;
        let workspace = Memory::new(&stream, blas.workspace_bytes())?;
        let inner =
            Inner { workspace, counters: Counters::default(), blas, device: device.clone(), stream, dtype };
        Ok(Self { inner: Arc::new(inner), fused_gelu: false })
    }

    /// Whether GELU, [`Activation::Gelu`], is computed in its tanh form within the product before it, which saves a pass over
    /// the MLP's hidden tokens. `f32` tensors get the exact form all the same.
    ///
    /// Off unless asked for: against what rounding to `f16` costs anyhow, the tanh form's error is larger, 1.2 times in the
    /// logits of the demo's model and 2.7 times in the features of a trained DINOv2 ViT-S (root mean squares).
    #[must_use]
    pub fn with_fused_gelu(self, fused: bool) -> Self {
        Self { fused_gelu: fused, ..self }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The stream that everything is enqueued on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.inner.stream
    }

    /// Waits for everything that has been enqueued.
    ///
    /// # Errors
    /// [`Error::Driver`] when the device or something on it failed.
    pub fn synchronize(&self) -> Result<()> {
        let stream = &self.inner.stream;
        stream.synchronize().map_err(|error| driver("waiting for the device", error))?;
        // What could not be returned when it happened: freeing memory that was dropped.
        stream.context().check_err().map_err(|error| driver("freeing memory", error))
    }

    /// What tensors hold.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    fn empty(&self, shape: &[usize], dtype: DType) -> Result<CudaTensor> {
        CudaTensor::new(&self.inner.stream, shape, dtype)
    }

    /// Checks that a tensor is this backend's and of type `dtype`.
    fn check(&self, op: &'static str, name: &str, tensor: &CudaTensor, dtype: DType) -> Result<()> {
        if !tensor.is_of(&self.inner.stream) {
            return Err(Error::argument(op, format!("{name} belongs to another backend")));
        }
        if tensor.dtype() != dtype {
            return Err(Error::argument(op, format!("{name} holds {}, expected {dtype}", tensor.dtype())));
        }
        Ok(())
    }

    /// Tokens (B, N, C) of the backend's type.
    fn read(&self, op: &'static str, name: &str, tensor: &CudaTensor) -> Result<Strided<DevicePointer>> {
        self.check(op, name, tensor, self.inner.dtype)?;
        tensor.tokens(op, name)
    }

    /// An array of the backend's type and of this shape.
    fn read_array(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        shape: &[usize],
    ) -> Result<DevicePointer> {
        self.check(op, name, tensor, self.inner.dtype)?;
        tensor.expect_shape(op, name, shape)?;
        Ok(tensor.pointer())
    }

    /// An array of `f32` of this shape: sizes (B, N) or scores (B, H, N).
    fn read_f32(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        shape: &[usize],
    ) -> Result<DevicePointer> {
        self.check(op, name, tensor, DType::F32)?;
        tensor.expect_shape(op, name, shape)?;
        Ok(tensor.pointer())
    }

    fn read_norm(
        &self,
        op: &'static str,
        norm: &Norm<CudaTensor>,
        width: usize,
    ) -> Result<Norm<DevicePointer>> {
        let weight = self.read_array(op, "weight", &norm.weight, &[width])?;
        let bias = norm.bias.as_ref().map(|bias| self.read_array(op, "bias", bias, &[width])).transpose()?;
        Ok(Norm { weight, bias, eps: norm.eps })
    }

    fn read_plan(&self, op: &'static str, plan: &CudaPlan) -> Result<PlanPointers> {
        if plan.is_of(&self.inner.stream) {
            return Ok(plan.pointers());
        }
        Err(Error::argument(op, "the plan belongs to another backend"))
    }

    /// What of an activation the product before it does.
    fn fused(&self, activation: Activation) -> Option<Fused> {
        match activation {
            Activation::Relu => Some(Fused::Relu),
            // How exactly cuBLASLt computes the hyperbolic tangent is its own affair; f32 takes ours.
            _ if self.inner.dtype == DType::F32 => None,
            Activation::GeluTanh => Some(Fused::GeluTanh),
            Activation::Gelu if self.fused_gelu => Some(Fused::GeluTanh),
            _ => None,
        }
    }
}

// SAFETY (for all blocks below): a `CudaTensor` or `CudaPlan` owns memory of its shape and type on this backend's stream
// (`check`, `read`), which all launches go to in the order in which they are made here; so what is read has been written by
// the operation that made it, what is written is new memory, and memory that is dropped is freed behind its last use.
impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Plan = CudaPlan;

    fn upload(&self, tensor: Tensor) -> Result<CudaTensor> {
        CudaTensor::upload(&self.inner.stream, &tensor, self.inner.dtype)
    }

    fn upload_f32(&self, tensor: Tensor) -> Result<CudaTensor> {
        CudaTensor::upload(&self.inner.stream, &tensor, DType::F32)
    }

    fn download(&self, tensor: &CudaTensor) -> Result<Tensor> {
        tensor.download()
    }

    fn shape<'a>(&self, tensor: &'a CudaTensor) -> &'a [usize] {
        tensor.shape()
    }

    fn upload_plan(&self, plan: TokenPlan) -> Result<CudaPlan> {
        CudaPlan::upload(&self.inner.stream, &plan)
    }

    fn download_plan(&self, plan: &CudaPlan) -> Result<TokenPlan> {
        plan.download()
    }

    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let shape @ [batch, channels, height, width] = images.shape();
        let [ph, pw] = patch.map(|extent| extent.max(1));
        let out =
            self.empty(&[batch, (height / ph) * (width / pw), channels.saturating_mul(ph * pw)], *dtype)?;
        let (memory, pixel) = match images.pixels() {
            Pixels::U8(pixels) => (Memory::upload(stream, pixels)?, PixelType::U8),
            Pixels::F32(pixels) => (Memory::upload(stream, pixels)?, PixelType::F32),
        };
        let images = DeviceImages::planes(memory.pointer(), shape);
        // Not `tokens`: what patches do not divide is for the launcher to say.
        let target = Strided::new(out.pointer(), [out.shape()[0], out.shape()[1], out.shape()[2]]);
        // SAFETY: see above the block.
        unsafe { patches_raw(device, stream, pixel, *dtype, &images, patch, mean, std, &target) }?;
        Ok(out)
    }

    fn embed(
        &self,
        patches: &CudaTensor,
        prefix: Option<&CudaTensor>,
        position: Option<&CudaTensor>,
    ) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read("embed", "patches", patches)?;
        let [batch, count, width] = source.shape;
        let special = prefix.map_or(0, |prefix| prefix.shape().first().copied().unwrap_or(0));
        let prefix =
            prefix.map(|prefix| self.read_array("embed", "prefix", prefix, &[special, width])).transpose()?;
        let position =
            position.map(|position| self.read_array("embed", "position", position, &[count, width]));
        let position = position.transpose()?;
        let out = self.empty(&[batch, special + count, width], *dtype)?;
        let target = out.tokens("embed", "out")?;
        // SAFETY: see above the block.
        unsafe { embed_raw(device, stream, *dtype, &source, prefix, position, &target) }?;
        Ok(out)
    }

    fn layer_norm(&self, x: &CudaTensor, norm: &Norm<CudaTensor>) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        self.check("layer_norm", "x", x, *dtype)?;
        let norm = self.read_norm("layer_norm", norm, x.width())?;
        let out = self.empty(x.shape(), *dtype)?;
        let arguments = LayerNorm { x: x.rows(), residual: None, sum: None, norm, out: out.rows() };
        // SAFETY: see above the block.
        unsafe { layer_norm_raw(device, stream, *dtype, &arguments) }?;
        Ok(out)
    }

    fn linear(
        &self,
        x: &CudaTensor,
        layer: LinearRows<'_, CudaTensor>,
        epilogue: Epilogue<CudaTensor>,
    ) -> Result<CudaTensor> {
        const OP: &str = "linear";
        let Inner { device, stream, dtype, blas, workspace, .. } = &*self.inner;
        self.check(OP, "x", x, *dtype)?;
        let (weight, bias) = (&layer.layer.weight, &layer.layer.bias);
        let (all, inputs) = (weight.shape().first().copied().unwrap_or(1), x.width());
        let weight = self.read_array(OP, "weight", weight, &[all, inputs])?;
        let bias = bias.as_ref().map(|bias| self.read_array(OP, "bias", bias, &[all])).transpose()?;
        let range = layer.rows.unwrap_or(0..all);
        if range.start >= range.end || range.end > all {
            return Err(Error::argument(OP, format!("outputs {range:?} are not among the layer's {all}")));
        }
        let mut shape = x.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = range.len();
        }
        let (out, fused, then) = match epilogue {
            Epilogue::AddTo(residual) => {
                self.check(OP, "residual", &residual, *dtype)?;
                residual.expect_shape(OP, "residual", &shape)?;
                (residual.into_own()?, Fused::Add, None)
            }
            Epilogue::Activation(activation) => match self.fused(activation) {
                Some(fused) => (self.empty(&shape, *dtype)?, fused, None),
                None => (self.empty(&shape, *dtype)?, Fused::None, Some(activation)),
            },
            Epilogue::None => (self.empty(&shape, *dtype)?, Fused::None, None),
        };
        let step = |elements: usize| (elements * dtype.bytes()) as DevicePointer;
        let arguments = AffinePointers {
            x: x.rows(),
            weight: weight + step(range.start * inputs),
            bias: bias.map(|bias| bias + step(range.start)),
            fused,
            out: out.rows(),
            workspace: workspace.pointer(),
            workspace_bytes: workspace.bytes(),
        };
        // SAFETY: see above the block; the workspace is used on this stream only, and `out` is nobody else's.
        unsafe { linear_raw(blas, stream, *dtype, &arguments) }?;
        let Some(activation) = then else { return Ok(out) };
        if activation != Activation::SwiGlu {
            // SAFETY: see above the block; the kernels may write where they read.
            unsafe { activate_raw(device, stream, *dtype, activation, &out.rows(), &out.rows()) }?;
            return Ok(out);
        }
        if !range.len().is_multiple_of(2) {
            return Err(Error::argument(
                OP,
                format!("{} outputs cannot be gated: the number is odd", range.len()),
            ));
        }
        if let Some(last) = shape.last_mut() {
            *last = range.len() / 2;
        }
        let gated = self.empty(&shape, *dtype)?;
        // SAFETY: see above the block.
        unsafe { activate_raw(device, stream, *dtype, activation, &out.rows(), &gated.rows()) }?;
        Ok(gated)
    }

    fn merge(
        &self,
        x: &CudaTensor,
        sizes: Option<&CudaTensor>,
        plan: &CudaPlan,
        pooling: Pooling,
        norm: Option<&Norm<CudaTensor>>,
    ) -> Result<Merged<CudaTensor>> {
        const OP: &str = "merge";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read(OP, "x", x)?;
        let [batch, tokens, width] = source.shape;
        let sizes = sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()?;
        let pointers = self.read_plan(OP, plan)?;
        let norm = norm.map(|norm| self.read_norm(OP, norm, width)).transpose()?;
        let shape = [batch, plan.tokens_out(), width];
        let merged = Merged {
            tokens: self.empty(&shape, *dtype)?,
            sizes: self.empty(&shape[..2], DType::F32)?,
            normed: norm.as_ref().map(|_| self.empty(&shape, *dtype)).transpose()?,
        };
        let normed = merged.normed.as_ref().map(|normed| normed.tokens(OP, "normed")).transpose()?;
        let arguments = MergePointers {
            x: source,
            sizes,
            plan: pointers,
            pooling,
            tokens_out: merged.tokens.tokens(OP, "tokens")?,
            sizes_out: merged.sizes.pointer(),
            norm: norm.zip(normed),
        };
        // SAFETY: see above the block; a plan's indices are in range, whoever made it.
        unsafe { merge_raw(device, stream, *dtype, &arguments) }?;
        Ok(merged)
    }

    fn unmerge(&self, x: &CudaTensor, plan: &CudaPlan) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read("unmerge", "x", x)?;
        let pointers = self.read_plan("unmerge", plan)?;
        let [batch, _, width] = source.shape;
        let out = self.empty(&[batch, plan.tokens_in(), width], *dtype)?;
        let target = out.tokens("unmerge", "out")?;
        // SAFETY: see above the block.
        unsafe { unmerge_raw(device, stream, *dtype, &source, &pointers, &target) }?;
        Ok(out)
    }

    fn keep_scores(
        &self,
        x: &CudaTensor,
        predictor: &Predictor<CudaTensor>,
        special: usize,
    ) -> Result<CudaTensor> {
        self.predicted_scores(x, predictor, special)
    }

    fn select(&self, select: &Select<'_, CudaTensor>) -> Result<CudaPlan> {
        const OP: &str = "select";
        let Inner { device, stream, .. } = &*self.inner;
        let scores = select.class_scores;
        self.check(OP, "class scores", scores, DType::F32)?;
        let source = scores.tokens(OP, "class scores")?;
        let [batch, _, tokens] = source.shape;
        let selection = Selection { special: select.special, keep: select.keep, fuse: select.fuse };
        let plan = CudaPlan::new(stream, batch, tokens, selection.tokens_out(tokens)?)?;
        // SAFETY: see above the block.
        unsafe { select_raw(device, stream, DType::F32, &source, selection, &plan.pointers()) }?;
        Ok(plan)
    }

    fn attention(
        &self,
        qkv: &Heads<'_, CudaTensor>,
        scores: ScoreRequest,
    ) -> Result<(CudaTensor, Scores<CudaTensor>)> {
        self.whole_attention(qkv, scores)
    }

    fn attention_scores(
        &self,
        qk: &Heads<'_, CudaTensor>,
        scores: ScoreRequest,
    ) -> Result<Scores<CudaTensor>> {
        self.scores_alone(qk, scores)
    }

    fn attention_reduced(
        &self,
        qk: &Heads<'_, CudaTensor>,
        values: &CudaTensor,
        plan: &CudaPlan,
        pooling: Pooling,
    ) -> Result<CudaTensor> {
        self.reduced_attention(qk, values, plan, pooling)
    }

    fn matching(&self, matching: &Matching<'_, CudaTensor>) -> Result<CudaPlan> {
        self.match_tokens(matching)
    }

    fn head_norm(
        &self,
        packed: CudaTensor,
        part: usize,
        heads: usize,
        norm: &Norm<CudaTensor>,
    ) -> Result<CudaTensor> {
        const OP: &str = "head_norm";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        self.read(OP, "packed heads", &packed)?;
        let head_dim = norm.weight.width();
        let norm = self.read_norm(OP, norm, head_dim)?;
        let packed = packed.into_own()?;
        let arguments = HeadNorm { packed: packed.tokens(OP, "packed heads")?, part, heads, head_dim, norm };
        // SAFETY: see above the block; `packed` is nobody else's.
        unsafe { head_norm_raw(device, stream, *dtype, &arguments) }?;
        Ok(packed)
    }

    fn tokens(&self, x: &CudaTensor, range: Range<usize>) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read("tokens", "x", x)?;
        let [batch, _, width] = source.shape;
        let out = self.empty(&[batch, range.len(), width], *dtype)?;
        // Not `tokens`: what is wrong with the range is for the launcher to say.
        let target = Strided::new(out.pointer(), [batch, range.len(), width]);
        // SAFETY: see above the block.
        unsafe { tokens_raw(device, stream, *dtype, &source, range, &target) }?;
        Ok(out)
    }

    fn mean_tokens(&self, x: &CudaTensor, sizes: Option<&CudaTensor>, first: usize) -> Result<CudaTensor> {
        const OP: &str = "mean_tokens";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read(OP, "x", x)?;
        let [batch, tokens, width] = source.shape;
        let sizes = sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()?;
        let out = self.empty(&[batch, width], *dtype)?;
        let target = Strided::new(out.pointer(), [batch, 1, width]);
        // SAFETY: see above the block.
        unsafe { mean_tokens_raw(device, stream, *dtype, &source, sizes, first, &target) }?;
        Ok(out)
    }
}
