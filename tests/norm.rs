//! LayerNorm, over rows and over heads, against the definition in double precision.

use foveate::{Tensor, backend::Norm};
use proptest::prelude::*;

mod backends;
use backends::backends;

fn random(shape: &[usize], seed: u64, spread: f32) -> Tensor {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let n = shape.iter().product();
    Tensor::new(shape, (0..n).map(|_| spread * rng.random_range(-1.0_f32..1.0)).collect()).unwrap()
}

/// The values, and what rounding the mean does to them: an ulp of the largest input, scaled as the inputs are.
fn definition(row: &[f32], norm: &Norm<Tensor>) -> Vec<(f64, f64)> {
    let n = row.len() as f64;
    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
    let bias = |c: usize| norm.bias.as_ref().map_or(0.0, |bias| f64::from(bias.data()[c]));
    let largest = row.iter().fold(0.0_f64, |max, &x| max.max(f64::from(x).abs()));
    let rounding = f64::from(f32::EPSILON) * largest * scale;
    let value = |(c, &x): (usize, &f32)| {
        ((f64::from(x) - mean) * scale * f64::from(norm.weight.data()[c]) + bias(c), rounding)
    };
    row.iter().enumerate().map(value).collect()
}

proptest! {
    #[test]
    fn rows_and_heads_match_the_definition(
        batch in 1_usize..3, tokens in 1_usize..12, heads in 1_usize..4, width in 1_usize..90, part in 0_usize..3,
        bias in any::<bool>(), spread in prop_oneof![Just(1e-3_f32), Just(1.0), Just(100.0)], seed in any::<u64>(),
    ) {
        for reference in backends() {
        let norm = Norm {
            weight: random(&[width], seed, 1.0),
            bias: bias.then(|| random(&[width], seed ^ 1, 1.0)),
            eps: 1e-6,
        };
        // Normalised values are at most sqrt(width) large and lose about as many ulp to the sums.
        let limit = 8.0 * f64::from(f32::EPSILON) * (width as f64).max(4.0);
        let x = random(&[batch, tokens, width], seed ^ 2, spread);
        let got = reference.layer_norm(&x, &norm).unwrap();
        for (got, row) in got.data().chunks(width).zip(x.data().chunks(width)) {
            for (&got, (want, rounding)) in got.iter().zip(definition(row, &norm)) {
                prop_assert!((f64::from(got) - want).abs() <= limit + rounding, "{} instead of {}", got, want);
            }
        }
        let packed = random(&[batch, tokens, 3 * heads * width], seed ^ 3, spread);
        let got = reference.head_norm(packed.clone(), part, heads, &norm).unwrap();
        for (at, (got, head)) in got.data().chunks(width).zip(packed.data().chunks(width)).enumerate() {
            if at % (3 * heads) / heads == part {
                for (&got, (want, rounding)) in got.iter().zip(definition(head, &norm)) {
                    prop_assert!((f64::from(got) - want).abs() <= limit + rounding, "{} instead of {}", got, want);
                }
            } else {
                prop_assert_eq!(got, head, "other parts stay as they are");
            }
        }
        }
    }
}

#[test]
fn a_constant_row_becomes_the_bias() {
    let norm = Norm {
        weight: random(&[5], 1, 1.0),
        bias: Some(Tensor::new(&[5], vec![1.0, 2.0, 3.0, 4.0, 5.0]).unwrap()),
        eps: 1e-6,
    };
    let x = Tensor::new(&[1, 1, 5], vec![7.0; 5]).unwrap();
    for backend in backends() {
        assert_eq!(backend.layer_norm(&x, &norm).unwrap().data(), [1.0, 2.0, 3.0, 4.0, 5.0]);
    }
}

#[test]
fn wrong_shapes_are_named() {
    for reference in backends() {
        let norm = Norm { weight: random(&[4], 1, 1.0), bias: None, eps: 1e-6 };
        let error = reference.layer_norm(&random(&[1, 2, 5], 2, 1.0), &norm).unwrap_err().to_string();
        assert!(error.contains("weight has shape [4], expected [5]"), "{error}");
        let error = reference.head_norm(random(&[1, 2, 24], 2, 1.0), 3, 2, &norm).unwrap_err().to_string();
        assert!(error.contains("have no part 3 of 2 heads of 4"), "{error}");
    }
}
