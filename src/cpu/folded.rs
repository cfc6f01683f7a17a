//! Attention whose map is folded over a plan with the maximum of a group's rows, which no product can go before: the folded map
//! of a head is formed, a row for each group.

use super::{
    Context, Plan, Tensor,
    attention::{BLOCKS, Extents, Map, TILE_ROWS, biases, pack_keys},
    check::addressable,
    gemm::{Finish, Out, Product, Rows, block_values, cut, pack_blocks},
    pack::{PANEL, PackRows, Panels, Shared, panel_values},
    pool::LINE,
    simd::{Kernel, Simd},
};
use crate::{Result, backend::Heads};

/// [`Backend::attention_reduced`](crate::backend::Backend::attention_reduced) with [`Pooling::Max`](crate::backend::Pooling::Max).
pub(super) fn attention_folded(
    context: &Context,
    qk: &Heads<'_, Tensor>,
    values: &Tensor,
    plan: &Plan,
) -> Result<Tensor> {
    let e = Extents::reduced(qk, values, plan)?;
    let (n, d, row, m) = (e.tokens, e.head_dim, e.row(), plan.tokens_out());
    let Context { kernels, threads, pool, .. } = context;
    let shape = [e.batch, m, e.width];
    let mut out = pool.take(addressable("attention_reduced", shape)?);
    let biases = biases(context, qk, e);
    let (packed, values) = (qk.packed.view(), values.view());
    let (key_len, query_len) = (panel_values(d, n), block_values(TILE_ROWS, d));
    let (value_len, block_len) = (panel_values(m, d), block_values(m, m));
    let room = key_len + query_len + 2 * TILE_ROWS * row + value_len + block_len + (m + 1) * m + n;
    let mut scratch = pool.take(threads.count() * room);
    let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out.make_mut()));
    threads.run(e.batch * e.heads, |thread, index| {
        let (image, head) = (index / e.heads, index % e.heads);
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * room, room) };
        let (keys, rest) = scratch.split_at_mut(key_len);
        let (query_blocks, rest) = rest.split_at_mut(query_len);
        let (scores, rest) = rest.split_at_mut(TILE_ROWS * row);
        let (exponentials, rest) = rest.split_at_mut(TILE_ROWS * row);
        let (value_panels, rest) = rest.split_at_mut(value_len);
        let (blocks, rest) = rest.split_at_mut(block_len);
        let (folded, rest) = rest.split_at_mut(m * m);
        let (sums, group_of) = rest.split_at_mut(m);
        let group_of: &mut [u32] = bytemuck::cast_slice_mut(group_of);
        // Nobody's members have a group too many.
        group_of.fill(m as u32);
        for group in 0..m {
            plan.group(image, group).0.iter().for_each(|&t| group_of[t as usize] = group as u32);
        }
        let image_rows = &packed[image * n * e.stride..(image + 1) * n * e.stride];
        pack_keys(context, e, image_rows, head, keys);
        // What is no number gives way to whatever comes.
        folded.fill(f32::NAN);
        let mut map = Map {
            context,
            keys: Panels { data: keys, depth: d, columns: n },
            bias: &biases[image * row..(image + 1) * row],
            scale: qk.scale,
            class: None,
            received: None,
            scores,
            exponentials,
        };
        let most = kernels.tile_rows() * BLOCKS;
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            let queries = &image_rows[first * e.stride + head * d..];
            let queries = Rows { data: queries, count, stride: e.stride };
            let queries = pack_blocks(*kernels, queries, d, query_blocks);
            let inverse = map.rows(queries, false, None);
            kernels.run(Fold {
                map: map.exponentials,
                inverse: &inverse[..count],
                group_of,
                first,
                sums,
                folded,
            });
        }
        for (group, row) in folded.chunks_exact_mut(m).enumerate() {
            if plan.group(image, group).0.is_empty() {
                row.fill(0.0);
            }
        }
        for (panel, to) in value_panels.chunks_exact_mut(m * PANEL).enumerate() {
            let from = &values[image * m * e.width + head * d + panel * PANEL..(image + 1) * m * e.width];
            PackRows { from, stride: e.width, width: PANEL.min(d - panel * PANEL), to }.run();
        }
        kernels.run(Product {
            a: pack_blocks(*kernels, Rows { data: folded, count: m, stride: m }, m, blocks),
            b: Panels { data: value_panels, depth: m, columns: d },
            columns: 0..d,
            // SAFETY: each task has the rows of a head of its own.
            out: unsafe { Out::part(&shared, image * m * e.width + head * d, e.width) },
            finish: Finish::default(),
        });
    });
    Ok(Tensor::pooled(shape, out))
}

/// Some rows of a map: the columns of each group become sums, and the rows of each group their largest.
struct Fold<'a> {
    /// Exponentials of so many rows as `inverse` has, in blocks.
    map: &'a [f32],
    /// What makes softmax rows of them.
    inverse: &'a [f32],
    /// Each token's, M for nobody's members.
    group_of: &'a [u32],
    /// The token of the first row.
    first: usize,
    /// (M).
    sums: &'a mut [f32],
    /// (M, M).
    folded: &'a mut [f32],
}

impl Kernel for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { map, inverse, group_of, first, sums, folded } = self;
        let m = sums.len();
        let padded = group_of.len().next_multiple_of(LINE);
        for block in cut::<S>(inverse.len()) {
            let map = &map[block.start * padded..block.end * padded];
            for (i, row) in block.clone().enumerate() {
                let own = group_of[first + row] as usize;
                if own == m {
                    continue;
                }
                sums.fill(0.0);
                for (chunk, groups) in group_of.chunks(LINE).enumerate() {
                    let values = &map[(chunk * block.len() + i) * LINE..][..LINE];
                    for (&group, value) in groups.iter().zip(values) {
                        if let Some(sum) = sums.get_mut(group as usize) {
                            *sum += value;
                        }
                    }
                }
                let inverse = inverse[row];
                for (largest, sum) in folded[own * m..(own + 1) * m].iter_mut().zip(&*sums) {
                    *largest = largest.max(sum * inverse);
                }
            }
        }
    }
}
