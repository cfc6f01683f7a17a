//! Chores of the workspace: `cargo xtask <task>`.

use std::{
    env,
    process::{Command, ExitCode},
};

const HELP: &str = "\
cargo xtask <task>

  test    all tests: unit, documentation, golden files, command line, and the library without its default features
  lint    rustfmt, clippy and rustdoc, warnings as errors
  ci      lint, then test
";

/// One command line and what it is for.
struct Step {
    what: &'static str,
    args: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
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
    Step {
        what: "rustdoc",
        args: &["doc", "--workspace", "--no-deps", "--document-private-items"],
        env: &[("RUSTDOCFLAGS", "-D warnings")],
    },
];

const TEST: &[Step] = &[
    Step { what: "tests", args: &["test", "--workspace", "--all-targets"], env: &[] },
    Step { what: "documentation examples", args: &["test", "--workspace", "--doc"], env: &[] },
    Step {
        what: "tests of the library alone",
        args: &["test", "--package", "foveate", "--lib", "--no-default-features"],
        env: &[],
    },
];

fn run(steps: &[Step]) -> bool {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    steps.iter().all(|step| {
        println!("== {}: cargo {}", step.what, step.args.join(" "));
        match Command::new(&cargo).args(step.args).envs(step.env.iter().copied()).status() {
            Ok(status) if status.success() => true,
            Ok(status) => {
                eprintln!("xtask: {} failed ({status})", step.what);
                false
            }
            Err(error) => {
                eprintln!("xtask: cannot run cargo: {error}");
                false
            }
        }
    })
}

fn main() -> ExitCode {
    let task = env::args().nth(1).unwrap_or_default();
    let ok = match task.as_str() {
        "test" => run(TEST),
        "lint" => run(LINT),
        "ci" => run(LINT) && run(TEST),
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
