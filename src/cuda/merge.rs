//! Applying a token plan with the LayerNorm that follows, and undoing it (kernels/merge.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePlan, DevicePointer, Element, PlanPointers, Strided,
    borrow::Borrow,
    image::RowTypes,
    launch::{Shape, int, launch, rows},
    nvtx,
    strided::{check_pointer, is_wide},
};
use crate::{
    Error, Result,
    backend::{Norm, Pooling},
};

const MERGE: &str = "merge";
const UNMERGE: &str = "unmerge";

/// `MergeParams` of kernels/merge.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct MergeParams {
    x: DevicePointer,
    sizes: DevicePointer,
    offsets: DevicePointer,
    members: DevicePointer,
    weights: DevicePointer,
    norm_weight: DevicePointer,
    norm_bias: DevicePointer,
    tokens_out: DevicePointer,
    sizes_out: DevicePointer,
    normed: DevicePointer,
    x_strides: [i64; 2],
    tokens_out_strides: [i64; 2],
    normed_strides: [i64; 2],
    rows: i32,
    tokens_in: i32,
    groups: i32,
    width: i32,
    maximum: i32,
    eps: f32,
}

const _: () = assert!(
    size_of::<MergeParams>() == 152
        && std::mem::offset_of!(MergeParams, x_strides) == 80
        && std::mem::offset_of!(MergeParams, rows) == 128
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for MergeParams {}

/// `UnmergeParams` of kernels/merge.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct UnmergeParams {
    x: DevicePointer,
    groups: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    rows: i32,
    tokens: i32,
    units: i32,
    reserved: i32,
}

const _: () = assert!(
    size_of::<UnmergeParams>() == 72
        && std::mem::offset_of!(UnmergeParams, x_strides) == 24
        && std::mem::offset_of!(UnmergeParams, rows) == 56
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for UnmergeParams {}

/// What [`merge`] reads.
#[derive(Debug)]
pub struct Merge<'a, T, O = T> {
    /// Tokens, (B, N, C).
    pub x: Strided<CudaView<'a, T>>,
    /// Their sizes, (B, N); 1 when absent.
    pub sizes: Option<CudaView<'a, f32>>,
    /// Who becomes what.
    pub plan: &'a DevicePlan,
    /// How members are combined.
    pub pooling: Pooling,
    /// The LayerNorm that follows.
    /// Its type has to be named where there is none: `Merge<'_, f32>`.
    pub norm: Option<Norm<CudaView<'a, O>>>,
}

/// What [`merge`] writes.
#[derive(Debug)]
pub struct Merged<'a, T, O = T> {
    /// The output tokens, (B, M, C).
    pub tokens: Strided<CudaViewMut<'a, T>>,
    /// How many input tokens each stands for, (B, M).
    pub sizes: CudaViewMut<'a, f32>,
    /// The LayerNorm of the output tokens as stored, (B, M, C); present exactly when a LayerNorm is asked for.
    pub normed: Option<Strided<CudaViewMut<'a, O>>>,
}

/// What [`merge_raw`] reads and writes; the fields of [`Merge`] and [`Merged`].
#[derive(Clone, Debug)]
pub struct MergePointers {
    /// (B, N, C).
    pub x: Strided<DevicePointer>,
    /// (B, N) `f32`.
    pub sizes: Option<DevicePointer>,
    /// The plan; its `groups` are not read.
    pub plan: PlanPointers,
    /// How members are combined.
    pub pooling: Pooling,
    /// (B, M, C).
    pub tokens_out: Strided<DevicePointer>,
    /// (B, M) `f32`.
    pub sizes_out: DevicePointer,
    /// The LayerNorm that follows, and where it goes, (B, M, C).
    pub norm: Option<(Norm<DevicePointer>, Strided<DevicePointer>)>,
}

