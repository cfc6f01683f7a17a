//! What a model reads out with: rows side by side, means of two, sizes behind hidden tokens. Copies and fills by the driver,
//! a few values an image.

use super::{
    super::{DType, Strided, tokens::mean_tokens_raw},
    Cuda, CudaTensor, Inner,
};
use crate::{Error, Result};

impl Cuda {
    /// Two tensors (B, C) and (B, K) as (B, C + K).
    pub(super) fn side_by_side(
        &self,
        op: &'static str,
        left: &CudaTensor,
        right: &CudaTensor,
    ) -> Result<CudaTensor> {
        let dtype = self.dtype();
        let (left, right) = (&self.stored(op, "left", left)?, &self.stored(op, "right", right)?);
        let mut widths = [0; 2];
        for (name, tensor, width) in [("left", left, 0), ("right", right, 1)] {
            self.check(op, name, tensor, dtype)?;
            let &[batch, columns] = tensor.shape() else {
                return Err(Error::argument(
                    op,
                    format!("{name} has shape {:?}, expected two axes", tensor.shape()),
                ));
            };
            tensor.expect_shape(op, name, &[left.shape()[0], columns])?;
            debug_assert_eq!(batch, left.shape()[0]);
            widths[width] = columns * dtype.bytes();
        }
        let ([left_bytes, right_bytes], batch) = (widths, left.shape()[0]);
        let out = self.empty(&[batch, left.width() + right.width()], dtype)?;
        let pitch = left_bytes + right_bytes;
        let memory = out.memory();
        memory.copy_from(0, pitch, left.pointer(), left_bytes, left_bytes, batch)?;
        memory.copy_from(left_bytes, pitch, right.pointer(), right_bytes, right_bytes, batch)?;
        Ok(out)
    }

    /// The mean of two tensors (B, C).
    pub(super) fn mean_of_two(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        const OP: &str = "average";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        b.expect_shape(OP, "b", a.shape())?;
        let both = self.side_by_side(OP, a, b)?;
        let &[batch, width] = a.shape() else { return Ok(both) };
        let both = both.reshaped(&[batch, 2, width]);
        let out = self.empty(&[batch, width], *dtype)?;
        let target = Strided::new(out.pointer(), [batch, 1, width]);
        let source = self.read(OP, "both", &both)?;
        // SAFETY: as for `Backend`.
        unsafe { mean_tokens_raw(device, stream, *dtype, &source, None, 0, &target) }?;
        Ok(out)
    }

    /// Sizes (B, N; 1 when absent) behind `hidden` zeros, (B, hidden + N).
    pub(super) fn sizes_behind_hidden(
        &self,
        sizes: Option<&CudaTensor>,
        [batch, tokens]: [usize; 2],
        hidden: usize,
    ) -> Result<CudaTensor> {
        const OP: &str = "hidden_sizes";
        const BYTES: usize = size_of::<f32>();
        let sizes = sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()?;
        let out = self.empty(&[batch, hidden.saturating_add(tokens)], DType::F32)?;
        let (memory, pitch) = (out.memory(), BYTES * (hidden + tokens));
        memory.fill(0, pitch, 0, hidden, batch)?;
        let first = BYTES * hidden;
        match sizes {
            Some(sizes) => memory.copy_from(first, pitch, sizes, BYTES * tokens, BYTES * tokens, batch)?,
            None => memory.fill(first, pitch, 1.0_f32.to_bits(), tokens, batch)?,
        }
        Ok(out)
    }
}
