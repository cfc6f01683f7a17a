//! Chores of the workspace: `cargo xtask <task>`.

mod candle;
mod compare_cpu;
mod emulate;
mod gpu_report;
mod resources;
mod side_by_side;
mod stand_in;
mod toolchain;

use std::{
    env,
    ffi::OsString,
    process::{Command, ExitCode},
    time::Instant,
};

use toolchain::{Missing, Nvcc};

const HELP: &str = "\
cargo xtask <task>

  test       all tests: unit, documentation, golden files, command line, the kernels and candle's operations on the emulated
             CUDA driver, and the counters; fetches an nvcc when there is none
  lint       rustfmt, clippy and rustdoc, warnings as errors
  ci         lint, then test
  resources  registers, shared memory, spills and occupancy of every CUDA kernel on three architectures, as a table and
             in the target folder as resources.json; fails on spills and local memory
  counters   what the CUDA kernels do on the emulated driver (instructions, memory sectors, bank conflicts) against
             benches/counters.json; fails when a cost rose by more than 2 %. --write puts the new counts into the file:
             the commit message then says why
  emulate    `cargo xtask emulate -- COMMAND`: runs a command on the emulated CUDA driver, slowly; `foveate` is built with
             its kernels first: cargo xtask emulate -- foveate demo --device cuda
  gpu-report on a machine with an NVIDIA card: device tests, benches, Nsight Compute's counters, PyTorch beside them, written
             to benches/results/<card>.md; --help tells more
  compare-cpu the processor's backend in turn with OpenVINO, ONNX Runtime and PyTorch on the same weights; --help tells more
  candle     the tests of foveate-candle, those on candle's CUDA device on the emulated CUDA driver
  toolchain  an nvcc: NVCC, CUDA_HOME or CUDA_PATH, PATH, else fetched into the target folder; prints NVCC=... and
             CUDA_HOME=... for scripts: export $(cargo xtask toolchain)
";

/// One command line and what it is for.
struct Step<'a> {
    what: &'a str,
    args: &'a [&'a str],
    env: &'a [(&'a str, &'a str)],
}

const LINT: &[Step] = &[
    Step { what: "rustfmt", args: &["fmt", "--all", "--check"], env: &[] },
    Step {
        what: "clippy",
        args: &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        env: &[],
    },
    Step {
        what: "clippy of the library alone",
        args: &["clippy", "--package", "foveate", "--lib", "--no-default-features", "--", "-D", "warnings"],
        env: &[],
    },
    // Neither needs the kernels themselves: no nvcc.
    Step {
        what: "clippy of the CUDA launchers, their tests and benches",
        args: &[
            "clippy",
            "--package",
            "foveate-device-tests",
            "--package",
            "foveate",
            "--lib",
            "--bins",
            "--tests",
            "--benches",
            "--examples",
            "--features",
            "foveate/nvtx,foveate-device-tests/emulated",
            "--",
            "-D",
            "warnings",
        ],
        env: &[("FOVEATE_NO_KERNELS", "1")],
    },
    Step {
        what: "rustdoc of the CUDA launchers",
        args: &["doc", "--package", "foveate", "--no-deps", "--features", "nvtx"],
        env: &[("RUSTDOCFLAGS", "-D warnings"), ("FOVEATE_NO_KERNELS", "1")],
    },
    Step {
        what: "rustdoc",
        args: &["doc", "--workspace", "--no-deps", "--document-private-items"],
        env: &[("RUSTDOCFLAGS", "-D warnings")],
    },
];

/// Here candle's build script has [`stand_in`] for an nvcc.
const LINT_CANDLE: &[Step] = &[Step {
    what: "clippy of candle's operations on CUDA",
    args: &[
        "clippy",
        "--package",
        "foveate-candle",
        "--all-targets",
        "--features",
        "cuda",
        "--",
        "-D",
        "warnings",
    ],
    env: &[("FOVEATE_NO_KERNELS", "1"), ("CUDA_COMPUTE_CAP", stand_in::ARCHITECTURE), (stand_in::WANTED, "")],
}];

