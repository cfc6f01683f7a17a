//! Decoded instructions: what the scheduler runs.

use super::core::Core;
use crate::ops::lanes::Test;
use crate::ptx::ast::Loc;

/// Executes one instruction for the lanes of `mask` (lanes whose guard predicate is false are already gone; 0 only for arithmetic whose
/// guard is undefined).
///
/// The functions are `unsafe` to call for one reason only: some are compiled for processor features that
/// [`crate::ops::lanes`] found present when it chose them.
pub type Exec = unsafe fn(&mut Core<'_>, &Inst, mask: u32) -> Flow;

/// What the scheduler does after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// All lanes go on with the next instruction.
    Next,
    /// The lanes of `taken` (a subset of the instruction's mask) jump to instruction `target`.
    Branch {
        /// Lanes that jump.
        taken: u32,
        /// Index into [`Kernel::insts`].
        target: u32,
    },
    /// Every lane of the mask jumps to its entry of `Warp::targets`.
    Indirect,
    /// The lanes of the mask have ended.
    Exit,
    /// The group waits at a barrier; it executes the same instruction again, with `Core::resumed` set, once released.
    Wait {
        /// Number of the barrier.
        barrier: u32,
    },
    /// `bar.arrive`: the lanes go on, and a barrier may be complete now.
    Arrived,
    /// A fault was reported: the launch ends.
    Fault,
}

/// Which lanes must have come together before an instruction may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Any subset of the warp.
    None,
    /// `.aligned`: every lane of the warp that has not exited.
    Aligned,
    /// `.sync` with a member mask in 32-bit slot `Inst::e`: every live lane of the mask at this instruction.
    Member,
    /// `bar.warp.sync`: as `Member`, but lanes may wait at different instructions of this kind.
    WarpBarrier,
}

/// Instruction classes of the counters (spec section 9.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Class {
    Int,
    Fp32,
    Fp64,
    Fp16,
    Sfu,
    Cvt,
    Move,
    LdGlobal,
    StGlobal,
    LdShared,
    StShared,
    Local,
    Atomic,
    CpAsync,
    LdMatrix,
    Mma,
    Warp,
    Barrier,
    Control,
}

/// One decoded instruction. Operands are slots of the register file; immediates and special registers are slots too,
/// filled before the kernel starts, so that no operand needs a case distinction at run time.
#[derive(Clone, Debug)]
pub struct Inst {
    /// The function that runs it.
    pub exec: Exec,
    /// The comparison of `setp` and its like.
    pub test: Option<Test>,
    /// Destination slot.
    pub d: u32,
    /// First source slot.
    pub a: u32,
    /// Second source slot.
    pub b: u32,
    /// Third source slot.
    pub c: u32,
    /// Fourth source slot (member mask, second predicate, ...).
    pub e: u32,
    /// Index of the first further slot in [`Kernel::extra`], for instructions with more operands.
    pub x: u32,
    /// Free for the family: an address offset, a rounding mode, flags.
    pub imm: i64,
    /// Free for the family.
    pub aux: u32,
    /// Guard predicate slot, or [`NO_GUARD`].
    pub guard: u32,
    /// The guard is negated.
    pub guard_not: bool,
    /// Lanes that must be together.
    pub sync: Sync,
    /// Counter class.
    pub class: Class,
    /// An undefined guard is an error for this instruction (stores, atomics, branches, barriers).
    pub strict: bool,
    /// Its own index in [`Kernel::insts`] (also the index into [`Kernel::meta`] and of the per-instruction counters).
    pub pc: u32,
}

/// No guard predicate.
pub const NO_GUARD: u32 = u32::MAX;

/// What reports need to know of an instruction.
#[derive(Clone, Debug, Default)]
pub struct Meta {
    /// Line in the PTX text.
    pub line: u32,
    /// CUDA source line.
    pub loc: Loc,
    /// The instruction as written.
    pub text: String,
}

/// Special registers that have one value per thread for a whole block; the clocks are instructions of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NWarpId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    SmId,
    NSmId,
    GridIdLow,
    DynamicSmemSize,
    TotalSmemSize,
}

/// A kernel parameter as the launch passes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name.
    pub name: String,
    /// Byte offset in the parameter space.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// A named piece of a block's shared memory, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedSymbol {
    /// Its name.
    pub name: String,
    /// Byte offset.
    pub offset: u32,
    /// Bytes; 0 for the dynamic part.
    pub size: u32,
}

/// A kernel ready to run.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// Symbol.
    pub name: String,
    /// Instructions; the last one is an exit.
    pub insts: Vec<Inst>,
    /// For each instruction, what reports say of it.
    pub meta: Vec<Meta>,
    /// Further operand slots.
    pub extra: Vec<u32>,
    /// Number of 32-bit slots, 64-bit slots and predicates.
    pub slots: [u32; 3],
    /// 32-bit slots with a constant.
    pub const32: Vec<(u32, u32)>,
    /// 64-bit slots with a constant.
    pub const64: Vec<(u32, u64)>,
    /// Predicate slots with a constant.
    pub const_pred: Vec<(u32, bool)>,
    /// 32-bit slots that hold a special register (zero-extended in 64-bit ones).
    pub special32: Vec<(u32, Special)>,
    /// 64-bit slots that hold a special register, zero-extended.
    pub special64: Vec<(u32, Special)>,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Size of the parameter space.
    pub param_bytes: u64,
    /// Static shared memory in bytes.
    pub shared_static: u32,
    /// Offset of the dynamic shared memory (static size rounded up to its alignment).
    pub shared_dynamic: u32,
    /// Named shared variables.
    pub shared_symbols: Vec<SharedSymbol>,
    /// Local frame of a thread in bytes.
    pub local_bytes: u32,
    /// `.const` bytes of the module.
    pub const_bytes: u64,
    /// `.maxntid`.
    pub maxntid: Option<[u32; 3]>,
    /// `.reqntid`.
    pub reqntid: Option<[u32; 3]>,
    /// PTX version times ten (`8.8` is 88).
    pub ptx_version: u32,
    /// Compute capability of `.target`, 80 for `sm_80`.
    pub sm: u32,
    /// Registers a thread: from `ptxas -v` where known, else an estimate from live 32-bit values.
    pub registers: u32,
    /// Source files by index.
    pub files: Vec<(u32, String)>,
}

impl Kernel {
    /// `file.cu:57`, or nothing when the PTX has no line information for the instruction.
    pub fn source_of(&self, pc: u32) -> Option<String> {
        let loc = self.meta.get(pc as usize)?.loc;
        let (_, path) = self.files.iter().find(|(index, _)| *index == loc.file)?;
        (loc.line > 0).then(|| format!("{}:{}", path.rsplit('/').next().unwrap_or(path), loc.line))
    }
}
