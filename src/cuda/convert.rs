//! Values from one storage type to another (kernels/convert.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element,
    borrow::Borrow,
    image::{Kernel, Module},
    launch::{Shape, launch},
    nvtx,
    strided::{check_pointer, is_wide},
};
use crate::{Error, Result};

const OP: &str = "convert";
/// Values of a block: 8 a thread.
const A_BLOCK: usize = 256 * 8;

/// `ConvertParams` of kernels/convert.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    out: DevicePointer,
    values: i64,
}

const _: () = assert!(size_of::<Params>() == 24 && std::mem::offset_of!(Params, values) == 16);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// What there are kernels for.
const PAIRS: [[DType; 2]; 4] = [
    [DType::F32, DType::F16],
    [DType::F32, DType::Bf16],
    [DType::F16, DType::F32],
    [DType::Bf16, DType::F32],
];

/// The kernels of kernels/convert.cu, in the order of [`PAIRS`].
#[derive(Debug)]
pub(super) struct ConvertKernels([Kernel; 4]);

impl ConvertKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let [a, b, c, d] = PAIRS.map(|[from, to]| module.kernel(format!("fv_convert_{from}_{to}")));
        Ok(Self([a?, b?, c?, d?]))
    }
}

/// `x` in another type, rounded to nearest even where that one is narrower: between `f32` and 16 bits.
///
/// # Errors
/// [`Error::Argument`] when `out` has another length, no kernel converts between the types, memory is not aligned to 16 bytes, or
/// an argument lives in another context; [`Error::Launch`] when the driver refuses.
pub fn convert<T: Element, O: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &CudaView<'_, T>,
    out: &mut CudaViewMut<'_, O>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let values = x.len();
    let (x, _x) = borrow.read_row("x", x, values)?;
    let (out, _out) = borrow.write_row("out", out, values)?;
    // SAFETY: both have as many values (checked above), live in the device's context, and their guards outlive the launch; `out`
    // is borrowed mutably, so it is not `x`.
    unsafe { convert_raw(device, stream, [T::DTYPE, O::DTYPE], x, out, values) }
}

/// [`convert`] over device pointers, `types` from and to.
///
/// # Errors
/// As [`convert`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both pointers must be addresses in the device's memory of so many values of
/// their types, `x` initialised; nobody else may write `x`, nor touch `out`; they must not overlap.
pub unsafe fn convert_raw(
    device: &Device,
    stream: &CudaStream,
    types @ [from, to]: [DType; 2],
    x: DevicePointer,
    out: DevicePointer,
    values: usize,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    check_pointer(OP, "x", x, from.bytes())?;
    check_pointer(OP, "out", out, to.bytes())?;
    if !is_wide(x) || !is_wide(out) {
        return Err(Error::argument(OP, "x and out must be aligned to 16 bytes"));
    }
    let place = PAIRS.iter().position(|&pair| pair == types);
    let place = place.ok_or_else(|| {
        Error::argument(
            OP,
            format!("no kernel converts {from} to {to}: one of them is f32, the other is not"),
        )
    })?;
    let grid = u32::try_from(values.div_ceil(A_BLOCK)).ok().filter(|&grid| grid <= i32::MAX.unsigned_abs());
    let grid =
        grid.ok_or_else(|| Error::argument(OP, format!("{values} values are too many for one launch")))?;
    if grid == 0 {
        return Ok(());
    }
    let params = Params { x, out, values: values as i64 };
    let shape = Shape { grid, block: 256, shared_bytes: 0 };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, &device.kernels().convert.0[place], shape, &params) }
}
