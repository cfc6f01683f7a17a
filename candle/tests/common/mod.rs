//! Every operation against foveate's reference, on any of candle's devices.

use candle_core::{DType, Device, Result, Tensor};
use foveate::{TokenPlan, backend::Backend, reference::Reference};
use foveate_candle::{
    Attraction, Heads, Matching, Metric, Norm, Parts, Plan, Pooling, ScoreRequest, Select, Weighting,
};

/// Numbers between -1 and 1, the same for the same seed.
pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub(crate) fn tensor(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    let values = numbers(shape.iter().product(), seed);
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Sizes and scores are positive.
pub(crate) fn positive(shape: &[usize], seed: u64, device: &Device) -> Result<Tensor> {
    let values = numbers(shape.iter().product(), seed).into_iter().map(|x| 1.0 + x.abs()).collect();
    Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu)?.to_device(device)
}

/// The same tensor where the reference reads it.
pub(crate) fn on_host(tensor: &Tensor) -> Result<foveate::Tensor> {
    let shape = tensor.dims().to_vec();
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(foveate::Tensor::new(&shape, tensor.flatten_all()?.to_vec1()?).unwrap())
}

/// How far an operation may be from the reference.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check {
    pub(crate) dtype: DType,
    /// Of the largest value, for results in `dtype`. 0 on the CPU, where they are the reference's, rounded.
    pub(crate) relative: f32,
    /// The same for sizes and scores.
    pub(crate) relative_f32: f32,
}

impl Check {
    /// Compares a result with the reference's.
    pub(crate) fn same(&self, what: &str, found: &Tensor, expected: &foveate::Tensor) -> Result<()> {
        let tolerance = if found.dtype() == DType::F32 { self.relative_f32 } else { self.relative };
        assert_eq!(found.dims(), expected.shape(), "{what}");
        // The reference's values, rounded as the result is.
        let rounded = Tensor::from_slice(expected.data(), expected.shape(), &Device::Cpu)?;
        let rounded = on_host(&rounded.to_dtype(found.dtype())?)?;
        let largest = rounded.data().iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (at, (&x, &y)) in on_host(found)?.data().iter().zip(rounded.data()).enumerate() {
            assert!(
                (x - y).abs() <= tolerance * largest,
                "{what}, {:?}: value {at} is {x}, expected {y} of at most {largest}",
                found.dtype()
            );
        }
        Ok(())
    }
}

pub(crate) struct Inputs {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) x: Tensor,
    pub(crate) qkv: Tensor,
    pub(crate) sizes: Tensor,
    pub(crate) received: Tensor,
    pub(crate) norm: Norm<Tensor>,
}

impl Inputs {
    pub(crate) fn new(
        [batch, tokens, heads, head_dim]: [usize; 4],
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let width = heads * head_dim;
        Ok(Self {
            batch,
            tokens,
            heads,
            head_dim,
            x: tensor(&[batch, tokens, width], 1, dtype, device)?,
            qkv: tensor(&[batch, tokens, 3 * width], 2, dtype, device)?,
            sizes: positive(&[batch, tokens], 3, device)?,
            received: positive(&[batch, heads, tokens], 4, device)?,
            norm: Norm {
                weight: tensor(&[width], 5, dtype, device)?,
                bias: Some(tensor(&[width], 6, dtype, device)?),
                eps: 1e-6,
            },
        })
    }

    pub(crate) fn view<'a>(&'a self, sizes: Option<&'a Tensor>) -> Heads<'a, Tensor> {
        let &Self { heads, head_dim, .. } = self;
        Heads { packed: &self.qkv, heads, head_dim, scale: 0.25, sizes }
    }

    /// The same for the reference.
    pub(crate) fn reference<'a>(
        &self,
        packed: &'a foveate::Tensor,
        sizes: Option<&'a foveate::Tensor>,
    ) -> Heads<'a, foveate::Tensor> {
        let &Self { heads, head_dim, .. } = self;
        Heads { packed, heads, head_dim, scale: 0.25, sizes }
    }
}

pub(crate) const BOTH: ScoreRequest = ScoreRequest { class: true, received: true };

