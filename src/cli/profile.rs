//! `foveate profile`: where the time goes, block by block, and what a reduction makes of it.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use foveate::{
    Images, Pixels, Reduction, Tensor,
    macs::{Convention, ModelMacs},
    model::{Observer, Vit, VitConfig, VitParams, arch},
    reduction::Method,
    weights::{Checkpoint, ConfigFile, LoadedVit, Overrides, load_vit},
};
use serde_json::{Value, json};

use super::{
    device::{Device, Runner, on_device},
    failure::Failure,
    info::model_json,
    measure::{Patience, in_turn, median},
    options::ModelSettings,
    progress::Progress,
    report::{Align, Table, counted, percent, quantity, three_digits, token_path, write_json},
    traffic::{Parameters, block_bytes, embed_bytes, head_bytes},
};

const EXAMPLES: &str = "\
Examples:
  foveate profile --arch deit_small --reduce tome:r=13 --batch 8
  foveate profile --weights model.safetensors --reduce mctf:r=16 --runs 20
  foveate profile --arch deit_tiny --reduce none --threads 1 --json

Times are medians over the runs, after warming up; with a reduction the dense model is measured in turn with it. MACs \
are counted as fvcore does. MB are counted, not measured: all parameters once per batch, and inputs and output of every \
operation, in f32; attention maps are never written. All figures are per batch. --arch takes random weights: what a \
model costs does not depend on what it knows.

JSON: command, version, name, model, backend, dtype, batch, threads, runs, reduction, tokens, segments: [{name, tokens_in, \
tokens_out, macs, bytes, milliseconds, share, dense_milliseconds}], macs, bytes, milliseconds, images_per_second; with \
a reduction also dense: {macs, bytes, milliseconds, images_per_second}, time_ratio and macs_ratio (reduced over dense).";

/// Runs that are thrown away.
const WARM_UP: usize = 2;
/// More patches would not fit a machine.
const MOST_PATCHES: usize = 1 << 16;

/// Measure a model block by block: tokens, multiply-adds, bytes and milliseconds.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    source: Source,
    /// How tokens are reduced, such as tome:r=13 (see 'foveate --help')
    #[arg(short, long, value_name = "SPEC", default_value = "none")]
    reduce: String,
    /// Images per forward pass
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Runs to take the median of
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    runs: u16,
    /// Print JSON and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: Device,
    #[command(flatten)]
    settings: ModelSettings,
}

/// Which model.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// Checkpoint in safetensors form; a config.json beside it is read too
    #[arg(short, long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// A published architecture, with random weights.
    #[arg(
        long,
        value_name = "NAME",
        help = "A published architecture with random weights, such as deit_small (a wrong name lists all)"
    )]
    arch: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    on_device!(arguments.device, |backend| run_on(arguments, backend))
}

fn run_on<B: Runner>(arguments: &Arguments, backend: B) -> Result<(), Failure> {
    let reduction: Reduction = arguments.reduce.parse()?;
    let overrides = arguments.settings.overrides()?;
    let (name, config, mut params) = arguments.source.model(&overrides)?;
    if arguments.source.arch.is_some() {
        params.reducers = arch::random_reducers(&config, reduction.own_weights(&config.host()), 0);
    }
    reduction.check(&params.host(&config))?;
    let parameters = Parameters::of(&params);
    let batch = usize::from(arguments.batch);
    let model = Vit::new(backend, config, params)?;
    let images = noise(model.config(), batch)?;
    let methods =
        if reduction == Reduction::None { vec![reduction] } else { vec![reduction, Reduction::None] };
    let times = measure(&model, &images, &methods, usize::from(arguments.runs))?;
    let profiles: Vec<Profile> = methods
        .iter()
        .zip(&times)
        .map(|(method, times)| Profile::new(model.config(), &parameters, method, batch, times))
        .collect();
    let report = Report { name, arguments, model: &model, method: &methods[0], profiles: &profiles };
    if arguments.json { write_json(&report.json()) } else { report.text(&mut io::stdout().lock()) }
}

