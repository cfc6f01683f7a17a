//! LayerNorm.

use rayon::prelude::*;

use super::{arithmetic::normalise, expect_shape, tokens_shape};
use crate::{Error, HostTensor, Result, Tensor, backend::Norm};

fn check(norm: &Norm<impl HostTensor>, width: usize) -> Result<()> {
    if width == 0 {
        return Err(Error::argument("layer_norm", "rows of no values have no mean"));
    }
    expect_shape("layer_norm", "weight", &norm.weight, &[width])?;
    norm.bias.as_ref().map_or(Ok(()), |bias| expect_shape("layer_norm", "bias", bias, &[width]))
}

/// [`Backend::layer_norm`](crate::backend::Backend::layer_norm).
///
/// # Errors
/// When shapes do not fit.
pub fn layer_norm<N: HostTensor>(x: &impl HostTensor, norm: &Norm<N>) -> Result<Tensor> {
    let width = x.width();
    check(norm, width)?;
    if width == 0 {
        return Err(Error::argument("layer_norm", "rows of no values have no mean"));
    }
    let mut out = Tensor::zeros(x.shape());
    let bias = norm.bias.as_ref().map(N::data);
    let rows = out.data_mut().par_chunks_mut(width).zip(x.data().par_chunks(width));
    rows.for_each(|(out, row)| normalise(row, norm.weight.data(), bias, norm.eps, out));
    Ok(out)
}

pub(super) fn head_norm(
    mut packed: Tensor,
    part: usize,
    heads: usize,
    norm: &Norm<Tensor>,
) -> Result<Tensor> {
    let [_, _, width] = tokens_shape("head_norm", "packed heads", &packed)?;
    let head_dim = norm.weight.width();
    check(norm, head_dim)?;
    let part_width = heads.saturating_mul(head_dim);
    if part_width == 0 || width % part_width != 0 || part >= width / part_width {
        return Err(Error::argument(
            "head_norm",
            format!("rows of {width} values have no part {part} of {heads} heads of {head_dim}"),
        ));
    }
    let bias = norm.bias.as_ref().map(Tensor::data);
    packed.data_mut().par_chunks_mut(width).for_each_init(
        || vec![0.0; head_dim],
        |scratch, row| {
            for head in row[part * part_width..(part + 1) * part_width].chunks_mut(head_dim) {
                normalise(head, norm.weight.data(), bias, norm.eps, scratch);
                head.copy_from_slice(scratch);
            }
        },
    );
    Ok(packed)
}
