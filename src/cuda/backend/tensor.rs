//! Tensors and plans of the CUDA backend.

use std::sync::Arc;

use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{
    super::{DType, DevicePointer, PlanPointers, Strided},
    memory::{Memory, Space},
};
use crate::{Error, Result, Tensor, TokenPlan};

/// A tensor of [`Cuda`](super::Cuda), row-major without gaps. Clones share its memory.
#[derive(Clone, Debug)]
pub struct CudaTensor {
    shape: Vec<usize>,
    dtype: DType,
    memory: Arc<Memory>,
    /// The same in `f32`, of parameters that meet a residual stream of that type.
    exact: Option<Arc<CudaTensor>>,
}

impl CudaTensor {
    /// A tensor of any content.
    pub(super) fn new(space: &Arc<Space>, shape: &[usize], dtype: DType) -> Result<Self> {
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, &extent| bytes.checked_mul(extent));
        let bytes = bytes.filter(|&bytes| i64::try_from(bytes).is_ok());
        let bytes = bytes
            .ok_or_else(|| Error::argument("tensor", format!("shape {shape:?} is too large to address")))?;
        let memory = Arc::new(Memory::new(space, bytes)?);
        Ok(Self { shape: shape.to_vec(), dtype, memory, exact: None })
    }

    /// A tensor of the host, rounded to `dtype`.
    pub(super) fn upload(space: &Arc<Space>, tensor: &Tensor, dtype: DType) -> Result<Self> {
        let values = tensor.data();
        let memory = match dtype {
            DType::F32 => Memory::upload(space, values)?,
            DType::F16 => {
                let mut rounded = vec![f16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                Memory::upload(space, &rounded)?
            }
            DType::Bf16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                Memory::upload(space, &rounded)?
            }
        };
        Ok(Self { shape: tensor.shape().to_vec(), dtype, memory: Arc::new(memory), exact: None })
    }

    /// This tensor with the same in `f32` beside it.
    pub(super) fn with_exact(self, exact: Self) -> Self {
        Self { exact: Some(Arc::new(exact)), ..self }
    }

    /// The same in `f32`, where it is kept.
    pub(super) fn exact(&self) -> Option<&Self> {
        self.exact.as_deref()
    }

    /// The tensor's values on the host; waits for the stream.
    pub(super) fn download(&self) -> Result<Tensor> {
        self.download_first(self.shape.first().copied().unwrap_or(1))
    }

    /// Those of the first `images`.
    pub(in super::super) fn download_first(&self, images: usize) -> Result<Tensor> {
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = images.min(*first);
        }
        let count = shape.iter().product();
        let mut values = vec![0.0; count];
        match self.dtype {
            DType::F32 => values = self.memory.download(0, count)?,
            DType::F16 => self.memory.download::<f16>(0, count)?.convert_to_f32_slice(&mut values),
            DType::Bf16 => self.memory.download::<bf16>(0, count)?.convert_to_f32_slice(&mut values),
        }
        Tensor::new(&shape, values)
    }

    /// The extents, outermost axis first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What it holds.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lies in the device's memory, for launches of the caller's own on the backend's stream while the tensor is
    /// alive.
    pub fn pointer(&self) -> DevicePointer {
        self.memory.pointer()
    }

    pub(super) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// What it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The same values under another shape of as many.
    pub(super) fn reshaped(mut self, shape: &[usize]) -> Self {
        debug_assert_eq!(self.count(), shape.iter().product::<usize>());
        self.shape = shape.to_vec();
        self
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The extent of the last axis.
    pub(super) fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub(super) fn is_of(&self, space: &Arc<Space>) -> bool {
        self.memory.is_of(space)
    }

    /// A tensor to write to that has this one's content: itself when nobody else has it, else a copy.
    pub(super) fn into_own(mut self) -> Result<Self> {
        if self.memory.is_constant() || Arc::get_mut(&mut self.memory).is_none() {
            self.memory = Arc::new(self.memory.copy()?);
        }
        Ok(self)
    }

    /// Rows of the last axis as one image's tokens.
    pub(super) fn rows(&self) -> Strided<DevicePointer> {
        let width = self.width();
        let rows = self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product());
        Strided::new(self.pointer(), [1, rows, width])
    }

    /// (B, N, C) of a tensor of tokens.
    pub(super) fn tokens(&self, op: &'static str, name: &str) -> Result<Strided<DevicePointer>> {
        match *self.shape {
            [b, n, c] if b > 0 && n > 0 && c > 0 => Ok(Strided::new(self.pointer(), [b, n, c])),
            _ => Err(Error::argument(
                op,
                format!(
                    "{name} has shape {:?}, expected three axes (images, tokens, width), none empty",
                    self.shape
                ),
            )),
        }
    }

    pub(super) fn expect_shape(&self, op: &'static str, name: &str, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::argument(op, format!("{name} has shape {:?}, expected {expected:?}", self.shape)))
    }
}

