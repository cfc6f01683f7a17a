//! f16 and bf16 as bits, in branch-free code that becomes vector instructions.

/// The NaN of both 16-bit formats.
pub(crate) const NAN16: u16 = 0x7fff;

/// Exact.
#[inline(always)]
pub(crate) fn f16_to_f32(h: u16) -> f32 {
    let h = u32::from(h);
    let magnitude = h & 0x7fff;
    let normal = (magnitude << 13) + (112 << 23);
    // A subnormal is so many units of 2^-24: put them below a one of 2^-14 and take that away again.
    let subnormal = (f32::from_bits((113 << 23) + (magnitude << 13)) - f32::from_bits(113 << 23)).to_bits();
    let special = normal + (112 << 23);
    let bits = if magnitude < 0x0400 { subnormal } else { normal };
    let bits = if magnitude >= 0x7c00 { special } else { bits };
    f32::from_bits(bits | (h & 0x8000) << 16)
}

/// Rounded to nearest even; any NaN becomes [`NAN16`].
#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // Adding just under half a unit, and the last bit, carries exactly when the value must go up; it carries into the
    // exponent and, past the largest number, into infinity as it should.
    let normal = (magnitude.wrapping_sub(112 << 23).wrapping_add(0x0fff + (magnitude >> 13 & 1))) >> 13;
    // Next to 0.5 the unit of an f32 is 2^-24, the unit of an f16 subnormal: the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let half = if magnitude < 113 << 23 { subnormal } else { normal };
    let half = if magnitude >= 143 << 23 { 0x7c00 } else { half };
    if magnitude > 0x7f80_0000 { NAN16 } else { (half | bits >> 16 & 0x8000) as u16 }
}

/// Exact.
#[inline(always)]
pub(crate) fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// Rounded to nearest even; any NaN becomes [`NAN16`].
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { NAN16 } else { rounded as u16 }
}

/// Rounded once to f16: the f32 in between keeps a trace of what it drops in its last bit ("round to odd"), and no f16 lies
/// near enough to notice. For values that are zero, at least 2^-126 or not finite.
#[inline(always)]
pub(crate) fn f64_to_f16(x: f64) -> u16 {
    const DROPPED: u64 = (1 << 29) - 1;
    let bits = x.to_bits();
    let dropped = bits & DROPPED;
    let odd = (bits & !DROPPED) | u64::from(dropped != 0) << 29;
    let special = bits & 0x7ff0_0000_0000_0000 == 0x7ff0_0000_0000_0000;
    f32_to_f16(f64::from_bits(if special { bits } else { odd }) as f32)
}

/// Rounded once to bf16, subnormal results too.
#[inline(always)]
pub(crate) fn f64_to_bf16(x: f64) -> u16 {
    const LEAST_NORMAL: f64 = f32::MIN_POSITIVE as f64;
    // 2^-133 is the unit of bf16 subnormals; next to this number it is the unit of f64.
    const MAGIC: f64 = f64::from_bits(((1023 - 133 + 52) << 52) | 1 << 51);
    let bits = x.to_bits();
    let rounded = f64::from_bits(bits.wrapping_add((1 << 44) - 1 + (bits >> 45 & 1)) & !((1 << 45) - 1));
    let value = if x.abs() < LEAST_NORMAL { (x + MAGIC) - MAGIC } else { rounded };
    // What is left has 8 significant bits: the rest is exact, but for values beyond the range, which become infinite.
    let half = ((value as f32).to_bits() >> 16) as u16 & 0x7fff | (bits >> 48 & 0x8000) as u16;
    if x.is_nan() { NAN16 } else { half }
}

/// Sum of two f64, or the nearest such below in magnitude with its last bit set where it is not exact: rounding it again to
/// a shorter format is as good as rounding the exact sum. For sums that do not overflow.
#[inline(always)]
pub(crate) fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let part = sum - a;
    let error = (a - (sum - part)) + (b - part);
    let bits = sum.to_bits();
    let even = bits & 1 == 0;
    // An even neighbour that is not the exact sum: step to the odd one on the side of the error.
    let outward = (error > 0.0) == (sum > 0.0);
    let stepped = if outward { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    let inexact = error != 0.0 && !error.is_nan();
    f64::from_bits(if inexact && even { stepped } else { bits })
}
