//! A CUDA driver without a GPU: loads PTX, runs it on the processor, and checks every access it makes.

pub mod fatbin;
pub mod ptx;
