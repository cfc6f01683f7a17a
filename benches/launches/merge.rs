//! Merging with its LayerNorm, and its inverse.

use foveate::{
    Result,
    backend::{Norm, Pooling},
    cuda::{
        DevicePlan, Element, Strided,
        merge::{Merge, Merged, merge, unmerge},
    },
};

use super::{ALL_TYPES, Counted, HALVES, Launch, Operation, Place, Shape, Value, Work, by_type, plan::pairs};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("merge", ALL_TYPES, |place, dtype, shape| by_type!(dtype, merging(place, shape))),
    Operation::new("unmerge", ALL_TYPES, |place, dtype, shape| by_type!(dtype, undoing(place, shape))),
    Operation::new("merge_of_f32", HALVES, |place, dtype, shape| by_type!(dtype, of_f32(place, shape)))
        .counted(Counted::UpTo(197)),
];

fn merging<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    of_types::<T, T>(place, shape)
}

/// A residual stream of f32, its LayerNorm of halves.
fn of_f32<O: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    of_types::<f32, O>(place, shape)
}

fn of_types<T: Value, O: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let plan = DevicePlan::upload(&stream, &pairs(batch, tokens)?)?;
    let out = plan.tokens_out();
    let (x, weight, bias) = (
        place.values::<T>(batch * tokens * width, 1)?,
        place.values::<O>(width, 2)?,
        place.values::<O>(width, 3)?,
    );
    let sizes = place.upload(&vec![1.0_f32; batch * tokens])?;
    let (mut merged, mut normed) =
        (place.zeros::<T>(batch * out * width)?, place.zeros::<O>(batch * out * width)?);
    let mut sizes_out = place.zeros::<f32>(batch * out)?;
    let plan_bytes = 4 * batch * (2 * tokens + out + 1);
    let work = Work {
        bytes: batch * (tokens + out) * width * <T as Element>::DTYPE.bytes()
            + batch * out * width * <O as Element>::DTYPE.bytes()
            + 4 * batch * (tokens + out)
            + plan_bytes,
        ..Work::default()
    };
    Ok(Launch::new(work, move || {
        let arguments = Merge {
            x: Strided::new(x.as_view(), [batch, tokens, width]),
            sizes: Some(sizes.as_view()),
            plan: &plan,
            pooling: Pooling::Weighted,
            norm: Some(Norm { weight: weight.as_view(), bias: Some(bias.as_view()), eps: 1e-6 }),
        };
        let mut written = Merged {
            tokens: Strided::new(merged.as_view_mut(), [batch, out, width]),
            sizes: sizes_out.as_view_mut(),
            normed: Some(Strided::new(normed.as_view_mut(), [batch, out, width])),
        };
        merge(&device, &stream, &arguments, &mut written)
    }))
}

fn undoing<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let plan = DevicePlan::upload(&stream, &pairs(batch, tokens)?)?;
    let merged = plan.tokens_out();
    let x = place.values::<T>(batch * merged * width, 1)?;
    let mut out = place.zeros::<T>(batch * tokens * width)?;
    let work = Work {
        bytes: batch * (tokens + merged) * width * <T as Element>::DTYPE.bytes() + 4 * batch * tokens,
        ..Work::default()
    };
    Ok(Launch::new(work, move || {
        let x = Strided::new(x.as_view(), [batch, merged, width]);
        unmerge(&device, &stream, &x, &plan, &mut Strided::new(out.as_view_mut(), [batch, tokens, width]))
    }))
}
