//! The adaptive frequency filter: transforms along each axis as products with tables of turns, the mask's network as products
//! with one real matrix for each group.
//!
//! A transform by its definition takes O(n) a value and axis, as in the reference. For the grids there are (8 to 64 a side) that
//! is 4 % of a model's multiply-adds, and it runs at the speed of products.

use std::f64::consts::TAU;

use super::{
    Context, Tensor,
    check::expect_shape,
    gemm::{Blocks, Finish, Out, Product, Rows, block_values, pack_blocks},
    pack::{PANEL, PackRows, Panels, Shared, panel_values},
    pool::Buffer,
    simd::{Kernel, Simd},
    tensor::View,
};
use crate::{
    Result,
    backend::Frequency,
    reference::frequency::{OP, groups, map_shape},
};

/// The longest side that is transformed here: tables grow with its square.
pub(super) const MOST_SIDE: usize = 256;
/// Bins that pass the mask's network together.
const BINS: usize = 112;

/// The numbers of a filter.
#[derive(Clone, Copy)]
struct Extents {
    batch: usize,
    channels: usize,
    height: usize,
    width: usize,
    /// Columns of a half spectrum.
    half: usize,
    /// Columns that count twice in the inverse: all but the first, and but the last if the width is even.
    twice: usize,
    groups: usize,
    /// Channels of a group.
    group: usize,
}

impl Extents {
    /// Values of an image's half spectrum, real and imaginary.
    fn spectrum(&self) -> usize {
        2 * self.height * self.half * self.channels
    }
}

/// [`GridBackend::frequency`](crate::backend::GridBackend::frequency) on a grid of sides up to [`MOST_SIDE`].
pub(super) fn frequency(
    context: &Context,
    x: &Tensor,
    grid: [usize; 2],
    filter: &Frequency<View<'_>>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let [batch, channels] = map_shape("x", x.shape(), grid)?;
    let [groups, group] = groups(filter, channels)?;
    if let Some(residual) = residual {
        expect_shape(OP, "residual", residual, x.shape())?;
    }
    let [height, width] = grid;
    let (half, twice) = (width / 2 + 1, (width - 1) / 2);
    let e = Extents { batch, channels, height, width, half, twice, groups, group };
    let pool = &context.pool;
    // Along the width (image, row, part, column, channel), then along the height (image, column, part, row, channel); the way
    // back uses the first again in the second's order.
    let (mut rows, mut columns) = (pool.take(batch * e.spectrum()), pool.take(batch * e.spectrum()));
    let mut out = pool.take(x.rows() * channels);
    let (view, residual) = (x.view(), residual.map(Tensor::view));
    along_width(context, e, &view, rows.make_mut());
    along_height(context, e, &rows, columns.make_mut());
    mask(context, e, filter, columns.make_mut());
    back_along_height(context, e, &columns, rows.make_mut());
    back_along_width(context, e, &rows, [Some(&*view), residual.as_deref()], out.make_mut());
    Ok(Tensor::pooled(x.shape, out))
}

/// A table of turns as a left factor.
struct Table {
    blocks: Buffer,
    rows: usize,
    depth: usize,
}

impl Table {
    /// (rows, depth) of what `value` makes of a row and a position, given cos and sin of `i` turns out of `n`.
    fn new(
        context: &Context,
        [rows, depth]: [usize; 2],
        n: usize,
        value: impl Fn(usize, usize, &dyn Fn(usize) -> [f64; 2]) -> f64,
    ) -> Self {
        let mut turns = [[0.0; 2]; MOST_SIDE];
        for (i, turn) in turns[..n].iter_mut().enumerate() {
            let angle = TAU * i as f64 / n as f64;
            *turn = [angle.cos(), angle.sin()];
        }
        let turn = |i: usize| turns[i % n];
        let mut plain = context.pool.take(rows * depth);
        for (row, values) in plain.make_mut().chunks_exact_mut(depth).enumerate() {
            values.iter_mut().enumerate().for_each(|(at, to)| *to = value(row, at, &turn) as f32);
        }
        let mut blocks = context.pool.take(block_values(rows, depth));
        let factor = Rows { data: &plain, count: rows, stride: depth };
        pack_blocks(context.kernels, factor, depth, blocks.make_mut());
        Self { blocks, rows, depth }
    }

    fn blocks(&self) -> Blocks<'_> {
        Blocks { data: &self.blocks, count: self.rows, depth: self.depth }
    }
}

