//! Factors, rounded to bf16 and put in the order in which tiles read them.

use std::{
    arch::x86_64::{
        __m512, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16,
        _mm512_storeu_si512,
    },
    ops::Range,
};

use super::{
    super::{
        gemm::Rows,
        simd::{Avx512, Simd},
    },
    Amx, CHUNK, PANEL, TILE, TILE_ROWS,
    detect::Kernel,
};

/// A tile on its way.
#[repr(C, align(64))]
struct Tile([u16; TILE]);

/// Two vectors, rounded, into 32 values.
///
/// # Safety
/// The processor has AVX-512 with bf16.
#[inline(always)]
pub(super) unsafe fn store_rounded([first, second]: [__m512; 2], to: &mut [u16]) {
    assert!(to.len() >= CHUNK);
    // SAFETY: the caller's promise; there is room for 512 bits.
    unsafe {
        let values: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
        _mm512_storeu_si512(to.as_mut_ptr().cast(), values);
    }
}

/// 32 values, rounded.
///
/// # Safety
/// The processor has AVX-512 with bf16; 32 values can be read.
#[inline(always)]
unsafe fn rounded(from: *const f32) -> __m512i {
    // SAFETY: the caller's promise; both types are 512 bits.
    unsafe {
        let (first, second) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(CHUNK / 2)));
        std::mem::transmute(_mm512_cvtne2ps_pbh(second, first))
    }
}

/// At most 32 values, rounded, and 0 behind them.
///
/// # Safety
/// The processor has AVX-512 with bf16.
#[inline(always)]
unsafe fn rounded_some(from: &[f32]) -> __m512i {
    let mut all = [0.0; CHUNK];
    all[..from.len()].copy_from_slice(from);
    // SAFETY: the caller's promise.
    unsafe { rounded(all.as_ptr()) }
}

/// The left factor of a product: blocks of 16 rows, in each a tile for each chunk of the depth. What fills up the last chunk is
/// 0; rows that fill up the last block hold anything.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [u16],
    pub(super) count: usize,
    pub(super) depth: usize,
}

/// bf16 values of such a factor.
pub(super) fn left_values(count: usize, depth: usize) -> usize {
    count.div_ceil(TILE_ROWS) * depth.div_ceil(CHUNK) * TILE
}

/// Rows of `depth` values become a left factor.
pub(super) fn pack_left<'a>(amx: Amx, rows: Rows<'_>, depth: usize, to: &'a mut [u16]) -> Left<'a> {
    let count = rows.count;
    let to = &mut to[..left_values(count, depth)];
    amx.run(PackLeft { rows, depth, to });
    Left { data: to, count, depth }
}

pub(super) struct PackLeft<'a> {
    pub(super) rows: Rows<'a>,
    pub(super) depth: usize,
    /// [`left_values`] of them.
    pub(super) to: &'a mut [u16],
}

impl Kernel for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: Avx512) {
        let Self { rows: Rows { data, count, stride }, depth, to } = self;
        let block_values = depth.div_ceil(CHUNK) * TILE;
        if block_values == 0 {
            return;
        }
        for (block, to) in to.chunks_exact_mut(block_values).enumerate() {
            let first = block * TILE_ROWS;
            for (i, row) in (first..count.min(first + TILE_ROWS)).enumerate() {
                let row = &data[row * stride..][..depth];
                for (chunk, from) in row.chunks(CHUNK).enumerate() {
                    let to = &mut to[chunk * TILE + i * CHUNK..][..CHUNK];
                    // SAFETY: a kernel runs where there is AVX-512 with bf16; a whole chunk has 32 values, and so has `to`.
                    unsafe {
                        let values = match from.len() {
                            CHUNK => rounded(from.as_ptr()),
                            _ => rounded_some(from),
                        };
                        _mm512_storeu_si512(to.as_mut_ptr().cast(), values);
                    }
                }
            }
        }
    }
}

/// Rows of `depth` values, `stride` apart and at most [`PANEL`], become the columns of a panel of a right factor.
pub(in crate::cpu) fn pack_transposed(amx: Amx, from: &[f32], stride: usize, depth: usize, to: &mut [u16]) {
    amx.run(PackTransposed { from, stride, depth, to });
}

