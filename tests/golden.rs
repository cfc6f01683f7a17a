//! Runs every golden file of a folder: `FOVEATE_GOLDEN_DIR` if set, else `../shared/golden` if there, else the curated
//! copy in `tests/golden`. Each file's `config.kind` says what it holds.
//!
//! The same files run on the CUDA kernels in tests/device/tests/golden.rs.

#[path = "golden_kinds/connectivity.rs"]
mod connectivity;
mod golden_kinds;
#[path = "golden_kinds/preprocess.rs"]
mod preprocess;

use std::{path::Path, process::ExitCode};

use golden_kinds::{Check, File};

/// What the files are held against: a backend whose tensors are those of the host.
type Golden = foveate::reference::Reference;

fn backend() -> Golden {
    Golden::new()
}

/// Kinds that another test target runs.
const ELSEWHERE: &[&str] = &[];

/// Kinds that only this test target runs.
fn more(kind: &str, file: &File, check: &mut Check) -> Option<()> {
    match kind {
        "preprocess" => preprocess::run(file, check),
        "erk_density" => connectivity::densities(file, check),
        "svite_dropgrow" => connectivity::drop_and_grow(file, check),
        "svite_structured" => connectivity::structured(file, check),
        _ => return None,
    }
    Some(())
}

fn main() -> ExitCode {
    golden_kinds::harness::all(Path::new(env!("CARGO_MANIFEST_DIR")))
}
