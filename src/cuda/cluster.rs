//! Decoupled tokens: attentive ones stay or pair up, the others join them or form clusters (kernels/cluster.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePlan, DevicePointer, Element, PlanPointers, Strided,
    borrow::Borrow,
    image::{Kernel, Module, TypedKernels},
    launch::{Grid, Shape, int, launch, launch_grid},
    nvtx,
    select::{Selection, select_raw},
    strided::check_pointer,
};
use crate::{Error, Result, backend::Inattentive};

const OP: &str = "cluster";

/// The most tokens an image may have: what is known of each lies in shared memory.
pub const MOST_TOKENS: usize = 4096;
/// The widest tokens.
pub const MOST_WIDTH: usize = 4096;

const TILE: usize = 64;
const NEAR_ROWS: usize = 4;
const PLAN_THREADS: u32 = 256;
const PAIR_THREADS: u32 = 128;
/// Bytes of a token in the plan's kernel: score, key, group, start of its group, centre.
const PLAN_BYTES: usize = 20;

/// `ClusterParams` of kernels/cluster.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    scores: DevicePointer,
    order: DevicePointer,
    density: DevicePointer,
    best: DevicePointer,
    far: DevicePointer,
    who: DevicePointer,
    offsets: DevicePointer,
    members: DevicePointer,
    weights: DevicePointer,
    groups: DevicePointer,
    x_strides: [i64; 2],
    score_strides: [i64; 2],
    heads: i32,
    tokens: i32,
    width: i32,
    special: i32,
    keep: i32,
    pairs: i32,
    clusters: i32,
    neighbours: i32,
    peaks: i32,
    tiles: i32,
    rows: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 168
        && std::mem::offset_of!(Params, x_strides) == 88
        && std::mem::offset_of!(Params, heads) == 120
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/cluster.cu, with wide accesses and with narrow ones.
#[derive(Debug)]
pub(super) struct ClusterKernels {
    density: [TypedKernels; 2],
    nearest: [TypedKernels; 2],
    pairs: [TypedKernels; 2],
    plan: [TypedKernels; 2],
}

impl ClusterKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |name: &str| TypedKernels::wide_and_narrow(module, &format!("fv_cluster_{name}"), "");
        Ok(Self {
            density: load("density")?,
            nearest: load("nearest")?,
            pairs: load("pairs")?,
            plan: load("plan")?,
        })
    }

    /// The kernels with dynamic shared memory, and the most they are launched with.
    pub(super) fn dynamic(&self) -> impl Iterator<Item = (&Kernel, usize)> {
        let plan = self.plan.iter().flat_map(TypedKernels::all);
        let nearest = self.nearest.iter().flat_map(TypedKernels::all);
        plan.map(|kernel| (kernel, PLAN_BYTES * MOST_TOKENS + 8))
            .chain(nearest.map(|kernel| (kernel, 4 * NEAR_ROWS * MOST_TOKENS)))
    }
}

/// What is done with the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoupling {
    /// Tokens at the front that are kept unconditionally.
    pub special: usize,
    /// Attentive tokens.
    pub keep: usize,
    /// What becomes of the others.
    pub inattentive: Inattentive,
}

impl Decoupling {
    /// The tokens that are left of `tokens`.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are not that many.
    pub fn tokens_out(&self, tokens: usize) -> Result<usize> {
        if self.special > tokens || self.keep == 0 || self.keep > tokens - self.special {
            return Err(Error::argument(
                OP,
                format!("cannot keep {} of {tokens} tokens of which {} are special", self.keep, self.special),
            ));
        }
        let (pairs, clusters) = self.counts(tokens);
        Ok(self.special + self.keep - pairs + clusters)
    }

    /// Pairs and clusters, as many as there can be.
    fn counts(&self, tokens: usize) -> (usize, usize) {
        match self.inattentive {
            Inattentive::Join => (0, 0),
            Inattentive::Peaks { pairs, clusters, .. } => {
                (pairs.min(self.keep / 2), clusters.min(tokens - self.special - self.keep))
            }
        }
    }
}

