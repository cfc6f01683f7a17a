//! The kernels' parameter struct and its launches.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DeviceRepr};

use super::{
    AttentionPointers, ScorePointers, Split,
    kernels::{Pass, resident_block, resident_bytes, stream_bytes},
};
use crate::{
    Result,
    cuda::{
        DType, Device, DevicePointer,
        launch::{Grid, int, launch_grid},
    },
};

use super::OP;

/// Rows of a streaming kernel's block.
const BLOCK_ROWS: u32 = 64;

/// `AttentionParams` of kernels/include/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    q: DevicePointer,
    k: DevicePointer,
    v: DevicePointer,
    out: DevicePointer,
    sizes: DevicePointer,
    groups: DevicePointer,
    class_rows: DevicePointer,
    received: DevicePointer,
    log_sum_exp: DevicePointer,
    pool_offsets: DevicePointer,
    pool_members: DevicePointer,
    pool_weights: DevicePointer,
    pooled: DevicePointer,
    arrived: DevicePointer,
    q_strides: [i64; 2],
    k_strides: [i64; 2],
    v_strides: [i64; 2],
    out_strides: [i64; 2],
    pooled_strides: [i64; 2],
    tokens: i32,
    heads: i32,
    class_count: i32,
    head_dim: i32,
    scale: f32,
    block_tiles: i32,
    pool_groups: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<Params>() == 224
        && std::mem::offset_of!(Params, q_strides) == 112
        && std::mem::offset_of!(Params, tokens) == 192
);

// SAFETY: plain integers and floats in the kernels' layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

fn params(
    arguments: &AttentionPointers,
    scores: ScorePointers,
    head_dim: usize,
    block_tiles: usize,
) -> Result<Params> {
    let (v, out) = arguments.values.unzip();
    let pool = arguments.pool.as_ref();
    let plan = pool.map(|pool| &pool.plan);
    let (class_rows, class_count) = scores.class_rows.unwrap_or_default();
    Ok(Params {
        q: arguments.q.data,
        k: arguments.k.data,
        v: v.map_or(0, |v| v.data),
        out: out.map_or(0, |out| out.data),
        sizes: arguments.sizes.unwrap_or(0),
        groups: arguments.groups.unwrap_or(0),
        class_rows,
        received: scores.received.unwrap_or(0),
        log_sum_exp: scores.log_sum_exp.unwrap_or(0),
        pool_offsets: plan.map_or(0, |plan| plan.offsets),
        pool_members: plan.map_or(0, |plan| plan.members),
        pool_weights: plan.map_or(0, |plan| plan.weights),
        pooled: pool.map_or(0, |pool| pool.out.data),
        arrived: pool.map_or(0, |pool| pool.arrived),
        q_strides: arguments.q.kernel_strides(),
        k_strides: arguments.k.kernel_strides(),
        v_strides: v.map_or([0; 2], |v| v.kernel_strides()),
        out_strides: out.map_or([0; 2], |out| out.kernel_strides()),
        pooled_strides: pool.map_or([0; 2], |pool| pool.out.kernel_strides()),
        tokens: int(OP, "tokens", arguments.q.shape[1])?,
        heads: int(OP, "heads", arguments.heads)?,
        class_count: int(OP, "softmax rows", class_count)?,
        head_dim: int(OP, "values a head", head_dim)?,
        scale: arguments.scale,
        block_tiles: int(OP, "query tiles", block_tiles)?,
        pool_groups: int(OP, "tokens of the plan", plan.map_or(0, |plan| plan.tokens_out))?,
        reserved: 0,
    })
}

/// The grid over blocks of a head, heads and images.
fn grid(arguments: &AttentionPointers, blocks: u32, threads: u32, shared_bytes: usize) -> Result<Grid> {
    let size = |what: &str, n: usize| int(OP, what, n).map(i32::unsigned_abs);
    Ok(Grid {
        blocks: [blocks, size("heads", arguments.heads)?, size("images", arguments.q.shape[0])?],
        block: threads,
        shared_bytes: size("bytes", shared_bytes)?,
    })
}

/// Blocks of 64 rows of a head.
fn row_blocks(arguments: &AttentionPointers) -> Result<u32> {
    Ok(int(OP, "tokens", arguments.q.shape[1])?.unsigned_abs().div_ceil(BLOCK_ROWS))
}

/// The threads of a streaming kernel's block.
fn stream_threads(dtype: DType) -> u32 {
    if dtype == DType::F32 { 256 } else { 128 }
}

/// The pass that attends.
///
/// # Safety
/// As [`super::attention_raw`], with checked arguments.
pub(super) unsafe fn launch_values(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    pass: &Pass,
    arguments: &AttentionPointers,
    scores: ScorePointers,
    head_dim: usize,
) -> Result<()> {
    let kernels = &device.kernels().attention;
    let (kernel, params, grid) = match *pass {
        Pass::Resident(at) => {
            let [images, tokens, _] = arguments.q.shape;
            let least = arguments.split == Split::Least || scores.received.is_some();
            let wanted = if least { 1 } else { device.multiprocessors() };
            let maps = images.saturating_mul(arguments.heads);
            let (tiles, warps) = resident_block(at, tokens, maps, wanted);
            let blocks = int(OP, "blocks", tokens.div_ceil(16 * tiles))?.unsigned_abs();
            let grid = grid(arguments, blocks, warps * 32, resident_bytes(tokens, tiles))?;
            (kernels.resident(dtype, at), params(arguments, scores, head_dim, tiles)?, grid)
        }
        Pass::Stream => {
            let [bytes, _] = stream_bytes(dtype, head_dim);
            let grid = grid(arguments, row_blocks(arguments)?, stream_threads(dtype), bytes)?;
            (kernels.stream(dtype, head_dim)[0], params(arguments, scores, head_dim, 0)?, grid)
        }
    };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch_grid(stream, kernel, grid, &params) }
}

/// The pass over keys that hands out scores.
///
/// # Safety
/// As [`super::attention_raw`], with checked arguments; `log_sum_exp` has been written on the stream.
pub(super) unsafe fn launch_scores(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    arguments: &AttentionPointers,
    scores: ScorePointers,
    head_dim: usize,
) -> Result<()> {
    let [_, bytes] = stream_bytes(dtype, head_dim);
    let grid = grid(arguments, row_blocks(arguments)?, stream_threads(dtype), bytes)?;
    let kernel = device.kernels().attention.stream(dtype, head_dim)[1];
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch_grid(stream, kernel, grid, &params(arguments, scores, head_dim, 0)?) }
}
