//! `cargo xtask gpu-report`: everything that takes a card, in one go, written down under the card's name.

mod report;

use std::{
    env,
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::toolchain::{self, Missing};
use report::{Outcome, Part, Report};

const HELP: &str = "\
cargo xtask gpu-report [--skip PART]... [--python PROGRAM]

  Runs on a machine with an NVIDIA card, and writes benches/results/<card>.md:
  tests    the device tests on the card
  benches  cargo bench --features cuda, all of it
  ncu      the counters of docs/profiling.md on the card, where there is an ncu
  python   PyTorch and timm, with ToMe where its package is there: images/s of the same models

  --skip PART        leaves a part out; repeatable
  --python PROGRAM   the Python that has torch (python3)
";

/// The parts that can be left out.
const PARTS: [&str; 4] = ["tests", "benches", "ncu", "python"];

/// A folder of its own: the emulated driver of other builds would stand in front of the card's.
const TARGET: &str = "target/gpu";

/// Times PyTorch; prints tables.
const SCRIPT: &str = include_str!("throughput.py");

/// The metrics of docs/profiling.md.
const METRICS: &str = "smsp__inst_executed.sum,l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum,\
    l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum,\
    l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum,\
    sm__inst_executed_pipe_tensor.sum,dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum";

/// What ncu looks at: one operation of each kind.
const PROFILED: [&str; 5] = ["attention", "matching", "merge", "layer_norm", "select"];

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    skipped: Vec<String>,
    python: String,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Option<Self>, String> {
        let mut arguments = Self { skipped: Vec::new(), python: "python3".to_owned() };
        while let Some(word) = words.next() {
            let word = word.to_string_lossy().into_owned();
            let mut value = || words.next().ok_or_else(|| format!("{word} takes a value"));
            match word.as_str() {
                "-h" | "--help" => return Ok(None),
                "--python" => arguments.python = value()?.to_string_lossy().into_owned(),
                "--skip" => {
                    let part = value()?.to_string_lossy().into_owned();
                    if !PARTS.contains(&part.as_str()) {
                        return Err(format!("there is no part `{part}`, only {}", PARTS.join(", ")));
                    }
                    arguments.skipped.push(part);
                }
                _ => return Err(format!("gpu-report does not know `{word}`; it takes --skip and --python")),
            }
        }
        Ok(Some(arguments))
    }

    fn wants(&self, part: &str) -> bool {
        !self.skipped.iter().any(|skipped| skipped == part)
    }
}

/// A card as its driver describes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Card {
    name: String,
    driver: String,
    capability: String,
    memory: String,
    clock: String,
}

const FIELDS: &str = "name,driver_version,compute_cap,memory.total,clocks.max.sm";

impl Card {
    /// The first line of nvidia-smi's answer.
    fn parse(answer: &str) -> Option<Self> {
        let mut fields = answer.lines().next()?.split(',').map(|field| field.trim().to_owned());
        let mut next = || fields.next().filter(|field| !field.is_empty());
        Some(Self { name: next()?, driver: next()?, capability: next()?, memory: next()?, clock: next()? })
    }

    /// Asks `program`; why there is no card is the error.
    fn find(program: &str) -> Result<Self, String> {
        let query = format!("--query-gpu={FIELDS}");
        let answer = Command::new(program).args([&query, "--format=csv,noheader"]).output();
        let refusal = |why: String| {
            format!(
                "gpu-report needs an NVIDIA card and its driver: {why}; without a card, `cargo xtask test` and `cargo xtask \
                 counters` say what can be said"
            )
        };
        match answer {
            Err(error) => Err(refusal(format!("cannot run {program}: {error}"))),
            Ok(answer) if !answer.status.success() => {
                let said = [answer.stdout, answer.stderr].concat();
                let said = String::from_utf8_lossy(&said).trim().replace('\n', " ");
                Err(refusal(format!("{program} failed: {said}")))
            }
            Ok(answer) => Self::parse(&String::from_utf8_lossy(&answer.stdout))
                .ok_or_else(|| refusal(format!("{program} names no card"))),
        }
    }

