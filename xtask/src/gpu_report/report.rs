//! The report's text.

use std::fmt::Write;

use super::Card;

/// How a part ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed(String),
    /// Something that it needs is not there.
    Missing(String),
    Skipped,
}

/// What was run and what it said.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) title: &'static str,
    pub(super) command: String,
    pub(super) outcome: Outcome,
    pub(super) output: String,
}

impl Part {
    /// A part that was left out on request.
    pub(super) fn skipped(title: &'static str) -> Self {
        Self { title, command: String::new(), outcome: Outcome::Skipped, output: String::new() }
    }
}

/// All parts, on one card.
#[derive(Debug)]
pub(super) struct Report {
    head: String,
    parts: Vec<Part>,
}

impl Report {
    pub(super) fn new(card: &Card, nvcc: &str, commit: &str) -> Self {
        let Card { name, driver, capability, memory, clock } = card;
        let head = format!(
            "# {name}\n\n\
             Written by `cargo xtask gpu-report`; every number below was measured on this card.\n\n\
             | card | driver | compute capability | memory | highest clock | nvcc | commit |\n\
             | --- | --- | --- | --- | --- | --- | --- |\n\
             | {name} | {driver} | {capability} | {memory} | {clock} | {nvcc} | {commit} |\n"
        );
        Self { head, parts: Vec::new() }
    }

    pub(super) fn add(&mut self, part: Part) {
        self.parts.push(part);
    }

    /// Whether nothing that ran has failed.
    pub(super) fn good(&self) -> bool {
        !self.parts.iter().any(|part| matches!(part.outcome, Outcome::Failed(_)))
    }

    /// The whole file.
    pub(super) fn text(&self) -> String {
        let mut text = self.head.clone();
        let mut title = "";
        for part in &self.parts {
            if part.title != title {
                title = part.title;
                let _ = write!(text, "\n## {title}\n");
            }
            if !part.command.is_empty() {
                let _ = write!(text, "\n    {}\n", part.command);
            }
            let _ = match &part.outcome {
                Outcome::Done => Ok(()),
                Outcome::Failed(how) => write!(text, "\n**Failed**: {how}.\n"),
                Outcome::Missing(what) => write!(text, "\nNot run: {what}.\n"),
                Outcome::Skipped => write!(text, "\nNot run: left out on request.\n"),
            };
            let output = part.output.trim_end();
            if !output.is_empty() {
                // Tables stay tables; the rest is quoted as it was printed.
                let table = output.starts_with('|');
                let _ = if table {
                    write!(text, "\n{output}\n")
                } else {
                    write!(text, "\n```text\n{output}\n```\n")
                };
            }
        }
        text
    }
}

/// All of an output.
pub(super) fn whole(output: &str) -> String {
    output.to_owned()
}

/// Of `cargo test`: what failed, and the verdict of each file.
pub(super) fn verdicts(output: &str) -> String {
    let kept = output.lines().filter(|line| {
        line.starts_with("test result:")
            || line.ends_with("FAILED")
            || line.starts_with("device:")
            || line.starts_with("SKIPPED")
    });
    kept.fold(String::new(), |text, line| text + line + "\n")
}

/// Of `cargo bench`: criterion's estimates as a table, and above it the lines that are no criterion's: peaks, and whole
/// models, which have tables of their own.
pub(super) fn criterion(output: &str) -> String {
    let (mut rows, mut rest) = (String::new(), String::new());
    let mut name = String::new();
    for line in output.lines() {
        let trimmed = line.trim();
        let estimate = |key: &str| {
            let (front, values) = line.split_once(key)?;
            // The estimate stands between the two ends of its interval.
            let words: Vec<&str> =
                values.trim().strip_prefix('[')?.split(']').next()?.split_whitespace().collect();
            let middle = words.len() / 3;
            (words.len() >= 3).then(|| (front.trim().to_owned(), words[middle..2 * middle].join(" ")))
        };
        if let Some((front, time)) = estimate("time:") {
            if !front.is_empty() {
                name = front;
            }
            let _ = writeln!(rows, "| {name} | {time} |  |");
        } else if let Some((_, rate)) = estimate("thrpt:") {
            if let Some(end) = rows.rfind("|  |") {
                rows.replace_range(end.., &format!("| {rate} |\n"));
            }
        } else if !line.starts_with(' ') && is_name(trimmed) {
            trimmed.clone_into(&mut name);
        } else if trimmed.starts_with('|') || trimmed.contains("peak") {
            rest.push_str(trimmed);
            rest.push('\n');
        }
    }
    if rows.is_empty() {
        return rest;
    }
    let rows = format!("| bench | time | rate |\n| --- | --- | --- |\n{rows}");
    if rest.is_empty() { rows } else { format!("{rows}\n{rest}") }
}

