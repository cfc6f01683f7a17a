//! The approximate functions of the special function unit, on f32, f16 and bf16.
//!
//! Values are computed in f64 and rounded once. Unless the configuration asks for exact values, an error is added before
//! the rounding: a hash of the argument picks a point between the bounds that the PTX manual documents, less what the
//! rounding itself can add. So a kernel that needs more accuracy than documented does not pass by luck, and results stay
//! the same from run to run. Powers of two, zeros and infinities are kept.

use super::approx_values::{exp2, log2, tanh};
use super::float::{canonical, flush, operands};
use super::half_bits::{bf16_to_f32, f16_to_f32, f64_to_bf16, f64_to_f16};
use super::half_float::flush_bf16;
use super::lanes::map1;
use crate::both;
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::ptx::ast::{Instruction, Ty};

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    if !matches!(i.opcode.as_str(), "ex2" | "lg2" | "sin" | "cos" | "tanh" | "rsqrt" | "rcp" | "sqrt" | "div")
    {
        return Ok(None);
    }
    let mut m = Mods::new(&i.modifiers);
    if !m.peek_ty().is_some_and(Ty::float) {
        return Ok(None);
    }
    let full = i.opcode == "div" && m.take("full");
    if !full && !m.take("approx") {
        return Err(format!("{} needs .approx", i.opcode));
    }
    let ftz = m.take("ftz");
    let ty = m.ty()?;
    m.finish()?;
    macro_rules! single {
        ($function:ident) => {
            if ftz { both!(one::<$function, true>) } else { both!(one::<$function, false>) }
        };
    }
    macro_rules! half {
        ($function:ident) => {
            match ty {
                Ty::F16 => both!(half::<$function, false, false>),
                Ty::F16x2 => both!(half::<$function, false, true>),
                Ty::BF16 => both!(half::<$function, true, false>),
                _ => both!(half::<$function, true, true>),
            }
        };
    }
    let exec = match (i.opcode.as_str(), ty) {
        ("ex2", Ty::F32) => single!(Exp2),
        ("lg2", Ty::F32) => single!(Log2),
        ("sin", Ty::F32) => single!(Sin),
        ("cos", Ty::F32) => single!(Cos),
        ("tanh", Ty::F32) if !ftz => single!(Tanh),
        ("rsqrt", Ty::F32) => single!(Rsqrt),
        ("rcp", Ty::F32) => single!(Reciprocal),
        ("sqrt", Ty::F32) => single!(Sqrt),
        ("div", Ty::F32) => match (full, ftz) {
            (true, true) => both!(quotient::<true, true>),
            (true, false) => both!(quotient::<true, false>),
            (false, true) => both!(quotient::<false, true>),
            (false, false) => both!(quotient::<false, false>),
        },
        ("ex2", Ty::F16 | Ty::F16x2) if !ftz => half!(Exp2),
        ("ex2", Ty::BF16 | Ty::BF16x2) if ftz => half!(Exp2),
        ("tanh", Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2) if !ftz => half!(Tanh),
        ("rcp", Ty::F64) if ftz => map1(|a: f64| gross(a, |x| 1.0 / x)),
        ("rsqrt", Ty::F64) if ftz => map1(|a: f64| gross(a, |x| 1.0 / x.sqrt())),
        ("rsqrt", Ty::F64) => map1(|a: f64| {
            let y = 1.0 / a.sqrt();
            if y.is_nan() { f64::from_bits(0x7fff_ffff_ffff_ffff) } else { y }
        }),
        _ => return Err(format!("{} does not exist in this form", i.opcode)),
    };
    let sources = if i.opcode == "div" { 2 } else { 1 };
    let width = if ty.size() == 4 { Ty::F32 } else { ty };
    Ok(Some(Inst { exec: exec as Exec, class: Class::Sfu, ..operands(d, i, width, sources)? }))
}

/// An approximated function.
trait Function: Copy {
    /// Its value, much more accurate than an f32.
    fn value(x: f32) -> f64;

    /// The largest error to add to the value `y` for f32 results.
    fn spread(x: f32, y: f64) -> f64;

    /// The bf16 form flushes subnormal results (it is `.ftz`).
    const FLUSHES_BF16: bool = false;

    /// [`Function::spread`] for f16 and bf16 results.
    fn spread16(_: f64, _brain: bool) -> f64 {
        0.0
    }
}

