//! Dropping and growing the weights of sparse layers (kernels/connectivity.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr, result};

use super::{
    DType, Device, DevicePointer, Element,
    borrow::Borrow,
    device::driver,
    image::{Kernel, Module, TypedKernels},
    launch::{Shape, int, launch},
    nvtx, record,
    strided::{check_pointer, is_wide},
};
use crate::{Error, Result};
#[cfg(doc)]
use crate::{connectivity::Update, reference};

const OP: &str = "drop_and_grow";

/// The most weights of a layer.
pub const MOST_WEIGHTS: usize = (1 << 30) - 1;

/// Threads of a block, of the histograms and of the write.
const THREADS: usize = 768;
const LOCATE_THREADS: u32 = 1024;
const WRITE_THREADS: usize = 256;
/// Histograms want whole rows of 64 KiB to count for: fewer blocks where there is less.
const VALUES_A_BLOCK: usize = 1 << 14;

const STATE_BYTES: usize = 64;
const HIGH_BYTES: usize = 4 << 14;
const LOW_BYTES: usize = 4 << 17;

/// `ConnectivityParams` of kernels/connectivity.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    weight: DevicePointer,
    gradient: DevicePointer,
    mask: DevicePointer,
    survivors: DevicePointer,
    state: DevicePointer,
    rate: f64,
    count: i32,
    step: i32,
}

const _: () = assert!(
    size_of::<Params>() == 56
        && std::mem::offset_of!(Params, rate) == 40
        && std::mem::offset_of!(Params, count) == 48
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/connectivity.cu, with 16-byte accesses and with narrow ones.
#[derive(Debug)]
pub(super) struct ConnectivityKernels {
    /// Upper bits of weights, their lower bits, upper and lower bits of gradients.
    histograms: [[TypedKernels; 2]; 4],
    write: [TypedKernels; 2],
    locate: Kernel,
}

impl ConnectivityKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |prefix: &str| TypedKernels::wide_and_narrow(module, prefix, "");
        Ok(Self {
            histograms: [
                load("fv_drop_high")?,
                load("fv_drop_low")?,
                load("fv_grow_high")?,
                load("fv_grow_low")?,
            ],
            write: load("fv_grow_write")?,
            locate: module.kernel("fv_connectivity_locate".to_owned())?,
        })
    }

    /// The kernels with dynamic shared memory, and its bytes.
    pub(super) fn dynamic(&self) -> impl Iterator<Item = (&Kernel, usize)> {
        let upper = [&self.histograms[0], &self.histograms[2]].into_iter().flatten();
        upper.flat_map(TypedKernels::all).map(|kernel| (kernel, HIGH_BYTES))
    }
}

/// Bytes of the workspace that a layer of `count` weights takes.
///
/// # Errors
/// [`Error::Argument`] when there are more than [`MOST_WEIGHTS`].
pub fn workspace_bytes(count: usize) -> Result<usize> {
    if count > MOST_WEIGHTS {
        return Err(Error::argument(OP, format!("{count} weights of a layer, at most {MOST_WEIGHTS}")));
    }
    // A word a tile of the narrowest write, then a byte a weight.
    Ok(cleared_bytes(count) + count)
}

/// What must be zero of it, a multiple of 16.
fn cleared_bytes(count: usize) -> usize {
    STATE_BYTES + HIGH_BYTES + LOW_BYTES + (4 * count.div_ceil(WRITE_THREADS)).next_multiple_of(16)
}

