//! 3x3 convolutions of feature maps (kernels/convolution.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Kernel, Module, TypedKernels},
    launch::{Divisor, images_a_launch, int, item_shape, launch},
    nvtx,
    strided::check_pointer,
};
use crate::{
    Error, Result,
    backend::{Convolution, Depthwise},
    model::Activation,
};

const DENSE: &str = "convolution";
const DEPTHWISE: &str = "depthwise";

/// Bytes of an access.
const ACCESS_BYTES: usize = 8;
/// Output rows and columns of a thread of the depthwise kernels.
const STRIP: [usize; 2] = [2, 8];

/// `ConvolutionParams` of kernels/convolution.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    weight: DevicePointer,
    bias: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    units: Divisor,
    columns: Divisor,
    rows: Divisor,
    items: i32,
    height: i32,
    width: i32,
    out_height: i32,
    out_width: i32,
    inputs: i32,
    outputs: i32,
    stride: i32,
    before: i32,
    after: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 144
        && std::mem::offset_of!(Params, x_strides) == 32
        && std::mem::offset_of!(Params, units) == 64
        && std::mem::offset_of!(Params, items) == 100
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The kernels of kernels/convolution.cu, with accesses of 8 bytes and with narrow ones.
#[derive(Debug)]
pub(super) struct ConvolutionKernels {
    dense: [TypedKernels; 2],
    /// By stride.
    depthwise: [[TypedKernels; 2]; 2],
}

impl ConvolutionKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |prefix| TypedKernels::wide_and_narrow(module, prefix, "");
        Ok(Self {
            dense: load("fv_convolution")?,
            depthwise: [load("fv_depthwise")?, load("fv_depthwise_halving")?],
        })
    }
}

/// What [`convolution_raw`] and [`depthwise_raw`] move.
#[derive(Clone, Copy, Debug)]
pub struct MapPointers {
    /// The feature map, (B, H·W, I).
    pub x: Strided<DevicePointer>,
    /// H and W.
    pub grid: [usize; 2],
    /// Where the result goes, (B, H'·W', O).
    pub out: Strided<DevicePointer>,
}

/// A dense 3x3 convolution with padding 1 of `x` (B, H·W, I) on `grid` into `out` (B, H'·W', O), H' = ceil(H/stride).
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, the stride is neither 1 nor 2, the activation is none of `silu`, `relu` and
/// `gelu`, or an argument lives in another context; [`Error::Launch`] when the driver refuses.
pub fn convolution<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    grid: [usize; 2],
    layer: &Convolution<CudaView<'_, T>>,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: DENSE, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (out, _out) = borrow.write("out", out)?;
    let (inputs, outputs) = (x.shape[2], out.shape[2]);
    let values = inputs.saturating_mul(outputs).saturating_mul(9);
    let (weight, _weight) = borrow.read_row("weight", &layer.weight, values)?;
    let (bias, _bias) = borrow.read_row("bias", &layer.bias, outputs)?;
    let layer = Convolution { weight, bias, stride: layer.stride, activation: layer.activation };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; `out` is borrowed mutably, so it is none of the others.
    unsafe { convolution_raw(device, stream, T::DTYPE, &MapPointers { x, grid, out }, &layer) }
}

/// [`convolution`] over device pointers.
///
/// # Errors
/// As [`convolution`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the tensor
/// of its shape, strides and `dtype` lies, initialised where it is read; nobody else may write what is read, nor touch `out`,
/// which must overlap no other tensor.
pub unsafe fn convolution_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    map: &MapPointers,
    layer: &Convolution<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(DENSE);
    let of = Operation { op: DENSE, tile: [1, 1], dtype };
    let activations = [None, layer.activation];
    let (params, wide) = of.params(map, layer.stride, activations, [layer.weight, layer.bias])?;
    let kernel = device.kernels().convolution.dense[usize::from(!wide)].pick(dtype);
    // SAFETY: the caller's promise is the same.
    unsafe { of.run(device, stream, kernel, map, params) }
}

/// A depthwise 3x3 convolution with padding 1 of `x` (B, H·W, C) on `grid` into `out` (B, H'·W', C), H' = ceil(H/stride),
/// with an activation before it and one after it.
///
/// # Errors
/// As [`convolution`].
pub fn depthwise<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    grid: [usize; 2],
    layer: &Depthwise<CudaView<'_, T>>,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: DEPTHWISE, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (out, _out) = borrow.write("out", out)?;
    let channels = x.shape[2];
    let (weight, _weight) = borrow.read_row("weight", &layer.weight, channels.saturating_mul(9))?;
    let (bias, _bias) = borrow.read_row("bias", &layer.bias, channels)?;
    let Depthwise { stride, before, activation, .. } = *layer;
    let layer = Depthwise { weight, bias, stride, before, activation };
    // SAFETY: as in `convolution`.
    unsafe { depthwise_raw(device, stream, T::DTYPE, &MapPointers { x, grid, out }, &layer) }
}

