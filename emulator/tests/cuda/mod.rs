//! The CUDA sources of this folder as PTX: compiled when the environment variable `NVCC` names a compiler, else the copy
//! stored beside each source.
// Not every test file uses all of it.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Tests of one process, and processes, compile the same source at the same time: every product has a name of its own.
static PRODUCTS: AtomicUsize = AtomicUsize::new(0);

/// The folder of the sources and their stored PTX, for a test of this package or of one in a folder of it.
pub(crate) fn folder() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package
        .ancestors()
        .map(|folder| folder.join("tests/cuda"))
        .find(|folder| folder.is_dir())
        .expect("tests/cuda")
}

/// What this process has compiled or read already.
static TEXTS: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// PTX of `<name>.cu`, and a line on the standard output that says which: fresh or stored.
pub(crate) fn ptx(name: &str) -> String {
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    texts.entry(name.to_owned()).or_insert_with(|| fresh_or_stored(name)).clone()
}

fn fresh_or_stored(name: &str) -> String {
    match compile(name) {
        Ok(text) => {
            println!("{name}: compiled now, {}", release(&text));
            text
        }
        Err(reason) => {
            let text = stored(name);
            println!("{name}: compilation skipped: {reason}; stored PTX, {}", release(&text));
            text
        }
    }
}

/// The stored PTX of `<name>.cu`.
pub(crate) fn stored(name: &str) -> String {
    let path = folder().join(name).with_extension("ptx");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Fresh PTX of `<name>.cu` without machine paths; `Err` says why there is no compiler. A source that does not compile
/// fails the test.
pub(crate) fn compile(name: &str) -> Result<String, String> {
    let nvcc = env::var_os("NVCC").ok_or_else(|| match env::var("EMU_NO_NVCC") {
        Ok(reason) => reason,
        Err(_) => "no nvcc (NVCC is not set; `cargo xtask toolchain` finds or fetches one)".to_owned(),
    })?;
    let source = folder().join(name).with_extension("cu");
    let number = PRODUCTS.fetch_add(1, Ordering::Relaxed);
    let product =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{}.{number}.ptx", std::process::id()));
    let output = Command::new(&nvcc)
        .args(["-std=c++17", "-O3", "-lineinfo", "-arch=compute_80", "-ptx", "-Werror", "all-warnings"])
        .arg(&source)
        .arg("-o")
        .arg(&product)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", Path::new(&nvcc).display()));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} does not compile:\n{messages}", source.display());
    let text = fs::read_to_string(&product).expect("nvcc wrote its product");
    let _ = fs::remove_file(&product);
    Ok(without_folders(&text))
}

/// `.file 1 "/some/where/name.cu"` becomes `.file 1 "name.cu"`.
fn without_folders(text: &str) -> String {
    let lines = text.lines().map(|line| match line.split_once('"') {
        Some((start, path)) if start.trim_start().starts_with(".file") => {
            format!("{start}\"{}", path.rsplit('/').next().unwrap_or(path))
        }
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

/// The comment in which nvcc names itself.
pub(crate) fn release(text: &str) -> &str {
    text.lines()
        .find_map(|line| line.strip_prefix("// Cuda compilation tools, "))
        .unwrap_or("by an unnamed compiler")
}
