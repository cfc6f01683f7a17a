//! Arithmetic on f32 and f64, correctly rounded.

use super::exact::{F32, F64, Format, Rounding, Value};
use super::lanes::{map1, map2, map3};
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
    let Some(ty @ (Ty::F32 | Ty::F64)) = m.peek_ty() else { return Ok(None) };
    if m.has("approx") || m.has("full") {
        return Ok(None);
    }
    let op = match i.opcode.as_str() {
        "add" => Op::Add,
        "sub" => Op::Sub,
        "mul" => Op::Mul,
        "fma" | "mad" => Op::Fma,
        "div" => Op::Div,
        "rcp" => Op::Rcp,
        "sqrt" => Op::Sqrt,
        "neg" | "abs" | "copysign" => return signs(d, i, m).map(Some),
        "min" | "max" => return extremes(d, i, m).map(Some),
        _ => return Ok(None),
    };
    m.take(if ty == Ty::F32 { "f32" } else { "f64" });
    let rounding = match m.take_map(|w| if w == "rna" { None } else { Rounding::parse(w) }) {
        Some(rounding) => rounding,
        None if matches!(op, Op::Add | Op::Sub | Op::Mul) => Rounding::Nearest,
        None => return Err(format!("{} needs a rounding mode, .approx or .full", i.opcode)),
    };
    let ftz = ty == Ty::F32 && m.take("ftz");
    let sat = ty == Ty::F32 && matches!(op, Op::Add | Op::Sub | Op::Mul | Op::Fma) && m.take("sat");
    m.finish()?;
    let exec = match (ty, rounding, sat) {
        (Ty::F32, Rounding::Nearest, false) => nearest32(op, ftz),
        (Ty::F64, Rounding::Nearest, _) => nearest64(op),
        (Ty::F32, ..) => any32 as Exec,
        _ => any64 as Exec,
    };
    let class = match (op, ty) {
        (_, Ty::F64) => Class::Fp64,
        _ => Class::Fp32,
    };
    let inst = operands(d, i, ty, op.sources())?;
    let aux = op as u32 | rounding.code() << 8 | u32::from(ftz) << 16 | u32::from(sat) << 17;
    Ok(Some(Inst { aux, ..Inst { exec, class, ..inst } }))
}

/// An instruction with a destination and so many sources of one type, in `d`, `a`, `b`, `c`.
pub(super) fn operands(d: &mut Decoder<'_>, i: &Instruction, ty: Ty, sources: usize) -> Result<Inst, String> {
    if i.operands.len() != sources + 1 {
        return Err(format!("{} needs {} operands", i.opcode, sources + 1));
    }
    let mut inst = Inst::new(any32, Class::Fp32);
    inst.a = d.src(&i.operands[1], ty)?;
    if sources > 1 {
        inst.b = d.src(&i.operands[2], ty)?;
    }
    if sources > 2 {
        inst.c = d.src(&i.operands[3], ty)?;
    }
    inst.d = d.dst(&i.operands[0], ty)?;
    Ok(inst)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Op {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Rcp,
    Sqrt,
}

impl Op {
    const ALL: [Self; 7] = [Self::Add, Self::Sub, Self::Mul, Self::Fma, Self::Div, Self::Rcp, Self::Sqrt];

    const fn sources(self) -> usize {
        match self {
            Self::Rcp | Self::Sqrt => 1,
            Self::Fma => 3,
            _ => 2,
        }
    }
}

/// A NaN result has one bit pattern. Asked of the bits: the compiler takes the payload of a NaN that it knows to come from an
/// operation for arbitrary, and would leave a question about the number out.
#[inline(always)]
pub(super) fn canonical(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff_ffff } else { bits })
}

#[inline(always)]
fn canonical64(x: f64) -> f64 {
    let bits = x.to_bits();
    f64::from_bits(if bits & i64::MAX as u64 > 0x7ff0 << 48 { F64.nan } else { bits })
}

/// `.ftz`: a subnormal number becomes zero with its sign.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

