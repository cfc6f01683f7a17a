//! cvt between integers and floats of every width.

use super::exact::{BF16, F16, F32, F64, Format, Number, Rounding, TF32, Value};
use super::float::{canonical, flush, saturate};
use super::half_bits::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::lanes::map1;
use super::{convert_packed, convert_small};
use crate::both;
use crate::lower::{AnySlot, Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::ptx::ast::{Instruction, Operand, Ty};

/// `$end` of an f32 that is rounded to an integer as `$plan` says.
macro_rules! whole_f32 {
    ($plan:expr, $end:expr) => {
        match ($plan.rounding, $plan.ftz) {
            (Rounding::Zero, false) => map1(|a: f32| $end(a.trunc())),
            (Rounding::Zero, true) => map1(|a: f32| $end(flush(a).trunc())),
            (Rounding::Down, false) => map1(|a: f32| $end(a.floor())),
            (Rounding::Down, true) => map1(|a: f32| $end(flush(a).floor())),
            (Rounding::Up, false) => map1(|a: f32| $end(a.ceil())),
            (Rounding::Up, true) => map1(|a: f32| $end(flush(a).ceil())),
            (_, false) => map1(|a: f32| $end(a.round_ties_even())),
            (_, true) => map1(|a: f32| $end(flush(a).round_ties_even())),
        }
    };
}

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    if i.opcode != "cvt" {
        return Ok(None);
    }
    let mut m = Mods::new(&i.modifiers);
    if m.take("pack") {
        return convert_packed::decode_pack(d, i, m).map(Some);
    }
    if i.modifiers.iter().any(|w| convert_small::is_small(w)) {
        return convert_small::decode(d, i, m).map(Some);
    }
    if m.peek_ty().is_some_and(|ty| matches!(ty, Ty::F16x2 | Ty::BF16x2)) {
        return convert_packed::decode_pair(d, i, m).map(Some);
    }
    let [to, from] = [m.ty()?, m.ty()?];
    let (Some(target), Some(source)) = (Kind::of(to), Kind::of(from)) else {
        return Err(format!("cvt from {from:?} to {to:?} does not exist"));
    };
    let word = m.take_any(&["rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"]);
    let whole = word.is_some_and(|w| w.len() == 3 && w.ends_with('i'));
    let rounding = word.and_then(Rounding::parse);
    let mut p = Plan {
        to: target,
        from: source,
        rounding: rounding.unwrap_or(Rounding::Nearest),
        whole,
        ..Plan::default()
    };
    p.ftz = (to == Ty::F32 || from == Ty::F32) && m.take("ftz");
    p.sat = m.take("sat");
    let short = matches!(to, Ty::F16 | Ty::BF16 | Ty::TF32);
    p.relu = short && m.take("relu");
    p.finite = short && m.take("satfinite");
    m.finish()?;
    p.check(to, from, word)?;
    let [target, source] = i.operands.as_slice() else {
        return Err("cvt needs a destination and a source".to_owned());
    };
    let (a, a_wide) = source_slot(d, source, from)?;
    let (out, out_wide) = target_slot(d, target, to)?;
    p.from_wide = a_wide;
    p.to_wide = out_wide;
    let exec = p.fast().unwrap_or(any as Exec);
    let inst = Inst::new(exec, Class::Cvt);
    Ok(Some(Inst { d: out, a, imm: p.pack(), ..inst }))
}

/// A register of any width that is at least the type's, or something that is read in the type's width.
fn source_slot(d: &mut Decoder<'_>, operand: &Operand, ty: Ty) -> Result<(u32, bool), String> {
    match d.any_register(operand) {
        Ok(AnySlot::R32(_)) if ty.size() == 8 => {
            Err("the source register is narrower than the type".to_owned())
        }
        Ok(AnySlot::R32(slot)) => Ok((slot, false)),
        Ok(AnySlot::R64(slot)) => Ok((slot, true)),
        Ok(AnySlot::Pred(_)) => Err("cvt does not read predicates".to_owned()),
        Err(_) => Ok((d.src(operand, ty)?, ty.size() == 8)),
    }
}

fn target_slot(d: &mut Decoder<'_>, operand: &Operand, ty: Ty) -> Result<(u32, bool), String> {
    match d.any_register(operand) {
        Ok(AnySlot::R32(_)) if ty.size() == 8 => {
            Err("the destination register is narrower than the type".to_owned())
        }
        Ok(AnySlot::R64(slot)) => Ok((slot, true)),
        _ => Ok((d.dst(operand, ty)?, ty.size() == 8)),
    }
}

