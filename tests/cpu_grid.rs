//! Operations on feature maps: what the reference gives, all that run on the processor give.

use foveate::{
    Tensor,
    backend::{Convolution, Depthwise, Norm, NormOver},
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

fn alike(mut results: impl Iterator<Item = Tensor>, limit: f32) -> Result<(), TestCaseError> {
    let want = results.next().unwrap();
    for got in results {
        prop_assert_eq!(got.shape(), want.shape());
        for (&got, &want) in got.data().iter().zip(want.data()) {
            prop_assert!((got - want).abs() <= limit, "{got} instead of {want}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn feature_maps(
        batch in 1_usize..3, height in 1_usize..9, width in 1_usize..9, channels in 1_usize..40, outputs in 1_usize..40,
        stride in 1_usize..3, relu in any::<bool>(), silu in any::<bool>(), seed in any::<u64>(),
    ) {
        let (grid, activation) = ([height, width], relu.then_some(Activation::Relu));
        let before = silu.then_some(Activation::Silu);
        let x = random(&[batch, height * width, channels], seed);
        let (weight, bias) = (random(&[9 * channels, outputs], seed ^ 1), random(&[outputs], seed ^ 2));
        let dense = Convolution { weight, bias, stride, activation };
        // Sums of 9·C products below 1 and a bias, in two orders.
        let limit = 8.0 * f32::EPSILON * (9.0 * channels as f32).sqrt() * 3.0;
        alike(backends().map(|backend| backend.convolution(&x, grid, &dense).unwrap()), limit)?;
        let (weight, bias) = (random(&[9, channels], seed ^ 3), random(&[channels], seed ^ 4));
        let single = Depthwise { weight, bias, stride, before, activation: before };
        alike(backends().map(|backend| backend.depthwise(&x, grid, &single).unwrap()), 32.0 * f32::EPSILON)?;
        for over in [NormOver::Image, NormOver::Position, NormOver::Nothing] {
            let bias = relu.then(|| random(&[channels], seed ^ 6));
            // Norms of nearly equal values only make their rounding visible.
            let norm = Norm { weight: random(&[channels], seed ^ 5), bias, eps: 0.1 };
            let count = (height * width * channels) as f32;
            let limit = 16.0 * f32::EPSILON * count.sqrt().max(4.0);
            alike(backends().map(|backend| backend.grid_norm(&x, over, &norm).unwrap()), limit)?;
        }
        let silu = Activation::Silu;
        alike(backends().map(|backend| backend.activate(x.clone(), silu).unwrap()), 4.0 * f32::EPSILON)?;
    }
}

#[test]
fn wrong_shapes_are_named() {
    let x = Tensor::zeros(&[1, 12, 2]);
    for backend in backends() {
        let dense = |stride, outputs: usize| Convolution {
            weight: Tensor::zeros(&[18, outputs]),
            bias: Tensor::zeros(&[outputs]),
            stride,
            activation: None,
        };
        let said = |grid, layer: &_| backend.convolution(&x, grid, layer).unwrap_err().to_string();
        assert!(said([3, 5], &dense(1, 4)).contains("no feature map of 3x5"));
        assert!(said([3, 4], &dense(3, 4)).contains("stride 3; 1 and 2 are supported"));
        assert!(said([3, 4], &dense(1, 0)).contains("the layer has no outputs"));
        let gate = Convolution { activation: Some(Activation::SwiGlu), ..dense(1, 4) };
        assert!(said([3, 4], &gate).contains("swiglu"));
        let gate = backend.activate(x.clone(), Activation::SwiGlu).unwrap_err().to_string();
        assert!(gate.contains("swiglu halves the channels"));
    }
}
