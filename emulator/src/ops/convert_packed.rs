//! cvt with two results in one register: f16x2 and bf16x2 from two f32, and cvt.pack.

use super::convert::finish;
use super::exact::{BF16, F16, F32, Rounding, Value};
use super::half_bits::{f32_to_bf16, f32_to_f16};
use crate::both;
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::ptx::ast::{Instruction, Ty};

/// `cvt.rn.f16x2.f32 d, a, b`: `a` goes to the upper half, `b` to the lower.
pub(super) fn decode_pair(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let to = m.ty()?;
    let from = m.ty()?;
    if from != Ty::F32 {
        return Err(format!("cvt from {from:?} to {to:?} does not exist"));
    }
    let rounding = m.take_any(&["rn", "rz"]).and_then(Rounding::parse);
    let rounding = rounding.ok_or("cvt to a pair needs .rn or .rz")?;
    let (relu, finite) = (m.take("relu"), m.take("satfinite"));
    m.finish()?;
    let [target, upper, lower] = i.operands.as_slice() else {
        return Err("cvt to a pair needs a destination and two sources".to_owned());
    };
    let exec = match (to, rounding, relu || finite) {
        (Ty::F16x2, Rounding::Nearest, false) => both!(pair_f16),
        (_, Rounding::Nearest, false) => both!(pair_bf16),
        _ => pair_any as Exec,
    };
    let aux =
        u32::from(to == Ty::BF16x2) | u32::from(relu) << 1 | u32::from(finite) << 2 | rounding.code() << 8;
    let (a, b) = (d.src32(upper, Ty::F32)?, d.src32(lower, Ty::F32)?);
    Ok(Inst { d: d.dst32(target)?, a, b, aux, ..Inst::new(exec, Class::Cvt) })
}

/// Each half is undefined where its own source is.
#[inline(always)]
fn pair(core: &mut Core<'_>, inst: &Inst, mask: u32, narrow: impl Fn(f32) -> u16) -> Flow {
    let regs = &mut core.warp.regs;
    let (upper, lower) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        let halves = [lower[lane], upper[lane]].map(|bits| u32::from(narrow(f32::from_bits(bits))));
        out[lane] = halves[0] | halves[1] << 16;
    }
    let undef = [regs.any_undef32(inst.b), regs.any_undef32(inst.a)];
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn pair_f16(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    pair(core, inst, mask, f32_to_f16)
}

#[inline(always)]
fn pair_bf16(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    pair(core, inst, mask, f32_to_bf16)
}

fn pair_any(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let format = if inst.aux & 1 == 1 { BF16 } else { F16 };
    let (relu, finite) = (inst.aux & 2 != 0, inst.aux & 4 != 0);
    let rounding = Rounding::from_code(inst.aux >> 8);
    pair(core, inst, mask, |x| {
        let bits = Value::of(u64::from(x.to_bits()), F32).round(format, rounding, finite);
        finish(bits, format, false, relu) as u16
    })
}

/// `cvt.pack.sat.u8.s32.b32 d, a, b, c`: `a` and `b` saturated, `b` lowest, then `a`, then the low bits of `c`.
pub(super) fn decode_pack(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    if !m.take("sat") {
        return Err("cvt.pack needs .sat".to_owned());
    }
    let word = m.take_any(&["u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"]);
    let word = word.ok_or("cvt.pack to this type does not exist")?;
    let bits: u32 = word[1..].parse().map_err(|_| "cvt.pack to this type does not exist")?;
    if !m.take("s32") {
        return Err("cvt.pack needs sources of type .s32".to_owned());
    }
    let with_c = m.take("b32");
    m.finish()?;
    let expected = if with_c { 4 } else { 3 };
    if i.operands.len() != expected || (bits < 16) != with_c {
        return Err(
            "cvt.pack has .b32 and a fourth operand for types below 16 bits, and only for them".to_owned()
        );
    }
    let a = d.src32(&i.operands[1], Ty::S32)?;
    let b = d.src32(&i.operands[2], Ty::S32)?;
    let c = if with_c { d.src32(&i.operands[3], Ty::B32)? } else { d.constant32(0) };
    let signed = word.starts_with('s');
    let aux = bits | u32::from(signed) << 8;
    Ok(Inst { d: d.dst32(&i.operands[0])?, a, b, c, aux, ..Inst::new(both!(pack), Class::Cvt) })
}

#[inline(always)]
fn pack(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let bits = inst.aux & 0xff;
    let signed = inst.aux >> 8 & 1;
    let high = (1 << (bits - signed)) - 1;
    let low = if signed == 1 { -high - 1 } else { 0 };
    let field = u32::MAX >> (32 - bits);
    let regs = &mut core.warp.regs;
    let (a, b, c) = (*regs.get32(inst.a), *regs.get32(inst.b), *regs.get32(inst.c));
    let mut out = [0; 32];
    for lane in 0..32 {
        let [a, b] = [a[lane], b[lane]].map(|v| (v as i32).clamp(low, high) as u32 & field);
        let above = u64::from(c[lane]) << (2 * bits);
        out[lane] = b | a << bits | above as u32;
    }
    let [ua, ub] = [regs.any_undef32(inst.a), regs.any_undef32(inst.b)];
    let uc = regs.undef32[inst.c as usize];
    let undef = match bits {
        16 => [ub, ua],
        8 => [ua | ub, uc[0]],
        _ => [ua | ub | uc[0], uc[0] | uc[1]],
    };
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}
