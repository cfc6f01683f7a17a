//! nvcc out of its wheels: installed by pip into the target folder, completed, tried, and only then marked as there.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{self, Command},
};

use super::NVCC_FILE;

/// The release whose PTX every driver from 580 on loads.
pub(super) const SERIES: &str = "13.0";

/// What nvcc is made of; the versions are those of one release.
const PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// Files without which nvcc cannot work, and the package that brings each.
const PARTS: [(&str, &str); 5] = [
    ("bin/ptxas", PACKAGES[0]),
    ("include/crt/host_config.h", PACKAGES[1]),
    ("nvvm/libdevice/libdevice.10.bc", PACKAGES[2]),
    ("include/cuda_runtime.h", PACKAGES[3]),
    ("include/cccl/cuda/std/cstdint", PACKAGES[4]),
];

/// Written last: a folder with this file is complete. It holds the packages, so that another list is fetched anew.
const MARKER: &str = "complete.txt";

/// The fetched compiler under `target`, downloaded when it is not there or is of another list.
pub(super) fn nvcc(target: &Path) -> Result<PathBuf, String> {
    let folder = target.join("cuda-toolkit");
    if let Some(nvcc) = complete(&folder) {
        return Ok(nvcc);
    }
    // Beside its final place, so that the rename at the end is one step: an interrupted fetch leaves no half toolkit.
    let staging = target.join(format!("cuda-toolkit.{}.tmp", process::id()));
    let result = fill(&staging).and_then(|()| put(&staging, &folder));
    let _ = fs::remove_dir_all(&staging);
    result?;
    complete(&folder).ok_or_else(|| format!("{} is incomplete: remove it, then run again", folder.display()))
}

fn complete(folder: &Path) -> Option<PathBuf> {
    let marker = fs::read_to_string(folder.join(MARKER)).ok()?;
    (marker == marker_text()).then(|| find(folder))?
}

fn marker_text() -> String {
    PACKAGES.join("\n") + "\n"
}

/// nvcc in the wheels' layout, `nvidia/<series>/bin/nvcc`.
fn find(folder: &Path) -> Option<PathBuf> {
    let series = fs::read_dir(folder.join("nvidia")).ok()?;
    let mut found: Vec<_> = series
        .filter_map(|entry| Some(entry.ok()?.path().join("bin").join(NVCC_FILE)))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.into_iter().next()
}

fn fill(staging: &Path) -> Result<(), String> {
    fs::create_dir_all(staging).map_err(|error| format!("{}: {error}", staging.display()))?;
    eprintln!("xtask: no nvcc on this machine; fetching {SERIES} ({} wheels, about 100 MB)", PACKAGES.len());
    install(staging).map_err(|reason| by_hand(&reason))?;
    let nvcc = find(staging).ok_or_else(|| by_hand("the wheels hold no bin/nvcc"))?;
    let home = nvcc.parent().and_then(Path::parent).expect("bin/nvcc has two parents");
    for (part, package) in PARTS {
        if !home.join(part).is_file() {
            return Err(by_hand(&format!("{package} brought no {part}")));
        }
    }
    arrange(home).map_err(|error| format!("{}: {error}", home.display()))?;
    try_out(&nvcc, staging)?;
    fs::write(staging.join(MARKER), marker_text()).map_err(|error| format!("{}: {error}", staging.display()))
}

/// Moves the finished toolkit to its place, unless another process has done so meanwhile.
fn put(staging: &Path, folder: &Path) -> Result<(), String> {
    if complete(folder).is_some() {
        return Ok(());
    }
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    match fs::rename(staging, folder) {
        Err(_) if complete(folder).is_some() => Ok(()),
        result => result.map_err(|error| format!("{}: {error}", folder.display())),
    }
}

/// Lets the first Python that has pip install the wheels.
fn install(staging: &Path) -> Result<(), String> {
    let mut reasons = Vec::new();
    for python in ["python3", "python"] {
        let pip = |arguments: &[&str]| {
            Command::new(python)
                .args(["-m", "pip", "--disable-pip-version-check"])
                .args(arguments)
                // A user's own pip settings may ask for the user scheme, which excludes a target folder.
                .env("PIP_USER", "0")
                .env("PIP_NO_INPUT", "1")
                .output()
        };
        match pip(&["--version"]) {
            Err(error) => {
                reasons.push(format!("{python}: {error}"));
                continue;
            }
            Ok(output) if !output.status.success() => {
                reasons.push(format!("{python} has no pip"));
                continue;
            }
            Ok(_) => {}
        }
        let folder = staging.to_str().ok_or_else(|| format!("{} is no Unicode", staging.display()))?;
        let options =
            ["install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:", "--target", folder];
        let arguments: Vec<&str> = options.into_iter().chain(PACKAGES).collect();
        let output = pip(&arguments).map_err(|error| format!("{python}: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        return Err(format!("pip failed: {}", last_lines(&output.stderr)));
    }
    Err(format!("there is no pip to fetch it with ({})", reasons.join("; ")))
}

/// What the reader can do when the fetch did not work.
fn by_hand(reason: &str) -> String {
    format!(
        "no nvcc: {reason}\n  Install one of these by hand, then run again:\n  \
         - a CUDA toolkit, 12.0 or newer; set CUDA_HOME to its folder, or NVCC to its nvcc\n  \
         - Python 3 with pip (Debian: apt install python3-pip) and a way to its package index\n  \
         - the wheels, brought from elsewhere:\n      \
         python3 -m pip install --no-deps --target DIR {}\n      \
         then set NVCC to DIR/nvidia/cu13/bin/nvcc",
        PACKAGES.join(" ")
    )
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(6)..].join("\n    ")
}

/// The wheels lack what an installed toolkit has: a `lib64` and unversioned names for the linker. Unpackers other than
/// pip also drop the execute bits.
fn arrange(home: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{PermissionsExt, symlink};
        for folder in [home.join("bin"), home.join("nvvm/bin")] {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_file() {
                    let mut permissions = fs::metadata(&path)?.permissions();
                    permissions.set_mode(permissions.mode() | 0o755);
                    fs::set_permissions(&path, permissions)?;
                }
            }
        }
        let lib = home.join("lib");
        if lib.is_dir() && !home.join("lib64").exists() {
            symlink("lib", home.join("lib64"))?;
        }
        if lib.is_dir() {
            for entry in fs::read_dir(&lib)? {
                let name = entry?.file_name();
                let plain = name
                    .to_str()
                    .and_then(|name| name.split_once(".so."))
                    .map(|(stem, _)| format!("{stem}.so"));
                if let Some(plain) = plain.map(|plain| lib.join(plain))
                    && !plain.exists()
                {
                    symlink(&name, plain)?;
                }
            }
        }
    }
    #[cfg(not(unix))]
    let _ = home;
    Ok(())
}

