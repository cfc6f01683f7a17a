//! The golden files of the methods' official code, as tests/golden.rs holds the reference to them, on the processor's backend:
//! each operation's arguments go to it and its results come back, which changes no bit.

#[allow(dead_code, reason = "tests of single operations use the rest")]
mod backends;
mod golden_kinds;

use std::{path::Path, process::ExitCode, sync::OnceLock};

use backends::Hosted;
use foveate::cpu::Cpu;
use golden_kinds::{Check, File, harness};

/// What the files are held against: a backend whose tensors are those of the host.
type Golden = Hosted;

/// Kinds that never come near a backend: tests/golden.rs runs them.
const ELSEWHERE: &[&str] = &[
    "preprocess",
    "tome_schedules",
    "mctf_schedules",
    "reduction_counts",
    "vit_weights",
    "erk_density",
    "svite_dropgrow",
    "svite_structured",
];

/// The one backend of this process.
fn backend() -> Golden {
    static SHARED: OnceLock<Golden> = OnceLock::new();
    SHARED.get_or_init(|| Hosted(Cpu::new())).clone()
}

/// There are no kinds that only this test target runs.
fn more(_kind: &str, _file: &File, _check: &mut Check) -> Option<()> {
    None
}

fn main() -> ExitCode {
    // `cargo test -- --list` and filters come with arguments: this target is one test.
    if std::env::args().any(|argument| argument == "--list") {
        println!("golden: test");
        return ExitCode::SUCCESS;
    }
    harness::all(Path::new(env!("CARGO_MANIFEST_DIR")))
}
