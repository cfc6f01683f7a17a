//! The operations on CUDA: foveate's launchers on candle's stream and memory.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CudaDevice, CudaStorage, DType, Error, Layout, Result, Storage, StorageRef, Tensor,
    cuda_backend::{
        CudaStorageSlice,
        cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop},
    },
};
use foveate::{
    TokenPlan,
    cuda::{
        self, Device, DevicePointer, PlanPointers, Strided,
        attention::{AttentionPointers, ScorePointers, Split, attention_raw, needs_log_sum_exp},
        matching::{
            Attraction as RawAttraction, MatchingPointers, MatchingScratch, Metric as RawMetric,
            Weighting as RawWeighting, chosen_values, match_tokens_raw,
        },
        merge::{MergePointers, merge_raw, unmerge_raw},
        select::{Selection, select_raw},
    },
};

use crate::{
    Attraction, Heads, Matching, Merged, Metric, Norm, Parts, Plan, Pooling, ScoreRequest, Scores, Select,
    Weighting, host,
    tensors::{Arguments, tokens_shape, wrap},
};

/// The devices whose kernels are loaded.
static LOADED: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// The kernels in the context of `stream`, loaded by the first to ask.
fn kernels(stream: &CudaStream) -> Result<Device> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = loaded.iter().find(|device| device.context() == stream.context()) {
        return Ok(device.clone());
    }
    let device = Device::with_context(stream.context().clone()).map_err(wrap)?;
    loaded.push(device.clone());
    Ok(device)
}

/// An operation on its way to the device.
struct Call<'a> {
    arguments: &'a Arguments<'a>,
    candle: &'a CudaDevice,
    stream: Arc<CudaStream>,
    device: Device,
    dtype: cuda::DType,
}

impl<'a> Call<'a> {
    fn new(arguments: &'a Arguments<'a>, candle: &'a CudaDevice) -> Result<Self> {
        let stream = candle.cuda_stream();
        let device = kernels(&stream)?;
        let dtype = match arguments.dtype {
            DType::F32 => cuda::DType::F32,
            DType::F16 => cuda::DType::F16,
            DType::BF16 => cuda::DType::Bf16,
            other => candle_core::bail!("{}: there are no kernels for {other:?}", arguments.op),
        };
        Ok(Self { arguments, candle, stream, device, dtype })
    }

    fn fail<T>(&self, what: impl std::fmt::Display) -> Result<T> {
        Err(Error::Msg(format!("{}: {what}", self.arguments.op)))
    }

    /// Room for a result, of any content.
    fn room(&self, dtype: DType, shape: &[usize]) -> Result<Room> {
        let count = shape.iter().product();
        // SAFETY: plain numbers, all of which a kernel writes before anybody reads them.
        let slice = unsafe {
            match dtype {
                DType::F32 => CudaStorageSlice::F32(self.candle.alloc(count)?),
                DType::F16 => CudaStorageSlice::F16(self.candle.alloc(count)?),
                DType::BF16 => CudaStorageSlice::BF16(self.candle.alloc(count)?),
                other => return self.fail(format_args!("no result is stored as {other:?}")),
            }
        };
        Ok(Room { slice, shape: shape.to_vec() })
    }

    fn room_if(&self, wanted: bool, dtype: DType, shape: &[usize]) -> Result<Option<Room>> {
        wanted.then(|| self.room(dtype, shape)).transpose()
    }

    fn finish(&self, room: Room) -> Result<Tensor> {
        let storage = CudaStorage { slice: room.slice, device: self.candle.clone() };
        self.arguments.finish(Storage::Cuda(storage), room.shape)
    }
}

/// A result that is still to be computed.
struct Room {
    slice: CudaStorageSlice,
    shape: Vec<usize>,
}

/// An address, and what must live until the launch has been submitted.
type Guarded<'a, P> = (P, SyncOnDrop<'a>);

impl Room {
    fn pointer<'a>(&'a mut self, stream: &'a CudaStream) -> Result<Guarded<'a, DevicePointer>> {
        match &mut self.slice {
            CudaStorageSlice::F32(slice) => Ok(slice.device_ptr_mut(stream)),
            CudaStorageSlice::F16(slice) => Ok(slice.device_ptr_mut(stream)),
            CudaStorageSlice::BF16(slice) => Ok(slice.device_ptr_mut(stream)),
            _ => candle_core::bail!("a result of another type than was made"),
        }
    }

