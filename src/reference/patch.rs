//! Images to tokens, and tokens picked out again.

use std::ops::Range;

use rayon::prelude::*;

use super::{arithmetic::add_scaled, expect_shape, tokens_shape};
use crate::{Error, Images, Pixels, Result, Tensor};

pub(super) fn patches(images: &Images, patch: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Tensor> {
    let [batch, channels, height, width] = images.shape();
    let [ph, pw] = patch;
    if ph == 0 || pw == 0 || height % ph != 0 || width % pw != 0 {
        return Err(Error::argument(
            "patches",
            format!("{height}x{width} images do not divide into {ph}x{pw} patches"),
        ));
    }
    if mean.len() != channels || std.len() != channels {
        return Err(Error::argument(
            "patches",
            format!(
                "mean and deviation of {} and {} channels, the images have {channels}",
                mean.len(),
                std.len()
            ),
        ));
    }
    let (columns, row_width) = (width / pw, channels * ph * pw);
    let count = (height / ph) * columns;
    let mut out = Tensor::zeros(&[batch, count, row_width]);
    out.data_mut().par_chunks_mut(row_width).enumerate().for_each(|(row, out)| {
        let (image, at) = (row / count, row % count);
        let (top, left) = (at / columns * ph, at % columns * pw);
        for c in 0..channels {
            for y in 0..ph {
                let from = ((image * channels + c) * height + top + y) * width + left;
                let to = &mut out[(c * ph + y) * pw..][..pw];
                match images.pixels() {
                    Pixels::F32(pixels) => to.copy_from_slice(&pixels[from..from + pw]),
                    Pixels::U8(pixels) => {
                        for (to, &p) in to.iter_mut().zip(&pixels[from..from + pw]) {
                            *to = (f32::from(p) / 255.0 - mean[c]) / std[c];
                        }
                    }
                }
            }
        }
    });
    Ok(out)
}

pub(super) fn embed(patches: &Tensor, prefix: Option<&Tensor>, position: Option<&Tensor>) -> Result<Tensor> {
    let [batch, count, width] = tokens_shape("embed", "patches", patches)?;
    let special = prefix.map_or(0, |prefix| prefix.dim(0));
    if let Some(prefix) = prefix {
        expect_shape("embed", "prefix", prefix, &[special, width])?;
    }
    if let Some(position) = position {
        expect_shape("embed", "position", position, &[count, width])?;
    }
    let mut out = Tensor::zeros(&[batch, special + count, width]);
    out.data_mut().par_chunks_mut((special + count) * width).enumerate().for_each(|(image, out)| {
        let (head, tail) = out.split_at_mut(special * width);
        if let Some(prefix) = prefix {
            head.copy_from_slice(prefix.data());
        }
        tail.copy_from_slice(patches.item(image));
        if let Some(position) = position {
            add_scaled(tail, 1.0, position.data());
        }
    });
    Ok(out)
}

pub(super) fn tokens(x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("tokens", "x", x)?;
    if range.start > range.end || range.end > n {
        return Err(Error::argument("tokens", format!("tokens {range:?} are not among {n}")));
    }
    let rows = x.data().chunks(n * width).flat_map(|image| &image[range.start * width..range.end * width]);
    Tensor::new(&[batch, range.len(), width], rows.copied().collect())
}

pub(super) fn mean_tokens(x: &Tensor, sizes: Option<&Tensor>, first: usize) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("mean_tokens", "x", x)?;
    if let Some(sizes) = sizes {
        expect_shape("mean_tokens", "sizes", sizes, &[batch, n])?;
    }
    if first >= n {
        return Err(Error::argument("mean_tokens", format!("no tokens are left from {first} on, of {n}")));
    }
    let mut out = Tensor::zeros(&[batch, width]);
    for (image, out) in out.data_mut().chunks_mut(width).enumerate() {
        let mut total = 0.0;
        for token in first..n {
            let size = sizes.map_or(1.0, |sizes| sizes.data()[image * n + token]);
            add_scaled(out, size, &x.item(image)[token * width..(token + 1) * width]);
            total += size;
        }
        out.iter_mut().for_each(|y| *y /= total);
    }
    Ok(out)
}
