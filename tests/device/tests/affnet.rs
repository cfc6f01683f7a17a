//! AFFNets on the kernels against the reference, in every storage type and with every norm.
#![cfg(feature = "cuda")]

use foveate::{
    Images, Pixels, Tensor,
    backend::{Backend, NormOver},
    cuda::{Cuda, DType},
    model::{
        Activation, AffNet, AffNetConfig,
        affnet::{AffNetParams, AffStage, Bottleneck, random_params},
    },
    reference::Reference,
};
use foveate_device_tests::{Turn, rounded};
use half::{bf16, f16};

/// A small network of every part: 44x36 pixels, of which the filters see 6x5, 3x3 and 2x2 positions.
fn config(norm: NormOver, activation: Activation) -> AffNetConfig {
    let layer = |inputs, outputs, stride| Bottleneck { inputs, hidden: 2 * inputs, outputs, stride };
    let stage = |inputs, outputs, blocks, fuse| AffStage {
        down: layer(inputs, outputs, 2),
        blocks,
        hidden: 2 * outputs,
        fuse,
    };
    AffNetConfig {
        image: [44, 36],
        stem: 8,
        bottlenecks: [vec![layer(8, 16, 1)], vec![layer(16, 16, 2), layer(16, 16, 1)]],
        stages: [stage(16, 24, 2, true), stage(24, 32, 1, false), stage(32, 40, 1, true)],
        features: 48,
        classes: 10,
        norm,
        activation,
        ..AffNetConfig::published("affnet_et").unwrap()
    }
}

fn pictures(config: &AffNetConfig, batch: usize) -> Images {
    let [height, width] = config.image;
    let shape = [batch, config.channels, height, width];
    let pixel = |at: usize| {
        let (x, y, plane) = (at % width, at / width % height, at / (width * height));
        ((x * 37 + y * 11 + plane * 5) % 97 + (x * y + plane * 7) % 31 * 3) as u8
    };
    Images::new(shape, Pixels::U8((0..shape.iter().product()).map(pixel).collect())).unwrap()
}

fn stored(dtype: DType, params: AffNetParams<Tensor>) -> AffNetParams<Tensor> {
    let round = |tensor: Tensor| {
        let values = match dtype {
            DType::F32 => tensor.data().to_vec(),
            DType::F16 => rounded::<f16>(tensor.data()),
            DType::Bf16 => rounded::<bf16>(tensor.data()),
        };
        Tensor::new(tensor.shape(), values)
    };
    params.try_map(&mut |tensor| round(tensor)).unwrap()
}

/// The largest difference over the largest value.
fn error(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.shape(), want.shape());
    let largest = want.data().iter().fold(0.0_f32, |largest, v| largest.max(v.abs()));
    let worst = got.data().iter().zip(want.data()).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
    assert!(got.data().iter().all(|v| v.is_finite()));
    worst / largest
}

#[test]
fn networks_give_what_the_reference_gives() {
    let Some(turn) = Turn::new() else { return };
    for (norm, activation, dtype, tolerance) in [
        (NormOver::Image, Activation::Silu, DType::F32, 1e-4),
        (NormOver::Position, Activation::Relu, DType::F32, 1e-4),
        (NormOver::Nothing, Activation::Silu, DType::F32, 1e-4),
        (NormOver::Image, Activation::Silu, DType::F16, 2e-2),
        (NormOver::Image, Activation::Silu, DType::Bf16, 8e-2),
    ] {
        let config = config(norm, activation);
        let params = stored(dtype, random_params(&config, 3));
        let images = pictures(&config, 2);
        let reference = AffNet::new(Reference::new(), config.clone(), params.clone()).unwrap();
        let want = reference.forward(&images).unwrap();
        let cuda = Cuda::on(&turn.device, dtype).unwrap();
        let model = AffNet::new(cuda, config, params).unwrap();
        let got = model.forward(&images).unwrap();
        assert_eq!(got.grid, want.grid);
        for (name, got, want) in [
            ("map", &got.map, &want.map),
            ("features", &got.features, &want.features),
            ("logits", &got.logits, &want.logits),
        ] {
            let worst = error(&model.backend().download(got).unwrap(), want);
            println!("{norm:?}, {activation:?}, {dtype}, {name}: {worst:e}");
            assert!(worst <= tolerance, "{norm:?}, {activation:?}, {dtype}, {name}: {worst:e}");
        }
        model.backend().synchronize().unwrap();
    }
    turn.end();
}

#[test]
fn bad_operands_are_named_before_anything_runs() {
    use foveate::backend::{Frequency, GridBackend};
    let Some(turn) = Turn::new() else { return };
    let cuda = Cuda::on(&turn.device, DType::F32).unwrap();
    let up = |shape: &[usize]| cuda.upload(Tensor::zeros(shape)).unwrap();
    let filter = |s: usize| Frequency {
        w1: up(&[2, 2, s, s]),
        b1: up(&[2, 2, s]),
        w2: up(&[2, 2, s, s]),
        b2: up(&[2, 2, s]),
        activation: Activation::Silu,
        threshold: 0.0,
    };
    let x = up(&[1, 12, 8]);
    let message =
        |grid, filter: &Frequency<_>| cuda.frequency(&x, grid, filter, None).unwrap_err().to_string();
    assert!(message([3, 5], &filter(4)).contains("no grid of 3x5"));
    assert!(message([3, 4], &filter(3)).contains("2 groups of 3 channels, x has 8"));
    assert!(message([3, 4], &Frequency { b2: up(&[2, 8]), ..filter(4) }).contains("b2 has shape [2, 8]"));
    assert!(message([3, 4], &Frequency { w1: up(&[8, 8]), ..filter(4) }).contains("w1 has shape [8, 8]"));
    assert!(
        message([3, 4], &Frequency { activation: Activation::Gelu, ..filter(4) }).contains("silu or relu")
    );
    assert!(message([3, 4], &Frequency { threshold: f32::NAN, ..filter(4) }).contains("threshold NaN"));
    turn.end();
}
