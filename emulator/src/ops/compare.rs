//! Comparisons and selections.

use super::logic::undecided;
use super::operands::{by_int, no_type, operands};
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::machine::regs::Regs;
use crate::ops::lanes::{Test, conjure, fast_processor, test1, test2};
use crate::ptx::ast::{Instruction, Operand, Ty};

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let m = Mods::new(&i.modifiers);
    let inst = match i.opcode.as_str() {
        "setp" => setp(d, i, m)?,
        "set" => set(d, i, m)?,
        "selp" => selp(d, i, m)?,
        "slct" => slct(d, i, m)?,
        "testp" => testp(d, i, m)?,
        _ => return Ok(None),
    };
    Ok(Some(inst))
}

// ---- what is compared how

/// A relation, with its operands exchanged if need be, so that "greater" needs no code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Eq,
    Ne,
    Lt,
    Le,
    Equ,
    Neu,
    Ltu,
    Leu,
    Num,
    Nan,
}

/// The relation, whether its operands change places, and whether it is one of the unsigned spellings.
fn relation(word: &str) -> Option<(Relation, bool, bool)> {
    Some(match word {
        "eq" => (Relation::Eq, false, false),
        "ne" => (Relation::Ne, false, false),
        "lt" => (Relation::Lt, false, false),
        "le" => (Relation::Le, false, false),
        "gt" => (Relation::Lt, true, false),
        "ge" => (Relation::Le, true, false),
        "lo" => (Relation::Lt, false, true),
        "ls" => (Relation::Le, false, true),
        "hi" => (Relation::Lt, true, true),
        "hs" => (Relation::Le, true, true),
        "equ" => (Relation::Equ, false, false),
        "neu" => (Relation::Neu, false, false),
        "ltu" => (Relation::Ltu, false, false),
        "leu" => (Relation::Leu, false, false),
        "gtu" => (Relation::Ltu, true, false),
        "geu" => (Relation::Leu, true, false),
        "num" => (Relation::Num, false, false),
        "nan" => (Relation::Nan, false, false),
        _ => return None,
    })
}

macro_rules! ordered {
    ($relation:expr, $ty:ty) => {
        match $relation {
            Relation::Eq => Some(test2(|a: $ty, b: $ty| a == b)),
            Relation::Ne => Some(test2(|a: $ty, b: $ty| a != b)),
            Relation::Lt => Some(test2(|a: $ty, b: $ty| a < b)),
            Relation::Le => Some(test2(|a: $ty, b: $ty| a <= b)),
            _ => None,
        }
    };
}

/// All relations of a float type; `$key` turns the stored value into one that compares as the float does.
macro_rules! floating {
    ($relation:expr, $test:ident, $ty:ty, $key:expr) => {
        match $relation {
            // Ordered: false with a NaN.
            Relation::Eq => $test(|a: $ty, b: $ty| $key(a) == $key(b)),
            Relation::Ne => $test(|a: $ty, b: $ty| $key(a) < $key(b) || $key(a) > $key(b)),
            Relation::Lt => $test(|a: $ty, b: $ty| $key(a) < $key(b)),
            Relation::Le => $test(|a: $ty, b: $ty| $key(a) <= $key(b)),
            // Unordered: true with a NaN.
            Relation::Equ => $test(|a: $ty, b: $ty| !($key(a) < $key(b) || $key(a) > $key(b))),
            Relation::Neu => $test(|a: $ty, b: $ty| $key(a) != $key(b)),
            Relation::Ltu => $test(|a: $ty, b: $ty| !($key(a) >= $key(b))),
            Relation::Leu => $test(|a: $ty, b: $ty| !($key(a) > $key(b))),
            Relation::Num => $test(|a: $ty, b: $ty| $key(a) == $key(a) && $key(b) == $key(b)),
            Relation::Nan => $test(|a: $ty, b: $ty| $key(a) != $key(a) || $key(b) != $key(b)),
        }
    };
}

/// Subnormal numbers as zero.
#[inline(always)]
fn flushed(a: f32) -> f32 {
    if a.to_bits() & 0x7f80_0000 == 0 { 0.0 } else { a }
}

