//! AVX2 with fused multiply-add.

use std::arch::x86_64::{
    __m256, __m256d, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_loadu_ps,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_andnot_ps, _mm256_blendv_ps, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtps_epi32, _mm256_cvtps_pd, _mm256_div_ps, _mm256_fmadd_pd,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_ps,
    _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_pd, _mm256_slli_epi32,
    _mm256_storeu_pd, _mm256_storeu_ps, _mm256_sub_pd, _mm256_sub_ps,
};

use super::{Kernel, Simd};

/// Runs a kernel with AVX2.
///
/// # Safety
/// The processor has it, and fused multiply-add.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// The proof; made in [`run`] only.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// An expression of intrinsics that need nothing but their instruction set.
macro_rules! with {
    ($e:expr) => {
        // SAFETY: a value of `Avx2` is proof that the processor has the instructions.
        unsafe { $e }
    };
}

impl Simd for Avx2 {
    type V = __m256;
    type Wide = __m256d;

    const LANES: usize = 8;
    const ROWS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        with!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        with!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        with!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        with!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        with!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        with!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn least(self, a: __m256, b: __m256) -> __m256 {
        with!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn largest(self, a: __m256, b: __m256) -> __m256 {
        with!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        with!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }

    #[inline(always)]
    fn copysign(self, a: __m256, b: __m256) -> __m256 {
        with!({
            let sign = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
        })
    }

    #[inline(always)]
    fn where_less(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        with!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        with!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn power_of_two(self, n: __m256) -> __m256 {
        with!({
            let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
        })
    }

    #[inline(always)]
    fn power_of_rounded(self, sum: __m256) -> __m256 {
        with!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(sum))))
    }

    #[inline(always)]
    fn wide_zero(self) -> __m256d {
        with!(_mm256_setzero_pd())
    }

    #[inline(always)]
    fn wide_sub(self, a: __m256d, b: __m256d) -> __m256d {
        with!(_mm256_sub_pd(a, b))
    }

    #[inline(always)]
    fn wide_fma(self, a: __m256d, b: __m256d, c: __m256d) -> __m256d {
        with!(_mm256_fmadd_pd(a, b, c))
    }

    #[inline(always)]
    fn wide_sum(self, v: __m256d) -> f64 {
        let mut all = [0.0; 4];
        with!(_mm256_storeu_pd(all.as_mut_ptr(), v));
        (all[0] + all[2]) + (all[1] + all[3])
    }

    #[inline(always)]
    unsafe fn widen(self, from: *const f32) -> __m256d {
        with!(_mm256_cvtps_pd(_mm_loadu_ps(from)))
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> __m256 {
        with!(_mm256_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, v: __m256) {
        with!(_mm256_storeu_ps(to, v));
    }
}
