use std::sync::Arc;

use foveate::{
    Reduction, TokenPlan,
    backend::{Backend, KeepInPlace, Linear, Pooling, Select},
    model::{BlockSize, Vit},
    reduction::{Removal, Svite},
    weights::{Checkpoint, LoadedVit, Overrides, load_vit},
};
use safetensors::{SafeTensors, tensor::TensorView};

use super::{Check, File, Tolerance, images, load, loaded, record};

/// The tokens that a plan of an image keeps, as a row of zeros and ones.
fn mask(plan: &TokenPlan, image: usize) -> Vec<usize> {
    let mut mask = vec![0; plan.tokens_in()];
    for token in 0..plan.tokens_out() {
        let (members, weights) = plan.group(image, token);
        for (&member, &weight) in members.iter().zip(weights) {
            mask[member as usize] = usize::from(weight > 0.0);
        }
    }
    mask
}

pub(crate) fn selector(file: &File, check: &mut Check) {
    let backend = crate::backend();
    let x = file.tensor("x");
    let selector = Linear { weight: file.tensor("gumbel.weight"), bias: Some(file.tensor("gumbel.bias")) };
    let scaled = Tolerance::Scaled(1e-5);
    let plain = backend.token_scores(&x, &selector, None).unwrap();
    check.close("scores", plain.data(), file.array("scores"), scaled);
    let noise = file.tensor("noise");
    let scores = backend.token_scores(&x, &selector, Some(&noise)).unwrap();
    let keep = file.int("k");
    let best = backend.select(&Select { class_scores: &scores, special: 0, keep, fuse: false }).unwrap();
    let in_place =
        |masked| backend.keep_in_place(&KeepInPlace { scores: &scores, special: 1, keep, masked }).unwrap();
    let (masked, gathered) = (in_place(true), in_place(false));
    for image in 0..x.dim(0) {
        let order: Vec<usize> = (0..keep).map(|at| best.group(image, at).0[0] as usize).collect();
        check.same("topk_idx", &order, &file.array("topk_idx").indices(image));
        let want = file.array("mask").indices(image);
        check.same("mask", &mask(&masked, image), &want);
        check.same("gathered tokens", &mask(&gathered, image), &want);
    }
    check.same("places", &gathered.tokens_out(), &(keep + 1).min(x.dim(1)));
    let out = backend.merge(&x, None, &masked, Pooling::Weighted, None).unwrap().tokens;
    check.close("out", out.data(), file.array("out"), Tolerance::Absolute(1e-30));
}

fn settings(file: &File) -> [String; 3] {
    [
        format!("heads={}", file.int("heads")),
        format!("image={}", file.int("img")),
        format!("norm_eps={}", file.config["ln_eps"]),
    ]
}

