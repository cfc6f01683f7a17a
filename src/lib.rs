//! Vision transformers that do not compute on tokens that do not matter.
//!
//! `foveate` runs plain vision transformers (ViT, DeiT, DINOv2, CLIP's visual tower) with token reduction: similar tokens
//! are merged, unimportant ones fused or dropped, while the model runs and without retraining it.
//!
//! ```
//! use foveate::{Reduction, cpu::Cpu, image::{self, Picture}, weights::{Overrides, load_vit_file}};
//!
//! # fn main() -> foveate::Result<()> {
//! # let root = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/");
//! # let pixels = (0..28 * 28).map(|i| (i % 251) as u8).collect();
//! // A checkpoint in timm or Hugging Face naming; the architecture is read off its tensors.
//! let model = load_vit_file(format!("{root}fashion_deit_f16.safetensors"), &Overrides::default())?.build(Cpu::new())?;
//!
//! // One picture, through the model's own input transform.
//! let picture = Picture::new(28, 28, 1, pixels)?;
//! let config = model.config();
//! let images = image::batch(&[config.transform.apply(&picture, config.image)?])?;
//!
//! // Merge 13 tokens in each block.
//! let reduction: Reduction = "tome:r=13".parse()?;
//! let output = model.forward(&images, &reduction)?;
//!
//! let logits = output.logits.as_ref().expect("this checkpoint has a head");
//! assert_eq!(logits.shape(), [1, 10]);
//! println!("tokens: {:?}", output.token_counts);
//! println!("the patches of each final token: {:?}", output.source_map(model.backend())?.groups(0));
//! # Ok(())
//! # }
//! ```
//!
//! # Layout
//! - [`TokenPlan`] is what every method ends in: which input tokens make up each output token, with which weights.
//! - [`reduction`] has one file per method; each builds plans out of backend operations and knows no device.
//! - [`backend::Backend`] is the operations; [`cpu::Cpu`] runs them on the processor, fast; [`reference::Reference`] is
//!   their reference, plain.
//! - `cuda` (feature `cuda`) launches the CUDA kernels on the caller's streams and memory.
//! - [`model`] has the forward passes, written once over a backend and a method.
//! - [`weights`] reads safetensors files; [`image`] reads pictures exactly as the models' training code does.
//! - [`connectivity`] drops and grows the weights, neurons and heads of sparse networks in training.
//! - [`macs`] counts multiply-adds by the rules of the papers.
//!
//! # Rules that hold everywhere
//! Ties go to the lower token index. A NaN score ranks below every number. Results are the same bits for any number of
//! threads. Special tokens (class, distillation, registers) come first and are never reduced.

pub mod backend;
pub mod connectivity;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod image;
pub mod macs;
pub mod model;
mod plan;
pub mod reduction;
pub mod reference;
mod tensor;
pub mod weights;

pub use error::{Error, Result};
pub use plan::{SourceMap, TokenPlan};
pub use reduction::Reduction;
pub use tensor::{HostTensor, Images, Pixels, Tensor, TensorView};

/// The README's example, compiled and run with the documentation tests.
#[cfg(all(doctest, feature = "image"))]
#[doc = include_str!("../README.md")]
struct Readme;
