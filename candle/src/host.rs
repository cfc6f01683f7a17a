//! The operations on the CPU: foveate's reference over candle's memory.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor};
use foveate::{
    HostTensor, TensorView,
    reference::{
        attention as reference_attention, matching as reference_matching, merge as reference_merge, norm,
        select as reference_select,
    },
};
use half::{bf16, f16};

use crate::{
    Attraction, Heads, Matching, Merged, Metric, Norm, Parts, Plan, Pooling, ScoreRequest, Scores, Select,
    Weighting,
    tensors::{Arguments, wrap},
};

/// `f32` values in row-major order: the tensor itself where it holds such, else a copy.
struct Dense(Tensor);

impl Dense {
    fn of(tensor: &Tensor) -> Result<Self> {
        Ok(Self(tensor.detach().to_dtype(DType::F32)?.contiguous()?))
    }

    fn of_option(tensor: Option<&Tensor>) -> Result<Option<Self>> {
        tensor.map(Self::of).transpose()
    }

    fn lock(&self) -> Locked<'_> {
        let (storage, layout) = self.0.storage_and_layout();
        Locked { storage, layout }
    }
}

/// A tensor that nobody writes while it is read.
struct Locked<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl Locked<'_> {
    fn view(&self) -> Result<TensorView<'_>> {
        let values = match (&*self.storage, self.layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(values)), Some((from, to))) => values.get(from..to),
            _ => None,
        };
        let Some(values) = values else {
            candle_core::bail!("a tensor is not what it says: {:?}", self.layout)
        };
        TensorView::new(self.layout.dims(), values).map_err(wrap)
    }
}

/// Values of the reference in candle's storage, rounded if need be.
fn store(values: Vec<f32>, dtype: DType) -> Result<Storage> {
    Ok(Storage::Cpu(match dtype {
        DType::F32 => CpuStorage::F32(values),
        DType::F16 => CpuStorage::F16(values.into_iter().map(f16::from_f32).collect()),
        DType::BF16 => CpuStorage::BF16(values.into_iter().map(bf16::from_f32).collect()),
        other => candle_core::bail!("no result is stored as {other:?}"),
    }))
}

fn tensor(arguments: &Arguments<'_>, tensor: foveate::Tensor, dtype: DType) -> Result<Tensor> {
    let shape = tensor.shape().to_vec();
    arguments.finish(store(tensor.into_data(), dtype)?, shape)
}

fn scores(arguments: &Arguments<'_>, scores: Scores<foveate::Tensor>) -> Result<Scores<Tensor>> {
    let store = |scores: Option<foveate::Tensor>| {
        scores.map(|scores| tensor(arguments, scores, DType::F32)).transpose()
    };
    Ok(Scores { class: store(scores.class)?, received: store(scores.received)? })
}

/// Calls `work` with packed heads as the reference takes them.
fn with_heads<R>(
    heads: &Heads<'_, Tensor>,
    work: impl FnOnce(&Heads<'_, TensorView<'_>>) -> foveate::Result<R>,
) -> Result<R> {
    let (packed, sizes) = (Dense::of(heads.packed)?, Dense::of_option(heads.sizes)?);
    let (packed, sizes) = (packed.lock(), sizes.as_ref().map(Dense::lock));
    let (packed, sizes) = (packed.view()?, sizes.as_ref().map(Locked::view).transpose()?);
    let &Heads { heads, head_dim, scale, .. } = heads;
    work(&Heads { packed: &packed, heads, head_dim, scale, sizes: sizes.as_ref() }).map_err(wrap)
}

