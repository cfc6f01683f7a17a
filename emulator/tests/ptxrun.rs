//! The command as its user calls it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn ptxrun(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ptxrun")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

/// A copy of a case that a test may spoil.
fn copy(name: &str, into: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(into);
    fs::remove_dir_all(&folder).ok();
    fs::create_dir_all(&folder).unwrap();
    for entry in fs::read_dir(case(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    folder
}

#[test]
fn a_folder_of_cases_runs_and_says_what_it_counted() {
    let out = ptxrun(&[case("").to_str().unwrap()]);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{said}{}", text(&out.stderr));
    assert!(said.contains("pass misc_warp") && said.contains("warp instructions"), "{said}");
}

#[test]
fn json_has_one_object_a_case() {
    let out = ptxrun(&[
        case("compact").to_str().unwrap(),
        "--json",
        "--set",
        "EMU_ORDER=reverse",
        "--checks",
        "global=error",
    ]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((json["case"].as_str(), json["pass"].as_bool()), (Some("compact"), Some(true)));
    assert!(json["counters"]["insts"].as_u64().unwrap() > 0);
    assert_eq!(json["outputs"].as_array().unwrap().len(), 2);
}

#[test]
fn a_wrong_output_and_a_kernel_that_cannot_load_fail() {
    let wrong = copy("misc_warp", "wrong_output");
    let launch = fs::read_to_string(wrong.join("launch.json")).unwrap();
    // Exact, and one byte of what is expected turned.
    let exact: String = launch.lines().filter(|l| !l.contains("tol\"")).collect();
    fs::write(wrong.join("launch.json"), exact).unwrap();
    let mut expected = fs::read(wrong.join("01_expect.npy")).unwrap();
    let last = expected.len() - 1;
    expected[last] ^= 0x40;
    fs::write(wrong.join("01_expect.npy"), expected).unwrap();
    let out = ptxrun(&[wrong.to_str().unwrap()]);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("FAIL misc_warp") && said.contains("wrong, worst error"), "{said}");

    let broken = copy("misc_warp", "broken_kernel");
    let ptx = fs::read_to_string(broken.join("kernel.ptx"))
        .unwrap()
        .replace("shfl.sync.bfly.b32", "shfl.sync.sideways.b32");
    fs::write(broken.join("kernel.ptx"), ptx).unwrap();
    let out = ptxrun(&[broken.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stdout).contains("ptx line"), "{}", text(&out.stdout));
}

#[test]
fn damaged_folders_fail_with_the_file_named() {
    for file in ["launch.json", "00_in.npy", "kernel.ptx"] {
        let folder = copy("compact", &format!("cut_{file}"));
        let bytes = fs::read(folder.join(file)).unwrap();
        fs::write(folder.join(file), &bytes[..bytes.len() / 2]).unwrap();
        let out = ptxrun(&[folder.to_str().unwrap()]);
        assert_eq!(out.status.code(), Some(1), "{file}: {}", text(&out.stderr));
        assert!(text(&out.stdout).contains("FAIL"), "{file}: {}", text(&out.stdout));
    }
}

#[test]
fn a_wrong_command_line_is_explained() {
    for (args, part) in [
        (&[][..], "no case folder"),
        (&["/nonexistent/folder"], "/nonexistent/folder"),
        (&["--frobnicate"], "unknown option --frobnicate"),
        (&["--checks", "tea=error", "x"], "unknown check \"tea\""),
        (&["--set", "EMU_MMA=round", "x"], "exact or rz8"),
        (&["--set"], "needs a value"),
    ] {
        let out = ptxrun(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(text(&out.stderr).contains(part), "{args:?}: {}", text(&out.stderr));
    }
    assert!(text(&ptxrun(&["--help"]).stdout).contains("Usage: ptxrun"));
}

#[test]
fn a_reader_that_leaves_early_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ptxrun"))
        .arg(case(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(141), "{}", text(&out.stderr));
    assert!(!text(&out.stderr).contains("panicked"), "{}", text(&out.stderr));
}