    fn tokens<'a>(&'a mut self, stream: &'a CudaStream) -> Result<Guarded<'a, Strided<DevicePointer>>> {
        let [batch, tokens, width] = self.shape[..] else { candle_core::bail!("a result without tokens") };
        let (pointer, guard) = self.pointer(stream)?;
        Ok((Strided::new(pointer, [batch, tokens, width]), guard))
    }
}

/// A tensor that nobody writes while it is read.
struct Locked<'a> {
    name: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Locked<'a> {
    fn new(name: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { name, storage, layout }
    }

    /// The address of the first value.
    fn pointer<'s>(&'s self, call: &'s Call<'_>) -> Result<Guarded<'s, DevicePointer>> {
        let Storage::Cuda(storage) = &*self.storage else {
            return call.fail(format_args!("{} is not on a CUDA device", self.name));
        };
        let stream = &*call.stream;
        let ((base, guard), bytes) = match &storage.slice {
            CudaStorageSlice::F32(slice) => (slice.device_ptr(stream), 4),
            CudaStorageSlice::F16(slice) => (slice.device_ptr(stream), 2),
            CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream), 2),
            _ => return call.fail(format_args!("{} holds no numbers that the kernels know", self.name)),
        };
        Ok((base + (self.layout.start_offset() * bytes) as DevicePointer, guard))
    }

    /// Three axes, the last one without gaps.
    fn strided<'s>(&'s self, call: &'s Call<'_>) -> Result<Guarded<'s, Strided<DevicePointer>>> {
        let (&[batch, tokens, width], &[image, token, step]) = (self.layout.dims(), self.layout.stride())
        else {
            return call.fail(format_args!(
                "{} has shape {:?}, expected three axes",
                self.name,
                self.layout.dims()
            ));
        };
        if step != 1 && width > 1 {
            return call.fail(format_args!(
                "{} has strides {:?}: the values of a row must follow each other; call contiguous()",
                self.name,
                self.layout.stride()
            ));
        }
        let (pointer, guard) = self.pointer(call)?;
        Ok((Strided::new(pointer, [batch, tokens, width]).with_strides([image, token]), guard))
    }

    /// An array of this shape without gaps.
    fn array<'s>(&'s self, call: &'s Call<'_>, shape: &[usize]) -> Result<Guarded<'s, DevicePointer>> {
        if self.layout.dims() != shape {
            return call.fail(format_args!(
                "{} has shape {:?}, expected {shape:?}",
                self.name,
                self.layout.dims()
            ));
        }
        if !self.layout.is_contiguous() {
            return call.fail(format_args!(
                "{} has strides {:?}: its values must follow each other; call contiguous()",
                self.name,
                self.layout.stride()
            ));
        }
        self.pointer(call)
    }
}

/// The addresses without their guards.
fn address<P: Copy>(guarded: Option<&Guarded<'_, P>>) -> Option<P> {
    guarded.map(|(pointer, _)| *pointer)
}

/// What attention reads, as addresses.
struct AttentionInputs {
    q: Strided<DevicePointer>,
    k: Strided<DevicePointer>,
    v: Option<Strided<DevicePointer>>,
    heads: usize,
    scale: f32,
    sizes: Option<DevicePointer>,
}

