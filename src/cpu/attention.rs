//! Attention, head by head: keys and values packed once, then rows of the map in a tile that never leaves the cache.

use std::ops::Range;

use super::{
    Context, Plan, Tensor, amx,
    check::{addressable, expect_shape, tokens_shape},
    gemm::{Blocks, Finish, Out, Product, Rows, block_values, cut, pack_blocks},
    pack::{PANEL, PackRows, PackTransposed, Panels, Shared, panel_values},
    pool::LINE,
    simd::{Kernel, Simd},
    softmax::Softmax,
};
use crate::{
    Error, Result,
    backend::{Heads, ScoreRequest, Scores, ScoresAndMap},
};

/// Row blocks of a tile of the map.
pub(super) const BLOCKS: usize = 2;
/// Rows of a tile at most, for any instruction set.
pub(super) const TILE_ROWS: usize = 14 * BLOCKS;
/// Tasks there should be at least: few heads are cut into runs of queries. No function of the number of threads, because the
/// sums of received attention depend on it.
pub(super) const TASKS: usize = 8;

/// Checked extents of packed heads.
#[derive(Clone, Copy)]
pub(super) struct Extents {
    pub(super) batch: usize,
    pub(super) tokens: usize,
    /// Values from one token to the next.
    pub(super) stride: usize,
    /// Width of one part: H·D.
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl Extents {
    fn new(op: &'static str, heads: &Heads<'_, Tensor>, parts: usize) -> Result<Self> {
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
        Ok(Self { batch, tokens, stride, width, heads: heads.heads, head_dim: heads.head_dim })
    }

    /// Those of queries and keys whose map is folded over a plan for the values of its groups.
    pub(super) fn reduced(qk: &Heads<'_, Tensor>, values: &Tensor, plan: &Plan) -> Result<Self> {
        const OP: &str = "attention_reduced";
        let e = Self::new(OP, qk, 2)?;
        let m = plan.tokens_out();
        if m == 0 {
            return Err(Error::argument(OP, "the plan leaves no token to attend to"));
        }
        expect_shape(OP, "values", values, &[e.batch, m, e.width])?;
        if (plan.batch(), plan.tokens_in()) != (e.batch, e.tokens) {
            return Err(Error::argument(
                OP,
                format!(
                    "the plan takes {} images of {} tokens, not {} of {}",
                    plan.batch(),
                    plan.tokens_in(),
                    e.batch,
                    e.tokens
                ),
            ));
        }
        Ok(e)
    }

    /// Tokens, rounded up to whole panels: the length of a row of the map.
    pub(super) fn row(&self) -> usize {
        self.tokens.next_multiple_of(PANEL)
    }

    /// Runs of queries that each head is cut into.
    fn runs(&self) -> usize {
        TASKS.div_ceil(self.batch * self.heads).min(self.tokens.div_ceil(2 * TILE_ROWS))
    }
}

/// Values of maps that are kept for [`attention_of_map`](super::kept::attention_of_map) at most, in all images: more would be fetched from further away than it
/// takes to compute them again.
const KEPT_VALUES: usize = 4 << 20;

/// What is made of the map.
pub(super) enum Values<'a> {
    /// Nothing but scores.
    None,
    /// Values packed behind queries and keys.
    Packed,
    /// Values of reduced tokens, (B, M, C), each member of a group having its group's.
    Groups(&'a [f32], &'a Plan),
}

