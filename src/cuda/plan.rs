//! Token plans in device memory, and their composition (kernels/plan.cu).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, SyncOnDrop};

use super::{
    Device, DevicePointer,
    device::driver,
    launch::{Shape, int, launch},
    nvtx,
    strided::check_pointer,
};
use crate::{Error, Result, TokenPlan};

const OP: &str = "compose";

/// The most tokens, before or after, that [`compose`] takes.
pub const MOST_TOKENS: usize = 16_384;

/// Threads of the composition's blocks.
const THREADS: u32 = 256;

/// A [`TokenPlan`] in device memory: its three arrays, and as a fourth its inverse, the output token of each input token,
/// which un-merging and composing need.
///
/// Only kernels and uploads write a plan, so what is in it can be trusted: its indices are in range.
#[derive(Debug)]
pub struct DevicePlan {
    batch: usize,
    tokens_in: usize,
    tokens_out: usize,
    offsets: CudaSlice<i32>,
    members: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    groups: CudaSlice<i32>,
}

/// The arrays of a plan, for the `unsafe` entry points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanPointers {
    /// Images B.
    pub batch: usize,
    /// Input tokens N of each image.
    pub tokens_in: usize,
    /// Output tokens M of each image.
    pub tokens_out: usize,
    /// Row starts, (B, M+1) `i32`.
    pub offsets: DevicePointer,
    /// Input token ids grouped by output token, ascending in each, (B, N) `i32`; -1 behind the last group.
    pub members: DevicePointer,
    /// The weight of each member, (B, N) `f32`; 0 behind the last group.
    pub weights: DevicePointer,
    /// The output token of each input token, (B, N) `i32`; -1 for dropped ones.
    pub groups: DevicePointer,
}

/// The guards of a plan's four arrays.
pub(super) type PlanGuards<'a> = [SyncOnDrop<'a>; 4];

impl DevicePlan {
    /// A plan in which every output token has no members, to be filled by an operation. Allocates and clears its arrays
    /// on `stream`.
    ///
    /// # Errors
    /// [`Error::Argument`] when an extent is 0 or not addressable; [`Error::Driver`] when memory runs out.
    pub fn new(stream: &Arc<CudaStream>, batch: usize, tokens_in: usize, tokens_out: usize) -> Result<Self> {
        let members = batch.checked_mul(tokens_in).filter(|&n| n > 0 && i32::try_from(n).is_ok());
        let offsets = batch.checked_mul(tokens_out.saturating_add(1)).filter(|&n| i32::try_from(n).is_ok());
        let (Some(members), Some(offsets), true) = (members, offsets, tokens_out <= tokens_in) else {
            return Err(Error::argument(
                "token plan",
                format!("no device plan turns {batch} images of {tokens_in} tokens into {tokens_out}"),
            ));
        };
        let failed = |error: DriverError| driver("allocating a token plan", error);
        Ok(Self {
            batch,
            tokens_in,
            tokens_out,
            offsets: stream.alloc_zeros(offsets).map_err(failed)?,
            members: stream.clone_htod(&vec![-1; members]).map_err(failed)?,
            weights: stream.alloc_zeros(members).map_err(failed)?,
            groups: stream.clone_htod(&vec![-1; members]).map_err(failed)?,
        })
    }

    /// Copies a plan to the device.
    ///
    /// # Errors
    /// As [`DevicePlan::new`].
    pub fn upload(stream: &Arc<CudaStream>, plan: &TokenPlan) -> Result<Self> {
        let mut device = Self::new(stream, plan.batch(), plan.tokens_in(), plan.tokens_out())?;
        let groups: Vec<i32> = (0..plan.batch()).flat_map(|image| plan.group_of(image)).collect();
        let failed = |error: DriverError| driver("copying a token plan to the device", error);
        stream.memcpy_htod(plan.offsets(), &mut device.offsets).map_err(failed)?;
        stream.memcpy_htod(plan.members(), &mut device.members).map_err(failed)?;
        stream.memcpy_htod(plan.weights(), &mut device.weights).map_err(failed)?;
        stream.memcpy_htod(&groups, &mut device.groups).map_err(failed)?;
        Ok(device)
    }

