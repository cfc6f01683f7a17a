//! The `foveate` command on models with stems: LV-ViT and T2T-ViT, from small checkpoints made here.
#![cfg(feature = "cli")]

use std::{collections::HashMap, fs, path::PathBuf, process::Command};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

const PICTURE: &str = "assets/fashion/0000_ankle_boot.png";
const WIDTH: usize = 64;

/// A folder of its own for a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("foveate-stems-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the command; stdout, or the line that it fails with.
fn foveate(arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    let output = command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[track_caller]
fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&foveate(&[arguments, &["--json"]].concat()).unwrap()).unwrap()
}

/// What both models have behind their stems: two blocks on a grid of 4 x 4.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("cls_token".to_owned(), vec![1, 1, WIDTH]),
        ("pos_embed".to_owned(), vec![1, 17, WIDTH]),
        ("head.weight".to_owned(), vec![5, WIDTH]),
        ("head.bias".to_owned(), vec![5]),
    ];
    let mut norms = vec!["norm".to_owned()];
    for i in 0..2 {
        let mut layer = |name: &str, rows: usize, columns: usize, bias: bool| {
            all.push((format!("blocks.{i}.{name}.weight"), vec![rows, columns]));
            if bias {
                all.push((format!("blocks.{i}.{name}.bias"), vec![rows]));
            }
        };
        layer("attn.qkv", 3 * WIDTH, WIDTH, false);
        layer("attn.proj", WIDTH, WIDTH, true);
        layer("mlp.fc1", 2 * WIDTH, WIDTH, true);
        layer("mlp.fc2", WIDTH, 2 * WIDTH, true);
        norms.extend([format!("blocks.{i}.norm1"), format!("blocks.{i}.norm2")]);
    }
    for norm in norms {
        all.extend([(format!("{norm}.weight"), vec![WIDTH]), (format!("{norm}.bias"), vec![WIDTH])]);
    }
    all
}

fn lvvit() -> Vec<(String, Vec<usize>)> {
    let mut all = shapes();
    let mut put = |name: &str, shape: &[usize]| all.push((name.to_owned(), shape.to_vec()));
    for (i, (inputs, kernel)) in [(3, 7), (8, 3), (8, 3)].into_iter().enumerate() {
        put(&format!("patch_embed.conv{}.weight", i + 1), &[8, inputs, kernel, kernel]);
        for part in ["weight", "bias", "running_mean", "running_var"] {
            put(&format!("patch_embed.bn{}.{part}", i + 1), &[8]);
        }
    }
    put("patch_embed.proj.weight", &[WIDTH, 8, 4, 4]);
    put("patch_embed.proj.bias", &[WIDTH]);
    put("aux_head.weight", &[5, WIDTH]);
    put("aux_head.bias", &[5]);
    all
}

fn t2t() -> Vec<(String, Vec<usize>)> {
    let mut all = shapes();
    all.retain(|(name, _)| name != "pos_embed");
    let mut put = |name: &str, shape: &[usize]| all.push((name.to_owned(), shape.to_vec()));
    put("pos_embed", &[1, 5, WIDTH]);
    for (stage, inputs) in [(1, 147), (2, 144)] {
        let name = |part: &str| format!("tokens_to_token.attention{stage}.{part}");
        for (norm, width) in [("norm1", inputs), ("norm2", 16)] {
            put(&name(&format!("{norm}.weight")), &[width]);
            put(&name(&format!("{norm}.bias")), &[width]);
        }
        for (layer, rows, columns) in
            [("kqv", 48, inputs), ("proj", 16, 16), ("mlp.0", 16, 16), ("mlp.2", 16, 16)]
        {
            put(&name(&format!("{layer}.weight")), &[rows, columns]);
            put(&name(&format!("{layer}.bias")), &[rows]);
        }
        put(&name("w"), &[8, 16]);
    }
    put("tokens_to_token.project.weight", &[WIDTH, 144]);
    put("tokens_to_token.project.bias", &[WIDTH]);
    all
}

