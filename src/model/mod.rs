//! Models: forward passes over a backend and a reduction, one file per architecture.

pub mod affnet;
pub mod arch;
mod config;
mod map;
mod vit;

pub use affnet::{AffNet, AffNetConfig};
pub use config::{Activation, BlockParams, BlockSize, PoolParams, Readout, Reducers, VitConfig, VitParams};
pub use vit::{Observer, Output, Vit};
