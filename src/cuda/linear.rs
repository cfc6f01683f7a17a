//! Affine layers over cuBLASLt: bias, GELU or `ReLU` and residual addition in the product's epilogue.

use std::ops::Range;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtrMut, DeviceSlice};

use super::{
    Blas, DType, DevicePointer, Element, Strided,
    blas::{Operands, Problem, WORKSPACE_ALIGNMENT, alignment},
    borrow::Borrow,
    nvtx,
    strided::check_pointer,
};
use crate::{Error, Result, backend::Linear};

const OP: &str = "linear";

/// What happens to a product, with its bias, before it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fused {
    /// Nothing.
    #[default]
    None,
    /// GELU's tanh approximation, [`Activation::GeluTanh`](crate::model::Activation::GeluTanh).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// The product is added to what the output holds: a residual connection.
    Add,
}

impl Fused {
    /// `cublasLtEpilogue_t`, without a bias and with one.
    fn number(self, bias: bool) -> u32 {
        let [without, with] = match self {
            Self::None | Self::Add => [1, 4],
            Self::Relu => [2, 6],
            Self::GeluTanh => [32, 36],
        };
        if bias { with } else { without }
    }
}

/// What [`linear`] reads.
#[derive(Debug)]
pub struct Affine<'a, T> {
    /// The rows, (B, N, inputs).
    pub x: Strided<CudaView<'a, T>>,
    /// Weight (all outputs, inputs) without gaps, and bias (all outputs).
    pub layer: Linear<CudaView<'a, T>>,
    /// The outputs to compute, all when absent.
    pub outputs: Option<Range<usize>>,
    /// What happens to the product.
    pub fused: Fused,
}

/// What a product reads and what it writes: the same type, or 16 bits and `f32` (a residual stream in single precision).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffineTypes {
    /// Of the rows and the weight.
    pub inputs: DType,
    /// Of the bias and the output.
    pub outputs: DType,
}

impl From<DType> for AffineTypes {
    fn from(dtype: DType) -> Self {
        Self { inputs: dtype, outputs: dtype }
    }
}

/// What [`linear_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct AffinePointers {
    /// (B, N, inputs).
    pub x: Strided<DevicePointer>,
    /// The first of the outputs' rows of W, (outputs, inputs) without gaps.
    pub weight: DevicePointer,
    /// The bias of the first of the outputs, (outputs).
    pub bias: Option<DevicePointer>,
    /// What happens to the product.
    pub fused: Fused,
    /// (B, N, outputs).
    pub out: Strided<DevicePointer>,
    /// Scratch memory, a multiple of 256; 0 without any.
    pub workspace: DevicePointer,
    /// Its size.
    pub workspace_bytes: usize,
}

/// `x Wᵀ + b` over the last axis into `out` (B, N, outputs), sums in `f32` (no TF32).
///
/// The same arguments give the same bits in every run on the same device and library. Another batch may be computed by
/// another algorithm, whose sums run in another order.
///
/// `workspace` is scratch memory of any size that nothing else on another stream may use at the time; how much pays is
/// [`Blas::workspace_bytes`]. The first call with a shape asks cuBLASLt for an algorithm; later ones take what it said.
///
/// # Errors
/// [`Error::Argument`] when shapes or ranges do not fit, rows of `x` overlap, or an argument lives in another context;
/// [`Error::Blas`] when cuBLASLt refuses.
pub fn linear<T: Element>(
    blas: &Blas,
    stream: &CudaStream,
    affine: &Affine<'_, T>,
    out: &mut Strided<CudaViewMut<'_, T>>,
    workspace: &mut CudaViewMut<'_, u8>,
) -> Result<()> {
    let device = blas.device();
    let borrow = Borrow { op: OP, device, stream };
    let (x, _x) = borrow.read("x", &affine.x)?;
    let inputs = x.shape[2];
    let held = affine.layer.weight.len();
    if inputs == 0 || held == 0 || !held.is_multiple_of(inputs) {
        return Err(Error::argument(OP, format!("weight has {held} values, which are not rows of {inputs}")));
    }
    let all = held / inputs;
    let (weight, _weight) = borrow.read_row("weight", &affine.layer.weight, held)?;
    let bias = affine.layer.bias.as_ref();
    let bias = bias.map(|bias| borrow.read_row("bias", bias, all)).transpose()?;
    let (bias, _bias) = bias.unzip();
    let range = affine.outputs.clone().unwrap_or(0..all);
    if range.start >= range.end || range.end > all {
        return Err(Error::argument(OP, format!("outputs {range:?} are not among the layer's {all}")));
    }
    let (out, _out) = borrow.write("out", out)?;
    out.expect_shape(OP, "out", [x.shape[0], x.shape[1], range.len()])?;
    device.check_context(OP, "workspace", workspace.stream().context())?;
    let bytes = workspace.len();
    let (scratch, _scratch) = workspace.device_ptr_mut(stream);
    let step = |elements: usize| (elements * T::DTYPE.bytes()) as DevicePointer;
    let pointers = AffinePointers {
        x,
        weight: weight + step(range.start * inputs),
        bias: bias.map(|bias| bias + step(range.start)),
        fused: affine.fused,
        out,
        workspace: if bytes == 0 { 0 } else { scratch },
        workspace_bytes: bytes,
    };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the call; `out` and the workspace are borrowed mutably, so they are none of the others.
    unsafe { linear_raw(blas, stream, T::DTYPE, &pointers) }
}

