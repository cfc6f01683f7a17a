//! Attention with scores, and MCTF's attention over a reduced set of tokens.

use rayon::prelude::*;

use super::{
    arithmetic::{add, add_scaled, softmax},
    expect_shape,
    gemm::{Matrix, Threads, gemm},
    tokens_shape,
};
use crate::{
    Error, HostTensor, Result, Tensor, TokenPlan,
    backend::{Heads, Pooling, ScoreRequest, Scores},
};

/// Query rows whose scores are held at a time: the map of a long sequence never exists as a whole.
const QUERY_ROWS: usize = 256;

/// Checked extents of packed heads.
struct Extents {
    batch: usize,
    tokens: usize,
    /// Values from one token to the next.
    stride: usize,
    /// Width of one part: H·D.
    width: usize,
}

fn extents(op: &'static str, heads: &Heads<'_, impl HostTensor>, parts: usize) -> Result<Extents> {
    let [batch, tokens, stride] = tokens_shape(op, "packed heads", heads.packed)?;
    let width = heads.heads.saturating_mul(heads.head_dim);
    if width == 0 || Some(stride) != width.checked_mul(parts) {
        return Err(Error::argument(
            op,
            format!(
                "packed rows of {stride} values are not {parts} parts of {} heads of {}",
                heads.heads, heads.head_dim
            ),
        ));
    }
    if let Some(sizes) = heads.sizes {
        expect_shape(op, "sizes", sizes, &[batch, tokens])?;
    }
    Ok(Extents { batch, tokens, stride, width })
}

/// The rows of one head's attention map, block by block: calls `visit` with the first query of a block and its softmax
/// rows, (queries, N).
fn map_rows(
    heads: &Heads<'_, impl HostTensor>,
    extents: &Extents,
    image: usize,
    head: usize,
    scratch: &mut Vec<f32>,
    mut visit: impl FnMut(usize, &[f32]),
) {
    let n = extents.tokens;
    let packed = heads.packed.item(image);
    let keys =
        Matrix::rows(&packed[extents.width + head * heads.head_dim..], n, heads.head_dim, extents.stride);
    let bias: Option<Vec<f32>> =
        heads.sizes.map(|sizes| sizes.data()[image * n..(image + 1) * n].iter().map(|s| s.ln()).collect());
    for first in (0..n).step_by(QUERY_ROWS) {
        let rows = QUERY_ROWS.min(n - first);
        let from = first * extents.stride + head * heads.head_dim;
        let queries = Matrix::rows(&packed[from..], rows, heads.head_dim, extents.stride);
        scratch.resize(rows * n, 0.0);
        gemm(scratch, n, false, heads.scale, queries, keys.transposed(), Threads::One);
        for row in scratch.chunks_mut(n) {
            if let Some(bias) = &bias {
                add(row, bias);
            }
            softmax(row);
        }
        visit(first, scratch);
    }
}

/// Per-head scores gathered while the rows of a map pass by.
struct Gather<'a> {
    class: Option<&'a mut [f32]>,
    received: Option<&'a mut [f32]>,
}

impl Gather<'_> {
    fn visit(&mut self, first: usize, rows: &[f32], n: usize) {
        if let (0, Some(class)) = (first, &mut self.class) {
            class.copy_from_slice(&rows[..n]);
        }
        if let Some(received) = &mut self.received {
            rows.chunks(n).for_each(|row| add(received, row));
        }
    }

    fn finish(self, n: usize) {
        if let Some(received) = self.received {
            received.iter_mut().for_each(|x| *x /= n as f32);
        }
    }
}

/// Room for the scores asked for, and an iterator of the part that belongs to each (image, head).
fn room(request: bool, shape: [usize; 3]) -> Option<Tensor> {
    request.then(|| Tensor::zeros(&shape))
}

fn per_head(scores: &mut Option<Tensor>, count: usize) -> Vec<Option<&mut [f32]>> {
    match scores {
        Some(t) => {
            let n = t.width();
            t.data_mut().chunks_mut(n).map(Some).collect()
        }
        None => (0..count).map(|_| None).collect(),
    }
}

