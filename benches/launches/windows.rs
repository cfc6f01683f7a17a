//! Means over windows of the grid of patches, and their way back.

use foveate::{
    Result,
    cuda::{
        Element,
        windows::{Windows, add_windows, pool_windows},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("pool_windows", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape, false))
    }),
    Operation::new("add_windows", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape, true))
    }),
];

/// Windows of 2 x 2 over a grid as square as the tokens allow, the first ones special.
fn prepare<T: Value>(place: &Place, shape: Shape, add: bool) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let side = (tokens - 1).isqrt().max(1);
    let windows = Windows { batch, special: tokens - side * side, grid: [side; 2], width, scale: 2 };
    let cells = windows.cells()[0] * windows.cells()[1];
    let mut x = place.values::<T>(batch * tokens * width, 1)?;
    let mut pooled = place.values::<T>(batch * cells * width, 2)?;
    let patches = if add { 2 * side * side } else { side * side };
    let work =
        Work { bytes: batch * (patches + cells) * width * <T as Element>::DTYPE.bytes(), ..Work::default() };
    Ok(Launch::new(work, move || {
        if add {
            add_windows(&device, &stream, &mut x.as_view_mut(), windows, &pooled.as_view())
        } else {
            pool_windows(&device, &stream, &x.as_view(), windows, &mut pooled.as_view_mut())
        }
    }))
}
