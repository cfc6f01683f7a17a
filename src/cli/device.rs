//! `--device`: where the model runs.

use std::{fmt, str::FromStr};

use clap::{Args, ValueEnum};
use foveate::{
    Images, Reduction,
    backend::GridBackend,
    cpu::{Cpu, Products},
    model::{AffNet, Vit, VitConfig},
};
#[cfg(feature = "cuda")]
use foveate::{
    cuda::{Cuda, DType, Engine, Forecast, patch::PixelType},
    macs::GridMacs,
};

use super::{
    failure::Failure,
    launches::Launches,
    options::Threads,
    passes::{GridPass, Incoming, Outgoing, Pass, Wanted},
};

/// Set by `cargo xtask emulate` (xtask/src/emulate.rs): the emulated driver is meant.
#[cfg(feature = "cuda")]
const EMULATED: &str = "FOVEATE_EMULATED";

/// Where to compute.
#[derive(Debug, Args)]
pub(crate) struct Device {
    /// Where to compute: auto (an NVIDIA card if there is one), cpu, cuda, or cuda:N for one of several
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto", help_heading = "Device")]
    place: Place,
    /// What weights and tokens are on a card; sums are f32 always. f16 unless given, or f32 where no f16 kernel takes the
    /// model. On the processor tokens are f32, and bf16 are the factors of products, which takes AMX; f32 unless given
    #[arg(long, value_name = "TYPE", help_heading = "Device")]
    dtype: Option<Storage>,
    /// Keep the residual stream in f32 on a card, beside weights and products of 16 bits: nearer to f32, a little slower
    #[arg(long, help_heading = "Device")]
    f32_residual: bool,
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
pub(crate) trait Runner: GridBackend + Clone {
    /// Its kind, as reports name it: `cpu` or `cuda`.
    const NAME: &'static str;

    /// Threads of the processor that compute.
    fn threads(&self) -> usize;

    /// What it is, for people.
    fn describe(&self) -> String;

    /// The type of weights and tokens.
    fn storage(&self) -> String;

    /// Bytes of one of their values.
    fn value_bytes(&self) -> u64;

    /// Whether the time that something takes says anything: the emulated driver's does not.
    fn keeps_time(&self) -> bool;

    /// Returns when everything that was begun is done.
    fn wait(&self) -> foveate::Result<()>;

    /// What a pass over `batch` images gives the device to do, told by a dry pass; nothing on the processor.
    fn launches(_model: &Vit<Self>, _method: &Reduction, _batch: usize) -> Option<foveate::Result<Launches>> {
        None
    }

    /// Runs batches of `batch` images at most and hands the results to `each` in order, the next batch on its way meanwhile.
    /// Nothing, and no image taken, on the processor, which has nobody to do that, and on a device without the room.
    fn stream(
        _model: &Vit<Self>,
        _method: &Reduction,
        _wanted: Wanted,
        _batch: usize,
        _images: Incoming<'_>,
        _each: Outgoing<'_, Pass>,
    ) -> Option<foveate::Result<()>> {
        None
    }

    /// [`Runner::launches`] of an AFFNet.
    fn grid_launches(_model: &AffNet<Self>, _batch: usize) -> Option<foveate::Result<Launches>> {
        None
    }

    /// [`Runner::stream`] of an AFFNet.
    fn stream_grid(
        _model: &AffNet<Self>,
        _wanted: Wanted,
        _batch: usize,
        _images: Incoming<'_>,
        _each: Outgoing<'_, GridPass>,
    ) -> Option<foveate::Result<()>> {
        None
    }

    /// A method made ready to be run again and again over `batch` images: what runs it once, to its end.
    fn ready<'a>(model: &'a Vit<Self>, method: &'a Reduction, batch: usize) -> foveate::Result<Ready<'a>>;
}

/// See [`Runner::ready`].
pub(crate) type Ready<'a> = Box<dyn FnMut(&Images) -> foveate::Result<()> + 'a>;

impl Runner for Cpu {
    const NAME: &'static str = "cpu";

    fn threads(&self) -> usize {
        Self::threads(self)
    }

    fn describe(&self) -> String {
        let threads = super::report::counted(Self::threads(self), "thread");
        if self.products() == Products::Bf16 { format!("{threads}, AMX") } else { threads }
    }

    fn storage(&self) -> String {
        match self.products() {
            Products::F32 => "f32".to_owned(),
            products => format!("{}, residual f32", products.name()),
        }
    }

    fn value_bytes(&self) -> u64 {
        4
    }

    fn keeps_time(&self) -> bool {
        true
    }

    fn wait(&self) -> foveate::Result<()> {
        Ok(())
    }

    fn ready<'a>(model: &'a Vit<Self>, method: &'a Reduction, _: usize) -> foveate::Result<Ready<'a>> {
        Ok(Box::new(|images| model.forward(images, method).map(drop)))
    }
}

#[cfg(feature = "cuda")]
impl Runner for Cuda {
    const NAME: &'static str = "cuda";

