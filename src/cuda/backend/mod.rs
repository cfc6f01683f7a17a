//! Whole models on the kernels: [`Cuda`] implements [`Backend`], so models and methods are the code that runs on the CPU.
//!
//! Every operation is enqueued on one stream and returns at once; only downloads and uploads wait. Memory comes from the
//! driver's stream-ordered allocator and goes back when the last clone of a tensor is dropped.

mod attention;
mod cluster;
mod grid;
mod ledger;
mod limits;
mod linear;
mod matching;
mod memory;
mod operands;
mod predictor;
mod readout;
pub(super) mod room;
mod score;
mod stem;
mod tensor;

use std::{ops::Range, sync::Arc};

use cudarc::driver::CudaStream;

pub use tensor::{CudaPlan, CudaTensor};

pub(super) use ledger::Layout;
pub(super) use memory::{Memory, Space, megabytes};

use memory::Cleared;

use super::{
    Blas, DType, Device, DevicePointer, RowTypes, Strided,
    attention::widened,
    device::driver,
    head_norm::{HeadNorm, head_norm_raw},
    merge::{MergePointers, merge_raw, unmerge_raw},
    patch::{DeviceImages, PixelType, embed_raw, patches_raw},
    record::{self, LaunchRecord},
    select::{Selection, select_raw},
    tokens::{mean_tokens_raw, tokens_raw},
};
use crate::{
    Error, Images, Result, Tensor, TokenPlan,
    backend::{
        Backend, Cluster, Epilogue, Heads, KeepInPlace, Linear, LinearRows, Matching, Merged, Norm, Pooling,
        Predictor, ScoreRequest, Scores, Select, Window,
    },
};

/// The CUDA kernels as a backend, on a stream of its own. Clones share it and may be used from any thread.
///
/// Weights and tokens are stored as its type says; token sizes, attention scores and the weights of plans are `f32` always,
/// and so are all sums.
#[derive(Clone, Debug)]
pub struct Cuda {
    inner: Arc<Inner>,
    fused_gelu: bool,
    f32_residual: bool,
}

#[derive(Debug)]
struct Inner {
    workspace: Memory,
    cleared: Cleared,
    blas: Blas,
    device: Device,
    stream: Arc<CudaStream>,
    /// Where memory comes from.
    space: Arc<Space>,
    /// Where a model's weights may lie besides.
    lender: Option<Arc<Space>>,
    dtype: DType,
}

impl Inner {
    fn new(
        blas: Blas,
        device: Device,
        space: Space,
        lender: Option<Arc<Space>>,
        dtype: DType,
    ) -> Result<Self> {
        let (stream, space) = (space.stream().clone(), Arc::new(space));
        let workspace = Memory::constant(&space, blas.workspace_bytes())?;
        Ok(Self { workspace, cleared: Cleared::default(), blas, device, stream, space, lender, dtype })
    }
}

