//! What a model reads out with: rows side by side, means of two, sizes behind hidden tokens.

use super::{
    Context, Tensor,
    check::{addressable, expect_shape},
};
use crate::{Error, Result};

/// [`Backend::concat`](crate::backend::Backend::concat).
pub(super) fn concat(context: &Context, left: &Tensor, right: &Tensor) -> Result<Tensor> {
    const OP: &str = "concat";
    let (&[batch, c], &[_, k]) = (left.shape(), right.shape()) else {
        let shapes = format!("shapes {:?} and {:?}, expected two axes each", left.shape(), right.shape());
        return Err(Error::argument(OP, shapes));
    };
    expect_shape(OP, "right", right, &[batch, k])?;
    let width = c + k;
    let mut out = context.pool.take(addressable(OP, [batch, width])?);
    let (left, right) = (left.view(), right.view());
    if width > 0 {
        for (image, out) in out.make_mut().chunks_exact_mut(width).enumerate() {
            out[..c].copy_from_slice(&left[image * c..(image + 1) * c]);
            out[c..].copy_from_slice(&right[image * k..(image + 1) * k]);
        }
    }
    Ok(Tensor::pooled([batch, width], out))
}

/// [`Backend::average`](crate::backend::Backend::average).
pub(super) fn average(context: &Context, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    expect_shape("average", "b", b, a.shape())?;
    let shape = a.shape;
    let (a, b) = (a.view(), b.view());
    let mut out = context.pool.take(a.len());
    let means = a.iter().zip(&*b).map(|(a, b)| f32::midpoint(*a, *b));
    out.make_mut().iter_mut().zip(means).for_each(|(out, mean)| *out = mean);
    Ok(Tensor::pooled(shape, out))
}

/// [`Backend::hidden_sizes`](crate::backend::Backend::hidden_sizes).
pub(super) fn hidden_sizes(
    context: &Context,
    sizes: Option<&Tensor>,
    [batch, tokens]: [usize; 2],
    hidden: usize,
) -> Result<Tensor> {
    const OP: &str = "hidden_sizes";
    if let Some(sizes) = sizes {
        expect_shape(OP, "sizes", sizes, &[batch, tokens])?;
    }
    let all = hidden.checked_add(tokens).filter(|&all| crate::tensor::elements(&[batch, all]).is_some());
    let all = all.ok_or_else(|| {
        Error::argument(OP, format!("{batch} x ({hidden} + {tokens}) sizes are too many to address"))
    })?;
    let sizes = sizes.map(Tensor::view);
    let mut out = context.pool.take(batch * all);
    if all > 0 {
        for (image, out) in out.make_mut().chunks_exact_mut(all).enumerate() {
            out[..hidden].fill(0.0);
            match &sizes {
                None => out[hidden..].fill(1.0),
                Some(sizes) => out[hidden..].copy_from_slice(&sizes[image * tokens..(image + 1) * tokens]),
            }
        }
    }
    Ok(Tensor::pooled([batch, all], out))
}
