//! The `foveate` command as a user calls it: the built binary, its output, its exit codes.
#![cfg(feature = "cli")]

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use foveate::{
    cpu::Products,
    image::{Picture, load, save_png},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

mod affnet_parts;

const MODEL: &str = "assets/fashion_deit_f16.safetensors";
const ANKLE_BOOT: &str = "assets/fashion/0000_ankle_boot.png";
/// A picture no sane model mistakes, class 1.
const TROUSER: &str = "assets/fashion/0002_trouser.png";

/// A folder of its own for a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("foveate-cli-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.0.join(name), content).unwrap();
        self.file(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn foveate(arguments: &[&str]) -> Output {
    let mut output = Command::new(env!("CARGO_BIN_EXE_foveate"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    if cfg!(feature = "cuda") {
        // What the machine has decides what this line says.
        let kept = text(&output.stderr);
        let kept = kept.split_inclusive('\n').filter(|line| !line.starts_with("foveate: device auto: "));
        output.stderr = kept.collect::<String>().into_bytes();
    }
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// stdout of a call that must succeed in silence.
#[track_caller]
fn done(arguments: &[&str]) -> String {
    let output = foveate(arguments);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{arguments:?}");
    text(&output.stdout)
}

/// The JSON of a call that must succeed; anything else on stdout would not parse.
#[track_caller]
fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&done(arguments)).unwrap()
}

/// The one line on stderr of a call that must fail with code 2 and print nothing else.
#[track_caller]
fn refused(arguments: &[&str]) -> String {
    let output = foveate(arguments);
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
    assert!(
        line.starts_with("foveate: ") && line.lines().count() == 1 && line.ends_with('\n'),
        "{arguments:?}: {line}"
    );
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    line
}

/// The likeliest class and its probability, per image.
fn best(report: &Value) -> Vec<(String, String, f64)> {
    report["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| {
            let first = &image["predictions"][0];
            (
                image["image"].as_str().unwrap().to_owned(),
                first["label"].as_str().unwrap().to_owned(),
                first["probability"].as_f64().unwrap(),
            )
        })
        .collect()
}

/// The files in a folder of the repository, sorted.
fn files(folder: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder))
        .unwrap()
        .map(|entry| format!("{folder}/{}", entry.unwrap().file_name().into_string().unwrap()))
        .filter(|name| Path::new(name).extension().is_some_and(|ending| ending == "png" || ending == "jpg"))
        .collect();
    names.sort();
    names
}

