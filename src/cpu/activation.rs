//! Nonlinearities of whole slices.

use super::simd::{Kernel, Simd, math};
use crate::model::Activation;

/// The nonlinearity of every value, in place.
pub(super) struct Activate<'a> {
    pub(super) activation: Activation,
    pub(super) values: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut chunks = self.values.chunks_exact_mut(S::LANES);
        for chunk in &mut chunks {
            let y = math::activate(s, self.activation, s.load(chunk));
            s.store(chunk, y);
        }
        let tail = chunks.into_remainder();
        let y = math::activate(s, self.activation, s.load_some(tail, 0.0));
        s.store_some(tail, y);
    }
}

/// `out = silu(first half)·second half` of a row.
pub(super) struct Gate<'a> {
    pub(super) row: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (gate, value) = self.row.split_at(self.row.len() / 2);
        let values = gate.chunks(S::LANES).zip(value.chunks(S::LANES));
        for (out, (gate, value)) in self.out.chunks_mut(S::LANES).zip(values) {
            let (gate, value) = (s.load_some(gate, 0.0), s.load_some(value, 0.0));
            s.store_some(out, s.mul(math::activate(s, Activation::Silu, gate), value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::simd::Instructions, *};

    fn everywhere(activation: Activation, x: &[f32], check: impl Fn(&[f32], Instructions)) {
        for kernels in Instructions::ALL.into_iter().filter_map(|instructions| instructions.checked().ok()) {
            let mut y = x.to_vec();
            kernels.run(Activate { activation, values: &mut y });
            check(&y, kernels.name());
        }
    }

    /// erf by its Maclaurin series in `f64`: converges well for |x| ≤ 4.
    fn erf(x: f64) -> f64 {
        if x.abs() > 4.5 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn activations_agree_with_their_definitions() {
        let x: Vec<f32> = (-60_001..60_001).map(|i| i as f32 * 1.5e-4).collect();
        let check = |activation, f: fn(f64) -> f64| {
            everywhere(activation, &x, |y, instructions| {
                for (&y, &x) in y.iter().zip(&x) {
                    let (x, error) = (f64::from(x), f64::from(y) - f(f64::from(x)));
                    // Four units in the last place of the sigmoid, or of erf + 1, times |x|.
                    let limit = 4.0 * f64::from(f32::EPSILON) * x.abs().max(1.0);
                    assert!(error.abs() <= limit, "{activation:?} of {x} is {y}, {instructions:?}");
                }
            });
        };
        check(Activation::Gelu, |x| 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)));
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
        let x = [f32::MIN, -1e30, -100.0, 1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Silu] {
            everywhere(activation, &x, |y, instructions| {
                assert_eq!(y[..5], [0.0, 0.0, 0.0, 1e30, f32::INFINITY], "{activation:?} {instructions:?}");
                assert!(y[5].is_nan() && y[6].is_nan(), "{activation:?}: {y:?}");
            });
        }
    }
}
