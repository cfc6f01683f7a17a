//! Products of rows with packed tiles, block by block.

use std::{arch::x86_64::__m512, ops::Range};

use super::{
    super::{
        Context,
        gemm::{Finish, Out, Rows},
        pack::Shared,
        simd::{Avx512, Simd, math},
    },
    Amx, BLOCK_ROWS, CHUNK, PANEL, TILE, TILE_ROWS, Tiles,
    detect::Kernel,
    pack::{Left, left_values, pack_left},
    tile::{Block, Configured},
    tile_values,
};
use crate::model::Activation;

/// Sums of a block.
const BLOCK: usize = BLOCK_ROWS * PANEL;
/// Chunks of the depth that are multiplied before the next panel comes: so much of a block's rows stays in the first-level cache.
const STEP: usize = 12;
/// Panels that a block's rows are multiplied with before the next rows come: so many values lie side by side when they are
/// written, where each row is on another page.
const GROUP_PANELS: usize = 4;
/// bf16 values of a group's rows, which panels pass over: they stay in the second-level cache.
const GROUP_VALUES: usize = 192 << 10;
/// Panels of one task, at most.
const TASK_PANELS: usize = 4;
/// Tasks there should be for each thread.
const TASKS: usize = 8;

/// Values that a product of so many panels takes beside its factors: the bias of all columns, and the sums of two blocks.
fn sum_values(panels: usize) -> usize {
    panels * PANEL + 2 * GROUP_PANELS * BLOCK
}

/// Groups that rows are cut into, in whole blocks.
struct RowGroups {
    count: usize,
    blocks: usize,
    groups: usize,
}

impl RowGroups {
    fn new(count: usize, depth: usize) -> Self {
        let blocks = count.div_ceil(BLOCK_ROWS);
        let most = (GROUP_VALUES / left_values(BLOCK_ROWS, depth).max(1)).max(4);
        Self { count, blocks, groups: blocks.div_ceil(most) }
    }

    fn rows(&self, group: usize) -> Range<usize> {
        let first = |group: usize| (self.blocks * group / self.groups * BLOCK_ROWS).min(self.count);
        first(group)..first(group + 1)
    }

    /// Rows of the largest group.
    fn most(&self) -> usize {
        self.blocks.div_ceil(self.groups.max(1)) * BLOCK_ROWS
    }
}

/// `out = a·b[columns]` and what `finish` says, spread over all threads; `out` has rows of `columns.len()` values.
pub(in crate::cpu) fn product(
    amx: Amx,
    context: &Context,
    a: Rows<'_>,
    b: Tiles<'_>,
    columns: Range<usize>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let Context { threads, pool, .. } = context;
    let (width, depth) = (columns.len(), b.depth);
    assert_eq!(out.len(), a.count * width);
    let groups = RowGroups::new(a.count, depth);
    let rows = |range: &Range<usize>| Rows {
        data: &a.data[(range.start * a.stride).min(a.data.len())..],
        count: range.len(),
        stride: a.stride,
    };
    let shared = Shared::of(out);
    if threads.count() == 1 || groups.groups >= TASKS * threads.count() {
        let left = left_values(groups.most(), depth);
        let panels = columns.end.div_ceil(PANEL) - columns.start / PANEL;
        let each = left / 2 + sum_values(panels);
        let mut scratch = pool.take(threads.count() * each);
        let scratches = Shared::of(scratch.make_mut());
        threads.run(groups.groups, |thread, group| {
            let range = groups.rows(group);
            // SAFETY: each thread has a part of the scratch, each task rows of the result.
            let (scratch, out) = unsafe {
                let scratch = scratches.part(thread * each, each);
                (scratch, Out::part(&shared, range.start * width, width))
            };
            let (packed, sums) = scratch.split_at_mut(left / 2);
            let a = pack_left(amx, rows(&range), depth, bytemuck::cast_slice_mut(packed));
            amx.run(Product { amx, a, b, columns: columns.clone(), out, finish, sums });
        });
        return;
    }
    let mut packed = pool.take(left_values(a.count, depth) / 2);
    let all = Shared::of(bytemuck::cast_slice_mut::<f32, u16>(packed.make_mut()));
    let blocks = groups.blocks;
    threads.run(blocks, |_, block| {
        let range = block * BLOCK_ROWS..a.count.min((block + 1) * BLOCK_ROWS);
        // SAFETY: each task has the tiles of its rows.
        let to = unsafe { all.part(left_values(range.start, depth), left_values(range.len(), depth)) };
        pack_left(amx, rows(&range), depth, to);
    });
    let packed: &[u16] = bytemuck::cast_slice(&packed);
    let (first, panels) = (columns.start / PANEL, columns.end.div_ceil(PANEL) - columns.start / PANEL);
    let each_panels = (panels * groups.groups / (TASKS * threads.count())).clamp(1, TASK_PANELS);
    let chunks = panels.div_ceil(each_panels);
    let each = sum_values(each_panels);
    let mut scratch = pool.take(threads.count() * each);
    let scratches = Shared::of(scratch.make_mut());
    threads.run(groups.groups * chunks, |thread, task| {
        let (range, chunk) = (groups.rows(task / chunks), task % chunks);
        let at = |chunk: usize| ((first + chunk * each_panels) * PANEL).clamp(columns.start, columns.end);
        let part = at(chunk)..at(chunk + 1);
        // SAFETY: each thread has a part of the scratch, each task rows and columns of its own.
        let (sums, out) = unsafe {
            let sums = scratches.part(thread * each, each);
            (sums, Out::part(&shared, range.start * width + part.start - columns.start, width))
        };
        let data = &packed[left_values(range.start, depth)..][..left_values(range.len(), depth)];
        let a = Left { data, count: range.len(), depth };
        amx.run(Product { amx, a, b, columns: part, out, finish, sums });
    });
}

