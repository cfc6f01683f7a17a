//! candle's operations on CUDA are type-checked without compiling candle's own CUDA code, which takes nvcc many minutes: its
//! build script is given this program for an nvcc, which makes files with nothing in them.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs, io,
    path::Path,
    process::Command,
};

/// Set where this program is to be an nvcc: to the real one, for everybody's code but candle's, or to nothing.
pub(crate) const WANTED: &str = "FOVEATE_STAND_IN_FOR_NVCC";

/// An architecture that candle-kernels is not built for: its build script keeps what it compiled by architecture, and a build
/// with a real nvcc in the same target folder must not take our empty files for its own.
pub(crate) const ARCHITECTURE: &str = "52";

/// Whether this program was called as an nvcc.
pub(crate) fn wanted() -> bool {
    env::var_os(WANTED).is_some()
}

/// Stands in, or hands on to the real one.
pub(crate) fn run(arguments: &[OsString]) -> io::Result<bool> {
    let real = env::var_os(WANTED).filter(|path| !path.is_empty());
    // Cargo tells a build script, and so its children, whose it is.
    match real.filter(|_| env::var_os("CARGO_PKG_NAME").is_none_or(|name| name != "candle-kernels")) {
        Some(nvcc) => Command::new(nvcc).args(arguments).status().map(|status| status.success()),
        None => stand_in(arguments).map(|()| true),
    }
}

/// Does what a build script can tell from the outside.
fn stand_in(arguments: &[OsString]) -> io::Result<()> {
    let is = |name: &str| arguments.iter().any(|argument| argument == name);
    let after = |name: &str| {
        arguments.iter().position(|argument| argument == name).and_then(|at| arguments.get(at + 1))
    };
    if is("--version") {
        println!("Cuda compilation tools, release 13.0, V13.0.88");
    } else if is("--list-gpu-code") || is("--list-gpu-arch") {
        println!("sm_{ARCHITECTURE}");
    }
    if let Some(file) = after("-o") {
        fs::write(file, "")?;
    }
    if let Some(folder) = after("--output-directory") {
        let sources =
            arguments.iter().map(Path::new).filter(|path| path.extension() == Some(OsStr::new("cu")));
        for stem in sources.filter_map(Path::file_stem) {
            let mut name = stem.to_owned();
            name.push(".ptx");
            fs::write(Path::new(folder).join(name), "")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_that_is_asked_for_is_there_and_empty() {
        let folder = env::temp_dir().join(format!("foveate-stand-in-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let words = |line: &str| {
            let line = line.replace("FOLDER", folder.to_str().unwrap());
            line.split(' ').map(OsString::from).collect::<Vec<_>>()
        };
        stand_in(&words("-gencode=arch=compute_52 --ptx --output-directory FOLDER -O3 src/affine.v2.cu"))
            .unwrap();
        stand_in(&words("-c -o FOLDER/a.o src/a.cu")).unwrap();
        stand_in(&words("--version")).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names, ["a.o", "affine.v2.ptx"]);
    }
}
