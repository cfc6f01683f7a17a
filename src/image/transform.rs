//! From a picture of any size to a model's input: timm's evaluation transform.

use super::{Interpolation, Picture, resize::resize_window};
use crate::{Error, Images, Pixels, Result};

/// timm's evaluation transform: resize the short side to `size/crop_pct`, crop the centre, scale to 0..1, normalise.
///
/// ```
/// use foveate::image::{Picture, Transform, batch};
///
/// let photo = Picture::filled(300, 451, [200, 100, 50])?;
/// let input = Transform::imagenet().apply(&photo, [224, 224])?;
/// assert_eq!((input.height(), input.width()), (224, 224));
/// assert_eq!(batch(&[input])?.shape(), [1, 3, 224, 224]);
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Transform {
    /// Share of the resized short side that the crop covers, in (0, 1].
    pub crop_pct: f64,
    /// The resampling filter.
    pub interpolation: Interpolation,
    /// Subtracted per channel, after scaling to 0..1. Its length, 1 or 3, is the number of channels of the result.
    pub mean: Vec<f32>,
    /// Divided by, per channel.
    pub std: Vec<f32>,
}

/// The longest side a picture may have after resizing and before cropping: Pillow's limit.
const MAX_SIDE: f64 = i32::MAX as f64;

impl Transform {
    /// What most models trained on `ImageNet` are evaluated with, those of the reduction papers among them: mean and
    /// deviation of `ImageNet`, bicubic, 0.9 of the short side.
    pub fn imagenet() -> Self {
        Self::bicubic(0.9, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    }

    /// What the original vision transformers expect, the regularised `augreg` ones too: 0..1 becomes -1..1, bicubic, 0.9 of the short side.
    pub fn inception() -> Self {
        Self::bicubic(0.9, [0.5; 3], [0.5; 3])
    }

    /// What CLIP's visual towers expect: mean and deviation of CLIP's training data, bicubic, the whole short side.
    pub fn clip() -> Self {
        Self::bicubic(
            1.0,
            [0.481_454_66, 0.457_827_5, 0.408_210_73],
            [0.268_629_54, 0.261_302_6, 0.275_777_1],
        )
    }

    fn bicubic(crop_pct: f64, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { crop_pct, interpolation: Interpolation::Bicubic, mean: mean.to_vec(), std: std.to_vec() }
    }

    /// The number of channels of the result, 1 or 3.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Whether the numbers make sense.
    ///
    /// # Errors
    /// When `crop_pct` is outside (0, 1], `mean` and `std` do not both have 1 or both have 3 values, a mean is not
    /// finite, or a deviation is not a positive number.
    pub fn check(&self) -> Result<()> {
        let fail = |what: String| Err(Error::argument("transform", what));
        // Written so that NaN fails.
        if !(self.crop_pct > 0.0 && self.crop_pct <= 1.0) {
            return fail(format!("crop_pct is {}; it must be above 0 and at most 1", self.crop_pct));
        }
        if !matches!((self.mean.len(), self.std.len()), (1, 1) | (3, 3)) {
            return fail(format!(
                "{} means and {} deviations; give one of each for grey input or three of each for RGB",
                self.mean.len(),
                self.std.len()
            ));
        }
        if let Some(mean) = self.mean.iter().find(|m| !m.is_finite()) {
            return fail(format!("a mean is {mean}; it must be a finite number"));
        }
        if let Some(std) = self.std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return fail(format!("a deviation is {std}; it must be a positive number"));
        }
        Ok(())
    }

    /// The model's input of `size` (height, width) in 8 bits: everything but scaling and normalising.
    ///
    /// The picture is first converted to the transform's channels. Where both sides of `size/crop_pct`, rounded down,
    /// are equal, the short side of the picture becomes that long and the long side keeps the proportion, rounded down
    /// (torchvision's `Resize`). Otherwise the picture is scaled, in proportion, until it just covers both sides, rounded
    /// to the nearest (timm's `ResizeKeepRatio`, which is what its `create_transform` uses for `crop_mode="center"`).
    /// Then the centre is cut out, an odd margin being split as torchvision's `CenterCrop` does. A picture that has the
    /// resized size already keeps its pixels.
    ///
    /// # Errors
    /// As [`Transform::check`]; when a side of `size` is 0; or when the sizes are beyond any use (a side of 2³¹ pixels
    /// after resizing, or 512 MiB of pixels).
    pub fn apply(&self, picture: &Picture, size: [usize; 2]) -> Result<Picture> {
        self.check()?;
        if size.contains(&0) {
            return Err(Error::argument(
                "transform",
                format!("a result of {}x{} pixels is empty", size[0], size[1]),
            ));
        }
        let resized = self.resized([picture.height(), picture.width()], size)?;
        let window = [0, 1].map(|axis| {
            let start = centre(resized[axis], size[axis]);
            start..start + size[axis]
        });
        if picture.channels() == self.channels() {
            resize_window(picture, resized, window, self.interpolation)
        } else {
            resize_window(&picture.to_channels(self.channels())?, resized, window, self.interpolation)
        }
    }

