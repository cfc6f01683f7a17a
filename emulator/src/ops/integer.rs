//! Integer arithmetic.

use super::operands::{build, by_int, by_type, no_type};
use crate::config::Check;
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::ops::lanes::{Lane, conjure, map1, map2, map3, pair1, pair2};
use crate::ptx::ast::{Instruction, Ty};
use crate::report::Fault;

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let m = Mods::new(&i.modifiers);
    let float = m.peek_last_ty().is_some_and(Ty::float);
    let inst = match i.opcode.as_str() {
        "add" | "sub" | "addc" | "subc" | "mul" | "mad" | "madc" | "div" | "rem" | "min" | "max" | "abs"
        | "neg"
            if float =>
        {
            return Ok(None);
        }
        "add" | "sub" | "addc" | "subc" => sum(d, i, m)?,
        "mul" | "mad" | "madc" => product(d, i, m)?,
        "mul24" | "mad24" => product24(d, i, m)?,
        "div" | "rem" => quotient(d, i, m)?,
        "min" | "max" => extreme(d, i, m)?,
        "abs" | "neg" => sign(d, i, m)?,
        "sad" => sad(d, i, m)?,
        "dp4a" | "dp2a" => dot(d, i, m)?,
        "popc" | "clz" | "brev" | "bfind" => bits(d, i, m)?,
        "fns" => fns(d, i, m)?,
        _ => return Ok(None),
    };
    Ok(Some(inst))
}

/// Takes `.u16x2` or `.s16x2`; whether it is signed.
pub(super) fn packed(m: &mut Mods<'_>) -> Option<bool> {
    m.take_any(&["u16x2", "s16x2"]).map(|word| word == "s16x2")
}

/// A word form of both 16-bit halves.
const PAIR: Ty = Ty::B32;

fn sum(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let carry_out = m.take("cc");
    let saturate = m.take("sat");
    let minus = i.opcode.starts_with("sub");
    let carry_in = i.opcode.ends_with('c');
    if packed(&mut m).is_some() {
        m.finish()?;
        if carry_in || carry_out || saturate {
            return Err("packed 16-bit sums have no carry and no .sat".to_owned());
        }
        let exec = if minus { pair2(u16::wrapping_sub) } else { pair2(u16::wrapping_add) };
        return build(d, i, exec, Class::Int, PAIR, &[PAIR, PAIR]);
    }
    let ty = m.ty()?;
    m.finish()?;
    let exec: Exec = if carry_in || carry_out {
        if saturate {
            return Err("a sum with carry has no .sat".to_owned());
        }
        match (ty, minus) {
            (Ty::U32 | Ty::S32, false) => crate::both!(carried_sum::<u32>),
            (Ty::U32 | Ty::S32, true) => crate::both!(carried_difference::<u32>),
            (Ty::U64 | Ty::S64, false) => crate::both!(carried_sum::<u64>),
            (Ty::U64 | Ty::S64, true) => crate::both!(carried_difference::<u64>),
            _ => return Err(no_type(i, ty)),
        }
    } else if saturate {
        match (ty, minus) {
            (Ty::S32, false) => map2(i32::saturating_add),
            (Ty::S32, true) => map2(i32::saturating_sub),
            _ => return Err(".sat needs .s32".to_owned()),
        }
    } else if minus {
        by_int!(i, ty, map2(|a: T, b: T| a.wrapping_sub(b)))
    } else {
        by_int!(i, ty, map2(|a: T, b: T| a.wrapping_add(b)))
    };
    let inst = build(d, i, exec, Class::Int, ty, &[ty, ty])?;
    Ok(Inst { aux: carry_flags(carry_in, carry_out), ..inst })
}

// ---- carry

const CARRY_IN: u32 = 1;
const CARRY_OUT: u32 = 2;

fn carry_flags(carry_in: bool, carry_out: bool) -> u32 {
    (if carry_in { CARRY_IN } else { 0 }) | if carry_out { CARRY_OUT } else { 0 }
}

/// An unsigned type whose sums may carry.
trait Word: Lane {
    /// `self + other + carry` and whether it did not fit.
    fn sum(self, other: Self, carry: bool) -> (Self, bool);
    /// `self - other - borrow` and whether it was negative.
    fn difference(self, other: Self, borrow: bool) -> (Self, bool);
    /// Low and high half of the product, of signed numbers if asked.
    fn product(self, other: Self, signed: bool) -> (Self, Self);
}

