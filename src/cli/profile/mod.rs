//! `foveate profile`: where the time goes, block by block, and what a reduction makes of it.

mod affnet;
mod cost;
mod report;

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Args;
use foveate::{
    Images, Pixels, Reduction, Tensor,
    model::{Observer, Vit, VitConfig, VitParams, arch},
    reduction::Method,
    weights::{Checkpoint, ConfigFile, LoadedVit, Overrides, load_vit},
};

use super::{
    device::{Device, Runner, on_device},
    failure::{Failure, complain},
    measure::{Patience, in_turn},
    memory::{out_of_memory, too_large},
    options::{ModelSettings, vit},
    progress::Progress,
    report::write_json,
    traffic::Parameters,
};
use cost::Profile;
use report::Report;

const EXAMPLES: &str = "\
Examples:
  foveate profile --arch deit_small --reduce tome:r=13 --batch 8
  foveate profile --weights model.safetensors --reduce mctf:r=16 --runs 20
  foveate profile --arch deit_tiny --reduce none --threads 1 --json

Times are medians over the runs, after warming up; with a reduction the dense model is measured in turn with it. MACs \
are counted as fvcore does. MB are counted, not measured: all parameters once per batch, and inputs and output of every \
operation, in the type that --dtype names; attention maps are never written. On a card, launches and their MB are those \
that are enqueued, matrix products and copies between operations among them. On the emulated driver nothing is run or timed. All figures are per \
batch. --arch takes random weights: what a model costs does not depend on what it knows.

JSON: command, version, name, model, backend, dtype, batch, threads, runs, reduction, tokens, segments: [{name, tokens_in, \
tokens_out, macs, bytes, launches: [{operation, kernel, bytes, macs (of products)}], milliseconds, share, dense_macs, dense_bytes, \
dense_launches (their number), dense_milliseconds}], macs, bytes, launches (their number), arena_bytes, live_bytes, milliseconds, \
images_per_second; with a reduction also dense: {macs, bytes, launches, milliseconds, images_per_second}, time_ratio and \
macs_ratio (reduced over dense). What is not known is null. Of an AFFNet (affnet_et, affnet_t, \
affnet_s): segments: [{name, grid, macs, milliseconds, share}], and no bytes.";

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
    arguments.device.prepare()?;
    let reduction: Reduction = arguments.reduce.parse()?;
    let overrides = arguments.settings.overrides()?;
    if affnet::run(arguments, &reduction, &overrides)?.is_some() {
        return Ok(());
    }
    let (name, config, mut params) = arguments.source.model(&overrides)?;
    if arguments.source.arch.is_some() {
        params.reducers = arch::random_reducers(&config, reduction.own_weights(&config.host()), 0);
    }
    reduction.check(&params.host(&config))?;
    on_device!(arguments.device, &config, |backend| {
        run_on(arguments, reduction, (name, config, params), backend)
    })
}

fn run_on<B: Runner>(
    arguments: &Arguments,
    reduction: Reduction,
    (name, config, params): Loaded,
    backend: B,
) -> Result<(), Failure> {
    let parameters = Parameters::of(&params);
    let batch = usize::from(arguments.batch);
    let model = vit(backend, config, params)?;
    let images = noise(model.config().channels, model.config().image, batch)?;
    let methods =
        if reduction == Reduction::None { vec![reduction] } else { vec![reduction, Reduction::None] };
    let (value, timed) = (model.backend().value_bytes(), model.backend().keeps_time());
    // Launches are told without running: where time says nothing, nothing runs.
    let times = if timed {
        measure(&model, &images, &methods, usize::from(arguments.runs))?
    } else {
        vec![Vec::new(); methods.len()]
    };
    let (mut profiles, host) = (Vec::new(), model.host());
    for (method, times) in methods.iter().zip(&times) {
        let launches = B::launches(&model, method, batch).and_then(|told| {
            // The rest of the profile is known all the same.
            told.map_err(|error| complain(&format!("the launches of {method} cannot be told: {error}"))).ok()
        });
        profiles.push(Profile::new(
            (model.config(), &host),
            &parameters,
            method,
            batch,
            value,
            launches,
            times,
        ));
    }
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
pub(crate) fn noise(channels: usize, [height, width]: [usize; 2], batch: usize) -> Result<Images, Failure> {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let pixels = (0..batch * channels * height * width).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 56) as u8
    });
    Ok(Images::new([batch, channels, height, width], Pixels::U8(pixels.collect()))?)
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
    let rounds = runs + WARM_UP;
    let total = rounds * methods.len();
    let progress = Progress::bar(total, "runs");
    let mut times = vec![Vec::new(); methods.len()];
    let patience = Patience { rounds, most_rounds: rounds, budget: Duration::MAX };
    in_turn(methods.len(), &patience, |which| {
        let mut clock = Clock { backend: model.backend(), marks: Vec::new(), failed: Ok(()) };
        let begun = Instant::now();
        match model.forward_observed(images, &methods[which], &mut clock) {
            Err(error) if out_of_memory(&error) => {
                return Err(too_large(model, images, &methods[which], &error));
            }
            other => drop(other?),
        }
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