/// Applies a plan to tokens and their sizes, with the LayerNorm that follows (of their type, or from `f32` to 16 bits), in one
/// launch.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit each other or the plan, `C` exceeds 4,096, or an argument lives in another
/// context; [`Error::Launch`] when the driver refuses.
pub fn merge<T: Element, O: Element>(
    device: &Device,
    stream: &CudaStream,
    merge: &Merge<'_, T, O>,
    out: &mut Merged<'_, T, O>,
) -> Result<()> {
    let borrow = Borrow { op: MERGE, device, stream };
    let (x, _x) = borrow.read("x", &merge.x)?;
    let (plan, _plan) = merge.plan.read(MERGE, "plan", device, stream)?;
    let sizes = merge.sizes.as_ref();
    let sizes =
        sizes.map(|sizes| borrow.read_row("sizes", sizes, plan.batch * plan.tokens_in)).transpose()?;
    let norm = merge.norm.as_ref().map(|norm| borrow.read_norm(norm, x.shape[2])).transpose()?;
    let (tokens_out, _tokens) = borrow.write("tokens", &mut out.tokens)?;
    let (sizes_out, _sizes) =
        borrow.write_row("output sizes", &mut out.sizes, plan.batch * plan.tokens_out)?;
    let normed = out.normed.as_mut().map(|normed| borrow.write("normed", normed)).transpose()?;
    let norm = match (&norm, &normed) {
        (Some((norm, _)), Some((normed, _))) => Some((norm.clone(), *normed)),
        (None, None) => None,
        (asked, _) => {
            let (there, missing) =
                if asked.is_some() { ("a LayerNorm", "`normed`") } else { ("`normed`", "a LayerNorm") };
            return Err(Error::argument(MERGE, format!("{there} is given without {missing}")));
        }
    };
    let sizes_in = sizes.as_ref().map(|sizes| sizes.0);
    let pointers =
        MergePointers { x, sizes: sizes_in, plan, pooling: merge.pooling, tokens_out, sizes_out, norm };
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; outputs are borrowed mutably, so they are none of the others; a `DevicePlan` holds a plan.
    unsafe { merge_raw(device, stream, RowTypes { rows: T::DTYPE, normed: O::DTYPE }, &pointers) }
}

/// [`merge`] over device pointers.
///
/// # Errors
/// As [`merge`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and type lies, initialised where it is read; the plan's indices must be in range; nobody
/// else may write what is read, nor touch what is written; no output may overlap another tensor.
pub unsafe fn merge_raw(
    device: &Device,
    stream: &CudaStream,
    types: impl Into<RowTypes>,
    arguments: &MergePointers,
) -> Result<()> {
    let types @ RowTypes { rows: dtype, normed: after } = types.into();
    let MergePointers { x, sizes, plan, pooling, tokens_out, sizes_out, norm } = arguments;
    let _range = nvtx::range(MERGE);
    device.check_stream(MERGE, stream)?;
    plan.check(MERGE, "plan")?;
    x.check(MERGE, "x", dtype)?;
    let [batch, tokens, width] = x.shape;
    if (plan.batch, plan.tokens_in) != (batch, tokens) {
        return Err(Error::argument(
            MERGE,
            format!(
                "the plan takes {} images of {} tokens, not {batch} of {tokens}",
                plan.batch, plan.tokens_in
            ),
        ));
    }
    let merged = [batch, plan.tokens_out, width];
    tokens_out.check_output(MERGE, "tokens", dtype)?;
    tokens_out.expect_shape(MERGE, "tokens", merged)?;
    sizes.map_or(Ok(()), |sizes| check_pointer(MERGE, "sizes", sizes, 4))?;
    check_pointer(MERGE, "output sizes", *sizes_out, 4)?;
    if let Some((norm, normed)) = norm {
        normed.check_output(MERGE, "normed", after)?;
        normed.expect_shape(MERGE, "normed", merged)?;
        check_pointer(MERGE, "weight", norm.weight, after.bytes())?;
        norm.bias.map_or(Ok(()), |bias| check_pointer(MERGE, "bias", bias, after.bytes()))?;
    }

    let wide = x.wide(dtype)
        && tokens_out.wide(dtype)
        && norm.as_ref().is_none_or(|(norm, normed)| {
            normed.wide(after) && is_wide(norm.weight) && norm.bias.is_none_or(is_wide)
        });
    let (kernel, row) = device.kernels().merge.pick(MERGE, types, width, wide)?;
    let rows = rows(MERGE, batch, plan.tokens_out)?;
    let params = MergeParams {
        x: x.data,
        sizes: sizes.unwrap_or(0),
        offsets: plan.offsets,
        members: plan.members,
        weights: plan.weights,
        norm_weight: norm.as_ref().map_or(0, |(norm, _)| norm.weight),
        norm_bias: norm.as_ref().and_then(|(norm, _)| norm.bias).unwrap_or(0),
        tokens_out: tokens_out.data,
        sizes_out: *sizes_out,
        normed: norm.as_ref().map_or(0, |(_, normed)| normed.data),
        x_strides: x.kernel_strides(),
        tokens_out_strides: tokens_out.kernel_strides(),
        normed_strides: norm.as_ref().map_or([0; 2], |(_, normed)| normed.kernel_strides()),
        rows,
        tokens_in: int(MERGE, "tokens", tokens)?,
        groups: int(MERGE, "tokens", plan.tokens_out)?,
        width: int(MERGE, "values a row", width)?,
        maximum: i32::from(*pooling == Pooling::Max),
        eps: norm.as_ref().map_or(0.0, |(norm, _)| norm.eps),
    };
    let shape =
        Shape { grid: rows.unsigned_abs().div_ceil(row.rows()), block: row.threads(), shared_bytes: 0 };
    // SAFETY: `MergeParams` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, kernel, shape, &params) }
}