macro_rules! word {
    ($ty:ty, $signed:ty, $wide:ty, $signed_wide:ty) => {
        impl Word for $ty {
            #[inline(always)]
            fn sum(self, other: Self, carry: bool) -> (Self, bool) {
                let (first, over) = self.overflowing_add(other);
                let (second, more) = first.overflowing_add(Self::from(carry));
                (second, over | more)
            }

            #[inline(always)]
            fn difference(self, other: Self, borrow: bool) -> (Self, bool) {
                let (first, under) = self.overflowing_sub(other);
                let (second, more) = first.overflowing_sub(Self::from(borrow));
                (second, under | more)
            }

            #[inline(always)]
            fn product(self, other: Self, signed: bool) -> (Self, Self) {
                let whole = if signed {
                    (<$signed_wide>::from(self as $signed) * <$signed_wide>::from(other as $signed)) as $wide
                } else {
                    <$wide>::from(self) * <$wide>::from(other)
                };
                (whole as Self, (whole >> Self::BITS) as Self)
            }
        }
    };
}

word!(u32, i32, u64, i64);
word!(u64, i64, u128, i128);

#[inline(always)]
fn carried<T: Word>(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
    f: impl Fn(T, T, bool) -> (T, bool),
) -> Flow {
    let (a, b) = (T::read(&core.warp.regs, inst.a), T::read(&core.warp.regs, inst.b));
    let undef = T::undef(&core.warp.regs, inst.a) | T::undef(&core.warp.regs, inst.b);
    finish_carried(core, inst, mask, &a, &b, undef, f)
}

/// `f(a, b, carry in)` into `d` and the carry flag.
#[inline(always)]
fn finish_carried<T: Word>(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
    a: &[T; 32],
    b: &[T; 32],
    mut undef: u32,
    f: impl Fn(T, T, bool) -> (T, bool),
) -> Flow {
    let warp = &mut *core.warp;
    let mut carry = 0;
    if inst.aux & CARRY_IN != 0 {
        carry = warp.carry;
        undef |= warp.undef_carry;
    }
    let mut out = [T::default(); 32];
    let mut over = 0;
    for lane in 0..32 {
        let (value, more) = f(a[lane], b[lane], carry >> lane & 1 == 1);
        out[lane] = value;
        over |= u32::from(more) << lane;
    }
    if inst.aux & CARRY_OUT != 0 {
        warp.carry = warp.carry & !mask | over & mask;
        warp.undef_carry = warp.undef_carry & !mask | undef & mask | warp.regs.poison;
    }
    T::write(&mut warp.regs, inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn carried_sum<T: Word>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    carried(core, inst, mask, T::sum)
}

#[inline(always)]
fn carried_difference<T: Word>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    carried(core, inst, mask, T::difference)
}

/// `mad.{lo,hi}.cc` and `madc`: the carry is that of the addition.
#[inline(always)]
fn carried_product<T: Word, const HIGH: bool, const SIGNED: bool>(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
) -> Flow {
    let regs = &core.warp.regs;
    let (a, b, c) = (T::read(regs, inst.a), T::read(regs, inst.b), T::read(regs, inst.c));
    let undef = T::undef(regs, inst.a) | T::undef(regs, inst.b) | T::undef(regs, inst.c);
    let mut part = [T::default(); 32];
    for lane in 0..32 {
        let (low, high) = a[lane].product(b[lane], SIGNED);
        part[lane] = if HIGH { high } else { low };
    }
    finish_carried(core, inst, mask, &part, &c, undef, T::sum)
}

// ---- products

