//! One model in every naming; models with a tensor too few, too many, or of another shape.

use foveate::{
    model::{Activation, Readout},
    weights::Family,
};

use super::*;

#[test]
fn the_same_model_under_every_name_is_the_same_model() {
    let plain = timm();
    let expected = load(&plain, &["heads=2"]).unwrap();
    assert_eq!(expected.family, Family::Timm);
    let c = &expected.config;
    assert_eq!((c.image, c.patch, c.width, c.depth, c.heads), ([12, 12], [4, 4], WIDTH, DEPTH, 2));
    assert_eq!(
        (c.hidden, c.classes, c.readout, c.activation),
        (HIDDEN, CLASSES, Readout::Class, Activation::Gelu)
    );
    assert_eq!((c.norm_eps, c.transform.crop_pct), (1e-6, 0.9));
    assert_eq!(c.special_tokens(), 1);

    let mut pooled = hugging_face_vit(&plain);
    put_layer(&mut pooled, "pooler.dense", WIDTH, WIDTH);
    for tensors in [
        with_prefix(&plain, "module._orig_mod.", "no name"),
        with_prefix(&plain, "model.", "no name"),
        hugging_face_vit(&plain),
        with_prefix(&hugging_face_vit(&plain), "vit.", "classifier"),
        with_prefix(&hugging_face_vit(&plain), "deit.", "classifier"),
        with_prefix(
            &renamed(&hugging_face_vit(&plain), &[("classifier", "cls_classifier")]),
            "deit.",
            "cls_class",
        ),
        pooled,
    ] {
        let loaded = load(&tensors, &["heads=2", "norm_eps=1e-6"]).unwrap();
        assert_eq!(text(&loaded), text(&expected), "{:?}", tensors.keys().next());
    }
    // Hugging Face's epsilon is another one.
    assert_eq!(load(&hugging_face_vit(&plain), &["heads=2"]).unwrap().config.norm_eps, 1e-12);
}

#[test]
fn layer_scale_is_folded_under_each_of_its_names() {
    let mut scaled = timm();
    put_layer_scale(&mut scaled);
    let loaded = load(&scaled, &["heads=2"]).unwrap();
    let plain = load(&timm(), &["heads=2"]).unwrap();
    let gamma = &scaled["blocks.1.ls2.gamma"].1;
    let (with, without) = (&loaded.params.blocks[1].fc2, &plain.params.blocks[1].fc2);
    for (row, factor) in gamma.iter().enumerate() {
        for column in 0..HIDDEN {
            let at = row * HIDDEN + column;
            assert_eq!(with.weight.data()[at], without.weight.data()[at] * factor);
        }
        assert_eq!(
            with.bias.as_ref().unwrap().data()[row],
            without.bias.as_ref().unwrap().data()[row] * factor
        );
    }

    let mut official = scaled.clone();
    put(&mut official, "mask_token", &[1, WIDTH]);
    let mut masked = with_prefix(&hugging_face_dinov2(&scaled), "dinov2.", "classifier");
    put(&mut masked, "dinov2.embeddings.mask_token", &[1, WIDTH]);
    let chunked = renamed(&scaled, &[("blocks.0.", "blocks.0.0."), ("blocks.1.", "blocks.1.1.")]);
    for (tensors, family) in [
        (renamed(&scaled, &[("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")]), Family::Timm),
        (official, Family::Dinov2),
        (chunked, Family::Dinov2),
        (hugging_face_dinov2(&scaled), Family::HuggingFaceDinov2),
        (masked, Family::HuggingFaceDinov2),
    ] {
        let other = load(&tensors, &["heads=2"]).unwrap();
        assert_eq!((text(&other), other.family), (text(&loaded), family));
    }
}

