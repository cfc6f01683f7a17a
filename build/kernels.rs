//! nvcc over kernels/*.cu, one fat binary each, embedded by src/cuda/image.rs.
//!
//! The front end runs once, for `compute_80`; its PTX becomes the machine code of every listed architecture and is
//! embedded itself, for cards that are newer than the list. So the PTX that the emulated driver runs in the tests is the
//! source of all machine code.

#[path = "cache.rs"]
mod cache;

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use cache::Cache;

/// Machine code for these, unless `FOVEATE_CUDA_ARCHS` names others.
const ARCHS: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// What the kernels are written for.
const OLDEST_ARCH: u32 = 80;
const OLDEST_NVCC: (u32, u32) = (12, 0);
/// From here on nvcc compresses well: a sixth of the bytes, which drivers of its own release on read.
const COMPRESSING_NVCC: (u32, u32) = (12, 8);
const FLAGS: [&str; 6] = ["-fatbin", "-std=c++17", "-O3", "-lineinfo", "--Werror", "all-warnings"];
const ARCHS_VARIABLE: &str = "FOVEATE_CUDA_ARCHS";
/// Its value for no machine code at all.
const PTX_ALONE: &str = "ptx";
const NVCC_FILE: &str = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
const REMEDIES: &str = concat!(
    "  - install a CUDA toolkit, 12.0 or newer, and set CUDA_HOME to its folder or NVCC to its nvcc\n",
    "  - in a checkout, without an installation: cargo xtask toolchain (fetches nvcc 13.0 into the target folder)\n",
    "  - build without the feature `cuda`"
);

pub(crate) fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={}", error.lines().next().unwrap_or_default());
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build/kernels.rs");
    println!("cargo::rerun-if-changed=build/cache.rs");
    for variable in
        ["DOCS_RS", "FOVEATE_NO_KERNELS", ARCHS_VARIABLE, "NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"]
    {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(set("OUT_DIR")?);
    // Documentation and lints need no kernels; loading them then is an error that says so.
    if env::var_os("DOCS_RS").is_some() || env::var_os("FOVEATE_NO_KERNELS").is_some() {
        return write_if_changed(&out.join("images.rs"), &image_table(&[], &[], (0, 0)));
    }
    let kernels = PathBuf::from(set("CARGO_MANIFEST_DIR")?).join("kernels");
    // New files; each file's own dependencies follow below.
    println!("cargo::rerun-if-changed={}", kernels.display());
    let nvcc = Nvcc::find(&out)?;
    println!("nvcc {}.{}: {}", nvcc.version.0, nvcc.version.1, nvcc.path.display());
    let archs = architectures(&nvcc)?;
    let sources = sources(&kernels)?;
    compile_all(&nvcc, &archs, &kernels, &sources, &out)?;
    write_if_changed(&out.join("images.rs"), &image_table(&sources, &archs, nvcc.version))
}

fn set(variable: &str) -> Result<OsString, String> {
    env::var_os(variable).ok_or_else(|| format!("{variable} is not set: cargo sets it for build scripts"))
}

/// The compiler, its version, and the host compiler that it preprocesses with.
struct Nvcc {
    path: PathBuf,
    version: (u32, u32),
    host: Option<OsString>,
}

impl Nvcc {
    /// `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, then what `cargo xtask toolchain` fetched.
    fn find(out: &Path) -> Result<Self, String> {
        let named = env::var_os("NVCC").filter(|value| !value.is_empty()).map(PathBuf::from);
        let homes =
            ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(|name| Some((name, env::var_os(name)?)));
        let homes = homes.map(|(name, home)| (name, Path::new(&home).join("bin").join(NVCC_FILE)));
        let mut candidates: Vec<(&str, PathBuf)> = Vec::new();
        if let Some(named) = named {
            candidates.push(("NVCC", named));
        } else {
            candidates.extend(homes.filter(|(_, path)| path.is_file()));
            candidates.extend(on_path().map(|path| ("PATH", path)));
            candidates.extend(fetched(out).map(|path| ("cargo xtask toolchain", path)));
        }
        let mut reasons = Vec::new();
        for (origin, path) in candidates {
            match version(&path) {
                Ok(version) if version >= OLDEST_NVCC => {
                    return Ok(Self { path, version, host: host_compiler() });
                }
                Ok((major, minor)) => {
                    reasons.push(format!(
                        "{} ({origin}) is nvcc {major}.{minor}, 12.0 is needed",
                        path.display()
                    ));
                }
                Err(reason) => reasons.push(format!("{} ({origin}): {reason}", path.display())),
            }
            // What was asked for by name is not replaced in silence.
            if origin != "PATH" {
                break;
            }
        }
        if reasons.is_empty() {
            reasons.push("none in NVCC, CUDA_HOME, CUDA_PATH or PATH".to_owned());
        }
        Err(format!(
            "the feature `cuda` compiles CUDA kernels and found no nvcc: {}\n{REMEDIES}",
            reasons.join("; ")
        ))
    }
}

