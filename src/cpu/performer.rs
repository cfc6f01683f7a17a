//! Attention by positive random features (T2T-ViT's performer): two passes over the tokens, some at a time.

use super::{
    Context, Tensor,
    check::tokens_shape,
    gemm::{Blocks, Finish, Out, Product, Rows, block_values, pack_blocks},
    pack::{PANEL, PackRows, PackTransposed, Panels, Shared, panel_values},
    pool::Buffer,
    simd::{Kernel, Kernels, Simd, math},
};
use crate::{Error, Result};

const OP: &str = "performer";
/// Keeps the quotient finite where all features are 0.
const EPSILON: f32 = 1e-8;
/// Tokens of one task.
const TASK_TOKENS: usize = 256;

/// [`Backend::performer`](crate::backend::Backend::performer).
pub(super) fn performer(context: &Context, packed: &Tensor, w: &Tensor) -> Result<Tensor> {
    let [batch, n, packed_width] = tokens_shape(OP, "packed", packed)?;
    let width = packed_width / 3;
    if width == 0 || !packed_width.is_multiple_of(3) {
        return Err(Error::argument(
            OP,
            format!("packed rows of {packed_width} values are no keys, queries and values of one width"),
        ));
    }
    let count = w.shape().first().copied().unwrap_or(0);
    super::check::expect_shape(OP, "the random features", w, &[count, width])?;
    if count == 0 {
        return Err(Error::argument(OP, "there are no random features"));
    }
    let (packed, w) = (packed.view(), w.view());
    let job = Job::new(context, &w, n, width, count);
    let sums = job.sums(context, &packed, batch);
    let mut out = context.pool.take(batch * n * width);
    job.quotients(context, &packed, &sums, &mut out);
    Ok(Tensor::pooled([batch, n, width], out))
}

/// The numbers of a performer, and its random features in both orders.
struct Job {
    kernels: Kernels,
    n: usize,
    /// D.
    width: usize,
    /// m, the number of features.
    count: usize,
    /// The random features as a left factor.
    blocks: Buffer,
    /// And as a right factor.
    panels: Buffer,
}

impl Job {
    fn new(context: &Context, w: &[f32], n: usize, width: usize, count: usize) -> Self {
        let kernels = context.kernels;
        let mut blocks = context.pool.take(block_values(count, width));
        pack_blocks(kernels, Rows { data: w, count, stride: width }, width, blocks.make_mut());
        let mut panels = context.pool.take(panel_values(width, count));
        let rows = w.chunks(PANEL * width);
        for (to, from) in panels.make_mut().chunks_exact_mut(PANEL * width).zip(rows) {
            kernels.run(PackTransposed { from, stride: width, depth: width, to });
        }
        Self { kernels, n, width, count, blocks, panels }
    }

    /// Tasks an image's tokens are cut into.
    fn tasks(&self) -> usize {
        self.n.div_ceil(TASK_TOKENS)
    }

    /// The first token of a task, and how many it has.
    fn part(&self, task: usize) -> (usize, usize) {
        let first = task * TASK_TOKENS;
        (first, TASK_TOKENS.min(self.n - first))
    }

    /// Values of an image's sums: (m, D) of the features of keys times values, (m) of those features.
    fn sum_values(&self) -> usize {
        self.count * (self.width + 1)
    }

    /// The factor that makes the features' sum their mean, in a way.
    fn scale(&self) -> f32 {
        (self.count as f64).powf(-0.5) as f32
    }

