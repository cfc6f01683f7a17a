//! Runs a grid: blocks one after the other, warps in slices.

use super::block::Block;
use super::core::Core;
use super::inst::Kernel;
use super::schedule::{self, Stop};
use super::warp::{BlockIds, State, Warp};
use crate::check::global::GlobalRace;
use crate::config::{Check, Config, Level, Order};
use crate::count::Counters;
use crate::mem::Memory;
use crate::report::{Fault, Reports};
use std::collections::VecDeque;

/// What to launch.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub dynamic_shared: u32,
    /// Parameter bytes at the kernel's offsets.
    pub params: Vec<u8>,
    /// All blocks are resident from the start.
    pub cooperative: bool,
    /// Stream handle, for reports.
    pub stream: u64,
    /// Running number of the launch.
    pub ordinal: u64,
    /// Blocks that fit the device at once.
    pub resident: u64,
}

/// How a launch went.
#[derive(Debug)]
pub struct Outcome {
    /// What was counted.
    pub counters: Counters,
    /// The first fault.
    pub fault: Option<Fault>,
    /// What the kernel printed.
    pub printed: String,
}

/// Instructions of a slice, and those after which a block that has not ended makes room for another.
const SLICE: u64 = 4096;
const PARK: u64 = 50_000_000;
/// The same where blocks are meant to wait for each other.
const TURN: u64 = 200_000;

struct Resident {
    block: Block,
    warps: Vec<Warp>,
    done: Vec<bool>,
    waiting: Vec<bool>,
}

enum BlockEnd {
    Done,
    Parked,
    Fault,
}

struct Run<'a> {
    kernel: &'a Kernel,
    spec: &'a Spec,
    memory: &'a mut Memory,
    config: &'a Config,
    reports: &'a mut Reports,
    counters: Counters,
    global_race: GlobalRace,
    fault: Option<Fault>,
    printed: String,
    label: String,
    spent: u64,
    random: u64,
}

/// Runs a kernel over a grid. The caller has checked the launch dimensions.
pub fn run(
    kernel: &Kernel,
    spec: &Spec,
    memory: &mut Memory,
    config: &Config,
    reports: &mut Reports,
) -> Outcome {
    let [gx, gy, gz] = spec.grid;
    let [bx, by, bz] = spec.block;
    let label = format!(
        "launch #{}: grid ({gx},{gy},{gz}) block ({bx},{by},{bz}) dynamic shared {}, stream {:#x}",
        spec.ordinal, spec.dynamic_shared, spec.stream
    );
    let seed = match config.order {
        Order::Random(seed) => seed ^ 0x9e37_79b9_7f4a_7c15,
        _ => 0x2545_f491_4f6c_dd1d,
    } ^ config.seed.unwrap_or(0).wrapping_mul(0xd134_2543_de82_ef95);
    let mut run = Run {
        kernel,
        spec,
        memory,
        config,
        reports,
        counters: Counters::new(kernel, config.count),
        global_race: GlobalRace::default(),
        fault: None,
        printed: String::new(),
        label,
        spent: 0,
        random: seed.max(1),
    };
    run.global_race.start();
    run.grid();
    run.counters.nondeterministic_atomics = run.global_race.contended_floats();
    run.counters.finish();
    Outcome { counters: run.counters, fault: run.fault, printed: run.printed }
}

