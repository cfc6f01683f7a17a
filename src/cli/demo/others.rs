//! The second table: the systems that the first leaves out, so that it stays readable.
//!
//! Methods without weights of their own run on the demo's model and are judged by its pictures. Those that were trained with
//! weights of their own, and other architectures, come with random weights, which cost what trained ones do and know nothing.

use std::{io::Write, time::Duration};

use foveate::{
    Images, Reduction,
    cpu::Cpu,
    macs::{Convention, GridConvention, GridMacs, ModelMacs},
    model::{AffNet, AffNetConfig, Vit, affnet, arch},
    reduction::OwnWeights,
};
use serde_json::{Value, json};

use super::{Demo, Outcome, Speed};
use crate::cli::{
    device::{Ready, Runner},
    failure::Failure,
    measure::{Patience, in_turn, median, speedup},
    options::vit,
    profile::noise,
    progress::Progress,
    report::{Align, Table, counted, quantity, three_digits, token_path},
};

/// On the demo's own model.
const JUDGED: [&str; 3] = ["bat:keep=0.7", "mstm:keep=0.7,scales=none", "mstm:keep=0.7"];

/// What shares and speeds of a model are against.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compared {
    /// Its first row.
    WithItself,
    /// The first row of the model before.
    WithThatBefore,
}

/// Architectures of random weights, and how each is reduced.
const RANDOM: [(&str, &[&str], Compared); 4] = [
    ("deit_tiny", &["none", "dynamicvit:keep=0.7", "svite:tokens=138"], Compared::WithItself),
    ("s2vite_tiny", &["none"], Compared::WithThatBefore),
    ("lvvit_t", &["none", "evit:keep=0.7"], Compared::WithItself),
    ("t2t_vit_7", &["none", "tome:r=13"], Compared::WithItself),
];

/// Where DynamicViT cuts, so many predictors it has.
const CUTS: usize = 3;

/// Stands alone: it has no tokens to reduce.
const AFFNET: &str = "affnet_et";

/// How long the measurement may take. The first round warms up where it is not the only one.
const PATIENCE: Patience = Patience { rounds: 1, most_rounds: 12, budget: Duration::from_secs(2) };

/// Images of one pass: a card is idle with one.
const IMAGES_OF_A_CARD: usize = 16;

/// A row of the table.
struct Other {
    model: &'static str,
    reduction: Reduction,
    /// None of a model that has none.
    tokens: Vec<usize>,
    macs: u64,
    /// The row that it is compared with.
    base: usize,
    /// Right answers, and those of the dense model.
    judged: Option<[usize; 2]>,
    speed: Option<Speed>,
}

/// The rows of the second table: the demo's dense model first, which is not shown.
pub(super) struct Others {
    rows: Vec<Other>,
    /// Images of one pass.
    batch: usize,
    rounds: usize,
}

impl Others {
    /// Judges and measures them; `dense` is what the demo's dense model says. Models of random weights do not run where time
    /// says nothing.
    pub(super) fn new<B: Runner>(demo: &Demo<B>, dense: &Outcome) -> Result<Self, Failure> {
        let progress = Progress::spinner("running and measuring the other systems");
        let mut rows = judged(demo, dense)?;
        rows.extend(random(rows.len())?);
        let backend = demo.model.backend();
        let batch = if B::NAME == <Cpu as Runner>::NAME { 1 } else { IMAGES_OF_A_CARD };
        let mut others = Self { rows, batch, rounds: 0 };
        if backend.keeps_time() {
            others.measure(demo)?;
        }
        progress.finish();
        Ok(others)
    }

