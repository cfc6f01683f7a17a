//! Products of rows with packed weights, spread over threads: `f32` in vector registers or bf16 in tiles, the same schedule for
//! both.

use std::ops::Range;

use super::{
    Context, Tensor, amx,
    gemm::{Blocks, Finish, Out, Product, Rows, block_values, pack_blocks},
    norm::Normalise,
    pack::{PANEL, Right, Shared},
    pool::LINE,
    simd::Kernels,
    tensor::View,
};
use crate::backend::Norm;

/// Tasks there should be for each thread, so that nobody waits long for the last one.
const TASKS: usize = 8;
/// Rows for each thread from which on each had better have rows of its own: with fewer, all would fetch all weights for too little
/// work. Rows of their own lie in the threads' own caches, from operation to operation.
const LEAST_ROWS: usize = 64;
/// Panels of one task where there are few rows, at most.
const TASK_PANELS: usize = 4;

/// A right factor and the instructions that multiply with it.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    kernels: Kernels,
    right: Right<'a>,
}

impl<'a> Factor<'a> {
    pub(super) fn new(context: &Context, right: Right<'a>) -> Self {
        Self { kernels: context.kernels, right }
    }

    pub(super) fn depth(&self) -> usize {
        match self.right {
            Right::F32(b) => b.depth,
            Right::Bf16(_, b) => b.depth,
        }
    }

    pub(super) fn columns(&self) -> usize {
        match self.right {
            Right::F32(b) => b.columns,
            Right::Bf16(_, b) => b.columns,
        }
    }

    /// Rows that are multiplied at once; groups of so many waste nothing.
    pub(super) fn block_rows(&self) -> usize {
        match self.right {
            Right::F32(_) => self.kernels.tile_rows(),
            Right::Bf16(..) => amx::BLOCK_ROWS,
        }
    }

    /// What the first row of a group is a multiple of. Blocks of `f32` are cut anew in every group, and evenly.
    fn align(&self) -> usize {
        match self.right {
            Right::F32(_) => 1,
            Right::Bf16(..) => amx::BLOCK_ROWS,
        }
    }

    /// `f32` values of memory that a left factor of so many rows takes.
    pub(super) fn left_values(&self, count: usize) -> usize {
        match self.right {
            Right::F32(b) => block_values(count, b.depth),
            Right::Bf16(_, b) => amx::left_len(count, b.depth),
        }
    }

    /// Values of memory that a product of so many columns takes beside its factors.
    pub(super) fn scratch_values(&self, columns: usize) -> usize {
        match self.right {
            Right::F32(_) => 0,
            Right::Bf16(..) => amx::scratch_values(columns),
        }
    }

    /// Rows become a left factor.
    fn pack(&self, rows: Rows<'_>, to: &mut [f32]) {
        match self.right {
            Right::F32(b) => drop(pack_blocks(self.kernels, rows, b.depth, to)),
            Right::Bf16(amx, b) => amx::pack_rows(amx, rows, b.depth, to),
        }
    }

    /// `out = left·right[columns]` and what `finish` says, on this thread, of `count` rows.
    pub(super) fn multiply(
        &self,
        left: &[f32],
        count: usize,
        columns: Range<usize>,
        out: Out<'_>,
        finish: Finish<'_>,
        scratch: &mut [f32],
    ) {
        match self.right {
            Right::F32(b) => {
                let a = Blocks { data: left, count, depth: b.depth };
                self.kernels.run(Product { a, b, columns, out, finish });
            }
            Right::Bf16(amx, b) => amx::multiply(amx, left, count, b, columns, out, finish, scratch),
        }
    }

    /// Groups of rows where each passes over all columns before the next: as large as caches allow.
    fn large_groups(&self, count: usize) -> usize {
        let rows = self.block_rows();
        let [most_values, least, most] = match self.right {
            // The panel comes from far away: three blocks pass over it at least. What is more should lie in the second-level cache,
            // which panels pass through as well.
            Right::F32(_) => [48 << 10, 3, 8],
            Right::Bf16(..) => [96 << 10, 4, usize::MAX],
        };
        let group = (most_values / self.left_values(rows).max(1)).clamp(least, most);
        count.div_ceil(rows.saturating_mul(group))
    }
}

/// Rows, cut into groups of about the same size.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    rows: usize,
    align: usize,
    pub(super) count: usize,
}

impl Groups {
    pub(super) fn new(factor: &Factor<'_>, rows: usize, count: usize) -> Self {
        let align = factor.align();
        Self { rows, align, count: count.min(rows.div_ceil(align)) }
    }

    pub(super) fn range(&self, group: usize) -> Range<usize> {
        let units = self.rows.div_ceil(self.align);
        let first = |group: usize| (units * group / self.count * self.align).min(self.rows);
        first(group)..first(group + 1)
    }

