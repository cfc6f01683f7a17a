//! Softmax of rows (kernels/softmax.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{Shape, int, launch, length, rows},
    nvtx,
    strided::{check_pointer, is_wide},
};
#[cfg(doc)]
use crate::Error;
use crate::Result;

const OP: &str = "softmax";

/// `SoftmaxParams` of kernels/softmax.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    sizes: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    rows: i32,
    rows_an_image: i32,
    width: i32,
    scale: f32,
}

const _: () = assert!(
    size_of::<Params>() == 72
        && std::mem::offset_of!(Params, x_strides) == 24
        && std::mem::offset_of!(Params, rows) == 56
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// A kernel: suffix of its name, values of its longest row, rows of a block, threads of a block.
type RowsOf = (&'static str, usize, u32, u32);

/// In ascending order of length.
const ROWS: [RowsOf; 4] =
    [("_256", 256, 4, 128), ("_1024", 1024, 1, 128), ("_4096", 4096, 1, 512), ("_long", usize::MAX, 1, 512)];

/// The kernels of kernels/softmax.cu.
#[derive(Debug)]
pub(super) struct SoftmaxKernels([[TypedKernels; 2]; 4]);

impl SoftmaxKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let [a, b, c, d] = ROWS.map(|row| TypedKernels::wide_and_narrow(module, "fv_softmax", row.0));
        Ok(Self([a?, b?, c?, d?]))
    }
}

/// The softmax of each row of `scale·x + log(sizes)`, with `x` and `out` (B, R, N): R rows of scores an image. `sizes` (B, N)
/// are those of the tokens the scores belong to, as in proportional attention (ToMe, section 3.2); a token of size 0 gets
/// nothing. A row of nothing but `-inf` becomes zeros; a NaN or `+inf` makes its row NaN.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn softmax<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    sizes: Option<&CudaView<'_, f32>>,
    scale: f32,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let count = x.shape[0].saturating_mul(x.shape[2]);
    let (x, _x) = borrow.read("x", x)?;
    let sizes = sizes.map(|sizes| borrow.read_row("sizes", sizes, count)).transpose()?;
    let (out, _out) = borrow.write("out", out)?;
    let sizes = sizes.as_ref().map(|sizes| sizes.0);
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; `out` is borrowed mutably, so it is none of the others.
    unsafe { softmax_raw(device, stream, T::DTYPE, &x, sizes, scale, &out) }
}

/// [`softmax()`] in place of `x` (B, R, N).
///
/// # Errors
/// As [`softmax()`].
pub fn softmax_in_place<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &mut Strided<CudaViewMut<'_, T>>,
    sizes: Option<&CudaView<'_, f32>>,
    scale: f32,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let count = x.shape[0].saturating_mul(x.shape[2]);
    let (x, _x) = borrow.write("x", x)?;
    let sizes = sizes.map(|sizes| borrow.read_row("sizes", sizes, count)).transpose()?;
    let sizes = sizes.as_ref().map(|sizes| sizes.0);
    // SAFETY: as in `softmax`; the kernel allows `out` to be `x` itself.
    unsafe { softmax_raw(device, stream, T::DTYPE, &x, sizes, scale, &x) }
}

/// [`softmax()`] and [`softmax_in_place`] over device pointers.
///
/// # Errors
/// As [`softmax()`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies (`sizes` without gaps), initialised where it is read; nobody else may write
/// what is read, nor touch `out`, which must not overlap the others, save that it may be `x` itself with the same strides.
pub unsafe fn softmax_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: &Strided<DevicePointer>,
    sizes: Option<DevicePointer>,
    scale: f32,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    out.check_output(OP, "out", dtype)?;
    out.expect_shape(OP, "out", x.shape)?;
    sizes.map_or(Ok(()), |sizes| check_pointer(OP, "sizes", sizes, size_of::<f32>()))?;

    let [images, rows_an_image, width] = x.shape;
    let wide = x.wide(dtype) && out.wide(dtype) && sizes.is_none_or(is_wide);
    let at = ROWS.iter().position(|row| width <= row.1).unwrap_or(ROWS.len() - 1);
    let (_, _, rows_a_block, block) = ROWS[at];
    let rows = rows(OP, images, rows_an_image)?;
    let params = Params {
        x: x.data,
        sizes: sizes.unwrap_or(0),
        out: out.data,
        x_strides: x.kernel_strides(),
        out_strides: out.kernel_strides(),
        rows,
        rows_an_image: int(OP, "rows", rows_an_image)?,
        width: length(OP, "values a row", width)?,
        scale,
    };
    let shape = Shape { grid: rows.unsigned_abs().div_ceil(rows_a_block), block, shared_bytes: 0 };
    let kernel = device.kernels().softmax.0[at][usize::from(!wide)].pick(dtype);
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, kernel, shape, &params) }
}
