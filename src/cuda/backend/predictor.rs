//! DynamicViT's predictor.

use super::{
    super::{
        DType, DevicePointer,
        predictor::{KeepPlan, KeepScores, MOST_SELECTED, ScratchExtents, keep_scores_raw},
        select::Selection,
    },
    Cuda, CudaPlan, CudaTensor,
};
use crate::{
    Result,
    backend::{Backend, Linear, Predictor, Select},
};

const OP: &str = "keep_scores";

impl Cuda {
    pub(super) fn predicted_scores(
        &self,
        x: &CudaTensor,
        predictor: &Predictor<CudaTensor>,
        special: usize,
    ) -> Result<CudaTensor> {
        self.predict(x, predictor, special, None)
    }

    /// Who is kept, selected in the launch that computes the last scores.
    pub(super) fn kept_by_scores(
        &self,
        x: &CudaTensor,
        predictor: &Predictor<CudaTensor>,
        special: usize,
        keep: usize,
    ) -> Result<CudaPlan> {
        let x = &self.stored(OP, "x", x)?;
        let [batch, tokens, _] = x.tokens(OP, "x")?.shape;
        if tokens > MOST_SELECTED {
            let class_scores = &self.predicted_scores(x, predictor, special)?;
            return self.select(&Select { class_scores, special, keep, fuse: false });
        }
        let left = Selection { special, keep, fuse: false }.tokens_out(tokens)?;
        let plan = self.empty_plan(batch, tokens, left)?;
        let (arrived, _held) = self.inner.cleared.hold(&self.inner.space, size_of::<u32>() * batch)?;
        let selection = KeepPlan { keep, plan: plan.pointers(), arrived };
        self.predict(x, predictor, special, Some(selection))?;
        Ok(plan)
    }

    fn predict(
        &self,
        x: &CudaTensor,
        predictor: &Predictor<CudaTensor>,
        special: usize,
        keep: Option<KeepPlan>,
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
            keep,
        };
        // SAFETY: as for `Backend` (see there); the scratch is this call's own.
        unsafe { keep_scores_raw(self.device(), self.stream(), self.dtype(), &arguments) }?;
        Ok(scores)
    }
}