    /// Copies the plan to the host; waits for `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`] when a copy or a launch before it failed; [`Error::Argument`] when the arrays are no plan.
    pub fn download(&self, stream: &Arc<CudaStream>) -> Result<TokenPlan> {
        let failed = |error: DriverError| driver("copying a token plan from the device", error);
        let offsets = stream.clone_dtoh(&self.offsets).map_err(failed)?;
        let members = stream.clone_dtoh(&self.members).map_err(failed)?;
        let weights = stream.clone_dtoh(&self.weights).map_err(failed)?;
        TokenPlan::new(self.batch, self.tokens_in, self.tokens_out, offsets, members, weights)
    }

    /// Copies the output token of each input token, (B, N), -1 for dropped ones; waits for `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`] when the copy or a launch before it failed.
    pub fn download_groups(&self, stream: &Arc<CudaStream>) -> Result<Vec<i32>> {
        stream.clone_dtoh(&self.groups).map_err(|error| driver("copying a token plan from the device", error))
    }

    /// Images B.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Input tokens N of each image.
    pub fn tokens_in(&self) -> usize {
        self.tokens_in
    }

    /// Output tokens M of each image.
    pub fn tokens_out(&self) -> usize {
        self.tokens_out
    }

    /// Row starts, (B, M+1): for kernels of the caller's own, and for the `unsafe` entry points.
    pub fn offsets(&self) -> &CudaSlice<i32> {
        &self.offsets
    }

    /// Input token ids grouped by output token, (B, N); -1 behind the last group.
    pub fn members(&self) -> &CudaSlice<i32> {
        &self.members
    }

    /// The weight of each member, (B, N).
    pub fn weights(&self) -> &CudaSlice<f32> {
        &self.weights
    }

    /// The output token of each input token, (B, N); -1 for dropped ones.
    pub fn groups(&self) -> &CudaSlice<i32> {
        &self.groups
    }

    /// The addresses to read from on `stream`, and what must live until that has been submitted.
    pub(super) fn read<'a>(
        &'a self,
        op: &'static str,
        name: &str,
        device: &Device,
        stream: &'a CudaStream,
    ) -> Result<(PlanPointers, PlanGuards<'a>)> {
        device.check_context(op, name, self.offsets.context())?;
        let (offsets, offsets_guard) = self.offsets.device_ptr(stream);
        let (members, members_guard) = self.members.device_ptr(stream);
        let (weights, weights_guard) = self.weights.device_ptr(stream);
        let (groups, groups_guard) = self.groups.device_ptr(stream);
        let &Self { batch, tokens_in, tokens_out, .. } = self;
        let pointers = PlanPointers { batch, tokens_in, tokens_out, offsets, members, weights, groups };
        Ok((pointers, [offsets_guard, members_guard, weights_guard, groups_guard]))
    }

    /// The addresses to write to on `stream`, and what must live until that has been submitted.
    pub(super) fn write<'a>(
        &'a mut self,
        op: &'static str,
        name: &str,
        device: &Device,
        stream: &'a CudaStream,
    ) -> Result<(PlanPointers, PlanGuards<'a>)> {
        device.check_context(op, name, self.offsets.context())?;
        let (batch, tokens_in, tokens_out) = (self.batch, self.tokens_in, self.tokens_out);
        let (offsets, offsets_guard) = self.offsets.device_ptr_mut(stream);
        let (members, members_guard) = self.members.device_ptr_mut(stream);
        let (weights, weights_guard) = self.weights.device_ptr_mut(stream);
        let (groups, groups_guard) = self.groups.device_ptr_mut(stream);
        let pointers = PlanPointers { batch, tokens_in, tokens_out, offsets, members, weights, groups };
        Ok((pointers, [offsets_guard, members_guard, weights_guard, groups_guard]))
    }
}

