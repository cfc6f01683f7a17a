//! The adaptive frequency filter: spectrum, mask, product, inverse, each by its definition (arXiv 2307.14008; the official
//! code's `AFNO2D_channelfirst`).
//!
//! Transforms are sums over the grid's two axes, one after the other: O(n) a value and axis instead of O(log n), for grids
//! of a few dozen rows, and any size.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::{
    arithmetic::{activate, add, add_scaled},
    expect_shape,
};
use crate::{Error, HostTensor, Result, Tensor, backend::Frequency, model::Activation};

pub(crate) const OP: &str = "frequency";

/// The half spectra of all channels, or what is multiplied with them: (B, C, H, W/2 + 1) each, frequencies in natural order.
#[derive(Clone, Debug)]
pub struct Spectrum {
    /// Real parts.
    pub re: Tensor,
    /// Imaginary parts.
    pub im: Tensor,
}

/// cos and sin of `2π·j·k/n` for `j` below `n` and `k` below `columns`, row by row.
struct Turns {
    cos: Vec<f32>,
    sin: Vec<f32>,
    columns: usize,
}

impl Turns {
    fn new(n: usize, columns: usize) -> Self {
        // Reduced to one turn first: the argument is exact.
        let angle = |i: usize| TAU * ((i / columns * (i % columns)) % n) as f64 / n as f64;
        let table = |f: fn(f64) -> f64| (0..n * columns).map(|i| f(angle(i)) as f32).collect();
        Self { cos: table(f64::cos), sin: table(f64::sin), columns }
    }

    fn row(&self, j: usize) -> (&[f32], &[f32]) {
        let range = j * self.columns..(j + 1) * self.columns;
        (&self.cos[range.clone()], &self.sin[range])
    }

    fn at(&self, j: usize, k: usize) -> (f32, f32) {
        (self.cos[j * self.columns + k], self.sin[j * self.columns + k])
    }
}

/// The longest side of a grid: its table of turns has as many values as a square of it.
const MOST_SIDE: usize = 4096;

fn check_sides([height, width]: [usize; 2]) -> Result<()> {
    if height.max(width) <= MOST_SIDE {
        return Ok(());
    }
    Err(Error::argument(OP, format!("a grid of {height}x{width}; sides of up to {MOST_SIDE} are supported")))
}

/// (B, C) of a feature map on `grid`.
pub(crate) fn map_shape(name: &str, shape: &[usize], [height, width]: [usize; 2]) -> Result<[usize; 2]> {
    match *shape {
        [b, n, c] if b > 0 && c > 0 && n > 0 && Some(n) == height.checked_mul(width) => {
            check_sides([height, width])?;
            Ok([b, c])
        }
        _ => Err(Error::argument(
            OP,
            format!("{name} has shape {shape:?}, expected (images, {height}x{width} positions, channels)"),
        )),
    }
}

/// The number of groups and of channels of each, after checking every parameter's shape.
pub(crate) fn groups(filter: &Frequency<impl HostTensor>, channels: usize) -> Result<[usize; 2]> {
    let [groups, width] = match *filter.w1.shape() {
        [2, g, s, _] if g > 0 && s > 0 => [g, s],
        ref other => {
            return Err(Error::argument(
                OP,
                format!("w1 has shape {other:?}, expected (2, groups, channels of a group, the same)"),
            ));
        }
    };
    if groups.checked_mul(width) != Some(channels) {
        return Err(Error::argument(
            OP,
            format!("w1 is for {groups} groups of {width} channels, x has {channels} channels"),
        ));
    }
    for (name, weight) in [("w1", &filter.w1), ("w2", &filter.w2)] {
        expect_shape(OP, name, weight, &[2, groups, width, width])?;
    }
    for (name, bias) in [("b1", &filter.b1), ("b2", &filter.b2)] {
        expect_shape(OP, name, bias, &[2, groups, width])?;
    }
    if !matches!(filter.activation, Activation::Silu | Activation::Relu) {
        return Err(Error::argument(
            OP,
            format!("the activation is {}; the filter takes silu or relu", filter.activation.name()),
        ));
    }
    if !(filter.threshold >= 0.0 && filter.threshold.is_finite()) {
        return Err(Error::argument(
            OP,
            format!("the threshold {} is not a number from 0 on", filter.threshold),
        ));
    }
    Ok([groups, width])
}

