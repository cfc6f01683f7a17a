//! Bipartite soft matching into a token plan (kernels/matching.cu).

mod params;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtrMut, DriverError, SyncOnDrop};
use params::{AT_ONCE, BACK, COSINE, FORTH, ONE_WAY, Params, parameters};

use super::{
    DType, Device, DevicePlan, DevicePointer, Element, PlanPointers, Strided,
    borrow::Borrow,
    device::driver,
    launch::{Shape, int, launch},
    nvtx,
};
use crate::{Error, Result};

const OP: &str = "matching";

/// The most tokens an image may have.
pub const MOST_TOKENS: usize = 16_384;

/// Limits of the kernels that hold all rows of an image in shared memory: tokens, bytes of rows, and, for each kernel, values
/// of a row.
const RESIDENT_TOKENS: usize = 512;
pub(super) const RESIDENT_BYTES: usize = 86_016;
const RESIDENT_WIDTHS: [usize; 2] = [64, 96];
const RESIDENT_THREADS: u32 = 512;

/// The tiles kernel: threads, rows of A or B that a block works on, and bytes of the rows that pass through shared memory.
const TILE_THREADS: u32 = 128;
const TILE_ROWS: usize = 32;
const TILE_BYTES: usize = (TILE_ROWS + 48) * 36 * 4;
/// Up to this many tokens of a side are ranked by counting, beyond they are sorted, which takes a key and a token a place.
const COUNTED: usize = 512;
const PLACE_BYTES: usize = 6;
/// What the tiles kernel may take of dynamic shared memory: a counter for each of the most output tokens.
pub(super) const TILES_MOST_BYTES: usize = 4 * MOST_TOKENS;

/// The rows whose cosine similarity decides who is merged; `T` is a tensor of the storage type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric<T> {
    /// The mean over heads of the keys in a packed tensor (B, N, parts·H·D), parts in the order query, key (ToMe, section
    /// 3.1).
    Keys {
        /// The packed tensor.
        packed: T,
        /// H.
        heads: usize,
        /// D.
        head_dim: usize,
    },
    /// The rows of a tensor (B, N, C) themselves (MCTF: the residual stream).
    Rows(T),
}

/// How similarity turns into the attraction of two tokens; `S` is a tensor (B, H, N) and `P` a row (B·N) of `f32`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attraction<S, P> {
    /// The cosine itself (ToMe).
    Cosine,
    /// MCTF's product of criteria (section 3.2), each raised to one over its temperature; temperature 0 switches a criterion
    /// off.
    MultiCriteria {
        /// Temperature of `(cosine + 1)/2`.
        tau_similarity: f64,
        /// Attention received, (B, H, N), whose mean over heads counts, and the temperature of its inverse.
        informativeness: (S, f64),
        /// Token sizes, (B, N), and the temperature of their inverse.
        size: (Option<P>, f64),
    },
}

/// The weights with which the members of a group enter their output token; `S` and `P` as for [`Attraction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting<S, P> {
    /// The plain mean.
    Uniform,
    /// In proportion to size, (B, N); sizes are 1 when absent.
    Size(Option<P>),
    /// In proportion to size times attention received, (B, N) and (B, H, N).
    SizeAndReceived(Option<P>, S),
}

/// What [`match_tokens`] reads: the fields of [`backend::Matching`](crate::backend::Matching).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matching<T, S, P> {
    /// What is compared.
    pub metric: Metric<T>,
    /// How attractive a similarity is.
    pub attraction: Attraction<S, P>,
    /// How a group's members are averaged.
    pub weighting: Weighting<S, P>,
    /// Tokens at the front that are neither merged away nor merged into.
    pub special: usize,
    /// Tokens to remove, at most `(N - special)/2`.
    pub merges: usize,
    /// Merge half of them from B into A, with the same scores (MCTF, section 3.2).
    pub both_ways: bool,
}

