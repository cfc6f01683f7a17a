//! Affine layers.

use rayon::prelude::*;

use super::{
    arithmetic::{activate, add, gate},
    expect_shape,
    gemm::{Matrix, Threads, gemm},
};
use crate::{
    Error, Result, Tensor,
    backend::{Epilogue, LinearRows},
    model::Activation,
};

pub(super) fn linear(
    x: &Tensor,
    layer: &LinearRows<'_, Tensor>,
    epilogue: Epilogue<Tensor>,
) -> Result<Tensor> {
    let weight = &layer.layer.weight;
    let (outputs, inputs) = (weight.dim(0), x.width());
    expect_shape("linear", "weight", weight, &[outputs, inputs])?;
    if let Some(bias) = &layer.layer.bias {
        expect_shape("linear", "bias", bias, &[outputs])?;
    }
    let range = layer.rows.clone().unwrap_or(0..outputs);
    if range.start >= range.end || range.end > outputs {
        return Err(Error::argument(
            "linear",
            format!("outputs {range:?} are not among the layer's {outputs}"),
        ));
    }
    let (rows, width) = (x.rows(), range.len());
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    let bias = layer.layer.bias.as_ref().map(|bias| &bias.data()[range.clone()]);
    let accumulate = bias.is_some() || matches!(epilogue, Epilogue::AddTo(_));
    let (mut out, activation) = match epilogue {
        Epilogue::AddTo(residual) => {
            expect_shape("linear", "residual", &residual, &shape)?;
            (residual, None)
        }
        Epilogue::Activation(activation) => (Tensor::zeros(&shape), Some(activation)),
        Epilogue::None => (Tensor::zeros(&shape), None),
    };
    // The bias goes in first and the product is accumulated on top of it.
    if let Some(bias) = bias {
        out.data_mut().par_chunks_mut(width).for_each(|row| add(row, bias));
    }
    let a = Matrix::rows(x.data(), rows, inputs, inputs);
    let b = Matrix::rows(&weight.data()[range.start * inputs..range.end * inputs], width, inputs, inputs);
    gemm(out.data_mut(), width, accumulate, 1.0, a, b.transposed(), Threads::Pool);
    match activation {
        None => Ok(out),
        Some(Activation::SwiGlu) => {
            if let Some(last) = shape.last_mut() {
                *last = width / 2;
            }
            if width % 2 != 0 {
                return Err(Error::argument(
                    "linear",
                    format!("{width} outputs cannot be gated: the number is odd"),
                ));
            }
            let mut gated = Tensor::zeros(&shape);
            let pairs = gated.data_mut().par_chunks_mut(width / 2).zip(out.data().par_chunks(width));
            pairs.for_each(|(gated, row)| gate(row, gated));
            Ok(gated)
        }
        Some(activation) => {
            out.data_mut().par_chunks_mut(width).for_each(|row| activate(activation, row));
            Ok(out)
        }
    }
}