    /// The name as a file's: `NVIDIA A100-SXM4-40GB` is `nvidia-a100-sxm4-40gb`.
    fn slug(&self) -> String {
        let letters = self.name.to_lowercase();
        let words = letters.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join("-")
    }
}

/// Runs everything that was asked for; false when a part failed.
pub(crate) fn run(words: impl Iterator<Item = OsString>) -> Result<bool, String> {
    let Some(arguments) = Arguments::parse(words)? else {
        print!("{HELP}");
        return Ok(true);
    };
    let card = Card::find("nvidia-smi")?;
    let nvcc = toolchain::nvcc().map_err(|missing| match missing {
        Missing::NotFetched(reason) | Missing::Unusable(reason) => reason,
    })?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let work = Work { root: root.to_owned(), nvcc: nvcc.path.clone().into_os_string() };
    let mut report = Report::new(&card, &nvcc.version.to_string(), &work.commit());
    let folder = root.join("benches/results");
    let file = folder.join(format!("{}.md", card.slug()));
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let all = work.parts(&arguments);
    for (part, made) in PARTS.into_iter().zip(all) {
        for step in made {
            report.add(if arguments.wants(part) { take(part, step) } else { Part::skipped(step.title) });
            // What is known so far is kept when a later part is interrupted.
            fs::write(&file, report.text()).map_err(|error| format!("{}: {error}", file.display()))?;
        }
    }
    println!("xtask: {}", file.display());
    Ok(report.good())
}

/// How one part is run.
struct Step {
    title: &'static str,
    command: Result<Command, String>,
    /// What is kept of its output.
    keep: fn(&str) -> String,
}

struct Work {
    root: PathBuf,
    nvcc: OsString,
}

impl Work {
    fn commit(&self) -> String {
        let git =
            Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(&self.root).output();
        let text = git.ok().filter(|git| git.status.success()).map(|git| git.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        if text.is_empty() { "unknown".to_owned() } else { text }
    }

    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(arguments).args(["--target-dir", TARGET]).current_dir(&self.root);
        cargo.env("NVCC", &self.nvcc).env("CARGO_TERM_COLOR", "never").env("FOVEATE_REQUIRE_GPU", "1");
        cargo
    }

    /// The steps of each part, in the order of [`PARTS`].
    fn parts(&self, arguments: &Arguments) -> [Vec<Step>; 4] {
        let tests = self.cargo(&[
            "test",
            "--package",
            "foveate-device-tests",
            "--features",
            "cuda",
            "--no-fail-fast",
        ]);
        let benches = self.cargo(&["bench", "--package", "foveate", "--features", "cuda"]);
        [
            vec![Step { title: "Device tests", command: Ok(tests), keep: report::verdicts }],
            vec![Step { title: "Benches", command: Ok(benches), keep: report::criterion }],
            self.profiles(arguments.wants("ncu")),
            vec![Step {
                title: "PyTorch and timm",
                command: Ok(self.python(&arguments.python)),
                keep: report::whole,
            }],
        ]
    }

    fn python(&self, program: &str) -> Command {
        let mut python = Command::new(program);
        python.args(["-c", SCRIPT]).current_dir(&self.root);
        python
    }

    /// The lines of docs/profiling.md, once `launch_one` is built.
    fn profiles(&self, wanted: bool) -> Vec<Step> {
        if !wanted {
            return vec![Step { title: "Nsight Compute", command: Err(String::new()), keep: report::whole }];
        }
        let there = Command::new("ncu").arg("--version").output().is_ok_and(|ncu| ncu.status.success());
        let example = ["build", "--release", "--features", "nvtx", "--example", "launch_one"];
        let built = there && self.cargo(&example).status().is_ok_and(|status| status.success());
        let missing = if there { "launch_one cannot be built" } else { "there is no ncu on PATH" };
        let step = |operation: &&str| {
            let mut ncu = Command::new("ncu");
            ncu.args(["--profile-from-start", "off", "--launch-count", "1", "--metrics", METRICS]);
            ncu.arg(Path::new(TARGET).join("release/examples/launch_one")).arg(operation);
            ncu.args(["--dtype", "f16", "--batch", "2", "--tokens", "197", "--width", "384"])
                .current_dir(&self.root);
            let command = if built { Ok(ncu) } else { Err(missing.to_owned()) };
            Step { title: "Nsight Compute", command, keep: report::whole }
        };
        let operations = if built { &PROFILED[..] } else { &PROFILED[..1] };
        operations.iter().map(step).collect()
    }
}

