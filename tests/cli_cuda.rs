//! `foveate --device` as a user calls it: the built command on the emulated CUDA driver.
//!
//! The driver is the one that the device tests have built beside this one: without it these tests say that they were
//! skipped, and fail where `FOVEATE_REQUIRE_EMULATOR` is set (`cargo xtask test` sets it).

mod affnet_parts;
mod stems_parts;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use safetensors::SafeTensors;
use serde_json::Value;

const MODEL: &str = "assets/fashion_deit_f16.safetensors";
const BOOT: &str = "assets/fashion/0000_ankle_boot.png";
const TROUSER: &str = "assets/fashion/0002_trouser.png";
/// Where the answer does not matter: 50 tokens instead of 197.
const SMALL: [&str; 2] = ["--image-size", "14"];

/// The folder that the emulated driver and its cuBLASLt lie in.
fn emulator() -> Option<PathBuf> {
    let folder = env::current_exe().unwrap().parent().unwrap().to_owned();
    let there = ["libcuda.so", "libcublasLt.so"].iter().all(|name| folder.join(name).is_file());
    if !there {
        let required = env::var_os("FOVEATE_REQUIRE_EMULATOR").is_some();
        assert!(!required, "no emulated driver in {}", folder.display());
        println!("SKIPPED: no emulated driver in {}: run the device tests first", folder.display());
    }
    there.then_some(folder)
}

/// The command with the libraries of `folder` in front, if any.
fn command(folder: Option<&Path>, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).env("EMU_COUNT", "0");
    command.env_remove("FOVEATE_EMULATED").env_remove("LD_LIBRARY_PATH");
    if let Some(folder) = folder {
        command.env("LD_LIBRARY_PATH", folder);
    }
    command
}