impl Cuda {
    /// Device `ordinal` with tensors of type `dtype`.
    ///
    /// # Errors
    /// Those of [`Device::new`] and [`Blas::new`]; [`Error::OutOfMemory`](crate::Error::OutOfMemory) when there is none for cuBLASLt's workspace.
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
        let inner = Inner::new(blas, device.clone(), Space::driver(stream), None, dtype)?;
        Ok(Self { inner: Arc::new(inner), fused_gelu: false, f32_residual: false })
    }

    /// This backend with memory from elsewhere, and on that memory's stream. It reads this backend's tensors too: the caller
    /// orders the streams, and keeps those tensors alive until the other stream has got past it.
    pub(super) fn within(&self, space: Space) -> Result<Self> {
        let Inner { blas, device, space: lender, dtype, .. } = &*self.inner;
        let inner = Inner::new(blas.clone(), device.clone(), space, Some(lender.clone()), *dtype)?;
        Ok(Self { inner: Arc::new(inner), ..*self })
    }

    /// Runs `work`, and writes down what it makes this backend launch from this thread.
    pub fn record<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<LaunchRecord>) {
        record::record(&self.inner.stream, false, work)
    }

    /// Whether GELU, [`Activation::Gelu`](crate::model::Activation::Gelu), is computed in its tanh form within the product
    /// before it, which saves a pass over the MLP's hidden tokens. `f32` tensors get the exact form all the same.
    ///
    /// Off unless asked for: against what rounding to `f16` costs anyhow, the tanh form's error is larger, 1.2 times in the
    /// logits of the demo's model and 2.7 times in the features of a trained DINOv2 ViT-S (root mean squares).
    #[must_use]
    pub fn with_fused_gelu(self, fused: bool) -> Self {
        Self { fused_gelu: fused, ..self }
    }

    /// Whether the residual stream is `f32` beside weights and products of 16 bits: what blocks add to it is then not rounded to
    /// 16 bits (docs/precision.md has the difference). MCTF's similarities are those of the stream, so they are exact as well.
    /// Of `f32` tensors it is `f32` anyhow.
    ///
    /// Choose before a model is put on the backend: the parameters that meet the stream are kept in both types.
    #[must_use]
    pub fn with_f32_residual(self, exact: bool) -> Self {
        Self { f32_residual: exact && self.inner.dtype != DType::F32, ..self }
    }

    /// Whether the residual stream is `f32` beside another type; see [`Cuda::with_f32_residual`].
    pub fn has_f32_residual(&self) -> bool {
        self.f32_residual
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
    /// [`Error::Driver`](crate::Error::Driver) when the device or something on it failed.
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

    pub(super) fn space(&self) -> &Arc<Space> {
        &self.inner.space
    }

    /// [`Backend::patches`] of images in device memory, planes in the order of `shape`.
    pub(super) fn patches_of(
        &self,
        pixels: &Memory,
        pixel: PixelType,
        shape @ [batch, channels, height, width]: [usize; 4],
        patch: [usize; 2],
        mean: &[f32],
        std: &[f32],
    ) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let [ph, pw] = patch.map(|extent| extent.max(1));
        let rows = [batch, (height / ph) * (width / pw), channels.saturating_mul(ph.saturating_mul(pw))];
        let out = self.empty(&rows, *dtype)?;
        record::operand(stream, pixels.bytes());
        let images = DeviceImages::planes(pixels.pointer(), shape);
        // Not `tokens`: what patches do not divide is for the launcher to say.
        let target = Strided::new(out.pointer(), rows);
        // SAFETY: see above the block below; the images lie in memory of their size on this stream.
        unsafe { patches_raw(device, stream, pixel, *dtype, &images, patch, mean, std, &target) }?;
        Ok(out)
    }
}

