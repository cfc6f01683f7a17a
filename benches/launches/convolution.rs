//! Depthwise convolutions of inverted residuals, twice as wide as the feature map, and the first convolution of a network.

use foveate::{
    Result,
    backend::{Convolution, Depthwise},
    cuda::{
        Element, Strided,
        convolution::{convolution, depthwise},
    },
    model::Activation,
};

use super::{
    ALL_TYPES, FEATURE_MAPS, Launch, Operation, Place, Shape, Units, Value, Work, by_type, grid, shape,
};

const SILU: Option<Activation> = Some(Activation::Silu);
/// Of the first convolution.
const INPUTS: usize = 3;
const OUTPUTS: usize = 16;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("depthwise", ALL_TYPES, |place, dtype, shape| by_type!(dtype, keeping(place, shape)))
        .on(FEATURE_MAPS),
    Operation::new("depthwise_halving", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, halving(place, shape))
    })
    .on(FEATURE_MAPS),
    Operation::new("convolution", ALL_TYPES, |place, dtype, shape| by_type!(dtype, first(place, shape)))
        .on(&[shape(4096, 16, 8)]),
];

fn keeping<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    by_channel::<T>(place, shape, 1)
}

fn halving<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    by_channel::<T>(place, shape, 2)
}

fn by_channel<T: Value>(place: &Place, shape: Shape, stride: usize) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let (grid, channels) = (grid(shape.tokens), 2 * shape.width);
    let positions = grid[0].div_ceil(stride) * grid[1].div_ceil(stride);
    let (read, written) = (shape.batch * shape.tokens * channels, shape.batch * positions * channels);
    let (weight, bias) = (place.values::<T>(9 * channels, 2)?, place.values::<T>(channels, 3)?);
    let (x, mut out) = (place.values::<T>(read, 1)?, place.zeros::<T>(written)?);
    let work = Work {
        bytes: (read + written + 10 * channels) * <T as Element>::DTYPE.bytes(),
        flops: 18 * written,
        units: Units::Lanes,
    };
    Ok(Launch::new(work, move || {
        let (weight, bias) = (weight.as_view(), bias.as_view());
        let layer = Depthwise { weight, bias, stride, before: SILU, activation: SILU };
        let x = Strided::new(x.as_view(), [shape.batch, shape.tokens, channels]);
        let mut out = Strided::new(out.as_view_mut(), [shape.batch, positions, channels]);
        depthwise(&device, &stream, &x, grid, &layer, &mut out)
    }))
}

fn first<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let grid = grid(shape.tokens);
    let positions = grid[0].div_ceil(2) * grid[1].div_ceil(2);
    let (read, written) = (shape.batch * shape.tokens * INPUTS, shape.batch * positions * OUTPUTS);
    let (weight, bias) = (place.values::<T>(9 * INPUTS * OUTPUTS, 2)?, place.values::<T>(OUTPUTS, 3)?);
    let (x, mut out) = (place.values::<T>(read, 1)?, place.zeros::<T>(written)?);
    let work = Work {
        bytes: (read + written + (9 * INPUTS + 1) * OUTPUTS) * <T as Element>::DTYPE.bytes(),
        flops: 18 * INPUTS * written,
        units: Units::Lanes,
    };
    Ok(Launch::new(work, move || {
        let (weight, bias) = (weight.as_view(), bias.as_view());
        let layer = Convolution { weight, bias, stride: 2, activation: SILU };
        let x = Strided::new(x.as_view(), [shape.batch, shape.tokens, INPUTS]);
        let mut out = Strided::new(out.as_view_mut(), [shape.batch, positions, OUTPUTS]);
        convolution(&device, &stream, &x, grid, &layer, &mut out)
    }))
}