fn product(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let part = m.take_any(&["lo", "hi", "wide"]).ok_or("lo, hi or wide is missing")?;
    let carry_out = m.take("cc");
    let carry_in = i.opcode == "madc";
    let saturate = m.take("sat");
    let ty = m.ty()?;
    m.finish()?;
    let with_sum = i.opcode != "mul";
    if carry_in || carry_out {
        if !with_sum || saturate {
            return Err("only mad has a carry, and not with .sat".to_owned());
        }
        let exec: Exec = match (ty, part) {
            (Ty::U32 | Ty::S32, "lo") => crate::both!(carried_product::<u32, false, false>),
            (Ty::U64 | Ty::S64, "lo") => crate::both!(carried_product::<u64, false, false>),
            (Ty::U32, "hi") => crate::both!(carried_product::<u32, true, false>),
            (Ty::S32, "hi") => crate::both!(carried_product::<u32, true, true>),
            (Ty::U64, "hi") => crate::both!(carried_product::<u64, true, false>),
            (Ty::S64, "hi") => crate::both!(carried_product::<u64, true, true>),
            _ => return Err(no_type(i, ty)),
        };
        let inst = build(d, i, exec, Class::Int, ty, &[ty, ty, ty])?;
        return Ok(Inst { aux: carry_flags(carry_in, carry_out), ..inst });
    }
    if saturate {
        if !(with_sum && part == "hi" && ty == Ty::S32) {
            return Err(".sat needs mad.hi.s32".to_owned());
        }
        let exec = map3(|a: i32, b: i32, c: i32| high_s32(a, b).saturating_add(c));
        return build(d, i, exec, Class::Int, ty, &[ty, ty, ty]);
    }
    if part == "wide" {
        let (exec, to): (Exec, Ty) = match (ty, with_sum) {
            (Ty::U16, false) => (map2(|a: u16, b: u16| u32::from(a) * u32::from(b)), Ty::U32),
            (Ty::S16, false) => (map2(|a: i16, b: i16| i32::from(a) * i32::from(b)), Ty::S32),
            (Ty::U32, false) => (map2(|a: u32, b: u32| u64::from(a) * u64::from(b)), Ty::U64),
            (Ty::S32, false) => (map2(|a: i32, b: i32| i64::from(a) * i64::from(b)), Ty::S64),
            (Ty::U16, true) => {
                (map3(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c)), Ty::U32)
            }
            (Ty::S16, true) => {
                (map3(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c)), Ty::S32)
            }
            (Ty::U32, true) => {
                (map3(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)), Ty::U64)
            }
            (Ty::S32, true) => {
                (map3(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c)), Ty::S64)
            }
            _ => return Err(no_type(i, ty)),
        };
        let from = [ty, ty, to];
        return build(d, i, exec, Class::Int, to, if with_sum { &from } else { &from[..2] });
    }
    let exec = match (part, with_sum) {
        ("lo", false) => by_int!(i, ty, map2(|a: T, b: T| a.wrapping_mul(b))),
        ("lo", true) => by_int!(i, ty, map3(|a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c))),
        (_, false) => match ty {
            Ty::U16 => map2(high_u16),
            Ty::S16 => map2(high_s16),
            Ty::U32 => map2(high_u32),
            Ty::S32 => map2(high_s32),
            Ty::U64 => map2(high_u64),
            Ty::S64 => map2(high_s64),
            _ => return Err(no_type(i, ty)),
        },
        (_, true) => match ty {
            Ty::U16 => map3(|a, b, c: u16| high_u16(a, b).wrapping_add(c)),
            Ty::S16 => map3(|a, b, c: i16| high_s16(a, b).wrapping_add(c)),
            Ty::U32 => map3(|a, b, c: u32| high_u32(a, b).wrapping_add(c)),
            Ty::S32 => map3(|a, b, c: i32| high_s32(a, b).wrapping_add(c)),
            Ty::U64 => map3(|a, b, c: u64| high_u64(a, b).wrapping_add(c)),
            Ty::S64 => map3(|a, b, c: i64| high_s64(a, b).wrapping_add(c)),
            _ => return Err(no_type(i, ty)),
        },
    };
    build(d, i, exec, Class::Int, ty, &[ty; 3][..if with_sum { 3 } else { 2 }])
}

macro_rules! high {
    ($name:ident, $ty:ty, $wide:ty) => {
        /// Upper half of the product.
        #[inline(always)]
        fn $name(a: $ty, b: $ty) -> $ty {
            ((<$wide>::from(a) * <$wide>::from(b)) >> <$ty>::BITS) as $ty
        }
    };
}

high!(high_u16, u16, u32);
high!(high_s16, i16, i32);
high!(high_u32, u32, u64);
high!(high_s32, i32, i64);
high!(high_u64, u64, u128);
high!(high_s64, i64, i128);

/// The low 24 bits as a number.
#[inline(always)]
fn u24(a: u32) -> u64 {
    u64::from(a & 0xff_ffff)
}

