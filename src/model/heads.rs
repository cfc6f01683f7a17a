//! Heads filled up with zeros to a width that a backend has kernels for.

use super::{VitConfig, VitParams};
use crate::{Result, Tensor, backend::Linear};

/// The parameters with heads of `head_dim` values, and how many they have then. Zeros behind a head's queries and keys change no
/// product, those behind its values meet zeros in the projection, so the results stay as they are; the scale is the model's own.
///
/// Norms of heads, or of all of them together, take means over a head's values, zeros included: such models keep their heads.
pub(super) fn padded(
    mut params: VitParams<Tensor>,
    config: &VitConfig,
    head_dim: usize,
) -> Result<(VitParams<Tensor>, usize)> {
    let own = config.head_dim();
    let normed = params
        .blocks
        .iter()
        .any(|block| [&block.q_norm, &block.k_norm, &block.attn_norm].into_iter().any(Option::is_some));
    if head_dim <= own || normed || params.attn_pool.is_some() {
        return Ok((params, own));
    }
    for block in &mut params.blocks {
        block.qkv = rows(&block.qkv, own, head_dim)?;
        block.proj.weight = spread(&block.proj.weight, own, head_dim)?;
    }
    Ok((params, head_dim))
}

/// A layer with rows of zeros behind every `from` outputs, up to `to`.
pub(super) fn rows(layer: &Linear<Tensor>, from: usize, to: usize) -> Result<Linear<Tensor>> {
    let columns = layer.weight.width();
    let grown = |tensor: &Tensor, width: usize, shape: &[usize]| {
        let heads = tensor.data().chunks(from * width);
        let filled = heads.flat_map(|head| head.iter().copied().chain(vec![0.0; (to - from) * width]));
        Tensor::new(shape, filled.collect())
    };
    let outputs = layer.weight.dim(0) / from * to;
    let bias = layer.bias.as_ref().map(|bias| grown(bias, 1, &[outputs])).transpose()?;
    Ok(Linear { weight: grown(&layer.weight, columns, &[outputs, columns])?, bias })
}

/// A weight with columns of zeros behind every `from` inputs, up to `to`.
pub(super) fn spread(weight: &Tensor, from: usize, to: usize) -> Result<Tensor> {
    let heads = weight.data().chunks(from);
    let filled = heads.flat_map(|head| head.iter().copied().chain(vec![0.0; to - from]));
    Tensor::new(&[weight.dim(0), weight.width() / from * to], filled.collect())
}