type Loaded = (String, VitConfig, VitParams<Tensor>);

impl Source {
    fn model(&self, overrides: &Overrides) -> Result<Loaded, Failure> {
        let progress = Progress::spinner("reading the weights");
        let loaded = match (&self.weights, &self.arch) {
            (Some(weights), _) => {
                let checkpoint = Checkpoint::open(weights)?;
                let LoadedVit { config, params, .. } =
                    load_vit(&checkpoint, ConfigFile::beside(weights)?.as_ref(), overrides)?;
                (weights.display().to_string(), config, params)
            }
            (None, Some(name)) => {
                let config = configured(arch::config(name)?, overrides)?;
                let params = arch::random_params(&config, 0);
                (name.clone(), config, params)
            }
            (None, None) => return Err(Failure::input("give --weights FILE or --arch NAME")),
        };
        progress.finish();
        Ok(loaded)
    }
}

/// A published architecture with other numbers, as far as they change what it costs.
fn configured(mut config: VitConfig, overrides: &Overrides) -> Result<VitConfig, Failure> {
    config.image = overrides.image.unwrap_or(config.image);
    config.heads = overrides.heads.unwrap_or(config.heads);
    config.norm_eps = overrides.norm_eps.unwrap_or(config.norm_eps);
    config.activation = overrides.activation.unwrap_or(config.activation);
    config.readout = overrides.readout.unwrap_or(config.readout);
    config.check()?;
    let [rows, columns] = config.grid();
    if rows * columns > MOST_PATCHES {
        return Err(Failure::Input(format!(
            "{rows}x{columns} patches are too many; choose a smaller image size"
        )));
    }
    Ok(config)
}

/// Images of random pixels.
fn noise(config: &VitConfig, batch: usize) -> Result<Images, Failure> {
    let [height, width] = config.image;
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let pixels = (0..batch * config.channels * height * width).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 56) as u8
    });
    Ok(Images::new([batch, config.channels, height, width], Pixels::U8(pixels.collect()))?)
}

/// Notes when each block was done.
struct Clock<'a, B> {
    backend: &'a B,
    marks: Vec<Instant>,
    failed: foveate::Result<()>,
}

impl<B: Runner> Clock<'_, B> {
    fn mark(&mut self) {
        // A device works on while the host goes ahead.
        if self.failed.is_ok() {
            self.failed = self.backend.wait();
        }
        self.marks.push(Instant::now());
    }
}

impl<B: Runner> Observer<B> for Clock<'_, B> {
    fn embedded(&mut self, _tokens: &B::Tensor) {
        self.mark();
    }

    fn block(&mut self, _layer: usize, _tokens: &B::Tensor) {
        self.mark();
    }
}

/// For each method, for each run: milliseconds of the embedding, of each block and of the head.
fn measure<B: Runner>(
    model: &Vit<B>,
    images: &Images,
    methods: &[Reduction],
    runs: usize,
) -> Result<Vec<Vec<Vec<f64>>>, Failure> {
    let total = (runs + WARM_UP) * methods.len();
    let progress = Progress::bar(total, "runs");
    let mut times = vec![Vec::new(); methods.len()];
    let patience = Patience { rounds: runs + WARM_UP, most_rounds: runs + WARM_UP, budget: Duration::MAX };
    in_turn(methods.len(), &patience, |which| {
        let mut clock = Clock { backend: model.backend(), marks: Vec::new(), failed: Ok(()) };
        let begun = Instant::now();
        model.forward_observed(images, &methods[which], &mut clock)?;
        model.backend().wait()?;
        let end = Instant::now();
        clock.failed?;
        let begins = std::iter::once(begun).chain(clock.marks.iter().copied());
        let ends = clock.marks.iter().copied().chain([end]);
        let segments: Vec<f64> =
            begins.zip(ends).map(|(from, to)| to.duration_since(from).as_secs_f64() * 1e3).collect();
        times[which].push(segments);
        progress.advance(1);
        Ok(())
    })?;
    progress.finish();
    times.iter_mut().for_each(|runs| drop(runs.drain(..WARM_UP)));
    Ok(times)
}