/// `out = a·b` and what `finish` says, where each row of `a` is made when it is needed: `row(i, values)` writes row `i` of
/// `count`. The rows of one task at a time exist.
pub(in crate::cpu) fn product_of(
    amx: Amx,
    context: &Context,
    count: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
    b: Tiles<'_>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let (depth, width) = (b.depth, b.columns);
    assert_eq!(out.len(), count * width);
    // Four blocks: with fewer, panels pass by too often; with more, threads wait for the last one.
    let most = 4 * BLOCK_ROWS;
    let (values, left) = ((most * depth).next_multiple_of(CHUNK), left_values(most, depth));
    let each = values + left / 2 + sum_values(width.div_ceil(PANEL));
    let mut scratch = context.pool.take(context.threads.count() * each);
    let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out));
    context.threads.run(count.div_ceil(most), |thread, task| {
        let (first, last) = (task * most, count.min((task + 1) * most));
        // SAFETY: each thread has a part of the scratch, each task rows of the result.
        let (scratch, out) = unsafe {
            let scratch = scratches.part(thread * each, each);
            (scratch, shared.part(first * width, (last - first) * width))
        };
        let (rows, scratch) = scratch.split_at_mut(values);
        let (packed, sums) = scratch.split_at_mut(left / 2);
        let rows = &mut rows[..(last - first) * depth];
        rows.chunks_exact_mut(depth.max(1)).zip(first..last).for_each(|(values, at)| row(at, values));
        let rows = Rows { data: rows, count: last - first, stride: depth };
        let a = pack_left(amx, rows, depth, bytemuck::cast_slice_mut(packed));
        amx.run(Product { amx, a, b, columns: 0..width, out: Out::of(out, width), finish, sums });
    });
}

/// A product on one thread.
struct Product<'a> {
    amx: Amx,
    a: Left<'a>,
    b: Tiles<'a>,
    columns: Range<usize>,
    out: Out<'a>,
    finish: Finish<'a>,
    /// [`sum_values`] of them.
    sums: &'a mut [f32],
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: Avx512) {
        let Self { amx, a, b, columns, out, finish, sums } = self;
        let (depth, width) = (b.depth, columns.len());
        if a.count == 0 || width == 0 {
            return;
        }
        assert!(
            a.depth == depth && left_values(a.count, depth) <= a.data.len(),
            "a left factor beyond its slice"
        );
        assert!(columns.end <= b.columns, "columns beyond the right factor's");
        assert!(tile_values(depth, b.columns) <= b.data.len(), "a right factor beyond its slice");
        out.check(a.count, width);
        assert!(finish.scales.is_none(), "rows are scaled by attention itself");
        let panels = columns.start / PANEL..columns.end.div_ceil(PANEL);
        let (bias, sums) = sums[..sum_values(panels.len())].split_at_mut(panels.len() * PANEL);
        let lead = columns.start - panels.start * PANEL;
        bias.fill(0.0);
        if let Some(all) = finish.bias {
            bias[lead..lead + width].copy_from_slice(&all[columns.clone()]);
        }
        let job = Job { a, b, panels, lead, width, bias, sums, out };
        let configured = Configured::new(amx);
        // A loop for each: what is done last is done between the steps of the next block.
        match finish {
            Finish { activation: Some(Activation::Gelu), .. } => job.run(s, &configured, Gelu),
            Finish { activation: Some(activation), .. } => job.run(s, &configured, Activated(activation)),
            Finish { add: true, .. } => job.run(s, &configured, Added),
            _ => job.run(s, &configured, AsItIs),
        }
    }
}

