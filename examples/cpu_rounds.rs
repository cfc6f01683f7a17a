//! Forward passes on the processor, one per line of standard input: what `cargo xtask compare-cpu` runs in turn with other
//! programs.
//!
//! `cpu_rounds WEIGHTS THREADS [f32|bf16]` (the factors of products; f32 unless given), then lines `SPEC BATCH` (a reduction, `none` for an AFFNet, and a number of images); each is
//! answered by the seconds that the pass took and the first image's first logits. `times SPEC BATCH` is answered by the share of
//! each kind of operation, `macs SPEC 1` by the multiply-adds of one image.

use std::{
    collections::BTreeMap,
    io::{BufRead, Write},
    time::Instant,
};

use foveate::{
    Images, Pixels, Reduction,
    cpu::{Cpu, Products},
    macs::{Convention, ModelMacs},
    model::{AffNet, Output as VitOutput, Vit, affnet::AffOutput},
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
    let cpu = Cpu::with_threads(threads.parse()?)?.with_products(products)?;
    let model = match load(&Checkpoint::open(weights)?, None, &Overrides::default())? {
        Loaded::Vit(vit) => Model::Vit(Box::new(vit.build(cpu)?)),
        Loaded::AffNet(net) => Model::AffNet(Box::new(net.build(cpu)?)),
    };
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
        let question = ["times ", "macs "].into_iter().find(|question| line.starts_with(question));
        let rest = &line[question.map_or(0, str::len)..];
        let (spec, batch) = rest.split_once(' ').ok_or("a line is SPEC BATCH")?;
        let (reduction, batch): (Reduction, usize) = (spec.parse()?, batch.parse()?);
        if question == Some("macs ") {
            let Model::Vit(vit) = &model else { return Err("only transformers are counted".into()) };
            println!("{}", ModelMacs::of(vit.config(), &reduction).sum().total(Convention::Fvcore));
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
