//! Vision transformers that do not compute on tokens that do not matter.

pub mod backend;
pub mod cpu;
mod error;
pub mod image;
pub mod macs;
pub mod model;
mod plan;
pub mod reduction;
mod tensor;
pub mod weights;

pub use error::{Error, Result};
pub use plan::{SourceMap, TokenPlan};
pub use reduction::Reduction;
pub use tensor::{Images, Pixels, Tensor};