/// The package with candle's operations, which is built with CUDA where that is possible: candle is compiled once then.
const CANDLE: &str = "foveate-candle";

/// The tests of every package that needs no nvcc, without the benches (clippy compiles them), and the documentation's examples.
/// That the library does without its default features is clippy's to say.
fn test_host(candle: bool, variables: &[(&str, OsString)]) -> bool {
    let others: &[&str] = if candle { &[] } else { &["--exclude", CANDLE] };
    let tests =
        [&["test", "--workspace", "--lib", "--bins", "--tests", "--examples", "--no-fail-fast"], others]
            .concat();
    let examples = [&["test", "--workspace", "--doc", "--no-fail-fast"], others].concat();
    let steps = [
        Step { what: "tests", args: &tests, env: &[] },
        Step { what: "documentation examples", args: &examples, env: &[] },
    ];
    run(&steps, variables)
}

/// The device tests, with the features that the command has in the step after them: all is built once for both.
const DEVICE_FEATURES: &str = "emulated,foveate/default,foveate/nvtx";

/// The emulated device runs PTX: no machine code is made, which would take as long again.
pub(crate) const ARCHS: (&str, &str) = ("FOVEATE_CUDA_ARCHS", "ptx");

/// The device tests that take longest.
const LONGEST: &[&str] =
    &["grid_norm", "matching", "model", "engine", "stems", "launches", "norm", "attention"];

/// What else needs nvcc, after the device tests, which have built the emulated driver for the command.
const TEST_KERNELS: &[Step] = &[
    Step {
        what: "unit tests of the CUDA launchers, launch_one without a driver, and the command on the emulated device",
        args: &[
            "test",
            "--package",
            "foveate",
            "--lib",
            "--bin",
            "foveate",
            "--example",
            "launch_one",
            "--test",
            "cli_cuda",
            "--features",
            "nvtx",
        ],
        env: &[ARCHS, ("FOVEATE_REQUIRE_EMULATOR", "1")],
    },
    Step {
        what: "documentation examples of the CUDA launchers",
        args: &["test", "--package", "foveate", "--doc", "--features", "nvtx"],
        env: &[ARCHS],
    },
];

/// Runs every step, also after one that failed: one run tells all that is wrong.
fn run(steps: &[Step], variables: &[(&str, OsString)]) -> bool {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut good = true;
    for step in steps {
        good &= timed(&format!("{}: cargo {}", step.what, step.args.join(" ")), step.what, || {
            let status = Command::new(&cargo)
                .args(step.args)
                .envs(step.env.iter().copied())
                .envs(variables.iter().cloned())
                .status()
                .map_err(|error| format!("cannot run cargo: {error}"))?;
            if status.success() { Ok(true) } else { Err(format!("cargo: {status}")) }
        });
    }
    good
}

/// Runs one piece of work between two lines of its own, the second one with the time it took.
fn timed(title: &str, what: &str, work: impl FnOnce() -> Result<bool, String>) -> bool {
    println!("== {title}");
    let start = Instant::now();
    let good = match work() {
        Ok(true) => true,
        Ok(false) => {
            eprintln!("xtask: {what} failed");
            false
        }
        Err(reason) => {
            eprintln!("xtask: {what} failed ({reason})");
            false
        }
    };
    println!("== {what}: {:.0} s", start.elapsed().as_secs_f64());
    good
}

fn lint() -> bool {
    let good = run(LINT, &[]);
    match env::current_exe() {
        Ok(this) => good & run(LINT_CANDLE, &[("NVCC", this.into_os_string())]),
        Err(error) => {
            eprintln!("xtask: cannot tell where this program is: {error}");
            false
        }
    }
}

