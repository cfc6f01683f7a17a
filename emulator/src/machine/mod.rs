//! Blocks, warps and the scheduler: the execution model of the specification's section 5.

pub mod barrier;
pub mod block;
pub mod core;
pub mod inst;
pub mod launch;
pub mod regs;
pub mod schedule;
pub mod warp;
