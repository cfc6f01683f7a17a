//! The adaptive frequency filter (kernels/frequency.cu, `kernels/frequency_mma.cu`).

mod matrix;
mod plan;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtrMut, DeviceRepr, DeviceSlice};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Kernel, Module, TypedKernels},
    launch::{Divisor, Shape, int, launch},
    nvtx,
    select::permit,
    strided::check_pointer,
};
use crate::{Error, Result, backend::Frequency, model::Activation};
use matrix::{MatrixPlan, STEPS, base, factors};
use plan::{Plan, TILES, radices};

const OP: &str = "frequency";

/// Threads of the staged transforms.
const STAGED_THREADS: usize = 256;

/// The longest side of a grid.
pub const LONGEST_SIDE: usize = 128;
/// `Axis` of kernels/include/fourier.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Axis {
    length: i32,
    lines: i32,
    count: Divisor,
    inner: Divisor,
    outer_step: i32,
    inner_step: i32,
    step: i32,
    base: i32,
    radices: u64,
}

/// `FrequencyParams` of kernels/include/frequency.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    residual: DevicePointer,
    w1: DevicePointer,
    b1: DevicePointer,
    w2: DevicePointer,
    b2: DevicePointer,
    out: DevicePointer,
    spectrum: DevicePointer,
    x_at: [i64; 3],
    residual_at: [i64; 3],
    out_at: [i64; 3],
    rows: Axis,
    columns: Axis,
    width: Divisor,
    pairs: Divisor,
    positions: Divisor,
    interior: Divisor,
    height: i32,
    channels: i32,
    groups: i32,
    row: i32,
    chunk: i32,
    tiles: i32,
    scratch: i32,
    relu: i32,
    planar: i32,
    together: i32,
    weights_together: i32,
    threshold: f32,
    scale: f32,
    unused: i32,
}

const _: () = assert!(
    size_of::<Params>() == 352
        && std::mem::offset_of!(Params, x_at) == 64
        && std::mem::offset_of!(Params, rows) == 136
        && std::mem::offset_of!(Params, columns) == 192
        && std::mem::offset_of!(Params, width) == 248
        && std::mem::offset_of!(Params, height) == 296
        && std::mem::offset_of!(Params, scale) == 344
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/frequency.cu, those of the mask network in the order of [`TILES`], and of `kernels/frequency_mma.cu`, in
/// the order of [`STEPS`], for f16 and for bf16.
#[derive(Debug)]
pub(super) struct FrequencyKernels {
    resident: [TypedKernels; 2],
    bins: [TypedKernels; 2],
    forward: TypedKernels,
    inverse: TypedKernels,
    matrix: [Vec<Kernel>; 2],
}

impl FrequencyKernels {
    pub(super) fn load(module: &Module, matrix: &Module) -> Result<Self> {
        let load =
            |prefix: &str, tile: usize| TypedKernels::load_variant(module, prefix, &format!("_{tile}"));
        let of_matrix = |dtype: DType| -> Result<Vec<Kernel>> {
            STEPS.iter().map(|steps| matrix.kernel(format!("fv_frequency_mma_{dtype}_{steps}"))).collect()
        };
        let [narrow, wide] = TILES;
        Ok(Self {
            resident: [load("fv_frequency", narrow)?, load("fv_frequency", wide)?],
            bins: [load("fv_frequency_bins", narrow)?, load("fv_frequency_bins", wide)?],
            forward: TypedKernels::load_variant(module, "fv_frequency_forward", "")?,
            inverse: TypedKernels::load_variant(module, "fv_frequency_inverse", "")?,
            matrix: [of_matrix(DType::F16)?, of_matrix(DType::Bf16)?],
        })
    }

    /// Lets the kernels have all the shared memory that a block may have.
    pub(super) fn permit_shared_memory(&self, device: &str, limit: i32) -> Result<()> {
        let bytes = usize::try_from(limit).unwrap_or_default();
        let kernels = self.resident.iter().chain(&self.bins).chain([&self.forward, &self.inverse]);
        let kernels = kernels.flat_map(TypedKernels::all).chain(self.matrix.iter().flatten());
        kernels.into_iter().try_for_each(|kernel| permit(kernel, bytes, device, limit))
    }
}

/// Which axis of a feature map is contiguous.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// (B, H·W, C): the channels of a position.
    #[default]
    Tokens,
    /// (B, C, H·W): the positions of a channel, as in PyTorch's NCHW.
    Planes,
}