/// An f16 as an f32 that compares the same: the sign and the other bits moved to where f32 has them, without the exponent's bias;
/// infinities and NaNs have to be lifted.
#[inline(always)]
fn f16_key(a: u16) -> f32 {
    let sign = u32::from(a & 0x8000) << 16;
    let rest = u32::from(a & 0x7fff) << 13;
    let key = if rest >= 0x7c00 << 13 { rest | 0x7f80_0000 } else { rest + (64 << 23) };
    let key = if rest == 0 { 0 } else { key };
    f32::from_bits(sign | key)
}

#[inline(always)]
fn f16_flushed_key(a: u16) -> f32 {
    f16_key(if a & 0x7c00 == 0 { 0 } else { a })
}

#[inline(always)]
fn bf16_key(a: u16) -> f32 {
    f32::from_bits(u32::from(a) << 16)
}

#[inline(always)]
fn same<T>(a: T) -> T {
    a
}

/// A relation of both halves: the lanes where it holds for the low halves, and those where it holds for the high ones. Which lanes are
/// undefined is not said.
fn halves_test<F: Fn(u16, u16) -> bool + Copy + 'static>(_: F) -> Test {
    #[inline(always)]
    fn body<F: Fn(u16, u16) -> bool + Copy + 'static>(regs: &Regs, inst: &Inst) -> (u32, u32) {
        let f = conjure::<F>();
        let (a, b) = (regs.get32(inst.a), regs.get32(inst.b));
        let (mut low, mut high) = (0, 0);
        for lane in 0..32 {
            low |= u32::from(f(a[lane] as u16, b[lane] as u16)) << lane;
            high |= u32::from(f((a[lane] >> 16) as u16, (b[lane] >> 16) as u16)) << lane;
        }
        (low, high)
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
    fn fast<F: Fn(u16, u16) -> bool + Copy + 'static>(regs: &Regs, inst: &Inst) -> (u32, u32) {
        body::<F>(regs, inst)
    }
    fn plain<F: Fn(u16, u16) -> bool + Copy + 'static>(regs: &Regs, inst: &Inst) -> (u32, u32) {
        body::<F>(regs, inst)
    }
    #[cfg(target_arch = "x86_64")]
    if fast_processor() {
        return fast::<F>;
    }
    plain::<F>
}

/// The test of a relation.
// A negated comparison is how "or not ordered" is said, a value that differs from itself is how a NaN shows.
#[allow(clippy::neg_cmp_op_on_partial_ord, clippy::eq_op)]
fn test(i: &Instruction, relation: Relation, unsigned: bool, ty: Ty, ftz: bool) -> Result<Test, String> {
    if ftz && !matches!(ty, Ty::F32 | Ty::F16 | Ty::F16x2) {
        return Err(".ftz needs f32, f16 or f16x2".to_owned());
    }
    if unsigned && !matches!(ty, Ty::U16 | Ty::U32 | Ty::U64) {
        return Err("lo, ls, hi, hs need an unsigned type".to_owned());
    }
    let integer = match ty {
        Ty::F32 if ftz => return Ok(floating!(relation, test2, f32, flushed)),
        Ty::F32 => return Ok(floating!(relation, test2, f32, same)),
        Ty::F64 => return Ok(floating!(relation, test2, f64, same)),
        Ty::F16 if ftz => return Ok(floating!(relation, test2, u16, f16_flushed_key)),
        Ty::F16 => return Ok(floating!(relation, test2, u16, f16_key)),
        Ty::BF16 => return Ok(floating!(relation, test2, u16, bf16_key)),
        Ty::F16x2 if ftz => return Ok(floating!(relation, halves_test, u16, f16_flushed_key)),
        Ty::F16x2 => return Ok(floating!(relation, halves_test, u16, f16_key)),
        Ty::BF16x2 => return Ok(floating!(relation, halves_test, u16, bf16_key)),
        Ty::B16 | Ty::B32 | Ty::B64 if !matches!(relation, Relation::Eq | Relation::Ne) => {
            return Err("bits compare only by eq and ne".to_owned());
        }
        Ty::B16 => ordered!(relation, u16),
        Ty::B32 => ordered!(relation, u32),
        Ty::B64 => ordered!(relation, u64),
        _ => by_int!(i, ty, ordered!(relation, T)),
    };
    integer.ok_or_else(|| "integers do not compare as unordered".to_owned())
}

