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
use serde_json::json;

use super::{Arguments, Runner, WARM_UP, noise};
use crate::cli::{
    affnet,
    device::on_device,
    failure::Failure,
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

fn profile<B: Runner>(arguments: &Arguments, name: &str, model: &AffNet<B>) -> Result<(), Failure> {
    let (config, batch) = (model.config(), usize::from(arguments.batch));
    let images = noise(config.channels, config.image, batch)?;
    let timed = model.backend().keeps_time();
    // Where time says nothing, one pass shows that the model runs.
    let (warm_up, runs) = if timed { (WARM_UP, usize::from(arguments.runs)) } else { (0, 1) };
    let parts = GridMacs::of(config);
    let progress = Progress::bar(warm_up + runs, "runs");
    let mut times = Vec::new();
    for _ in 0..warm_up + runs {
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
    times.drain(..warm_up);
    let of_part = |at: usize| median(&times.iter().map(|run| run[at]).collect::<Vec<_>>());
    let whole = median(&times.iter().map(|run| run.iter().sum()).collect::<Vec<f64>>());
    let each: Vec<f64> = (0..parts.len()).map(of_part).collect();
    let rate = batch as f64 / (whole / 1e3).max(1e-9);
    let share = |at: usize| each[at] / each.iter().sum::<f64>().max(1e-9);
    let macs = |part: &GridMacs| batch as u64 * part.total(GridConvention::Theoretical);
    let grids = config.grids();
    let grid = |at: usize| grids[at.min(grids.len() - 1)];
    let sum = macs(&GridMacs::sum(config));
    if arguments.json {
        let time = |value: f64| timed.then_some(value);
        let segments = parts.iter().enumerate().map(|(at, (part, counted))| {
            json!({
                "name": part,
                "grid": grid(at),
                "macs": macs(counted),
                "milliseconds": time(each[at]),
                "share": time(share(at)),
            })
        });
        return write_json(&json!({
            "command": "profile",
            "version": env!("CARGO_PKG_VERSION"),
            "name": name,
            "backend": B::NAME,
            "dtype": model.backend().storage(),
            "batch": batch,
            "threads": model.backend().threads(),
            "runs": runs,
            "reduction": "none",
            "segments": segments.collect::<Vec<_>>(),
            "macs": sum,
            "milliseconds": time(whole),
            "images_per_second": time(rate),
        }));
    }
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{name}: {} per batch, {} ({}, {}), median of {}",
        counted(batch, "image"),
        B::NAME,
        model.backend().describe(),
        model.backend().storage(),
        counted(runs, "run")
    )?;
    let columns = [
        ("part", Align::Left),
        ("grid", Align::Left),
        ("MACs", Align::Right),
        ("ms", Align::Right),
        ("share", Align::Right),
    ];
    let mut table = Table::new(columns);
    let time = |text: String| if timed { text } else { "-".to_owned() };
    for (at, (part, counted)) in parts.iter().enumerate() {
        let [rows, columns] = grid(at);
        table.row([
            (*part).to_owned(),
            format!("{rows}x{columns}"),
            quantity(macs(counted)),
            time(three_digits(each[at])),
            time(percent(share(at))),
        ]);
    }
    table.write(&mut out)?;
    if timed {
        let (ms, rate) = (three_digits(whole), three_digits(rate));
        writeln!(out, "\n{} MACs as the official code counts, {ms} ms, {rate} images/s", quantity(sum))?;
    } else {
        writeln!(
            out,
            "\n{} MACs as the official code counts; the emulated driver keeps no time",
            quantity(sum)
        )?;
    }
    Ok(out.flush()?)
}
