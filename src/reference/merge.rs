//! Applying a token plan, and undoing it.

use rayon::prelude::*;

use super::{attention::pool_group, expect_shape, norm::layer_norm, tokens_shape};
use crate::{
    Error, HostTensor, Result, Tensor, TokenPlan,
    backend::{Merged, Norm, Pooling},
};

/// [`Backend::merge`](crate::backend::Backend::merge).
///
/// # Errors
/// When shapes do not fit each other or the plan.
pub fn merge<T: HostTensor>(
    x: &T,
    sizes: Option<&T>,
    plan: &TokenPlan,
    pooling: Pooling,
    norm: Option<&Norm<T>>,
) -> Result<Merged<Tensor>> {
    let [batch, n, width] = tokens_shape("merge", "x", x)?;
    if let Some(sizes) = sizes {
        expect_shape("merge", "sizes", sizes, &[batch, n])?;
    }
    if (plan.batch(), plan.tokens_in()) != (batch, n) {
        return Err(Error::argument(
            "merge",
            format!(
                "the plan takes {} images of {} tokens, not {batch} of {n}",
                plan.batch(),
                plan.tokens_in()
            ),
        ));
    }
    let m = plan.tokens_out();
    let mut tokens = Tensor::zeros(&[batch, m, width]);
    let mut out_sizes = Tensor::zeros(&[batch, m]);
    tokens.data_mut().par_chunks_mut(width).zip(out_sizes.data_mut()).enumerate().for_each(
        |(row, (out, out_size))| {
            let image = row / m;
            let (members, weights) = plan.group(image, row % m);
            pool_group(x.item(image), width, members, weights, pooling, out);
            let size = |&token: &i32| sizes.map_or(1.0, |sizes| sizes.item(image)[token as usize]);
            *out_size = members.iter().map(size).sum();
        },
    );
    let normed = norm.map(|norm| layer_norm(&tokens, norm)).transpose()?;
    Ok(Merged { tokens, sizes: out_sizes, normed })
}

/// [`Backend::unmerge`](crate::backend::Backend::unmerge).
///
/// # Errors
/// When the shape does not fit the plan.
pub fn unmerge(x: &impl HostTensor, plan: &TokenPlan) -> Result<Tensor> {
    let [batch, m, width] = tokens_shape("unmerge", "x", x)?;
    if (plan.batch(), plan.tokens_out()) != (batch, m) {
        return Err(Error::argument(
            "unmerge",
            format!(
                "the plan gives {} images of {} tokens, not {batch} of {m}",
                plan.batch(),
                plan.tokens_out()
            ),
        ));
    }
    let n = plan.tokens_in();
    let mut out = Tensor::zeros(&[batch, n, width]);
    out.data_mut().par_chunks_mut(n * width).enumerate().for_each(|(image, out)| {
        for (out, group) in out.chunks_mut(width).zip(plan.group_of(image)) {
            if let Ok(group) = usize::try_from(group) {
                out.copy_from_slice(&x.item(image)[group * width..(group + 1) * width]);
            }
        }
    });
    Ok(out)
}
