//! Scores of whole neurons and heads, and the updates of their masks (kernels/structured.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Kernel, Module, TypedKernels},
    launch::{Shape, int, launch, length},
    nvtx,
    strided::check_pointer,
};
#[cfg(doc)]
use crate::reference;
use crate::{Error, Result, connectivity::removals};

const SCORES: &str = "neuron_scores";
const SUMS: &str = "head_sums";
const NEURONS: &str = "update_neurons";
const HEADS: &str = "update_heads";

/// The most heads of an attention.
pub const MOST_HEADS: usize = 1024;

const THREADS: u32 = 256;
const UPDATE_THREADS: u32 = 1024;
/// Neurons of a block.
const NEURONS_A_BLOCK: usize = 32;

/// `NeuronScoreParams` of kernels/structured.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct ScoreParams {
    fc1: DevicePointer,
    fc2: DevicePointer,
    scores: DevicePointer,
    strides: [i64; 2],
    neurons: i32,
    width: i32,
    outputs: i32,
    reserved: i32,
}

/// `HeadSumParams` of kernels/structured.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct SumParams {
    output: DevicePointer,
    gradient: DevicePointer,
    products: DevicePointer,
    sizes: DevicePointer,
    strides: [[i64; 2]; 2],
    heads: i32,
    tokens: i32,
    head_dim: i32,
    reserved: i32,
}

/// `UpdateParams` of kernels/structured.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct UpdateParams {
    scores: DevicePointer,
    calls: DevicePointer,
    mask: DevicePointer,
    rate: f64,
    count: i32,
    batch: i32,
}

const _: () = assert!(
    size_of::<ScoreParams>() == 56
        && std::mem::offset_of!(ScoreParams, strides) == 24
        && std::mem::offset_of!(ScoreParams, neurons) == 40
        && size_of::<SumParams>() == 80
        && std::mem::offset_of!(SumParams, strides) == 32
        && std::mem::offset_of!(SumParams, heads) == 64
        && size_of::<UpdateParams>() == 40
        && std::mem::offset_of!(UpdateParams, rate) == 24
        && std::mem::offset_of!(UpdateParams, count) == 32
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for ScoreParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for SumParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for UpdateParams {}

/// The kernels of kernels/structured.cu.
#[derive(Debug)]
pub(super) struct StructuredKernels {
    scores: TypedKernels,
    sums: TypedKernels,
    neurons: Kernel,
    heads: Kernel,
}

impl StructuredKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        Ok(Self {
            scores: TypedKernels::load_variant(module, "fv_neuron_scores", "")?,
            sums: TypedKernels::load_variant(module, "fv_head_sums", "")?,
            neurons: module.kernel("fv_neuron_update".to_owned())?,
            heads: module.kernel("fv_head_update".to_owned())?,
        })
    }
}

/// The magnitudes of each neuron's row of `fc1` (1, n, C) and column of `fc2` (1, C', n), added up in `f32`: of weights, or of
/// gradients ([`reference::connectivity::neuron_scores`]).
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn neuron_scores<T: Element>(
    device: &Device,
    stream: &CudaStream,
    fc1: &Strided<CudaView<'_, T>>,
    fc2: &Strided<CudaView<'_, T>>,
    scores: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let borrow = Borrow { op: SCORES, device, stream };
    let neurons = fc1.shape[1];
    let (fc1, _fc1) = borrow.read("fc1", fc1)?;
    let (fc2, _fc2) = borrow.read("fc2", fc2)?;
    let (scores, _scores) = borrow.write_row("scores", scores, neurons)?;
    // SAFETY: every tensor lies within its view, which lives in the device's context and whose guard outlives the launch;
    // `scores` is borrowed mutably, so it is none of the others.
    unsafe { neuron_scores_raw(device, stream, T::DTYPE, &fc1, &fc2, scores) }
}

/// [`neuron_scores`] over device pointers.
///
/// # Errors
/// As [`neuron_scores`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both matrices must lie at their addresses in the device's memory, initialised,
/// and as many `f32` as there are neurons at `scores`; nobody else may write the matrices, nor touch the scores, which overlap
/// neither.
pub unsafe fn neuron_scores_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    fc1: &Strided<DevicePointer>,
    fc2: &Strided<DevicePointer>,
    scores: DevicePointer,
) -> Result<()> {
    let _range = nvtx::range(SCORES);
    device.check_stream(SCORES, stream)?;
    fc1.check(SCORES, "fc1", dtype)?;
    fc2.check(SCORES, "fc2", dtype)?;
    check_pointer(SCORES, "scores", scores, 4)?;
    let [_, neurons, width] = fc1.shape;
    let outputs = fc2.shape[1];
    fc1.expect_shape(SCORES, "fc1", [1, neurons, width])?;
    fc2.expect_shape(SCORES, "fc2", [1, outputs, neurons])?;
    let params = ScoreParams {
        fc1: fc1.data,
        fc2: fc2.data,
        scores,
        strides: [fc1.kernel_strides()[1], fc2.kernel_strides()[1]],
        neurons: length(SCORES, "neurons", neurons)?,
        width: length(SCORES, "values a row", width)?,
        outputs: length(SCORES, "rows of fc2", outputs)?,
        reserved: 0,
    };
    let grid = int(SCORES, "blocks", neurons.div_ceil(NEURONS_A_BLOCK))?.unsigned_abs();
    let shape = Shape { grid, block: THREADS, shared_bytes: 0 };
    // SAFETY: the struct is the kernel's; the caller vouches for the memory behind it.
    unsafe { launch(stream, device.kernels().structured.scores.pick(dtype), shape, &params) }
}

