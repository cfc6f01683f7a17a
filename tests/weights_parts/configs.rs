//! What configurations may say, and what they may not.

use foveate::{
    image::Interpolation,
    model::{Activation, Readout},
};

use super::*;

fn source<'a>(loaded: &'a LoadedVit, field: &str) -> &'a str {
    &loaded.provenance.iter().find(|p| p.field == field).unwrap_or_else(|| panic!("no {field}")).source
}

#[test]
fn timm_configurations() {
    let config = r#"{"architecture": "vit_tiny_patch4_quickgelu_12", "num_classes": 5, "num_features": 16,
        "global_pool": "avg", "label_names": ["n1", "n2", "n3", "n4", "n5"], "label_descriptions": {"n2": "tench"},
        "model_args": {"num_heads": 8, "img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "mlp_ratio": 2},
        "pretrained_cfg": {"input_size": [3, 12, 12], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5],
            "crop_pct": 0.95, "interpolation": "bilinear", "crop_mode": "squash", "num_classes": 5}}"#;
    let loaded = load_with(&timm(), config, &[]).unwrap();
    let c = &loaded.config;
    assert_eq!((c.heads, c.image, c.readout), (8, [24, 24], Readout::Mean));
    assert_eq!(loaded.params.position.as_ref().unwrap().shape(), [36, WIDTH]);
    assert_eq!(c.activation, Activation::QuickGelu);
    assert_eq!((c.transform.crop_pct, c.transform.interpolation), (0.95, Interpolation::Bilinear));
    assert_eq!((c.transform.mean[0], c.transform.std[1]), (0.5, 0.25));
    assert_eq!(c.labels.as_ref().unwrap()[..2], ["n1", "tench"]);
    assert_eq!(source(&loaded, "heads"), "config.json: model_args.num_heads");
    assert_eq!(source(&loaded, "mean"), "config.json: pretrained_cfg.mean");
    assert!(source(&loaded, "remark").ends_with("crop_mode"));

    // Overrides outrank all of it.
    let settings = [
        "heads=2",
        "image=12",
        "pool=class",
        "activation=relu",
        "crop_pct=1",
        "interpolation=bicubic",
        "mean=0",
        "std=1,2,4",
        "norm_eps=0.5",
    ];
    let loaded = load_with(&timm(), config, &settings).unwrap();
    let c = &loaded.config;
    assert_eq!((c.heads, c.image, c.readout, c.activation), (2, [12, 12], Readout::Class, Activation::Relu));
    assert_eq!((c.norm_eps, &c.transform.mean[..], c.transform.std[2]), (0.5, &[0.0; 3][..], 4.0));
    assert_eq!(source(&loaded, "heads"), "override");
    fails(
        load_with(&timm(), r#"{"architecture": "vit_base_patch16_rpn_224"}"#, &["heads=2"]),
        &["res-post-norm"],
    );
}

