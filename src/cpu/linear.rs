//! Affine layers.

use super::{
    Context, Tensor,
    activation::Gate,
    check::{addressable, expect_shape},
    gemm::{Finish, Rows},
    norm,
    pack::{Form, Packed, Shared},
    schedule::{Input, RowNorm, product},
};
use crate::{
    Error, Result,
    backend::{Epilogue, LinearRows, Norm},
    model::Activation,
};

/// The packed form of an affine layer's weight (outputs, inputs).
pub(super) fn packed<'a>(
    context: &Context,
    weight: &'a Tensor,
    extents: [usize; 2],
    passing: &'a mut Option<Packed>,
) -> &'a Packed {
    let Context { kernels, threads, amx, .. } = context;
    match *amx {
        None => weight.packed(Form::Transposed, passing, |w| Packed::new(w, extents, *kernels, threads)),
        Some(amx) => weight.packed(Form::TransposedBf16, passing, |w| Packed::bf16(w, extents, amx, threads)),
    }
}

/// [`Backend::linear`](crate::backend::Backend::linear).
pub(super) fn linear(
    context: &Context,
    x: &Tensor,
    layer: &LinearRows<'_, Tensor>,
    epilogue: Epilogue<Tensor>,
) -> Result<Tensor> {
    linear_of(context, x, None, layer, epilogue)
}

/// [`Backend::norm_linear`](crate::backend::Backend::norm_linear).
pub(super) fn norm_linear(
    context: &Context,
    x: &Tensor,
    norm: &Norm<Tensor>,
    layer: &LinearRows<'_, Tensor>,
) -> Result<Tensor> {
    linear_of(context, x, Some(norm), layer, Epilogue::None)
}

fn linear_of(
    context: &Context,
    x: &Tensor,
    norm: Option<&Norm<Tensor>>,
    layer: &LinearRows<'_, Tensor>,
    epilogue: Epilogue<Tensor>,
) -> Result<Tensor> {
    const OP: &str = "linear";
    let weight = &layer.layer.weight;
    let (outputs, inputs) = (weight.shape().first().copied().unwrap_or(1), x.width());
    expect_shape(OP, "weight", weight, &[outputs, inputs])?;
    if let Some(bias) = &layer.layer.bias {
        expect_shape(OP, "bias", bias, &[outputs])?;
    }
    norm.map_or(Ok(()), |norm| norm::check(norm, inputs))?;
    let range = layer.rows.clone().unwrap_or(0..outputs);
    if range.start >= range.end || range.end > outputs {
        return Err(Error::argument(OP, format!("outputs {range:?} are not among the layer's {outputs}")));
    }
    let (rows, width) = (x.rows(), range.len());
    let shape = x.shape.with_width(width);
    let len = addressable(OP, shape)?;
    let (mut out, add, activation) = match epilogue {
        Epilogue::AddTo(residual) => {
            expect_shape(OP, "residual", &residual, &shape)?;
            (residual.into_buffer(&context.pool), true, None)
        }
        Epilogue::Activation(Activation::SwiGlu) if width % 2 != 0 => {
            let what = format!("{width} outputs cannot be gated: the number is odd");
            return Err(Error::argument(OP, what));
        }
        Epilogue::Activation(activation) => (context.pool.take(len), false, Some(activation)),
        Epilogue::None => (context.pool.take(len), false, None),
    };
    let (input, bias) = (x.view(), layer.layer.bias.as_ref().map(Tensor::view));
    let finish = Finish {
        bias: bias.as_deref(),
        add,
        activation: activation.filter(|&activation| activation != Activation::SwiGlu),
        scales: None,
    };
    let row_norm = norm.map(RowNorm::new);
    let input = Input { rows: Rows { data: &input, count: rows, stride: inputs }, norm: row_norm.as_ref() };
    let mut passing = None;
    let packed = packed(context, weight, [outputs, inputs], &mut passing);
    product(context, input, packed.right(), range, out.make_mut(), finish);
    if activation != Some(Activation::SwiGlu) {
        return Ok(Tensor::pooled(shape, out));
    }
    let half = width / 2;
    let mut gated = context.pool.take(rows * half);
    let shared = Shared::of(gated.make_mut());
    context.threads.run(rows, |_, row| {
        // SAFETY: each task has a row of its own.
        let gated = unsafe { shared.part(row * half, half) };
        context.kernels.run(Gate { row: &out[row * width..(row + 1) * width], out: gated });
    });
    Ok(Tensor::pooled(shape.with_width(half), gated))
}
