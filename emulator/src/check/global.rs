//! Races between blocks in global memory (specification section 8.6).

use super::shared::Touch;

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

/// Happens-before state of one launch.
#[derive(Debug, Default)]
pub struct GlobalRace {}

impl GlobalRace {
    /// A new launch.
    pub fn start(&mut self) {}

    /// Looks at an access and records it; the first conflict found, if any.
    pub fn access(&mut self, _access: &GlobalAccess<'_>) -> Option<GlobalConflict> {
        None
    }

    /// `membar`/`fence` by a warp of a block.
    pub fn fence(&mut self, _block: u64, _warp: u32) {}

    /// A block-wide barrier completed in a block.
    pub fn barrier(&mut self, _block: u64) {}
}
