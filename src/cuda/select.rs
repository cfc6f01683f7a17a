//! Top-k selection by class scores into a token plan (kernels/select.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, DeviceRepr, sys};

use super::{
    DType, Device, DevicePlan, DevicePointer, Element, PlanPointers, Strided,
    borrow::Borrow,
    image::{Kernel, Kernels, TypedKernels},
    launch::{Shape, int, launch},
    matching, nvtx, plan,
};
use crate::{Error, Result};

const OP: &str = "select";

/// The most tokens an image may have.
pub const MOST_TOKENS: usize = 16_384;

/// Up to this many tokens ranks are counted, beyond they are sorted.
const RANK_TOKENS: usize = 512;
/// Shared memory of one place of the sort: a key and a token.
const PLACE_BYTES: usize = 6;
/// The sort's largest and smallest block.
const SORT_THREADS: [usize; 2] = [128, 1024];

/// `SelectParams` of kernels/select.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    scores: DevicePointer,
    offsets: DevicePointer,
    members: DevicePointer,
    weights: DevicePointer,
    groups: DevicePointer,
    strides: [i64; 2],
    heads: i32,
    tokens: i32,
    special: i32,
    keep: i32,
    fused: i32,
    places: i32,
    order: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 88
        && std::mem::offset_of!(Params, strides) == 40
        && std::mem::offset_of!(Params, heads) == 56
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// Who is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Tokens at the front that are kept unconditionally.
    pub special: usize,
    /// Other tokens to keep, in descending order of score.
    pub keep: usize,
    /// Append one token: the sum of the others, each times its score. None is appended when there are no others.
    pub fuse: bool,
}

impl Selection {
    /// The tokens that are left of `tokens`, the fused one included.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are not that many.
    pub fn tokens_out(&self, tokens: usize) -> Result<usize> {
        if self.special > tokens || self.keep > tokens - self.special {
            return Err(Error::argument(
                OP,
                format!("cannot keep {} of {tokens} tokens of which {} are special", self.keep, self.special),
            ));
        }
        Ok(self.special + self.keep + usize::from(self.fuses(tokens)))
    }

    fn fuses(&self, tokens: usize) -> bool {
        self.fuse && self.special + self.keep < tokens
    }
}

/// Who is kept in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPlace {
    /// Tokens at the front that stay whatever their scores.
    pub special: usize,
    /// How many tokens are the best, special ones among them or not.
    pub keep: usize,
    /// All tokens stay, but those that would go have weight 0.
    pub masked: bool,
}

impl InPlace {
    /// The places for what is left of `tokens`.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are not that many.
    pub fn tokens_out(&self, tokens: usize) -> Result<usize> {
        if self.special > tokens || self.keep > tokens {
            return Err(Error::argument(
                OP,
                format!("cannot keep {} of {tokens} tokens of which {} are special", self.keep, self.special),
            ));
        }
        Ok(if self.masked { tokens } else { (self.special + self.keep).min(tokens) })
    }
}

/// Where tokens that stay go, as the kernels number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    ByScore = 0,
    InPlace = 1,
    Masked = 2,
}

/// What a launch does.
#[derive(Clone, Copy, Debug)]
struct Job {
    special: usize,
    keep: usize,
    fused: bool,
    order: Order,
    tokens_out: usize,
}

/// Writes the plan of a selection by class scores (B, H, N), whose mean over heads decides. Ties go to the lower index, NaN
/// comes after every number.
///
/// # Errors
/// [`Error::Argument`] when counts or the plan's extents do not fit, there are more than [`MOST_TOKENS`], or an argument
/// lives in another context; [`Error::Launch`] when the driver refuses.
pub fn select<T: Element>(
    device: &Device,
    stream: &CudaStream,
    class_scores: &Strided<CudaView<'_, T>>,
    selection: Selection,
    plan: &mut DevicePlan,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (scores, _scores) = borrow.read("class scores", class_scores)?;
    let (plan, _plan) = plan.write(OP, "plan", device, stream)?;
    // SAFETY: the scores lie within their view (checked above), which lives in the device's context and whose guard
    // outlives the launch; the plan owns arrays of its extents and is borrowed mutably.
    unsafe { select_raw(device, stream, T::DTYPE, &scores, selection, &plan) }
}

/// [`select`] over device pointers.
///
/// # Errors
/// As [`select`].
///
/// # Safety
/// On `stream`, until it has passed this launch: `class_scores` must be the address of an initialised tensor of its shape,
/// strides and `dtype` in the device's memory that nobody writes; the plan's arrays must have its extents, and nobody else
/// may touch them.
pub unsafe fn select_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    class_scores: &Strided<DevicePointer>,
    selection: Selection,
    plan: &PlanPointers,
) -> Result<()> {
    let tokens = class_scores.shape[2];
    let job = Job {
        special: selection.special,
        keep: selection.keep,
        fused: selection.fuses(tokens),
        order: Order::ByScore,
        tokens_out: selection.tokens_out(tokens)?,
    };
    // SAFETY: the caller's promise.
    unsafe { run(device, stream, dtype, class_scores, job, plan) }
}