    /// Rows of the largest group.
    pub(super) fn most(&self) -> usize {
        self.rows.div_ceil(self.align).div_ceil(self.count.max(1)) * self.align
    }
}

/// The rows of a left factor before they are one.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) rows: Rows<'a>,
    /// They are normalised on the way.
    pub(super) norm: Option<&'a RowNorm<'a>>,
}

/// A LayerNorm's parameters.
pub(super) struct RowNorm<'a> {
    weight: View<'a>,
    bias: Option<View<'a>>,
    eps: f32,
}

impl<'a> RowNorm<'a> {
    pub(super) fn new(norm: &'a Norm<Tensor>) -> Self {
        Self { weight: norm.weight.view(), bias: norm.bias.as_ref().map(Tensor::view), eps: norm.eps }
    }
}

impl Input<'_> {
    /// Values of memory that packing takes.
    pub(super) fn scratch_values(&self, factor: &Factor<'_>, most: usize) -> usize {
        let rows = if matches!(factor.right, Right::F32(_)) { most } else { amx::BLOCK_ROWS.min(most) };
        if self.norm.is_some() { (rows * factor.depth()).next_multiple_of(LINE) } else { 0 }
    }

    /// Some of the rows become a left factor.
    pub(super) fn pack(&self, factor: &Factor<'_>, range: Range<usize>, to: &mut [f32], scratch: &mut [f32]) {
        let Rows { data, stride, .. } = self.rows;
        let rows = |range: &Range<usize>| Rows {
            data: &data[(range.start * stride).min(data.len())..],
            count: range.len(),
            stride,
        };
        let Some(norm) = self.norm else { return factor.pack(rows(&range), to) };
        let depth = factor.depth();
        // Tiles can be filled one after the other, blocks of `f32` are cut when all rows are there.
        let step = if factor.align() == 1 { range.len() } else { factor.align() };
        for first in range.clone().step_by(step.max(1)) {
            let part = first..range.end.min(first + step);
            let normed = &mut scratch[..part.len() * depth];
            for (row, out) in part.clone().zip(normed.chunks_exact_mut(depth.max(1))) {
                factor.kernels.run(Normalise {
                    row: &data[row * stride..][..depth],
                    weight: &norm.weight,
                    bias: norm.bias.as_deref(),
                    eps: norm.eps,
                    out,
                });
            }
            let rows = Rows { data: normed, count: part.len(), stride: depth };
            factor.pack(rows, &mut to[factor.left_values(first - range.start)..]);
        }
    }
}

/// `out = input·right[columns]` and what `finish` says, spread over all threads; `out` has rows of `columns.len()` values.
pub(super) fn product(
    context: &Context,
    input: Input<'_>,
    right: Right<'_>,
    columns: Range<usize>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let Context { threads, pool, .. } = context;
    let (factor, count, width) = (Factor::new(context, right), input.rows.count, columns.len());
    assert_eq!(out.len(), count * width);
    let groups = groups(context, &factor, count);
    let shared = Shared::of(out);
    if rows_suffice(context, count) {
        // Each group is put in order by whoever multiplies it, while it is in the cache anyway.
        let (left, sums) = (factor.left_values(groups.most()), factor.scratch_values(width));
        let each = left + sums.max(input.scratch_values(&factor, groups.most()));
        let mut scratch = pool.take(threads.count() * each);
        let scratches = Shared::of(scratch.make_mut());
        threads.run(groups.count, |thread, group| {
            let rows = groups.range(group);
            // SAFETY: each thread has a part of the scratch, each task rows of the result.
            let (scratch, out) = unsafe {
                let scratch = scratches.part(thread * each, each);
                (scratch, Out::part(&shared, rows.start * width, width))
            };
            let (left, scratch) = scratch.split_at_mut(left);
            input.pack(&factor, rows.clone(), left, scratch);
            factor.multiply(left, rows.len(), columns.clone(), out, finish, scratch);
        });
        return;
    }
    let packed = packed(context, &factor, input, groups);
    columns_of(context, &factor, &packed, groups, columns, finish, |rows, columns, first| {
        // SAFETY: each task has rows and columns of its own.
        unsafe { Out::part(&shared, rows.start * width + columns.start - first, width) }
    });
}

/// Whether threads that have rows of their own are busy.
pub(super) fn rows_suffice(context: &Context, rows: usize) -> bool {
    let threads = context.threads.count();
    threads == 1 || rows >= threads * LEAST_ROWS
}