fn packed(ty: Ty) -> bool {
    matches!(ty, Ty::F16x2 | Ty::BF16x2)
}

fn class(ty: Ty) -> Class {
    match ty {
        Ty::F32 => Class::Fp32,
        Ty::F64 => Class::Fp64,
        ty if ty.float() => Class::Fp16,
        _ => Class::Int,
    }
}

// ---- comparison and combination with a predicate

/// No combination, or the one with the predicate `c`.
const COMBINE: u32 = 3;
const AND: u32 = 1;
const OR: u32 = 2;
const XOR: u32 = 3;
/// The predicate is negated.
const NOT: u32 = 4;
/// Both halves are compared.
const PACKED: u32 = 8;
/// No second predicate.
const NONE: u32 = u32::MAX;

/// What `setp` and `set` have in common: relation, combination, sources. `operands` are the sources `a`, `b` and, if combined, `c`.
fn comparison(
    d: &mut Decoder<'_>,
    i: &Instruction,
    m: &mut Mods<'_>,
    ty: Ty,
    exec: Exec,
    sources: &[Operand],
) -> Result<Inst, String> {
    let (relation, exchanged, unsigned) = m.take_map(relation).ok_or("the relation is missing")?;
    let combine = m.take_any(&["and", "or", "xor"]);
    let ftz = m.take("ftz");
    m.finish()?;
    let test = test(i, relation, unsigned, ty, ftz)?;
    let mut inst = Inst { test: Some(test), e: NONE, ..Inst::new(exec, class(ty)) };
    let (a, b) = match (sources, combine) {
        ([a, b], None) => (a, b),
        ([a, b, c], Some(word)) => {
            let (slot, not) = d.src_pred(c)?;
            inst.c = slot;
            inst.aux = match word {
                "and" => AND,
                "or" => OR,
                _ => XOR,
            } | if not { NOT } else { 0 };
            (a, b)
        }
        _ => return Err("wrong number of sources".to_owned()),
    };
    if packed(ty) {
        inst.aux |= PACKED;
    }
    (inst.a, inst.b) = (d.src(a, ty)?, d.src(b, ty)?);
    if exchanged {
        (inst.a, inst.b) = (inst.b, inst.a);
    }
    Ok(inst)
}

fn setp(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    let (to, sources) = i.operands.split_first().ok_or("operands are missing")?;
    let mut inst = comparison(d, i, &mut m, ty, set_one, sources)?;
    match to {
        Operand::Pair(p, q) => {
            inst.exec = set_two;
            (inst.d, inst.e) = (d.dst_pred(p)?, d.dst_pred(q)?);
        }
        _ if packed(ty) => return Err("a packed comparison writes two predicates p|q".to_owned()),
        p => {
            inst.d = d.dst_pred(p)?;
            if inst.aux != 0 {
                inst.exec = set_two;
            }
        }
    }
    Ok(inst)
}

/// `setp` with one destination and nothing to combine with.
fn set_one(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (value, undef) = compare(core, inst);
    core.warp.regs.put_pred(inst.d, value, mask, undef);
    Flow::Next
}

fn set_two(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let [(p, undef_p), (q, undef_q)] = outcomes(core, inst);
    core.warp.regs.put_pred(inst.d, p, mask, undef_p);
    if inst.e != NONE {
        core.warp.regs.put_pred(inst.e, q, mask, undef_q);
    }
    Flow::Next
}

#[inline(always)]
fn compare(core: &Core<'_>, inst: &Inst) -> (u32, u32) {
    match inst.test {
        // SAFETY: the test was chosen for this processor when the instruction was decoded.
        Some(test) => unsafe { test(&core.warp.regs, inst) },
        None => (0, 0),
    }
}