    fn threads(&self) -> usize {
        1
    }

    fn describe(&self) -> String {
        self.device().name().to_owned()
    }

    fn storage(&self) -> String {
        let residual = if self.has_f32_residual() { ", residual f32" } else { "" };
        format!("{}{residual}", self.dtype())
    }

    fn value_bytes(&self) -> u64 {
        self.dtype().bytes() as u64
    }

    fn keeps_time(&self) -> bool {
        !self.device().is_emulated()
    }

    fn wait(&self) -> foveate::Result<()> {
        self.synchronize()
    }

    fn launches(model: &Vit<Self>, method: &Reduction, batch: usize) -> Option<foveate::Result<Launches>> {
        let forecast = Forecast::new(model, method, batch, PixelType::U8);
        Some(forecast.map(|forecast| Launches::of(&forecast, model.config().depth)))
    }

    fn stream(
        model: &Vit<Self>,
        method: &Reduction,
        wanted: Wanted,
        batch: usize,
        images: Incoming<'_>,
        each: Outgoing<'_, Pass>,
    ) -> Option<foveate::Result<()>> {
        let mut begun = false;
        let mut run = || {
            let mut engine = Engine::new(model, method, batch, PixelType::U8)?;
            engine.stream_batches(images.inspect(|_| begun = true), |_, run| each(Pass::of_run(run, wanted)?))
        };
        unless_it_has_no_room(run(), begun)
    }

    fn grid_launches(model: &AffNet<Self>, batch: usize) -> Option<foveate::Result<Launches>> {
        let forecast = Forecast::of_affnet(model, batch, PixelType::U8);
        Some(forecast.map(|forecast| Launches::of(&forecast, GridMacs::PARTS)))
    }

    fn stream_grid(
        model: &AffNet<Self>,
        wanted: Wanted,
        batch: usize,
        images: Incoming<'_>,
        each: Outgoing<'_, GridPass>,
    ) -> Option<foveate::Result<()>> {
        let mut begun = false;
        let mut run = || {
            let mut engine = Engine::of_affnet(model, batch, PixelType::U8)?;
            engine.stream_batches(images.inspect(|_| begun = true), |_, run| {
                each(GridPass::of_run(run, wanted)?)
            })
        };
        unless_it_has_no_room(run(), begun)
    }

    fn ready<'a>(model: &'a Vit<Self>, method: &'a Reduction, batch: usize) -> foveate::Result<Ready<'a>> {
        let mut engine = Engine::new(model, method, batch, PixelType::U8)?;
        Ok(Box::new(move |images| engine.run(images)?.wait()))
    }
}

/// Nothing where an engine found no room and has taken no images: it takes more than a pass does. Where a pass does not fit
/// either, that finds the batch that would.
#[cfg(feature = "cuda")]
fn unless_it_has_no_room(outcome: foveate::Result<()>, begun: bool) -> Option<foveate::Result<()>> {
    match outcome {
        Err(error) if super::memory::out_of_memory(&error) && !begun => None,
        outcome => Some(outcome),
    }
}

/// What was chosen.
pub(crate) enum Chosen {
    /// The processor.
    Cpu(Cpu),
    /// A card.
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

/// Runs `$task` with the backend that `$device` names for a model of `$config` as `$backend`, whatever its type.
macro_rules! on_device {
    ($device:expr, $config:expr, |$backend:ident| $task:expr) => {
        match $device.start($config)? {
            $crate::cli::device::Chosen::Cpu($backend) => $task,
            #[cfg(feature = "cuda")]
            $crate::cli::device::Chosen::Cuda($backend) => $task,
        }
    };
}
pub(crate) use on_device;

impl Device {
    /// What comes before a model is read: the processor's threads, and what can be refused without knowing the model.
    pub(crate) fn prepare(&self) -> Result<(), Failure> {
        if self.place == Place::Cpu {
            self.products().check().map_err(|missing| Failure::Input(format!("--dtype bf16: {missing}")))?;
            if self.dtype == Some(Storage::F16) {
                let what = "--dtype f16: the processor computes in f32, or multiplies bf16 where it has AMX; use f32 or bf16";
                return Err(Failure::input(what));
            }
        }
        if cfg!(not(feature = "cuda")) && matches!(self.place, Place::Cuda(_)) {
            return Err(Failure::input(
                "--device cuda: this foveate was built without CUDA; build it with `cargo install foveate --features cuda`",
            ));
        }
        self.threads.start()
    }

    /// The backend asked for, for a transformer with these numbers, or any other model. What was left to choose is told on stderr: what was taken, and
    /// why.
    pub(crate) fn start<'a>(&self, config: impl Into<Option<&'a VitConfig>>) -> Result<Chosen, Failure> {
        match self.place {
            Place::Cpu => self.processor(),
            Place::Auto | Place::Cuda(_) => self.card(config.into()),
        }
    }

