//! Images in device memory.

use cudarc::driver::{CudaView, DeviceRepr};

use super::{DevicePointer, strided::check_pointer};
use crate::{Error, Result};

/// Channels of 8-bit images whose mean and deviation the kernels hold.
pub(super) const NORMALISED: usize = 16;

/// What pixels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PixelType {
    /// 0 to 255, to be normalised.
    U8,
    /// Normalised already.
    F32,
}

impl PixelType {
    /// Bytes of one value.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F32 => 4,
        }
    }
}

/// A Rust type of pixels: `u8` or `f32`.
pub trait Pixel: DeviceRepr + Copy + sealed::Sealed {
    /// Its name at run time.
    const TYPE: PixelType;
}

impl Pixel for u8 {
    const TYPE: PixelType = PixelType::U8;
}

impl Pixel for f32 {
    const TYPE: PixelType = PixelType::F32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for f32 {}
}

/// A batch of images in device memory: `data` is a cudarc view, or a [`DevicePointer`] in
/// [`patches_raw`](super::patch::patches_raw).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceImages<P> {
    /// Where pixel 0 of channel 0 of image 0 lies.
    pub data: P,
    /// (images, channels, height, width), whatever the order in memory.
    pub shape: [usize; 4],
    /// From one image, channel, line and pixel to the next, in values.
    pub strides: [usize; 4],
}

impl<P> DeviceImages<P> {
    /// Images of planes, (images, channels, height, width) in memory: what [`crate::Images`] holds.
    pub const fn planes(data: P, shape: [usize; 4]) -> Self {
        let [_, channels, height, width] = shape;
        let plane = height.saturating_mul(width);
        Self { data, shape, strides: [plane.saturating_mul(channels), plane, width, 1] }
    }

    /// Images whose pixels hold their channels, (images, height, width, channels) in memory: what decoders write.
    /// `shape` is (images, channels, height, width) all the same.
    pub const fn interleaved(data: P, shape: [usize; 4]) -> Self {
        let [_, channels, height, width] = shape;
        let line = width.saturating_mul(channels);
        Self { data, shape, strides: [line.saturating_mul(height), 1, line, channels] }
    }

    /// Values from the first to past the last one.
    pub(super) fn extent(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let axes = self.shape.iter().zip(self.strides);
        axes.map(|(&n, stride)| (n - 1).checked_mul(stride))
            .try_fold(0_usize, |sum, steps| sum.checked_add(steps?))?
            .checked_add(1)
    }
}

impl<T> DeviceImages<CudaView<'_, T>> {
    /// Checks that the images lie within their view.
    pub(super) fn check_length(&self, op: &'static str) -> Result<()> {
        let held = self.data.len();
        if self.extent().is_some_and(|needed| needed <= held) {
            return Ok(());
        }
        Err(Error::argument(
            op,
            format!(
                "images of shape {:?} and strides {:?} do not lie within their memory of {held} values",
                self.shape, self.strides
            ),
        ))
    }
}

impl DeviceImages<DevicePointer> {
    /// Checks that there is a mean and a deviation for each channel, and room for them in the kernels.
    pub(super) fn check_normalisation(
        &self,
        op: &'static str,
        pixel: PixelType,
        mean: &[f32],
        std: &[f32],
    ) -> Result<()> {
        let [_, channels, _, _] = self.shape;
        if mean.len() != channels || std.len() != channels {
            return Err(Error::argument(
                op,
                format!(
                    "mean and deviation of {} and {} channels, the images have {channels}",
                    mean.len(),
                    std.len()
                ),
            ));
        }
        if pixel == PixelType::U8 && channels > NORMALISED {
            return Err(Error::argument(
                op,
                format!(
                    "8-bit images have {channels} channels, the kernels normalise up to {NORMALISED}; normalise to f32 first"
                ),
            ));
        }
        Ok(())
    }

    /// Checks that no axis is empty, that the kernels' integers hold the shape, and that the address fits the type.
    pub(super) fn check(&self, op: &'static str, pixel: PixelType) -> Result<()> {
        let fits = |&n: &usize| n > 0 && i32::try_from(n).is_ok();
        let bytes = self.extent().and_then(|n| n.checked_mul(pixel.bytes()));
        if !self.shape.iter().all(fits) || bytes.is_none_or(|n| i64::try_from(n).is_err()) {
            return Err(Error::argument(
                op,
                format!(
                    "images have shape {:?} and strides {:?}: every axis must hold 1 to 2^31 - 1 and all of it be \
                     addressable",
                    self.shape, self.strides
                ),
            ));
        }
        check_pointer(op, "images", self.data, pixel.bytes())
    }

    /// Whether loads of `bytes` suit the start of every line, of every channel or of all channels together.
    pub(super) fn aligned(&self, pixel: PixelType, together: usize, bytes: usize) -> bool {
        let axes: &[usize] = if together == 1 { &[0, 1, 2] } else { &[0, 2] };
        let step = |&axis: &usize| if self.shape[axis] > 1 { self.strides[axis] } else { 0 };
        axes.iter().map(step).all(|step| (step * pixel.bytes()).is_multiple_of(bytes))
            && self.data.is_multiple_of(bytes as u64)
    }
}
