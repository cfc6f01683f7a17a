//! Drop and grow of a sparse layer, the MLP's first of a block as wide as the shape, half of it there; scores of the MLP's neurons
//! and of the attention's heads.

use foveate::{
    Result,
    cuda::{
        Element, Strided,
        connectivity::{drop_and_grow, workspace_bytes},
        structured::{HeadSums, head_sums, neuron_scores},
    },
};

use super::{DType, Launch, Operation, Place, Shape, Value, Work, by_type, noise, shape};

/// Weights are kept in f32 while they are trained.
const TYPES: &[DType] = &[DType::F32, DType::Bf16, DType::F16];

/// What happens once in thousands of iterations is counted once.
const ONE: &[Shape] = &[shape(197, 384, 6)];

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("drop_and_grow", TYPES, |place, dtype, shape| by_type!(dtype, prepare(place, shape)))
        .on(ONE),
    Operation::new("head_sums", TYPES, |place, dtype, shape| by_type!(dtype, heads(place, shape))).on(ONE),
    Operation::new("neuron_scores", TYPES, |place, dtype, shape| by_type!(dtype, neurons(place, shape)))
        .on(ONE),
];

fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let count = 4 * shape.width * shape.width;
    // Values that do not repeat: in f32 few of them tie.
    let values = |seed| (0..count).map(|at| T::of(noise(at, seed))).collect::<Vec<T>>();
    let mut weight = place.upload(&values(1))?;
    let gradient = place.upload(&values(2))?;
    let mask: Vec<u8> = (0..count).map(|at| (at.wrapping_mul(0x9E37_79B1) >> 16 & 1) as u8).collect();
    let mut mask = place.upload(&mask)?;
    let mut workspace = place.zeros::<u8>(workspace_bytes(count)?)?;
    // Weights, gradients and mask read, weights and mask written.
    let bytes = count * (3 * <T as Element>::DTYPE.bytes() + 2);
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        drop_and_grow(
            &device,
            &stream,
            &mut weight.as_view_mut(),
            &gradient.as_view(),
            &mut mask.as_view_mut(),
            0.3,
            &mut workspace.as_view_mut(),
        )
    }))
}

fn heads<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    let extents = [batch, tokens, width];
    let count: usize = extents.iter().product();
    let (output, gradient) = (place.values::<T>(count, 1)?, place.values::<T>(count, 2)?);
    let (mut products, mut sizes) = (place.zeros::<f32>(batch * heads)?, place.zeros::<f32>(batch * heads)?);
    let bytes = 2 * count * <T as Element>::DTYPE.bytes() + 8 * batch * heads;
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let sums = &mut HeadSums { products: products.as_view_mut(), sizes: sizes.as_view_mut() };
        let view = |x| Strided::new(x, extents);
        head_sums(&device, &stream, &view(output.as_view()), &view(gradient.as_view()), heads, sums)
    }))
}

fn neurons<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let (width, neurons) = (shape.width, 4 * shape.width);
    let (fc1, fc2) = (place.values::<T>(neurons * width, 1)?, place.values::<T>(neurons * width, 2)?);
    let mut scores = place.zeros::<f32>(neurons)?;
    let bytes = 2 * neurons * width * <T as Element>::DTYPE.bytes() + 4 * neurons;
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let fc1 = Strided::new(fc1.as_view(), [1, neurons, width]);
        let fc2 = Strided::new(fc2.as_view(), [1, width, neurons]);
        neuron_scores(&device, &stream, &fc1, &fc2, &mut scores.as_view_mut())
    }))
}