/// Whether a line is a benchmark's name: criterion prints a long one on a line of its own.
fn is_name(line: &str) -> bool {
    line.contains('/') && !line.contains(' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Card {
        Card::parse("NVIDIA A100, 580.65.06, 8.0, 40960 MiB, 1410 MHz").unwrap()
    }

    const BENCH: &str = "\
merge: foveate 0.1.0 on NVIDIA A100; peak 1555 GB/s, 19500 GFLOP/s in f32
merge/b64n197c384h6/f16 time:   [10.100 \u{b5}s 10.200 \u{b5}s 10.300 \u{b5}s]
                        thrpt:  [1.0 GB/s 1.5 GB/s (96.4 % of peak) 1.6 GB/s]
attention/b64n577c1024h16/bf16
                        time:   [1.1 ms 1.2 ms 1.3 ms]
                        change: [-1 % +0 % +1 %]
| deit_small, none | 64 | 1234 |
";

    #[test]
    fn estimates_become_a_table() {
        let table = criterion(BENCH);
        assert!(
            table.starts_with(
                "| bench | time | rate |\n| --- | --- | --- |\n| merge/b64n197c384h6/f16 | 10.200 \u{b5}s |"
            ),
            "{table}"
        );
        assert!(table.contains("| attention/b64n577c1024h16/bf16 | 1.2 ms |  |"), "{table}");
        assert!(
            table.contains("peak 1555 GB/s") && table.contains("| deit_small, none | 64 | 1234 |"),
            "{table}"
        );
        assert!(!table.contains("change"), "{table}");
        assert_eq!(criterion("nothing was timed\n"), "");
    }

    #[test]
    fn verdicts_are_kept_of_tests() {
        let output =
            "running 3 tests\ntest a ... ok\ntest b ... FAILED\n\ntest result: FAILED. 1 passed; 1 failed\n";
        assert_eq!(verdicts(output), "test b ... FAILED\ntest result: FAILED. 1 passed; 1 failed\n");
    }

    #[test]
    fn a_report_says_what_ran_and_what_did_not() {
        let mut report = Report::new(&card(), "13.0.88", "abc1234");
        let part = |title, outcome, output: &str| Part {
            title,
            command: "cargo test".to_owned(),
            outcome,
            output: output.to_owned(),
        };
        report.add(part("Device tests", Outcome::Done, "test result: ok. 9 passed\n"));
        report.add(part("Benches", Outcome::Done, &criterion(BENCH)));
        report.add(part("Nsight Compute", Outcome::Missing("there is no ncu on PATH".to_owned()), ""));
        report.add(Part::skipped("PyTorch and timm"));
        assert!(report.good());
        let text = report.text();
        assert!(text.starts_with("# NVIDIA A100\n"), "{text}");
        assert!(
            text.contains("| NVIDIA A100 | 580.65.06 | 8.0 | 40960 MiB | 1410 MHz | 13.0.88 | abc1234 |"),
            "{text}"
        );
        assert!(
            text.contains("## Device tests\n\n    cargo test\n\n```text\ntest result: ok. 9 passed\n```\n"),
            "{text}"
        );
        assert!(text.contains("## Benches\n\n    cargo test\n\n| bench | time | rate |"), "{text}");
        assert!(text.contains("Not run: there is no ncu on PATH."), "{text}");
        assert!(text.contains("## PyTorch and timm\n\nNot run: left out on request."), "{text}");
        report.add(part("Device tests", Outcome::Failed("exit status: 101".to_owned()), ""));
        assert!(!report.good() && report.text().contains("**Failed**: exit status: 101."));
    }
}
