//! Products of rows with packed tiles, block by block.

use std::{arch::x86_64::__m512, ops::Range};

use super::{
    super::{
        gemm::{Finish, Out, OutForm, Rows},
        simd::{Avx512, Simd, math},
    },
    Amx, BLOCK_ROWS, CHUNK, PANEL, TILE, TILE_ROWS, Tiles,
    detect::Kernel,
    pack::{Left, left_values, pack_left, store_rounded},
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

/// Values that a product of so many panels takes beside its factors: the bias of all columns, and the sums of two blocks.
fn sum_values(panels: usize) -> usize {
    panels * PANEL + 2 * GROUP_PANELS * BLOCK
}

/// `f32` values of memory that a product of so many columns takes beside its factors.
pub(in crate::cpu) fn scratch_values(columns: usize) -> usize {
    sum_values(columns.div_ceil(PANEL) + 1)
}

/// `f32` values of memory that the left factor takes.
pub(in crate::cpu) fn left_len(count: usize, depth: usize) -> usize {
    left_values(count, depth) / 2
}

/// Rows of `depth` values become a left factor.
pub(in crate::cpu) fn pack_rows(amx: Amx, rows: Rows<'_>, depth: usize, to: &mut [f32]) {
    pack_left(amx, rows, depth, bytemuck::cast_slice_mut(to));
}

/// `out = a·b[columns]` and what `finish` says, on this thread; `a` is a left factor of `count` rows.
#[expect(clippy::too_many_arguments, reason = "as many as a product has")]
pub(in crate::cpu) fn multiply(
    amx: Amx,
    a: &[f32],
    count: usize,
    b: Tiles<'_>,
    columns: Range<usize>,
    out: Out<'_>,
    finish: Finish<'_>,
    scratch: &mut [f32],
) {
    let a = Left { data: bytemuck::cast_slice(a), count, depth: b.depth };
    amx.run(Product { amx, a, b, columns, out, finish, sums: scratch });
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
        out.check(a.count, &columns, left_len);
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
        if let OutForm::Left { .. } = job.out.form() {
            assert!(!finish.add, "a left factor is not added to");
            match finish.activation {
                Some(Activation::Gelu) => job.run(s, &configured, Rounded(Gelu)),
                Some(activation) => job.run(s, &configured, Rounded(Activated(activation))),
                None => job.run(s, &configured, Rounded(AsItIs)),
            }
            return;
        }
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
                            let (to, stride) = match out.form() {
                                OutForm::Rows { stride } => (row * stride + at + valid.start - lead, stride),
                                OutForm::Left { depth } => {
                                    let chunk = panels.start + at / PANEL;
                                    (left_len(row, depth) + chunk * TILE / 2, left_len(TILE_ROWS, depth))
                                }
                            };
                            let (bias, to) = (bias[at..].as_ptr(), out.pointer().wrapping_add(to));
                            Done { sums, rows, bias, valid, to, stride }
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
    /// Where the first wanted value goes, rows `stride` apart; for what is [`Rounded`] the tile of the left factor, and that of the next
    /// 16 rows.
    pub(super) to: *mut f32,
    pub(super) stride: usize,
}

/// What becomes of a vector of sums and bias.
pub(super) trait Last: Copy {
    /// Whether it is written into tiles of a left factor.
    const ROUNDED: bool = false;

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

/// Something that is written into tiles of a left factor, and does not look at what is there.
#[derive(Clone, Copy)]
struct Rounded<L>(L);

impl<L: Last> Last for Rounded<L> {
    const ROUNDED: bool = true;

    #[inline(always)]
    unsafe fn last(self, s: Avx512, x: __m512, row: usize, to: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { self.0.last(s, x, row, to) }
    }
}

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
        if L::ROUNDED {
            for i in rows {
                // SAFETY: the caller's promise; this runs where there is AVX-512 with bf16.
                unsafe {
                    let first = s.add(s.read(sums.add(i * PANEL)), s.read(bias));
                    let second = s.add(s.read(sums.add(i * PANEL + TILE_ROWS)), s.read(bias.add(TILE_ROWS)));
                    let line = to.add(i / TILE_ROWS * stride + i % TILE_ROWS * CHUNK / 2);
                    let values = [last.last(s, first, i, line), last.last(s, second, i, line)];
                    store_rounded(values, std::slice::from_raw_parts_mut(line.cast(), CHUNK));
                }
            }
            return;
        }
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
