//! What changed between two counters.json, and whether it may.

use std::{collections::BTreeMap, fmt};

use serde_json::Value as Json;

/// A cost may be this much higher than the file says. Everything is counted, nothing measured: the room is for changes
/// that are not worth a line in a file's history.
const SLACK: f64 = 0.02;

/// Instructions of an issue slot or two: what counts is how many there are in all, not that four more of them are a jump.
const CHEAP: [&str; 6] = [
    "instructions.control",
    "instructions.cvt",
    "instructions.fp16",
    "instructions.fp32",
    "instructions.int",
    "instructions.move",
];

/// Parts of an entry that say what had to be done, or are worked out from the rest: no costs.
const NO_COST: [&str; 5] = ["bytes.needed", "flops", "kernels", "modelled", "shared.ideal"];

/// What became of an entry.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A cost is higher than it may be.
    Rise { entry: String, cost: String, before: u64, after: u64 },
    /// A cost is lower.
    Drop { entry: String, cost: String, before: u64, after: u64 },
    /// The file does not have it.
    New { entry: String },
    /// The file has it, and nothing launches it any more.
    Missing { entry: String },
}

impl Change {
    fn fails(&self) -> bool {
        !matches!(self, Self::Drop { .. })
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rise { entry, cost, before, after } => {
                write!(f, "RISE     {entry}: {cost} {}", Step { before: *before, after: *after })
            }
            Self::Drop { entry, cost, before, after } => {
                write!(f, "drop     {entry}: {cost} {}", Step { before: *before, after: *after })
            }
            Self::New { entry } => write!(f, "NEW      {entry}: not in the file"),
            Self::Missing { entry } => write!(f, "MISSING  {entry}: in the file, and no longer launched"),
        }
    }
}

struct Step {
    before: u64,
    after: u64,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { before, after } = *self;
        write!(f, "{before} -> {after}")?;
        if before > 0 {
            write!(f, " ({:+.1} %)", 100.0 * (after as f64 / before as f64 - 1.0))?;
        }
        Ok(())
    }
}

/// All changes, entry by entry.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Report {
    changes: Vec<Change>,
    /// The versions of nvcc, where they differ: each makes its own PTX, so no cost can be held to the other's.
    compilers: Option<[String; 2]>,
}

impl Report {
    /// Whether one of the changes has to be accepted by hand.
    pub(crate) fn fails(&self) -> bool {
        self.failing().next().is_some()
    }

    fn failing(&self) -> impl Iterator<Item = &Change> {
        let excused = |change: &Change| self.compilers.is_some() && matches!(change, Change::Rise { .. });
        self.changes.iter().filter(move |change| change.fails() && !excused(change))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.changes.iter().try_for_each(|change| writeln!(f, "{change}"))?;
        if let Some([before, after]) = &self.compilers {
            writeln!(
                f,
                "counters: the file is of nvcc {before}, this is {after}: rises are told and accepted"
            )?;
        }
        if self.changes.is_empty() {
            return writeln!(f, "counters: as in the file");
        }
        let failing = self.failing().count();
        writeln!(f, "counters: {} changed, {failing} of them to be accepted", self.changes.len())
    }
}

/// The numbers of an entry that cost something, by their place: `global.ld.sectors`.
fn costs(entry: &Json) -> BTreeMap<String, u64> {
    fn walk(at: &str, value: &Json, found: &mut BTreeMap<String, u64>) {
        let counts = !NO_COST.contains(&at) && !at.ends_with(".ideal_sectors");
        match value {
            Json::Object(object) if counts => object.iter().for_each(|(key, value)| {
                let inner = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                walk(&inner, value, found);
            }),
            _ if counts => found.extend(value.as_u64().map(|n| (at.to_owned(), n))),
            _ => {}
        }
    }
    let mut found = BTreeMap::new();
    walk("", entry, &mut found);
    found
}

