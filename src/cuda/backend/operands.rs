//! What operations read and write: whose a tensor is, its type, its shape.

use super::{
    super::{
        DType, DevicePointer, PlanPointers, RowTypes, Strided,
        convert::convert_raw,
        norm::{LayerNorm, layer_norm_raw},
        record,
    },
    Cuda, CudaPlan, CudaTensor, Inner,
};
use crate::{Error, Result, backend::Norm};

// SAFETY (for all blocks below): as for `Backend` in mod.rs: what is read has been checked to be this backend's.
impl Cuda {
    /// What an operation writes, of any content.
    pub(super) fn empty(&self, shape: &[usize], dtype: DType) -> Result<CudaTensor> {
        let tensor = self.scratch(shape, dtype)?;
        record::operand(&self.inner.stream, tensor.bytes());
        Ok(tensor)
    }

    /// What an operation writes and reads, and nobody else.
    pub(super) fn scratch(&self, shape: &[usize], dtype: DType) -> Result<CudaTensor> {
        CudaTensor::new(&self.inner.space, shape, dtype)
    }

    /// A plan that an operation writes.
    pub(super) fn empty_plan(&self, batch: usize, tokens_in: usize, tokens_out: usize) -> Result<CudaPlan> {
        let plan = CudaPlan::new(&self.inner.space, batch, tokens_in, tokens_out)?;
        record::operand(&self.inner.stream, plan.bytes());
        Ok(plan)
    }

    /// Checks that a tensor is this backend's and of type `dtype`.
    pub(super) fn check(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        dtype: DType,
    ) -> Result<()> {
        self.check_owner(op, name, tensor, dtype)?;
        record::operand(&self.inner.stream, tensor.bytes());
        Ok(())
    }

    /// The same, where the operation reads only a part of the tensor.
    pub(super) fn check_owner(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        dtype: DType,
    ) -> Result<()> {
        let Inner { space, lender, .. } = &*self.inner;
        space.check(op)?;
        if !tensor.is_of(space) && !lender.as_ref().is_some_and(|lender| tensor.is_of(lender)) {
            return Err(Error::argument(op, format!("{name} belongs to another backend")));
        }
        if tensor.dtype() != dtype {
            return Err(Error::argument(op, format!("{name} holds {}, expected {dtype}", tensor.dtype())));
        }
        Ok(())
    }

    /// Tokens (B, N, C) of the backend's type.
    pub(super) fn read(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
    ) -> Result<Strided<DevicePointer>> {
        self.check(op, name, tensor, self.inner.dtype)?;
        tensor.tokens(op, name)
    }

    /// What tokens hold: the backend's type, or `f32` of a residual stream.
    pub(super) fn stream_type(&self, op: &'static str, name: &str, tensor: &CudaTensor) -> Result<DType> {
        let dtype = tensor.dtype();
        if dtype == self.inner.dtype || self.f32_residual && dtype == DType::F32 {
            return Ok(dtype);
        }
        let residual = if self.f32_residual { " or f32" } else { "" };
        Err(Error::argument(op, format!("{name} holds {dtype}, expected {}{residual}", self.inner.dtype)))
    }

    /// Tokens (B, N, C), of the residual stream or of the backend's type, and which.
    pub(super) fn read_stream(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
    ) -> Result<(Strided<DevicePointer>, DType)> {
        let dtype = self.stream_type(op, name, tensor)?;
        self.check(op, name, tensor, dtype)?;
        Ok((tensor.tokens(op, name)?, dtype))
    }

    /// A tensor in the type `dtype`: itself, or converted from or to `f32`.
    pub(super) fn converted(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        dtype: DType,
    ) -> Result<CudaTensor> {
        let from = self.stream_type(op, name, tensor)?;
        if from == dtype {
            return Ok(tensor.clone());
        }
        self.check(op, name, tensor, from)?;
        let out = self.empty(tensor.shape(), dtype)?;
        let (device, stream, values) = (self.device(), self.stream(), out.count());
        // SAFETY: as for `Backend`, below: both are of as many values.
        unsafe { convert_raw(device, stream, [from, dtype], tensor.pointer(), out.pointer(), values) }?;
        Ok(out)
    }

