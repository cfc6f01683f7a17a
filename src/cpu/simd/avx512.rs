//! AVX-512.

use std::arch::x86_64::{
    __m512, __m512d, __m512i, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm256_loadu_ps,
    _mm512_abs_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtps_epi32, _mm512_cvtps_pd, _mm512_fmadd_pd,
    _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_max_ps, _mm512_min_ps,
    _mm512_mul_ps, _mm512_rcp14_ps, _mm512_reduce_add_pd, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_roundscale_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_ps,
    _mm512_shuffle_f32x4, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_pd, _mm512_sub_ps,
    _mm512_ternarylogic_epi32, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

use super::{Kernel, Simd, gelu};

/// Runs a kernel with AVX-512.
///
/// # Safety
/// The processor has it.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// The proof; made in [`run`] and, with a promise, in [`Avx512::proven`].
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512(());

#[cfg(target_os = "linux")]
impl Avx512 {
    /// # Safety
    /// The processor has the instructions, and the caller is compiled for them.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn proven() -> Self {
        Self(())
    }
}

/// An expression of intrinsics that need nothing but their instruction set.
macro_rules! with {
    ($e:expr) => {
        // SAFETY: a value of `Avx512` is proof that the processor has the instructions.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    type Wide = __m512d;

    const LANES: usize = 16;
    const ROWS: usize = 14;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_mul_ps(a, b))
    }

    /// The approximate reciprocal and a step of Newton's method, then the quotient's remainder: a division takes the
    /// unit of multiplications three times as long.
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with!({
            let r = _mm512_rcp14_ps(b);
            let r = _mm512_fmadd_ps(_mm512_fnmadd_ps(b, r, _mm512_set1_ps(1.0)), r, r);
            let q = _mm512_mul_ps(a, r);
            _mm512_fmadd_ps(_mm512_fnmadd_ps(b, q, a), r, q)
        })
    }

    /// Two corrections by the remainder: after the first the quotient is off by less than a unit in the last place, and then the second
    /// rounds correctly (P. Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, 1990). Five
    /// instructions of half a cycle, where a division takes 16 cycles.
    #[inline(always)]
    fn quotient(self, a: __m512, b: __m512, r: __m512) -> __m512 {
        with!({
            let q = _mm512_mul_ps(a, r);
            let q = _mm512_fmadd_ps(_mm512_fnmadd_ps(b, q, a), r, q);
            _mm512_fmadd_ps(_mm512_fnmadd_ps(b, q, a), r, q)
        })
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn least(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn largest(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        with!(_mm512_abs_ps(a))
    }

    #[inline(always)]
    fn copysign(self, a: __m512, b: __m512) -> __m512 {
        with!({
            let sign = _mm512_set1_epi32(i32::MIN);
            // sign ? b : a, bit by bit.
            let bits =
                _mm512_ternarylogic_epi32::<0xca>(sign, _mm512_castps_si512(b), _mm512_castps_si512(a));
            _mm512_castsi512_ps(bits)
        })
    }

    #[inline(always)]
    fn where_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        with!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        with!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn power_of_two(self, n: __m512) -> __m512 {
        with!({
            let n: __m512i = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        })
    }

    #[inline(always)]
    fn power_of_rounded(self, sum: __m512) -> __m512 {
        with!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(sum))))
    }

    #[inline(always)]
    fn gelu(self, x: __m512) -> __m512 {
        with!(gelu::gelu(x))
    }

    #[inline(always)]
    fn wide_zero(self) -> __m512d {
        with!(_mm512_setzero_pd())
    }

    #[inline(always)]
    fn wide_sub(self, a: __m512d, b: __m512d) -> __m512d {
        with!(_mm512_sub_pd(a, b))
    }

    #[inline(always)]
    fn wide_fma(self, a: __m512d, b: __m512d, c: __m512d) -> __m512d {
        with!(_mm512_fmadd_pd(a, b, c))
    }

    #[inline(always)]
    fn wide_sum(self, v: __m512d) -> f64 {
        with!(_mm512_reduce_add_pd(v))
    }

    #[inline(always)]
    unsafe fn widen(self, from: *const f32) -> __m512d {
        with!(_mm512_cvtps_pd(_mm256_loadu_ps(from)))
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> __m512 {
        with!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, v: __m512) {
        with!(_mm512_storeu_ps(to, v));
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        with!(_mm512_reduce_add_ps(v))
    }

    #[inline(always)]
    fn maximum(self, v: __m512) -> f32 {
        with!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        with!({
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * from_stride));
            }
            // Pairs of rows, then fours: columns 4k to 4k + 3 of four rows end up in the 128-bit lanes k.
            let mut fours = [_mm512_setzero_ps(); 16];
            for i in (0..16).step_by(4) {
                let (a, b) =
                    (_mm512_unpacklo_ps(rows[i], rows[i + 1]), _mm512_unpackhi_ps(rows[i], rows[i + 1]));
                let (c, d) = (
                    _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]),
                    _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]),
                );
                let [a, b, c, d] = [a, b, c, d].map(|x| _mm512_castps_pd(x));
                fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            for column in 0..4 {
                let [a, b, c, d] = [0, 4, 8, 12].map(|i| fours[i + column]);
                let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (even2, odd2) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                // even holds lanes 0 and 2 of a and b, odd lanes 1 and 3.
                let out = [
                    _mm512_shuffle_f32x4::<0x88>(even, even2),
                    _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                    _mm512_shuffle_f32x4::<0xdd>(even, even2),
                    _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
                ];
                for (lane, out) in out.into_iter().enumerate() {
                    _mm512_storeu_ps(to.add((4 * lane + column) * to_stride), out);
                }
            }
        });
    }
}