#[test]
fn hugging_face_configurations() {
    let tensors = with_prefix(&hugging_face_vit(&timm()), "vit.", "classifier");
    let config = r#"{"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 32, "hidden_act": "gelu_new", "layer_norm_eps": 1e-05, "image_size": 12,
        "patch_size": [4, 4], "num_channels": 3, "id2label": {"4": "e", "0": "a", "1": "b", "2": "c", "3": "d"}, "torch_dtype": null}"#;
    let loaded = load_with(&tensors, config, &[]).unwrap();
    let c = &loaded.config;
    assert_eq!((c.heads, c.norm_eps, c.activation), (4, 1e-5, Activation::GeluTanh));
    assert_eq!(c.labels.as_ref().unwrap().concat(), "abcde");
    assert_eq!((c.transform.mean[0], c.transform.crop_pct), (0.485, 0.9));

    for (old, new, parts) in [
        (
            "\"hidden_size\": 16",
            "\"hidden_size\": 32",
            &["config.json: hidden_size` is 32", "width is 16"][..],
        ),
        ("layers\": 2", "layers\": 12", &["num_hidden_layers` is 12", "depth is 2"]),
        (
            "\"intermediate_size\": 32",
            "\"intermediate_size\": 64",
            &["intermediate_size` is 64", "MLP width is 32"],
        ),
        ("[4, 4]", "16", &["patch_size` is 16", "patch height is 4"]),
        ("\"num_channels\": 3", "\"num_channels\": 1", &["num_channels` is 1"]),
        ("heads\": 4", "heads\": 5", &["5 heads (config.json: num_attention_heads)", "16", "set heads"]),
        ("heads\": 4", "heads\": 0", &["0 heads"]),
        ("heads\": 4", "heads\": \"4\"", &["`num_attention_heads` is \"4\"; expected a whole number"]),
        ("heads\": 4", "heads\": 1e300", &["num_attention_heads", "1e+300"]),
        ("heads\": 4", "heads\": -4", &["num_attention_heads", "-4"]),
        ("heads\": 4", "heads\": 99999999999", &["num_attention_heads", "eight digits"]),
        ("1e-05", "0", &["epsilon 0"]),
        ("1e-05", "-1", &["epsilon -1"]),
        ("1e-05", "1e999", &["not valid JSON"]),
        ("\"gelu_new\"", "\"mish\"", &["config.json: hidden_act", "`mish`", "quick_gelu"]),
        ("\"gelu_new\"", "[1]", &["`hidden_act` is [1]; expected a string"]),
        ("\"image_size\": 12", "\"image_size\": 13", &["13", "multiple of the patch"]),
        ("\"image_size\": 12", "\"image_size\": 16000000", &["image size", "16384"]),
        ("\"image_size\": 12", "\"image_size\": 16384", &["16777216 patches", "65536"]),
        ("\"image_size\": 12", "\"image_size\": 0", &["image size"]),
        ("\"4\": \"e\", ", "", &["id2label` is 4", "number of outputs is 5"]),
        ("\"4\": \"e\"", "\"7\": \"e\"", &["`id2label` has the entry `7`"]),
        ("\"4\": \"e\"", "\"04\": \"e\", \"4\": \"f\"", &["id2label` names a class twice"]),
        ("\"4\": \"e\"", "\"4\": 4", &["`id2label` has the entry `4`: 4"]),
    ] {
        assert!(config.contains(old), "{old}");
        fails(load_with(&tensors, &config.replace(old, new), &[]), parts);
    }
    for text in ["", "[]", "null", "{\"a\": }", "{\"hidden_size\": NaN}"] {
        fails(load_with(&tensors, text, &["heads=2"]), &["config.json"]);
    }
    let deep = "[".repeat(100_000);
    fails(ConfigFile::from_json("config.json", &deep), &["not valid JSON"]);
    // Placeholder names are no names, and without a head names mean nothing.
    let placeholders =
        r#"{"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2", "3": "LABEL_3", "4": "LABEL_4"}}"#;
    assert!(load_with(&tensors, placeholders, &["heads=2"]).unwrap().config.labels.is_none());
    let headless: Tensors = tensors.into_iter().filter(|(name, _)| !name.contains("classifier")).collect();
    let loaded = load_with(&headless, r#"{"id2label": {"0": "a", "1": "b"}}"#, &["heads=2"]).unwrap();
    assert!(loaded.config.labels.is_none() && loaded.config.classes == 0 && loaded.params.head.is_none());
}