/// A kernel that needs every part: headers of the runtime and of half precision, libdevice's expf, the C++ library.
const PROBE: &str = "\
#include <cuda_fp16.h>
#include <cuda/std/cstdint>
extern \"C\" __global__ void probe(float* values, cuda::std::int32_t count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] = __half2float(__float2half(expf(values[i])));
}
";

fn try_out(nvcc: &Path, folder: &Path) -> Result<(), String> {
    let source = folder.join("probe.cu");
    let in_folder = |error: io::Error| format!("{}: {error}", folder.display());
    fs::write(&source, PROBE).map_err(in_folder)?;
    let checks: [(&[&str], &str, &[u8]); 2] = [
        (&["-ptx", "-arch=compute_80"], "probe.ptx", b".visible .entry probe("),
        (
            &["-fatbin", "-gencode", "arch=compute_80,code=[sm_80,compute_80]"],
            "probe.fatbin",
            &[0x50, 0xED, 0x55, 0xBA],
        ),
    ];
    for (options, name, expected) in checks {
        let product = folder.join(name);
        let mut command = Command::new(nvcc);
        command.args(options).arg(&source).arg("-o").arg(&product);
        let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
        let made = fs::read(&product).unwrap_or_default();
        if !output.status.success() || !made.windows(expected.len()).any(|window| window == expected) {
            return Err(format!(
                "the fetched nvcc does not compile: {}\n  It needs a C++ compiler on the PATH (Debian: apt install g++; \
                 another one goes into NVCC_CCBIN). The command was\n    {command:?}",
                last_lines(&[output.stderr, output.stdout].concat())
            ));
        }
        fs::remove_file(&product).map_err(in_folder)?;
    }
    fs::remove_file(&source).map_err(in_folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fetch_names_every_package_and_the_ways_around_it() {
        let text = by_hand("there is no pip to fetch it with (python3 has no pip)");
        for package in PACKAGES {
            assert!(text.contains(package), "{text}");
            let version = package.split_once("==").expect("every version is pinned").1;
            assert!(version.starts_with(SERIES), "{package} is not of {SERIES}");
        }
        for remedy in ["CUDA_HOME", "NVCC", "python3-pip", "--no-deps"] {
            assert!(text.contains(remedy), "{text}");
        }
        assert!(text.starts_with("no nvcc: there is no pip"), "{text}");
        assert!(!text.contains("://"), "where pip looks is the user's business: {text}");
    }

    #[test]
    fn only_a_marked_folder_of_the_same_packages_counts_as_there() {
        let folder = std::env::temp_dir().join(format!("xtask-toolkit-{}", process::id()));
        let bin = folder.join("nvidia/cu13/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::write(bin.join(NVCC_FILE), "").unwrap();
        assert_eq!(complete(&folder), None, "no marker: an interrupted fetch");
        fs::write(folder.join(MARKER), "nvidia-cuda-nvcc==12.9.1\n").unwrap();
        assert_eq!(complete(&folder), None, "another release");
        fs::write(folder.join(MARKER), marker_text()).unwrap();
        assert_eq!(complete(&folder), Some(bin.join(NVCC_FILE)));
        fs::remove_file(bin.join(NVCC_FILE)).unwrap();
        assert_eq!(complete(&folder), None, "the compiler was removed");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn the_layout_is_completed() {
        use std::os::unix::fs::PermissionsExt;
        let home = std::env::temp_dir().join(format!("xtask-layout-{}", process::id()));
        for folder in ["bin", "nvvm/bin", "lib"] {
            fs::create_dir_all(home.join(folder)).unwrap();
        }
        for file in ["bin/nvcc", "nvvm/bin/cicc", "lib/libcudart.so.13"] {
            fs::write(home.join(file), "x").unwrap();
        }
        for _ in 0..2 {
            arrange(&home).unwrap();
            assert_eq!(fs::read(home.join("lib64/libcudart.so")).unwrap(), b"x");
            let mode = fs::metadata(home.join("nvvm/bin/cicc")).unwrap().permissions().mode();
            assert_eq!(mode & 0o111, 0o111);
        }
        fs::remove_dir_all(&home).unwrap();
    }
}
