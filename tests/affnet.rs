//! AFFNets out of checkpoints with the official names: what they become, and what is refused.

mod affnet_parts;

use affnet_parts::{CLASSES, Tensors, file, tensors};
use foveate::{
    Images, Pixels,
    backend::{Backend, NormOver},
    model::{Activation, AffNetConfig},
    reference::Reference,
    weights::{Checkpoint, Loaded, LoadedAffNet, Overrides, load, load_affnet},
};

fn read(tensors: &Tensors, settings: &[&str]) -> foveate::Result<LoadedAffNet> {
    let mut overrides = Overrides::default();
    settings.iter().try_for_each(|setting| overrides.set(setting))?;
    load_affnet(&Checkpoint::from_bytes("small.safetensors", file(tensors))?, &overrides)
}

#[track_caller]
fn refused(tensors: &Tensors, settings: &[&str], parts: &[&str]) {
    let message = read(tensors, settings).unwrap_err().to_string();
    for part in parts.iter().chain(&["small.safetensors"]) {
        assert!(message.contains(part) && !message.contains('\n'), "{message}");
    }
}

#[test]
fn names_and_shapes_tell_the_architecture() {
    let loaded = read(&tensors(), &["image=40x44"]).unwrap();
    let config = &loaded.config;
    assert_eq!(config.image, [40, 44]);
    assert_eq!((config.stem, config.features, config.classes), (8, 48, CLASSES));
    assert_eq!(config.stages.each_ref().map(|stage| stage.down.outputs), [24, 32, 40]);
    assert_eq!(config.bottlenecks[1].iter().map(|layer| layer.stride).collect::<Vec<_>>(), [2, 1]);
    assert_eq!((config.activation, config.norm, config.threshold), (Activation::Silu, NormOver::Image, 0.01));
    let norm = loaded.provenance.iter().find(|entry| entry.field == "norm").unwrap();
    assert_eq!((&norm.value[..], &norm.source[..]), ("layer_norm_2d", "as in the released models"));
    let model = loaded.clone().build(Reference::new()).unwrap();
    let pixels = (0..2 * 3 * 40 * 44).map(|i| (i * 37 % 251) as u8).collect();
    let images = Images::new([2, 3, 40, 44], Pixels::U8(pixels)).unwrap();
    let output = model.forward(&images).unwrap();
    let logits = model.backend().download(&output.logits).unwrap();
    assert_eq!((output.grid, logits.shape()), ([2, 2], &[2, CLASSES][..]));
    assert!(logits.data().iter().all(|value| value.is_finite()) && logits.item(0) != logits.item(1));
    let wrong = Images::new([1, 3, 44, 40], Pixels::U8(vec![0; 3 * 44 * 40])).unwrap();
    let message = model.forward(&wrong).unwrap_err().to_string();
    assert!(message.contains("44x40") && message.contains("40x44"), "{message}");
}

#[test]
fn a_file_tells_which_kind_of_model_it_holds() {
    let checkpoint = Checkpoint::from_bytes("small.safetensors", file(&tensors())).unwrap();
    assert!(matches!(load(&checkpoint, None, &Overrides::default()), Ok(Loaded::AffNet(_))));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/fashion_deit_f16.safetensors");
    let vit = Checkpoint::open(path).unwrap();
    assert!(matches!(load(&vit, None, &Overrides::default()), Ok(Loaded::Vit(_))));
    let mut overrides = Overrides::default();
    overrides.set("shrinkage=0.1").unwrap();
    let message = load(&vit, None, &overrides).unwrap_err().to_string();
    assert!(message.contains("`shrinkage=0.1` does not apply"), "{message}");
}

