//! Resampling, to the bit as Pillow's `Image.resize` does it.
//!
//! Models are trained on Pillow's pixels, and a different filter costs accuracy that no one finds again. Pillow
//! (`src/libImaging/Resample.c`) convolves with a filter that widens with the reduction (antialiasing), rows first, then
//! columns, in fixed point: the coefficients of an output pixel are normalised in double precision, rounded to 22
//! fractional bits, and every pass rounds to 8 bits. No general-purpose resizing library rounds at the same places.

use std::ops::Range;

use super::Picture;
use crate::{Error, Result, tensor::elements};

/// How a picture is resized. Both filters are antialiased as Pillow's are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// Triangle filter.
    Bilinear,
    /// Cubic convolution, a = -0.5.
    Bicubic,
}

impl Interpolation {
    /// The name in timm's and Hugging Face's configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
        }
    }

    /// The filter that configuration files call `name`.
    ///
    /// # Errors
    /// When no filter of this crate is called that; the error lists the names.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "bilinear" => Ok(Self::Bilinear),
            "bicubic" => Ok(Self::Bicubic),
            _ => Err(Error::argument(
                "resize",
                format!("interpolation `{name}` is unknown; use bilinear or bicubic"),
            )),
        }
    }

    /// Half the width of the filter at scale 1, in input pixels.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    /// The filter's value at distance `x`. The order of the operations is Pillow's: another one rounds differently.
    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            _ => 0.0,
        }
    }
}

/// Fractional bits of the coefficients: 8 of the 32 are the pixel's, 2 leave room for the filter's overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// One half, where every sum starts, so that the shift at its end rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);
/// The most bytes one pass may write. Sizes can come from a file; memory should not run out because of a number in one.
const MAX_BYTES: usize = 512 << 20;

/// The input pixels of one output pixel along one axis.
struct Tap {
    /// The first input pixel.
    start: usize,
    /// The coefficients of it and its followers; they sum to 1, give or take the rounding.
    weights: Vec<i32>,
}

/// The picture with `height` rows and `width` columns.
///
/// Equal to the last bit to `Image.resize((width, height), BICUBIC or BILINEAR)` of Pillow up to 12 for 8-bit grey and
/// RGB: an axis whose size stays is not filtered. Pillow 13 more often filters columns before rows where that is less work (pictures
/// more than twice as high as wide, or a height reduced by more than the width), which rounds differently there.
///
/// # Errors
/// When a side is 0, or the result or the intermediate picture (rows of the input, columns of the result) needs more
/// than 512 MiB.
///
/// ```
/// use foveate::image::{Interpolation, Picture, resize};
///
/// let step = Picture::new(1, 4, 1, vec![0, 0, 200, 200])?;
/// assert_eq!(resize(&step, 1, 2, Interpolation::Bilinear)?.data(), [29, 171]);
/// # Ok::<(), foveate::Error>(())
/// ```
pub fn resize(
    picture: &Picture,
    height: usize,
    width: usize,
    interpolation: Interpolation,
) -> Result<Picture> {
    resize_window(picture, [height, width], [0..height, 0..width], interpolation)
}