    /// The height and width that the picture is resized to before it is cropped; at least `size` on both axes.
    fn resized(&self, picture: [usize; 2], size: [usize; 2]) -> Result<[usize; 2]> {
        let scaled = size.map(|side| (side as f64 / self.crop_pct).floor());
        let sides = picture.map(|side| side as f64);
        let resized = if scaled[0] == scaled[1] {
            let short = usize::from(sides[1] < sides[0]);
            let long = 1 - short;
            let mut resized = [scaled[0]; 2];
            // Python's `int(scaled * long / short)`: an exact product, one correctly rounded division, truncation.
            resized[long] = (scaled[0] * sides[long] / sides[short]).floor();
            resized
        } else {
            let ratio = (sides[0] / scaled[0]).min(sides[1] / scaled[1]);
            [0, 1].map(|axis| (sides[axis] / ratio).round_ties_even().max(size[axis] as f64))
        };
        if !resized.iter().all(|side| *side <= MAX_SIDE) {
            return Err(Error::argument(
                "transform",
                format!(
                    "a picture of {}x{} pixels would be resized to {:.0}x{:.0} for an input of {}x{} with crop_pct {}; \
                     crop it or choose a smaller size",
                    picture[0], picture[1], resized[0], resized[1], size[0], size[1], self.crop_pct
                ),
            ));
        }
        // Both values lie between 1 and 2³¹.
        Ok(resized.map(|side| side as usize))
    }

    /// The batch with 8-bit values scaled to 0..1 and normalised, `(value/255 - mean)/std` in that order in `f32`, as
    /// torchvision's `ToTensor` and `Normalize` compute it. A batch of floats is normalised already and stays.
    ///
    /// # Errors
    /// As [`Transform::check`]; when the batch has another number of channels than the transform.
    pub fn normalise(&self, images: &Images) -> Result<Images> {
        self.check()?;
        let shape @ [_, channels, height, width] = images.shape();
        if channels != self.channels() {
            return Err(Error::argument(
                "transform",
                format!("images of {channels} channels given, the transform has {}", self.channels()),
            ));
        }
        let Pixels::U8(values) = images.pixels() else { return Ok(images.clone()) };
        let planes = values.chunks_exact(height * width).enumerate();
        let normalised = planes
            .flat_map(|(plane, values)| {
                let (mean, std) = (self.mean[plane % channels], self.std[plane % channels]);
                values.iter().map(move |&value| (f32::from(value) / 255.0 - mean) / std)
            })
            .collect();
        Images::new(shape, Pixels::F32(normalised))
    }
}

/// Where a crop of `part` of `whole` pixels starts: Python's `round((whole - part)/2)`, halves to even.
fn centre(whole: usize, part: usize) -> usize {
    let margin = whole - part;
    // The half of an odd margin lies between two integers; the even one of them is taken.
    margin / 2 + usize::from(margin % 4 == 3)
}