/// The processor rounds to nearest even, as `.rn` wants. A flushed result is one that is subnormal after rounding.
fn nearest32(op: Op, ftz: bool) -> Exec {
    match (op, ftz) {
        (Op::Add, false) => map2(|a: f32, b: f32| canonical(a + b)),
        (Op::Sub, false) => map2(|a: f32, b: f32| canonical(a - b)),
        (Op::Mul, false) => map2(|a: f32, b: f32| canonical(a * b)),
        (Op::Fma, false) => map3(|a: f32, b: f32, c: f32| canonical(a.mul_add(b, c))),
        (Op::Div, false) => map2(|a: f32, b: f32| canonical(a / b)),
        (Op::Rcp, false) => map1(|a: f32| canonical(1.0 / a)),
        (Op::Sqrt, false) => map1(|a: f32| canonical(a.sqrt())),
        (Op::Add, true) => map2(|a: f32, b: f32| flush(canonical(flush(a) + flush(b)))),
        (Op::Sub, true) => map2(|a: f32, b: f32| flush(canonical(flush(a) - flush(b)))),
        (Op::Mul, true) => map2(|a: f32, b: f32| flush(canonical(flush(a) * flush(b)))),
        (Op::Fma, true) => {
            map3(|a: f32, b: f32, c: f32| flush(canonical(flush(a).mul_add(flush(b), flush(c)))))
        }
        (Op::Div, true) => map2(|a: f32, b: f32| flush(canonical(flush(a) / flush(b)))),
        (Op::Rcp, true) => map1(|a: f32| flush(canonical(1.0 / flush(a)))),
        (Op::Sqrt, true) => map1(|a: f32| flush(canonical(flush(a).sqrt()))),
    }
}

fn nearest64(op: Op) -> Exec {
    match op {
        Op::Add => map2(|a: f64, b: f64| canonical64(a + b)),
        Op::Sub => map2(|a: f64, b: f64| canonical64(a - b)),
        Op::Mul => map2(|a: f64, b: f64| canonical64(a * b)),
        Op::Fma => map3(|a: f64, b: f64, c: f64| canonical64(a.mul_add(b, c))),
        Op::Div => map2(|a: f64, b: f64| canonical64(a / b)),
        Op::Rcp => map1(|a: f64| canonical64(1.0 / a)),
        Op::Sqrt => map1(|a: f64| canonical64(a.sqrt())),
    }
}

/// The operation of `aux` on one lane, exactly, rounded once.
fn exactly(aux: u32, format: Format, sources: [u64; 3]) -> u64 {
    let op = Op::ALL[(aux & 7) as usize % 7];
    let rounding = Rounding::from_code(aux >> 8 & 0xff);
    let (ftz, sat) = (aux >> 16 & 1 == 1, aux >> 17 & 1 == 1);
    let [a, b, c] = sources.map(|bits| Value::of(if ftz { format.flush(bits) } else { bits }, format));
    let value = match op {
        Op::Add => a.plus(b, rounding),
        Op::Sub => a.plus(b.negated(), rounding),
        Op::Mul => a.times(b),
        Op::Fma => a.times(b).plus(c, rounding),
        Op::Div => a.over(b),
        Op::Rcp => Value::of(F64_ONE, F64).over(a),
        Op::Sqrt => a.root(),
    };
    let bits = value.round(format, rounding, false);
    let bits = if ftz { format.flush(bits) } else { bits };
    if sat { u64::from(saturate(f32::from_bits(bits as u32)).to_bits()) } else { bits }
}

const F64_ONE: u64 = 0x3ff0_0000_0000_0000;

/// `.sat`: into [0, 1], NaN and -0 give +0.
#[inline(always)]
pub(super) fn saturate(x: f32) -> f32 {
    let x = if x > 0.0 { x } else { 0.0 };
    if x > 1.0 { 1.0 } else { x }
}

fn any32(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let sources = Op::ALL[(inst.aux & 7) as usize % 7].sources();
    let slots =
        [inst.a, if sources > 1 { inst.b } else { inst.a }, if sources > 2 { inst.c } else { inst.a }];
    let undef = slots.iter().fold(0, |u, &slot| u | regs.any_undef32(slot));
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        if mask >> lane & 1 == 1 {
            let sources = slots.map(|slot| u64::from(regs.get32(slot)[lane]));
            *value = exactly(inst.aux, F32, sources) as u32;
        }
    }
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

fn any64(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let sources = Op::ALL[(inst.aux & 7) as usize % 7].sources();
    let slots =
        [inst.a, if sources > 1 { inst.b } else { inst.a }, if sources > 2 { inst.c } else { inst.a }];
    let undef = slots.iter().fold(0, |u, &slot| u | regs.any_undef64(slot));
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        if mask >> lane & 1 == 1 {
            *value = exactly(inst.aux, F64, slots.map(|slot| regs.get64(slot)[lane]));
        }
    }
    regs.put64(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

/// neg, abs, copysign: bits only.
fn signs(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    const SIGN: u64 = 1 << 63;
    let ty = m.ty()?;
    let ftz = ty == Ty::F32 && i.opcode != "copysign" && m.take("ftz");
    m.finish()?;
    let exec = match (i.opcode.as_str(), ty, ftz) {
        ("neg", Ty::F32, false) => map1(|a: u32| a ^ 0x8000_0000),
        ("neg", Ty::F32, true) => map1(|a: f32| -flush(a)),
        ("neg", ..) => map1(|a: u64| a ^ SIGN),
        ("abs", Ty::F32, false) => map1(|a: u32| a & 0x7fff_ffff),
        ("abs", Ty::F32, true) => map1(|a: f32| flush(a).abs()),
        ("abs", ..) => map1(|a: u64| a & !SIGN),
        // copysign d, a, b: the sign of a, the magnitude of b.
        (_, Ty::F32, _) => map2(|a: u32, b: u32| a & 0x8000_0000 | b & 0x7fff_ffff),
        _ => map2(|a: u64, b: u64| a & SIGN | b & !SIGN),
    };
    let inst = operands(d, i, ty, if i.opcode == "copysign" { 2 } else { 1 })?;
    Ok(Inst { exec, class: if ty == Ty::F32 { Class::Fp32 } else { Class::Fp64 }, ..inst })
}

/// A signed integer that orders floats as the manual's min and max do, -0 below +0.
#[inline(always)]
fn order(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) & 0x7fff_ffff)
}

