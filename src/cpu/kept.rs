//! Attention of reduced tokens by a map that was kept (MCTF's look-ahead): its rows pooled, times the groups' values.

use std::ops::Range;

use super::{
    Context, Plan, Tensor, amx,
    attention::{BLOCKS, Extents, TASKS, TILE_ROWS, Values, pack_values, spread},
    check::{addressable, expect_shape},
    gemm::{Blocks, Finish, Out, Product, Rows, block_values, cut},
    pack::{Panels, Shared, panel_values},
    pool::LINE,
    simd::{Kernel, Simd},
};
use crate::{Result, backend::Heads};

const OP: &str = "attention_reduced";

/// [`Backend::attention_reduced_of`](crate::backend::Backend::attention_reduced_of) with weighted pooling: rows of the kept map are
/// pooled as tokens are, then multiplied by the groups' values.
pub(super) fn attention_of_map(
    context: &Context,
    map: &Tensor,
    qk: &Heads<'_, Tensor>,
    values: &Tensor,
    plan: &Plan,
) -> Result<Tensor> {
    let e = Extents::reduced(qk, values, plan)?;
    let (n, row, m) = (e.tokens, e.row(), plan.tokens_out());
    expect_shape(OP, "map", map, &[e.batch, e.heads, n, row])?;
    let Context { kernels, threads, pool, .. } = context;
    let shape = [e.batch, m, e.width];
    let mut out = pool.take(addressable(OP, shape)?);
    let (map, values) = (map.view(), values.view());
    let most = kernels.tile_rows() * BLOCKS;
    let count = e.batch * e.heads;
    // Rows are independent of each other, so these may depend on the number of threads.
    let runs = (TASKS * threads.count()).div_ceil(count.max(1)).min(m.div_ceil(most));
    let (value_values, block, more) = if context.amx.is_some() {
        let spread_values = (n * e.head_dim).next_multiple_of(LINE);
        (spread_values, m.div_ceil(runs) * row, amx::times_values(n, e.head_dim))
    } else {
        (panel_values(n, e.head_dim), block_values(TILE_ROWS, n), 0)
    };
    let each = value_values + block + more;
    let mut scratch = pool.take(threads.count() * each);
    let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out.make_mut()));
    threads.run(count * runs, |thread, task| {
        let (index, run) = (task / runs, task % runs);
        let (image, head) = (index / e.heads, index % e.heads);
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * each, each) };
        let (of_groups, rest) = scratch.split_at_mut(value_values);
        let (pooled, rest) = rest.split_at_mut(block);
        let rows = &map[index * n * row..(index + 1) * n * row];
        let (start, end) = (m * run / runs, m * (run + 1) / runs);
        // SAFETY: each task has rows of a head of its own.
        let out = |first: usize| unsafe {
            Out::part(&shared, (image * m + first) * e.width + head * e.head_dim, e.width)
        };
        if let Some(amx) = context.amx {
            let columns = head * e.head_dim..(head + 1) * e.head_dim;
            spread(&values, plan, image, columns, e.width, of_groups, e.head_dim);
            kernels.run(PoolRows { rows, row, tokens: start..end, plan, image, blocks: false, to: pooled });
            let a = Rows { data: pooled, count: end - start, stride: row };
            amx::times(amx, a, n, (of_groups, e.head_dim), e.head_dim, out(start), rest);
            return;
        }
        pack_values(e, &[], image, head, &Values::Groups(&values, plan), of_groups);
        let tiles = (end - start).div_ceil(most);
        for tile in 0..tiles {
            let first = start + (end - start) * tile / tiles;
            let last = start + (end - start) * (tile + 1) / tiles;
            kernels.run(PoolRows { rows, row, tokens: first..last, plan, image, blocks: true, to: pooled });
            let a = Blocks { data: pooled, count: last - first, depth: n };
            let b = Panels { data: of_groups, depth: n, columns: e.head_dim };
            let finish = Finish::default();
            kernels.run(Product { a, b, columns: 0..e.head_dim, out: out(first), finish });
        }
    });
    Ok(Tensor::pooled(shape, out))
}

/// Weighted sums of a map's rows, one for each of some reduced tokens.
struct PoolRows<'a> {
    /// (N, row).
    rows: &'a [f32],
    row: usize,
    tokens: Range<usize>,
    plan: &'a Plan,
    image: usize,
    /// As [`Blocks`], else rows as long as the map's.
    blocks: bool,
    to: &'a mut [f32],
}

impl Kernel for PoolRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, row, tokens, plan, image, blocks, to } = self;
        let n = plan.tokens_in();
        let (used, padded) = (n.next_multiple_of(S::LANES), n.next_multiple_of(LINE));
        for block in cut::<S>(tokens.len()) {
            for (i, token) in block.clone().enumerate() {
                let (members, weights) = plan.group(image, tokens.start + token);
                let place = |at: usize| {
                    if blocks {
                        block.start * padded + (at / LINE * block.len() + i) * LINE + at % LINE
                    } else {
                        token * row + at
                    }
                };
                for at in (0..used).step_by(S::LANES) {
                    let mut sum = s.splat(0.0);
                    for (&member, &weight) in members.iter().zip(weights) {
                        let from = &rows[member as usize * row + at..];
                        sum = s.fma(s.load(from), s.splat(weight), sum);
                    }
                    s.store(&mut to[place(at)..], sum);
                }
            }
        }
    }
}