#[test]
fn every_help_shows_how_to_call_it() {
    for command in ["demo", "classify", "embed", "overlay", "profile", "info"] {
        let help = done(&[command, "--help"]);
        assert!(help.contains(&format!("Usage: foveate {command}")), "{help}");
        assert!(help.contains("Examples:") && help.contains(&format!("foveate {command} ")), "{help}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
    let help = done(&["--help"]);
    assert!(help.contains("foveate demo") && help.contains("tome:r=13"), "{help}");
    assert!(done(&["--version"]).starts_with("foveate 0."));
    let nothing = foveate(&[]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(text(&nothing.stderr).contains("foveate demo"));
}

#[test]
fn the_demo_shows_all_methods_and_draws() {
    let folder = Folder::new("demo");
    let picture = folder.file("demo.png");
    let report = json(&["demo", "--json", "-o", &picture]);
    let methods = report["methods"].as_array().unwrap();
    let names: Vec<&str> = methods.iter().map(|m| m["reduction"].as_str().unwrap()).collect();
    for method in ["none", "tome:", "mctf:", "evit:"] {
        assert!(names.iter().any(|name| name.starts_with(method)), "{names:?}");
    }
    let tokens = report["model"]["depth"].as_u64().unwrap() + 1;
    for method in methods {
        let counts: Vec<u64> =
            method["tokens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        assert_eq!(counts.len() as u64, tokens);
        assert!(counts.windows(2).all(|w| w[0] >= w[1]));
        assert!(
            method["images_per_second"].as_f64().unwrap() > 0.0 && method["speedup"].as_f64().unwrap() > 0.0
        );
        let share = method["macs_share"].as_f64().unwrap();
        assert_eq!(method["reduction"] == "none", share == 1.0);
        assert!(share <= 1.0);
    }
    assert_eq!(methods[0]["agreement"], 20);
    assert!(methods[0]["correct"].as_u64().unwrap() >= 14, "{}", methods[0]);
    for other in report["others"].as_array().unwrap() {
        let (model, reduction) = (other["model"].as_str().unwrap(), other["reduction"].as_str().unwrap());
        assert!(other["images_per_second"].as_f64().unwrap() > 0.0, "{other}");
        assert_eq!(other["correct"].is_null(), other["random_weights"].as_bool().unwrap(), "{other}");
        let share = other["macs_share"].as_f64().unwrap();
        assert_eq!(share < 0.999, reduction != "none" || model.starts_with("s2vite"), "{other}");
        // BAT and MSTM know what the model knows.
        if reduction.starts_with("bat") || reduction.ends_with("scales=none") {
            assert!(other["correct"].as_u64().unwrap() >= 12, "{other}");
        }
    }
    let others = report["others"].to_string();
    for system in ["bat:", "mstm:", "dynamicvit:", "svite:", "s2vite_", "lvvit_", "t2t_vit_", "affnet_"] {
        assert!(others.contains(system), "{system} is missing: {others}");
    }
    let images = report["images"].as_array().unwrap();
    assert_eq!(images.len(), 20);
    assert!(images.iter().all(|image| image["predictions"].as_array().unwrap().len() == names.len()));
    assert_eq!(report["picture"], Value::from(picture.as_str()));

    let sheet = load(&picture).unwrap();
    assert!(sheet.width() > 800 && sheet.height() > 800, "{}x{}", sheet.height(), sheet.width());
    assert_eq!(sheet.channels(), 3);
}

#[test]
fn the_demo_takes_other_methods_and_says_something_at_once() {
    let folder = Folder::new("demo-text");
    let mut child = Command::new(env!("CARGO_BIN_EXE_foveate"))
        .args(["demo", "--reduce", "tome:r=2", "--threads", "1"])
        .current_dir(&folder.0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(out.starts_with("foveate 0."), "{out}");
    assert!(out.contains("tome:r=2") && !out.contains("mctf") && out.contains("Ankle boot"), "{out}");
    assert!(!out.contains("dynamicvit"), "others beside what was asked for: {out}");
    assert!(out.lines().all(|line| line.chars().count() <= 100), "{out}");
    assert!(load(folder.0.join("foveate_demo.png")).is_ok());

    let elsewhere = Folder::new("demo-no-picture");
    let mut quiet = Command::new(env!("CARGO_BIN_EXE_foveate"));
    quiet.args(["demo", "--no-picture", "--reduce", "none"]).current_dir(&elsewhere.0).stdout(Stdio::null());
    assert!(quiet.status().unwrap().success());
    assert!(!elsewhere.0.join("foveate_demo.png").exists());
    assert!(refused(&["demo", "--no-picture", "--reduce", "tome:r=x"]).contains("tome:r=x"));
}

#[test]
fn twenty_images_together_are_classified_as_one_by_one() {
    let names = files("assets/fashion");
    assert_eq!(names.len(), 20);
    for reduce in ["none", "tome:r=2"] {
        let common = ["--weights", MODEL, "--json", "--reduce", reduce];
        let together = best(&json(&[&["classify", "assets/fashion", "--batch", "7"], &common[..]].concat()));
        assert_eq!(together.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>(), names);
        for (name, (_, label, probability)) in names.iter().zip(&together) {
            let alone = best(&json(&[&["classify", name.as_str()], &common[..]].concat()));
            assert_eq!(alone[0].1, *label, "{name}");
            assert!((alone[0].2 - probability).abs() <= 1e-5, "{name}: {} and {probability}", alone[0].2);
        }
    }
}

#[test]
fn classify_reads_files_globs_folders_and_photos() {
    let all = json(&["classify", "assets/fashion/*.png", "assets/photos", TROUSER, "-w", MODEL, "--json"]);
    assert_eq!(all["command"], "classify");
    assert_eq!(all["reduction"], "none");
    let images = best(&all);
    let photos = files("assets/photos");
    assert_eq!(images.len(), 20 + photos.len() + 1);
    assert!(images[20..].iter().map(|(name, ..)| name).eq(photos.iter().chain([&TROUSER.to_owned()])));
    assert_eq!(images[images.len() - 1].1, "Trouser");
    assert_eq!(all["errors"], Value::Array(Vec::new()));
    let predictions = all["images"][0]["predictions"].as_array().unwrap();
    assert_eq!(predictions.len(), 5);
    let sure: Vec<f64> = predictions.iter().map(|p| p["probability"].as_f64().unwrap()).collect();
    assert!(sure.windows(2).all(|w| w[0] >= w[1]) && sure.iter().sum::<f64>() <= 1.0 + 1e-9);

    let listed =
        done(&["classify", ANKLE_BOOT, "--weights", MODEL, "--top", "3", "--reduce", "evit:keep=0.7"]);
    assert_eq!(listed.lines().count(), 4, "{listed}");
    let lines = done(&["classify", "assets/fashion", "--weights", MODEL, "-k", "1", "--threads", "1"]);
    assert_eq!(lines.lines().count(), 20, "{lines}");
    assert!(lines.lines().next().unwrap().starts_with(ANKLE_BOOT));
}

#[test]
fn all_of_a_softmax_is_one() {
    let all = json(&["classify", ANKLE_BOOT, "-w", MODEL, "--top", "100", "--json"]);
    let predictions = all["images"][0]["predictions"].as_array().unwrap();
    assert_eq!(predictions.len(), 10);
    let sum: f64 = predictions.iter().map(|p| p["probability"].as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-9);
}

#[test]
fn labels_come_from_a_file() {
    let folder = Folder::new("labels");
    let names: Vec<String> = (0..10).map(|i| format!("thing {i}")).collect();
    let plain = folder.write("plain.txt", names.join("\n") + "\n");
    let list = folder.write("list.json", serde_json::to_string(&names).unwrap());
    let map: serde_json::Map<_, _> =
        names.iter().enumerate().map(|(i, n)| (i.to_string(), Value::from(n.as_str()))).collect();
    let map = folder.write("map.json", Value::Object(map).to_string());
    for labels in [&plain, &list, &map] {
        let report = json(&["classify", TROUSER, "--weights", MODEL, "--labels", labels, "--json"]);
        assert_eq!(best(&report)[0].1, "thing 1");
    }
    let short = folder.write("short.txt", "one\ntwo\n");
    let line = refused(&["classify", ANKLE_BOOT, "--weights", MODEL, "--labels", &short]);
    assert!(
        line.contains("short.txt has 2 labels") && line.contains("10 outputs") && line.contains(MODEL),
        "{line}"
    );
    assert!(
        refused(&["classify", ANKLE_BOOT, "-w", MODEL, "--labels", &folder.file("none.txt")])
            .contains("none.txt")
    );
}

#[test]
fn bad_input_is_one_line_and_code_2() {
    let folder = Folder::new("bad");
    let not_an_image = folder.write("notes.png", "these are notes, not pixels\n");
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL)).unwrap();
    let truncated = folder.write("cut.safetensors", &bytes[..bytes.len() / 2]);
    let nothing = folder.file("nothing.png");
    let pixel = folder.file("pixel.png");
    save_png(&pixel, &Picture::new(1, 1, 1, vec![7]).unwrap()).unwrap();
    let empty = folder.file("empty");
    fs::create_dir(&empty).unwrap();
    let out = folder.file("out.png");
    for (arguments, part) in [
        (vec!["classify", &nothing, "-w", MODEL], "nothing.png"),
        (vec!["classify", &not_an_image, "-w", MODEL], "notes.png: not an image"),
        (vec!["classify", &pixel, "-w", MODEL], "pixel.png"),
        (vec!["classify", &empty, "-w", MODEL], "no image files"),
        (vec!["classify", "assets/fashion/*.bmp", "-w", MODEL], "no file matches"),
        (vec!["classify", ANKLE_BOOT, "-w", &truncated], "cut.safetensors"),
        (vec!["classify", ANKLE_BOOT, "-w", &nothing], "nothing.png"),
        (vec!["classify", ANKLE_BOOT, "-w", &not_an_image], "notes.png"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--reduce", "tame:r=3"], "unknown method `tame`"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--reduce", "tome:r=999999"], "r=999999"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--reduce", "mctf:r=0"], "r=0"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--reduce", "evit:keep=0.5,layers=3/99"], "99"),
        // What is asked for is checked before any file is opened.
        (vec!["classify", &nothing, "-w", &nothing, "--reduce", "nonsense"], "nonsense"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--set", "head=3"], "setting `head`"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--image-size", "29"], "29"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--batch", "0"], "--batch"),
        (vec!["classify", ANKLE_BOOT, "-w", MODEL, "--threads", "0"], "--threads"),
        (vec!["classify", ANKLE_BOOT], "--weights"),
        (vec!["classify", "-w", MODEL], "<IMAGE>"),
        (vec!["classfy"], "classfy"),
        (vec!["embed", &not_an_image, "-w", MODEL, "-o", &out], "notes.png"),
        (vec!["embed", ANKLE_BOOT, "-w", MODEL, "-o", MODEL], "is an input"),
        (vec!["overlay", &pixel, "-w", MODEL, "-r", "tome:r=2", "-o", &out], "pixel.png"),
        (vec!["overlay", ANKLE_BOOT, "-w", MODEL, "-o", &out], "--reduce"),
        (vec!["profile", "--arch", "deit_huge"], "deit_huge"),
        (vec!["profile", "--arch", "deit_tiny", "--reduce", "tome:r=-1"], "tome:r=-1"),
        (vec!["profile"], "--weights"),
        (vec!["info", &truncated], "cut.safetensors"),
        (vec!["info", &folder.0.display().to_string()], "directory"),
        (vec!["demo", "--no-picture", "--reduce", "evit:keep=2"], "keep=2"),
    ] {
        let line = refused(&arguments);
        assert!(line.contains(part), "{arguments:?}: {line}");
    }
    assert!(!Path::new(&out).exists() && !folder.0.join("out.png.partial").exists());
}

#[test]
fn one_bad_image_does_not_stop_the_others() {
    let folder = Folder::new("some-bad");
    let bad = folder.write("bad.png", "no image");
    let missing = folder.file("missing.png");
    let arguments =
        ["classify", ANKLE_BOOT, &bad, "assets/photos/coffee.png", &missing, "-w", MODEL, "--json"];
    let output = foveate(&arguments);
    assert_eq!(output.status.code(), Some(2));
    let lines = text(&output.stderr);
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.lines().all(|line| line.starts_with("foveate: ")), "{lines}");
    assert!(lines.contains("bad.png") && lines.contains("missing.png"));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(best(&report).len(), 2);
    assert_eq!(report["errors"].as_array().unwrap().len(), 2);
    assert_eq!(report["errors"][0]["image"], Value::from(bad.as_str()));

    let out = folder.file("features.safetensors");
    let output = foveate(&["embed", &bad, ANKLE_BOOT, "-w", MODEL, "--reduce", "tome:r=3", "-o", &out]);
    assert_eq!(output.status.code(), Some(2));
    let bytes = fs::read(&out).unwrap();
    let whole = folder.file("whole.safetensors");
    done(&["embed", ANKLE_BOOT, "-w", MODEL, "--reduce", "tome:r=3", "-o", &whole]);
    let (some, alone) = (SafeTensors::deserialize(&bytes).unwrap(), fs::read(&whole).unwrap());
    let alone = SafeTensors::deserialize(&alone).unwrap();
    assert_eq!(some.len(), alone.len());
    for (name, tensor) in alone.tensors() {
        let other = some.tensor(&name).unwrap();
        assert_eq!((other.shape(), other.data()), (tensor.shape(), tensor.data()), "{name}");
    }
}

