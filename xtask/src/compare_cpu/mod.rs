//! `cargo xtask compare-cpu`: the processor's backend beside other engines, run in turn on the same weights.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const HELP: &str = "\
cargo xtask compare-cpu [--rounds N] [--models LIST] [--threads LIST] [--precisions LIST] [--python PROGRAM]

  Runs DeiT-T and DeiT-S, dense and reduced, batches of 1 and 8, on 1 and 2 threads, in turn with OpenVINO and ONNX Runtime
  (dense and tome:r=13) and PyTorch (dense; also LV-ViT-S and AFFNet-ET) on the same weights, and writes the ratios of times
  to benches/results/cpu.md, the machine named by its processor's features only. What Python has not, it installs from its
  package index into target/compare-cpu; PyTorch, which is large, is used where --python has it.

  The file is written after every row, with the rows of earlier runs that this one has not measured again: parts can be measured
  one by one. Remove target/compare-cpu/rows.json to begin anew, on another machine say.

  --rounds N         rounds in which everybody has a turn (15)
  --models LIST      of deit_tiny, deit_small, lvvit_s and affnet_et (all)
  --threads LIST     of 1 and 2 (1,2)
  --precisions LIST  of f32 and bf16, which takes a processor with AMX: products of rounded factors, OpenVINO by its hint (f32)
  --python PROGRAM   the Python to make the environment with (python3)
";

const MODELS: [&str; 4] = ["deit_tiny", "deit_small", "lvvit_s", "affnet_et"];
const THREADS: [&str; 2] = ["1", "2"];
const PRECISIONS: [&str; 2] = ["f32", "bf16"];

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
    models: String,
    threads: String,
    precisions: String,
    python: String,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            rounds: 15,
            models: MODELS.join(","),
            threads: THREADS.join(","),
            precisions: PRECISIONS[0].to_owned(),
            python: "python3".to_owned(),
        }
    }
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Option<Self>, String> {
        let mut arguments = Self::default();
        while let Some(word) = words.next() {
            let word = word.to_string_lossy().into_owned();
            let mut value = || {
                let value = words.next().ok_or_else(|| format!("{word} takes a value"))?;
                Ok::<_, String>(value.to_string_lossy().into_owned())
            };
            let of = |list: String, known: &[&str]| match list.split(',').find(|one| !known.contains(one)) {
                Some(one) => Err(format!("{word} knows {}, not `{one}`", known.join(", "))),
                None => Ok(list),
            };
            match &*word {
                "--help" | "-h" => return Ok(None),
                "--rounds" => {
                    let rounds = value()?.parse().ok().filter(|&rounds: &usize| rounds > 0);
                    arguments.rounds = rounds.ok_or("--rounds takes a number from 1 on")?;
                }
                "--models" => arguments.models = of(value()?, &MODELS)?,
                "--threads" => arguments.threads = of(value()?, &THREADS)?,
                "--precisions" => arguments.precisions = of(value()?, &PRECISIONS)?,
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
    let (script, head) = (folder.join(SCRIPTS[0].0), folder.join("head.md"));
    fs::write(&head, report_head()).map_err(|e| format!("{}: {e}", head.display()))?;
    let path = root.join(RESULT);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
    }
    let Arguments { rounds, models, threads, precisions, .. } = &arguments;
    let mut compare = Command::new(&python);
    compare.arg(&script).arg(target.join("release/examples/cpu_rounds")).args([&folder, &path, &head]);
    compare.args(["--rounds", &rounds.to_string(), "--models", models, "--threads", threads]);
    compare.args(["--precisions", precisions]);
    succeed(&mut compare)?;
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

/// What stands before the tables.
fn report_head() -> String {
    format!(
        "# The processor's backend beside other engines\n\n\
         Their time over foveate's for the same weights: above 1 foveate is faster. Medians over rounds in which everybody has a \
         turn, the fastest of a few passes; `cargo xtask compare-cpu` makes these tables. Processor: {}.\n",
        features()
    )
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
    // What the compiler's macro does not know in all the versions that build this.
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    features.extend(flags.split_whitespace().any(|flag| flag == "amx_bf16").then_some("AMX BF16"));
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
        assert_eq!(parse(&[]), Ok(Some(Arguments::default())));
        let given = parse(&["--rounds", "3", "--models", "lvvit_s,deit_tiny", "--precisions", "f32,bf16"]);
        let models = "lvvit_s,deit_tiny".to_owned();
        let precisions = "f32,bf16".to_owned();
        assert_eq!(given, Ok(Some(Arguments { rounds: 3, models, precisions, ..Arguments::default() })));
        assert_eq!(parse(&["--help"]), Ok(None));
        assert!(parse(&["--rounds", "0"]).unwrap_err().contains("from 1 on"));
        assert!(parse(&["--models", "deit_tiny,vgg"]).unwrap_err().contains("deit_small, lvvit_s"));
        assert!(parse(&["--threads", "3"]).unwrap_err().contains("not `3`"));
        assert!(parse(&["--fast"]).unwrap_err().contains("--fast is not an argument"));
    }

    #[test]
    fn the_report_names_features_and_no_machine() {
        let text = report_head();
        assert!(text.contains("hardware threads") && !text.contains('/'), "{text}");
    }
}