/// A matching over cudarc's views.
pub type MatchingViews<'a, T> =
    Matching<Strided<CudaView<'a, T>>, Strided<CudaView<'a, f32>>, CudaView<'a, f32>>;

/// A matching over device pointers.
pub type MatchingPointers = Matching<Strided<DevicePointer>, Strided<DevicePointer>, DevicePointer>;

/// Up to this many tokens, by criteria and with a special one, both ways are one launch: beyond, one block would ask too many of B
/// again, and without special tokens those of A that stay are not in the order in which ties are decided.
const AT_ONCE_TOKENS: usize = 2 * COUNTED;

/// Memory that a matching needs beside its plan: the counters with which blocks tell who is the last of an image, and both ways
/// who stays of A and whom each of B chooses. Allocated once, for launches that follow each other on one stream: two
/// matchings at a time need two of it.
#[derive(Debug)]
pub struct MatchingWorkspace {
    arrived: CudaSlice<u32>,
    stays: CudaSlice<i32>,
    chosen: CudaSlice<u64>,
    tokens: usize,
}

impl MatchingWorkspace {
    /// Memory for up to `batch` images of up to `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] when those are not addressable; [`Error::Driver`] when memory runs out.
    pub fn new(stream: &Arc<CudaStream>, batch: usize, tokens: usize) -> Result<Self> {
        let failed = |error: DriverError| driver("allocating a workspace", error);
        let stays = batch.checked_mul(tokens.div_ceil(2)).filter(|&n| i32::try_from(n).is_ok());
        let stays = stays.ok_or_else(|| {
            Error::argument(OP, format!("no workspace holds {batch} images of {tokens} tokens"))
        })?;
        Ok(Self {
            arrived: stream.alloc_zeros(batch.max(1)).map_err(failed)?,
            stays: stream.alloc_zeros(stays.max(1)).map_err(failed)?,
            chosen: stream.alloc_zeros(chosen_values(batch, tokens).max(1)).map_err(failed)?,
            tokens,
        })
    }

    /// Images it serves.
    pub fn batch(&self) -> usize {
        self.arrived.len()
    }

    /// Tokens of an image it serves.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// The arrays of a [`MatchingWorkspace`], for the `unsafe` entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatchingScratch {
    /// (batch) `u32`: 0 before a launch, and 0 again after it.
    pub arrived: DevicePointer,
    /// (batch, tokens/2 rounded up) `i32`: anything.
    pub stays: DevicePointer,
    /// [`chosen_values`] `u64`: 0 before a launch, and 0 again after it.
    pub chosen: DevicePointer,
    /// Images they serve.
    pub batch: usize,
    /// Tokens of an image they serve.
    pub tokens: usize,
}

/// The values of [`MatchingScratch::chosen`] for `batch` images of up to `tokens` tokens.
pub fn chosen_values(batch: usize, tokens: usize) -> usize {
    batch.saturating_mul(tokens.min(AT_ONCE_TOKENS) / 2)
}

