//! LV-ViT and T2T-ViT.

use foveate::{
    Images, Pixels, Reduction,
    model::{Readout, Stem, TokensAttention},
    reference::Reference,
    weights::Family,
};

use super::{CLASSES, Tensors, WIDTH, fails, load, put, put_layer, put_norm, renamed, timm};

const FILTERS: usize = 6;

/// A small LV-ViT: patches of 4, an image of 12.
fn lvvit() -> Tensors {
    let mut t = timm();
    t.retain(|name, _| !name.contains("qkv.bias"));
    for (i, (inputs, kernel)) in [(3, 7), (FILTERS, 3), (FILTERS, 3)].into_iter().enumerate() {
        let i = i + 1;
        put(&mut t, &format!("patch_embed.conv{i}.weight"), &[FILTERS, inputs, kernel, kernel]);
        put_norm(&mut t, &format!("patch_embed.bn{i}"), FILTERS);
        put(&mut t, &format!("patch_embed.bn{i}.running_mean"), &[FILTERS]);
        put(&mut t, &format!("patch_embed.bn{i}.running_var"), &[FILTERS]);
        put(&mut t, &format!("patch_embed.bn{i}.num_batches_tracked"), &[]);
        let variance = &mut t.get_mut(&format!("patch_embed.bn{i}.running_var")).unwrap().1;
        variance.iter_mut().for_each(|v| *v += 1.0);
    }
    put(&mut t, "patch_embed.proj.weight", &[WIDTH, FILTERS, 2, 2]);
    put_layer(&mut t, "aux_head", CLASSES, WIDTH);
    t
}

fn logits(tensors: &Tensors, settings: &[&str]) -> Vec<f32> {
    let model = load(tensors, settings).unwrap().build(Reference::new()).unwrap();
    let pixels = (0..3 * 144).map(|i| (i * 37 % 251) as u8).collect();
    let images = Images::new([1, 3, 12, 12], Pixels::U8(pixels)).unwrap();
    model.forward(&images, &Reduction::None).unwrap().logits.unwrap().into_data()
}

#[test]
fn an_lv_vit_is_read_off_its_names() {
    let loaded = load(&lvvit(), &["skip_lam=2", "heads=2"]).unwrap();
    let c = &loaded.config;
    assert_eq!((loaded.family, c.stem), (Family::LvVit, Stem::Convolutions { filters: FILTERS }));
    assert_eq!((c.patch, c.image, c.channels, c.width), ([4, 4], [12, 12], 3, WIDTH));
    assert!(c.readout == Readout::ClassAndAux && c.norm_eps.to_bits() == 1e-5_f32.to_bits());
    let found = |field: &str| {
        let entry = loaded.provenance.iter().find(|entry| entry.field == field).unwrap();
        (entry.value.clone(), entry.source.clone())
    };
    assert_eq!(found("skip_lam"), ("2".to_owned(), "override".to_owned()));
    assert_eq!(found("stem").0, "3 convolutions, 6 filters");
    assert_eq!(found("readout").1, "tensor names (auxiliary head)");
    // With wrappers the same model.
    let wrapped = lvvit().into_iter().map(|(name, tensor)| (format!("state_dict_ema.module.{name}"), tensor));
    let settings = ["skip_lam=2", "heads=2"];
    assert_eq!(logits(&wrapped.collect(), &settings), logits(&lvvit(), &settings));
}

#[test]
fn residuals_are_divided_and_the_auxiliary_head_counts_half() {
    let divided = logits(&lvvit(), &["skip_lam=2", "heads=2"]);
    // Layers that are halved in the file need no division.
    let mut halved = lvvit();
    for (name, (_, values)) in &mut halved {
        if name.contains("attn.proj") || name.contains("mlp.fc2") {
            values.iter_mut().for_each(|v| *v /= 2.0);
        }
    }
    assert_eq!(logits(&halved, &["skip_lam=1", "heads=2"]), divided);
    assert_ne!(logits(&lvvit(), &["skip_lam=1", "heads=2"]), divided);

    let class = logits(&lvvit(), &["skip_lam=2", "heads=2", "readout=class"]);
    let mut without = lvvit();
    without.retain(|name, _| !name.contains("aux_head"));
    assert_eq!(logits(&without, &["skip_lam=2", "heads=2"]), class);
    // A constant auxiliary head adds half its bias.
    let mut constant = lvvit();
    constant.get_mut("aux_head.weight").unwrap().1.fill(0.0);
    constant.get_mut("aux_head.bias").unwrap().1.fill(3.0);
    for (with, class) in logits(&constant, &["skip_lam=2", "heads=2"]).iter().zip(class) {
        assert!((with - class - 1.5).abs() < 1e-6, "{with} and {class}");
    }
}

