//! Pixels with a size.

use crate::{Error, Result, tensor::elements};

/// An 8-bit picture, grey or RGB, shape (height, width, channels) row-major, at least one pixel.
///
/// ```
/// use foveate::image::Picture;
///
/// let picture = Picture::new(1, 2, 3, vec![255, 0, 0, 0, 0, 255])?;
/// assert_eq!(picture.pixel(0, 1), [0, 0, 255]);
/// assert_eq!(picture.to_channels(1)?.data(), [76, 29]);
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    height: usize,
    width: usize,
    channels: usize,
    data: Vec<u8>,
}

impl Picture {
    /// A picture over `data`, shape (height, width, channels): the channels of a pixel lie side by side.
    ///
    /// # Errors
    /// When a side is 0, `channels` is neither 1 nor 3, or `data` has another length.
    pub fn new(height: usize, width: usize, channels: usize, data: Vec<u8>) -> Result<Self> {
        if channels != 1 && channels != 3 {
            return Err(Error::argument("picture", format!("{channels} channels; use 1 (grey) or 3 (RGB)")));
        }
        match elements(&[height, width, channels]) {
            Some(0) => Err(Error::argument(
                "picture",
                format!("{height}x{width} pixels; both sides must be at least 1"),
            )),
            Some(n) if n == data.len() => Ok(Self { height, width, channels, data }),
            _ => Err(Error::argument(
                "picture",
                format!("{height}x{width} pixels of {channels} channels do not fit {} bytes", data.len()),
            )),
        }
    }

    /// An RGB picture of one colour.
    ///
    /// # Errors
    /// When a side is 0 or the picture would be too large to address.
    pub fn filled(height: usize, width: usize, colour: [u8; 3]) -> Result<Self> {
        match elements(&[height, width, 3]) {
            Some(n) if n > 0 => Self::new(height, width, 3, colour.repeat(n / 3)),
            _ => Err(Error::argument("picture", format!("no picture can have {height}x{width} pixels"))),
        }
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The values, (height, width, channels) row-major.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The values, to write to.
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// The values without the size.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }

    /// The channels of the pixel in row `y` and column `x`.
    ///
    /// # Panics
    /// When the pixel lies outside, as slice indexing does.
    pub fn pixel(&self, y: usize, x: usize) -> &[u8] {
        assert!(x < self.width, "column {x} of a picture {} pixels wide", self.width);
        let at = (y * self.width + x) * self.channels;
        &self.data[at..at + self.channels]
    }

    /// The picture as grey (1) or RGB (3).
    ///
    /// Grey becomes RGB by repetition; RGB becomes grey as Pillow's `convert("L")` does it, ITU-R 601 luma in 16-bit
    /// fixed point: `(19595 R + 38470 G + 7471 B + 32768) >> 16`.
    ///
    /// # Errors
    /// When `channels` is neither 1 nor 3.
    pub fn to_channels(&self, channels: usize) -> Result<Self> {
        let data = match (self.channels, channels) {
            (from, to) if from == to => self.data.clone(),
            (1, 3) => self.data.iter().flat_map(|&v| [v; 3]).collect(),
            (3, 1) => self.data.as_chunks().0.iter().map(|&pixel| luma(pixel)).collect(),
            _ => {
                return Err(Error::argument(
                    "picture",
                    format!("{channels} channels; use 1 (grey) or 3 (RGB)"),
                ));
            }
        };
        Ok(Self { channels, data, ..*self })
    }

    /// Writes `colour` to the pixel in row `y` and column `x`, as its luma where the picture is grey.
    pub(super) fn set(&mut self, y: usize, x: usize, colour: [u8; 3]) {
        let at = (y * self.width + x) * self.channels;
        if self.channels == 3 {
            self.data[at..at + 3].copy_from_slice(&colour);
        } else {
            self.data[at] = luma(colour);
        }
    }
}

/// Brightness of an RGB pixel, as Pillow rounds it.
pub(super) fn luma([r, g, b]: [u8; 3]) -> u8 {
    // The weights sum to 65536, so the result is at most 255.
    ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_consistent_pictures_can_be_made() {
        assert!(Picture::new(2, 3, 1, vec![0; 6]).is_ok());
        for (height, width, channels, bytes) in
            [(2, 3, 1, 5), (2, 3, 3, 6), (0, 3, 1, 0), (3, 0, 3, 0), (1, 1, 4, 4), (1, 1, 0, 0), (1, 1, 2, 2)]
        {
            assert!(
                Picture::new(height, width, channels, vec![0; bytes]).is_err(),
                "{height}x{width}x{channels}"
            );
        }
        assert!(Picture::new(usize::MAX, usize::MAX, 3, vec![0; 3]).is_err());
        assert!(Picture::filled(usize::MAX, 2, [0; 3]).is_err());
        assert!(Picture::filled(0, 2, [0; 3]).is_err());
        assert_eq!(Picture::filled(1, 2, [1, 2, 3]).unwrap().data(), [1, 2, 3, 1, 2, 3]);
    }

    #[test]
    fn grey_and_rgb_convert_as_in_pillow() {
        let rgb =
            Picture::new(1, 5, 3, vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255, 10, 20, 30]).unwrap();
        let grey = rgb.to_channels(1).unwrap();
        assert_eq!(grey.data(), [76, 150, 29, 255, 18]);
        assert_eq!(grey.to_channels(3).unwrap().pixel(0, 1), [150; 3]);
        assert_eq!(rgb.to_channels(3).unwrap(), rgb);
        assert_eq!(grey.to_channels(1).unwrap(), grey);
        assert!(grey.to_channels(2).is_err());
    }
}
