//! f16, bf16 and tf32 products with AVX2, FMA and F16C.
//!
//! A (rows of k) and B (k rows of columns, even columns first) are laid out as f64, then four rows of D at a time take k steps of
//! eight fused operations: the accumulators of four rows fill eight vector registers, which hides the latency of the additions.

use super::Num;
use super::fragments::{Slots, read_f16, to_f16, undefined, write};
use super::{Shape, float};
use crate::machine::core::Core;
use crate::machine::inst::{Exec, Flow, Inst};
use std::arch::x86_64::{
    __m128i, __m256d, _CMP_UNORD_Q, _mm_and_si128, _mm_blendv_ps, _mm_castps_si128, _mm_castsi128_ps,
    _mm_cmp_ps, _mm_set1_epi32, _mm_setzero_si128, _mm_unpackhi_epi16, _mm_unpackhi_epi32,
    _mm_unpackhi_epi64, _mm_unpacklo_epi16, _mm_unpacklo_epi32, _mm_unpacklo_epi64, _mm256_broadcast_sd,
    _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtpd_ps, _mm256_cvtph_ps,
    _mm256_cvtps_pd, _mm256_extractf128_ps, _mm256_fmadd_pd, _mm256_loadu_pd, _mm256_setzero_pd,
    _mm256_slli_epi32, _mm256_storeu_pd,
};

const F16: u8 = Num::F16 as u8;
const BF16: u8 = Num::Bf16 as u8;
const TF32: u8 = Num::Tf32 as u8;

/// The function for a type, a number of registers along k, and a type of the accumulator. The last number is k / 4.
pub(super) fn exec(a: Num, blocks: u32, d: Num) -> Exec {
    match (a, blocks, d) {
        (Num::F16, 1, Num::F16) => product::<F16, true, 2>,
        (Num::F16, 2, Num::F16) => product::<F16, true, 4>,
        (Num::F16, 1, _) => product::<F16, false, 2>,
        (Num::F16, _, _) => product::<F16, false, 4>,
        (Num::Bf16, 1, _) => product::<BF16, false, 2>,
        (Num::Bf16, _, _) => product::<BF16, false, 4>,
        (_, 1, _) => product::<TF32, false, 1>,
        _ => product::<TF32, false, 2>,
    }
}

/// Four numbers: a vector register in memory. Everything below works on arrays of known length so that all loops unroll.
type Four = [f64; 4];

#[target_feature(enable = "avx2,fma,f16c")]
fn product<const NUM: u8, const PACKED: bool, const QUADS: usize>(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
) -> Flow {
    if core.config.mma_truncates {
        return float::portable(core, inst, mask);
    }
    let quads_per_register = if NUM == TF32 { 1 } else { 2 };
    let blocks = QUADS / quads_per_register;
    let accumulators = if PACKED { 2 } else { 4 };
    let slots = Slots::new(core.kernel, inst, [accumulators, 2 * blocks, blocks, accumulators]);
    let regs = &mut core.warp.regs;
    let undef = undefined(regs, &slots, &Shape::unpack(inst.aux));
    let mut a = [[[0.0; 4]; QUADS]; 16];
    let mut b = [[[[0.0; 4]; 2]; 4]; QUADS];
    for block in 0..blocks {
        for half in 0..2 {
            let rows = rows_of(regs.get32(slots.a[2 * block + half]));
            for g in 0..8 {
                if NUM == TF32 {
                    store(&mut a[8 * half + g][block], widen_words(rows[g]));
                } else {
                    let [low, high] = widen::<NUM>(rows[g]);
                    store(&mut a[8 * half + g][2 * block], low);
                    store(&mut a[8 * half + g][2 * block + 1], high);
                }
            }
        }
        let columns = rows_of(regs.get32(slots.b[block]));
        if NUM == TF32 {
            transpose_words(&columns, &mut b[block]);
        } else {
            let by_k = transpose_halves(&columns);
            for k in 0..8 {
                let [even, odd] = widen::<NUM>(by_k[k]);
                let to = &mut b[2 * block + k / 4][k % 4];
                store(&mut to[0], even);
                store(&mut to[1], odd);
            }
        }
    }
    if PACKED {
        let mut c = read_f16(regs, slots.c);
        for quarter in 0..4 {
            let mut sums = [[_mm256_setzero_pd(); 2]; 4];
            let rows = &mut c.0[4 * quarter..4 * quarter + 4];
            for (sum, row) in sums.iter_mut().zip(rows.iter()) {
                *sum = read(row);
            }
            accumulate::<QUADS>(&a, &b, quarter, &mut sums);
            for (sum, row) in sums.iter().zip(rows) {
                *row = written(sum);
            }
        }
        write(regs, slots.d, &to_f16(&c), mask, undef);
    } else {
        let c = slots.c;
        let mut out = [[_mm_setzero_si128(); 8]; 4];
        for quarter in 0..4 {
            let (half, g) = (quarter / 2, quarter % 2 * 4);
            let (even, odd) = (rows_of(regs.get32(c[2 * half])), rows_of(regs.get32(c[2 * half + 1])));
            let mut sums = [[_mm256_setzero_pd(); 2]; 4];
            for r in 0..4 {
                sums[r] = [
                    _mm256_cvtps_pd(_mm_castsi128_ps(even[g + r])),
                    _mm256_cvtps_pd(_mm_castsi128_ps(odd[g + r])),
                ];
            }
            accumulate::<QUADS>(&a, &b, quarter, &mut sums);
            for r in 0..4 {
                out[2 * half][g + r] = round(sums[r][0]);
                out[2 * half + 1][g + r] = round(sums[r][1]);
            }
        }
        // SAFETY: both are 512 bytes without padding, and any bits will do.
        let out: [[u32; 32]; 4] = unsafe { std::mem::transmute(out) };
        write(regs, slots.d, &out, mask, undef);
    }
    Flow::Next
}

