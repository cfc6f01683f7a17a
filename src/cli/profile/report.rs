//! What is printed.

use std::io::Write;

use foveate::{Reduction, model::Vit};
use serde_json::{Value, json};

use super::{
    Arguments,
    cost::{Profile, Segment},
};
use crate::cli::{
    device::Runner,
    failure::Failure,
    info::model_json,
    report::{Align, Table, counted, percent, quantity, three_digits, token_path},
};

/// The first profile, and the dense one beside it.
pub(super) struct Report<'a, B: Runner> {
    pub(super) name: String,
    pub(super) arguments: &'a Arguments,
    pub(super) model: &'a Vit<B>,
    pub(super) method: &'a Reduction,
    pub(super) profiles: &'a [Profile],
}

impl<B: Runner> Report<'_, B> {
    fn dense(&self) -> Option<&Profile> {
        self.profiles.get(1)
    }

    pub(super) fn text(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let (profile, backend) = (&self.profiles[0], self.model.backend());
        let timed = backend.keeps_time();
        writeln!(
            out,
            "{}, {}: {} per batch, {} ({}, {}), {}",
            self.name,
            self.method,
            counted(profile.batch, "image"),
            backend.describe(),
            B::NAME,
            backend.storage(),
            if timed {
                format!("median of {}", counted(usize::from(self.arguments.runs), "run"))
            } else {
                "not timed: what the emulated driver takes says nothing about a card".to_owned()
            },
        )?;
        writeln!(out)?;
        self.table(timed).write(out)?;
        writeln!(out)?;
        let ratio = |of: &dyn Fn(&Profile) -> f64, dense: &Profile| of(profile) / of(dense);
        if let Some(rate) = profile.images_per_second() {
            write!(out, "{} images/s", three_digits(rate))?;
            if let Some((dense, rate)) =
                self.dense().and_then(|dense| Some((dense, dense.images_per_second()?)))
            {
                let share = ratio(&|p| p.milliseconds.unwrap_or(0.0), dense);
                write!(
                    out,
                    ", dense {}\ntime {} of dense ({} times as fast)",
                    three_digits(rate),
                    three_digits(share),
                    three_digits(1.0 / share)
                )?;
            }
        }
        if let Some(dense) = self.dense() {
            writeln!(
                out,
                "{}MACs {} of dense ({} of {})",
                if timed { ", " } else { "" },
                three_digits(ratio(&|p| p.macs() as f64, dense)),
                quantity(profile.macs()),
                quantity(dense.macs()),
            )?;
        } else if timed {
            writeln!(out)?;
        }
        Ok(out.flush()?)
    }

    fn table(&self, timed: bool) -> Table {
        let profile = &self.profiles[0];
        let mut columns =
            vec![("", Align::Left), ("tokens", Align::Left), ("MMACs", Align::Right), ("MB", Align::Right)];
        if timed {
            columns.extend([("ms", Align::Right), ("share", Align::Right), ("GMAC/s", Align::Right)]);
        }
        match (self.dense(), timed) {
            (None, _) => {}
            (Some(_), true) => columns.extend([("dense ms", Align::Right), ("of dense", Align::Right)]),
            (Some(_), false) => columns.extend([("dense MMACs", Align::Right), ("dense MB", Align::Right)]),
        }
        let mut table = Table::new(columns);
        let mut row = |segment: &Segment, share: String, dense: Option<&Segment>| {
            let millions = |number: u64| three_digits(number as f64 / 1e6);
            let mut cells = vec![
                segment.name.clone(),
                token_path(&segment.tokens),
                millions(segment.macs),
                millions(segment.bytes),
            ];
            if let Some(ms) = segment.milliseconds {
                cells.extend([
                    three_digits(ms),
                    share,
                    three_digits(segment.macs as f64 / 1e6 / ms.max(1e-9)),
                ]);
            }
            if let Some(dense) = dense {
                cells.extend(match (segment.milliseconds, dense.milliseconds) {
                    (Some(ms), Some(dense)) => [three_digits(dense), three_digits(ms / dense.max(1e-9))],
                    _ => [millions(dense.macs), millions(dense.bytes)],
                });
            }
            table.row(cells);
        };
        for (at, segment) in profile.segments.iter().enumerate() {
            let share = profile.share(segment).map_or_else(String::new, percent);
            row(segment, share, self.dense().map(|dense| &dense.segments[at]));
        }
        row(&profile.total(), String::new(), self.dense().map(Profile::total).as_ref());
        table
    }

    pub(super) fn json(&self) -> Value {
        let (profile, backend) = (&self.profiles[0], self.model.backend());
        let segments: Vec<Value> = profile
            .segments
            .iter()
            .enumerate()
            .map(|(at, segment)| {
                let dense = self.dense().map(|dense| &dense.segments[at]);
                json!({
                    "name": segment.name,
                    "tokens_in": segment.tokens[0],
                    "tokens_out": segment.tokens[1],
                    "macs": segment.macs,
                    "bytes": segment.bytes,
                    "milliseconds": segment.milliseconds,
                    "share": profile.share(segment),
                    "dense_macs": dense.map(|dense| dense.macs),
                    "dense_bytes": dense.map(|dense| dense.bytes),
                    "dense_milliseconds": dense.and_then(|dense| dense.milliseconds),
                })
            })
            .collect();
        let mut document = json!({
            "command": "profile",
            "version": env!("CARGO_PKG_VERSION"),
            "name": self.name,
            "model": model_json(self.model.config()),
            "backend": B::NAME,
            "dtype": backend.storage(),
            "batch": profile.batch,
            "threads": backend.threads(),
            "runs": if backend.keeps_time() { self.arguments.runs } else { 0 },
            "reduction": self.method.to_string(),
            "tokens": profile.token_counts,
            "segments": segments,
            "macs": profile.macs(),
            "bytes": profile.bytes(),
            "milliseconds": profile.milliseconds,
            "images_per_second": profile.images_per_second(),
        });
        if let Some(dense) = self.dense() {
            document["dense"] = json!({
                "macs": dense.macs(),
                "bytes": dense.bytes(),
                "milliseconds": dense.milliseconds,
                "images_per_second": dense.images_per_second(),
            });
            let times = profile.milliseconds.zip(dense.milliseconds);
            document["time_ratio"] = json!(times.map(|(ours, dense)| ours / dense));
            document["macs_ratio"] = json!(profile.macs() as f64 / dense.macs() as f64);
        }
        document
    }
}
