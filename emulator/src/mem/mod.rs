//! Device memory: virtual addresses, allocations, and a shadow byte for every byte.

mod allocation;

pub use allocation::{Allocation, Kind, Memory, MemoryError};

/// Shadow value of a byte somebody wrote.
pub const DEFINED: u8 = 0;
/// Shadow bit of a byte nobody wrote.
pub const UNDEFINED: u8 = 1;
/// Shadow bit of a shared byte that an asynchronous copy is about to write.
pub const PENDING: u8 = 2;

/// First address of device allocations.
pub const DEVICE_BASE: u64 = 0x7f00_0000_0000;
/// First address of module variables.
pub const MODULE_BASE: u64 = 0x7e00_0000_0000;
/// Generic window of shared memory; the low 32 bits are the offset.
pub const SHARED_WINDOW: u64 = 0x0001_0000_0000_0000;
/// Generic window of local memory.
pub const LOCAL_WINDOW: u64 = 0x0002_0000_0000_0000;
/// Generic window of the kernel parameters.
pub const PARAM_WINDOW: u64 = 0x0003_0000_0000_0000;
/// Fresh memory is filled with this: NaN in every float format.
pub const FILL: u8 = 0xff;