/// Attention, packed and in parts, and its scores alone.
pub(crate) fn attention(inputs: &Inputs, check: &Check) -> Result<()> {
    let reference = Reference::new();
    let (qkv, sizes) = (on_host(&inputs.qkv)?, on_host(&inputs.sizes)?);
    let width = inputs.heads * inputs.head_dim;
    for with_sizes in [false, true] {
        let given = with_sizes.then_some(&inputs.sizes);
        let known = with_sizes.then_some(&sizes);
        let (context, scores) = reference.attention(&inputs.reference(&qkv, known), BOTH).unwrap();
        let (class, received) = (scores.class.unwrap(), scores.received.unwrap());

        let (found, scores) = foveate_candle::attention(&inputs.view(given), BOTH)?;
        assert_eq!(found.dtype(), check.dtype);
        check.same("attention", &found, &context)?;
        check.same("class scores", &scores.class.unwrap(), &class)?;
        check.same("attention received", &scores.received.unwrap(), &received)?;

        let part = |at: usize| inputs.qkv.narrow(2, at * width, width);
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let parts = Parts { q: &q, k: &k, v: &v, heads: inputs.heads, scale: 0.25, sizes: given };
        let (found, scores) =
            foveate_candle::attention_parts(&parts, ScoreRequest { received: false, ..BOTH })?;
        check.same("attention of parts", &found, &context)?;
        check.same("class scores of parts", &scores.class.unwrap(), &class)?;
        assert!(scores.received.is_none());

        let qk = inputs.qkv.narrow(2, 0, 2 * width)?;
        let view = Heads { packed: &qk, ..inputs.view(given) };
        let scores = foveate_candle::attention_scores(&view, ScoreRequest { class: false, ..BOTH })?;
        check.same("received alone", &scores.received.unwrap(), &received)?;
        assert!(scores.class.is_none());
        assert!(foveate_candle::attention_scores(&view, ScoreRequest::default())?.class.is_none());
    }
    Ok(())
}

/// Plans are compared exactly, but for their weights, which are sums in another order on a device.
pub(crate) fn same_plan(what: &str, found: &Plan, expected: &TokenPlan, relative: f32) -> Result<()> {
    let groups: Vec<i32> = (0..expected.batch()).flat_map(|image| expected.group_of(image)).collect();
    assert_eq!(found.groups()?.flatten_all()?.to_vec1::<i32>()?, groups, "{what}");
    let found = found.to_host()?;
    assert_eq!(found.offsets(), expected.offsets(), "{what}");
    assert_eq!(found.members(), expected.members(), "{what}");
    for (x, y) in found.weights().iter().zip(expected.weights()) {
        assert!((x - y).abs() <= relative * y.abs(), "{what}: a weight of {x}, expected {y}");
    }
    Ok(())
}

/// Matchings of ToMe and of MCTF.
pub(crate) fn matching(inputs: &Inputs, check: &Check) -> Result<()> {
    let reference = Reference::new();
    let (x, qkv) = (on_host(&inputs.x)?, on_host(&inputs.qkv)?);
    let (sizes, received) = (on_host(&inputs.sizes)?, on_host(&inputs.received)?);
    let most = (inputs.tokens - 1) / 2;
    for merges in [0, most.min(1), most] {
        let view = inputs.view(None);
        let tome = foveate_candle::matching(&Matching {
            metric: Metric::Keys(&view),
            attraction: Attraction::Cosine,
            weighting: Weighting::Size(Some(&inputs.sizes)),
            special: 1,
            merges,
            both_ways: false,
        })?;
        let expected = reference.matching(&Matching {
            metric: Metric::Keys(&inputs.reference(&qkv, None)),
            attraction: Attraction::Cosine,
            weighting: Weighting::Size(Some(&sizes)),
            special: 1,
            merges,
            both_ways: false,
        });
        same_plan("ToMe's matching", &tome, &expected.unwrap(), check.relative_f32)?;

        let mctf = foveate_candle::matching(&Matching {
            metric: Metric::Rows(&inputs.x),
            attraction: Attraction::MultiCriteria {
                tau_similarity: 1.0,
                informativeness: (&inputs.received, 2.0),
                size: (Some(&inputs.sizes), 0.5),
            },
            weighting: Weighting::SizeAndReceived(Some(&inputs.sizes), &inputs.received),
            special: 1,
            merges,
            both_ways: true,
        })?;
        let expected = reference.matching(&Matching {
            metric: Metric::Rows(&x),
            attraction: Attraction::MultiCriteria {
                tau_similarity: 1.0,
                informativeness: (&received, 2.0),
                size: (Some(&sizes), 0.5),
            },
            weighting: Weighting::SizeAndReceived(Some(&sizes), &received),
            special: 1,
            merges,
            both_ways: true,
        });
        same_plan("MCTF's matching", &mctf, &expected.unwrap(), check.relative_f32)?;
    }
    Ok(())
}