/// What a type means for a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
enum Kind {
    U8,
    S8,
    U16,
    S16,
    #[default]
    U32,
    S32,
    U64,
    S64,
    F16,
    BF16,
    TF32,
    F32,
    F64,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::S8,
        Self::U16,
        Self::S16,
        Self::U32,
        Self::S32,
        Self::U64,
        Self::S64,
        Self::F16,
        Self::BF16,
        Self::TF32,
        Self::F32,
        Self::F64,
    ];

    fn of(ty: Ty) -> Option<Self> {
        Some(match ty {
            Ty::U8 => Self::U8,
            Ty::S8 => Self::S8,
            Ty::U16 => Self::U16,
            Ty::S16 => Self::S16,
            Ty::U32 => Self::U32,
            Ty::S32 => Self::S32,
            Ty::U64 => Self::U64,
            Ty::S64 => Self::S64,
            Ty::F16 => Self::F16,
            Ty::BF16 => Self::BF16,
            Ty::TF32 => Self::TF32,
            Ty::F32 => Self::F32,
            Ty::F64 => Self::F64,
            _ => return None,
        })
    }

    fn format(self) -> Option<Format> {
        Some(match self {
            Self::F16 => F16,
            Self::BF16 => BF16,
            Self::TF32 => TF32,
            Self::F32 => F32,
            Self::F64 => F64,
            _ => return None,
        })
    }

    fn bits(self) -> u32 {
        match self {
            Self::U8 | Self::S8 => 8,
            Self::U16 | Self::S16 | Self::F16 | Self::BF16 => 16,
            Self::U32 | Self::S32 | Self::TF32 | Self::F32 => 32,
            Self::U64 | Self::S64 | Self::F64 => 64,
        }
    }

    fn signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The sign bit of signed integers, else 0.
    fn sign(self) -> u64 {
        if self.signed() { 1 << (self.bits() - 1) } else { 0 }
    }

    /// Smallest and largest integer.
    fn range(self) -> (i128, i128) {
        let top = 1i128 << (self.bits() - u32::from(self.signed()));
        (if self.signed() { -top } else { 0 }, top - 1)
    }
}

/// A conversion, as it is kept in `Inst::imm`.
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::struct_excessive_bools)] // each is a modifier of the instruction
struct Plan {
    to: Kind,
    from: Kind,
    rounding: Rounding,
    /// The result is an integer (`.rni` and its like).
    whole: bool,
    ftz: bool,
    sat: bool,
    relu: bool,
    finite: bool,
    to_wide: bool,
    from_wide: bool,
}

impl Plan {
    fn pack(self) -> i64 {
        let flags = [self.whole, self.ftz, self.sat, self.relu, self.finite, self.to_wide, self.from_wide];
        let flags = flags.iter().enumerate().fold(0, |all, (bit, &flag)| all | i64::from(flag) << bit);
        self.to as i64 | (self.from as i64) << 8 | i64::from(self.rounding.code()) << 16 | flags << 24
    }

    fn unpack(imm: i64) -> Self {
        let kind = |shift: u32| Kind::ALL[(imm >> shift & 0xff) as usize % Kind::ALL.len()];
        let flag = |bit: u32| imm >> (24 + bit) & 1 == 1;
        Self {
            to: kind(0),
            from: kind(8),
            rounding: Rounding::from_code((imm >> 16 & 0xff) as u32),
            whole: flag(0),
            ftz: flag(1),
            sat: flag(2),
            relu: flag(3),
            finite: flag(4),
            to_wide: flag(5),
            from_wide: flag(6),
        }
    }

    /// The rules of the manual about which modifiers go with which types.
    fn check(&self, to: Ty, from: Ty, word: Option<&str>) -> Result<(), String> {
        let floats = (to.float(), from.float());
        let needs = match floats {
            (false, true) => "a rounding to an integer (.rni, .rzi, .rmi, .rpi)",
            (true, false) => "a rounding mode (.rn, .rz, .rm, .rp)",
            (true, true) if to.size() < from.size() || to == Ty::TF32 => {
                "a rounding mode (.rn, .rz, .rm, .rp)"
            }
            (true, true) if to.size() == from.size() && to != from => "a rounding mode (.rn, .rz, .rm, .rp)",
            _ => "",
        };
        if !needs.is_empty() && word.is_none() {
            return Err(format!("this cvt needs {needs}"));
        }
        let allowed = match floats {
            (false, false) => word.is_none(),
            (false, true) => self.whole,
            (true, false) => !self.whole,
            (true, true) => !self.whole || to == from,
        };
        if !allowed || (word == Some("rna") && to != Ty::TF32) || from == Ty::TF32 {
            return Err(format!(
                "cvt.{}from {from:?} to {to:?} does not exist",
                word.map_or(String::new(), |w| format!("{w} "))
            ));
        }
        if to == Ty::TF32 && from != Ty::F32 {
            return Err("cvt to tf32 is from f32 only".to_owned());
        }
        Ok(())
    }

