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
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
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
    let mut aux = SOURCES * sources as u32;
    let mut flag = |on: bool, bit: u32| aux |= if on { bit } else { 0 };
    flag(brain, BRAIN);
    flag(pair, PAIR);
    flag(ftz, FTZ);
    let exec = match i.opcode.as_str() {
        "neg" if ftz => unary(pair, |a| flush(a) ^ 0x8000, |a: u16| flush(a) ^ 0x8000),
        "neg" => unary(pair, |a| a ^ 0x8000, |a| a ^ 0x8000),
        "abs" if ftz => unary(pair, |a| flush(a) & 0x7fff, |a| flush(a) & 0x7fff),
        "abs" => unary(pair, |a| a & 0x7fff, |a| a & 0x7fff),
        "min" | "max" => {
            flag(i.opcode == "max", MAX);
            flag(m.take("NaN"), NAN);
            let xor = m.take("xorsign");
            if m.take("abs") != xor || (xor && sources == 3) {
                return Err(".xorsign.abs is for two sources".to_owned());
            }
            flag(xor, XOR);
            extremes(aux)
        }
        op => {
            if !m.take("rn") && op == "fma" {
                return Err("fma needs .rn".to_owned());
            }
            let sat = !brain && m.take("sat");
            let relu = op == "fma" && m.take("relu");
            if sat && relu {
                return Err(".sat and .relu exclude each other".to_owned());
            }
            flag(sat, SAT);
            flag(relu, RELU);
            aux |= match op {
                "add" => ADD,
                "sub" => SUB,
                "mul" => MUL,
                _ => FMA,
            };
            arithmetic(op, aux)
        }
    };
    m.finish()?;
    let width = if pair { Ty::B32 } else { ty };
    Ok(Some(Inst { exec, aux, class: Class::Fp16, ..operands(d, i, width, sources)? }))
}