#[test]
fn clip_towers_in_three_namings() {
    let mut tower = timm();
    put_norm(&mut tower, "norm_pre", WIDTH);
    for name in ["patch_embed.proj.bias", "head.bias"] {
        tower.remove(name);
    }
    let expected = load(&tower, &["heads=2"]).unwrap();
    assert_eq!((expected.config.norm_eps, expected.config.transform.crop_pct), (1e-5, 1.0));
    assert_eq!(expected.config.transform.mean[0], 0.481_454_66);
    assert_eq!(expected.config.activation, Activation::Gelu);

    let mut clip = renamed(
        &split(&tower),
        &[
            ("cls_token", "vision_model.embeddings.class_embedding"),
            ("pos_embed", "vision_model.embeddings.position_embedding.weight"),
            ("patch_embed.proj", "vision_model.embeddings.patch_embedding"),
            ("attn.proj", "self_attn.out_proj"),
            ("attn.query", "self_attn.q_proj"),
            ("attn.key", "self_attn.k_proj"),
            ("attn.value", "self_attn.v_proj"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("blocks.", "vision_model.encoder.layers."),
            ("norm_pre", "vision_model.pre_layrnorm"),
            ("head", "visual_projection"),
        ],
    );
    for part in ["weight", "bias"] {
        let norm = clip.remove(&format!("norm.{part}")).unwrap();
        clip.insert(format!("vision_model.post_layernorm.{part}"), norm);
    }
    clip.get_mut("vision_model.embeddings.class_embedding").unwrap().0 = vec![WIDTH];
    clip.get_mut("vision_model.embeddings.position_embedding.weight").unwrap().0 = vec![10, WIDTH];
    put(&mut clip, "text_model.embeddings.token_embedding.weight", &[7, 8]);
    put(&mut clip, "text_projection.weight", &[5, 8]);
    put(&mut clip, "logit_scale", &[]);
    put(&mut clip, "vision_model.embeddings.position_ids", &[1, 10]);
    let loaded = load(&clip, &["heads=2"]).unwrap();
    assert_eq!((text(&loaded), loaded.family), (text(&expected), Family::HuggingFaceClip));
    assert_eq!(loaded.config.activation, Activation::QuickGelu);
    let nested = r#"{"model_type": "clip", "projection_dim": 5, "vision_config": {"hidden_size": 16, "hidden_act": "gelu",
        "num_attention_heads": 4, "layer_norm_eps": 1e-3, "image_size": 12, "patch_size": 4, "num_hidden_layers": 2}}"#;
    let configured = load_with(&clip, nested, &[]).unwrap().config;
    assert_eq!((configured.heads, configured.activation, configured.norm_eps), (4, Activation::Gelu, 1e-3));
    fails(
        load_with(&clip, &nested.replace(": 5", ": 6"), &[]),
        &["projection_dim` is 6", "number of outputs is 5"],
    );
    // Before the tower's own name, and without any.
    let bare = renamed(&clip, &[("vision_model.", "")]);
    assert_eq!(text(&load(&bare, &["heads=2"]).unwrap()), text(&expected));
    assert_eq!(text(&load(&with_prefix(&clip, "clip.", "no name"), &["heads=2"]).unwrap()), text(&expected));

    let mut open = renamed(
        &tower,
        &[
            ("cls_token", "visual.class_embedding"),
            ("pos_embed", "visual.positional_embedding"),
            ("patch_embed.proj", "visual.conv1"),
            ("attn.proj", "attn.out_proj"),
            ("attn.qkv.", "attn.in_proj_"),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("norm_pre", "visual.ln_pre"),
            ("norm.", "visual.ln_post."),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("blocks.", "visual.transformer.resblocks."),
        ],
    );
    let (_, head) = open.remove("head.weight").unwrap();
    let transposed = (0..head.len()).map(|i| head[(i % CLASSES) * WIDTH + i / CLASSES]).collect();
    open.insert("visual.proj".into(), (vec![WIDTH, CLASSES], transposed));
    put(&mut open, "transformer.resblocks.0.ln_1.weight", &[8]);
    put(&mut open, "positional_embedding", &[7, 8]);
    let loaded = load(&open, &["heads=2"]).unwrap();
    assert_eq!((text(&loaded), loaded.family), (text(&expected), Family::OpenClip));
}

