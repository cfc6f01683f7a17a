//! Attention that is linear in the number of tokens, by positive random features (kernels/performer.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{Grid, int, launch_grid, length},
    nvtx,
    strided::check_pointer,
};
use crate::{Error, Result};

const OP: &str = "performer";

/// The widest keys, queries and values.
pub const MOST_WIDTH: usize = 64;
/// The most random features.
pub const MOST_FEATURES: usize = 32;

/// Tokens of a block of the second kernel, and of a partial sum.
const TILE: usize = 64;
const CHUNK: usize = 256;
const THREADS: u32 = 256;
/// The most images of one launch.
const MOST_IMAGES: usize = 65_535;

/// `PerformerParams` of kernels/performer.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    packed: DevicePointer,
    weight: DevicePointer,
    partial: DevicePointer,
    out: DevicePointer,
    packed_strides: [i64; 2],
    out_strides: [i64; 2],
    tokens: i32,
    width: i32,
    features: i32,
    chunks: i32,
    scale: f32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 88
        && std::mem::offset_of!(Params, packed_strides) == 32
        && std::mem::offset_of!(Params, tokens) == 64
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/performer.cu.
#[derive(Debug)]
pub(super) struct PerformerKernels {
    sums: TypedKernels,
    out: TypedKernels,
}

impl PerformerKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |prefix| TypedKernels::load_variant(module, prefix, "");
        Ok(Self { sums: load("fv_performer_sums")?, out: load("fv_performer_out")? })
    }
}

/// How many values of `f32` the operation wants between its two launches, for `batch` images of `tokens` tokens of `width` values
/// with so many random features.
pub fn partial_length(batch: usize, tokens: usize, width: usize, features: usize) -> usize {
    let each = features.saturating_mul(width.saturating_add(1));
    batch.saturating_mul(tokens.div_ceil(CHUNK)).saturating_mul(each)
}

/// What [`performer_raw`] reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct PerformerPointers {
    /// Keys, queries and values in that order, (B, N, 3D).
    pub packed: Strided<DevicePointer>,
    /// The random features, (m, D) without gaps, in `f32` whatever the type.
    pub weight: DevicePointer,
    /// m.
    pub features: usize,
    /// Room for [`partial_length`] values of `f32`, of any content.
    pub partial: DevicePointer,
    /// (B, N, D).
    pub out: Strided<DevicePointer>,
}

/// Attention by random features of `packed` keys, queries and values (B, N, 3D) with `weight` (m, D) in `f32` into `out` (B, N, D):
/// [`Backend::performer`](crate::backend::Backend::performer). Two launches; `partial` holds what passes between them.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, D is above [`MOST_WIDTH`] or m above [`MOST_FEATURES`], or an argument lives in
/// another context; [`Error::Launch`] when the driver refuses.
pub fn performer<T: Element>(
    device: &Device,
    stream: &CudaStream,
    packed: &Strided<CudaView<'_, T>>,
    weight: &CudaView<'_, f32>,
    features: usize,
    partial: &mut CudaViewMut<'_, f32>,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let [batch, tokens, width] = out.shape;
    let (packed, _packed) = borrow.read("packed", packed)?;
    let (weight, _weight) = borrow.read_row("weight", weight, features.saturating_mul(width))?;
    let length = partial_length(batch, tokens, width, features);
    let (partial, _partial) = borrow.write_row("partial", partial, length)?;
    let (out, _out) = borrow.write("out", out)?;
    let arguments = PerformerPointers { packed, weight, features, partial, out };
    // SAFETY: every tensor lies within its view, or has as many values (checked above), and lives in the device's context;
    // what is written is borrowed mutably, so it is none of the others.
    unsafe { performer_raw(device, stream, T::DTYPE, &arguments) }
}

/// [`performer`] over device pointers.
///
/// # Errors
/// As [`performer`].
///
/// # Safety
/// On `stream`, until it has passed both launches: every pointer must be an address in the device's memory at which the tensor of
/// its shape, strides and type lies (`partial` of [`partial_length`] values), initialised where it is read; nobody else may write
/// what is read, nor touch what is written, which must overlap no other tensor.
pub unsafe fn performer_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &PerformerPointers,
) -> Result<()> {
    let &PerformerPointers { packed, weight, features, partial, out } = arguments;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    packed.check(OP, "packed", dtype)?;
    out.check_output(OP, "out", dtype)?;
    let [batch, tokens, width] = out.shape;
    if width > MOST_WIDTH || features == 0 || features > MOST_FEATURES {
        return Err(Error::argument(
            OP,
            format!(
                "{features} random features of {width} values; the kernels take up to {MOST_FEATURES} of up to {MOST_WIDTH}"
            ),
        ));
    }
    packed.expect_shape(OP, "packed", [batch, tokens, 3 * width])?;
    check_pointer(OP, "weight", weight, size_of::<f32>())?;
    check_pointer(OP, "partial", partial, size_of::<f32>())?;

    let chunks = tokens.div_ceil(CHUNK);
    let mut params = Params {
        weight,
        packed_strides: packed.kernel_strides(),
        out_strides: out.kernel_strides(),
        tokens: length(OP, "tokens", tokens)?,
        width: int(OP, "values a token", width)?,
        features: int(OP, "random features", features)?,
        chunks: int(OP, "chunks", chunks)?,
        scale: (features as f64).powf(-0.5) as f32,
        ..Params::zeroed()
    };
    let kernels = &device.kernels().performer;
    let each = partial_length(1, tokens, width, features) * size_of::<f32>();
    for first in (0..batch).step_by(MOST_IMAGES) {
        let images = MOST_IMAGES.min(batch - first) as u32;
        params.packed = packed.image(first, dtype);
        params.out = out.image(first, dtype);
        params.partial = partial + (first * each) as u64;
        for (kernels, blocks) in [(&kernels.sums, chunks), (&kernels.out, tokens.div_ceil(TILE))] {
            let blocks = int(OP, "blocks", blocks)?.unsigned_abs();
            let shape = Grid { blocks: [blocks, images, 1], block: THREADS, shared_bytes: 0 };
            // SAFETY: `Params` is the kernels' struct; the caller vouches for the memory behind it.
            unsafe { launch_grid(stream, kernels.pick(dtype), shape, &params) }?;
        }
    }
    Ok(())
}