/// The two results and their undefined lanes: of the comparison and of its complement, or of the low and the high halves; both combined
/// with the predicate.
fn outcomes(core: &Core<'_>, inst: &Inst) -> [(u32, u32); 2] {
    let (first, second) = compare(core, inst);
    let regs = &core.warp.regs;
    let both = if inst.aux & PACKED != 0 {
        let (ua, ub) = (regs.undef32[inst.a as usize], regs.undef32[inst.b as usize]);
        [(first, ua[0] | ub[0]), (second, ua[1] | ub[1])]
    } else {
        [(first, second), (!first, second)]
    };
    if inst.aux & COMBINE == 0 {
        return both;
    }
    let c = regs.pred[inst.c as usize];
    let c = if inst.aux & NOT != 0 { !c } else { c };
    let unknown = regs.undef_pred[inst.c as usize];
    both.map(|(t, undef)| match inst.aux & COMBINE {
        AND => (t & c, undecided(undef, unknown, |second| !if second { c } else { t })),
        OR => (t | c, undecided(undef, unknown, |second| if second { c } else { t })),
        _ => (t ^ c, undef | unknown),
    })
}

fn set(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let to = m.ty()?;
    let ty = m.last_ty()?;
    let truth: i64 = match (to, packed(ty)) {
        (Ty::U32 | Ty::S32, _) => 0xffff_ffff,
        (Ty::U16 | Ty::S16, false) if matches!(ty, Ty::F16 | Ty::BF16) => 0xffff,
        (Ty::F32, false) => 0x3f80_0000,
        (Ty::F16, false) => 0x3c00,
        (Ty::BF16, false) => 0x3f80,
        (Ty::F16x2, true) if ty == Ty::F16x2 => 0x3c00_3c00,
        (Ty::BF16x2, true) if ty == Ty::BF16x2 => 0x3f80_3f80,
        _ => return Err(format!("set has no form from {ty:?} to {to:?}")),
    };
    let (target, sources) = i.operands.split_first().ok_or("operands are missing")?;
    let inst = comparison(d, i, &mut m, ty, set_value, sources)?;
    Ok(Inst { d: d.dst32(target)?, imm: truth, ..inst })
}

fn set_value(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let [low, mut high] = outcomes(core, inst);
    if inst.aux & PACKED == 0 {
        high = low;
    }
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        let halves = ((low.0 >> lane & 1) * 0xffff) | ((high.0 >> lane & 1) * 0xffff_0000);
        *value = inst.imm as u32 & halves;
    }
    core.warp.regs.put32(inst.d, &out, mask, [low.1, high.1]);
    Flow::Next
}

// ---- selection

fn selp(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    if !matches!(ty.size(), 2 | 4 | 8) {
        return Err(no_type(i, ty));
    }
    let [to, a, b, p] = operands(i)?;
    let exec = if ty.size() == 8 { crate::both!(select64) } else { crate::both!(select32) };
    let (a, b) = (d.src(a, ty)?, d.src(b, ty)?);
    let (c, not) = d.src_pred(p)?;
    let (a, b) = if not { (b, a) } else { (a, b) };
    Ok(Inst { d: d.dst(to, ty)?, a, b, c, ..Inst::new(exec, Class::Move) })
}

/// Undefined lanes of a choice between two sources: those of the source taken, and those where the choice is.
#[inline(always)]
fn chosen(choice: u32, unknown: u32, ua: [u32; 2], ub: [u32; 2]) -> [u32; 2] {
    [0, 1].map(|n| (choice & ua[n]) | (!choice & ub[n]) | unknown)
}

#[inline(always)]
fn select32(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let choice = regs.pred[inst.c as usize];
    let unknown = regs.undef_pred[inst.c as usize];
    put_choice32(regs, inst, mask, choice, unknown);
    Flow::Next
}

