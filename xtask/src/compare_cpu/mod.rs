//! `cargo xtask compare-cpu`: the processor's backend beside other engines, run in turn on the same weights.

use std::{
    env,
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const HELP: &str = "\
cargo xtask compare-cpu [--rounds N] [--python PROGRAM]

  Runs DeiT-T and DeiT-S, dense and reduced, batches of 1 and 8, on 1 and 2 threads, in turn with OpenVINO and ONNX Runtime
  (dense and tome:r=13) and PyTorch (dense; also LV-ViT-S and AFFNet-ET) on the same weights, and writes the ratios of times
  to benches/results/cpu.md, the machine named by its processor's features only. What Python has not, it installs from its
  package index into target/compare-cpu; PyTorch, which is large, is used where --python has it.

  --rounds N         rounds in which everybody has a turn (15)
  --python PROGRAM   the Python to make the environment with (python3)
";

/// The first is run, the others it imports.
const SCRIPTS: [(&str, &str); 4] = [
    ("compare.py", include_str!("compare.py")),
    ("weights.py", include_str!("weights.py")),
    ("graphs.py", include_str!("graphs.py")),
    ("eager.py", include_str!("eager.py")),
];
const PACKAGES: [&str; 4] = ["numpy", "onnx", "openvino", "onnxruntime"];
const RESULT: &str = "benches/results/cpu.md";

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    rounds: usize,
    python: String,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Option<Self>, String> {
        let mut arguments = Self { rounds: 15, python: "python3".to_owned() };
        while let Some(word) = words.next() {
            let word = word.to_string_lossy().into_owned();
            let mut value = || {
                let value = words.next().ok_or_else(|| format!("{word} takes a value"))?;
                Ok::<_, String>(value.to_string_lossy().into_owned())
            };
            match &*word {
                "--help" | "-h" => return Ok(None),
                "--rounds" => {
                    let rounds = value()?.parse().ok().filter(|&rounds: &usize| rounds > 0);
                    arguments.rounds = rounds.ok_or("--rounds takes a number from 1 on")?;
                }
                "--python" => arguments.python = value()?,
                other => return Err(format!("{other} is not an argument; --help tells which are")),
            }
        }
        Ok(Some(arguments))
    }
}

/// Runs the comparison.
pub(crate) fn run(words: impl Iterator<Item = OsString>) -> Result<(), String> {
    let Some(arguments) = Arguments::parse(words)? else {
        print!("{HELP}");
        return Ok(());
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("xtask lies in no workspace")?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let folder = target.join("compare-cpu");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let python = environment(&folder, &arguments.python)?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    succeed(cargo.current_dir(root).args([
        "build",
        "--release",
        "--package",
        "foveate",
        "--example",
        "cpu_rounds",
    ]))?;
    for (name, text) in SCRIPTS {
        let script = folder.join(name);
        fs::write(&script, text).map_err(|e| format!("{}: {e}", script.display()))?;
    }
    let script = folder.join(SCRIPTS[0].0);
    let mut compare = Command::new(&python);
    compare.arg(&script).arg(target.join("release/examples/cpu_rounds")).arg(&folder);
    compare.arg(arguments.rounds.to_string()).stderr(Stdio::inherit());
    let output = compare.output().map_err(|e| format!("{}: {e}", python.display()))?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{table}");
    if !output.status.success() {
        return Err(format!("compare.py: {}", output.status));
    }
    let path = root.join(RESULT);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
    }
    fs::write(&path, report(&table, arguments.rounds)).map_err(|e| format!("{}: {e}", path.display()))?;
    println!("written to {RESULT}");
    Ok(())
}

/// A Python that has the packages: the given one, or that of an environment made from it.
fn environment(folder: &Path, python: &str) -> Result<PathBuf, String> {
    let all = format!("import {}", PACKAGES.join(", "));
    let there = Command::new(python).args(["-c", &all]).stderr(Stdio::null()).status();
    if there.is_ok_and(|status| status.success()) {
        return Ok(python.into());
    }
    let place = folder.join("environment");
    let own = place.join("bin/python");
    if !own.exists() {
        // What is installed already, PyTorch say, is seen.
        succeed(Command::new(python).args(["-m", "venv", "--system-site-packages"]).arg(&place))?;
    }
    succeed(Command::new(&own).args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
    Ok(own)
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{name}: {status}")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn report(table: &str, rounds: usize) -> String {
    let mut text = String::from("# The processor's backend beside other engines\n\n");
    let _ = writeln!(
        text,
        "Their time over foveate's for the same weights, f32: above 1 foveate is faster. Medians over {rounds} rounds in which \
         everybody has a turn, the fastest of a few passes; `cargo xtask compare-cpu` makes this table. Processor: {}.\n\n{table}",
        features()
    );
    text
}

/// The vector instructions of this machine and how many threads it runs at once: what its speed depends on, and no more.
fn features() -> String {
    let mut features: Vec<&str> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    for (name, there) in [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512F", is_x86_feature_detected!("avx512f")),
        ("AVX-512 VNNI", is_x86_feature_detected!("avx512vnni")),
        ("AVX-512 BF16", is_x86_feature_detected!("avx512bf16")),
    ] {
        features.extend(there.then_some(name));
    }
    if features.is_empty() {
        features.push(env::consts::ARCH);
    }
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    format!("{}, {threads} hardware threads", features.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read() {
        let parse = |words: &[&str]| Arguments::parse(words.iter().map(OsString::from));
        assert_eq!(parse(&[]), Ok(Some(Arguments { rounds: 15, python: "python3".to_owned() })));
        let given = parse(&["--rounds", "3", "--python", "python3.12"]);
        assert_eq!(given, Ok(Some(Arguments { rounds: 3, python: "python3.12".to_owned() })));
        assert_eq!(parse(&["--help"]), Ok(None));
        assert!(parse(&["--rounds", "0"]).unwrap_err().contains("from 1 on"));
        assert!(parse(&["--fast"]).unwrap_err().contains("--fast is not an argument"));
    }

    #[test]
    fn the_report_names_features_and_no_machine() {
        let text = report("| a |\n", 7);
        assert!(
            text.contains("over 7 rounds")
                && text.contains("hardware threads")
                && text.ends_with("| a |\n\n")
        );
    }
}
