//! Logic, shifts and bit fields.

use super::moves::not_pred;
use super::operands::{build, by_type, no_type, operands};
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::ops::lanes::{map1, map2, map3, map4};
use crate::ptx::ast::{Instruction, Operand, Ty};

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let m = Mods::new(&i.modifiers);
    let inst = match i.opcode.as_str() {
        "and" | "or" | "xor" => binary(d, i, m)?,
        "not" | "cnot" => unary(d, i, m)?,
        "shl" | "shr" => shift(d, i, m)?,
        "shf" => funnel(d, i, m)?,
        "bfe" | "bfi" => field(d, i, m)?,
        "bmsk" | "szext" => mask_or_extend(d, i, m)?,
        "lop3" => lop3(d, i, m)?,
        _ => return Ok(None),
    };
    Ok(Some(inst))
}

// ---- and, or, xor, not

fn binary(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    if ty == Ty::Pred {
        let [to, a, b] = operands(i)?;
        let exec = match i.opcode.as_str() {
            "and" => logic_pred::<AND>,
            "or" => logic_pred::<OR>,
            _ => logic_pred::<XOR>,
        };
        let (a, b) = (positive(d, a)?, positive(d, b)?);
        return Ok(Inst { d: d.dst_pred(to)?, a, b, ..Inst::new(exec, Class::Int) });
    }
    let exec: Exec = match (i.opcode.as_str(), ty) {
        ("and", Ty::B16 | Ty::B32) => crate::both!(logic32::<AND>),
        ("or", Ty::B16 | Ty::B32) => crate::both!(logic32::<OR>),
        (_, Ty::B16 | Ty::B32) => crate::both!(logic32::<XOR>),
        ("and", Ty::B64) => crate::both!(logic64::<AND>),
        ("or", Ty::B64) => crate::both!(logic64::<OR>),
        (_, Ty::B64) => crate::both!(logic64::<XOR>),
        _ => return Err(no_type(i, ty)),
    };
    build(d, i, exec, Class::Int, ty, &[ty, ty])
}

/// A predicate that must not be negated.
fn positive(d: &mut Decoder<'_>, operand: &Operand) -> Result<u32, String> {
    match d.src_pred(operand)? {
        (slot, false) => Ok(slot),
        (_, true) => Err(format!("operand {operand:?} cannot be negated here")),
    }
}

const AND: u32 = 0;
const OR: u32 = 1;
const XOR: u32 = 2;

/// Undefined lanes of a part of the result: where either source is, unless the other decides alone (`and` with zero, `or` with ones).
/// `decides` gives the lanes where a source is zero, or all ones, in that part.
#[inline(always)]
pub(super) fn undecided(ua: u32, ub: u32, decides: impl Fn(bool) -> u32) -> u32 {
    let mut undef = ua | ub;
    if ua & !ub != 0 || ub & !ua != 0 {
        undef &= !(decides(false) & !ua) & !(decides(true) & !ub);
    }
    undef
}

/// Lanes where the masked part of a value has the bits that decide `OP`.
#[inline(always)]
fn deciding<const OP: u32>(value: &[u64; 32], part: u64) -> u32 {
    let wanted = if OP == AND { 0 } else { part };
    value.iter().enumerate().fold(0, |lanes, (lane, v)| lanes | u32::from(v & part == wanted) << lane)
}

