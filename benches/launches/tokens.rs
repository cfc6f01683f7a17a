//! Some tokens of each image, the mean of them and their largest values.

use foveate::{
    Result,
    cuda::{
        Element, Strided,
        tokens::{max_tokens, mean_tokens, tokens},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("mean_tokens", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, mean(place, shape, false))
    }),
    Operation::new("max_tokens", ALL_TYPES, |place, dtype, shape| by_type!(dtype, mean(place, shape, true))),
    Operation::new("tokens", ALL_TYPES, |place, dtype, shape| by_type!(dtype, copy(place, shape))),
];

/// All but the class token, by size.
fn mean<T: Value>(place: &Place, shape: Shape, largest: bool) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let x = place.values::<T>(batch * tokens * width, 1)?;
    let sizes = place.upload(&vec![2.0_f32; batch * tokens])?;
    let mut out = place.zeros::<T>(batch * width)?;
    let rows = tokens.saturating_sub(1);
    let bytes = batch * ((rows + 1) * width * <T as Element>::DTYPE.bytes() + 4 * rows);
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let x = Strided::new(x.as_view(), [batch, tokens, width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, 1, width]);
        let reduce = if largest { max_tokens } else { mean_tokens };
        reduce(&device, &stream, &x, Some(&sizes.as_view()), 1, &mut out)
    }))
}

/// All but the class token.
fn copy<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens: all, width, .. } = shape;
    let rows = all.saturating_sub(1);
    let x = place.values::<T>(batch * all * width, 1)?;
    let mut out = place.zeros::<T>(batch * rows * width)?;
    let bytes = 2 * batch * rows * width * <T as Element>::DTYPE.bytes();
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let x = Strided::new(x.as_view(), [batch, all, width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, rows, width]);
        tokens(&device, &stream, &x, 1..all, &mut out)
    }))
}