/// The orthonormal real transform of each channel of `x` (B, H·W, C).
///
/// # Errors
/// When `x` is no feature map on `grid`.
pub fn spectrum(x: &Tensor, grid: [usize; 2]) -> Result<Spectrum> {
    let [batch, channels] = map_shape("x", x.shape(), grid)?;
    let ([height, width], half) = (grid, grid[1] / 2 + 1);
    let (along_width, along_height) = (Turns::new(width, half), Turns::new(height, height));
    let scale = 1.0 / ((height * width) as f64).sqrt();
    let shape = [batch, channels, height, half];
    let (mut re, mut im) = (Tensor::zeros(&shape), Tensor::zeros(&shape));
    let planes = re.data_mut().par_chunks_mut(height * half).zip(im.data_mut().par_chunks_mut(height * half));
    planes.enumerate().for_each(|(plane, (re, im))| {
        let (image, channel) = (x.item(plane / channels), plane % channels);
        let mut rows = [vec![0.0; height * half], vec![0.0; height * half]];
        let [row_re, row_im] = &mut rows;
        for (h, (re, im)) in row_re.chunks_mut(half).zip(row_im.chunks_mut(half)).enumerate() {
            for w in 0..width {
                let value = image[(h * width + w) * channels + channel];
                let (cos, sin) = along_width.row(w);
                add_scaled(re, value, cos);
                add_scaled(im, -value, sin);
            }
        }
        for (l, (re, im)) in re.chunks_mut(half).zip(im.chunks_mut(half)).enumerate() {
            for (h, (row_re, row_im)) in row_re.chunks(half).zip(row_im.chunks(half)).enumerate() {
                let (cos, sin) = along_height.at(l, h);
                // (a + ib)(cos - i·sin)
                add_scaled(re, cos, row_re);
                add_scaled(re, sin, row_im);
                add_scaled(im, cos, row_im);
                add_scaled(im, -sin, row_re);
            }
        }
        re.iter_mut().chain(im).for_each(|value| *value = (f64::from(*value) * scale) as f32);
    });
    Ok(Spectrum { re, im })
}

/// The learned mask: `shrink(act(X·W1 + b1)·W2 + b2)` at every bin, in complex arithmetic, group by group.
///
/// # Errors
/// When the filter's parameters do not fit each other or the spectrum.
pub fn mask(spectrum: &Spectrum, filter: &Frequency<Tensor>) -> Result<Spectrum> {
    let (channels, bins) = (spectrum.re.dim(1), spectrum.re.dim(2) * spectrum.re.dim(3));
    let [groups, width] = groups(filter, channels)?;
    let mut out = spectrum.clone();
    let block = width * bins;
    let items = out.re.data_mut().par_chunks_mut(block).zip(out.im.data_mut().par_chunks_mut(block));
    items.enumerate().for_each(|(item, (re, im))| {
        let group = item % groups;
        let (mut z_re, mut z_im) = (vec![0.0; block], vec![0.0; block]);
        complex_layer([re, im], [&filter.w1, &filter.b1], group, [&mut z_re, &mut z_im], bins);
        activate(filter.activation, &mut z_re);
        activate(filter.activation, &mut z_im);
        complex_layer([&z_re, &z_im], [&filter.w2, &filter.b2], group, [re, im], bins);
        re.iter_mut().chain(im).for_each(|value| *value = shrink(*value, filter.threshold));
    });
    Ok(out)
}

/// `out = x·W + b` over one group's channels (channels, bins).
fn complex_layer(
    [x_re, x_im]: [&[f32]; 2],
    [weight, bias]: [&Tensor; 2],
    group: usize,
    [out_re, out_im]: [&mut [f32]; 2],
    bins: usize,
) {
    let (groups, width) = (weight.dim(1), weight.dim(2));
    let w =
        |part: usize, i: usize, o: usize| weight.data()[((part * groups + group) * width + i) * width + o];
    for (o, (re, im)) in out_re.chunks_mut(bins).zip(out_im.chunks_mut(bins)).enumerate() {
        re.fill(bias.data()[group * width + o]);
        im.fill(bias.data()[(groups + group) * width + o]);
        for (i, (x_re, x_im)) in x_re.chunks(bins).zip(x_im.chunks(bins)).enumerate() {
            add_scaled(re, w(0, i, o), x_re);
            add_scaled(re, -w(1, i, o), x_im);
            add_scaled(im, w(0, i, o), x_im);
            add_scaled(im, w(1, i, o), x_re);
        }
    }
}

