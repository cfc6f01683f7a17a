//! `foveate embed`: features of pictures into a safetensors file.

mod affnet;
mod file;

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use foveate::{Reduction, Tensor, backend::Backend, image::Transform, reduction::token_counts};
use serde_json::json;

use super::{
    device::{Device, Runner, on_device},
    failure::Failure,
    inputs::{Batches, expand, verdict},
    options::{BatchSize, Loaded, Model, ModelSettings, Sources, refuse_overwriting},
    passes::{Details, Pass, Wanted, through},
    progress::Progress,
    report::{counted, errors_json, write_json},
};
use file::{EmbeddingFile, Part, Values};

const EXAMPLES: &str = "\
Examples:
  foveate embed photos/ --weights dinov2_small.safetensors -o features.safetensors
  foveate embed photos/ --weights dinov2_small.safetensors -r tome:r=8 --unmerge -o f.safetensors

The file holds, for I images, M final patch tokens (all patches without a reduction) and width C:
  features    F32 (I, F)     what a classifier would read: class token, mean of patches, or both
  class       F32 (I, C)     the class token after the last LayerNorm, where there is one
  embedding   F32 (I, P)     the projection, where the model is a CLIP tower
  patches     F32 (I, M, C)  the patch tokens; after --unmerge (I, rows, columns, C), dropped ones 0
  sizes       F32 (I, M)     after a reduction: how many patches each token stands for
  source_map  I32 (I, rows, columns)
                             after a reduction: each patch's token, -1 where it was dropped
Of an AFFNet, for feature maps of C channels:
  map         F32 (I, rows, columns, C)
                             what the last stage gives
  features    F32 (I, F)     what the classifier reads
Its __metadata__ has images (a JSON list of the files, in order), weights, reduction, grid and version.";

/// Write the features of pictures to a safetensors file.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// How tokens are reduced, such as tome:r=13 (see 'foveate --help')
    #[arg(short, long, value_name = "SPEC", default_value = "none")]
    reduce: String,
    /// Spread the tokens back over the grid of patches, for dense prediction
    #[arg(long)]
    unmerge: bool,
    /// Print a JSON summary and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    batch: BatchSize,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    settings: ModelSettings,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.device.prepare()?;
    let reduction: Reduction = arguments.reduce.parse()?;
    let overrides = arguments.settings.overrides()?;
    let paths = expand(&arguments.sources.images)?;
    refuse_overwriting(&arguments.output, paths.iter().chain([&arguments.sources.weights]))?;
    if let Some(opened) = super::affnet::open(&arguments.sources.weights, &overrides)? {
        return affnet::run(arguments, &reduction, &paths, opened);
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
    model.check(reduction)?;
    let task = Task {
        reduction,
        tokens: token_counts(reduction, model.config().tokens(), &model.vit.host()),
        grid: model.config().grid(),
        parts: parts(model, reduction, arguments.unmerge),
        input: model.input(),
    };
    write(arguments, paths, &task, |batches, each| {
        through(&model.vit, reduction, Wanted::Everything, batches, |names, pass| {
            let extract = Extract::new(model, pass)?;
            each(names, &|part| extract.values(part))
        })
    })
}

/// What goes into the file, whatever the model is.
struct Task<'a> {
    reduction: &'a Reduction,
    /// Entering block 0 and leaving each block; none where there are none.
    tokens: Vec<usize>,
    grid: [usize; 2],
    /// The tensors, the largest first.
    parts: Vec<Part>,
    input: (&'a Transform, [usize; 2]),
}

/// Takes the pictures of a batch and what says what goes into each tensor of them.
type Each<'a> =
    &'a mut dyn FnMut(&[String], &dyn Fn(&Part) -> Result<Values, Failure>) -> Result<(), Failure>;