/// A product whose extents have been checked.
struct Job<'a> {
    a: Left<'a>,
    b: Tiles<'a>,
    panels: Range<usize>,
    /// Columns of the first panel that are not wanted.
    lead: usize,
    /// Columns that are.
    width: usize,
    /// A value for each of the panels' columns.
    bias: &'a [f32],
    sums: &'a mut [f32],
    out: Out<'a>,
}

impl Job<'_> {
    #[inline(always)]
    fn run<L: Last>(self, s: Avx512, configured: &Configured, last: L) {
        let Self { a, b, panels, lead, width, bias, sums, out } = self;
        let chunks = b.depth.div_ceil(CHUNK);
        // A block's sums are finished between the steps of the next one: alone they would take half as long as the products, and
        // right after a tile was stored its values would be waited for.
        let (mut pending, mut turn): (Option<Done>, _) = (None, 0);
        for first in panels.clone().step_by(GROUP_PANELS) {
            let group = GROUP_PANELS.min(panels.end - first);
            let tiles = b.data[first * chunks * 2 * TILE..].as_ptr();
            for row in (0..a.count).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(a.count - row);
                turn = 1 - turn;
                // At least once, so that sums over no depth are written.
                for chunk in (0..chunks.max(1)).step_by(STEP) {
                    for panel in 0..group {
                        let at = (first - panels.start + panel) * PANEL;
                        let sums = sums[(turn * GROUP_PANELS + panel) * BLOCK..].as_mut_ptr();
                        let done = (chunk + STEP >= chunks).then(|| {
                            let valid = lead.saturating_sub(at)..PANEL.min(lead + width - at);
                            let to = row * out.stride() + at + valid.start - lead;
                            Done {
                                sums,
                                rows,
                                bias: bias[at..].as_ptr(),
                                to: out.pointer().wrapping_add(to),
                                valid,
                                stride: out.stride(),
                            }
                        });
                        // SAFETY: by the assertions of `Product` the rows' tiles lie in `a`, the panel's in `b`, the block's sums in
                        // `sums`, and the wanted columns of these rows in `out`, which is this kernel's own.
                        unsafe {
                            let b = tiles.add((panel * chunks + chunk) * 2 * TILE);
                            // A quarter of the same part of the next group, with each of the first four blocks.
                            let soon = (group * chunks + row / BLOCK_ROWS % 4 * STEP / 4) * 2 * TILE;
                            let stretch = Stretch {
                                a: a.data.as_ptr().add(left_values(row, a.depth) + chunk * TILE),
                                below: chunks * TILE,
                                b,
                                soon: b.wrapping_add(soon),
                                steps: STEP.min(chunks - chunk),
                                go_on: chunk > 0,
                                sums,
                            };
                            if rows > TILE_ROWS {
                                stretch.run::<true, L>(s, configured, pending.as_ref(), last);
                            } else {
                                stretch.run::<false, L>(s, configured, pending.as_ref(), last);
                            }
                        }
                        pending = done;
                    }
                }
            }
        }
        if let Some(done) = pending {
            // SAFETY: as above.
            unsafe { done.write(s, last, 0..done.rows) };
        }
    }
}

/// Steps over part of the depth.
struct Stretch {
    a: *const u16,
    /// Values from a tile of the left factor to that of the next 16 rows.
    below: usize,
    b: *const u16,
    soon: *const u16,
    steps: usize,
    go_on: bool,
    sums: *mut f32,
}

impl Stretch {
    /// # Safety
    /// The factors' tiles can be read and the sums written; `pending` can be written as [`Done::write`] says.
    #[inline(always)]
    unsafe fn run<const TWO: bool, L: Last>(
        self,
        s: Avx512,
        configured: &Configured,
        pending: Option<&Done>,
        last: L,
    ) {
        let Self { a, below, b, soon, steps, go_on, sums } = self;
        // SAFETY: the caller's promise.
        unsafe {
            Block::<TWO>::begin(configured, go_on, sums, PANEL);
            let (mut written, rows) = (0, pending.map_or(0, |done| done.rows));
            let each = rows.div_ceil(steps.max(1));
            for step in 0..steps {
                let a = a.add(step * TILE);
                let (b, soon) = (b.add(step * 2 * TILE), soon.wrapping_add(step * TILE / 2));
                Block::<TWO>::step(configured, a, a.wrapping_add(below), b, soon);
                if written < rows
                    && let Some(done) = pending
                {
                    let part = written..rows.min(written + each);
                    written = part.end;
                    done.write(s, last, part);
                }
            }
            if written < rows
                && let Some(done) = pending
            {
                done.write(s, last, written..rows);
            }
            Block::<TWO>::end(configured, sums, PANEL);
        }
    }
}

