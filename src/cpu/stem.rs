//! What windows see of images and of feature maps, and convolutions: products of rows that exist a few at a time.

use super::{
    Context, Tensor,
    check::{addressable, expect_shape, tokens_shape},
    gemm::Finish,
    linear::packed,
    pack::Shared,
    schedule::product_of,
};
use crate::{
    Error, Images, Pixels, Result,
    backend::{Epilogue, Linear, Window},
    model::Activation,
};

/// A window's places over a grid.
pub(super) struct Places {
    window: Window,
    grid: [usize; 2],
    /// Rows and columns of places.
    pub(super) over: [usize; 2],
}

impl Places {
    pub(super) fn new(op: &'static str, window: Window, grid: [usize; 2]) -> Result<Self> {
        let Window { kernel, stride, padding } = window;
        let over = window.over(grid).ok_or_else(|| {
            Error::argument(
                op,
                format!(
                    "a window of {kernel}x{kernel}, stride {stride}, padding {padding} has no place on a grid of {}x{}; the \
                     stride must be at least 1, the padding less than the window, and the grid as large as the window less \
                     twice the padding",
                    grid[0], grid[1]
                ),
            )
        })?;
        Ok(Self { window, grid, over })
    }

    pub(super) fn count(&self) -> usize {
        self.over[0] * self.over[1]
    }

    /// Where tap `tap` along `axis` is, at place `place`; nowhere beyond the border.
    pub(super) fn seen(&self, axis: usize, place: usize, tap: usize) -> Option<usize> {
        let at = (place * self.window.stride + tap).checked_sub(self.window.padding);
        at.filter(|&at| at < self.grid[axis])
    }

    /// What the window sees of a feature map (H·W, C) at place `place`.
    pub(super) fn look(&self, image: &[f32], place: usize, out: &mut [f32]) {
        let (k, columns) = (self.window.kernel, self.over[1]);
        let channels = out.len() / self.window.taps();
        let (row, column) = (place / columns, place % columns);
        // Where all taps of a line lie inside, their channels lie one behind the other.
        let first = self.seen(1, column, 0).filter(|_| self.seen(1, column, k - 1).is_some());
        for (line, out) in out.chunks_exact_mut(k * channels).enumerate() {
            let Some(y) = self.seen(0, row, line) else {
                out.fill(0.0);
                continue;
            };
            let line = &image[y * self.grid[1] * channels..][..self.grid[1] * channels];
            if let Some(x) = first {
                out.copy_from_slice(&line[x * channels..][..k * channels]);
                continue;
            }
            for (tap, out) in out.chunks_exact_mut(channels).enumerate() {
                match self.seen(1, column, tap) {
                    Some(x) => out.copy_from_slice(&line[x * channels..][..channels]),
                    None => out.fill(0.0),
                }
            }
        }
    }
}

/// (B, C) of a feature map over `grid`.
fn feature_map(op: &'static str, x: &Tensor, grid: [usize; 2]) -> Result<[usize; 2]> {
    let [batch, positions, channels] = tokens_shape(op, "x", x)?;
    if grid[0].checked_mul(grid[1]) == Some(positions) {
        return Ok([batch, channels]);
    }
    let what = format!("x has shape {:?}, which is no feature map of {}x{}", x.shape(), grid[0], grid[1]);
    Err(Error::argument(op, what))
}