#[test]
fn special_tokens_carry_the_positions_their_authors_gave_them() {
    let sum = |t: &Tensors, token: &str, row: usize| -> Vec<f32> {
        t[token].1.iter().zip(&t["pos_embed"].1[row * WIDTH..]).map(|(a, b)| a + b).collect()
    };
    // Distilled: both special tokens have positions.
    let mut distilled = timm();
    put(&mut distilled, "dist_token", &[1, 1, WIDTH]);
    put(&mut distilled, "pos_embed", &[1, GRID * GRID + 2, WIDTH]);
    put_layer(&mut distilled, "head_dist", CLASSES, WIDTH);
    let loaded = load(&distilled, &["heads=2"]).unwrap();
    let prefix = loaded.params.prefix.as_ref().unwrap();
    assert_eq!(prefix.item(0), sum(&distilled, "cls_token", 0));
    assert_eq!(prefix.item(1), sum(&distilled, "dist_token", 1));
    assert_eq!(loaded.params.position.as_ref().unwrap().data(), &distilled["pos_embed"].1[2 * WIDTH..]);
    let hf = load(&hugging_face_vit(&distilled), &["heads=2", "norm_eps=1e-6"]).unwrap();
    assert_eq!(text(&hf), text(&loaded));

    // DeiT III: the table holds patches only.
    let mut patches_only = timm();
    put(&mut patches_only, "pos_embed", &[1, GRID * GRID, WIDTH]);
    let loaded = load(&patches_only, &["heads=2"]).unwrap();
    assert_eq!(loaded.params.prefix.unwrap().data(), &patches_only["cls_token"].1);
    assert_eq!(loaded.params.position.unwrap().shape(), [9, WIDTH]);

    // DINOv2: registers come without positions, whatever they are called.
    let mut registers = timm();
    put(&mut registers, "reg_token", &[1, 4, WIDTH]);
    let loaded = load(&registers, &["heads=2"]).unwrap();
    let prefix = loaded.params.prefix.as_ref().unwrap();
    assert_eq!((loaded.config.registers, prefix.shape()), (4, &[5, WIDTH][..]));
    assert_eq!(prefix.item(0), sum(&registers, "cls_token", 0));
    assert_eq!(&prefix.data()[WIDTH..], &registers["reg_token"].1);
    let official = load(&renamed(&registers, &[("reg_token", "register_tokens")]), &["heads=2"]).unwrap();
    assert_eq!((text(&official), official.family), (text(&loaded), Family::Dinov2));
    let hf = with_prefix(&hugging_face_dinov2(&registers), "dinov2_with_registers.", "classifier");
    assert_eq!(text(&load(&hf, &["heads=2"]).unwrap()), text(&loaded));

    // timm with positions for all of them.
    put(&mut registers, "pos_embed", &[1, GRID * GRID + 5, WIDTH]);
    let prefix = load(&registers, &["heads=2"]).unwrap().params.prefix.unwrap();
    assert_eq!(prefix.data()[WIDTH], registers["reg_token"].1[0] + registers["pos_embed"].1[WIDTH]);

    // No class token: the mean is read.
    let mut bare = timm();
    bare.remove("cls_token");
    put(&mut bare, "pos_embed", &[1, GRID * GRID, WIDTH]);
    let loaded = load(&bare, &["heads=2"]).unwrap();
    assert!(loaded.params.prefix.is_none() && loaded.config.readout == Readout::Mean);

    // A rectangle needs a hint; `position` follows the image that is asked for.
    let mut wide = timm();
    put(&mut wide, "pos_embed", &[1, 3 * 5 + 1, WIDTH]);
    put(&mut wide, "cls_token", &[1, 1, WIDTH]);
    let square = load(&wide, &["heads=2"]).unwrap().config;
    assert_eq!(square.image, [16, 16], "16 rows read as 4 x 4 patches when nothing says otherwise");
    let config = r#"{"image_size": [12, 20]}"#;
    let loaded = load_with(&wide, config, &["heads=2", "image=24x20"]).unwrap();
    assert_eq!(loaded.params.position.unwrap().shape(), [30, WIDTH]);
}

