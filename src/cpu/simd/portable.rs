//! Arrays that the compiler turns into vector registers of whatever target it is given.

use super::{Kernel, Simd};

/// Runs a kernel.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Portable)
}

/// Eight values: two registers of NEON or SSE2.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; 8];

#[inline(always)]
fn map(a: V, f: impl Fn(f32) -> f32) -> V {
    a.map(f)
}

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = V;
    type Wide = [f64; 4];

    const LANES: usize = 8;
    const ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; 8]
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    /// Fused where the target has the instruction; without it a fused one would be a call of a function.
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn least(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn largest(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn abs(self, a: V) -> V {
        map(a, f32::abs)
    }

    #[inline(always)]
    fn copysign(self, a: V, b: V) -> V {
        zip(a, b, f32::copysign)
    }

    #[inline(always)]
    fn where_less(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }

    /// Adding 1.5·2²³ rounds to the nearest whole number, for magnitudes below 2²²: the exponents that `exp` asks for.
    #[inline(always)]
    fn round(self, a: V) -> V {
        map(a, |a| (a + 12_582_912.0) - 12_582_912.0)
    }

    #[inline(always)]
    fn power_of_two(self, n: V) -> V {
        map(n, |n| f32::from_bits((n + 12_582_912.0).to_bits().wrapping_add(127) << 23))
    }

    #[inline(always)]
    fn power_of_rounded(self, sum: V) -> V {
        map(sum, |sum| f32::from_bits(sum.to_bits() << 23))
    }

    #[inline(always)]
    fn wide_zero(self) -> [f64; 4] {
        [0.0; 4]
    }

    #[inline(always)]
    fn wide_sub(self, a: [f64; 4], b: [f64; 4]) -> [f64; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }

    /// As [`Simd::fma`] of this.
    #[inline(always)]
    fn wide_fma(self, a: [f64; 4], b: [f64; 4], c: [f64; 4]) -> [f64; 4] {
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn wide_sum(self, v: [f64; 4]) -> f64 {
        (v[0] + v[2]) + (v[1] + v[3])
    }

    #[inline(always)]
    unsafe fn widen(self, from: *const f32) -> [f64; 4] {
        // SAFETY: the caller's promise; arrays of f32 are aligned as f32 are.
        unsafe { from.cast::<[f32; 4]>().read() }.map(f64::from)
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> V {
        // SAFETY: the caller's promise; arrays of f32 are aligned as f32 are.
        unsafe { from.cast::<V>().read() }
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, v: V) {
        // SAFETY: as above.
        unsafe { to.cast::<V>().write(v) }
    }
}
