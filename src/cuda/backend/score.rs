//! A selector's scores, and who is kept in place by them.

use super::{
    super::{
        DType,
        score::{TokenScores, token_scores_raw},
        select::{InPlace, keep_in_place_raw},
    },
    Cuda, CudaPlan, CudaTensor,
};
use crate::{
    Result,
    backend::{KeepInPlace, Linear},
};

const OP: &str = "token_scores";

impl Cuda {
    pub(super) fn kept_in_place(&self, keep: &KeepInPlace<'_, CudaTensor>) -> Result<CudaPlan> {
        const OP: &str = "keep_in_place";
        self.check(OP, "scores", keep.scores, DType::F32)?;
        let scores = keep.scores.tokens(OP, "scores")?;
        let [batch, _, tokens] = scores.shape;
        let selection = InPlace { special: keep.special, keep: keep.keep, masked: keep.masked };
        let plan = self.empty_plan(batch, tokens, selection.tokens_out(tokens)?)?;
        let (device, stream) = (self.device(), self.stream());
        // SAFETY: as for `Backend` (see there).
        unsafe { keep_in_place_raw(device, stream, DType::F32, &scores, selection, &plan.pointers()) }?;
        Ok(plan)
    }

    pub(super) fn selector_scores(
        &self,
        x: &CudaTensor,
        selector: &Linear<CudaTensor>,
        noise: Option<&CudaTensor>,
    ) -> Result<CudaTensor> {
        let x = &self.stored(OP, "x", x)?;
        let source = self.read(OP, "x", x)?;
        let [batch, tokens, width] = source.shape;
        let bias = selector.bias.as_ref().map(|bias| self.read_array(OP, "bias", bias, &[1])).transpose()?;
        let weight = self.read_array(OP, "weight", &selector.weight, &[1, width])?;
        let noise = noise.map(|noise| self.read_f32(OP, "noise", noise, &[batch, tokens])).transpose()?;
        let scores = self.empty(&[batch, 1, tokens], DType::F32)?;
        let arguments =
            TokenScores { x: source, selector: Linear { weight, bias }, noise, scores: scores.pointer() };
        // SAFETY: as for `Backend` (see there).
        unsafe { token_scores_raw(self.device(), self.stream(), self.dtype(), &arguments) }?;
        Ok(scores)
    }
}
