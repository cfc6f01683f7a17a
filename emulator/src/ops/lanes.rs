//! Turns a scalar function into an instruction over 32 lanes.
//!
//! `map2(|a: u32, b: u32| a.wrapping_add(b))` gives the [`Exec`] of `add.u32`: it reads slots `a` and `b`, writes slot `d`, and
//! marks a result undefined where a source is. Each body is compiled twice, for AVX2 + FMA + F16C and for the baseline, and the
//! right one is chosen when the kernel is decoded: the loops vectorise and `mul_add` is one instruction.

use crate::machine::core::Core;
use crate::machine::inst::{Exec, Flow, Inst};
use crate::machine::regs::Regs;

/// A value a lane can hold: knows its slot file.
pub trait Lane: Copy + Default + 'static {
    /// All 32 lanes of a slot.
    fn read(regs: &Regs, slot: u32) -> [Self; 32];
    /// Writes the lanes of `mask`; `undef` are the undefined lanes.
    fn write(regs: &mut Regs, slot: u32, value: &[Self; 32], mask: u32, undef: u32);
    /// Undefined lanes of a slot, as far as this type reads it.
    fn undef(regs: &Regs, slot: u32) -> u32;
}

macro_rules! lane {
    ($ty:ty, $get:ident, $put:ident, $raw:ty, $undef:ident, $from:expr, $to:expr) => {
        impl Lane for $ty {
            #[inline(always)]
            fn read(regs: &Regs, slot: u32) -> [Self; 32] {
                let raw = regs.$get(slot);
                let mut out = [Self::default(); 32];
                for lane in 0..32 {
                    out[lane] = $from(raw[lane]);
                }
                out
            }

            #[inline(always)]
            fn write(regs: &mut Regs, slot: u32, value: &[Self; 32], mask: u32, undef: u32) {
                let mut raw = [<$raw>::default(); 32];
                for lane in 0..32 {
                    raw[lane] = $to(value[lane]);
                }
                regs.$put(slot, &raw, mask, [undef; 2]);
            }

            #[inline(always)]
            fn undef(regs: &Regs, slot: u32) -> u32 {
                regs.$undef(slot)
            }
        }
    };
}

lane!(u32, get32, put32, u32, any_undef32, |v: u32| v, |v: u32| v);
lane!(i32, get32, put32, u32, any_undef32, |v: u32| v as i32, |v: i32| v as u32);
lane!(f32, get32, put32, u32, any_undef32, f32::from_bits, f32::to_bits);
lane!(u64, get64, put64, u64, any_undef64, |v: u64| v, |v: u64| v);
lane!(i64, get64, put64, u64, any_undef64, |v: u64| v as i64, |v: i64| v as u64);
lane!(f64, get64, put64, u64, any_undef64, f64::from_bits, f64::to_bits);

macro_rules! low_half {
    ($ty:ty) => {
        impl Lane for $ty {
            #[inline(always)]
            fn read(regs: &Regs, slot: u32) -> [Self; 32] {
                let raw = regs.get32(slot);
                let mut out = [Self::default(); 32];
                for lane in 0..32 {
                    out[lane] = raw[lane] as $ty;
                }
                out
            }

            #[inline(always)]
            fn write(regs: &mut Regs, slot: u32, value: &[Self; 32], mask: u32, undef: u32) {
                let mut raw = [0; 32];
                for lane in 0..32 {
                    raw[lane] = u32::from(value[lane] as u16);
                }
                regs.put32(slot, &raw, mask, [undef, 0]);
            }

            #[inline(always)]
            fn undef(regs: &Regs, slot: u32) -> u32 {
                regs.undef32[slot as usize][0]
            }
        }
    };
}

low_half!(u16);
low_half!(i16);

/// Two 16-bit values in one 32-bit slot, low half first; each half is undefined by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair(pub u16, pub u16);

/// Makes a value of a type that has only one.
#[inline(always)]
#[expect(clippy::uninit_assumed_init, reason = "a value without bytes is never uninitialised")]
pub(crate) fn conjure<F: Copy + 'static>() -> F {
    const { assert!(size_of::<F>() == 0, "an instruction's function must not capture anything") };
    // SAFETY: F has no bytes, so there is nothing to initialise, and it is Copy; every caller was handed a value of it before.
    unsafe { std::mem::MaybeUninit::<F>::uninit().assume_init() }
}

/// The processor has what the second compilation of each body needs.
pub fn fast_processor() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Compiles `$body` (an `#[inline(always)]` function with [`Exec`]'s signature) for both processors and picks one.
#[macro_export]
macro_rules! both {
    ($body:expr) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
        fn fast(
            core: &mut $crate::machine::core::Core<'_>,
            inst: &$crate::machine::inst::Inst,
            mask: u32,
        ) -> $crate::machine::inst::Flow {
            $body(core, inst, mask)
        }
        fn plain(
            core: &mut $crate::machine::core::Core<'_>,
            inst: &$crate::machine::inst::Inst,
            mask: u32,
        ) -> $crate::machine::inst::Flow {
            $body(core, inst, mask)
        }
        #[cfg(target_arch = "x86_64")]
        let chosen: $crate::machine::inst::Exec =
            if $crate::ops::lanes::fast_processor() { fast } else { plain };
        #[cfg(not(target_arch = "x86_64"))]
        let chosen: $crate::machine::inst::Exec = plain;
        chosen
    }};
}

