//! Launches one operation on one shape, for Nsight Compute and Nsight Systems (docs/profiling.md).
//!
//! ```sh
//! cargo build --release --example launch_one --features cuda
//! ncu --set full target/release/examples/launch_one merge --dtype f16 --batch 64 --tokens 197 --width 384
//! ```

#[path = "../benches/launches/mod.rs"]
#[allow(dead_code, unreachable_pub, reason = "the launches serve the counters and the benches too")]
mod launches;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use cudarc::driver::Profiler;
use foveate::{
    Error, Result,
    cuda::{DType, Device},
};
use launches::{Case, OPERATIONS, Place, Shape};

/// The command line was not understood.
const USAGE: u8 = 2;
/// There is no driver, or it refused something.
const FAILED: u8 = 1;

/// Tensors are filled on the processor: no row is longer, and there are no more of them.
const LARGEST_ROW: usize = 8192;
const MOST_ROWS: usize = 1 << 19;

const HELP: &str = "\
launch_one OPERATION [--dtype f16|bf16|f32] [--batch N] [--tokens N] [--width N] [--heads N] [--times N] [--device N]

  Launches the operation once to warm up, then --times times between cuProfilerStart and cuProfilerStop.
  Without options: f16 (or the operation's only type), 64 images of 197 tokens of 384 values in 6 heads, 10 times.
";

/// What to say, and the exit code.
#[derive(Debug)]
struct Failure {
    code: u8,
    what: String,
}

impl Failure {
    fn usage(what: impl Into<String>) -> Self {
        Self { code: USAGE, what: what.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { code: FAILED, what: error.to_string() }
    }
}

struct Arguments {
    case: Case,
    times: usize,
    device: usize,
}

/// All operations by name.
fn names() -> String {
    let names = OPERATIONS.iter().flat_map(|(_, operations)| *operations).map(|operation| operation.name);
    names.collect::<Vec<_>>().join(", ")
}

fn arguments(mut words: impl Iterator<Item = String>) -> std::result::Result<Arguments, Failure> {
    let name = words.next().unwrap_or_default();
    let operation = launches::operation(&name).ok_or_else(|| {
        Failure::usage(format!("`{name}` is no operation; there are {}\n\n{HELP}", names()))
    })?;
    let mut shape = Shape { batch: 64, tokens: 197, width: 384, heads: 6 };
    let (mut dtype, mut times, mut device) = (operation.types[0], 10, 0);
    while let Some(option) = words.next() {
        let value =
            words.next().ok_or_else(|| Failure::usage(format!("{option} needs a value\n\n{HELP}")))?;
        let number = |least: usize| {
            let number = value.parse().ok().filter(|&n| n >= least);
            number.ok_or_else(|| {
                Failure::usage(format!("{option} is `{value}`, expected a whole number of at least {least}"))
            })
        };
        match option.as_str() {
            "--dtype" => {
                let types = operation.types.iter().map(DType::to_string).collect::<Vec<_>>();
                let at = types.iter().position(|name| *name == value);
                dtype = operation.types[at.ok_or_else(|| {
                    Failure::usage(format!("{name} has no type `{value}`, only {}", types.join(", ")))
                })?];
            }
            "--batch" => shape.batch = number(1)?,
            "--tokens" => shape.tokens = number(1)?,
            "--width" => shape.width = number(1)?,
            "--heads" => shape.heads = number(1)?,
            "--times" => times = number(1)?,
            "--device" => device = number(0)?,
            other => return Err(Failure::usage(format!("unknown option `{other}`\n\n{HELP}"))),
        }
    }
    let Shape { batch, tokens, width, heads } = shape;
    if width.max(heads) > LARGEST_ROW || batch.checked_mul(tokens).is_none_or(|rows| rows > MOST_ROWS) {
        return Err(Failure::usage(format!(
            "{batch} images of {tokens} tokens, {width} wide with {heads} heads, are too many: at most {MOST_ROWS} tokens in \
             all, {LARGEST_ROW} wide"
        )));
    }
    Ok(Arguments { case: Case { operation, dtype, shape }, times, device })
}

/// Reads the command line, opens the device and launches.
fn run(
    words: impl Iterator<Item = String>,
    open: impl FnOnce(usize) -> Result<Device>,
    out: &mut impl Write,
) -> std::result::Result<(), Failure> {
    let mut words = words.peekable();
    if words.peek().is_some_and(|word| ["-h", "--help"].contains(&word.as_str())) {
        // A closed pipe is the reader's affair.
        let _ = write!(out, "{HELP}\nOperations: {}\n", names());
        return Ok(());
    }
    let Arguments { case, times, device } = arguments(words)?;
    let place = Place::new(open(device)?)?;
    let mut launch = case.prepare(&place)?;
    launch.run()?;
    place.synchronize()?;
    let profile = Profiler::new()
        .map_err(|error| Failure { code: FAILED, what: format!("cuProfilerStart: {error:?}") })?;
    (0..times).try_for_each(|_| launch.run())?;
    place.synchronize()?;
    drop(profile);
    let work = launch.work;
    let _ = writeln!(
        out,
        "{case} on {}: launched once and {times} times; each must move {} bytes and do {} operations in products",
        place.device.name(),
        work.bytes,
        work.flops
    );
    Ok(())
}

fn main() -> ExitCode {
    match run(env::args().skip(1), Device::new, &mut io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("launch_one: {}", failure.what.trim_end());
            ExitCode::from(failure.code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_driver(line: &str) -> Failure {
        let none = |_| Err(Error::NoDriver { what: "libcuda.so cannot be loaded".to_owned() });
        run(line.split_whitespace().map(str::to_owned), none, &mut io::sink()).unwrap_err()
    }

    #[test]
    fn without_a_driver_it_says_so_and_fails() {
        for (_, operations) in OPERATIONS {
            for operation in *operations {
                let failure = without_driver(operation.name);
                assert_eq!(failure.code, FAILED);
                assert_eq!(failure.what, "there is no CUDA driver: libcuda.so cannot be loaded");
            }
        }
    }

    #[test]
    fn a_command_line_is_read() {
        let line = "merge --dtype bf16 --batch 3 --tokens 50 --width 192 --heads 4 --times 7 --device 1";
        let Ok(Arguments { case, times, device }) = arguments(line.split(' ').map(str::to_owned)) else {
            panic!("refused");
        };
        assert_eq!((case.to_string().as_str(), times, device), ("merge/b3n50c192h4/bf16", 7, 1));
    }

    #[test]
    fn what_cannot_be_read_is_named_with_what_can() {
        for (line, told) in [
            ("", "`` is no operation; there are "),
            ("conv", "`conv` is no operation; there are "),
            ("merge --dtype f64", "merge has no type `f64`, only f16, bf16, f32"),
            ("compose --dtype f16", "compose has no type `f16`, only f32"),
            ("merge --batch 0", "--batch is `0`, expected a whole number of at least 1"),
            ("merge --tokens many", "--tokens is `many`, expected"),
            ("merge --tokens", "--tokens needs a value"),
            (
                "merge --batch 1000000 --tokens 1000000",
                "1000000 images of 1000000 tokens, 384 wide with 6 heads, are too",
            ),
            ("merge --width 18446744073709551615", "64 images of 197 tokens, 18446744073709551615 wide"),
            ("select --heads 10000", "64 images of 197 tokens, 384 wide with 10000 heads, are too many"),
            ("merge --speed 3", "unknown option `--speed`"),
        ] {
            let failure = without_driver(line);
            assert_eq!(failure.code, USAGE, "{line}");
            assert!(failure.what.starts_with(told), "{line}: {}", failure.what);
        }
    }

    #[test]
    fn help_needs_no_driver_and_names_the_operations() {
        let mut text = Vec::new();
        let none = |_| panic!("help opens no device");
        run(["--help".to_owned()].into_iter(), none, &mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("merge, unmerge"));
    }
}