impl PlanPointers {
    /// Checks extents and addresses; what lies there is the caller's promise.
    pub(super) fn check(&self, op: &'static str, name: &str) -> Result<()> {
        let arrays = [
            ("offsets", self.offsets),
            ("members", self.members),
            ("weights", self.weights),
            ("groups", self.groups),
        ];
        for (array, pointer) in arrays {
            check_pointer(op, &format!("{name}: {array}"), pointer, 4)?;
        }
        if self.batch == 0 || self.tokens_in == 0 || self.tokens_out == 0 {
            return Err(Error::argument(
                op,
                format!(
                    "{name} turns {} images of {} tokens into {}: nothing to do",
                    self.batch, self.tokens_in, self.tokens_out
                ),
            ));
        }
        Ok(())
    }
}

/// `ComposeParams` of kernels/plan.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    first: [DevicePointer; 4],
    next: [DevicePointer; 4],
    out: [DevicePointer; 4],
    tokens: i32,
    middles: i32,
    outputs: i32,
    reserved: i32,
}

const _: () = assert!(size_of::<Params>() == 112 && std::mem::offset_of!(Params, tokens) == 96);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// The plan that does what `first` and then `next` do, into `out`. Weights multiply. What [`TokenPlan::then`] computes, to
/// the bit.
///
/// # Errors
/// [`Error::Argument`] when the plans do not follow each other, `out` has other extents, or there are more than
/// [`MOST_TOKENS`]; [`Error::Launch`] when the driver refuses.
pub fn compose(
    device: &Device,
    stream: &CudaStream,
    first: &DevicePlan,
    next: &DevicePlan,
    out: &mut DevicePlan,
) -> Result<()> {
    let (first, _first) = first.read(OP, "first", device, stream)?;
    let (next, _next) = next.read(OP, "next", device, stream)?;
    let (out, _out) = out.write(OP, "out", device, stream)?;
    // SAFETY: a `DevicePlan` owns arrays of its extents with indices in range, in the device's context; the guards
    // outlive the launch; `out` is borrowed mutably, so it is neither of the others.
    unsafe { compose_raw(device, stream, &first, &next, &out) }
}

/// [`compose`] over device pointers.
///
/// # Errors
/// As [`compose`].
///
/// # Safety
/// On `stream`, until it has passed this launch: the arrays must lie in the device's memory with the extents given,
/// `first` and `next` must hold plans (indices in range, `groups` the inverse of the others) that nobody writes, and `out`
/// must overlap neither.
pub unsafe fn compose_raw(
    device: &Device,
    stream: &CudaStream,
    first: &PlanPointers,
    next: &PlanPointers,
    out: &PlanPointers,
) -> Result<()> {
    let _range = nvtx::range(OP);
    device.check_stream(OP, stream)?;
    first.check(OP, "first")?;
    next.check(OP, "next")?;
    out.check(OP, "out")?;
    if (next.batch, next.tokens_in) != (first.batch, first.tokens_out) {
        return Err(Error::argument(
            OP,
            format!(
                "a plan for {} images of {} tokens cannot follow one that gives {} images of {}",
                next.batch, next.tokens_in, first.batch, first.tokens_out
            ),
        ));
    }
    if (out.batch, out.tokens_in, out.tokens_out) != (first.batch, first.tokens_in, next.tokens_out) {
        return Err(Error::argument(
            OP,
            format!(
                "out holds {} images of {} tokens that become {}, expected {} of {} that become {}",
                out.batch, out.tokens_in, out.tokens_out, first.batch, first.tokens_in, next.tokens_out
            ),
        ));
    }
    if first.tokens_in > MOST_TOKENS {
        return Err(Error::argument(OP, format!("{} tokens, at most {MOST_TOKENS}", first.tokens_in)));
    }
    let arrays = |plan: &PlanPointers| [plan.offsets, plan.members, plan.weights, plan.groups];
    let params = Params {
        first: arrays(first),
        next: arrays(next),
        out: arrays(out),
        tokens: int(OP, "tokens", first.tokens_in)?,
        middles: int(OP, "tokens", first.tokens_out)?,
        outputs: int(OP, "tokens", next.tokens_out)?,
        reserved: 0,
    };
    let shape = Shape {
        grid: int(OP, "images", first.batch)?.unsigned_abs(),
        block: THREADS,
        shared_bytes: 4 * params.outputs.unsigned_abs(),
    };
    // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
    unsafe { launch(stream, &device.kernels().compose, shape, &params) }
}