/// Writes what the product of a task is added to.
type Prepare<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// `tasks` products of `table` with right factors that `fill(task, panel, its first column and how many, to)` writes; results go to
/// `out`, one behind the other. `before` prepares what a product is added to.
fn transforms(
    context: &Context,
    table: &Table,
    [tasks, columns]: [usize; 2],
    fill: impl Fn(usize, [usize; 2], &mut [f32]) + Sync,
    out: &mut [f32],
    before: Option<&Prepare<'_>>,
) {
    let (depth, len) = (table.depth, table.rows * columns);
    let values = panel_values(depth, columns);
    let mut scratch = context.pool.take(context.threads.count() * values);
    let (scratches, out) = (Shared::of(scratch.make_mut()), Shared::of(out));
    context.threads.run(tasks, |thread, task| {
        // SAFETY: each thread has a part of the scratch, each task one of the result.
        let (panels, out) = unsafe { (scratches.part(thread * values, values), out.part(task * len, len)) };
        for (panel, to) in panels.chunks_exact_mut(depth * PANEL).enumerate() {
            let first = panel * PANEL;
            fill(task, [first, PANEL.min(columns - first)], to);
        }
        if let Some(before) = before {
            before(task, out);
        }
        context.kernels.run(Product {
            a: table.blocks(),
            b: Panels { data: panels, depth, columns },
            columns: 0..columns,
            out: Out::of(out, columns),
            finish: Finish { add: before.is_some(), ..Finish::default() },
        });
    });
}

/// Rows of `x` become half spectra.
fn along_width(context: &Context, e: Extents, x: &[f32], out: &mut [f32]) {
    let Extents { width, half, channels, .. } = e;
    let scale = 1.0 / ((e.height * width) as f64).sqrt();
    let table = Table::new(context, [2 * half, width], width, |row, w, turn| {
        let [cos, sin] = turn(row % half * w);
        scale * if row < half { cos } else { -sin }
    });
    let fill = |task: usize, [first, count]: [usize; 2], to: &mut [f32]| {
        let from = &x[task * width * channels + first..];
        PackRows { from, stride: channels, width: count, to }.run();
    };
    transforms(context, &table, [e.batch * e.height, channels], fill, out, None);
}

/// Their columns become columns of the spectrum.
fn along_height(context: &Context, e: Extents, rows: &[f32], out: &mut [f32]) {
    let Extents { height, half, channels, .. } = e;
    // (a + ib)(cos - i·sin)
    let table = Table::new(context, [2 * height, 2 * height], height, |row, h, turn| {
        let [cos, sin] = turn(row % height * (h % height));
        match (row < height, h < height) {
            (true, true) | (false, false) => cos,
            (true, false) => sin,
            (false, true) => -sin,
        }
    });
    let fill = |task: usize, [first, count]: [usize; 2], to: &mut [f32]| {
        let image = &rows[task / half * e.spectrum()..][..e.spectrum()];
        for (part, to) in to.chunks_exact_mut(height * PANEL).enumerate() {
            let from = &image[(part * half + task % half) * channels + first..];
            PackRows { from, stride: 2 * half * channels, width: count, to }.run();
        }
    };
    transforms(context, &table, [e.batch * half, channels], fill, out, None);
}

/// Back along the height.
fn back_along_height(context: &Context, e: Extents, columns: &[f32], out: &mut [f32]) {
    let Extents { height, half, channels, .. } = e;
    // (a + ib)(cos + i·sin)
    let table = Table::new(context, [2 * height, 2 * height], height, |row, l, turn| {
        let [cos, sin] = turn(row % height * (l % height));
        match (row < height, l < height) {
            (true, true) | (false, false) => cos,
            (true, false) => -sin,
            (false, true) => sin,
        }
    });
    let fill = |task: usize, [first, count]: [usize; 2], to: &mut [f32]| {
        let from = &columns[task * 2 * height * channels + first..];
        PackRows { from, stride: channels, width: count, to }.run();
    };
    transforms(context, &table, [e.batch * half, channels], fill, out, None);
}

/// Back along the width, onto what is added: the first column of the half spectrum, and the last if the width is even, count once and
/// without their imaginary parts, the others twice.
fn back_along_width(
    context: &Context,
    e: Extents,
    columns: &[f32],
    added: [Option<&[f32]>; 2],
    out: &mut [f32],
) {
    let Extents { height, width, half, twice, channels, .. } = e;
    let scale = 1.0 / ((height * width) as f64).sqrt();
    let table = Table::new(context, [width, half + twice], width, |w, at, turn| {
        let k = if at < half { at } else { at - half + 1 };
        let [cos, sin] = turn(k * w);
        let times = if (1..=twice).contains(&k) { 2.0 * scale } else { scale };
        times * if at < half { cos } else { -sin }
    });
    let fill = |task: usize, [first, count]: [usize; 2], to: &mut [f32]| {
        let image = &columns[task / height * e.spectrum()..][..e.spectrum()];
        let stride = 2 * height * channels;
        let at = |k: usize, part: usize| k * stride + (part * height + task % height) * channels + first;
        let (re, im) = to.split_at_mut(half * PANEL);
        PackRows { from: &image[at(0, 0)..], stride, width: count, to: re }.run();
        if twice > 0 {
            PackRows { from: &image[at(1, 1)..], stride, width: count, to: im }.run();
        }
    };
    let before = |task: usize, out: &mut [f32]| {
        let range = task * width * channels..(task + 1) * width * channels;
        let mut added = added.into_iter().flatten().map(|added| &added[range.clone()]);
        out.copy_from_slice(added.next().unwrap_or_default());
        added.for_each(|added| out.iter_mut().zip(added).for_each(|(out, x)| *out += x));
    };
    transforms(context, &table, [e.batch * height, channels], fill, out, Some(&before));
}

