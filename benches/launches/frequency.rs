//! The frequency filter on the feature maps of AFFNet-ET and AFFNet, tokens and planes.

use foveate::{
    Result,
    backend::Frequency,
    cuda::{
        Element, Strided,
        frequency::{Filtering, FrequencyShape, Layout, frequency, workspace_bytes},
    },
    model::Activation,
};

use super::{ALL_TYPES, FEATURE_MAPS, Launch, Operation, Place, Shape, Units, Value, Work, by_type, grid};

const GROUPS: usize = 8;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("frequency", ALL_TYPES, |place, dtype, shape| by_type!(dtype, tokens(place, shape)))
        .on(FEATURE_MAPS),
    Operation::new("frequency_planes", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, planes(place, shape))
    })
    .on(FEATURE_MAPS),
];

fn tokens<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Layout::Tokens)
}

fn planes<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Layout::Planes)
}

fn prepare<T: Value>(place: &Place, shape: Shape, layout: Layout) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width: channels, .. } = shape;
    let (grid, s, bytes) = (grid(tokens), channels / GROUPS, <T as Element>::DTYPE.bytes());
    let extents = match layout {
        Layout::Tokens => [batch, tokens, channels],
        Layout::Planes => [batch, channels, tokens],
    };
    let count = batch * tokens * channels;
    let room = workspace_bytes(&device, FrequencyShape { batch, grid, channels, groups: GROUPS })?;
    let (x, residual) = (place.values::<T>(count, 1)?, place.values::<T>(count, 2)?);
    let (w1, w2) = (place.values::<T>(2 * GROUPS * s * s, 3)?, place.values::<T>(2 * GROUPS * s * s, 4)?);
    let (b1, b2) = (place.values::<T>(2 * GROUPS * s, 5)?, place.values::<T>(2 * GROUPS * s, 6)?);
    let (mut out, mut workspace) = (place.zeros::<T>(count)?, place.zeros::<u8>(room.max(8))?);
    let bins = grid[0] * (grid[1] / 2 + 1);
    // Both transforms of two channels at once, and eight real products for each weight.
    let transforms = 5.0 * tokens as f64 * (tokens as f64).log2() * channels as f64;
    let work = Work {
        bytes: (3 * count + 4 * GROUPS * (s * s + s)) * bytes,
        flops: batch * (transforms as usize + 16 * channels * s * bins),
        units: Units::Lanes,
    };
    Ok(Launch::new(work, move || {
        let filtering = Filtering {
            x: Strided::new(x.as_view(), extents),
            residual: Some(Strided::new(residual.as_view(), extents)),
            layout,
            grid,
            groups: GROUPS,
            filter: Frequency {
                w1: w1.as_view(),
                b1: b1.as_view(),
                w2: w2.as_view(),
                b2: b2.as_view(),
                activation: Activation::Silu,
                threshold: 0.01,
            },
        };
        let mut out = Strided::new(out.as_view_mut(), extents);
        frequency(&device, &stream, &filtering, &mut out, &mut workspace.slice_mut(..room))
    }))
}
