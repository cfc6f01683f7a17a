//! LayerNorm, with and without the residual addition before it, and of a residual stream of f32; rounding of that.

use foveate::{
    Result,
    backend::Norm,
    cuda::{
        Element, Strided,
        convert::convert,
        norm::{add_layer_norm, layer_norm},
    },
};

use super::{ALL_TYPES, Counted, HALVES, Launch, Operation, Place, Shape, Value, Work, by_type, noise};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("add_layer_norm", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, with_residual(place, shape))
    }),
    Operation::new("layer_norm", ALL_TYPES, |place, dtype, shape| by_type!(dtype, alone(place, shape))),
    Operation::new("layer_norm_of_f32", HALVES, |place, dtype, shape| by_type!(dtype, of_f32(place, shape)))
        .counted(Counted::UpTo(197)),
    Operation::new("convert_f32", HALVES, |place, dtype, shape| by_type!(dtype, rounding(place, shape)))
        .counted(Counted::UpTo(197)),
];

fn alone<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    rows::<T, T>(place, shape)
}

/// A residual stream of f32.
fn of_f32<O: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    rows::<f32, O>(place, shape)
}

/// A tensor of f32 to `O`.
fn rounding<O: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let count = shape.batch * shape.tokens * shape.width;
    let (x, mut out) = (place.values::<f32>(count, 1)?, place.zeros::<O>(count)?);
    let work = Work { bytes: count * (4 + <O as Element>::DTYPE.bytes()), ..Work::default() };
    Ok(Launch::new(work, move || convert(&device, &stream, &x.as_view(), &mut out.as_view_mut())))
}

fn rows<T: Value, O: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let extents = [shape.batch, shape.tokens, shape.width];
    let count = extents.iter().product();
    let (x, weight, bias) = (
        place.values::<T>(count, 1)?,
        place.values::<O>(shape.width, 2)?,
        place.values::<O>(shape.width, 3)?,
    );
    let mut out = place.zeros::<O>(count)?;
    let bytes = <T as Element>::DTYPE.bytes() + <O as Element>::DTYPE.bytes();
    let work = Work { bytes: count * bytes, ..Work::default() };
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
