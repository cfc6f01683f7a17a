use foveate::{
    Tensor,
    backend::{Backend, Frequency, GridBackend, NormOver},
    model::Activation,
    reference::frequency,
    weights::{Checkpoint, Overrides, load_aff_block, load_affnet},
};

use super::{Array, Check, File, Tolerance, images, int, text};

/// (B, C, H, W) as a feature map (B, H·W, C).
fn map(array: &Array) -> Tensor {
    let &[batch, channels, height, width] = &array.shape[..] else { panic!("an image-shaped tensor") };
    let n = height * width;
    let at = |i: usize| {
        let (image, position, channel) = (i / (n * channels), i / channels % n, i % channels);
        array.values[(image * channels + channel) * n + position] as f32
    };
    Tensor::new(&[batch, n, channels], (0..array.values.len()).map(at).collect()).unwrap()
}

/// The other way round.
fn planes(map: &Tensor) -> Vec<f32> {
    let (n, channels) = (map.dim(1), map.dim(2));
    let at = |i: usize| {
        let (image, channel, position) = (i / (n * channels), i / n % channels, i % n);
        map.data()[(image * n + position) * channels + channel]
    };
    (0..map.data().len()).map(at).collect()
}

fn activation(config: &serde_json::Value) -> Activation {
    Activation::parse(text(config, "activation")).unwrap()
}

fn threshold(config: &serde_json::Value) -> f32 {
    config["sparsity_threshold"].as_f64().unwrap() as f32
}

fn filter(file: &File, prefix: &str) -> Frequency<Tensor> {
    let part = |name: &str| file.tensor(&format!("{prefix}{name}"));
    Frequency {
        w1: part("w1"),
        b1: part("b1"),
        w2: part("w2"),
        b2: part("b2"),
        activation: activation(&file.config),
        threshold: threshold(&file.config),
    }
}

/// The mixer as the backend runs it.
fn run(x: &Tensor, grid: [usize; 2], filter: &Frequency<Tensor>, residual: Option<&Tensor>) -> Tensor {
    let backend = crate::backend();
    backend.frequency(x, grid, filter, residual).unwrap()
}

/// The mixer by itself, step by step and in one.
pub(crate) fn operation(file: &File, check: &mut Check) {
    let scaled = Tolerance::Scaled(1e-5);
    let grid = [file.int("H"), file.int("W")];
    let (x, filter) = (map(file.array("x")), filter(file, ""));
    check.same("groups", &filter.w1.dim(1), &file.int("num_blocks"));
    let complex = |part: &frequency::Spectrum| {
        let pairs = part.re.data().iter().zip(part.im.data());
        pairs.flat_map(|(&re, &im)| [re, im]).collect::<Vec<f32>>()
    };
    let spectrum = frequency::spectrum(&x, grid).unwrap();
    check.close("spec", &complex(&spectrum), file.array("spec"), scaled);
    let mask = frequency::mask(&spectrum, &filter).unwrap();
    check.close("mask", &complex(&mask), file.array("mask"), scaled);
    let product = frequency::product(&mask, &spectrum);
    check.close("prod", &complex(&product), file.array("prod"), scaled);
    let y = frequency::inverse(&product, grid).unwrap();
    check.close("y", &planes(&y), file.array("y"), scaled);
    check.close("out", &planes(&run(&x, grid, &filter, None)), file.array("out"), scaled);
}

/// A stage's body.
pub(crate) fn block(file: &File, check: &mut Check) {
    let scaled = Tolerance::Scaled(2e-5);
    let config = &file.config;
    let norm = NormOver::parse(text(config, "norm")).unwrap();
    let checkpoint = Checkpoint::open(&file.path).unwrap().with_prefix("w/");
    let eps = config["norm_eps"].as_f64().unwrap() as f32;
    let params = load_aff_block(&checkpoint, norm, activation(config), threshold(config), eps).unwrap();
    check.same("blocks", &params.layers.len(), &int(config, "n_blocks"));
    check.same("fusion", &params.fusion.is_some(), &!config["no_fuse"].as_bool().unwrap());
    let backend = crate::backend();
    let grid = [file.int("H"), file.int("W")];
    let params = params.try_map(&mut |tensor| backend.upload(tensor)).unwrap();
    let x = map(file.array("x"));
    let last = format!("global_rep.{}", params.layers.len());
    let mut filtered = None;
    let mut look = |place: &str, seen: &Tensor| {
        let name = match place {
            "global_rep.0.norm1" => "act/b0_norm1",
            "global_rep.0.mlp" => "act/b0_mlp",
            "global_rep.0.norm2" => {
                filtered = Some(run(seen, grid, &filter(file, "w/global_rep.0.filter."), None));
                "act/b0_norm2"
            }
            "global_rep.0" => "act/b0_out",
            "conv_proj" => "act/conv_proj",
            other if other == last => "act/final_norm",
            _ => return,
        };
        check.close(name, &planes(seen), file.array(name), scaled);
    };
    let out = params.forward(&backend, norm, x, grid, Some(&mut look)).unwrap();
    check.close("act/b0_filter", &planes(&filtered.unwrap()), file.array("act/b0_filter"), scaled);
    check.close("out", &planes(&out), file.array("out"), scaled);
}

/// A whole network.
pub(crate) fn model(file: &File, check: &mut Check) {
    let scaled = Tolerance::Scaled(2e-4);
    let checkpoint = Checkpoint::open(&file.path).unwrap().with_prefix("w/");
    let mut overrides = Overrides::default();
    for setting in [
        format!("image={}x{}", file.int("H"), file.int("W")),
        format!("activation={}", text(&file.config, "activation")),
        format!("norm={}", text(&file.config, "norm")),
        format!("shrinkage={}", threshold(&file.config)),
        format!("norm_eps={}", file.config["norm_eps"]),
    ] {
        overrides.set(&setting).unwrap();
    }
    let model = load_affnet(&checkpoint, &overrides).unwrap().build(crate::backend()).unwrap();
    let published = foveate::model::AffNetConfig::published("affnet_et").unwrap();
    check.same("widths", &model.config().stages, &published.stages);
    check.same("features", &model.config().features, &published.features);
    check.same("classes", &model.config().classes, &file.int("n_classes"));
    let mut look = |place: &str, seen: &Tensor| {
        if let Some(layer) = place.strip_prefix("layer_")
            && let Some(want) = file.get(&format!("act/out_l{layer}"))
        {
            check.close(place, &planes(seen), want, scaled);
        }
    };
    let output = model.forward_observed(&images(file.array("x")), &mut look).unwrap();
    check.close("act/pooled", output.features.data(), file.array("act/pooled"), scaled);
    check.close("logits", output.logits.data(), file.array("logits"), scaled);
}