macro_rules! mapper {
    ($name:ident, $body:ident, $fast:ident, $plain:ident, ($($src:ident $value:ident $field:ident),+), $doc:literal) => {
        #[doc = $doc]
        pub fn $name<$($src: Lane,)+ D: Lane, F: Fn($($src),+) -> D + Copy + 'static>(_: F) -> Exec {
            #[cfg(target_arch = "x86_64")]
            if fast_processor() {
                return $fast::<$($src,)+ D, F>;
            }
            $plain::<$($src,)+ D, F>
        }

        #[inline(always)]
        fn $body<$($src: Lane,)+ D: Lane, F: Fn($($src),+) -> D + Copy + 'static>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            let f = conjure::<F>();
            let regs = &mut core.warp.regs;
            $(let $value = $src::read(regs, inst.$field);)+
            let undef = if regs.track { 0 $(| $src::undef(regs, inst.$field))+ } else { 0 };
            let mut out = [D::default(); 32];
            for lane in 0..32 {
                out[lane] = f($($value[lane]),+);
            }
            D::write(regs, inst.d, &out, mask, undef);
            Flow::Next
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
        fn $fast<$($src: Lane,)+ D: Lane, F: Fn($($src),+) -> D + Copy + 'static>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            $body::<$($src,)+ D, F>(core, inst, mask)
        }

        fn $plain<$($src: Lane,)+ D: Lane, F: Fn($($src),+) -> D + Copy + 'static>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            $body::<$($src,)+ D, F>(core, inst, mask)
        }
    };
}

mapper!(map1, body1, fast1, plain1, (A va a), "`d = f(a)`.");
mapper!(map2, body2, fast2, plain2, (A va a, B vb b), "`d = f(a, b)`.");
mapper!(map3, body3, fast3, plain3, (A va a, B vb b, C vc c), "`d = f(a, b, c)`.");
mapper!(map4, body4, fast4, plain4, (A va a, B vb b, C vc c, E ve e), "`d = f(a, b, c, e)`.");

macro_rules! pair_mapper {
    ($name:ident, $body:ident, $fast:ident, $plain:ident, ($($value:ident $field:ident $ty:ident),+), $doc:literal) => {
        #[doc = $doc]
        pub fn $name<F: Fn($($ty),+) -> u16 + Copy + 'static>(_: F) -> Exec {
            #[cfg(target_arch = "x86_64")]
            if fast_processor() {
                return $fast::<F>;
            }
            $plain::<F>
        }

        #[inline(always)]
        fn $body<F: Fn($($ty),+) -> u16 + Copy + 'static>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            let f = conjure::<F>();
            let regs = &mut core.warp.regs;
            $(let $value = *regs.get32(inst.$field);)+
            let mut undef = [0; 2];
            if regs.track {
                $(let u = regs.undef32[inst.$field as usize]; undef[0] |= u[0]; undef[1] |= u[1];)+
            }
            let mut out = [0; 32];
            for lane in 0..32 {
                let low = f($($value[lane] as u16),+);
                let high = f($(($value[lane] >> 16) as u16),+);
                out[lane] = u32::from(low) | u32::from(high) << 16;
            }
            regs.put32(inst.d, &out, mask, undef);
            Flow::Next
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
        fn $fast<F: Fn($($ty),+) -> u16 + Copy + 'static>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            $body::<F>(core, inst, mask)
        }

        fn $plain<F: Fn($($ty),+) -> u16 + Copy + 'static>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            $body::<F>(core, inst, mask)
        }
    };
}

pair_mapper!(pair1, pair_body1, pair_fast1, pair_plain1, (va a u16), "`d = f(a)` on both 16-bit halves.");
pair_mapper!(pair2, pair_body2, pair_fast2, pair_plain2, (va a u16, vb b u16), "`d = f(a, b)` on both 16-bit halves.");
pair_mapper!(pair3, pair_body3, pair_fast3, pair_plain3, (va a u16, vb b u16, vc c u16), "`d = f(a, b, c)` on both 16-bit halves.");

macro_rules! test_mapper {
    ($name:ident, $body:ident, $fast:ident, $plain:ident, ($($src:ident $value:ident $field:ident),+), $doc:literal) => {
        #[doc = $doc]
        pub fn $name<$($src: Lane,)+ F: Fn($($src),+) -> bool + Copy + 'static>(_: F) -> Test {
            #[cfg(target_arch = "x86_64")]
            if fast_processor() {
                return $fast::<$($src,)+ F>;
            }
            $plain::<$($src,)+ F>
        }

        #[inline(always)]
        fn $body<$($src: Lane,)+ F: Fn($($src),+) -> bool + Copy + 'static>(regs: &Regs, inst: &Inst) -> (u32, u32) {
            let f = conjure::<F>();
            $(let $value = $src::read(regs, inst.$field);)+
            let undef = if regs.track { 0 $(| $src::undef(regs, inst.$field))+ } else { 0 };
            let mut out = 0;
            for lane in 0..32 {
                out |= u32::from(f($($value[lane]),+)) << lane;
            }
            (out, undef)
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
        fn $fast<$($src: Lane,)+ F: Fn($($src),+) -> bool + Copy + 'static>(regs: &Regs, inst: &Inst) -> (u32, u32) {
            $body::<$($src,)+ F>(regs, inst)
        }

        fn $plain<$($src: Lane,)+ F: Fn($($src),+) -> bool + Copy + 'static>(regs: &Regs, inst: &Inst) -> (u32, u32) {
            $body::<$($src,)+ F>(regs, inst)
        }
    };
}

/// A comparison of sources: the lanes where it holds and the lanes where it is undefined.
pub type Test = unsafe fn(&Regs, &Inst) -> (u32, u32);

test_mapper!(test1, test_body1, test_fast1, test_plain1, (A va a), "A condition on `a`.");
test_mapper!(test2, test_body2, test_fast2, test_plain2, (A va a, B vb b), "A condition on `a` and `b`.");