pub(crate) fn attention(
    arguments: &Arguments<'_>,
    qkv: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<(Tensor, Scores<Tensor>)> {
    let (context, found) = with_heads(qkv, |qkv| reference_attention::attention(qkv, request))?;
    Ok((tensor(arguments, context, arguments.dtype)?, scores(arguments, found)?))
}

pub(crate) fn attention_parts(
    arguments: &Arguments<'_>,
    parts: &Parts<'_>,
    request: ScoreRequest,
) -> Result<(Tensor, Scores<Tensor>)> {
    let [_, _, width] = crate::tokens_shape(arguments.op, "q", parts.q)?;
    if parts.heads == 0 || !width.is_multiple_of(parts.heads) {
        candle_core::bail!("{}: rows of {width} values are not {} heads", arguments.op, parts.heads);
    }
    let detached = [parts.q, parts.k, parts.v].map(Tensor::detach);
    let packed = Tensor::cat(&detached, 2)?;
    let &Parts { heads, scale, sizes, .. } = parts;
    let heads = Heads { packed: &packed, heads, head_dim: width / heads, scale, sizes };
    attention(arguments, &heads, request)
}

pub(crate) fn attention_scores(
    arguments: &Arguments<'_>,
    qk: &Heads<'_, Tensor>,
    request: ScoreRequest,
) -> Result<Scores<Tensor>> {
    scores(arguments, with_heads(qk, |qk| reference_attention::attention_scores(qk, request))?)
}

pub(crate) fn matching(matching: &Matching<'_, Tensor>) -> Result<Plan> {
    let (factors, factor_sizes) = match &matching.attraction {
        Attraction::Cosine => (None, None),
        Attraction::MultiCriteria { informativeness, size, .. } => (Some(informativeness.0), size.0),
    };
    let (sizes, received) = match &matching.weighting {
        Weighting::Uniform => (None, None),
        Weighting::Size(sizes) => (*sizes, None),
        Weighting::SizeAndReceived(sizes, received) => (*sizes, Some(*received)),
    };
    let rows = match &matching.metric {
        Metric::Keys(_) => None,
        Metric::Rows(rows) => Some(*rows),
    };
    let dense = [rows, factors, factor_sizes, sizes, received];
    let dense = dense.into_iter().map(Dense::of_option).collect::<Result<Vec<_>>>()?;
    let locked: Vec<_> = dense.iter().map(|dense| dense.as_ref().map(Dense::lock)).collect();
    let views = locked.iter().map(|locked| locked.as_ref().map(Locked::view).transpose());
    let views = views.collect::<Result<Vec<_>>>()?;
    let [rows, factors, factor_sizes, sizes, received] = [0, 1, 2, 3, 4].map(|at| views[at].as_ref());

    let attraction = match (&matching.attraction, factors) {
        (&Attraction::MultiCriteria { tau_similarity, informativeness, size }, Some(factors)) => {
            Attraction::MultiCriteria {
                tau_similarity,
                informativeness: (factors, informativeness.1),
                size: (factor_sizes, size.1),
            }
        }
        _ => Attraction::Cosine,
    };
    let weighting = match (&matching.weighting, received) {
        (Weighting::Uniform, _) => Weighting::Uniform,
        (_, Some(received)) => Weighting::SizeAndReceived(sizes, received),
        (_, None) => Weighting::Size(sizes),
    };
    let &Matching { special, merges, both_ways, .. } = matching;
    let run = |metric: Metric<'_, TensorView<'_>>| {
        reference_matching::plan(&Matching { metric, attraction, weighting, special, merges, both_ways })
    };
    let plan = match (&matching.metric, rows) {
        (Metric::Keys(heads), _) => with_heads(heads, |heads| run(Metric::Keys(heads)))?,
        (Metric::Rows(_), Some(rows)) => run(Metric::Rows(rows)).map_err(wrap)?,
        (Metric::Rows(_), None) => candle_core::bail!("matching: there are no rows"),
    };
    Ok(Plan::on_host(plan))
}

pub(crate) fn select(select: &Select<'_, Tensor>) -> Result<Plan> {
    let scores = Dense::of(select.class_scores)?;
    let scores = scores.lock();
    let &Select { special, keep, fuse, .. } = select;
    let select = Select { class_scores: &scores.view()?, special, keep, fuse };
    Ok(Plan::on_host(reference_select::plan(&select).map_err(wrap)?))
}

pub(crate) fn merge(
    arguments: &Arguments<'_>,
    x: &Tensor,
    sizes: Option<&Tensor>,
    plan: &Plan,
    pooling: Pooling,
    following: Option<&Norm<Tensor>>,
) -> Result<Merged<Tensor>> {
    let dtype = arguments.dtype;
    let merged = {
        let (x, sizes) = (Dense::of(x)?, Dense::of_option(sizes)?);
        let (x, sizes) = (x.lock(), sizes.as_ref().map(Dense::lock));
        let (x, sizes) = (x.view()?, sizes.as_ref().map(Locked::view).transpose()?);
        reference_merge::merge(&x, sizes.as_ref(), plan.host()?, pooling, None).map_err(wrap)?
    };
    let sizes = tensor(arguments, merged.sizes, DType::F32)?;
    let Some(following) = following else {
        return Ok(Merged { tokens: tensor(arguments, merged.tokens, dtype)?, sizes, normed: None });
    };
    if dtype == DType::F32 {
        let normed = tensor(arguments, layer_norm(&merged.tokens, following)?, dtype)?;
        return Ok(Merged { tokens: tensor(arguments, merged.tokens, dtype)?, sizes, normed: Some(normed) });
    }
    // The LayerNorm is of the tokens as they are stored.
    let tokens = tensor(arguments, merged.tokens, dtype)?;
    let normed = layer_norm(&Dense::of(&tokens)?.lock().view()?, following)?;
    Ok(Merged { tokens, sizes, normed: Some(tensor(arguments, normed, dtype)?) })
}

fn layer_norm(x: &impl HostTensor, following: &Norm<Tensor>) -> Result<foveate::Tensor> {
    let (weight, bias) = (Dense::of(&following.weight)?, Dense::of_option(following.bias.as_ref())?);
    let (weight, bias) = (weight.lock(), bias.as_ref().map(Dense::lock));
    let (weight, bias) = (weight.view()?, bias.as_ref().map(Locked::view).transpose()?);
    norm::layer_norm(x, &Norm { weight, bias, eps: following.eps }).map_err(wrap)
}

pub(crate) fn unmerge(arguments: &Arguments<'_>, x: &Tensor, plan: &Plan) -> Result<Tensor> {
    let spread = reference_merge::unmerge(&Dense::of(x)?.lock().view()?, plan.host()?).map_err(wrap)?;
    tensor(arguments, spread, arguments.dtype)
}

/// The output token of each input token, (B·N).
pub(crate) fn groups(plan: &foveate::TokenPlan) -> Vec<i32> {
    (0..plan.batch()).flat_map(|image| plan.group_of(image)).collect()
}
