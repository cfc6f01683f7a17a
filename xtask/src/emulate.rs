//! `cargo xtask emulate -- <command>`: a command on the emulated CUDA driver.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use crate::toolchain::{self, Missing};

/// The emulator's libraries, as cargo names them and as programs look for them.
const LIBRARIES: [&str; 2] = ["libcuda.so", "libcublasLt.so"];

/// Tells our command that the emulated driver is meant: it refuses one that is in front by accident (src/cli/device.rs).
const EMULATED: &str = "FOVEATE_EMULATED";

/// The command that is built, with the kernels, when it is asked for by name.
const OURS: &str = "foveate";

/// Builds what is needed and runs the command.
pub(crate) fn emulate(words: &[OsString]) -> Result<bool, String> {
    let [program, arguments @ ..] = words else {
        return Err(format!(
            "emulate takes a command, such as `cargo xtask emulate -- {OURS} demo --device cuda`"
        ));
    };
    if !cfg!(target_os = "linux") {
        return Err("the emulated driver is a Linux library".to_owned());
    }
    let target = toolchain::target_folder()?;
    cargo(&["build", "--package", "emulator", "--package", "emulator-cublaslt"], None)?;
    let folder = gather(&target).map_err(|error| format!("cannot lay out the emulated driver: {error}"))?;
    let program = if program == OURS { build_ours(&target)? } else { program.into() };
    eprintln!(
        "xtask: on an emulated GPU: the kernels' own PTX and results, every access checked, thousands of times slower than a \
         card; its times say nothing"
    );
    let status = emulated(&program, arguments, &folder)?.status();
    status
        .as_ref()
        .map(ExitStatus::success)
        .map_err(|error| format!("cannot run {}: {error}", program.display()))
}

/// The command with the libraries in `folder` in front of all others.
fn emulated(program: &Path, arguments: &[OsString], folder: &Path) -> Result<Command, String> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LD_LIBRARY_PATH", library_path(folder, env::var_os("LD_LIBRARY_PATH").as_deref())?)
        .env(EMULATED, "1")
        // Nobody reads counters here, and counting costs time.
        .env("EMU_COUNT", env::var_os("EMU_COUNT").unwrap_or_else(|| "0".into()));
    Ok(command)
}

/// The emulated driver in a folder of its own: cargo's have more in them than a program should see first.
pub(crate) fn gather(target: &Path) -> io::Result<PathBuf> {
    let folder = target.join("emulator");
    fs::create_dir_all(&folder)?;
    for name in LIBRARIES {
        let (from, to) = (target.join("debug").join(name), folder.join(name));
        // Renamed into place, so that a program that runs meanwhile keeps the file it has mapped.
        let fresh = folder.join(format!("{name}.{}", std::process::id()));
        fs::copy(from, &fresh)?;
        fs::rename(fresh, to)?;
    }
    Ok(folder)
}

/// `folder` before what is looked through already.
pub(crate) fn library_path(folder: &Path, known: Option<&OsStr>) -> Result<OsString, String> {
    let known = known.into_iter().flat_map(env::split_paths);
    env::join_paths(std::iter::once(folder.to_owned()).chain(known))
        .map_err(|error| format!("the target folder cannot be on a library path: {error}"))
}

/// The `foveate` command with the kernels.
fn build_ours(target: &Path) -> Result<PathBuf, String> {
    let nvcc = toolchain::nvcc().map_err(|missing| match missing {
        Missing::NotFetched(reason) | Missing::Unusable(reason) => reason,
    })?;
    cargo(&["build", "--package", "foveate", "--features", "cuda"], Some(nvcc.path.as_os_str()))?;
    Ok(target.join("debug").join(OURS))
}

pub(crate) fn cargo(arguments: &[&str], nvcc: Option<&OsStr>) -> Result<(), String> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    if let Some(nvcc) = nvcc {
        command.env("NVCC", nvcc);
        if env::var_os(crate::ARCHS.0).is_none() {
            command.env(crate::ARCHS.0, crate::ARCHS.1);
        }
    }
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo {} failed ({status})", arguments.join(" "))),
        Err(error) => Err(format!("cannot run cargo: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_driver_comes_first() {
        let path =
            |known: Option<&str>| library_path(Path::new("/t/emulator"), known.map(OsStr::new)).unwrap();
        assert_eq!(path(None), "/t/emulator");
        assert_eq!(path(Some("/a:/b")), "/t/emulator:/a:/b");
    }

    #[test]
    fn the_command_is_told_that_the_emulated_driver_is_meant() {
        let command = emulated(Path::new("/t/foveate"), &["demo".into()], Path::new("/t/emulator")).unwrap();
        let set = |name: &str| command.get_envs().find(|(key, _)| *key == name).and_then(|(_, value)| value);
        assert_eq!(set(EMULATED), Some(OsStr::new("1")));
        let path = set("LD_LIBRARY_PATH").unwrap().to_str().unwrap();
        assert!(path.starts_with("/t/emulator"), "{path}");
        assert_eq!(command.get_args().collect::<Vec<_>>(), ["demo"]);
    }

    #[test]
    fn a_command_is_needed() {
        assert!(emulate(&[]).unwrap_err().contains("takes a command"));
    }
}