/// [`depthwise`] over device pointers.
///
/// # Errors
/// As [`convolution`].
///
/// # Safety
/// As [`convolution_raw`].
pub unsafe fn depthwise_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    map: &MapPointers,
    layer: &Depthwise<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(DEPTHWISE);
    if map.x.shape[2] != map.out.shape[2] {
        let [inputs, outputs] = [map.x, map.out].map(|tensor| tensor.shape[2]);
        let what = format!("out has {outputs} channels, expected the {inputs} of x");
        return Err(Error::argument(DEPTHWISE, what));
    }
    let of = Operation { op: DEPTHWISE, tile: STRIP, dtype };
    let activations = [layer.before, layer.activation];
    let (params, wide) = of.params(map, layer.stride, activations, [layer.weight, layer.bias])?;
    let kernels = &device.kernels().convolution.depthwise[layer.stride - 1];
    // SAFETY: the caller's promise is the same.
    unsafe { of.run(device, stream, kernels[usize::from(!wide)].pick(dtype), map, params) }
}

/// The grid that a stride of 1 or 2 makes of another.
pub(super) fn strided_grid(grid: [usize; 2], stride: usize) -> [usize; 2] {
    grid.map(|side| side.div_ceil(stride.max(1)))
}

/// One of the two.
#[derive(Clone, Copy)]
struct Operation {
    op: &'static str,
    /// Output rows and columns of a thread.
    tile: [usize; 2],
    dtype: DType,
}

impl Operation {
    /// The parameters of a launch of no images yet, and whether accesses of 8 bytes fit.
    fn params(
        self,
        map: &MapPointers,
        stride: usize,
        activations: [Option<Activation>; 2],
        [weight, bias]: [DevicePointer; 2],
    ) -> Result<(Params, bool)> {
        let Self { op, tile, dtype } = self;
        let MapPointers { x, grid, out } = map;
        x.check(op, "x", dtype)?;
        out.check_output(op, "out", dtype)?;
        if grid[0].checked_mul(grid[1]) != Some(x.shape[1]) {
            let what =
                format!("x has shape {:?}, which is no feature map of {}x{}", x.shape, grid[0], grid[1]);
            return Err(Error::argument(op, what));
        }
        if !matches!(stride, 1 | 2) {
            return Err(Error::argument(op, format!("stride {stride}; 1 and 2 are supported")));
        }
        let [out_height, out_width] = strided_grid(*grid, stride);
        out.expect_shape(op, "out", [x.shape[0], out_height * out_width, out.shape[2]])?;
        check_pointer(op, "weight", weight, dtype.bytes())?;
        check_pointer(op, "bias", bias, dtype.bytes())?;
        let mut kinds = [0; 2];
        for (kind, activation) in kinds.iter_mut().zip(activations) {
            *kind = match activation {
                None => 0,
                Some(Activation::Silu) => 1,
                Some(Activation::Relu) => 2,
                Some(Activation::Gelu) => 3,
                Some(other) => {
                    let what = format!("activation {}; silu, relu and gelu are supported", other.name());
                    return Err(Error::argument(op, what));
                }
            };
        }
        let aligned = |pointer: DevicePointer| pointer.is_multiple_of(ACCESS_BYTES as u64);
        // A dense convolution reads single values of x.
        let wide = out.aligned(dtype, ACCESS_BYTES)
            && (op == DENSE || x.aligned(dtype, ACCESS_BYTES))
            && aligned(weight)
            && aligned(bias);
        let channels = if wide { ACCESS_BYTES / dtype.bytes() } else { 1 };
        let params = Params {
            weight,
            bias,
            x_strides: x.kernel_strides(),
            out_strides: out.kernel_strides(),
            units: Divisor::new(op, "accesses a row", out.shape[2] / channels)?,
            columns: Divisor::new(op, "columns", out_width.div_ceil(tile[1]))?,
            rows: Divisor::new(op, "rows", out_height.div_ceil(tile[0]))?,
            height: int(op, "rows", grid[0])?,
            width: int(op, "columns", grid[1])?,
            out_height: int(op, "rows", out_height)?,
            out_width: int(op, "columns", out_width)?,
            inputs: int(op, "channels", x.shape[2])?,
            outputs: int(op, "channels", out.shape[2])?,
            stride: int(op, "positions", stride)?,
            before: kinds[0],
            after: kinds[1],
            ..Params::zeroed()
        };
        Ok((params, wide))
    }

    /// Launches over as many images at a time as the kernels' integers count.
    ///
    /// # Safety
    /// As [`convolution_raw`].
    unsafe fn run(
        self,
        device: &Device,
        stream: &CudaStream,
        kernel: &Kernel,
        map: &MapPointers,
        mut params: Params,
    ) -> Result<()> {
        let Self { op, dtype, .. } = self;
        device.check_stream(op, stream)?;
        let counts = [params.units, params.columns, params.rows].map(Divisor::by);
        let items = counts.into_iter().fold(1, usize::saturating_mul);
        let together = images_a_launch(op, items)?;
        let batch = map.x.shape[0];
        for first in (0..batch).step_by(together) {
            let items = items * together.min(batch - first);
            params.x = map.x.image(first, dtype);
            params.out = map.out.image(first, dtype);
            params.items = int(op, "accesses", items)?;
            // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
            unsafe { launch(stream, kernel, item_shape(items), &params) }?;
        }
        Ok(())
    }
}
