//! One block: its shared memory, barriers and race state. The warps are kept beside it.

use super::barrier::Barrier;
use super::warp::BlockIds;
use crate::check::shared::SharedRace;
use crate::mem::{FILL, UNDEFINED};

/// Shared memory that asynchronous copies are about to write (its bytes have the [`crate::mem::PENDING`] bit).
#[derive(Debug, Default)]
pub struct Pending {
    /// Copies that are not complete.
    pub count: u32,
    /// Instruction and thread (warp * 32 + lane) of the last copy to each 4-byte word; empty before the first copy.
    issuers: Vec<(u32, u32)>,
}

impl Pending {
    /// Instruction and thread that issued the copy which byte `offset` waits for.
    pub fn by(&self, offset: u32) -> Option<(u32, u32)> {
        self.issuers.get(offset as usize / 4).copied()
    }

    /// A copy to `offset..offset + size` of `shared` bytes of shared memory was issued.
    pub fn issue(&mut self, offset: u32, size: u32, shared: usize, pc: u32, thread: u32) {
        self.count += 1;
        if self.issuers.len() < shared.div_ceil(4) {
            self.issuers.resize(shared.div_ceil(4), (0, 0));
        }
        self.issuers[offset as usize / 4..(offset + size).div_ceil(4) as usize].fill((pc, thread));
    }
}

/// State shared by the warps of a block.
#[derive(Debug, Default)]
pub struct Block {
    /// Linear index in the grid.
    pub index: u64,
    /// Coordinates and sizes.
    pub ids: BlockIds,
    /// Shared memory: static, then dynamic.
    pub shared: Vec<u8>,
    /// Its shadow: [`crate::mem::UNDEFINED`] and [`crate::mem::PENDING`] bits.
    pub shared_shadow: Vec<u8>,
    /// Number of warps.
    pub warps: u32,
    /// Live lanes of each warp.
    pub live: Vec<u32>,
    /// The sixteen barriers.
    pub barriers: Vec<Barrier>,
    /// Happens-before of the shared memory, when looked for.
    pub race: Option<SharedRace>,
    /// Asynchronous copies under way.
    pub pending: Pending,
}

impl Block {
    /// Makes the block ready for its first instruction. `shared` is static plus dynamic size in bytes.
    pub fn start(&mut self, index: u64, ids: BlockIds, shared: u32, race: bool) {
        let threads = ids.ntid[0] * ids.ntid[1] * ids.ntid[2];
        self.index = index;
        self.ids = ids;
        self.warps = threads.div_ceil(32);
        self.shared.clear();
        self.shared.resize(shared as usize, FILL);
        self.shared_shadow.clear();
        self.shared_shadow.resize(shared as usize, UNDEFINED);
        self.pending.count = 0;
        self.live.clear();
        self.live.extend(
            (0..self.warps)
                .map(|w| if threads - w * 32 >= 32 { u32::MAX } else { (1 << (threads - w * 32)) - 1 }),
        );
        self.barriers.clear();
        self.barriers.resize_with(16, || Barrier::new(self.warps));
        if race {
            self.race.get_or_insert_with(SharedRace::default).start(self.warps, shared);
        } else {
            self.race = None;
        }
    }
}
