//! `foveate profile` of an AFFNet: stage by stage.

use std::{
    io::{self, Write},
    time::Instant,
};

use foveate::{
    Reduction, Tensor,
    macs::{GridConvention, GridMacs},
    model::{
        AffNet, AffNetConfig,
        affnet::{AffNetParams, names, random_params},
    },
    weights::Overrides,
};
use serde_json::{Value, json};

use super::{Arguments, Runner, WARM_UP, noise};
use crate::cli::{
    affnet,
    device::on_device,
    failure::{Failure, complain},
    launches::{Launch, Launches},
    measure::median,
    progress::Progress,
    report::{Align, Table, counted, percent, quantity, three_digits, write_json},
};

/// A model's name, its numbers and its parameters.
type Found = (String, AffNetConfig, AffNetParams<Tensor>);

/// The AFFNet that the arguments name; nothing where they name another model.
fn find(arguments: &Arguments, overrides: &Overrides) -> Result<Option<Found>, Failure> {
    match (&arguments.source.weights, &arguments.source.arch) {
        (Some(weights), _) => Ok(affnet::open(weights, overrides)?.map(affnet::Opened::model)),
        (None, Some(name)) if names().any(|known| known == name) => {
            let mut config = AffNetConfig::published(name)?;
            config.image = overrides.image.unwrap_or(config.image);
            config.activation = overrides.activation.unwrap_or(config.activation);
            config.norm = overrides.norm.unwrap_or(config.norm);
            config.check()?;
            let params = random_params(&config, 0);
            Ok(Some((name.clone(), config, params)))
        }
        _ => Ok(None),
    }
}

/// Profiles an AFFNet; `None` where the arguments name another model.
pub(super) fn run(
    arguments: &Arguments,
    reduction: &Reduction,
    overrides: &Overrides,
) -> Result<Option<()>, Failure> {
    let Some((name, config, params)) = find(arguments, overrides)? else { return Ok(None) };
    affnet::refuse(&name, reduction)?;
    on_device!(arguments.device, None, |backend| {
        let model = AffNet::new(backend, config, params)?;
        profile(arguments, &name, &model).map(Some)
    })
}

/// A part of the model, as [`GridMacs::of`] tells them apart.
struct Part {
    name: &'static str,
    grid: [usize; 2],
    macs: u64,
    /// What the device is given to do; none on the processor.
    launches: Option<Vec<Launch>>,
    /// Median over the runs; none where time says nothing.
    milliseconds: Option<f64>,
}

/// All of them, and what holds for the whole.
struct Profile {
    parts: Vec<Part>,
    batch: usize,
    runs: usize,
    /// Median of the runs' whole times.
    milliseconds: Option<f64>,
    /// Bytes of an engine beside the weights, and the most of them in use at a time.
    memory: Option<[usize; 2]>,
}

fn profile<B: Runner>(arguments: &Arguments, name: &str, model: &AffNet<B>) -> Result<(), Failure> {
    let (config, batch) = (model.config(), usize::from(arguments.batch));
    // Launches are told without running: where time says nothing, nothing runs.
    let runs = if model.backend().keeps_time() { usize::from(arguments.runs) } else { 0 };
    let times = measure(model, batch, runs)?;
    let launches = B::grid_launches(model, batch).and_then(|told| {
        // The rest of the profile is known all the same.
        told.map_err(|error| complain(&format!("the launches cannot be told: {error}"))).ok()
    });
    let memory = launches.as_ref().map(|launches| [launches.arena_bytes, launches.live_bytes]);
    // The pixels' way into rows stands before the first part.
    let of_part = |at: usize, launches: &Launches| match at {
        0 => launches.segments[..2].concat(),
        at => launches.segments[at + 1].clone(),
    };
    let of_runs = |of: &dyn Fn(&Vec<f64>) -> f64| {
        (runs > 0).then(|| median(&times.iter().map(of).collect::<Vec<f64>>()))
    };
    let grids = config.grids();
    let parts = GridMacs::of(config).into_iter().enumerate().map(|(at, (name, macs))| Part {
        name,
        grid: grids[at.min(grids.len() - 1)],
        macs: batch as u64 * macs.total(GridConvention::Theoretical),
        launches: launches.as_ref().map(|launches| of_part(at, launches)),
        milliseconds: of_runs(&|run| run[at]),
    });
    let parts = parts.collect();
    let whole = of_runs(&|run| run.iter().sum());
    let profile = Profile { parts, batch, runs, milliseconds: whole, memory };
    let backend = model.backend();
    if arguments.json {
        write_json(&profile.json(name, backend))
    } else {
        profile.text(name, backend, &mut io::stdout().lock())
    }
}

/// For each run: milliseconds of each part.
fn measure<B: Runner>(model: &AffNet<B>, batch: usize, runs: usize) -> Result<Vec<Vec<f64>>, Failure> {
    if runs == 0 {
        return Ok(Vec::new());
    }
    let images = noise(model.config().channels, model.config().image, batch)?;
    let parts = GridMacs::of(model.config());
    let progress = Progress::bar(WARM_UP + runs, "runs");
    let mut times = Vec::new();
    for _ in 0..WARM_UP + runs {
        let mut failed = Ok(());
        let mut marks = vec![Instant::now()];
        let mut mark = || {
            // A device works on while the host goes ahead.
            if failed.is_ok() {
                failed = model.backend().wait();
            }
            marks.push(Instant::now());
        };
        let mut look = |place: &str, _: &B::Tensor| {
            if parts.iter().any(|(part, _)| *part == place) {
                mark();
            }
        };
        model.forward_observed(&images, &mut look)?;
        mark();
        failed?;
        let milliseconds = |pair: &[Instant]| pair[1].duration_since(pair[0]).as_secs_f64() * 1e3;
        times.push(marks.windows(2).map(milliseconds).collect::<Vec<f64>>());
        progress.advance(1);
    }
    progress.finish();
    times.drain(..WARM_UP);
    Ok(times)
}

