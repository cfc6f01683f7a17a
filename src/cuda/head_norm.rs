//! LayerNorm over every head of the queries or keys, in place (`kernels/head_norm.cu`).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{Divisor, ITEM_THREADS, Shape, images_a_launch, int, launch},
    nvtx,
    strided::{WIDE_BYTES, check_pointer, is_wide},
};
use crate::{Error, Result, backend::Norm};

const OP: &str = "head_norm";

/// Values of the widest head of each kernel with 16-byte accesses.
const WIDEST: [usize; 3] = [32, 64, 128];

/// `HeadNormParams` of `kernels/head_norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    weight: DevicePointer,
    bias: DevicePointer,
    strides: [i64; 2],
    heads: Divisor,
    tokens: Divisor,
    rows: i32,
    width: i32,
    eps: f32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 80
        && std::mem::offset_of!(Params, strides) == 24
        && std::mem::offset_of!(Params, heads) == 40
        && std::mem::offset_of!(Params, rows) == 64
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of `kernels/head_norm.cu`.
#[derive(Debug)]
pub(super) struct HeadNormKernels {
    /// In the order of [`WIDEST`].
    wide: [TypedKernels; 3],
    narrow: TypedKernels,
}

impl HeadNormKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |suffix: &str| TypedKernels::load_variant(module, "fv_head_norm", suffix);
        Ok(Self { wide: [load("_32")?, load("_64")?, load("_128")?], narrow: load("_narrow")? })
    }
}

/// What [`head_norm_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct HeadNorm {
    /// (B, N, parts·H·D) with parts in the order query, key, value.
    pub packed: Strided<DevicePointer>,
    /// The part to normalise: 0 for queries, 1 for keys.
    pub part: usize,
    /// H.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
    /// Weight and bias, (D) each.
    pub norm: Norm<DevicePointer>,
}

/// LayerNorm over each of the `heads` heads of part `part` (0 query, 1 key) of `packed` (B, N, parts·H·D), in place of that
/// part. D is the length of the norm's weight.
///
/// # Errors
/// [`Error::Argument`] when the rows have no such part, D exceeds 128, shapes do not fit, or an argument lives in another
/// context; [`Error::Launch`] when the driver refuses.
pub fn head_norm<T: Element>(
    device: &Device,
    stream: &CudaStream,
    packed: &mut Strided<CudaViewMut<'_, T>>,
    part: usize,
    heads: usize,
    norm: &Norm<CudaView<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let head_dim = norm.weight.len();
    let (packed, _packed) = borrow.write("packed heads", packed)?;
    let (norm, _norm) = borrow.read_norm(norm, head_dim)?;
    let arguments = HeadNorm { packed, part, heads, head_dim, norm };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; `packed` is borrowed mutably, so it is none of the others.
    unsafe { head_norm_raw(device, stream, T::DTYPE, &arguments) }
}

/// [`head_norm`] over device pointers.
///
/// # Errors
/// As [`head_norm`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and `dtype` lies, initialised; nobody else may write what is read, nor touch the part, which
/// must not overlap weight or bias.
pub unsafe fn head_norm_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &HeadNorm,
) -> Result<()> {
    let HeadNorm { packed, part, heads, head_dim, norm } = arguments;
    let (part, heads, head_dim) = (*part, *heads, *head_dim);
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    packed.check_output(OP, "packed heads", dtype)?;
    let [batch, tokens, width] = packed.shape;
    let part_width = heads.saturating_mul(head_dim);
    if part_width == 0 || width % part_width != 0 || part >= width / part_width {
        return Err(Error::argument(
            OP,
            format!("rows of {width} values have no part {part} of {heads} heads of {head_dim}"),
        ));
    }
    let Some(narrowest) = WIDEST.iter().position(|&widest| head_dim <= widest) else {
        return Err(Error::argument(
            OP,
            format!("heads have {head_dim} values, the kernels hold up to {}", WIDEST[WIDEST.len() - 1]),
        ));
    };
    check_pointer(OP, "weight", norm.weight, dtype.bytes())?;
    norm.bias.map_or(Ok(()), |bias| check_pointer(OP, "bias", bias, dtype.bytes()))?;

    let x = Strided {
        // Within a row of `packed`, which is addressable.
        data: packed.data + (part * part_width * dtype.bytes()) as u64,
        shape: [batch, tokens, part_width],
        strides: packed.strides,
    };
    let wide = x.wide(dtype)
        && (head_dim * dtype.bytes()).is_multiple_of(WIDE_BYTES)
        && is_wide(norm.weight)
        && norm.bias.is_none_or(is_wide);
    let kernels = &device.kernels().head_norm;
    let (kernel, lanes) = if wide {
        (&kernels.wide[narrowest], WIDEST[narrowest] * dtype.bytes() / WIDE_BYTES)
    } else {
        (&kernels.narrow, 32)
    };
    let mut params = Params {
        x: x.data,
        weight: norm.weight,
        bias: norm.bias.unwrap_or(0),
        strides: x.kernel_strides(),
        heads: Divisor::new(OP, "heads", heads)?,
        tokens: Divisor::new(OP, "tokens", tokens)?,
        rows: 0,
        width: int(OP, "values a head", head_dim)?,
        eps: norm.eps,
        reserved: 0,
    };
    let rows = tokens.saturating_mul(heads);
    let together = images_a_launch(OP, rows)?;
    for first in (0..batch).step_by(together) {
        let rows = rows * together.min(batch - first);
        params.x = x.image(first, dtype);
        params.rows = int(OP, "heads of all tokens", rows)?;
        let grid = rows.div_ceil(ITEM_THREADS / lanes) as u32;
        let shape = Shape { grid, block: ITEM_THREADS as u32, shared_bytes: 0 };
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel.pick(dtype), shape, &params) }?;
    }
    Ok(())
}
