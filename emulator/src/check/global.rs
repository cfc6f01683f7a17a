//! Races between blocks in global memory (specification section 8.6).
//!
//! Every byte has a history: its last plain write, last plain read and last atomic, each with the block. Histories are kept for
//! whole 32-byte sectors as long as all bytes of a sector were treated alike, for words or bytes otherwise. What orders blocks is in
//! `order.rs`.

use super::order::{Order, Segment};
use super::shared::Touch;
use std::collections::HashMap;

/// One access of a warp instruction to global memory.
#[derive(Clone, Copy, Debug)]
pub struct GlobalAccess<'a> {
    /// Linear block index.
    pub block: u64,
    /// Warp in the block.
    pub warp: u32,
    /// Instruction.
    pub pc: u32,
    /// Lanes.
    pub mask: u32,
    /// Global address of each lane.
    pub addresses: &'a [u64; 32],
    /// Bytes of each lane.
    pub size: u32,
    /// Kind.
    pub touch: Touch,
    /// `ld.global.nc`.
    pub read_only: bool,
    /// Float atomic: its order changes the result.
    pub float_atomic: bool,
}

/// Two accesses of different blocks without order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalConflict {
    /// Block and instruction of the earlier access, and how it touched the word.
    pub first: (u64, u32, Touch),
    /// The word's address.
    pub address: u64,
    /// A read through the read-only path of something the launch writes.
    pub read_only: bool,
}

/// Bytes of a sector, and sectors of a page.
const SECTOR: u64 = 32;
const PAGE: u64 = 128;

/// Marks a [`Past::reader`] that stands for several blocks; the rest is their list.
const SEVERAL: u32 = 1 << 31;
/// Marks the instruction of a reader when some reader used the read-only path.
const READ_ONLY: u32 = 1 << 31;

/// What happened to some bytes; segments are 0 for "never".
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    writer: Segment,
    writer_pc: u32,
    reader: u32,
    reader_pc: u32,
    atomic: Segment,
    atomic_pc: u32,
}

/// The history of a sector: one for all its bytes, or the place of its parts plus one.
#[derive(Clone, Copy, Debug, Default)]
struct Sector {
    past: Past,
    words: u32,
    bytes: u32,
}

/// Float atomics on one address.
#[derive(Clone, Copy, Debug)]
struct Floats {
    block: u64,
    warp: u32,
    shared: bool,
    count: u64,
}

/// Happens-before state of one launch.
#[derive(Debug, Default)]
pub struct GlobalRace {
    order: Order,
    index: HashMap<u64, usize>,
    pages: Vec<Box<[Sector; PAGE as usize]>>,
    last: Option<(u64, usize)>,
    words: Vec<[Past; 8]>,
    bytes: Vec<[Past; 32]>,
    floats: HashMap<u64, Floats>,
}

impl GlobalRace {
    /// A new launch.
    pub fn start(&mut self) {
        *self = Self::default();
    }

    /// Looks at an access and records it; the first conflict found, if any.
    pub fn access(&mut self, access: &GlobalAccess<'_>) -> Option<GlobalConflict> {
        if access.mask == 0 {
            return None;
        }
        if access.float_atomic {
            self.float_atomic(access);
        }
        if access.touch != Touch::Write {
            self.order.acquire(access.block, access.addresses, access.mask, access.touch == Touch::Atomic);
        }
        let now = Now { segment: self.order.segment(access.block), access };
        let mut found = None;
        let size = u64::from(access.size);
        if access.mask == u32::MAX && contiguous(access.addresses, size) {
            found = self.range(&now, access.addresses[0], size * 32);
        } else {
            let mut rest = access.mask;
            while rest != 0 {
                let start = access.addresses[rest.trailing_zeros() as usize];
                let mut length = size;
                rest &= rest - 1;
                // Neighbouring lanes with neighbouring addresses are one range.
                while rest != 0
                    && access.addresses[rest.trailing_zeros() as usize] == start.wrapping_add(length)
                {
                    length += size;
                    rest &= rest - 1;
                }
                let one = self.range(&now, start, length);
                found = found.or(one);
            }
        }
        if access.touch == Touch::Atomic {
            self.order.release(access.block, access.warp, access.addresses, access.mask);
        }
        found
    }

    /// `membar`/`fence` by a warp of a block.
    pub fn fence(&mut self, block: u64, warp: u32) {
        self.order.fence(block, warp);
    }

    /// A barrier completed in a block.
    pub fn barrier(&mut self, block: u64) {
        self.order.barrier(block);
    }

    /// Float atomics of threads to addresses that more than one warp of the launch hit.
    pub fn contended_floats(&self) -> u64 {
        self.floats.values().filter(|hits| hits.shared).map(|hits| hits.count).sum()
    }

    fn float_atomic(&mut self, access: &GlobalAccess<'_>) {
        for lane in (0..32).filter(|lane| access.mask >> lane & 1 == 1) {
            let (block, warp) = (access.block, access.warp);
            let first = Floats { block, warp, shared: false, count: 0 };
            let hits = self.floats.entry(access.addresses[lane]).or_insert(first);
            hits.count += 1;
            hits.shared |= (hits.block, hits.warp) != (block, warp);
        }
    }

    fn range(&mut self, now: &Now<'_>, start: u64, length: u64) -> Option<GlobalConflict> {
        let mut found = None;
        let mut at = start;
        let end = start.saturating_add(length);
        while at < end {
            let base = at & !(SECTOR - 1);
            let stop = end.min(base.saturating_add(SECTOR));
            let one = self.sector(now, base, (at - base) as usize, (stop - base) as usize);
            found = found.or(one);
            if stop <= at {
                break;
            }
            at = stop;
        }
        found
    }