#[inline(always)]
fn select64(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let choice = regs.pred[inst.c as usize];
    let unknown = regs.undef_pred[inst.c as usize];
    put_choice64(regs, inst, mask, choice, unknown);
    Flow::Next
}

#[inline(always)]
fn put_choice32(regs: &mut Regs, inst: &Inst, mask: u32, choice: u32, unknown: u32) {
    let (a, b) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        let keep = (choice >> lane & 1).wrapping_neg();
        out[lane] = a[lane] & keep | b[lane] & !keep;
    }
    let undef = chosen(choice, unknown, regs.undef32[inst.a as usize], regs.undef32[inst.b as usize]);
    regs.put32(inst.d, &out, mask, undef);
}

#[inline(always)]
fn put_choice64(regs: &mut Regs, inst: &Inst, mask: u32, choice: u32, unknown: u32) {
    let (a, b) = (*regs.get64(inst.a), *regs.get64(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        let keep = u64::from(choice >> lane & 1).wrapping_neg();
        out[lane] = a[lane] & keep | b[lane] & !keep;
    }
    let undef = chosen(choice, unknown, regs.undef64[inst.a as usize], regs.undef64[inst.b as usize]);
    regs.put64(inst.d, &out, mask, undef);
}

/// `d = c >= 0 ? a : b`.
fn slct(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ftz = m.take("ftz");
    let ty = m.ty()?;
    let by = m.last_ty()?;
    m.finish()?;
    if !matches!(ty.size(), 2 | 4 | 8) {
        return Err(no_type(i, ty));
    }
    let [to, a, b, c] = operands(i)?;
    // The comparison reads slot `a`: it is made for an instruction that has `c` there.
    let sign: Test = match (by, ftz) {
        (Ty::S32, false) => test1(|c: i32| c >= 0),
        // The sign of a subnormal number survives .ftz as the sign of zero, which does not count.
        (Ty::F32, true) => test1(|c: f32| flushed(c) >= 0.0),
        (Ty::F32, false) => test1(|c: f32| c >= 0.0),
        _ => return Err("slct chooses by .s32 or .f32, and .ftz needs .f32".to_owned()),
    };
    let exec = if ty.size() == 8 { choose::<true> } else { choose::<false> };
    let inst = Inst { test: Some(sign), ..Inst::new(exec, Class::Move) };
    let (a, b) = (d.src(a, ty)?, d.src(b, ty)?);
    Ok(Inst { d: d.dst(to, ty)?, a: d.src32(c, by)?, b: a, c: b, ..inst })
}

/// `slct`: the choice is by slot `a`, between `b` and `c`.
fn choose<const WIDE: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (choice, unknown) = compare(core, inst);
    let between = Inst { a: inst.b, b: inst.c, ..inst.clone() };
    let regs = &mut core.warp.regs;
    if WIDE {
        put_choice64(regs, &between, mask, choice, unknown);
    } else {
        put_choice32(regs, &between, mask, choice, unknown);
    }
    Flow::Next
}

/// Properties of a float: by its exponent and mantissa, the sign does not matter.
fn testp(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let what = m
        .take_any(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"])
        .ok_or("the property is missing")?;
    let ty = m.ty()?;
    m.finish()?;
    macro_rules! property {
        ($float:ty) => {
            match what {
                "finite" => test1(|a: $float| a.is_finite()),
                "infinite" => test1(|a: $float| a.is_infinite()),
                "number" => test1(|a: $float| !a.is_nan()),
                "notanumber" => test1(|a: $float| a.is_nan()),
                // Zero counts as a normal number.
                "normal" => test1(|a: $float| a.is_normal() || a == 0.0),
                _ => test1(|a: $float| a.is_subnormal()),
            }
        };
    }
    let test = match ty {
        Ty::F32 => property!(f32),
        Ty::F64 => property!(f64),
        _ => return Err(no_type(i, ty)),
    };
    let [to, a] = operands(i)?;
    let inst = Inst { test: Some(test), ..Inst::new(set_one, class(ty)) };
    Ok(Inst { d: d.dst_pred(to)?, a: d.src(a, ty)?, ..inst })
}
