//! Affine layers with their epilogues.

use super::{
    super::{
        DType, DevicePointer,
        activation::activate_raw,
        linear::{AffinePointers, AffineTypes, Fused, linear_raw},
        record,
    },
    Cuda, CudaTensor, Inner,
};
use crate::{
    Error, Result,
    backend::{Epilogue, LinearRows},
    model::Activation,
};

impl Cuda {
    pub(super) fn affine(
        &self,
        x: &CudaTensor,
        layer: LinearRows<'_, CudaTensor>,
        epilogue: Epilogue<CudaTensor>,
    ) -> Result<CudaTensor> {
        const OP: &str = "linear";
        let Inner { device, stream, dtype, blas, workspace, .. } = &*self.inner;
        let x = &self.stored(OP, "x", x)?;
        self.check(OP, "x", x, *dtype)?;
        let (weight, bias) = (&layer.layer.weight, &layer.layer.bias);
        let (all, inputs) = (weight.shape().first().copied().unwrap_or(1), x.width());
        let part = |name: &str, tensor: &CudaTensor, shape: &[usize]| {
            self.check_owner(OP, name, tensor, *dtype)?;
            tensor.expect_shape(OP, name, shape).map(|()| tensor.pointer())
        };
        let weight = part("weight", weight, &[all, inputs])?;
        let bias = bias.as_ref().map(|bias| part("bias", bias, &[all])).transpose()?;
        let range = layer.rows.unwrap_or(0..all);
        if range.start >= range.end || range.end > all {
            return Err(Error::argument(OP, format!("outputs {range:?} are not among the layer's {all}")));
        }
        let mut shape = x.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = range.len();
        }
        let mut outputs = *dtype;
        let (out, fused, then) = match epilogue {
            Epilogue::AddTo(residual) => {
                outputs = self.stream_type(OP, "residual", &residual)?;
                self.check(OP, "residual", &residual, outputs)?;
                residual.expect_shape(OP, "residual", &shape)?;
                let out = residual.into_own()?;
                record::operand(stream, out.bytes());
                (out, Fused::Add, None)
            }
            Epilogue::Activation(activation) => match self.fused(activation) {
                Some(fused) => (self.empty(&shape, *dtype)?, fused, None),
                None => (self.empty(&shape, *dtype)?, Fused::None, Some(activation)),
            },
            Epilogue::None => (self.empty(&shape, *dtype)?, Fused::None, None),
        };
        // What is added to f32 has a bias of f32.
        let exact = |bias| self.exact(OP, "bias", bias, &[all]).map(CudaTensor::pointer);
        let bias = match &layer.layer.bias {
            Some(bias) if outputs != *dtype => Some(exact(bias)?),
            _ => bias,
        };
        let step = |elements: usize, dtype: DType| (elements * dtype.bytes()) as DevicePointer;
        let biases = if bias.is_some() { range.len() * outputs.bytes() } else { 0 };
        record::operand(stream, range.len() * inputs * dtype.bytes() + biases);
        let arguments = AffinePointers {
            x: x.rows(),
            weight: weight + step(range.start * inputs, *dtype),
            bias: bias.map(|bias| bias + step(range.start, outputs)),
            fused,
            out: out.rows(),
            workspace: workspace.pointer(),
            workspace_bytes: workspace.bytes(),
        };
        // SAFETY: as for `Backend`; the workspace is used on this stream only, and `out` is nobody else's.
        unsafe { linear_raw(blas, stream, AffineTypes { inputs: *dtype, outputs }, &arguments) }?;
        let Some(activation) = then else { return Ok(out) };
        record::operand(stream, out.bytes());
        if activation != Activation::SwiGlu {
            record::operand(stream, out.bytes());
            // SAFETY: as for `Backend`; the kernels may write where they read.
            unsafe { activate_raw(device, stream, *dtype, activation, &out.rows(), &out.rows()) }?;
            return Ok(out);
        }
        if !range.len().is_multiple_of(2) {
            return Err(Error::argument(
                OP,
                format!("{} outputs cannot be gated: the number is odd", range.len()),
            ));
        }
        if let Some(last) = shape.last_mut() {
            *last = range.len() / 2;
        }
        let gated = self.empty(&shape, *dtype)?;
        // SAFETY: as for `Backend`.
        unsafe { activate_raw(device, stream, *dtype, activation, &out.rows(), &gated.rows()) }?;
        Ok(gated)
    }

    /// What of an activation the product before it does.
    fn fused(&self, activation: Activation) -> Option<Fused> {
        match activation {
            Activation::Relu => Some(Fused::Relu),
            // How exactly cuBLASLt computes the hyperbolic tangent is its own affair; f32 takes ours.
            _ if self.inner.dtype == DType::F32 => None,
            Activation::GeluTanh => Some(Fused::GeluTanh),
            Activation::Gelu if self.fused_gelu => Some(Fused::GeluTanh),
            _ => None,
        }
    }
}