/// How large a filter's operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrequencyShape {
    /// Images B.
    pub batch: usize,
    /// Rows and columns of the feature map, up to [`LONGEST_SIDE`].
    pub grid: [usize; 2],
    /// Channels C of it.
    pub channels: usize,
    /// Groups G of the filter.
    pub groups: usize,
}

/// What [`frequency`] reads.
#[derive(Debug)]
pub struct Filtering<'a, T> {
    /// The feature map, in `layout`.
    pub x: Strided<CudaView<'a, T>>,
    /// Added to the result, in `layout` too.
    pub residual: Option<Strided<CudaView<'a, T>>>,
    /// Which axis of these and of the output is contiguous.
    pub layout: Layout,
    /// Rows and columns of the feature map.
    pub grid: [usize; 2],
    /// Groups of the filter.
    pub groups: usize,
    /// (2, G, S, S) and (2, G, S), without gaps.
    pub filter: Frequency<CudaView<'a, T>>,
}

/// What [`frequency_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct FrequencyPointers {
    /// The feature map, in `layout`.
    pub x: Strided<DevicePointer>,
    /// Added to the result, in `layout` too.
    pub residual: Option<Strided<DevicePointer>>,
    /// Which axis of these and of the output is contiguous.
    pub layout: Layout,
    /// Rows and columns of the feature map.
    pub grid: [usize; 2],
    /// Groups of the filter.
    pub groups: usize,
    /// (2, G, S, S) and (2, G, S), without gaps.
    pub filter: Frequency<DevicePointer>,
    /// Where the result goes, in `layout`.
    pub out: Strided<DevicePointer>,
    /// Scratch memory, a multiple of 8; 0 without any.
    pub workspace: DevicePointer,
    /// Its size.
    pub workspace_bytes: usize,
}

/// Bytes of scratch memory that [`frequency`] needs on `device`: 0 where a group's spectrum fits a block's shared memory.
///
/// # Errors
/// [`Error::Argument`] when the shape is impossible or too large.
pub fn workspace_bytes(device: &Device, shape: FrequencyShape) -> Result<usize> {
    let plan = Plan::new(shape, device.shared_bytes())?;
    Ok(if plan.resident { 0 } else { plan.spectrum_bytes })
}

/// `x + residual + inverse(mask(X)·X)`, as [`GridBackend::frequency`](crate::backend::GridBackend::frequency) says, into `out`.
///
/// One launch where a group's spectrum fits a block's shared memory, else three, with the spectrum in `workspace`
/// ([`workspace_bytes`]). In f16 and bf16, groups of 4 to 40 channels take tensor cores, with spectra, hidden values and matrices as
/// sums of two bf16: as exact as f32 to 1.1e-5 of the largest result.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, a side of the grid exceeds [`LONGEST_SIDE`], a plane of the grid does not fit
/// shared memory, the workspace is too small, or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn frequency<T: Element>(
    device: &Device,
    stream: &CudaStream,
    filtering: &Filtering<'_, T>,
    out: &mut Strided<CudaViewMut<'_, T>>,
    workspace: &mut CudaViewMut<'_, u8>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let Filtering { layout, grid, groups, filter, .. } = filtering;
    let (x, _x) = borrow.read("x", &filtering.x)?;
    let residual = filtering.residual.as_ref().map(|r| borrow.read("residual", r)).transpose()?;
    let (residual, _residual) = residual.unzip();
    let width = shape_of(&x, *layout, *grid, *groups)?.group_width()?;
    let weights = width.saturating_mul(width).saturating_mul(2 * groups);
    let (w1, _w1) = borrow.read_row("w1", &filter.w1, weights)?;
    let (b1, _b1) = borrow.read_row("b1", &filter.b1, 2 * groups * width)?;
    let (w2, _w2) = borrow.read_row("w2", &filter.w2, weights)?;
    let (b2, _b2) = borrow.read_row("b2", &filter.b2, 2 * groups * width)?;
    let (out, _out) = borrow.write("out", out)?;
    device.check_context(OP, "workspace", workspace.stream().context())?;
    let bytes = workspace.len();
    let (scratch, _scratch) = workspace.device_ptr_mut(stream);
    let pointers = FrequencyPointers {
        x,
        residual,
        layout: *layout,
        grid: *grid,
        groups: *groups,
        filter: Frequency { w1, b1, w2, b2, activation: filter.activation, threshold: filter.threshold },
        out,
        workspace: if bytes == 0 { 0 } else { scratch },
        workspace_bytes: bytes,
    };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launches; `out` and the workspace are borrowed mutably, so they are none of the others.
    unsafe { frequency_raw(device, stream, T::DTYPE, &pointers) }
}