#[test]
fn embeddings_are_the_tokens_and_their_map() {
    let folder = Folder::new("embed");
    let (dense, reduced, spread) =
        (folder.file("d.safetensors"), folder.file("r.safetensors"), folder.file("s.safetensors"));
    let tokens = json(&["info", MODEL, "--json"])["tokens"].as_u64().unwrap() as usize;
    let width = json(&["info", MODEL, "--json"])["model"]["width"].as_u64().unwrap() as usize;
    let (patches, side) = (tokens - 1, (tokens - 1).isqrt());

    let report = json(&["embed", "assets/fashion", "-w", MODEL, "-o", &dense, "--json", "--batch", "6"]);
    assert_eq!(report["images"].as_array().unwrap().len(), 20);
    let bytes = fs::read(&dense).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("patches").unwrap().shape(), [20, patches, width]);
    assert_eq!(file.tensor("class").unwrap().shape(), [20, width]);
    assert_eq!(file.tensor("class").unwrap().data(), file.tensor("features").unwrap().data());
    assert!(file.tensor("sizes").is_err());
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    let images: Vec<String> = serde_json::from_str(&metadata["images"]).unwrap();
    assert_eq!(images, files("assets/fashion"));

    let spec = "evit:keep=0.5,fuse=false";
    done(&["embed", "assets/fashion", "-w", MODEL, "--reduce", spec, "-o", &reduced]);
    done(&["embed", "assets/fashion", "-w", MODEL, "--reduce", spec, "--unmerge", "-o", &spread]);
    let (reduced, spread) = (fs::read(&reduced).unwrap(), fs::read(&spread).unwrap());
    let (reduced, spread) =
        (SafeTensors::deserialize(&reduced).unwrap(), SafeTensors::deserialize(&spread).unwrap());
    let left = reduced.tensor("patches").unwrap().shape()[1];
    assert!(left < patches);
    assert_eq!(reduced.tensor("sizes").unwrap().shape(), [20, left]);
    assert_eq!(reduced.tensor("source_map").unwrap().shape(), [20, side, side]);
    assert_eq!(spread.tensor("patches").unwrap().shape(), [20, side, side, width]);
    let map = reduced.tensor("source_map").unwrap();
    let map: Vec<i32> = map.data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect();
    let (rows, grid) = (reduced.tensor("patches").unwrap(), spread.tensor("patches").unwrap());
    let row_bytes = 4 * width;
    assert!(map.contains(&-1));
    for (at, &token) in map.iter().enumerate() {
        let spread = &grid.data()[at * row_bytes..][..row_bytes];
        match usize::try_from(token) {
            Ok(token) => {
                assert_eq!(spread, &rows.data()[(at / patches * left + token) * row_bytes..][..row_bytes]);
            }
            Err(_) => assert!(spread.iter().all(|&b| b == 0)),
        }
    }
}