/// Products and sizes of heads, (B, H) each: what [`update_heads`] decides by.
#[derive(Clone, Copy, Debug)]
pub struct HeadSums<P> {
    /// The sum of output times gradient over the tokens and values of a head.
    pub products: P,
    /// The sum of the gradient's magnitudes.
    pub sizes: P,
}

/// The [`HeadSums`] of an attention's `output` (B, N, H·D) before its projection and the `gradient` of the loss with respect to
/// it; their means over images are [`reference::connectivity::head_scores`].
///
/// # Errors
/// As [`neuron_scores`], and when `heads` does not divide the width.
pub fn head_sums<T: Element>(
    device: &Device,
    stream: &CudaStream,
    output: &Strided<CudaView<'_, T>>,
    gradient: &Strided<CudaView<'_, T>>,
    heads: usize,
    sums: &mut HeadSums<CudaViewMut<'_, f32>>,
) -> Result<()> {
    let borrow = Borrow { op: SUMS, device, stream };
    let count = output.shape[0].saturating_mul(heads);
    let (output, _output) = borrow.read("output", output)?;
    let (gradient, _gradient) = borrow.read("gradient", gradient)?;
    let (products, _products) = borrow.write_row("products", &mut sums.products, count)?;
    let (sizes, _sizes) = borrow.write_row("sizes", &mut sums.sizes, count)?;
    // SAFETY: every tensor lies within its view, which lives in the device's context and whose guard outlives the launch; the
    // sums are borrowed mutably, so they are none of the others.
    unsafe {
        head_sums_raw(device, stream, T::DTYPE, &output, &gradient, heads, HeadSums { products, sizes })
    }
}

/// [`head_sums`] over device pointers.
///
/// # Errors
/// As [`head_sums`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both tensors must lie at their addresses in the device's memory, initialised,
/// and B·H `f32` at each of the sums; nobody else may write the tensors, nor touch the sums, which overlap nothing else.
pub unsafe fn head_sums_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    output: &Strided<DevicePointer>,
    gradient: &Strided<DevicePointer>,
    heads: usize,
    sums: HeadSums<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(SUMS);
    device.check_stream(SUMS, stream)?;
    output.check(SUMS, "output", dtype)?;
    gradient.check(SUMS, "gradient", dtype)?;
    gradient.expect_shape(SUMS, "gradient", output.shape)?;
    check_pointer(SUMS, "products", sums.products, 4)?;
    check_pointer(SUMS, "sizes", sums.sizes, 4)?;
    let [batch, tokens, width] = output.shape;
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::argument(SUMS, format!("{heads} heads do not divide the width {width}")));
    }
    let head_dim = width / heads;
    length(SUMS, "values a head", tokens.saturating_mul(head_dim))?;
    let params = SumParams {
        output: output.data,
        gradient: gradient.data,
        products: sums.products,
        sizes: sums.sizes,
        strides: [output.kernel_strides(), gradient.kernel_strides()],
        heads: int(SUMS, "heads", heads)?,
        tokens: int(SUMS, "tokens", tokens)?,
        head_dim: int(SUMS, "values of a head", head_dim)?,
        reserved: 0,
    };
    let grid = int(SUMS, "blocks", batch.saturating_mul(heads))?.unsigned_abs();
    let shape = Shape { grid, block: THREADS, shared_bytes: 0 };
    // SAFETY: the struct is the kernel's; the caller vouches for the memory behind it.
    unsafe { launch(stream, device.kernels().structured.sums.pick(dtype), shape, &params) }
}