/// The fields of `Inst::aux`.
const OPERATION: u32 = 3;
const ADD: u32 = 0;
const SUB: u32 = 1;
const MUL: u32 = 2;
const FMA: u32 = 3;
const SOURCES: u32 = 1 << 2;
const BRAIN: u32 = 1 << 4;
const PAIR: u32 = 1 << 5;
const FTZ: u32 = 1 << 6;
const SAT: u32 = 1 << 7;
const RELU: u32 = 1 << 8;
const MAX: u32 = 1 << 9;
const NAN: u32 = 1 << 10;
const XOR: u32 = 1 << 11;

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
    ($map2:expr, $map3:expr, $op:ident, $widen:ident, $narrow:ident, $fma:ident) => {{
        match $op {
            "add" => $map2(|a: u16, b: u16| $narrow($widen(a) + $widen(b))),
            "sub" => $map2(|a: u16, b: u16| $narrow($widen(a) - $widen(b))),
            "mul" => $map2(|a: u16, b: u16| $narrow($widen(a) * $widen(b))),
            _ => $map3(|a: u16, b: u16, c: u16| $fma(a, b, c)),
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

/// The common forms, in code that becomes vector instructions; the others one lane after the other.
fn arithmetic(op: &str, aux: u32) -> Exec {
    macro_rules! shapes {
        ($widen:ident, $narrow:ident, $fma:ident) => {
            if aux & PAIR != 0 {
                arithmetic!(pair2, pair3, op, $widen, $narrow, $fma)
            } else {
                arithmetic!(map2, map3, op, $widen, $narrow, $fma)
            }
        };
    }
    if aux & (FTZ | SAT | RELU) != 0 {
        any_arithmetic
    } else if aux & BRAIN != 0 {
        shapes!(bf16_to_f32, f32_to_bf16, fma_bf16)
    } else {
        shapes!(f16_to_f32, f32_to_f16, fma_f16)
    }
}

/// The form of `aux`, for one half.
fn arithmetic_of(aux: u32, sources: [u16; 3]) -> u16 {
    let (brain, ftz) = (aux & BRAIN != 0, aux & FTZ != 0);
    let [a, b, c] = sources.map(|h| if ftz { flush(h) } else { h });
    let widen = |h| if brain { bf16_to_f32(h) } else { f16_to_f32(h) };
    let narrow = |x| if brain { f32_to_bf16(x) } else { f32_to_f16(x) };
    let result = match aux & OPERATION {
        ADD => narrow(widen(a) + widen(b)),
        SUB => narrow(widen(a) - widen(b)),
        MUL => narrow(widen(a) * widen(b)),
        _ if brain => fma_bf16(a, b, c),
        _ => fma_f16(a, b, c),
    };
    let result = if ftz { flush(result) } else { result };
    if aux & SAT != 0 {
        saturate(result)
    } else if aux & RELU != 0 {
        relu(result, if brain { 0x7f80 } else { 0x7c00 })
    } else {
        result
    }
}

fn any_arithmetic(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    halves(core, inst, mask, arithmetic_of)
}

/// `f(aux, sources)` on the low half of each lane or, for pairs, both.
fn halves(core: &mut Core<'_>, inst: &Inst, mask: u32, f: fn(u32, [u16; 3]) -> u16) -> Flow {
    let regs = &mut core.warp.regs;
    let count = ((inst.aux / SOURCES) & 3) as usize;
    let slots = [inst.a, inst.b, inst.c];
    let pair = inst.aux & PAIR != 0;
    let mut undef = [0; 2];
    for &slot in &slots[..count] {
        let u = regs.undef32[slot as usize];
        undef = [undef[0] | u[0], undef[1] | u[1]];
    }
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        if mask >> lane & 1 == 0 {
            continue;
        }
        let mut words = [0; 3];
        for (word, &slot) in words.iter_mut().zip(&slots[..count]) {
            *word = regs.get32(slot)[lane];
        }
        let low = f(inst.aux, words.map(|w| w as u16));
        let high = if pair { f(inst.aux, words.map(|w| (w >> 16) as u16)) } else { 0 };
        *value = u32::from(low) | u32::from(high) << 16;
    }
    regs.put32(inst.d, &out, mask, [undef[0], if pair { undef[1] } else { 0 }]);
    Flow::Next
}

/// An integer that orders halves, -0 below +0.
#[inline(always)]
fn order(h: u16) -> i16 {
    let bits = h as i16;
    bits ^ ((bits >> 15) & 0x7fff)
}

/// The smaller or larger; of a number and a NaN the number, or the NaN where it goes through.
#[inline(always)]
fn extreme(a: u16, b: u16, max: bool, nan: bool, infinity: u16) -> u16 {
    let (a_nan, b_nan) = (a & 0x7fff > infinity, b & 0x7fff > infinity);
    let chosen = if (order(a) > order(b)) == max { a } else { b };
    if nan {
        return if a_nan || b_nan { NAN16 } else { chosen };
    }
    let other = if b_nan { NAN16 } else { b };
    let chosen = if a_nan { other } else { chosen };
    if b_nan && !a_nan { a } else { chosen }
}

/// The form of `aux`, for one half.
fn extreme_of(aux: u32, sources: [u16; 3]) -> u16 {
    let [a, b, c] = sources.map(|h| if aux & FTZ != 0 { flush(h) } else { h });
    let infinity = if aux & BRAIN != 0 { 0x7f80 } else { 0x7c00 };
    let (max, nan) = (aux & MAX != 0, aux & NAN != 0);
    if aux & XOR != 0 {
        let magnitude = extreme(a & 0x7fff, b & 0x7fff, max, nan, infinity);
        return if magnitude > infinity { magnitude } else { magnitude | (a ^ b) & 0x8000 };
    }
    let first = extreme(a, b, max, nan, infinity);
    if (aux / SOURCES) & 3 == 3 { extreme(first, c, max, nan, infinity) } else { first }
}

fn any_extreme(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    halves(core, inst, mask, extreme_of)
}

/// The common forms, and one for all others.
fn extremes(aux: u32) -> Exec {
    macro_rules! shapes {
        ($max:literal, $nan:literal, $infinity:literal) => {
            if aux & PAIR != 0 {
                pair2(|a: u16, b: u16| extreme(a, b, $max, $nan, $infinity))
            } else {
                map2(|a: u16, b: u16| extreme(a, b, $max, $nan, $infinity))
            }
        };
    }
    if aux & (FTZ | XOR) != 0 || (aux / SOURCES) & 3 == 3 {
        return any_extreme;
    }
    match (aux & MAX != 0, aux & NAN != 0, aux & BRAIN != 0) {
        (false, false, false) => shapes!(false, false, 0x7c00),
        (false, false, true) => shapes!(false, false, 0x7f80),
        (false, true, false) => shapes!(false, true, 0x7c00),
        (false, true, true) => shapes!(false, true, 0x7f80),
        (true, false, false) => shapes!(true, false, 0x7c00),
        (true, false, true) => shapes!(true, false, 0x7f80),
        (true, true, false) => shapes!(true, true, 0x7c00),
        (true, true, true) => shapes!(true, true, 0x7f80),
    }
}