/// The command as `cargo xtask emulate` starts it, with further settings.
fn emulated(folder: &Path, settings: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = command(Some(folder), arguments);
    command.env("FOVEATE_EMULATED", "1").envs(settings.iter().copied()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Without the emulator's own reports.
fn ours(lines: &str) -> String {
    lines.split_inclusive('\n').filter(|line| !line.starts_with("=========")).collect()
}

/// stdout and stderr of a run that must succeed.
#[track_caller]
fn done(output: &Output) -> (&str, &str) {
    let streams = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{streams:?}");
    streams
}

/// The JSON of a run on the emulated device.
#[track_caller]
fn json(folder: &Path, arguments: &[&str]) -> Value {
    let output = emulated(folder, &[], &[arguments, &["--device", "cuda", "--json"]].concat());
    serde_json::from_str(done(&output).0).unwrap()
}

/// The JSON of a run on the processor.
#[track_caller]
fn cpu(arguments: &[&str]) -> Value {
    let output = command(None, &[arguments, &["--device", "cpu", "--json"]].concat()).output().unwrap();
    serde_json::from_str(done(&output).0).unwrap()
}

/// The one line on stderr of a run that must fail with this code and print nothing else; the emulator adds reports.
#[track_caller]
fn refused(output: &Output, code: i32) -> String {
    let line = ours(text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{line}");
    assert!(line.starts_with("foveate: ") && line.lines().count() == 1, "{line}");
    assert_eq!(text(&output.stdout), "");
    line
}

/// A folder of its own for a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = env::temp_dir().join(format!("foveate-cuda-{test}-{}", std::process::id()));
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

#[test]
fn an_emulated_driver_that_is_in_front_by_accident_computes_nothing() {
    let Some(folder) = emulator() else { return };
    let classify = ["classify", BOOT, "-w", MODEL, "--json", SMALL[0], SMALL[1]];
    let on = |device: &str| {
        command(Some(&folder), &[&classify[..], &["--device", device]].concat()).output().unwrap()
    };
    let line = refused(&on("cuda"), 1);
    for part in
        ["--device cuda:0", "emulated", "foveate emulator (sm_80)", "--target-dir", "cargo xtask emulate --"]
    {
        assert!(line.contains(part), "{line}");
    }
    let output = on("auto");
    let (said, told) = done(&output);
    assert!(
        told.starts_with("foveate: device auto: cpu, because the driver in front is the emulated one"),
        "{told}"
    );
    assert_eq!(told.lines().count(), 1, "{told}");
    let said: Value = serde_json::from_str(said).unwrap();
    assert_eq!(said["images"], cpu(&["classify", BOOT, "-w", MODEL, SMALL[0], SMALL[1]])["images"]);
    assert_eq!(done(&on("cpu")).1, "");
}

/// The largest difference between two reports' probabilities of the same classes in the same order.
fn apart(a: &Value, b: &Value) -> f64 {
    let rows = |report: &Value| -> Vec<(String, Vec<(u64, f64)>)> {
        let images = report["images"].as_array().unwrap().iter();
        let of = |image: &Value| {
            let guesses = image["predictions"].as_array().unwrap().iter();
            let mut guesses: Vec<_> =
                guesses.map(|g| (g["class"].as_u64().unwrap(), g["probability"].as_f64().unwrap())).collect();
            guesses.sort_by_key(|guess| guess.0);
            (image["image"].as_str().unwrap().to_owned(), guesses)
        };
        images.map(of).collect()
    };
    let (a, b) = (rows(a), rows(b));
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(&b).flat_map(|((name, a), (other, b))| {
        assert_eq!((name, a.len()), (other, b.len()));
        a.iter().zip(b).map(move |(a, b)| {
            assert_eq!(a.0, b.0, "{name}");
            (a.1 - b.1).abs()
        })
    });
    pairs.fold(0.0, f64::max)
}

#[test]
fn pictures_are_classified_as_on_the_processor() {
    let Some(folder) = emulator() else { return };
    let classify = ["classify", BOOT, TROUSER, "-w", MODEL, "-k", "10"];
    let want = cpu(&classify);
    for (dtype, limit) in [("f32", 1e-4), ("f16", 1e-2), ("bf16", 5e-2)] {
        let got = json(&folder, &[&classify[..], &["--dtype", dtype]].concat());
        let apart = apart(&got, &want);
        println!("{dtype}: {apart:.1e} of {limit:.0e}");
        assert!(apart <= limit, "{dtype}: {apart}");
        assert!(dtype == "f32" || apart > 0.0, "{dtype} rounds");
    }
    let (plain, residual) = (["--dtype", "bf16"], ["--dtype", "bf16", "--f32-residual"]);
    let [rounded, exact] = [&plain[..], &residual].map(|more| json(&folder, &[&classify[..], more].concat()));
    assert!(apart(&exact, &want) <= 5e-2 && apart(&exact, &rounded) > 0.0, "the residual stream is another");
    let reduced = [&classify[..], &["--reduce", "evit:keep=0.5"]].concat();
    let got = json(&folder, &[&reduced[..], &["--dtype", "f32"]].concat());
    assert_eq!(got["tokens"], cpu(&reduced)["tokens"]);
    let apart = apart(&got, &cpu(&reduced));
    assert!(apart <= 1e-4, "evit: {apart}");

    // On the emulated device that was asked for, auto is a card.
    let output = emulated(&folder, &[], &["classify", BOOT, "-w", MODEL, "-k", "1"]);
    let (said, told) = done(&output);
    assert!(said.contains("Ankle boot"), "{said}");
    assert!(told.starts_with("foveate: device auto: cuda:0, foveate emulator (sm_80)"), "{told}");
    assert!(told.contains("f16") && told.lines().count() == 1, "{told}");
}

/// Four batches and more: the next one is decoded while a graph computes one.
#[test]
fn many_batches_are_those_of_the_processor() {
    let Some(folder) = emulator() else { return };
    let own = Folder::new("many");
    let no_picture = own.file("no picture.png");
    fs::write(&no_picture, "no picture").unwrap();
    let files: Vec<_> = fs::read_dir("assets/fashion").unwrap().map(|file| file.unwrap().path()).collect();
    let mut pictures: Vec<_> = files.iter().take(9).map(|path| path.to_str().unwrap()).collect();
    // 10 files, 9 pictures: a batch of one, and one that is not full.
    pictures.insert(4, &no_picture);
    let common = ["-w", MODEL, SMALL[0], SMALL[1], "-r", "tome:r=4", "--json", "--batch", "2", "--device"];
    let on = |device: &str, command: &[&str]| -> Output {
        let dtype: &[&str] = if device == "cuda" { &["--dtype", "f32"] } else { &[] };
        emulated(&folder, &[], &[command, &pictures, &common, &[device], dtype].concat())
    };
    let read = |output: &Output| -> Value {
        assert_eq!((output.status.code(), ours(text(&output.stderr)).lines().count()), (Some(2), 1));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let [got, want] = ["cuda", "cpu"].map(|device| read(&on(device, &["classify"])));
    assert_eq!(got["images"].as_array().unwrap().len(), 9);
    assert!(apart(&got, &want) <= 1e-4);
    assert_eq!(got["errors"], want["errors"]);
    assert!(got["seconds"].as_f64().unwrap() > 0.0);

    let [got, want] = ["cuda", "cpu"].map(|device| {
        let file = own.file(device);
        let said = read(&on(device, &["embed", "-o", &file]));
        assert_eq!(said["images"].as_array().unwrap().len(), 9);
        fs::read(file).unwrap()
    });
    let [got, want] = [&got, &want].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    for name in ["source_map", "sizes"] {
        assert_eq!(got.tensor(name).unwrap().data(), want.tensor(name).unwrap().data(), "{name}");
    }
}

#[test]
fn features_and_overlays_are_those_of_the_processor() {
    let Some(folder) = emulator() else { return };
    let own = Folder::new("embed");
    let [ours, theirs] = ["ours.safetensors", "theirs.safetensors"].map(|name| own.file(name));
    let embed = ["embed", BOOT, "-w", MODEL, "--reduce", "tome:r=16", "--dtype", "f32"];
    json(&folder, &[&embed[..], &["-o", &ours]].concat());
    cpu(&[&embed[..], &["-o", &theirs]].concat());
    let (ours, theirs) = (fs::read(ours).unwrap(), fs::read(theirs).unwrap());
    let (ours, theirs) =
        (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    assert_eq!(ours.len(), 5);
    for (name, want) in theirs.tensors() {
        let got = ours.tensor(&name).unwrap();
        assert_eq!(got.shape(), want.shape(), "{name}");
        if name == "source_map" || name == "sizes" {
            assert_eq!(got.data(), want.data(), "{name}");
            continue;
        }
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let (got, want) = (floats(got.data()), floats(want.data()));
        let scale = want.iter().fold(0.0_f32, |scale, x| scale.max(x.abs()));
        let worst = got.iter().zip(&want).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst <= 1e-4 * scale, "{name}: {worst} of {scale}");
    }

    let overlay = |output: &Output| done(output).0.to_owned();
    let picture = |device: &str| {
        let file = own.file(&format!("{device}.png"));
        let arguments = [
            "overlay",
            TROUSER,
            "-w",
            MODEL,
            "-r",
            "tome:r=16",
            "--dtype",
            "f32",
            "--device",
            device,
            "-o",
            &file,
        ];
        overlay(&emulated(&folder, &[], &arguments));
        fs::read(file).unwrap()
    };
    assert!(picture("cuda") == picture("cpu"), "the pictures differ");
}

#[test]
fn profiles_count_and_do_not_time_the_emulated_driver() {
    let Some(folder) = emulator() else { return };
    let profile = ["profile", "-w", MODEL, "--reduce", "evit:keep=0.5", "--runs", "1"];
    let (ours, theirs) = (json(&folder, &profile), cpu(&profile));
    for same in ["model", "reduction", "tokens", "macs", "macs_ratio", "batch"] {
        assert_eq!(ours[same], theirs[same], "{same}");
    }
    assert_eq!((&ours["backend"], &ours["dtype"]), (&Value::from("cuda"), &Value::from("f16")));
    for time in ["milliseconds", "images_per_second", "time_ratio"] {
        assert!(ours[time].is_null() && theirs[time].is_f64(), "{time}: {}", ours[time]);
    }
    // A dense block: two norms, four products, attention, GELU. One that reduces merges with the second norm.
    let segments = ours["segments"].as_array().unwrap();
    let mut all = 0;
    for segment in segments {
        let launches = segment["launches"].as_array().unwrap();
        all += launches.len();
        let sum = |key: &str| launches.iter().map(|launch| launch[key].as_u64().unwrap()).sum::<u64>();
        assert_eq!(sum("bytes"), segment["bytes"].as_u64().unwrap());
        assert!(sum("macs") <= segment["macs"].as_u64().unwrap(), "{segment}");
        if segment["name"].as_str().unwrap().starts_with("block") {
            let reduces = segment["tokens_in"] != segment["tokens_out"];
            assert!(sum("macs") > segment["macs"].as_u64().unwrap() / 2, "{segment}");
            assert!(
                if reduces { (9..=10).contains(&launches.len()) } else { launches.len() == 8 },
                "{segment}"
            );
            assert_eq!(segment["dense_launches"], 8);
        }
    }
    assert_eq!((segments.len(), ours["launches"].as_u64()), (14, Some(all as u64)));
    assert!(theirs["launches"].is_null() && theirs["segments"][1]["launches"].is_null());
    let memory = |key: &str| ours[key].as_u64().unwrap();
    assert!(memory("live_bytes") <= memory("arena_bytes"));
    let output = emulated(&folder, &[], &[&profile[..], &["--device", "cuda"]].concat());
    let (table, _) = done(&output);
    assert!(
        table.contains("not timed") && table.contains("dense launches") && !table.contains("images/s"),
        "{table}"
    );
    assert!(table.lines().skip(1).all(|line| line.chars().count() <= 100), "{table}");
}

/// Stems on the card: the answers of the processor, and their launches in the profile.
#[test]
fn models_with_stems_run_on_a_card() {
    let Some(folder) = emulator() else { return };
    let own = Folder::new("stems");
    let [lvvit, t2t] = ["lvvit.safetensors", "t2t.safetensors"].map(|name| own.file(name));
    stems_parts::write(&lvvit, &stems_parts::lvvit());
    stems_parts::write(&t2t, &stems_parts::t2t());
    for (model, settings, reduction, of_stem) in [
        (&lvvit, &["--set", "skip_lam=2"][..], "evit:keep=0.5,layers=0", "unfold_images"),
        (&t2t, &[], "tome:r=1", "performer"),
    ] {
        let with = |arguments: &[&'static str]| {
            [arguments, &["-w", model, "--reduce", reduction], settings].concat()
        };
        let classify = with(&["classify", BOOT, TROUSER, "-k", "5"]);
        let want = cpu(&classify);
        for (dtype, limit) in [("f32", 1e-4), ("f16", 1e-2)] {
            let got = json(&folder, &[&classify[..], &["--dtype", dtype]].concat());
            let apart = apart(&got, &want);
            assert!(apart <= limit, "{of_stem} in {dtype}: {apart}");
            assert_eq!(got["tokens"], want["tokens"]);
        }
        let profile = json(&folder, &with(&["profile", "--runs", "1"]));
        let launches = profile["segments"][0]["launches"].as_array().unwrap();
        assert!(launches.iter().any(|launch| launch["operation"] == of_stem), "{launches:?}");
        assert!(profile["macs_ratio"].as_f64().unwrap() < 1.0);
    }
}

/// An AFFNet in a graph: the answers of the processor, and its launches part by part.
#[test]
fn an_affnet_runs_on_a_card() {
    let Some(folder) = emulator() else { return };
    let own = Folder::new("affnet");
    let weights = own.file("small.safetensors");
    fs::write(&weights, affnet_parts::file(&affnet_parts::tensors())).unwrap();
    let size = ["-w", &weights, "--image-size", "36x44"];
    // Five batches: in a stream.
    let classify = [&["classify", "assets/fashion"], &size[..], &["-k", "5", "--batch", "4"]].concat();
    let want = cpu(&classify);
    for (dtype, limit) in [("f32", 1e-4), ("f16", 1e-2)] {
        let got = json(&folder, &[&classify[..], &["--dtype", dtype]].concat());
        assert!(apart(&got, &want) <= limit, "{dtype}: {}", apart(&got, &want));
    }
    let file = own.file("features.safetensors");
    let embed = [&["embed", "assets/fashion"], &size[..], &["-o", &file, "--batch", "4"]].concat();
    let report = json(&folder, &embed);
    assert_eq!(report["tensors"]["map"]["shape"], serde_json::json!([20, 2, 2, 40]));
    let profile = json(&folder, &[&["profile", "--runs", "1"], &size[..]].concat());
    assert!(profile["milliseconds"].is_null());
    let mut all = 0;
    for (at, segment) in profile["segments"].as_array().unwrap().iter().enumerate() {
        let launches = segment["launches"].as_array().unwrap();
        let names = |name: &str| launches.iter().filter(|launch| launch["operation"] == name).count();
        assert_eq!(names("frequency") > 0, (3..6).contains(&at), "{segment}");
        all += launches.len();
    }
    assert_eq!(profile["launches"].as_u64(), Some(all as u64));
    assert!(profile["live_bytes"].as_u64() <= profile["arena_bytes"].as_u64());
    let full = emulated(&folder, &[], &["profile", "--arch", "affnet_et", "--device", "cuda"]);
    assert!(done(&full).0.contains("launches") && done(&full).0.contains("layer_5"), "{}", done(&full).0);
}

#[test]
fn narrow_heads_are_computed_in_f32_unless_another_type_is_asked_for() {
    let Some(folder) = emulator() else { return };
    // 8 heads of 16 values: another model than was trained, and that is all the same here.
    let classify = ["classify", BOOT, "-w", MODEL, SMALL[0], SMALL[1], "--set", "heads=8", "--json"];
    let on = |more: &[&str]| emulated(&folder, &[], &[&classify[..], more].concat());
    let read = |output: &Output| serde_json::from_str::<Value>(done(output).0).unwrap();
    let want = cpu(&classify[..8]);
    let output = on(&[]);
    assert!(apart(&read(&output), &want) <= 1e-4);
    let told = done(&output).1;
    assert!(
        told.contains("device auto: cuda:0") && told.contains("f32, because attention: heads have 16 values"),
        "{told}"
    );
    let output = on(&["--device", "cuda"]);
    assert!(apart(&read(&output), &want) <= 1e-4);
    let told = done(&output).1;
    assert!(
        told.starts_with("foveate: device cuda:0: f32, because attention: heads have 16 values"),
        "{told}"
    );
    for dtype in ["f16", "bf16"] {
        for device in ["auto", "cuda"] {
            let line = refused(&on(&["--dtype", dtype, "--device", device]), 2);
            assert!(
                line.starts_with(&format!("foveate: --dtype {dtype}: attention: heads have 16")),
                "{line}"
            );
            assert!(line.contains("in f32"), "{line}");
        }
    }
    // Heads of 4 values have no kernel at all.
    let none = ["classify", BOOT, "-w", MODEL, SMALL[0], SMALL[1], "--set", "heads=32", "--json"];
    let output = emulated(&folder, &[], &none);
    assert!(done(&output).1.contains("device auto: cpu, because attention: heads have 4 values"));
    let line = refused(&emulated(&folder, &[], &[&none[..], &["--device", "cuda"]].concat()), 2);
    assert!(line.contains("heads have 4 values") && line.contains("--device cpu"), "{line}");
}

#[test]
fn what_a_card_cannot_do_is_said_in_one_line() {
    let Some(folder) = emulator() else { return };
    let classify = ["classify", BOOT, "-w", MODEL, SMALL[0], SMALL[1], "--device"];
    let on = |settings: &[(&str, &str)], device: &str| {
        emulated(&folder, settings, &[&classify[..], &[device]].concat())
    };
    for (setting, parts) in [
        (("EMU_DEVICE", "sm_75"), ["foveate emulator (sm_75)", "compute capability 8.0 or higher"]),
        (("EMU_DRIVER", "12.4"), ["UNSUPPORTED_PTX_VERSION", "update the driver, which is for CUDA 12.4"]),
        (("EMU_MEM_LIMIT", "2M"), ["memory is used up", "MB"]),
    ] {
        let line = refused(&on(&[setting], "cuda"), 1);
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        let output = on(&[setting], "auto");
        let told = ours(done(&output).1);
        assert!(told.starts_with("foveate: device auto: cpu, because "), "{told}");
        assert!(told.contains(parts[0]) && told.lines().count() == 1, "{told}");
    }
    let line = refused(&on(&[], "cuda:3"), 1);
    assert!(line.contains("--device cuda:3") && line.contains("INVALID_DEVICE"), "{line}");

    // What is not there. A machine may have either library of its own.
    let own = Folder::new("nothing");
    let line = |output: Output| {
        let line = text(&output.stderr).to_owned();
        (!output.status.success()).then_some(line)
    };
    match line(command(Some(&own.0), &[&classify[..], &["cuda"]].concat()).output().unwrap()) {
        Some(line) => assert!(line.contains("there is no CUDA driver") || line.contains("CUDA"), "{line}"),
        None => println!("this machine has a driver of its own"),
    }
    fs::copy(folder.join("libcuda.so"), own.0.join("libcuda.so")).unwrap();
    match line(emulated(&own.0, &[], &[&classify[..], &["cuda"]].concat())) {
        Some(line) => assert!(line.contains("there is no cuBLASLt"), "{line}"),
        None => println!("this machine has a cuBLASLt of its own"),
    }
}

#[test]
fn a_batch_that_is_too_large_is_told_one_that_fits() {
    let Some(folder) = emulator() else { return };
    let common = ["-w", MODEL, SMALL[0], SMALL[1], "--device", "cuda", "--dtype", "f32", "-k", "1"];
    let with = |megabytes: &str, images: &[&str], batch: &str| {
        let arguments = [&["classify"], images, &common[..], &["--batch", batch]].concat();
        emulated(&folder, &[("EMU_MEM_LIMIT", megabytes)], &arguments)
    };
    let line = refused(&with("15M", &["assets/fashion"], "16"), 1);
    assert!(line.contains("memory is used up") && line.contains("16 images at a time"), "{line}");
    let fits = line.split("--batch ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!((1..16).contains(&fits.parse::<usize>().unwrap()), "{line}");
    assert_eq!(done(&with("15M", &["assets/fashion"], fits)).0.lines().count(), 20);

    let line = refused(&with("12M", &[BOOT], "1"), 1);
    assert!(line.contains("the weights do not fit the device") && line.contains("--device cpu"), "{line}");
    assert!(!line.contains("smaller batch"), "{line}");
}
