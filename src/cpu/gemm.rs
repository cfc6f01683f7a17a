//! Products of rows with packed panels, tile by tile in registers.
//!
//! Each value of the result is one sum over the whole depth in order, fused multiply-add by fused multiply-add, whatever tile
//! it belongs to: so its bits depend neither on the other rows nor on how many threads there are.

use std::ops::Range;

use super::{
    Context, amx,
    pack::{PANEL, Panels, Right, Shared},
    pool::LINE,
    simd::{Kernel, Kernels, Simd, math},
};
use crate::model::Activation;

/// The left factor: rows of `depth` values, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) count: usize,
    pub(super) stride: usize,
}

/// What is done to a product before it is written.
#[derive(Clone, Copy, Default)]
pub(super) struct Finish<'a> {
    /// Added to each row: one value for each column of the right factor.
    pub(super) bias: Option<&'a [f32]>,
    /// The product is added to what is there.
    pub(super) add: bool,
    /// Applied to product and bias. Not together with `add`.
    pub(super) activation: Option<Activation>,
    /// Multiplies each row of the product: one value for each row. Alone.
    pub(super) scales: Option<&'a [f32]>,
}

/// How many rows of a panel ahead the next ones are asked for: 24 is 1 to 3 % faster than 8 where weights come from main memory,
/// and as fast where they do not; without it 5 % are lost.
const AHEAD: usize = 24;
/// Columns of one task where there are few rows.
const TASK_COLUMNS: usize = 4 * PANEL;
/// Row blocks that pass over a panel before the next panel is fetched, at least: the panel comes from far away.
const LEAST_GROUP: usize = 3;
/// And at most.
const MOST_GROUP: usize = 8;
/// Values of a group's rows that may lie in the second-level cache, which panels pass through as well.
const GROUP_VALUES: usize = 48 << 10;
/// Tasks there should be for each thread, so that nobody waits long for the last one.
const TASKS: usize = 8;

/// `out = a·b[columns]` and what `finish` says, spread over all threads; `out` has rows of `columns.len()` values.
pub(super) fn product(
    context: &Context,
    a: Rows<'_>,
    b: Right<'_>,
    columns: Range<usize>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let b = match b {
        Right::F32(b) => b,
        Right::Bf16(amx, b) => return amx::product(amx, context, a, b, columns, out, finish),
    };
    let Context { kernels, threads, pool, .. } = context;
    let (width, depth) = (columns.len(), b.depth);
    assert_eq!(out.len(), a.count * width);
    let groups = groups(context, a.count, depth);
    let part = |group: usize| (a.count * group / groups, a.count * (group + 1) / groups);
    let rows = |(first, last): (usize, usize)| Rows {
        data: &a.data[(first * a.stride).min(a.data.len())..],
        count: last - first,
        stride: a.stride,
    };
    let shared = Shared::of(out);
    if threads.count() == 1 || groups >= TASKS * threads.count() {
        // Enough groups of rows: each is put in order by whoever multiplies it, while it is in the cache anyway.
        let most = block_values(a.count.div_ceil(groups.max(1)), depth);
        let mut scratch = pool.take(threads.count() * most);
        let scratches = Shared::of(scratch.make_mut());
        threads.run(groups, |thread, group| {
            let (first, last) = part(group);
            // SAFETY: each thread has a part of the scratch, each task rows of the result.
            let (blocks, out) = unsafe {
                let blocks = scratches.part(thread * most, block_values(last - first, depth));
                (blocks, Out::part(&shared, first * width, width))
            };
            let a = pack_blocks(*kernels, rows(part(group)), depth, blocks);
            kernels.run(Product { a, b, columns: columns.clone(), out, finish });
        });
        return;
    }
    let mut blocks = pool.take(block_values(a.count, depth));
    let all = Shared::of(blocks.make_mut());
    threads.run(groups, |_, group| {
        let (first, last) = part(group);
        // SAFETY: each task has the blocks of its rows.
        let to = unsafe { all.part(block_values(first, depth), block_values(last - first, depth)) };
        pack_blocks(*kernels, rows((first, last)), depth, to);
    });
    let chunks = width.div_ceil(TASK_COLUMNS);
    threads.run(groups * chunks, |_, task| {
        let (group, chunk) = (task / chunks, task % chunks);
        let (first, last) = part(group);
        let from = columns.start + chunk * TASK_COLUMNS;
        // SAFETY: each task has rows and columns of its own.
        let out = unsafe { Out::part(&shared, first * width + chunk * TASK_COLUMNS, width) };
        let a = &blocks[block_values(first, depth)..block_values(last, depth)];
        kernels.run(Product {
            a: Blocks { data: a, count: last - first, depth },
            b,
            columns: from..(from + TASK_COLUMNS).min(columns.end),
            out,
            finish,
        });
    });
}

