use std::sync::Arc;

use foveate::{
    Reduction, TokenPlan,
    backend::{Backend, KeepInPlace, Linear, Pooling, Select},
    reduction::{Removal, Svite},
};

use super::{Check, File, Tolerance, images, load, record};

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

/// A masked checkpoint is a plain one with zeros; its selector in both of its meanings.
pub(crate) fn model(file: &File, check: &mut Check) {
    let vit = load(&file.path, "w/", &settings(file));
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
