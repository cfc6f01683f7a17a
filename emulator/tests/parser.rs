//! What the PTX parser makes of every form it must know, and of text that is not PTX.

use std::path::{Path, PathBuf};

use cuda::ptx::parse;

/// Every `kernel.ptx` below the test cases and, where they are there, below the larger samples.
fn samples() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut found = Vec::new();
    for folder in [Some(here), std::env::var_os("EMU_PTX_DIR").map(PathBuf::from)].into_iter().flatten() {
        for entry in folder.read_dir().expect("a folder of cases") {
            let kernel = entry.expect("a case").path().join("kernel.ptx");
            if kernel.is_file() {
                found.push(kernel);
            }
        }
    }
    found
}

#[test]
fn samples_parse() {
    let samples = samples();
    assert!(samples.len() >= 5);
    for path in samples {
        let text = std::fs::read_to_string(&path).unwrap();
        let module = parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(module.functions.iter().any(|function| function.kernel && function.body.is_some()));
    }
}
