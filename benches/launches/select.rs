//! Top-k selection by class scores.

use foveate::{
    Result,
    cuda::{
        DevicePlan, Element, Strided,
        select::{Selection, select},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type, plan::bytes};

pub(super) const OPERATIONS: &[Operation] =
    &[Operation::new("select", ALL_TYPES, |place, dtype, shape| by_type!(dtype, prepare(place, shape)))];

/// EViT's: the class token and seven tenths of the others are kept, the rest is fused.
fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, heads, .. } = shape;
    let selection = Selection { special: 1, keep: tokens.saturating_sub(1) * 7 / 10, fuse: true };
    let out = selection.tokens_out(tokens)?;
    let scores = place.values::<T>(batch * heads * tokens, 1)?;
    let mut plan = DevicePlan::new(&stream, batch, tokens, out)?;
    let read = batch * heads * tokens * <T as Element>::DTYPE.bytes();
    let work = Work { bytes: read + bytes(batch, tokens, out), ..Work::default() };
    Ok(Launch::new(work, move || {
        let view = Strided::new(scores.as_view(), [batch, heads, tokens]);
        select(&device, &stream, &view, selection, &mut plan)
    }))
}