/// Every bin of the spectrum becomes its product with the mask `shrink(act(X·W1 + b1)·W2 + b2)`.
fn mask(context: &Context, e: Extents, filter: &Frequency<View<'_>>, spectrum: &mut [f32]) {
    let Extents { channels, height, groups, group, .. } = e;
    let (bins, wide) = (e.half * height, 2 * group);
    // Of each group and layer: the real matrix, then its bias.
    let matrix = panel_values(wide, wide);
    let layer = matrix + wide;
    let mut weights = context.pool.take(groups * 2 * layer);
    let shared = Shared::of(weights.make_mut());
    context.threads.run(groups * 2, |_, task| {
        // SAFETY: each task has a layer of its own.
        let (panels, bias) = unsafe { shared.part(task * layer, layer) }.split_at_mut(matrix);
        let (w, b) = if task % 2 == 0 { (&filter.w1, &filter.b1) } else { (&filter.w2, &filter.b2) };
        real_layer(w, b, [groups, group], task / 2, panels, bias);
    });
    let (left, rows) = (block_values(BINS, wide), BINS * wide);
    let mut scratch = context.pool.take(context.threads.count() * (left + rows));
    let (scratches, spectrum) = (Shared::of(scratch.make_mut()), Shared::of(spectrum));
    context.threads.run(e.batch * groups, |thread, task| {
        let (image, g) = (task / groups, task % groups);
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * (left + rows), left + rows) };
        let (blocks, values) = scratch.split_at_mut(left);
        // Where the real and the imaginary part of a bin's group begin.
        let at = |bin: usize, part: usize| {
            image * e.spectrum() + ((bin / height * 2 + part) * height + bin % height) * channels + g * group
        };
        for first in (0..bins).step_by(BINS) {
            let count = BINS.min(bins - first);
            let values = &mut values[..count * wide];
            for (i, row) in values.chunks_exact_mut(wide).enumerate() {
                for (part, to) in row.chunks_exact_mut(group).enumerate() {
                    // SAFETY: each task has the channels of a group of an image.
                    to.copy_from_slice(unsafe { spectrum.part(at(first + i, part), group) });
                }
            }
            for (number, activation) in [(2 * g, Some(filter.activation)), (2 * g + 1, None)] {
                let (panels, bias) = weights[number * layer..(number + 1) * layer].split_at(matrix);
                let from = Rows { data: values, count, stride: wide };
                context.kernels.run(Product {
                    a: pack_blocks(context.kernels, from, wide, blocks),
                    b: Panels { data: panels, depth: wide, columns: wide },
                    columns: 0..wide,
                    out: Out::of(values, wide),
                    finish: Finish { bias: Some(bias), activation, ..Finish::default() },
                });
            }
            for (i, mask) in values.chunks_exact(wide).enumerate() {
                // SAFETY: as above; real and imaginary parts lie apart.
                let (re, im) = unsafe {
                    (spectrum.part(at(first + i, 0), group), spectrum.part(at(first + i, 1), group))
                };
                context.kernels.run(Masked { mask, re, im, threshold: filter.threshold });
            }
        }
    });
}

/// A complex layer of group `g` as a real one on real and imaginary parts side by side: `[[re, im], [-im, re]]`.
fn real_layer(
    weight: &[f32],
    bias: &[f32],
    [groups, group]: [usize; 2],
    g: usize,
    panels: &mut [f32],
    to: &mut [f32],
) {
    let wide = 2 * group;
    let part = |part: usize| &weight[(part * groups + g) * group * group..][..group * group];
    let (re, im) = (part(0), part(1));
    for (panel, to) in panels.chunks_exact_mut(wide * PANEL).enumerate() {
        for (row, to) in to.chunks_exact_mut(PANEL).enumerate() {
            let columns = (panel * PANEL..wide).zip(to);
            for (column, to) in columns {
                let at = row % group * group + column % group;
                *to = match (row < group, column < group) {
                    (true, true) | (false, false) => re[at],
                    (true, false) => im[at],
                    (false, true) => -im[at],
                };
            }
        }
    }
    for (part, to) in to.chunks_exact_mut(group).enumerate() {
        to.copy_from_slice(&bias[(part * groups + g) * group..][..group]);
    }
}

/// A bin times its shrunk mask.
struct Masked<'a> {
    /// Real parts, then imaginary ones.
    mask: &'a [f32],
    re: &'a mut [f32],
    im: &'a mut [f32],
    threshold: f32,
}

impl Kernel for Masked<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { mask, re, im, threshold } = self;
        let shrink = |value: f32| {
            let less = if value < -threshold { value + threshold } else { 0.0 };
            if value > threshold { value - threshold } else { less }
        };
        let (mask_re, mask_im) = mask.split_at(re.len());
        for ((re, im), (a, b)) in re.iter_mut().zip(im).zip(mask_re.iter().zip(mask_im)) {
            let (a, b) = (shrink(*a), shrink(*b));
            (*re, *im) = (a * *re - b * *im, a * *im + b * *re);
        }
    }
}
