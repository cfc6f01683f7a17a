//! The `foveate` command on models with stems: LV-ViT and T2T-ViT, from small checkpoints made here.
#![cfg(feature = "cli")]

mod stems_parts;

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;
use stems_parts::{WIDTH, lvvit, t2t, write};

const PICTURE: &str = "assets/fashion/0000_ankle_boot.png";

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
