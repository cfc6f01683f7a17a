//! The frequency filter against a transform by definition in f64, and what it refuses.

use std::f64::consts::TAU;

mod backends;

use backends::backends;
use foveate::{
    Tensor,
    backend::{Frequency, GridBackend},
    model::Activation,
    reference::Reference,
};
use proptest::prelude::*;

/// Values between -1 and 1 without a pattern.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::new(shape, noise(shape.iter().product(), seed)).unwrap()
}

fn filter(groups: usize, width: usize, seed: u64) -> Frequency<Tensor> {
    Frequency {
        w1: tensor(&[2, groups, width, width], seed),
        b1: tensor(&[2, groups, width], seed + 1),
        w2: tensor(&[2, groups, width, width], seed + 2),
        b2: tensor(&[2, groups, width], seed + 3),
        activation: if seed.is_multiple_of(2) { Activation::Silu } else { Activation::Relu },
        threshold: 0.02,
    }
}

type Complex = (f64, f64);

fn times((a, b): Complex, (c, d): Complex) -> Complex {
    (a * c - b * d, a * d + b * c)
}

fn turn(j: usize, k: usize, n: usize) -> Complex {
    let angle = TAU * ((j * k) % n) as f64 / n as f64;
    (angle.cos(), angle.sin())
}

/// Section 2 of the specification, one sum after the other.
fn by_definition(x: &Tensor, [height, width]: [usize; 2], f: &Frequency<Tensor>) -> Vec<f64> {
    let (batch, n, channels) = (x.dim(0), height * width, x.dim(2));
    let (groups, s, half) = (f.w1.dim(1), f.w1.dim(2), width / 2 + 1);
    let scale = 1.0 / (n as f64).sqrt();
    let weight = |w: &Tensor, g: usize, i: usize, o: usize| {
        let at = |part: usize| f64::from(w.data()[((part * groups + g) * s + i) * s + o]);
        (at(0), at(1))
    };
    let bias = |b: &Tensor, g: usize, o: usize| {
        (f64::from(b.data()[g * s + o]), f64::from(b.data()[(groups + g) * s + o]))
    };
    let activate = |v: f64| match f.activation {
        Activation::Silu => v / (1.0 + (-v).exp()),
        _ => v.max(0.0),
    };
    let lambda = f64::from(f.threshold);
    let shrink = |v: f64| v.signum() * (v.abs() - lambda).max(0.0);
    let mut out = vec![0.0; batch * n * channels];
    for image in 0..batch {
        let value =
            |h: usize, w: usize, c: usize| f64::from(x.data()[(image * n + h * width + w) * channels + c]);
        let mut masked = vec![(0.0, 0.0); channels * height * half];
        for l in 0..height {
            for k in 0..half {
                let spectrum: Vec<Complex> = (0..channels)
                    .map(|c| {
                        let mut sum = (0.0, 0.0);
                        for h in 0..height {
                            for w in 0..width {
                                let (cos, sin) = times(turn(l, h, height), turn(k, w, width));
                                sum.0 += value(h, w, c) * cos * scale;
                                sum.1 -= value(h, w, c) * sin * scale;
                            }
                        }
                        sum
                    })
                    .collect();
                for g in 0..groups {
                    let layer = |x: &[Complex], w: &Tensor, b: &Tensor| -> Vec<Complex> {
                        let output = |o: usize| {
                            x.iter().enumerate().fold(bias(b, g, o), |sum, (i, &x)| {
                                let product = times(x, weight(w, g, i, o));
                                (sum.0 + product.0, sum.1 + product.1)
                            })
                        };
                        (0..s).map(output).collect()
                    };
                    let inputs = &spectrum[g * s..(g + 1) * s];
                    let hidden: Vec<Complex> = layer(inputs, &f.w1, &f.b1)
                        .into_iter()
                        .map(|(re, im)| (activate(re), activate(im)))
                        .collect();
                    for (i, (re, im)) in layer(&hidden, &f.w2, &f.b2).into_iter().enumerate() {
                        masked[((g * s + i) * height + l) * half + k] =
                            times((shrink(re), shrink(im)), inputs[i]);
                    }
                }
            }
        }
        for c in 0..channels {
            for h in 0..height {
                for w in 0..width {
                    let mut sum = 0.0;
                    for k in 0..half {
                        let twice = if k == 0 || 2 * k == width { 1.0 } else { 2.0 };
                        for l in 0..height {
                            let turned = times(turn(l, h, height), turn(k, w, width));
                            sum += twice * times(masked[(c * height + l) * half + k], turned).0;
                        }
                    }
                    out[(image * n + h * width + w) * channels + c] = sum * scale + value(h, w, c);
                }
            }
        }
    }
    out
}