    /// The sums over the tokens of each image, (B, `sum_values`). They are added up in order of the tasks, whoever did those.
    fn sums(&self, context: &Context, packed: &[f32], batch: usize) -> Buffer {
        let Self { kernels, n, width, count, .. } = *self;
        let (tasks, each, stride) = (self.tasks(), self.sum_values(), 3 * width);
        let most = TASK_TOKENS.min(n);
        let keys_len = panel_values(width, most);
        let values_len = panel_values(most, width);
        let (phi_len, block_len) = (count * most, block_values(count, most));
        let room = keys_len + values_len + phi_len + block_len + most;
        let mut scratch = context.pool.take(context.threads.count() * room);
        let mut parts = context.pool.take(batch * tasks * each);
        let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(parts.make_mut()));
        context.threads.run(batch * tasks, |thread, task| {
            let (image, (first, some)) = (task / tasks, self.part(task % tasks));
            // SAFETY: each thread has a part of the scratch, each task one of the sums.
            let (scratch, sums) =
                unsafe { (scratches.part(thread * room, room), shared.part(task * each, each)) };
            let (keys, rest) = scratch.split_at_mut(keys_len);
            let (values, rest) = rest.split_at_mut(values_len);
            let (phi, rest) = rest.split_at_mut(phi_len);
            let (blocks, halves) = rest.split_at_mut(block_len);
            let rows = &packed[(image * n + first) * stride..(image * n + first + some) * stride];
            for (to, from) in keys.chunks_exact_mut(PANEL * width).zip(rows.chunks(PANEL * stride)) {
                let from = &from[..from.len() - stride + width];
                kernels.run(PackTransposed { from, stride, depth: width, to });
            }
            for (half, row) in halves.iter_mut().zip(rows.chunks_exact(stride)) {
                *half = kernels.run(HalfSquare(&row[..width]));
            }
            // The features of a token are a column: as many rows as the next product has.
            let phi = &mut phi[..count * some];
            kernels.run(Product {
                a: Blocks { data: &self.blocks, count, depth: width },
                b: Panels { data: keys, depth: width, columns: some },
                columns: 0..some,
                out: Out::of(phi, some),
                finish: Finish::default(),
            });
            let (sums, totals) = sums.split_at_mut(count * width);
            let scale = self.scale();
            for (row, total) in phi.chunks_exact_mut(some).zip(totals) {
                *total = kernels.run(Features { row, less: Less::Each(&halves[..some]), scale });
            }
            let values = &mut values[..panel_values(some, width)];
            for (panel, to) in values.chunks_exact_mut(PANEL * some).enumerate() {
                let from = &rows[2 * width + panel * PANEL..];
                PackRows { from, stride, width: PANEL.min(width - panel * PANEL), to }.run();
            }
            kernels.run(Product {
                a: pack_blocks(kernels, Rows { data: phi, count, stride: some }, some, blocks),
                b: Panels { data: values, depth: some, columns: width },
                columns: 0..width,
                out: Out::of(sums, width),
                finish: Finish::default(),
            });
        });
        let mut sums = context.pool.take(batch * each);
        for (sums, parts) in sums.make_mut().chunks_exact_mut(each).zip(parts.chunks_exact(tasks * each)) {
            let (first, others) = parts.split_at(each);
            sums.copy_from_slice(first);
            for part in others.chunks_exact(each) {
                sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        }
        sums
    }