/// [`frequency`] over device pointers.
///
/// # Errors
/// As [`frequency`].
///
/// # Safety
/// On `stream`, until it has passed these launches: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and `dtype` lies, initialised where it is read; nobody else may write what is read, nor touch
/// `out` and the workspace, which must overlap no other tensor.
pub unsafe fn frequency_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &FrequencyPointers,
) -> Result<()> {
    let FrequencyPointers { x, residual, layout, grid, groups, filter, out, .. } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    let shape = shape_of(x, *layout, *grid, *groups)?;
    let width = shape.group_width()?;
    out.check_output(OP, "out", dtype)?;
    out.expect_shape(OP, "out", x.shape)?;
    if let Some(residual) = residual {
        residual.check(OP, "residual", dtype)?;
        residual.expect_shape(OP, "residual", x.shape)?;
    }
    let parts = [("w1", filter.w1), ("b1", filter.b1), ("w2", filter.w2), ("b2", filter.b2)];
    parts.iter().try_for_each(|(name, part)| check_pointer(OP, name, *part, dtype.bytes()))?;
    let relu = match filter.activation {
        Activation::Silu => 0,
        Activation::Relu => 1,
        other => {
            return Err(Error::argument(
                OP,
                format!("the activation is {}; the filter takes silu or relu", other.name()),
            ));
        }
    };
    if !(filter.threshold >= 0.0 && filter.threshold.is_finite()) {
        return Err(Error::argument(
            OP,
            format!("the threshold {} is not a number from 0 on", filter.threshold),
        ));
    }

    let plan = Plan::new(shape, device.shared_bytes())?;
    let products = MatrixPlan::new(shape, dtype, device.shared_bytes())?;
    let resident = plan.resident || products.is_some();
    let tensors = [Some(x), residual.as_ref(), Some(out)];
    let aligned = |values: usize| {
        tensors.into_iter().flatten().all(|tensor| tensor.aligned(dtype, values * dtype.bytes()))
    };
    let [height, columns] = *grid;
    // How many values travel in one access, and what is counted in such units.
    let (counted, widest): (usize, &[usize]) = match (layout, products) {
        (Layout::Tokens, Some(_)) => (width, &[8, 4, 2]),
        (Layout::Planes, Some(_)) => (columns, &[2]),
        (Layout::Tokens, None) => (width, &[2]),
        (Layout::Planes, None) => (columns, &[]),
    };
    let together =
        widest.iter().copied().find(|&values| counted.is_multiple_of(values) && aligned(values)).unwrap_or(0);
    let at = |tensor: &Strided<DevicePointer>| {
        let [image, second] = tensor.kernel_strides();
        match layout {
            Layout::Tokens => [image, second, 1],
            Layout::Planes => [image, 1, second],
        }
    };
    let positions = height * columns;
    let row = plan.row;
    let pairs = width.div_ceil(2);
    let planes = if resident { pairs } else { 1 };
    let plane = products.map_or(height * row, |products| products.plane);
    let along_width = Axis::new(columns, planes, height, [plane, row, 1], products.is_some())?;
    let along_height = Axis::new(height, planes, columns, [plane, 1, row], products.is_some())?;
    // What one block moves a position: a group's channels, or two of them where the work is staged.
    let moved = if resident { width } else { width.min(2) };
    let units = match (layout, products) {
        (Layout::Planes, Some(_)) if together > 0 => positions / together,
        _ => moved / together.max(1),
    };
    let weights_together = width.is_multiple_of(2)
        && [filter.w1, filter.w2].iter().all(|at| at.is_multiple_of(2 * dtype.bytes() as u64));
    let params = Params {
        x: x.data,
        residual: residual.map_or(0, |residual| residual.data),
        w1: filter.w1,
        b1: filter.b1,
        w2: filter.w2,
        b2: filter.b2,
        out: out.data,
        x_at: at(x),
        residual_at: residual.as_ref().map_or([0; 3], at),
        out_at: at(out),
        rows: along_width,
        columns: along_height,
        width: Divisor::new(OP, "columns", columns)?,
        pairs: Divisor::new(OP, "channels", units)?,
        positions: Divisor::new(OP, "positions", positions)?,
        interior: Divisor::new(OP, "columns", columns.saturating_sub(1) / 2)?,
        height: int(OP, "rows", height)?,
        channels: int(OP, "channels of a group", width)?,
        groups: int(OP, "groups", *groups)?,
        row: int(OP, "columns", row)?,
        chunk: int(OP, "bins", plan.chunk)?,
        tiles: int(OP, "tiles", plan.tiles)?,
        scratch: int(OP, "values", products.map_or(plan.scratch, |products| products.scratch))?,
        relu,
        planar: i32::from(*layout == Layout::Planes),
        together: int(OP, "values", together)?,
        weights_together: i32::from(weights_together),
        threshold: filter.threshold,
        scale: (0.5 / (positions as f64).sqrt()) as f32,
        ..Params::zeroed()
    };
    let kernels = &device.kernels().frequency;
    let size = |n: usize| int(OP, "blocks", n).map(i32::unsigned_abs);
    let blocks = shape.batch.saturating_mul(*groups);
    let run = |kernel: &Kernel, blocks: usize, threads: usize, bytes: usize, params: &Params| {
        let shape = Shape { grid: size(blocks)?, block: size(threads)?, shared_bytes: size(bytes)? };
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, shape, params) }
    };
    if let Some(MatrixPlan { steps, threads, shared_bytes, .. }) = products {
        let kernel = &kernels.matrix[usize::from(dtype == DType::Bf16)][steps];
        return run(kernel, blocks, threads, shared_bytes, &params);
    }
    if plan.resident {
        return run(
            kernels.resident[plan.tile].pick(dtype),
            blocks,
            plan.threads,
            plan.shared_bytes,
            &params,
        );
    }
    if arguments.workspace_bytes < plan.spectrum_bytes {
        return Err(Error::argument(
            OP,
            format!(
                "the workspace holds {} bytes, {} are needed (`workspace_bytes`)",
                arguments.workspace_bytes, plan.spectrum_bytes
            ),
        ));
    }
    check_pointer(OP, "workspace", arguments.workspace, 8)?;
    let params = Params { spectrum: arguments.workspace, ..params };
    let transform = Params { scratch: int(OP, "values", plan.transform_scratch)?, ..params };
    let chunks = plan.bins.div_ceil(plan.chunk);
    let transforms = blocks.saturating_mul(pairs);
    run(kernels.forward.pick(dtype), transforms, STAGED_THREADS, plan.transform_bytes, &transform)?;
    let bins = kernels.bins[plan.tile].pick(dtype);
    run(bins, blocks.saturating_mul(chunks), plan.threads, plan.shared_bytes, &params)?;
    run(kernels.inverse.pick(dtype), transforms, STAGED_THREADS, plan.transform_bytes, &transform)
}