/// EViT's selection.
pub(crate) fn select(inputs: &Inputs, check: &Check) -> Result<()> {
    let scores = on_host(&inputs.received)?;
    for (keep, fuse) in
        [(0, true), (inputs.tokens / 2, true), (inputs.tokens / 2, false), (inputs.tokens - 1, true)]
    {
        let select = Select { class_scores: &inputs.received, special: 1, keep, fuse };
        let found = foveate_candle::select(&select)?;
        let expected =
            Reference::new().select(&Select { class_scores: &scores, special: 1, keep, fuse }).unwrap();
        same_plan("a selection", &found, &expected, check.relative_f32)?;
    }
    Ok(())
}

/// Merging with and without its LayerNorm, and back.
pub(crate) fn merge(inputs: &Inputs, check: &Check) -> Result<()> {
    let (x, sizes) = (on_host(&inputs.x)?, on_host(&inputs.sizes)?);
    let scores = on_host(&inputs.received)?;
    let keep = inputs.tokens / 3;
    let reference = Reference::new();
    let select = Select { class_scores: &scores, special: 1, keep, fuse: true };
    let expected_plan = reference.select(&select).unwrap();
    let plan = Plan::from_host(expected_plan.clone(), inputs.x.device())?;
    assert_eq!(plan.to_host()?, expected_plan);
    let shape = [plan.batch(), plan.tokens_in(), plan.tokens_out()];
    assert_eq!(shape, [inputs.batch, inputs.tokens, expected_plan.tokens_out()]);
    for pooling in [Pooling::Weighted, Pooling::Max] {
        let bare = foveate_candle::merge(&inputs.x, None, &plan, pooling, None)?;
        let expected = reference.merge(&x, None, &expected_plan, pooling, None).unwrap();
        check.same("merged tokens", &bare.tokens, &expected.tokens)?;
        check.same("sizes of ones", &bare.sizes, &expected.sizes)?;
        assert!(bare.normed.is_none());

        for bias in [true, false] {
            let bias = inputs.norm.bias.clone().filter(|_| bias);
            let norm = Norm { bias, ..inputs.norm.clone() };
            let found = foveate_candle::merge(&inputs.x, Some(&inputs.sizes), &plan, pooling, Some(&norm))?;
            let expected = reference.merge(&x, Some(&sizes), &expected_plan, pooling, None).unwrap();
            check.same("merged tokens", &found.tokens, &expected.tokens)?;
            check.same("sizes", &found.sizes, &expected.sizes)?;
            // Of the tokens as they are stored.
            let norm = Norm {
                weight: on_host(&norm.weight)?,
                bias: norm.bias.as_ref().map(on_host).transpose()?,
                eps: norm.eps,
            };
            let expected = reference.layer_norm(&on_host(&found.tokens)?, &norm).unwrap();
            check.same("normed", &found.normed.unwrap(), &expected)?;
        }
        let back = foveate_candle::unmerge(&bare.tokens, &plan)?;
        let expected = reference.unmerge(&on_host(&bare.tokens)?, &expected_plan).unwrap();
        assert_eq!(on_host(&back)?, expected);
    }
    Ok(())
}

/// Where tensors lie in memory does not matter. Rearranged on the host: on a device only views are made.
pub(crate) fn layouts(inputs: &Inputs, check: &Check) -> Result<()> {
    let device = inputs.x.device();
    // Images, tokens and columns of something larger; and tokens outermost.
    let widened = |x: &Tensor| {
        let x = x.to_device(&Device::Cpu)?;
        let padded = x.pad_with_zeros(0, 1, 1)?.pad_with_zeros(1, 2, 0)?.pad_with_zeros(2, 8, 8)?;
        let padded = padded.to_device(device)?;
        padded.narrow(0, 1, inputs.batch)?.narrow(1, 2, inputs.tokens)?.narrow(2, 8, x.dim(2)?)
    };
    let swapped = |x: &Tensor| {
        let x = x.to_device(&Device::Cpu)?.transpose(0, 1)?.contiguous()?;
        x.to_device(device)?.transpose(0, 1)
    };
    let arrangements =
        [[widened(&inputs.x)?, widened(&inputs.qkv)?], [swapped(&inputs.x)?, swapped(&inputs.qkv)?]];
    for [x, qkv] in arrangements {
        let other = Inputs {
            x,
            qkv,
            sizes: inputs.sizes.clone(),
            received: inputs.received.clone(),
            norm: inputs.norm.clone(),
            ..*inputs
        };
        attention(&other, check)?;
        matching(&other, check)?;
        merge(&other, check)?;
    }
    Ok(())
}
