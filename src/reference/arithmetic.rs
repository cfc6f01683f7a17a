//! Sums in a fixed order, and elementary functions that the compiler can vectorise.
//!
//! Every loop here is compiled for the widest vector unit at hand by `pulp` and contains no fused multiply-add, so its
//! results are the same bits on every x86 processor.

#![allow(
    clippy::inline_always,
    reason = "only inlined code is compiled for the vector unit that `pulp` dispatches to"
)]

use pulp::Arch;

use crate::model::Activation;

/// Partial sums kept side by side: one AVX-512 register of `f32`. The number is part of the result's bits.
const LANES: usize = 16;

#[inline(always)]
fn fold(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += term(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += term(x);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` to within 2 units in the last place; 0 below -87.3, infinite above 88, NaN for NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first exact in few bits: the product with n does not round.
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    // The polynomial of the Cephes library's expf.
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 5e-1;
    let e = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let finite = if x < -87.3 { 0.0 } else { e * power };
    if x > 88.0 { f32::INFINITY } else { finite }
}

/// The error function to within 2e-7: a polynomial around 0, and `1 - e^polynomial` beyond (coefficients by N. Juffa).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let (t, s) = (x.abs(), x * x);
    let mut far = -1.728_534_7e-5 * t + 3.831_971_3e-4;
    far = far * s + (-3.883_964_4e-3 * t + 2.425_462_2e-2);
    for c in [-1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1] {
        far = far * t + c;
    }
    let far = (1.0 - exp(far * t - t)).copysign(x);
    let mut near = -5.967_617e-4_f32;
    for c in [4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1] {
        near = near * s + c;
    }
    if t > 0.927_734_4 { far } else { near * x + x }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    2.0 * sigmoid(2.0 * x) - 1.0
}

/// A row becomes its softmax, in place. A row of nothing but `-inf` becomes zeros.
pub(super) fn softmax(row: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
            let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
            for x in row.iter_mut() {
                *x = exp(*x - max);
            }
            let sum = fold(row, |x| x);
            let scale = if sum == 0.0 { 0.0 } else { 1.0 / sum };
            for x in row.iter_mut() {
                *x *= scale;
            }
        },
    );
}

/// `y += x`.
pub(super) fn add(y: &mut [f32], x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}

/// `y += a·x`.
pub(super) fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += a * x;
            }
        },
    );
}

/// `y += a·x`, value by value.
pub(super) fn add_product(y: &mut [f32], a: &[f32], x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((y, &a), &x) in y.iter_mut().zip(a).zip(x) {
                *y += a * x;
            }
        },
    );
}

/// `out = (row - mean)/sqrt(variance + eps)·weight + bias`.
pub(super) fn normalise(row: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let n = row.len() as f32;
            let mean = fold(row, |x| x) / n;
            let variance = fold(row, |x| (x - mean) * (x - mean)) / n;
            let scale = 1.0 / (variance + eps).sqrt();
            for ((y, &x), &w) in out.iter_mut().zip(row).zip(weight) {
                *y = (x - mean) * scale * w;
            }
            if let Some(bias) = bias {
                for (y, &b) in out.iter_mut().zip(bias) {
                    *y += b;
                }
            }
        },
    );
}

/// The nonlinearity, in place. [`Activation::SwiGlu`] is not elementwise: see [`gate`].
pub(super) fn activate(activation: Activation, values: &mut [f32]) {
    #[inline(always)]
    fn each(values: &mut [f32], f: impl Fn(f32) -> f32) {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for x in values {
                    *x = f(*x);
                }
            },
        );
    }
    match activation {
        Activation::Gelu => each(
            values,
            #[inline(always)]
            |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        ),
        Activation::GeluTanh => each(
            values,
            #[inline(always)]
            |x| 0.5 * x * (1.0 + tanh(0.797_884_6 * (x + 0.044_715 * x * x * x))),
        ),
        Activation::QuickGelu => each(
            values,
            #[inline(always)]
            |x| x * sigmoid(1.702 * x),
        ),
        Activation::Silu | Activation::SwiGlu => each(
            values,
            #[inline(always)]
            |x| x * sigmoid(x),
        ),
        Activation::Relu => each(
            values,
            #[inline(always)]
            |x| if x < 0.0 { 0.0 } else { x },
        ),
    }
}

/// `out = silu(first half)·second half` of a row.
pub(super) fn gate(row: &[f32], out: &mut [f32]) {
    let (first, second) = row.split_at(row.len() / 2);
    out.copy_from_slice(first);
    activate(Activation::Silu, out);
    for (y, &x) in out.iter_mut().zip(second) {
        *y *= x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf by its Maclaurin series in `f64`: converges well for |x| ≤ 4.
    fn erf_series(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0_f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([89.0, f32::INFINITY].map(exp), [f32::INFINITY; 2]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_2e_7() {
        let mut worst = 0.0_f64;
        for i in -45_000..45_000 {
            let x = i as f32 * 1e-4;
            worst = worst.max((f64::from(erf(x)) - erf_series(f64::from(x).clamp(-4.0, 4.0))).abs());
        }
        assert!(worst < 2e-7, "absolute error {worst:e}");
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_sums_to_one_and_survives_extremes() {
        let mut row = [1e30, -1e30, 3.0, f32::NEG_INFINITY];
        softmax(&mut row);
        assert_eq!(row, [1.0, 0.0, 0.0, 0.0]);
        let mut row = [f32::NEG_INFINITY; 3];
        softmax(&mut row);
        assert_eq!(row, [0.0; 3]);
    }

    #[test]
    fn activations_agree_with_their_definitions() {
        let x = [-3.0_f32, -0.5, 0.0, 0.7, 2.5];
        let check = |activation, f: fn(f64) -> f64| {
            let mut y = x;
            activate(activation, &mut y);
            for (y, x) in y.iter().zip(x) {
                assert!((f64::from(*y) - f(f64::from(x))).abs() < 1e-6, "{activation:?} of {x} is {y}");
            }
        };
        check(Activation::Gelu, |x| 0.5 * x * (1.0 + erf_series(x / std::f64::consts::SQRT_2)));
        check(Activation::GeluTanh, |x| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        });
        check(Activation::QuickGelu, |x| x / (1.0 + (-1.702 * x).exp()));
        check(Activation::Silu, |x| x / (1.0 + (-x).exp()));
        check(Activation::Relu, |x| x.max(0.0));
    }

    /// As in PyTorch: what vanishes against `e^|x|` is 0 however large, and `-inf` times 0 is NaN.
    #[test]
    fn activations_far_from_zero() {
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Silu] {
            let mut y = [f32::MIN, -1e30, -100.0, 1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
            activate(activation, &mut y);
            assert_eq!(y[..5], [0.0, 0.0, 0.0, 1e30, f32::INFINITY], "{activation:?}");
            assert!(y[5].is_nan() && y[6].is_nan(), "{activation:?}: {y:?}");
        }
    }
}