/// How many groups `count` rows are cut into: as large as the cache allows, smaller if threads would be idle.
fn groups(context: &Context, count: usize, depth: usize) -> usize {
    let rows = context.kernels.tile_rows();
    let group = (GROUP_VALUES / block_values(rows, depth).max(1)).clamp(LEAST_GROUP, MOST_GROUP);
    let (few, many) = (count.div_ceil(rows * group), count.div_ceil(rows * LEAST_GROUP));
    if context.threads.count() == 1 { few } else { many.min(few.max(TASKS * context.threads.count())) }
}

/// `out = a·b` and what `finish` says, where each row of `a` is made when it is needed: `row(i, values)` writes row `i` of
/// `count`. The rows of one task at a time exist.
pub(super) fn product_of(
    context: &Context,
    count: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
    b: Right<'_>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let b = match b {
        Right::F32(b) => b,
        Right::Bf16(amx, b) => return amx::product_of(amx, context, count, row, b, out, finish),
    };
    let (depth, width) = (b.depth, b.columns);
    assert_eq!(out.len(), count * width);
    let tasks = count.div_ceil(context.kernels.tile_rows() * LEAST_GROUP);
    let most = count.div_ceil(tasks.max(1));
    let each = most * depth + block_values(most, depth);
    let mut scratch = context.pool.take(context.threads.count() * each);
    let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out));
    context.threads.run(tasks, |thread, task| {
        let (first, last) = (count * task / tasks, count * (task + 1) / tasks);
        // SAFETY: each thread has a part of the scratch, each task rows of the result.
        let (scratch, out) = unsafe {
            let scratch = scratches.part(thread * each, each);
            (scratch, shared.part(first * width, (last - first) * width))
        };
        let (rows, blocks) = scratch.split_at_mut(most * depth);
        let rows = &mut rows[..(last - first) * depth];
        rows.chunks_exact_mut(depth.max(1)).zip(first..last).for_each(|(values, at)| row(at, values));
        let rows = Rows { data: rows, count: last - first, stride: depth };
        let a = pack_blocks(context.kernels, rows, depth, blocks);
        context.kernels.run(Product { a, b, columns: 0..width, out: Out::of(out, width), finish });
    });
}

/// The left factor in the order in which tiles read it: blocks of rows, in each the first [`LINE`] values of every row, then
/// the next, and so on. A tile reads it from front to back and needs one address for all its rows, where rows of their own
/// need more addresses than there are registers: that is worth 6 to 10 % of the time, 20 % beside a busy hyperthread.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) data: &'a [f32],
    pub(super) count: usize,
    pub(super) depth: usize,
}

/// Values of such a factor.
pub(super) fn block_values(count: usize, depth: usize) -> usize {
    count * depth.next_multiple_of(LINE)
}

/// Blocks of a tile's rows that `count` rows are cut into. They differ by one row at most: a last block of few rows would leave
/// the units idle.
#[inline(always)]
pub(super) fn cut<S: Simd>(count: usize) -> impl Iterator<Item = Range<usize>> {
    let blocks = count.div_ceil(S::ROWS);
    let (small, larger) = (count / blocks.max(1), count % blocks.max(1));
    (0..blocks).map(move |block| {
        let first = block * small + block.min(larger);
        first..first + small + usize::from(block < larger)
    })
}

/// Puts rows of `depth` values in order.
pub(super) fn pack_blocks<'a>(
    kernels: Kernels,
    rows: Rows<'_>,
    depth: usize,
    to: &'a mut [f32],
) -> Blocks<'a> {
    let count = rows.count;
    let to = &mut to[..block_values(count, depth)];
    kernels.run(PackBlocks { rows, depth, to });
    Blocks { data: to, count, depth }
}

struct PackBlocks<'a> {
    rows: Rows<'a>,
    depth: usize,
    to: &'a mut [f32],
}

impl Kernel for PackBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows: Rows { data, count, stride }, depth, to } = self;
        const { assert!(LINE.is_multiple_of(S::LANES)) };
        let padded = depth.next_multiple_of(LINE);
        for block in cut::<S>(count) {
            let to = &mut to[block.start * padded..block.end * padded];
            for (i, row) in block.clone().enumerate() {
                let row = &data[row * stride..][..depth];
                let (whole, rest) = row.as_chunks::<LINE>();
                for (chunk, from) in whole.iter().enumerate() {
                    let to = &mut to[(chunk * block.len() + i) * LINE..][..LINE];
                    for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
                        s.store(to, s.load(from));
                    }
                }
                if !rest.is_empty() {
                    to[(whole.len() * block.len() + i) * LINE..][..rest.len()].copy_from_slice(rest);
                }
            }
        }
    }
}