#[test]
fn overlays_are_pictures() {
    let folder = Folder::new("overlay");
    let sheet = folder.file("sheet.png");
    let said = done(&[
        "overlay",
        "assets/photos",
        "-w",
        MODEL,
        "-r",
        "tome:r=3",
        "-r",
        "evit:keep=0.5",
        "-o",
        &sheet,
    ]);
    assert!(said.starts_with(&sheet), "{said}");
    let picture = load(&sheet).unwrap();
    // A row for each photo, three panels each.
    let photos = files("assets/photos");
    assert!(picture.width() >= 3 * 448 && picture.height() >= photos.len() * 448);
    let each = folder.file("each/");
    let said = done(&[
        "overlay",
        "assets/photos",
        ANKLE_BOOT,
        ANKLE_BOOT,
        "-w",
        MODEL,
        "-r",
        "mctf:r=3",
        "-o",
        &each,
    ]);
    assert_eq!(said.lines().count(), photos.len() + 2);
    for name in ["chelsea", "0000_ankle_boot", "0000_ankle_boot_2"] {
        assert!(load(folder.0.join(format!("each/{name}.png"))).is_ok(), "{name}");
    }
}

#[test]
fn profiles_add_up() {
    let report = json(&[
        "profile",
        "--weights",
        MODEL,
        "--reduce",
        "tome:r=3",
        "--batch",
        "4",
        "--runs",
        "3",
        "--json",
    ]);
    let segments = report["segments"].as_array().unwrap();
    assert_eq!(segments.len(), 14);
    let sum = |key: &str| segments.iter().map(|s| s[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("macs"), report["macs"].as_u64().unwrap());
    assert_eq!(sum("bytes"), report["bytes"].as_u64().unwrap());
    let shares: f64 = segments.iter().map(|s| s["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-6);
    assert!(report["macs_ratio"].as_f64().unwrap() < 1.0 && report["time_ratio"].as_f64().unwrap() > 0.0);
    let info = json(&["info", MODEL, "--json", "--reduce", "tome:r=3"]);
    assert_eq!(
        report["macs"].as_u64().unwrap(),
        4 * info["reductions"][0]["macs"]["fvcore"].as_u64().unwrap()
    );
    assert_eq!(report["dense"]["macs"].as_u64().unwrap(), 4 * info["macs"]["fvcore"].as_u64().unwrap());

    let table = done(&["profile", "--arch", "deit_tiny", "--image-size", "64", "--runs", "1"]);
    assert!(table.contains("block 11") && table.contains("total") && !table.contains("of dense"), "{table}");
    let table =
        done(&["profile", "--arch", "deit_tiny", "--image-size", "64", "--runs", "1", "-r", "evit:keep=0.5"]);
    assert!(table.contains("of dense"), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
}

/// Methods that decouple tokens run on any model with a class token; those with weights of their own want them, and random ones
/// come with random weights.
#[test]
fn every_method_is_profiled_drawn_and_refused_where_its_weights_are_missing() {
    for (method, left) in
        [("dynamicvit:keep=0.7", 6), ("svite:tokens=11", 12), ("bat:keep=0.7", 8), ("mstm:keep=0.7", 8)]
    {
        let arguments = ["profile", "--arch", "deit_tiny", "--image-size", "64", "--runs", "1", "--json"];
        let report = json(&[&arguments[..], &["--reduce", method]].concat());
        let counts = report["tokens"].as_array().unwrap().clone();
        assert_eq!(counts.last().unwrap().as_u64(), Some(left), "{method}: {counts:?}");
    }
    let folder = Folder::new("decoupled");
    for method in ["bat:keep=0.6", "mstm:keep=0.6"] {
        let picture = folder.file("drawn.png");
        done(&["overlay", TROUSER, "-w", MODEL, "-r", method, "-o", &picture]);
        assert!(load(&picture).unwrap().width() > 0);
        let report = json(&["classify", TROUSER, "-w", MODEL, "-r", method, "--json"]);
        assert_eq!(best(&report)[0].1, "Trouser", "{method}");
    }
    for (method, missing) in [("dynamicvit", "score_predictor.0.*"), ("svite", "gumbel.weight")] {
        let line = refused(&["classify", TROUSER, "-w", MODEL, "-r", method]);
        assert!(line.contains(missing) && line.contains("load a checkpoint"), "{line}");
    }
}

#[test]
fn info_says_where_numbers_come_from() {
    let report = json(&["info", MODEL, "--json"]);
    assert_eq!(report["family"], "timm VisionTransformer");
    assert_eq!(report["labels"].as_array().unwrap().len(), 10);
    assert_eq!(report["model"]["classes"], 10);
    assert_eq!(report["tokens"].as_u64().unwrap(), 1 + report["grid"][0].as_u64().unwrap().pow(2));
    let heads = report["settings"].as_array().unwrap().iter().find(|s| s["name"] == "heads").unwrap();
    assert_eq!(heads["source"], "metadata: arch.heads");
    let set = json(&["info", MODEL, "--json", "--set", "heads=4"]);
    let heads = set["settings"].as_array().unwrap().iter().find(|s| s["name"] == "heads").unwrap();
    assert_eq!((&heads["value"], &heads["source"]), (&Value::from("4"), &Value::from("override")));
    let shown = done(&["info", MODEL, "--reduce", "tome:r=3"]);
    assert!(shown.contains("metadata: arch.heads") && shown.contains("tome:r=3"), "{shown}");
}

#[test]
fn an_affnet_classifies_and_has_no_tokens_to_reduce() {
    let folder = Folder::new("affnet");
    let weights = folder.write("small.safetensors", affnet_parts::file(&affnet_parts::tensors()));
    let size = ["--image-size", "36x44"];
    let report = json(&["info", &weights, "--json", size[0], size[1]]);
    assert_eq!(report["family"], "official AFFNet");
    assert_eq!(report["model"]["widths"], serde_json::json!([16, 16, 24, 32, 40]));
    assert_eq!(report["model"]["image"], serde_json::json!([36, 44]));
    assert!(
        report["macs"]["theoretical"].as_u64() > Some(0) && report["parts"].as_array().unwrap().len() == 7
    );
    let shown = done(&["info", &weights]);
    assert!(shown.contains("layer_norm_2d") && shown.contains("as the official code counts"), "{shown}");
    let classes =
        json(&["classify", ANKLE_BOOT, TROUSER, "-w", &weights, "--json", "-k", "3", size[0], size[1]]);
    let images = classes["images"].as_array().unwrap();
    assert_eq!((images.len(), images[0]["predictions"].as_array().unwrap().len()), (2, 3));
    assert_ne!(images[0]["predictions"], images[1]["predictions"]);
    for arguments in [
        vec!["classify", ANKLE_BOOT, "-w", &weights, "-r", "tome:r=3"],
        vec!["info", &weights, "-r", "tome:r=3"],
    ] {
        let line = refused(&arguments);
        assert!(line.contains("reduction `tome:r=3") && line.contains("frequency domain"), "{line}");
    }
    let features = folder.file("features.safetensors");
    let embed = ["embed", ANKLE_BOOT, TROUSER, "-w", &weights, "-o", &features, "--json", size[0], size[1]];
    let report = json(&embed);
    assert_eq!(report["tensors"]["map"]["shape"], serde_json::json!([2, 2, 2, 40]));
    let file = fs::read(&features).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let features = file.tensor("features").unwrap();
    assert_eq!(features.shape()[0], 2);
    let (one, other) = features.data().split_at(features.data().len() / 2);
    assert!(one != other, "two pictures with the same features");
    let line = refused(&[&embed[..], &["--unmerge"]].concat());
    assert!(line.contains("--unmerge") && line.contains("no tokens to spread"), "{line}");
    let report = json(&["profile", "-w", &weights, "--runs", "1", "--json", size[0], size[1]]);
    let parts = report["segments"].as_array().unwrap();
    assert_eq!((parts.len(), &parts[6]["name"]), (7, &Value::from("head")));
    assert_eq!(parts[3]["grid"], serde_json::json!([5, 6]));
    let line = refused(&["profile", "--arch", "affnet_et", "-r", "evit:keep=0.7"]);
    assert!(line.contains("affnet_et: reduction `evit:keep=0.7"), "{line}");
    let line =
        refused(&["overlay", ANKLE_BOOT, "-w", &weights, "-r", "tome:r=3", "-o", &folder.file("a.png")]);
    assert!(line.contains("is an AFFNet, which has no tokens"), "{line}");
    let line = refused(&["classify", ANKLE_BOOT, "-w", &weights, "--set", "heads=3"]);
    assert!(line.contains("`heads=3` does not apply"), "{line}");
}

#[test]
fn models_without_a_classifier_say_so() {
    let folder = Folder::new("headless");
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let rest: Vec<_> = file.tensors().into_iter().filter(|(name, _)| !name.starts_with("head.")).collect();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut notes = header.metadata().clone().unwrap();
    notes.remove("labels");
    let headless = folder.write("headless.safetensors", safetensors::serialize(rest, Some(notes)).unwrap());
    let line = refused(&["classify", ANKLE_BOOT, "-w", &headless]);
    assert!(line.contains("no classification head") && line.contains("foveate embed"), "{line}");
    done(&["embed", ANKLE_BOOT, "-w", &headless, "-o", &folder.file("out.safetensors")]);
    done(&["overlay", ANKLE_BOOT, "-w", &headless, "-r", "tome:r=2", "-o", &folder.file("out.png")]);
}

/// A visual tower in OpenAI's naming: 64 wide, one block, 32x32 pixels, 2x2 patches, a projection to 5 numbers.
fn clip_tower() -> Vec<u8> {
    const C: usize = 64;
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("visual.conv1.weight".into(), vec![C, 3, 16, 16]),
        ("visual.class_embedding".into(), vec![C]),
        ("visual.positional_embedding".into(), vec![5, C]),
        ("visual.proj".into(), vec![C, 5]),
    ];
    let block = "visual.transformer.resblocks.0";
    for norm in ["visual.ln_pre", "visual.ln_post", &format!("{block}.ln_1"), &format!("{block}.ln_2")] {
        tensors.extend(["weight", "bias"].map(|part| (format!("{norm}.{part}"), vec![C])));
    }
    tensors.push((format!("{block}.attn.in_proj_weight"), vec![3 * C, C]));
    tensors.push((format!("{block}.attn.in_proj_bias"), vec![3 * C]));
    for (layer, [outputs, inputs]) in
        [("attn.out_proj", [C, C]), ("mlp.c_fc", [4 * C, C]), ("mlp.c_proj", [C, 4 * C])]
    {
        tensors.push((format!("{block}.{layer}.weight"), vec![outputs, inputs]));
        tensors.push((format!("{block}.{layer}.bias"), vec![outputs]));
    }
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(seed, (_, shape))| {
            let values =
                (0..shape.iter().product::<usize>()).map(|i| ((i * 37 + seed * 11) % 23) as f32 * 0.01 - 0.1);
            values.flat_map(f32::to_le_bytes).collect()
        })
        .collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .zip(&data)
        .map(|((name, shape), data)| (&name[..], TensorView::new(Dtype::F32, shape.clone(), data).unwrap()))
        .collect();
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn clip_embeds_and_does_not_classify() {
    let folder = Folder::new("clip");
    let clip = folder.write("clip.safetensors", clip_tower());
    let line = refused(&["classify", ANKLE_BOOT, "-w", &clip]);
    assert!(line.contains("CLIP") && line.contains("foveate embed"), "{line}");
    let out = folder.file("out.safetensors");
    done(&["embed", ANKLE_BOOT, "-w", &clip, "-o", &out]);
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("embedding").unwrap().shape(), [1, 5]);
    assert_eq!(file.tensor("patches").unwrap().shape(), [1, 4, 64]);
}

/// `foveate ... | head -1` ends in silence.
#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_panic() {
    for arguments in [
        &["info", MODEL][..],
        &["classify", "assets/fashion", "-w", MODEL, "--json", "--device", "cpu"],
        &["--help"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_foveate"))
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(&output.stderr), "", "{arguments:?}");
        assert!(output.status.success(), "{arguments:?}: {:?}", output.status);
    }
}

#[test]
fn the_device_is_chosen_by_name() {
    let on = |device: &[&str]| {
        let call = [&["classify", TROUSER, "-w", MODEL, "-k", "1"][..], device].concat();
        foveate(&call)
    };
    let usual = done(&["classify", TROUSER, "-w", MODEL, "-k", "1"]);
    assert!(usual.contains("Trouser"));
    let cpu = on(&["--device", "cpu", "--dtype", "f32"]);
    assert_eq!((cpu.status.code(), text(&cpu.stdout)), (Some(0), usual));
    let line = |device: &[&str], code: i32| {
        let output = on(device);
        assert_eq!(output.status.code(), Some(code), "{device:?}");
        text(&output.stderr)
    };
    assert!(line(&["--device", "gpu"], 2).contains("use auto, cpu, cuda, or cuda:N"));
    assert!(line(&["--device", "cuda:first"], 2).contains("`first` is not the number of a card"));
    assert!(line(&["--device", "cpu", "--dtype", "f16"], 2).contains("the processor computes in f32"));
    let bf16 = ["--device", "cpu", "--dtype", "bf16"];
    match Products::Bf16.check() {
        Ok(()) => {
            assert!(text(&on(&bf16).stdout).contains("Trouser"));
            let report = done(&[
                "profile", "-w", MODEL, "-r", "none", "--runs", "1", "--device", "cpu", "--dtype", "bf16",
            ]);
            assert!(report.contains("AMX") && report.contains("bf16, residual f32"), "{report}");
        }
        Err(missing) => {
            let said = line(&bf16, 2);
            assert!(said.contains(&missing.to_string()) && said.contains("use f32"), "{said}");
        }
    }
    if !cfg!(feature = "cuda") {
        assert!(line(&["--device", "cuda"], 2).contains("built without CUDA"));
    }
}
