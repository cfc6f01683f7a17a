//! Elementary functions of vectors.

use super::{ROUNDER, Simd};
use crate::model::Activation;

/// `c[0] + c[1]·x + ...`.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, c: [f32; N]) -> S::V {
    let mut sum = s.splat(c[N - 1]);
    for c in c[..N - 1].iter().rev() {
        sum = s.fma(sum, x, s.splat(*c));
    }
    sum
}

/// `e^x` as `e^r·2^n` with a whole number n, which is in [-126, 128] for x in [-87.5, 89]: the first factor, and n.
#[inline(always)]
fn exp_parts<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts: the product with the first does not round.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // The polynomial of the Cephes library's expf.
    let p =
        polynomial(s, r, [5e-1, 1.666_666_6e-1, 4.166_579_6e-2, 8.333_452e-3, 1.398_2e-3, 1.987_569_1e-4]);
    (s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0)), n)
}

/// `e^x` of x ≤ 0 to within 2 units in the last place; 0 below -87.3, NaN for NaN. Softmax spends its time here: n stays in the sum
/// that rounded it, and nothing is kept within limits that is thrown away at the end.
#[inline(always)]
pub(in crate::cpu) fn exp_negative<S: Simd>(s: S, x: S::V) -> S::V {
    let rounded = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUNDER));
    let n = s.sub(rounded, s.splat(ROUNDER));
    // As in `exp_parts`.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // Fitted to the smallest relative error over half of ln 2 on either side, 3e-9, and exact at 0.
    let p =
        polynomial(s, r, [1.0, 1.0, 0.499_999_94, 0.166_665_21, 4.166_839e-2, 8.368_745e-3, 1.381_454e-3]);
    s.where_less(x, s.splat(-87.3), s.splat(0.0), s.mul(p, s.power_of_rounded(rounded)))
}

/// `e^x` to within 2 units in the last place; 0 below -87.3, infinite where it is no `f32`, NaN for NaN.
#[inline(always)]
pub(in crate::cpu) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let (e, n) = exp_parts(s, s.largest(s.splat(-87.5), s.least(s.splat(89.0), x)));
    // 2^128 in two steps.
    let most = s.least(s.splat(127.0), n);
    let e = s.mul(s.mul(e, s.power_of_two(most)), s.power_of_two(s.sub(n, most)));
    s.where_less(x, s.splat(-87.3), s.splat(0.0), e)
}

/// The error function to within 4e-7: a quotient of two polynomials, fitted to the smallest relative error over
/// [0, 3.95]; exactly 1 beyond.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "a fitted number, not 2/sqrt(pi)")]
pub(in crate::cpu) fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    let t = s.least(s.splat(3.95), s.abs(x));
    let z = s.mul(t, t);
    let above = polynomial(
        s,
        z,
        [1.128_379_106_521_606_4, 0.191_560_27, 0.052_876_827, 3.808_628_3e-3, 2.847_051e-4, 2.025_907e-6],
    );
    let below =
        polynomial(s, z, [1.0, 0.503_098_55, 0.114_563_81, 0.015_055_988, 1.170_853_6e-3, 3.783_273e-5]);
    let e = s.div(s.mul(t, above), below);
    s.copysign(s.least(s.splat(1.0), e), x)
}

/// `x·Φ(x)` by the error function.
#[inline(always)]
pub(super) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let half = s.mul(x, s.splat(0.5));
    s.fma(half, erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))), half)
}

/// By `e^-|x|`, which is at most 1: nothing overflows, and what vanishes is exactly 0.
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp_negative(s, s.sub(s.splat(0.0), s.abs(x)));
    let above = s.where_less(x, s.splat(0.0), e, s.splat(1.0));
    s.div(above, s.add(s.splat(1.0), e))
}

