//! f16, bf16 and tf32 products with AVX2, FMA and F16C.
//!
//! A (rows of k) and B (k rows of columns, even columns first) are laid out as f64, then four rows of D at a time take k steps of
//! eight fused operations: the accumulators of four rows fill eight vector registers, which hides the latency of the additions.

use super::Num;
use super::fragments::{Rows, Slots, read_f16, to_f16, undefined, write};
use super::{Shape, float};
use crate::machine::core::Core;
use crate::machine::inst::{Exec, Flow, Inst};
use crate::machine::regs::Regs;
use std::arch::x86_64::{
    __m128i, __m256d, _CMP_UNORD_Q, _mm_and_si128, _mm_blendv_ps, _mm_castps_si128, _mm_castsi128_ps,
    _mm_cmp_ps, _mm_loadu_si128, _mm_set1_epi32, _mm_setzero_si128, _mm_storeu_si128, _mm_unpackhi_epi16,
    _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi16, _mm_unpacklo_epi32, _mm_unpacklo_epi64,
    _mm256_broadcast_sd, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtpd_ps,
    _mm256_cvtph_ps, _mm256_cvtps_pd, _mm256_extractf128_ps, _mm256_fmadd_pd, _mm256_loadu_pd,
    _mm256_setzero_pd, _mm256_slli_epi32, _mm256_storeu_pd,
};

const F16: u8 = Num::F16 as u8;
const BF16: u8 = Num::Bf16 as u8;
const TF32: u8 = Num::Tf32 as u8;

/// The function for a type, a number of registers along k, and a type of the accumulator.
pub(super) fn exec(a: Num, blocks: u32, d: Num) -> Exec {
    match (a, blocks, d) {
        (Num::F16, 1, Num::F16) => product::<F16, 1, true>,
        (Num::F16, 2, Num::F16) => product::<F16, 2, true>,
        (Num::F16, 1, _) => product::<F16, 1, false>,
        (Num::F16, _, _) => product::<F16, 2, false>,
        (Num::Bf16, 1, _) => product::<BF16, 1, false>,
        (Num::Bf16, _, _) => product::<BF16, 2, false>,
        (_, 1, _) => product::<TF32, 1, false>,
        _ => product::<TF32, 2, false>,
    }
}

/// Most columns of A.
const MOST: usize = 16;

#[target_feature(enable = "avx2,fma,f16c")]
fn product<const NUM: u8, const BLOCKS: usize, const PACKED: bool>(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
) -> Flow {
    if core.config.mma_truncates {
        return float::portable(core, inst, mask);
    }
    let accumulators = if PACKED { 2 } else { 4 };
    let slots = Slots::new(core.kernel, inst, [accumulators, 2 * BLOCKS, BLOCKS, accumulators]);
    let regs = &mut core.warp.regs;
    let undef = undefined(regs, &slots, &Shape::unpack(inst.aux));
    let width = if NUM == TF32 { 4 } else { 8 };
    let mut a = [[0.0; MOST]; 16];
    let mut b = [[0.0; 8]; MOST];
    for block in 0..BLOCKS {
        for half in 0..2 {
            let register = regs.get32(slots.a[2 * block + half]);
            for g in 0..8 {
                spread_row::<NUM>(load(register, g), &mut a[8 * half + g], width * block);
            }
        }
        let register = regs.get32(slots.b[block]);
        if NUM == TF32 {
            transpose_words(register, &mut b[width * block..]);
        } else {
            transpose_halves::<NUM>(register, &mut b[width * block..]);
        }
    }
    let mut c = if PACKED { read_f16(regs, slots.c) } else { read_rows(regs, slots.c) };
    accumulate(&a, &b[..width * BLOCKS], &mut c);
    if PACKED {
        write(regs, slots.d, &to_f16(&c), mask, undef);
    } else {
        write(regs, slots.d, &to_registers(&c), mask, undef);
    }
    Flow::Next
}

/// Row `g` of a fragment register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(register: &[u32; 32], g: usize) -> __m128i {
    let row = &register[4 * g..4 * g + 4];
    // SAFETY: the slice is 16 bytes long; the load needs no alignment.
    unsafe { _mm_loadu_si128(row.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f64], at: usize, value: __m256d) {
    let to = &mut to[at..at + 4];
    // SAFETY: the slice is 32 bytes long; the store needs no alignment.
    unsafe { _mm256_storeu_pd(to.as_mut_ptr(), value) }
}

/// Eight halves as f64.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen<const NUM: u8>(halves: __m128i) -> [__m256d; 2] {
    let floats = if NUM == F16 {
        _mm256_cvtph_ps(halves)
    } else {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    };
    [_mm256_cvtps_pd(_mm256_castps256_ps128(floats)), _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(floats))]
}

