//! What windows see of images and of feature maps, and the largest values of tokens.

use std::ops::Range;

use rayon::prelude::*;

use super::{expect_shape, tokens_shape};
use crate::{Error, Images, Pixels, Result, Tensor, backend::Window};

/// The places of a window, or an error that names it.
fn places(op: &'static str, window: Window, grid: [usize; 2]) -> Result<[usize; 2]> {
    let Window { kernel, stride, padding } = window;
    window.over(grid).ok_or_else(|| {
        Error::argument(
            op,
            format!(
                "a window of {kernel}x{kernel}, stride {stride}, padding {padding} has no place on a grid of {}x{}; the \
                 stride must be at least 1, the padding less than the window, and the grid as large as the window less \
                 twice the padding",
                grid[0], grid[1]
            ),
        )
    })
}

/// Where tap `tap` along an axis of length `side` is, at place `place`; nowhere beyond the border.
fn seen(window: Window, place: usize, tap: usize, side: usize) -> Option<usize> {
    (place * window.stride + tap).checked_sub(window.padding).filter(|&at| at < side)
}

pub(super) fn unfold_images(images: &Images, window: Window, mean: &[f32], std: &[f32]) -> Result<Tensor> {
    const OP: &str = "unfold_images";
    let [batch, channels, height, width] = images.shape();
    let [rows, columns] = places(OP, window, [height, width])?;
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
    let (k, count) = (window.kernel, rows * columns);
    let mut out = Tensor::zeros(&[batch, count, channels * k * k]);
    out.data_mut().par_chunks_mut(channels * k * k).enumerate().for_each(|(row, out)| {
        let (image, place) = (row / count, row % count);
        for (at, out) in out.iter_mut().enumerate() {
            let (c, y, x) = (at / (k * k), at / k % k, at % k);
            let (y, x) = (seen(window, place / columns, y, height), seen(window, place % columns, x, width));
            let (Some(y), Some(x)) = (y, x) else { continue };
            let from = ((image * channels + c) * height + y) * width + x;
            *out = match images.pixels() {
                Pixels::F32(pixels) => pixels[from],
                Pixels::U8(pixels) => (f32::from(pixels[from]) / 255.0 - mean[c]) / std[c],
            };
        }
    });
    Ok(out)
}

pub(super) fn unfold(x: &Tensor, grid: [usize; 2], window: Window) -> Result<Tensor> {
    const OP: &str = "unfold";
    let [batch, positions, channels] = tokens_shape(OP, "x", x)?;
    if grid[0].checked_mul(grid[1]) != Some(positions) {
        return Err(Error::argument(
            OP,
            format!("x has shape {:?}, which is no feature map of {}x{}", x.shape(), grid[0], grid[1]),
        ));
    }
    let [rows, columns] = places(OP, window, grid)?;
    let (k, count) = (window.kernel, rows * columns);
    let mut out = Tensor::zeros(&[batch, count, k * k * channels]);
    out.data_mut().par_chunks_mut(k * k * channels).enumerate().for_each(|(row, out)| {
        let (image, place) = (x.item(row / count), row % count);
        for (tap, out) in out.chunks_mut(channels).enumerate() {
            let y = seen(window, place / columns, tap / k, grid[0]);
            let x = seen(window, place % columns, tap % k, grid[1]);
            if let (Some(y), Some(x)) = (y, x) {
                out.copy_from_slice(&image[(y * grid[1] + x) * channels..][..channels]);
            }
        }
    });
    Ok(out)
}

pub(super) fn columns(x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("columns", "x", x)?;
    if range.start >= range.end || range.end > width {
        return Err(Error::argument("columns", format!("columns {range:?} are not among {width}")));
    }
    let rows = x.data().chunks(width).flat_map(|row| &row[range.clone()]);
    Tensor::new(&[batch, n, range.len()], rows.copied().collect())
}

pub(super) fn max_tokens(x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
    const OP: &str = "max_tokens";
    let [batch, n, width] = tokens_shape(OP, "x", x)?;
    if let Some(sizes) = sizes {
        expect_shape(OP, "sizes", sizes, &[batch, n])?;
    }
    if first >= n {
        return Err(Error::argument(OP, format!("no tokens are left from {first} on, of {n}")));
    }
    let mut out = Tensor::zeros(&[batch, width]);
    for (image, out) in out.data_mut().chunks_mut(width).enumerate() {
        let counts = |&token: &usize| sizes.is_none_or(|sizes| sizes.data()[image * n + token] != 0.0);
        for (at, token) in (first..n).filter(counts).enumerate() {
            let row = &x.item(image)[token * width..(token + 1) * width];
            for (largest, &value) in out.iter_mut().zip(row) {
                if at == 0 || value > *largest || value.is_nan() {
                    *largest = value;
                }
            }
        }
    }
    Ok(out)
}
