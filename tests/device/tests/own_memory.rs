//! The launchers as an inference engine calls them: with a context, a stream and an arena of its own, over bare addresses.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use foveate::{
    TokenPlan,
    backend::{Attraction, Backend, Heads, Matching, Metric, Norm, Pooling, ScoreRequest, Weighting},
    cuda::{
        DType, Device, DevicePlan, DevicePointer, PlanPointers, Strided,
        attention::{AttentionPointers, ScorePointers, Split, attention_raw, needs_log_sum_exp},
        matching::{
            Attraction as RawAttraction, Matching as RawMatching, MatchingScratch, Metric as RawMetric,
            Weighting as RawWeighting, chosen_values, match_tokens_raw,
        },
        merge::{Merge, MergePointers, Merged, merge, merge_raw, unmerge_raw},
        select::{Selection, select, select_raw},
    },
    reference::Reference,
};
use foveate_device_tests::{Turn, random, tensor};

const BATCH: usize = 2;
const TOKENS: usize = 33;
const HEADS: usize = 3;
const HEAD_DIM: usize = 32;
const WIDTH: usize = HEADS * HEAD_DIM;
const MERGES: usize = 8;
const LEFT: usize = TOKENS - MERGES;

/// One allocation, cut into pieces of 256 bytes' alignment, as engines have them.
struct Arena {
    memory: CudaSlice<u8>,
    base: DevicePointer,
    used: usize,
}

impl Arena {
    fn new(stream: &Arc<CudaStream>) -> Self {
        let memory = stream.alloc_zeros::<u8>(1 << 20).unwrap();
        let base = memory.device_ptr(stream).0;
        Self { memory, base, used: 0 }
    }

    /// Room for `count` values of 4 bytes.
    fn take(&mut self, count: usize) -> DevicePointer {
        let at = self.used;
        self.used += (4 * count).next_multiple_of(256);
        assert!(self.used <= self.memory.len());
        self.base + at as DevicePointer
    }

    fn plan(&mut self) -> PlanPointers {
        PlanPointers {
            batch: BATCH,
            tokens_in: TOKENS,
            tokens_out: LEFT,
            offsets: self.take(BATCH * (LEFT + 1)),
            members: self.take(BATCH * TOKENS),
            weights: self.take(BATCH * TOKENS),
            groups: self.take(BATCH * TOKENS),
        }
    }

    fn write(&mut self, stream: &Arc<CudaStream>, at: DevicePointer, values: &[f32]) {
        let start = (at - self.base) as usize;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        stream.memcpy_htod(&bytes, &mut self.memory.slice_mut(start..start + bytes.len())).unwrap();
    }

    fn words(&self, stream: &Arc<CudaStream>, at: DevicePointer, count: usize) -> Vec<[u8; 4]> {
        let start = (at - self.base) as usize;
        let bytes = stream.clone_dtoh(&self.memory.slice(start..start + 4 * count)).unwrap();
        bytes.chunks(4).map(|word| word.try_into().unwrap()).collect()
    }

    fn floats(&self, stream: &Arc<CudaStream>, at: DevicePointer, count: usize) -> Vec<f32> {
        self.words(stream, at, count).into_iter().map(f32::from_ne_bytes).collect()
    }

    fn integers(&self, stream: &Arc<CudaStream>, at: DevicePointer, count: usize) -> Vec<i32> {
        self.words(stream, at, count).into_iter().map(i32::from_ne_bytes).collect()
    }
}

