//! `cargo xtask toolchain`: an nvcc for the machine, its own or a fetched one.

mod fetch;

use std::{
    env,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

/// The oldest nvcc whose language and PTX the kernels use.
const OLDEST: Version = Version { major: 12, minor: 0, patch: 0 };

/// What `nvcc --version` says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Version {
    /// Reads `V13.0.88` out of nvcc's answer to `--version`.
    fn parse(text: &str) -> Option<Self> {
        let word = text.split([' ', ',', '\n', '\r']).find(|word| {
            word.strip_prefix('V').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })?;
        let mut numbers = word[1..].split('.').map(str::parse);
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self { major, minor, patch })
    }
}

/// Where an nvcc was named or found, in the order in which they are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The environment variable `NVCC`: the compiler itself.
    Nvcc,
    /// An environment variable with a toolkit's folder.
    Home(&'static str),
    /// A folder of `PATH`.
    Path,
    /// The wheels under the target folder.
    Fetched,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nvcc => f.write_str("NVCC"),
            Self::Home(variable) => f.write_str(variable),
            Self::Path => f.write_str("PATH"),
            Self::Fetched => f.write_str("fetched"),
        }
    }
}

/// A compiler that answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nvcc {
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
    pub(crate) origin: Origin,
}

impl Nvcc {
    /// The toolkit's folder, when the compiler lies in the `bin` of one.
    fn home(&self) -> Option<&Path> {
        let bin = self.path.parent()?;
        (bin.file_name()? == "bin").then(|| bin.parent())?
    }
}

/// What the search sees of the machine; the tests put another one in its place.
trait Machine {
    fn variable(&self, name: &str) -> Option<OsString>;
    fn is_file(&self, path: &Path) -> bool;
    /// Runs `path --version`; an error is one line.
    fn version(&self, path: &Path) -> Result<Version, String>;
}

struct Here;

impl Machine for Here {
    fn variable(&self, name: &str) -> Option<OsString> {
        env::var_os(name).filter(|value| !value.is_empty())
    }

    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }

    fn version(&self, path: &Path) -> Result<Version, String> {
        let output = Command::new(path)
            .arg("--version")
            .output()
            .map_err(|error| format!("{} cannot be run: {error}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Version::parse(&text)
            .filter(|_| output.status.success())
            .ok_or_else(|| format!("{} --version names no version ({})", path.display(), output.status))
    }
}

/// The executable's name in a toolkit's `bin`.
const NVCC_FILE: &str = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };

/// The machine's own nvcc: `NVCC`, then `CUDA_HOME` or `CUDA_PATH`, then `PATH`. `None` when there is none to be used,
/// with the reasons in `notes`; an error when one was asked for by name and cannot be used.
fn own(machine: &impl Machine, notes: &mut Vec<String>) -> Result<Option<Nvcc>, String> {
    let on_path = |name: &Path| {
        let folders = machine.variable("PATH").unwrap_or_default();
        env::split_paths(&folders).map(|folder| folder.join(name)).find(|file| machine.is_file(file))
    };
    if let Some(named) = machine.variable("NVCC").map(PathBuf::from) {
        let path = if named.components().count() > 1 { Some(named.clone()) } else { on_path(&named) };
        let path = path.filter(|path| machine.is_file(path)).ok_or_else(|| {
            format!(
                "NVCC is {}, which is no file: set it to an nvcc of CUDA {OLDEST} or newer, or unset it",
                named.display()
            )
        })?;
        return usable(machine, path, Origin::Nvcc).map(Some);
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        let Some(home) = machine.variable(variable).map(PathBuf::from) else { continue };
        let path = home.join("bin").join(NVCC_FILE);
        if machine.is_file(&path) {
            return usable(machine, path, Origin::Home(variable)).map(Some);
        }
        notes.push(format!("{variable} is {}, which has no bin/{NVCC_FILE}", home.display()));
    }
    if let Some(path) = on_path(Path::new(NVCC_FILE)) {
        match usable(machine, path, Origin::Path) {
            Ok(nvcc) => return Ok(Some(nvcc)),
            // Nobody asked for this one: a fetched one takes its place.
            Err(note) => notes.push(note),
        }
    }
    Ok(None)
}

