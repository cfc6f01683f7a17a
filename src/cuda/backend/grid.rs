//! The operations of feature maps.

use super::{
    super::{
        DType, Strided,
        activation::activate_raw,
        convolution::{MapPointers, convolution_raw, depthwise_raw, strided_grid},
        frequency::{FrequencyPointers, FrequencyShape, Layout, frequency_raw, workspace_bytes},
        grid_norm::{GridNorm, grid_norm_raw, moments_length},
    },
    Cuda, CudaTensor, DevicePointer,
};
use crate::{
    Error, Result,
    backend::{Convolution, Depthwise, Frequency, GridBackend, Norm, NormOver},
    model::Activation,
};

/// Room for the result of a convolution of `x`.
fn target(
    cuda: &Cuda,
    x: &Strided<DevicePointer>,
    grid: [usize; 2],
    stride: usize,
    channels: usize,
) -> Result<(CudaTensor, Strided<DevicePointer>)> {
    let [height, width] = strided_grid(grid, stride);
    let shape = [x.shape[0], height.saturating_mul(width), channels];
    let out = cuda.empty(&shape, cuda.dtype())?;
    let place = Strided::new(out.pointer(), shape);
    Ok((out, place))
}

// SAFETY (for all blocks below): as for `Backend`.
impl GridBackend for Cuda {
    fn convolution(
        &self,
        x: &CudaTensor,
        grid: [usize; 2],
        layer: &Convolution<CudaTensor>,
    ) -> Result<CudaTensor> {
        const OP: &str = "convolution";
        let source = self.read(OP, "x", x)?;
        let outputs = layer.weight.width();
        let pointers = Convolution {
            weight: self.read_array(OP, "weight", &layer.weight, &[9 * source.shape[2], outputs])?,
            bias: self.read_array(OP, "bias", &layer.bias, &[outputs])?,
            stride: layer.stride,
            activation: layer.activation,
        };
        let (result, out) = target(self, &source, grid, layer.stride, outputs)?;
        let map = MapPointers { x: source, grid, out };
        // SAFETY: see above the block.
        unsafe { convolution_raw(self.device(), self.stream(), self.dtype(), &map, &pointers) }?;
        Ok(result)
    }

    fn depthwise(
        &self,
        x: &CudaTensor,
        grid: [usize; 2],
        layer: &Depthwise<CudaTensor>,
    ) -> Result<CudaTensor> {
        const OP: &str = "depthwise";
        let source = self.read(OP, "x", x)?;
        let channels = source.shape[2];
        let pointers = Depthwise {
            weight: self.read_array(OP, "weight", &layer.weight, &[9, channels])?,
            bias: self.read_array(OP, "bias", &layer.bias, &[channels])?,
            stride: layer.stride,
            before: layer.before,
            activation: layer.activation,
        };
        let (result, out) = target(self, &source, grid, layer.stride, channels)?;
        let map = MapPointers { x: source, grid, out };
        // SAFETY: see above the block.
        unsafe { depthwise_raw(self.device(), self.stream(), self.dtype(), &map, &pointers) }?;
        Ok(result)
    }

    fn grid_norm(&self, x: &CudaTensor, over: NormOver, norm: &Norm<CudaTensor>) -> Result<CudaTensor> {
        const OP: &str = "grid_norm";
        let source = self.read(OP, "x", x)?;
        let norm = self.read_norm(OP, norm, source.shape[2])?;
        let result = self.empty(&source.shape, self.dtype())?;
        let length = if over == NormOver::Image { moments_length(source.shape) } else { 0 };
        let moments = (length > 0).then(|| self.empty(&[length], DType::F32)).transpose()?;
        let arguments = GridNorm {
            x: source,
            over,
            norm,
            out: result.tokens(OP, "out")?,
            moments: moments.as_ref().map_or(0, CudaTensor::pointer),
            moments_length: length,
        };
        // SAFETY: see above the block.
        unsafe { grid_norm_raw(self.device(), self.stream(), self.dtype(), &arguments) }?;
        Ok(result)
    }

    fn activate(&self, x: CudaTensor, activation: Activation) -> Result<CudaTensor> {
        const OP: &str = "activate";
        if activation == Activation::SwiGlu {
            let what = "swiglu halves the channels; it is an epilogue of `linear`";
            return Err(Error::argument(OP, what));
        }
        self.check(OP, "x", &x, self.dtype())?;
        let out = x.into_own()?;
        // SAFETY: see above the block; the kernels may write where they read, and `out` is nobody else's.
        unsafe {
            activate_raw(self.device(), self.stream(), self.dtype(), activation, &out.rows(), &out.rows())
        }?;
        Ok(out)
    }

    fn frequency(
        &self,
        x: &CudaTensor,
        grid: [usize; 2],
        filter: &Frequency<CudaTensor>,
        residual: Option<&CudaTensor>,
    ) -> Result<CudaTensor> {
        const OP: &str = "frequency";
        let source = self.read(OP, "x", x)?;
        let [batch, _, channels] = source.shape;
        let &[2, groups, width, _] = filter.w1.shape() else {
            let what = format!(
                "w1 has shape {:?}, expected (2, groups, channels of a group, the same)",
                filter.w1.shape()
            );
            return Err(Error::argument(OP, what));
        };
        if groups.checked_mul(width) != Some(channels) {
            let what = format!("w1 is for {groups} groups of {width} channels, x has {channels} channels");
            return Err(Error::argument(OP, what));
        }
        let (matrix, row) = ([2, groups, width, width], [2, groups, width]);
        let pointers = Frequency {
            w1: self.read_array(OP, "w1", &filter.w1, &matrix)?,
            b1: self.read_array(OP, "b1", &filter.b1, &row)?,
            w2: self.read_array(OP, "w2", &filter.w2, &matrix)?,
            b2: self.read_array(OP, "b2", &filter.b2, &row)?,
            activation: filter.activation,
            threshold: filter.threshold,
        };
        let residual = residual.map(|residual| self.read(OP, "residual", residual)).transpose()?;
        let result = self.empty(&source.shape, self.dtype())?;
        let bytes = workspace_bytes(self.device(), FrequencyShape { batch, grid, channels, groups })?;
        let workspace = (bytes > 0).then(|| self.empty(&[bytes.div_ceil(4)], DType::F32)).transpose()?;
        let arguments = FrequencyPointers {
            x: source,
            residual,
            layout: Layout::Tokens,
            grid,
            groups,
            filter: pointers,
            out: result.tokens(OP, "out")?,
            workspace: workspace.as_ref().map_or(0, CudaTensor::pointer),
            workspace_bytes: bytes,
        };
        // SAFETY: see above the block.
        unsafe { frequency_raw(self.device(), self.stream(), self.dtype(), &arguments) }?;
        Ok(result)
    }
}
