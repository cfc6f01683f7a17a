//! `foveate demo`: a model, twenty pictures and every method, out of the box.

mod assets;
mod others;
mod sheet;

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use foveate::{
    Images, Reduction, SourceMap,
    image::{Picture, batch, decode, save_png},
    macs::{Convention, ModelMacs},
    model::{Vit, VitConfig},
    reduction::{Method, token_counts},
    weights::{Checkpoint, LoadedVit, Overrides, load_vit},
};
use serde_json::{Value, json};

use super::{
    device::{Device, Runner, on_device},
    failure::Failure,
    info::model_json,
    measure::{Patience, in_turn, median, speedup},
    options::{reductions, vit},
    predict::{Guess, guesses},
    progress::Progress,
    report::{Align, Table, percent, quantity, thousands, three_digits, token_path, write_json},
    traffic::Parameters,
};
use others::Others;

const EXAMPLES: &str = "\
Examples:
  foveate demo
  foveate demo --reduce tome:r=8 --reduce evit:keep=0.5,fuse=false -o tokens.png
  foveate demo --json --no-picture

Speeds are measured in turn: in each round the dense model and every method run once over all images; images/s is the \
median over the rounds, the speed-up the median of the rounds' ratios. Agreement counts the images for which a method \
says the same as the dense model. The emulated driver is not timed. A second table shows every other system: methods that \
need no weights of their own on the same model, the others and other architectures with random weights, for what they cost.

JSON: command, version, model, parameters, test_top1, backend, dtype, threads, rounds, methods: [{reduction, tokens, macs, macs_share, \
images_per_second, speedup, correct, agreement}], images: [{image, truth, predictions: [{class, label, probability, \
reduction}]}], picture (null without one), others (null with --reduce): [{model, random_weights, reduction, tokens, macs, \
macs_share, images_per_second, speedup, correct, agreement}].";

/// The methods that are shown when none is asked for; r is for 197 tokens.
const METHODS: [(&str, Option<usize>, &str); 6] = [
    ("tome:r=", Some(13), ""),
    ("tome:r=", Some(16), ",schedule=decreasing"),
    ("mctf:r=", Some(16), ""),
    ("mctf:r=0.35", None, ""),
    ("evit:keep=0.7", None, ""),
    ("evit:keep=0.5", None, ""),
];

/// Tokens of the models that published values of r are for.
const PUBLISHED_TOKENS: usize = 197;

/// How long the measurement may take.
const PATIENCE: Patience = Patience { rounds: 3, most_rounds: 15, budget: Duration::from_millis(2500) };

/// Columns of the terminal that tables may take.
const COLUMNS: usize = 100;

/// See what token reduction does, on a model and pictures that come with the command.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// A reduction to show instead of the usual ones (repeatable; see 'foveate --help')
    #[arg(short, long, value_name = "SPEC")]
    reduce: Vec<String>,
    /// Where the picture of the merged tokens goes
    #[arg(short, long, value_name = "FILE", default_value = "foveate_demo.png")]
    output: PathBuf,
    /// Draw no picture
    #[arg(long)]
    no_picture: bool,
    /// Print JSON and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: Device,
}

/// One of the demo's pictures.
struct Item {
    /// The number in its file name.
    number: &'static str,
    picture: Picture,
    truth: usize,
}

/// What one method made of the pictures.
struct Outcome {
    method: Reduction,
    guesses: Vec<Guess>,
    map: SourceMap,
    token_counts: Vec<usize>,
    macs: u64,
    /// Absent on a device whose time says nothing.
    speed: Option<Speed>,
}

/// How fast a method was.
struct Speed {
    images_per_second: f64,
    /// Against the dense model.
    speedup: f64,
}

/// The demo's model and pictures.
struct Demo<B: Runner> {
    model: Vit<B>,
    parameters: u64,
    test_top1: Option<f64>,
    labels: Vec<String>,
    items: Vec<Item>,
    images: Images,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.device.prepare()?;
    let asked = reductions(&arguments.reduce)?;
    let checkpoint = Checkpoint::from_static("the demo's model", assets::MODEL)?;
    let loaded = load_vit(&checkpoint, None, &Overrides::default())?;
    on_device!(arguments.device, &loaded.config, |backend| {
        run_on(arguments, asked, &checkpoint, loaded, backend)
    })
}