#[track_caller]
fn check(batch: usize, grid: [usize; 2], groups: usize, width: usize, seed: u64) {
    let x = tensor(&[batch, grid[0] * grid[1], groups * width], seed);
    let f = filter(groups, width, seed + 10);
    let residual = tensor(x.shape(), seed + 20);
    let want = by_definition(&x, grid, &f);
    let largest = want.iter().fold(1.0, |largest: f64, v| largest.max(v.abs()));
    for residual in [None, Some(&residual)] {
        for got in backends().map(|backend| backend.frequency(&x, grid, &f, residual).unwrap()) {
            for (at, (got, want)) in got.data().iter().zip(&want).enumerate() {
                let want = want + residual.map_or(0.0, |r| f64::from(r.data()[at]));
                // Sums of H·W and of 2S terms, each rounded: far below 1e-5 of the largest.
                assert!(
                    (f64::from(*got) - want).abs() <= 1e-5 * largest,
                    "{grid:?}[{at}]: {got} instead of {want}"
                );
            }
        }
    }
}

#[test]
fn grids_of_every_parity_agree_with_the_definition() {
    for grid in [[1, 1], [1, 2], [2, 1], [1, 7], [7, 1], [2, 2], [3, 4], [4, 3], [5, 5], [6, 8], [7, 7]] {
        check(1, grid, 2, 3, (10 * grid[0] + grid[1]) as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_shape_agrees_with_the_definition(
        batch in 1_usize..3, height in 1_usize..9, width in 1_usize..10, groups in 1_usize..4, s in 1_usize..5, seed in 0_u64..1000,
    ) {
        check(batch, [height, width], groups, s, seed);
    }
}

#[test]
fn a_wrong_rule_for_the_special_columns_would_be_seen() {
    // Rows 0 to H/2 of the columns 0 and W/2 mirrored, as a multi-dimensional inverse may do it, is not what is asked for.
    let (grid, f) = ([6, 6], filter(1, 4, 3));
    let x = tensor(&[1, 36, 4], 4);
    let spectrum = foveate::reference::frequency::spectrum(&x, grid).unwrap();
    let mask = foveate::reference::frequency::mask(&spectrum, &f).unwrap();
    let product = foveate::reference::frequency::product(&mask, &spectrum);
    let mut mirrored = product.clone();
    for plane in 0..4 {
        for l in 4..6 {
            for k in [0, 3] {
                let (at, from) = ((plane * 6 + l) * 4 + k, (plane * 6 + 6 - l) * 4 + k);
                mirrored.re.data_mut()[at] = product.re.data()[from];
                mirrored.im.data_mut()[at] = -product.im.data()[from];
            }
        }
    }
    let [right, wrong] =
        [&product, &mirrored].map(|p| foveate::reference::frequency::inverse(p, grid).unwrap());
    let worst = right.data().iter().zip(wrong.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst > 1e-2, "the rules differ by {worst} only");
}

#[test]
fn bad_arguments_are_named() {
    let x = tensor(&[2, 12, 6], 1);
    let message = |grid, f: &Frequency<Tensor>, residual: Option<&Tensor>| {
        Reference::new().frequency(&x, grid, f, residual).unwrap_err().to_string()
    };
    let good = filter(2, 3, 2);
    assert!(message([3, 5], &good, None).contains("x has shape [2, 12, 6], expected (images, 3x5 positions"));
    assert!(message([usize::MAX, 2], &good, None).contains("expected (images"));
    assert!(message([3, 4], &filter(2, 4, 2), None).contains("2 groups of 4 channels, x has 6"));
    assert!(
        message([3, 4], &Frequency { w2: tensor(&[2, 2, 3, 2], 1), ..good.clone() }, None).contains("w2")
    );
    assert!(message([3, 4], &Frequency { b1: tensor(&[2, 6], 1), ..good.clone() }, None).contains("b1"));
    assert!(
        message([3, 4], &Frequency { w1: tensor(&[4, 3], 1), ..good.clone() }, None).contains("w1 has shape")
    );
    let gelu = Frequency { activation: Activation::Gelu, ..good.clone() };
    assert!(message([3, 4], &gelu, None).contains("silu or relu"));
    let negative = Frequency { threshold: -1.0, ..good.clone() };
    assert!(message([3, 4], &negative, None).contains("threshold -1"));
    assert!(message([3, 4], &good, Some(&tensor(&[2, 12, 5], 1))).contains("residual"));
}
