//! Scores of tokens, selections in place, and the coarser grid, on every backend: against their definitions, and the reference.

use foveate::{
    Tensor,
    backend::{Backend, KeepInPlace, Linear, Norm, Predictor},
    reference::Reference,
};
use proptest::prelude::*;

mod backends;
use backends::backends;

fn values(count: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let mixed = (i as u32 ^ seed).wrapping_mul(2_654_435_761).wrapping_add(seed);
        (mixed ^ mixed >> 15).wrapping_mul(2_246_822_519) >> 8
    };
    (0..count).map(|i| value(i) as f32 / 16_777_216.0 - 0.5).collect()
}

fn tensor(shape: &[usize], seed: u32) -> Tensor {
    Tensor::new(shape, values(shape.iter().product(), seed)).unwrap()
}

fn layer(outputs: usize, inputs: usize, seed: u32) -> Linear<Tensor> {
    Linear { weight: tensor(&[outputs, inputs], seed), bias: Some(tensor(&[outputs], seed ^ 5)) }
}

proptest! {
    /// To the bit: the sum is in double precision on both sides.
    #[test]
    fn selectors_are_products(
        batch in 1_usize..4, n in 1_usize..50, width in 1_usize..90, bias in any::<bool>(), noise in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let (x, mut selector) = (tensor(&[batch, n, width], seed), layer(1, width, seed ^ 1));
        selector.bias = selector.bias.filter(|_| bias);
        let noise = noise.then(|| tensor(&[batch, n], seed ^ 2));
        let want = Reference::new().token_scores(&x, &selector, noise.as_ref()).unwrap();
        for backend in backends() {
            prop_assert_eq!(&backend.token_scores(&x, &selector, noise.as_ref()).unwrap(), &want);
        }
    }

    #[test]
    fn predictors_are_the_references(
        batch in 1_usize..4, n in 1_usize..50, special in 0_usize..3, quarter in 1_usize..20, odd in 0_usize..4,
        seed in any::<u32>(),
    ) {
        let (width, special) = (4 * quarter + odd, special.min(n - 1));
        let x = tensor(&[batch, n, width], seed);
        let predictor = Predictor {
            norm: Norm { weight: tensor(&[width], seed ^ 1), bias: Some(tensor(&[width], seed ^ 2)), eps: 1e-5 },
            hidden: layer(width, width, seed ^ 3),
            first: layer(width / 2, width, seed ^ 4),
            second: layer(width / 4, width / 2, seed ^ 5),
            last: layer(2, width / 4, seed ^ 6),
        };
        let want = Reference::new().keep_scores(&x, &predictor, special).unwrap();
        for backend in backends() {
            let got = backend.keep_scores(&x, &predictor, special).unwrap();
            prop_assert_eq!(got.shape(), want.shape());
            for (got, want) in got.data().iter().zip(want.data()) {
                // Four products of at most 83 values of a half: their sums reach 10 and lose 1e-5 each at the most.
                prop_assert!((got - want).abs() <= 4e-5, "{got} instead of {want}");
            }
        }
    }

    /// Few levels of scores: ties.
    #[test]
    fn selections_in_place_are_the_references(
        batch in 1_usize..4, heads in 1_usize..4, n in 1_usize..70, special in 0_usize..5, share in 0.0..=1.0_f64,
        levels in prop_oneof![Just(1.0_f32), Just(4.0), Just(1e6)], odd in any::<bool>(), masked in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let (special, keep) = (special.min(n), (n as f64 * share).round() as usize);
        let mut scores = tensor(&[batch, heads, n], seed);
        scores.data_mut().iter_mut().for_each(|x| *x = (*x * levels).round() / levels);
        if odd {
            scores.data_mut().iter_mut().step_by(5).for_each(|x| *x = f32::NAN);
        }
        let select = KeepInPlace { scores: &scores, special, keep, masked };
        let want = Reference::new().keep_in_place(&select).unwrap();
        for backend in backends() {
            prop_assert_eq!(&backend.keep_in_place(&select).unwrap(), &want);
        }
    }

    /// To the bit: the sums are in one order.
    #[test]
    fn windows_are_the_references(
        batch in 1_usize..4, rows in 1_usize..9, columns in 1_usize..9, special in 0_usize..3, width in 1_usize..40,
        scale in 1_usize..6, seed in any::<u32>(),
    ) {
        let (x, grid) = (tensor(&[batch, special + rows * columns, width], seed), [rows, columns]);
        let reference = Reference::new();
        let pooled = reference.pool_windows(&x, special, grid, scale).unwrap();
        let added = reference.add_windows(x.clone(), &pooled, special, grid, scale).unwrap();
        for backend in backends() {
            prop_assert_eq!(&backend.pool_windows(&x, special, grid, scale).unwrap(), &pooled);
            prop_assert_eq!(&backend.add_windows(x.clone(), &pooled, special, grid, scale).unwrap(), &added);
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let x = Tensor::zeros(&[1, 7, 4]);
    let selector = |shape: &[usize]| Linear { weight: Tensor::zeros(shape), bias: None };
    for backend in backends() {
        let said = backend.token_scores(&x, &selector(&[2, 4]), None).unwrap_err().to_string();
        assert!(said.contains("weight has shape [2, 4], expected [1, 4]"), "{said}");
        let noise = Tensor::zeros(&[1, 6]);
        let said = backend.token_scores(&x, &selector(&[1, 4]), Some(&noise)).unwrap_err().to_string();
        assert!(said.contains("noise has shape [1, 6], expected [1, 7]"), "{said}");
        let said = backend.pool_windows(&x, 1, [2, 2], 2).unwrap_err().to_string();
        assert!(said.contains("7 tokens of which 1 are special are no grid of 2x2 patches"), "{said}");
        let said = backend.add_windows(x.clone(), &x, 1, [2, 3], 2).unwrap_err().to_string();
        assert!(said.contains("pooled has shape [1, 7, 4], expected [1, 2, 4]"), "{said}");
        let scores = Tensor::zeros(&[1, 2, 5]);
        let keep = KeepInPlace { scores: &scores, special: 1, keep: 6, masked: false };
        let said = backend.keep_in_place(&keep).unwrap_err().to_string();
        assert!(said.contains("cannot keep 6 of 5 tokens of which 1 are special"), "{said}");
    }
}