/// The rows and columns `window` of the picture resized to `size` (height, width).
///
/// Output pixels do not depend on each other, so a crop of a resized picture need not resize what is cropped away. That
/// is cheaper, and a picture 2 pixels high and 30,000 wide, whose resized form would take gigabytes, does no harm.
pub(super) fn resize_window(
    picture: &Picture,
    size: [usize; 2],
    window: [Range<usize>; 2],
    interpolation: Interpolation,
) -> Result<Picture> {
    let ([height, width], [rows, columns]) = (size, window);
    let channels = picture.channels();
    let fail = |what: &str| Err(Error::argument("resize", format!("{height}x{width} pixels {what}")));
    if rows.is_empty() || columns.is_empty() {
        return fail("asked for; both sides must be at least 1");
    }
    let fits = |rows: usize| elements(&[rows, columns.len(), channels]).is_some_and(|n| n <= MAX_BYTES);
    if !fits(rows.len()) {
        return fail("asked for, more than 512 MiB; choose a smaller size");
    }
    let [row_count, column_count] = [rows.len(), columns.len()];
    if picture.height() > 100 * picture.width() && height < picture.height() && width != picture.width() {
        // Pillow's one exception to rows before columns.
        let all = 0..picture.width();
        let lowered = resize_window(picture, [height, all.end], [rows, all], interpolation)?;
        return resize_window(&lowered, [row_count, width], [0..row_count, columns], interpolation);
    }

    let vertical =
        (height != picture.height()).then(|| taps(picture.height(), height, rows.clone(), interpolation));
    // The rows of the input that the result is made of.
    let source_rows = match vertical.as_deref() {
        Some([first, .., last]) => first.start..last.start + last.weights.len(),
        Some([only]) => only.start..only.start + only.weights.len(),
        _ => rows,
    };
    if !fits(source_rows.len()) {
        return fail("need an intermediate picture of more than 512 MiB; resize in two steps");
    }

    let first = source_rows.start;
    let pitch = picture.width() * channels;
    let source = &picture.data()[first * pitch..source_rows.end * pitch];
    let narrowed = if width == picture.width() {
        source
            .chunks_exact(pitch)
            .flat_map(|row| &row[columns.start * channels..columns.end * channels])
            .copied()
            .collect()
    } else {
        let taps = taps(picture.width(), width, columns, interpolation);
        if channels == 3 {
            filter_rows::<3>(source, pitch, &taps)
        } else {
            filter_rows::<1>(source, pitch, &taps)
        }
    };
    let data = match vertical {
        Some(taps) => filter_columns(&narrowed, column_count * channels, first, &taps),
        None => narrowed,
    };
    Picture::new(row_count, column_count, channels, data)
}

