//! Races in shared memory: vector clocks of warps, last accesses of words (specification section 8.4).

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
pub struct SharedRace {}

impl SharedRace {
    /// A new block: forget everything.
    pub fn start(&mut self, _warps: u32, _bytes: u32) {}

    /// Looks at an access and records it; the first conflict found, if any.
    pub fn access(&mut self, _access: &Access<'_>) -> Option<Conflict> {
        None
    }

    /// A barrier completed: `waited` join each other's clocks and those of `arrived`, which only published theirs.
    pub fn barrier(&mut self, _waited: &[u32], _arrived: &[u32]) {}

    /// `bar.warp.sync` of lanes of one warp.
    pub fn warp_sync(&mut self, _warp: u32, _mask: u32) {}
}
