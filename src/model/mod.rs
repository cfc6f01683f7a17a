//! Models: forward passes over a backend and a reduction, one file per architecture.

pub mod affnet;
pub mod arch;
mod config;
mod heads;
mod map;
mod stem;
mod tokens_to_token;
mod vit;

pub use affnet::{AffNet, AffNetConfig};
pub use config::{Activation, BlockParams, BlockSize, PoolParams, Readout, Reducers, VitConfig, VitParams};
pub(crate) use stem::SPLIT_PATCH;
pub use stem::{Stem, StemParams, TokensAttention};
pub use tokens_to_token::StageParams;
pub use vit::{Observer, Output, Vit};
