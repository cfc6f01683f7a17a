//! Images to patch rows, and patch tokens to the sequence of the first block.

use foveate::{
    Result,
    cuda::{
        Element, Strided,
        patch::{DeviceImages, Pixel, embed, patches},
    },
};

use super::{ALL_TYPES, Launch, Operation, PERIOD, Place, Shape, Value, Work, by_type, noise};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("embed", ALL_TYPES, |place, dtype, shape| by_type!(dtype, sequence(place, shape))),
    Operation::new("patches_f32", ALL_TYPES, |place, dtype, shape| by_type!(dtype, planes_f32(place, shape)))
        .of_any_width(),
    Operation::new("patches_rgb", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, interleaved_u8(place, shape))
    })
    .of_any_width(),
    Operation::new("patches_u8", ALL_TYPES, |place, dtype, shape| by_type!(dtype, planes_u8(place, shape)))
        .of_any_width(),
];

/// Colours of an image.
const CHANNELS: usize = 3;

/// Rows and columns of the patches beside a class token, as square as their number allows, and the pixels of a patch's
/// side: 32 for ViT/32, 16 for ViT/16, 14 for what has more tokens.
fn grid(tokens: usize) -> ([usize; 2], usize) {
    let count = tokens.saturating_sub(1).max(1);
    let rows = (1..=count.isqrt()).rev().find(|rows| count.is_multiple_of(*rows)).unwrap_or(1);
    let side = match count {
        ..64 => 32,
        64..200 => 16,
        _ => 14,
    };
    ([rows, count / rows], side)
}

fn planes_u8<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    cut::<u8, T>(place, shape, DeviceImages::planes, |value| (127.0 * value + 128.0) as u8)
}

fn interleaved_u8<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    cut::<u8, T>(place, shape, DeviceImages::interleaved, |value| (127.0 * value + 128.0) as u8)
}

fn planes_f32<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    cut::<f32, T>(place, shape, DeviceImages::planes, |value| value)
}

/// Patches of images that lie in memory as `layout` says, of pixels that `pixel` makes of values in -1..1.
fn cut<P: Pixel + 'static, T: Value>(
    place: &Place,
    shape: Shape,
    layout: impl Fn((), [usize; 4]) -> DeviceImages<()>,
    pixel: impl Fn(f32) -> P,
) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let ([rows, columns], side) = grid(shape.tokens);
    let extents = [shape.batch, CHANNELS, rows * side, columns * side];
    let count: usize = extents.iter().product();
    let table: Vec<P> = (0..count.min(PERIOD)).map(|i| pixel(noise(i, 1))).collect();
    let pixels = place.upload(&table.iter().copied().cycle().take(count).collect::<Vec<_>>())?;
    let mut out = place.zeros::<T>(count)?;
    let DeviceImages { shape: extents, strides, .. } = layout((), extents);
    let out_shape = [shape.batch, rows * columns, CHANNELS * side * side];
    let work = Work { bytes: count * (size_of::<P>() + <T as Element>::DTYPE.bytes()), ..Work::default() };
    Ok(Launch::new(work, move || {
        let images = DeviceImages { data: pixels.as_view(), shape: extents, strides };
        let mut out = Strided::new(out.as_view_mut(), out_shape);
        patches(&device, &stream, &images, [side; 2], &[0.5; CHANNELS], &[0.25; CHANNELS], &mut out)
    }))
}

fn sequence<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let count = tokens.saturating_sub(1);
    let (rows, prefix) = (place.values::<T>(batch * count * width, 1)?, place.values::<T>(width, 2)?);
    let position = place.values::<T>(count * width, 3)?;
    let mut out = place.zeros::<T>(batch * tokens * width)?;
    let elements = (batch * (count + tokens) + count + 1) * width;
    let work = Work { bytes: elements * <T as Element>::DTYPE.bytes(), ..Work::default() };
    Ok(Launch::new(work, move || {
        let rows = Strided::new(rows.as_view(), [batch, count, width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, tokens, width]);
        embed(&device, &stream, &rows, Some(&prefix.as_view()), Some(&position.as_view()), &mut out)
    }))
}
