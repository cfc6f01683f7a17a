//! Forward passes on the processor, one per line of standard input: what `cargo xtask compare-cpu` runs in turn with other
//! programs.
//!
//! `cpu_rounds WEIGHTS THREADS`, then lines `SPEC BATCH` (a reduction and a number of images); each is answered by the seconds
//! that the pass took and the first image's first logits. `times SPEC BATCH` is answered by the share of each kind of operation.

use std::{
    collections::BTreeMap,
    io::{BufRead, Write},
    time::Instant,
};

use foveate::{
    Images, Pixels, Reduction,
    cpu::Cpu,
    weights::{Overrides, load_vit_file},
};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let (Some(weights), Some(threads)) = (words.next(), words.next()) else {
        return Err("usage: cpu_rounds WEIGHTS THREADS".into());
    };
    let cpu = Cpu::with_threads(threads.parse()?)?;
    let vit = load_vit_file(weights, &Overrides::default())?.build(cpu)?;
    let [height, width] = vit.config().image;
    // Normalised pixels, the same as the other programs are given.
    let images = |batch: usize| {
        let values = batch * 3 * height * width;
        let pixels = (0..values).map(|i| (i * 31 % 251) as f32 / 125.0 - 1.0).collect();
        Images::new([batch, 3, height, width], Pixels::F32(pixels))
    };
    let mut outputs = BTreeMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (timed, rest) = line.strip_prefix("times ").map_or((false, &*line), |rest| (true, rest));
        let (spec, batch) = rest.split_once(' ').ok_or("a line is SPEC BATCH")?;
        let (reduction, batch): (Reduction, usize) = (spec.parse()?, batch.parse()?);
        let images = images(batch)?;
        if timed {
            vit.backend().start_timing();
        }
        let begun = Instant::now();
        let output = match outputs.remove(&(spec.to_owned(), batch)) {
            Some(earlier) => vit.forward_again(&images, &reduction, earlier)?,
            None => vit.forward(&images, &reduction)?,
        };
        let seconds = begun.elapsed().as_secs_f64();
        if timed {
            let times = vit.backend().stop_timing();
            let all: f64 = times.iter().map(|(_, time)| time.as_secs_f64()).sum();
            let shares = times.iter().filter(|(_, time)| !time.is_zero());
            let shares: Vec<_> = shares
                .map(|(name, time)| format!("{name} {:.2}", 100.0 * time.as_secs_f64() / all))
                .collect();
            println!("{seconds:.6} {}", shares.join(" "));
        } else {
            let logits = output.logits.as_ref().map(foveate::cpu::Tensor::to_vec).unwrap_or_default();
            let first: Vec<_> = logits.iter().take(8).map(ToString::to_string).collect();
            println!("{seconds:.6} {}", first.join(" "));
        }
        std::io::stdout().flush()?;
        outputs.insert((spec.to_owned(), batch), output);
    }
    Ok(())
}
