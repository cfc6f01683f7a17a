//! The operations of [`GridBackend`].

use super::{Cpu, Tensor, activation::Activate, backend::host_norm, pack::Shared};
use crate::{
    Error, Result,
    backend::{Convolution, Depthwise, Frequency, GridBackend, Norm, NormOver},
    model::Activation,
};

/// Values of one task.
const TASK: usize = 1 << 14;

impl GridBackend for Cpu {
    fn convolution(&self, x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
        let layer = Convolution {
            weight: layer.weight.view().to_host()?,
            bias: layer.bias.view().to_host()?,
            stride: layer.stride,
            activation: layer.activation,
        };
        self.adopt(&self.plain()?.convolution(&x.view().to_host()?, grid, &layer)?)
    }

    fn depthwise(&self, x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
        let layer = Depthwise {
            weight: layer.weight.view().to_host()?,
            bias: layer.bias.view().to_host()?,
            stride: layer.stride,
            before: layer.before,
            activation: layer.activation,
        };
        self.adopt(&self.plain()?.depthwise(&x.view().to_host()?, grid, &layer)?)
    }

    fn grid_norm(&self, x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.adopt(&self.plain()?.grid_norm(&x.view().to_host()?, over, &host_norm(norm)?)?)
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        if activation == Activation::SwiGlu {
            return Err(Error::argument("activate", "a gate is not the nonlinearity of every value"));
        }
        let (shape, context) = (x.shape, &*self.context);
        let mut out = x.into_buffer(&context.pool);
        let len = out.len();
        let shared = Shared::of(out.make_mut());
        context.threads.run(len.div_ceil(TASK), |_, task| {
            // SAFETY: each task has values of its own.
            let values = unsafe { shared.part(task * TASK, TASK.min(len - task * TASK)) };
            context.kernels.run(Activate { activation, values });
        });
        Ok(Tensor::pooled(shape, out))
    }

    fn frequency(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        filter: &Frequency<Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let filter = Frequency {
            w1: filter.w1.view().to_host()?,
            b1: filter.b1.view().to_host()?,
            w2: filter.w2.view().to_host()?,
            b2: filter.b2.view().to_host()?,
            activation: filter.activation,
            threshold: filter.threshold,
        };
        let residual = residual.map(|residual| residual.view().to_host()).transpose()?;
        self.adopt(&self.plain()?.frequency(&x.view().to_host()?, grid, &filter, residual.as_ref())?)
    }
}