/// The low 24 bits as a signed number.
#[inline(always)]
fn s24(a: i32) -> i64 {
    i64::from(a << 8 >> 8)
}

/// `.lo` are bits 0 to 31 of the 48-bit product, `.hi` bits 16 to 47.
fn product24(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let high = m.take_any(&["lo", "hi"]).ok_or("lo or hi is missing")? == "hi";
    let saturate = m.take("sat");
    let ty = m.ty()?;
    m.finish()?;
    let with_sum = i.opcode == "mad24";
    let exec: Exec = match (ty, high, with_sum, saturate) {
        (Ty::U32, false, false, false) => map2(|a: u32, b: u32| (u24(a) * u24(b)) as u32),
        (Ty::U32, true, false, false) => map2(|a: u32, b: u32| ((u24(a) * u24(b)) >> 16) as u32),
        (Ty::S32, false, false, false) => map2(|a: i32, b: i32| (s24(a) * s24(b)) as i32),
        (Ty::S32, true, false, false) => map2(|a: i32, b: i32| ((s24(a) * s24(b)) >> 16) as i32),
        (Ty::U32, false, true, false) => {
            map3(|a: u32, b: u32, c: u32| ((u24(a) * u24(b)) as u32).wrapping_add(c))
        }
        (Ty::U32, true, true, false) => {
            map3(|a: u32, b: u32, c: u32| (((u24(a) * u24(b)) >> 16) as u32).wrapping_add(c))
        }
        (Ty::S32, false, true, false) => {
            map3(|a: i32, b: i32, c: i32| ((s24(a) * s24(b)) as i32).wrapping_add(c))
        }
        (Ty::S32, true, true, false) => {
            map3(|a: i32, b: i32, c: i32| (((s24(a) * s24(b)) >> 16) as i32).wrapping_add(c))
        }
        (Ty::S32, true, true, true) => {
            map3(|a: i32, b: i32, c: i32| (((s24(a) * s24(b)) >> 16) as i32).saturating_add(c))
        }
        (_, _, _, true) => return Err(".sat needs mad24.hi.s32".to_owned()),
        _ => return Err(no_type(i, ty)),
    };
    build(d, i, exec, Class::Int, ty, &[ty; 3][..if with_sum { 3 } else { 2 }])
}

// ---- division

/// Division by zero gives all ones, quotient and remainder, as the code that ptxas makes for it does.
fn quotient(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    let exec = if i.opcode == "div" {
        by_int!(i, ty, divided(|a: T, b: T| if b == 0 { !0 } else { a.wrapping_div(b) }))
    } else {
        by_int!(i, ty, divided(|a: T, b: T| if b == 0 { !0 } else { a.wrapping_rem(b) }))
    };
    build(d, i, exec, Class::Int, ty, &[ty, ty])
}

fn divided<T: Lane + PartialEq, F: Fn(T, T) -> T + Copy + 'static>(_: F) -> Exec {
    fn run<T: Lane + PartialEq, F: Fn(T, T) -> T + Copy + 'static>(
        core: &mut Core<'_>,
        inst: &Inst,
        mask: u32,
    ) -> Flow {
        let f = conjure::<F>();
        let regs = &mut core.warp.regs;
        let (a, b) = (T::read(regs, inst.a), T::read(regs, inst.b));
        let unknown = T::undef(regs, inst.b);
        let mut out = [T::default(); 32];
        let mut zero = 0;
        for lane in 0..32 {
            zero |= u32::from(b[lane] == T::default()) << lane;
            out[lane] = f(a[lane], b[lane]);
        }
        let undef = T::undef(regs, inst.a) | unknown;
        T::write(regs, inst.d, &out, mask, undef);
        zero &= mask & !unknown;
        if zero != 0 {
            let lines = vec!["Misuse: integer division by zero".to_owned()];
            return core.find(Check::Misuse, Fault::LaunchFailed, inst, zero, lines);
        }
        Flow::Next
    }
    run::<T, F>
}

// ---- smaller, larger, sign

