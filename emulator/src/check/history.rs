//! What a word of shared memory remembers of its accesses, and how a new access compares with it.

use super::shared::{Access, Conflict, Side, Touch};

/// Several warps have read since the last write: they are in the side table.
const MANY: u8 = 1;
/// There were atomics: they are in the side table.
const ATOMS: u8 = 2;
/// The bytes of the word have separate histories, in the side table.
const SPLIT: u8 = 4;

/// The history of a word, or of a byte. Time 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Word {
    write_time: u32,
    write_lanes: u32,
    write_pc: u32,
    /// Time of the last read; of the last access to any byte when the word is split.
    read_time: u32,
    read_lanes: u32,
    read_pc: u32,
    /// Place in the side tables plus one: of [`SideTables::sets`], or of [`SideTables::bytes`] when the word is split.
    side: u32,
    write_warp: u8,
    read_warp: u8,
    flags: u8,
}

/// What one warp last did to a word.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    time: u32,
    lanes: u32,
    pc: u32,
}

/// The warps that have read a word and those that have used it atomically.
#[derive(Debug, Default)]
struct Set {
    readers: u32,
    atomics: u32,
    /// Time of the last atomic.
    last_atomic: u32,
    /// Readers by warp, then atomics by warp.
    entries: Vec<Entry>,
}

/// Histories that do not fit a word. Nothing is ever removed: a word keeps its place for the next time it needs one.
#[derive(Debug, Default)]
pub(super) struct SideTables {
    warps: usize,
    sets: Vec<Set>,
    /// Four bytes, and the place in `sets` of the word they make up.
    bytes: Vec<([Word; 4], u32)>,
    /// Places in `bytes` of words that are whole again.
    free: Vec<u32>,
}

impl SideTables {
    /// Tables for a block of so many warps.
    pub(super) fn new(warps: usize) -> Self {
        Self { warps, ..Self::default() }
    }

