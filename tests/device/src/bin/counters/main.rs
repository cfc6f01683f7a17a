//! What the launches of benches/launches do on the emulated driver, as JSON, against what the committed file says.
//! `cargo xtask counters` runs it; `CONTRIBUTING.md` and `docs/profiling.md` say what for.

mod compare;
mod record;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use foveate::{Error, Result, cuda::Device};
use foveate_device_tests::{
    emulator,
    launches::{self, Place},
};
use serde_json::Value as Json;

/// The committed file, from the workspace's folder.
const FILE: &str = "benches/counters.json";

struct Arguments {
    file: PathBuf,
    write: bool,
    nvcc: String,
}

impl Arguments {
    fn read(mut words: impl Iterator<Item = String>) -> std::result::Result<Self, String> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(""));
        let mut arguments = Self { file: workspace.join(FILE), write: false, nvcc: "unknown".to_owned() };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--write" => arguments.write = true,
                "--file" => arguments.file = value()?.into(),
                "--nvcc" => arguments.nvcc = value()?,
                other => {
                    return Err(format!("unknown argument `{other}`: --write, --file PATH, --nvcc VERSION"));
                }
            }
        }
        Ok(arguments)
    }
}

/// Launches every case and records what it did.
fn count(nvcc: &str) -> Result<Json> {
    let place = Place::new(Device::new(0)?)?;
    let wrong = |what: String| Error::Driver { action: "counting", what };
    if !emulator::is_loaded() {
        return Err(wrong(format!(
            "a real driver stands in front of the emulated one: {}",
            place.device.name()
        )));
    }
    // Bounds are always checked; the other checks are the tests' affair, and cost time.
    emulator::set(c"EMU_CHECKS", c"all=off");
    let mut entries = Vec::new();
    for case in launches::counted() {
        let mut launch = case.prepare(&place)?;
        place.synchronize()?;
        emulator::reset_counters();
        launch.run()?;
        place.synchronize()?;
        let counters: Vec<Json> = serde_json::from_str(&emulator::counters())
            .map_err(|error| wrong(format!("the emulator's counters: {error}")))?;
        if counters.is_empty() {
            return Err(wrong(format!("{case} launched nothing")));
        }
        entries.push((case, record::entry(&counters, launch.work)));
    }
    let findings = emulator::findings();
    if let Some(first) = findings.first() {
        return Err(wrong(format!("the emulator found {} faults, first: {first}", findings.len())));
    }
    entries.sort_by_key(|(case, _)| {
        let shape = case.shape;
        (case.operation.name, shape.tokens, shape.width, case.dtype.to_string())
    });
    Ok(record::file(nvcc, entries.into_iter().map(|(case, entry)| (case.to_string(), entry))))
}

fn run(arguments: &Arguments) -> std::result::Result<bool, String> {
    let start = Instant::now();
    let counted = count(&arguments.nvcc).map_err(|error| error.to_string())?;
    let entries = counted["entries"].as_object().map_or(0, serde_json::Map::len);
    println!("counters: {entries} launches counted in {:.1} s", start.elapsed().as_secs_f64());
    let path = arguments.file.display();
    let committed = match fs::read_to_string(&arguments.file) {
        Ok(text) => serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Json::Null,
        Err(error) => return Err(format!("{path}: {error}")),
    };
    let report = compare::compare(&committed, &counted);
    print!("{report}");
    if arguments.write {
        fs::write(&arguments.file, record::text(&counted)).map_err(|error| format!("{path}: {error}"))?;
        println!("counters: written to {path}; the reason for what rose belongs in the commit message");
        return Ok(true);
    }
    if report.fails() {
        println!(
            "counters: `cargo xtask counters --write` accepts this; the reason belongs in the commit message"
        );
    }
    Ok(!report.fails())
}

fn main() -> ExitCode {
    let done = Arguments::read(env::args().skip(1)).and_then(|arguments| run(&arguments));
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("counters: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_and_unknown_ones_named() {
        let read = |words: &[&str]| Arguments::read(words.iter().map(|&word| word.to_owned()));
        let given = read(&["--write", "--nvcc", "13.0.88", "--file", "x.json"]).unwrap();
        assert!(given.write && given.nvcc == "13.0.88" && given.file == Path::new("x.json"));
        assert!(read(&["--nvcc"]).is_err_and(|error| error == "--nvcc needs a value"));
        assert!(read(&["-w"]).is_err_and(|error| error.contains("`-w`")));
    }
}