#[test]
fn a_tome_block_in_an_engines_own_arena_and_graph() {
    let Some(turn) = Turn::new() else { return };
    // Nothing of the test's device: the engine brings the context.
    let context = CudaContext::new(0).unwrap();
    let device = Device::with_context(context.clone()).unwrap();
    // One stream and no tracking, as cudarc asks of those who capture.
    // SAFETY: what is allocated from here to the end of the test is used on this one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let mut arena = Arena::new(&stream);

    let (x, qkv) =
        (random::<f32>(BATCH * TOKENS * WIDTH, 1, 1.0), random::<f32>(BATCH * TOKENS * 3 * WIDTH, 2, 1.0));
    let (weight, scale) = (random::<f32>(WIDTH, 3, 1.0), 0.2);
    let [x_at, qkv_at, weight_at, context_at, class_at] =
        [x.len(), qkv.len(), WIDTH, x.len(), BATCH * HEADS * TOKENS].map(|count| arena.take(count));
    let needed = needs_log_sum_exp(DType::F32, TOKENS, HEAD_DIM, true, false);
    let sums_at = needed.then(|| arena.take(BATCH * HEADS * TOKENS));
    let [arrived, stays, chosen] =
        [BATCH, BATCH * TOKENS.div_ceil(2), 2 * chosen_values(BATCH, TOKENS)].map(|count| arena.take(count));
    let plan = arena.plan();
    let [tokens_at, sizes_at, normed_at, back_at] =
        [BATCH * LEFT * WIDTH, BATCH * LEFT, BATCH * LEFT * WIDTH, x.len()].map(|count| arena.take(count));
    for (at, values) in [(x_at, &x), (qkv_at, &qkv), (weight_at, &weight)] {
        arena.write(&stream, at, values);
    }

    let packed = Strided::new(qkv_at, [BATCH, TOKENS, 3 * WIDTH]);
    let part = |part: usize| Strided {
        data: qkv_at + (4 * part * WIDTH) as DevicePointer,
        shape: [BATCH, TOKENS, WIDTH],
        strides: packed.strides,
    };
    let tokens = |at: DevicePointer, count: usize| Strided::new(at, [BATCH, count, WIDTH]);
    let launch = || {
        let attention = AttentionPointers {
            q: part(0),
            k: part(1),
            values: Some((part(2), tokens(context_at, TOKENS))),
            groups: None,
            heads: HEADS,
            scale,
            sizes: None,
            split: Split::Auto,
            scores: ScorePointers { class_rows: Some((class_at, 1)), received: None, log_sum_exp: sums_at },
            pool: None,
        };
        let matching = RawMatching {
            metric: RawMetric::Keys { packed, heads: HEADS, head_dim: HEAD_DIM },
            attraction: RawAttraction::Cosine,
            weighting: RawWeighting::Uniform,
            special: 1,
            merges: MERGES,
            both_ways: false,
        };
        let scratch = MatchingScratch { arrived, stays, chosen, batch: BATCH, tokens: TOKENS };
        let merging = MergePointers {
            x: tokens(x_at, TOKENS),
            sizes: None,
            plan,
            pooling: Pooling::Weighted,
            tokens_out: tokens(tokens_at, LEFT),
            sizes_out: sizes_at,
            norm: Some((Norm { weight: weight_at, bias: None, eps: 1e-6 }, tokens(normed_at, LEFT))),
        };
        // SAFETY: the arena's pieces have these extents, do not overlap, are used on this stream only and live until it has been
        // waited for; the counters were cleared with it.
        unsafe {
            attention_raw(&device, &stream, DType::F32, &attention).unwrap();
            match_tokens_raw(&device, &stream, DType::F32, &matching, scratch, &plan).unwrap();
            merge_raw(&device, &stream, DType::F32, &merging).unwrap();
            let (from, to) = (tokens(normed_at, LEFT), tokens(back_at, TOKENS));
            unmerge_raw(&device, &stream, DType::F32, &from, &plan, &to).unwrap();
        }
    };
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    launch();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    for _ in 0..2 {
        graph.launch().unwrap();
    }
    stream.synchronize().unwrap();

    let reference = Reference::new();
    let packed = tensor(&[BATCH, TOKENS, 3 * WIDTH], qkv);
    let heads = Heads { packed: &packed, heads: HEADS, head_dim: HEAD_DIM, scale, sizes: None };
    let (expected, scores) =
        reference.attention(&heads, ScoreRequest { class: true, received: false }).unwrap();
    let near = 64.0 * f32::EPSILON;
    let close = |what: &str, at: DevicePointer, expected: &[f32]| {
        for (found, expected) in arena.floats(&stream, at, expected.len()).iter().zip(expected) {
            assert!(
                (found - expected).abs() <= near * expected.abs().max(1.0),
                "{what}: {found}, expected {expected}"
            );
        }
    };
    close("attention", context_at, expected.data());
    close("class scores", class_at, scores.class.unwrap().data());
    let matching = Matching {
        metric: Metric::Keys(&heads),
        attraction: Attraction::Cosine,
        weighting: Weighting::Uniform,
        special: 1,
        merges: MERGES,
        both_ways: false,
    };
    let expected = reference.matching(&matching).unwrap();
    let found = TokenPlan::new(
        BATCH,
        TOKENS,
        LEFT,
        arena.integers(&stream, plan.offsets, BATCH * (LEFT + 1)),
        arena.integers(&stream, plan.members, BATCH * TOKENS),
        arena.floats(&stream, plan.weights, BATCH * TOKENS),
    );
    assert_eq!(found.unwrap(), expected);
    let norm = Norm { weight: tensor(&[WIDTH], weight), bias: None, eps: 1e-6 };
    let merged =
        reference.merge(&tensor(&[BATCH, TOKENS, WIDTH], x), None, &expected, Pooling::Weighted, Some(&norm));
    let merged = merged.unwrap();
    close("merged tokens", tokens_at, merged.tokens.data());
    close("sizes", sizes_at, merged.sizes.data());
    let normed = merged.normed.unwrap();
    close("normed", normed_at, normed.data());
    close("un-merged", back_at, reference.unmerge(&normed, &expected).unwrap().data());

    drop(graph);
    turn.end();
}

