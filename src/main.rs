//! The `foveate` command: see `foveate --help`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