/// A token plan of [`Cuda`](super::Cuda).
#[derive(Debug)]
pub struct CudaPlan {
    batch: usize,
    tokens_in: usize,
    tokens_out: usize,
    /// Offsets, members, weights and groups, one after the other.
    memory: Memory,
}

impl CudaPlan {
    /// A plan of any content, to be written by an operation.
    pub(super) fn new(space: &Arc<Space>, batch: usize, tokens_in: usize, tokens_out: usize) -> Result<Self> {
        Self::check_extents(batch, tokens_in, tokens_out)?;
        let memory = Memory::new(space, Self::extent(batch, tokens_in, tokens_out))?;
        Ok(Self { batch, tokens_in, tokens_out, memory })
    }

    fn check_extents(batch: usize, tokens_in: usize, tokens_out: usize) -> Result<()> {
        let fits = |n: usize| batch.checked_mul(n).is_some_and(|n| i32::try_from(n).is_ok());
        if !fits(tokens_in) || !fits(tokens_out.saturating_add(1)) {
            return Err(Error::argument(
                "token plan",
                format!("no device plan turns {batch} images of {tokens_in} tokens into {tokens_out}"),
            ));
        }
        Ok(())
    }

    /// Bytes of all arrays.
    fn extent(batch: usize, tokens_in: usize, tokens_out: usize) -> usize {
        4 * batch * (tokens_out + 1 + 3 * tokens_in)
    }

    /// What it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    pub(super) fn upload(space: &Arc<Space>, plan: &TokenPlan) -> Result<Self> {
        let (batch, tokens_in, tokens_out) = (plan.batch(), plan.tokens_in(), plan.tokens_out());
        Self::check_extents(batch, tokens_in, tokens_out)?;
        let memory = Memory::constant(space, Self::extent(batch, tokens_in, tokens_out))?;
        let device = Self { batch, tokens_in, tokens_out, memory };
        let groups: Vec<i32> = (0..plan.batch()).flat_map(|image| plan.group_of(image)).collect();
        let [offsets, members, weights, inverse] = device.places();
        device.memory.write(offsets, plan.offsets())?;
        device.memory.write(members, plan.members())?;
        device.memory.write(weights, plan.weights())?;
        device.memory.write(inverse, &groups)?;
        device.memory.wait()?;
        Ok(device)
    }

    pub(super) fn download(&self) -> Result<TokenPlan> {
        self.download_first(self.batch)
    }

    /// The plan of the first `images`.
    pub(in super::super) fn download_first(&self, images: usize) -> Result<TokenPlan> {
        let [offsets, members, weights, _] = self.places();
        let images = images.min(self.batch);
        let (rows, count) = (images * (self.tokens_out + 1), images * self.tokens_in);
        TokenPlan::new(
            images,
            self.tokens_in,
            self.tokens_out,
            self.memory.download(offsets, rows)?,
            self.memory.download(members, count)?,
            self.memory.download(weights, count)?,
        )
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

    /// Where its arrays lie, for launches of the caller's own on the backend's stream while the plan is alive.
    pub fn pointers(&self) -> PlanPointers {
        let &Self { batch, tokens_in, tokens_out, .. } = self;
        let [offsets, members, weights, groups] =
            self.places().map(|place| self.memory.pointer() + place as DevicePointer);
        PlanPointers { batch, tokens_in, tokens_out, offsets, members, weights, groups }
    }

    pub(super) fn is_of(&self, space: &Arc<Space>) -> bool {
        self.memory.is_of(space)
    }

    /// Byte offsets of the arrays.
    fn places(&self) -> [usize; 4] {
        let offsets = 4 * self.batch * (self.tokens_out + 1);
        let members = 4 * self.batch * self.tokens_in;
        [0, offsets, offsets + members, offsets + 2 * members]
    }
}
