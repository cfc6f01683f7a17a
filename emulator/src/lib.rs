//! A CUDA driver without a GPU: loads PTX, runs it on the processor, and checks every access it makes.

// The lane loops must end up inside the functions that are compiled for AVX2: a call would lose its registers and its vectors.
#![allow(clippy::inline_always)]

pub mod case;
pub mod check;
pub mod config;
pub mod count;
pub mod device;
pub mod driver;
pub mod fatbin;
pub mod lower;
pub mod machine;
pub mod mem;
pub mod npy;
pub mod ops;
pub mod ptx;
pub mod report;
