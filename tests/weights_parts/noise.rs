//! Whatever bytes come in, what comes out is a model or an error of one line: never a panic, never a huge allocation.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::*;

/// One edit of a file.
#[derive(Clone, Debug)]
enum Edit {
    Flip(Index, u8),
    Cut(Index),
    Append(Vec<u8>),
    /// Replaces a piece of the header by another one of the same length, so that the rest stays in place.
    Header(Index, &'static str),
    /// Replaces digits of the header.
    Digit(Index, u8),
    Length(u64),
}

fn edit() -> impl Strategy<Value = Edit> {
    let pieces = vec![
        "\"F16\"", "\"BF16", "\"I64\"", "[16]", "[0]", "null", "{}", ",", "cls", "99999", "-1", "\\u0000",
        "\"",
    ];
    prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, to)| Edit::Flip(at, to)),
        1 => any::<Index>().prop_map(Edit::Cut),
        1 => vec(any::<u8>(), 1..9).prop_map(Edit::Append),
        6 => (any::<Index>(), proptest::sample::select(pieces)).prop_map(|(at, text)| Edit::Header(at, text)),
        6 => (any::<Index>(), b'0'..=b'9').prop_map(|(at, to)| Edit::Digit(at, to)),
        1 => prop_oneof![any::<u64>(), 0_u64..5000].prop_map(Edit::Length),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    if bytes.len() < 9 {
        return;
    }
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()).min(bytes.len() as u64 - 8) as usize;
    let header = 8..8 + length.max(1);
    match edit {
        Edit::Flip(at, to) => *at.get_mut(bytes) = *to,
        Edit::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Edit::Append(more) => bytes.extend(more),
        Edit::Header(at, text) => {
            let start = header.start + at.index(header.len());
            let end = (start + text.len()).min(bytes.len());
            bytes[start..end].copy_from_slice(&text.as_bytes()[..end - start]);
        }
        Edit::Digit(at, to) => {
            let digits: Vec<_> = header.filter(|&i| bytes[i].is_ascii_digit()).collect();
            if !digits.is_empty() {
                bytes[digits[at.index(digits.len())]] = *to;
            }
        }
        Edit::Length(length) => bytes[..8].copy_from_slice(&length.to_le_bytes()),
    }
}

/// JSON that looks like a configuration until one looks closer.
fn config() -> impl Strategy<Value = String> {
    let keys = vec![
        "hidden_size",
        "num_attention_heads",
        "layer_norm_eps",
        "hidden_act",
        "image_size",
        "patch_size",
        "id2label",
        "vision_config",
        "num_classes",
        "global_pool",
        "pretrained_cfg",
        "model_args",
        "label_names",
        "input_size",
        "mean",
        "std",
        "crop_pct",
        "interpolation",
        "num_heads",
        "img_size",
        "mlp_ratio",
        "architecture",
        "model_type",
        "size",
        "shortest_edge",
        "crop_size",
        "resample",
        "image_mean",
        "do_normalize",
        "num_register_tokens",
        "act_layer",
    ];
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|v| v.to_string()),
        (0_u64..20).prop_map(|v| v.to_string()),
        any::<i64>().prop_map(|v| v.to_string()),
        any::<f64>().prop_map(|v| format!("{v:e}")),
        "[a-z\n\\\\\u{e9}]{0,8}".prop_map(|v| serde_json::Value::from(v).to_string()),
        Just("\"token\"".to_owned()),
        Just("[3,12,12]".to_owned()),
        Just("[0.5,0.5,0.5]".to_owned()),
    ];
    let object = move |inner: BoxedStrategy<String>| {
        vec((proptest::sample::select(keys.clone()), inner), 0..6).prop_map(|pairs| {
            let pairs: Vec<_> = pairs.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
            format!("{{{}}}", pairs.join(","))
        })
    };
    let value = leaf.prop_recursive(2, 16, 6, {
        let object = object.clone();
        move |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(|items| format!("[{}]", items.join(","))),
                object(inner.boxed()),
            ]
        }
    });
    prop_oneof![9 => object(value.boxed()), 1 => ".{0,20}"]
}

fn models() -> [Tensors; 3] {
    let mut scaled = timm();
    put_layer_scale(&mut scaled);
    [timm(), hugging_face_vit(&timm()), hugging_face_dinov2(&scaled)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_never_panic(
        which in 0_usize..3, edits in vec(edit(), 0..5), heads in prop_oneof![Just("2"), Just("5")],
    ) {
        let mut file = bytes(&models()[which]);
        for edit in &edits {
            apply(&mut file, edit);
        }
        let overrides = set(&[&format!("heads={heads}")]);
        let loaded = Checkpoint::from_bytes("noise.safetensors", file)
            .and_then(|checkpoint| load_vit(&checkpoint, None, &overrides));
        if let Err(error) = loaded {
            let text = error.to_string();
            prop_assert!(!text.contains('\n') && text.len() < 1000, "{}", text);
        }
    }

    #[test]
    fn invented_configurations_never_panic(
        which in 0_usize..3, config in config(), preprocessor in config(), heads in any::<bool>(),
    ) {
        let checkpoint = checkpoint(&models()[which]);
        let overrides = if heads { set(&["heads=2"]) } else { Overrides::default() };
        let loaded = ConfigFile::from_json("config.json", &config)
            .and_then(|file| file.with_preprocessor("preprocessor_config.json", &preprocessor))
            .and_then(|file| load_vit(&checkpoint, Some(&file), &overrides));
        match loaded {
            Err(error) => {
                let text = error.to_string();
                prop_assert!(!text.contains('\n') && text.len() < 1000, "{}", text);
            }
            Ok(loaded) => prop_assert!(loaded.config.check().is_ok()),
        }
    }

    #[test]
    fn settings_never_panic(
        key in "(heads|image|mean|std|crop_pct|norm_eps|readout|.{0,6})", value in ".{0,12}|[0-9x,.eE+-]{0,12}",
    ) {
        let mut overrides = Overrides::default();
        if let Err(error) = overrides.set(&format!("{key}={value}")) {
            let text = error.to_string();
            prop_assert!(!text.contains('\n') && text.len() < 1000, "{}", text);
        } else {
            // What is accepted can be loaded, or is refused in words.
            let _ = load_vit(&checkpoint(&timm()), None, &overrides);
        }
        let _ = overrides.set(&value);
    }
}