/// The eight rows of a fragment register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_of(register: &[u32; 32]) -> [__m128i; 8] {
    // SAFETY: both are 128 bytes without padding, and any bits will do.
    unsafe { std::mem::transmute(*register) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut Four, value: __m256d) {
    // SAFETY: 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_pd(to.as_mut_ptr(), value) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fetch(from: &Four) -> __m256d {
    // SAFETY: 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_pd(from.as_ptr()) }
}

/// A row of [`Rows`](super::fragments::Rows): even columns, odd columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn read(row: &[f64; 8]) -> [__m256d; 2] {
    // SAFETY: both loads lie in the eight numbers and need no alignment.
    unsafe { [_mm256_loadu_pd(row.as_ptr()), _mm256_loadu_pd(row.as_ptr().add(4))] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn written(sums: &[__m256d; 2]) -> [f64; 8] {
    // SAFETY: both are 64 bytes without padding.
    unsafe { std::mem::transmute(*sums) }
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

/// Four numbers as f32; a NaN has one pattern.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round(sums: __m256d) -> __m128i {
    let value = _mm256_cvtpd_ps(sums);
    let nan = _mm_castsi128_ps(_mm_set1_epi32(0x7fff_ffff));
    _mm_castps_si128(_mm_blendv_ps(value, nan, _mm_cmp_ps::<_CMP_UNORD_Q>(value, value)))
}

/// Eight columns of eight halves become eight rows, the even columns first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose_halves(x: &[__m128i; 8]) -> [__m128i; 8] {
    // Interleaving the first four with the last four rotates the bits of an element's index; three times swap row and column.
    let x = interleave(&[x[0], x[2], x[4], x[6], x[1], x[3], x[5], x[7]]);
    let x = interleave(&x);
    interleave(&x)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn interleave(x: &[__m128i; 8]) -> [__m128i; 8] {
    [
        _mm_unpacklo_epi16(x[0], x[4]),
        _mm_unpackhi_epi16(x[0], x[4]),
        _mm_unpacklo_epi16(x[1], x[5]),
        _mm_unpackhi_epi16(x[1], x[5]),
        _mm_unpacklo_epi16(x[2], x[6]),
        _mm_unpackhi_epi16(x[2], x[6]),
        _mm_unpacklo_epi16(x[3], x[7]),
        _mm_unpackhi_epi16(x[3], x[7]),
    ]
}

/// Eight columns of four words become four rows, the even columns first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose_words(x: &[__m128i; 8], to: &mut [[Four; 2]; 4]) {
    for odd in 0..2 {
        let (p, q) = (_mm_unpacklo_epi32(x[odd], x[2 + odd]), _mm_unpacklo_epi32(x[4 + odd], x[6 + odd]));
        let (r, s) = (_mm_unpackhi_epi32(x[odd], x[2 + odd]), _mm_unpackhi_epi32(x[4 + odd], x[6 + odd]));
        store(&mut to[0][odd], widen_words(_mm_unpacklo_epi64(p, q)));
        store(&mut to[1][odd], widen_words(_mm_unpackhi_epi64(p, q)));
        store(&mut to[2][odd], widen_words(_mm_unpacklo_epi64(r, s)));
        store(&mut to[3][odd], widen_words(_mm_unpackhi_epi64(r, s)));
    }
}

/// Adds the products of four rows of A with all of B.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<const QUADS: usize>(
    a: &[[Four; QUADS]; 16],
    b: &[[[Four; 2]; 4]; QUADS],
    quarter: usize,
    sums: &mut [[__m256d; 2]; 4],
) {
    let rows = [&a[4 * quarter], &a[4 * quarter + 1], &a[4 * quarter + 2], &a[4 * quarter + 3]];
    for quad in 0..QUADS {
        for k in 0..4 {
            let (even, odd) = (fetch(&b[quad][k][0]), fetch(&b[quad][k][1]));
            for r in 0..4 {
                let left = _mm256_broadcast_sd(&rows[r][quad][k]);
                sums[r][0] = _mm256_fmadd_pd(left, even, sums[r][0]);
                sums[r][1] = _mm256_fmadd_pd(left, odd, sums[r][1]);
            }
        }
    }
}