/// A batch norm folded in is that batch norm: the same network with norms that do nothing and weights scaled by hand.
#[test]
fn batch_norms_are_folded_in() {
    let plain = tensors();
    let mut scaled = plain.clone();
    for part in ["conv_1", "layer_3.1.fusion", "layer_4.0.block.conv_3x3"] {
        let norm = |which: &str| plain[&format!("{part}.block.norm.{which}")].1.clone();
        let [weight, bias, mean, variance] = ["weight", "bias", "running_mean", "running_var"].map(norm);
        let factors: Vec<f32> = weight.iter().zip(&variance).map(|(w, v)| w / (v + 1e-5).sqrt()).collect();
        let (shape, values) = scaled.get_mut(&format!("{part}.block.conv.weight")).unwrap();
        let row: usize = shape[1..].iter().product();
        for (row, factor) in values.chunks_mut(row).zip(&factors) {
            row.iter_mut().for_each(|value| *value *= factor);
        }
        let shift = (0..factors.len()).map(|i| bias[i] - mean[i] * factors[i]).collect();
        let mut set = |which: &str, values: Vec<f32>| {
            scaled.get_mut(&format!("{part}.block.norm.{which}")).unwrap().1 = values;
        };
        set("bias", shift);
        set("running_mean", vec![0.0; factors.len()]);
        set("running_var", vec![1.0 - 1e-5; factors.len()]);
        set("weight", vec![1.0; factors.len()]);
    }
    let pixels: Vec<f32> = (0..3 * 32 * 32).map(|i| (i * 37 % 251) as f32 / 251.0).collect();
    let images = Images::new([1, 3, 32, 32], Pixels::F32(pixels)).unwrap();
    let logits = |tensors: &Tensors| {
        let model = read(tensors, &["image=32"]).unwrap().build(Reference::new()).unwrap();
        model.forward(&images).unwrap().logits
    };
    let (a, b) = (logits(&plain), logits(&scaled));
    let worst = a.data().iter().zip(b.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}

#[test]
fn norms_with_running_statistics_become_scales() {
    let mut all = tensors();
    for (layer, width) in [(3, 24), (4, 32), (5, 40)] {
        for norm in ["0.norm1", "0.norm2", "1"] {
            let name = format!("layer_{layer}.1.global_rep.{norm}");
            all.insert(format!("{name}.running_mean"), (vec![width], vec![0.5; width]));
            all.insert(format!("{name}.running_var"), (vec![width], vec![4.0; width]));
        }
    }
    let loaded = read(&all, &[]).unwrap();
    assert_eq!(loaded.config.norm, NormOver::Nothing);
    let norm = &loaded.params.stages[0].1.norm;
    let original = &all["layer_3.1.global_rep.1.weight"].1;
    assert!((norm.weight.data()[3] - original[3] / 2.0).abs() < 1e-5);
    refused(&all, &["norm=layer_norm"], &["running_mean", "norm=layer_norm has no running statistics"]);
    refused(&tensors(), &["norm=batch_norm"], &["running_mean", "needs it"]);
}

#[test]
fn broken_checkpoints_are_named() {
    let without = |name: &str| {
        let mut all = tensors();
        all.remove(name).unwrap();
        all
    };
    for name in [
        "layer_4.1.global_rep.0.filter.b2",
        "layer_2.1.block.conv_3x3.block.norm.running_var",
        "conv_1x1_exp.block.conv.weight",
        "classifier.fc.weight",
        "layer_5.1.global_rep.1.bias",
    ] {
        refused(&without(name), &[], &[name, "missing"]);
    }
    refused(&without("conv_1.block.conv.weight"), &[], &["is no AFFNet"]);
    let with = |name: &str, shape: &[usize], value: f32| {
        let mut all = tensors();
        all.insert(name.to_owned(), (shape.to_vec(), vec![value; shape.iter().product()]));
        all
    };
    refused(&with("layer_6.weight", &[1], 0.0), &[], &["layer_6.weight", "does not belong"]);
    refused(&with("layer_3.1.global_rep.0.filter.w2", &[2, 8, 3, 4], 0.0), &[], &["filter.w2", "has shape"]);
    refused(&with("conv_1.block.norm.running_var", &[8], -1.0), &[], &["running_var", "a variance"]);
    refused(&with("conv_1.block.norm.weight", &[8], f32::NAN), &[], &["conv_1.block.norm.weight", "damaged"]);
    refused(&with("conv_1.block.conv.weight", &[8, 2, 3, 3], 0.0), &[], &["2 input channels"]);
    refused(&tensors(), &["heads=3"], &["`heads=3` does not apply"]);
    refused(&tensors(), &["readout=mean"], &["`readout=mean` does not apply"]);
    refused(&tensors(), &["activation=gelu"], &["silu or relu"]);
    refused(&tensors(), &["mean=0.5,0.4"], &["mean has 2 values"]);
}

#[test]
fn published_architectures_have_the_published_sizes() {
    // Parameters of the convolutions and of their batch norms' scale and shift, of norms, filters and classifier.
    for (name, published) in [("affnet_et", 1_436_264), ("affnet_t", 2_654_232), ("affnet_s", 5_568_696)] {
        let config = AffNetConfig::published(name).unwrap();
        let mut values = 0;
        let mut folded = 0;
        let params = foveate::model::affnet::random_params(&config, 1);
        // A folded convolution has a bias where the official one has a scale and a shift.
        for layers in &params.bottlenecks {
            folded += layers
                .iter()
                .map(|l| l.expand.weight.dim(0) + l.depthwise.bias.dim(0) + l.reduce.weight.dim(0))
                .sum::<usize>();
        }
        folded += params.stem.bias.dim(0) + params.expand.weight.dim(0);
        for (down, body) in &params.stages {
            for layer in std::iter::once(down).chain(body.layers.iter().map(|layer| &layer.mlp)) {
                folded +=
                    layer.expand.weight.dim(0) + layer.depthwise.bias.dim(0) + layer.reduce.weight.dim(0);
            }
            folded += body.proj.weight.dim(0);
            folded += body.fusion.as_ref().map_or(0, |[first, _]| first.weight.dim(0));
        }
        params
            .try_map(&mut |tensor| {
                values += tensor.data().len();
                Ok(tensor)
            })
            .unwrap();
        assert_eq!(values + folded, published, "{name}");
    }
}