fn usable(machine: &impl Machine, path: PathBuf, origin: Origin) -> Result<Nvcc, String> {
    let version = machine.version(&path).map_err(|error| format!("{origin}: {error}"))?;
    if version < OLDEST {
        return Err(format!(
            "{origin}: {} is nvcc {version}, and the kernels need {OLDEST} or newer: name a newer one in NVCC or \
             CUDA_HOME, or name none and `cargo xtask toolchain` fetches {}",
            path.display(),
            fetch::SERIES
        ));
    }
    Ok(Nvcc { path, version, origin })
}

/// Why there is no nvcc.
pub(crate) enum Missing {
    /// One was asked for by name and cannot be used: the user's to mend.
    Unusable(String),
    /// There is none here, and it could not be fetched either.
    NotFetched(String),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable(reason) | Self::NotFetched(reason) => f.write_str(reason),
        }
    }
}

/// An nvcc: the machine's own, else the one under the target folder, fetched when it is not there.
pub(crate) fn nvcc() -> Result<Nvcc, Missing> {
    let mut notes = Vec::new();
    let found = own(&Here, &mut notes);
    for note in &notes {
        eprintln!("xtask: {note}");
    }
    let fetched = || usable(&Here, fetch::nvcc(&target_folder()?)?, Origin::Fetched);
    let nvcc = match found.map_err(Missing::Unusable)? {
        Some(nvcc) => nvcc,
        None => fetched().map_err(Missing::NotFetched)?,
    };
    eprintln!("xtask: nvcc {} ({}): {}", nvcc.version, nvcc.origin, nvcc.path.display());
    Ok(nvcc)
}

/// Cargo's target folder, as an absolute path.
pub(crate) fn target_folder() -> Result<PathBuf, String> {
    let folder = ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"]
        .iter()
        .find_map(|name| Here.variable(name))
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target"), PathBuf::from);
    std::path::absolute(&folder).map_err(|error| format!("{}: {error}", folder.display()))
}