/// Attention in all its forms.
///
/// # Safety
/// The addresses in `inputs` must be those of tensors of this call's type whose guards live.
unsafe fn attend(
    call: &Call<'_>,
    inputs: &AttentionInputs,
    request: ScoreRequest,
) -> Result<(Option<Tensor>, Scores<Tensor>)> {
    let &AttentionInputs { q, k, v, heads, scale, sizes } = inputs;
    let (stream, [batch, tokens, width]) = (&*call.stream, q.shape);
    let ScoreRequest { class, received } = request;
    if heads == 0 || !width.is_multiple_of(heads) {
        return call.fail(format_args!("rows of {width} values are not {heads} heads"));
    }
    let map = [batch, heads, tokens];
    let needed = needs_log_sum_exp(call.dtype, tokens, width / heads, class, received);
    let mut out = call.room_if(v.is_some(), call.arguments.dtype, &q.shape)?;
    let mut class = call.room_if(class, DType::F32, &map)?;
    let mut received = call.room_if(received, DType::F32, &map)?;
    let mut sums = call.room_if(needed, DType::F32, &map)?;
    {
        let target = out.as_mut().map(|out| out.tokens(stream)).transpose()?;
        let class = class.as_mut().map(|room| room.pointer(stream)).transpose()?;
        let received = received.as_mut().map(|room| room.pointer(stream)).transpose()?;
        let sums = sums.as_mut().map(|room| room.pointer(stream)).transpose()?;
        let pointers = AttentionPointers {
            q,
            k,
            values: v.zip(address(target.as_ref())),
            groups: None,
            heads,
            scale,
            sizes,
            split: Split::Auto,
            scores: ScorePointers {
                class_rows: address(class.as_ref()).map(|rows| (rows, 1)),
                received: address(received.as_ref()),
                log_sum_exp: address(sums.as_ref()),
            },
            pool: None,
        };
        // SAFETY: candle's tensors lie within their memory, which lives in the stream's context, initialised; the caller
        // vouches for their types and guards, those of the results are above; results are new memory.
        unsafe { attention_raw(&call.device, stream, call.dtype, &pointers) }.map_err(wrap)?;
    }
    let finish = |room: Option<Room>| room.map(|room| call.finish(room)).transpose();
    Ok((finish(out)?, Scores { class: finish(class)?, received: finish(received)? }))
}

/// Attention of packed heads.
fn attend_packed(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    heads: &Heads<'_, Tensor>,
    values: bool,
    request: ScoreRequest,
) -> Result<(Option<Tensor>, Scores<Tensor>)> {
    let call = Call::new(arguments, device)?;
    let packed = Locked::new("packed heads", heads.packed);
    let (packed, _packed) = packed.strided(&call)?;
    let [batch, tokens, _] = packed.shape;
    let sizes = heads.sizes.map(|sizes| Locked::new("sizes", sizes));
    let sizes = sizes.as_ref().map(|sizes| sizes.array(&call, &[batch, tokens])).transpose()?;
    let width = heads.heads * heads.head_dim;
    let part = |part: usize| Strided {
        data: packed.data + (part * width * call.dtype.bytes()) as DevicePointer,
        shape: [batch, tokens, width],
        strides: packed.strides,
    };
    let inputs = AttentionInputs {
        q: part(0),
        k: part(1),
        v: values.then(|| part(2)),
        heads: heads.heads,
        scale: heads.scale,
        sizes: address(sizes.as_ref()),
    };
    // SAFETY: parts of the packed tensor, whose width has been checked and whose guard lives.
    unsafe { attend(&call, &inputs, request) }
}

