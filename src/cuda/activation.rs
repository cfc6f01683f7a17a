//! The nonlinearities of an MLP by themselves (kernels/activation.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Module, TypedKernels},
    launch::{Divisor, images_a_launch, int, item_shape, launch},
    nvtx,
    strided::WIDE_BYTES,
};
use crate::{Error, Result, model::Activation};

const OP: &str = "activation";

/// `ActivationParams` of kernels/activation.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    units: Divisor,
    tokens: Divisor,
    items: i32,
    width: i32,
}

const _: () = assert!(
    size_of::<Params>() == 80
        && std::mem::offset_of!(Params, x_strides) == 16
        && std::mem::offset_of!(Params, units) == 48
        && std::mem::offset_of!(Params, items) == 72
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

const ACTIVATIONS: [Activation; 6] = [
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::QuickGelu,
    Activation::Silu,
    Activation::Relu,
    Activation::SwiGlu,
];

/// The kernels of kernels/activation.cu, in the order of [`ACTIVATIONS`]: with 16-byte accesses, with narrow ones.
#[derive(Debug)]
pub(super) struct ActivationKernels([[TypedKernels; 2]; 6]);

impl ActivationKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let load = |activation: Activation| {
            TypedKernels::wide_and_narrow(module, &format!("fv_{}", activation.name()), "")
        };
        let [a, b, c, d, e, f] = ACTIVATIONS.map(load);
        Ok(Self([a?, b?, c?, d?, e?, f?]))
    }

    fn pick(&self, activation: Activation, dtype: DType, wide: bool) -> &super::image::Kernel {
        let at = ACTIVATIONS.iter().position(|&other| other == activation).unwrap_or_default();
        self.0[at][usize::from(!wide)].pick(dtype)
    }
}

/// The nonlinearity of each value of `x` (B, N, C) to `out` (B, N, C); [`Activation::SwiGlu`] takes `x` (B, N, 2C).
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn activate<T: Element>(
    device: &Device,
    stream: &CudaStream,
    activation: Activation,
    x: &Strided<CudaView<'_, T>>,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (out, _out) = borrow.write("out", out)?;
    // SAFETY: both tensors lie within their views (checked above), which live in the device's context and whose guards
    // outlive the launch; `out` is borrowed mutably, so it is not `x`.
    unsafe { activate_raw(device, stream, T::DTYPE, activation, &x, &out) }
}

/// [`activate`] in place of `x`; [`Activation::SwiGlu`] leaves its result in the first half of each row.
///
/// # Errors
/// As [`activate`], and when rows of an odd length have no halves.
pub fn activate_in_place<T: Element>(
    device: &Device,
    stream: &CudaStream,
    activation: Activation,
    x: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (x, _x) = borrow.write("x", x)?;
    let [batch, tokens, width] = x.shape;
    let width = if activation == Activation::SwiGlu { width / 2 } else { width };
    let out = Strided { shape: [batch, tokens, width], ..x };
    // SAFETY: as in `activate`; the kernels allow `out` to be `x`, or its first half.
    unsafe { activate_raw(device, stream, T::DTYPE, activation, &x, &out) }
}

/// [`activate`] and [`activate_in_place`] over device pointers.
///
/// # Errors
/// As [`activate`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both pointers must be addresses in the device's memory at which the tensors
/// of their shapes, strides and `dtype` lie, `x` initialised; nobody else may write `x`, nor touch `out`; they must not
/// overlap, save that `out` may have the address and the strides of `x`.
pub unsafe fn activate_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    activation: Activation,
    x: &Strided<DevicePointer>,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    let [batch, tokens, mut width] = x.shape;
    if activation == Activation::SwiGlu {
        if width % 2 != 0 {
            return Err(Error::argument(
                OP,
                format!("x has rows of {width} values, which have no halves for SwiGLU"),
            ));
        }
        width /= 2;
    }
    out.check_output(OP, "out", dtype)?;
    out.expect_shape(OP, "out", [batch, tokens, width])?;

    let wide = x.wide(dtype) && out.wide(dtype);
    let units = if wide { width * dtype.bytes() / WIDE_BYTES } else { width };
    let mut params = Params {
        x_strides: x.kernel_strides(),
        out_strides: out.kernel_strides(),
        units: Divisor::new(OP, "accesses a row", units)?,
        tokens: Divisor::new(OP, "tokens", tokens)?,
        width: int(OP, "values a row", width)?,
        ..Params::zeroed()
    };
    let kernel = device.kernels().activation.pick(activation, dtype, wide);
    let items = tokens.saturating_mul(units);
    let together = images_a_launch(OP, items)?;
    for first in (0..batch).step_by(together) {
        let items = items * together.min(batch - first);
        params.x = x.image(first, dtype);
        params.out = out.image(first, dtype);
        params.items = int(OP, "accesses", items)?;
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(items), &params) }?;
    }
    Ok(())
}
