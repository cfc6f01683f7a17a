//! Test programs side by side, where cargo runs one after the other.
//!
//! A test of a kernel takes its turn at the one device of its process, so a test program keeps one core busy however many there
//! are. Programs know nothing of each other: as many run at a time as there are cores.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use serde_json::Value;

use crate::emulate::library_path;

/// A test program and the folder that it runs in.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    folder: PathBuf,
}

/// Builds the test programs that `cargo test` with these arguments would run, then runs them, the ones with names in `first`
/// before all others: what takes longest must not be left for the end.
pub(crate) fn test(
    arguments: &[&str],
    first: &[&str],
    variables: &[(&str, OsString)],
) -> Result<bool, String> {
    let built = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--no-run", "--message-format=json-render-diagnostics"])
        .args(arguments)
        .envs(variables.iter().cloned())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !built.status.success() {
        return Err(format!("cargo test --no-run failed ({})", built.status));
    }
    let mut programs = programs(&String::from_utf8_lossy(&built.stdout))?;
    if programs.is_empty() {
        return Err(format!("cargo built no test programs for {}", arguments.join(" ")));
    }
    programs
        .sort_by_key(|program| first.iter().position(|name| name == &program.name()).unwrap_or(first.len()));
    Ok(run_all(&programs, variables))
}

impl Program {
    /// The name without the hash that cargo puts behind it.
    fn name(&self) -> &str {
        let name = self.path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        name.rsplit_once('-').map_or(name, |(name, _)| name)
    }

    /// The program as cargo would run it: in its package's folder, libraries that were built beside it on the loader's path.
    fn run(&self, variables: &[(&str, OsString)]) -> Result<Output, String> {
        let deps = self.path.parent().unwrap_or(Path::new(""));
        let known = library_path(deps.parent().unwrap_or(deps), env::var_os("LD_LIBRARY_PATH").as_deref())?;
        Command::new(&self.path)
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder)
            .envs(variables.iter().cloned())
            .env("LD_LIBRARY_PATH", library_path(deps, Some(&known))?)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cannot run {}: {error}", self.path.display()))
    }
}

/// The test programs in cargo's messages, one JSON object a line.
fn programs(messages: &str) -> Result<Vec<Program>, String> {
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line)
            .map_err(|error| format!("cargo wrote a message that is not JSON ({error}): {line}"))?;
        let text = |value: &Value| value.as_str().map(PathBuf::from);
        let (Some(path), Some(manifest)) = (text(&message["executable"]), text(&message["manifest_path"]))
        else {
            continue;
        };
        if message["profile"]["test"] == Value::Bool(true) {
            let folder = manifest.parent().map(Path::to_owned).unwrap_or_default();
            programs.push(Program { path, folder });
        }
    }
    Ok(programs)
}

/// Runs all programs, also after one that failed. What a program says is printed in one piece when it ends.
fn run_all(programs: &[Program], variables: &[(&str, OsString)]) -> bool {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(program) = programs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let start = Instant::now();
            let outcome = program.run(variables);
            // The lock also keeps two programs' lines apart.
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            println!("     Running {} ({:.1} s)", program.name(), start.elapsed().as_secs_f64());
            match outcome {
                Ok(output) => {
                    print!("{}", String::from_utf8_lossy(&output.stdout));
                    eprint!("{}", String::from_utf8_lossy(&output.stderr));
                    if !output.status.success() {
                        failed.push(format!("{} ({})", program.name(), output.status));
                    }
                }
                Err(error) => failed.push(error),
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, std::num::NonZero::get).min(programs.len());
    thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    for what in &failed {
        eprintln!("xtask: test program failed: {what}");
    }
    failed.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_among_the_messages() {
        let artifact = |name: &str, executable: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/p/Cargo.toml","target":{{"name":"{name}"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let messages = [
            artifact("library", "null", false),
            artifact("command", "\"/t/debug/command\"", false),
            artifact("tests", "\"/t/debug/deps/some_tests-0123abcd\"", true),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let found = programs(&messages.join("\n")).unwrap();
        let expected = Program { path: "/t/debug/deps/some_tests-0123abcd".into(), folder: "/p".into() };
        assert_eq!(found, [expected]);
        assert_eq!(found[0].name(), "some_tests");
        assert!(programs("{").unwrap_err().contains("not JSON"));
    }

    #[cfg(unix)]
    #[test]
    fn a_program_that_fails_is_not_lost_among_others() {
        let program = |path: &str| Program { path: path.into(), folder: "/".into() };
        let (good, bad, absent) = (program("/bin/true"), program("/bin/false"), program("/no/such/program"));
        assert!(run_all(&[good], &[]));
        assert!(!run_all(&[program("/bin/true"), bad, program("/bin/true")], &[]));
        assert!(!run_all(&[program("/bin/true"), absent], &[]));
    }
}