/// What the operands' extents say.
fn shape_of(
    x: &Strided<DevicePointer>,
    layout: Layout,
    grid: [usize; 2],
    groups: usize,
) -> Result<FrequencyShape> {
    let [batch, second, third] = x.shape;
    let (positions, channels) = match layout {
        Layout::Tokens => (second, third),
        Layout::Planes => (third, second),
    };
    if grid[0].checked_mul(grid[1]) != Some(positions) {
        return Err(Error::argument(
            OP,
            format!(
                "x has shape {:?}: {positions} positions are no grid of {}x{}",
                x.shape, grid[0], grid[1]
            ),
        ));
    }
    Ok(FrequencyShape { batch, grid, channels, groups })
}

impl FrequencyShape {
    fn group_width(&self) -> Result<usize> {
        let Self { channels, groups, .. } = *self;
        if groups == 0 || channels == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::argument(OP, format!("{channels} channels are not {groups} groups")));
        }
        Ok(channels / groups)
    }
}

impl Axis {
    /// `lines` in each of `planes`, their steps from plane to plane, from line to line, from value to value.
    fn new(length: usize, planes: usize, lines: usize, steps: [usize; 3], products: bool) -> Result<Self> {
        let (factors, base) = if products { (factors(length), base(length)) } else { (radices(length), 0) };
        let radices = factors.iter().rev().fold(0, |all, &radix| all << 8 | radix as u64);
        let [outer_step, inner_step, step] = steps;
        Ok(Self {
            length: int(OP, "values", length)?,
            lines: int(OP, "lines", planes * lines)?,
            count: Divisor::new(OP, "lines", planes * lines)?,
            inner: Divisor::new(OP, "lines", lines)?,
            outer_step: int(OP, "values", outer_step)?,
            inner_step: int(OP, "values", inner_step)?,
            step: int(OP, "values", step)?,
            base: int(OP, "values", base)?,
            radices,
        })
    }
}