/// What changed from `committed` to `counted`.
pub(crate) fn compare(committed: &Json, counted: &Json) -> Report {
    let empty = serde_json::Map::new();
    let entries = |file: &'_ Json| file["entries"].as_object().cloned().unwrap_or_else(|| empty.clone());
    let (old, new) = (entries(committed), entries(counted));
    let mut changes = Vec::new();
    for (entry, now) in &new {
        let Some(then) = old.get(entry) else {
            changes.push(Change::New { entry: entry.clone() });
            continue;
        };
        let (then, now) = (costs(then), costs(now));
        let mut names: Vec<&String> = then.keys().chain(now.keys()).collect();
        names.sort_unstable();
        names.dedup();
        for cost in names {
            // What did not happen is not in the file.
            let of = |costs: &BTreeMap<String, u64>| costs.get(cost).copied().unwrap_or(0);
            let (before, after) = (of(&then), of(&now));
            let all = then.get("instructions.all").copied();
            let part = all.filter(|_| CHEAP.contains(&cost.as_str())).unwrap_or(before);
            let (entry, cost) = (entry.clone(), cost.clone());
            let conflicts = cost == "shared.bank_conflicts";
            if after < before {
                changes.push(Change::Drop { entry, cost, before, after });
            } else if after as f64 > before as f64 + SLACK * part as f64 || (conflicts && after > before) {
                changes.push(Change::Rise { entry, cost, before, after });
            }
        }
    }
    let gone = old.keys().filter(|entry| !new.contains_key(*entry));
    changes.extend(gone.map(|entry| Change::Missing { entry: entry.clone() }));
    let nvcc = [committed, counted].map(|file| file["nvcc"].as_str().unwrap_or("unknown").to_owned());
    Report { changes, compilers: (nvcc[0] != nvcc[1]).then_some(nvcc) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(sectors: u64, conflicts: u64) -> Json {
        json!({"nvcc": "13.0.88", "entries": {"op/b2/f16": {
            "kernels": "fv_op", "launches": 1, "instructions": {"all": 1000, "int": 900},
            "global": {"ld": {"requests": 10, "sectors": sectors, "ideal_sectors": 7}},
            "shared": {"wavefronts": 1000, "ideal": 1000, "bank_conflicts": conflicts},
            "bytes": {"read": 320, "written": 32, "needed": 300}, "modelled": {"us": 2.5, "bound": "int"},
        }}})
    }

    fn changes(before: &Json, after: &Json) -> Vec<String> {
        compare(before, after).changes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_same_is_no_change() {
        let report = compare(&file(100, 0), &file(100, 0));
        assert_eq!(report, Report::default());
        assert!(!report.fails());
        assert_eq!(report.to_string(), "counters: as in the file\n");
    }

    #[test]
    fn a_rise_beyond_the_slack_fails_and_one_within_it_does_not() {
        assert_eq!(changes(&file(100, 0), &file(102, 0)), [""; 0]);
        let rise = compare(&file(100, 0), &file(103, 0));
        assert!(rise.fails());
        assert_eq!(rise.changes.len(), 1);
        assert_eq!(rise.changes[0].to_string(), "RISE     op/b2/f16: global.ld.sectors 100 -> 103 (+3.0 %)");
    }

    #[test]
    fn one_bank_conflict_more_is_a_rise_however_many_there_were() {
        assert_eq!(
            changes(&file(100, 0), &file(100, 1)),
            ["RISE     op/b2/f16: shared.bank_conflicts 0 -> 1"]
        );
        assert!(compare(&file(100, 1000), &file(100, 1001)).fails());
    }

    #[test]
    fn a_drop_is_told_and_does_not_fail() {
        let drop = compare(&file(100, 4), &file(99, 0));
        assert!(!drop.fails());
        assert_eq!(
            drop.to_string(),
            "drop     op/b2/f16: global.ld.sectors 100 -> 99 (-1.0 %)\n\
             drop     op/b2/f16: shared.bank_conflicts 4 -> 0 (-100.0 %)\n\
             counters: 2 changed, 0 of them to be accepted\n"
        );
    }

    /// Of 1,000 instructions 2 % are 20, whatever their kind; matrix instructions are held to their own number.
    #[test]
    fn cheap_instructions_are_held_to_the_number_of_all() {
        let with = |kind: &str, count: u64| {
            let mut file = file(100, 0);
            file["entries"]["op/b2/f16"]["instructions"][kind] = json!(count);
            file
        };
        assert!(!compare(&with("control", 4), &with("control", 24)).fails());
        assert!(compare(&with("control", 4), &with("control", 25)).fails());
        assert!(compare(&with("mma", 4), &with("mma", 5)).fails());
    }

    #[test]
    fn a_cost_that_was_not_there_is_a_rise() {
        let mut after = file(100, 0);
        after["entries"]["op/b2/f16"]["instructions"]["local"] = json!(1);
        assert_eq!(changes(&file(100, 0), &after), ["RISE     op/b2/f16: instructions.local 0 -> 1"]);
        assert_eq!(
            changes(&after, &file(100, 0)),
            ["drop     op/b2/f16: instructions.local 1 -> 0 (-100.0 %)"]
        );
    }

    #[test]
    fn what_had_to_be_done_and_what_is_modelled_are_no_costs() {
        let mut after = file(100, 0);
        let entry = &mut after["entries"]["op/b2/f16"];
        entry["bytes"]["needed"] = json!(9999);
        entry["modelled"]["us"] = json!(99);
        entry["global"]["ld"]["ideal_sectors"] = json!(99);
        entry["shared"]["ideal"] = json!(9999);
        entry["kernels"] = json!("fv_other");
        assert_eq!(compare(&file(100, 0), &after), Report::default());
    }

    #[test]
    fn another_compiler_excuses_rises_and_nothing_else() {
        let mut after = file(200, 0);
        after["nvcc"] = json!("12.9.1");
        let report = compare(&file(100, 0), &after);
        assert!(!report.fails());
        assert_eq!(
            report.to_string(),
            "RISE     op/b2/f16: global.ld.sectors 100 -> 200 (+100.0 %)\n\
             counters: the file is of nvcc 13.0.88, this is 12.9.1: rises are told and accepted\n\
             counters: 1 changed, 0 of them to be accepted\n"
        );
        after["entries"]["op/b4/f16"] = json!({});
        assert!(compare(&file(100, 0), &after).fails());
    }

    #[test]
    fn new_and_missing_entries_are_told_and_fail() {
        let mut after = file(100, 0);
        let entries = after["entries"].as_object_mut().unwrap();
        let entry = entries.remove("op/b2/f16").unwrap();
        entries.insert("op/b4/f16".to_owned(), entry);
        let report = compare(&file(100, 0), &after);
        assert!(report.fails());
        assert_eq!(
            report.changes,
            [
                Change::New { entry: "op/b4/f16".to_owned() },
                Change::Missing { entry: "op/b2/f16".to_owned() }
            ]
        );
        assert!(compare(&Json::Null, &file(100, 0)).fails(), "no file yet");
    }
}