/// `contexts` (B, H, N, D) to (B, N, H·D).
fn join_heads(contexts: &[f32], batch: usize, heads: usize, n: usize, d: usize) -> Tensor {
    let mut out = Tensor::zeros(&[batch, n, heads * d]);
    out.data_mut().par_chunks_mut(heads * d).enumerate().for_each(|(row, out)| {
        let (image, token) = (row / n, row % n);
        for (head, out) in out.chunks_mut(d).enumerate() {
            out.copy_from_slice(&contexts[((image * heads + head) * n + token) * d..][..d]);
        }
    });
    out
}

/// [`Backend::attention`](crate::backend::Backend::attention) of packed queries, keys and values (B, N, 3C).
///
/// # Errors
/// When shapes do not fit.
pub fn attention(
    qkv: &Heads<'_, impl HostTensor>,
    request: ScoreRequest,
) -> Result<(Tensor, Scores<Tensor>)> {
    let e = extents("attention", qkv, 3)?;
    let (n, d) = (e.tokens, qkv.head_dim);
    let shape = [e.batch, qkv.heads, n];
    let (mut class, mut received) = (room(request.class, shape), room(request.received, shape));
    let count = e.batch * qkv.heads;
    let mut contexts = vec![0.0; count * n * d];
    let outputs = per_head(&mut class, count).into_par_iter().zip(per_head(&mut received, count));
    contexts.par_chunks_mut(n * d).zip(outputs).enumerate().for_each_init(
        Vec::new,
        |scratch, (index, (context, (class, received)))| {
            let (image, head) = (index / qkv.heads, index % qkv.heads);
            let values = &qkv.packed.item(image)[2 * e.width + head * d..];
            let values = Matrix::rows(values, n, d, e.stride);
            let mut gather = Gather { class, received };
            map_rows(qkv, &e, image, head, scratch, |first, rows| {
                let count = rows.len() / n;
                let out = &mut context[first * d..(first + count) * d];
                gemm(out, d, false, 1.0, Matrix::rows(rows, count, n, n), values, Threads::One);
                gather.visit(first, rows, n);
            });
            gather.finish(n);
        },
    );
    Ok((join_heads(&contexts, e.batch, qkv.heads, n, d), Scores { class, received }))
}

/// [`Backend::attention_scores`](crate::backend::Backend::attention_scores) of packed queries and keys (B, N, 2C).
///
/// # Errors
/// When shapes do not fit.
pub fn attention_scores(qk: &Heads<'_, impl HostTensor>, request: ScoreRequest) -> Result<Scores<Tensor>> {
    let e = extents("attention_scores", qk, 2)?;
    let n = e.tokens;
    let shape = [e.batch, qk.heads, n];
    let (mut class, mut received) = (room(request.class, shape), room(request.received, shape));
    let count = e.batch * qk.heads;
    let outputs = per_head(&mut class, count).into_par_iter().zip(per_head(&mut received, count));
    outputs.enumerate().for_each_init(Vec::new, |scratch, (index, (class, received))| {
        let mut gather = Gather { class, received };
        map_rows(qk, &e, index / qk.heads, index % qk.heads, scratch, |first, rows| {
            gather.visit(first, rows, n);
        });
        gather.finish(n);
    });
    Ok(Scores { class, received })
}

/// Rows of an attention map, (rows, N), with the columns of each group summed: (rows, M). `group` is each token's
/// output token, -1 for dropped ones.
fn sum_columns(rows: &[f32], group: &[i32], groups: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() / group.len() * groups];
    for (out, row) in out.chunks_mut(groups).zip(rows.chunks(group.len())) {
        for (&p, &group) in row.iter().zip(group) {
            if let Ok(group) = usize::try_from(group) {
                out[group] += p;
            }
        }
    }
    out
}

/// `rows` (N, width) pooled over the groups of image `image`, (M, width).
fn pool_rows(rows: &[f32], width: usize, plan: &TokenPlan, image: usize, pooling: Pooling) -> Vec<f32> {
    let mut out = vec![0.0; plan.tokens_out() * width];
    for (token, out) in out.chunks_mut(width).enumerate() {
        let (members, weights) = plan.group(image, token);
        pool_group(rows, width, members, weights, pooling, out);
    }
    out
}

