//! 3x3 convolutions of feature maps: dense, and each channel by itself.

use rayon::prelude::*;

use super::{
    arithmetic::{activate, add_product, add_scaled},
    expect_shape,
};
use crate::{
    Error, Result, Tensor,
    backend::{Convolution, Depthwise},
    model::Activation,
};

/// A feature map and the grid it becomes.
struct Shape {
    batch: usize,
    grid: [usize; 2],
    channels: usize,
    stride: usize,
    out: [usize; 2],
}

impl Shape {
    fn new(
        op: &'static str,
        x: &Tensor,
        grid: [usize; 2],
        stride: usize,
        activations: [Option<Activation>; 2],
    ) -> Result<Self> {
        let &[batch, positions, channels] = x.shape() else {
            return Err(Error::argument(
                op,
                format!("x has shape {:?}, expected (images, positions, channels)", x.shape()),
            ));
        };
        if positions == 0 || batch == 0 || channels == 0 || Some(positions) != grid[0].checked_mul(grid[1]) {
            return Err(Error::argument(
                op,
                format!("x has shape {:?}, which is no feature map of {}x{}", x.shape(), grid[0], grid[1]),
            ));
        }
        if !matches!(stride, 1 | 2) {
            return Err(Error::argument(op, format!("stride {stride}; 1 and 2 are supported")));
        }
        if activations.contains(&Some(Activation::SwiGlu)) {
            return Err(Error::argument(op, "swiglu halves the channels; a convolution keeps them"));
        }
        Ok(Self { batch, grid, channels, stride, out: grid.map(|side| side.div_ceil(stride)) })
    }

    /// The taps of output position `at` that lie within the map: their number, row-major, and the input's position.
    fn taps(&self, at: usize) -> impl Iterator<Item = (usize, usize)> {
        let (row, column) = (at / self.out[1] * self.stride, at % self.out[1] * self.stride);
        let [height, width] = self.grid;
        (0..9).filter_map(move |tap| {
            let y = (row + tap / 3).checked_sub(1).filter(|&y| y < height)?;
            let x = (column + tap % 3).checked_sub(1).filter(|&x| x < width)?;
            Some((tap, y * width + x))
        })
    }
}

pub(super) fn convolution(x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
    const OP: &str = "convolution";
    let shape = Shape::new(OP, x, grid, layer.stride, [layer.activation, None])?;
    let (inputs, outputs) = (shape.channels, layer.weight.width());
    expect_shape(OP, "weight", &layer.weight, &[9 * inputs, outputs])?;
    expect_shape(OP, "bias", &layer.bias, &[outputs])?;
    if outputs == 0 {
        return Err(Error::argument(OP, "the layer has no outputs"));
    }
    let positions = shape.out[0] * shape.out[1];
    let mut out = Tensor::zeros(&[shape.batch, positions, outputs]);
    out.data_mut().par_chunks_mut(outputs).enumerate().for_each(|(row, out)| {
        out.copy_from_slice(layer.bias.data());
        let image = x.item(row / positions);
        for (tap, from) in shape.taps(row % positions) {
            for (input, &value) in image[from * inputs..(from + 1) * inputs].iter().enumerate() {
                let weight = &layer.weight.data()[(tap * inputs + input) * outputs..][..outputs];
                add_scaled(out, value, weight);
            }
        }
        if let Some(activation) = layer.activation {
            activate(activation, out);
        }
    });
    Ok(out)
}

pub(super) fn depthwise(x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
    const OP: &str = "depthwise";
    let shape = Shape::new(OP, x, grid, layer.stride, [layer.before, layer.activation])?;
    let channels = shape.channels;
    expect_shape(OP, "weight", &layer.weight, &[9, channels])?;
    expect_shape(OP, "bias", &layer.bias, &[channels])?;
    let activated = layer.before.map(|activation| activate_all(x.clone(), activation)).transpose()?;
    let x = activated.as_ref().unwrap_or(x);
    let positions = shape.out[0] * shape.out[1];
    let mut out = Tensor::zeros(&[shape.batch, positions, channels]);
    out.data_mut().par_chunks_mut(channels).enumerate().for_each(|(row, out)| {
        out.copy_from_slice(layer.bias.data());
        let image = x.item(row / positions);
        for (tap, from) in shape.taps(row % positions) {
            let weight = &layer.weight.data()[tap * channels..(tap + 1) * channels];
            add_product(out, weight, &image[from * channels..(from + 1) * channels]);
        }
        if let Some(activation) = layer.activation {
            activate(activation, out);
        }
    });
    Ok(out)
}

pub(super) fn activate_all(mut x: Tensor, activation: Activation) -> Result<Tensor> {
    if activation == Activation::SwiGlu {
        return Err(Error::argument("activate", "swiglu halves the channels; it is an epilogue of `linear`"));
    }
    let width = x.width().max(1);
    x.data_mut().par_chunks_mut(width).for_each(|row| activate(activation, row));
    Ok(x)
}
