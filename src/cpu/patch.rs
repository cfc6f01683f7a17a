//! Images to tokens, and tokens picked out again.

use std::ops::Range;

use super::{
    Context, Tensor,
    check::{addressable, expect_shape, tokens_shape},
    pack::Shared,
};
use crate::{Error, Images, Pixels, Result};

/// [`Backend::patches`](crate::backend::Backend::patches).
pub(super) fn patches(
    context: &Context,
    images: &Images,
    patch: [usize; 2],
    mean: &[f32],
    std: &[f32],
) -> Result<Tensor> {
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
    let mut out = context.pool.take(addressable("patches", [batch, count, row_width])?);
    // All values that a byte can become, per channel: the division is the definition, so the bits are the same.
    let mut table = context.pool.take(channels * 256);
    if matches!(images.pixels(), Pixels::U8(_)) {
        for (c, values) in table.make_mut().chunks_exact_mut(256).enumerate() {
            for (p, value) in values.iter_mut().enumerate() {
                *value = (p as f32 / 255.0 - mean[c]) / std[c];
            }
        }
    }
    let shared = Shared::of(out.make_mut());
    let strips = height / ph;
    // A task is a strip of patches side by side: its pixels are read row after row.
    context.threads.run(batch * strips, |_, task| {
        let (image, strip) = (task / strips, task % strips);
        // SAFETY: each task has patches of its own.
        let out = unsafe { shared.part(task * columns * row_width, columns * row_width) };
        for c in 0..channels {
            let table = &table[c * 256..(c + 1) * 256];
            for y in 0..ph {
                let from = ((image * channels + c) * height + strip * ph + y) * width;
                for (column, out) in out.chunks_exact_mut(row_width).enumerate() {
                    let from = from + column * pw..from + (column + 1) * pw;
                    let to = &mut out[(c * ph + y) * pw..][..pw];
                    match images.pixels() {
                        Pixels::F32(pixels) => to.copy_from_slice(&pixels[from]),
                        Pixels::U8(pixels) => {
                            to.iter_mut().zip(&pixels[from]).for_each(|(to, &p)| *to = table[usize::from(p)]);
                        }
                    }
                }
            }
        }
    });
    drop(table);
    Ok(Tensor::pooled([batch, count, row_width], out))
}

/// [`Backend::embed`](crate::backend::Backend::embed).
pub(super) fn embed(
    context: &Context,
    patches: &Tensor,
    prefix: Option<&Tensor>,
    position: Option<&Tensor>,
) -> Result<Tensor> {
    let [batch, count, width] = tokens_shape("embed", "patches", patches)?;
    let special = prefix.map_or(0, |prefix| prefix.shape().first().copied().unwrap_or(1));
    if let Some(prefix) = prefix {
        expect_shape("embed", "prefix", prefix, &[special, width])?;
    }
    if let Some(position) = position {
        expect_shape("embed", "position", position, &[count, width])?;
    }
    let n = special + count;
    let mut out = context.pool.take(addressable("embed", [batch, n, width])?);
    let (patches, prefix, position) = (patches.view(), prefix.map(Tensor::view), position.map(Tensor::view));
    let shared = Shared::of(out.make_mut());
    context.threads.run(batch, |_, image| {
        // SAFETY: each task has an image of its own.
        let out = unsafe { shared.part(image * n * width, n * width) };
        let (head, tail) = out.split_at_mut(special * width);
        if let Some(prefix) = &prefix {
            head.copy_from_slice(prefix);
        }
        let patches = &patches[image * count * width..(image + 1) * count * width];
        match &position {
            None => tail.copy_from_slice(patches),
            Some(position) => {
                let sums = patches.iter().zip(&**position).map(|(patch, position)| patch + position);
                tail.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
            }
        }
    });
    Ok(Tensor::pooled([batch, n, width], out))
}