/// Writes the file: `run` takes all batches through the model.
fn write(
    arguments: &Arguments,
    paths: &[PathBuf],
    task: &Task<'_>,
    run: impl FnOnce(&mut Batches<'_>, Each<'_>) -> Result<Duration, Failure>,
) -> Result<(), Failure> {
    let all_names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let notes = |images: &[String]| notes(arguments, task, images);
    let parts = &task.parts;
    let mut file = EmbeddingFile::create(&arguments.output, parts.clone(), paths.len(), &notes(&all_names))?;
    let mut names = Vec::new();
    let progress = Progress::bar(paths.len(), "images");
    let mut batches = Batches::new(paths, task.input, arguments.batch.get(), &progress);
    run(&mut batches, &mut |batch, values| {
        for part in parts {
            file.write(part.name, &values(part)?)?;
        }
        names.extend_from_slice(batch);
        Ok(())
    })?;
    let rejected = batches.rejected;
    progress.finish();
    if names.is_empty() {
        // Dropping the file takes it away again; every image has been reported.
        return verdict(&rejected);
    }
    let shapes = file.finish(names.len(), &notes(&names))?;
    if arguments.json {
        let tensors: serde_json::Map<_, _> = shapes
            .iter()
            .map(|(part, shape)| (part.name.to_owned(), json!({"dtype": part.dtype(), "shape": shape})))
            .collect();
        write_json(&json!({
            "command": "embed",
            "version": env!("CARGO_PKG_VERSION"),
            "weights": arguments.sources.weights.display().to_string(),
            "reduction": task.reduction.to_string(),
            "tokens": task.tokens,
            "output": arguments.output.display().to_string(),
            "tensors": tensors,
            "images": names,
            "errors": errors_json(&rejected),
        }))?;
    } else {
        let mut out = io::stdout().lock();
        writeln!(out, "{}: {}", arguments.output.display(), counted(names.len(), "image"))?;
        for (part, shape) in &shapes {
            let extents: Vec<String> = shape.iter().map(ToString::to_string).collect();
            writeln!(out, "  {:<10}  {}  ({})", part.name, part.dtype(), extents.join(", "))?;
        }
    }
    verdict(&rejected)
}

/// The tensors of the file, the largest first.
fn parts<B: Backend>(model: &Model<B>, reduction: &Reduction, unmerge: bool) -> Vec<Part> {
    let config = model.config();
    let (c, [rows, columns]) = (config.width, config.grid());
    let left = token_counts(reduction, config.tokens(), &model.vit.host()).last().copied();
    let tokens = left.unwrap_or(config.tokens()) - config.special_tokens();
    let features = if config.readout == foveate::model::Readout::ClassAndMean { 2 * c } else { c };
    let patches = if unmerge { vec![rows, columns, c] } else { vec![tokens, c] };
    let mut parts = vec![Part::new("patches", patches)];
    parts.push(Part::new("features", vec![features]));
    if config.class_token {
        parts.push(Part::new("class", vec![c]));
    }
    if model.is_clip() && config.classes > 0 {
        parts.push(Part::new("embedding", vec![config.classes]));
    }
    if *reduction != Reduction::None {
        parts.push(Part::new("sizes", vec![tokens]));
        parts.push(Part::integers("source_map", vec![rows, columns]));
    }
    parts
}

/// The file's `__metadata__`.
fn notes(arguments: &Arguments, task: &Task<'_>, images: &[String]) -> serde_json::Value {
    let [rows, columns] = task.grid;
    json!({
        "weights": arguments.sources.weights.display().to_string(),
        "reduction": task.reduction.to_string(),
        "grid": format!("{rows}x{columns}"),
        "version": env!("CARGO_PKG_VERSION"),
        "images": json!(images).to_string(),
    })
}

/// The results of one batch.
struct Extract<'a, B: Backend> {
    model: &'a Model<B>,
    logits: Option<Tensor>,
    details: Details,
}

impl<'a, B: Backend> Extract<'a, B> {
    fn new(model: &'a Model<B>, Pass { logits, details }: Pass) -> Result<Self, Failure> {
        let details = details.ok_or_else(|| Failure::Other("a pass left only logits".to_owned()))?;
        Ok(Self { model, logits, details })
    }

    /// What goes into `part`, all images of the batch one after the other.
    fn values(&self, part: &Part) -> Result<Values, Failure> {
        let Details { tokens, features, sizes, map } = &self.details;
        let special = self.model.config().special_tokens();
        let width = tokens.width();
        let images = 0..tokens.dim(0);
        let floats = |per_image: &dyn Fn(usize) -> Vec<f32>| {
            Values::Floats(images.clone().flat_map(per_image).collect())
        };
        Ok(match part.name {
            "features" => Values::Floats(features.data().to_vec()),
            "embedding" => Values::Floats(self.logits.iter().flat_map(Tensor::data).copied().collect()),
            "class" => floats(&|image| tokens.item(image)[..width].to_vec()),
            // Nothing was reduced if there are no sizes: every token is one patch.
            "sizes" => floats(&|image| match sizes {
                Some(sizes) => sizes.item(image)[special..].to_vec(),
                None => vec![1.0; tokens.dim(1) - special],
            }),
            "source_map" => {
                // Special tokens come first and stay, so the patches' tokens are those behind them.
                let from_patches = |&group: &i32| (group - special as i32).max(-1);
                Values::Integers(
                    images
                        .clone()
                        .flat_map(|image| map.groups(image)[special..].iter().map(from_patches))
                        .collect(),
                )
            }
            _ if part.shape.len() == 2 => floats(&|image| tokens.item(image)[special * width..].to_vec()),
            _ => {
                let mut spread = Vec::new();
                for image in images.clone() {
                    let all = map.unmerge(image, tokens.item(image), width, 0.0)?;
                    spread.extend_from_slice(&all[special * width..]);
                }
                Values::Floats(spread)
            }
        })
    }
}
