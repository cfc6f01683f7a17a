//! Reports: blocks of lines modelled on compute-sanitizer (specification section 10).

use crate::config::{Check, Config, Level};
use std::collections::HashMap;
use std::fmt::Write;

/// A fault makes every later driver call fail with this code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `CUDA_ERROR_ILLEGAL_ADDRESS`.
    IllegalAddress,
    /// `CUDA_ERROR_MISALIGNED_ADDRESS`.
    Misaligned,
    /// `CUDA_ERROR_ASSERT`.
    Assert,
    /// `CUDA_ERROR_LAUNCH_FAILED`.
    LaunchFailed,
    /// `CUDA_ERROR_LAUNCH_TIMEOUT`: the instruction budget is spent.
    Timeout,
}

impl Fault {
    /// The documented `CUresult`.
    pub const fn code(self) -> i32 {
        match self {
            Self::IllegalAddress => 700,
            Self::Timeout => 702,
            Self::Assert => 710,
            Self::Misaligned => 716,
            Self::LaunchFailed => 719,
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The check that found it.
    pub check: Check,
    /// Whether it failed the launch.
    pub level: Level,
    /// Kernel, or empty.
    pub kernel: String,
    /// PTX line, or 0.
    pub line: u32,
    /// All lines, each beginning with `=========`.
    pub text: String,
    /// How often the same thing was found.
    pub count: u64,
}

/// All findings since the last clearing.
#[derive(Debug, Default)]
pub struct Reports {
    list: Vec<Report>,
    seen: HashMap<(String, String, u32), (u64, usize)>,
    /// Findings are also printed to standard error.
    pub print: bool,
    /// The process aborts after an error.
    pub abort: bool,
}

/// Full texts kept of one kind at one line; later ones are only counted.
const KEEP: u64 = 20;

impl Reports {
    /// Nothing found yet.
    pub fn new(config: &Config) -> Self {
        Self { print: true, abort: config.abort_on_fault, ..Self::default() }
    }

    /// Files a finding. The first line starts with a fixed word per kind: Invalid, Misaligned, Undefined, Race, Barrier, Deadlock,
    /// Leak, `StreamOrder`, `ReadOnly`, Misuse.
    pub fn push(&mut self, check: Check, level: Level, kernel: &str, line: u32, lines: &[String]) {
        if level == Level::Off {
            return;
        }
        let first = lines.first().cloned().unwrap_or_default();
        let word = first.split(' ').next().unwrap_or_default().to_owned();
        let entry = self.seen.entry((word, kernel.to_owned(), line)).or_insert((0, self.list.len()));
        entry.0 += 1;
        if entry.0 > KEEP {
            let index = entry.1;
            if let Some(report) = self.list.get_mut(index) {
                report.count += 1;
            }
            return;
        }
        let mark = if level == Level::Warn { " (warning)" } else { "" };
        let mut text = String::new();
        for (i, line) in lines.iter().enumerate() {
            let indent = if i == 0 { "" } else { "    " };
            let mark = if i == 0 { mark } else { "" };
            let _ = writeln!(text, "========= {indent}{line}{mark}");
        }
        if self.print {
            eprint!("{text}");
        }
        if entry.0 == 1 {
            entry.1 = self.list.len();
        }
        self.list.push(Report { check, level, kernel: kernel.to_owned(), line, text, count: 1 });
        if self.abort && level == Level::Error {
            std::process::abort();
        }
    }

    /// What was found, in order.
    pub fn all(&self) -> &[Report] {
        &self.list
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.list.clear();
        self.seen.clear();
    }
}