    /// The common conversions, in code that becomes vector instructions.
    fn fast(&self) -> Option<Exec> {
        use Kind::{BF16, F16, F32, F64, S32, U32};
        if self.relu || self.finite {
            return None;
        }
        if self.to.format().is_none() && self.from.format().is_none() {
            return (!self.sat).then(|| self.integers());
        }
        let natural = self.to_wide == (self.to.bits() == 64) && self.from_wide == (self.from.bits() == 64);
        if !natural || (self.sat && (self.to, self.from) != (F32, F32)) {
            return None;
        }
        let nearest = self.rounding == Rounding::Nearest;
        Some(match (self.to, self.from) {
            (F32, F16) => map1(|a: u16| canonical(f16_to_f32(a))),
            (F32, BF16) if !self.ftz => map1(|a: u16| canonical(bf16_to_f32(a))),
            // The flushed values would round to zero as well.
            (F16, F32) if nearest => map1(f32_to_f16),
            (BF16, F32) if nearest && !self.ftz => map1(f32_to_bf16),
            (F32, S32) if nearest => map1(|a: i32| a as f32),
            (F32, U32) if nearest => map1(|a: u32| a as f32),
            (F64, S32) => map1(|a: i32| f64::from(a)),
            (F64, U32) => map1(|a: u32| f64::from(a)),
            (S32, F32) => whole_f32!(self, |a: f32| a as i32),
            (U32, F32) => whole_f32!(self, |a: f32| a as u32),
            (F32, F32) if self.sat && !self.whole && !self.ftz => map1(saturate),
            (F32, F32) if self.sat && !self.whole => map1(|a: f32| saturate(flush(a))),
            (F32, F32) if self.whole && !self.sat => whole_f32!(self, canonical),
            _ => return None,
        })
    }

    fn integers(&self) -> Exec {
        match (self.to_wide, self.from_wide) {
            (true, false) if self.to.bits() == 64 && self.from == Kind::U32 => map1(|a: u32| u64::from(a)),
            (true, false) if self.to.bits() == 64 && self.from == Kind::S32 => map1(|a: i32| i64::from(a)),
            (true, false) => both!(widen),
            (false, true) => both!(narrow),
            (false, false) => both!(within32),
            (true, true) => both!(within64),
        }
    }
}

/// A value of `bits` in the low bits of a slot, extended to the slot.
#[inline(always)]
fn extended(value: u64, mask: u64, sign: u64) -> u64 {
    ((value & mask) ^ sign).wrapping_sub(sign)
}

/// Undefined lanes of the two halves of the result of an integer conversion, from those of the source.
fn undefined_halves(p: &Plan, [low, high]: [u32; 2]) -> [u32; 2] {
    let half = if p.from_wide { 32 } else { 16 };
    let used = p.from.bits().min(p.to.bits());
    let half_out = if p.to_wide { 32 } else { 16 };
    if p.from_wide == p.to_wide && used == 2 * half {
        return [low, high];
    }
    let any = if used <= half { low } else { low | high };
    // The upper half is a constant zero where the value is short and unsigned, in the order of the two extensions.
    let zero = (!p.to.signed() && p.to.bits() <= half_out)
        || (!p.from.signed() && p.from.bits() <= half_out && p.from.bits() < p.to.bits());
    [any, if zero { 0 } else { any }]
}

