//! What windows see of images (T2T-ViT's first soft split) and of feature maps (its second, and LV-ViT's convolutions).

use foveate::{
    Result,
    backend::Window,
    cuda::{
        Element, Strided,
        patch::DeviceImages,
        unfold::{unfold, unfold_images},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type, grid, noise, shape};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("unfold", ALL_TYPES, |place, dtype, shape| by_type!(dtype, map(place, shape)))
        .on(&[shape(3136, 64, 1), shape(784, 64, 1)]),
    Operation::new("unfold_images", ALL_TYPES, |place, dtype, shape| by_type!(dtype, images(place, shape)))
        .on(&[shape(3136, 64, 1)]),
];

const FIRST: Window = Window { kernel: 7, stride: 4, padding: 2 };
const NEXT: Window = Window { kernel: 3, stride: 2, padding: 1 };
/// Colours of an image.
const CHANNELS: usize = 3;

fn map<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let grid = grid(tokens);
    let places: usize = NEXT.over(grid).unwrap_or([1, 1]).iter().product();
    let x = place.values::<T>(batch * tokens * width, 1)?;
    let written = batch * places * NEXT.taps() * width;
    let mut out = place.zeros::<T>(written)?;
    let bytes = (batch * tokens * width + written) * <T as Element>::DTYPE.bytes();
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let x = Strided::new(x.as_view(), [batch, tokens, width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, places, NEXT.taps() * width]);
        unfold(&device, &stream, &x, grid, NEXT, &mut out)
    }))
}

/// Images of as many places as there are tokens.
fn images<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let sides = grid(shape.tokens).map(|side| 4 * side);
    let extents = [shape.batch, CHANNELS, sides[0], sides[1]];
    let count: usize = extents.iter().product();
    let pixels: Vec<u8> = (0..count).map(|i| (127.0 * noise(i, 1) + 128.0) as u8).collect();
    let pixels = place.upload(&pixels)?;
    let out_shape = [shape.batch, shape.tokens, CHANNELS * FIRST.taps()];
    let written: usize = out_shape.iter().product();
    let mut out = place.zeros::<T>(written)?;
    let bytes = count + written * <T as Element>::DTYPE.bytes();
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let images = DeviceImages::planes(pixels.as_view(), extents);
        let mut out = Strided::new(out.as_view_mut(), out_shape);
        unfold_images(&device, &stream, &images, FIRST, &[0.5; CHANNELS], &[0.25; CHANNELS], &mut out)
    }))
}