/// [`Backend::attention`](crate::backend::Backend::attention).
pub(super) fn attention(
    context: &Context,
    qkv: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<(Tensor, Scores<Tensor>)> {
    let e = Extents::new("attention", qkv, 3)?;
    let shape = [e.batch, e.tokens, e.width];
    let mut out = context.pool.take(addressable("attention", shape)?);
    let scores = run(context, qkv, e, request, &Values::Packed, out.make_mut(), None);
    Ok((Tensor::pooled(shape, out), scores))
}

/// [`Backend::attention_scores`](crate::backend::Backend::attention_scores).
pub(super) fn attention_scores(
    context: &Context,
    qk: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<Scores<Tensor>> {
    let e = Extents::new("attention_scores", qk, 2)?;
    Ok(run(context, qk, e, request, &Values::None, &mut [], None))
}

/// [`Backend::attention_scores_and_map`](crate::backend::Backend::attention_scores_and_map). A row of the map is as long as whole
/// panels; what is behind the last token is 0 in the last vector and anything behind that.
pub(super) fn attention_scores_and_map(
    context: &Context,
    qk: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<ScoresAndMap<Tensor>> {
    let e = Extents::new("attention_scores", qk, 2)?;
    let shape = [e.batch, e.heads, e.tokens, e.row()];
    let len = shape.iter().try_fold(1_usize, |len, &extent| len.checked_mul(extent));
    let Some(len) = len.filter(|&len| len <= KEPT_VALUES) else {
        return Ok((run(context, qk, e, request, &Values::None, &mut [], None), None));
    };
    let mut map = context.pool.take(len);
    let scores = run(context, qk, e, request, &Values::None, &mut [], Some(map.make_mut()));
    Ok((scores, Some(Tensor::pooled(shape, map))))
}

/// [`Backend::attention_reduced`](crate::backend::Backend::attention_reduced) with weighted pooling: the product comes first,
/// over the groups' values; then its rows are pooled as tokens are.
pub(super) fn attention_grouped(
    context: &Context,
    qk: &Heads<'_, Tensor>,
    values: &Tensor,
    plan: &Plan,
) -> Result<Tensor> {
    let e = Extents::reduced(qk, values, plan)?;
    let shape = [e.batch, e.tokens, e.width];
    let mut out = context.pool.take(addressable("attention_reduced", shape)?);
    let values = values.view();
    run(context, qk, e, ScoreRequest::default(), &Values::Groups(&values, plan), out.make_mut(), None);
    super::merge::pool_tokens(context, &Tensor::pooled(shape, out), plan)
}

/// All heads of all images: scores, contexts into `out` (B, N, H·D) unless there are no values, and the softmax rows into `kept`
/// (B, H, N, row) if somebody wants them.
fn run(
    context: &Context,
    heads: &Heads<'_, Tensor>,
    e: Extents,
    request: ScoreRequest,
    values: &Values<'_>,
    out: &mut [f32],
    kept: Option<&mut [f32]>,
) -> Scores<Tensor> {
    let pool = &context.pool;
    let (n, row, runs, count) = (e.tokens, e.row(), e.runs(), e.batch * e.heads);
    let biases = biases(context, heads, e);
    let mut class = request.class.then(|| pool.take(count * n));
    let mut received = request.received.then(|| pool.take(runs * count * row));
    let class_parts = class.as_mut().map(|class| Shared::of(class.make_mut()));
    let received_parts = received.as_mut().map(|received| Shared::of(received.make_mut()));
    let packed = heads.packed.view();
    let with_values = !matches!(values, Values::None);
    let key_values = panel_values(e.head_dim, n);
    let value_values = if with_values { panel_values(n, e.head_dim) } else { 0 };
    // A tile of queries in blocks, their scores, and the map's rows in blocks.
    let query_values = block_values(TILE_ROWS, e.head_dim);
    let scratch_len = match context.amx {
        None => key_values + value_values + query_values + 2 * TILE_ROWS * row,
        Some(_) => (n * e.head_dim).next_multiple_of(LINE) + amx::head_values(n, e.head_dim),
    };
    let mut scratch = pool.take(context.threads.count() * scratch_len);
    let (scratches, out) = (Shared::of(scratch.make_mut()), Shared::of(out));
    let kept = kept.map(Shared::of);
    context.threads.run(count * runs, |thread, task| {
        let (index, run) = (task / runs, task % runs);
        let (image, head) = (index / e.heads, index % e.heads);
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * scratch_len, scratch_len) };
        let image_rows = &packed[image * n * e.stride..(image + 1) * n * e.stride];
        let bias = &biases[image * row..(image + 1) * row];
        let queries = n * run / runs..n * (run + 1) / runs;
        let class = class_parts.as_ref().filter(|_| run == 0).map(|parts| {
            // SAFETY: each head has a row of its own; the run with query 0 writes it.
            unsafe { parts.part(index * n, n) }
        });
        let mut received = received_parts.as_ref().map(|parts| {
            // SAFETY: each run of each head has a row of its own.
            unsafe { parts.part((run * count + index) * row, row) }
        });
        if let Some(received) = &mut received {
            received.fill(0.0);
        }
        // SAFETY: each task has rows of a head of its own.
        let out = |first: usize| unsafe {
            Out::part(&out, (image * n + first) * e.width + head * e.head_dim, e.width)
        };
        if let Some(amx) = context.amx {
            let (grouped, scratch) = scratch.split_at_mut((n * e.head_dim).next_multiple_of(LINE));
            let column = head * e.head_dim;
            let head = QueryRun {
                rows: image_rows,
                stride: e.stride,
                tokens: n,
                head_dim: e.head_dim,
                queries_at: column,
                keys: e.width + column,
                values: match values {
                    Values::None => None,
                    Values::Packed => Some((&image_rows[2 * e.width + column..], e.stride)),
                    Values::Groups(values, plan) => {
                        spread(
                            values,
                            plan,
                            image,
                            column..column + e.head_dim,
                            e.width,
                            grouped,
                            e.head_dim,
                        );
                        Some((grouped, e.head_dim))
                    }
                },
                bias,
                scale: heads.scale,
                class,
                received,
                out: if with_values { out(queries.start) } else { Out::of(&mut [], e.width) },
                kept: kept.as_ref().map(|kept| {
                    // SAFETY: each task has queries of a head of its own.
                    unsafe { kept.part((index * n + queries.start) * row, queries.len() * row) }
                }),
                queries,
                scratch,
            };
            amx::attend(amx, head);
            return;
        }
        let (keys, rest) = scratch.split_at_mut(key_values);
        let (value_panels, rest) = rest.split_at_mut(value_values);
        let (blocks, rest) = rest.split_at_mut(query_values);
        let (scores, exponentials) = rest.split_at_mut(TILE_ROWS * row);
        pack_keys(context, e, image_rows, head, keys);
        pack_values(e, image_rows, image, head, values, value_panels);
        let mut map = Map {
            context,
            keys: Panels { data: keys, depth: e.head_dim, columns: n },
            bias,
            scale: heads.scale,
            class,
            received,
            scores,
            exponentials,
        };
        let most = context.kernels.tile_rows() * BLOCKS;
        let Range { start, end } = queries;
        let tiles = (end - start).div_ceil(most);
        for tile in 0..tiles {
            let first = start + (end - start) * tile / tiles;
            let last = start + (end - start) * (tile + 1) / tiles;
            let queries = &image_rows[first * e.stride + head * e.head_dim..];
            let queries = Rows { data: queries, count: last - first, stride: e.stride };
            let queries = pack_blocks(context.kernels, queries, e.head_dim, blocks);
            let kept = kept.as_ref().map(|kept| {
                // SAFETY: each task has queries of a head of its own.
                unsafe { kept.part((index * n + first) * row, (last - first) * row) }
            });
            let inverse = map.rows(queries, first == 0, kept);
            if with_values {
                let panels = Panels { data: value_panels, depth: n, columns: e.head_dim };
                let out = out(first);
                let a = Blocks { data: map.exponentials, count: last - first, depth: n };
                let finish = Finish { scales: Some(&inverse), ..Finish::default() };
                context.kernels.run(Product { a, b: panels, columns: 0..e.head_dim, out, finish });
            }
        }
    });
    drop(scratch);
    let shape = [e.batch, e.heads, n];
    Scores {
        class: class.map(|class| Tensor::pooled(shape, class)),
        received: received.map(|parts| {
            let mut sums = pool.take(count * n);
            for (index, sums) in sums.make_mut().chunks_exact_mut(n).enumerate() {
                for (t, sum) in sums.iter_mut().enumerate() {
                    let part = |run| parts[(run * count + index) * row + t];
                    *sum = (0..runs).map(part).sum::<f32>() / n as f32;
                }
            }
            Tensor::pooled(shape, sums)
        }),
    }
}

/// What is added to each key's scores, (B, row): the logarithm of its size, `-inf` behind the last token.
pub(super) fn biases(context: &Context, heads: &Heads<'_, Tensor>, e: Extents) -> super::pool::Buffer {
    let row = e.row();
    let mut biases = context.pool.take(e.batch * row);
    let sizes = heads.sizes.map(Tensor::view);
    let shared = Shared::of(biases.make_mut());
    let fill = |image: usize| {
        // SAFETY: each image has a row of its own.
        let (known, behind) = unsafe { shared.part(image * row, row) }.split_at_mut(e.tokens);
        behind.fill(f32::NEG_INFINITY);
        match &sizes {
            None => known.fill(0.0),
            Some(sizes) => {
                let sizes = &sizes[image * e.tokens..(image + 1) * e.tokens];
                known.iter_mut().zip(sizes).for_each(|(bias, size)| *bias = size.ln());
            }
        }
    };
    (0..e.batch).for_each(fill);
    biases
}

pub(super) fn pack_keys(context: &Context, e: Extents, image: &[f32], head: usize, to: &mut [f32]) {
    for (panel, to) in to.chunks_exact_mut(e.head_dim * PANEL).enumerate() {
        let (first, last) = (panel * PANEL, e.tokens.min((panel + 1) * PANEL));
        let from = first * e.stride + e.width + head * e.head_dim;
        let from = &image[from..from + (last - first - 1) * e.stride + e.head_dim];
        context.kernels.run(PackTransposed { from, stride: e.stride, depth: e.head_dim, to });
    }
}

pub(super) fn pack_values(
    e: Extents,
    rows: &[f32],
    image: usize,
    head: usize,
    values: &Values<'_>,
    to: &mut [f32],
) {
    for (panel, to) in to.chunks_exact_mut(e.tokens * PANEL).enumerate() {
        let column = head * e.head_dim + panel * PANEL;
        let width = PANEL.min(e.head_dim - panel * PANEL);
        match values {
            Values::None => {}
            Values::Packed => {
                PackRows { from: &rows[2 * e.width + column..], stride: e.stride, width, to }.run();
            }
            Values::Groups(values, plan) => {
                spread(values, plan, image, column..column + width, e.width, to, PANEL);
            }
        }
    }
}

/// Rows that are `to_stride` apart: each token's are these columns of its group's, which are `stride` apart; 0 where it is in none.
pub(super) fn spread(
    values: &[f32],
    plan: &Plan,
    image: usize,
    columns: Range<usize>,
    stride: usize,
    to: &mut [f32],
    to_stride: usize,
) {
    to.fill(0.0);
    let m = plan.tokens_out();
    for group in 0..m {
        let value = &values[(image * m + group) * stride..][columns.clone()];
        for &member in plan.group(image, group).0 {
            to[member as usize * to_stride..][..columns.len()].copy_from_slice(value);
        }
    }
}

/// A head and some of its queries, for who computes it in one go.
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies them where there is no AMX")
)]
pub(super) struct QueryRun<'a> {
    /// The image's tokens, `stride` apart.
    pub(super) rows: &'a [f32],
    pub(super) stride: usize,
    pub(super) tokens: usize,
    pub(super) head_dim: usize,
    /// Where in a row the head's query is, and its key.
    pub(super) queries_at: usize,
    pub(super) keys: usize,
    /// A row of `head_dim` values for each token, and how far they are apart; nothing where scores alone are wanted.
    pub(super) values: Option<(&'a [f32], usize)>,
    /// Added to the scaled products: one for each token, `-inf` up to a whole panel.
    pub(super) bias: &'a [f32],
    pub(super) scale: f32,
    /// The softmax of the first query, where it is among these.
    pub(super) class: Option<&'a mut [f32]>,
    /// The columns of the softmax are added here.
    pub(super) received: Option<&'a mut [f32]>,
    pub(super) queries: Range<usize>,
    /// The softmax of these queries goes here, rows as long as `bias`.
    pub(super) kept: Option<&'a mut [f32]>,
    /// From the first of these queries on.
    pub(super) out: Out<'a>,
    pub(super) scratch: &'a mut [f32],
}