/// The lines of `cargo xtask toolchain`, for `export` in a shell or a file of variables in a workflow.
pub(crate) fn variables(nvcc: &Nvcc) -> String {
    let home = nvcc.home().map(|home| format!("CUDA_HOME={}\n", home.display()));
    format!("NVCC={}\n{}", nvcc.path.display(), home.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// A machine of variables and compilers.
    #[derive(Default)]
    struct Fake {
        variables: HashMap<&'static str, &'static str>,
        compilers: HashMap<&'static str, Result<Version, String>>,
    }

    impl Fake {
        fn set(mut self, name: &'static str, value: &'static str) -> Self {
            self.variables.insert(name, value);
            self
        }

        fn nvcc(mut self, path: &'static str, major: u32, minor: u32) -> Self {
            self.compilers.insert(path, Ok(Version { major, minor, patch: 1 }));
            self
        }
    }

    impl Machine for Fake {
        fn variable(&self, name: &str) -> Option<OsString> {
            self.variables.get(name).map(OsString::from)
        }

        fn is_file(&self, path: &Path) -> bool {
            self.compilers.contains_key(path.to_str().unwrap())
        }

        fn version(&self, path: &Path) -> Result<Version, String> {
            self.compilers[path.to_str().unwrap()].clone()
        }
    }

    type Choice = Result<Option<(Origin, String)>, String>;

    fn choice(machine: &Fake) -> (Choice, Vec<String>) {
        let mut notes = Vec::new();
        let found = own(machine, &mut notes);
        (found.map(|nvcc| nvcc.map(|nvcc| (nvcc.origin, nvcc.path.display().to_string()))), notes)
    }

    #[test]
    fn versions_are_read_from_nvccs_answer() {
        let answer = "nvcc: NVIDIA (R) Cuda compiler driver\nBuilt on Wed_Aug_20\n\
                      Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0\n";
        assert_eq!(Version::parse(answer), Some(Version { major: 13, minor: 0, patch: 88 }));
        assert_eq!(
            Version::parse("release 9.2, V9.2.148").map(|version| version.to_string()).as_deref(),
            Some("9.2.148")
        );
        assert!(Version { major: 11, minor: 8, patch: 89 } < OLDEST);
        for nothing in ["", "NVIDIA VERY Verbose", "V13", "V13.x", "gcc (Debian 12.2.0) 12.2.0"] {
            assert_eq!(Version::parse(nothing), None, "{nothing:?}");
        }
    }

    #[test]
    fn the_order_is_nvcc_home_path() {
        let mut machine = Fake::default()
            .set("NVCC", "/one/nvcc")
            .set("CUDA_HOME", "/two")
            .set("CUDA_PATH", "/three")
            .set("PATH", "/none:/four")
            .nvcc("/one/nvcc", 12, 9)
            .nvcc("/two/bin/nvcc", 13, 0)
            .nvcc("/three/bin/nvcc", 13, 0)
            .nvcc("/four/nvcc", 13, 0);
        let expected = [
            (Origin::Nvcc, "/one/nvcc", "NVCC"),
            (Origin::Home("CUDA_HOME"), "/two/bin/nvcc", "CUDA_HOME"),
            (Origin::Home("CUDA_PATH"), "/three/bin/nvcc", "CUDA_PATH"),
            (Origin::Path, "/four/nvcc", "PATH"),
        ];
        for (origin, path, variable) in expected {
            assert_eq!(choice(&machine), (Ok(Some((origin, path.to_owned()))), vec![]));
            machine.variables.remove(variable);
        }
        assert_eq!(choice(&machine), (Ok(None), vec![]));
    }

    #[test]
    fn a_bare_name_in_nvcc_is_looked_up() {
        let machine = Fake::default().set("NVCC", "nvcc-13").set("PATH", "/a:/b").nvcc("/b/nvcc-13", 13, 0);
        assert_eq!(choice(&machine).0, Ok(Some((Origin::Nvcc, "/b/nvcc-13".to_owned()))));
    }

    #[test]
    fn what_was_asked_for_by_name_and_is_unusable_is_an_error() {
        let (missing, _) = choice(&Fake::default().set("NVCC", "/gone/nvcc"));
        assert!(
            missing.unwrap_err().contains("/gone/nvcc, which is no file: set it to an nvcc of CUDA 12.0")
        );
        let (old, _) = choice(&Fake::default().set("CUDA_HOME", "/old").nvcc("/old/bin/nvcc", 11, 8));
        let old = old.unwrap_err();
        assert!(
            old.contains("CUDA_HOME: /old/bin/nvcc is nvcc 11.8.1, and the kernels need 12.0.0"),
            "{old}"
        );
        assert!(old.contains("or name none and `cargo xtask toolchain` fetches 13.0"), "{old}");
    }

    #[test]
    fn what_nobody_asked_for_is_passed_over_with_a_note() {
        let machine =
            Fake::default().set("CUDA_HOME", "/runtime-only").set("PATH", "/old").nvcc("/old/nvcc", 11, 8);
        let (found, notes) = choice(&machine);
        assert_eq!(found, Ok(None));
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].contains("/runtime-only, which has no bin/nvcc"), "{notes:?}");
        assert!(notes[1].contains("nvcc 11.8.1"), "{notes:?}");
    }

    #[test]
    fn scripts_get_one_variable_a_line() {
        let version = Version { major: 13, minor: 0, patch: 88 };
        let nvcc = |path: &str| Nvcc { path: path.into(), version, origin: Origin::Path };
        assert_eq!(variables(&nvcc("/cuda/bin/nvcc")), "NVCC=/cuda/bin/nvcc\nCUDA_HOME=/cuda\n");
        assert_eq!(variables(&nvcc("/wrappers/nvcc")), "NVCC=/wrappers/nvcc\n");
    }
}
