//! Races in shared memory: vector clocks of warps, last accesses of pieces of memory (specification section 8.4).
//!
//! Time is one counter of access instructions, which goes on from block to block. For every pair of warps `clock[w][v]` is the
//! time up to which whatever warp `v` did is ordered before what warp `w` does next; barriers raise it. With v = w it is the time
//! up to which the lanes of a warp are ordered among themselves. A piece of 16 bytes keeps its last plain write and its last plain
//! readers with their times; atomics, several readers and the histories of separate words and bytes go to side tables. Pieces whose
//! last access lies before everything that a warp may still conflict with, which is nearly always so, cost one comparison, and a
//! new block needs no clearing.

use super::history::{PIECE, Past, Piece, SideTables, worse};

/// How an instruction touches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An atomic.
    Atomic,
}

/// One access of a warp instruction.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// Warp number.
    pub warp: u32,
    /// Instruction.
    pub pc: u32,
    /// Lanes taking part.
    pub mask: u32,
    /// Byte offset in shared memory of each lane.
    pub offsets: &'a [u32; 32],
    /// Bytes of each lane.
    pub size: u32,
    /// Kind.
    pub touch: Touch,
    /// What each lane writes, little-endian (only for [`Touch::Write`]): two lanes may write the same value to one word.
    pub values: Option<&'a [u128; 32]>,
}

/// One side of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// Warp.
    pub warp: u32,
    /// Lane.
    pub lane: u32,
    /// Instruction.
    pub pc: u32,
    /// Kind.
    pub touch: Touch,
}

/// Two accesses without order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The earlier one.
    pub first: Side,
    /// The later one.
    pub second: Side,
    /// Byte offset in shared memory.
    pub offset: u32,
    /// Both sides are lanes of one warp, in different instructions.
    pub intra_warp: bool,
}

/// Happens-before state of one block's shared memory.
#[derive(Debug, Default)]
pub struct SharedRace {
    warps: usize,
    /// Counts access instructions, over all blocks.
    now: u32,
    /// `clock[w * warps + v]`.
    clock: Vec<u32>,
    /// The smallest entry of each warp's clock: nothing up to then concerns it.
    floor: Vec<u32>,
    /// What the warps that only arrived at a barrier had done when they did.
    published: Vec<Option<Vec<u32>>>,
    /// Clocks between the lanes of a warp, for warps that have synchronised a part of their lanes.
    lanes: Vec<Option<Box<LaneClocks>>>,
    pieces: Vec<Piece>,
    side: SideTables,
}

/// `clocks[a][b]`: what lane b did up to then is ordered before what lane a does next.
type LaneClocks = [[u32; 32]; 32];

/// Times after which a new block starts again from zero.
const LATE: u32 = 1 << 31;

impl SharedRace {
    /// A new block: forget everything.
    pub fn start(&mut self, warps: u32, bytes: u32) {
        let warps = warps as usize;
        if self.now > LATE || self.warps != warps {
            self.now = 0;
            self.pieces.clear();
            self.side = SideTables::new(warps);
        }
        self.warps = warps;
        self.pieces.resize(bytes.div_ceil(PIECE) as usize, Piece::default());
        self.clock.clear();
        self.clock.resize(warps * warps, self.now);
        self.floor.clear();
        self.floor.resize(warps, self.now);
        self.published.clear();
        self.lanes.clear();
        self.lanes.resize(warps, None);
    }

    /// Looks at an access and records it; the first conflict found, if any. One between warps goes before one inside a warp.
    pub fn access(&mut self, access: &Access<'_>) -> Option<Conflict> {
        let warp = access.warp as usize;
        if warp >= self.warps || access.mask == 0 {
            return None;
        }
        if self.now == u32::MAX {
            // Nobody gets here: it takes four thousand million accesses in one block. Everything counts as ordered then.
            self.now = 0;
            self.pieces.fill(Piece::default());
            self.clock.fill(0);
            self.floor.fill(0);
            self.lanes.fill(None);
        }
        self.now += 1;
        let past = Past {
            access,
            now: self.now,
            floor: self.floor[warp],
            clock: &self.clock[warp * self.warps..][..self.warps],
            lanes: self.lanes[warp].as_deref(),
        };
        let mut found = None;
        let mut rest = access.mask;
        while rest != 0 {
            let lane = rest.trailing_zeros();
            rest &= rest - 1;
            let mut from = access.offsets[lane as usize];
            let end = from.saturating_add(access.size);
            while from < end {
                let Some(piece) = self.pieces.get_mut((from / PIECE) as usize) else { break };
                let to = end.min((from | (PIECE - 1)) + 1);
                let conflict = past.touch(piece, &mut self.side, lane, (from, to), PIECE);
                if conflict.is_some() {
                    found = worse(found, conflict);
                }
                from = to;
            }
        }
        found
    }

    /// A warp arrives at a barrier without waiting: what it did so far is what the others will know of it.
    pub fn arrive(&mut self, barrier: u32, warp: u32) {
        let (warp, barrier) = (warp as usize, barrier as usize);
        if warp >= self.warps {
            return;
        }
        if self.published.len() <= barrier {
            self.published.resize(barrier + 1, None);
        }
        let published = self.published[barrier].get_or_insert_with(|| vec![0; self.warps]);
        let own = &self.clock[warp * self.warps..][..self.warps];
        published.iter_mut().zip(own).for_each(|(p, &o)| *p = (*p).max(o));
        published[warp] = self.now;
    }

    /// A barrier completed: `waited` join each other's clocks and those that were published by the warps that only arrived.
    pub fn barrier(&mut self, barrier: u32, waited: &[u32]) {
        let n = self.warps;
        let mut joined =
            self.published.get_mut(barrier as usize).and_then(Option::take).unwrap_or_else(|| vec![0; n]);
        let members = || waited.iter().map(|&w| w as usize).filter(|&w| w < n);
        for w in members() {
            let own = &self.clock[w * n..][..n];
            joined.iter_mut().zip(own).for_each(|(j, &o)| *j = (*j).max(o));
        }
        members().for_each(|w| joined[w] = self.now);
        let floor = joined.iter().copied().min().unwrap_or(self.now);
        for w in members() {
            // Every clock that goes into `joined` is at least the block's start, and so is what it replaces.
            self.clock[w * n..][..n].copy_from_slice(&joined);
            self.floor[w] = floor;
            self.lanes[w] = None;
        }
    }

    /// `bar.warp.sync` of lanes of one warp.
    pub fn warp_sync(&mut self, warp: u32, mask: u32) {
        let w = warp as usize;
        if w >= self.warps {
            return;
        }
        if mask == u32::MAX {
            self.clock[w * self.warps + w] = self.now;
            self.floor[w] = self.clock[w * self.warps..][..self.warps].iter().copied().min().unwrap_or(0);
            self.lanes[w] = None;
            return;
        }
        let now = self.now;
        let clocks = self.lanes[w].get_or_insert_with(|| Box::new([[0; 32]; 32]));
        let members = || (0..32usize).filter(|lane| mask >> lane & 1 == 1);
        let mut joined = [0; 32];
        for lane in members() {
            joined.iter_mut().zip(&clocks[lane]).for_each(|(j, &c)| *j = (*j).max(c));
        }
        members().for_each(|lane| joined[lane] = now);
        members().for_each(|lane| clocks[lane] = joined);
    }
}