/// One stretch of the forward pass: the embedding, a block, or the head.
struct Segment {
    name: String,
    tokens: [usize; 2],
    macs: u64,
    bytes: u64,
    milliseconds: f64,
}

/// What a batch costs under one method.
struct Profile {
    segments: Vec<Segment>,
    /// Median over the runs of their whole time.
    milliseconds: f64,
    token_counts: Vec<usize>,
    batch: usize,
}

impl Profile {
    fn new(
        config: &VitConfig,
        parameters: &Parameters,
        method: &Reduction,
        batch: usize,
        times: &[Vec<f64>],
    ) -> Self {
        let macs = ModelMacs::of(config, method);
        let host = config.host();
        let images = batch as u64;
        let at = |segment: usize| median(&times.iter().map(|run| run[segment]).collect::<Vec<_>>());
        let total = |macs: &foveate::macs::Macs| images * macs.total(Convention::Fvcore);
        let counts = macs.token_counts.clone();
        let first = counts[0];
        let mut segments = vec![Segment {
            name: "embed".to_owned(),
            tokens: [first, first],
            macs: total(&macs.embed),
            bytes: embed_bytes(config, parameters, images),
            milliseconds: at(0),
        }];
        for layer in 0..config.depth {
            let step = method.step(layer, counts[layer], &host);
            segments.push(Segment {
                name: format!("block {layer}"),
                tokens: [counts[layer], counts[layer + 1]],
                macs: total(&macs.blocks[layer]),
                bytes: block_bytes(
                    config,
                    parameters.blocks[layer],
                    counts[layer] as u64,
                    step.as_ref(),
                    images,
                ),
                milliseconds: at(layer + 1),
            });
        }
        let last = counts[config.depth];
        segments.push(Segment {
            name: "head".to_owned(),
            tokens: [last, last],
            macs: total(&macs.head),
            bytes: head_bytes(config, parameters, last as u64, images),
            milliseconds: at(config.depth + 1),
        });
        let milliseconds = median(&times.iter().map(|run| run.iter().sum()).collect::<Vec<f64>>());
        Self { segments, milliseconds, token_counts: counts, batch }
    }

    fn macs(&self) -> u64 {
        self.segments.iter().map(|segment| segment.macs).sum()
    }

    fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    fn images_per_second(&self) -> f64 {
        self.batch as f64 / (self.milliseconds / 1e3).max(1e-9)
    }

    /// The segment's share of the segments' time.
    fn share(&self, segment: &Segment) -> f64 {
        segment.milliseconds / self.segments.iter().map(|s| s.milliseconds).sum::<f64>().max(1e-9)
    }
}

/// What is printed: the first profile, and the dense one beside it.
struct Report<'a, B: Runner> {
    name: String,
    arguments: &'a Arguments,
    model: &'a Vit<B>,
    method: &'a Reduction,
    profiles: &'a [Profile],
}

