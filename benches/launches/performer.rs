//! T2T-ViT's performer: its two stages at 224 pixels.

use foveate::{
    Result,
    cuda::{
        Element, Strided,
        performer::{partial_length, performer},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Units, Value, Work, by_type, shape};

pub(super) const OPERATIONS: &[Operation] =
    &[Operation::new("performer", ALL_TYPES, |place, dtype, shape| by_type!(dtype, stage(place, shape)))
        .on(&[shape(784, 64, 1), shape(3136, 64, 1)])];

/// Random features.
const FEATURES: usize = 32;

fn stage<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    let width = width / heads;
    let packed = place.values::<T>(batch * tokens * 3 * width, 1)?;
    let weight = place.values::<f32>(FEATURES * width, 2)?;
    let mut partial = place.zeros::<f32>(partial_length(batch, tokens, width, FEATURES))?;
    let mut out = place.zeros::<T>(batch * tokens * width)?;
    let work = Work {
        bytes: 4 * (batch * tokens * width * <T as Element>::DTYPE.bytes() + FEATURES * width),
        flops: 2 * batch * tokens * FEATURES * (4 * width + 1),
        units: Units::Lanes,
    };
    Ok(Launch::new(work, move || {
        let packed = Strided::new(packed.as_view(), [batch, tokens, 3 * width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, tokens, width]);
        let (weight, mut partial) = (weight.as_view(), partial.as_view_mut());
        performer(&device, &stream, &packed, &weight, FEATURES, &mut partial, &mut out)
    }))
}