/// [`linear`] over device pointers.
///
/// # Errors
/// As [`linear`].
///
/// # Safety
/// On `stream`, until it has passed this product: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read (with [`Fused::Add`] also `out`); nobody else
/// may write what is read, nor touch `out` and the workspace, which must overlap no other tensor.
pub unsafe fn linear_raw(
    blas: &Blas,
    stream: &CudaStream,
    types: impl Into<AffineTypes>,
    arguments: &AffinePointers,
) -> Result<()> {
    let AffineTypes { inputs: dtype, outputs: after } = types.into();
    let AffinePointers { x, weight, bias, fused, out, workspace, workspace_bytes } = arguments;
    let _range = nvtx::range(OP);
    blas.device().check_stream(OP, stream)?;
    x.check(OP, "x", dtype)?;
    out.check_output(OP, "out", after)?;
    if after != dtype && after != DType::F32 {
        return Err(Error::argument(
            OP,
            format!("no product of {dtype} gives {after}: out is {dtype} or f32"),
        ));
    }
    let ([batch, tokens, inputs], outputs) = (x.shape, out.shape[2]);
    out.expect_shape(OP, "out", [batch, tokens, outputs])?;
    check_pointer(OP, "weight", *weight, dtype.bytes())?;
    bias.map_or(Ok(()), |bias| check_pointer(OP, "bias", bias, after.bytes()))?;
    if *workspace_bytes > 0 && (*workspace == 0 || !workspace.is_multiple_of(WORKSPACE_ALIGNMENT)) {
        return Err(Error::argument(
            OP,
            format!("the workspace lies at {workspace:#x}, expected a multiple of {WORKSPACE_ALIGNMENT}"),
        ));
    }

    // One product over all rows where they follow each other evenly, else one for each image.
    let (batch, rows, x_strides, out_strides) = match (even_rows(x), even_rows(out)) {
        (Some(x_row), Some(out_row)) => {
            (1, batch * tokens, [x_row, batch * tokens * x_row], [out_row, batch * tokens * out_row])
        }
        _ => (batch, tokens, by_image(x), by_image(out)),
    };
    if x_strides[0] < inputs {
        return Err(Error::argument(
            OP,
            format!(
                "x of shape {:?} has strides {:?}: cuBLASLt takes no rows that overlap",
                x.shape, x.strides
            ),
        ));
    }
    let out_alignment = alignment(out.data);
    let problem = Problem {
        dtype,
        out: after,
        batch,
        rows,
        inputs,
        outputs,
        x_strides,
        y_strides: out_strides,
        epilogue: fused.number(bias.is_some()),
        alignments: [
            alignment(*weight),
            alignment(x.data),
            bias.map_or(out_alignment, |bias| alignment(bias).min(out_alignment)),
        ],
        workspace_bytes: *workspace_bytes,
    };
    let operands = Operands {
        x: x.data,
        weight: *weight,
        bias: *bias,
        y: out.data,
        accumulate: *fused == Fused::Add,
        workspace: *workspace,
    };
    // SAFETY: the operands have the problem's extents (checked above); the caller vouches for the memory behind them.
    unsafe { blas.multiply(stream, &problem, &operands) }
}

/// The distance of all rows of all images, when there is one.
fn even_rows(tensor: &Strided<DevicePointer>) -> Option<usize> {
    let ([images, tokens, width], [image, token]) = (tensor.shape, tensor.strides);
    match (images, tokens) {
        (1, 1) => Some(width),
        (1, _) => Some(token),
        (_, 1) => Some(image),
        _ => (Some(image) == tokens.checked_mul(token)).then_some(token),
    }
}

/// The distance of the rows of an image, and of the images.
fn by_image(tensor: &Strided<DevicePointer>) -> [usize; 2] {
    let ([_, tokens, width], [image, token]) = (tensor.shape, tensor.strides);
    [if tokens == 1 { width } else { token }, image]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_one_matrix_where_they_are_evenly_apart() {
        let tensor = |shape, strides| Strided::new(0x1000, shape).with_strides(strides);
        assert_eq!(even_rows(&tensor([2, 3, 4], [12, 4])), Some(4));
        assert_eq!(even_rows(&tensor([2, 3, 4], [24, 8])), Some(8), "a part of wider rows");
        assert_eq!(even_rows(&tensor([2, 3, 4], [16, 4])), None, "some tokens of more");
        assert_eq!(even_rows(&tensor([2, 1, 4], [16, 1])), Some(16), "the class tokens");
        assert_eq!(even_rows(&tensor([1, 3, 4], [0, 8])), Some(8));
        assert_eq!(even_rows(&tensor([1, 1, 4], [0, 0])), Some(4));
    }

    #[test]
    fn alignments_are_powers_of_two_up_to_256() {
        assert_eq!([0x1000, 0x1002, 0x1008, 0x10_0080].map(alignment), [256, 2, 8, 128]);
    }
}
