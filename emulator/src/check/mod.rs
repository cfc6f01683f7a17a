//! Checks that need their own bookkeeping: happens-before inside a block and between blocks.

pub mod global;
mod history;
mod order;
mod readers;
pub mod shared;
