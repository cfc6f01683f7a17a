//! `foveate overlay`: a picture of what was merged.

use std::{
    collections::HashSet,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use foveate::{
    Reduction,
    image::{Picture, caption, grid, overlay_clusters, save_png, upscale},
};

use super::{
    device::{Device, Runner, on_device},
    failure::Failure,
    inputs::{Batch, Batches, expand, verdict},
    memory::forward,
    options::{BatchSize, Loaded, Model, ModelSettings, Sources, reductions, refuse_overwriting},
    predict::{guesses, is_classifier},
    progress::Progress,
    report::percent,
};

const EXAMPLES: &str = "\
Examples:
  foveate overlay cat.jpg --weights deit_small.safetensors --reduce tome:r=13 -o cat.png
  foveate overlay photos/ --weights m.safetensors -r tome:r=16 -r evit:keep=0.5 -o sheet.png
  foveate overlay photos/ --weights m.safetensors --reduce mctf:r=16 -o merged/

Each row shows the model's input and, for each reduction, the tokens that are left at the end: patches of one token \
have its mean colour and one outline, bright around merged ones, a darker tone around single ones, dashed around clusters \
(BAT); dropped and masked patches are dark and hatched. With a file name after -o all rows go into \
one picture, with a folder (one that exists, or a name that ends in /) each row into its own.";

/// The sheet's colours.
pub(crate) const BACKGROUND: [u8; 3] = [22, 24, 30];
/// Text that is neither right nor wrong.
pub(crate) const INK: [u8; 3] = [222, 226, 232];

/// Sheets of more pixels are refused.
const MOST_PIXELS: usize = 1 << 27;

/// Draw which patches were merged into which token.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// How tokens are reduced, such as tome:r=13 (repeatable: one column each; see 'foveate --help')
    #[arg(short, long, value_name = "SPEC", required = true)]
    reduce: Vec<String>,
    /// The PNG file to write, or a folder for one file per picture
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    batch: BatchSize,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    settings: ModelSettings,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.device.prepare()?;
    let methods = reductions(&arguments.reduce)?;
    let overrides = arguments.settings.overrides()?;
    let paths = expand(&arguments.sources.images)?;
    let target = Target::new(&arguments.output)?;
    refuse_overwriting(&arguments.output, paths.iter().chain([&arguments.sources.weights]))?;
    let loaded = Loaded::open(&arguments.sources.weights, &overrides)?;
    on_device!(arguments.device, &loaded.config, |backend| {
        run_on(&methods, &paths, target, arguments.batch.get(), &loaded.on(backend)?)
    })
}

fn run_on<B: Runner>(
    methods: &[Reduction],
    paths: &[PathBuf],
    target: Target,
    batch: usize,
    model: &Model<B>,
) -> Result<(), Failure> {
    for method in methods {
        model.check(method)?;
    }
    let [height, width] = panel_size(model.config().image);
    let panels = (methods.len() + 1).saturating_mul(height * width);
    if matches!(target, Target::Sheet(_)) && panels.saturating_mul(paths.len()) > MOST_PIXELS {
        return Err(Failure::Input(format!(
            "{} pictures are too many for one sheet; give a folder, such as -o merged/, for one file per picture",
            paths.len()
        )));
    }
    let mut target = target;
    let mut rows = Vec::new();
    let progress = Progress::bar(paths.len(), "images");
    let mut batches = Batches::new(paths, model.input(), batch, &progress);
    for batch in &mut batches {
        let batch = batch?;
        let made = draw(model, methods, &batch)?;
        for (name, row) in batch.names.iter().zip(made) {
            match &mut target {
                Target::Sheet(_) => rows.push(row),
                Target::Folder { path, used } => {
                    let file = free_name(path, name, used);
                    refuse_overwriting(&file, paths.iter())?;
                    save_png(&file, &grid(&[row], 6, BACKGROUND)?)?;
                    progress.aside(|| writeln!(io::stdout(), "{}", file.display()))?;
                }
            }
        }
    }
    let rejected = batches.rejected;
    progress.finish();
    if let (Target::Sheet(path), false) = (&target, rows.is_empty()) {
        let sheet = grid(&rows, 6, BACKGROUND)?;
        save_png(path, &sheet)?;
        writeln!(io::stdout(), "{}: {}x{} pixels", path.display(), sheet.width(), sheet.height())?;
    }
    verdict(&rejected)
}

