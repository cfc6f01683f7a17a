//! Products of rows with packed panels, tile by tile in registers.
//!
//! Each value of the result is one sum over the whole depth in order, fused multiply-add by fused multiply-add, whatever tile
//! it belongs to: so its bits depend neither on the other rows nor on how many threads there are.

use std::ops::Range;

use super::{
    Context,
    pack::{PANEL, Panels, Shared},
    pool::LINE,
    simd::{Kernel, Kernels, Simd, math},
    threads::Threads,
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

/// Row blocks that pass over a panel before the next panel is fetched: their rows stay in the second-level cache. Of 3, 6, 12
/// and all, 3 was the fastest at 1,576 rows (by 5 %) and as fast as any at 197.
const GROUP: usize = 3;
/// How many rows of a panel ahead the next ones are asked for: 4, 8 and 16 are alike, without it 5 % are lost.
const AHEAD: usize = 8;
/// Columns of one task.
const TASK_COLUMNS: usize = 4 * PANEL;

/// `out = a·b[columns]` and what `finish` says, spread over all threads; `out` has rows of `columns.len()` values.
pub(super) fn product(
    kernels: Kernels,
    threads: &Threads,
    a: Rows<'_>,
    b: Panels<'_>,
    columns: Range<usize>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let width = columns.len();
    assert_eq!(out.len(), a.count * width);
    // Groups of rows that differ by one row at most.
    let most = kernels.tile_rows() * GROUP;
    let groups = a.count.div_ceil(most);
    let chunks = width.div_ceil(TASK_COLUMNS);
    let shared = Shared::of(out);
    threads.run(groups * chunks, |_, task| {
        let (group, chunk) = (task / chunks, task % chunks);
        let (first, last) = (a.count * group / groups, a.count * (group + 1) / groups);
        let from = columns.start + chunk * TASK_COLUMNS;
        // SAFETY: each task has rows and columns of its own.
        let out = unsafe { Out::part(&shared, first * width + chunk * TASK_COLUMNS, width) };
        let rows = Rows { data: &a.data[first * a.stride..], count: last - first, stride: a.stride };
        kernels.run(Product {
            a: rows,
            b,
            columns: from..(from + TASK_COLUMNS).min(columns.end),
            out,
            finish,
        });
    });
}

/// `out = a·b` and what `finish` says, where each row of `a` is made when it is needed: `row(i, values)` writes row `i` of
/// `count`. The rows of one task at a time exist.
pub(super) fn product_of(
    context: &Context,
    count: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
    b: Panels<'_>,
    out: &mut [f32],
    finish: Finish<'_>,
) {
    let (depth, width) = (b.depth, b.columns);
    assert_eq!(out.len(), count * width);
    let tasks = count.div_ceil(context.kernels.tile_rows() * GROUP);
    let most = count.div_ceil(tasks.max(1)) * depth;
    let mut scratch = context.pool.take(context.threads.count() * most);
    let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out));
    context.threads.run(tasks, |thread, task| {
        let (first, last) = (count * task / tasks, count * (task + 1) / tasks);
        // SAFETY: each thread has a part of the scratch, each task rows of the result.
        let (rows, out) = unsafe {
            let rows = scratches.part(thread * most, (last - first) * depth);
            (rows, shared.part(first * width, (last - first) * width))
        };
        rows.chunks_exact_mut(depth.max(1)).zip(first..last).for_each(|(values, at)| row(at, values));
        context.kernels.run(Product {
            a: Rows { data: rows, count: last - first, stride: depth },
            b,
            columns: 0..width,
            out: Out::of(out, width),
            finish,
        });
    });
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
}