/// Where a product goes: rows `stride` apart, from `pointer` on.
pub(super) struct Out<'a> {
    pointer: *mut f32,
    /// Values that can be written from there on.
    len: usize,
    stride: usize,
    slice: std::marker::PhantomData<&'a mut [f32]>,
}

impl<'a> Out<'a> {
    /// The whole of a slice.
    pub(super) fn of(out: &'a mut [f32], stride: usize) -> Self {
        Self { pointer: out.as_mut_ptr(), len: out.len(), stride, slice: std::marker::PhantomData }
    }

    /// From value `first` of a shared slice on.
    ///
    /// # Safety
    /// Nobody else has the values that the product covers: as many in each row as it has columns.
    pub(super) unsafe fn part(shared: &Shared<'a>, first: usize, stride: usize) -> Self {
        let (pointer, len) = shared.from(first);
        Self { pointer, len, stride, slice: std::marker::PhantomData }
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn pointer(&self) -> *mut f32 {
        self.pointer
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// Panics unless so many rows of so many values can be written.
    pub(super) fn check(&self, rows: usize, width: usize) {
        assert!(
            width <= self.stride && (rows - 1) * self.stride + width <= self.len,
            "a result beyond its slice"
        );
    }
}

/// A product on one thread.
pub(super) struct Product<'a> {
    pub(super) a: Blocks<'a>,
    pub(super) b: Panels<'a>,
    pub(super) columns: Range<usize>,
    pub(super) out: Out<'a>,
    pub(super) finish: Finish<'a>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { a, b, columns, out, finish } = self;
        let (depth, width) = (b.depth, columns.len());
        if a.count == 0 || width == 0 {
            return;
        }
        assert!(
            a.depth == depth && block_values(a.count, depth) <= a.data.len(),
            "a left factor beyond its slice"
        );
        assert!(columns.end <= b.columns, "columns beyond the right factor's");
        assert!(b.columns.div_ceil(PANEL) * depth * PANEL <= b.data.len(), "a right factor beyond its slice");
        out.check(a.count, width);
        assert!(finish.bias.is_none_or(|bias| bias.len() >= columns.end));
        assert!(finish.scales.is_none_or(|scales| scales.len() >= a.count));
        let wide = 2 * S::LANES;
        let blocks = a.count.div_ceil(S::ROWS);
        // Lines of the next panel that each block asks for in each of its steps.
        let (steps, lines) = (depth.div_ceil(LINE), PANEL.div_ceil(blocks));
        let mut edge = [0.0; PANEL * 16];
        let mut at = columns.start / wide * wide;
        while at < columns.end {
            let valid = at.max(columns.start)..(at + wide).min(columns.end);
            let narrow = valid.end - at <= S::LANES;
            let whole = valid.len() == if narrow { S::LANES } else { wide };
            let mut bias = [0.0; PANEL];
            if let Some(all) = finish.bias {
                bias[valid.start - at..valid.end - at].copy_from_slice(&all[valid.clone()]);
            }
            // The panel after this one, the first one again after the last.
            let next = if at + wide < columns.end { at + wide } else { columns.start };
            let next = (next % PANEL == 0).then(|| b.data.as_ptr().wrapping_add(next * depth));
            for (number, block) in cut::<S>(a.count).enumerate() {
                let (row, rows) = (block.start, block.len());
                let asked = number * steps * lines * LINE;
                let soon = next.filter(|_| asked < depth * PANEL).map(|next| next.wrapping_add(asked));
                // SAFETY: by the assertions above the block's rows lie in `a`, the tile's columns in the panel
                // that `at` falls into (PANEL is a multiple of the tile's width), and the valid columns of these rows
                // in `out`, which is this kernel's own. A tile that is not whole goes to a buffer of its own.
                unsafe {
                    let a = a.data.as_ptr().add(block_values(row, depth));
                    let b = b.data.as_ptr().add(at / PANEL * depth * PANEL + at % PANEL);
                    let to = out.pointer.add(row * out.stride + valid.start - columns.start);
                    let scales = finish.scales.map(|scales| &scales[row..row + rows]);
                    let activation = finish.activation;
                    let soon = soon.map_or((b, 0), |soon| (soon, lines));
                    let tile = Tile { a, b, depth, soon, bias: &bias, activation, scales };
                    // One call: all tiles are inlined into each.
                    let (c, stride, add) =
                        if whole { (to, out.stride, finish.add) } else { (edge.as_mut_ptr(), PANEL, false) };
                    tile.some_rows(s, rows, narrow, c, stride, add);
                    if !whole {
                        for (i, edge) in edge.chunks_exact(PANEL).enumerate().take(rows) {
                            for (j, &value) in edge[valid.start - at..valid.end - at].iter().enumerate() {
                                let to = to.add(i * out.stride + j);
                                *to = if finish.add { *to + value } else { value };
                            }
                        }
                    }
                }
            }
            at += wide;
        }
    }
}

