//! Checks that need their own bookkeeping: happens-before inside a block and between blocks.

pub mod global;
pub mod shared;
