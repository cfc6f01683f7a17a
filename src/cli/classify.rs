//! `foveate classify`: what is in the pictures.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use foveate::{Reduction, Tensor, image::Transform, reduction::token_counts};
use serde_json::{Value, json};

use super::{
    affnet,
    device::{Device, Runner, on_device},
    failure::Failure,
    inputs::{Batches, Rejected, expand, verdict},
    labels,
    options::{BatchSize, Loaded, Model, ModelSettings, Sources},
    passes::{Wanted, through},
    predict::{Guess, guesses, require_classifier},
    progress::Progress,
    report::{JsonStream, errors_json, percent, three_digits},
};

const EXAMPLES: &str = "\
Examples:
  foveate classify cat.jpg --weights deit_small.safetensors
  foveate classify photos/ 'more/**/*.png' --weights deit_small.safetensors -r tome:r=13 --top 1
  foveate classify photos/ --weights m.safetensors --labels imagenet.txt --json > result.json

JSON: command, version, weights, reduction, tokens (entering block 0 and leaving each block; none of an AFFNet), images: [{image, \
predictions: [{class, label, probability}]}], errors: [{image, error}], seconds and images_per_second (without \
decoding; on a card that has four batches or more to do, decoding goes on meanwhile and counts where it is waited for).";

/// Name the likeliest classes of pictures.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Class names: a text file with one a line, or a JSON list or object
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// How tokens are reduced, such as tome:r=13 (see 'foveate --help')
    #[arg(short, long, value_name = "SPEC", default_value = "none")]
    reduce: String,
    /// Classes to name per picture
    #[arg(short = 'k', long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    /// Print JSON and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    batch: BatchSize,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    settings: ModelSettings,
}

/// Where the results go.
enum Sink {
    Json(JsonStream),
    Text { out: io::Stdout, top: usize },
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.device.prepare()?;
    let reduction: Reduction = arguments.reduce.parse()?;
    let overrides = arguments.settings.overrides()?;
    let paths = expand(&arguments.sources.images)?;
    if let Some(affnet) = affnet::open(&arguments.sources.weights, &overrides)? {
        return affnet.classify(arguments, &reduction, &paths);
    }
    let loaded = Loaded::open(&arguments.sources.weights, &overrides)?;
    on_device!(arguments.device, &loaded.config, |backend| {
        run_on(arguments, &reduction, &paths, &loaded.on(backend)?)
    })
}

fn run_on<B: Runner>(
    arguments: &Arguments,
    reduction: &Reduction,
    paths: &[PathBuf],
    model: &Model<B>,
) -> Result<(), Failure> {
    require_classifier(model)?;
    model.check(reduction)?;
    let config = model.config();
    let task = Task {
        file: &model.file,
        classes: config.classes,
        labels: config.labels.as_deref(),
        transform: &config.transform,
        image: config.image,
        tokens: token_counts(reduction, config.tokens(), &model.vit.host()),
    };
    with(arguments, reduction, paths, &task, |batches, each| {
        through(&model.vit, reduction, Wanted::Logits, batches, |names, pass| {
            each(names, &pass.logits.ok_or_else(|| Failure::input("the model has no head"))?)
        })
    })
}

/// What there is to know of a classifier.
pub(crate) struct Task<'a> {
    /// The checkpoint as messages name it.
    pub(crate) file: &'a str,
    /// How many classes there are.
    pub(crate) classes: usize,
    /// Their names, if the checkpoint brings them.
    pub(crate) labels: Option<&'a [String]>,
    /// How pictures become inputs.
    pub(crate) transform: &'a Transform,
    /// Of this height and width.
    pub(crate) image: [usize; 2],
    /// Tokens entering block 0 and leaving each block.
    pub(crate) tokens: Vec<usize>,
}

/// What takes the logits of a batch, with the pictures' names.
pub(crate) type Each<'a> = dyn FnMut(&[String], &Tensor) -> Result<(), Failure> + 'a;

/// Classifies by what `infer` makes of batches, and says how long it took.
pub(crate) fn with(
    arguments: &Arguments,
    reduction: &Reduction,
    paths: &[PathBuf],
    task: &Task<'_>,
    infer: impl FnOnce(&mut Batches<'_>, &mut Each<'_>) -> Result<Duration, Failure>,
) -> Result<(), Failure> {
    let named = match &arguments.labels {
        Some(file) => Some(labels::read(file, task.classes, task.file)?),
        None => None,
    };
    let labels = named.as_deref().or(task.labels);
    let top = usize::from(arguments.top).min(task.classes);
    let mut sink = if arguments.json {
        Sink::Json(JsonStream::begin(&head(arguments, reduction, &task.tokens))?)
    } else {
        Sink::Text { out: io::stdout(), top }
    };
    let progress = Progress::bar(paths.len(), "images");
    let mut batches = Batches::new(paths, (task.transform, task.image), arguments.batch.get(), &progress);
    let mut count = 0;
    let took = infer(&mut batches, &mut |names, logits| {
        count += names.len();
        progress.aside(|| sink.write(names, &guesses(logits, top), labels))
    })?;
    let (rejected, seconds) = (batches.rejected, took.as_secs_f64());
    progress.finish();
    if let Sink::Json(stream) = sink {
        stream.end(&tail(&rejected, seconds, count))?;
    } else if count > 1 && io::IsTerminal::is_terminal(&io::stderr()) {
        let rate = three_digits(rate(seconds, count));
        let _ = writeln!(
            io::stderr(),
            "{count} images, {rate} images/s without decoding (reduction: {reduction})"
        );
    }
    verdict(&rejected)
}

impl Arguments {
    /// Where to compute.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

impl Sink {
    fn write(
        &mut self,
        names: &[String],
        guesses: &[Vec<Guess>],
        labels: Option<&[String]>,
    ) -> Result<(), Failure> {
        match self {
            Self::Json(stream) => {
                for (name, guesses) in names.iter().zip(guesses) {
                    let predictions: Vec<Value> = guesses.iter().map(|guess| guess.json(labels)).collect();
                    stream.image(&json!({"image": name, "predictions": predictions}))?;
                }
                stream.flush()
            }
            Self::Text { out, top } => {
                let mut out = out.lock();
                for (name, guesses) in names.iter().zip(guesses) {
                    let line =
                        |guess: &Guess| format!("{:>7}  {}", percent(guess.probability), guess.name(labels));
                    if *top == 1 {
                        writeln!(
                            out,
                            "{name}  {}",
                            guesses.first().map(line).unwrap_or_default().trim_start()
                        )?;
                        continue;
                    }
                    writeln!(out, "{name}")?;
                    for guess in guesses {
                        writeln!(out, "  {}", line(guess))?;
                    }
                }
                Ok(out.flush()?)
            }
        }
    }
}

fn head(arguments: &Arguments, reduction: &Reduction, tokens: &[usize]) -> Value {
    json!({
        "command": "classify",
        "version": env!("CARGO_PKG_VERSION"),
        "weights": arguments.sources.weights.display().to_string(),
        "reduction": reduction.to_string(),
        "tokens": tokens,
    })
}

fn tail(rejected: &[Rejected], seconds: f64, count: usize) -> Value {
    json!({
        "errors": errors_json(rejected),
        "seconds": seconds,
        "images_per_second": rate(seconds, count),
    })
}

fn rate(seconds: f64, count: usize) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}