    /// The features of queries times the sums, over the features times their sums.
    fn quotients(&self, context: &Context, packed: &[f32], sums: &[f32], out: &mut Buffer) {
        let Self { kernels, n, width, count, .. } = *self;
        let (tasks, each, stride) = (self.tasks(), self.sum_values(), 3 * width);
        let batch = sums.len() / each;
        let most = TASK_TOKENS.min(n);
        let image_panels = panel_values(count, width);
        let mut panels = context.pool.take(batch * image_panels);
        for (panels, sums) in panels.make_mut().chunks_exact_mut(image_panels).zip(sums.chunks_exact(each)) {
            for (panel, to) in panels.chunks_exact_mut(PANEL * count).enumerate() {
                let from = &sums[panel * PANEL..count * width];
                PackRows { from, stride: width, width: PANEL.min(width - panel * PANEL), to }.run();
            }
        }
        let (query_len, phi_len, block_len) =
            (block_values(most, width), most * count, block_values(most, count));
        let room = query_len + phi_len + block_len + most;
        let mut scratch = context.pool.take(context.threads.count() * room);
        let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out.make_mut()));
        context.threads.run(batch * tasks, |thread, task| {
            let (image, (first, some)) = (task / tasks, self.part(task % tasks));
            // SAFETY: each thread has a part of the scratch, each task rows of the result.
            let (scratch, out) = unsafe {
                let out = shared.part((image * n + first) * width, some * width);
                (scratches.part(thread * room, room), out)
            };
            let (queries, rest) = scratch.split_at_mut(query_len);
            let (phi, rest) = rest.split_at_mut(phi_len);
            let (blocks, scales) = rest.split_at_mut(block_len);
            let rows = &packed[(image * n + first) * stride..(image * n + first + some) * stride];
            let data = Rows { data: &rows[width..], count: some, stride };
            let phi = &mut phi[..some * count];
            kernels.run(Product {
                a: pack_blocks(kernels, data, width, queries),
                b: Panels { data: &self.panels, depth: width, columns: count },
                columns: 0..count,
                out: Out::of(phi, count),
                finish: Finish::default(),
            });
            let totals = &sums[image * each + count * width..(image + 1) * each];
            let scale = self.scale();
            for ((phi, row), below) in
                phi.chunks_exact_mut(count).zip(rows.chunks_exact(stride)).zip(&mut *scales)
            {
                let less = Less::One(kernels.run(HalfSquare(&row[width..2 * width])));
                kernels.run(Features { row: phi, less, scale });
                *below = 1.0 / (kernels.run(Dot(phi, totals)) + EPSILON);
            }
            let data = Rows { data: phi, count: some, stride: count };
            kernels.run(Product {
                a: pack_blocks(kernels, data, count, blocks),
                b: Panels {
                    data: &panels[image * image_panels..(image + 1) * image_panels],
                    depth: count,
                    columns: width,
                },
                columns: 0..width,
                out: Out::of(out, width),
                finish: Finish { scales: Some(&scales[..some]), ..Finish::default() },
            });
        });
    }
}

/// What is taken from the exponents of a row.
enum Less<'a> {
    One(f32),
    Each(&'a [f32]),
}

/// `e^(x - less)·scale` of a row, in place, and its sum.
struct Features<'a> {
    row: &'a mut [f32],
    less: Less<'a>,
    scale: f32,
}

impl Kernel for Features<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { row, less, scale } = self;
        let mut sum = s.splat(0.0);
        let whole = row.len() / S::LANES * S::LANES;
        let (main, tail) = row.split_at_mut(whole);
        for (chunk, at) in main.chunks_exact_mut(S::LANES).zip((0..).step_by(S::LANES)) {
            let less = match less {
                Less::One(less) => s.splat(less),
                Less::Each(less) => s.load(&less[at..]),
            };
            let phi = s.mul(math::exp(s, s.sub(s.load(chunk), less)), s.splat(scale));
            s.store(chunk, phi);
            sum = s.add(sum, phi);
        }
        if tail.is_empty() {
            return s.sum(sum);
        }
        let less = match less {
            Less::One(less) => s.splat(less),
            Less::Each(less) => s.load_some(&less[whole..], 0.0),
        };
        let phi = s.mul(math::exp(s, s.sub(s.load_some(tail, 0.0), less)), s.splat(scale));
        s.store_some(tail, phi);
        s.sum(sum) + tail.iter().sum::<f32>()
    }
}

/// Half the square of a row's length.
struct HalfSquare<'a>(&'a [f32]);

impl Kernel for HalfSquare<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        Dot(self.0, self.0).run(s) / 2.0
    }
}

/// The product of two rows.
struct Dot<'a>(&'a [f32], &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (a, b) = (self.0.chunks_exact(S::LANES), self.1.chunks_exact(S::LANES));
        let mut sum = s.splat(0.0);
        if !a.remainder().is_empty() {
            sum = s.mul(s.load_some(a.remainder(), 0.0), s.load_some(b.remainder(), 0.0));
        }
        for (a, b) in a.zip(b) {
            sum = s.fma(s.load(a), s.load(b), sum);
        }
        s.sum(sum)
    }
}
