//! Means over windows of the grid of patches, and their way back (MSTM's fusion of scales).

use super::{
    Context, Tensor,
    check::{expect_shape, tokens_shape},
    pack::Shared,
};
use crate::{Error, Result};

/// Rows of one task.
const TASK_ROWS: usize = 32;

/// (B, N, C) of a grid of patches behind special tokens, and the rows and columns of windows over it.
fn check(
    op: &'static str,
    x: &Tensor,
    special: usize,
    grid: [usize; 2],
    scale: usize,
) -> Result<([usize; 3], [usize; 2])> {
    let shape @ [_, n, _] = tokens_shape(op, "x", x)?;
    let patches = grid[0].checked_mul(grid[1]).filter(|&patches| patches > 0);
    if patches.and_then(|patches| patches.checked_add(special)) != Some(n) || scale == 0 {
        return Err(Error::argument(
            op,
            format!(
                "{n} tokens of which {special} are special are no grid of {}x{} patches for windows of {scale}",
                grid[0], grid[1]
            ),
        ));
    }
    Ok((shape, grid.map(|side| side.div_ceil(scale))))
}

/// [`Backend::pool_windows`](crate::backend::Backend::pool_windows).
pub(super) fn pool_windows(
    context: &Context,
    x: &Tensor,
    special: usize,
    grid: [usize; 2],
    scale: usize,
) -> Result<Tensor> {
    let ([batch, n, width], cells) = check("pool_windows", x, special, grid, scale)?;
    let count = cells[0] * cells[1];
    let mut out = context.pool.take(batch * count * width);
    let (x, shared) = (x.view(), Shared::of(out.make_mut()));
    context.threads.run((batch * count).div_ceil(TASK_ROWS), |_, task| {
        for at in task * TASK_ROWS..(batch * count).min((task + 1) * TASK_ROWS) {
            let (image, cell) = (at / count, at % count);
            // SAFETY: each row is one task's.
            let out = unsafe { shared.part(at * width, width) };
            let side = |cell: usize, side: usize| cell * scale..((cell + 1) * scale).min(side);
            let (rows, columns) = (side(cell / cells[1], grid[0]), side(cell % cells[1], grid[1]));
            let patches = (rows.len() * columns.len()) as f32;
            out.fill(0.0);
            for row in rows {
                for column in columns.clone() {
                    let token = image * n + special + row * grid[1] + column;
                    let patch = &x[token * width..(token + 1) * width];
                    out.iter_mut().zip(patch).for_each(|(sum, value)| *sum += value);
                }
            }
            out.iter_mut().for_each(|sum| *sum /= patches);
        }
    });
    Ok(Tensor::pooled([batch, count, width], out))
}

/// [`Backend::add_windows`](crate::backend::Backend::add_windows).
pub(super) fn add_windows(
    context: &Context,
    x: Tensor,
    pooled: &Tensor,
    special: usize,
    grid: [usize; 2],
    scale: usize,
) -> Result<Tensor> {
    let ([batch, n, width], cells) = check("add_windows", &x, special, grid, scale)?;
    let count = cells[0] * cells[1];
    expect_shape("add_windows", "pooled", pooled, &[batch, count, width])?;
    let pooled = pooled.view();
    let mut out = x.into_buffer(&context.pool);
    let shared = Shared::of(out.make_mut());
    context.threads.run((batch * n).div_ceil(TASK_ROWS), |_, task| {
        for at in task * TASK_ROWS..(batch * n).min((task + 1) * TASK_ROWS) {
            let (image, token) = (at / n, at % n);
            let Some(place) = token.checked_sub(special) else { continue };
            let cell = place / grid[1] / scale * cells[1] + place % grid[1] / scale;
            // SAFETY: each row is one task's.
            let patch = unsafe { shared.part(at * width, width) };
            let coarse = &pooled[(image * count + cell) * width..][..width];
            patch.iter_mut().zip(coarse).for_each(|(value, coarse)| *value += coarse);
        }
    });
    Ok(Tensor::pooled([batch, n, width], out))
}
