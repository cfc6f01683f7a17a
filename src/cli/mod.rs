//! The `foveate` command: arguments, dispatch, exit codes. One file per subcommand.
//!
//! Exit codes: 0 done, 2 for bad input (a file, a setting, the usage), 1 for anything else. Errors are one line each on
//! stderr, `foveate: ...`; results go to stdout, and with `--json` nothing else does.

mod affnet;
mod classify;
mod demo;
mod device;
mod embed;
mod failure;
mod info;
mod inputs;
mod labels;
mod launches;
mod measure;
mod memory;
mod options;
mod overlay;
mod passes;
mod predict;
mod profile;
mod progress;
mod report;
mod traffic;

use std::{panic, process::ExitCode};

use clap::{Parser, Subcommand, error::ErrorKind};

use failure::{Failure, complain, one_line};

const EXAMPLES: &str = "\
Start here (no files needed, the demo brings its own model and images):
  foveate demo

With a checkpoint of your own (safetensors, as timm and Hugging Face write it):
  foveate info model.safetensors
  foveate classify photos/ --weights model.safetensors --reduce tome:r=13
  foveate overlay cat.jpg --weights model.safetensors --reduce tome:r=13 -o cat.png
  foveate profile --weights model.safetensors --reduce evit:keep=0.7 --batch 8

A reduction is written METHOD:KEY=VALUE,KEY=VALUE:
  none                        all tokens, the dense model
  tome:r=13                   merge the 13 most similar pairs of tokens in every block
  tome:r=16,schedule=decreasing
                              16 on average, most of them in the first blocks: saves the most
  mctf:r=16                   merge by similarity, informativeness and size (all blocks but one)
  mctf:r=0.35                 the same for a share of the tokens, in three blocks
  evit:keep=0.7               keep the 70 % that the class token looks at, fuse the rest into one
  dynamicvit:keep=0.7         keep 70, 49 and 34 % by predictors that are part of the weights
  svite:tokens=138            keep the 138 best by a selector that is part of the weights
  bat:keep=0.7                pair up attentive tokens, cluster the others
  mstm:keep=0.7               merge inattentive tokens into attentive ones, after fusing a coarser grid

Exit codes: 0 done, 2 bad input, 1 anything else.";

/// Vision transformers that do not compute on tokens that do not matter: merge, fuse or drop tokens of a trained model
/// and see what it saves.
#[derive(Debug, Parser)]
#[command(name = "foveate", version, after_help = EXAMPLES, max_term_width = 100, propagate_version = true)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Arguments),
    Classify(classify::Arguments),
    Embed(embed::Arguments),
    Overlay(overlay::Arguments),
    Profile(profile::Arguments),
    Info(info::Arguments),
}

/// Runs the command; what `main` returns.
pub(crate) fn main() -> ExitCode {
    // A panic is a bug of ours: say so in one line. The decoders' panics are caught and reported per image, so the hook
    // stays silent unless someone asks for a back-trace.
    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |information| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            default_hook(information);
        }
    }));
    match panic::catch_unwind(run) {
        Ok(Ok(()) | Err(Failure::ClosedPipe)) => ExitCode::SUCCESS,
        Ok(Err(Failure::Reported)) => ExitCode::from(2),
        Ok(Err(Failure::Input(what))) => {
            complain(&what);
            ExitCode::from(2)
        }
        Ok(Err(Failure::Other(what))) => {
            complain(&what);
            ExitCode::FAILURE
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown cause");
            complain(&format!("internal error, please report it: {text}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match cli.command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Classify(arguments) => classify::run(&arguments),
        Command::Embed(arguments) => embed::run(&arguments),
        Command::Overlay(arguments) => overlay::run(&arguments),
        Command::Profile(arguments) => profile::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
    }
}

/// Help and version as clap prints them; a mistake in the usage as one line.
fn usage(error: &clap::Error) -> Result<(), Failure> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(error.print()?),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Nothing was asked: the help is the answer, and still not a success.
            let _ = error.print();
            Err(Failure::Reported)
        }
        _ => Err(Failure::Input(usage_line(&error.render().to_string()))),
    }
}

/// The sentence of clap's message, without its layout, and where to read on.
fn usage_line(message: &str) -> String {
    let mut what = String::new();
    let mut help = "try 'foveate --help'".to_owned();
    for line in message.lines().map(str::trim) {
        if let Some(usage) = line.strip_prefix("Usage: ") {
            let words: Vec<&str> = usage.split_whitespace().take(2).collect();
            if let [name, command] = words[..]
                && command.chars().all(|c| c.is_ascii_lowercase())
            {
                help = format!("try '{name} {command} --help'");
            }
            break;
        }
        if line.starts_with("For more information") {
            break;
        }
        let line = line.strip_prefix("error: ").unwrap_or(line);
        if !line.is_empty() {
            // The sentence, a list after a colon, a tip.
            what.push_str(match what.chars().last() {
                None => "",
                Some(':') => " ",
                Some(_) if line.starts_with("tip:") => "; ",
                Some(_) => ", ",
            });
            what.push_str(line);
        }
    }
    one_line(&format!("{what}; {help}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mistakes_in_the_usage_are_one_line() {
        let error = Cli::try_parse_from(["foveate", "classify", "a.png"]).unwrap_err();
        let line = usage_line(&error.render().to_string());
        assert!(line.contains("--weights") && line.ends_with("try 'foveate classify --help'"), "{line}");
        assert!(!line.contains('\n'));
        let error = Cli::try_parse_from(["foveate", "clasify"]).unwrap_err();
        let line = usage_line(&error.render().to_string());
        assert!(line.contains("clasify") && line.ends_with("try 'foveate --help'"), "{line}");
    }
}