/// Copies each output token (B, M, C) back to all members of its group, (B, N, C); dropped tokens become zero.
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit the plan, or an argument lives in another context; [`Error::Launch`] when
/// the driver refuses.
pub fn unmerge<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    plan: &DevicePlan,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: UNMERGE, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (plan, _plan) = plan.read(UNMERGE, "plan", device, stream)?;
    let (out, _out) = borrow.write("out", out)?;
    // SAFETY: as in `merge`.
    unsafe { unmerge_raw(device, stream, T::DTYPE, &x, &plan, &out) }
}

/// [`unmerge`] over device pointers.
///
/// # Errors
/// As [`unmerge`].
///
/// # Safety
/// As [`merge_raw`]; of the plan only `groups` are read.
pub unsafe fn unmerge_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: &Strided<DevicePointer>,
    plan: &PlanPointers,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(UNMERGE);
    device.check_stream(UNMERGE, stream)?;
    plan.check(UNMERGE, "plan")?;
    x.check(UNMERGE, "x", dtype)?;
    out.check_output(UNMERGE, "out", dtype)?;
    let [batch, merged, width] = x.shape;
    if (plan.batch, plan.tokens_out) != (batch, merged) {
        return Err(Error::argument(
            UNMERGE,
            format!(
                "the plan gives {} images of {} tokens, not {batch} of {merged}",
                plan.batch, plan.tokens_out
            ),
        ));
    }
    out.expect_shape(UNMERGE, "out", [batch, plan.tokens_in, width])?;

    // The widest access that suits both; strides and widths then count in accesses.
    let bytes = x.access(dtype).min(out.access(dtype));
    let units = |elements: usize| elements * dtype.bytes() / bytes;
    let strides =
        |tensor: &Strided<DevicePointer>| tensor.with_strides(tensor.strides.map(units)).kernel_strides();
    let rows = rows(UNMERGE, batch, plan.tokens_in)?;
    let params = UnmergeParams {
        x: x.data,
        groups: plan.groups,
        out: out.data,
        x_strides: strides(x),
        out_strides: strides(out),
        rows,
        tokens: int(UNMERGE, "tokens", plan.tokens_in)?,
        units: int(UNMERGE, "values a row", units(width))?,
        reserved: 0,
    };
    let shape = Shape { grid: rows.unsigned_abs().div_ceil(4), block: 128, shared_bytes: 0 };
    // SAFETY: `UnmergeParams` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, device.kernels().unmerge.pick(bytes), shape, &params) }
}