fn test() -> bool {
    // Without nvcc the tests use the PTX that is stored beside its sources, and say so.
    let nvcc = match toolchain::nvcc() {
        Ok(nvcc) => nvcc,
        Err(Missing::NotFetched(reason)) => {
            eprintln!(
                "xtask: {reason}\nxtask: SKIPPED: tests that compile CUDA, and all tests of the kernels"
            );
            let first = reason.lines().next().unwrap_or_default().to_owned();
            return test_host(true, &[("EMU_NO_NVCC", first.into())]);
        }
        Err(Missing::Unusable(reason)) => {
            eprintln!("xtask: {reason}");
            return false;
        }
    };
    let variables = [("NVCC", nvcc.path.clone().into_os_string())];
    test_host(!candle::possible(), &variables)
        & test_device(&nvcc)
        & run(TEST_KERNELS, &variables)
        & (!candle::possible() || test_candle())
        & count(&nvcc, false)
}

/// The kernels on the emulated device, test programs side by side.
fn test_device(nvcc: &Nvcc) -> bool {
    let arguments = ["--package", "foveate-device-tests", "--features", DEVICE_FEATURES];
    let variables = [("NVCC", nvcc.path.clone().into_os_string()), (ARCHS.0, ARCHS.1.into())];
    let what = "the CUDA kernels on the emulated device";
    timed(what, what, || side_by_side::test(&arguments, LONGEST, &variables))
}

/// All tests of candle's operations, those on candle's CUDA device on the emulated driver.
fn test_candle() -> bool {
    let what = "candle's operations, also on the emulated device";
    timed(what, what, candle::candle)
}

/// Counts on the emulated device; without nvcc there is nothing to count.
fn counters(write: bool) -> bool {
    match toolchain::nvcc() {
        Ok(nvcc) => count(&nvcc, write),
        Err(Missing::NotFetched(reason)) => {
            eprintln!("xtask: {reason}\nxtask: SKIPPED: counting what the kernels do takes an nvcc");
            !write
        }
        Err(Missing::Unusable(reason)) => {
            eprintln!("xtask: {reason}");
            false
        }
    }
}

fn count(nvcc: &Nvcc, write: bool) -> bool {
    let version = nvcc.version.to_string();
    let mut args = vec!["run", "--quiet", "--package", "foveate-device-tests", "--features", DEVICE_FEATURES];
    args.extend(["--bin", "counters", "--", "--nvcc", &version]);
    args.extend(write.then_some("--write"));
    let step = Step { what: "counters of the CUDA kernels", args: &args, env: &[ARCHS] };
    run(&[step], &[("NVCC", nvcc.path.clone().into_os_string())])
}

fn print_toolchain() -> bool {
    match toolchain::nvcc() {
        Ok(nvcc) => {
            print!("{}", toolchain::variables(&nvcc));
            true
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            false
        }
    }
}

fn main() -> ExitCode {
    if stand_in::wanted() {
        let made = stand_in::run(&env::args_os().skip(1).collect::<Vec<_>>());
        return if made.is_ok_and(|made| made) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let task = env::args().nth(1).unwrap_or_default();
    let ok = match task.as_str() {
        "test" => test(),
        "lint" => lint(),
        "ci" => lint() & test(),
        "counters" => match env::args().skip(2).collect::<Vec<_>>().as_slice() {
            [] => counters(false),
            [write] if write == "--write" => counters(true),
            other => {
                eprintln!("xtask: counters takes --write or nothing, not {}", other.join(" "));
                return ExitCode::from(2);
            }
        },
        "resources" => resources::report().unwrap_or_else(|error| {
            eprintln!("xtask: {error}");
            false
        }),
        "emulate" => {
            let mut words = env::args_os().skip(2).peekable();
            let _ = words.next_if(|word| word == "--");
            emulate::emulate(&words.collect::<Vec<_>>()).unwrap_or_else(|error| {
                eprintln!("xtask: {error}");
                false
            })
        }
        "gpu-report" => gpu_report::run(env::args_os().skip(2)).unwrap_or_else(|error| {
            eprintln!("xtask: {error}");
            false
        }),
        "compare-cpu" => match compare_cpu::run(env::args_os().skip(2)) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("xtask: {error}");
                false
            }
        },
        "candle" => test_candle(),
        "toolchain" => print_toolchain(),
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        other => {
            eprintln!("xtask: unknown task `{other}`\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