// SAFETY (for all blocks below): a `CudaTensor` or `CudaPlan` owns memory of its shape and type on this backend's stream
// (`check`, `read`), which all launches go to in the order in which they are made here; so what is read has been written by
// the operation that made it, what is written is new memory, and memory that is dropped is freed behind its last use.
impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Plan = CudaPlan;

    fn upload(&self, tensor: Tensor) -> Result<CudaTensor> {
        let Inner { space, dtype, .. } = &*self.inner;
        let uploaded = CudaTensor::upload(space, &tensor, *dtype)?;
        if !self.f32_residual || tensor.shape().len() != 1 {
            return Ok(uploaded);
        }
        Ok(uploaded.with_exact(CudaTensor::upload(space, &tensor, DType::F32)?))
    }

    fn upload_f32(&self, tensor: Tensor) -> Result<CudaTensor> {
        CudaTensor::upload(&self.inner.space, &tensor, DType::F32)
    }

    fn download(&self, tensor: &CudaTensor) -> Result<Tensor> {
        tensor.download()
    }

    fn shape<'a>(&self, tensor: &'a CudaTensor) -> &'a [usize] {
        tensor.shape()
    }

    fn head_dim(&self, head_dim: usize) -> usize {
        widened(self.inner.dtype, head_dim)
    }

    fn upload_plan(&self, plan: TokenPlan) -> Result<CudaPlan> {
        CudaPlan::upload(&self.inner.space, &plan)
    }

    fn download_plan(&self, plan: &CudaPlan) -> Result<TokenPlan> {
        plan.download()
    }

    fn explain(&self, error: Error, batch: usize, pass: &dyn Fn(Self, usize) -> Result<()>) -> Error {
        room::explained(self, error, batch, pass)
    }

    fn patches(&self, images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<CudaTensor> {
        let (memory, pixel) = self.pixels(images)?;
        self.patches_of(&memory, pixel, images.shape(), patch, mean, std)
    }

    fn unfold_images(
        &self,
        images: &Images,
        window: Window,
        mean: &[f32],
        std: &[f32],
    ) -> Result<CudaTensor> {
        let (memory, pixel) = self.pixels(images)?;
        self.windows_of(&memory, pixel, images.shape(), window, mean, std)
    }

    fn unfold(&self, x: &CudaTensor, grid: [usize; 2], window: Window) -> Result<CudaTensor> {
        self.unfolded(x, grid, window)
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
        if self.f32_residual { self.converted("embed", "tokens", &out, DType::F32) } else { Ok(out) }
    }

    fn layer_norm(&self, x: &CudaTensor, norm: &Norm<CudaTensor>) -> Result<CudaTensor> {
        self.check_owner("layer_norm", "x", x, self.stream_type("layer_norm", "x", x)?)?;
        let norm = self.read_norm("layer_norm", norm, x.width())?;
        self.normalised(x, norm, self.inner.dtype)
    }

    fn stream_norm(&self, x: &CudaTensor, norm: &Norm<CudaTensor>) -> Result<CudaTensor> {
        if !self.f32_residual {
            return self.layer_norm(x, norm);
        }
        let x = self.converted("layer_norm", "x", x, DType::F32)?;
        let part = |name: &str, tensor: &CudaTensor| {
            self.exact("layer_norm", name, tensor, &[x.width()]).map(CudaTensor::pointer)
        };
        let weight = part("weight", &norm.weight)?;
        let bias = norm.bias.as_ref().map(|bias| part("bias", bias)).transpose()?;
        self.normalised(&x, Norm { weight, bias, eps: norm.eps }, DType::F32)
    }

    fn linear(
        &self,
        x: &CudaTensor,
        layer: LinearRows<'_, CudaTensor>,
        epilogue: Epilogue<CudaTensor>,
    ) -> Result<CudaTensor> {
        self.affine(x, layer, epilogue)
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
        let (source, rows) = self.read_stream(OP, "x", x)?;
        let [batch, tokens, width] = source.shape;
        let sizes = sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()?;
        let pointers = self.read_plan(OP, plan)?;
        let norm = norm.map(|norm| self.read_norm(OP, norm, width)).transpose()?;
        let shape = [batch, plan.tokens_out(), width];
        let merged = Merged {
            tokens: self.empty(&shape, rows)?,
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
        unsafe { merge_raw(device, stream, RowTypes { rows, normed: *dtype }, &arguments) }?;
        Ok(merged)
    }

    fn unmerge(&self, x: &CudaTensor, plan: &CudaPlan) -> Result<CudaTensor> {
        let Inner { device, stream, .. } = &*self.inner;
        let (source, dtype) = self.read_stream("unmerge", "x", x)?;
        let pointers = self.read_plan("unmerge", plan)?;
        let [batch, _, width] = source.shape;
        let out = self.empty(&[batch, plan.tokens_in(), width], dtype)?;
        let target = out.tokens("unmerge", "out")?;
        // SAFETY: see above the block.
        unsafe { unmerge_raw(device, stream, dtype, &source, &pointers, &target) }?;
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

    fn keep_predicted(
        &self,
        x: &CudaTensor,
        predictor: &Predictor<CudaTensor>,
        special: usize,
        keep: usize,
    ) -> Result<CudaPlan> {
        self.kept_by_scores(x, predictor, special, keep)
    }

    fn token_scores(
        &self,
        x: &CudaTensor,
        selector: &Linear<CudaTensor>,
        noise: Option<&CudaTensor>,
    ) -> Result<CudaTensor> {
        self.selector_scores(x, selector, noise)
    }

    fn cluster(&self, cluster: &Cluster<'_, CudaTensor>) -> Result<CudaPlan> {
        self.cluster_tokens(cluster)
    }

    fn pool_windows(
        &self,
        x: &CudaTensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<CudaTensor> {
        self.pooled_windows(x, special, grid, scale)
    }

    fn add_windows(
        &self,
        x: CudaTensor,
        pooled: &CudaTensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<CudaTensor> {
        self.added_windows(x, pooled, special, grid, scale)
    }

    fn keep_in_place(&self, keep: &KeepInPlace<'_, CudaTensor>) -> Result<CudaPlan> {
        self.kept_in_place(keep)
    }

    fn select(&self, select: &Select<'_, CudaTensor>) -> Result<CudaPlan> {
        const OP: &str = "select";
        let Inner { device, stream, .. } = &*self.inner;
        let scores = select.class_scores;
        self.check(OP, "class scores", scores, DType::F32)?;
        let source = scores.tokens(OP, "class scores")?;
        let [batch, _, tokens] = source.shape;
        let selection = Selection { special: select.special, keep: select.keep, fuse: select.fuse };
        let plan = self.empty_plan(batch, tokens, selection.tokens_out(tokens)?)?;
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
        let head_dim = norm.weight.width();
        self.read_values(OP, "packed heads", &packed, |[b, n, _]| {
            (2 * b * n).saturating_mul(heads).saturating_mul(head_dim)
        })?;
        let norm = self.read_norm(OP, norm, head_dim)?;
        let packed = packed.into_own()?;
        let arguments = HeadNorm { packed: packed.tokens(OP, "packed heads")?, part, heads, head_dim, norm };
        // SAFETY: see above the block; `packed` is nobody else's.
        unsafe { head_norm_raw(device, stream, *dtype, &arguments) }?;
        Ok(packed)
    }

    fn tokens(&self, x: &CudaTensor, range: Range<usize>) -> Result<CudaTensor> {
        let Inner { device, stream, .. } = &*self.inner;
        let (source, dtype) =
            (self.read_values("tokens", "x", x, |[b, _, c]| (b * c).saturating_mul(range.len()))?, x.dtype());
        let [batch, _, width] = source.shape;
        let out = self.empty(&[batch, range.len(), width], dtype)?;
        // Not `tokens`: what is wrong with the range is for the launcher to say.
        let target = Strided::new(out.pointer(), [batch, range.len(), width]);
        // SAFETY: see above the block.
        unsafe { tokens_raw(device, stream, dtype, &source, range, &target) }?;
        Ok(out)
    }

    fn mean_tokens(&self, x: &CudaTensor, sizes: Option<&CudaTensor>, first: usize) -> Result<CudaTensor> {
        const OP: &str = "mean_tokens";
        let Inner { device, stream, .. } = &*self.inner;
        let (source, dtype) = self.read_stream(OP, "x", x)?;
        let [batch, tokens, width] = source.shape;
        let sizes = sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()?;
        let out = self.empty(&[batch, width], dtype)?;
        let target = Strided::new(out.pointer(), [batch, 1, width]);
        // SAFETY: see above the block.
        unsafe { mean_tokens_raw(device, stream, dtype, &source, sizes, first, &target) }?;
        Ok(out)
    }

    fn columns(&self, x: &CudaTensor, range: Range<usize>) -> Result<CudaTensor> {
        self.some_columns(x, range)
    }

    fn performer(&self, packed: &CudaTensor, w: &CudaTensor) -> Result<CudaTensor> {
        self.random_features(packed, w)
    }

    fn max_tokens(&self, x: &CudaTensor, sizes: Option<&CudaTensor>, first: usize) -> Result<CudaTensor> {
        self.largest_tokens(x, sizes, first)
    }

    fn concat(&self, left: &CudaTensor, right: &CudaTensor) -> Result<CudaTensor> {
        self.side_by_side("concat", left, right)
    }

    fn average(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        self.mean_of_two(a, b)
    }

    fn hidden_sizes(
        &self,
        sizes: Option<&CudaTensor>,
        shape: [usize; 2],
        hidden: usize,
    ) -> Result<CudaTensor> {
        self.sizes_behind_hidden(sizes, shape, hidden)
    }
}