    /// Bytes `from..to` of the sector at `base`.
    fn sector(&mut self, now: &Now<'_>, base: u64, from: usize, to: usize) -> Option<GlobalConflict> {
        let page = self.page(base / SECTOR / PAGE);
        let sector = &mut self.pages[page][(base / SECTOR % PAGE) as usize];
        if sector.words | sector.bytes == 0 {
            if to - from == SECTOR as usize {
                return now.touch(&mut sector.past, &mut self.order, base);
            }
            if sector.past.same(now) {
                return None;
            }
            self.words.push([sector.past; 8]);
            sector.words = self.words.len() as u32;
        }
        if sector.bytes == 0 && (from | to) & 3 != 0 {
            let words = &self.words[sector.words as usize - 1];
            self.bytes.push(std::array::from_fn(|byte| words[byte / 4]));
            sector.bytes = self.bytes.len() as u32;
        }
        let mut found = None;
        let (parts, size) = if sector.bytes == 0 {
            (&mut self.words[sector.words as usize - 1][from / 4..to / 4], 4)
        } else {
            (&mut self.bytes[sector.bytes as usize - 1][from..to], 1)
        };
        for (k, past) in parts.iter_mut().enumerate() {
            let one = now.touch(past, &mut self.order, base + (from + k * size) as u64);
            found = found.or(one);
        }
        found
    }

    fn page(&mut self, key: u64) -> usize {
        match self.last {
            Some((last, page)) if last == key => page,
            _ => {
                let pages = &mut self.pages;
                let page = *self.index.entry(key).or_insert_with(|| {
                    pages.push(Box::new([Sector::default(); PAGE as usize]));
                    pages.len() - 1
                });
                self.last = Some((key, page));
                page
            }
        }
    }
}

fn contiguous(addresses: &[u64; 32], size: u64) -> bool {
    let base = addresses[0];
    let mut difference = 0;
    for (lane, &address) in addresses.iter().enumerate() {
        difference |= address ^ base.wrapping_add(size * lane as u64);
    }
    difference == 0
}

impl Past {
    /// The access changes nothing here and can find nothing.
    fn same(&self, now: &Now<'_>) -> bool {
        let access = now.access;
        access.touch == Touch::Read
            && !access.read_only
            && self.reader == now.segment
            && (self.writer == 0 || self.writer == now.segment)
    }
}

/// The access that is being looked at.
struct Now<'a> {
    segment: Segment,
    access: &'a GlobalAccess<'a>,
}

impl Now<'_> {
    fn touch(&self, past: &mut Past, order: &mut Order, address: u64) -> Option<GlobalConflict> {
        match self.access.touch {
            Touch::Read => self.read(past, order, address),
            Touch::Write => {
                let found = self.against(past.atomic, past.atomic_pc, Touch::Atomic, order, address);
                let found = found.or_else(|| self.changed(past, order, address));
                *past = Past { writer: self.segment, writer_pc: self.access.pc, ..Past::default() };
                found
            }
            Touch::Atomic => {
                let found = self.changed(past, order, address);
                (past.atomic, past.atomic_pc) = (self.segment, self.access.pc);
                found
            }
        }
    }

    fn read(&self, past: &mut Past, order: &mut Order, address: u64) -> Option<GlobalConflict> {
        let mut found = None;
        if past.writer != 0 {
            if self.access.read_only {
                found = Some(conflict(past.writer, past.writer_pc, Touch::Write, order, address, true));
            }
            found = found.or(self.against(past.writer, past.writer_pc, Touch::Write, order, address));
        }
        if past.reader != self.segment {
            let keep = past.reader_pc & READ_ONLY;
            past.reader = if past.reader & SEVERAL != 0 {
                SEVERAL | order.readers.with(past.reader & !SEVERAL, self.segment)
            } else if past.reader != 0 && !order.before(past.reader, self.access.block) {
                let first = order.readers.with(0, past.reader);
                SEVERAL | order.readers.with(first, self.segment)
            } else {
                self.segment
            };
            past.reader_pc = self.access.pc & !READ_ONLY | keep;
        }
        if self.access.read_only {
            past.reader_pc |= READ_ONLY;
        }
        found
    }

    /// A plain write or an atomic, against plain writes and reads.
    fn changed(&self, past: &Past, order: &mut Order, address: u64) -> Option<GlobalConflict> {
        let reader_pc = past.reader_pc & !READ_ONLY;
        if past.reader_pc & READ_ONLY != 0 {
            let reader = match past.reader & SEVERAL {
                0 => past.reader,
                _ => order.readers.of(past.reader & !SEVERAL).next().unwrap_or(0),
            };
            return Some(conflict(reader, reader_pc, Touch::Read, order, address, true));
        }
        if let Some(found) = self.against(past.writer, past.writer_pc, Touch::Write, order, address) {
            return Some(found);
        }
        if self.access.touch == Touch::Atomic || past.reader == 0 {
            return None;
        }
        if past.reader & SEVERAL == 0 {
            return self.against(past.reader, reader_pc, Touch::Read, order, address);
        }
        let reader = order.unordered_reader(past.reader & !SEVERAL, self.access.block)?;
        Some(conflict(reader, reader_pc, Touch::Read, order, address, false))
    }

    fn against(
        &self,
        segment: Segment,
        pc: u32,
        touch: Touch,
        order: &mut Order,
        address: u64,
    ) -> Option<GlobalConflict> {
        if segment == 0 || segment == self.segment || order.before(segment, self.access.block) {
            return None;
        }
        Some(conflict(segment, pc, touch, order, address, false))
    }
}

fn conflict(
    segment: Segment,
    pc: u32,
    touch: Touch,
    order: &Order,
    address: u64,
    read_only: bool,
) -> GlobalConflict {
    GlobalConflict { first: (order.block(segment), pc, touch), address, read_only }
}