#[test]
fn what_nothing_tells_is_asked_for() {
    fails(load(&lvvit(), &["heads=2"]), &["width 16 and depth 2", "set skip_lam"]);
    fails(load(&timm(), &["heads=2", "skip_lam=2"]), &["`skip_lam=2` does not apply: only LV-ViT"]);
    let mut headless = lvvit();
    headless.retain(|name, _| !name.starts_with("aux_head"));
    fails(
        load(&headless, &["heads=2", "skip_lam=1", "readout=class_and_aux"]),
        &["readout class_and_aux (override) needs a head and an auxiliary head", "readout=class"],
    );
    fails(
        load(&lvvit(), &["heads=2", "skip_lam=1", "image=14"]),
        &["image height 14 is not a positive multiple of the patch height 4"],
    );
    // Rectangles are fine: positions are resampled.
    assert_eq!(load(&lvvit(), &["heads=2", "skip_lam=1", "image=8x20"]).unwrap().config.grid(), [2, 5]);
}

#[test]
fn wrong_stems_are_named() {
    let settings = ["heads=2", "skip_lam=1"];
    let broken = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = lvvit();
        change(&mut tensors);
        load(&tensors, &settings)
    };
    fails(
        broken(&|t| drop(t.remove("patch_embed.bn2.running_var"))),
        &["patch_embed.bn2.running_var", "missing; expected shape (6)"],
    );
    fails(broken(&|t| drop(t.remove("patch_embed.bn1.weight"))), &["patch_embed.bn1.weight", "missing"]);
    fails(broken(&|t| drop(t.remove("patch_embed.conv3.weight"))), &["patch_embed.conv3.weight", "missing"]);
    fails(
        broken(&|t| put(t, "patch_embed.conv1.weight", &[FILTERS, 3, 5, 5])),
        &["patch_embed.conv1.weight", "has shape (6, 3, 5, 5); expected (6, 3, 7, 7)"],
    );
    fails(
        broken(&|t| put(t, "patch_embed.conv2.weight", &[FILTERS, 4, 3, 3])),
        &["patch_embed.conv2.weight", "expected (6, 6, 3, 3)"],
    );
    fails(
        broken(&|t| put(t, "patch_embed.proj.weight", &[WIDTH, 5, 2, 2])),
        &["patch_embed.proj.weight", "expected (16, 6, 2, 2)"],
    );
    fails(
        broken(&|t| put(t, "patch_embed.conv1.bias", &[FILTERS])),
        &["patch_embed.conv1.bias", "extra tensor, not part of a official LV-ViT model"],
    );
    fails(
        broken(&|t| t.get_mut("patch_embed.bn3.running_var").unwrap().1[2] = -1.0),
        &["patch_embed.bn3.running_var", "holds -1; a variance is at least 0"],
    );
    fails(broken(&|t| put(t, "aux_head.weight", &[4, WIDTH])), &["aux_head.weight", "expected (5, 16)"]);
    fails(
        load(&renamed(&lvvit(), &[("conv2", "conv4")]), &settings),
        &["patch_embed.conv4.weight", "extra tensor"],
    );
}

/// Width of the tokens before the blocks, and random features.
const TOKENS: usize = 8;
const FEATURES: usize = 4;

/// A small T2T-ViT: an image of 48.
fn t2t(performer: bool) -> Tensors {
    let mut t = timm();
    t.retain(|name, _| !name.contains("qkv.bias") && !name.starts_with("patch_embed"));
    for (stage, inputs) in [(1, 49 * 3), (2, 9 * TOKENS)] {
        let name = |part: &str| format!("tokens_to_token.attention{stage}.{part}");
        put_norm(&mut t, &name("norm1"), inputs);
        put_norm(&mut t, &name("norm2"), TOKENS);
        let [proj, fc1, fc2] =
            if performer { ["proj", "mlp.0", "mlp.2"] } else { ["attn.proj", "mlp.fc1", "mlp.fc2"] };
        for layer in [proj, fc1, fc2] {
            put_layer(&mut t, &name(layer), TOKENS, TOKENS);
        }
        if performer {
            put_layer(&mut t, &name("kqv"), 3 * TOKENS, inputs);
            put(&mut t, &name("w"), &[FEATURES, TOKENS]);
        } else {
            put(&mut t, &name("attn.qkv.weight"), &[3 * TOKENS, inputs]);
        }
    }
    put_layer(&mut t, "tokens_to_token.project", WIDTH, 9 * TOKENS);
    t
}