/// A product on one thread.
pub(super) struct Product<'a> {
    pub(super) a: Rows<'a>,
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
        assert!(depth <= a.stride || a.count == 1);
        assert!((a.count - 1) * a.stride + depth <= a.data.len(), "a left factor beyond its slice");
        assert!(columns.end <= b.columns, "columns beyond the right factor's");
        assert!(b.columns.div_ceil(PANEL) * depth * PANEL <= b.data.len(), "a right factor beyond its slice");
        assert!(
            width <= out.stride && (a.count - 1) * out.stride + width <= out.len,
            "a result beyond its slice"
        );
        assert!(finish.bias.is_none_or(|bias| bias.len() >= columns.end));
        assert!(finish.scales.is_none_or(|scales| scales.len() >= a.count));
        // Blocks that differ by one row at most: a last block of few rows would leave the units idle.
        let blocks = a.count.div_ceil(S::ROWS);
        let (small, larger) = (a.count / blocks, a.count % blocks);
        let wide = 2 * S::LANES;
        let mut at = columns.start / wide * wide;
        while at < columns.end {
            let valid = at.max(columns.start)..(at + wide).min(columns.end);
            let narrow = valid.end - at <= S::LANES;
            let whole = valid.len() == if narrow { S::LANES } else { wide };
            let mut bias = [0.0; PANEL];
            if let Some(all) = finish.bias {
                bias[valid.start - at..valid.end - at].copy_from_slice(&all[valid.clone()]);
            }
            let mut row = 0;
            for block in 0..blocks {
                let rows = small + usize::from(block < larger);
                // SAFETY: by the assertions above the rows `row..row + rows` lie in `a`, the tile's columns in the panel
                // that `at` falls into (PANEL is a multiple of the tile's width), and the valid columns of these rows
                // in `out`, which is this kernel's own. A tile that is not whole goes to a buffer of its own.
                unsafe {
                    let (a, stride) = (a.data.as_ptr().add(row * a.stride), a.stride);
                    let b = b.data.as_ptr().add(at / PANEL * depth * PANEL + at % PANEL);
                    let to = out.pointer.add(row * out.stride + valid.start - columns.start);
                    let scales = finish.scales.map(|scales| &scales[row..row + rows]);
                    let tile =
                        Tile { a, stride, b, depth, bias: &bias, activation: finish.activation, scales };
                    if whole {
                        tile.some_rows(s, rows, narrow, to, out.stride, finish.add);
                    } else {
                        let mut edge = [0.0; PANEL * 16];
                        tile.some_rows(s, rows, narrow, edge.as_mut_ptr(), PANEL, false);
                        for (i, edge) in edge.chunks_exact(PANEL).enumerate().take(rows) {
                            for (j, &value) in edge[valid.start - at..valid.end - at].iter().enumerate() {
                                let to = to.add(i * out.stride + j);
                                *to = if finish.add { *to + value } else { value };
                            }
                        }
                    }
                }
                row += rows;
            }
            at += wide;
        }
    }
}

/// A tile of a product: some rows of `a` times one or two vectors of columns.
struct Tile<'a> {
    a: *const f32,
    stride: usize,
    b: *const f32,
    depth: usize,
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
        macro_rules! tiles {
            ($($n:literal)*) => {
                match (rows, narrow) {
                    $(
                        // SAFETY: the caller's promise.
                        ($n, false) if $n <= S::ROWS => unsafe { self.tile::<S, $n, 2>(s, c, stride, add) },
                        // SAFETY: the caller's promise.
                        ($n, true) if $n <= S::ROWS => unsafe { self.tile::<S, $n, 1>(s, c, stride, add) },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
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
            let (a, mut b) = (self.a, self.b);
            for p in 0..self.depth {
                let mut right = [s.splat(0.0); N];
                for j in 0..N {
                    if (j * S::LANES).is_multiple_of(LINE) {
                        s.expect_read(b.wrapping_add(AHEAD * PANEL + j * S::LANES));
                    }
                    right[j] = s.read(b.add(j * S::LANES));
                }
                b = b.add(PANEL);
                for i in 0..M {
                    let left = s.splat(*a.add(i * self.stride + p));
                    for j in 0..N {
                        sums[i][j] = s.fma(left, right[j], sums[i][j]);
                    }
                }
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
            if let Some(activation) = self.activation {
                for i in 0..M {
                    for j in 0..N {
                        let c = c.add(i * stride + j * S::LANES);
                        s.write(c, math::activate(s, activation, s.read(c)));
                    }
                }
            }
        }
    }
}
