//! What orders the blocks of a launch: fences and atomics.
//!
//! A block that has executed a fence and then an atomic on an address *releases* into that address everything it did before the
//! fence, and all that others had released to it. A block that reads the address with a load or an atomic afterwards has
//! *acquired* it. Acquiring needs no fence here: where the hardware would need one its absence goes unnoticed.

use super::readers::{List, Readers};
use std::collections::HashMap;

/// A stretch of a block's life between two fences: numbers from 1, 0 is "never".
pub(super) type Segment = u32;

#[derive(Clone, Copy, Debug)]
struct Stretch {
    block: u64,
    /// Time at which it began.
    since: u32,
}

/// What a block knows.
#[derive(Debug, Default)]
struct Knowledge {
    /// Its present segment, 0 after a fence.
    segment: Segment,
    /// Time of the last fence of each warp.
    fences: Vec<u32>,
    /// Time of the last fence that all warps know of.
    fenced: u32,
    /// Variables acquired, and how much of their logs.
    acquired: Vec<(usize, usize)>,
}

/// An address that blocks synchronise through.
#[derive(Debug, Default)]
struct Variable {
    /// Releases in order: the block and the time of its fence.
    log: Vec<(u64, u32)>,
    /// Where a block's last release is.
    last: HashMap<u64, usize>,
    /// What a release passes on: its place in the log, another variable, and how much of that one's log.
    links: Vec<(usize, usize, usize)>,
}

/// Order between the blocks of a launch.
#[derive(Debug)]
pub(super) struct Order {
    time: u32,
    stretches: Vec<Stretch>,
    blocks: HashMap<u64, Knowledge>,
    /// The block asked for last and its segment.
    current: Option<(u64, Segment)>,
    variables: Vec<Variable>,
    by_address: HashMap<u64, usize>,
    /// Who has read words that several blocks have read.
    pub(super) readers: Readers,
    /// Some block has synchronised through too many addresses to follow: everything counts as ordered.
    lost: bool,
}

/// Addresses that a block may synchronise through.
const FOLLOWED: usize = 64;

impl Default for Order {
    fn default() -> Self {
        Self {
            time: 1,
            stretches: vec![Stretch { block: u64::MAX, since: 0 }],
            blocks: HashMap::new(),
            current: None,
            variables: Vec::new(),
            by_address: HashMap::new(),
            readers: Readers::default(),
            lost: false,
        }
    }
}

impl Order {
    /// The block of a segment.
    pub(super) fn block(&self, segment: Segment) -> u64 {
        self.stretches.get(segment as usize).map_or(u64::MAX, |s| s.block)
    }

    /// The segment of what a block does now.
    #[inline]
    pub(super) fn segment(&mut self, block: u64) -> Segment {
        if let Some((of, segment)) = self.current
            && of == block
        {
            return segment;
        }
        let knowledge = self.blocks.entry(block).or_default();
        if knowledge.segment == 0 {
            knowledge.segment = self.stretches.len() as u32;
            self.stretches.push(Stretch { block, since: self.time });
        }
        self.current = Some((block, knowledge.segment));
        knowledge.segment
    }

    /// A warp of a block executes a fence.
    pub(super) fn fence(&mut self, block: u64, warp: u32) {
        // Times and segments stay below the marks that histories put on them.
        self.time = (self.time + 1).min(i32::MAX as u32);
        let knowledge = self.blocks.entry(block).or_default();
        let warp = warp as usize;
        if knowledge.fences.len() <= warp {
            knowledge.fences.resize(warp + 1, 0);
        }
        knowledge.fences[warp] = self.time;
        if self.stretches.len() < i32::MAX as usize {
            knowledge.segment = 0;
        }
        self.current = None;
    }

    /// A barrier completed in a block: its warps know of each other's fences.
    pub(super) fn barrier(&mut self, block: u64) {
        if let Some(knowledge) = self.blocks.get_mut(&block) {
            knowledge.fenced = knowledge.fences.iter().copied().fold(knowledge.fenced, u32::max);
        }
    }