#[inline(always)]
fn logic32<const OP: u32>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (a, b) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        out[lane] = apply::<OP>(u64::from(a[lane]), u64::from(b[lane])) as u32;
    }
    let mut undef = [0; 2];
    if regs.track {
        let (ua, ub) = (regs.undef32[inst.a as usize], regs.undef32[inst.b as usize]);
        undef = if (ua[0] | ua[1] | ub[0] | ub[1]) & mask == 0 {
            [0; 2]
        } else {
            parts::<OP>(&a.map(u64::from), &b.map(u64::from), ua, ub, [0xffff, 0xffff_0000])
        };
    }
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn logic64<const OP: u32>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (a, b) = (*regs.get64(inst.a), *regs.get64(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        out[lane] = apply::<OP>(a[lane], b[lane]);
    }
    let mut undef = [0; 2];
    if regs.track {
        let (ua, ub) = (regs.undef64[inst.a as usize], regs.undef64[inst.b as usize]);
        if (ua[0] | ua[1] | ub[0] | ub[1]) & mask != 0 {
            undef = parts::<OP>(&a, &b, ua, ub, [0xffff_ffff, 0xffff_ffff << 32]);
        }
    }
    regs.put64(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn apply<const OP: u32>(a: u64, b: u64) -> u64 {
    match OP {
        AND => a & b,
        OR => a | b,
        _ => a ^ b,
    }
}

/// Undefined lanes of both parts of a result.
#[inline(never)]
fn parts<const OP: u32>(
    a: &[u64; 32],
    b: &[u64; 32],
    ua: [u32; 2],
    ub: [u32; 2],
    part: [u64; 2],
) -> [u32; 2] {
    if OP == XOR {
        return [ua[0] | ub[0], ua[1] | ub[1]];
    }
    [0, 1].map(|n| undecided(ua[n], ub[n], |second| deciding::<OP>(if second { b } else { a }, part[n])))
}

fn logic_pred<const OP: u32>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (a, b) = (regs.pred[inst.a as usize], regs.pred[inst.b as usize]);
    let (ua, ub) = (regs.undef_pred[inst.a as usize], regs.undef_pred[inst.b as usize]);
    let undef = match OP {
        AND => undecided(ua, ub, |second| !if second { b } else { a }),
        OR => undecided(ua, ub, |second| if second { b } else { a }),
        _ => ua | ub,
    };
    regs.put_pred(inst.d, apply::<OP>(u64::from(a), u64::from(b)) as u32, mask, undef);
    Flow::Next
}

fn unary(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    let exec: Exec = match (i.opcode.as_str(), ty) {
        ("not", Ty::Pred) => {
            let [to, a] = operands(i)?;
            let a = positive(d, a)?;
            return Ok(Inst { d: d.dst_pred(to)?, a, ..Inst::new(not_pred, Class::Int) });
        }
        // Half by half, so that each keeps its own definedness.
        ("not", Ty::B32) => crate::ops::lanes::pair1(|a: u16| !a),
        ("not", _) => by_type!(i, ty, [B16 u16, B64 u64], map1(|a: T| !a)),
        _ => by_type!(i, ty, [B16 u16, B32 u32, B64 u64], map1(|a: T| T::from(a == 0))),
    };
    build(d, i, exec, Class::Int, ty, &[ty])
}

// ---- shifts

fn shift(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    let exec: Exec = match (i.opcode.as_str(), ty) {
        ("shl", Ty::B16) => map2(|a: u16, n: u32| if n < 16 { a << n } else { 0 }),
        ("shl", Ty::B32) => crate::both!(shift32::<LEFT>),
        ("shl", Ty::B64) => crate::both!(shift64::<LEFT>),
        ("shr", Ty::B16 | Ty::U16) => map2(|a: u16, n: u32| if n < 16 { a >> n } else { 0 }),
        ("shr", Ty::S16) => map2(|a: i16, n: u32| a >> n.min(15)),
        ("shr", Ty::B32 | Ty::U32) => crate::both!(shift32::<RIGHT>),
        ("shr", Ty::S32) => crate::both!(shift32::<SIGNED>),
        ("shr", Ty::B64 | Ty::U64) => crate::both!(shift64::<RIGHT>),
        ("shr", Ty::S64) => crate::both!(shift64::<SIGNED>),
        _ => return Err(no_type(i, ty)),
    };
    build(d, i, exec, Class::Int, ty, &[ty, Ty::U32])
}

const LEFT: u32 = 0;
const RIGHT: u32 = 1;
const SIGNED: u32 = 2;

#[inline(always)]
fn shift32<const KIND: u32>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (a, n) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        let (a, n) = (a[lane], n[lane]);
        out[lane] = match KIND {
            LEFT if n < 32 => a << n,
            RIGHT if n < 32 => a >> n,
            SIGNED => (a as i32 >> n.min(31)) as u32,
            _ => 0,
        };
    }
    let mut undef = [0; 2];
    if regs.track {
        let ua = regs.undef32[inst.a as usize];
        let un = regs.any_undef32(inst.b);
        if (ua[0] | ua[1] | un) & mask != 0 {
            undef = shifted(ua, un, &n, 16, KIND);
        }
    }
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn shift64<const KIND: u32>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (a, n) = (*regs.get64(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        let (a, n) = (a[lane], n[lane]);
        out[lane] = match KIND {
            LEFT if n < 64 => a << n,
            RIGHT if n < 64 => a >> n,
            SIGNED => (a as i64 >> n.min(63)) as u64,
            _ => 0,
        };
    }
    let mut undef = [0; 2];
    if regs.track {
        let ua = regs.undef64[inst.a as usize];
        let un = regs.any_undef32(inst.b);
        if (ua[0] | ua[1] | un) & mask != 0 {
            undef = shifted(ua, un, &n, 32, KIND);
        }
    }
    regs.put64(inst.d, &out, mask, undef);
    Flow::Next
}