pub(crate) fn attention(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    qkv: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<(Tensor, Scores<Tensor>)> {
    match attend_packed(arguments, device, qkv, true, request)? {
        (Some(context), scores) => Ok((context, scores)),
        (None, _) => candle_core::bail!("{}: there is no result", arguments.op),
    }
}

pub(crate) fn attention_scores(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    qk: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<Scores<Tensor>> {
    Ok(attend_packed(arguments, device, qk, false, request)?.1)
}

pub(crate) fn attention_parts(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    parts: &Parts<'_>,
    request: ScoreRequest,
) -> Result<(Tensor, Scores<Tensor>)> {
    let call = Call::new(arguments, device)?;
    let [batch, tokens, _] = tokens_shape(arguments.op, "q", parts.q)?;
    let (q, k, v) = (Locked::new("q", parts.q), Locked::new("k", parts.k), Locked::new("v", parts.v));
    let ((q, _q), (k, _k), (v, _v)) = (q.strided(&call)?, k.strided(&call)?, v.strided(&call)?);
    let sizes = parts.sizes.map(|sizes| Locked::new("sizes", sizes));
    let sizes = sizes.as_ref().map(|sizes| sizes.array(&call, &[batch, tokens])).transpose()?;
    let &Parts { heads, scale, .. } = parts;
    let inputs = AttentionInputs { q, k, v: Some(v), heads, scale, sizes: address(sizes.as_ref()) };
    // SAFETY: the tensors' guards live.
    match unsafe { attend(&call, &inputs, request) }? {
        (Some(context), scores) => Ok((context, scores)),
        (None, _) => call.fail("there is no result"),
    }
}

pub(crate) fn matching(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    matching: &Matching<'_, Tensor>,
) -> Result<Plan> {
    let call = Call::new(arguments, device)?;
    let rows = Locked::new(
        "the metric",
        match &matching.metric {
            Metric::Keys(heads) => heads.packed,
            Metric::Rows(rows) => rows,
        },
    );
    let (rows, _rows) = rows.strided(&call)?;
    let [batch, tokens, _] = rows.shape;
    let metric = match &matching.metric {
        Metric::Keys(heads) => RawMetric::Keys { packed: rows, heads: heads.heads, head_dim: heads.head_dim },
        Metric::Rows(_) => RawMetric::Rows(rows),
    };
    let (factors, factor_sizes) = match &matching.attraction {
        Attraction::Cosine => (None, None),
        Attraction::MultiCriteria { informativeness, size, .. } => (Some(informativeness.0), size.0),
    };
    let (sizes, received) = match &matching.weighting {
        Weighting::Uniform => (None, None),
        Weighting::Size(sizes) => (*sizes, None),
        Weighting::SizeAndReceived(sizes, received) => (*sizes, Some(*received)),
    };
    let factors = factors.map(|tensor| Locked::new("informativeness", tensor));
    let factors = factors.as_ref().map(|scores| scores.strided(&call)).transpose()?;
    let received = received.map(|tensor| Locked::new("received attention", tensor));
    let received = received.as_ref().map(|scores| scores.strided(&call)).transpose()?;
    let factor_sizes = factor_sizes.map(|tensor| Locked::new("sizes of the attraction", tensor));
    let factor_sizes = factor_sizes.as_ref().map(|sizes| sizes.array(&call, &[batch, tokens])).transpose()?;
    let sizes = sizes.map(|tensor| Locked::new("sizes", tensor));
    let sizes = sizes.as_ref().map(|sizes| sizes.array(&call, &[batch, tokens])).transpose()?;

    let &Matching { special, merges, both_ways, .. } = matching;
    let pointers = MatchingPointers {
        metric,
        attraction: match (&matching.attraction, address(factors.as_ref())) {
            (&Attraction::MultiCriteria { tau_similarity, informativeness, size }, Some(factors)) => {
                RawAttraction::MultiCriteria {
                    tau_similarity,
                    informativeness: (factors, informativeness.1),
                    size: (address(factor_sizes.as_ref()), size.1),
                }
            }
            _ => RawAttraction::Cosine,
        },
        weighting: match (&matching.weighting, address(received.as_ref())) {
            (Weighting::Uniform, _) => RawWeighting::Uniform,
            (_, Some(received)) => RawWeighting::SizeAndReceived(address(sizes.as_ref()), received),
            (_, None) => RawWeighting::Size(address(sizes.as_ref())),
        },
        special,
        merges,
        both_ways,
    };
    // More merges than tokens are refused by the launcher, which names both.
    let mut plan = CudaPlan::new(device, batch, tokens, tokens.saturating_sub(merges).max(1))?;
    let mut arrived = device.alloc_zeros::<u32>(batch)?;
    let choices = if both_ways { chosen_values(batch, tokens) } else { 0 };
    let mut chosen = device.alloc_zeros::<u64>(choices.max(1))?;
    // SAFETY: plain numbers, which the kernels write before they read them.
    let mut stays = unsafe { device.alloc::<i32>(batch.saturating_mul(tokens.div_ceil(2)))? };
    {
        let stream = &*call.stream;
        let (arrived, _arrived) = arrived.device_ptr_mut(stream);
        let (stays, _stays) = stays.device_ptr_mut(stream);
        let (chosen, _chosen) = chosen.device_ptr_mut(stream);
        let scratch = MatchingScratch { arrived, stays, chosen, batch, tokens };
        let (plan, _plan) = plan.write(stream);
        // SAFETY: candle's tensors lie within their memory, which lives in the stream's context, initialised, of the types that
        // were checked; their guards live; plan and scratch are new memory of their extents, counters and choices cleared.
        unsafe { match_tokens_raw(&call.device, stream, call.dtype, &pointers, scratch, &plan) }
            .map_err(wrap)?;
    }
    Ok(Plan::on_cuda(plan))
}

pub(crate) fn select(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    select: &Select<'_, Tensor>,
) -> Result<Plan> {
    let call = Call::new(arguments, device)?;
    let [batch, _, tokens] = tokens_shape(arguments.op, "class scores", select.class_scores)?;
    let &Select { special, keep, fuse, .. } = select;
    let selection = Selection { special, keep, fuse };
    let scores = Locked::new("class scores", select.class_scores);
    let (scores, _scores) = scores.strided(&call)?;
    let mut plan = CudaPlan::new(device, batch, tokens, selection.tokens_out(tokens).map_err(wrap)?)?;
    {
        let (plan, _plan) = plan.write(&call.stream);
        // SAFETY: the scores lie within their memory, initialised, in the stream's context, and their guard lives; the plan is
        // new memory of its extents.
        unsafe { select_raw(&call.device, &call.stream, call.dtype, &scores, selection, &plan) }
            .map_err(wrap)?;
    }
    Ok(Plan::on_cuda(plan))
}

pub(crate) fn merge(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    x: &Tensor,
    sizes: Option<&Tensor>,
    plan: &Plan,
    pooling: Pooling,
    norm: Option<&Norm<Tensor>>,
) -> Result<Merged<Tensor>> {
    let call = Call::new(arguments, device)?;
    let plan = plan.cuda()?;
    let x = Locked::new("x", x);
    let (x, _x) = x.strided(&call)?;
    let [batch, tokens, width] = x.shape;
    let sizes = sizes.map(|sizes| Locked::new("sizes", sizes));
    let sizes = sizes.as_ref().map(|sizes| sizes.array(&call, &[batch, tokens])).transpose()?;
    let weight = norm.map(|norm| Locked::new("weight", &norm.weight));
    let weight = weight.as_ref().map(|weight| weight.array(&call, &[width])).transpose()?;
    let bias = norm.and_then(|norm| norm.bias.as_ref()).map(|bias| Locked::new("bias", bias));
    let bias = bias.as_ref().map(|bias| bias.array(&call, &[width])).transpose()?;
    let merged = [batch, plan.tokens_out().max(1), width];
    let mut tokens_out = call.room(arguments.dtype, &merged)?;
    let mut sizes_out = call.room(DType::F32, &merged[..2])?;
    let mut normed = call.room_if(norm.is_some(), arguments.dtype, &merged)?;
    {
        let stream = &*call.stream;
        let (tokens_out, _tokens) = tokens_out.tokens(stream)?;
        let (sizes_out, _sizes) = sizes_out.pointer(stream)?;
        let normed = normed.as_mut().map(|normed| normed.tokens(stream)).transpose()?;
        let (plan, _plan) = plan.read(stream);
        let parameters = norm.zip(address(weight.as_ref())).map(|(norm, weight)| Norm {
            weight,
            bias: address(bias.as_ref()),
            eps: norm.eps,
        });
        let pointers = MergePointers {
            x,
            sizes: address(sizes.as_ref()),
            plan,
            pooling,
            tokens_out,
            sizes_out,
            norm: parameters.zip(address(normed.as_ref())),
        };
        // SAFETY: candle's tensors lie within their memory, which lives in the stream's context, initialised, of the types that
        // were checked; their guards live; the plan was written by a kernel or checked when it was made; results are new.
        unsafe { merge_raw(&call.device, stream, call.dtype, &pointers) }.map_err(wrap)?;
    }
    Ok(Merged {
        tokens: call.finish(tokens_out)?,
        sizes: call.finish(sizes_out)?,
        normed: normed.map(|normed| call.finish(normed)).transpose()?,
    })
}

pub(crate) fn unmerge(
    arguments: &Arguments<'_>,
    device: &CudaDevice,
    x: &Tensor,
    plan: &Plan,
) -> Result<Tensor> {
    let call = Call::new(arguments, device)?;
    let plan = plan.cuda()?;
    let x = Locked::new("x", x);
    let (x, _x) = x.strided(&call)?;
    let mut out = call.room(arguments.dtype, &[x.shape[0], plan.tokens_in(), x.shape[2]])?;
    {
        let stream = &*call.stream;
        let (target, _target) = out.tokens(stream)?;
        let (plan, _plan) = plan.read(stream);
        // SAFETY: as in `merge`.
        unsafe { unmerge_raw(&call.device, stream, call.dtype, &x, &plan, &target) }.map_err(wrap)?;
    }
    call.finish(out)
}

/// A token plan in candle's memory.
#[derive(Debug)]
pub(crate) struct CudaPlan {
    batch: usize,
    tokens_in: usize,
    tokens_out: usize,
    /// Offsets, members, the bits of the weights, and groups, one after the other.
    words: CudaSlice<i32>,
    device: CudaDevice,
}

impl CudaPlan {
    /// A plan of any content, for a kernel to write.
    fn new(device: &CudaDevice, batch: usize, tokens_in: usize, tokens_out: usize) -> Result<Self> {
        let row = tokens_in.checked_mul(3).and_then(|n| n.checked_add(tokens_out)?.checked_add(1));
        let words = row.and_then(|row| row.checked_mul(batch)).filter(|&n| n > 0 && i32::try_from(n).is_ok());
        let Some(words) = words else {
            candle_core::bail!(
                "token plan: none turns {batch} images of {tokens_in} tokens into {tokens_out} on a device"
            );
        };
        // SAFETY: plain numbers, all of which a kernel or a copy writes before anybody reads them.
        let words = unsafe { device.alloc(words)? };
        Ok(Self { batch, tokens_in, tokens_out, words, device: device.clone() })
    }

    pub(crate) fn upload(device: &CudaDevice, plan: &TokenPlan) -> Result<Self> {
        let mut on_device = Self::new(device, plan.batch(), plan.tokens_in(), plan.tokens_out())?;
        let weights = plan.weights().iter().map(|weight| weight.to_bits().cast_signed());
        let words = plan.offsets().iter().chain(plan.members()).copied().chain(weights);
        let words: Vec<i32> = words.chain(host::groups(plan)).collect();
        device.memcpy_htod(&words, &mut on_device.words)?;
        Ok(on_device)
    }

    pub(crate) fn download(&self) -> Result<TokenPlan> {
        let words = self.device.clone_dtoh(&self.words)?;
        let [members, weights, groups] = self.places();
        TokenPlan::new(
            self.batch,
            self.tokens_in,
            self.tokens_out,
            words[..members].to_vec(),
            words[members..weights].to_vec(),
            words[weights..groups].iter().map(|bits| f32::from_bits(bits.cast_unsigned())).collect(),
        )
        .map_err(wrap)
    }

    /// The output token of each input token.
    pub(crate) fn groups(&self, shape: (usize, usize)) -> Result<Tensor> {
        let [.., groups] = self.places();
        // SAFETY: plain numbers, which the copy writes.
        let mut copy = unsafe { self.device.alloc::<i32>(self.batch * self.tokens_in)? };
        self.device.memcpy_dtod(&self.words.slice(groups..), &mut copy)?;
        let storage = CudaStorage { slice: CudaStorageSlice::I32(copy), device: self.device.clone() };
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, candle_core::op::BackpropOp::none(), false))
    }

    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub(crate) fn batch(&self) -> usize {
        self.batch
    }

    pub(crate) fn tokens_in(&self) -> usize {
        self.tokens_in
    }

    pub(crate) fn tokens_out(&self) -> usize {
        self.tokens_out
    }

    /// Where members, weights and groups begin, in words.
    fn places(&self) -> [usize; 3] {
        let (offsets, row) = (self.batch * (self.tokens_out + 1), self.batch * self.tokens_in);
        [offsets, offsets + row, offsets + 2 * row]
    }

    fn at(&self, offsets: DevicePointer) -> PlanPointers {
        let &Self { batch, tokens_in, tokens_out, .. } = self;
        let [members, weights, groups] = self.places().map(|place| offsets + 4 * place as DevicePointer);
        PlanPointers { batch, tokens_in, tokens_out, offsets, members, weights, groups }
    }

    fn read<'a>(&'a self, stream: &'a CudaStream) -> Guarded<'a, PlanPointers> {
        let (offsets, guard) = self.words.device_ptr(stream);
        (self.at(offsets), guard)
    }

    fn write<'a>(&'a mut self, stream: &'a CudaStream) -> Guarded<'a, PlanPointers> {
        let &mut Self { batch, tokens_in, tokens_out, .. } = self;
        let [members, weights, groups] = self.places();
        let (offsets, guard) = self.words.device_ptr_mut(stream);
        let at = |place: usize| offsets + 4 * place as DevicePointer;
        let pointers = PlanPointers {
            batch,
            tokens_in,
            tokens_out,
            offsets,
            members: at(members),
            weights: at(weights),
            groups: at(groups),
        };
        (pointers, guard)
    }
}
