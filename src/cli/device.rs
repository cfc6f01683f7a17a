//! `--device`: where the model runs.

use std::{fmt, str::FromStr};

use clap::{Args, ValueEnum};
use foveate::{backend::Backend, cpu::Cpu};

use super::{failure::Failure, options::Threads};

/// Where to compute.
#[derive(Debug, Args)]
pub(crate) struct Device {
    /// Where to compute: auto (an NVIDIA card if there is one), cpu, cuda, or cuda:N for one of several
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto", help_heading = "Device")]
    place: Place,
    /// What weights and tokens are on a card; sums are f32 always, and so is everything on the processor. f16 unless given
    #[arg(long, value_name = "TYPE", help_heading = "Device")]
    dtype: Option<Storage>,
    #[command(flatten)]
    threads: Threads,
}

/// What `--device` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is not the number of a card"));
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:") {
                Some(ordinal) => Ok(Self::Cuda(number(ordinal)?)),
                None => Err("use auto, cpu, cuda, or cuda:N".to_owned()),
            },
        }
    }
}

/// What `--dtype` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Storage {
    /// Single precision
    F32,
    /// Half precision
    F16,
    /// Half precision with the range of f32
    Bf16,
}

/// A backend that the command runs on.
pub(crate) trait Runner: Backend + Clone {
    /// Its kind, as reports name it: `cpu` or `cuda`.
    const NAME: &'static str;

    /// Threads of the processor that compute.
    fn threads(&self) -> usize;

    /// What it is, for people.
    fn describe(&self) -> String;

    /// The type of weights and tokens.
    fn storage(&self) -> String;

    /// Returns when everything that was begun is done.
    fn wait(&self) -> foveate::Result<()>;
}

impl Runner for Cpu {
    const NAME: &'static str = "cpu";

    fn threads(&self) -> usize {
        Self::threads(self)
    }

    fn describe(&self) -> String {
        super::report::counted(Self::threads(self), "thread")
    }

    fn storage(&self) -> String {
        "f32".to_owned()
    }

    fn wait(&self) -> foveate::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Runner for foveate::cuda::Cuda {
    const NAME: &'static str = "cuda";

    fn threads(&self) -> usize {
        1
    }

    fn describe(&self) -> String {
        self.device().name().to_owned()
    }

    fn storage(&self) -> String {
        self.dtype().to_string()
    }

    fn wait(&self) -> foveate::Result<()> {
        self.synchronize()
    }
}

/// What was chosen.
pub(crate) enum Chosen {
    /// The processor.
    Cpu(Cpu),
    /// A card.
    #[cfg(feature = "cuda")]
    Cuda(foveate::cuda::Cuda),
}

/// Runs `$task` with the backend that `$device` names as `$backend`, whatever its type.
macro_rules! on_device {
    ($device:expr, |$backend:ident| $task:expr) => {
        match $device.start()? {
            $crate::cli::device::Chosen::Cpu($backend) => $task,
            #[cfg(feature = "cuda")]
            $crate::cli::device::Chosen::Cuda($backend) => $task,
        }
    };
}
pub(crate) use on_device;

impl Device {
    /// The backend asked for. `auto` tells on stderr what it took and why, where there was a choice.
    pub(crate) fn start(&self) -> Result<Chosen, Failure> {
        let cpu = self.threads.start()?;
        if self.place == Place::Cpu {
            return match self.dtype {
                None | Some(Storage::F32) => Ok(Chosen::Cpu(cpu)),
                Some(_) => Err(Failure::input("--dtype: the processor computes in f32; leave it out")),
            };
        }
        self.card(cpu)
    }

    #[cfg(not(feature = "cuda"))]
    fn card(&self, cpu: Cpu) -> Result<Chosen, Failure> {
        match self.place {
            Place::Cuda(_) => Err(Failure::input(
                "--device cuda: this foveate was built without CUDA; build it with `cargo install foveate --features cuda`",
            )),
            // There is nothing to choose from, and so nothing to tell.
            Place::Auto | Place::Cpu => Ok(Chosen::Cpu(cpu)),
        }
    }

    #[cfg(feature = "cuda")]
    fn card(&self, cpu: Cpu) -> Result<Chosen, Failure> {
        use std::io::Write;

        use foveate::cuda::{Cuda, DType};

        let dtype = match self.dtype {
            Some(Storage::F32) => DType::F32,
            Some(Storage::F16) | None => DType::F16,
            Some(Storage::Bf16) => DType::Bf16,
        };
        let automatic = self.place == Place::Auto;
        let ordinal = if let Place::Cuda(ordinal) = self.place { ordinal } else { 0 };
        let (chosen, why) = match Cuda::new(ordinal, dtype) {
            Ok(cuda) => {
                let why = format!("cuda:{ordinal}, {}, {dtype}", cuda.describe());
                (Chosen::Cuda(cuda), why)
            }
            Err(error) if automatic => (Chosen::Cpu(cpu), format!("cpu, because {error}")),
            Err(error) => return Err(Failure::Other(format!("--device {}: {error}", self.place))),
        };
        if automatic {
            // If nobody listens there, nobody can be told.
            let _ = writeln!(std::io::stderr(), "foveate: device auto: {}", super::failure::one_line(&why));
        }
        Ok(chosen)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        assert_eq!("auto".parse(), Ok(Place::Auto));
        assert_eq!("cuda".parse(), Ok(Place::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(Place::Cuda(3)));
        assert!("cuda:x".parse::<Place>().unwrap_err().contains("`x`"));
        assert!("gpu".parse::<Place>().unwrap_err().contains("use auto, cpu"));
    }
}
