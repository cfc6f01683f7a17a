//! AFFNets on the kernels against the reference, in every storage type and with every norm.
#![cfg(feature = "cuda")]

use foveate::{
    Images, Pixels, Tensor,
    backend::{Backend, NormOver},
    cuda::{Cuda, DType, Engine, Forecast, patch::PixelType},
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
    waves(config, batch, 0)
}

fn waves(config: &AffNetConfig, batch: usize, seed: usize) -> Images {
    let [height, width] = config.image;
    let shape = [batch, config.channels, height, width];
    let pixel = |at: usize| {
        let (x, y, plane) = (at % width, at / width % height, at / (width * height));
        ((x * 37 + y * 11 + (plane + seed) * 5) % 97 + (x * y + (plane + seed) * 7) % 31 * 3) as u8
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

/// AFFNet-ET as published: 256 by 256 pixels, random weights.
#[test]
#[ignore = "a minute on the emulated driver"]
fn affnet_et_in_full_size() {
    let Some(turn) = Turn::new() else { return };
    let config = AffNetConfig::published("affnet_et").unwrap();
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 5e-2)] {
        let params = stored(dtype, random_params(&config, 3));
        let images = pictures(&config, 1);
        let want = AffNet::new(Reference::new(), config.clone(), params.clone()).unwrap();
        let want = want.forward(&images).unwrap();
        let model = AffNet::new(Cuda::on(&turn.device, dtype).unwrap(), config.clone(), params).unwrap();
        let mut engine = Engine::of_affnet(&model, 1, PixelType::U8).unwrap();
        let worst = error(&engine.run(&images).unwrap().logits().unwrap(), &want.logits);
        println!("{dtype}: {worst:e}");
        assert!(worst <= tolerance, "{dtype}: {worst:e}");
    }
    turn.end();
}

/// Replays are eager passes bit for bit, one by one and in a stream; the dry pass has counted what they do.
#[test]
fn engines_replay_what_a_pass_gives() {
    let Some(turn) = Turn::new() else { return };
    for (norm, dtype) in
        [(NormOver::Image, DType::F32), (NormOver::Position, DType::F16), (NormOver::Nothing, DType::Bf16)]
    {
        let config = config(norm, Activation::Silu);
        let cuda = Cuda::on(&turn.device, dtype).unwrap();
        let model = AffNet::new(cuda.clone(), config.clone(), random_params(&config, 3)).unwrap();
        let mut engine = Engine::of_affnet(&model, 2, PixelType::U8).unwrap();
        // The last is the first image of the second: products of fewer rows add in another order, the engine's do not.
        let batches = [waves(&config, 2, 0), waves(&config, 2, 3), waves(&config, 1, 3)];
        let eager = |images: &Images| {
            let output = model.forward(images).unwrap();
            [&output.map, &output.features, &output.logits].map(|it| cuda.download(it).unwrap())
        };
        let mut want: Vec<[Tensor; 3]> = batches[..2].iter().map(eager).collect();
        assert_ne!(want[0], want[1], "other images, other results");
        let first = |tensor: &Tensor| {
            let shape = [&[1], &tensor.shape()[1..]].concat();
            Tensor::new(&shape, tensor.data()[..shape.iter().product()].to_vec()).unwrap()
        };
        want.push(want[1].each_ref().map(first));
        for (images, want) in batches.iter().zip(&want) {
            let run = engine.run(images).unwrap();
            let (map, grid) = run.map().unwrap();
            assert_eq!(grid, config.grids()[5]);
            assert_eq!(&[map, run.features().unwrap(), run.logits().unwrap()], want, "{norm:?} {dtype}");
        }
        let mut got = Vec::new();
        engine
            .stream_batches(batches.iter().cloned().map(Ok), |_, run| {
                got.push([run.map()?.0, run.features()?, run.logits()?]);
                Ok(())
            })
            .unwrap();
        assert_eq!(got, want);

        let forecast = engine.forecast();
        assert!(forecast.token_counts().is_empty());
        let parts: Vec<Option<usize>> = forecast.launches().iter().map(|launch| launch.layer).collect();
        assert!(parts.is_sorted() && parts[0].is_none(), "{parts:?}");
        assert!((0..7).all(|part| parts.contains(&Some(part))), "{parts:?}");
        assert!(forecast.arena_bytes() as f64 <= 1.15 * forecast.largest_live_bytes() as f64);
        let (_, launched) = cuda.record(|| model.forward(&batches[0]).unwrap());
        let kernels = |all: &[foveate::cuda::LaunchRecord]| -> Vec<String> {
            all.iter().map(|launch| launch.kernel.clone()).collect()
        };
        // The eager pass sends its images up, which is none of the graph's business.
        assert!(kernels(&launched).ends_with(&kernels(forecast.launches())), "{norm:?} {dtype}");
        let most = Forecast::largest_affnet_batch(&model, PixelType::U8, forecast.arena_bytes()).unwrap();
        assert_eq!(most, 2);
        let message = engine.run(&waves(&config, 3, 0)).unwrap_err().to_string();
        assert!(message.contains("3 images, the engine was made for 2"), "{message}");
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
