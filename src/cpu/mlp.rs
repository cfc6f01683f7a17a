//! The feed-forward network of a block: what lies between its two layers is never a tensor.
//!
//! Of B·N rows of C values and a network H wide, tensors between the layers would be written and read back, 2·B·N·H values, and read and
//! written once more to become the second product's left factor. Here the first product writes that factor itself, rounded if it is to
//! be, for as many rows as the second-level cache has room for; then the second product adds to the residual stream.

use super::{
    Context, Tensor,
    check::expect_shape,
    gemm::{Finish, Out, Rows},
    linear::packed,
    norm,
    pack::{PANEL, Shared},
    schedule::{self, Factor, Groups, Input, RowNorm},
};
use crate::{
    Result,
    backend::{Linear, Mlp},
    model::Activation,
};

/// `f32` values of memory that a group's rows may take between the layers: the second-level cache holds them, the group's input, and what
/// passes of the weights.
const HIDDEN_VALUES: usize = 160 << 10;
/// Blocks of rows in a group, at least: the weights come from far away.
const LEAST_BLOCKS: usize = 3;

/// Whether [`mlp`] computes such a network.
pub(super) fn fuses(mlp: &Mlp<'_, Tensor>) -> bool {
    let hidden = mlp.fc1.weight.shape().first().copied().unwrap_or(0);
    mlp.inner_norm.is_none()
        && mlp.activation != Activation::SwiGlu
        && hidden > 0
        && hidden.is_multiple_of(PANEL)
        && mlp.fc2.weight.shape().last() == Some(&hidden)
}

fn bias<'a>(
    name: &str,
    layer: &'a Linear<Tensor>,
    outputs: usize,
) -> Result<Option<super::tensor::View<'a>>> {
    let Some(bias) = &layer.bias else { return Ok(None) };
    expect_shape(OP, name, bias, &[outputs])?;
    Ok(Some(bias.view()))
}

const OP: &str = "mlp";

/// [`Backend::mlp`](crate::backend::Backend::mlp) of a network that [`fuses`].
pub(super) fn mlp(
    context: &Context,
    tokens: Tensor,
    normed: Option<&Tensor>,
    mlp: &Mlp<'_, Tensor>,
) -> Result<Tensor> {
    let (shape, width, rows) = (tokens.shape, tokens.width(), tokens.rows());
    let hidden = mlp.fc1.weight.shape().first().copied().unwrap_or(0);
    expect_shape(OP, "fc1.weight", &mlp.fc1.weight, &[hidden, width])?;
    expect_shape(OP, "fc2.weight", &mlp.fc2.weight, &[width, hidden])?;
    let biases = [bias("fc1.bias", mlp.fc1, hidden)?, bias("fc2.bias", mlp.fc2, width)?];
    match normed {
        Some(normed) => expect_shape(OP, "normed", normed, &shape)?,
        None => norm::check(mlp.norm, width)?,
    }
    if rows == 0 || width == 0 {
        return Ok(tokens);
    }
    let (mut first_passing, mut second_passing) = (None, None);
    let first = packed(context, &mlp.fc1.weight, [hidden, width], &mut first_passing);
    let second = packed(context, &mlp.fc2.weight, [width, hidden], &mut second_passing);
    let normed = normed.map(Tensor::view);
    let row_norm = RowNorm::new(mlp.norm);
    let mut out = tokens.into_buffer(&context.pool);
    let network = Network {
        context,
        first: Factor::new(context, first.right()),
        second: Factor::new(context, second.right()),
        hidden,
        width,
        norm: normed.is_none().then_some(&row_norm),
        finishes: [
            Finish { bias: biases[0].as_deref(), activation: Some(mlp.activation), ..Finish::default() },
            Finish { bias: biases[1].as_deref(), add: true, ..Finish::default() },
        ],
    };
    network.run(rows, normed.as_deref(), out.make_mut());
    Ok(Tensor::pooled(shape, out))
}

