//! Exponential, logarithm and hyperbolic tangent in f64, good to about eleven digits, without branches or calls: the loops
//! over lanes become vector instructions.

/// 1.5 * 2^52: added to a number below 2^51, it leaves the nearest integer in the last bits.
const MAGIC: f64 = 6_755_399_441_055_744.0;

/// 2^x; the result of large arguments is beyond the range of f32.
#[inline(always)]
pub(super) fn exp2(x: f64) -> f64 {
    // Written so that a NaN goes through.
    let x = if x > 300.0 { 300.0 } else { x };
    let x = if x < -300.0 { -300.0 } else { x };
    let shifted = x + MAGIC;
    let r = (x - (shifted - MAGIC)) * std::f64::consts::LN_2;
    // |r| <= 0.35: the series of e^r; the first term left out is below 1e-11.
    let mut sum = 1.0 / 362_880.0;
    for term in
        [1.0 / 40_320.0, 1.0 / 5_040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0]
    {
        sum = sum * r + term;
    }
    sum * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52)
}

/// The logarithm to base 2 of an f32 value.
#[inline(always)]
pub(super) fn log2(x: f64) -> f64 {
    const FRACTION: u64 = 0x000f_ffff_ffff_ffff;
    const TWO_52: f64 = 4_503_599_627_370_496.0;
    let bits = x.to_bits();
    // The exponent field as a number: laid into the last bits of 2^52.
    let exponent = f64::from_bits(0x4330_0000_0000_0000 | bits >> 52) - (TWO_52 + 1023.0);
    let m = f64::from_bits(bits & FRACTION | 0x3ff0_0000_0000_0000);
    let upper = m > std::f64::consts::SQRT_2;
    let (m, exponent) = if upper { (0.5 * m, exponent + 1.0) } else { (m, exponent) };
    // ln m = 2 artanh((m - 1) / (m + 1)), and the quotient is at most 0.172.
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    let mut sum = 1.0 / 17.0;
    for term in [1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        sum = sum * s2 + term;
    }
    let y = exponent + sum * s * (2.0 * std::f64::consts::LOG2_E);
    let y = if x == f64::INFINITY { x } else { y };
    let y = if x == 0.0 { f64::NEG_INFINITY } else { y };
    if x < 0.0 || x.is_nan() { f64::NAN } else { y }
}

/// The hyperbolic tangent.
#[inline(always)]
pub(super) fn tanh(x: f64) -> f64 {
    let a = x.abs();
    let large = 1.0 - 2.0 / (exp2(a * (2.0 * std::f64::consts::LOG2_E)) + 1.0);
    // Below 0.3 the difference above loses digits: the series, whose terms shrink by 27 each.
    let x2 = a * a;
    let mut sum = -929_569.0 / 638_512_875.0;
    for term in [
        21_844.0 / 6_081_075.0,
        -1_382.0 / 155_925.0,
        62.0 / 2_835.0,
        -17.0 / 315.0,
        2.0 / 15.0,
        -1.0 / 3.0,
        1.0,
    ] {
        sum = sum * x2 + term;
    }
    let y = if a < 0.3 { sum * a } else { large };
    y.copysign(x)
}