#[test]
fn gated_mlps_in_four_spellings() {
    let mut packed = timm();
    for i in 0..DEPTH {
        put_layer(&mut packed, &format!("blocks.{i}.mlp.fc1"), 2 * HIDDEN, WIDTH);
    }
    let expected = load(&packed, &["heads=2"]).unwrap();
    assert_eq!((expected.config.activation, expected.config.hidden), (Activation::SwiGlu, HIDDEN));
    let mut apart = packed.clone();
    for i in 0..DEPTH {
        for part in ["weight", "bias"] {
            let (mut shape, data) = apart.remove(&format!("blocks.{i}.mlp.fc1.{part}")).unwrap();
            shape[0] /= 2;
            let (gate, value) = data.split_at(data.len() / 2);
            apart.insert(format!("blocks.{i}.mlp.fc1_g.{part}"), (shape.clone(), gate.to_vec()));
            apart.insert(format!("blocks.{i}.mlp.fc1_x.{part}"), (shape, value.to_vec()));
        }
    }
    let official = renamed(&packed, &[("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")]);
    let hf = renamed(
        &hugging_face_dinov2(&packed),
        &[("mlp.fc1", "mlp.weights_in"), ("mlp.fc2", "mlp.weights_out")],
    );
    for tensors in [apart, official, hf.clone()] {
        assert_eq!(text(&load(&tensors, &["heads=2"]).unwrap()), text(&expected));
    }
    // Hugging Face's configuration goes on naming the activation that is not used.
    assert!(load_with(&hf, r#"{"hidden_act": "gelu"}"#, &["heads=2"]).is_ok());
    fails(load(&packed, &["heads=2", "activation=relu"]), &["relu", "gated"]);
    fails(load(&timm(), &["heads=2", "activation=swiglu"]), &["64 rows, it has 32"]);
}

#[test]
fn optional_norms_and_biases() {
    let mut t = timm();
    for i in 0..DEPTH {
        put_norm(&mut t, &format!("blocks.{i}.attn.q_norm"), 4);
        put_norm(&mut t, &format!("blocks.{i}.attn.k_norm"), 4);
        put_norm(&mut t, &format!("blocks.{i}.attn.norm"), WIDTH);
        put_norm(&mut t, &format!("blocks.{i}.mlp.norm"), HIDDEN);
        for name in ["attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias"] {
            t.remove(&format!("blocks.{i}.{name}"));
        }
    }
    t.remove("patch_embed.proj.bias");
    let t = renamed(&t, &[("norm.weight", "norm.weight")]);
    let loaded = load(&t, &[]).unwrap();
    let block = &loaded.params.blocks[1];
    assert!(block.q_norm.is_some() && block.k_norm.is_some() && block.attn_norm.is_some());
    assert!(block.mlp_norm.is_some() && block.qkv.bias.is_none() && block.fc2.bias.is_some());
    assert_eq!(loaded.config.heads, 4, "four heads of the norm's width");
    fails(load(&t, &["heads=2"]), &["2 heads", "8 wide", "normalised over 4"]);

    let mut mean = timm();
    for part in ["weight", "bias"] {
        let norm = mean.remove(&format!("norm.{part}")).unwrap();
        mean.insert(format!("fc_norm.{part}"), norm);
    }
    let loaded = load(&mean, &["heads=2"]).unwrap();
    assert!(loaded.config.readout == Readout::Mean && loaded.params.norm.is_none());
    assert_eq!(
        load_with(&mean, r#"{"global_pool": "token"}"#, &["heads=2"]).unwrap().config.readout,
        Readout::Class
    );

    let mut both = timm();
    put_layer(&mut both, "head", CLASSES, 2 * WIDTH);
    assert_eq!(load(&both, &["heads=2"]).unwrap().config.readout, Readout::ClassAndMean);
    fails(load(&both, &["heads=2", "readout=mean"]), &["readout mean (override)", "16 features", "reads 32"]);
    fails(
        load_with(&timm(), r#"{"global_pool": "map"}"#, &["heads=2"]),
        &["global_pool", "`map`", "readout"],
    );
}

/// DynamicViT's predictors, in the official names and under a wrapper.
#[test]
fn predictors_belong_to_a_model() {
    let mut t = timm();
    for p in 0..2 {
        let name = |part: &str| format!("score_predictor.{p}.{part}");
        put_norm(&mut t, &name("in_conv.0"), WIDTH);
        put_layer(&mut t, &name("in_conv.1"), WIDTH, WIDTH);
        put_layer(&mut t, &name("out_conv.0"), WIDTH / 2, WIDTH);
        put_layer(&mut t, &name("out_conv.2"), WIDTH / 4, WIDTH / 2);
        put_layer(&mut t, &name("out_conv.4"), 2, WIDTH / 4);
    }
    let loaded = load(&t, &["heads=2"]).unwrap();
    let predictors = &loaded.params.reducers.predictors;
    assert_eq!(predictors.len(), 2);
    assert_eq!(predictors[1].first.weight.data(), t["score_predictor.1.out_conv.0.weight"].1);
    assert!((predictors[0].norm.eps - 1e-5).abs() < 1e-12, "PyTorch's default, not the model's");
    assert_eq!(text(&load(&with_prefix(&t, "module.", "none"), &["heads=2"]).unwrap()), text(&loaded));

    let without = |gone: &str| {
        let kept = t.iter().filter(|(name, _)| !name.starts_with(gone));
        load(&kept.map(|(name, tensor)| (name.clone(), tensor.clone())).collect(), &["heads=2"])
    };
    assert_eq!(without("score_predictor").unwrap().params.reducers.predictors.len(), 0);
    fails(
        without("score_predictor.0."),
        &["score_predictor.0.in_conv.0.weight", "missing; expected shape (16)"],
    );
    fails(without("score_predictor.1.out_conv.4.bias"), &["score_predictor.1.out_conv.4.bias", "missing"]);
    let mut misshapen = t.clone();
    put(&mut misshapen, "score_predictor.1.out_conv.2.weight", &[WIDTH / 2, WIDTH / 2]);
    fails(
        load(&misshapen, &["heads=2"]),
        &["score_predictor.1.out_conv.2.weight", "(8, 8); expected (4, 8)"],
    );
    let mut extra = t.clone();
    put(&mut extra, "score_predictor.1.out_conv.6.weight", &[2, 2]);
    fails(load(&extra, &["heads=2"]), &["score_predictor.1.out_conv.6.weight", "extra tensor"]);
}

/// SViTE's selectors and MSTM's projections; a masked checkpoint is a plain one.
#[test]
fn selectors_and_projections_belong_to_a_model() {
    let mut t = timm();
    put_layer(&mut t, "gumbel", 1, WIDTH);
    for i in 0..DEPTH {
        put_layer(&mut t, &format!("blocks.{i}.attn.gumbel"), 1, WIDTH);
    }
    put_layer(&mut t, "msf.4", WIDTH, WIDTH);
    put_layer(&mut t, "msf.2", WIDTH, WIDTH);
    let reducers = load(&t, &["heads=2"]).unwrap().params.reducers;
    assert_eq!(reducers.selector.unwrap().weight.data(), t["gumbel.weight"].1);
    assert_eq!(reducers.layer_selectors.len(), DEPTH);
    assert_eq!(reducers.projections.iter().map(|projection| projection.0).collect::<Vec<_>>(), [2, 4]);
    let mut one_missing = t.clone();
    one_missing.remove("blocks.1.attn.gumbel.bias");
    fails(load(&one_missing, &["heads=2"]), &["blocks.1.attn.gumbel.bias", "missing; expected shape (1)"]);
    let mut misshapen = t.clone();
    put(&mut misshapen, "gumbel.weight", &[2, WIDTH]);
    fails(load(&misshapen, &["heads=2"]), &["gumbel.weight", "(2, 16); expected (1, 16)"]);
    let mut extra = t.clone();
    put_layer(&mut extra, "msf.two", WIDTH, WIDTH);
    fails(load(&extra, &["heads=2"]), &["msf.two.bias", "extra tensor"]);
    for scale in ["0", "1", "64", "100", "18446744073709551615"] {
        let mut beyond = t.clone();
        put_layer(&mut beyond, &format!("msf.{scale}"), WIDTH, WIDTH);
        fails(load(&beyond, &["heads=2"]), &[&format!("msf.{scale}.bias"), "scales go from 2 to 63"]);
    }
}

#[test]
fn damaged_models_are_named_by_tensor() {
    let change = |edit: &dyn Fn(&mut Tensors)| {
        let mut t = timm();
        edit(&mut t);
        load(&t, &["heads=2"])
    };
    let hf = |edit: &dyn Fn(&mut Tensors)| {
        let mut t = with_prefix(&hugging_face_vit(&timm()), "module.vit.", "classifier");
        edit(&mut t);
        load(&t, &["heads=2"])
    };
    let remove = |name: &'static str| move |t: &mut Tensors| drop(t.remove(name).unwrap());
    fails(
        change(&remove("blocks.1.norm2.bias")),
        &["tiny.safetensors: tensor `blocks.1.norm2.bias`", "(16)"],
    );
    fails(change(&remove("blocks.0.norm1.weight")), &["`blocks.0.norm1.weight`: missing"]);
    fails(change(&remove("patch_embed.proj.weight")), &["`patch_embed.proj.weight`: missing"]);
    fails(
        change(&remove("blocks.1.mlp.fc1.bias")),
        &["`blocks.1.mlp.fc1.bias`: missing; expected shape (32)"],
    );
    fails(change(&remove("pos_embed")), &["`pos_embed`: missing"]);
    fails(change(&remove("norm.weight")), &["`norm.weight`: missing"]);
    fails(change(&remove("head.weight")), &["`head.weight`: missing"]);
    // In the file's own names, wrappers and prefixes included.
    let name = "module.vit.encoder.layer.1.attention.attention.key.weight";
    fails(hf(&remove(name)), &[name, "missing; expected shape (16, 16)"]);
    let name = "module.vit.encoder.layer.0.layernorm_after.weight";
    fails(hf(&remove(name)), &[name, "missing"]);
    let chunks = renamed(&timm(), &[("blocks.0.", "blocks.0.0."), ("blocks.1.", "blocks.0.1.")]);
    let mut cut = chunks.clone();
    cut.remove("blocks.0.1.attn.proj.weight");
    fails(load(&cut, &["heads=2"]), &["`blocks.0.1.attn.proj.weight`: missing"]);

    fails(
        change(&|t| put(t, "blocks.1.attn.qkv.weight", &[47, WIDTH])),
        &["`blocks.1.attn.qkv.weight`: has shape (47, 16); expected (48, 16)"],
    );
    fails(change(&|t| put(t, "cls_token", &[1, 2, WIDTH])), &["`cls_token`", "(1, 2, 16)", "(1, 1, 16)"]);
    fails(change(&|t| put(t, "patch_embed.proj.weight", &[WIDTH, 48])), &["(16, 48)", "(C, channels"]);
    fails(change(&|t| put(t, "patch_embed.proj.weight", &[WIDTH, 3, 0, 4])), &["(16, 3, 0, 4)"]);
    fails(change(&|t| put(t, "pos_embed", &[1, 13, WIDTH])), &["13 rows", "no square grid", "image"]);
    fails(
        change(&|t| put(t, "blocks.0.norm3.weight", &[4])),
        &["`blocks.0.norm3.weight`: extra tensor", "timm"],
    );
    fails(change(&|t| put(t, "head_dist.weight", &[4])), &["`head_dist.weight`: extra tensor"]);
    fails(change(&|t| put(t, "probe", &[4])), &["`probe`", "attention pooling", "not supported"]);
    fails(change(&|t| put(t, "blocks.0.attn.rel_pos_h", &[4])), &["relative position", "not supported"]);
    fails(change(&|t| put(t, "module.cls_token", &[1, 1, WIDTH])), &["same parameter as", "cls_token"]);
    // Nothing may be multiplied before it is known to be small.
    for name in ["reg_token", "pos_embed"] {
        fails(
            change(&|t| put(t, name, &[1, usize::MAX, 0])),
            &[&format!("`{name}`: has shape (1, 18446744073709551615, 0)")],
        );
    }
    // A number in a name is no reason to allocate.
    fails(change(&|t| put_norm(t, "blocks.1000000000000.norm1", WIDTH)), &["blocks.2.norm1.weight"]);
    fails(load(&Tensors::new(), &[]), &["not a vision transformer", "timm", "CLIP"]);
    let mut bert = Tensors::new();
    put(&mut bert, "encoder.layer.0.output.dense.weight", &[4, 4]);
    for word in ["word", "token_type", "segment"] {
        put(&mut bert, &format!("embeddings.{word}_embeddings.weight"), &[4, 4]);
    }
    fails(load(&bert, &[]), &["not a vision transformer", "embeddings.segment_embeddings.weight"]);

    for (value, shown) in
        [(f32::NAN, "NaN at (2, 1)"), (f32::INFINITY, "inf at"), (f32::NEG_INFINITY, "-inf at")]
    {
        fails(
            change(&|t| t.get_mut("head.weight").unwrap().1[2 * WIDTH + 1] = value),
            &["`head.weight`", shown, "damaged"],
        );
    }
}