/// Runs a step; what it prints is shown as it comes.
fn take(part: &'static str, step: Step) -> Part {
    let mut command = match step.command {
        Ok(command) => command,
        Err(reason) => return Part { outcome: Outcome::Missing(reason), ..Part::skipped(step.title) },
    };
    let line = shown(&command);
    println!("== {}: {line}", step.title);
    let child = command.stdout(Stdio::piped()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            let reason = format!("cannot run {}: {error}", command.get_program().display());
            return Part {
                title: step.title,
                command: line,
                outcome: Outcome::Missing(reason),
                output: String::new(),
            };
        }
    };
    let mut output = String::new();
    for text in
        child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok)
    {
        println!("{text}");
        let _ = std::io::stdout().flush();
        output.push_str(&text);
        output.push('\n');
    }
    let outcome = match child.wait() {
        Ok(status) if status.success() => Outcome::Done,
        // The script's own way to say that there is nothing to time.
        Ok(status) if part == "python" && status.code() == Some(3) => {
            Outcome::Missing(std::mem::take(&mut output).trim().to_owned())
        }
        Ok(status) => Outcome::Failed(status.to_string()),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    Part { title: step.title, command: line, outcome, output: (step.keep)(&output) }
}

/// A command as one line; a program text among its arguments is left out.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words = words.map(|word| {
        let word = word.to_string_lossy();
        if word.contains('\n') {
            "<xtask/src/gpu_report/throughput.py>".to_owned()
        } else {
            word.into_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Arguments>, String> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn arguments_are_read_and_refused() {
        let all = parse("").unwrap().unwrap();
        assert!(PARTS.iter().all(|part| all.wants(part)) && all.python == "python3");
        let some = parse("--skip tests --python /venv/bin/python --skip ncu").unwrap().unwrap();
        assert_eq!(PARTS.map(|part| some.wants(part)), [false, true, false, true]);
        assert_eq!(some.python, "/venv/bin/python");
        assert_eq!(parse("--help"), Ok(None));
        assert!(parse("--skip tets").unwrap_err().contains("no part `tets`, only tests, benches"));
        assert!(parse("--python").unwrap_err().contains("takes a value"));
        assert!(parse("now").unwrap_err().contains("`now`"));
    }

    #[test]
    fn without_a_card_there_is_a_refusal() {
        let refusal = Card::find("no-such-nvidia-smi").unwrap_err();
        assert!(
            refusal.contains("needs an NVIDIA card") && refusal.contains("no-such-nvidia-smi"),
            "{refusal}"
        );
        assert!(refusal.contains("cargo xtask counters") && !refusal.contains('\n'), "{refusal}");
        #[cfg(unix)]
        {
            let refusal = Card::find("false").unwrap_err();
            assert!(refusal.contains("false failed"), "{refusal}");
            let refusal = Card::find("true").unwrap_err();
            assert!(refusal.contains("names no card"), "{refusal}");
        }
    }

    #[test]
    fn a_card_is_named_by_its_driver() {
        let answer = "NVIDIA A100-SXM4-40GB, 580.65.06, 8.0, 40960 MiB, 1410 MHz\nNVIDIA T4, 580.65.06, 7.5, 1 MiB, 1 MHz\n";
        let card = Card::parse(answer).unwrap();
        assert_eq!(card.slug(), "nvidia-a100-sxm4-40gb");
        assert_eq!((card.driver.as_str(), card.capability.as_str()), ("580.65.06", "8.0"));
        assert_eq!(Card::parse("\n"), None);
        assert_eq!(Card::parse("No devices were found"), None);
    }

    #[test]
    fn a_program_text_is_not_printed() {
        let work = Work { root: PathBuf::from("."), nvcc: OsString::new() };
        let line = shown(&work.python("python3"));
        assert_eq!(line, "python3 -c <xtask/src/gpu_report/throughput.py>");
        let line = shown(&work.cargo(&["bench"]));
        assert!(line.ends_with("bench --target-dir target/gpu"), "{line}");
    }
}
