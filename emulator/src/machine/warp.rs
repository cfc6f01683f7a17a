//! One warp: registers, the groups its lanes have split into, its local memory, its asynchronous copies.

use super::inst::{Kernel, Special};
use super::regs::{FULL, Regs};
use crate::mem::{FILL, UNDEFINED};

/// What a group of lanes is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Can run.
    Ready,
    /// Waits for other lanes of its warp at its instruction.
    Converging,
    /// Waits at the barrier with this number.
    Barrier(u32),
    /// The barrier has let it go: it runs the barrier instruction again with `Core::resumed`.
    Released,
}

/// Lanes at one instruction.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Index of the next instruction.
    pub pc: u32,
    /// The lanes.
    pub mask: u32,
    /// What they do.
    pub state: State,
}

/// The asynchronous copies that one instruction issued and that are not complete (spec section 6): the bytes were read at the issue.
#[derive(Clone, Debug)]
pub struct PendingCopy {
    /// Lanes whose copy is not complete.
    pub lanes: u32,
    /// Those of them that have not committed theirs.
    pub open: u32,
    /// Commit group of each other lane's copy.
    pub groups: [u32; 32],
    /// Offsets in shared memory.
    pub offsets: [u32; 32],
    /// Bytes to write: 4, 8 or 16.
    pub size: u32,
    /// The bytes.
    pub data: [[u8; 16]; 32],
    /// Their shadow.
    pub shadow: [[u8; 16]; 32],
    /// Instruction that issued it.
    pub pc: u32,
}

/// A warp.
#[derive(Clone, Debug, Default)]
pub struct Warp {
    /// Its number in the block.
    pub id: u32,
    /// Registers.
    pub regs: Regs,
    /// Groups in no particular order; their masks are disjoint and make up `live`.
    pub groups: Vec<Group>,
    /// Lanes that have not exited.
    pub live: u32,
    /// Lanes that exist (the last warp of a block may be short).
    pub present: u32,
    /// Where each lane goes after [`super::inst::Flow::Indirect`].
    pub targets: Vec<u32>,
    /// Local memory, one frame of `Kernel::local_bytes` a lane.
    pub local: Vec<u8>,
    /// Shadow of `local`.
    pub local_shadow: Vec<u8>,
    /// Asynchronous copies in the order of their issue.
    pub copies: Vec<PendingCopy>,
    /// Commit groups closed so far, a lane each.
    pub committed: [u32; 32],
    /// Carry flag of `add.cc` and its like.
    pub carry: u32,
    /// Lanes whose carry flag is undefined.
    pub undef_carry: u32,
    /// Lanes that ran last and the steps they have taken in a row while others could run.
    pub streak: (u32, u32),
    /// Instructions this warp has executed (the clock that `%clock` reads).
    pub executed: u64,
}

/// Values a block gives its special registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct BlockIds {
    /// `%ctaid`.
    pub ctaid: [u32; 3],
    /// `%nctaid`.
    pub nctaid: [u32; 3],
    /// `%ntid`.
    pub ntid: [u32; 3],
    /// `%smid`.
    pub smid: u32,
    /// `%nsmid`.
    pub nsmid: u32,
    /// `%gridid`.
    pub gridid: u32,
    /// `%dynamic_smem_size`.
    pub dynamic_shared: u32,
    /// `%total_smem_size`.
    pub total_shared: u32,
}

impl Warp {
    /// Makes the warp ready for the first instruction of a block.
    pub fn start(&mut self, kernel: &Kernel, id: u32, ids: &BlockIds, track: bool) {
        let threads = ids.ntid[0] * ids.ntid[1] * ids.ntid[2];
        let here = (threads - id * 32).min(32);
        self.id = id;
        self.present = if here == 32 { FULL } else { (1 << here) - 1 };
        self.live = self.present;
        self.groups.clear();
        self.groups.push(Group { pc: 0, mask: self.live, state: State::Ready });
        self.copies.clear();
        self.committed = [0; 32];
        self.carry = 0;
        self.streak = (0, 0);
        self.executed = 0;
        let frame = kernel.local_bytes as usize * 32;
        self.local.clear();
        self.local.resize(frame, FILL);
        self.local_shadow.clear();
        self.local_shadow.resize(frame, UNDEFINED);
        let none = if track { FULL } else { 0 };
        self.undef_carry = none;
        let regs = &mut self.regs;
        regs.track = track;
        regs.poison = 0;
        let [n32, n64, np] = kernel.slots.map(|n| n as usize);
        regs.r32.resize(n32, [u32::MAX; 32]);
        regs.r64.resize(n64, [u64::MAX; 32]);
        regs.pred.clear();
        regs.pred.resize(np, 0);
        regs.undef32.clear();
        regs.undef32.resize(n32, [none; 2]);
        regs.undef64.clear();
        regs.undef64.resize(n64, [none; 2]);
        regs.undef_pred.clear();
        regs.undef_pred.resize(np, none);
        for &(slot, value) in &kernel.const32 {
            regs.put32(slot, &[value; 32], FULL, [0; 2]);
        }
        for &(slot, value) in &kernel.const64 {
            regs.put64(slot, &[value; 32], FULL, [0; 2]);
        }
        for &(slot, value) in &kernel.const_pred {
            regs.put_pred(slot, if value { FULL } else { 0 }, FULL, 0);
        }
        for &(slot, special) in &kernel.special32 {
            regs.put32(slot, &lanes_of(special, id, ids), FULL, [0; 2]);
        }
        for &(slot, special) in &kernel.special64 {
            regs.put64(slot, &lanes_of(special, id, ids).map(u64::from), FULL, [0; 2]);
        }
    }

    /// The lowest lane of `mask` as a thread index.
    pub fn thread(&self, mask: u32, ntid: [u32; 3]) -> [u32; 3] {
        let linear = self.id * 32 + mask.trailing_zeros().min(31);
        [linear % ntid[0], linear / ntid[0] % ntid[1], linear / (ntid[0] * ntid[1])]
    }
}

fn lanes_of(special: Special, warp: u32, ids: &BlockIds) -> [u32; 32] {
    let threads = ids.ntid[0] * ids.ntid[1] * ids.ntid[2];
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        let lane = lane as u32;
        let linear = warp * 32 + lane;
        *value = match special {
            Special::Tid(0) => linear % ids.ntid[0],
            Special::Tid(1) => linear / ids.ntid[0] % ids.ntid[1],
            Special::Tid(_) => linear / (ids.ntid[0] * ids.ntid[1]),
            Special::Ntid(axis) => ids.ntid[axis as usize % 3],
            Special::Ctaid(axis) => ids.ctaid[axis as usize % 3],
            Special::Nctaid(axis) => ids.nctaid[axis as usize % 3],
            Special::LaneId => lane,
            Special::WarpId => warp,
            Special::NWarpId => threads.div_ceil(32),
            Special::LaneMaskEq => 1 << lane,
            Special::LaneMaskLt => (1 << lane) - 1,
            Special::LaneMaskLe => u32::MAX >> (31 - lane),
            Special::LaneMaskGt => !(u32::MAX >> (31 - lane)),
            Special::LaneMaskGe => !((1 << lane) - 1),
            Special::SmId => ids.smid,
            Special::NSmId => ids.nsmid,
            Special::GridIdLow => ids.gridid,
            Special::DynamicSmemSize => ids.dynamic_shared,
            Special::TotalSmemSize => ids.total_shared,
        };
    }
    out
}