    /// A block reads addresses: it acquires those that something was released into.
    #[inline]
    pub(super) fn acquire(&mut self, block: u64, addresses: &[u64; 32], mask: u32, atomic: bool) {
        if self.by_address.is_empty() {
            return;
        }
        // Atomics on a word may be narrower or wider than a load of it.
        let mut rest = mask;
        while rest != 0 {
            let address = addresses[rest.trailing_zeros() as usize] & !3;
            rest &= rest - 1;
            let Some(&variable) = self.by_address.get(&address) else { continue };
            let end = self.variables[variable].log.len();
            let acquired = &mut self.blocks.entry(block).or_default().acquired;
            match acquired.iter_mut().find(|(of, _)| *of == variable) {
                Some((_, upto)) => *upto = (*upto).max(end),
                None => acquired.push((variable, end)),
            }
            // The lanes of an atomic mostly share their address; those of a load seldom are of any interest.
            if atomic && addresses.iter().all(|&other| other & !3 == address) {
                return;
            }
        }
    }

    /// A warp executes an atomic: it releases into its addresses, if there was a fence.
    pub(super) fn release(&mut self, block: u64, warp: u32, addresses: &[u64; 32], mask: u32) {
        let Some(knowledge) = self.blocks.get(&block) else { return };
        if knowledge.acquired.len() > FOLLOWED {
            self.lost = true;
            return;
        }
        let own = knowledge.fences.get(warp as usize).copied().unwrap_or(0);
        let fenced = own.max(knowledge.fenced);
        if fenced == 0 {
            return;
        }
        let mut before = None;
        for lane in (0..32).filter(|lane| mask >> lane & 1 == 1) {
            let address = addresses[lane] & !3;
            if before == Some(address) {
                continue;
            }
            before = Some(address);
            let place = *self.by_address.entry(address).or_insert_with(|| {
                self.variables.push(Variable::default());
                self.variables.len() - 1
            });
            let variable = &mut self.variables[place];
            let at = variable.log.len();
            let mut news = variable.last.get(&block).is_none_or(|&last| variable.log[last].1 < fenced);
            for &(other, upto) in knowledge.acquired.iter().filter(|(other, _)| *other != place) {
                let known = variable.links.iter().any(|&(_, of, known)| of == other && known >= upto);
                if !known {
                    variable.links.push((at, other, upto));
                    news = true;
                }
            }
            if news {
                variable.log.push((block, fenced));
                variable.last.insert(block, at);
            }
        }
        // What a block has released into a variable it need not acquire from there, but an atomic also reads.
        self.acquire(block, addresses, mask, true);
    }

    /// What a segment's block did in it is ordered before what `block` does now.
    pub(super) fn before(&self, segment: Segment, block: u64) -> bool {
        let stretch = self.stretches[segment as usize];
        stretch.block == block || self.ordered(stretch.block, stretch.since, block)
    }

    /// The first of a word's several readers whose reading is not ordered before what `block` does now.
    pub(super) fn unordered_reader(&self, list: List, block: u64) -> Option<Segment> {
        self.readers.of(list).find(|&reader| !self.before(reader, block))
    }

    /// `block` has acquired a release of `other` whose fence came after `time`.
    fn ordered(&self, other: u64, time: u32, block: u64) -> bool {
        if self.variables.is_empty() {
            return false;
        }
        if self.lost {
            return true;
        }
        let Some(knowledge) = self.blocks.get(&block) else { return false };
        let mut open: Vec<(usize, usize)> = knowledge.acquired.clone();
        let mut seen: HashMap<usize, usize> = HashMap::new();
        while let Some((place, upto)) = open.pop() {
            let best = seen.entry(place).or_insert(0);
            if *best >= upto {
                continue;
            }
            *best = upto;
            let variable = &self.variables[place];
            // The last release of the block is the best one unless it lies beyond what was acquired.
            let released = match variable.last.get(&other) {
                None => false,
                Some(&last) if last < upto => variable.log[last].1 > time,
                Some(_) => variable.log[..upto].iter().any(|&(of, fence)| of == other && fence > time),
            };
            if released {
                return true;
            }
            open.extend(variable.links.iter().filter(|link| link.0 < upto).map(|link| (link.1, link.2)));
        }
        false
    }
}
