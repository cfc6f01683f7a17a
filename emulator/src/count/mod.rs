//! Counters of a launch (specification section 9).
//!
//! One *warp instruction* is one PTX instruction executed by one group of lanes with at least one active, predicate-true lane.
//! Memory counters are kept by instruction, so that totals, kinds and source lines all come from one table; see
//! [`json`] for the keys of the report.

mod banks;
pub mod json;
pub mod model;
mod sectors;

use crate::machine::inst::Kernel;
use sectors::Touched;

/// What kind of global access a warp instruction makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum GlobalKind {
    Load,
    Store,
    Atomic,
    CpAsync,
}

/// Global memory requests of one instruction (9.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GlobalUse {
    /// The kind, once there was a request.
    pub kind: Option<GlobalKind>,
    /// Warp instructions with an active lane.
    pub requests: u64,
    /// Distinct 32-byte sectors of each request, summed.
    pub sectors: u64,
    /// Distinct bytes of each request over 32, rounded up, summed.
    pub ideal: u64,
    /// Requests that touched more than twice their ideal number of sectors.
    pub scattered: u64,
}

impl GlobalUse {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.sectors += other.sectors;
        self.ideal += other.ideal;
        self.scattered += other.scattered;
    }
}

/// Shared memory requests of one instruction (9.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedUse {
    /// Warp instructions with an active lane.
    pub requests: u64,
    /// Passes of lanes, which is the ideal number of wavefronts.
    pub ideal: u64,
    /// Wavefronts of all passes.
    pub wavefronts: u64,
}

impl SharedUse {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.ideal += other.ideal;
        self.wavefronts += other.wavefronts;
    }

    /// Wavefronts that a better layout would not need.
    pub fn conflicts(&self) -> u64 {
        self.wavefronts - self.ideal
    }
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
    /// Global memory, by instruction.
    pub global: Vec<GlobalUse>,
    /// Shared memory, by instruction.
    pub shared: Vec<SharedUse>,
    /// Float atomics of threads to addresses that more than one warp hit (9.7): their order changes the result.
    pub nondeterministic_atomics: u64,
    /// Useful floating-point operations, when the launcher declared them.
    pub useful_flops: Option<f64>,
    touched: Touched,
    unique: [u64; 2],
}

impl Counters {
    /// All zero.
    pub fn new(kernel: &Kernel, memory: bool) -> Self {
        let n = kernel.insts.len();
        Self {
            executed: vec![0; n],
            lanes: vec![0; n],
            divergent: vec![0; n],
            memory,
            global: vec![GlobalUse::default(); n],
            shared: vec![SharedUse::default(); n],
            ..Self::default()
        }
    }

    /// A warp instruction on global memory: `size` bytes at each active lane's address.
    #[inline]
    pub fn global(&mut self, pc: u32, kind: GlobalKind, addresses: &[u64; 32], mask: u32, size: u32) {
        if mask == 0 || size == 0 {
            return;
        }
        // An atomic brings its sector in and writes it back; it counts as a write, once.
        let writes = matches!(kind, GlobalKind::Store | GlobalKind::Atomic);
        let (sectors, bytes) = sectors::measure(addresses, mask, size, &mut self.touched, writes);
        let ideal = bytes.div_ceil(sectors::SECTOR as u32);
        let entry = &mut self.global[pc as usize];
        entry.kind = Some(kind);
        entry.requests += 1;
        entry.sectors += u64::from(sectors);
        entry.ideal += u64::from(ideal);
        entry.scattered += u64::from(sectors > 2 * ideal);
    }

    /// A warp instruction on shared memory: `size` bytes (4 for less) at each active lane's offset.
    #[inline]
    pub fn shared(&mut self, pc: u32, offsets: &[u32; 32], mask: u32, size: u32, atomic: bool) {
        if mask == 0 {
            return;
        }
        let (ideal, mut wavefronts) = banks::passes(offsets, mask, size);
        if atomic {
            wavefronts += banks::most_on_one_address(offsets, mask) - 1;
        }
        self.shared_passes(pc, ideal, wavefronts);
    }

    /// An `ldmatrix`/`stmatrix`: the lanes `0..8 * matrices` give rows of 16 bytes.
    #[inline]
    pub fn matrix_rows(&mut self, pc: u32, offsets: &[u32; 32], matrices: u32) {
        let lanes = u32::MAX >> (32 - 8 * matrices.clamp(1, 4));
        let (ideal, wavefronts) = banks::passes(offsets, lanes, 16);
        self.shared_passes(pc, ideal, wavefronts);
    }

    #[inline]
    fn shared_passes(&mut self, pc: u32, ideal: u32, wavefronts: u32) {
        let entry = &mut self.shared[pc as usize];
        entry.requests += 1;
        entry.ideal += u64::from(ideal);
        entry.wavefronts += u64::from(wavefronts);
    }

    /// The launch has ended: what is only needed while it runs goes.
    pub fn finish(&mut self) {
        self.unique = self.unique_bytes();
        self.touched = Touched::default();
    }

    /// 32 bytes for each distinct sector that was read, and that was written (9.3).
    pub fn unique_bytes(&self) -> [u64; 2] {
        let now = self.touched.count().map(|sectors| sectors * sectors::SECTOR);
        [now[0] + self.unique[0], now[1] + self.unique[1]]
    }

    /// Global memory requests of all instructions of a kind.
    pub fn global_total(&self, kind: GlobalKind) -> GlobalUse {
        let mut total = GlobalUse { kind: Some(kind), ..GlobalUse::default() };
        self.global.iter().filter(|entry| entry.kind == Some(kind)).for_each(|entry| total.add(entry));
        total
    }

    /// Global memory requests of all instructions.
    pub fn global_all(&self) -> GlobalUse {
        let mut total = GlobalUse::default();
        self.global.iter().for_each(|entry| total.add(entry));
        total
    }

    /// Shared memory requests of all instructions.
    pub fn shared_total(&self) -> SharedUse {
        let mut total = SharedUse::default();
        self.shared.iter().for_each(|entry| total.add(entry));
        total
    }
}
