//! Vector registers: one interface, an implementation per instruction set, and the dispatch between them.
//!
//! A kernel is written once over [`Simd`] and compiled for each instruction set: [`Kernels::run`] enters the function
//! that carries the compiler's target features, into which everything marked `inline(always)` is inlined.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod gelu;
pub(super) mod math;
mod portable;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use avx512::Avx512;

use crate::{Error, Result};

/// What the processor's vector units are asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Instructions {
    /// AVX-512 (F, VL, DQ and BW): 16 values at a time.
    Avx512,
    /// AVX2 with fused multiply-add: 8 values at a time.
    Avx2,
    /// Whatever the compiler makes of arrays for the target it was given: NEON on aarch64, SSE2 on `x86_64`.
    Portable,
}

impl Instructions {
    /// All there are, the widest first.
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Portable];

    /// The widest that this processor has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().find(|instructions| instructions.available()).unwrap_or(Self::Portable)
    }

    /// Whether this processor has them.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && Self::Avx2.available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }

    /// The name, as messages and reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    pub(super) fn checked(self) -> Result<Kernels> {
        if self.available() {
            return Ok(Kernels(self));
        }
        Err(Error::argument("instructions", format!("this processor has no {}; use portable", self.name())))
    }
}

/// Instructions that this processor has: only [`Instructions::checked`] and [`Kernels::detect`] make one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels(Instructions);

/// Something to do with vectors.
pub(super) trait Kernel {
    /// What comes of it.
    type Output;

    /// Does it. Implementations are `inline(always)`: only inlined code is compiled for the instruction set.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

impl Kernels {
    /// The widest that this processor has.
    pub(super) fn detect() -> Self {
        Self(Instructions::detect())
    }

    pub(super) fn name(self) -> Instructions {
        self.0
    }

    /// Rows of a product's tile.
    pub(super) fn tile_rows(self) -> usize {
        struct Ask;
        impl Kernel for Ask {
            type Output = usize;

            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                S::ROWS
            }
        }
        self.run(Ask)
    }

    /// Runs a kernel with these instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a value of this type exists only if the processor has the instructions.
            Instructions::Avx512 => unsafe { avx512::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::Avx2 => unsafe { avx2::run(kernel) },
            _ => portable::run(kernel),
        }
    }
}

/// What is added to a small number to round it to a whole one: 1.5·2^23, and 127 so that the sum's lowest bits are the exponent of
/// `2^n`.
const ROUNDER: f32 = 12_582_912.0 + 127.0;

/// A vector register of `f32` and what it can do. A value of the type is proof that the processor can.
///
/// `least` and `largest` return their second argument where either is NaN.
pub(super) trait Simd: Copy {
    /// A register.
    type V: Copy;
    /// A register of half as many `f64`.
    type Wide: Copy;

    /// Values in it, at most 16.
    const LANES: usize;
    /// Rows of a product's tile: as many as leave registers for two vectors of the right factor and a value of the left.
    const ROWS: usize;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a/b`, to within 1 unit in the last place.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a/b`, rounded to nearest, where `r` is `1/b`, so rounded, and neither of the three is near the ends of the range.
    #[inline(always)]
    fn quotient(self, a: Self::V, b: Self::V, r: Self::V) -> Self::V {
        let _ = r;
        self.div(a, b)
    }
    /// `a·b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn least(self, a: Self::V, b: Self::V) -> Self::V;
    fn largest(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// The magnitude of `a` with the sign of `b`.
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V;
    /// `yes` where `a < b`, else `no`.
    fn where_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// The nearest whole number, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` of whole numbers from -126 to 127.
    fn power_of_two(self, n: Self::V) -> Self::V;
    /// `2^n` of whole numbers from -126 to 127, to which [`ROUNDER`] was added; anything for others.
    fn power_of_rounded(self, sum: Self::V) -> Self::V;

    /// `x·Φ(x)`, Φ the normal distribution.
    #[inline(always)]
    fn gelu(self, x: Self::V) -> Self::V {
        math::gelu(self, x)
    }

    fn wide_zero(self) -> Self::Wide;
    fn wide_sub(self, a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// `a·b + c`.
    fn wide_fma(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide;
    /// The sum of all values.
    fn wide_sum(self, v: Self::Wide) -> f64;
    /// Half a register's values as `f64`.
    ///
    /// # Safety
    /// `LANES/2` values can be read from `from`.
    unsafe fn widen(self, from: *const f32) -> Self::Wide;

    /// # Safety
    /// `LANES` values can be read from `from`.
    unsafe fn read(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` values can be written to `to`.
    unsafe fn write(self, to: *mut f32, v: Self::V);

    /// Asks for the cache line at `at`, to be written to. Any address will do.
    #[inline(always)]
    fn expect_write(self, at: *const f32) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint and touches nothing; the instruction is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(at.cast());
        }
        let _ = at;
    }

    /// Asks for the cache line at `at`, to be read. Any address will do.
    #[inline(always)]
    fn expect_read(self, at: *const f32) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint and touches nothing; the instruction is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
        }
        let _ = at;
    }

    /// Asks for the cache line at `at`, to be read later on: it need not come nearer than the second-level cache. Any address will
    /// do.
    #[inline(always)]
    fn expect_read_soon(self, at: *const f32) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint and touches nothing; the instruction is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
        }
        let _ = at;
    }

    /// `to[j·to_stride + i] = from[i·from_stride + j]` for i and j below `LANES`.
    ///
    /// # Safety
    /// All of them can be read and written, and source and destination do not overlap.
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller's promise.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * from_stride + j) };
            }
        }
    }

    /// The first values of a slice.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::V {
        assert!(from.len() >= Self::LANES);
        // SAFETY: the slice is long enough.
        unsafe { self.read(from.as_ptr()) }
    }

    /// Into the front of a slice.
    #[inline(always)]
    fn store(self, to: &mut [f32], v: Self::V) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the slice is long enough.
        unsafe { self.write(to.as_mut_ptr(), v) }
    }

    /// A slice of at most `LANES` values, `rest` behind them.
    #[inline(always)]
    fn load_some(self, from: &[f32], rest: f32) -> Self::V {
        let mut all = [rest; 16];
        all[..from.len()].copy_from_slice(from);
        self.load(&all)
    }

    /// As many values as the slice holds, at most `LANES`.
    #[inline(always)]
    fn store_some(self, to: &mut [f32], v: Self::V) {
        let mut all = [0.0; 16];
        self.store(&mut all, v);
        to.copy_from_slice(&all[..to.len()]);
    }

    /// The sum of all values, in pairs.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut all = [0.0; 16];
        self.store(&mut all, v);
        let mut width = Self::LANES / 2;
        while width > 0 {
            for i in 0..width {
                all[i] += all[i + width];
            }
            width /= 2;
        }
        all[0]
    }

    /// The largest value; what NaN does is not said.
    #[inline(always)]
    fn maximum(self, v: Self::V) -> f32 {
        let mut all = [f32::NEG_INFINITY; 16];
        self.store(&mut all, v);
        all.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
    }
}