impl Run<'_> {
    fn grid(&mut self) {
        let [gx, gy, gz] = self.spec.grid.map(u64::from);
        let total = gx * gy * gz;
        let mut next = 0;
        let mut free: Vec<Resident> = Vec::new();
        let mut resident: VecDeque<Resident> = VecDeque::new();
        let room = self.spec.resident.max(1) as usize;
        if self.spec.cooperative {
            while next < total {
                resident.push_back(self.open(next, total, None));
                next += 1;
            }
        }
        loop {
            // A block that spins on another gives way to blocks that have not started, then to the other resident ones.
            let fresh = next < total && resident.len() < room;
            let mut current = if fresh {
                let opened = self.open(next, total, free.pop());
                next += 1;
                opened
            } else if let Some(parked) = resident.pop_front() {
                parked
            } else {
                return;
            };
            match self.block(&mut current) {
                BlockEnd::Done => {
                    if free.is_empty() {
                        free.push(current);
                    }
                }
                BlockEnd::Parked => resident.push_back(current),
                BlockEnd::Fault => return,
            }
        }
    }

    fn open(&mut self, position: u64, total: u64, reuse: Option<Resident>) -> Resident {
        let [gx, gy, _] = self.spec.grid.map(u64::from);
        let index = match self.config.order {
            Order::Forward => position,
            Order::Reverse => total - 1 - position,
            Order::Random(seed) => permute(position, total, seed),
        };
        let kernel = self.kernel;
        let shared = kernel.shared_dynamic + self.spec.dynamic_shared;
        let ids = BlockIds {
            ctaid: [(index % gx) as u32, (index / gx % gy) as u32, (index / (gx * gy)) as u32],
            nctaid: self.spec.grid,
            ntid: self.spec.block,
            smid: (index % u64::from(self.config.model.sms)) as u32,
            nsmid: self.config.model.sms,
            gridid: self.spec.ordinal as u32,
            dynamic_shared: self.spec.dynamic_shared,
            total_shared: shared,
        };
        let mut resident = reuse.unwrap_or_else(|| Resident {
            block: Block::default(),
            warps: Vec::new(),
            done: Vec::new(),
            waiting: Vec::new(),
        });
        let race =
            self.config.level(Check::Race) != Level::Off || self.config.level(Check::Intra) != Level::Off;
        resident.block.start(index, ids, shared, race);
        let warps = resident.block.warps as usize;
        resident.warps.resize_with(warps, Warp::default);
        let track = self.config.level(Check::Uninit) != Level::Off;
        for (id, warp) in resident.warps.iter_mut().enumerate() {
            warp.start(kernel, id as u32, &ids, track);
        }
        resident.done.clear();
        resident.done.resize(warps, false);
        resident.waiting.clear();
        resident.waiting.resize(warps, false);
        resident
    }

    /// Runs a block until it ends or has had its turn.
    fn block(&mut self, resident: &mut Resident) -> BlockEnd {
        let count = resident.warps.len();
        let mut turn = if self.spec.cooperative { TURN } else { PARK };
        loop {
            let mut progress = false;
            for position in 0..count {
                let w = match self.config.order {
                    Order::Forward if self.config.seed.is_none() => position,
                    Order::Reverse => count - 1 - position,
                    _ => (position + (self.next_random() % count as u64) as usize) % count,
                };
                if resident.done[w] || resident.waiting[w] {
                    continue;
                }
                progress = true;
                let slice =
                    if self.config.seed.is_some() { 1 + self.next_random() % (2 * SLICE) } else { SLICE };
                let mut left = slice;
                let stop = schedule::run(&mut self.core(resident, w), &mut left);
                let used = slice - left;
                turn = turn.saturating_sub(used.max(1));
                self.spent += used;
                match stop {
                    Stop::Fault => return BlockEnd::Fault,
                    Stop::Slice | Stop::Arrived => {}
                    Stop::Done => resident.done[w] = true,
                    Stop::Waiting => resident.waiting[w] = true,
                }
                if stop != Stop::Slice && !self.release(resident, w) {
                    return BlockEnd::Fault;
                }
                if self.spent > self.config.budget {
                    self.runaway(resident, w);
                    return BlockEnd::Fault;
                }
            }
            if resident.done.iter().all(|&done| done) {
                return BlockEnd::Done;
            }
            // A random order may pass over a warp in one round; only a round in which nobody can run is a deadlock.
            if !progress && (0..count).all(|w| resident.done[w] || resident.waiting[w]) {
                self.deadlock(resident);
                return BlockEnd::Fault;
            }
            if turn == 0 {
                return BlockEnd::Parked;
            }
        }
    }

    fn core<'b>(&'b mut self, resident: &'b mut Resident, warp: usize) -> Core<'b> {
        Core {
            warp: &mut resident.warps[warp],
            block: &mut resident.block,
            memory: self.memory,
            kernel: self.kernel,
            params: &self.spec.params,
            config: self.config,
            counters: &mut self.counters,
            global_race: &mut self.global_race,
            reports: self.reports,
            launch: &self.label,
            fault: &mut self.fault,
            resumed: false,
            printed: &mut self.printed,
        }
    }

    /// Completes barriers that have everyone they wait for; false after a fault.
    fn release(&mut self, resident: &mut Resident, warp: usize) -> bool {
        for id in 0..resident.block.barriers.len() {
            let barrier = &resident.block.barriers[id];
            if barrier.idle() || !barrier.complete(&resident.block.live) {
                continue;
            }
            let mut waited = barrier.participants();
            waited.retain(|&w| !barrier.arrive_only[w as usize]);
            let whole = barrier.count.is_none();
            let exited = whole && resident.block.live.contains(&0);
            let pc = waited.first().map_or(0, |&w| barrier.pc[w as usize]);
            if exited && self.config.level(Check::Misuse) != Level::Off {
                let mut core = self.core(resident, warp);
                let inst = &core.kernel.insts[pc as usize];
                let lines =
                    vec!["Barrier completes although threads of the block have exited without it".to_owned()];
                core.find(Check::Misuse, Fault::LaunchFailed, inst, u32::MAX, lines);
                if core.fault.is_some() {
                    return false;
                }
            }
            resident.block.barriers[id].reset();
            self.counters.barriers += 1;
            if let Some(race) = &mut resident.block.race {
                race.barrier(id as u32, &waited);
            }
            self.global_race.barrier(resident.block.index);
            for (w, state) in resident.warps.iter_mut().enumerate() {
                for group in &mut state.groups {
                    if group.state == State::Barrier(id as u32) {
                        group.state = State::Released;
                        resident.waiting[w] = false;
                    }
                }
            }
        }
        true
    }

    fn deadlock(&mut self, resident: &mut Resident) {
        let mut lines = vec!["Deadlock: every warp of the block waits".to_owned()];
        for warp in &resident.warps {
            for group in &warp.groups {
                let inst = &self.kernel.meta[group.pc as usize];
                let source = self.kernel.source_of(group.pc).map(|s| format!(" ({s})")).unwrap_or_default();
                let state = match group.state {
                    State::Barrier(id) => format!("at barrier {id}"),
                    _ => "for other lanes of its warp".to_owned(),
                };
                lines.push(format!(
                    "warp {} lanes {:08x} waits {state}, ptx line {}{source}: {}",
                    warp.id, group.mask, inst.line, inst.text
                ));
            }
        }
        let Some(first) = resident.warps.iter().position(|w| !w.groups.is_empty()) else { return };
        let group = resident.warps[first].groups[0];
        let mut core = self.core(resident, first);
        let inst = &core.kernel.insts[group.pc as usize];
        core.find(Check::Barrier, Fault::LaunchFailed, inst, group.mask, lines);
        // With the check off there is still nothing that could run.
        self.fault.get_or_insert(Fault::LaunchFailed);
    }

    fn runaway(&mut self, resident: &mut Resident, warp: usize) {
        let pc = resident.warps[warp].groups.first().map_or(0, |g| g.pc);
        let lines = vec![format!(
            "Deadlock: the launch has used its budget of {} warp instructions (EMU_BUDGET)",
            self.config.budget
        )];
        let mut core = self.core(resident, warp);
        let inst = &core.kernel.insts[pc as usize];
        core.find(Check::Bounds, Fault::Timeout, inst, u32::MAX, lines);
    }

    fn next_random(&mut self) -> u64 {
        // xorshift64*: good enough to shuffle, and the same everywhere.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// A permutation of `0..total` that needs no table: a Feistel network over the next power of four, walked until it lands inside.
fn permute(position: u64, total: u64, seed: u64) -> u64 {
    let half = (64 - total.max(2).saturating_sub(1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half) - 1;
    let mut value = position;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..4u64 {
            let mut mixed = right ^ seed.wrapping_add(round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (left, right) = (right, left ^ ((mixed >> 31) & mask));
        }
        value = left << half | right;
        if value < total {
            return value;
        }
    }
}