    /// What products are computed in on the processor.
    fn products(&self) -> Products {
        if self.dtype == Some(Storage::Bf16) { Products::Bf16 } else { Products::F32 }
    }

    fn processor(&self) -> Result<Chosen, Failure> {
        Ok(Chosen::Cpu(Cpu::new().with_products(self.products())?))
    }

    /// The processor where a card might have been: in f32 where it lacks what another type takes.
    fn instead(&self) -> Result<Chosen, Failure> {
        if self.products().check().is_ok() { self.processor() } else { Ok(Chosen::Cpu(Cpu::new())) }
    }

    /// Without CUDA there is nothing to choose from, and so nothing to tell.
    #[cfg(not(feature = "cuda"))]
    fn card(&self, _config: Option<&VitConfig>) -> Result<Chosen, Failure> {
        self.instead()
    }

    #[cfg(feature = "cuda")]
    fn card(&self, config: Option<&VitConfig>) -> Result<Chosen, Failure> {
        let automatic = self.place == Place::Auto;
        let ordinal = if let Place::Cuda(ordinal) = self.place { ordinal } else { 0 };
        let device = match open(ordinal) {
            Ok(device) => device,
            Err(reason) if automatic => return self.no_card(&reason),
            Err(reason) => return Err(Failure::Other(format!("--device {}: {reason}", self.place))),
        };
        let (dtype, why) = match (self.storage(config), self.dtype) {
            (Ok(storage), _) => storage,
            // A type that was asked for by name is not replaced.
            (Err(reason), Some(dtype)) => {
                return Err(Failure::Input(format!("--dtype {}: {reason}", DType::from(dtype))));
            }
            (Err(reason), None) if automatic => return self.no_card(&reason.to_string()),
            (Err(reason), None) => {
                return Err(Failure::Input(format!("--device {}: {reason}; use --device cpu", self.place)));
            }
        };
        match Cuda::on(&device, dtype).map(|cuda| cuda.with_f32_residual(self.f32_residual)) {
            Ok(cuda) => {
                if automatic {
                    tell(&format!("device auto: cuda:{ordinal}, {}, {dtype}{why}", device.name()));
                } else if !why.is_empty() {
                    tell(&format!("device {}: {dtype}{why}", self.place));
                }
                Ok(Chosen::Cuda(cuda))
            }
            Err(reason) if automatic => self.no_card(&reason.to_string()),
            Err(reason) => Err(Failure::Other(format!("--device {}: {reason}", self.place))),
        }
    }

    /// The processor instead of a card.
    #[cfg(feature = "cuda")]
    fn no_card(&self, reason: &str) -> Result<Chosen, Failure> {
        let chosen = self.instead()?;
        if let Chosen::Cpu(cpu) = &chosen {
            let storage = match cpu.products() {
                Products::F32 => String::new(),
                _ => format!(", {}", cpu.storage()),
            };
            tell(&format!("device auto: cpu{storage}, because {reason}"));
        }
        Ok(chosen)
    }

    /// The type of weights and tokens, and why where it is not the usual one.
    #[cfg(feature = "cuda")]
    fn storage(&self, config: Option<&VitConfig>) -> foveate::Result<(DType, String)> {
        // An AFFNet runs in every type.
        let supports = |dtype| config.map_or(Ok(()), |config| Cuda::supports(config, dtype));
        if let Some(dtype) = self.dtype {
            let dtype = DType::from(dtype);
            return supports(dtype).map(|()| (dtype, String::new()));
        }
        match supports(DType::F16) {
            Ok(()) => Ok((DType::F16, String::new())),
            Err(reason) => supports(DType::F32).map(|()| (DType::F32, format!(", because {reason}"))),
        }
    }
}

/// The card. The emulated driver is none, unless `cargo xtask emulate` has put it there: cargo puts it in front of programs
/// that it runs wherever it has built it.
#[cfg(feature = "cuda")]
fn open(ordinal: usize) -> Result<foveate::cuda::Device, String> {
    let device = foveate::cuda::Device::new(ordinal).map_err(|error| error.to_string())?;
    if !device.is_emulated() || std::env::var_os(EMULATED).is_some() {
        return Ok(device);
    }
    Err(format!(
        "the driver in front is the emulated one ({}), thousands of times slower than a card; run the built binary itself \
         instead of `cargo run`, or build with --target-dir target/gpu; if the emulated driver is meant, run `cargo xtask \
         emulate -- foveate ...`",
        device.name()
    ))
}

/// A line on stderr that is no error. If nobody listens there, nobody can be told.
#[cfg(feature = "cuda")]
fn tell(what: &str) {
    super::failure::complain(what);
}

#[cfg(feature = "cuda")]
impl From<Storage> for DType {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::F32 => Self::F32,
            Storage::F16 => Self::F16,
            Storage::Bf16 => Self::Bf16,
        }
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