#[test]
fn preprocessors() {
    let tensors = hugging_face_dinov2(&timm());
    let with = |text: &str, settings: &[&str]| {
        let config = ConfigFile::from_json("config.json", r#"{"image_size": 12}"#)?;
        let config = config.with_preprocessor("preprocessor_config.json", text)?;
        load_vit(&checkpoint(&tensors), Some(&config), &set(&[settings, &["heads=2"]].concat()))
    };
    // DINOv2 takes what the preprocessor hands it, whatever it was trained at.
    let config = with(r#"{"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}"#, &[])
        .unwrap()
        .config;
    assert_eq!((config.image, config.transform.crop_pct), ([24, 24], 0.75));
    // A size alone is not cropped, nor is a crop that is switched off.
    assert_eq!(with(r#"{"size": 24}"#, &[]).unwrap().config.transform.crop_pct, 1.0);
    let off =
        r#"{"size": 16, "crop_size": 12, "do_center_crop": false, "do_normalize": false, "resample": 3}"#;
    let config = with(off, &[]).unwrap().config;
    assert_eq!((config.image, config.transform.crop_pct), ([16, 16], 1.0));
    assert_eq!((config.transform.mean, config.transform.std), (vec![0.0; 3], vec![1.0; 3]));
    for (text, parts) in [
        (
            r#"{"image_mean": [0.5]}"#,
            &["mean [0.5]", "preprocessor_config.json: image_mean", "3 finite numbers"][..],
        ),
        (r#"{"image_mean": "0.5"}"#, &["preprocessor_config.json: `image_mean`", "list of 1 to 4 numbers"]),
        (r#"{"image_std": [0.5, 0, 0.5]}"#, &["std 0"]),
        (r#"{"image_std": [0.5, 1e300, 0.5]}"#, &["image_std"]),
        (r#"{"size": "big"}"#, &["`size` is \"big\""]),
        (r#"{"size": {"shortest_edge": "big"}}"#, &["`size.shortest_edge`"]),
        (r#"{"size": 8, "crop_size": 16}"#, &["`crop_size` 16", "size 8"]),
        (r#"{"size": 0}"#, &["`crop_size` 0"]),
        (r#"{"resample": 1}"#, &["preprocessor_config.json: resample` is lanczos", "interpolation"]),
        ("7", &["preprocessor_config.json: is not a JSON object"]),
    ] {
        fails(with(text, &[]), parts);
    }
    assert!(with(r#"{"resample": 1}"#, &["interpolation=bilinear"]).is_ok());
}

#[test]
fn metadata_counts_where_nothing_else_is_said() {
    let with = |notes: &[(&str, &str)], config: Option<&str>| {
        let mut bytes = bytes(&timm());
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let notes: serde_json::Map<_, _> = notes.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        header["__metadata__"] = serde_json::Value::Object(notes);
        let data = bytes.split_off(8 + length);
        let checkpoint = Checkpoint::from_bytes("noted.safetensors", assemble(&header.to_string(), &data))?;
        let config = config.map(|text| ConfigFile::from_json("config.json", text)).transpose()?;
        load_vit(&checkpoint, config.as_ref(), &Overrides::default())
    };
    let arch = r#"{"img": 12, "patch": 4, "in_chans": 3, "dim": 16, "depth": 2, "heads": 8, "mlp": 2.0, "classes": 5,
        "norm_eps": 1e-4}"#;
    let notes = [("arch", arch), ("mean", "[0.1, 0.2, 0.3]"), ("std", "[1, 2, 3]"), ("labels", "a,b, c,d,e")];
    let loaded = with(&notes, None).unwrap();
    let c = &loaded.config;
    assert_eq!((c.heads, c.norm_eps, c.transform.crop_pct), (8, 1e-4, 1.0));
    assert_eq!((&c.transform.mean[..], &c.transform.std[..]), (&[0.1, 0.2, 0.3][..], &[1.0, 2.0, 3.0][..]));
    assert_eq!(c.labels.as_ref().unwrap()[2], "c");
    assert_eq!(source(&loaded, "heads"), "metadata: arch.heads");
    let over = with(&notes, Some(r#"{"num_attention_heads": 4}"#)).unwrap();
    assert_eq!((over.config.heads, over.config.norm_eps), (4, 1e-4));
    fails(with(&[("arch", &arch.replace("16", "32"))], None), &["metadata: arch.dim` is 32", "width is 16"]);
    fails(with(&[("arch", &arch.replace("2.0", "3.0"))], None), &["metadata: arch.mlp` is 3", "32 wide"]);
    fails(with(&[("arch", "{")], None), &["metadata `arch`"]);
    fails(with(&[("arch", arch), ("labels", "a,b")], None), &["metadata: labels", "2 classes", "5 outputs"]);
    // Notes of other programs under the same keys are not ours to judge; without ours the heads are unknown.
    fails(with(&[("arch", "vit"), ("mean", "see paper")], None), &["set heads"]);
}