/// The C++ compiler that the rest of the build uses (CXX and its forms for one target), as cc finds it. cc's own search for
/// nvcc knows NVCC and PATH alone, and warns where neither has one.
fn host_compiler() -> Option<OsString> {
    for variable in ["NVCC_CCBIN", "CXX"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("NVCC_CCBIN").is_some() {
        return None;
    }
    let mut build = cc::Build::new();
    build.cpp(true).debug(false).no_default_flags(true).cargo_warnings(false).cargo_metadata(false);
    build.try_get_compiler().ok().map(|tool| tool.path().as_os_str().to_owned())
}

fn on_path() -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(NVCC_FILE)).find(|path| path.is_file())
}

/// The toolkit beside the build folder, if it was fetched completely.
fn fetched(out: &Path) -> Option<PathBuf> {
    let toolkit = out.ancestors().map(|folder| folder.join("cuda-toolkit"));
    let toolkit = toolkit.into_iter().find(|folder| folder.join("complete.txt").is_file())?;
    let series = fs::read_dir(toolkit.join("nvidia")).ok()?;
    let mut found: Vec<_> =
        series.filter_map(|entry| Some(entry.ok()?.path().join("bin").join(NVCC_FILE))).collect();
    found.sort();
    found.into_iter().find(|path| path.is_file())
}

fn version(nvcc: &Path) -> Result<(u32, u32), String> {
    let output = Command::new(nvcc).arg("--version").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number =
        text.split_once("release ").map(|(_, rest)| rest.split([',', ' ', '\n']).next().unwrap_or_default());
    let parse = |number: &str| {
        let (major, minor) = number.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    number.and_then(parse).ok_or_else(|| format!("`--version` names no version ({})", output.status))
}

/// The architectures to build machine code for.
fn architectures(nvcc: &Nvcc) -> Result<Vec<u32>, String> {
    let output = Command::new(&nvcc.path)
        .arg("--list-gpu-code")
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.path.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut known: Vec<u32> =
        text.split_whitespace().filter_map(|word| word.strip_prefix("sm_")?.parse().ok()).collect();
    known.sort_unstable();
    let asked = env::var(ARCHS_VARIABLE).unwrap_or_default();
    if asked.trim().is_empty() {
        let (archs, dropped): (Vec<u32>, Vec<u32>) = ARCHS.into_iter().partition(|arch| known.contains(arch));
        if !dropped.is_empty() {
            println!("this nvcc makes no machine code for {dropped:?}; such cards compile the embedded PTX");
        }
        return Ok(archs);
    }
    // For whoever runs the PTX alone: machine code is half of the compiler's time.
    if asked.trim() == PTX_ALONE {
        return Ok(Vec::new());
    }
    let mut archs = Vec::new();
    for word in asked.split([',', ' ', ';']).filter(|word| !word.is_empty()) {
        let number = word.strip_prefix("sm_").unwrap_or(word);
        match number.parse::<u32>() {
            Ok(arch) if arch >= OLDEST_ARCH && known.contains(&arch) => archs.push(arch),
            _ => {
                let usable: Vec<_> =
                    known.iter().filter(|&&arch| arch >= OLDEST_ARCH).map(ToString::to_string).collect();
                return Err(format!(
                    "{ARCHS_VARIABLE} names the architecture `{word}`; nvcc {}.{} and the kernels know {}\n  \
                     - name compute capabilities without the point, with commas: {ARCHS_VARIABLE}=80,90; or {PTX_ALONE} for none\n  \
                     - unset it for the default, {ARCHS:?}",
                    nvcc.version.0,
                    nvcc.version.1,
                    usable.join(", "),
                ));
            }
        }
    }
    archs.sort_unstable();
    archs.dedup();
    Ok(archs)
}

/// The names of kernels/*.cu, without ending, in order.
fn sources(kernels: &Path) -> Result<Vec<String>, String> {
    let failed = |error| format!("{}: {error}", kernels.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(kernels).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension() == Some(OsStr::new("cu")) {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Compiles what has changed, as many at a time as cargo allows.
fn compile_all(
    nvcc: &Nvcc,
    archs: &[u32],
    kernels: &Path,
    sources: &[String],
    out: &Path,
) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1_usize);
    let way = format!("{} {:?} {:?} {archs:?} {FLAGS:?}", nvcc.path.display(), nvcc.version, nvcc.host);
    let cache = Cache::around(out, &way, &kernels.join("include"));
    let next = AtomicUsize::new(0);
    let work = || -> Vec<Result<Vec<PathBuf>, String>> {
        std::iter::from_fn(|| sources.get(next.fetch_add(1, Ordering::Relaxed)))
            .map(|name| compile(nvcc, archs, kernels, name, out, &cache))
            .collect()
    };
    let results: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.clamp(1, sources.len().max(1))).map(|_| scope.spawn(work)).collect();
        let died = |_| vec![Err("a thread of the build script died".to_owned())];
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(died)).collect()
    });
    let mut errors = Vec::new();
    for result in results {
        match result {
            Ok(dependencies) => {
                for path in dependencies {
                    println!("cargo::rerun-if-changed={}", path.display());
                }
            }
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n\n")) }
}

/// One fat binary, unless its command line and everything it was made of are as they were. Returns its dependencies.
fn compile(
    nvcc: &Nvcc,
    archs: &[u32],
    kernels: &Path,
    name: &str,
    out: &Path,
    cache: &Cache,
) -> Result<Vec<PathBuf>, String> {
    let source = kernels.join(name).with_extension("cu");
    let file = |ending: &str| out.join(format!("{name}.{ending}"));
    let (image, depfile, stamp) = (file("fatbin"), file("d"), file("command"));
    let codes: Vec<String> = archs.iter().map(|arch| format!("sm_{arch}")).collect();
    let code = [vec![format!("compute_{OLDEST_ARCH}")], codes].concat().join(",");
    let mut command = Command::new(&nvcc.path);
    if let Some(host) = &nvcc.host {
        command.arg("-ccbin").arg(host);
    }
    if nvcc.version >= COMPRESSING_NVCC {
        command.arg("--compress-mode=size");
    }
    command
        .args(FLAGS)
        .arg(format!("-gencode=arch=compute_{OLDEST_ARCH},code=[{code}]"))
        .arg("-I")
        .arg(kernels.join("include"))
        .args(["-MMD", "-MF"])
        .arg(&depfile)
        .arg("-o")
        .arg(&image)
        .arg(&source);
    let line = format!("nvcc {:?}\n{command:?}", nvcc.version);
    if let Some(dependencies) = up_to_date(&image, &depfile, &stamp, &line) {
        return Ok(dependencies);
    }
    // Removed first: an interrupted compilation leaves no image that looks finished.
    let _ = fs::remove_file(&stamp);
    let finish = || {
        fs::write(&stamp, &line).map_err(|error| format!("{}: {error}", stamp.display()))?;
        read_depfile(&depfile).ok_or_else(|| format!("{}: nvcc wrote no dependencies", depfile.display()))
    };
    let place = cache.place(name, &source);
    if place.as_ref().is_some_and(|place| Cache::fetch(place, &image, &depfile)) {
        return finish();
    }
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "nvcc could not compile kernels/{name}.cu ({})\n{command:?}\n{}{}\n  \
             - unchanged kernels: nvcc {}.{} may be at odds with the host compiler; try another (NVCC, or NVCC_CCBIN)\n{REMEDIES}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            nvcc.version.0,
            nvcc.version.1,
        ));
    }
    if let Some(place) = &place {
        Cache::keep(place, &image, &depfile);
    }
    finish()
}