/// The map of one head, a tile of rows at a time.
pub(super) struct Map<'a> {
    pub(super) context: &'a Context,
    /// (D, N).
    pub(super) keys: Panels<'a>,
    /// A row: added to the scaled products.
    pub(super) bias: &'a [f32],
    pub(super) scale: f32,
    pub(super) class: Option<&'a mut [f32]>,
    pub(super) received: Option<&'a mut [f32]>,
    /// (queries, row).
    pub(super) scores: &'a mut [f32],
    /// Their exponentials, in blocks.
    pub(super) exponentials: &'a mut [f32],
}

impl Map<'_> {
    /// Makes the exponentials of the scores of some queries, the class token's first if `class`; returns what makes softmax
    /// rows of them, which go to `kept` (queries, row).
    pub(super) fn rows(
        &mut self,
        queries: Blocks<'_>,
        class: bool,
        kept: Option<&mut [f32]>,
    ) -> [f32; TILE_ROWS] {
        let (row, n) = (self.bias.len(), self.keys.columns);
        let kernels = self.context.kernels;
        kernels.run(Product {
            a: queries,
            b: self.keys,
            columns: 0..n,
            out: Out::of(self.scores, row),
            finish: Finish::default(),
        });
        let mut inverse = [0.0; TILE_ROWS];
        kernels.run(Softmax {
            scores: &mut self.scores[..queries.count * row],
            map: self.exponentials,
            tokens: n,
            bias: self.bias,
            scale: self.scale,
            inverse: &mut inverse,
            received: self.received.as_deref_mut(),
            kept,
        });
        if let (true, Some(scores)) = (class, &mut self.class) {
            // The first row's values lie as far apart as its block has rows.
            let block = kernels.run(FirstBlock(queries.count));
            let first = self.exponentials.chunks(block * LINE).flat_map(|chunk| &chunk[..LINE]);
            scores.iter_mut().zip(first).for_each(|(score, e)| *score = e * inverse[0]);
        }
        inverse
    }
}

/// Rows of the first block of so many.
struct FirstBlock(usize);

impl Kernel for FirstBlock {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        cut::<S>(self.0).next().map_or(1, |block| block.len())
    }
}