/// The coefficients of the output pixels `window` when `input` pixels become `output` pixels.
fn taps(input: usize, output: usize, window: Range<usize>, interpolation: Interpolation) -> Vec<Tap> {
    let scale = input as f64 / output as f64;
    // Enlarging interpolates between neighbours; only reducing widens the filter.
    let stretch = scale.max(1.0);
    let support = interpolation.support() * stretch;
    let inverse = 1.0 / stretch;
    window
        .map(|position| {
            let centre = (position as f64 + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(input);
            let weights: Vec<f64> =
                (start..end).map(|x| interpolation.weight((x as f64 - centre + 0.5) * inverse)).collect();
            let sum: f64 = weights.iter().sum();
            Tap {
                start,
                weights: weights.iter().map(|w| fixed_point(if sum == 0.0 { *w } else { w / sum })).collect(),
            }
        })
        .collect()
}

/// A coefficient in fixed point, halves away from zero.
fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    // A normalised coefficient of either filter lies within ±2, inside i32; the cast truncates as C's does.
    (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// A sum in fixed point as a pixel value.
fn pixel_value(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Every row of `source`, `pitch` bytes long, filtered along its length.
///
/// The sums stay inside i32: coefficients sum to 1, negative ones make up at most an eighth of that, and 255 · 1.25 is
/// less than the 512 that 22 fractional bits leave.
fn filter_rows<const CHANNELS: usize>(source: &[u8], pitch: usize, taps: &[Tap]) -> Vec<u8> {
    let mut filtered = Vec::with_capacity(source.len() / pitch * taps.len() * CHANNELS);
    for row in source.chunks_exact(pitch) {
        let pixels = row.as_chunks::<CHANNELS>().0;
        for tap in taps {
            let mut sums = [HALF; CHANNELS];
            for (pixel, &weight) in pixels[tap.start..].iter().zip(&tap.weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            filtered.extend(sums.map(pixel_value));
        }
    }
    filtered
}

/// Every column of `source`, whose rows are `pitch` bytes long and start with row `first`, filtered along its length.
fn filter_columns(source: &[u8], pitch: usize, first: usize, taps: &[Tap]) -> Vec<u8> {
    let mut filtered = Vec::with_capacity(taps.len() * pitch);
    let mut sums = vec![HALF; pitch];
    for tap in taps {
        sums.fill(HALF);
        for (row, &weight) in source[(tap.start - first) * pitch..].chunks_exact(pitch).zip(&tap.weights) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += i32::from(value) * weight;
            }
        }
        filtered.extend(sums.iter().map(|&sum| pixel_value(sum)));
    }
    filtered
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Interpolation::{Bicubic, Bilinear};

    /// (5, 7) grey.
    fn sample() -> Picture {
        let data = (0..5_usize)
            .flat_map(|y| (0..7_usize).map(move |x| ((37 * (7 * y + x).pow(2) + 11 * x) % 256) as u8));
        Picture::new(5, 7, 1, data.collect()).unwrap()
    }

    #[test]
    fn coefficients_are_the_filters_by_hand() {
        // Two pixels become one: distances 0.25 of the stretched triangle, weights 3/4 each, normalised to halves.
        let halves = taps(2, 1, 0..1, Bilinear);
        assert_eq!((halves[0].start, &halves[0].weights[..]), (0, &[1 << 21, 1 << 21][..]));
        // One pixel becomes two: a single neighbour, whatever the distance.
        assert!(taps(1, 2, 0..2, Bicubic).iter().all(|tap| tap.start == 0 && tap.weights == [1 << 22]));
        // The middle of four equal pixels: -1/16, 9/16, 9/16, -1/16.
        assert_eq!([1.5, 0.5].map(|x| Bicubic.weight(x)), [-0.0625, 0.5625]);
        assert_eq!([0.0, 1.0, 2.0].map(|x| Bicubic.weight(x)), [1.0, 0.0, 0.0]);
        assert_eq!((fixed_point(0.5 / 4_194_304.0), fixed_point(-0.5 / 4_194_304.0)), (1, -1));
        assert_eq!([-1, 0, 300 << 22].map(pixel_value), [0, 0, 255]);
    }

    #[test]
    fn results_are_pillows() {
        // Written by Pillow 12.3: both axes, one axis, enlarged, reduced, and colour.
        let cases: [(usize, usize, Interpolation, &[u8]); 5] = [
            (3, 4, Bicubic, &[27, 149, 136, 133, 121, 135, 110, 89, 164, 89, 86, 154]),
            (3, 4, Bilinear, &[39, 143, 135, 135, 119, 128, 107, 94, 154, 95, 92, 147]),
            (
                8,
                3,
                Bicubic,
                &[
                    51, 133, 163, 62, 149, 138, 80, 162, 95, 87, 124, 51, 135, 113, 86, 208, 128, 183, 151,
                    72, 146, 96, 28, 103,
                ],
            ),
            (5, 2, Bilinear, &[85, 150, 115, 120, 104, 73, 177, 163, 77, 80]),
            (2, 7, Bicubic, &[32, 85, 151, 158, 116, 102, 120, 127, 194, 78, 98, 70, 169, 102]),
        ];
        for (height, width, interpolation, expected) in cases {
            let resized = resize(&sample(), height, width, interpolation).unwrap();
            assert_eq!(resized.data(), expected, "{height}x{width} {interpolation:?}");
        }
        let colours = Picture::new(1, 2, 3, vec![0, 255, 10, 255, 0, 200]).unwrap();
        let expected = [0, 255, 0, 17, 238, 22, 128, 128, 105, 238, 17, 188, 255, 0, 219];
        assert_eq!(resize(&colours, 1, 5, Bicubic).unwrap().data(), expected);
    }

    #[test]
    fn columns_go_first_where_a_picture_is_very_high() {
        let data: Vec<u8> = (0..402_usize).map(|i| (i * i % 251) as u8).collect();
        let strip = Picture::new(201, 2, 1, data).unwrap();
        let apart = resize(&resize(&strip, 5, 2, Bicubic).unwrap(), 5, 3, Bicubic).unwrap();
        assert_eq!(resize(&strip, 5, 3, Bicubic).unwrap(), apart);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let picture = sample();
        for (height, width) in [(0, 3), (3, 0), (usize::MAX, usize::MAX), (1 << 40, 1), (1 << 15, 1 << 15)] {
            let error = resize(&picture, height, width, Bicubic).unwrap_err().to_string();
            assert!(error.starts_with("resize: "), "{error}");
        }
        // A million rows, a million columns: neither input nor output is large, what is between them is.
        let column = Picture::new(1 << 16, 1 << 10, 1, vec![7; 1 << 26]).unwrap();
        let error = resize(&column, 1 << 13, 1 << 14, Bilinear).unwrap_err().to_string();
        assert!(error.contains("intermediate"), "{error}");
    }

    #[test]
    fn names_are_read_back() {
        for interpolation in [Bilinear, Bicubic] {
            assert_eq!(Interpolation::parse(interpolation.name()).unwrap(), interpolation);
        }
        assert!(Interpolation::parse("lanczos").unwrap_err().to_string().contains("bilinear or bicubic"));
    }

    fn pictures() -> impl Strategy<Value = Picture> {
        (1..20_usize, 1..20_usize, prop_oneof![Just(1_usize), Just(3)]).prop_flat_map(
            |(height, width, channels)| {
                prop::collection::vec(any::<u8>(), height * width * channels)
                    .prop_map(move |data| Picture::new(height, width, channels, data).unwrap())
            },
        )
    }

    proptest! {
        #[test]
        fn a_window_is_a_part_of_the_whole(
            picture in pictures(), size in [1..30_usize, 1..30_usize], from in [0.0..1.0, 0.0..1.0], share in [0.0..1.0, 0.0..1.0], cubic: bool,
        ) {
            let interpolation = if cubic { Bicubic } else { Bilinear };
            let window = [0, 1].map(|axis| {
                let start = (size[axis] as f64 * from[axis]) as usize;
                start..start + 1 + ((size[axis] - start - 1) as f64 * share[axis]) as usize
            });
            let whole = resize(&picture, size[0], size[1], interpolation).unwrap();
            let part = resize_window(&picture, size, window.clone(), interpolation).unwrap();
            for (y, row) in window[0].clone().enumerate() {
                for (x, column) in window[1].clone().enumerate() {
                    prop_assert_eq!(part.pixel(y, x), whole.pixel(row, column));
                }
            }
        }

        #[test]
        fn the_own_size_changes_nothing(picture in pictures()) {
            prop_assert_eq!(&resize(&picture, picture.height(), picture.width(), Bicubic).unwrap(), &picture);
        }

        #[test]
        fn constant_pictures_stay_constant(
            value: u8, from in [1..300_usize, 1..40_usize], to in [1..300_usize, 1..40_usize], cubic: bool,
        ) {
            let picture = Picture::new(from[0], from[1], 1, vec![value; from[0] * from[1]]).unwrap();
            let resized = resize(&picture, to[0], to[1], if cubic { Bicubic } else { Bilinear }).unwrap();
            prop_assert!(resized.data().iter().all(|v| *v == value));
        }

        #[test]
        fn grey_and_colour_agree(picture in pictures(), height in 1..30_usize, width in 1..30_usize) {
            let grey = picture.to_channels(1).unwrap();
            let resized = resize(&grey.to_channels(3).unwrap(), height, width, Bicubic).unwrap();
            prop_assert_eq!(resized, resize(&grey, height, width, Bicubic).unwrap().to_channels(3).unwrap());
        }
    }
}
