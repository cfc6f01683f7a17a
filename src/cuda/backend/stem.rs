//! What stands before the first block: windows over pixels and over feature maps. And the auxiliary readout behind the last.

use std::ops::Range;

use super::{
    super::{
        DType, DevicePointer, Strided,
        patch::{DeviceImages, PixelType},
        performer::{PerformerPointers, partial_length, performer_raw},
        record,
        tokens::{max_tokens_raw, tokens_raw},
        unfold::{places, unfold_images_raw, unfold_raw},
    },
    Cuda, CudaTensor, Inner, Memory,
};
use crate::{Error, Images, Pixels, Result, backend::Window};

// SAFETY (for all blocks below): as for `Backend`.
impl Cuda {
    /// Images on the device, and what their pixels are.
    pub(super) fn pixels(&self, images: &Images) -> Result<(Memory, PixelType)> {
        let space = &self.inner.space;
        Ok(match images.pixels() {
            Pixels::U8(pixels) => (Memory::upload(space, pixels)?, PixelType::U8),
            Pixels::F32(pixels) => (Memory::upload(space, pixels)?, PixelType::F32),
        })
    }

    /// [`Backend::unfold_images`](crate::backend::Backend::unfold_images) of images in device memory, planes in the order of
    /// `shape`.
    pub(in super::super) fn windows_of(
        &self,
        pixels: &Memory,
        pixel: PixelType,
        shape @ [batch, channels, height, width]: [usize; 4],
        window: Window,
        mean: &[f32],
        std: &[f32],
    ) -> Result<CudaTensor> {
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let [rows, columns] = places("unfold_images", window, [height, width])?;
        let shape_out = [batch, rows.saturating_mul(columns), channels.saturating_mul(window.taps())];
        let out = self.empty(&shape_out, *dtype)?;
        record::operand(stream, pixels.bytes());
        let images = DeviceImages::planes(pixels.pointer(), shape);
        let target = Strided::new(out.pointer(), shape_out);
        // SAFETY: see above the block; the images lie in memory of their size on this stream.
        unsafe { unfold_images_raw(device, stream, pixel, *dtype, &images, window, mean, std, &target) }?;
        Ok(out)
    }

    pub(super) fn unfolded(&self, x: &CudaTensor, grid: [usize; 2], window: Window) -> Result<CudaTensor> {
        const OP: &str = "unfold";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read(OP, "x", x)?;
        let [rows, columns] = places(OP, window, grid)?;
        let [batch, _, channels] = source.shape;
        let shape = [batch, rows.saturating_mul(columns), window.taps().saturating_mul(channels)];
        let out = self.empty(&shape, *dtype)?;
        let target = Strided::new(out.pointer(), shape);
        // SAFETY: see above the block.
        unsafe { unfold_raw(device, stream, *dtype, &source, grid, window, &target) }?;
        Ok(out)
    }

    /// A copy of some columns: the tokens of a tensor of narrower rows, as far apart as those it is cut out of.
    pub(super) fn some_columns(&self, x: &CudaTensor, range: Range<usize>) -> Result<CudaTensor> {
        const OP: &str = "columns";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read_values(OP, "x", x, |[b, n, _]| (b * n).saturating_mul(range.len()))?;
        let [batch, tokens, width] = source.shape;
        if range.start >= range.end || range.end > width {
            return Err(Error::argument(OP, format!("columns {range:?} are not among {width}")));
        }
        let part = Strided {
            data: source.data + (range.start * dtype.bytes()) as DevicePointer,
            shape: [batch, tokens, range.len()],
            ..source
        };
        let out = self.empty(&part.shape, *dtype)?;
        let target = out.tokens(OP, "out")?;
        // SAFETY: see above the block; the columns are among those of `x`.
        unsafe { tokens_raw(device, stream, *dtype, &part, 0..tokens, &target) }?;
        Ok(out)
    }

    pub(super) fn random_features(&self, packed: &CudaTensor, w: &CudaTensor) -> Result<CudaTensor> {
        const OP: &str = "performer";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read(OP, "packed", packed)?;
        let [batch, tokens, row] = source.shape;
        let width = row / 3;
        if width == 0 || !row.is_multiple_of(3) {
            let what = format!("packed rows of {row} values are no keys, queries and values of one width");
            return Err(Error::argument(OP, what));
        }
        let features = w.shape().first().copied().unwrap_or(0);
        let weight = self.read_f32(OP, "the random features", w, &[features, width])?;
        let out = self.empty(&[batch, tokens, width], *dtype)?;
        let partial = self.scratch(&[partial_length(batch, tokens, width, features).max(1)], DType::F32)?;
        let arguments = PerformerPointers {
            packed: source,
            weight,
            features,
            partial: partial.pointer(),
            out: out.tokens(OP, "out")?,
        };
        // SAFETY: see above the block.
        unsafe { performer_raw(device, stream, *dtype, &arguments) }?;
        Ok(out)
    }

    pub(super) fn largest_tokens(
        &self,
        x: &CudaTensor,
        sizes: Option<&CudaTensor>,
        first: usize,
    ) -> Result<CudaTensor> {
        const OP: &str = "max_tokens";
        let Inner { device, stream, dtype, .. } = &*self.inner;
        let source = self.read_values(OP, "x", x, |[b, n, c]| b * n.saturating_sub(first) * c)?;
        let [batch, tokens, width] = source.shape;
        let sizes = sizes.map(|sizes| self.read_f32(OP, "sizes", sizes, &[batch, tokens])).transpose()?;
        let out = self.empty(&[batch, width], *dtype)?;
        let target = Strided::new(out.pointer(), [batch, 1, width]);
        // SAFETY: see above the block.
        unsafe { max_tokens_raw(device, stream, *dtype, &source, sizes, first, &target) }?;
        Ok(out)
    }
}
