//! Every shape that timm's `VisionTransformer` can take, against timm's own outputs (`tests/timm/make.py`).

use std::path::Path;

use foveate::{
    Images, Pixels, Reduction, Tensor,
    reference::Reference,
    weights::{Checkpoint, LoadedVit, Overrides, load_vit},
};

const FILES: [&str; 5] =
    ["attention_pool", "clip_quickgelu", "no_class_token", "qk_norm_mean", "registers_swiglu"];

fn load(name: &str) -> (LoadedVit, Images, Checkpoint) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/timm/{name}.safetensors"));
    let file = Checkpoint::open(path).unwrap();
    let mut overrides = Overrides::default();
    let settings: Vec<String> = serde_json::from_str(&file.metadata()["set"]).unwrap();
    settings.iter().for_each(|setting| overrides.set(setting).unwrap());
    let loaded = load_vit(&file.with_prefix("w/"), None, &overrides).unwrap();
    let x = file.tensor("x").unwrap();
    let shape = <[usize; 4]>::try_from(x.shape()).unwrap();
    (loaded, Images::new(shape, Pixels::F32(x.into_data())).unwrap(), file)
}

fn close(name: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    let scale = want.data().iter().fold(1.0_f32, |m, x| m.max(x.abs()));
    for (got, want) in got.data().iter().zip(want.data()) {
        // Two blocks of sums over at most 192 values: 4·eps·sqrt(192)·2 is 1.4e-5.
        assert!((got - want).abs() <= 1.4e-5 * scale, "{name}: {got} instead of {want}");
    }
}

#[test]
fn dense_outputs_match_timm() {
    for name in FILES {
        let (loaded, images, file) = load(name);
        let vit = loaded.build(Reference::new()).unwrap();
        let output = vit.forward(&images, &Reduction::None).unwrap();
        close(name, &output.features, &file.tensor("features").unwrap());
        close(name, &output.logits.unwrap(), &file.tensor("logits").unwrap());
    }
}

/// Without positions, all patches of a flat picture are the same token. Merging them must change nothing, whatever the
/// readout: proportional attention and size-weighted pooling make up for the tokens that are gone.
#[test]
fn merging_equal_tokens_changes_nothing() {
    for name in FILES {
        let (mut loaded, images, _) = load(name);
        loaded.params.position = None;
        let vit = loaded.build(Reference::new()).unwrap();
        let values = images.shape().iter().product();
        let flat = Images::new(images.shape(), Pixels::F32(vec![0.25; values])).unwrap();
        let dense = vit.forward(&flat, &Reduction::None).unwrap();
        let reduced = vit.forward(&flat, &"tome:r=5".parse::<Reduction>().unwrap()).unwrap();
        assert!(reduced.token_counts[2] + 8 < dense.token_counts[2], "{name}");
        close(name, &reduced.logits.unwrap(), &dense.logits.unwrap());
    }
}

#[test]
fn every_method_that_suits_runs() {
    for name in FILES {
        let (loaded, images, _) = load(name);
        let vit = loaded.build(Reference::new()).unwrap();
        for spec in [
            "tome:r=3",
            "mctf:r=2",
            "mctf:r=2,ahead=0",
            "mctf:r=0.2,layers=1,ahead=2",
            "evit:keep=0.5,layers=0",
        ] {
            let reduction: Reduction = spec.parse().unwrap();
            match vit.forward(&images, &reduction) {
                Ok(output) => {
                    assert!(output.token_counts[2] < output.token_counts[0], "{name} {spec}");
                    assert!(output.logits.unwrap().data().iter().all(|x| x.is_finite()), "{name} {spec}");
                }
                Err(error) => {
                    assert!(!vit.config().class_token && spec.starts_with("evit"), "{name} {spec}: {error}");
                    assert!(error.to_string().contains("needs a class token"));
                }
            }
        }
    }
}
