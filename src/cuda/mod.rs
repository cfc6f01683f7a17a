//! The CUDA kernels, launched on the caller's stream and memory.
//!
//! Each operation has a safe function over cudarc's views and an `unsafe` one over device pointers, for engines with
//! memory of their own. Neither allocates, synchronises or reads back, so both can be captured in a CUDA graph (switch
//! cudarc's event tracking off before capturing, as cudarc asks). Arguments are checked before anything is launched.
//! Results are the same bits in every run and, but for [`linear`]'s, for every batch.
//!
//! | operation | kernels | reference |
//! | --- | --- | --- |
//! | [`attention`] | kernels/attention.cu, `attention_stream.cu`, `attention_f32.cu`, `attention_fold.cu` | [`Backend::attention`], [`Backend::attention_scores`], [`Backend::attention_reduced`] |
//! | [`norm`] | kernels/norm.cu | [`Backend::layer_norm`], with the residual addition before it |
//! | [`linear`] | cuBLASLt | [`Backend::linear`] |
//! | [`cluster`] | kernels/cluster.cu | [`Backend::cluster`] |
//! | [`windows`] | kernels/windows.cu | [`Backend::pool_windows`], [`Backend::add_windows`] |
//! | [`activation`] | kernels/activation.cu | [`Activation`](crate::model::Activation) |
//! | [`connectivity`] | kernels/connectivity.cu | [`reference::connectivity`](crate::reference::connectivity) |
//! | [`convolution`] | kernels/convolution.cu | [`GridBackend::convolution`], [`GridBackend::depthwise`] |
//! | [`frequency`] | kernels/frequency.cu, `frequency_mma.cu` | [`GridBackend::frequency`] |
//! | [`grid_norm`] | `kernels/grid_norm.cu` | [`GridBackend::grid_norm`] |
//! | [`head_norm`] | `kernels/head_norm.cu` | [`Backend::head_norm`] |
//! | [`matching`] | kernels/matching.cu | [`Backend::matching`] |
//! | [`merge`] | kernels/merge.cu | [`Backend::merge`], [`Backend::unmerge`] |
//! | [`patch`] | kernels/patch.cu | [`Backend::patches`], [`Backend::embed`] |
//! | [`performer`] | kernels/performer.cu | [`Backend::performer`] |
//! | [`predictor`] | kernels/predictor.cu | [`Backend::keep_scores`] |
//! | [`plan`] | kernels/plan.cu | [`TokenPlan::then`] |
//! | [`reduce`] | kernels/reduce.cu | sums and maxima of rows, means of columns |
//! | [`score`] | kernels/score.cu | [`Backend::token_scores`] |
//! | [`select`] | kernels/select.cu | [`Backend::select`], [`Backend::keep_in_place`] |
//! | [`softmax`] | kernels/softmax.cu | the softmax of attention scores, as rows in memory |
//! | [`structured`] | kernels/structured.cu | scores and updates of [`reference::connectivity`](crate::reference::connectivity) |
//! | [`tokens`] | kernels/tokens.cu | [`Backend::tokens`], [`Backend::mean_tokens`], [`Backend::max_tokens`] |
//! | [`unfold`] | kernels/unfold.cu | [`Backend::unfold_images`], [`Backend::unfold`] |
//!
//! Whole models run on [`Cuda`], which implements [`Backend`](crate::backend::Backend); with one batch size, faster, in an
//! [`Engine`], a CUDA graph over one allocation. [`Forecast`] tells what either takes.
//!
//! Storage is `f32`, `f16` or `bf16` ([`Element`]); sums are `f32`.
//!
//! ```no_run
//! use foveate::cuda::{Device, DevicePlan, Strided, select::{Selection, select}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::new(0)?;
//! let stream = device.context().new_stream()?;
//! // Class attention of 2 images, 6 heads, 197 tokens; keep the class token and 137 others, fuse the rest.
//! let scores = stream.clone_htod(&vec![0.5_f32; 2 * 6 * 197])?;
//! let selection = Selection { special: 1, keep: 137, fuse: true };
//! let mut plan = DevicePlan::new(&stream, 2, 197, selection.tokens_out(197)?)?;
//! select(&device, &stream, &Strided::new(scores.as_view(), [2, 6, 197]), selection, &mut plan)?;
//! assert_eq!(plan.download(&stream)?.tokens_out(), 139);
//! # Ok(())
//! # }
//! ```
//!
//! [`Backend::attention`]: crate::backend::Backend::attention
//! [`Backend::attention_scores`]: crate::backend::Backend::attention_scores
//! [`Backend::attention_reduced`]: crate::backend::Backend::attention_reduced
//! [`GridBackend::convolution`]: crate::backend::GridBackend::convolution
//! [`GridBackend::depthwise`]: crate::backend::GridBackend::depthwise
//! [`GridBackend::grid_norm`]: crate::backend::GridBackend::grid_norm
//! [`GridBackend::frequency`]: crate::backend::GridBackend::frequency
//! [`Backend::layer_norm`]: crate::backend::Backend::layer_norm
//! [`Backend::linear`]: crate::backend::Backend::linear
//! [`Backend::matching`]: crate::backend::Backend::matching
//! [`Backend::merge`]: crate::backend::Backend::merge
//! [`Backend::unmerge`]: crate::backend::Backend::unmerge
//! [`Backend::head_norm`]: crate::backend::Backend::head_norm
//! [`Backend::tokens`]: crate::backend::Backend::tokens
//! [`Backend::mean_tokens`]: crate::backend::Backend::mean_tokens
//! [`Backend::max_tokens`]: crate::backend::Backend::max_tokens
//! [`Backend::unfold`]: crate::backend::Backend::unfold
//! [`Backend::unfold_images`]: crate::backend::Backend::unfold_images
//! [`Backend::patches`]: crate::backend::Backend::patches
//! [`Backend::embed`]: crate::backend::Backend::embed
//! [`Backend::performer`]: crate::backend::Backend::performer
//! [`Backend::keep_scores`]: crate::backend::Backend::keep_scores
//! [`Backend::token_scores`]: crate::backend::Backend::token_scores
//! [`Backend::cluster`]: crate::backend::Backend::cluster
//! [`Backend::pool_windows`]: crate::backend::Backend::pool_windows
//! [`Backend::add_windows`]: crate::backend::Backend::add_windows
//! [`Backend::keep_in_place`]: crate::backend::Backend::keep_in_place
//! [`Backend::select`]: crate::backend::Backend::select
//! [`TokenPlan::then`]: crate::TokenPlan::then

pub mod activation;
pub mod attention;
mod backend;
mod blas;
mod borrow;
pub mod cluster;
pub mod connectivity;
pub mod convert;
pub mod convolution;
mod device;
mod element;
mod engine;
pub mod frequency;
pub mod grid_norm;
pub mod head_norm;
mod image;
mod launch;
pub mod linear;
pub mod matching;
pub mod merge;
pub mod norm;
mod nvtx;
pub mod patch;
pub mod performer;
mod pixels;
pub mod plan;
pub mod predictor;
mod record;
pub mod reduce;
pub mod score;
pub mod select;
pub mod softmax;
mod strided;
pub mod structured;
pub mod tokens;
pub mod unfold;
pub mod windows;

pub use backend::{Cuda, CudaPlan, CudaTensor};
pub use blas::Blas;
pub use device::Device;
pub use element::{DType, Element};
pub use engine::{Engine, EngineModel, Forecast, Run};
pub use image::RowTypes;
pub use plan::{DevicePlan, PlanPointers};
pub use record::LaunchRecord;
pub use strided::Strided;

/// An address in device memory.
pub type DevicePointer = cudarc::driver::sys::CUdeviceptr;