/// [`Backend::unfold_images`](crate::backend::Backend::unfold_images).
pub(super) fn unfold_images(
    context: &Context,
    images: &Images,
    window: Window,
    mean: &[f32],
    std: &[f32],
) -> Result<Tensor> {
    const OP: &str = "unfold_images";
    let [batch, channels, height, width] = images.shape();
    let places = Places::new(OP, window, [height, width])?;
    if mean.len() != channels || std.len() != channels {
        return Err(Error::argument(
            OP,
            format!(
                "mean and deviation of {} and {} channels, the images have {channels}",
                mean.len(),
                std.len()
            ),
        ));
    }
    let (k, count) = (window.kernel, places.count());
    let shape = [batch, count, channels * k * k];
    let mut out = context.pool.take(addressable(OP, shape)?);
    let row_width = channels * k * k;
    let (rows, columns) = (places.over[0], places.over[1]);
    let shared = Shared::of(out.make_mut());
    context.threads.run(batch * rows, |_, task| {
        let (image, row) = (task / rows, task % rows);
        // SAFETY: each task has places of its own.
        let out = unsafe { shared.part(task * columns * row_width, columns * row_width) };
        for (column, out) in out.chunks_exact_mut(row_width).enumerate() {
            for (line, out) in out.chunks_exact_mut(k).enumerate() {
                let (c, y) = (line / k, places.seen(0, row, line % k));
                let base = |y: usize| ((image * channels + c) * height + y) * width;
                for (tap, out) in out.iter_mut().enumerate() {
                    *out = match (y, places.seen(1, column, tap)) {
                        (Some(y), Some(x)) => match images.pixels() {
                            Pixels::F32(pixels) => pixels[base(y) + x],
                            Pixels::U8(pixels) => (f32::from(pixels[base(y) + x]) / 255.0 - mean[c]) / std[c],
                        },
                        _ => 0.0,
                    };
                }
            }
        }
    });
    Ok(Tensor::pooled(shape, out))
}

/// [`Backend::unfold`](crate::backend::Backend::unfold).
pub(super) fn unfold(context: &Context, x: &Tensor, grid: [usize; 2], window: Window) -> Result<Tensor> {
    const OP: &str = "unfold";
    let [batch, channels] = feature_map(OP, x, grid)?;
    let places = Places::new(OP, window, grid)?;
    let (rows, columns) = (places.over[0], places.over[1]);
    let row_width = window.taps() * channels;
    let shape = [batch, places.count(), row_width];
    let mut out = context.pool.take(addressable(OP, shape)?);
    let x = x.view();
    let per_image = x.len() / batch;
    let shared = Shared::of(out.make_mut());
    context.threads.run(batch * rows, |_, task| {
        let image = &x[task / rows * per_image..][..per_image];
        // SAFETY: each task has places of its own.
        let out = unsafe { shared.part(task * columns * row_width, columns * row_width) };
        for (column, out) in out.chunks_exact_mut(row_width).enumerate() {
            places.look(image, task % rows * columns + column, out);
        }
    });
    Ok(Tensor::pooled(shape, out))
}

/// [`Backend::convolve`](crate::backend::Backend::convolve): what the window sees is never there as a whole.
pub(super) fn convolve(
    context: &Context,
    x: &Tensor,
    grid: [usize; 2],
    window: Window,
    layer: &Linear<Tensor>,
    activation: Option<Activation>,
) -> Result<Tensor> {
    const OP: &str = "unfold";
    if activation == Some(Activation::SwiGlu) {
        let rows = unfold(context, x, grid, window)?;
        return super::linear::linear(context, &rows, &layer.all(), Epilogue::Activation(Activation::SwiGlu));
    }
    let [batch, channels] = feature_map(OP, x, grid)?;
    let places = Places::new(OP, window, grid)?;
    let inputs = window.taps() * channels;
    let outputs = layer.weight.shape().first().copied().unwrap_or(1);
    expect_shape("linear", "weight", &layer.weight, &[outputs, inputs])?;
    if let Some(bias) = &layer.bias {
        expect_shape("linear", "bias", bias, &[outputs])?;
    }
    if outputs == 0 {
        return Err(Error::argument("linear", "the layer has no outputs"));
    }
    let count = places.count();
    let shape = [batch, count, outputs];
    let mut out = context.pool.take(addressable("linear", shape)?);
    let (x, bias) = (x.view(), layer.bias.as_ref().map(Tensor::view));
    let per_image = x.len() / batch;
    let finish = Finish { bias: bias.as_deref(), activation, ..Finish::default() };
    let look = |row: usize, out: &mut [f32]| {
        places.look(&x[row / count * per_image..][..per_image], row % count, out);
    };
    let mut passing = None;
    let packed = packed(context, &layer.weight, [outputs, inputs], &mut passing);
    product_of(context, batch * count, look, packed.right(), out.make_mut(), finish);
    Ok(Tensor::pooled(shape, out))
}
