//! LV-ViT and T2T-ViT as whole models: on the kernels as on the reference, in an engine as without one, with every method.
#![cfg(feature = "cuda")]

use foveate::{
    Images, Pixels, Reduction, Tensor,
    backend::Backend,
    cuda::{Cuda, DType, Engine, patch::PixelType},
    model::{Readout, Stem, TokensAttention, Vit, VitConfig, VitParams, arch},
    reduction::{Method, OwnWeights},
    reference::Reference,
};
use foveate_device_tests::Turn;

/// 16 patches and a class token each.
fn models() -> Vec<(&'static str, VitConfig)> {
    let lvvit = arch::config("lvvit_t").unwrap();
    let small = VitConfig { width: 60, heads: 2, hidden: 96, depth: 3, classes: 10, ..lvvit };
    let t2t = |attention| VitConfig {
        image: [64; 2],
        stem: Stem::TokensToToken { width: 32, attention },
        readout: Readout::Class,
        width: 64,
        ..small.clone()
    };
    vec![
        // Heads of 30 values, filled up to 32.
        (
            "lvvit",
            VitConfig {
                image: [32; 2],
                patch: [8; 2],
                stem: Stem::Convolutions { filters: 8 },
                ..small.clone()
            },
        ),
        ("t2t, performer", t2t(TokensAttention::Performer { features: 8 })),
        ("t2t, transformer", t2t(TokensAttention::Transformer)),
    ]
}

fn params(config: &VitConfig) -> VitParams<Tensor> {
    let needed = OwnWeights { predictors: 2, selector: true, projections: 1 << 2, ..OwnWeights::default() };
    VitParams { reducers: arch::random_reducers(config, needed, 4), ..arch::random_params(config, 1) }
}

fn pictures(config: &VitConfig, batch: usize) -> Images {
    let [height, width] = config.image;
    let shape = [batch, 3, height, width];
    let pixel = |at: usize| {
        let (x, y, plane) = (at % width, at / width % height, at / (width * height));
        (((x * (37 + plane) + y * 11 + plane * 5) % 97 + (x * y + plane * 7) % 31 * 3) % 251) as u8
    };
    Images::new(shape, Pixels::U8((0..shape.iter().product()).map(pixel).collect())).unwrap()
}

const SPECS: [&str; 8] = [
    "none",
    "tome:r=3",
    "mctf:r=2",
    "evit:keep=0.6,layers=0/1",
    "dynamicvit:keep=0.7,layers=1/2",
    "svite:tokens=9",
    "bat:keep=0.6,layers=0/1",
    "mstm:keep=0.6,layers=0/1",
];

/// An engine gives the eager pass's bits. Returns how far the dense model's logits are from the reference's, of the largest.
fn check(turn: &Turn, name: &str, config: &VitConfig, dtype: DType, specs: &[&str]) -> f32 {
    let cuda = Cuda::on(&turn.device, dtype).unwrap();
    Cuda::supports(config, dtype).unwrap();
    let images = pictures(config, 2);
    let vit = Vit::new(cuda.clone(), config.clone(), params(config)).unwrap();
    let reference = Vit::new(Reference::new(), config.clone(), params(config)).unwrap();
    let mut error = 0.0_f32;
    for spec in specs {
        let method: Reduction = spec.parse().unwrap();
        let eager = vit.forward(&images, &method).unwrap();
        let logits = cuda.download(eager.logits.as_ref().unwrap()).unwrap();
        let mut engine = Engine::new(&vit, &method, 2, PixelType::U8).unwrap();
        let run = engine.run(&images).unwrap();
        assert_eq!(run.logits().unwrap().unwrap(), logits, "{name} {dtype} {spec}: the engine");
        let want = reference.forward(&images, &method).unwrap();
        assert_eq!(run.token_counts(), want.token_counts, "{name} {dtype} {spec}");
        if method != Reduction::None {
            continue;
        }
        let want = want.logits.unwrap();
        let largest = want.data().iter().fold(1.0_f32, |largest, x| largest.max(x.abs()));
        for (got, want) in logits.data().iter().zip(want.data()) {
            error = error.max((got - want).abs() / largest);
        }
        assert!(
            want.item(0).iter().zip(want.item(1)).any(|(a, b)| (a - b).abs() > 0.05 * largest),
            "{name}: images that cannot be told apart"
        );
    }
    error
}

#[test]
fn engines_and_reference_agree() {
    let Some(turn) = Turn::new() else { return };
    for (name, config) in models() {
        for spec in SPECS {
            spec.parse::<Reduction>().unwrap().check(&params(&config).host(&config)).unwrap();
        }
        let exact = check(&turn, name, &config, DType::F32, &SPECS);
        let halves = check(&turn, name, &config, DType::F16, &SPECS[..3]);
        let coarse = check(&turn, name, &config, DType::Bf16, &SPECS[..1]);
        println!("{name}: {exact:e} in f32, {halves:e} in f16, {coarse:e} in bf16");
        // The golden files' tolerances of networks; bf16 has three bits fewer than f16, and chance a factor of two.
        assert!(exact <= 2e-5, "{name} in f32: {exact:e}");
        assert!(halves <= 5e-2, "{name} in f16: {halves:e}");
        assert!(coarse <= 5e-2, "{name} in bf16: {coarse:e}");
        // A performer's exponentials magnify what keys and queries lost when they were rounded: 17 times f16's error was seen.
        if !name.contains("performer") {
            assert!(
                coarse <= 16.0 * halves.max(1.0 / 1024.0),
                "{name} in bf16: {coarse:e}, in f16 {halves:e}"
            );
        }
    }
    turn.end();
}

/// As published: 224 by 224 pixels, random weights.
#[test]
#[ignore = "minutes on the emulated driver"]
fn published_models_in_full_size() {
    let Some(turn) = Turn::new() else { return };
    for name in ["lvvit_t", "t2t_vit_7", "t2t_vit_t_14"] {
        let config = arch::config(name).unwrap();
        let error = check(&turn, name, &config, DType::F16, &["none"]);
        println!("{name}: {error:e} in f16");
        assert!(error <= 5e-2, "{name}: {error:e}");
    }
    turn.end();
}

/// Tokens that are masked but stay would be read by the auxiliary head.
#[test]
fn masks_and_auxiliary_heads_do_not_go_together() {
    let Some(turn) = Turn::new() else { return };
    let (_, config) = models().remove(0);
    let vit = Vit::new(Cuda::on(&turn.device, DType::F32).unwrap(), config.clone(), params(&config)).unwrap();
    let method: Reduction = "svite:tokens=9,mode=mask".parse().unwrap();
    let error = vit.forward(&pictures(&config, 1), &method).unwrap_err().to_string();
    assert!(error.contains("auxiliary head would read them; use mode=gather"), "{error}");
    drop(vit);
    turn.end();
}
