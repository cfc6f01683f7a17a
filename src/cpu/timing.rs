//! How long each kind of operation has taken.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Linear,
    Attention,
    Norm,
    Matching,
    Select,
    Cluster,
    Scores,
    Windows,
    Performer,
    Merge,
    Patches,
    Convolution,
    Frequency,
    Readout,
    Rest,
}

impl Kind {
    const NAMES: [&str; 15] = [
        "linear",
        "attention",
        "norm",
        "matching",
        "select",
        "cluster",
        "scores",
        "windows",
        "performer",
        "merge",
        "patches",
        "convolution",
        "frequency",
        "readout",
        "rest",
    ];
}

/// Sums of times; nothing is measured until it is asked for.
#[derive(Default)]
pub(super) struct Timing {
    wanted: AtomicBool,
    nanoseconds: [AtomicU64; Kind::NAMES.len()],
}

impl Timing {
    pub(super) fn start(&self) {
        self.nanoseconds.iter().for_each(|sum| sum.store(0, Ordering::Relaxed));
        self.wanted.store(true, Ordering::Relaxed);
    }

    pub(super) fn stop(&self) -> Vec<(&'static str, Duration)> {
        self.wanted.store(false, Ordering::Relaxed);
        let times = self.nanoseconds.iter().map(|sum| Duration::from_nanos(sum.load(Ordering::Relaxed)));
        Kind::NAMES.into_iter().zip(times).collect()
    }

    /// Runs something of this kind.
    pub(super) fn of<R>(&self, kind: Kind, run: impl FnOnce() -> R) -> R {
        if !self.wanted.load(Ordering::Relaxed) {
            return run();
        }
        let begun = Instant::now();
        let result = run();
        let taken = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds[kind as usize].fetch_add(taken, Ordering::Relaxed);
        result
    }
}