/// How much memory the operation wants between its launches, in bytes.
pub fn workspace_bytes(batch: usize, tokens: usize) -> usize {
    // The selection's plan; densities; best, far and who of each tile.
    let plan = 4 * (tokens + 2) + 12 * tokens;
    let tiles = tokens.div_ceil(TILE);
    batch.saturating_mul(plan + 4 * tokens + 12 * tiles * tokens)
}

/// What [`cluster_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct ClusterPointers {
    /// The tokens, (B, N, C).
    pub x: Strided<DevicePointer>,
    /// The class token's softmax row, (B, H, N) of `f32`: the mean over heads decides.
    pub class_scores: Strided<DevicePointer>,
    /// What is done with them.
    pub decoupling: Decoupling,
    /// [`workspace_bytes`], 4-byte aligned.
    pub workspace: DevicePointer,
    /// Where the plan goes.
    pub plan: PlanPointers,
}

/// Writes the plan of decoupled tokens `x` (B, N, C) by class scores (B, H, N), whose mean over heads decides who is attentive.
/// `workspace` holds [`workspace_bytes`]; what it holds before and after does not matter.
///
/// # Errors
/// As [`cluster_raw`], and when an argument lives in another context.
pub fn cluster<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    class_scores: &Strided<CudaView<'_, f32>>,
    decoupling: Decoupling,
    workspace: &mut CudaViewMut<'_, u32>,
    plan: &mut DevicePlan,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let words = workspace_bytes(x.shape[0], x.shape[1]) / 4;
    let (x, _x) = borrow.read("x", x)?;
    let (class_scores, _scores) = borrow.read("class scores", class_scores)?;
    let (workspace, _workspace) = borrow.write_row("workspace", workspace, words)?;
    let (plan, _plan) = plan.write(OP, "plan", device, stream)?;
    let pointers = ClusterPointers { x, class_scores, decoupling, workspace, plan };
    // SAFETY: tokens and scores lie within their views and the workspace has its length (checked above), in the device's
    // context; the plan owns arrays of its extents; what is written is borrowed mutably.
    unsafe { cluster_raw(device, stream, T::DTYPE, &pointers) }
}