struct Network<'a> {
    context: &'a Context,
    first: Factor<'a>,
    second: Factor<'a>,
    hidden: usize,
    width: usize,
    /// Absent if the rows are normalised already.
    norm: Option<&'a RowNorm<'a>>,
    finishes: [Finish<'a>; 2],
}

impl Network<'_> {
    /// Adds to `out` (rows, C) what becomes of `normed`, or of the norms of what is there.
    fn run(&self, rows: usize, normed: Option<&[f32]>, out: &mut [f32]) {
        let threads = self.context.threads.count();
        let block = self.first.block_rows();
        let blocks = (HIDDEN_VALUES / self.second.left_values(block).max(1)).max(LEAST_BLOCKS);
        let few = rows.div_ceil(block.saturating_mul(blocks)).next_multiple_of(threads);
        let groups = Groups::new(&self.first, rows, few);
        // Threads that have groups of their own do not wait for each other in between.
        if schedule::rows_suffice(self.context, rows) {
            self.by_groups(groups, normed, out);
        } else {
            self.by_layers(rows, normed, out);
        }
    }

    fn input<'b>(&'b self, rows: &'b [f32], count: usize) -> Input<'b> {
        Input { rows: Rows { data: rows, count, stride: self.width }, norm: self.norm }
    }

    /// Each group of rows passes through both layers on one thread.
    fn by_groups(&self, groups: Groups, normed: Option<&[f32]>, out: &mut [f32]) {
        let Self { context, ref first, ref second, hidden, width, .. } = *self;
        let most = groups.most();
        let [left, between] = [first.left_values(most), second.left_values(most)];
        let input_scratch = self.input(&[], 0).scratch_values(first, most);
        let sums = first.scratch_values(hidden).max(second.scratch_values(width));
        let each = left + between + sums.max(input_scratch);
        let mut scratch = context.pool.take(context.threads.count() * each);
        let (scratches, shared) = (Shared::of(scratch.make_mut()), Shared::of(out));
        context.threads.run(groups.count, |thread, group| {
            let rows = groups.range(group);
            // SAFETY: each thread has a part of the scratch, each task rows of the stream, which are read before they are written.
            let (scratch, stream) = unsafe {
                let stream = shared.part(rows.start * width, rows.len() * width);
                (scratches.part(thread * each, each), stream)
            };
            let (left, scratch) = scratch.split_at_mut(left);
            let (between, scratch) = scratch.split_at_mut(between);
            let from = normed.map_or(&*stream, |normed| &normed[rows.start * width..][..stream.len()]);
            self.input(from, rows.len()).pack(first, 0..rows.len(), left, scratch);
            let [to_hidden, to_stream] = self.finishes;
            let to = Shared::of(between);
            // SAFETY: nobody else has what lies between this task's layers.
            let to = unsafe { Out::left(&to, 0, hidden) };
            first.multiply(left, rows.len(), 0..hidden, to, to_hidden, scratch);
            second.multiply(between, rows.len(), 0..width, Out::of(stream, width), to_stream, scratch);
        });
    }

    /// All rows pass through one layer, then through the other.
    fn by_layers(&self, rows: usize, normed: Option<&[f32]>, out: &mut [f32]) {
        let Self { context, ref first, ref second, hidden, width, .. } = *self;
        let groups = schedule::groups(context, first, rows);
        let from = normed.unwrap_or(&*out);
        let left = schedule::packed(context, first, self.input(from, rows), groups);
        let mut between = context.pool.take(second.left_values(rows));
        let shared = Shared::of(between.make_mut());
        let [to_hidden, to_stream] = self.finishes;
        schedule::columns_of(context, first, &left, groups, 0..hidden, to_hidden, |rows, _, _| {
            // SAFETY: each task has rows and columns of its own.
            unsafe { Out::left(&shared, second.left_values(rows.start), hidden) }
        });
        drop(left);
        let shared = Shared::of(out);
        schedule::columns_of(context, second, &between, groups, 0..width, to_stream, |rows, columns, _| {
            // SAFETY: as above.
            unsafe { Out::part(&shared, rows.start * width + columns.start, width) }
        });
    }
}