fn run_on<B: Runner>(
    arguments: &Arguments,
    asked: Vec<Reduction>,
    checkpoint: &Checkpoint,
    loaded: LoadedVit,
    backend: B,
) -> Result<(), Failure> {
    if !arguments.json {
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "foveate {}: {} pictures of clothes, a small vision transformer, {}; nothing is downloaded",
            env!("CARGO_PKG_VERSION"),
            assets::IMAGES.len(),
            backend.describe(),
        )?;
        out.flush()?;
    }
    let demo = Demo::new(checkpoint, loaded, backend)?;
    let methods = demo.methods(asked)?;
    if !arguments.json {
        demo.introduce(&mut io::stdout().lock())?;
    }
    let (outcomes, rounds) = demo.outcomes(&methods)?;
    if !arguments.json {
        demo.text(&outcomes, rounds, &mut io::stdout().lock())?;
    }
    // Who asks for methods by name wants to see those.
    let others = arguments.reduce.is_empty().then(|| Others::new(&demo, &outcomes[0])).transpose()?;
    if let Some(others) = others.as_ref().filter(|_| !arguments.json) {
        others.text(demo.items.len(), &mut io::stdout().lock())?;
    }
    if !arguments.no_picture {
        let sheet = sheet::draw(&demo, &outcomes)?;
        save_png(&arguments.output, &sheet)?;
        if !arguments.json {
            writeln!(
                io::stdout(),
                "\n{}: each picture beside the tokens that are left",
                arguments.output.display()
            )?;
        }
    }
    if arguments.json {
        let mut document = demo.json(&outcomes, rounds, arguments);
        document["others"] = json!(others.as_ref().map(Others::json));
        write_json(&document)?;
    }
    Ok(())
}

/// The usual methods for a model of `tokens` tokens: r in proportion.
fn usual(tokens: usize) -> Vec<String> {
    let scaled = |r: usize| (r * tokens / PUBLISHED_TOKENS).max(1);
    METHODS
        .iter()
        .map(|(front, r, back)| {
            format!("{front}{}{back}", r.map_or_else(String::new, |r| scaled(r).to_string()))
        })
        .collect()
}

impl<B: Runner> Demo<B> {
    fn new(checkpoint: &Checkpoint, loaded: LoadedVit, backend: B) -> Result<Self, Failure> {
        let LoadedVit { config, params, .. } = loaded;
        let labels = config.labels.clone().ok_or_else(|| broken("its model has no labels"))?;
        let mut items = Vec::new();
        for &(name, bytes) in assets::IMAGES {
            let (number, truth) = name
                .strip_suffix(".png")
                .and_then(|stem| stem.split_once('_'))
                .and_then(|(number, word)| {
                    Some((number, labels.iter().position(|label| file_word(label) == word)?))
                })
                .ok_or_else(|| broken(&format!("{name} is named after no label")))?;
            let picture = config.transform.apply(&decode(name, bytes)?, config.image)?;
            items.push(Item { number, picture, truth });
        }
        let pictures: Vec<Picture> = items.iter().map(|item| item.picture.clone()).collect();
        Ok(Self {
            parameters: Parameters::of(&params).total(),
            test_top1: checkpoint.metadata().get("test_top1").and_then(|text| text.parse().ok()),
            model: vit(backend, config, params)?,
            labels,
            items,
            images: batch(&pictures)?,
        })
    }

    fn config(&self) -> &VitConfig {
        self.model.config()
    }

    /// The dense model first, then what was asked for, or the usual.
    fn methods(&self, asked: Vec<Reduction>) -> Result<Vec<Reduction>, Failure> {
        let mut methods = vec![Reduction::None];
        if asked.is_empty() {
            methods.extend(reductions(&usual(self.config().tokens()))?);
        } else {
            methods.extend(asked.into_iter().filter(|method| *method != Reduction::None));
        }
        for method in &methods {
            method.check(&self.model.host())?;
        }
        Ok(methods)
    }