/// Writes the plan of a bipartite matching (ToMe, section 3; MCTF, section 3.2): what [`Backend::matching`] computes.
///
/// Similarities are products and sums in `f32` for every storage type: no matrix unit is used, since products of rounded
/// rows change who is chosen. A score differs from its exact value by up to `4·eps·√D` (`eps = 2^-23`, `D` values a row) and,
/// with criteria, by a few `eps` of itself; who is chosen is best within that. Equal tokens have equal scores to the bit, and
/// then the lower index goes first. NaN scores come after every number; a row of zeros is similar to nothing.
///
/// One launch one way. By the cosine, up to 512 tokens of up to 96 values whose rows fit 84 KiB as `f32`, padded (316 of 64),
/// one block holds an image; beyond, with criteria, or both ways, blocks take 32 tokens of one side each against all of the other.
/// Both ways are one launch too with criteria, up to 1,024 tokens of which one at least is special, else one for each way.
///
/// # Errors
/// [`Error::Argument`] when shapes, counts or the plan's extents do not fit, a temperature is NaN, the workspace is too
/// small, there are more than [`MOST_TOKENS`], or an argument lives in another context; [`Error::Launch`] when the
/// driver refuses.
///
/// [`Backend::matching`]: crate::backend::Backend::matching
pub fn match_tokens<T: Element>(
    device: &Device,
    stream: &CudaStream,
    matching: &MatchingViews<'_, T>,
    workspace: &mut MatchingWorkspace,
    plan: &mut DevicePlan,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let mut guards: Vec<SyncOnDrop<'_>> = Vec::with_capacity(5);
    let metric = match &matching.metric {
        Metric::Rows(rows) => {
            let (rows, guard) = borrow.read("metric", rows)?;
            guards.push(guard);
            Metric::Rows(rows)
        }
        &Metric::Keys { ref packed, heads, head_dim } => {
            let (packed, guard) = borrow.read("packed heads", packed)?;
            guards.push(guard);
            Metric::Keys { packed, heads, head_dim }
        }
    };
    let [batch, tokens, _] = metric.tensor().shape;
    let length = batch.saturating_mul(tokens);
    let attraction = match &matching.attraction {
        Attraction::Cosine => Attraction::Cosine,
        Attraction::MultiCriteria { tau_similarity, informativeness, size } => {
            let (scores, guard) = borrow.read("informativeness", &informativeness.0)?;
            guards.push(guard);
            let sizes = read_sizes(borrow, "sizes of the attraction", size.0.as_ref(), length, &mut guards)?;
            Attraction::MultiCriteria {
                tau_similarity: *tau_similarity,
                informativeness: (scores, informativeness.1),
                size: (sizes, size.1),
            }
        }
    };
    let weighting = match &matching.weighting {
        Weighting::Uniform => Weighting::Uniform,
        Weighting::Size(sizes) => {
            Weighting::Size(read_sizes(borrow, "sizes", sizes.as_ref(), length, &mut guards)?)
        }
        Weighting::SizeAndReceived(sizes, received) => {
            let sizes = read_sizes(borrow, "sizes", sizes.as_ref(), length, &mut guards)?;
            let (received, guard) = borrow.read("received", received)?;
            guards.push(guard);
            Weighting::SizeAndReceived(sizes, received)
        }
    };
    let &Matching { special, merges, both_ways, .. } = matching;
    let pointers = Matching { metric, attraction, weighting, special, merges, both_ways };
    device.check_context(OP, "workspace", workspace.arrived.context())?;
    let (batch, tokens) = (workspace.batch(), workspace.tokens);
    let (arrived, _arrived) = workspace.arrived.device_ptr_mut(stream);
    let (stays, _stays) = workspace.stays.device_ptr_mut(stream);
    let (chosen, _chosen) = workspace.chosen.device_ptr_mut(stream);
    let scratch = MatchingScratch { arrived, stays, chosen, batch, tokens };
    let (plan, _plan) = plan.write(OP, "plan", device, stream)?;
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard outlives
    // the launch; plan and workspace own arrays of their extents and are borrowed mutably; only this function writes the
    // counters and choices, which were cleared when they were allocated.
    unsafe { match_tokens_raw(device, stream, T::DTYPE, &pointers, scratch, &plan) }
}

/// A row of sizes, if there is one.
fn read_sizes<'a>(
    borrow: Borrow<'a>,
    name: &str,
    sizes: Option<&'a CudaView<'_, f32>>,
    length: usize,
    guards: &mut Vec<SyncOnDrop<'a>>,
) -> Result<Option<DevicePointer>> {
    let Some(sizes) = sizes else { return Ok(None) };
    let (pointer, guard) = borrow.read_row(name, sizes, length)?;
    guards.push(guard);
    Ok(Some(pointer))
}

impl<T> Metric<T> {
    fn tensor(&self) -> &T {
        match self {
            Self::Keys { packed: tensor, .. } | Self::Rows(tensor) => tensor,
        }
    }
}