fn extreme(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let relu = m.take("relu");
    let least = i.opcode == "min";
    if let Some(signed) = packed(&mut m) {
        m.finish()?;
        let exec = match (signed, least, relu) {
            (false, true, false) => pair2(|a: u16, b: u16| a.min(b)),
            (false, false, false) => pair2(|a: u16, b: u16| a.max(b)),
            (true, true, false) => pair2(|a: u16, b: u16| (a as i16).min(b as i16) as u16),
            (true, false, false) => pair2(|a: u16, b: u16| (a as i16).max(b as i16) as u16),
            (true, true, true) => pair2(|a: u16, b: u16| (a as i16).min(b as i16).max(0) as u16),
            (true, false, true) => pair2(|a: u16, b: u16| (a as i16).max(b as i16).max(0) as u16),
            (false, _, true) => return Err(".relu needs a signed type".to_owned()),
        };
        return build(d, i, exec, Class::Int, PAIR, &[PAIR, PAIR]);
    }
    let ty = m.ty()?;
    m.finish()?;
    let exec = match (least, relu) {
        (true, false) => by_int!(i, ty, map2(|a: T, b: T| a.min(b))),
        (false, false) => by_int!(i, ty, map2(|a: T, b: T| a.max(b))),
        (true, true) if ty == Ty::S32 => map2(|a: i32, b: i32| a.min(b).max(0)),
        (false, true) if ty == Ty::S32 => map2(|a: i32, b: i32| a.max(b).max(0)),
        (_, true) => return Err(".relu needs .s32 or .s16x2".to_owned()),
    };
    build(d, i, exec, Class::Int, ty, &[ty, ty])
}

fn sign(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    if i.opcode == "neg" && m.take("s16x2") {
        m.finish()?;
        return build(d, i, pair1(u16::wrapping_neg), Class::Int, PAIR, &[PAIR]);
    }
    let ty = m.ty()?;
    m.finish()?;
    let exec = if i.opcode == "abs" {
        by_type!(i, ty, [S16 i16, S32 i32, S64 i64], map1(|a: T| a.wrapping_abs()))
    } else {
        by_type!(i, ty, [S16 i16, S32 i32, S64 i64], map1(|a: T| a.wrapping_neg()))
    };
    build(d, i, exec, Class::Int, ty, &[ty])
}

/// `d = c + |a - b|`.
fn sad(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    let exec = by_int!(i, ty, map3(|a: T, b: T, c: T| c.wrapping_add(a.max(b).wrapping_sub(a.min(b)))));
    build(d, i, exec, Class::Int, ty, &[ty, ty, ty])
}

// ---- dot products

/// Byte `n` as a signed or unsigned number.
#[inline(always)]
fn byte<const SIGNED: bool>(word: u32, n: u32) -> i32 {
    let byte = (word >> (8 * n)) as u8;
    if SIGNED { i32::from(byte as i8) } else { i32::from(byte) }
}

/// Half `n` as a signed or unsigned number.
#[inline(always)]
fn half<const SIGNED: bool>(word: u32, n: u32) -> i32 {
    let half = (word >> (16 * n)) as u16;
    if SIGNED { i32::from(half as i16) } else { i32::from(half) }
}

#[inline(always)]
fn dot4<const A: bool, const B: bool>(a: u32, b: u32, c: i32) -> i32 {
    let mut sum = c;
    for n in 0..4 {
        sum = sum.wrapping_add(byte::<A>(a, n) * byte::<B>(b, n));
    }
    sum
}

#[inline(always)]
fn dot2<const A: bool, const B: bool>(a: u32, b: u32, c: i32, first: u32) -> i32 {
    let low = half::<A>(a, 0) * byte::<B>(b, first);
    let high = half::<A>(a, 1) * byte::<B>(b, first + 1);
    c.wrapping_add(low).wrapping_add(high)
}