    /// The set of a word that is not split.
    fn set<'a>(&'a mut self, word: &mut Word) -> &'a mut Set {
        if word.side == 0 {
            let entries = vec![Entry::default(); 2 * self.warps];
            self.sets.push(Set { entries, ..Set::default() });
            word.side = self.sets.len() as u32;
        }
        &mut self.sets[word.side as usize - 1]
    }

    /// Gives each byte of a word the word's history.
    fn split(&mut self, word: &mut Word) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.bytes.push(([Word::default(); 4], 0));
            self.bytes.len() as u32
        });
        for k in 0..4 {
            let mut byte = Word { side: self.bytes[place as usize - 1].0[k].side, ..*word };
            if word.flags != 0 {
                self.set(&mut byte);
                let (from, to) = (word.side as usize - 1, byte.side as usize - 1);
                let copy = Set { entries: self.sets[from].entries.clone(), ..self.sets[from] };
                self.sets[to] = copy;
            }
            self.bytes[place as usize - 1].0[k] = byte;
        }
        self.bytes[place as usize - 1].1 = word.side;
        word.side = place;
        word.flags = SPLIT;
    }

    /// Makes a word whose bytes no longer matter whole again.
    fn join(&mut self, word: &mut Word) {
        self.free.push(word.side);
        *word = Word { side: self.bytes[word.side as usize - 1].1, ..Word::default() };
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
    /// The access of a lane to a whole word.
    #[inline]
    pub(super) fn word(
        &self,
        word: &mut Word,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
    ) -> Option<Conflict> {
        if word.flags == 0 && word.write_time <= self.floor {
            match self.access.touch {
                Touch::Read if word.read_time <= self.floor => {
                    self.first_read(word, lane);
                    return None;
                }
                Touch::Read if word.read_warp == self.access.warp as u8 => {
                    self.read_again(word, lane);
                    return None;
                }
                Touch::Write if word.read_time <= self.floor => {
                    self.written(word, lane);
                    return None;
                }
                _ => {}
            }
        }
        self.contested(word, side, lane, offset, 4)
    }

    fn first_read(&self, word: &mut Word, lane: u32) {
        word.read_time = self.now;
        word.read_lanes = 1 << lane;
        word.read_pc = self.access.pc;
        word.read_warp = self.access.warp as u8;
    }

    /// The warp that read the word last reads it again.
    fn read_again(&self, word: &mut Word, lane: u32) {
        let before = if word.read_time == self.now {
            word.read_lanes
        } else {
            self.unordered(word.read_lanes, word.read_time, lane)
        };
        word.read_time = self.now;
        word.read_lanes = before | 1 << lane;
        word.read_pc = self.access.pc;
    }

    fn written(&self, word: &mut Word, lane: u32) {
        // Lanes that write the same value in one instruction are all its writers.
        let others = if word.write_time == self.now { word.write_lanes } else { 0 };
        word.write_time = self.now;
        word.write_lanes = others | 1 << lane;
        word.write_pc = self.access.pc;
        word.write_warp = self.access.warp as u8;
        word.read_time = 0;
        word.flags = 0;
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
        word: &mut Word,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
        bytes: u32,
    ) -> Option<Conflict> {
        if word.flags & SPLIT != 0 {
            if word.read_time > self.floor {
                word.read_time = self.now;
                let at = word.side as usize - 1;
                let mut found = None;
                for k in 0..4 {
                    let mut byte = side.bytes[at].0[k];
                    found = found.or(self.contested(&mut byte, side, lane, offset + k as u32, 1));
                    side.bytes[at].0[k] = byte;
                }
                return found;
            }
            side.join(word);
        }
        let mut found = self.against_write(word, lane, offset, bytes);
        if self.access.touch != Touch::Atomic && word.flags & ATOMS != 0 {
            found = found.or(self.against_atomics(word, side, lane, offset));
        }
        if self.access.touch != Touch::Read {
            found = found.or(self.against_reads(word, side, lane, offset));
        }
        match self.access.touch {
            Touch::Read => self.record_read(word, side, lane),
            Touch::Write => self.written(word, lane),
            Touch::Atomic => {
                let (warp, count) = (self.access.warp as usize, self.clock.len());
                let first = word.flags & ATOMS == 0;
                word.flags |= ATOMS;
                let many = word.flags & MANY != 0;
                let set = side.set(word);
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

    fn record_read(&self, word: &mut Word, side: &mut SideTables, lane: u32) {
        let warp = self.access.warp as usize;
        if word.flags & MANY == 0 {
            if word.read_time <= self.clock[word.read_warp as usize] {
                return self.first_read(word, lane);
            }
            if word.read_warp as usize == warp {
                return self.read_again(word, lane);
            }
            let other = Entry { time: word.read_time, lanes: word.read_lanes, pc: word.read_pc };
            let set = side.set(word);
            set.readers = 1 << word.read_warp;
            set.entries[word.read_warp as usize] = other;
            word.flags |= MANY;
        }
        let set = side.set(word);
        self.enter(&mut set.entries[warp], set.readers >> warp & 1 == 1, lane);
        set.readers |= 1 << warp;
        word.read_time = self.now;
    }

    fn conflict(&self, warp: u32, lanes: u32, pc: u32, touch: Touch, lane: u32, offset: u32) -> Conflict {
        let first = Side { warp, lane: lanes.trailing_zeros() & 31, pc, touch };
        let second = Side { warp: self.access.warp, lane, pc: self.access.pc, touch: self.access.touch };
        Conflict { first, second, offset, intra_warp: warp == self.access.warp }
    }

    /// Lanes of a warp that touched the word at `time` and are not ordered before the lane now.
    fn rivals(&self, warp: u32, lanes: u32, time: u32, lane: u32) -> u32 {
        if warp == self.access.warp {
            self.unordered(lanes & !(1 << lane), time, lane)
        } else if time <= self.clock[warp as usize] {
            0
        } else {
            lanes
        }
    }

    fn against_write(&self, word: &Word, lane: u32, offset: u32, bytes: u32) -> Option<Conflict> {
        if word.write_time <= self.floor {
            return None;
        }
        let warp = u32::from(word.write_warp);
        if word.write_time == self.now {
            // Another lane of the same instruction.
            let other = word.write_lanes.trailing_zeros() & 31;
            if self.access.touch != Touch::Write || self.agree(lane, other, offset, bytes) {
                return None;
            }
            let mut conflict =
                self.conflict(warp, word.write_lanes, word.write_pc, Touch::Write, lane, offset);
            conflict.intra_warp = false;
            return Some(conflict);
        }
        if warp == self.access.warp && word.write_lanes >> lane & 1 == 1 {
            return None;
        }
        match self.rivals(warp, word.write_lanes, word.write_time, lane) {
            0 => None,
            lanes => Some(self.conflict(warp, lanes, word.write_pc, Touch::Write, lane, offset)),
        }
    }

    /// Two lanes write the same value to the bytes at `offset`. Without the values they are taken to differ.
    fn agree(&self, a: u32, b: u32, offset: u32, bytes: u32) -> bool {
        let Some(values) = self.access.values else { return false };
        let value = |lane: u32| {
            let shift = 8 * offset.wrapping_sub(self.access.offsets[lane as usize]);
            values[lane as usize].checked_shr(shift).unwrap_or(0) as u32 & (u32::MAX >> (32 - 8 * bytes))
        };
        a == b || value(a) == value(b)
    }

    fn against_reads(
        &self,
        word: &mut Word,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
    ) -> Option<Conflict> {
        if word.read_time <= self.floor {
            return None;
        }
        if word.flags & MANY == 0 {
            let warp = u32::from(word.read_warp);
            return match self.rivals(warp, word.read_lanes, word.read_time, lane) {
                0 => None,
                lanes => Some(self.conflict(warp, lanes, word.read_pc, Touch::Read, lane, offset)),
            };
        }
        let set = side.set(word);
        self.among(&set.entries[..self.clock.len()], set.readers, Touch::Read, lane, offset)
    }

    fn against_atomics(
        &self,
        word: &mut Word,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
    ) -> Option<Conflict> {
        let set = side.set(word);
        if set.last_atomic <= self.floor {
            word.flags &= !ATOMS;
            return None;
        }
        self.among(&set.entries[self.clock.len()..], set.atomics, Touch::Atomic, lane, offset)
    }

    /// The first conflict with entries of the warps of a mask; one of another warp if there is one.
    fn among(&self, entries: &[Entry], warps: u32, touch: Touch, lane: u32, offset: u32) -> Option<Conflict> {
        let mut found: Option<Conflict> = None;
        for warp in (0..entries.len() as u32).filter(|warp| warps >> warp & 1 == 1) {
            let entry = entries[warp as usize];
            let lanes = self.rivals(warp, entry.lanes, entry.time, lane);
            if lanes != 0 && found.is_none_or(|f| f.intra_warp) {
                found = Some(self.conflict(warp, lanes, entry.pc, touch, lane, offset));
            }
        }
        found
    }

    /// The access of a lane to one byte.
    pub(super) fn byte(
        &self,
        word: &mut Word,
        side: &mut SideTables,
        lane: u32,
        offset: u32,
    ) -> Option<Conflict> {
        if word.flags & SPLIT == 0 {
            side.split(word);
        }
        word.read_time = self.now;
        let at = word.side as usize - 1;
        let k = (offset & 3) as usize;
        let mut byte = side.bytes[at].0[k];
        let found = self.contested(&mut byte, side, lane, offset, 1);
        side.bytes[at].0[k] = byte;
        found
    }
}
