//! Attention of packed heads, whole or over a reduced set of tokens.

use super::{
    super::{
        DType, DevicePointer, Strided,
        attention::{
            AttentionPointers, Fold, PoolPointers, ScorePointers, Split, attention_folded_raw, attention_raw,
            needs_log_sum_exp,
        },
    },
    Cuda, CudaPlan, CudaTensor,
};
use crate::{
    Error, Result,
    backend::{Heads, Pooling, ScoreRequest, Scores},
};

/// Packed heads, checked: each part as a strided tensor.
struct Packed {
    /// Query, key and, with three parts, value, (B, N, H·D) each.
    parts: Vec<Strided<DevicePointer>>,
    sizes: Option<DevicePointer>,
}

/// What an attention has beside queries and keys.
#[derive(Clone, Copy, Default)]
struct Parts {
    /// Values, and where their result goes.
    values: Option<(Strided<DevicePointer>, Strided<DevicePointer>)>,
    /// The row of the values that each key has.
    groups: Option<DevicePointer>,
    pool: Option<PoolPointers>,
}

impl Cuda {
    fn unpack(&self, op: &'static str, heads: &Heads<'_, CudaTensor>, parts: usize) -> Result<Packed> {
        let packed = self.read(op, "packed heads", heads.packed)?;
        let ([batch, tokens, row], width) = (packed.shape, heads.heads.saturating_mul(heads.head_dim));
        if width == 0 || Some(row) != width.checked_mul(parts) {
            return Err(Error::argument(
                op,
                format!(
                    "packed rows of {row} values are not {parts} parts of {} heads of {}",
                    heads.heads, heads.head_dim
                ),
            ));
        }
        let sizes = heads.sizes.map(|sizes| self.read_f32(op, "sizes", sizes, &[batch, tokens]));
        let part = |part: usize| Strided {
            data: packed.data + (part * width * self.dtype().bytes()) as DevicePointer,
            shape: [batch, tokens, width],
            strides: packed.strides,
        };
        Ok(Packed { parts: (0..parts).map(part).collect(), sizes: sizes.transpose()? })
    }

    /// Attention in all its forms: with values, or for the scores alone.
    fn attend(
        &self,
        op: &'static str,
        heads: &Heads<'_, CudaTensor>,
        packed: &Packed,
        parts: Parts,
        request: ScoreRequest,
    ) -> Result<Scores<CudaTensor>> {
        let Parts { values, groups, pool } = parts;
        let [batch, tokens, _] = packed.parts[0].shape;
        let room =
            |wanted: bool| wanted.then(|| self.empty(&[batch, heads.heads, tokens], DType::F32)).transpose();
        let ScoreRequest { class, received } = request;
        let needed = needs_log_sum_exp(self.dtype(), tokens, heads.head_dim, class, received);
        let scores = [batch, heads.heads, tokens];
        let (class, received) = (room(class)?, room(received)?);
        let scratch = needed.then(|| self.scratch(&scores, DType::F32)).transpose()?;
        if values.is_none() && class.is_none() && received.is_none() {
            return Err(Error::argument(op, "no scores are asked for"));
        }
        let address = |tensor: &Option<CudaTensor>| tensor.as_ref().map(CudaTensor::pointer);
        let arguments = AttentionPointers {
            q: packed.parts[0],
            k: packed.parts[1],
            values,
            groups,
            heads: heads.heads,
            scale: heads.scale,
            sizes: packed.sizes,
            split: Split::Auto,
            scores: ScorePointers {
                class_rows: address(&class).map(|rows| (rows, 1)),
                received: address(&received),
                log_sum_exp: address(&scratch),
            },
            pool,
        };
        // SAFETY: as for `Backend` (see there); groups are those of a plan, whose indices are in range.
        unsafe { attention_raw(self.device(), self.stream(), self.dtype(), &arguments) }?;
        Ok(Scores { class, received })
    }

    pub(super) fn whole_attention(
        &self,
        qkv: &Heads<'_, CudaTensor>,
        request: ScoreRequest,
    ) -> Result<(CudaTensor, Scores<CudaTensor>)> {
        const OP: &str = "attention";
        let packed = self.unpack(OP, qkv, 3)?;
        let out = self.empty(&packed.parts[0].shape, self.dtype())?;
        let values = Some((packed.parts[2], out.tokens(OP, "out")?));
        let scores = self.attend(OP, qkv, &packed, Parts { values, ..Parts::default() }, request)?;
        Ok((out, scores))
    }

    pub(super) fn scores_alone(
        &self,
        qk: &Heads<'_, CudaTensor>,
        request: ScoreRequest,
    ) -> Result<Scores<CudaTensor>> {
        const OP: &str = "attention_scores";
        let packed = self.unpack(OP, qk, 2)?;
        if request == ScoreRequest::default() {
            return Ok(Scores { class: None, received: None });
        }
        self.attend(OP, qk, &packed, Parts::default(), request)
    }

    pub(super) fn reduced_attention(
        &self,
        qk: &Heads<'_, CudaTensor>,
        values: &CudaTensor,
        plan: &CudaPlan,
        pooling: Pooling,
    ) -> Result<CudaTensor> {
        const OP: &str = "attention_reduced";
        let packed = self.unpack(OP, qk, 2)?;
        let [batch, tokens, width] = packed.parts[0].shape;
        let pointers = self.read_plan(OP, plan)?;
        if plan.tokens_out() == 0 {
            return Err(Error::argument(OP, "the plan leaves no token to attend to"));
        }
        if (plan.batch(), plan.tokens_in()) != (batch, tokens) {
            return Err(Error::argument(
                OP,
                format!(
                    "the plan takes {} images of {} tokens, not {batch} of {tokens}",
                    plan.batch(),
                    plan.tokens_in()
                ),
            ));
        }
        let reduced = [batch, plan.tokens_out(), width];
        let source = self.read(OP, "values", values)?;
        values.expect_shape(OP, "values", &reduced)?;
        let out = self.empty(&reduced, self.dtype())?;
        let target = out.tokens(OP, "out")?;
        if pooling == Pooling::Max {
            let fold = Fold {
                q: packed.parts[0],
                k: packed.parts[1],
                values: source,
                out: target,
                heads: qk.heads,
                scale: qk.scale,
                sizes: packed.sizes,
                plan: pointers,
            };
            // SAFETY: as for `Backend`.
            unsafe { attention_folded_raw(self.device(), self.stream(), self.dtype(), &fold) }?;
            return Ok(out);
        }
        // Rows are pooled linearly: the product comes first, for all tokens, then the plan's weights.
        let rows = self.scratch(&[batch, tokens, width], self.dtype())?;
        let values = Some((source, rows.tokens(OP, "rows")?));
        let heads = size_of::<u32>() * batch.saturating_mul(qk.heads);
        let (arrived, _held) = self.inner.cleared.hold(&self.inner.space, heads)?;
        let pool = Some(PoolPointers { plan: pointers, out: target, arrived });
        self.attend(
            OP,
            qk,
            &packed,
            Parts { values, groups: Some(pointers.groups), pool },
            ScoreRequest::default(),
        )?;
        Ok(out)
    }
}
