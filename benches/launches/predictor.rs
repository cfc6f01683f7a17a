//! `DynamicViT`'s predictor of who is kept.

use cudarc::driver::CudaSlice;
use foveate::{
    Result,
    backend::{Linear, Norm, Predictor},
    cuda::{
        Element, Strided,
        predictor::{Scratch, ScratchExtents, keep_scores},
    },
};

use super::{ALL_TYPES, Counted, Launch, Operation, Place, Shape, Units, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] =
    &[Operation::new("keep_scores", ALL_TYPES, |place, dtype, shape| by_type!(dtype, prepare(place, shape)))
        .counted(Counted::UpTo(257))];

/// Both launches, for the patches of each image behind one class token.
fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width: c, .. } = shape;
    let patches = tokens - 1;
    let x = place.values::<T>(batch * tokens * c, 1)?;
    let vector = |count: usize, seed: usize| place.values::<T>(count, seed);
    let norm = [vector(c, 2)?, vector(c, 3)?];
    let shapes = [[c, c], [c / 2, c], [c / 4, c / 2], [2, c / 4]];
    let mut layers: Vec<[CudaSlice<T>; 2]> = Vec::new();
    for (at, [outputs, inputs]) in shapes.into_iter().enumerate() {
        layers.push([vector(outputs * inputs, 4 + at)?, vector(outputs, 8 + at)?]);
    }
    let extents = ScratchExtents::new(batch, patches, c);
    let mut local = place.zeros::<T>(extents.local)?;
    let mut partial = place.zeros::<f32>(extents.partial)?;
    let mut scores = place.zeros::<f32>(batch * tokens)?;
    let size = <T as Element>::DTYPE.bytes();
    let weights: usize = shapes.iter().map(|[outputs, inputs]| outputs * (inputs + 1)).sum::<usize>() + 2 * c;
    let products: usize = shapes.iter().map(|[outputs, inputs]| outputs * inputs).sum();
    let work = Work {
        bytes: size * (batch * patches * c + weights) + 4 * batch * tokens,
        flops: 2 * batch * patches * products,
        units: Units::of(T::DTYPE),
    };
    Ok(Launch::new(work, move || {
        let linear =
            |at: usize| Linear { weight: layers[at][0].as_view(), bias: Some(layers[at][1].as_view()) };
        let predictor = Predictor {
            norm: Norm { weight: norm[0].as_view(), bias: Some(norm[1].as_view()), eps: 1e-5 },
            hidden: linear(0),
            first: linear(1),
            second: linear(2),
            last: linear(3),
        };
        let view = Strided::new(x.as_view(), [batch, tokens, c]);
        let mut scratch = Scratch { local: local.as_view_mut(), partial: partial.as_view_mut() };
        keep_scores(&device, &stream, &view, &predictor, 1, &mut scratch, &mut scores.as_view_mut())
    }))
}