    /// A tensor of the residual stream in the type of weights and products, where those must meet.
    pub(super) fn stored(&self, op: &'static str, name: &str, tensor: &CudaTensor) -> Result<CudaTensor> {
        self.converted(op, name, tensor, self.inner.dtype)
    }

    /// The same where the operation reads or writes so many values of them.
    pub(super) fn read_values(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        values: impl FnOnce([usize; 3]) -> usize,
    ) -> Result<Strided<DevicePointer>> {
        let dtype = self.stream_type(op, name, tensor)?;
        self.check_owner(op, name, tensor, dtype)?;
        let tokens = tensor.tokens(op, name)?;
        record::operand(&self.inner.stream, values(tokens.shape).saturating_mul(dtype.bytes()));
        Ok(tokens)
    }

    /// An array of the backend's type and of this shape.
    pub(super) fn read_array(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        shape: &[usize],
    ) -> Result<DevicePointer> {
        self.check(op, name, tensor, self.inner.dtype)?;
        tensor.expect_shape(op, name, shape)?;
        Ok(tensor.pointer())
    }

    /// An array of `f32` of this shape: sizes (B, N) or scores (B, H, N).
    pub(super) fn read_f32(
        &self,
        op: &'static str,
        name: &str,
        tensor: &CudaTensor,
        shape: &[usize],
    ) -> Result<DevicePointer> {
        self.check(op, name, tensor, DType::F32)?;
        tensor.expect_shape(op, name, shape)?;
        Ok(tensor.pointer())
    }

    pub(super) fn read_norm(
        &self,
        op: &'static str,
        norm: &Norm<CudaTensor>,
        width: usize,
    ) -> Result<Norm<DevicePointer>> {
        let weight = self.read_array(op, "weight", &norm.weight, &[width])?;
        let bias = norm.bias.as_ref().map(|bias| self.read_array(op, "bias", bias, &[width])).transpose()?;
        Ok(Norm { weight, bias, eps: norm.eps })
    }

    /// A parameter in `f32`.
    pub(super) fn exact<'a>(
        &self,
        op: &'static str,
        name: &str,
        tensor: &'a CudaTensor,
        shape: &[usize],
    ) -> Result<&'a CudaTensor> {
        self.check_owner(op, name, tensor, self.inner.dtype)?;
        tensor.expect_shape(op, name, shape)?;
        tensor.exact().ok_or_else(|| {
            Error::argument(op, format!("{name} was put on the device before its residual stream became f32"))
        })
    }

    /// LayerNorm of rows of either type.
    pub(super) fn normalised(
        &self,
        x: &CudaTensor,
        norm: Norm<DevicePointer>,
        normed: DType,
    ) -> Result<CudaTensor> {
        let Inner { device, stream, .. } = &*self.inner;
        let rows = self.stream_type("layer_norm", "x", x)?;
        self.check("layer_norm", "x", x, rows)?;
        let out = self.empty(x.shape(), normed)?;
        let arguments = LayerNorm { x: x.rows(), residual: None, sum: None, norm, out: out.rows() };
        // SAFETY: as for `Backend`, below.
        unsafe { layer_norm_raw(device, stream, RowTypes { rows, normed }, &arguments) }?;
        Ok(out)
    }

    pub(super) fn read_plan(&self, op: &'static str, plan: &CudaPlan) -> Result<PlanPointers> {
        self.inner.space.check(op)?;
        if plan.is_of(&self.inner.space) {
            record::operand(&self.inner.stream, plan.bytes());
            return Ok(plan.pointers());
        }
        Err(Error::argument(op, "the plan belongs to another backend"))
    }
}
