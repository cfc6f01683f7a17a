//! Which operations are ordered: a vector clock for the host, each stream and each event (specification section 8.8).

use crate::config::{Check, Level};
use crate::device::Device;
use crate::report::Fault;
use std::collections::HashMap;
use std::sync::Arc;

/// What an operation did with an allocation: index, read, written.
pub(crate) type Access = (usize, bool, bool);

/// How much of each stream has happened before something, and the modelled time at which it happens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    ticks: Vec<u64>,
    /// Seconds of modelled time.
    pub(crate) time: f64,
}

impl Clock {
    /// Everything before `other` is before this too.
    pub(crate) fn join(&mut self, other: &Self) {
        if self.ticks.len() < other.ticks.len() {
            self.ticks.resize(other.ticks.len(), 0);
        }
        for (mine, &theirs) in self.ticks.iter_mut().zip(&other.ticks) {
            *mine = (*mine).max(theirs);
        }
        self.time = self.time.max(other.time);
    }

    fn tick(&mut self, lane: usize) -> u64 {
        if self.ticks.len() <= lane {
            self.ticks.resize(lane + 1, 0);
        }
        self.ticks[lane] += 1;
        self.ticks[lane]
    }

    fn has(&self, operation: &Operation) -> bool {
        self.ticks.get(operation.lane).is_some_and(|&tick| tick >= operation.tick)
    }
}

/// One operation that was submitted.
#[derive(Clone, Debug)]
struct Operation {
    lane: usize,
    tick: u64,
    label: Arc<str>,
}

/// The last conflicting operations on an allocation.
#[derive(Debug, Default)]
struct Uses {
    write: Option<Operation>,
    reads: Vec<Operation>,
}

/// Clocks' common state.
#[derive(Debug, Default)]
pub(crate) struct Order {
    /// What the host knows to be finished.
    pub(crate) host: Clock,
    uses: HashMap<usize, Uses>,
    lanes: usize,
}

impl Order {
    /// A position in the vector clocks for a new stream.
    pub(crate) fn lane(&mut self) -> usize {
        self.lanes += 1;
        self.lanes - 1
    }

    /// An allocation is gone.
    pub(crate) fn forget(&mut self, allocation: usize) {
        self.uses.remove(&allocation);
    }

    /// Enters an operation of `lane` whose predecessors are in `clock`. Unordered conflicts are reported; at level error they
    /// are a fault of the device.
    pub(crate) fn enter(
        &mut self,
        device: &mut Device,
        clock: &mut Clock,
        lane: usize,
        label: &str,
        accesses: &[Access],
        seconds: f64,
    ) {
        let tick = clock.tick(lane);
        clock.time += seconds;
        let level = device.config.level(Check::Stream);
        if level == Level::Off {
            return;
        }
        let now = Operation { lane, tick, label: label.into() };
        for &(allocation, read, written) in accesses {
            let uses = self.uses.entry(allocation).or_default();
            let earlier = uses.write.iter().filter(|op| !clock.has(op)).map(|op| (op, "writes"));
            let readers = uses.reads.iter().filter(|op| written && !clock.has(op)).map(|op| (op, "reads"));
            if let Some((op, does)) = earlier.chain(readers).next() {
                let now_does = if written { "writes" } else { "reads" };
                let what = device.memory.get(allocation).label();
                let lines = [
                    format!("StreamOrder: {} is not ordered after {}", now.label, op.label),
                    format!("the earlier one {does} and the later one {now_does} {what}"),
                    "no stream order, event or synchronisation lies between them".to_owned(),
                ];
                device.reports.push(Check::Stream, level, "", 0, &lines);
                if level == Level::Error {
                    device.fault.get_or_insert(Fault::LaunchFailed);
                }
            }
            if written {
                uses.reads.clear();
                uses.write = Some(now.clone());
            } else if read {
                uses.reads.retain(|op| op.lane != lane && !clock.has(op));
                uses.reads.push(now.clone());
            }
        }
    }
}