impl<B: Runner> Report<'_, B> {
    fn text(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let (profile, dense) = (&self.profiles[0], self.profiles.get(1));
        writeln!(
            out,
            "{}, {}: {} per batch, {} ({}, {}), median of {}",
            self.name,
            self.method,
            counted(profile.batch, "image"),
            self.model.backend().describe(),
            B::NAME,
            self.model.backend().storage(),
            counted(usize::from(self.arguments.runs), "run"),
        )?;
        writeln!(out)?;
        let mut columns = vec![
            ("", Align::Left),
            ("tokens", Align::Left),
            ("MMACs", Align::Right),
            ("MB", Align::Right),
            ("ms", Align::Right),
            ("share", Align::Right),
            ("GMAC/s", Align::Right),
        ];
        if dense.is_some() {
            columns.extend([("dense ms", Align::Right), ("of dense", Align::Right)]);
        }
        let mut table = Table::new(columns);
        let row =
            |name: &str, path: String, numbers: [u64; 2], share: String, ms: f64, dense: Option<f64>| {
                let mut cells = vec![
                    name.to_owned(),
                    path,
                    three_digits(numbers[0] as f64 / 1e6),
                    three_digits(numbers[1] as f64 / 1e6),
                    three_digits(ms),
                    share,
                    three_digits(numbers[0] as f64 / 1e6 / ms.max(1e-9)),
                ];
                cells.extend(
                    dense
                        .into_iter()
                        .flat_map(|dense| [three_digits(dense), three_digits(ms / dense.max(1e-9))]),
                );
                cells
            };
        for (at, segment) in profile.segments.iter().enumerate() {
            let beside = dense.map(|dense| dense.segments[at].milliseconds);
            let numbers = [segment.macs, segment.bytes];
            let share = percent(profile.share(segment));
            table.row(row(
                &segment.name,
                token_path(&segment.tokens),
                numbers,
                share,
                segment.milliseconds,
                beside,
            ));
        }
        let counts = &profile.token_counts;
        let ends = [counts[0], counts[counts.len() - 1]];
        let numbers = [profile.macs(), profile.bytes()];
        let beside = dense.map(|dense| dense.milliseconds);
        table.row(row("total", token_path(&ends), numbers, String::new(), profile.milliseconds, beside));
        table.write(out)?;
        writeln!(out)?;
        write!(out, "{} images/s", three_digits(profile.images_per_second()))?;
        let Some(dense) = dense else {
            writeln!(out)?;
            return Ok(out.flush()?);
        };
        writeln!(
            out,
            ", dense {}\ntime {} of dense ({} times as fast), MACs {} of dense ({} of {})",
            three_digits(dense.images_per_second()),
            three_digits(profile.milliseconds / dense.milliseconds),
            three_digits(dense.milliseconds / profile.milliseconds),
            three_digits(profile.macs() as f64 / dense.macs() as f64),
            quantity(profile.macs()),
            quantity(dense.macs()),
        )?;
        Ok(out.flush()?)
    }

    fn json(&self) -> Value {
        let (profile, dense) = (&self.profiles[0], self.profiles.get(1));
        let segments: Vec<Value> = profile
            .segments
            .iter()
            .enumerate()
            .map(|(at, segment)| {
                json!({
                    "name": segment.name,
                    "tokens_in": segment.tokens[0],
                    "tokens_out": segment.tokens[1],
                    "macs": segment.macs,
                    "bytes": segment.bytes,
                    "milliseconds": segment.milliseconds,
                    "share": profile.share(segment),
                    "dense_milliseconds": dense.map(|dense| dense.segments[at].milliseconds),
                })
            })
            .collect();
        let mut document = json!({
            "command": "profile",
            "version": env!("CARGO_PKG_VERSION"),
            "name": self.name,
            "model": model_json(self.model.config()),
            "backend": B::NAME,
            "dtype": self.model.backend().storage(),
            "batch": profile.batch,
            "threads": self.model.backend().threads(),
            "runs": self.arguments.runs,
            "reduction": self.method.to_string(),
            "tokens": profile.token_counts,
            "segments": segments,
            "macs": profile.macs(),
            "bytes": profile.bytes(),
            "milliseconds": profile.milliseconds,
            "images_per_second": profile.images_per_second(),
        });
        if let Some(dense) = dense {
            document["dense"] = json!({
                "macs": dense.macs(),
                "bytes": dense.bytes(),
                "milliseconds": dense.milliseconds,
                "images_per_second": dense.images_per_second(),
            });
            document["time_ratio"] = json!(profile.milliseconds / dense.milliseconds);
            document["macs_ratio"] = json!(profile.macs() as f64 / dense.macs() as f64);
        }
        document
    }
}
