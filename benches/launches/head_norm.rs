//! LayerNorm of the keys, head by head.

use foveate::{
    Result,
    backend::Norm,
    cuda::{Element, Strided, head_norm::head_norm},
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] =
    &[Operation::new("head_norm", ALL_TYPES, |place, dtype, shape| by_type!(dtype, prepare(place, shape)))];

fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    // In place: what is normalised stays so, however often it is launched.
    let mut packed = place.values::<T>(batch * tokens * 3 * width, 1)?;
    let head_dim = width / heads.max(1);
    let (weight, bias) = (place.values::<T>(head_dim, 2)?, place.values::<T>(head_dim, 3)?);
    let bytes = 2 * batch * tokens * width * <T as Element>::DTYPE.bytes();
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let norm = Norm { weight: weight.as_view(), bias: Some(bias.as_view()), eps: 1e-6 };
        let mut packed = Strided::new(packed.as_view_mut(), [batch, tokens, 3 * width]);
        head_norm(&device, &stream, &mut packed, 1, heads, &norm)
    }))
}