/// How rows are grouped: as large as caches allow, smaller if threads would be idle.
pub(super) fn groups(context: &Context, factor: &Factor<'_>, rows: usize) -> Groups {
    let (threads, few) = (context.threads.count(), factor.large_groups(rows));
    let count = if rows_suffice(context, rows) {
        few.next_multiple_of(threads)
    } else if matches!(factor.right, Right::Bf16(..)) {
        few
    } else {
        rows.div_ceil(factor.block_rows() * 3).min(few.max(TASKS * threads))
    };
    Groups::new(factor, rows, count)
}

/// All rows as a left factor, group by group.
pub(super) fn packed(
    context: &Context,
    factor: &Factor<'_>,
    input: Input<'_>,
    groups: Groups,
) -> super::pool::Buffer {
    let Context { threads, pool, .. } = context;
    // Tiles lie where they lie however rows are grouped.
    let groups = if groups.align == 1 { groups } else { Groups::new(factor, groups.rows, usize::MAX) };
    let mut packed = pool.take(factor.left_values(groups.rows));
    let all = Shared::of(packed.make_mut());
    let each = input.scratch_values(factor, groups.most());
    let mut scratch = pool.take(threads.count() * each);
    let scratches = Shared::of(scratch.make_mut());
    threads.run(groups.count, |thread, group| {
        let rows = groups.range(group);
        // SAFETY: each task has the blocks of its rows, each thread a part of the scratch.
        let (to, scratch) = unsafe {
            let to = all.part(factor.left_values(rows.start), factor.left_values(rows.len()));
            (to, scratches.part(thread * each, each))
        };
        input.pack(factor, rows, to, scratch);
    });
    drop(scratch);
    packed
}

/// A product of few rows, spread over groups of them and over columns. `out` says where rows and columns go, given the first of all
/// columns.
pub(super) fn columns_of<'o>(
    context: &Context,
    factor: &Factor<'_>,
    packed: &[f32],
    groups: Groups,
    columns: Range<usize>,
    finish: Finish<'_>,
    out: impl Fn(&Range<usize>, &Range<usize>, usize) -> Out<'o> + Sync,
) {
    let Context { threads, pool, .. } = context;
    let (first, panels) = (columns.start / PANEL, columns.end.div_ceil(PANEL) - columns.start / PANEL);
    let each_panels = (panels * groups.count / (TASKS * threads.count())).clamp(1, TASK_PANELS);
    let chunks = panels.div_ceil(each_panels);
    let each = factor.scratch_values(each_panels * PANEL);
    let mut scratch = pool.take(threads.count() * each);
    let scratches = Shared::of(scratch.make_mut());
    threads.run(groups.count * chunks, |thread, task| {
        let (rows, chunk) = (groups.range(task / chunks), task % chunks);
        let at = |chunk: usize| ((first + chunk * each_panels) * PANEL).clamp(columns.start, columns.end);
        let part = at(chunk)..at(chunk + 1);
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * each, each) };
        let left = &packed[factor.left_values(rows.start)..][..factor.left_values(rows.len())];
        let out = out(&rows, &part, columns.start);
        factor.multiply(left, rows.len(), part, out, finish, scratch);
    });
}

/// `out = a·b` and what `finish` says, where each row of `a` is made when it is needed: `row(i, values)` writes row `i` of
/// `count`. The rows of one task at a time exist.
pub(super) fn product_of(
    context: &Context,
    count: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
    right: Right<'_>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let factor = Factor::new(context, right);
    let (depth, width) = (factor.depth(), factor.columns());
    assert_eq!(out.len(), count * width);
    // With fewer blocks panels pass by too often; with more, threads wait for the last one.
    let blocks = if matches!(right, Right::F32(_)) { 3 } else { 4 };
    let groups = Groups::new(&factor, count, count.div_ceil(factor.block_rows() * blocks));
    let most = groups.most();
    let (values, left) = ((most * depth).next_multiple_of(LINE), factor.left_values(most));
    let each = values + left + factor.scratch_values(width);
    let mut scratch = context.pool.take(context.threads.count() * each);
    let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out));
    context.threads.run(groups.count, |thread, group| {
        let range = groups.range(group);
        // SAFETY: each thread has a part of the scratch, each task rows of the result.
        let (scratch, out) = unsafe {
            let scratch = scratches.part(thread * each, each);
            (scratch, Out::part(&shared, range.start * width, width))
        };
        let (rows, scratch) = scratch.split_at_mut(values);
        let (left, scratch) = scratch.split_at_mut(left);
        let rows = &mut rows[..range.len() * depth];
        rows.chunks_exact_mut(depth.max(1)).zip(range.clone()).for_each(|(values, at)| row(at, values));
        factor.pack(Rows { data: rows, count: range.len(), stride: depth }, left);
        factor.multiply(left, range.len(), 0..width, out, finish, scratch);
    });
}