/// Pictures of one size and channel count as a batch of 8-bit images, shape (pictures, channels, height, width).
///
/// # Errors
/// When there is no picture, or one differs from the first in size or channels; the error names it.
pub fn batch(pictures: &[Picture]) -> Result<Images> {
    let Some(first) = pictures.first() else {
        return Err(Error::argument("batch", "no pictures given; give at least one"));
    };
    let shape = |picture: &Picture| [picture.height(), picture.width(), picture.channels()];
    let [height, width, channels] = shape(first);
    if let Some((index, other)) = pictures.iter().enumerate().find(|(_, p)| shape(p) != shape(first)) {
        let [h, w, c] = shape(other);
        return Err(Error::argument(
            "batch",
            format!(
                "picture {index} is {h}x{w} with {c} channels, the first one {height}x{width} with {channels}"
            ),
        ));
    }
    let mut planes = Vec::with_capacity(pictures.len() * first.data().len());
    for picture in pictures {
        for channel in 0..channels {
            planes.extend(picture.data().iter().skip(channel).step_by(channels));
        }
    }
    Images::new([pictures.len(), channels, height, width], Pixels::U8(planes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(crop_pct: f64) -> Transform {
        Transform { crop_pct, ..Transform::imagenet() }
    }

    #[test]
    fn sides_are_those_of_timm_and_torchvision() {
        // (picture, size, crop_pct, resized): int(248 * 451/300), floor(224/0.875), portrait, square.
        let short_side = [
            ([300, 451], [224, 224], 0.9, [248, 372]),
            ([300, 451], [224, 224], 0.875, [256, 384]),
            ([451, 300], [96, 96], 1.0, [144, 96]),
            ([512, 512], [336, 336], 1.0, [336, 336]),
            ([2, 2], [28, 28], 1.0, [28, 28]),
        ];
        // round(300/(451/320)), round(451/(300/213)): the side that is short of its target decides.
        let covering = [([300, 451], [192, 288], 0.9, [213, 320]), ([100, 400], [224, 112], 1.0, [224, 896])];
        for (picture, size, crop_pct, resized) in short_side.into_iter().chain(covering) {
            assert_eq!(
                transform(crop_pct).resized(picture, size).unwrap(),
                resized,
                "{picture:?} {size:?} {crop_pct}"
            );
        }
    }

    #[test]
    fn odd_margins_round_to_even() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|margin| centre(10 + margin, 10)), [0, 0, 1, 2, 2, 2, 3, 4]);
    }

    #[test]
    fn a_picture_of_the_resized_size_keeps_its_pixels() {
        let picture = Picture::new(2, 5, 3, (0..30).collect()).unwrap();
        let cropped = transform(1.0).apply(&picture, [2, 2]).unwrap();
        // The margin is 3, its half rounds to 2.
        assert_eq!(cropped.data(), [6, 7, 8, 9, 10, 11, 21, 22, 23, 24, 25, 26]);
    }

    #[test]
    fn the_result_has_the_transforms_channels() {
        let grey = Transform { mean: vec![0.5], std: vec![0.25], ..Transform::imagenet() };
        let red = Picture::filled(4, 4, [255, 0, 0]).unwrap();
        assert_eq!(grey.apply(&red, [2, 2]).unwrap(), Picture::new(2, 2, 1, vec![76; 4]).unwrap());
        let black = Picture::new(4, 4, 1, vec![0; 16]).unwrap();
        assert_eq!(Transform::clip().apply(&black, [2, 2]).unwrap().data(), [0; 12]);
    }

    #[test]
    fn extreme_proportions_cost_nothing() {
        let strip = Picture::new(2, 30_000, 1, vec![9; 60_000]).unwrap();
        let input = Transform::imagenet().apply(&strip, [224, 224]).unwrap();
        assert_eq!(input, Picture::filled(224, 224, [9; 3]).unwrap());
    }

    #[test]
    fn impossible_numbers_are_errors() {
        let picture = Picture::filled(4, 4, [0; 3]).unwrap();
        let good = Transform::inception();
        let bad = [
            Transform { crop_pct: 0.0, ..good.clone() },
            Transform { crop_pct: 1.5, ..good.clone() },
            Transform { crop_pct: f64::NAN, ..good.clone() },
            Transform { mean: vec![], std: vec![], ..good.clone() },
            Transform { mean: vec![0.5; 2], std: vec![0.5; 2], ..good.clone() },
            Transform { std: vec![0.5], ..good.clone() },
            Transform { mean: vec![0.5, f32::INFINITY, 0.5], ..good.clone() },
            Transform { std: vec![0.5, 0.0, 0.5], ..good.clone() },
            Transform { std: vec![0.5, 0.5, f32::NAN], ..good.clone() },
            // Sides of a billion billion pixels.
            Transform { crop_pct: 1e-18, ..good.clone() },
            Transform { crop_pct: f64::MIN_POSITIVE, ..good.clone() },
        ];
        for transform in bad {
            let error = transform.apply(&picture, [2, 2]).unwrap_err().to_string();
            assert!(error.starts_with("transform: ") && !error.contains('\n'), "{error}");
        }
        for size in [[0, 2], [2, 0], [usize::MAX, 2], [usize::MAX; 2], [1 << 20, 1 << 20]] {
            assert!(good.apply(&picture, size).is_err(), "{size:?}");
        }
    }

    #[test]
    fn a_batch_is_planar() {
        let first = Picture::new(1, 2, 3, vec![1, 2, 3, 4, 5, 6]).unwrap();
        let second = Picture::new(1, 2, 3, vec![7, 8, 9, 10, 11, 12]).unwrap();
        let images = batch(&[first.clone(), second]).unwrap();
        assert_eq!(images.shape(), [2, 3, 1, 2]);
        let Pixels::U8(values) = images.pixels() else { panic!("8-bit pictures make an 8-bit batch") };
        assert_eq!(values[..], [1, 4, 2, 5, 3, 6, 7, 10, 8, 11, 9, 12]);

        assert!(batch(&[]).is_err());
        let error =
            batch(&[first.clone(), first.clone(), Picture::filled(2, 2, [0; 3]).unwrap()]).unwrap_err();
        assert!(error.to_string().contains("picture 2 is 2x2"), "{error}");
        assert!(batch(&[first.clone(), first.to_channels(1).unwrap()]).is_err());
    }

    #[test]
    fn normalising_follows_the_channels() {
        let picture = Picture::new(1, 2, 3, vec![0, 51, 255, 102, 0, 204]).unwrap();
        let transform =
            Transform { mean: vec![0.0, 0.2, 0.5], std: vec![1.0, 0.2, 0.25], ..Transform::imagenet() };
        let images = transform.normalise(&batch(&[picture]).unwrap()).unwrap();
        let Pixels::F32(values) = images.pixels() else { panic!("normalised values are floats") };
        let expected = [0.0, 0.4, 0.0, -1.0, 2.0, 1.2];
        assert!(values.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{values:?}");
        assert_eq!(transform.normalise(&images).unwrap().shape(), [1, 3, 1, 2]);
        let grey = Transform { mean: vec![0.0], std: vec![1.0], ..transform };
        assert!(grey.normalise(&images).is_err());
    }
}
