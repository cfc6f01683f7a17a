//! MCTF's attention over a reduced set of tokens with rows pooled by maximum (`kernels/attention_fold.cu`).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{Attention, check_heads, kernels::FOLD_BYTES};
use crate::{
    Error, Result,
    cuda::{
        DType, Device, DevicePlan, DevicePointer, Element, PlanPointers, Strided,
        borrow::Borrow,
        launch::{Grid, int, launch_grid},
        nvtx,
        strided::check_pointer,
    },
};

const OP: &str = "attention_folded";

/// Threads of a block.
const THREADS: u32 = 128;

/// `FoldParams` of `kernels/attention_fold.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    q: DevicePointer,
    k: DevicePointer,
    v: DevicePointer,
    out: DevicePointer,
    sizes: DevicePointer,
    offsets: DevicePointer,
    members: DevicePointer,
    q_strides: [i64; 2],
    k_strides: [i64; 2],
    v_strides: [i64; 2],
    out_strides: [i64; 2],
    tokens: i32,
    groups: i32,
    head_dim: i32,
    scale: f32,
}

const _: () = assert!(
    size_of::<Params>() == 136
        && std::mem::offset_of!(Params, q_strides) == 56
        && std::mem::offset_of!(Params, tokens) == 120
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// What [`attention_folded_raw`] reads and writes.
#[derive(Clone, Debug)]
pub struct Fold {
    /// (B, N, H·D).
    pub q: Strided<DevicePointer>,
    /// (B, N, H·D).
    pub k: Strided<DevicePointer>,
    /// (B, M, H·D).
    pub values: Strided<DevicePointer>,
    /// (B, M, H·D).
    pub out: Strided<DevicePointer>,
    /// H.
    pub heads: usize,
    /// Multiplies the products of queries and keys; positive.
    pub scale: f32,
    /// (B, N) `f32`.
    pub sizes: Option<DevicePointer>,
    /// Its weights and groups are not read.
    pub plan: PlanPointers,
}

/// The attention map's columns summed and its rows pooled by maximum over the groups of `plan`, times `values` (B, M,
/// H·D), into `out` (B, M, H·D) (MCTF, section 3.3, pooling by maximum). [`Attention::split`] does not matter.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit, N + M + D exceeds 24,576, or an argument lives in another context;
/// [`Error::Launch`] when the driver refuses.
pub fn attention_folded<T: Element>(
    device: &Device,
    stream: &CudaStream,
    attention: &Attention<'_, T>,
    values: &Strided<CudaView<'_, T>>,
    plan: &DevicePlan,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: OP, device, stream };
    let (q, _q) = borrow.read("q", &attention.q)?;
    let (k, _k) = borrow.read("k", &attention.k)?;
    let (values, _values) = borrow.read("values", values)?;
    let (plan, _plan) = plan.read(OP, "plan", device, stream)?;
    let (out, _out) = borrow.write("out", out)?;
    let [images, tokens, _] = q.shape;
    let sizes = attention.sizes.as_ref();
    let sizes =
        sizes.map(|sizes| borrow.read_row("sizes", sizes, images.saturating_mul(tokens))).transpose()?;
    let (heads, scale) = (attention.heads, attention.scale);
    let fold = Fold { q, k, values, out, heads, scale, sizes: sizes.as_ref().map(|(at, _)| *at), plan };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; `out` is borrowed mutably, so it is none of the others; a `DevicePlan` holds a plan.
    unsafe { attention_folded_raw(device, stream, T::DTYPE, &fold) }
}

/// [`attention_folded`] over device pointers.
///
/// # Errors
/// As [`attention_folded`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read; the plan's indices must be in range; nobody
/// else may write what is read, nor touch what is written; `out` must not overlap another tensor.
pub unsafe fn attention_folded_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    fold: &Fold,
) -> Result<()> {
    let Fold { q, k, values, out, heads, scale, sizes, plan } = fold;
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    let head_dim = check_heads(OP, dtype, q, k, *heads, *scale)?;
    let [images, tokens, width] = q.shape;
    plan.check(OP, "plan")?;
    values.check(OP, "values", dtype)?;
    out.check_output(OP, "out", dtype)?;
    values.expect_shape(OP, "values", [images, plan.tokens_out, width])?;
    out.expect_shape(OP, "out", values.shape)?;
    sizes.map_or(Ok(()), |sizes| check_pointer(OP, "sizes", sizes, 4))?;
    if (plan.batch, plan.tokens_in) != (images, tokens) {
        return Err(Error::argument(
            OP,
            format!(
                "the plan takes {} images of {} tokens, not {images} of {tokens}",
                plan.batch, plan.tokens_in
            ),
        ));
    }
    let bytes = 4 * tokens.saturating_add(plan.tokens_out).saturating_add(head_dim);
    if bytes > FOLD_BYTES {
        return Err(Error::argument(
            OP,
            format!(
                "{tokens} tokens that become {} need {bytes} bytes of shared memory, at most {FOLD_BYTES}",
                plan.tokens_out
            ),
        ));
    }
    let groups = int(OP, "tokens", plan.tokens_out)?;
    let params = Params {
        q: q.data,
        k: k.data,
        v: values.data,
        out: out.data,
        sizes: sizes.unwrap_or(0),
        offsets: plan.offsets,
        members: plan.members,
        q_strides: q.kernel_strides(),
        k_strides: k.kernel_strides(),
        v_strides: values.kernel_strides(),
        out_strides: out.kernel_strides(),
        tokens: int(OP, "tokens", tokens)?,
        groups,
        head_dim: int(OP, "values a head", head_dim)?,
        scale: *scale,
    };
    let size = |what: &str, n: usize| int(OP, what, n).map(i32::unsigned_abs);
    let grid = Grid {
        blocks: [groups.unsigned_abs(), size("heads", *heads)?, size("images", images)?],
        block: THREADS,
        shared_bytes: size("bytes", bytes)?,
    };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch_grid(stream, device.kernels().attention.fold(dtype), grid, &params) }
}
