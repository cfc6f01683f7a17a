//! `ptxrun CASE_DIR... [--checks LIST] [--set KEY=VALUE] [--json]`: runs case folders, prints pass or fail, the worst error and the
//! counters. Exit status: 0 all passed, 1 some failed, 2 the command line or a folder is wrong.

use cuda::case::{self, Outcome};
use cuda::config::Config;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
Runs PTX kernels on the emulated device and compares their outputs.

Usage: ptxrun [OPTIONS] CASE_DIR...

A folder without launch.json stands for all case folders in it.

  --checks LIST     levels of checks, for example uninit=off,race=warn or all=off (EMU_CHECKS)
  --set KEY=VALUE   any EMU_ setting, for example EMU_ORDER=reverse; may be repeated
  --json            one JSON object a case instead of text
  --repeat N        run each case N times and give the fastest time
  --quiet           no findings, only results
  -h, --help        this text
";

/// `println!` that ends the program quietly when its reader has gone, with the status of a broken pipe.
macro_rules! say {
    ($($text:tt)*) => {
        if writeln!(std::io::stdout(), $($text)*).is_err() {
            std::process::exit(141);
        }
    };
}

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(message) => {
            // Nobody may be reading: that changes nothing about the status.
            writeln!(std::io::stderr(), "ptxrun: {message}\n\n{HELP}").ok();
            ExitCode::from(2)
        }
    }
}

fn run(args: Vec<String>) -> Result<ExitCode, String> {
    let mut config = Config::from_env().map_err(|e| e.to_string())?;
    let (mut json, mut quiet, mut repeat) = (false, false, 1);
    let mut folders = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
            _ => (arg.clone(), None),
        };
        let mut value = || inline.clone().or_else(|| args.next()).ok_or(format!("{name} needs a value"));
        match name.as_str() {
            "--checks" => config.set("EMU_CHECKS", &value()?).map_err(|e| e.to_string())?,
            "--set" => {
                let setting = value()?;
                let (key, value) = setting.split_once('=').ok_or("--set needs KEY=VALUE")?;
                config.set(key, value).map_err(|e| e.to_string())?;
            }
            "--repeat" => repeat = value()?.parse::<u32>().map_err(|_| "--repeat needs a number")?.max(1),
            "--json" => json = true,
            "--quiet" => quiet = true,
            "-h" | "--help" => {
                say!("{}", HELP.trim_end());
                return Ok(ExitCode::SUCCESS);
            }
            _ if name.starts_with('-') => return Err(format!("unknown option {name}")),
            _ => folders.push(PathBuf::from(arg)),
        }
    }
    if folders.is_empty() {
        return Err("no case folder given".to_owned());
    }
    let mut cases = Vec::new();
    for folder in folders {
        if folder.join("launch.json").exists() {
            cases.push(folder);
            continue;
        }
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut inside: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .map(|e| e.path())
            .filter(|p| p.join("launch.json").exists())
            .collect();
        if inside.is_empty() {
            return Err(format!("{}: no launch.json here or one folder below", folder.display()));
        }
        inside.sort();
        cases.append(&mut inside);
    }
    let mut all = true;
    for folder in cases {
        let mut best: Option<Outcome> = None;
        for _ in 0..repeat {
            match case::run(&folder, config.clone()) {
                Ok(outcome) if best.as_ref().is_none_or(|b| outcome.time.1 < b.time.1) => {
                    best = Some(outcome);
                }
                Ok(_) => {}
                Err(message) => {
                    all = false;
                    if json {
                        say!("{}", serde_json::json!({ "case": folder, "pass": false, "error": message }));
                    } else {
                        say!("FAIL {}: {message}", folder.display());
                    }
                    break;
                }
            }
        }
        if let Some(outcome) = best {
            all &= outcome.passed();
            if json { print_json(&outcome, &config) } else { print_text(&outcome, quiet, &config) }
        }
    }
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_text(o: &Outcome, quiet: bool, config: &Config) {
    let c = &o.launch.counters;
    let insts: u64 = c.executed.iter().sum();
    let seconds = o.time.1.as_secs_f64();
    say!("{} {}", if o.passed() { "pass" } else { "FAIL" }, o.name);
    for c in &o.comparisons {
        let verdict =
            if c.wrong == 0 { "ok".to_owned() } else { format!("{} of {} wrong", c.wrong, c.elements) };
        say!(
            "  output {}: {verdict}, worst error {:.3e} ({:.2} of its tolerance) at {}: {} for {}",
            c.parameter,
            c.worst,
            c.worst_share,
            c.at,
            c.got_expected.0,
            c.got_expected.1
        );
    }
    if o.comparisons.is_empty() {
        say!("  no output to compare: it ran");
    }
    say!(
        "  loaded in {:.1} ms; {insts} warp instructions in {:.1} ms: {:.1} M/s",
        o.time.0.as_secs_f64() * 1e3,
        seconds * 1e3,
        insts as f64 / seconds / 1e6
    );
    say!("  {}", o.launch.counters.json(&o.launch, config));
    if !quiet {
        for finding in &o.findings {
            say!("{}", finding.trim_end());
        }
    }
}

fn print_json(o: &Outcome, config: &Config) {
    let outputs: Vec<_> = o
        .comparisons
        .iter()
        .map(|c| {
            serde_json::json!({
                "parameter": c.parameter, "elements": c.elements, "wrong": c.wrong, "worst_error": finite(c.worst),
                "worst_share_of_tolerance": finite(c.worst_share), "at": c.at,
            })
        })
        .collect();
    say!(
        "{}",
        serde_json::json!({
            "case": o.name, "pass": o.passed(), "outputs": outputs, "errors": o.errors, "findings": o.findings,
            "load_seconds": o.time.0.as_secs_f64(), "run_seconds": o.time.1.as_secs_f64(),
            "counters": o.launch.counters.json(&o.launch, config),
        })
    );
}

/// JSON has no infinity.
fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}