/// The dependencies of an image that is newer than all of them and was made by the same command.
fn up_to_date(image: &Path, depfile: &Path, stamp: &Path, line: &str) -> Option<Vec<PathBuf>> {
    if fs::read_to_string(stamp).ok()? != line {
        return None;
    }
    let made = fs::metadata(image).and_then(|data| data.modified()).ok()?;
    let dependencies = read_depfile(depfile)?;
    let older = |path: &PathBuf| {
        fs::metadata(path).and_then(|data| data.modified()).is_ok_and(|changed| changed <= made)
    };
    dependencies.iter().all(older).then_some(dependencies)
}

/// The files of a make rule `target : file file \`, with `\ ` for a space. nvcc leaves out the system's headers.
fn read_depfile(path: &Path) -> Option<Vec<PathBuf>> {
    let text = fs::read_to_string(path).ok()?.replace("\\\r\n", " ").replace("\\\n", " ");
    let (_, files) = text.split_once(": ").or_else(|| text.split_once(" :"))?;
    let files = files.replace("\\ ", "\0");
    Some(files.split_whitespace().map(|file| PathBuf::from(file.replace('\0', " "))).collect())
}

/// The Rust source that embeds the images.
fn image_table(sources: &[String], archs: &[u32], nvcc: (u32, u32)) -> String {
    let row = |name: &String| {
        format!("    ({name:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),\n")
    };
    let rows = sources.iter().map(row).collect::<Vec<_>>().concat();
    format!(
        "/// A fat binary for each file of kernels/.\nconst IMAGES: &[(&str, &[u8])] = &[\n{rows}];\n\
         /// What they hold machine code for.\nconst ARCHITECTURES: &[u32] = &{archs:?};\n\
         /// The nvcc that has compiled them.\nconst NVCC: (u32, u32) = {nvcc:?};\n"
    )
}

/// Leaves the time stamp alone when nothing changed, so that nothing is compiled again.
fn write_if_changed(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