/// Writes tensors of these shapes: small values, positive where they are variances.
fn write(path: &str, shapes: &[(String, Vec<usize>)]) {
    let mut state = 1_u32;
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(name, shape)| {
            let around = if name.ends_with("running_var") || name.contains("norm") { 1.0 } else { 0.0 };
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                around + (f32::from((state >> 16) as u16) / 65536.0 - 0.5) * 0.25
            };
            (0..shape.iter().product()).flat_map(|_| value().to_le_bytes()).collect()
        })
        .collect();
    let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let none: Option<HashMap<String, String>> = None;
    fs::write(path, safetensors::serialize(views, none).unwrap()).unwrap();
}

/// info, classify, embed, overlay and profile agree on a model, with and without a method.
fn every_command(folder: &Folder, model: &str, settings: &[&str], family: &str, stem: &str, patches: u64) {
    let with = |arguments: &[&str]| {
        [arguments, settings].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let json = |arguments: &[&str]| {
        let arguments = with(arguments);
        json(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let info = json(&["info", model, "-r", "tome:r=2"]);
    assert_eq!((info["family"].as_str(), info["tokens"].as_u64()), (Some(family), Some(patches + 1)));
    let found = |name: &str| {
        let settings = info["settings"].as_array().unwrap();
        settings.iter().find(|entry| entry["name"] == name).unwrap()["value"].as_str().unwrap().to_owned()
    };
    assert!(found("stem").starts_with(stem), "{}", found("stem"));
    let [dense, reduced] =
        [&info["macs"], &info["reductions"][0]["macs"]].map(|m| m["fvcore"].as_u64().unwrap());
    assert!(reduced < dense && reduced > dense / 2);

    let classified = json(&["classify", PICTURE, "-w", model, "--reduce", "tome:r=2", "--device", "cpu"]);
    assert_eq!(classified["images"].as_array().unwrap().len(), 1, "{classified}");
    let features = folder.file("features.safetensors");
    let arguments = with(&["embed", PICTURE, "-w", model, "-o", &features, "--device", "cpu"]);
    foveate(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    assert!(fs::metadata(&features).unwrap().len() > 4 * WIDTH as u64);
    let picture = folder.file("overlay.png");
    let arguments =
        with(&["overlay", PICTURE, "-w", model, "--reduce", "tome:r=2", "-o", &picture, "--device", "cpu"]);
    foveate(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    assert!(fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
    let profile =
        json(&["profile", "-w", model, "--reduce", "evit:keep=0.5", "--runs", "1", "--device", "cpu"]);
    assert!(profile.to_string().contains("embed"), "{profile}");
}

#[test]
fn an_lv_vit_in_every_command() {
    let folder = Folder::new("lvvit");
    let model = folder.file("lvvit.safetensors");
    write(&model, &lvvit());
    let settings = ["--set", "skip_lam=2"];
    every_command(&folder, &model, &settings, "official LV-ViT", "3 convolutions, 8 filters", 16);
    let info = json(&["info", &model, "--set", "skip_lam=2"]);
    assert_eq!(info["model"]["readout"], "class_and_aux");
    let line = foveate(&["info", &model]).unwrap_err();
    assert!(line.contains("set skip_lam") && line.lines().count() == 1, "{line}");
    let line = foveate(&[
        "classify",
        PICTURE,
        "-w",
        &model,
        "--set",
        "skip_lam=2",
        "-r",
        "dynamicvit:keep=[0.7],layers=1",
    ])
    .unwrap_err();
    assert!(line.contains("score_predictor"), "{line}");
}

#[test]
fn a_t2t_vit_in_every_command() {
    let folder = Folder::new("t2t");
    let model = folder.file("t2t.safetensors");
    write(&model, &t2t());
    every_command(&folder, &model, &[], "official T2T-ViT", "tokens to token, performer, width 16", 4);
    let line = foveate(&["info", &model, "--image-size", "40"]).unwrap_err();
    assert!(line.contains("40 is not a positive multiple of the patch height 16"), "{line}");
}

#[test]
fn published_stems_are_profiled_without_a_checkpoint() {
    for (name, stem, macs) in
        [("lvvit_t", "convolutions", 2.88), ("t2t_vit_7", "tokens to token, performer", 1.16)]
    {
        let profile = json(&["profile", "--arch", name, "--runs", "1", "--device", "cpu"]);
        assert_eq!(profile["model"]["stem"], stem);
        let total = profile["macs"].as_u64().unwrap() as f64 / 1e9;
        assert_eq!(format!("{total:.2}"), format!("{macs:.2}"), "{name}");
    }
}
