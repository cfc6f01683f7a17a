//! Products of bf16 in the tiles of AMX.
//!
//! A value of a product is the sum, in `f32`, of the products of its factors, each rounded to bf16 (to nearest, ties to even; a
//! denormal becomes 0 of its sign, NaN stays NaN). The order is fixed: 32 values of the depth at a time, those at even places summed
//! one after the other, those at odd places beside them, both sums added and the result added to what was there before. Every sum is
//! rounded to nearest, and one that is denormal becomes 0. So a value's bits depend neither on the other rows nor on how many threads
//! there are. Bias, activation and residual come after that, in `f32`.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod attention;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod detect;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod pack;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod product;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tile;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use self::{
    attention::{attend, head_values, times, times_values},
    detect::Amx,
    pack::pack_transposed,
    product::{left_len, multiply, pack_rows, scratch_values},
};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod elsewhere;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) use self::elsewhere::{
    Amx, attend, head_values, left_len, multiply, pack_rows, pack_transposed, scratch_values, times,
    times_values,
};

/// Values of the depth that one instruction multiplies.
pub(super) const CHUNK: usize = 32;
/// Columns of a panel: two tiles.
pub(super) const PANEL: usize = 32;
/// Rows of a tile, of sums as of factors.
const TILE_ROWS: usize = 16;
/// Rows of a block of sums, which eight tiles suffice for.
pub(super) const BLOCK_ROWS: usize = 2 * TILE_ROWS;
/// bf16 values of a tile.
const TILE: usize = TILE_ROWS * CHUNK;

/// The right factor of a product, (depth, columns), in panels of [`PANEL`] columns, each in chunks of the depth, each in two
/// tiles of 16 columns: element (i, j) is `data[place(depth, i, j)]`. What fills up the last chunk is 0, and so are the columns
/// that fill up the last panel.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies them where there is no AMX")
)]
pub(super) struct Tiles<'a> {
    pub(super) data: &'a [u16],
    pub(super) depth: usize,
    pub(super) columns: usize,
}

/// bf16 values that such a factor takes.
pub(super) fn tile_values(depth: usize, columns: usize) -> usize {
    columns.div_ceil(PANEL) * depth.div_ceil(CHUNK) * 2 * TILE
}

/// Where element (i, j) of a right factor is.
pub(super) fn place(depth: usize, i: usize, j: usize) -> usize {
    let tile = (j / PANEL * depth.div_ceil(CHUNK) + i / CHUNK) * 2 + j % PANEL / TILE_ROWS;
    tile * TILE + i % CHUNK / 2 * CHUNK + j % TILE_ROWS * 2 + i % 2
}