    /// What a method makes of the pictures, without its speed.
    fn outcome(&self, method: &Reduction) -> Result<Outcome, Failure> {
        let output = self.model.forward(&self.images, method)?;
        let logits = output.logits.as_ref().ok_or_else(|| broken("its model has no head"))?;
        let macs = ModelMacs::of_host(self.config(), &self.model.host(), method);
        Ok(Outcome {
            method: method.clone(),
            guesses: guesses(&self.model.backend().download(logits)?, 1).into_iter().flatten().collect(),
            map: output.source_map(self.model.backend())?,
            token_counts: token_counts(method, self.config().tokens(), &self.model.host()),
            macs: macs.sum().total(Convention::Fvcore),
            speed: None,
        })
    }

    /// Runs every method once for its results, then all of them in turn for their speed.
    fn outcomes(&self, methods: &[Reduction]) -> Result<(Vec<Outcome>, usize), Failure> {
        let progress = Progress::spinner("running and measuring");
        let mut outcomes = Vec::new();
        for method in methods {
            outcomes.push(self.outcome(method)?);
        }
        if !self.model.backend().keeps_time() {
            progress.finish();
            return Ok((outcomes, 0));
        }
        let ready = methods.iter().map(|method| B::ready(&self.model, method, self.items.len()));
        let mut ready = ready.collect::<foveate::Result<Vec<_>>>()?;
        let seconds = in_turn(methods.len(), &PATIENCE, |which| Ok(ready[which](&self.images)?))?;
        for (outcome, times) in outcomes.iter_mut().zip(&seconds) {
            outcome.speed = Some(Speed {
                images_per_second: self.items.len() as f64 / median(times).max(1e-9),
                speedup: speedup(&seconds[0], times),
            });
        }
        progress.finish();
        Ok((outcomes, seconds[0].len()))
    }

    fn correct(&self, outcome: &Outcome) -> usize {
        self.items.iter().zip(&outcome.guesses).filter(|(item, guess)| item.truth == guess.class).count()
    }

    fn agreement(dense: &Outcome, outcome: &Outcome) -> usize {
        dense.guesses.iter().zip(&outcome.guesses).filter(|(a, b)| a.class == b.class).count()
    }

    fn introduce(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let config = self.config();
        let accuracy = self
            .test_top1
            .map_or_else(String::new, |top1| format!(", {} right on the 10,000 test images", percent(top1)));
        writeln!(
            out,
            "model: {} blocks, {} wide, {} tokens, {} parameters{accuracy}\n",
            config.depth,
            config.width,
            config.tokens(),
            thousands(self.parameters),
        )?;
        Ok(out.flush()?)
    }

    fn text(&self, outcomes: &[Outcome], rounds: usize, out: &mut dyn Write) -> Result<(), Failure> {
        let dense = &outcomes[0];
        let of = format!("/{}", self.items.len());
        let mut table = Table::new([
            ("", Align::Right),
            ("method", Align::Left),
            ("tokens", Align::Left),
            ("MACs", Align::Right),
            ("share", Align::Right),
            ("images/s", Align::Right),
            ("speed", Align::Right),
            ("right", Align::Right),
            ("agree", Align::Right),
        ]);
        for (number, outcome) in outcomes.iter().enumerate() {
            table.row([
                number.to_string(),
                outcome.method.to_string(),
                token_path(&outcome.token_counts),
                quantity(outcome.macs),
                format!("{:.0} %", 100.0 * outcome.macs as f64 / dense.macs as f64),
                outcome.speed.as_ref().map_or_else(|| "-".to_owned(), |s| three_digits(s.images_per_second)),
                outcome.speed.as_ref().map_or_else(|| "-".to_owned(), |s| format!("{:.2}x", s.speedup)),
                format!("{}{of}", self.correct(outcome)),
                format!("{}{of}", Self::agreement(dense, outcome)),
            ]);
        }
        table.write(out)?;
        let device = self.model.backend().describe();
        let speed = if rounds == 0 {
            format!("not measured: what {device} takes says nothing about a card")
        } else {
            format!("against method 0, measured in turn; median of {rounds} rounds on {device}")
        };
        writeln!(
            out,
            "\nMACs: multiply-adds per image. Agree: answers as method 0 does.\nSpeed: {speed}.\n"
        )?;
        self.predictions(outcomes).write(out)?;
        writeln!(
            out,
            "\nNumbers are percent: how sure of the right answer; after a name, how sure of this wrong one."
        )?;
        Ok(out.flush()?)
    }