/// Drops active weights of the smallest magnitude and grows as many where the gradient is largest:
/// [`reference::connectivity::drop_and_grow`], bit for bit, in nine launches. Each selection takes three passes over its values.
///
/// `weight` and `gradient` are a layer's values in order, `mask` a byte each (0: not there; becomes 0 or 1). `rate` is the
/// share that is dropped. Of `workspace` ([`workspace_bytes`], any contents) the first three words say afterwards how many weights
/// were active, how many were to be dropped, and how many were ([`Update`]).
///
/// # Errors
/// [`Error::Argument`] when lengths do not fit, `rate` is no share, or an argument lives in another context; [`Error::Launch`]
/// when the driver refuses.
pub fn drop_and_grow<T: Element>(
    device: &Device,
    stream: &CudaStream,
    weight: &mut CudaViewMut<'_, T>,
    gradient: &CudaView<'_, T>,
    mask: &mut CudaViewMut<'_, u8>,
    rate: f64,
    workspace: &mut CudaViewMut<'_, u8>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let count = weight.len();
    let (gradient, _gradient) = borrow.read_row("gradient", gradient, count)?;
    let (mask, _mask) = borrow.write_row("mask", mask, count)?;
    let (workspace, _workspace) = borrow.write_row("workspace", workspace, workspace_bytes(count)?)?;
    let (weight, _weight) = borrow.write_row("weight", weight, count)?;
    let arguments = DropAndGrow { weight, gradient, mask, workspace, count, rate };
    // SAFETY: every argument has as many values as its view, which lives in the device's context and whose guard outlives the
    // launches; all but the gradient are borrowed mutably, so none overlaps another.
    unsafe { drop_and_grow_raw(device, stream, T::DTYPE, &arguments) }
}

/// What [`drop_and_grow_raw`] reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct DropAndGrow {
    /// The weights.
    pub weight: DevicePointer,
    /// The gradient of the loss with respect to the masked weights.
    pub gradient: DevicePointer,
    /// A byte a weight.
    pub mask: DevicePointer,
    /// [`workspace_bytes`] of memory, aligned to 16.
    pub workspace: DevicePointer,
    /// How many weights.
    pub count: usize,
    /// The share to drop.
    pub rate: f64,
}

/// [`drop_and_grow`] over device pointers.
///
/// # Errors
/// As [`drop_and_grow`].
///
/// # Safety
/// On `stream`, until it has passed these launches: every pointer must be an address in the device's memory at which `count`
/// initialised values of `dtype` (a byte each of the mask) lie, the workspace as many bytes as it says; nobody else may write the
/// gradient, nor touch the others, and none may overlap another.
pub unsafe fn drop_and_grow_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &DropAndGrow,
) -> Result<()> {
    let &DropAndGrow { weight, gradient, mask, workspace, count, rate } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    crate::connectivity::removals(rate, 0)?;
    check_pointer(OP, "weight", weight, dtype.bytes())?;
    check_pointer(OP, "gradient", gradient, dtype.bytes())?;
    check_pointer(OP, "workspace", workspace, 16)?;
    workspace_bytes(count)?;
    if count == 0 {
        return Ok(());
    }
    let wide = is_wide(weight) && is_wide(gradient) && mask.is_multiple_of(4);
    let values = if wide { 16 / dtype.bytes() } else { 1 };
    let cleared = cleared_bytes(count);
    if record::launch(stream, |record| "memset".clone_into(&mut record.kernel)) {
        stream.context().bind_to_thread().map_err(|error| driver("binding the context", error))?;
        // SAFETY: the caller vouches for the workspace, which is longer than that.
        unsafe { result::memset_d8_async(workspace, 0, cleared, stream.cu_stream()) }
            .map_err(|error| driver("clearing the workspace", error))?;
    }
    let mut params = Params {
        weight,
        gradient,
        mask,
        survivors: workspace + cleared as u64,
        state: workspace,
        rate,
        count: int(OP, "weights", count)?,
        step: 0,
    };
    let kernels = &device.kernels().connectivity;
    let blocks = count.div_ceil(VALUES_A_BLOCK).min(2 * device.multiprocessors());
    let grid = int(OP, "blocks", blocks)?.unsigned_abs();
    for (step, histogram) in kernels.histograms.iter().enumerate() {
        let shared = if step % 2 == 0 { HIGH_BYTES } else { 0 };
        let shape = Shape { grid, block: THREADS as u32, shared_bytes: shared as u32 };
        params.step = int(OP, "steps", step)?;
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, histogram[usize::from(!wide)].pick(dtype), shape, &params) }?;
        let one = Shape { grid: 1, block: LOCATE_THREADS, shared_bytes: 0 };
        // SAFETY: as above.
        unsafe { launch(stream, &kernels.locate, one, &params) }?;
    }
    let tiles = int(OP, "tiles", count.div_ceil(WRITE_THREADS * values))?.unsigned_abs();
    let shape = Shape { grid: tiles, block: WRITE_THREADS as u32, shared_bytes: 0 };
    // SAFETY: as above.
    unsafe { launch(stream, kernels.write[usize::from(!wide)].pick(dtype), shape, &params) }
}