#[inline(always)]
fn widen(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let p = Plan::unpack(inst.imm);
    let regs = &mut core.warp.regs;
    let source = *regs.get32(inst.a);
    let mut out = [0; 32];
    for lane in 0..32 {
        let value = extended(u64::from(source[lane]), p.from.mask(), p.from.sign());
        out[lane] = extended(value, p.to.mask(), p.to.sign());
    }
    let undef = undefined_halves(&p, regs.undef32[inst.a as usize]);
    regs.put64(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn narrow(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let p = Plan::unpack(inst.imm);
    let regs = &mut core.warp.regs;
    let source = *regs.get64(inst.a);
    let mut out = [0; 32];
    for lane in 0..32 {
        let value = extended(source[lane], p.from.mask(), p.from.sign());
        out[lane] = extended(value, p.to.mask(), p.to.sign()) as u32;
    }
    let undef = undefined_halves(&p, regs.undef64[inst.a as usize]);
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn within32(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let p = Plan::unpack(inst.imm);
    let regs = &mut core.warp.regs;
    let source = *regs.get32(inst.a);
    let [from, to] = [p.from, p.to].map(|kind| (kind.mask() as u32, kind.sign() as u32));
    let mut out = [0; 32];
    for lane in 0..32 {
        let value = ((source[lane] & from.0) ^ from.1).wrapping_sub(from.1);
        out[lane] = ((value & to.0) ^ to.1).wrapping_sub(to.1);
    }
    let undef = undefined_halves(&p, regs.undef32[inst.a as usize]);
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn within64(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let p = Plan::unpack(inst.imm);
    let regs = &mut core.warp.regs;
    let source = *regs.get64(inst.a);
    let mut out = [0; 32];
    for lane in 0..32 {
        let value = extended(source[lane], p.from.mask(), p.from.sign());
        out[lane] = extended(value, p.to.mask(), p.to.sign());
    }
    let undef = undefined_halves(&p, regs.undef64[inst.a as usize]);
    regs.put64(inst.d, &out, mask, undef);
    Flow::Next
}

/// Everything else: exact, lane by lane.
fn any(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let p = Plan::unpack(inst.imm);
    let regs = &mut core.warp.regs;
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        if mask >> lane & 1 == 1 {
            let source =
                if p.from_wide { regs.get64(inst.a)[lane] } else { u64::from(regs.get32(inst.a)[lane]) };
            *value = convert(&p, source);
        }
    }
    let [low, high] = if p.from_wide { regs.undef64[inst.a as usize] } else { regs.undef32[inst.a as usize] };
    let half = if p.from_wide { 32 } else { 16 };
    let undef = if p.from.bits() <= half { low } else { low | high };
    let short = p.to.bits() <= if p.to_wide { 32 } else { 16 } && !p.to.signed();
    let undef = [undef, if short { 0 } else { undef }];
    if p.to_wide {
        regs.put64(inst.d, &out, mask, undef);
    } else {
        regs.put32(inst.d, &out.map(|v| v as u32), mask, undef);
    }
    Flow::Next
}

/// One conversion; the result fills the destination's slot.
fn convert(p: &Plan, source: u64) -> u64 {
    let source = source & p.from.mask();
    let value = if let Some(format) = p.from.format() {
        let flushed = p.ftz && p.from == Kind::F32;
        Value::of(if flushed { format.flush(source) } else { source }, format)
    } else {
        let signed = extended(source, p.from.mask(), p.from.sign()) as i64;
        let negative = p.from.signed() && signed < 0;
        let magnitude = if negative { signed.unsigned_abs() } else { source };
        Value::Finite(Number::integer(negative, u128::from(magnitude)))
    };
    match p.to.format() {
        Some(format) => to_float(p, value, format),
        None => extended(to_integer(p, value), p.to.mask(), p.to.sign()),
    }
}

/// Floats saturate and integers wrap unless `.sat` says otherwise.
fn to_integer(p: &Plan, value: Value) -> u64 {
    let (low, high) = p.to.range();
    let clamp = |n: i128| n.clamp(low, high) as u64;
    match value {
        // The manual: zero when the source is not f64 and the destination has no 64 bits, else the highest bit alone.
        Value::Nan if p.from != Kind::F64 && p.to.bits() != 64 => 0,
        Value::Nan => 1 << (p.to.bits() - 1),
        Value::Infinite(negative) => clamp(if negative { i128::MIN } else { i128::MAX }),
        Value::Finite(number) => {
            let magnitude = number.to_integer(p.rounding).min(1 << 100) as i128;
            let integer = if number.negative { -magnitude } else { magnitude };
            if p.sat || p.from.format().is_some() { clamp(integer) } else { integer as u64 }
        }
    }
}

fn to_float(p: &Plan, value: Value, format: Format) -> u64 {
    let value = match value {
        Value::Finite(n) if p.whole && n.exponent < 0 => {
            Value::Finite(Number::integer(n.negative, n.to_integer(p.rounding)))
        }
        other => other,
    };
    let bits = finish(value.round(format, p.rounding, p.finite), format, p.sat, p.relu);
    match p.to {
        Kind::F32 if p.ftz => format.flush(bits),
        // tf32 is kept in the upper bits of an f32.
        Kind::TF32 if bits == format.nan => F32.nan,
        Kind::TF32 => bits << 13,
        _ => bits,
    }
}

/// `.sat` clamps to [0, 1], NaN to +0; `.relu` makes negative numbers +0.
pub(super) fn finish(bits: u64, format: Format, sat: bool, relu: bool) -> u64 {
    let (negative, nan) = match Value::of(bits, format) {
        Value::Nan => (false, true),
        Value::Infinite(negative) => (negative, false),
        Value::Finite(n) => (n.negative, false),
    };
    match (sat, relu) {
        (true, _) if negative || nan => 0,
        (true, _) => bits.min(format.one()),
        (_, true) if negative => 0,
        _ => bits,
    }
}
