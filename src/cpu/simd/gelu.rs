//! GELU by a table in registers.

use std::arch::x86_64::{
    __m512, _mm512_abs_ps, _mm512_castps_si512, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps,
    _mm512_min_ps, _mm512_permutex2var_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_sub_ps,
};

/// Intervals of the table.
const INTERVALS: usize = 32;
/// Their width.
const WIDTH: f32 = 23.0 / 128.0;
/// 1.5·2^23: a number to which this is added has its nearest whole number in the lowest bits.
const ROUNDER: f32 = 12_582_912.0;

/// `1 - Φ(t)` around `k·WIDTH` as a polynomial of the distance: the coefficient of each power, a value for each k. Fitted to the smallest
/// error, which is at most 1.8e-7 times 1/t. From the last interval on it is 0: so is what `t` multiplies it to, nearly.
#[rustfmt::skip]
static TAIL: [[f32; INTERVALS]; 4] = [
    [
        0.5, 0.428_699_02, 0.359_657_4, 0.294_922_02, 0.236_147_67, 0.184_476_36, 0.140_489_13, 0.104_229_9,
        7.528_805e-2, 5.291_893e-2, 3.617_772e-2, 2.404_551_8e-2, 1.553_202_8e-2, 9.747_199e-3, 5.941_028_7e-3, 3.516_091e-3,
        2.020_104_6e-3, 1.126_451_1e-3, 6.095_288_6e-4, 3.199_976_6e-4, 1.629_687_2e-4, 8.050_213e-5, 3.856_581_7e-5, 1.791_600_9e-5,
        8.070_107_5e-6, 3.524_330_4e-6, 1.492_095_1e-6, 6.123_58e-7, 2.435_974e-7, 9.392_26e-8, 3.509_715e-8, 0.0,
    ],
    [
        -0.398_942_53, -0.392_553_24, -0.373_994_44, -0.344_992_34, -0.308_128_2, -0.266_459_47, -0.223_104_6, -0.180_868_76,
        -0.141_969_89, -0.107_896_306, -7.939_524e-2, -5.656_659e-2, -3.902_141_4e-2, -2.606_294_9e-2, -1.685_472_2e-2, -1.055_351_2e-2,
        -6.398_082_7e-3, -3.755_606e-3, -2.134_457_2e-3, -1.174_551_8e-3, -6.257_978_4e-4, -3.228_294e-4, -1.612_460_8e-4, -7.797_982e-5,
        -3.651_34e-5, -1.655_385_5e-5, -7.266_459e-6, -3.088_326_4e-6, -1.270_867_2e-6, -5.063_534e-7, -1.953_366_5e-7, 0.0,
    ],
    [
        1.527_046_5e-5, 3.519_820_8e-2, 6.707_257e-2, 9.281_698_6e-2, 0.110_548_794, 0.119_522_15, 0.120_118_68, 0.113_640_93,
        0.101_976_63, 8.722_153e-2, 7.134_239_4e-2, 5.593_762_5e-2, 4.211_652_7e-2, 3.049_095_9e-2, 2.124_754_2e-2, 1.426_334_1e-2,
        9.229_875e-3, 5.760_590_5e-3, 3.469_199_9e-3, 2.016_719_7e-3, 1.132_018_4e-3, 6.137_207e-4, 3.214_389_4e-4, 1.626_763_3e-4,
        7.956_551e-5, 3.761_552e-5, 1.719_135_6e-5, 7.596_379_4e-6, 3.245_662e-6, 1.341_040_6e-6, 5.358_708e-7, 0.0,
    ],
    [
        6.627_413e-2, 6.320_213_5e-2, 5.419_768_4e-2, 4.074_363e-2, 2.481_955_3e-2, 8.594_636e-3, -5.978_015_3e-3, -1.747_432_4e-2,
        -2.515_951_7e-2, -2.898_374_8e-2, -2.944_463_9e-2, -2.737_502_8e-2, -2.372_126e-2, -1.935_876_7e-2, -1.497_665_6e-2, -1.103_210_5e-2,
        -7.761_734_5e-3, -5.227_687_3e-3, -3.376_488_8e-3, -2.094_178_5e-3, -1.248_597_5e-3, -7.162_599_4e-4, -3.956_126_2e-4, -2.105_139_1e-4,
        -1.079_746_7e-4, -5.340_479_4e-5, -2.548_099_1e-5, -1.173_192_5e-5, -5.213_874e-6, -2.237_158e-6, -9.269_834e-7, 0.0,
    ],
];

/// `x·Φ(x)` to within 3e-7 of the larger of 1 and |x|, as `max(x, 0) - t·(1 - Φ(t))` with t = |x|. What is subtracted is below 2e-7 from 5.5 on
/// and taken for 0. Half the instructions of a quotient of polynomials.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
pub(super) unsafe fn gelu(x: __m512) -> __m512 {
    /// A coefficient of each value's interval.
    macro_rules! coefficient {
        ($power:literal, $interval:expr) => {{
            let values = TAIL[$power].as_ptr();
            _mm512_permutex2var_ps(
                _mm512_loadu_ps(values),
                $interval,
                _mm512_loadu_ps(values.add(INTERVALS / 2)),
            )
        }};
    }
    // SAFETY: the caller's promise; a coefficient has 32 values.
    unsafe {
        // NaN stays: it is the second of the two.
        let t = _mm512_min_ps(_mm512_set1_ps(WIDTH * (INTERVALS - 1) as f32), _mm512_abs_ps(x));
        let rounder = _mm512_set1_ps(ROUNDER);
        let rounded = _mm512_fmadd_ps(t, _mm512_set1_ps(1.0 / WIDTH), rounder);
        let d = _mm512_fnmadd_ps(_mm512_sub_ps(rounded, rounder), _mm512_set1_ps(WIDTH), t);
        let interval = _mm512_castps_si512(rounded);
        let tail = _mm512_fmadd_ps(coefficient!(3, interval), d, coefficient!(2, interval));
        let tail = _mm512_fmadd_ps(tail, d, coefficient!(1, interval));
        let tail = _mm512_fmadd_ps(tail, d, coefficient!(0, interval));
        // max(x, 0), but NaN for -inf, as -inf·Φ(-inf) is.
        let above = _mm512_sub_ps(x, _mm512_min_ps(_mm512_setzero_ps(), x));
        _mm512_fnmadd_ps(t, tail, above)
    }
}