/// One output row: the members' weighted sum or elementwise maximum. A lone member of weight 1 is copied bit for bit.
pub(super) fn pool_group(
    rows: &[f32],
    width: usize,
    members: &[i32],
    weights: &[f32],
    pooling: Pooling,
    out: &mut [f32],
) {
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
        (_, Pooling::Weighted) => {
            out.fill(0.0);
            for (&member, &weight) in members.iter().zip(weights) {
                add_scaled(out, weight, row(member));
            }
        }
    }
}

/// An attention map (H, N, N) of image `image` folded over a plan, (H, M, M): columns of a group summed, then rows
/// pooled (MCTF, section 3.3). The forward pass never forms this; it is the definition that
/// [`crate::backend::Backend::attention_reduced`] is equivalent to.
///
/// # Errors
/// When `map` is not a whole number of N×N maps, or the plan leaves no token.
pub fn fold_map(map: &[f32], plan: &TokenPlan, image: usize, pooling: Pooling) -> Result<Vec<f32>> {
    let (n, m) = (plan.tokens_in(), plan.tokens_out());
    if map.is_empty() || m == 0 || !map.len().is_multiple_of(n * n) || image >= plan.batch() {
        return Err(Error::argument("fold_map", format!("{} values are not maps of {n} x {n}", map.len())));
    }
    let group = plan.group_of(image);
    let heads = map.chunks(n * n).map(|map| pool_rows(&sum_columns(map, &group, m), m, plan, image, pooling));
    Ok(heads.flatten().collect())
}

/// [`Backend::attention_reduced`](crate::backend::Backend::attention_reduced) of packed queries and keys (B, N, 2C) and the
/// reduced tokens' values (B, M, C).
///
/// # Errors
/// When shapes do not fit, or the plan leaves no token.
pub fn attention_reduced(
    qk: &Heads<'_, impl HostTensor>,
    values: &impl HostTensor,
    plan: &TokenPlan,
    pooling: Pooling,
) -> Result<Tensor> {
    let e = extents("attention_reduced", qk, 2)?;
    let (n, m, d) = (e.tokens, plan.tokens_out(), qk.head_dim);
    if m == 0 {
        return Err(Error::argument("attention_reduced", "the plan leaves no token to attend to"));
    }
    expect_shape("attention_reduced", "values", values, &[e.batch, m, e.width])?;
    if (plan.batch(), plan.tokens_in()) != (e.batch, n) {
        return Err(Error::argument(
            "attention_reduced",
            format!(
                "the plan takes {} images of {} tokens, not {} of {n}",
                plan.batch(),
                plan.tokens_in(),
                e.batch
            ),
        ));
    }
    let mut contexts = vec![0.0; e.batch * qk.heads * m * d];
    contexts.par_chunks_mut(m * d).enumerate().for_each_init(Vec::new, |scratch, (index, context)| {
        let (image, head) = (index / qk.heads, index % qk.heads);
        let group = plan.group_of(image);
        let values = Matrix::rows(&values.item(image)[head * d..], m, d, e.width);
        match pooling {
            // Rows are pooled linearly, so the product can come first and the M×M map is never needed.
            Pooling::Weighted => {
                let mut product = vec![0.0; n * d];
                map_rows(qk, &e, image, head, scratch, |first, rows| {
                    let count = rows.len() / n;
                    let summed = sum_columns(rows, &group, m);
                    let out = &mut product[first * d..(first + count) * d];
                    gemm(out, d, false, 1.0, Matrix::rows(&summed, count, m, m), values, Threads::One);
                });
                context.copy_from_slice(&pool_rows(&product, d, plan, image, pooling));
            }
            Pooling::Max => {
                let mut summed = Vec::with_capacity(n * m);
                map_rows(qk, &e, image, head, scratch, |_, rows| summed.extend(sum_columns(rows, &group, m)));
                let folded = pool_rows(&summed, m, plan, image, pooling);
                gemm(context, d, false, 1.0, Matrix::rows(&folded, m, m, m), values, Threads::One);
            }
        }
    });
    Ok(join_heads(&contexts, e.batch, qk.heads, m, d))
}
