//! Arithmetic on f16, bf16 and pairs of them, rounded once.
//!
//! f16 and bf16 have at most 11 significant bits. A sum, difference or product of two such numbers that is first rounded
//! to the 24 bits of an f32 and then to 11 or 8 is what one rounding gives, because 24 >= 2 * 11 + 2; where results are
//! subnormal, sums are multiples of the least subnormal and so exact, f16 products are exact in f32 (22 bits, at least
//! 2^-48), and bf16 products (16 bits) are exact in f32 from 2^-134 up, while smaller ones round to zero either way.
//!
//! A fused product and sum in f64: the product is exact. For f16 the f64 sum is inexact only when product and addend are
//! more than 30 binary places apart: then either the product is beyond the range, or the addend decides alone. For bf16
//! the product may be as long as half way between two numbers with an addend far below it, so the sum is rounded to odd.

use super::float::operands;
use super::half_bits::{
    NAN16, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, f64_to_bf16, f64_to_f16, sum_to_odd,
};
use super::lanes::{map1, map2, map3, pair1, pair2, pair3};
use crate::lower::{Decoder, Mods};
use crate::machine::inst::{Class, Exec, Inst};
use crate::ptx::ast::{Instruction, Ty};

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let mut m = Mods::new(&i.modifiers);
    let Some(ty @ (Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2)) = m.peek_ty() else { return Ok(None) };
    let sources = match i.opcode.as_str() {
        "add" | "sub" | "mul" => 2,
        "min" | "max" => i.operands.len().saturating_sub(1).clamp(2, 3),
        "fma" => 3,
        "neg" | "abs" => 1,
        _ => return Ok(None),
    };
    m.ty()?;
    let brain = matches!(ty, Ty::BF16 | Ty::BF16x2);
    let pair = matches!(ty, Ty::F16x2 | Ty::BF16x2);
    let ftz = !brain && m.take("ftz");
    let exec = match i.opcode.as_str() {
        "neg" if ftz => unary(pair, |a| flush(a) ^ 0x8000, |a: u16| flush(a) ^ 0x8000),
        "neg" => unary(pair, |a| a ^ 0x8000, |a| a ^ 0x8000),
        "abs" if ftz => unary(pair, |a| flush(a) & 0x7fff, |a| flush(a) & 0x7fff),
        "abs" => unary(pair, |a| a & 0x7fff, |a| a & 0x7fff),
        "min" | "max" => {
            let nan = m.take("NaN");
            let xor = m.take("xorsign");
            if m.take("abs") != xor || (xor && sources == 3) {
                return Err(".xorsign.abs is for two sources".to_owned());
            }
            extremes(brain, pair, i.opcode == "max", nan, xor, ftz, sources == 3)
        }
        op => {
            let rounded = m.take("rn");
            if op == "fma" && !rounded {
                return Err("fma needs .rn".to_owned());
            }
            let sat = !brain && m.take("sat");
            let relu = op == "fma" && m.take("relu");
            if sat && relu {
                return Err(".sat and .relu exclude each other".to_owned());
            }
            // .oob is a form of .relu that this emulator does not know.
            let end = if sat {
                End::Sat
            } else if relu {
                End::Relu
            } else {
                End::Plain
            };
            arithmetic(op, brain, pair, ftz, end)
        }
    };
    m.finish()?;
    let width = if pair { Ty::B32 } else { ty };
    Ok(Some(Inst { exec, class: Class::Fp16, ..operands(d, i, width, sources)? }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Plain,
    Sat,
    Relu,
}

/// One function for both shapes: the low half alone, or both halves.
fn unary<F, G>(pair: bool, one: F, both: G) -> Exec
where
    F: Fn(u16) -> u16 + Copy + 'static,
    G: Fn(u16) -> u16 + Copy + 'static,
{
    if pair { pair1(both) } else { map1(one) }
}

/// A subnormal f16 becomes zero with its sign.
#[inline(always)]
fn flush(h: u16) -> u16 {
    if h & 0x7c00 == 0 { h & 0x8000 } else { h }
}

/// A subnormal bf16 becomes zero with its sign.
#[inline(always)]
pub(super) fn flush_bf16(h: u16) -> u16 {
    if h & 0x7f80 == 0 { h & 0x8000 } else { h }
}

/// Into [0, 1]; NaN and -0 give +0.
#[inline(always)]
fn saturate(h: u16) -> u16 {
    let negative = (h as i16) < 0;
    let nan = h & 0x7fff > 0x7c00;
    if negative || nan { 0 } else { h.min(0x3c00) }
}

/// Negative results become +0, NaN stays.
#[inline(always)]
fn relu(h: u16, infinity: u16) -> u16 {
    let nan = h & 0x7fff > infinity;
    if (h as i16) < 0 && !nan { 0 } else { h }
}

macro_rules! arithmetic {
    ($pair:ident, $map2:expr, $map3:expr, $op:ident, $in:expr, $widen:ident, $narrow:ident, $fma:ident, $out:expr) => {{
        match $op {
            "add" => $map2(|a: u16, b: u16| $out($narrow($widen($in(a)) + $widen($in(b))))),
            "sub" => $map2(|a: u16, b: u16| $out($narrow($widen($in(a)) - $widen($in(b))))),
            "mul" => $map2(|a: u16, b: u16| $out($narrow($widen($in(a)) * $widen($in(b))))),
            _ => $map3(|a: u16, b: u16, c: u16| $out($fma($in(a), $in(b), $in(c)))),
        }
    }};
}

#[inline(always)]
fn fma_f16(a: u16, b: u16, c: u16) -> u16 {
    let [a, b, c] = [a, b, c].map(|h| f64::from(f16_to_f32(h)));
    f64_to_f16(a * b + c)
}

#[inline(always)]
fn fma_bf16(a: u16, b: u16, c: u16) -> u16 {
    let [a, b, c] = [a, b, c].map(|h| f64::from(bf16_to_f32(h)));
    f64_to_bf16(sum_to_odd(a * b, c))
}

fn arithmetic(op: &str, brain: bool, pair: bool, ftz: bool, end: End) -> Exec {
    macro_rules! shapes {
        ($in:expr, $widen:ident, $narrow:ident, $fma:ident, $out:expr) => {
            if pair {
                arithmetic!(pair, pair2, pair3, op, $in, $widen, $narrow, $fma, $out)
            } else {
                arithmetic!(pair, map2, map3, op, $in, $widen, $narrow, $fma, $out)
            }
        };
    }
    match (brain, ftz, end) {
        (true, _, End::Relu) => {
            shapes!(|h: u16| h, bf16_to_f32, f32_to_bf16, fma_bf16, |h: u16| relu(h, 0x7f80))
        }
        (true, ..) => shapes!(|h: u16| h, bf16_to_f32, f32_to_bf16, fma_bf16, |h: u16| h),
        (false, false, End::Plain) => shapes!(|h: u16| h, f16_to_f32, f32_to_f16, fma_f16, |h: u16| h),
        (false, false, End::Sat) => shapes!(|h: u16| h, f16_to_f32, f32_to_f16, fma_f16, saturate),
        (false, false, End::Relu) => {
            shapes!(|h: u16| h, f16_to_f32, f32_to_f16, fma_f16, |h: u16| relu(h, 0x7c00))
        }
        (false, true, End::Plain) => shapes!(flush, f16_to_f32, f32_to_f16, fma_f16, flush),
        (false, true, End::Sat) => {
            shapes!(flush, f16_to_f32, f32_to_f16, fma_f16, |h: u16| saturate(flush(h)))
        }
        (false, true, End::Relu) => {
            shapes!(flush, f16_to_f32, f32_to_f16, fma_f16, |h: u16| relu(flush(h), 0x7c00))
        }
    }
}

/// An integer that orders halves, -0 below +0.
#[inline(always)]
fn order(h: u16) -> i16 {
    let bits = h as i16;
    bits ^ ((bits >> 15) & 0x7fff)
}

/// The smaller or larger; of a number and a NaN the number, or the NaN where it goes through.
#[inline(always)]
fn extreme<const MAX: bool, const NAN: bool, const INFINITY: u16>(a: u16, b: u16) -> u16 {
    let (a_nan, b_nan) = (a & 0x7fff > INFINITY, b & 0x7fff > INFINITY);
    let chosen = if (order(a) > order(b)) == MAX { a } else { b };
    if NAN {
        return if a_nan || b_nan { NAN16 } else { chosen };
    }
    let other = if b_nan { NAN16 } else { b };
    let chosen = if a_nan { other } else { chosen };
    if b_nan && !a_nan { a } else { chosen }
}

#[inline(always)]
fn xorsign<const MAX: bool, const NAN: bool, const INFINITY: u16>(a: u16, b: u16) -> u16 {
    let magnitude = extreme::<MAX, NAN, INFINITY>(a & 0x7fff, b & 0x7fff);
    if magnitude > INFINITY { magnitude } else { magnitude | (a ^ b) & 0x8000 }
}

fn extremes(brain: bool, pair: bool, max: bool, nan: bool, xor: bool, ftz: bool, three: bool) -> Exec {
    macro_rules! shapes {
        ($max:literal, $nan:literal, $infinity:literal, $in:expr) => {
            match (three, xor, pair) {
                (false, false, true) => {
                    pair2(|a: u16, b: u16| extreme::<$max, $nan, $infinity>($in(a), $in(b)))
                }
                (false, false, false) => {
                    map2(|a: u16, b: u16| extreme::<$max, $nan, $infinity>($in(a), $in(b)))
                }
                (false, true, true) => {
                    pair2(|a: u16, b: u16| xorsign::<$max, $nan, $infinity>($in(a), $in(b)))
                }
                (false, true, false) => {
                    map2(|a: u16, b: u16| xorsign::<$max, $nan, $infinity>($in(a), $in(b)))
                }
                (true, _, true) => pair3(|a: u16, b: u16, c: u16| {
                    let first = extreme::<$max, $nan, $infinity>($in(a), $in(b));
                    extreme::<$max, $nan, $infinity>(first, $in(c))
                }),
                (true, _, false) => map3(|a: u16, b: u16, c: u16| {
                    let first = extreme::<$max, $nan, $infinity>($in(a), $in(b));
                    extreme::<$max, $nan, $infinity>(first, $in(c))
                }),
            }
        };
    }
    macro_rules! formats {
        ($max:literal, $nan:literal) => {
            match (brain, ftz) {
                (true, _) => shapes!($max, $nan, 0x7f80, |h: u16| h),
                (false, false) => shapes!($max, $nan, 0x7c00, |h: u16| h),
                (false, true) => shapes!($max, $nan, 0x7c00, flush),
            }
        };
    }
    match (max, nan) {
        (false, false) => formats!(false, false),
        (false, true) => formats!(false, true),
        (true, false) => formats!(true, false),
        (true, true) => formats!(true, true),
    }
}
