//! Counters of a launch (specification section 9).

use crate::machine::inst::Kernel;

/// What kind of global access a warp instruction makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum GlobalKind {
    Load,
    Store,
    Atomic,
    CpAsync,
}

/// What a launch has counted so far.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Warp instructions executed, by instruction.
    pub executed: Vec<u64>,
    /// Their active lanes summed, by instruction.
    pub lanes: Vec<u64>,
    /// Branches that split a group, by instruction.
    pub divergent: Vec<u64>,
    /// Block barriers completed.
    pub barriers: u64,
    /// Memory counters are kept.
    pub memory: bool,
}

impl Counters {
    /// All zero.
    pub fn new(kernel: &Kernel, memory: bool) -> Self {
        let n = kernel.insts.len();
        Self { executed: vec![0; n], lanes: vec![0; n], divergent: vec![0; n], barriers: 0, memory }
    }

    /// A warp instruction on global memory: `size` bytes at each active lane's address.
    #[inline]
    pub fn global(&mut self, _pc: u32, _kind: GlobalKind, _addresses: &[u64; 32], _mask: u32, _size: u32) {}

    /// A warp instruction on shared memory: `size` bytes (4 for less) at each active lane's offset.
    #[inline]
    pub fn shared(&mut self, _pc: u32, _offsets: &[u32; 32], _mask: u32, _size: u32, _atomic: bool) {}

    /// An `ldmatrix`/`stmatrix`: the lanes `0..8 * matrices` give rows of 16 bytes.
    #[inline]
    pub fn matrix_rows(&mut self, _pc: u32, _offsets: &[u32; 32], _matrices: u32) {}
}
