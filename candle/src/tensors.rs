//! What both devices ask of their arguments, and how results become tensors of candle's graph.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Storage, Tensor,
    op::BackpropOp,
};

use crate::Plan;

/// An operation's arguments, checked against the first of them.
pub(crate) struct Arguments<'a> {
    pub(crate) op: &'static str,
    first: &'a Tensor,
    /// What tokens and parameters hold.
    pub(crate) dtype: DType,
    /// An argument that gradients are wanted of.
    tracked: Option<&'a Tensor>,
}

impl<'a> Arguments<'a> {
    pub(crate) fn new(op: &'static str, first: &'a Tensor, dtype: DType) -> Self {
        Self { op, first, dtype, tracked: first.track_op().then_some(first) }
    }

    /// Where all of them lie.
    pub(crate) fn device(&self) -> &'a Device {
        self.first.device()
    }

    /// One more argument, of the same type.
    pub(crate) fn with(self, name: &str, tensor: &'a Tensor) -> Result<Self> {
        let dtype = self.dtype;
        self.with_type(name, tensor, dtype, "as the first argument does")
    }

    /// One more argument, sizes or scores.
    pub(crate) fn with_f32(self, name: &str, tensor: Option<&'a Tensor>) -> Result<Self> {
        let Some(tensor) = tensor else { return Ok(self) };
        self.with_type(name, tensor, DType::F32, "whatever the tokens hold")
    }

    fn with_type(mut self, name: &str, tensor: &'a Tensor, dtype: DType, why: &str) -> Result<Self> {
        if tensor.dtype() != dtype {
            candle_core::bail!(
                "{}: {name} holds {:?}, expected {dtype:?} {why}; convert it with to_dtype",
                self.op,
                tensor.dtype()
            );
        }
        self.check_device(name, tensor.device())?;
        self.tracked = self.tracked.or_else(|| tensor.track_op().then_some(tensor));
        Ok(self)
    }

    pub(crate) fn check_plan(&self, plan: &Plan) -> Result<()> {
        self.check_device("the plan", plan.device())
    }

    fn check_device(&self, name: &str, device: &Device) -> Result<()> {
        let (expected, found) = (self.device().location(), device.location());
        if expected == found {
            return Ok(());
        }
        candle_core::bail!(
            "{}: {name} lies on {found:?}, the first argument on {expected:?}; move it with to_device",
            self.op
        )
    }

    /// A result as a tensor, through which no gradient goes unnoticed.
    pub(crate) fn finish(&self, storage: Storage, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let Some(tracked) = self.tracked else {
            return Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false));
        };
        tracked.apply_op1(Computed { op: self.op, storage: Mutex::new(Some(storage)), shape })
    }
}

/// A result that is known already, as the node of candle's graph that it would be: candle's operations give one tensor each,
/// ours several. Its backward pass is candle's default: an error with the operation's name.
struct Computed {
    op: &'static str,
    storage: Mutex<Option<Storage>>,
    shape: Shape,
}

impl Computed {
    fn take(&self) -> Result<Storage> {
        let storage = self.storage.lock().unwrap_or_else(PoisonError::into_inner).take();
        storage.ok_or_else(|| Error::Msg(format!("{}: its result was taken twice", self.op)))
    }
}

impl CustomOp1 for Computed {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Storage::Cpu(storage) => Ok((storage, self.shape.clone())),
            _ => candle_core::bail!("{}: its result is not on the CPU", self.op),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Storage::Cuda(storage) => Ok((storage, self.shape.clone())),
            _ => candle_core::bail!("{}: its result is not on a CUDA device", self.op),
        }
    }
}

/// The type of tokens or parameters, if the operations have it.
pub(crate) fn check_float(op: &str, name: &str, tensor: &Tensor) -> Result<DType> {
    match tensor.dtype() {
        dtype @ (DType::F32 | DType::F16 | DType::BF16) => Ok(dtype),
        other => candle_core::bail!(
            "{op}: {name} holds {other:?}, expected F32, F16 or BF16; convert it with to_dtype"
        ),
    }
}

/// (B, N, C) of a tensor of tokens.
pub(crate) fn tokens_shape(op: &str, name: &str, tensor: &Tensor) -> Result<[usize; 3]> {
    match *tensor.dims() {
        [b, n, c] if b > 0 && n > 0 && c > 0 => Ok([b, n, c]),
        ref dims => candle_core::bail!(
            "{op}: {name} has shape {dims:?}, expected three axes (images, tokens, width), none empty"
        ),
    }
}

pub(crate) fn unsupported(op: &str, device: &Device) -> Error {
    let remedy = match device {
        Device::Cuda(_) => "build foveate-candle with its feature `cuda`, or move the tensors to the CPU",
        _ => "move the tensors to the CPU or to a CUDA device",
    };
    Error::Msg(format!("{op}: there is no implementation on {:?}; {remedy}", device.location()))
}

/// An error of foveate's as one of candle's.
pub(crate) fn wrap(error: foveate::Error) -> Error {
    Error::wrap(error)
}
