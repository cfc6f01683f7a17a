//! Forward passes on the processor, one per line of standard input: what `cargo xtask compare-cpu` runs in turn with other
//! programs.
//!
//! `cpu_rounds WEIGHTS THREADS [f32|bf16]` (the factors of products; f32 unless given), then lines `SPEC BATCH` (a reduction, `none` for an AFFNet, and a number of images); each is
//! answered by the seconds that the pass took and the first image's first logits. `times SPEC BATCH` is answered by the share of
//! each kind of operation, `macs SPEC 1` by the multiply-adds of one image. `ratios ROUNDS BATCH SPEC SPEC ...` runs the
//! specifications in turn and says of each how much faster than the first it is (the median over the rounds), by how much its
//! multiply-adds are fewer, and the quotient of the two.
//!
//! `random:ARCHITECTURE` instead of WEIGHTS is a model of that architecture with random weights, those of all methods included:
//! what a method costs does not depend on what a model knows.

use std::{
    collections::BTreeMap,
    io::{BufRead, Write},
    sync::LazyLock,
    time::Instant,
};

use foveate::{
    Images, Pixels, Reduction,
    cpu::{Cpu, Products},
    macs::{Convention, ModelMacs},
    model::{AffNet, Output as VitOutput, Vit, affnet::AffOutput, arch},
    reduction::OwnWeights,
    weights::{Checkpoint, Loaded, Overrides, load},
};

type Failure = Box<dyn std::error::Error>;

enum Model {
    Vit(Box<Vit<Cpu>>),
    AffNet(Box<AffNet<Cpu>>),
}

enum Output {
    Vit(Box<VitOutput<Cpu>>),
    AffNet(Box<AffOutput<Cpu>>),
}

impl Model {
    fn load(weights: &str, cpu: Cpu) -> Result<Self, Failure> {
        if let Some(name) = weights.strip_prefix("random:") {
            let config = arch::config(name)?;
            let own = OwnWeights { predictors: 3, selector: true, layer_selectors: 0, projections: 1 << 2 };
            let mut params = arch::random_params(&config, 0);
            params.reducers = arch::random_reducers(&config, own, 1);
            return Ok(Self::Vit(Box::new(Vit::new(cpu, config, params)?)));
        }
        Ok(match load(&Checkpoint::open(weights)?, None, &Overrides::default())? {
            Loaded::Vit(vit) => Self::Vit(Box::new(vit.build(cpu)?)),
            Loaded::AffNet(net) => Self::AffNet(Box::new(net.build(cpu)?)),
        })
    }

    fn backend(&self) -> &Cpu {
        match self {
            Self::Vit(vit) => vit.backend(),
            Self::AffNet(net) => net.backend(),
        }
    }

    fn image(&self) -> [usize; 2] {
        match self {
            Self::Vit(vit) => vit.config().image,
            Self::AffNet(net) => net.config().image,
        }
    }

    /// The multiply-adds of one image.
    fn macs(&self, reduction: &Reduction) -> Result<u64, Failure> {
        let Self::Vit(vit) = self else { return Err("only transformers are counted".into()) };
        Ok(ModelMacs::of(vit.config(), reduction).sum().total(Convention::Fvcore))
    }

    /// How much faster than the first of `specs` each is, and by how much its multiply-adds are fewer.
    fn ratios(&self, rounds: usize, images: &Images, specs: &[&str]) -> Result<Vec<String>, Failure> {
        let reductions = specs.iter().map(|spec| spec.parse()).collect::<Result<Vec<Reduction>, _>>()?;
        let mut outputs: Vec<Option<Output>> = reductions.iter().map(|_| None).collect();
        let mut speeds: Vec<Vec<f64>> = vec![Vec::new(); reductions.len()];
        // The first round warms up.
        for round in 0..=rounds {
            let mut first = None;
            for (at, reduction) in reductions.iter().enumerate() {
                // The clock may tick as slowly as every 10 ms.
                let (begun, mut passes, mut passed) = (busy_seconds(), 0, 0.0);
                while passed < LEAST_SECONDS {
                    outputs[at] = Some(self.forward(images, reduction, outputs[at].take())?);
                    (passes, passed) = (passes + 1, busy_seconds() - begun);
                }
                let seconds = passed / f64::from(passes);
                let first = *first.get_or_insert(seconds);
                if round > 0 {
                    speeds[at].push(first / seconds);
                }
            }
        }
        let all = self.macs(&reductions[0])? as f64;
        let mut line = |(at, spec): (usize, &&str)| {
            speeds[at].sort_by(f64::total_cmp);
            let (speed, fewer) = (speeds[at][rounds / 2], all / self.macs(&reductions[at])? as f64);
            Ok(format!("{spec} {speed:.3} of {fewer:.3}: {:.3}", speed / fewer))
        };
        specs.iter().enumerate().map(&mut line).collect()
    }