impl Profile {
    fn macs(&self) -> u64 {
        self.parts.iter().map(|part| part.macs).sum()
    }

    fn launches(&self) -> Option<usize> {
        self.parts.iter().map(|part| part.launches.as_ref().map(Vec::len)).sum()
    }

    fn bytes(&self) -> Option<u64> {
        self.parts.iter().map(Part::bytes).sum()
    }

    fn images_per_second(&self) -> Option<f64> {
        self.milliseconds.map(|milliseconds| self.batch as f64 / (milliseconds / 1e3).max(1e-9))
    }

    /// A part's share of the parts' time.
    fn share(&self, part: &Part) -> Option<f64> {
        let all: f64 = self.parts.iter().filter_map(|part| part.milliseconds).sum();
        part.milliseconds.map(|milliseconds| milliseconds / all.max(1e-9))
    }

    fn json<B: Runner>(&self, name: &str, backend: &B) -> Value {
        let segments = self.parts.iter().map(|part| {
            let launches = part.launches.as_ref();
            json!({
                "name": part.name,
                "grid": part.grid,
                "macs": part.macs,
                "bytes": part.bytes(),
                "launches": launches.map(|all| all.iter().map(Launch::json).collect::<Vec<Value>>()),
                "milliseconds": part.milliseconds,
                "share": self.share(part),
            })
        });
        json!({
            "command": "profile",
            "version": env!("CARGO_PKG_VERSION"),
            "name": name,
            "backend": B::NAME,
            "dtype": backend.storage(),
            "batch": self.batch,
            "threads": backend.threads(),
            "runs": self.runs,
            "reduction": "none",
            "segments": segments.collect::<Vec<_>>(),
            "macs": self.macs(),
            "bytes": self.bytes(),
            "launches": self.launches(),
            "arena_bytes": self.memory.map(|[arena, _]| arena),
            "live_bytes": self.memory.map(|[_, live]| live),
            "milliseconds": self.milliseconds,
            "images_per_second": self.images_per_second(),
        })
    }

    fn text<B: Runner>(&self, name: &str, backend: &B, out: &mut dyn Write) -> Result<(), Failure> {
        writeln!(
            out,
            "{name}: {} per batch, {} ({}, {}), {}",
            counted(self.batch, "image"),
            B::NAME,
            backend.describe(),
            backend.storage(),
            if self.milliseconds.is_some() {
                format!("median of {}", counted(self.runs, "run"))
            } else {
                "not timed: what the emulated driver takes says nothing about a card".to_owned()
            }
        )?;
        self.table().write(out)?;
        writeln!(out)?;
        if let Some([arena, live]) = self.memory {
            let [arena, live] = [arena, live].map(|bytes| three_digits(bytes as f64 / 1e6));
            writeln!(
                out,
                "memory of an engine beside its weights: {arena} MB, at most {live} MB of it in use at a time"
            )?;
        }
        write!(out, "{} MACs as the official code counts", quantity(self.macs()))?;
        if let (Some(ms), Some(rate)) = (self.milliseconds, self.images_per_second()) {
            write!(out, ", {} ms, {} images/s", three_digits(ms), three_digits(rate))?;
        }
        writeln!(out)?;
        Ok(out.flush()?)
    }

    fn table(&self) -> Table {
        let (launched, timed) = (self.memory.is_some(), self.milliseconds.is_some());
        let mut columns = vec![("part", Align::Left), ("grid", Align::Left)];
        columns.extend(launched.then_some(("launches", Align::Right)));
        columns.push(("MACs", Align::Right));
        columns.extend(launched.then_some(("MB", Align::Right)));
        if timed {
            columns.extend([("ms", Align::Right), ("share", Align::Right)]);
        }
        let mut table = Table::new(columns);
        let mut row =
            |name: &str, grid: String, macs: u64, launches: Option<usize>, bytes: Option<u64>, time| {
                let mut cells = vec![name.to_owned(), grid];
                cells.extend(launches.map(|launches| launches.to_string()));
                cells.push(quantity(macs));
                cells.extend(bytes.map(|bytes| three_digits(bytes as f64 / 1e6)));
                if let Some((ms, share)) = time {
                    cells.extend([three_digits(ms), share]);
                }
                table.row(cells);
            };
        for part in &self.parts {
            let [rows, columns] = part.grid;
            let launches = part.launches.as_ref().map(Vec::len);
            let time = part.milliseconds.zip(self.share(part).map(percent));
            row(part.name, format!("{rows}x{columns}"), part.macs, launches, part.bytes(), time);
        }
        let time = self.milliseconds.map(|ms| (ms, String::new()));
        row("total", String::new(), self.macs(), self.launches(), self.bytes(), time);
        table
    }
}

impl Part {
    /// Bytes that its launches read and write.
    fn bytes(&self) -> Option<u64> {
        self.launches.as_ref().map(|launches| launches.iter().map(|launch| launch.bytes).sum())
    }
}