/// A block's sums, and where they go.
pub(super) struct Done {
    pub(super) sums: *const f32,
    pub(super) rows: usize,
    /// A value for each of the panel's columns.
    pub(super) bias: *const f32,
    /// Columns that are wanted.
    pub(super) valid: Range<usize>,
    /// Where the first wanted value goes, rows `stride` apart.
    pub(super) to: *mut f32,
    pub(super) stride: usize,
}

/// What becomes of a vector of sums and bias.
pub(super) trait Last: Copy {
    /// # Safety
    /// A vector can be read from `to`.
    unsafe fn last(self, s: Avx512, x: __m512, row: usize, to: *const f32) -> __m512;
}

#[derive(Clone, Copy)]
pub(super) struct AsItIs;
#[derive(Clone, Copy)]
struct Added;
#[derive(Clone, Copy)]
struct Gelu;
#[derive(Clone, Copy)]
struct Activated(Activation);
#[derive(Clone, Copy)]
pub(super) struct Scaled<'a>(pub(super) &'a [f32]);

impl Last for AsItIs {
    #[inline(always)]
    unsafe fn last(self, _: Avx512, x: __m512, _: usize, _: *const f32) -> __m512 {
        x
    }
}

impl Last for Added {
    #[inline(always)]
    unsafe fn last(self, s: Avx512, x: __m512, _: usize, to: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        s.add(x, unsafe { s.read(to) })
    }
}

impl Last for Gelu {
    #[inline(always)]
    unsafe fn last(self, s: Avx512, x: __m512, _: usize, _: *const f32) -> __m512 {
        math::activate(s, Activation::Gelu, x)
    }
}

impl Last for Activated {
    #[inline(always)]
    unsafe fn last(self, s: Avx512, x: __m512, _: usize, _: *const f32) -> __m512 {
        math::activate(s, self.0, x)
    }
}

impl Last for Scaled<'_> {
    #[inline(always)]
    unsafe fn last(self, s: Avx512, x: __m512, row: usize, _: *const f32) -> __m512 {
        s.mul(x, s.splat(self.0[row]))
    }
}

impl Done {
    /// Writes some of the rows.
    ///
    /// # Safety
    /// There are as many rows of sums and of the result, and in each as many columns as are valid.
    #[inline(always)]
    pub(super) unsafe fn write<L: Last>(&self, s: Avx512, last: L, rows: Range<usize>) {
        let Self { sums, bias, ref valid, to, stride, .. } = *self;
        let whole = valid.len() == PANEL;
        for i in rows {
            for half in [0, TILE_ROWS] {
                // SAFETY: the caller's promise.
                unsafe {
                    let x = s.add(s.read(sums.add(i * PANEL + half)), s.read(bias.add(half)));
                    if whole {
                        let to = to.add(i * stride + half);
                        s.write(to, last.last(s, x, i, to));
                    } else {
                        self.write_some(s, last.last(s, x, i, self.edge(i, half).as_ptr()), i, half);
                    }
                }
            }
        }
    }

    /// What is wanted of a vector's columns: numbers in the panel.
    #[inline(always)]
    fn wanted(&self, half: usize) -> Range<usize> {
        let end = (half + TILE_ROWS).min(self.valid.end);
        half.max(self.valid.start).min(end)..end
    }

    /// What is there, of a vector that reaches over the edge of what is wanted.
    ///
    /// # Safety
    /// As [`Done::write`].
    #[inline(always)]
    unsafe fn edge(&self, row: usize, half: usize) -> [f32; TILE_ROWS] {
        let mut edge = [0.0; TILE_ROWS];
        for at in self.wanted(half) {
            // SAFETY: the caller's promise.
            edge[at - half] = unsafe { *self.to.add(row * self.stride + at - self.valid.start) };
        }
        edge
    }

    /// # Safety
    /// As [`Done::write`].
    #[inline(always)]
    unsafe fn write_some(&self, s: Avx512, x: __m512, row: usize, half: usize) {
        let mut edge = [0.0; TILE_ROWS];
        s.store(&mut edge, x);
        for at in self.wanted(half) {
            // SAFETY: the caller's promise.
            unsafe { *self.to.add(row * self.stride + at - self.valid.start) = edge[at - half] };
        }
    }
}
