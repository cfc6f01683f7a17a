//! A stand-in for `libcublasLt.so` over the emulated CUDA driver: matrix products with cublasLt's interface, computed on
//! the processor in f32.
//!
//! | what | supported |
//! | --- | --- |
//! | types | A and B f32, f16 or bf16 alike; C and D the same type, or f32 |
//! | sums | f32 (`CUBLAS_COMPUTE_32F`, its pedantic form, and TF32, which is computed without rounding the inputs) |
//! | matrices | column- and row-major, transposed or not, any leading dimension, strided batches |
//! | scalars | alpha and beta as f32 in host memory |
//! | epilogues | none, bias, `ReLU`, `GELU` (the tanh form), and these after a bias |
//!
//! Anything else returns `CUBLAS_STATUS_NOT_SUPPORTED`, what contradicts itself `CUBLAS_STATUS_INVALID_VALUE`, with one
//! line on the standard error that says what and why. Where the manual leaves a case open the stricter reading is taken:
//! a product that passes here also passes on hardware, but for rounding.

// The library's name is not ours to choose.
#![allow(non_snake_case)]

mod attributes;
mod compute;
mod driver;
mod exports;
mod handles;
mod problem;
mod status;

pub use driver::{Enqueue, Range, use_driver};
pub use exports::*;