/// [`match_tokens`] over device pointers.
///
/// # Errors
/// As [`match_tokens`].
///
/// # Safety
/// On `stream`, until it has passed these launches: every tensor must be the address of initialised values of its shape and
/// strides (the metric's of type `dtype`, all others `f32`, rows of sizes B·N) in the device's memory that nobody writes; the
/// plan's arrays must have its extents; `scratch` must hold its arrays, counters and choices all 0; and nobody else may touch plan or scratch.
pub unsafe fn match_tokens_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    matching: &MatchingPointers,
    scratch: MatchingScratch,
    plan: &PlanPointers,
) -> Result<()> {
    device.check_stream(OP, stream)?;
    plan.check(OP, "plan")?;
    let params = parameters(dtype, matching, scratch, plan)?;
    let [batch, tokens, _] = matching.metric.tensor().shape;
    let images = int(OP, "images", batch)?.unsigned_abs();
    let _range = nvtx::range(OP);
    let kernels = &device.kernels().matching;
    if let Some((kernel, bytes)) = resident(&params, matching.both_ways) {
        let shape = Shape { grid: images, block: RESIDENT_THREADS, shared_bytes: bytes };
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        return unsafe { launch(stream, kernels.resident[kernel].pick(dtype), shape, &params) };
    }
    let tiles_kernel = if params.attraction == COSINE { &kernels.tiles } else { &kernels.criteria };
    // Who chooses: A, then B.
    let [a, b] = [tokens.div_ceil(2) - matching.special.div_ceil(2), tokens / 2 - matching.special / 2];
    let at_once = params.attraction != COSINE && matching.special > 0 && tokens <= AT_ONCE_TOKENS;
    let ways: &[(i32, usize)] = match (matching.both_ways, at_once) {
        (false, _) => &[(ONE_WAY, a)],
        (true, true) => &[(AT_ONCE, a)],
        (true, false) => &[(FORTH, a), (BACK, b)],
    };
    for &(direction, side) in ways {
        // One block at least: somebody has to write the plan.
        let tiles = side.div_ceil(TILE_ROWS).max(1);
        let params = params.towards(direction, int(OP, "tiles", tiles)?);
        let blocks = batch.saturating_mul(tiles);
        let shape = Shape {
            grid: int(OP, "blocks", blocks)?.unsigned_abs(),
            block: TILE_THREADS,
            shared_bytes: int(OP, "bytes", tiles_bytes(a.max(b), plan.tokens_out))?.unsigned_abs(),
        };
        // SAFETY: as above.
        unsafe { launch(stream, tiles_kernel.pick(dtype), shape, &params)? };
    }
    Ok(())
}

/// Dynamic shared memory of the tiles kernel: the rows of a tile, or the keys of a side, or a counter for each output token.
fn tiles_bytes(side: usize, tokens_out: usize) -> usize {
    let keys =
        if side <= COUNTED { 4 * side.next_multiple_of(32) } else { PLACE_BYTES * side.next_power_of_two() };
    TILE_BYTES.max(keys).max(4 * tokens_out)
}

/// Which resident kernel serves, and its dynamic shared memory.
fn resident(params: &Params, both_ways: bool) -> Option<(usize, u32)> {
    let [tokens, special, width] = [params.tokens, params.special, params.width].map(i32::unsigned_abs);
    if both_ways || params.attraction != COSINE || tokens as usize > RESIDENT_TOKENS {
        return None;
    }
    let kernel = RESIDENT_WIDTHS.iter().position(|&widest| width as usize <= widest)?;
    let a = (tokens.div_ceil(2) - special.div_ceil(2)).next_multiple_of(4);
    let b = (tokens / 2 - special / 2).next_multiple_of(8);
    let bytes = 4 * (a + b) * (RESIDENT_WIDTHS[kernel] as u32 + 4);
    (bytes as usize <= RESIDENT_BYTES).then_some((kernel, bytes))
}