fn dot(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let first = if i.opcode == "dp2a" {
        Some(if m.take_any(&["lo", "hi"]).ok_or("lo or hi is missing")? == "hi" { 2 } else { 0 })
    } else {
        None
    };
    let mut signed = || match m.ty()? {
        Ty::U32 => Ok(false),
        Ty::S32 => Ok(true),
        other => Err(no_type(i, other)),
    };
    let (a, b) = (signed()?, signed()?);
    m.finish()?;
    let exec = match (first, a, b) {
        (None, false, false) => map3(dot4::<false, false>),
        (None, false, true) => map3(dot4::<false, true>),
        (None, true, false) => map3(dot4::<true, false>),
        (None, true, true) => map3(dot4::<true, true>),
        (Some(0), false, false) => map3(|a, b, c| dot2::<false, false>(a, b, c, 0)),
        (Some(0), false, true) => map3(|a, b, c| dot2::<false, true>(a, b, c, 0)),
        (Some(0), true, false) => map3(|a, b, c| dot2::<true, false>(a, b, c, 0)),
        (Some(0), true, true) => map3(|a, b, c| dot2::<true, true>(a, b, c, 0)),
        (Some(_), false, false) => map3(|a, b, c| dot2::<false, false>(a, b, c, 2)),
        (Some(_), false, true) => map3(|a, b, c| dot2::<false, true>(a, b, c, 2)),
        (Some(_), true, false) => map3(|a, b, c| dot2::<true, false>(a, b, c, 2)),
        (Some(_), true, true) => map3(|a, b, c| dot2::<true, true>(a, b, c, 2)),
    };
    build(d, i, exec, Class::Int, Ty::U32, &[Ty::U32; 3])
}

// ---- counting and finding bits

fn bits(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let shift = i.opcode == "bfind" && m.take("shiftamt");
    let ty = m.ty()?;
    m.finish()?;
    let exec = match (i.opcode.as_str(), ty) {
        ("popc", Ty::B32) => map1(|a: u32| a.count_ones()),
        ("popc", Ty::B64) => map1(|a: u64| a.count_ones()),
        ("clz", Ty::B32) => map1(|a: u32| a.leading_zeros()),
        ("clz", Ty::B64) => map1(|a: u64| a.leading_zeros()),
        ("brev", Ty::B32) => {
            return build(d, i, map1(u32::reverse_bits), Class::Int, ty, &[ty]);
        }
        ("brev", Ty::B64) => {
            return build(d, i, map1(u64::reverse_bits), Class::Int, ty, &[ty]);
        }
        // The most significant bit that is not a copy of the sign.
        ("bfind", Ty::U32) if shift => map1(|a: u32| shift_amount(a.leading_zeros(), 32)),
        ("bfind", Ty::S32) if shift => map1(|a: u32| shift_amount(unsigned32(a).leading_zeros(), 32)),
        ("bfind", Ty::U64) if shift => map1(|a: u64| shift_amount(a.leading_zeros(), 64)),
        ("bfind", Ty::S64) if shift => map1(|a: u64| shift_amount(unsigned64(a).leading_zeros(), 64)),
        ("bfind", Ty::U32) => map1(|a: u32| 31u32.wrapping_sub(a.leading_zeros())),
        ("bfind", Ty::S32) => map1(|a: u32| 31u32.wrapping_sub(unsigned32(a).leading_zeros())),
        ("bfind", Ty::U64) => map1(|a: u64| 63u32.wrapping_sub(a.leading_zeros())),
        ("bfind", Ty::S64) => map1(|a: u64| 63u32.wrapping_sub(unsigned64(a).leading_zeros())),
        _ => return Err(no_type(i, ty)),
    };
    build(d, i, exec, Class::Int, Ty::U32, &[ty])
}

#[inline(always)]
fn shift_amount(zeros: u32, width: u32) -> u32 {
    if zeros == width { u32::MAX } else { zeros }
}

/// A negative number complemented: its bits that differ from the sign are one.
#[inline(always)]
fn unsigned32(a: u32) -> u32 {
    a ^ (a as i32 >> 31) as u32
}

#[inline(always)]
fn unsigned64(a: u64) -> u64 {
    a ^ (a as i64 >> 63) as u64
}

/// The position of the n-th set bit, counted from `base` upwards or downwards.
fn fns(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    if ty != Ty::B32 {
        return Err(no_type(i, ty));
    }
    let exec = map3(|bits: u32, base: u32, offset: i32| {
        let step = if offset < 0 { -1 } else { 1 };
        let mut left = offset.unsigned_abs().max(1);
        let mut at = i64::from(base);
        while (0..32).contains(&at) {
            if bits >> at & 1 == 1 {
                left -= 1;
                if left == 0 {
                    return at as u32;
                }
            }
            if offset == 0 {
                break;
            }
            at += step;
        }
        u32::MAX
    });
    build(d, i, exec, Class::Int, Ty::B32, &[Ty::B32, Ty::B32, Ty::S32])
}
