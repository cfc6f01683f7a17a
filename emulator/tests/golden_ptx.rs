//! Every case folder under `EMU_PTX_DIR`, else the shared golden folder when it lies beside the repository, else the copies in
//! `tests/cases`: outputs within their tolerance, no findings at level error, in two orders of blocks and warps.

mod common;

use common::config;
use std::path::{Path, PathBuf};

fn folders() -> (PathBuf, Vec<PathBuf>) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = std::env::var_os("EMU_PTX_DIR").map_or_else(
        || {
            let shared = here.join("../../shared/golden/ptx");
            if shared.is_dir() { shared } else { here.join("tests/cases") }
        },
        PathBuf::from,
    );
    let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut list: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.join("launch.json").exists()).collect();
    list.sort();
    (root, list)
}

#[test]
fn every_case_folder_passes_in_two_orders() {
    let (root, list) = folders();
    assert!(!list.is_empty(), "no case folder in {}", root.display());
    let mut failures = Vec::new();
    for folder in &list {
        let settings: [&[(&str, &str)]; 3] = [
            &[],
            &[("EMU_ORDER", "reverse"), ("EMU_SEED", "7")],
            &[("EMU_APPROX", "exact"), ("EMU_MMA", "rz8"), ("EMU_ORDER", "random:3")],
        ];
        for setting in settings {
            match cuda::case::run(folder, config(setting)) {
                Ok(outcome) if outcome.passed() => {}
                Ok(outcome) => failures.push(format!(
                    "{} {setting:?}: {:?}\n{}",
                    folder.display(),
                    outcome.comparisons,
                    outcome.findings.join("")
                )),
                Err(message) => failures.push(format!("{}: {message}", folder.display())),
            }
        }
    }
    println!("{} case folders in {}", list.len(), root.display());
    assert!(failures.is_empty(), "{} of {} failed:\n{}", failures.len(), list.len(), failures.join("\n"));
}
