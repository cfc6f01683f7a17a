//! A CUDA driver without a GPU: loads PTX, runs it on the processor, and checks every access it makes.

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