pub(super) struct PackTransposed<'a> {
    pub(super) from: &'a [f32],
    pub(super) stride: usize,
    pub(super) depth: usize,
    pub(super) to: &'a mut [u16],
}

impl Kernel for PackTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: Avx512) {
        let Self { from, stride, depth, to } = self;
        if depth == 0 {
            return;
        }
        let rows = (from.len() + stride - depth) / stride;
        assert!(to.len() == depth.div_ceil(CHUNK) * 2 * TILE && rows <= PANEL && depth <= stride);
        for (chunk, to) in to.chunks_exact_mut(2 * TILE).enumerate() {
            let values = chunk * CHUNK..depth.min((chunk + 1) * CHUNK);
            for (half, to) in to.chunks_exact_mut(TILE).enumerate() {
                let mut tile = Tile([0; TILE]);
                for (row, line) in (half * TILE_ROWS..rows).zip(tile.0.chunks_exact_mut(CHUNK)) {
                    let from = &from[row * stride..][values.clone()];
                    // SAFETY: as in `PackLeft`.
                    unsafe {
                        let values = match from.len() {
                            CHUNK => rounded(from.as_ptr()),
                            _ => rounded_some(from),
                        };
                        _mm512_storeu_si512(line.as_mut_ptr().cast(), values);
                    }
                }
                // SAFETY: pairs of values are moved as if each were one of 32 bits, 16 times 16 of them, whose bits stay.
                unsafe { s.transpose(tile.0.as_ptr().cast(), TILE_ROWS, to.as_mut_ptr().cast(), TILE_ROWS) };
            }
        }
    }
}

/// `depth` rows of `width` values, `stride` apart, become a right factor.
pub(super) struct PackRows<'a> {
    pub(super) from: &'a [f32],
    pub(super) stride: usize,
    pub(super) depth: usize,
    pub(super) width: usize,
    /// [`tile_values`](super::tile_values) of them.
    pub(super) to: &'a mut [u16],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: Avx512) {
        /// Two rows of 16 values, one behind the other, become pairs.
        static PAIRS: [u16; CHUNK] = {
            let mut order = [0; CHUNK];
            let mut i = 0;
            while i < CHUNK {
                order[i] = (i / 2 + i % 2 * TILE_ROWS) as u16;
                i += 1;
            }
            order
        };
        let Self { from, stride, depth, width, to } = self;
        let chunks = depth.div_ceil(CHUNK);
        if chunks == 0 {
            return;
        }
        // SAFETY: a kernel runs where there is AVX-512; the order has 512 bits.
        let pairs = unsafe { _mm512_loadu_si512(PAIRS.as_ptr().cast()) };
        for (at, tile) in to.chunks_exact_mut(TILE).enumerate() {
            let (panel, chunk, half) = (at / 2 / chunks, at / 2 % chunks, at % 2);
            let first = panel * PANEL + half * TILE_ROWS;
            let columns = first.min(width)..width.min(first + TILE_ROWS);
            for (pair, line) in tile.chunks_exact_mut(CHUNK).enumerate() {
                let i = chunk * CHUNK + 2 * pair;
                // SAFETY: a kernel runs where there is AVX-512 with bf16; a line has 512 bits.
                unsafe {
                    let [even, odd] = [i, i + 1].map(|i| if i < depth { i * stride } else { usize::MAX });
                    let rows =
                        _mm512_cvtne2ps_pbh(some(s, from, odd, &columns), some(s, from, even, &columns));
                    let rows: __m512i = std::mem::transmute(rows);
                    _mm512_storeu_si512(line.as_mut_ptr().cast(), _mm512_permutexvar_epi16(pairs, rows));
                }
            }
        }
    }
}

/// Some columns, at most 16, of the row that begins at `row`, and 0 behind them; 0 for a row beyond the end.
#[inline(always)]
fn some(s: Avx512, from: &[f32], row: usize, columns: &Range<usize>) -> __m512 {
    if row == usize::MAX || columns.is_empty() {
        return s.splat(0.0);
    }
    let row = &from[row..][columns.clone()];
    if row.len() == TILE_ROWS { s.load(row) } else { s.load_some(row, 0.0) }
}