/// Undefined lanes of the parts of a shifted value, each `part` bits wide. A part of the result is undefined where it gets bits of an
/// undefined part: shifts by 16 take a bf16 out of its word, and a neighbour that nobody wrote must not stick to it.
#[inline(never)]
fn shifted(ua: [u32; 2], un: u32, amount: &[u32; 32], part: u32, kind: u32) -> [u32; 2] {
    let mut undef = [un; 2];
    // Seen from the end that bits move away from: `from` empties first, `to` receives.
    let (from, to) = if kind == LEFT { (0, 1) } else { (1, 0) };
    for (lane, &n) in amount.iter().enumerate() {
        let bit = 1 << lane;
        let sign = if kind == SIGNED { ua[from] & bit } else { 0 };
        undef[from] |= if n < part { ua[from] & bit } else { sign };
        undef[to] |= match n {
            0 => ua[to] & bit,
            _ if n < part => (ua[0] | ua[1]) & bit,
            _ if n < 2 * part => ua[from] & bit,
            _ => sign,
        };
    }
    undef
}

fn funnel(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let left = m.take_any(&["l", "r"]).ok_or("l or r is missing")? == "l";
    let clamp = m.take_any(&["clamp", "wrap"]).ok_or("clamp or wrap is missing")? == "clamp";
    let ty = m.ty()?;
    m.finish()?;
    if ty != Ty::B32 {
        return Err(no_type(i, ty));
    }
    let exec = match (left, clamp) {
        (true, true) => map3(|a: u32, b: u32, n: u32| (joined(a, b) << n.min(32) >> 32) as u32),
        (true, false) => map3(|a: u32, b: u32, n: u32| (joined(a, b) << (n & 31) >> 32) as u32),
        (false, true) => map3(|a: u32, b: u32, n: u32| (joined(a, b) >> n.min(32)) as u32),
        (false, false) => map3(|a: u32, b: u32, n: u32| (joined(a, b) >> (n & 31)) as u32),
    };
    build(d, i, exec, Class::Int, ty, &[ty, ty, Ty::U32])
}

