//! Token plans on candle's devices.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use foveate::TokenPlan;

#[cfg(feature = "cuda")]
use crate::cuda::CudaPlan;
use crate::{host, tensors::unsupported};

/// Which input tokens make up each output token, with which weights, on the device of the tensors it was made from: a
/// [`TokenPlan`] that need not leave it. Clones share it.
#[derive(Clone, Debug)]
pub struct Plan {
    inner: Arc<Place>,
    device: Device,
}

#[derive(Debug)]
enum Place {
    Host(TokenPlan),
    #[cfg(feature = "cuda")]
    Cuda(CudaPlan),
}

impl Plan {
    pub(crate) fn on_host(plan: TokenPlan) -> Self {
        Self { inner: Arc::new(Place::Host(plan)), device: Device::Cpu }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn on_cuda(plan: CudaPlan) -> Self {
        let device = Device::Cuda(plan.device().clone());
        Self { inner: Arc::new(Place::Cuda(plan)), device }
    }

    /// Moves a plan to `device`.
    ///
    /// # Errors
    /// When there is no implementation on `device`, or its memory runs out.
    pub fn from_host(plan: TokenPlan, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::on_host(plan)),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => CudaPlan::upload(device, &plan).map(Self::on_cuda),
            other => Err(unsupported("token plan", other)),
        }
    }

    /// Copies the plan to the host. On CUDA this waits for the device.
    ///
    /// # Errors
    /// When something that was enqueued before has failed.
    pub fn to_host(&self) -> Result<TokenPlan> {
        match &*self.inner {
            Place::Host(plan) => Ok(plan.clone()),
            #[cfg(feature = "cuda")]
            Place::Cuda(plan) => plan.download(),
        }
    }

    /// The output token of each input token, (B, N) of `i32`: -1 for dropped ones.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn groups(&self) -> Result<Tensor> {
        let shape = (self.batch(), self.tokens_in());
        match &*self.inner {
            Place::Host(plan) => Tensor::from_vec(host::groups(plan), shape, &Device::Cpu),
            #[cfg(feature = "cuda")]
            Place::Cuda(plan) => plan.groups(shape),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Images B.
    pub fn batch(&self) -> usize {
        match &*self.inner {
            Place::Host(plan) => plan.batch(),
            #[cfg(feature = "cuda")]
            Place::Cuda(plan) => plan.batch(),
        }
    }

    /// Input tokens N of each image.
    pub fn tokens_in(&self) -> usize {
        match &*self.inner {
            Place::Host(plan) => plan.tokens_in(),
            #[cfg(feature = "cuda")]
            Place::Cuda(plan) => plan.tokens_in(),
        }
    }

    /// Output tokens M of each image.
    pub fn tokens_out(&self) -> usize {
        match &*self.inner {
            Place::Host(plan) => plan.tokens_out(),
            #[cfg(feature = "cuda")]
            Place::Cuda(plan) => plan.tokens_out(),
        }
    }

    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unnecessary_wraps, reason = "a plan may lie on a device")
    )]
    pub(crate) fn host(&self) -> Result<&TokenPlan> {
        match &*self.inner {
            Place::Host(plan) => Ok(plan),
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => candle_core::bail!("the plan is not on the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Result<&CudaPlan> {
        match &*self.inner {
            Place::Cuda(plan) => Ok(plan),
            Place::Host(_) => candle_core::bail!("the plan is not on a CUDA device"),
        }
    }
}
