//! Affine layers and their epilogues against the definition in double precision.

use foveate::{
    Tensor,
    backend::{Epilogue, Linear, Mlp, Norm},
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

fn random_norm(width: usize, seed: u64) -> Norm<Tensor> {
    Norm { weight: random(&[width], seed), bias: Some(random(&[width], seed ^ 1)), eps: 1e-5 }
}

/// A feed-forward network's parameters.
struct Network {
    norm: Norm<Tensor>,
    inner: Norm<Tensor>,
    fc1: Linear<Tensor>,
    fc2: Linear<Tensor>,
}

impl Network {
    fn random(width: usize, hidden: usize, gates: usize, bias: bool, seed: u64) -> Self {
        let layer = |outputs: usize, inputs: usize, seed| Linear {
            weight: random(&[outputs, inputs], seed),
            bias: bias.then(|| random(&[outputs], seed ^ 1)),
        };
        Self {
            norm: random_norm(width, seed),
            inner: random_norm(hidden, seed ^ 8),
            fc1: layer(gates * hidden, width, seed ^ 2),
            fc2: layer(width, hidden, seed ^ 4),
        }
    }

    fn mlp(&self, activation: Activation, inner: bool) -> Mlp<'_, Tensor> {
        let Self { norm, inner: inner_norm, fc1, fc2 } = self;
        Mlp { norm, fc1, activation, inner_norm: inner.then_some(inner_norm), fc2 }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Networks that are computed in one go give the bits of the operations they consist of, whatever is left out of memory; and
    /// backends agree on them.
    #[test]
    fn a_network_is_its_operations(
        rows in prop_oneof![1_usize..60, 500_usize..600], width in 1_usize..70, hidden in 1_usize..5, whole in any::<bool>(),
        activation in 0_usize..6, known in any::<bool>(), inner in any::<bool>(), bias in any::<bool>(), seed in any::<u64>(),
    ) {
        let hidden = if whole { 32 * hidden } else { 13 * hidden };
        let activation = [
            Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Silu, Activation::Relu,
            Activation::SwiGlu,
        ][activation];
        let gates = 1 + usize::from(activation == Activation::SwiGlu);
        let network = Network::random(width, hidden, gates, bias, seed);
        let mlp = network.mlp(activation, inner);
        let x = random(&[1, rows, width], seed ^ 16);
        let normed = known.then(|| random(&[1, rows, width], seed ^ 32));
        let mut first = None;
        for backend in backends() {
            let got = backend.mlp(x.clone(), normed.clone(), &mlp).unwrap();
            let want = mlp.composed(backend, x.clone(), normed.clone()).unwrap();
            prop_assert!(got == want, "not what its operations give");
            let first = first.get_or_insert_with(|| got.clone());
            // Sums of `width` products of normalised values below some units, then of `hidden` such values.
            let limit = 1e-5 * width as f32 * hidden as f32;
            let off = got.data().iter().zip(first.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            prop_assert!(off <= limit, "backends differ by {}", off);
        }
    }

    #[test]
    fn a_layer_of_norms_is_norm_and_layer(
        rows in prop_oneof![1_usize..60, 500_usize..600], inputs in 1_usize..70, outputs in 1_usize..90,
        part in 0.0..1.0_f64, seed in any::<u64>(),
    ) {
        let layer = Linear { weight: random(&[outputs, inputs], seed), bias: Some(random(&[outputs], seed ^ 1)) };
        let (norm, x) = (random_norm(inputs, seed ^ 2), random(&[1, rows, inputs], seed ^ 4));
        let part = (part * outputs as f64) as usize..outputs;
        for backend in backends() {
            let got = backend.norm_linear(&x, &norm, layer.rows(part.clone())).unwrap();
            let normed = backend.layer_norm(&x, &norm).unwrap();
            let want = backend.linear(&normed, layer.rows(part.clone()), Epilogue::None).unwrap();
            prop_assert!(got == want, "not what its operations give");
        }
    }
}

#[test]
fn wrong_shapes_in_a_network_are_named() {
    let network = Network::random(8, 32, 1, true, 1);
    let wrong = |change: &dyn Fn(&mut Network)| {
        let mut network = Network::random(8, 32, 1, true, 1);
        change(&mut network);
        network
    };
    let x = random(&[1, 3, 8], 2);
    for backend in backends() {
        let said = |network: &Network, normed: Option<Tensor>| {
            backend.mlp(x.clone(), normed, &network.mlp(Activation::Gelu, false)).unwrap_err().to_string()
        };
        let normed = said(&network, Some(random(&[1, 3, 7], 3)));
        assert!(normed.contains("normed") || normed.contains("weight"), "{normed}");
        let fc1 = wrong(&|network| network.fc1.weight = random(&[32, 9], 1));
        assert!(said(&fc1, None).contains("weight"), "{}", said(&fc1, None));
        let fc2 = wrong(&|network| network.fc2.weight = random(&[9, 32], 1));
        assert!(said(&fc2, None).contains('9'), "{}", said(&fc2, None));
        let bias = wrong(&|network| network.fc2.bias = Some(random(&[7], 1)));
        assert!(said(&bias, None).contains("bias"), "{}", said(&bias, None));
        let norm = wrong(&|network| network.norm.weight = random(&[7], 1));
        assert!(said(&norm, None).contains("weight"), "{}", said(&norm, None));
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