/// [`cluster`] over device pointers. Writes the plan of decoupled tokens: the attentive ones by score, and what the others become. Three launches where the
/// others join attentive tokens (MSTM), four where they form clusters (BAT), the selection of the attentive ones included.
///
/// # Errors
/// [`Error::Argument`] when shapes, counts or the plan's extents do not fit, or there are more than [`MOST_TOKENS`] tokens or
/// [`MOST_WIDTH`] values a token; [`Error::Launch`] when the driver refuses.
///
/// # Safety
/// On `stream`, until it has passed these launches: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read; the plan's arrays must have its extents; nobody
/// else may write what is read, nor touch what is written; nothing that is written may overlap anything else.
pub unsafe fn cluster_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    pointers: &ClusterPointers,
) -> Result<()> {
    let ClusterPointers { x, class_scores, decoupling, workspace, plan } = pointers;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    class_scores.check(OP, "class scores", DType::F32)?;
    plan.check(OP, "plan")?;
    check_pointer(OP, "workspace", *workspace, 4)?;
    let [batch, tokens, width] = x.shape;
    let heads = class_scores.shape[1];
    class_scores.expect_shape(OP, "class scores", [batch, heads, tokens])?;
    if tokens > MOST_TOKENS || width > MOST_WIDTH {
        return Err(Error::argument(
            OP,
            format!(
                "{tokens} tokens of {width} values, the kernels take up to {MOST_TOKENS} of up to {MOST_WIDTH}"
            ),
        ));
    }
    let &Decoupling { special, keep, inattentive } = decoupling;
    let out = decoupling.tokens_out(tokens)?;
    if (plan.batch, plan.tokens_in, plan.tokens_out) != (batch, tokens, out) {
        return Err(Error::argument(
            OP,
            format!(
                "the plan holds {} images of {} tokens that become {}, expected {batch} of {tokens} that become {out}",
                plan.batch, plan.tokens_in, plan.tokens_out
            ),
        ));
    }
    let rest = tokens - special - keep;
    let (pairs, clusters) = decoupling.counts(tokens);

    // The selection writes all of its plan, of which the order is wanted.
    let selection = Selection { special, keep, fuse: true };
    let selected = selection.tokens_out(tokens)?;
    let place = |words: usize| workspace + (4 * words) as DevicePointer;
    let (offsets, count) = (batch * (tokens + 2), batch * tokens);
    let order = PlanPointers {
        batch,
        tokens_in: tokens,
        tokens_out: selected,
        offsets: place(0),
        members: place(offsets),
        weights: place(offsets + count),
        groups: place(offsets + 2 * count),
    };
    // SAFETY: the caller's promise; the workspace holds a plan of up to `tokens + 1` tokens.
    unsafe { select_raw(device, stream, DType::F32, class_scores, selection, &order) }?;

    let tiles_of = |count: usize| count.div_ceil(TILE);
    let (peaks, neighbours) = match inattentive {
        Inattentive::Join => (false, 0),
        Inattentive::Peaks { neighbours, .. } => (true, neighbours),
    };
    let (rows, tiles) = if peaks {
        (tiles_of((keep / 2).max(rest)), tiles_of(keep.div_ceil(2).max(rest)))
    } else {
        (tiles_of(rest), tiles_of(keep))
    };
    let scratch = offsets + 3 * count;
    let of_tiles = batch * tiles * tokens;
    let params = Params {
        x: x.data,
        scores: class_scores.data,
        order: order.members,
        density: place(scratch),
        best: place(scratch + count),
        far: place(scratch + count + of_tiles),
        who: place(scratch + count + 2 * of_tiles),
        offsets: plan.offsets,
        members: plan.members,
        weights: plan.weights,
        groups: plan.groups,
        x_strides: x.kernel_strides(),
        score_strides: class_scores.kernel_strides(),
        heads: int(OP, "heads", heads)?,
        tokens: int(OP, "tokens", tokens)?,
        width: int(OP, "values of a token", width)?,
        special: int(OP, "special tokens", special)?,
        keep: int(OP, "tokens to keep", keep)?,
        pairs: int(OP, "pairs", pairs)?,
        clusters: int(OP, "clusters", clusters)?,
        neighbours: int(OP, "neighbours", neighbours)?,
        peaks: i32::from(peaks),
        tiles: int(OP, "tiles", tiles)?,
        rows: int(OP, "tiles", rows)?,
        reserved: 0,
    };
    let kernels = &device.kernels().cluster;
    // Four values an access.
    let narrow = usize::from(!(x.aligned(dtype, 4 * dtype.bytes())));
    let images = int(OP, "images", batch)?.unsigned_abs();
    if peaks && rest > 0 && clusters > 0 {
        let (kernel, shape) = if neighbours == 0 {
            (&kernels.density, Shape { grid: images, block: PLAN_THREADS, shared_bytes: 0 })
        } else {
            let blocks = int(OP, "blocks", batch.saturating_mul(rest.div_ceil(NEAR_ROWS)))?.unsigned_abs();
            let shared_bytes = (4 * NEAR_ROWS * rest) as u32;
            (&kernels.nearest, Shape { grid: blocks, block: PAIR_THREADS, shared_bytes })
        };
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it, and the stream for the order.
        unsafe { launch(stream, kernel[narrow].pick(dtype), shape, &params) }?;
    }
    let roles = if peaks && rest > 0 && clusters > 0 { 2 } else { 1 };
    if rows * tiles > 0 && (pairs > 0 || roles == 2 || !peaks) {
        let blocks = [images, (rows * tiles) as u32, roles];
        let grid = Grid { blocks, block: PAIR_THREADS, shared_bytes: 0 };
        // SAFETY: as above.
        unsafe { launch_grid(stream, kernels.pairs[narrow].pick(dtype), grid, &params) }?;
    }
    let shared_bytes = (PLAN_BYTES * tokens + 8) as u32;
    let shape = Shape { grid: images, block: PLAN_THREADS, shared_bytes };
    // SAFETY: as above.
    unsafe { launch(stream, kernels.plan[narrow].pick(dtype), shape, &params) }
}