#[test]
fn a_plan_made_by_the_safe_launchers_can_be_read_by_the_others() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    let (shape, keep) = ([BATCH, HEADS, TOKENS], 9);
    let scores = turn.upload::<f32>(&random::<f32>(BATCH * HEADS * TOKENS, 5, 1.0));
    let selection = Selection { special: 1, keep, fuse: true };
    let left = selection.tokens_out(TOKENS).unwrap();
    let mut plan = DevicePlan::new(stream, BATCH, TOKENS, left).unwrap();
    select(device, stream, &Strided::new(scores.as_view(), shape), selection, &mut plan).unwrap();

    // The same by addresses, into slices of the caller's.
    let mut words = [BATCH * (left + 1), BATCH * TOKENS, BATCH * TOKENS]
        .map(|count| stream.alloc_zeros::<i32>(count).unwrap());
    let mut weights = stream.alloc_zeros::<f32>(BATCH * TOKENS).unwrap();
    {
        use cudarc::driver::DevicePtrMut;
        let [offsets, members, groups] = words.each_mut().map(|slice| slice.device_ptr_mut(stream));
        let (weights, _weights) = weights.device_ptr_mut(stream);
        let (scores, _scores) = scores.device_ptr(stream);
        let pointers = PlanPointers {
            batch: BATCH,
            tokens_in: TOKENS,
            tokens_out: left,
            offsets: offsets.0,
            members: members.0,
            weights,
            groups: groups.0,
        };
        // SAFETY: slices of these extents, whose guards live until the launch has been submitted.
        unsafe { select_raw(device, stream, DType::F32, &Strided::new(scores, shape), selection, &pointers) }
            .unwrap();
    }
    let host = |slice: &CudaSlice<i32>| stream.clone_dtoh(slice).unwrap();
    assert_eq!(words.each_ref().map(host), [plan.offsets(), plan.members(), plan.groups()].map(host));
    assert_eq!(stream.clone_dtoh(&weights).unwrap(), stream.clone_dtoh(plan.weights()).unwrap());

    // And the plan of the safe launcher through the bare one.
    let values = random::<f32>(BATCH * TOKENS * WIDTH, 6, 1.0);
    let x = turn.upload::<f32>(&values);
    let [mut safe, mut bare] = [(); 2].map(|()| stream.alloc_zeros::<f32>(BATCH * left * WIDTH).unwrap());
    let [mut safe_sizes, mut bare_sizes] = [(); 2].map(|()| stream.alloc_zeros::<f32>(BATCH * left).unwrap());
    let input: Merge<'_, f32> = Merge {
        x: Strided::new(x.as_view(), [BATCH, TOKENS, WIDTH]),
        sizes: None,
        plan: &plan,
        pooling: Pooling::Weighted,
        norm: None,
    };
    let mut output = Merged {
        tokens: Strided::new(safe.as_view_mut(), [BATCH, left, WIDTH]),
        sizes: safe_sizes.as_view_mut(),
        normed: None,
    };
    merge(device, stream, &input, &mut output).unwrap();
    {
        use cudarc::driver::DevicePtrMut;
        let (offsets, members, groups) = (
            plan.offsets().device_ptr(stream),
            plan.members().device_ptr(stream),
            plan.groups().device_ptr(stream),
        );
        let (weights, x) = (plan.weights().device_ptr(stream), x.device_ptr(stream));
        let (out, sizes) = (bare.device_ptr_mut(stream), bare_sizes.device_ptr_mut(stream));
        let pointers = MergePointers {
            x: Strided::new(x.0, [BATCH, TOKENS, WIDTH]),
            sizes: None,
            plan: PlanPointers {
                batch: BATCH,
                tokens_in: TOKENS,
                tokens_out: left,
                offsets: offsets.0,
                members: members.0,
                weights: weights.0,
                groups: groups.0,
            },
            pooling: Pooling::Weighted,
            tokens_out: Strided::new(out.0, [BATCH, left, WIDTH]),
            sizes_out: sizes.0,
            norm: None,
        };
        // SAFETY: as above.
        unsafe { merge_raw(device, stream, DType::F32, &pointers) }.unwrap();
    }
    assert_eq!(turn.download(&safe), turn.download(&bare));
    assert_eq!(turn.download(&safe_sizes), turn.download(&bare_sizes));
    turn.end();
}
