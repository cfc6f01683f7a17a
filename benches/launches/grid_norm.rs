//! Norms of feature maps: over an image and over the channels of a position.

use foveate::{
    Result,
    backend::{Norm, NormOver},
    cuda::{
        Element, Strided,
        grid_norm::{grid_norm, moments_length},
    },
};

use super::{ALL_TYPES, FEATURE_MAPS, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("image_norm", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape, NormOver::Image))
    })
    .on(FEATURE_MAPS),
    Operation::new("position_norm", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape, NormOver::Position))
    })
    .on(FEATURE_MAPS),
];

fn prepare<T: Value>(place: &Place, shape: Shape, over: NormOver) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let extents = [shape.batch, shape.tokens, shape.width];
    let count = extents.iter().product();
    let (weight, bias) = (place.values::<T>(shape.width, 2)?, place.values::<T>(shape.width, 3)?);
    let (x, mut out) = (place.values::<T>(count, 1)?, place.zeros::<T>(count)?);
    let mut moments = place.zeros::<f32>(moments_length(extents))?;
    let work = Work { bytes: 2 * count * <T as Element>::DTYPE.bytes(), ..Work::default() };
    Ok(Launch::new(work, move || {
        let norm = Norm { weight: weight.as_view(), bias: Some(bias.as_view()), eps: 1e-5 };
        let x = Strided::new(x.as_view(), extents);
        let mut out = Strided::new(out.as_view_mut(), extents);
        grid_norm(&device, &stream, &x, over, &norm, &mut out, &mut moments.as_view_mut())
    }))
}
