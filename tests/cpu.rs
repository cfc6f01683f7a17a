//! The processor's backend against the plain reference: whole models, all methods.

use foveate::{
    Images, Pixels, Reduction, Tensor,
    backend::Backend,
    cpu::{Cpu, Instructions},
    model::{Vit, VitConfig, VitParams, arch},
    reduction::OwnWeights,
    reference::Reference,
};

fn images(batch: usize, config: &VitConfig) -> Images {
    let shape = [batch, config.channels, config.image[0], config.image[1]];
    let mut state = 12_345_u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    Images::new(shape, Pixels::U8((0..shape.iter().product()).map(|_| byte()).collect())).unwrap()
}

fn small() -> VitConfig {
    VitConfig { image: [64, 64], depth: 4, ..arch::config("deit_tiny").unwrap() }
}

/// Random weights, those of all methods included.
fn params(config: &VitConfig) -> VitParams<Tensor> {
    let own =
        OwnWeights { predictors: 3, selector: true, layer_selectors: config.depth, projections: 0b1100 };
    VitParams { reducers: arch::random_reducers(config, own, 8), ..arch::random_params(config, 7) }
}

const SPECS: [&str; 16] = [
    "none",
    "tome:r=3",
    "tome:r=2,proportional=false",
    "mctf:r=3",
    "mctf:r=3,pool=max",
    "mctf:r=3,ahead=0,pool=max",
    "mctf:r=0.3,layers=1/2,ahead=2",
    "evit:keep=0.6",
    "evit:keep=0.5,fuse=false",
    "dynamicvit:keep=0.7",
    "bat",
    "bat:keep=0.5,pairs=3,clusters=2,neighbours=3",
    "mstm",
    "mstm:keep=0.5,scales=2/3",
    "svite:tokens=11",
    "svite:tokens=11,mode=mask,layerwise=true",
];

fn all_instructions() -> impl Iterator<Item = Instructions> {
    Instructions::ALL.into_iter().filter(|instructions| instructions.available())
}

struct Ran {
    tokens: Tensor,
    logits: Tensor,
    groups: Vec<Vec<i32>>,
}

fn run<B: Backend>(backend: B, config: &VitConfig, batch: usize, reduction: &Reduction) -> Ran {
    let vit = Vit::new(backend, config.clone(), params(config)).unwrap();
    let output = vit.forward(&images(batch, config), reduction).unwrap();
    let map = output.source_map(vit.backend()).unwrap();
    Ran {
        tokens: vit.backend().download(&output.tokens).unwrap(),
        logits: vit.backend().download(output.logits.as_ref().unwrap()).unwrap(),
        groups: (0..batch).map(|image| map.groups(image).to_vec()).collect(),
    }
}

fn close(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    let scale = want.data().iter().fold(1.0_f32, |max, x| max.max(x.abs()));
    for (at, (got, want)) in got.data().iter().zip(want.data()).enumerate() {
        // Four blocks of sums over at most 768 values: 4·eps·sqrt(768)·4 is 5e-5.
        assert!((got - want).abs() <= 5e-5 * scale, "{what}, value {at}: {got} instead of {want}");
    }
}

#[test]
fn every_method_gives_what_the_reference_gives() {
    let config = small();
    for spec in SPECS {
        let Ok(reduction) = spec.parse::<Reduction>() else { panic!("{spec} is no method") };
        let want = run(Reference::new(), &config, 3, &reduction);
        for instructions in all_instructions() {
            let what = format!("{spec} with {instructions:?}");
            let got = run(Cpu::with(2, instructions).unwrap(), &config, 3, &reduction);
            assert_eq!(got.groups, want.groups, "{what}");
            close(&what, &got.tokens, &want.tokens);
            close(&what, &got.logits, &want.logits);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let config = VitConfig { image: [112, 112], depth: 2, ..arch::config("deit_tiny").unwrap() };
    for instructions in all_instructions() {
        let reductions =
            ["mctf:r=16,pool=max", "bat", "mstm", "dynamicvit:layers=0/1,keep=[0.6,0.3]", "svite:tokens=30"];
        for spec in ["none", "tome:r=13", "mctf:r=16", "evit:keep=0.5"].into_iter().chain(reductions) {
            let reduction: Reduction = spec.parse().unwrap();
            let one = run(Cpu::with(1, instructions).unwrap(), &config, 2, &reduction);
            for threads in [2, 5] {
                let got = run(Cpu::with(threads, instructions).unwrap(), &config, 2, &reduction);
                assert!(
                    got.tokens == one.tokens && got.logits == one.logits,
                    "{spec}, {threads} {instructions:?}"
                );
            }
        }
    }
}