/// The new mask of an MLP's neurons from the scores of its weights and of their gradients
/// ([`reference::connectivity::update_neurons`]).
///
/// # Errors
/// [`Error::Argument`] when lengths differ, `rate` is no share or an argument lives in another context; [`Error::Launch`] when the
/// driver refuses.
pub fn update_neurons(
    device: &Device,
    stream: &CudaStream,
    scores: &CudaView<'_, f32>,
    gradients: &CudaView<'_, f32>,
    mask: &mut CudaViewMut<'_, u8>,
    rate: f64,
) -> Result<()> {
    let borrow = Borrow { op: NEURONS, device, stream };
    let count = mask.len();
    let (scores, _scores) = borrow.read_row("scores", scores, count)?;
    let (calls, _calls) = borrow.read_row("gradients", gradients, count)?;
    let (mask, _mask) = borrow.write_row("mask", mask, count)?;
    let update = Update { scores, calls, mask, count, batch: 1, rate };
    // SAFETY: all have as many values as the mask, live in the device's context and have guards that outlive the launch; the
    // mask is borrowed mutably, so it is none of the others.
    unsafe { update_neurons_raw(device, stream, &update) }
}

/// What an update reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Scores of neurons (n), or products of heads (B, H), `f32`.
    pub scores: DevicePointer,
    /// Scores of the neurons' gradients (n), or sizes of heads (B, H), `f32`.
    pub calls: DevicePointer,
    /// A byte each.
    pub mask: DevicePointer,
    /// Neurons or heads.
    pub count: usize,
    /// Images, of heads.
    pub batch: usize,
    /// The share to drop.
    pub rate: f64,
}

/// [`update_neurons`] over device pointers.
///
/// # Errors
/// As [`update_neurons`].
///
/// # Safety
/// On `stream`, until it has passed this launch: what [`Update`] describes must lie at its addresses in the device's memory,
/// initialised; nobody else may write it, nor touch the mask, which overlaps nothing else.
pub unsafe fn update_neurons_raw(device: &Device, stream: &CudaStream, update: &Update) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { run(NEURONS, device, stream, &device.kernels().structured.neurons, UPDATE_THREADS, update) }
}

/// The new mask of an attention's heads, H, from the [`HeadSums`] of a batch ([`reference::connectivity::update_heads`]).
///
/// # Errors
/// As [`update_neurons`], and when there are more than [`MOST_HEADS`] or the sums are not those of whole images.
pub fn update_heads(
    device: &Device,
    stream: &CudaStream,
    sums: &HeadSums<CudaView<'_, f32>>,
    mask: &mut CudaViewMut<'_, u8>,
    rate: f64,
) -> Result<()> {
    let borrow = Borrow { op: HEADS, device, stream };
    let (count, held) = (mask.len(), sums.products.len());
    if count == 0 || held == 0 || !held.is_multiple_of(count) {
        return Err(Error::argument(
            HEADS,
            format!("{held} products of {count} heads are not those of whole images"),
        ));
    }
    let (scores, _scores) = borrow.read_row("products", &sums.products, held)?;
    let (calls, _calls) = borrow.read_row("sizes", &sums.sizes, held)?;
    let (mask, _mask) = borrow.write_row("mask", mask, count)?;
    let update = Update { scores, calls, mask, count, batch: held / count, rate };
    // SAFETY: all lie within their views, live in the device's context and have guards that outlive the launch; the mask is
    // borrowed mutably, so it is none of the others.
    unsafe { update_heads_raw(device, stream, &update) }
}

/// [`update_heads`] over device pointers.
///
/// # Errors
/// As [`update_heads`].
///
/// # Safety
/// As [`update_neurons_raw`].
pub unsafe fn update_heads_raw(device: &Device, stream: &CudaStream, update: &Update) -> Result<()> {
    if update.count > MOST_HEADS {
        return Err(Error::argument(HEADS, format!("{} heads, at most {MOST_HEADS}", update.count)));
    }
    let threads = update.count.next_multiple_of(32) as u32;
    // SAFETY: the caller's promise.
    unsafe { run(HEADS, device, stream, &device.kernels().structured.heads, threads, update) }
}

/// # Safety
/// As [`update_neurons_raw`].
unsafe fn run(
    op: &'static str,
    device: &Device,
    stream: &CudaStream,
    kernel: &Kernel,
    threads: u32,
    update: &Update,
) -> Result<()> {
    let &Update { scores, calls, mask, count, batch, rate } = update;
    let _range = nvtx::range(op);
    device.check_stream(op, stream)?;
    removals(rate, 0)?;
    check_pointer(op, "scores", scores, 4)?;
    check_pointer(op, "calls", calls, 4)?;
    if count == 0 {
        return Ok(());
    }
    let params = UpdateParams {
        scores,
        calls,
        mask,
        rate,
        count: length(op, "elements", count)?,
        batch: int(op, "images", batch)?,
    };
    let shape = Shape { grid: 1, block: threads, shared_bytes: 0 };
    // SAFETY: the struct is the kernel's; the caller vouches for the memory behind it.
    unsafe { launch(stream, kernel, shape, &params) }
}
