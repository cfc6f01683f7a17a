//! What a piece of shared memory remembers of its accesses, and how a new access compares with it.
//!
//! A piece is 16 bytes, which is what copies, vectors and rows of matrices touch at once; where something smaller is touched it has four
//! parts of a word, and a word four bytes.

use super::shared::{Access, Conflict, Side, Touch};

/// Bytes of a piece before anything splits it.
pub(super) const PIECE: u32 = 16;

/// Several warps have read since the last write: they are in the side table.
const MANY: u8 = 1;
/// There were atomics: they are in the side table.
const ATOMS: u8 = 2;
/// The quarters of the piece have separate histories, in the side table.
const SPLIT: u8 = 4;

/// The history of a piece: of 16 bytes, of a word, or of a byte. Time 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Piece {
    write_time: u32,
    write_lanes: u32,
    write_pc: u32,
    /// Time of the last read; of the last access to any quarter when the piece is split.
    read_time: u32,
    read_lanes: u32,
    read_pc: u32,
    /// Place in the side tables plus one: of [`SideTables::sets`], or of [`SideTables::quarters`] when the piece is split.
    side: u32,
    write_warp: u8,
    read_warp: u8,
    flags: u8,
}

/// What one warp last did to a piece.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    time: u32,
    lanes: u32,
    pc: u32,
}

/// The warps that have read a piece and those that have used it atomically.
#[derive(Debug, Default)]
struct Set {
    readers: u32,
    atomics: u32,
    /// Time of the last atomic.
    last_atomic: u32,
    /// Readers by warp, then atomics by warp.
    entries: Vec<Entry>,
}

/// Histories that do not fit a piece. Nothing is ever removed: a piece keeps its place for the next time it needs one.
#[derive(Debug, Default)]
pub(super) struct SideTables {
    warps: usize,
    sets: Vec<Set>,
    /// Four quarters, and the place in `sets` of the piece they make up.
    quarters: Vec<([Piece; 4], u32)>,
    /// Places in `quarters` of pieces that are whole again.
    free: Vec<u32>,
}

impl SideTables {
    /// Tables for a block of so many warps.
    pub(super) fn new(warps: usize) -> Self {
        Self { warps, ..Self::default() }
    }

    /// The set of a piece that is not split.
    #[inline]
    fn set<'a>(&'a mut self, piece: &mut Piece) -> &'a mut Set {
        if piece.side == 0 {
            self.new_set(piece);
        }
        &mut self.sets[piece.side as usize - 1]
    }

    #[cold]
    fn new_set(&mut self, piece: &mut Piece) {
        let entries = vec![Entry::default(); 2 * self.warps];
        self.sets.push(Set { entries, ..Set::default() });
        piece.side = self.sets.len() as u32;
    }

    /// Gives each quarter of a piece the piece's history.
    #[cold]
    fn split(&mut self, piece: &mut Piece) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.quarters.push(([Piece::default(); 4], 0));
            self.quarters.len() as u32
        });
        for k in 0..4 {
            let mut quarter = Piece { side: self.quarters[place as usize - 1].0[k].side, ..*piece };
            if piece.flags != 0 {
                self.set(&mut quarter);
                let (from, to) = (piece.side as usize - 1, quarter.side as usize - 1);
                let copy = Set { entries: self.sets[from].entries.clone(), ..self.sets[from] };
                self.sets[to] = copy;
            }
            self.quarters[place as usize - 1].0[k] = quarter;
        }
        self.quarters[place as usize - 1].1 = piece.side;
        piece.side = place;
        piece.flags = SPLIT;
    }

    /// Makes a piece whole again whose quarters no longer matter, for a write after all of them.
    fn join(&mut self, piece: &mut Piece) {
        let at = piece.side as usize - 1;
        for k in 0..4 {
            let mut quarter = self.quarters[at].0[k];
            if quarter.flags & SPLIT != 0 {
                self.join(&mut quarter);
                self.quarters[at].0[k] = quarter;
            }
        }
        self.free.push(piece.side);
        *piece = Piece { side: self.quarters[at].1, ..Piece::default() };
    }
}

/// The conflict to report: one between warps goes before one inside a warp.
pub(super) fn worse(found: Option<Conflict>, next: Option<Conflict>) -> Option<Conflict> {
    match (found, next) {
        (Some(f), Some(n)) if f.intra_warp && !n.intra_warp => next,
        (None, _) => next,
        _ => found,
    }
}

/// One access against what was before it.
pub(super) struct Past<'a> {
    pub(super) access: &'a Access<'a>,
    pub(super) now: u32,
    /// Nothing up to then can be a conflict.
    pub(super) floor: u32,
    pub(super) clock: &'a [u32],
    pub(super) lanes: Option<&'a [[u32; 32]; 32]>,
}