/// [`Backend::tokens`](crate::backend::Backend::tokens).
pub(super) fn tokens(context: &Context, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("tokens", "x", x)?;
    if range.start > range.end || range.end > n {
        return Err(Error::argument("tokens", format!("tokens {range:?} are not among {n}")));
    }
    let count = range.len();
    let mut out = context.pool.take(batch * count * width);
    let x = x.view();
    if count > 0 {
        for (image, out) in out.make_mut().chunks_exact_mut(count * width).enumerate() {
            out.copy_from_slice(&x[(image * n + range.start) * width..(image * n + range.end) * width]);
        }
    }
    Ok(Tensor::pooled([batch, count, width], out))
}

/// [`Backend::columns`](crate::backend::Backend::columns).
pub(super) fn columns(context: &Context, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("columns", "x", x)?;
    if range.start >= range.end || range.end > width {
        return Err(Error::argument("columns", format!("columns {range:?} are not among {width}")));
    }
    let count = range.len();
    let mut out = context.pool.take(batch * n * count);
    let x = x.view();
    for (out, row) in out.make_mut().chunks_exact_mut(count).zip(x.chunks_exact(width)) {
        out.copy_from_slice(&row[range.clone()]);
    }
    Ok(Tensor::pooled([batch, n, count], out))
}

/// [`Backend::mean_tokens`](crate::backend::Backend::mean_tokens).
pub(super) fn mean_tokens(
    context: &Context,
    x: &Tensor,
    sizes: Option<&Tensor>,
    first: usize,
) -> Result<Tensor> {
    let [batch, n, width] = tokens_shape("mean_tokens", "x", x)?;
    if let Some(sizes) = sizes {
        expect_shape("mean_tokens", "sizes", sizes, &[batch, n])?;
    }
    if first >= n {
        return Err(Error::argument("mean_tokens", format!("no tokens are left from {first} on, of {n}")));
    }
    let (x, sizes) = (x.view(), sizes.map(Tensor::view));
    let mut out = context.pool.take(batch * width);
    for (image, out) in out.make_mut().chunks_exact_mut(width).enumerate() {
        out.fill(0.0);
        let mut total = 0.0;
        for token in image * n + first..(image + 1) * n {
            let size = sizes.as_ref().map_or(1.0, |sizes| sizes[token]);
            let row = &x[token * width..(token + 1) * width];
            out.iter_mut().zip(row).for_each(|(sum, x)| *sum += size * x);
            total += size;
        }
        out.iter_mut().for_each(|sum| *sum /= total);
    }
    Ok(Tensor::pooled([batch, width], out))
}

/// [`Backend::max_tokens`](crate::backend::Backend::max_tokens).
pub(super) fn max_tokens(
    context: &Context,
    x: &Tensor,
    sizes: Option<&Tensor>,
    first: usize,
) -> Result<Tensor> {
    const OP: &str = "max_tokens";
    let [batch, n, width] = tokens_shape(OP, "x", x)?;
    if let Some(sizes) = sizes {
        expect_shape(OP, "sizes", sizes, &[batch, n])?;
    }
    if first >= n {
        return Err(Error::argument(OP, format!("no tokens are left from {first} on, of {n}")));
    }
    let (x, sizes) = (x.view(), sizes.map(Tensor::view));
    let mut out = context.pool.take(batch * width);
    for (image, out) in out.make_mut().chunks_exact_mut(width).enumerate() {
        let counts = |&token: &usize| sizes.as_ref().is_none_or(|sizes| sizes[token] != 0.0);
        out.fill(0.0);
        for (at, token) in (image * n + first..(image + 1) * n).filter(counts).enumerate() {
            for (largest, &value) in out.iter_mut().zip(&x[token * width..(token + 1) * width]) {
                if at == 0 || value > *largest || value.is_nan() {
                    *largest = value;
                }
            }
        }
    }
    Ok(Tensor::pooled([batch, width], out))
}