/// The parameters `w/NAME` of a golden file under their own names, with their masks beside them. Masked weights are 7 instead
/// of 0, so that a mask which is not applied shows.
fn masked(file: &File) -> LoadedVit {
    let bytes = std::fs::read(&file.path).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = Vec::new();
    for (name, view) in stored.tensors() {
        let mut data = view.data().to_vec();
        if let Some(own) = name.strip_prefix("w/") {
            if let Ok(mask) = stored.tensor(&format!("mask/{own}")) {
                let values = data.as_chunks_mut::<4>().0.iter_mut().zip(mask.data());
                values.filter(|(_, there)| **there == 0).for_each(|(v, _)| *v = 7.0_f32.to_le_bytes());
            }
            tensors.push((own.to_owned(), view.dtype(), view.shape().to_vec(), data));
        } else if name.starts_with("mask/") || matches!(name.rsplit('.').next(), Some("heads" | "neurons")) {
            tensors.push((name, view.dtype(), view.shape().to_vec(), data));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    let checkpoint = Checkpoint::from_bytes("masked.safetensors", bytes).unwrap();
    let mut overrides = Overrides::default();
    settings(file).iter().for_each(|setting| overrides.set(setting).unwrap());
    load_vit(&checkpoint, None, &overrides).unwrap()
}

/// A checkpoint with masks of heads and neurons runs without them.
pub(crate) fn structured(file: &File, check: &mut Check) {
    let plain = load(&file.path, "w/", &settings(file));
    let images = images(file.array("x"));
    let scaled = Tolerance::Scaled(1e-5);
    let (output, _) = record(&plain, &images, &Reduction::None);
    check.close("logits", output.logits.unwrap().data(), file.array("logits"), scaled);
    let loaded = masked(file);
    let size = BlockSize { heads: file.int("heads_kept"), hidden: file.int("hidden_kept") };
    check.same("sizes", &loaded.config.compact, &vec![size; file.int("depth")]);
    for (i, block) in loaded.params.blocks.iter().enumerate() {
        let array = |name: &str| file.array(&format!("compact/blocks.{i}.{name}"));
        for (name, layer) in [("attn.qkv", &block.qkv), ("mlp.fc1", &block.fc1), ("mlp.fc2", &block.fc2)] {
            check.same(name, &layer.weight, &array(&format!("{name}.weight")).tensor());
            let bias = layer.bias.as_ref().unwrap();
            check.same(name, bias, &array(&format!("{name}.bias")).tensor());
        }
        // The official class pads the projection with columns that nothing reaches.
        let inner = block.proj.weight.width();
        let official = array("attn.proj.weight").tensor();
        let columns = official.data().chunks(official.width()).flat_map(|row| &row[..inner]).copied();
        check.same("attn.proj", &block.proj.weight.data().to_vec(), &columns.collect());
        let bias = block.proj.bias.as_ref().unwrap();
        check.close("attn.proj.bias", bias.data(), array("attn.proj.bias"), Tolerance::Scaled(1e-6));
    }
    let compact = Vit::new(crate::backend(), loaded.config, loaded.params).unwrap();
    let (output, _) = record(&compact, &images, &Reduction::None);
    check.close("logits_compact", output.logits.unwrap().data(), file.array("logits_compact"), scaled);
}

/// A masked checkpoint is a plain one with zeros; its selector in both of its meanings.
pub(crate) fn model(file: &File, check: &mut Check) {
    let vit = load(&file.path, "w/", &settings(file));
    let masked = masked(file);
    let same = vit.config() == &masked.config
        && loaded(&file.path, "w/", &settings(file)).params.blocks.iter().zip(&masked.params.blocks).all(
            |(a, b)| {
                [(&a.qkv, &b.qkv), (&a.proj, &b.proj), (&a.fc1, &b.fc1), (&a.fc2, &b.fc2)]
                    .iter()
                    .all(|(a, b)| a.weight == b.weight)
            },
        );
    check.same("masks beside weights", &same, &true);
    let images = images(file.array("x"));
    let scaled = Tolerance::Scaled(1e-5);
    let (plain, _) = record(&vit, &images, &Reduction::None);
    check.close("logits_no_selector", plain.logits.unwrap().data(), file.array("logits_no_selector"), scaled);
    let noise = vec![Arc::new(file.tensor("noise"))];
    for (name, removal, noise) in [
        ("logits_mult_det", Removal::Mask, Vec::new()),
        ("logits_mult_noise", Removal::Mask, noise),
        ("logits_gather_det", Removal::Gather, Vec::new()),
    ] {
        let deterministic = noise.is_empty();
        let method = Svite { tokens: file.int("k"), removal, layerwise: false, noise };
        let (output, record) = record(&vit, &images, &method);
        check.close(name, output.logits.unwrap().data(), file.array(name), scaled);
        let step = &record.steps[0];
        for image in (0..step.plan.batch()).filter(|_| deterministic) {
            let want = file.array("selector_mask").indices(image);
            check.same(&format!("{name}: mask"), &mask(&step.plan, image), &want);
        }
    }
}

pub(crate) fn layerwise(file: &File, check: &mut Check) {
    let vit = load(&file.path, "w/", &settings(file));
    let images = images(file.array("x"));
    let scaled = Tolerance::Scaled(1e-5);
    let noise = (0..=file.int("depth")).map(|i| Arc::new(file.tensor(&format!("noise.{i}")))).collect();
    let method = |noise| Svite { tokens: file.int("k"), removal: Removal::Mask, layerwise: true, noise };
    for (name, method) in [
        ("logits_det", Reduction::Svite(method(Vec::new()))),
        ("logits_noise", Reduction::Svite(method(noise))),
        ("logits_off", Reduction::None),
    ] {
        let (output, _) = record(&vit, &images, &method);
        check.close(name, output.logits.unwrap().data(), file.array(name), scaled);
    }
}