impl Past<'_> {
    /// The access of a lane to the bytes from `from` to before `to`, all in one piece of `bytes` bytes.
    #[inline]
    pub(super) fn touch(
        &self,
        piece: &mut Piece,
        side: &mut SideTables,
        lane: u32,
        (from, to): (u32, u32),
        bytes: u32,
    ) -> Option<Conflict> {
        if to - from != bytes {
            return self.quarters(piece, side, lane, (from, to), bytes / 4);
        }
        if self.quick(piece, lane) { None } else { self.contested(piece, side, lane, from, bytes) }
    }

    /// The access of a lane to a part of a piece, whose quarters are of `bytes` bytes.
    fn quarters(
        &self,
        piece: &mut Piece,
        side: &mut SideTables,
        lane: u32,
        (mut from, to): (u32, u32),
        bytes: u32,
    ) -> Option<Conflict> {
        if piece.flags & SPLIT == 0 {
            side.split(piece);
        }
        piece.read_time = self.now;
        let at = piece.side as usize - 1;
        let mut found = None;
        while from < to {
            let next = to.min((from | (bytes - 1)) + 1);
            let k = ((from / bytes) & 3) as usize;
            let quarter = &mut side.quarters[at].0[k];
            if !(next - from == bytes && self.quick(quarter, lane)) {
                let mut quarter = *quarter;
                found = worse(found, self.touch(&mut quarter, side, lane, (from, next), bytes));
                side.quarters[at].0[k] = quarter;
            }
            from = next;
        }
        found
    }

    /// Records the access to a whole piece if nothing before it matters.
    #[inline(always)]
    fn quick(&self, piece: &mut Piece, lane: u32) -> bool {
        if piece.flags != 0 || piece.write_time > self.floor {
            return false;
        }
        let fresh = piece.read_time <= self.floor;
        match self.access.touch {
            Touch::Read if fresh => self.first_read(piece, lane),
            Touch::Read if piece.read_warp == self.access.warp as u8 => self.read_again(piece, lane),
            Touch::Write if fresh => self.written(piece, lane),
            _ => return false,
        }
        true
    }

    fn first_read(&self, piece: &mut Piece, lane: u32) {
        piece.read_time = self.now;
        piece.read_lanes = 1 << lane;
        piece.read_pc = self.access.pc;
        piece.read_warp = self.access.warp as u8;
    }

    /// The warp that read the piece last reads it again.
    fn read_again(&self, piece: &mut Piece, lane: u32) {
        let before = if piece.read_time == self.now {
            piece.read_lanes
        } else {
            self.unordered(piece.read_lanes, piece.read_time, lane)
        };
        piece.read_time = self.now;
        piece.read_lanes = before | 1 << lane;
        piece.read_pc = self.access.pc;
    }

    fn written(&self, piece: &mut Piece, lane: u32) {
        // Lanes that write the same value in one instruction are all its writers.
        let others = if piece.write_time == self.now { piece.write_lanes } else { 0 };
        piece.write_time = self.now;
        piece.write_lanes = others | 1 << lane;
        piece.write_pc = self.access.pc;
        piece.write_warp = self.access.warp as u8;
        piece.read_time = 0;
        piece.flags = 0;
    }

    /// The lanes of this warp whose access at `time` is not ordered before what `lane` does now.
    fn unordered(&self, lanes: u32, time: u32, lane: u32) -> u32 {
        if time <= self.clock[self.access.warp as usize] {
            return 0;
        }
        match self.lanes {
            None => lanes,
            Some(clocks) => {
                let known = &clocks[lane as usize];
                (0..32).filter(|&l| known[l as usize] < time).fold(0, |m, l| m | 1 << l) & lanes
            }
        }
    }

    #[inline(never)]
    fn contested(
        &self,
        piece: &mut Piece,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
        bytes: u32,
    ) -> Option<Conflict> {
        if piece.flags & SPLIT != 0 {
            // A write after everything stands for all of it. A read does not: other warps may still conflict with the writes.
            if piece.read_time > self.floor || self.access.touch != Touch::Write {
                return self.quarters(piece, side, lane, (offset, offset + bytes), bytes / 4);
            }
            side.join(piece);
        }
        let mut found = self.against_write(piece, lane, offset, bytes);
        if self.access.touch != Touch::Atomic && piece.flags & ATOMS != 0 {
            found = worse(found, self.against_atomics(piece, side, lane, offset));
        }
        if self.access.touch != Touch::Read {
            found = worse(found, self.against_reads(piece, side, lane, offset));
        }
        match self.access.touch {
            Touch::Read => self.record_read(piece, side, lane),
            Touch::Write => self.written(piece, lane),
            Touch::Atomic => {
                let (warp, count) = (self.access.warp as usize, self.clock.len());
                let first = piece.flags & ATOMS == 0;
                piece.flags |= ATOMS;
                let many = piece.flags & MANY != 0;
                let set = side.set(piece);
                if first {
                    set.atomics = 0;
                }
                if !many {
                    set.readers = 0;
                }
                self.enter(&mut set.entries[count + warp], set.atomics >> warp & 1 == 1, lane);
                set.atomics |= 1 << warp;
                set.last_atomic = self.now;
            }
        }
        found
    }

    fn enter(&self, entry: &mut Entry, known: bool, lane: u32) {
        let before = match known {
            true if entry.time == self.now => entry.lanes,
            true => self.unordered(entry.lanes, entry.time, lane),
            false => 0,
        };
        *entry = Entry { time: self.now, lanes: before | 1 << lane, pc: self.access.pc };
    }

    fn record_read(&self, piece: &mut Piece, side: &mut SideTables, lane: u32) {
        let warp = self.access.warp as usize;
        if piece.flags & MANY == 0 {
            if piece.read_time <= self.clock[piece.read_warp as usize] {
                return self.first_read(piece, lane);
            }
            if piece.read_warp as usize == warp {
                return self.read_again(piece, lane);
            }
            let other = Entry { time: piece.read_time, lanes: piece.read_lanes, pc: piece.read_pc };
            let set = side.set(piece);
            set.readers = 1 << piece.read_warp;
            set.entries[piece.read_warp as usize] = other;
            piece.flags |= MANY;
        }
        let set = side.set(piece);
        self.enter(&mut set.entries[warp], set.readers >> warp & 1 == 1, lane);
        set.readers |= 1 << warp;
        piece.read_time = self.now;
    }

    fn conflict(&self, warp: u32, lanes: u32, pc: u32, touch: Touch, lane: u32, offset: u32) -> Conflict {
        let first = Side { warp, lane: lanes.trailing_zeros() & 31, pc, touch };
        let second = Side { warp: self.access.warp, lane, pc: self.access.pc, touch: self.access.touch };
        Conflict { first, second, offset, intra_warp: warp == self.access.warp }
    }

    /// Lanes of a warp that touched the piece at `time` and are not ordered before the lane now.
    fn rivals(&self, warp: u32, lanes: u32, time: u32, lane: u32) -> u32 {
        if warp == self.access.warp {
            self.unordered(lanes & !(1 << lane), time, lane)
        } else if time <= self.clock[warp as usize] {
            0
        } else {
            lanes
        }
    }

    fn against_write(&self, piece: &Piece, lane: u32, offset: u32, bytes: u32) -> Option<Conflict> {
        if piece.write_time <= self.floor {
            return None;
        }
        let warp = u32::from(piece.write_warp);
        if piece.write_time == self.now {
            // Another lane of the same instruction.
            let other = piece.write_lanes.trailing_zeros() & 31;
            if self.access.touch != Touch::Write {
                return None;
            }
            let offset = self.disagree(lane, other, offset, bytes)?;
            let mut conflict =
                self.conflict(warp, piece.write_lanes, piece.write_pc, Touch::Write, lane, offset);
            conflict.intra_warp = false;
            return Some(conflict);
        }
        if warp == self.access.warp && piece.write_lanes >> lane & 1 == 1 {
            return None;
        }
        match self.rivals(warp, piece.write_lanes, piece.write_time, lane) {
            0 => None,
            lanes => Some(self.conflict(warp, lanes, piece.write_pc, Touch::Write, lane, offset)),
        }
    }

    /// Where two lanes write different values: the first such word among the bytes at `offset`. Without the values they are taken to
    /// differ.
    fn disagree(&self, a: u32, b: u32, offset: u32, bytes: u32) -> Option<u32> {
        let Some(values) = self.access.values else { return Some(offset) };
        if a == b {
            return None;
        }
        let value = |lane: u32| {
            let shift = 8 * offset.wrapping_sub(self.access.offsets[lane as usize]);
            values[lane as usize].checked_shr(shift).unwrap_or(0) & (u128::MAX >> (128 - 8 * bytes))
        };
        let different = value(a) ^ value(b);
        (different != 0).then(|| offset + different.trailing_zeros() / 32 * 4)
    }

    fn against_reads(
        &self,
        piece: &mut Piece,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
    ) -> Option<Conflict> {
        if piece.read_time <= self.floor {
            return None;
        }
        if piece.flags & MANY == 0 {
            let warp = u32::from(piece.read_warp);
            return match self.rivals(warp, piece.read_lanes, piece.read_time, lane) {
                0 => None,
                lanes => Some(self.conflict(warp, lanes, piece.read_pc, Touch::Read, lane, offset)),
            };
        }
        let set = side.set(piece);
        self.among(&set.entries[..self.clock.len()], set.readers, Touch::Read, lane, offset)
    }

    fn against_atomics(
        &self,
        piece: &mut Piece,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
    ) -> Option<Conflict> {
        let set = side.set(piece);
        if set.last_atomic <= self.floor {
            return None;
        }
        self.among(&set.entries[self.clock.len()..], set.atomics, Touch::Atomic, lane, offset)
    }

    /// The first conflict with entries of the warps of a mask; one of another warp if there is one.
    fn among(&self, entries: &[Entry], warps: u32, touch: Touch, lane: u32, offset: u32) -> Option<Conflict> {
        let mut found = None;
        for warp in (0..entries.len() as u32).filter(|warp| warps >> warp & 1 == 1) {
            let entry = entries[warp as usize];
            let lanes = self.rivals(warp, entry.lanes, entry.time, lane);
            if lanes != 0 {
                found = worse(found, Some(self.conflict(warp, lanes, entry.pc, touch, lane, offset)));
            }
        }
        found
    }
}
