//! LayerNorm, with and without the residual addition before it.

use foveate::{
    Result,
    backend::Norm,
    cuda::{
        Element, Strided,
        norm::{add_layer_norm, layer_norm},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type, noise};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("add_layer_norm", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, with_residual(place, shape))
    }),
    Operation::new("layer_norm", ALL_TYPES, |place, dtype, shape| by_type!(dtype, alone(place, shape))),
];

fn alone<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let extents = [shape.batch, shape.tokens, shape.width];
    let count = extents.iter().product();
    let (x, weight, bias) = (
        place.values::<T>(count, 1)?,
        place.values::<T>(shape.width, 2)?,
        place.values::<T>(shape.width, 3)?,
    );
    let mut out = place.zeros::<T>(count)?;
    let work = Work { bytes: 2 * count * <T as Element>::DTYPE.bytes(), ..Work::default() };
    Ok(Launch::new(work, move || {
        let norm = Norm { weight: weight.as_view(), bias: Some(bias.as_view()), eps: 1e-6 };
        let mut out = Strided::new(out.as_view_mut(), extents);
        layer_norm(&device, &stream, &Strided::new(x.as_view(), extents), &norm, &mut out)
    }))
}

fn with_residual<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let extents = [shape.batch, shape.tokens, shape.width];
    let count: usize = extents.iter().product();
    let (weight, bias) = (place.values::<T>(shape.width, 2)?, place.values::<T>(shape.width, 3)?);
    // The sum goes where x was: it must stay finite however often it is launched.
    let residual: Vec<T> = (0..count).map(|i| T::of(1e-7 * noise(i, 4))).collect();
    let (mut x, residual) = (place.values::<T>(count, 1)?, place.upload(&residual)?);
    let mut out = place.zeros::<T>(count)?;
    let work = Work { bytes: 4 * count * <T as Element>::DTYPE.bytes(), ..Work::default() };
    Ok(Launch::new(work, move || {
        let norm = Norm { weight: weight.as_view(), bias: Some(bias.as_view()), eps: 1e-6 };
        let mut x = Strided::new(x.as_view_mut(), extents);
        let residual = Strided::new(residual.as_view(), extents);
        let mut out = Strided::new(out.as_view_mut(), extents);
        add_layer_norm(&device, &stream, &mut x, &residual, &norm, &mut out)
    }))
}
