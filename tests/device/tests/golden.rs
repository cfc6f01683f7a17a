//! The golden files of the methods' official code, as tests/golden.rs holds the reference to them, on the CUDA kernels: each
//! operation's arguments go up and its results come back, in f32, which changes no bit.
#![cfg_attr(not(feature = "cuda"), allow(missing_docs))]

#[cfg(feature = "cuda")]
#[path = "../../golden_kinds/mod.rs"]
mod golden_kinds;

#[cfg(feature = "cuda")]
mod on_device {
    use std::{path::Path, process::ExitCode, sync::OnceLock};

    use foveate::cuda::{Cuda, DType};
    use foveate_device_tests::{Turn, mirror::Mirror};

    use crate::golden_kinds::{Check, File, harness};

    /// What the files are held against: a backend whose tensors are those of the host.
    pub(crate) type Golden = Mirror;

    /// Kinds that never come near a backend: tests/golden.rs runs them.
    pub(crate) const ELSEWHERE: &[&str] = &[
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
    pub(crate) fn backend() -> Golden {
        static SHARED: OnceLock<Golden> = OnceLock::new();
        SHARED.get_or_init(|| Mirror(Cuda::new(0, DType::F32).unwrap())).clone()
    }

    /// There are no kinds that only this test target runs.
    pub(crate) fn more(_kind: &str, _file: &File, _check: &mut Check) -> Option<()> {
        None
    }

    pub(super) fn run() -> ExitCode {
        // `cargo test -- --list` and filters come with arguments: this target is one test.
        if std::env::args().any(|argument| argument == "--list") {
            println!("golden: test");
            return ExitCode::SUCCESS;
        }
        let Some(turn) = Turn::new() else { return ExitCode::SUCCESS };
        let outcome = harness::all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
        turn.end();
        outcome
    }
}

#[cfg(feature = "cuda")]
use on_device::{ELSEWHERE, Golden, backend, more};

#[cfg(feature = "cuda")]
fn main() -> std::process::ExitCode {
    on_device::run()
}

#[cfg(not(feature = "cuda"))]
fn main() {}