/// Writes the plan of a selection in place by scores (B, H, N), whose mean over heads decides. All tokens compete; what is kept
/// stands in order of index, with empty groups behind it where special tokens are among the best.
///
/// # Errors
/// As [`select`].
pub fn keep_in_place<T: Element>(
    device: &Device,
    stream: &CudaStream,
    scores: &Strided<CudaView<'_, T>>,
    selection: InPlace,
    plan: &mut DevicePlan,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (scores, _scores) = borrow.read("scores", scores)?;
    let (plan, _plan) = plan.write(OP, "plan", device, stream)?;
    // SAFETY: as in `select`.
    unsafe { keep_in_place_raw(device, stream, T::DTYPE, &scores, selection, &plan) }
}

/// [`keep_in_place`] over device pointers.
///
/// # Errors
/// As [`select`].
///
/// # Safety
/// As [`select_raw`].
pub unsafe fn keep_in_place_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    scores: &Strided<DevicePointer>,
    selection: InPlace,
    plan: &PlanPointers,
) -> Result<()> {
    let job = Job {
        special: selection.special,
        keep: selection.keep,
        fused: false,
        order: if selection.masked { Order::Masked } else { Order::InPlace },
        tokens_out: selection.tokens_out(scores.shape[2])?,
    };
    // SAFETY: the caller's promise.
    unsafe { run(device, stream, dtype, scores, job, plan) }
}

/// # Safety
/// As [`select_raw`].
unsafe fn run(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    class_scores: &Strided<DevicePointer>,
    job: Job,
    plan: &PlanPointers,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    class_scores.check(OP, "class scores", dtype)?;
    plan.check(OP, "plan")?;
    let [batch, heads, tokens] = class_scores.shape;
    let Job { special, keep, fused, order, tokens_out } = job;
    if (plan.batch, plan.tokens_in, plan.tokens_out) != (batch, tokens, tokens_out) {
        return Err(Error::argument(
            OP,
            format!(
                "the plan holds {} images of {} tokens that become {}, expected {batch} of {tokens} that become {tokens_out}",
                plan.batch, plan.tokens_in, plan.tokens_out
            ),
        ));
    }
    if tokens > MOST_TOKENS {
        return Err(Error::argument(OP, format!("{tokens} tokens, at most {MOST_TOKENS}")));
    }
    let candidates = if order == Order::ByScore { tokens - special } else { tokens };
    let places = candidates.next_power_of_two();
    let params = Params {
        scores: class_scores.data,
        offsets: plan.offsets,
        members: plan.members,
        weights: plan.weights,
        groups: plan.groups,
        strides: class_scores.kernel_strides(),
        heads: int(OP, "heads", heads)?,
        tokens: int(OP, "tokens", tokens)?,
        special: int(OP, "special tokens", special)?,
        keep: int(OP, "tokens to keep", keep)?,
        fused: i32::from(fused),
        places: int(OP, "places", places)?,
        order: order as i32,
        reserved: 0,
    };
    let kernels = device.kernels();
    let (kernel, block, shared) = if tokens <= RANK_TOKENS {
        (kernels.select_rank.pick(dtype), tokens.next_multiple_of(32), 0)
    } else {
        let [least, most] = SORT_THREADS;
        (kernels.select_sort.pick(dtype), (places / 2).clamp(least, most), PLACE_BYTES * places)
    };
    let size = |n| int(OP, "threads", n).map(i32::unsigned_abs);
    let shape = Shape {
        grid: int(OP, "images", batch)?.unsigned_abs(),
        block: size(block)?,
        shared_bytes: size(shared)?,
    };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, kernel, shape, &params) }
}

/// Lets the kernels that need it have more than 48 KiB of dynamic shared memory, `limit` bytes being the device's own limit
/// for a block.
pub(super) fn permit_shared_memory(kernels: &Kernels, device: &str, limit: i32) -> Result<()> {
    let sorts = kernels.select_sort.all().iter().map(|kernel| (kernel, PLACE_BYTES * MOST_TOKENS));
    let composes = std::iter::once((&kernels.compose, plan::MOST_TOKENS * size_of::<i32>()));
    let resident = kernels.matching.resident.iter().flat_map(TypedKernels::all);
    let resident = resident.map(|kernel| (kernel, matching::RESIDENT_BYTES));
    let tiles = kernels.matching.tiles.all().iter().chain(kernels.matching.criteria.all());
    let tiles = tiles.map(|kernel| (kernel, matching::TILES_MOST_BYTES));
    sorts
        .chain(composes)
        .chain(resident)
        .chain(tiles)
        .chain(kernels.predictor.dynamic())
        .chain(kernels.cluster.dynamic())
        .chain(kernels.connectivity.dynamic())
        .try_for_each(|(kernel, bytes)| permit(kernel, bytes, device, limit))
}

/// Lets a kernel have `bytes` of dynamic shared memory.
pub(super) fn permit(kernel: &Kernel, bytes: usize, device: &str, limit: i32) -> Result<()> {
    let fail = |what: String| Error::Kernels { device: device.to_owned(), what };
    let bytes = int(OP, "bytes", bytes)?;
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    kernel.function.set_attribute(attribute, bytes).map_err(|error| {
        fail(format!(
            "{} needs {bytes} bytes of shared memory of the {limit} a block may have: {error:?}",
            kernel.name
        ))
    })
}
