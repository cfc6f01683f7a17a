//! Means over windows of the grid of patches, and their way back (MSTM's fusion of scales).

use rayon::prelude::*;

use super::{expect_shape, tokens_shape};
use crate::{Error, Result, Tensor};

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

pub(super) fn pool_windows(x: &Tensor, special: usize, grid: [usize; 2], scale: usize) -> Result<Tensor> {
    let ([batch, _, width], cells) = check("pool_windows", x, special, grid, scale)?;
    let count = cells[0] * cells[1];
    let mut out = Tensor::zeros(&[batch, count, width]);
    out.data_mut().par_chunks_mut(width).enumerate().for_each(|(at, out)| {
        let (image, cell) = (at / count, at % count);
        let side = |cell: usize, side: usize| cell * scale..((cell + 1) * scale).min(side);
        let (rows, columns) = (side(cell / cells[1], grid[0]), side(cell % cells[1], grid[1]));
        let patches = (rows.len() * columns.len()) as f32;
        for row in rows {
            for column in columns.clone() {
                let token = special + row * grid[1] + column;
                let patch = &x.item(image)[token * width..(token + 1) * width];
                out.iter_mut().zip(patch).for_each(|(sum, value)| *sum += value);
            }
        }
        out.iter_mut().for_each(|sum| *sum /= patches);
    });
    Ok(out)
}

pub(super) fn add_windows(
    mut x: Tensor,
    pooled: &Tensor,
    special: usize,
    grid: [usize; 2],
    scale: usize,
) -> Result<Tensor> {
    let ([batch, n, width], cells) = check("add_windows", &x, special, grid, scale)?;
    expect_shape("add_windows", "pooled", pooled, &[batch, cells[0] * cells[1], width])?;
    x.data_mut().par_chunks_mut(width).enumerate().for_each(|(at, patch)| {
        let (image, token) = (at / n, at % n);
        let Some(place) = token.checked_sub(special) else { return };
        let cell = place / grid[1] / scale * cells[1] + place % grid[1] / scale;
        let coarse = &pooled.item(image)[cell * width..(cell + 1) * width];
        patch.iter_mut().zip(coarse).for_each(|(value, coarse)| *value += coarse);
    });
    Ok(x)
}
