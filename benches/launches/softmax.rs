//! Softmax of one row of scores a head, with token sizes.

use foveate::{
    Result,
    cuda::{Element, Strided, softmax::softmax},
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] =
    &[Operation::new("softmax", ALL_TYPES, |place, dtype, shape| by_type!(dtype, prepare(place, shape)))];

fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, heads, .. } = shape;
    let x = place.values::<T>(batch * heads * tokens, 1)?;
    let sizes = place.upload(&vec![2.0_f32; batch * tokens])?;
    let mut out = place.zeros::<T>(batch * heads * tokens)?;
    let bytes = batch * tokens * (2 * heads * <T as Element>::DTYPE.bytes() + 4);
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let x = Strided::new(x.as_view(), [batch, heads, tokens]);
        let mut out = Strided::new(out.as_view_mut(), [batch, heads, tokens]);
        softmax(&device, &stream, &x, Some(&sizes.as_view()), 0.125, &mut out)
    }))
}
