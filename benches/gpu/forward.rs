//! Whole models on a GPU, as engines, by CUDA events.

use cudarc::driver::sys::CUevent_flags;
use foveate::{
    Error, Images, Reduction, Result,
    cuda::{Cuda, DType, Engine, patch::PixelType},
    macs::{Convention, ModelMacs},
    model::{Vit, arch},
};

use super::gpu::launches::Place;

const MODELS: [&str; 3] = ["deit_tiny", "deit_small", "deit_base"];
const BATCHES: [usize; 2] = [1, 64];
/// Rounds that are thrown away, and rounds that count.
const WARM_UP: usize = 3;
const ROUNDS: usize = 21;
/// Passes between two events.
const PASSES: usize = 10;

/// Prints a table for each model and batch. A word on the command line leaves out the models that lack it.
pub(crate) fn time(place: &Place, methods: &[(&str, Reduction)], images: impl Fn(usize) -> Images) {
    let word = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let wanted = |name: &str| word.as_ref().is_none_or(|word| name.contains(word.as_str()));
    for name in MODELS.into_iter().filter(|name| wanted(name)) {
        for batch in BATCHES {
            match rows(place, name, methods, &images(batch)) {
                Ok(rows) => print(place, name, batch, &rows),
                Err(error) => println!("forward: {name}, batch {batch}: not timed: {error}"),
            }
        }
    }
}

/// One method's line of the table.
struct Row {
    method: String,
    tokens: [usize; 2],
    /// Of a pass: one for each round.
    milliseconds: Vec<f64>,
    macs: u64,
    launches: usize,
    arena_bytes: usize,
}

/// The methods take turns, so that a clock that changes changes for all.
fn rows(place: &Place, name: &str, methods: &[(&str, Reduction)], images: &Images) -> Result<Vec<Row>> {
    let config = arch::config(name)?;
    let cuda = Cuda::on(&place.device, DType::F16)?;
    let vit = Vit::new(cuda, config.clone(), arch::random_params(&config, 1))?;
    let mut timed = Vec::new();
    for (spec, method) in methods {
        let engine = Engine::new(&vit, method, images.batch(), PixelType::U8)?;
        let counts = engine.forecast().token_counts();
        let row = Row {
            method: (*spec).to_owned(),
            tokens: [counts[0], counts[counts.len() - 1]],
            milliseconds: Vec::new(),
            macs: ModelMacs::of(&config, method).sum().total(Convention::Fvcore),
            launches: engine.forecast().launches().len(),
            arena_bytes: engine.forecast().arena_bytes(),
        };
        timed.push((engine, row));
    }
    for round in 0..WARM_UP + ROUNDS {
        for (engine, row) in &mut timed {
            let milliseconds = passes(engine, images)?;
            if round >= WARM_UP {
                row.milliseconds.push(milliseconds);
            }
        }
    }
    Ok(timed.into_iter().map(|(_, row)| row).collect())
}

/// Milliseconds of one pass, out of many, the upload of its pixels included: it overlaps the pass before.
fn passes(engine: &mut Engine, images: &Images) -> Result<f64> {
    let failed = |error| Error::Driver { action: "timing by events", what: format!("{error:?}") };
    let event =
        |engine: &Engine| engine.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed);
    engine.run(images)?.wait()?;
    let start = event(engine)?;
    for _ in 0..PASSES {
        engine.run(images)?;
    }
    let end = event(engine)?;
    let elapsed = start.elapsed_ms(&end).map_err(failed)?;
    Ok(f64::from(elapsed) / PASSES as f64)
}

fn print(place: &Place, name: &str, batch: usize, rows: &[Row]) {
    let middle = |row: &Row| {
        let mut sorted = row.milliseconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    println!(
        "| forward {name}, batch {batch}, f16, {} | tokens | launches | MB | ms | images/s | time of dense | MACs of dense |",
        place.device.name()
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let (ms, dense) = (middle(row), middle(&rows[0]));
        println!(
            "| {} | {} to {} | {} | {:.1} | {ms:.3} | {:.0} | {:.3} | {:.3} |",
            row.method,
            row.tokens[0],
            row.tokens[1],
            row.launches,
            row.arena_bytes as f64 / 1e6,
            1e3 * batch as f64 / ms,
            ms / dense,
            row.macs as f64 / rows[0].macs as f64
        );
    }
    println!();
}
