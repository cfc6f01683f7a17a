//! `cargo xtask candle`: foveate-candle's operations on candle's own CUDA device, on the emulated driver.
//!
//! candle links CUDA's libraries and opens cuBLAS and cuRAND with every device. Neither is needed by these operations, and
//! neither is here: stand-ins open and close, and refuse everything else. candle's own kernels are not compiled either
//! ([`stand_in`]).

use std::{env, fs, path::Path, process::Command};

use crate::{
    emulate::{cargo, gather, library_path},
    stand_in,
    toolchain::{self, Missing},
};

/// What candle calls of cuBLAS and cuRAND. Those that open a handle write one through their first argument.
const OPENS: [&str; 2] = ["cublasCreate_v2", "curandCreateGenerator"];
const SUCCEEDS: [&str; 5] = [
    "cublasDestroy_v2",
    "cublasSetStream_v2",
    "curandDestroyGenerator",
    "curandSetPseudoRandomGeneratorSeed",
    "curandSetStream",
];
const REFUSES: [&str; 4] = [
    "cublasDgemmStridedBatched",
    "cublasGemmStridedBatchedEx",
    "curandGenerateNormal",
    "curandGenerateNormalDouble",
];

/// The library that has them all, and those that are linked by name only.
const STAND_IN: &str = "libcublas.so";
const BY_NAME: [&str; 4] = ["libcurand.so", "libnvrtc.so", "libcudart.so", "libmoe.so"];

/// Whether there is an emulated driver for this system.
pub(crate) fn possible() -> bool {
    cfg!(target_os = "linux")
}

/// Builds the emulator and the tests and runs them.
pub(crate) fn candle() -> Result<bool, String> {
    if !possible() {
        return Err("the emulated driver is a Linux library".to_owned());
    }
    let nvcc = match toolchain::nvcc() {
        Ok(nvcc) => nvcc,
        Err(Missing::NotFetched(reason) | Missing::Unusable(reason)) => return Err(reason),
    };
    let target = toolchain::target_folder()?;
    cargo(&["build", "--package", "emulator", "--package", "emulator-cublaslt"], None)?;
    let folder = gather(&target).map_err(|error| format!("cannot lay out the emulated driver: {error}"))?;
    let folder = stand_ins(&folder, &target.join("emulator-candle"))?;
    let this = env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let mut good = true;
    // The examples have tests.
    for what in [&["--lib", "--tests", "--examples"][..], &["--doc"]] {
        let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["test", "--package", crate::CANDLE, "--features", "cuda", "--no-fail-fast"])
            .args(what)
            .env("NVCC", &this)
            .env(stand_in::WANTED, &nvcc.path)
            .env("CUDA_COMPUTE_CAP", stand_in::ARCHITECTURE)
            .env(crate::ARCHS.0, crate::ARCHS.1)
            .env("FOVEATE_REQUIRE_GPU", "1")
            // Where the linker looks, and the loader.
            .env("LIBRARY_PATH", library_path(&folder, env::var_os("LIBRARY_PATH").as_deref())?)
            .env("LD_LIBRARY_PATH", library_path(&folder, env::var_os("LD_LIBRARY_PATH").as_deref())?)
            .status()
            .map_err(|error| format!("cannot run cargo: {error}"))?;
        good &= status.success();
    }
    Ok(good)
}

/// The emulated libraries and the stand-ins in one folder.
fn stand_ins(emulated: &Path, folder: &Path) -> Result<std::path::PathBuf, String> {
    let failed = |error: std::io::Error| format!("cannot write to {}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    for entry in fs::read_dir(emulated).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        fs::copy(entry.path(), folder.join(entry.file_name())).map_err(failed)?;
    }
    let source = folder.join("stand_ins.rs");
    fs::write(&source, stand_in_source()).map_err(failed)?;
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args(["--edition", "2024", "--crate-type", "cdylib", "-C", "panic=abort", "-o"])
        .args([folder.join(STAND_IN), source])
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(format!("rustc failed on the stand-ins for cuBLAS and cuRAND ({status})")),
        Err(error) => return Err(format!("cannot run rustc: {error}")),
    }
    for name in BY_NAME {
        // A linker script that asks for the one library there is.
        fs::write(folder.join(name), format!("INPUT({STAND_IN})\n")).map_err(failed)?;
    }
    Ok(folder.to_owned())
}

fn stand_in_source() -> String {
    let open = |name: &&str| {
        format!(
            "#[unsafe(no_mangle)]\npub unsafe extern \"C\" fn {name}(handle: *mut usize) -> i32 {{ unsafe {{ *handle = 1 }}; 0 }}\n"
        )
    };
    let answer = |name: &&str, status: i32| {
        format!("#[unsafe(no_mangle)]\npub extern \"C\" fn {name}() -> i32 {{ {status} }}\n")
    };
    OPENS
        .iter()
        .map(open)
        .chain(SUCCEEDS.iter().map(|name| answer(name, 0)))
        // CUBLAS_STATUS_NOT_SUPPORTED.
        .chain(REFUSES.iter().map(|name| answer(name, 15)))
        .collect()
}