/// Errors relative to the result: what the manual allows less the rounding to f32 (`2^-24`).
const ROUND: f64 = 1.0 / 16_777_216.0;
/// 2^-22.5.
const EX2: f64 = 1.685_873_940_435_761_4e-7;
/// 2^-22.9.
const RSQRT: f64 = 1.277_653_530_283_325e-7;
/// 2^-22.6.
const LG2: f64 = 1.572_976_005_998_722_2e-7;
/// 2^-20.5.
const SIN: f64 = 6.743_495_761_743_046e-7;
/// 2^-14.7.
const SIN_FAR: f64 = 3.757_154_581_741_079_6e-5;
/// 2^-9.9, the bound of ex2 on f16.
const EX2_F16: f64 = 0.001_046_653_772_008_098_5;
/// 2^-10.987, the bound of tanh on f16.
const TANH_F16: f64 = 0.000_492_700_993_088_223_3;

#[derive(Clone, Copy)]
struct Exp2;

impl Function for Exp2 {
    const FLUSHES_BF16: bool = true;

    #[inline(always)]
    fn value(x: f32) -> f64 {
        exp2(f64::from(x))
    }

    #[inline(always)]
    fn spread(_: f32, y: f64) -> f64 {
        (EX2 - ROUND) * y
    }

    #[inline(always)]
    fn spread16(y: f64, brain: bool) -> f64 {
        // bf16: 2^-7 in all, of which rounding takes up to 2^-8.
        if brain { y * (1.0 / 256.0 - ROUND) } else { y * (EX2_F16 - 1.0 / 2048.0) }
    }
}

#[derive(Clone, Copy)]
struct Log2;

impl Function for Log2 {
    #[inline(always)]
    fn value(x: f32) -> f64 {
        log2(f64::from(x))
    }

    #[inline(always)]
    fn spread(x: f32, y: f64) -> f64 {
        // Absolute between 0.5 and 2, where results round to less than 2^-24; elsewhere relative, 2^-22.
        let near = LG2 - ROUND;
        let far = 3.0 * ROUND * y.abs();
        let spread = if x > 0.5 && x < 2.0 { near } else { far };
        // The logarithm of a power of two.
        if y == y.trunc() { 0.0 } else { spread }
    }
}

#[derive(Clone, Copy)]
struct Sin;

impl Function for Sin {
    fn value(x: f32) -> f64 {
        f64::from(x).sin()
    }

    fn spread(x: f32, y: f64) -> f64 {
        if y == 0.0 { 0.0 } else { circular(x) }
    }
}

#[derive(Clone, Copy)]
struct Cos;

impl Function for Cos {
    fn value(x: f32) -> f64 {
        f64::from(x).cos()
    }

    fn spread(x: f32, y: f64) -> f64 {
        if y == 1.0 { 0.0 } else { circular(x) }
    }
}

/// Absolute errors of sin and cos: documented within 2 pi and within 100 pi; beyond, the argument itself is reduced badly.
fn circular(x: f32) -> f64 {
    let x = f64::from(x).abs();
    if x <= std::f64::consts::TAU {
        SIN - ROUND
    } else if x <= 50.0 * std::f64::consts::TAU {
        SIN_FAR - ROUND
    } else {
        (x * 2.0 * ROUND).clamp(SIN_FAR, 1.0)
    }
}

#[derive(Clone, Copy)]
struct Tanh;

impl Function for Tanh {
    #[inline(always)]
    fn value(x: f32) -> f64 {
        tanh(f64::from(x))
    }

    #[inline(always)]
    fn spread(_: f32, y: f64) -> f64 {
        (1.0 / 2048.0 - ROUND) * y
    }

    #[inline(always)]
    fn spread16(y: f64, brain: bool) -> f64 {
        // bf16: 2^-8 in all, which is what rounding alone may take.
        if brain { 0.0 } else { y * (TANH_F16 - 1.0 / 4096.0) }
    }
}

#[derive(Clone, Copy)]
struct Rsqrt;

impl Function for Rsqrt {
    #[inline(always)]
    fn value(x: f32) -> f64 {
        // -0 gives -0 and so minus infinity, as the manual's table has it.
        1.0 / f64::from(x).sqrt()
    }

    #[inline(always)]
    fn spread(_: f32, y: f64) -> f64 {
        (RSQRT - ROUND) * y
    }
}

#[derive(Clone, Copy)]
struct Sqrt;

impl Function for Sqrt {
    #[inline(always)]
    fn value(x: f32) -> f64 {
        f64::from(x).sqrt()
    }

    #[inline(always)]
    fn spread(_: f32, y: f64) -> f64 {
        // 2^-23 in all.
        ROUND * y
    }
}

#[derive(Clone, Copy)]
struct Reciprocal;

impl Function for Reciprocal {
    #[inline(always)]
    fn value(x: f32) -> f64 {
        1.0 / f64::from(x)
    }

    #[inline(always)]
    fn spread(_: f32, y: f64) -> f64 {
        0.5 * last_place(y)
    }
}

