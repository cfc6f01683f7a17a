//! Bipartite matching into a plan.

use super::{
    super::{
        DType, DevicePointer, Strided,
        matching::{
            Attraction as DeviceAttraction, MatchingPointers, MatchingScratch, Metric as DeviceMetric,
            Weighting as DeviceWeighting, chosen_values, match_tokens_raw,
        },
    },
    Cuda, CudaPlan, CudaTensor,
    memory::Memory,
};
use crate::{
    Result,
    backend::{Attraction, Matching, Metric, Weighting},
};

const OP: &str = "matching";

impl Cuda {
    pub(super) fn match_tokens(&self, matching: &Matching<'_, CudaTensor>) -> Result<CudaPlan> {
        let (metric, rows) = match &matching.metric {
            Metric::Keys(heads) => {
                let keys = |[b, n, _]: [usize; 3]| {
                    (b * n).saturating_mul(heads.heads).saturating_mul(heads.head_dim)
                };
                let packed = self.read_values(OP, "packed heads", heads.packed, keys)?;
                (DeviceMetric::Keys { packed, heads: heads.heads, head_dim: heads.head_dim }, packed)
            }
            Metric::Rows(rows) => {
                let (rows, _) = self.read_stream(OP, "metric", rows)?;
                (DeviceMetric::Rows(rows), rows)
            }
        };
        let dtype = match &matching.metric {
            Metric::Keys(heads) => heads.packed.dtype(),
            Metric::Rows(rows) => rows.dtype(),
        };
        let [batch, tokens, _] = rows.shape;
        let sizes = |sizes: Option<&CudaTensor>| {
            sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()
        };
        let scores = |name: &str, scores: &CudaTensor| -> Result<Strided<DevicePointer>> {
            self.check(OP, name, scores, DType::F32)?;
            scores.tokens(OP, name)
        };
        let pointers = MatchingPointers {
            metric,
            attraction: match matching.attraction {
                Attraction::Cosine => DeviceAttraction::Cosine,
                Attraction::MultiCriteria { tau_similarity, informativeness, size } => {
                    DeviceAttraction::MultiCriteria {
                        tau_similarity,
                        informativeness: (scores("informativeness", informativeness.0)?, informativeness.1),
                        size: (sizes(size.0)?, size.1),
                    }
                }
            },
            weighting: match matching.weighting {
                Weighting::Uniform => DeviceWeighting::Uniform,
                Weighting::Size(given) => DeviceWeighting::Size(sizes(given)?),
                Weighting::SizeAndReceived(given, received) => {
                    DeviceWeighting::SizeAndReceived(sizes(given)?, scores("received attention", received)?)
                }
            },
            special: matching.special,
            merges: matching.merges,
            both_ways: matching.both_ways,
        };
        // More merges than tokens are refused by the launcher, which names both.
        let left = tokens.saturating_sub(matching.merges).max(1);
        let plan = self.empty_plan(batch, tokens, left)?;
        // Choices, then counters.
        let choices = size_of::<u64>() * chosen_values(batch, tokens);
        let (chosen, _held) =
            self.inner.cleared.hold(&self.inner.space, choices + size_of::<u32>() * batch)?;
        let memory = Memory::new(&self.inner.space, 4 * batch.saturating_mul(tokens.div_ceil(2)))?;
        let (arrived, stays) = (chosen + choices as DevicePointer, memory.pointer());
        let scratch = MatchingScratch { arrived, stays, chosen, batch, tokens };
        // SAFETY: as for `Backend` (see there); choices and counters are 0 and this stream's alone.
        unsafe {
            match_tokens_raw(self.device(), self.stream(), dtype, &pointers, scratch, &plan.pointers())
        }?;
        Ok(plan)
    }
}