/// An activation of one vector. [`Activation::SwiGlu`] is not elementwise; its gate is [`Activation::Silu`].
#[inline(always)]
pub(in crate::cpu) fn activate<S: Simd>(s: S, activation: Activation, x: S::V) -> S::V {
    match activation {
        Activation::Gelu => s.gelu(x),
        Activation::GeluTanh => {
            let cubic = s.mul(s.mul(s.mul(x, x), x), s.splat(0.044_715));
            let inner = s.mul(s.add(x, cubic), s.splat(2.0 * 0.797_884_6));
            // (1 + tanh(y))/2 is the sigmoid of 2y.
            s.mul(x, sigmoid(s, inner))
        }
        Activation::QuickGelu => s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702)))),
        Activation::Silu | Activation::SwiGlu => s.mul(x, sigmoid(s, x)),
        Activation::Relu => s.where_less(x, s.splat(0.0), s.splat(0.0), x),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Instructions, Kernel},
        *,
    };

    struct Exp<'a> {
        values: &'a mut [f32],
        negative: bool,
    }

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for values in self.values.chunks_mut(S::LANES) {
                let x = s.load_some(values, 0.0);
                s.store_some(values, if self.negative { exp_negative(s, x) } else { exp(s, x) });
            }
        }
    }

    fn all_kernels() -> impl Iterator<Item = super::super::Kernels> {
        Instructions::ALL.into_iter().filter_map(|instructions| instructions.checked().ok())
    }

    /// Values divided by one.
    struct Quotients<'a>(&'a mut [f32], f32);

    impl Kernel for Quotients<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(values, divisor) = self;
            let (b, r) = (s.splat(divisor), s.splat(1.0 / divisor));
            for values in values.chunks_mut(S::LANES) {
                let a = s.load_some(values, 0.0);
                s.store_some(values, s.quotient(a, b, r));
            }
        }
    }

    #[test]
    fn quotients_are_rounded_as_divisions_are() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        // All ones in the significand: where one over it is off the most.
        let odd =
            [1.0, 3.0, f32::from_bits(0x3fff_ffff), f32::from_bits(0x3f7f_ffff), f32::from_bits(0x3f80_0001)];
        for round in 0..4000 {
            let mut any = || f32::from_bits(rng.random_range(0x3000_0000..0x4f00_0000_u32));
            let divisor = odd.get(round).copied().unwrap_or_else(&mut any);
            let mut values: Vec<f32> = (0..96).map(|_| any()).collect();
            values.extend(odd.map(|x| x * divisor));
            values.extend([0.0, -divisor]);
            let want: Vec<f32> = values.iter().map(|x| x / divisor).collect();
            for kernels in all_kernels() {
                let mut got = values.clone();
                kernels.run(Quotients(&mut got, divisor));
                assert_eq!(got, want, "by {divisor}, {:?}", kernels.name());
            }
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for (negative, range) in [(false, -8_730..8_873), (true, -8_730..1)] {
            let x: Vec<f32> = range.map(|i| i as f32 * 1e-2).collect();
            for kernels in all_kernels() {
                let mut y = x.clone();
                kernels.run(Exp { values: &mut y, negative });
                for (y, x) in y.iter().zip(&x) {
                    let exact = f64::from(*x).exp();
                    let error = ((f64::from(*y) - exact) / exact).abs();
                    assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {y}, {:?}", kernels.name());
                }
            }
        }
    }

    #[test]
    fn exp_of_what_has_no_exp() {
        for kernels in all_kernels() {
            let mut odd = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, 88.8, 1e30, f32::INFINITY, f32::NAN];
            kernels.run(Exp { values: &mut odd, negative: false });
            assert_eq!(odd[..7], [0.0, 0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
            assert!(odd[7].is_nan(), "{:?}", kernels.name());
            // NaN with other bits than the processor's own, too.
            let nan = f32::from_bits(0xffc1_2345);
            let mut odd = [f32::NEG_INFINITY, f32::MIN, -1e30, -88.0, -87.31, -0.0, f32::NAN, nan];
            kernels.run(Exp { values: &mut odd, negative: true });
            assert_eq!(odd[..6], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
            assert!(odd[6].is_nan() && odd[7].is_nan(), "{:?}", kernels.name());
        }
    }
}