#[inline(always)]
fn order64(x: f64) -> i64 {
    let bits = x.to_bits() as i64;
    bits ^ ((bits >> 63) & i64::MAX)
}

macro_rules! extreme {
    ($name:ident, $ty:ty, $order:ident, $nan:expr) => {
        /// The smaller or larger one; of a number and a NaN the number, or the NaN where it goes through.
        #[inline(always)]
        fn $name<const MAX: bool, const NAN: bool>(a: $ty, b: $ty) -> $ty {
            let take_a = ($order(a) > $order(b)) == MAX;
            let chosen = if take_a { a } else { b };
            let nan = <$ty>::from_bits($nan);
            if NAN {
                if a.is_nan() || b.is_nan() { nan } else { chosen }
            } else {
                let other = if b.is_nan() { nan } else { b };
                let chosen = if a.is_nan() { other } else { chosen };
                if b.is_nan() && !a.is_nan() { a } else { chosen }
            }
        }
    };
}

extreme!(extreme32, f32, order, 0x7fff_ffff);
extreme!(extreme64, f64, order64, F64.nan);

fn extremes(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    let max = i.opcode == "max";
    if ty == Ty::F64 {
        m.finish()?;
        let exec = if max { map2(extreme64::<true, false>) } else { map2(extreme64::<false, false>) };
        return Ok(Inst { exec, class: Class::Fp64, ..operands(d, i, ty, 2)? });
    }
    let (ftz, nan) = (m.take("ftz"), m.take("NaN"));
    let xor = m.take("xorsign");
    if m.take("abs") != xor {
        return Err(".xorsign and .abs go together".to_owned());
    }
    m.finish()?;
    let three = i.operands.len() == 4;
    if three && xor {
        return Err("three sources and .xorsign do not go together".to_owned());
    }
    macro_rules! choose {
        ($max:literal, $nan:literal) => {
            if ftz {
                map2(|a: f32, b: f32| extreme32::<$max, $nan>(flush(a), flush(b)))
            } else {
                map2(|a: f32, b: f32| extreme32::<$max, $nan>(a, b))
            }
        };
    }
    let exec = match (max, nan) {
        _ if three || xor => any_extreme as Exec,
        (false, false) => choose!(false, false),
        (false, true) => choose!(false, true),
        (true, false) => choose!(true, false),
        (true, true) => choose!(true, true),
    };
    let flags = [max, nan, ftz, xor, three];
    let aux = flags.iter().enumerate().fold(0, |all, (bit, &flag)| all | u32::from(flag) << bit);
    Ok(Inst { exec, aux, class: Class::Fp32, ..operands(d, i, ty, if three { 3 } else { 2 })? })
}

/// Three sources, or `.xorsign.abs`: compares magnitudes, the sign is the exclusive or of both signs.
fn any_extreme(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let [max, nan, ftz, xor, three] = [0, 1, 2, 3, 4].map(|bit| inst.aux >> bit & 1 == 1);
    let pick: fn(f32, f32) -> f32 = match (max, nan) {
        (false, false) => extreme32::<false, false>,
        (false, true) => extreme32::<false, true>,
        (true, false) => extreme32::<true, false>,
        (true, true) => extreme32::<true, true>,
    };
    let regs = &mut core.warp.regs;
    let slots = [inst.a, inst.b, if three { inst.c } else { inst.b }];
    let undef = slots.iter().fold(0, |u, &slot| u | regs.any_undef32(slot));
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        let [a, b, c] = slots.map(|slot| f32::from_bits(regs.get32(slot)[lane]));
        let [a, b, c] = [a, b, c].map(|x| if ftz { flush(x) } else { x });
        let result = if xor {
            let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
            let magnitude = pick(a.abs(), b.abs());
            if magnitude.is_nan() { magnitude } else { f32::from_bits(magnitude.to_bits() | sign) }
        } else if three {
            pick(pick(a, b), c)
        } else {
            pick(a, b)
        };
        *value = result.to_bits();
    }
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}