/// What the last bit of an f32 near `y` is worth.
#[inline(always)]
fn last_place(y: f64) -> f64 {
    f64::from_bits(y.to_bits() & 0x7ff0_0000_0000_0000) * (2.0 * ROUND)
}

/// A number in [-1, 1] that depends on every bit.
#[inline(always)]
fn hash(bits: u32) -> f64 {
    let mut h = bits.wrapping_mul(0x9e37_79b1);
    h ^= h >> 15;
    h = h.wrapping_mul(0x85eb_ca6b);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^= h >> 16;
    f64::from(h as i32) * (1.0 / 2_147_483_648.0)
}

/// The value with its error. What has no bits after the first (zeros, powers of two, infinities) is kept.
#[inline(always)]
fn degraded(y: f64, spread: f64, bits: u32) -> f64 {
    let keep = y.to_bits() << 12 == 0;
    if keep { y } else { y + spread * hash(bits) }
}

#[inline(always)]
fn one<A: Function, const FTZ: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let source = *regs.get32(inst.a);
    let mut out = [0; 32];
    let arguments = source.map(|bits| if FTZ { flush(f32::from_bits(bits)) } else { f32::from_bits(bits) });
    let finish = |y: f64| {
        let y = canonical(y as f32);
        if FTZ { flush(y).to_bits() } else { y.to_bits() }
    };
    if core.config.degrade_approximations {
        for lane in 0..32 {
            let y = A::value(arguments[lane]);
            out[lane] = finish(degraded(y, A::spread(arguments[lane], y), source[lane]));
        }
    } else {
        for lane in 0..32 {
            out[lane] = finish(A::value(arguments[lane]));
        }
    }
    let undef = regs.any_undef32(inst.a);
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

/// One half, or both.
#[inline(always)]
fn half<A: Function, const BRAIN: bool, const PAIR: bool>(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
) -> Flow {
    let degrade = core.config.degrade_approximations;
    let compute = |h: u16| {
        let y = A::value(if BRAIN { bf16_to_f32(h) } else { f16_to_f32(h) });
        let y = if degrade { degraded(y, A::spread16(y, BRAIN), u32::from(h)) } else { y };
        let result = if BRAIN { f64_to_bf16(y) } else { f64_to_f16(y) };
        if BRAIN && A::FLUSHES_BF16 { flush_bf16(result) } else { result }
    };
    let regs = &mut core.warp.regs;
    let source = *regs.get32(inst.a);
    let mut out = [0; 32];
    for lane in 0..32 {
        let high = if PAIR { compute((source[lane] >> 16) as u16) } else { 0 };
        out[lane] = u32::from(compute(source[lane] as u16)) | u32::from(high) << 16;
    }
    let [low, high] = regs.undef32[inst.a as usize];
    regs.put32(inst.d, &out, mask, [low, if PAIR { high } else { 0 }]);
    Flow::Next
}

/// `div.approx` and `div.full`: within 2 units in the last place.
#[inline(always)]
fn quotient<const FULL: bool, const FTZ: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let degrade = core.config.degrade_approximations;
    let regs = &mut core.warp.regs;
    let (a, b) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        let [x, z] = [a[lane], b[lane]].map(f32::from_bits).map(|x| if FTZ { flush(x) } else { x });
        let y = f64::from(x) / f64::from(z);
        let spread = 1.5 * last_place(y);
        let y = if degrade { degraded(y, spread, a[lane] ^ b[lane].rotate_left(16)) } else { y };
        // Above 2^126 the reciprocal of a finite divisor counts as zero.
        let lost = !FULL && z.abs() > f32::from_bits(253 << 23) && z.is_finite();
        let y = if lost { f64::from(x * 0.0f32.copysign(z)) } else { y };
        let y = canonical(y as f32);
        out[lane] = if FTZ { flush(y).to_bits() } else { y.to_bits() };
    }
    let undef = regs.any_undef32(inst.a) | regs.any_undef32(inst.b);
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

/// The f64 forms with .ftz: the lower words of argument and result are left out, subnormals are zeros.
#[inline(always)]
fn gross(x: f64, function: impl Fn(f64) -> f64) -> f64 {
    const UPPER: u64 = 0xffff_ffff_0000_0000;
    let flush = |bits: u64| if bits & 0x7ff0 << 48 == 0 { bits & 1 << 63 } else { bits };
    // A NaN may have its payload in the lower word only.
    let bits = if x.is_nan() { 0x7fff_ffff_0000_0000 } else { flush(x.to_bits()) & UPPER };
    let y = function(f64::from_bits(bits));
    f64::from_bits(if y.is_nan() { 0x7fff_ffff_0000_0000 } else { flush(y.to_bits()) & UPPER })
}