/// Towards 0 by `threshold`.
fn shrink(value: f32, threshold: f32) -> f32 {
    if value > threshold {
        value - threshold
    } else if value < -threshold {
        value + threshold
    } else {
        0.0
    }
}

/// The complex product, bin by bin.
///
/// # Panics
/// When the two have different shapes.
pub fn product(a: &Spectrum, b: &Spectrum) -> Spectrum {
    assert_eq!(a.re.shape(), b.re.shape(), "shapes of the factors");
    let mut out = a.clone();
    let parts = out.re.data_mut().iter_mut().zip(out.im.data_mut());
    for ((re, im), (c, d)) in parts.zip(b.re.data().iter().zip(b.im.data())) {
        (*re, *im) = (*re * c - *im * d, *re * d + *im * c);
    }
    out
}

/// The orthonormal inverse onto `grid`, (B, H·W, C): a complex one along H, a real one along W that takes the columns 0 and
/// W/2 once and without their imaginary parts, and the others twice.
///
/// # Errors
/// When the spectrum is not one of `grid`.
pub fn inverse(spectrum: &Spectrum, grid: [usize; 2]) -> Result<Tensor> {
    check_sides(grid)?;
    let ([height, width], half) = (grid, grid[1] / 2 + 1);
    let [batch, channels] = [spectrum.re.dim(0), spectrum.re.dim(1)];
    expect_shape(OP, "spectrum", &spectrum.re, &[batch, channels, height, half])?;
    expect_shape(OP, "spectrum", &spectrum.im, &[batch, channels, height, half])?;
    let (along_height, along_width) = (Turns::new(height, height), Turns::new(width, width));
    let scale = 1.0 / ((height * width) as f64).sqrt();
    let plane_of = |plane: usize| -> Vec<f32> {
        let range = plane * height * half..(plane + 1) * height * half;
        let (re, im) = (&spectrum.re.data()[range.clone()], &spectrum.im.data()[range]);
        let mut out = vec![0.0; height * width];
        for (h, out) in out.chunks_mut(width).enumerate() {
            let (mut row_re, mut row_im) = (vec![0.0; half], vec![0.0; half]);
            for (l, (re, im)) in re.chunks(half).zip(im.chunks(half)).enumerate() {
                let (cos, sin) = along_height.at(l, h);
                // (a + ib)(cos + i·sin)
                add_scaled(&mut row_re, cos, re);
                add_scaled(&mut row_re, -sin, im);
                add_scaled(&mut row_im, cos, im);
                add_scaled(&mut row_im, sin, re);
            }
            for (k, (re, im)) in row_re.iter().zip(&row_im).enumerate() {
                let twice = k != 0 && 2 * k != width;
                let times = if twice { 2.0 } else { 1.0 };
                let (cos, sin) = along_width.row(k);
                add_scaled(out, times * re, cos);
                if twice {
                    add_scaled(out, -times * im, sin);
                }
            }
        }
        out.iter_mut().for_each(|value| *value = (f64::from(*value) * scale) as f32);
        out
    };
    let planes: Vec<Vec<f32>> = (0..batch * channels).into_par_iter().map(plane_of).collect();
    let mut out = Tensor::zeros(&[batch, height * width, channels]);
    out.data_mut().par_chunks_mut(channels).enumerate().for_each(|(row, out)| {
        let (image, position) = (row / (height * width), row % (height * width));
        for (channel, out) in out.iter_mut().enumerate() {
            *out = planes[image * channels + channel][position];
        }
    });
    Ok(out)
}

pub(super) fn frequency(
    x: &Tensor,
    grid: [usize; 2],
    filter: &Frequency<Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let [_, channels] = map_shape("x", x.shape(), grid)?;
    groups(filter, channels)?;
    if let Some(residual) = residual {
        expect_shape(OP, "residual", residual, x.shape())?;
    }
    let spectrum = spectrum(x, grid)?;
    let masked = product(&mask(&spectrum, filter)?, &spectrum);
    let mut out = inverse(&masked, grid)?;
    for other in [Some(x), residual].into_iter().flatten() {
        let rows = out.data_mut().par_chunks_mut(channels).zip(other.data().par_chunks(channels));
        rows.for_each(|(out, other)| add(out, other));
    }
    Ok(out)
}
