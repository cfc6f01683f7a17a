//! Checkpoints: safetensors files in timm and Hugging Face naming become parameters.
//!
//! [`Checkpoint`] opens a file, [`ConfigFile`] the configuration beside it, [`Overrides`] holds what the caller knows
//! better, and [`load_vit`] turns them into the numbers and parameters of a plain vision transformer, [`load_affnet`] into
//! those of an AFFNet, [`load`] into whichever it is. Files are not
//! trusted: whatever they hold, the result is a model or an error of one line that names the file, the tensor or key,
//! and the remedy.

mod affnet;
mod batch_norm;
mod config;
mod file;
mod header;
mod json;
mod masks;
mod naming;
mod overrides;
mod parameters;
mod position;
mod reducers;
mod settings;
mod stem;
mod text;
mod vit;

pub use affnet::{Loaded, LoadedAffNet, is_affnet, load, load_aff_block, load_affnet, load_affnet_file};
pub use config::ConfigFile;
pub use file::Checkpoint;
pub use naming::Family;
pub use overrides::Overrides;
pub use position::{PositionResampling, resample_positions};
pub use vit::{LoadedVit, Provenance, load_vit, load_vit_file};
