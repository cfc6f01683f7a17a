//! DynamicViT's predictor.

use super::{
    super::{
        DType, DevicePointer,
        predictor::{KeepScores, ScratchExtents, keep_scores_raw},
    },
    Cuda, CudaTensor,
};
use crate::{
    Result,
    backend::{Linear, Predictor},
};

const OP: &str = "keep_scores";

impl Cuda {
    pub(super) fn predicted_scores(
        &self,
        x: &CudaTensor,
        predictor: &Predictor<CudaTensor>,
        special: usize,
    ) -> Result<CudaTensor> {
        let x = &self.stored(OP, "x", x)?;
        let source = self.read(OP, "x", x)?;
        let [batch, tokens, c] = source.shape;
        let linear =
            |name: &str, layer: &Linear<CudaTensor>, shape: [usize; 2]| -> Result<Linear<DevicePointer>> {
                let weight = self.read_array(OP, &format!("{name} layer's weight"), &layer.weight, &shape)?;
                let bias = layer
                    .bias
                    .as_ref()
                    .map(|bias| self.read_array(OP, &format!("{name} layer's bias"), bias, &shape[..1]));
                Ok(Linear { weight, bias: bias.transpose()? })
            };
        let pointers = Predictor {
            norm: self.read_norm(OP, &predictor.norm, c)?,
            hidden: linear("the hidden", &predictor.hidden, [c, c])?,
            first: linear("the first", &predictor.first, [c / 2, c])?,
            second: linear("the second", &predictor.second, [c / 4, c / 2])?,
            last: linear("the last", &predictor.last, [2, c / 4])?,
        };
        let extents = ScratchExtents::new(batch, tokens.saturating_sub(special), c);
        let local = self.scratch(&[extents.local], self.dtype())?;
        let partial = self.scratch(&[extents.partial], DType::F32)?;
        let scores = self.empty(&[batch, 1, tokens], DType::F32)?;
        let arguments = KeepScores {
            x: source,
            predictor: pointers,
            special,
            local: local.pointer(),
            partial: partial.pointer(),
            scores: scores.pointer(),
        };
        // SAFETY: as for `Backend` (see there); the scratch is this call's own.
        unsafe { keep_scores_raw(self.device(), self.stream(), self.dtype(), &arguments) }?;
        Ok(scores)
    }
}