/// The 64 bits that a funnel shift moves.
#[inline(always)]
fn joined(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

// ---- bit fields

/// Ones in the low `count` bits, all of them from 64 on.
#[inline(always)]
fn ones(count: u32) -> u64 {
    if count < 64 { (1 << count) - 1 } else { u64::MAX }
}

/// Bits `pos` to `pos + len - 1` (only the low bytes of both count); above them zeros, or for signed types the top bit of the field,
/// which is at most the value's own top bit.
#[inline(always)]
fn extract<const BITS: u32, const SIGNED: bool>(a: u64, pos: u32, len: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let shifted = if pos < BITS { a >> pos } else { 0 };
    let there = len.min(BITS.saturating_sub(pos));
    let top = (pos + len).wrapping_sub(1).min(BITS - 1);
    let sign = SIGNED && len > 0 && a >> top & 1 == 1;
    shifted & ones(there) | if sign { !ones(there) } else { 0 }
}

/// `b` with `len` bits from `pos` replaced by the low bits of `a`.
#[inline(always)]
fn insert<const BITS: u32>(a: u64, b: u64, pos: u32, len: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    if pos >= BITS {
        return b;
    }
    let field = ones(len) << pos;
    b & !field | a << pos & field
}

fn field(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    if i.opcode == "bfi" {
        let exec: Exec = match ty {
            Ty::B32 => map4(|a: u32, b: u32, pos: u32, len: u32| {
                insert::<32>(u64::from(a), u64::from(b), pos, len) as u32
            }),
            Ty::B64 => map4(|a: u64, b: u64, pos: u32, len: u32| insert::<64>(a, b, pos, len)),
            _ => return Err(no_type(i, ty)),
        };
        return build(d, i, exec, Class::Int, ty, &[ty, ty, Ty::U32, Ty::U32]);
    }
    let exec: Exec = match ty {
        Ty::U32 => map3(|a: u32, pos: u32, len: u32| extract::<32, false>(u64::from(a), pos, len) as u32),
        Ty::S32 => map3(|a: u32, pos: u32, len: u32| extract::<32, true>(u64::from(a), pos, len) as u32),
        Ty::U64 => map3(|a: u64, pos: u32, len: u32| extract::<64, false>(a, pos, len)),
        Ty::S64 => map3(|a: u64, pos: u32, len: u32| extract::<64, true>(a, pos, len)),
        _ => return Err(no_type(i, ty)),
    };
    build(d, i, exec, Class::Int, ty, &[ty, Ty::U32, Ty::U32])
}

fn mask_or_extend(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let clamp = m.take_any(&["clamp", "wrap"]).ok_or("clamp or wrap is missing")? == "clamp";
    let ty = m.ty()?;
    m.finish()?;
    let exec = match (i.opcode.as_str(), ty, clamp) {
        ("bmsk", Ty::B32, true) => {
            map2(|pos: u32, len: u32| if pos < 32 { (ones(len.min(32)) << pos) as u32 } else { 0 })
        }
        ("bmsk", Ty::B32, false) => map2(|pos: u32, len: u32| (ones(len & 31) << (pos & 31)) as u32),
        ("szext", Ty::U32, true) => {
            map2(|a: u32, bits: u32| if bits < 32 { a & ones(bits) as u32 } else { a })
        }
        ("szext", Ty::U32, false) => map2(|a: u32, bits: u32| a & ones(bits & 31) as u32),
        ("szext", Ty::S32, true) => map2(|a: u32, bits: u32| if bits < 32 { extend(a, bits) } else { a }),
        ("szext", Ty::S32, false) => map2(|a: u32, bits: u32| extend(a, bits & 31)),
        _ => return Err(no_type(i, ty)),
    };
    build(d, i, exec, Class::Int, ty, &[ty, Ty::U32])
}

/// The low `bits` (0 to 31) of a word as a signed number.
#[inline(always)]
fn extend(a: u32, bits: u32) -> u32 {
    if bits == 0 { 0 } else { ((a << (32 - bits)) as i32 >> (32 - bits)) as u32 }
}

// ---- any function of three bits

fn lop3(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let combine = m.take_any(&["or", "and"]);
    let ty = m.ty()?;
    m.finish()?;
    if ty != Ty::B32 {
        return Err(no_type(i, ty));
    }
    let table = |operand: &Operand| match operand {
        Operand::Int { bits, .. } if *bits < 256 => Ok(*bits as u32),
        other => Err(format!("operand {other:?} is not a table of 8 bits")),
    };
    let mut inst = Inst::new(crate::both!(look_up), Class::Int);
    let sources = if let Some(word) = combine {
        let [Operand::Pair(to, p), a, b, c, immediate, q] = operands(i)? else {
            return Err("lop3 with a predicate writes a pair d|p".to_owned());
        };
        let (slot, not) = d.src_pred(q)?;
        inst.exec = if word == "or" { look_up_or } else { look_up_and };
        inst.d = d.dst32(to)?;
        inst.imm = i64::from(d.dst_pred(p)?);
        (inst.e, inst.x, inst.aux) = (slot, u32::from(not), table(immediate)?);
        [a, b, c]
    } else {
        let [to, a, b, c, immediate] = operands(i)?;
        inst.d = d.dst32(to)?;
        inst.aux = table(immediate)?;
        [a, b, c]
    };
    inst.a = d.src32(sources[0], ty)?;
    inst.b = d.src32(sources[1], ty)?;
    inst.c = d.src32(sources[2], ty)?;
    Ok(inst)
}

#[inline(always)]
fn table_value(core: &Core<'_>, inst: &Inst) -> ([u32; 32], [u32; 2]) {
    let regs = &core.warp.regs;
    let (a, b, c) = (regs.get32(inst.a), regs.get32(inst.b), regs.get32(inst.c));
    let mut out = [0; 32];
    for n in (0..8).filter(|n| inst.aux >> n & 1 == 1) {
        // Flipped where the row of the table has a zero.
        let flip = |bit: u32| (n >> bit & 1u32).wrapping_sub(1);
        let (fa, fb, fc) = (flip(2), flip(1), flip(0));
        for lane in 0..32 {
            out[lane] |= (a[lane] ^ fa) & (b[lane] ^ fb) & (c[lane] ^ fc);
        }
    }
    let [ua, ub, uc] = [inst.a, inst.b, inst.c].map(|slot| regs.undef32[slot as usize]);
    (out, [ua[0] | ub[0] | uc[0], ua[1] | ub[1] | uc[1]])
}

#[inline(always)]
fn look_up(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (out, undef) = table_value(core, inst);
    core.warp.regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

fn look_up_or(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    look_up_test(core, inst, mask, |nonzero, q| nonzero | q)
}

fn look_up_and(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    look_up_test(core, inst, mask, |nonzero, q| nonzero & q)
}

/// Also tells whether the result is zero, combined with a predicate.
fn look_up_test(core: &mut Core<'_>, inst: &Inst, mask: u32, combine: fn(u32, u32) -> u32) -> Flow {
    let (out, undef) = table_value(core, inst);
    let nonzero = out.iter().enumerate().fold(0, |lanes, (lane, &v)| lanes | u32::from(v != 0) << lane);
    let regs = &mut core.warp.regs;
    let q = regs.pred[inst.e as usize];
    let q = if inst.x == 1 { !q } else { q };
    let unknown = undef[0] | undef[1] | regs.undef_pred[inst.e as usize];
    regs.put32(inst.d, &out, mask, undef);
    regs.put_pred(inst.imm as u32, combine(nonzero, q), mask, unknown);
    Flow::Next
}