/// Four tf32 as f64.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_words(words: __m128i) -> __m256d {
    let significant = _mm_and_si128(words, _mm_set1_epi32(0xffff_e000_u32 as i32));
    _mm256_cvtps_pd(_mm_castsi128_ps(significant))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn spread_row<const NUM: u8>(row: __m128i, to: &mut [f64; MOST], at: usize) {
    if NUM == TF32 {
        store(to, at, widen_words(row));
    } else {
        let [low, high] = widen::<NUM>(row);
        store(to, at, low);
        store(to, at + 4, high);
    }
}

/// The order of the columns in a row of B.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Eight columns of eight halves become eight rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose_halves<const NUM: u8>(register: &[u32; 32], to: &mut [[f64; 8]]) {
    let mut x = [_mm_setzero_si128(); 8];
    for (row, n) in x.iter_mut().zip(ORDER) {
        *row = load(register, n);
    }
    for _ in 0..3 {
        // Interleaving the first four with the last four rotates the bits of an element's index; three times swap row and column.
        x = [
            _mm_unpacklo_epi16(x[0], x[4]),
            _mm_unpackhi_epi16(x[0], x[4]),
            _mm_unpacklo_epi16(x[1], x[5]),
            _mm_unpackhi_epi16(x[1], x[5]),
            _mm_unpacklo_epi16(x[2], x[6]),
            _mm_unpackhi_epi16(x[2], x[6]),
            _mm_unpacklo_epi16(x[3], x[7]),
            _mm_unpackhi_epi16(x[3], x[7]),
        ];
    }
    for (row, halves) in to.iter_mut().zip(x) {
        let [even, odd] = widen::<NUM>(halves);
        store(row, 0, even);
        store(row, 4, odd);
    }
}

/// Eight columns of four words become four rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose_words(register: &[u32; 32], to: &mut [[f64; 8]]) {
    for (half, columns) in ORDER.chunks_exact(4).enumerate() {
        let mut x = [_mm_setzero_si128(); 4];
        for (row, n) in x.iter_mut().zip(columns) {
            *row = load(register, *n);
        }
        let (p, q) = (_mm_unpacklo_epi32(x[0], x[1]), _mm_unpacklo_epi32(x[2], x[3]));
        let (r, s) = (_mm_unpackhi_epi32(x[0], x[1]), _mm_unpackhi_epi32(x[2], x[3]));
        let rows = [
            _mm_unpacklo_epi64(p, q),
            _mm_unpackhi_epi64(p, q),
            _mm_unpacklo_epi64(r, s),
            _mm_unpackhi_epi64(r, s),
        ];
        for (row, words) in to.iter_mut().zip(rows) {
            store(row, 4 * half, widen_words(words));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate(a: &[[f64; MOST]; 16], b: &[[f64; 8]], c: &mut Rows) {
    for (rows, sums) in a.chunks_exact(4).zip(c.0.chunks_exact_mut(4)) {
        let mut acc = [[_mm256_setzero_pd(); 2]; 4];
        for (acc, sum) in acc.iter_mut().zip(sums.iter()) {
            *acc = read(sum);
        }
        for (k, right) in b.iter().enumerate().take(MOST) {
            let [even, odd] = read(right);
            for (sum, row) in acc.iter_mut().zip(rows) {
                let left = _mm256_broadcast_sd(&row[k]);
                sum[0] = _mm256_fmadd_pd(left, even, sum[0]);
                sum[1] = _mm256_fmadd_pd(left, odd, sum[1]);
            }
        }
        for (sum, [even, odd]) in sums.iter_mut().zip(acc) {
            store(sum, 0, even);
            store(sum, 4, odd);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn read(row: &[f64; 8]) -> [__m256d; 2] {
    // SAFETY: both loads lie in the eight numbers and need no alignment.
    unsafe { [_mm256_loadu_pd(row.as_ptr()), _mm256_loadu_pd(row.as_ptr().add(4))] }
}

/// A 32-bit accumulator as rows: the even columns are one register, the odd ones the next.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn read_rows(regs: &Regs, c: &[u32]) -> Rows {
    let mut rows = Rows([[0.0; 8]; 16]);
    for (i, &slot) in c.iter().enumerate() {
        let register = regs.get32(slot);
        for g in 0..8 {
            let value = _mm256_cvtps_pd(_mm_castsi128_ps(load(register, g)));
            store(&mut rows.0[g + i / 2 * 8], i % 2 * 4, value);
        }
    }
    rows
}

/// Rounds to f32 and lays the rows out as registers; a NaN has one pattern.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn to_registers(rows: &Rows) -> [[u32; 32]; 4] {
    let nan = _mm_castsi128_ps(_mm_set1_epi32(0x7fff_ffff));
    let mut out = [[0; 32]; 4];
    for (r, row) in rows.0.iter().enumerate() {
        for (odd, sums) in read(row).into_iter().enumerate() {
            let value = _mm256_cvtpd_ps(sums);
            let value = _mm_blendv_ps(value, nan, _mm_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let to = &mut out[r / 8 * 2 + odd][r % 8 * 4..r % 8 * 4 + 4];
            // SAFETY: the slice is 16 bytes long; the store needs no alignment.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm_castps_si128(value)) };
        }
    }
    out
}