/// A tile of a product: some rows of `a` times one or two vectors of columns.
struct Tile<'a> {
    /// A block of as many rows as the tile has.
    a: *const f32,
    b: *const f32,
    depth: usize,
    /// What will be read soon, from far away, and how many cache lines of it to ask for in each step.
    soon: (*const f32, usize),
    bias: &'a [f32; PANEL],
    activation: Option<Activation>,
    scales: Option<&'a [f32]>,
}

impl Tile<'_> {
    /// # Safety
    /// `rows` is 1 to `S::ROWS`; as many rows of `a`, `depth` rows of `b` and as many of `c` can be used, one vector of
    /// columns if `narrow`, else two.
    #[inline(always)]
    unsafe fn some_rows<S: Simd>(
        &self,
        s: S,
        rows: usize,
        narrow: bool,
        c: *mut f32,
        stride: usize,
        add: bool,
    ) {
        // Without a tile of its own the block would be passed over in silence.
        assert!(rows <= S::ROWS, "a block of {rows} rows");
        // `const`: tiles that the instructions have no registers for are not compiled.
        macro_rules! tiles {
            ($($n:literal)*) => {
                match (rows, narrow) {
                    $(
                        ($n, false) => if const { $n <= S::ROWS } {
                            // SAFETY: the caller's promise.
                            unsafe { self.tile::<S, $n, 2>(s, c, stride, add) }
                        },
                        ($n, true) => if const { $n <= S::ROWS } {
                            // SAFETY: the caller's promise.
                            unsafe { self.tile::<S, $n, 1>(s, c, stride, add) }
                        },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        // Here and not in the tiles, which would each have a copy for every register.
        if let Some(activation) = self.activation {
            for i in 0..rows {
                for j in 0..if narrow { 1 } else { 2 } {
                    // SAFETY: the tile has written there.
                    unsafe {
                        let c = c.add(i * stride + j * S::LANES);
                        s.write(c, math::activate(s, activation, s.read(c)));
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`Tile::some_rows`].
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "indices address registers, panels and rows alike")]
    unsafe fn tile<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        c: *mut f32,
        stride: usize,
        add: bool,
    ) {
        // SAFETY: the caller's promise covers every address below: rows below M, columns below N·LANES, depths below
        // `depth`.
        unsafe {
            let mut sums = [[s.splat(0.0); N]; M];
            for i in 0..M {
                for j in 0..N {
                    s.expect_write(c.add(i * stride + j * S::LANES));
                    sums[i][j] = s.read(self.bias.as_ptr().add(j * S::LANES));
                }
            }
            let (mut a, mut b) = (self.a, self.b);
            let (mut soon, lines) = self.soon;
            for chunk in (0..self.depth).step_by(LINE) {
                for _ in 0..lines {
                    s.expect_read_soon(soon);
                    soon = soon.wrapping_add(LINE);
                }
                for p in 0..LINE.min(self.depth - chunk) {
                    let mut right = [s.splat(0.0); N];
                    for j in 0..N {
                        if (j * S::LANES).is_multiple_of(LINE) {
                            s.expect_read(b.wrapping_add(AHEAD * PANEL + j * S::LANES));
                        }
                        right[j] = s.read(b.add(j * S::LANES));
                    }
                    b = b.add(PANEL);
                    for i in 0..M {
                        let left = s.splat(*a.add(i * LINE + p));
                        for j in 0..N {
                            sums[i][j] = s.fma(left, right[j], sums[i][j]);
                        }
                    }
                }
                a = a.add(M * LINE);
            }
            if let Some(scales) = self.scales {
                for i in 0..M {
                    let scale = s.splat(*scales.get_unchecked(i));
                    for j in 0..N {
                        sums[i][j] = s.mul(sums[i][j], scale);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    let c = c.add(i * stride + j * S::LANES);
                    let sum = if add { s.add(sums[i][j], s.read(c)) } else { sums[i][j] };
                    s.write(c, sum);
                }
            }
        }
    }
}