#[test]
fn a_t2t_vit_is_read_off_its_names() {
    for (performer, attention) in
        [(true, TokensAttention::Performer { features: FEATURES }), (false, TokensAttention::Transformer)]
    {
        let loaded = load(&t2t(performer), &["heads=2"]).unwrap();
        let c = &loaded.config;
        assert_eq!(
            (loaded.family, c.stem),
            (Family::T2tVit, Stem::TokensToToken { width: TOKENS, attention })
        );
        assert_eq!((c.patch, c.image, c.channels, c.width), ([16, 16], [48, 48], 3, WIDTH));
        assert!(c.readout == Readout::Class && c.norm_eps.to_bits() == 1e-5_f32.to_bits());
        let stem = loaded.provenance.iter().find(|entry| entry.field == "stem").unwrap();
        assert!(
            stem.value.starts_with("tokens to token, ") && stem.value.contains("width 8"),
            "{}",
            stem.value
        );
        let wrapped = t2t(performer).into_iter();
        let wrapped =
            wrapped.map(|(name, tensor)| (format!("state_dict_ema.module.{name}"), tensor)).collect();
        assert_eq!(super::text(&load(&wrapped, &["heads=2"]).unwrap()), super::text(&loaded));
        // Rectangles: the official code reshapes to squares, the definition does not need them.
        let wide =
            load(&t2t(performer), &["heads=2", "image=32x64"]).unwrap().build(Reference::new()).unwrap();
        let images = Images::new([1, 3, 32, 64], Pixels::U8(vec![7; 3 * 32 * 64])).unwrap();
        assert_eq!(wide.forward(&images, &Reduction::None).unwrap().token_counts[0], 9);
    }
}

#[test]
fn wrong_tokens_to_token_modules_are_named() {
    let broken = |performer: bool, change: &dyn Fn(&mut Tensors)| {
        let mut tensors = t2t(performer);
        change(&mut tensors);
        load(&tensors, &["heads=2"])
    };
    let name = |part: &str| format!("tokens_to_token.attention{part}");
    fails(broken(true, &|t| drop(t.remove(&name("1.w")))), &["attention1.w", "missing"]);
    fails(
        broken(true, &|t| put(t, &name("2.w"), &[FEATURES, TOKENS + 1])),
        &["attention2.w", "has shape (4, 9); expected (4, 8)"],
    );
    fails(
        broken(true, &|t| put(t, &name("1.kqv.weight"), &[3 * TOKENS, 146])),
        &["attention1.kqv.weight", "expected (24, 147)"],
    );
    fails(
        broken(false, &|t| put_norm(t, &name("1.norm1"), 146)),
        &["attention1.norm1.weight", "holds 146 values, which are no windows of 7x7 pixels"],
    );
    fails(
        broken(false, &|t| put(t, &name("2.attn.qkv.weight"), &[3 * TOKENS, 71])),
        &["attention2.attn.qkv.weight", "expected (24, 72)"],
    );
    fails(
        broken(false, &|t| drop(t.remove("tokens_to_token.project.weight"))),
        &["project.weight", "missing"],
    );
    fails(
        broken(false, &|t| put(t, &name("1.w"), &[FEATURES, TOKENS])),
        &["attention1.kqv.weight", "missing"],
    );
    fails(
        broken(false, &|t| put(t, "tokens_to_token.conv0.weight", &[4, 3, 7, 7])),
        &["tokens_to_token.conv0.weight", "neither a transformer nor a performer"],
    );
    fails(
        load(&t2t(true), &["heads=2", "image=40"]),
        &["height 40 is not a positive multiple of the patch height 16"],
    );
    fails(load(&t2t(true), &["heads=2", "skip_lam=2"]), &["only LV-ViT divides its residuals"]);
}