    fn measure<B: Runner>(&mut self, demo: &Demo<B>) -> Result<(), Failure> {
        let (backend, batch) = (demo.model.backend(), self.batch);
        let mut models: Vec<(&str, Vit<B>)> = Vec::new();
        for (name, ..) in RANDOM {
            let config = arch::config(name)?;
            let mut params = arch::random_params(&config, 0);
            let needed = OwnWeights { predictors: CUTS, selector: true, ..OwnWeights::default() };
            params.reducers = arch::random_reducers(&config, needed, 0);
            models.push((name, vit(backend.clone(), config, params)?));
        }
        let config = AffNetConfig::published(AFFNET)?;
        let params = affnet::random_params(&config, 0);
        let convolutions = AffNet::new(backend.clone(), config, params)?;
        let mut ready: Vec<(Ready<'_>, Images)> = Vec::new();
        for row in &self.rows {
            if row.model == AFFNET {
                let AffNetConfig { channels, image, .. } = *convolutions.config();
                let run = |images: &Images| {
                    convolutions.forward(images)?;
                    convolutions.backend().wait()
                };
                ready.push((Box::new(run), noise(channels, image, batch)?));
                continue;
            }
            let random = models.iter().find(|(name, _)| *name == row.model);
            let model = random.map_or(&demo.model, |(_, model)| model);
            let images = noise(model.config().channels, model.config().image, batch)?;
            ready.push((B::ready(model, &row.reduction, batch)?, images));
        }
        let mut seconds = in_turn(ready.len(), &PATIENCE, |which| {
            let (run, images) = &mut ready[which];
            Ok(run(images)?)
        })?;
        drop(ready);
        self.rounds = seconds[0].len();
        if self.rounds > 1 {
            // Which warmed up.
            self.rounds -= 1;
            for times in &mut seconds {
                times.remove(0);
            }
        }
        for (row, times) in self.rows.iter_mut().zip(&seconds) {
            row.speed = Some(Speed {
                images_per_second: batch as f64 / median(times).max(1e-9),
                speedup: speedup(&seconds[row.base], times),
            });
        }
        Ok(())
    }

    /// Its share of the multiply-adds of what it is compared with.
    fn share(&self, row: &Other) -> f64 {
        row.macs as f64 / self.rows[row.base].macs as f64
    }

    pub(super) fn text(&self, pictures: usize, out: &mut dyn Write) -> Result<(), Failure> {
        let mut table = Table::new([
            ("model", Align::Left),
            ("method", Align::Left),
            ("tokens", Align::Left),
            ("MACs", Align::Right),
            ("share", Align::Right),
            ("images/s", Align::Right),
            ("speed", Align::Right),
            ("right", Align::Right),
        ]);
        for row in &self.rows[1..] {
            let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
            let speed = row.speed.as_ref();
            table.row([
                row.model.to_owned(),
                row.reduction.to_string(),
                if row.tokens.is_empty() { "-".to_owned() } else { token_path(&row.tokens) },
                quantity(row.macs),
                format!("{:.0} %", 100.0 * self.share(row)),
                or_dash(speed.map(|speed| three_digits(speed.images_per_second))),
                or_dash(speed.map(|speed| format!("{:.2}x", speed.speedup))),
                or_dash(row.judged.map(|[correct, _]| format!("{correct}/{pictures}"))),
            ]);
        }
        writeln!(out, "\nEvery other system:\n")?;
        table.write(out)?;
        writeln!(
            out,
            "\nPublished architectures have random weights here: they know nothing; this is what they cost.\n\
             Share and speed are against the same model without a method; s2vite_tiny's against deit_tiny.",
        )?;
        if self.rounds > 0 {
            let images = counted(self.batch, "image");
            writeln!(
                out,
                "Measured in turn with {images} a pass; median of {}.",
                counted(self.rounds, "round")
            )?;
        }
        Ok(out.flush()?)
    }

    pub(super) fn json(&self) -> Value {
        let row = |row: &Other| {
            json!({
                "model": row.model,
                "random_weights": row.judged.is_none(),
                "reduction": row.reduction.to_string(),
                "tokens": row.tokens,
                "macs": row.macs,
                "macs_share": self.share(row),
                "images_per_second": row.speed.as_ref().map(|speed| speed.images_per_second),
                "speedup": row.speed.as_ref().map(|speed| speed.speedup),
                "correct": row.judged.map(|[correct, _]| correct),
                "agreement": row.judged.map(|[_, agreement]| agreement),
            })
        };
        self.rows[1..].iter().map(row).collect()
    }
}

/// Methods on the demo's model, behind its dense form.
fn judged<B: Runner>(demo: &Demo<B>, dense: &Outcome) -> Result<Vec<Other>, Failure> {
    let row = |outcome: &Outcome| Other {
        model: "the demo's",
        reduction: outcome.method.clone(),
        tokens: outcome.token_counts.clone(),
        macs: outcome.macs,
        base: 0,
        judged: Some([demo.correct(outcome), Demo::<B>::agreement(dense, outcome)]),
        speed: None,
    };
    let mut rows = vec![row(dense)];
    for method in JUDGED {
        rows.push(row(&demo.outcome(&method.parse()?)?));
    }
    Ok(rows)
}

/// Architectures by name; the first of them will be row `first`.
fn random(first: usize) -> Result<Vec<Other>, Failure> {
    let (mut rows, mut dense) = (Vec::new(), first);
    for (model, methods, compared) in RANDOM {
        if compared == Compared::WithItself {
            dense = first + rows.len();
        }
        let config = arch::config(model)?;
        for method in methods {
            let reduction: Reduction = method.parse()?;
            rows.push(Other {
                model,
                tokens: reduction.token_counts(config.tokens(), &config.host()),
                macs: ModelMacs::of(&config, &reduction).sum().total(Convention::Fvcore),
                reduction,
                base: dense,
                judged: None,
                speed: None,
            });
        }
    }
    rows.push(Other {
        model: AFFNET,
        reduction: Reduction::None,
        tokens: Vec::new(),
        macs: GridMacs::sum(&AffNetConfig::published(AFFNET)?).total(GridConvention::Fvcore),
        base: first + rows.len(),
        judged: None,
        speed: None,
    });
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_compared_with_what_they_should_be() {
        let mut rows = random(1).unwrap();
        let speed = || Some(Speed { images_per_second: 1234.5, speedup: 1.234 });
        let dense = Other {
            model: "the demo's",
            judged: Some([20, 20]),
            speed: speed(),
            base: 0,
            ..random(0).unwrap().remove(0)
        };
        let judged = Other { reduction: JUDGED[1].parse().unwrap(), ..random(0).unwrap().remove(0) };
        rows.splice(0..0, [dense]);
        rows.push(Other { judged: Some([20, 20]), speed: speed(), base: 0, ..judged });
        let others = Others { rows, batch: 1, rounds: 0 };
        for row in &others.rows[1..] {
            let base = &others.rows[row.base];
            assert!(base.reduction == Reduction::None && others.share(row) <= 1.0);
            assert_eq!(base.model.replace("the demo's", "deit_tiny"), row.model.replace("s2vite", "deit"));
        }
        let mut text = Vec::new();
        others.text(20, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.lines().any(|line| line.starts_with("s2vite_tiny") && line.contains(" 69 %")), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }
}