/// Where the pictures go.
enum Target {
    Sheet(PathBuf),
    Folder { path: PathBuf, used: HashSet<PathBuf> },
}

impl Target {
    fn new(output: &Path) -> Result<Self, Failure> {
        let named_as_folder = output.as_os_str().as_encoded_bytes().ends_with(b"/");
        if named_as_folder {
            std::fs::create_dir_all(output).map_err(|e| foveate::Error::io(output, e))?;
        }
        Ok(if named_as_folder || output.is_dir() {
            Self::Folder { path: output.to_owned(), used: HashSet::new() }
        } else {
            Self::Sheet(output.to_owned())
        })
    }
}

/// A file for the picture of image `name`: pictures of one name get numbers.
fn free_name(folder: &Path, name: &str, used: &mut HashSet<PathBuf>) -> PathBuf {
    let stem = Path::new(name).file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut file = folder.join(format!("{stem}.png"));
    let mut number = 2;
    while !used.insert(file.clone()) {
        file = folder.join(format!("{stem}_{number}.png"));
        number += 1;
    }
    file
}

/// Inputs are magnified to about so many pixels.
const PANEL: usize = 448;
/// Captions grow by one step for so many pixels.
const CAPTION: usize = 224;

fn magnification(size: [usize; 2]) -> usize {
    (PANEL / size[0].min(size[1]).max(1)).max(1)
}

fn panel_size(size: [usize; 2]) -> [usize; 2] {
    size.map(|side| side * magnification(size))
}

/// One row per image: the input, then each method's groups.
fn draw<B: Runner>(
    model: &Model<B>,
    methods: &[Reduction],
    batch: &Batch,
) -> Result<Vec<Vec<Picture>>, Failure> {
    let config = model.config();
    let factor = magnification(config.image);
    let scale = (panel_size(config.image)[1] / CAPTION).max(1);
    let letters = panel_size(config.image)[1] / (6 * scale);
    let mut rows = Vec::with_capacity(batch.pictures.len());
    for (name, picture) in batch.names.iter().zip(&batch.pictures) {
        let file = Path::new(name).file_name().unwrap_or_default().to_string_lossy();
        let text = format!("{}\ninput", shortened(&file, letters));
        rows.push(vec![caption(&upscale(picture, factor)?, &text, scale, INK, BACKGROUND)?]);
    }
    for method in methods {
        let output = forward(&model.vit, &batch.images, method)?;
        let map = output.source_map(model.vit.backend())?;
        let clustered = output.clustered(model.vit.backend(), method, &model.vit.host())?;
        let logits = output.logits.as_ref().filter(|_| is_classifier(model));
        let logits = logits.map(|logits| model.vit.backend().download(logits)).transpose()?;
        let best = logits.map(|logits| guesses(&logits, 1));
        let tokens = format!("{} to {} tokens", output.token_counts[0], map.tokens_out());
        for (image, row) in rows.iter_mut().enumerate() {
            let groups = &map.groups(image)[config.special_tokens()..];
            let picture = upscale(&batch.pictures[image], factor)?;
            let drawn = overlay_clusters(&picture, config.grid(), groups, &clustered[image])?;
            let guess = best.as_ref().and_then(|best| best[image].first());
            let said = guess.map_or_else(String::new, |guess| {
                format!(
                    "\n{} {}",
                    shortened(&guess.name(config.labels.as_deref()), letters),
                    percent(guess.probability)
                )
            });
            let text = format!("{}\n{tokens}{said}", shortened(&method.to_string(), letters));
            row.push(caption(&drawn, &text, scale, INK, BACKGROUND)?);
        }
    }
    Ok(rows)
}

/// At most `letters` characters of a text.
pub(crate) fn shortened(text: &str, letters: usize) -> String {
    if text.chars().count() <= letters {
        return text.to_owned();
    }
    text.chars().take(letters.saturating_sub(2)).chain("..".chars()).collect()
}