    /// A pass that uses the memory of an earlier one.
    fn forward(
        &self,
        images: &Images,
        reduction: &Reduction,
        earlier: Option<Output>,
    ) -> Result<Output, Failure> {
        Ok(match (self, earlier) {
            (Self::Vit(vit), Some(Output::Vit(earlier))) => {
                Output::Vit(Box::new(vit.forward_again(images, reduction, *earlier)?))
            }
            (Self::Vit(vit), _) => Output::Vit(Box::new(vit.forward(images, reduction)?)),
            (Self::AffNet(net), _) => Output::AffNet(Box::new(net.forward(images)?)),
        })
    }
}

impl Output {
    fn logits(&self) -> Vec<f32> {
        match self {
            Self::Vit(output) => output.logits.as_ref().map(foveate::cpu::Tensor::to_vec).unwrap_or_default(),
            Self::AffNet(output) => output.logits.to_vec(),
        }
    }
}

/// Processor time of a turn, at least.
const LEAST_SECONDS: f64 = 0.2;

/// Processor time of all threads so far, which does not count what other programs take from them; where the system does not tell,
/// the time that has passed.
fn busy_seconds() -> f64 {
    static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let of_thread = |thread: std::fs::DirEntry| {
        let told = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        told.split_whitespace().next()?.parse::<u64>().ok()
    };
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds: u64 = threads.filter_map(of_thread).sum();
    if nanoseconds == 0 { BEGUN.elapsed().as_secs_f64() } else { nanoseconds as f64 * 1e-9 }
}

fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let (Some(weights), Some(threads)) = (words.next(), words.next()) else {
        return Err("usage: cpu_rounds WEIGHTS THREADS [f32|bf16]".into());
    };
    let products = match words.next().as_deref() {
        None | Some("f32") => Products::F32,
        Some("bf16") => Products::Bf16,
        Some(other) => return Err(format!("products are f32 or bf16, not {other}").into()),
    };
    let model = Model::load(&weights, Cpu::with_threads(threads.parse()?)?.with_products(products)?)?;
    let [height, width] = model.image();
    // Normalised pixels, the same as the other programs are given.
    let images = |batch: usize| {
        let values = batch * 3 * height * width;
        let pixels = (0..values).map(|i| (i * 31 % 251) as f32 / 125.0 - 1.0).collect();
        Images::new([batch, 3, height, width], Pixels::F32(pixels))
    };
    let mut outputs = BTreeMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some(rest) = line.strip_prefix("ratios ") {
            let words: Vec<&str> = rest.split_whitespace().collect();
            let [rounds, batch, specs @ ..] = &words[..] else {
                return Err("a line is ratios ROUNDS BATCH SPEC ...".into());
            };
            for line in model.ratios(rounds.parse()?, &images(batch.parse()?)?, specs)? {
                println!("{line}");
            }
            continue;
        }
        let question = ["times ", "macs "].into_iter().find(|question| line.starts_with(question));
        let rest = &line[question.map_or(0, str::len)..];
        let (spec, batch) = rest.split_once(' ').ok_or("a line is SPEC BATCH")?;
        let (reduction, batch): (Reduction, usize) = (spec.parse()?, batch.parse()?);
        if question == Some("macs ") {
            println!("{}", model.macs(&reduction)?);
            std::io::stdout().flush()?;
            continue;
        }
        let images = images(batch)?;
        if question.is_some() {
            model.backend().start_timing();
        }
        let earlier = outputs.remove(&(spec.to_owned(), batch));
        let begun = Instant::now();
        let output = model.forward(&images, &reduction, earlier)?;
        let seconds = begun.elapsed().as_secs_f64();
        if question.is_some() {
            let times = model.backend().stop_timing();
            let all: f64 = times.iter().map(|(_, time)| time.as_secs_f64()).sum();
            let shares = times.iter().filter(|(_, time)| !time.is_zero());
            let shares: Vec<_> = shares
                .map(|(name, time)| format!("{name} {:.2}", 100.0 * time.as_secs_f64() / all))
                .collect();
            println!("{seconds:.6} {}", shares.join(" "));
        } else {
            let first: Vec<_> = output.logits().iter().take(8).map(ToString::to_string).collect();
            println!("{seconds:.6} {}", first.join(" "));
        }
        std::io::stdout().flush()?;
        outputs.insert((spec.to_owned(), batch), output);
    }
    Ok(())
}
