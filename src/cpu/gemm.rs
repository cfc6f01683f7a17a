//! Products of rows with packed panels, tile by tile in registers.
//!
//! Each value of the result is one sum over the whole depth in order, fused multiply-add by fused multiply-add, whatever tile
//! it belongs to: so its bits depend neither on the other rows nor on how many threads there are.

use std::ops::Range;

use super::{
    pack::{PANEL, Panels, Shared},
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

/// Where a product goes.
pub(super) struct Out<'a> {
    pointer: *mut f32,
    /// Values that can be written from there on.
    len: usize,
    form: OutForm,
    slice: std::marker::PhantomData<&'a mut [f32]>,
}

#[derive(Clone, Copy)]
pub(super) enum OutForm {
    /// Rows, so far apart; the first column that is computed is the first value.
    Rows { stride: usize },
    /// The left factor of the next product, as deep as this right factor has columns, in whole panels; from the first row that is
    /// computed and the right factor's first column on.
    Left { depth: usize },
}

impl<'a> Out<'a> {
    /// The whole of a slice.
    pub(super) fn of(out: &'a mut [f32], stride: usize) -> Self {
        Self {
            pointer: out.as_mut_ptr(),
            len: out.len(),
            form: OutForm::Rows { stride },
            slice: std::marker::PhantomData,
        }
    }

    /// From value `first` of a shared slice on.
    ///
    /// # Safety
    /// Nobody else has the values that the product covers: as many in each row as it has columns.
    pub(super) unsafe fn part(shared: &Shared<'a>, first: usize, stride: usize) -> Self {
        let (pointer, len) = shared.from(first);
        Self { pointer, len, form: OutForm::Rows { stride }, slice: std::marker::PhantomData }
    }

    /// The left factor of the next product, `depth` deep, from value `first` of a shared slice on.
    ///
    /// # Safety
    /// Nobody else has the values that the product covers: those of its columns in each row.
    pub(super) unsafe fn left(shared: &Shared<'a>, first: usize, depth: usize) -> Self {
        let (pointer, len) = shared.from(first);
        Self { pointer, len, form: OutForm::Left { depth }, slice: std::marker::PhantomData }
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn pointer(&self) -> *mut f32 {
        self.pointer
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn form(&self) -> OutForm {
        self.form
    }

    /// Panics unless these columns of so many rows can be written; `left` says how many values a left factor has (rows, depth).
    #[inline(always)]
    pub(super) fn check(
        &self,
        rows: usize,
        columns: &Range<usize>,
        left: impl FnOnce(usize, usize) -> usize,
    ) {
        let fits = match self.form {
            OutForm::Rows { stride } => {
                columns.len() <= stride && (rows - 1) * stride + columns.len() <= self.len
            }
            OutForm::Left { depth } => {
                depth.is_multiple_of(PANEL)
                    && columns.start.is_multiple_of(PANEL)
                    && columns.end.is_multiple_of(PANEL)
                    && columns.end <= depth
                    && left(rows, depth) <= self.len
            }
        };
        assert!(fits, "a result beyond its slice");
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
        out.check(a.count, &columns, block_values);
        assert!(finish.add <= matches!(out.form, OutForm::Rows { .. }), "a left factor is not added to");
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
                    let (to, stride, second) = match out.form {
                        OutForm::Rows { stride } => {
                            (out.pointer.add(row * stride + valid.start - columns.start), stride, S::LANES)
                        }
                        OutForm::Left { depth } => {
                            let chunk = block_values(row, depth) + at / LINE * rows * LINE + at % LINE;
                            (
                                out.pointer.add(chunk),
                                LINE,
                                if S::LANES == LINE { rows * LINE } else { S::LANES },
                            )
                        }
                    };
                    let scales = finish.scales.map(|scales| &scales[row..row + rows]);
                    let activation = finish.activation;
                    let soon = soon.map_or((b, 0), |soon| (soon, lines));
                    let tile = Tile { a, b, depth, soon, bias: &bias, activation, scales };
                    // One call: all tiles are inlined into each.
                    let c = if whole {
                        Place { c: to, stride, second, add: finish.add }
                    } else {
                        Place { c: edge.as_mut_ptr(), stride: PANEL, second: S::LANES, add: false }
                    };
                    tile.some_rows(s, rows, narrow, c);
                    if !whole {
                        for (i, edge) in edge.chunks_exact(PANEL).enumerate().take(rows) {
                            for (j, &value) in edge[valid.start - at..valid.end - at].iter().enumerate() {
                                let to = to.add(i * stride + j);
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

/// Where a tile goes.
#[derive(Clone, Copy)]
struct Place {
    c: *mut f32,
    /// Values from one row to the next.
    stride: usize,
    /// And from the first vector of columns to the second.
    second: usize,
    /// Whether the tile is added to what is there.
    add: bool,
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
    unsafe fn some_rows<S: Simd>(&self, s: S, rows: usize, narrow: bool, place: Place) {
        // Without a tile of its own the block would be passed over in silence.
        assert!(rows <= S::ROWS, "a block of {rows} rows");
        // `const`: tiles that the instructions have no registers for are not compiled.
        macro_rules! tiles {
            ($($n:literal)*) => {
                match (rows, narrow) {
                    $(
                        ($n, false) => if const { $n <= S::ROWS } {
                            // SAFETY: the caller's promise.
                            unsafe { self.tile::<S, $n, 2>(s, place) }
                        },
                        ($n, true) => if const { $n <= S::ROWS } {
                            // SAFETY: the caller's promise.
                            unsafe { self.tile::<S, $n, 1>(s, place) }
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
                        let c = place.c.add(i * place.stride + j * place.second);
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
    unsafe fn tile<S: Simd, const M: usize, const N: usize>(&self, s: S, place: Place) {
        let Place { c, stride, second, add } = place;
        // SAFETY: the caller's promise covers every address below: rows below M, columns below N·LANES, depths below
        // `depth`.
        unsafe {
            let mut sums = [[s.splat(0.0); N]; M];
            for i in 0..M {
                for j in 0..N {
                    s.expect_write(c.add(i * stride + j * second));
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
                    let c = c.add(i * stride + j * second);
                    let sum = if add { s.add(sums[i][j], s.read(c)) } else { sums[i][j] };
                    s.write(c, sum);
                }
            }
        }
    }
}
