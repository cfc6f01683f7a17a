//! Nonlinearities between the layers of a block's MLP, four times as wide as the tokens.

use foveate::{
    Result,
    cuda::{Element, Strided, activation::activate},
    model::Activation,
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("gelu", ALL_TYPES, |place, dtype, shape| by_type!(dtype, gelu(place, shape))),
    Operation::new("swiglu", ALL_TYPES, |place, dtype, shape| by_type!(dtype, swiglu(place, shape))),
];

/// `erf` and all: the costliest one.
fn gelu<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Activation::Gelu, 4)
}

fn swiglu<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Activation::SwiGlu, 8)
}

/// `read` values in a row for each value of a token.
fn prepare<T: Value>(place: &Place, shape: Shape, activation: Activation, read: usize) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let (inputs, outputs) = (read * width, 4 * width);
    let x = place.values::<T>(batch * tokens * inputs, 1)?;
    let mut out = place.zeros::<T>(batch * tokens * outputs)?;
    let bytes = batch * tokens * (inputs + outputs) * <T as Element>::DTYPE.bytes();
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let x = Strided::new(x.as_view(), [batch, tokens, inputs]);
        let mut out = Strided::new(out.as_view_mut(), [batch, tokens, outputs]);
        activate(&device, &stream, activation, &x, &mut out)
    }))
}
