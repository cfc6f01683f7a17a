//! Products of rows with packed tiles, block by block.

use std::ops::Range;

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

/// Sums of a block.
const BLOCK: usize = BLOCK_ROWS * PANEL;
/// Chunks of the depth that are multiplied before the next rows come: so much of a panel stays in the first-level cache.
const STEP: usize = 12;
/// bf16 values of a group's rows, which panels pass over: they stay in the second-level cache.
const GROUP_VALUES: usize = 192 << 10;
/// Panels of one task, at most.
const TASK_PANELS: usize = 4;
/// Tasks there should be for each thread.
const TASKS: usize = 8;

/// Memory of one thread: `f32` values that hold so many bf16 ones, and the sums of a product's rows.
fn scratch_values(left: usize, rows: usize) -> usize {
    left / 2 + rows.div_ceil(BLOCK_ROWS) * BLOCK
}

/// Groups that rows are cut into, in whole blocks.
struct Groups {
    count: usize,
    blocks: usize,
    groups: usize,
}

impl Groups {
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
    let groups = Groups::new(a.count, depth);
    let rows = |range: &Range<usize>| Rows {
        data: &a.data[(range.start * a.stride).min(a.data.len())..],
        count: range.len(),
        stride: a.stride,
    };
    let shared = Shared::of(out);
    if threads.count() == 1 || groups.groups >= TASKS * threads.count() {
        let left = left_values(groups.most(), depth);
        let each = scratch_values(left, groups.most());
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
    let each = scratch_values(0, groups.most());
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
    let each = values + scratch_values(left, most);
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
pub(super) struct Product<'a> {
    pub(super) amx: Amx,
    pub(super) a: Left<'a>,
    pub(super) b: Tiles<'a>,
    pub(super) columns: Range<usize>,
    pub(super) out: Out<'a>,
    pub(super) finish: Finish<'a>,
    /// Room for the sums of all rows' blocks.
    pub(super) sums: &'a mut [f32],
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
        assert!(finish.bias.is_none_or(|bias| bias.len() >= columns.end));
        assert!(finish.scales.is_none_or(|scales| scales.len() >= a.count));
        let blocks = a.count.div_ceil(BLOCK_ROWS);
        assert!(blocks * BLOCK <= sums.len(), "no room for the sums");
        let chunks = depth.div_ceil(CHUNK);
        let configured = Configured::new(amx);
        for panel in columns.start / PANEL..columns.end.div_ceil(PANEL) {
            let at = panel * PANEL;
            let valid = columns.start.saturating_sub(at)..PANEL.min(columns.end - at);
            let mut bias = [0.0; PANEL];
            if let Some(all) = finish.bias {
                bias[valid.clone()].copy_from_slice(&all[at + valid.start..at + valid.end]);
            }
            let tiles = b.data[panel * chunks * 2 * TILE..].as_ptr();
            if chunks == 0 {
                sums.fill(0.0);
            }
            for first in (0..chunks.max(1)).step_by(STEP) {
                let steps = STEP.min(chunks - first);
                for block in 0..blocks {
                    let row = block * BLOCK_ROWS;
                    let rows = BLOCK_ROWS.min(a.count - row);
                    // Sums of a depth that is done in one go are not kept.
                    let sums = sums[if chunks > STEP { block * BLOCK } else { 0 }..].as_mut_ptr();
                    // SAFETY: by the assertions above the block's rows lie in `a`, the panel in `b`, the block's sums in
                    // `sums`, and the valid columns of these rows in `out`, which is this kernel's own.
                    unsafe {
                        if steps > 0 {
                            let this = tiles.add(first * 2 * TILE);
                            Block {
                                a: a.data.as_ptr().add(left_values(row, depth) + first * TILE),
                                next_rows: (rows > TILE_ROWS).then_some(chunks * TILE),
                                b: this,
                                chunks: steps,
                                sums,
                                stride: PANEL,
                                go_on: first > 0,
                                // A quarter of what comes after these steps, with each of the first four blocks.
                                soon: this.wrapping_add((steps + block % 4 * STEP / 4) * 2 * TILE),
                            }
                            .multiply(&configured);
                        }
                        if first + steps == chunks {
                            let c = out.pointer().add(row * out.stride() + at + valid.start - columns.start);
                            let done = Done { sums, rows, valid: valid.clone(), bias: &bias, finish, row };
                            done.write(s, c, out.stride());
                        }
                    }
                }
            }
        }
    }
}

/// A block's sums.
pub(super) struct Done<'a> {
    pub(super) sums: *mut f32,
    pub(super) rows: usize,
    /// Columns of the panel that are wanted.
    pub(super) valid: Range<usize>,
    pub(super) bias: &'a [f32; PANEL],
    pub(super) finish: Finish<'a>,
    /// The first row's number.
    pub(super) row: usize,
}

impl Done<'_> {
    /// # Safety
    /// There are as many rows of sums and of `c`, `stride` apart, as many columns as are valid from there on.
    #[inline(always)]
    pub(super) unsafe fn write(self, s: Avx512, c: *mut f32, stride: usize) {
        let Self { sums, rows, valid, bias, finish, row } = self;
        let whole = valid.len() == PANEL;
        let bias = [s.load(&bias[..16]), s.load(&bias[16..])];
        for i in 0..rows {
            let scale = s.splat(finish.scales.map_or(1.0, |scales| scales[row + i]));
            for j in 0..2 {
                // SAFETY: the caller's promise.
                unsafe {
                    let from = sums.add(i * PANEL + j * 16);
                    let to = if whole { c.add(i * stride + j * 16) } else { from };
                    let mut x = s.add(s.read(from), bias[j]);
                    if let Some(activation) = finish.activation {
                        x = math::activate(s, activation, x);
                    }
                    if finish.scales.is_some() {
                        x = s.mul(x, scale);
                    }
                    if whole && finish.add {
                        x = s.add(x, s.read(to));
                    }
                    s.write(to, x);
                }
            }
        }
        if whole {
            return;
        }
        for i in 0..rows {
            for (j, column) in valid.clone().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let (x, to) = (*sums.add(i * PANEL + column), c.add(i * stride + j));
                    *to = if finish.add { x + *to } else { x };
                }
            }
        }
    }
}
