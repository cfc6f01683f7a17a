//! Arguments that several subcommands share, and what they turn into.

use std::path::{Path, PathBuf};

use clap::Args;
use foveate::{
    Reduction, Tensor,
    backend::Backend,
    image::Transform,
    model::{Vit, VitConfig, VitParams},
    reduction::Method,
    weights::{Checkpoint, ConfigFile, Family, LoadedVit, Overrides, load_vit},
};

use super::{
    device::Runner,
    failure::Failure,
    memory::{no_room_for_weights, out_of_memory},
    progress::Progress,
};

/// What is looked at, and with what.
#[derive(Debug, Args)]
pub(crate) struct Sources {
    /// Image files, folders (all image files in them) or patterns such as 'val/*/*.JPEG'
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,
    /// Checkpoint in safetensors form; a config.json beside it is read too
    #[arg(short, long, value_name = "FILE")]
    pub(crate) weights: PathBuf,
}

/// How a checkpoint is read.
#[derive(Debug, Args)]
pub(crate) struct ModelSettings {
    /// Input size of the model, such as 224 or 224x320 (height x width); positions are resampled to fit
    #[arg(long, value_name = "SIZE", help_heading = "Model")]
    image_size: Option<String>,
    /// Set what the checkpoint does not say, such as heads=6 or mean=0.5,0.5,0.5 (repeatable; a wrong key lists all
    /// keys)
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Model")]
    set: Vec<String>,
}

impl ModelSettings {
    /// What outranks the checkpoint's own numbers.
    pub(crate) fn overrides(&self) -> Result<Overrides, Failure> {
        let mut overrides = Overrides::default();
        for assignment in &self.set {
            overrides.set(assignment)?;
        }
        if let Some(size) = &self.image_size {
            overrides.set(&format!("image={size}"))?;
        }
        Ok(overrides)
    }
}

/// Threads.
#[derive(Debug, Args)]
pub(crate) struct Threads {
    /// Threads of the processor to compute with, by default one per core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Threads {
    /// Starts the threads, which everything in the process (decoding, reading weights, computing) uses.
    pub(crate) fn start(&self) -> Result<(), Failure> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(usize::from(threads))
                .build_global()
                .map_err(|e| Failure::Other(format!("cannot start {threads} threads: {e}")))?;
        }
        Ok(())
    }
}

/// Images per forward pass.
#[derive(Debug, Args)]
pub(crate) struct BatchSize {
    /// Images per forward pass: larger is faster up to a point and takes more memory
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
}

impl BatchSize {
    /// The number, at least 1.
    pub(crate) fn get(&self) -> usize {
        usize::from(self.batch)
    }
}

/// Reads reductions from their specifications.
pub(crate) fn reductions(specs: &[String]) -> Result<Vec<Reduction>, Failure> {
    specs.iter().map(|spec| Ok(spec.parse()?)).collect()
}

/// A checkpoint that has been read, and goes to no device yet: which one suits it depends on what it is.
pub(crate) struct Loaded {
    /// The checkpoint as messages name it.
    pub(crate) file: String,
    /// The model's numbers.
    pub(crate) config: VitConfig,
    /// Its parameters.
    pub(crate) params: VitParams<Tensor>,
    family: Family,
}

impl Loaded {
    /// Opens a checkpoint, with the configuration that lies beside it.
    pub(crate) fn open(weights: &Path, overrides: &Overrides) -> Result<Self, Failure> {
        let progress = Progress::spinner("reading the weights");
        let checkpoint = Checkpoint::open(weights)?;
        let LoadedVit { config, params, family, .. } =
            load_vit(&checkpoint, ConfigFile::beside(weights)?.as_ref(), overrides)?;
        progress.finish();
        Ok(Self { file: weights.display().to_string(), config, params, family })
    }

    /// The model on a device.
    pub(crate) fn on<B: Runner>(self, backend: B) -> Result<Model<B>, Failure> {
        let Self { file, config, params, family } = self;
        Ok(Model { vit: vit(backend, config, params)?, file, family })
    }
}

/// A model on a device; weights that it has no room for are an error that says so.
pub(crate) fn vit<B: Runner>(
    backend: B,
    config: VitConfig,
    params: VitParams<Tensor>,
) -> Result<Vit<B>, Failure> {
    Vit::new(backend, config, params)
        .map_err(|error| if out_of_memory(&error) { no_room_for_weights(&error) } else { error.into() })
}

/// A model and what is known about the file it came from.
pub(crate) struct Model<B: Backend> {
    /// The model.
    pub(crate) vit: Vit<B>,
    /// The checkpoint as messages name it.
    pub(crate) file: String,
    /// Who wrote it.
    pub(crate) family: Family,
}

impl<B: Backend> Model<B> {
    /// The model's numbers.
    pub(crate) fn config(&self) -> &VitConfig {
        self.vit.config()
    }

    /// How pictures become inputs, and of which height and width.
    pub(crate) fn input(&self) -> (&Transform, [usize; 2]) {
        (&self.config().transform, self.config().image)
    }

    /// Whether the head is CLIP's projection rather than a classifier.
    pub(crate) fn is_clip(&self) -> bool {
        self.family.is_clip()
    }

    /// Whether `reduction` suits the model, before any image is read.
    pub(crate) fn check(&self, reduction: &Reduction) -> Result<(), Failure> {
        Ok(reduction.check(&self.vit.host())?)
    }
}

/// Refuses to write over a file that is being read.
pub(crate) fn refuse_overwriting<'a>(
    output: &Path,
    inputs: impl Iterator<Item = &'a PathBuf>,
) -> Result<(), Failure> {
    let Ok(output) = output.canonicalize() else { return Ok(()) };
    for input in inputs {
        if output.is_file() && input.canonicalize().is_ok_and(|input| input == output) {
            return Err(Failure::Input(format!(
                "{}: is an input; write the output to another file",
                input.display()
            )));
        }
    }
    Ok(())
}
