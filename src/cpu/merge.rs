//! Applying a token plan, with the LayerNorm that follows while the row is in the cache.

use super::{
    Context, Plan, Tensor,
    check::{addressable, expect_shape, tokens_shape},
    norm::{self, Normalise},
    pack::Shared,
    simd::{Kernel, Simd},
};
use crate::{
    Error, Result,
    backend::{Merged, Norm, Pooling},
};

/// Rows of one task.
const TASK_ROWS: usize = 32;

/// [`Backend::merge`](crate::backend::Backend::merge).
pub(super) fn merge(
    context: &Context,
    x: &Tensor,
    sizes: Option<&Tensor>,
    plan: &Plan,
    pooling: Pooling,
    norm: Option<&Norm<Tensor>>,
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
    norm.map_or(Ok(()), |norm| norm::check(norm, width))?;
    let m = plan.tokens_out();
    let len = addressable("merge", [batch, m, width])?;
    let mut tokens = context.pool.take(len);
    let mut out_sizes = context.pool.take(batch * m);
    let mut normed = norm.map(|_| context.pool.take(len));
    let (x, sizes) = (x.view(), sizes.map(Tensor::view));
    let weights = norm.map(|norm| (norm.weight.view(), norm.bias.as_ref().map(Tensor::view), norm.eps));
    let rows = batch * m;
    let shared = Shared::of(tokens.make_mut());
    let shared_sizes = Shared::of(out_sizes.make_mut());
    let shared_normed = normed.as_mut().map(|normed| Shared::of(normed.make_mut()));
    context.threads.run(rows.div_ceil(TASK_ROWS), |_, task| {
        for row in task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS) {
            let (image, token) = (row / m, row % m);
            // SAFETY: each row is one task's.
            let (out, out_size) = unsafe { (shared.part(row * width, width), shared_sizes.part(row, 1)) };
            let (members, weights_of) = plan.group(image, token);
            let rows = &x[image * n * width..(image + 1) * n * width];
            pool_group(context, rows, members, weights_of, pooling, out);
            let size = |&token: &i32| sizes.as_ref().map_or(1.0, |sizes| sizes[image * n + token as usize]);
            out_size[0] = members.iter().map(size).sum();
            if let (Some(normed), Some((weight, bias, eps))) = (&shared_normed, &weights) {
                // SAFETY: as above.
                let normed = unsafe { normed.part(row * width, width) };
                let bias = bias.as_deref();
                context.kernels.run(Normalise { row: out, weight, bias, eps: *eps, out: normed });
            }
        }
    });
    Ok(Merged {
        tokens: Tensor::pooled([batch, m, width], tokens),
        sizes: Tensor::pooled([batch, m], out_sizes),
        normed: normed.map(|normed| Tensor::pooled([batch, m, width], normed)),
    })
}

/// [`Backend::unmerge`](crate::backend::Backend::unmerge).
pub(super) fn unmerge(context: &Context, x: &Tensor, plan: &Plan) -> Result<Tensor> {
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
    let mut out = context.pool.take(addressable("unmerge", [batch, n, width])?);
    let (x, shared) = (x.view(), Shared::of(out.make_mut()));
    context.threads.run(batch, |_, image| {
        // SAFETY: each image is one task's.
        let out = unsafe { shared.part(image * n * width, n * width) };
        // Nothing comes back for dropped tokens.
        out.fill(0.0);
        for (group, row) in x[image * m * width..(image + 1) * m * width].chunks_exact(width).enumerate() {
            for &member in plan.group(image, group).0 {
                out[member as usize * width..][..width].copy_from_slice(row);
            }
        }
    });
    Ok(Tensor::pooled([batch, n, width], out))
}

/// The weighted sums of tokens, (B, N, C) → (B, M, C), nothing else.
pub(super) fn pool_tokens(context: &Context, x: &Tensor, plan: &Plan) -> Result<Tensor> {
    merge(context, x, None, plan, Pooling::Weighted, None).map(|merged| merged.tokens)
}

/// One output row: the members' weighted sum or elementwise maximum. A lone member of weight 1 is copied bit for bit.
fn pool_group(
    context: &Context,
    rows: &[f32],
    members: &[i32],
    weights: &[f32],
    pooling: Pooling,
    out: &mut [f32],
) {
    let width = out.len();
    let row = |member: i32| &rows[member as usize * width..][..width];
    match (members, pooling) {
        ([], _) => out.fill(0.0),
        (&[first, ref rest @ ..], Pooling::Max) => {
            out.copy_from_slice(row(first));
            for &member in rest {
                out.iter_mut().zip(row(member)).for_each(|(y, &x)| *y = y.max(x));
            }
        }
        (&[only], Pooling::Weighted) if weights[0] == 1.0 => out.copy_from_slice(row(only)),
        (_, Pooling::Weighted) => context.kernels.run(WeightedSum { rows, members, weights, out }),
    }
}

/// `out = Σ weight·row` over the members, in order.
struct WeightedSum<'a> {
    rows: &'a [f32],
    members: &'a [i32],
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for WeightedSum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, members, weights, out } = self;
        let width = out.len();
        let row = |member: i32| &rows[member as usize * width..][..width];
        let whole = width / S::LANES * S::LANES;
        // Four vectors at a time: enough sums in flight, few enough for the registers.
        let step = 4 * S::LANES;
        let mut at = 0;
        while at + step <= whole {
            let mut sums = [s.splat(0.0); 4];
            for (&member, &weight) in members.iter().zip(weights) {
                let row = &row(member)[at..at + step];
                for (sum, x) in sums.iter_mut().zip(row.chunks_exact(S::LANES)) {
                    *sum = s.fma(s.splat(weight), s.load(x), *sum);
                }
            }
            for (sum, out) in sums.into_iter().zip(out[at..at + step].chunks_exact_mut(S::LANES)) {
                s.store(out, sum);
            }
            at += step;
        }
        while at < width {
            let step = S::LANES.min(width - at);
            let mut sum = s.splat(0.0);
            for (&member, &weight) in members.iter().zip(weights) {
                sum = s.fma(s.splat(weight), s.load_some(&row(member)[at..at + step], 0.0), sum);
            }
            s.store_some(&mut out[at..at + step], sum);
            at += step;
        }
    }
}
