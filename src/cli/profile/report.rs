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
    launches::Launch,
    report::{Align, Table, counted, percent, quantity, three_digits, token_path},
};

/// Columns of the terminal that a list may take.
const COLUMNS: usize = 100;

/// A list in lines of at most `columns`, those behind the first indented.
fn wrapped(head: &str, words: &[&str], columns: usize) -> Vec<String> {
    let mut lines = vec![head.to_owned()];
    for (at, word) in words.iter().enumerate() {
        let comma = if at + 1 < words.len() { "," } else { "" };
        let last = lines.last().map_or(0, |line| line.chars().count());
        if last + 1 + word.chars().count() + comma.len() > columns {
            lines.push(format!("  {word}{comma}"));
        } else if let Some(line) = lines.last_mut() {
            line.extend([" ", *word, comma]);
        }
    }
    lines
}

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
        self.launches(out)?;
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

    /// What the busiest block launches, and the memory of it all.
    fn launches(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let profile = &self.profiles[0];
        let Some([arena, live]) = profile.memory else { return Ok(()) };
        let blocks = &profile.segments[1..profile.segments.len() - 1];
        let number = |segment: &Segment| segment.launches.as_ref().map_or(0, Vec::len);
        // The first of several.
        let busiest = blocks.iter().rev().max_by_key(|segment| number(segment));
        if let Some((name, launches)) = busiest.and_then(|s| Some((&s.name, s.launches.as_ref()?))) {
            let operations: Vec<&str> = launches.iter().map(|launch| launch.operation.as_str()).collect();
            for line in wrapped(&format!("launches of {name}:"), &operations, COLUMNS) {
                writeln!(out, "{line}")?;
            }
        }
        writeln!(
            out,
            "memory of an engine beside its weights: {} MB, at most {} MB of it in use at a time\n",
            three_digits(arena as f64 / 1e6),
            three_digits(live as f64 / 1e6)
        )?;
        Ok(())
    }

    fn table(&self, timed: bool) -> Table {
        let profile = &self.profiles[0];
        let mut columns = vec![("", Align::Left), ("tokens", Align::Left)];
        let launched = profile.memory.is_some();
        columns.extend(launched.then_some(("launches", Align::Right)));
        columns.extend([("MMACs", Align::Right), ("MB", Align::Right)]);
        if timed {
            columns.extend([("ms", Align::Right), ("share", Align::Right), ("GMAC/s", Align::Right)]);
        }
        match (self.dense(), timed) {
            (None, _) => {}
            (Some(_), true) => columns.extend([("dense ms", Align::Right), ("of dense", Align::Right)]),
            (Some(_), false) => {
                columns.extend(launched.then_some(("dense launches", Align::Right)));
                columns.extend([("dense MMACs", Align::Right), ("dense MB", Align::Right)]);
            }
        }
        let mut table = Table::new(columns);
        let mut row = |segment: &Segment, share: String, dense: Option<&Segment>| {
            let millions = |number: u64| three_digits(number as f64 / 1e6);
            let number =
                |segment: &Segment| segment.launches.as_ref().map(|launches| launches.len().to_string());
            let mut cells = vec![segment.name.clone(), token_path(&segment.tokens)];
            cells.extend(number(segment));
            cells.extend([millions(segment.macs), millions(segment.bytes)]);
            if let Some(ms) = segment.milliseconds {
                cells.extend([
                    three_digits(ms),
                    share,
                    three_digits(segment.macs as f64 / 1e6 / ms.max(1e-9)),
                ]);
            }
            if let Some(dense) = dense {
                if let (Some(ms), Some(dense)) = (segment.milliseconds, dense.milliseconds) {
                    cells.extend([three_digits(dense), three_digits(ms / dense.max(1e-9))]);
                } else {
                    cells.extend(number(dense));
                    cells.extend([millions(dense.macs), millions(dense.bytes)]);
                }
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
                    "launches": segment.launches.as_ref().map(|launches| {
                        launches.iter().map(Launch::json).collect::<Vec<Value>>()
                    }),
                    "milliseconds": segment.milliseconds,
                    "share": profile.share(segment),
                    "dense_macs": dense.map(|dense| dense.macs),
                    "dense_bytes": dense.map(|dense| dense.bytes),
                    "dense_launches": dense.and_then(|dense| dense.launches.as_ref()).map(Vec::len),
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
            "launches": profile.total().launches.map(|launches| launches.len()),
            "arena_bytes": profile.memory.map(|[arena, _]| arena),
            "live_bytes": profile.memory.map(|[_, live]| live),
            "milliseconds": profile.milliseconds,
            "images_per_second": profile.images_per_second(),
        });
        if let Some(dense) = self.dense() {
            document["dense"] = json!({
                "macs": dense.macs(),
                "bytes": dense.bytes(),
                "launches": dense.total().launches.map(|launches| launches.len()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_wrapped() {
        let lines = wrapped("of:", &["one", "two", "three"], 12);
        assert_eq!(lines, ["of: one,", "  two, three"]);
        assert_eq!(wrapped("of:", &["one", "two"], 100), ["of: one, two"]);
    }
}