    /// What every method says about every picture, in at most [`COLUMNS`] columns.
    fn predictions(&self, outcomes: &[Outcome]) -> Table {
        let mut letters = 14;
        loop {
            let table = self.predictions_with(outcomes, letters);
            if letters == 4 || table.width() <= COLUMNS {
                return table;
            }
            letters -= 1;
        }
    }

    fn predictions_with(&self, outcomes: &[Outcome], letters: usize) -> Table {
        let heads: Vec<String> = outcomes
            .iter()
            .enumerate()
            .map(|(number, outcome)| {
                let spec = outcome.method.to_string();
                format!("{number} {}", spec.split(':').next().unwrap_or_default())
            })
            .collect();
        let first = [("no.", Align::Left), ("picture of", Align::Left)];
        let mut table =
            Table::new(first.into_iter().chain(heads.iter().map(|head| (&head[..], Align::Right))));
        for (at, item) in self.items.iter().enumerate() {
            let cells = outcomes.iter().map(|outcome| {
                let guess = &outcome.guesses[at];
                let label: String = if guess.class == item.truth {
                    String::new()
                } else {
                    self.labels[guess.class].chars().take(letters).chain([' ']).collect()
                };
                format!("{label}{:.0}", 100.0 * guess.probability)
            });
            table.row([item.number.to_owned(), self.labels[item.truth].clone()].into_iter().chain(cells));
        }
        table
    }

    fn json(&self, outcomes: &[Outcome], rounds: usize, arguments: &Arguments) -> Value {
        let dense = &outcomes[0];
        let methods: Vec<Value> = outcomes
            .iter()
            .map(|outcome| {
                json!({
                    "reduction": outcome.method.to_string(),
                    "tokens": outcome.token_counts,
                    "macs": outcome.macs,
                    "macs_share": outcome.macs as f64 / dense.macs as f64,
                    "images_per_second": outcome.speed.as_ref().map(|speed| speed.images_per_second),
                    "speedup": outcome.speed.as_ref().map(|speed| speed.speedup),
                    "correct": self.correct(outcome),
                    "agreement": Self::agreement(dense, outcome),
                })
            })
            .collect();
        let images: Vec<Value> = self
            .items
            .iter()
            .enumerate()
            .map(|(at, item)| {
                let predictions: Vec<Value> = outcomes
                    .iter()
                    .map(|outcome| {
                        let mut guess = outcome.guesses[at].json(Some(&self.labels));
                        guess["reduction"] = json!(outcome.method.to_string());
                        guess
                    })
                    .collect();
                json!({"image": item.number, "truth": self.labels[item.truth], "predictions": predictions})
            })
            .collect();
        json!({
            "command": "demo",
            "version": env!("CARGO_PKG_VERSION"),
            "model": model_json(self.config()),
            "parameters": self.parameters,
            "test_top1": self.test_top1,
            "backend": B::NAME,
            "dtype": self.model.backend().storage(),
            "threads": self.model.backend().threads(),
            "rounds": rounds,
            "methods": methods,
            "images": images,
            "picture": (!arguments.no_picture).then(|| arguments.output.display().to_string()),
        })
    }
}

/// A label as file names spell it.
fn file_word(label: &str) -> String {
    label.to_lowercase().replace([' ', '/'], "_")
}

/// The demo's own files contradict each other: our mistake, not the user's.
fn broken(what: &str) -> Failure {
    Failure::Other(format!("the demo is broken: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r_follows_the_number_of_tokens() {
        let published = usual(197);
        assert_eq!(published[..3], ["tome:r=13", "tome:r=16,schedule=decreasing", "mctf:r=16"]);
        assert_eq!(usual(50)[..3], ["tome:r=3", "tome:r=4,schedule=decreasing", "mctf:r=4"]);
        assert!(reductions(&usual(1)).is_ok());
    }
}
