//! Affine layers and their epilogues against the definition in double precision.

use foveate::{
    Tensor,
    backend::{Epilogue, Linear},
    model::Activation,
};
use proptest::prelude::*;

mod backends;
use backends::backends;

fn random(shape: &[usize], seed: u64) -> Tensor {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let n = shape.iter().product();
    Tensor::new(shape, (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()).unwrap()
}

fn definition(x: &Tensor, layer: &Linear<Tensor>, row: usize, output: usize) -> f64 {
    let k = x.width();
    let products =
        (0..k).map(|i| f64::from(x.data()[row * k + i]) * f64::from(layer.weight.data()[output * k + i]));
    products.sum::<f64>() + layer.bias.as_ref().map_or(0.0, |bias| f64::from(bias.data()[output]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_match_the_definition(
        rows in 1_usize..40, inputs in 1_usize..90, outputs in 1_usize..70, bias in any::<bool>(),
        residual in any::<bool>(), part in 0.0..1.0_f64, seed in any::<u64>(),
    ) {
        for reference in backends() {
        let layer = Linear {
            weight: random(&[outputs, inputs], seed),
            bias: bias.then(|| random(&[outputs], seed ^ 1)),
        };
        let x = random(&[1, rows, inputs], seed ^ 2);
        let first = (part * outputs as f64) as usize;
        let added = random(&[1, rows, outputs - first], seed ^ 3);
        let epilogue = if residual { Epilogue::AddTo(added.clone()) } else { Epilogue::None };
        let got = reference.linear(&x, layer.rows(first..outputs), epilogue).unwrap();
        prop_assert_eq!(got.shape(), &[1, rows, outputs - first][..]);
        // Sums of at most 90 products below 1, a bias and a residual.
        let limit = 4.0 * f64::from(f32::EPSILON) * (inputs as f64).sqrt() * 3.0;
        for (at, &got) in got.data().iter().enumerate() {
            let (row, output) = (at / (outputs - first), first + at % (outputs - first));
            let add = if residual { f64::from(added.data()[at]) } else { 0.0 };
            let want = definition(&x, &layer, row, output) + add;
            prop_assert!((f64::from(got) - want).abs() <= limit, "[{}, {}]: {} instead of {}", row, output, got, want);
        }
        }
    }
}

#[test]
fn a_gated_layer_halves_its_width() {
    for reference in backends() {
        let layer = Linear { weight: random(&[6, 4], 1), bias: Some(random(&[6], 2)) };
        let x = random(&[1, 5, 4], 3);
        let got = reference.linear(&x, layer.all(), Epilogue::Activation(Activation::SwiGlu)).unwrap();
        assert_eq!(got.shape(), [1, 5, 3]);
        for (at, &got) in got.data().iter().enumerate() {
            let (gate, value) =
                (definition(&x, &layer, at / 3, at % 3), definition(&x, &layer, at / 3, 3 + at % 3));
            let want = gate / (1.0 + (-gate).exp()) * value;
            assert!((f64::from(got) - want).abs() < 2e-6, "{got} instead of {want}");
        }
    }
}

#[test]
fn wrong_shapes_are_named() {
    for reference in backends() {
        let layer = Linear { weight: random(&[6, 4], 1), bias: Some(random(&[5], 2)) };
        let said = |x: &Tensor, layer: &Linear<Tensor>, epilogue| {
            reference.linear(x, layer.all(), epilogue).unwrap_err().to_string()
        };
        let x = random(&[1, 2, 4], 3);
        assert!(said(&x, &layer, Epilogue::None).contains("bias has shape [5], expected [6]"));
        let layer = Linear { bias: None, ..layer };
        assert!(
            said(&random(&[1, 2, 3], 3), &layer, Epilogue::None)
                .contains("weight has shape [6, 4], expected [6, 3]")
        );
        let residual = Epilogue::AddTo(random(&[1, 2, 5], 4));
        assert!(said(&x, &layer, residual).contains("residual has shape [1, 2, 5], expected [1, 2, 6]"));
        let odd = Linear { weight: random(&[5, 4], 1), bias: None };
        assert!(said(&x, &odd, Epilogue::Activation(Activation::SwiGlu)).contains("the number is odd"));
        let error = reference.linear(&x, layer.rows(2..9), Epilogue::None).unwrap_err().to_string();
        assert!(error.contains("outputs 2..9 are not among the layer's 6"));
    }
}
