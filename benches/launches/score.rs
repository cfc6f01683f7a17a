//! A selector's score of every token.

use foveate::{
    Result,
    backend::Linear,
    cuda::{Element, Strided, score::token_scores},
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] =
    &[Operation::new("token_scores", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape))
    })];

fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let x = place.values::<T>(batch * tokens * width, 1)?;
    let weight = place.values::<T>(width, 2)?;
    let bias = place.values::<T>(1, 3)?;
    let mut scores = place.zeros::<f32>(batch * tokens)?;
    let read = (batch * tokens * width + width + 1) * <T as Element>::DTYPE.bytes();
    let work = Work { bytes: read + 4 * batch * tokens, ..Work::default() };
    Ok(Launch::new(work, move || {
        let x = Strided::new(x.as_view(), [batch, tokens, width]);
        let selector = Linear { weight: weight.as_view(), bias: Some(bias.as_view()) };
        token_scores(&device, &stream, &x, &selector, None, &mut scores.as_view_mut())
    }))
}
