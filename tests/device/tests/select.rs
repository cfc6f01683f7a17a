//! kernels/select.cu against the reference: plans to the bit.
#![cfg(feature = "cuda")]

use cudarc::driver::{
    CudaSlice,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use foveate::{
    backend::{Backend, KeepInPlace, Pooling, Select},
    cuda::{
        DevicePlan, Strided,
        merge::{Merge, Merged, merge},
        select::{InPlace, Selection, keep_in_place, select},
    },
    reference::Reference,
};
use foveate_device_tests::{Turn, Value, arrays, groups_of, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    heads: usize,
    tokens: usize,
    selection: Selection,
    /// How many different scores there are.
    levels: u32,
    /// Scores that are NaN, infinite, or zero of either sign.
    odd: bool,
    seed: u64,
}

fn case(tokens: &'static [usize]) -> impl Strategy<Value = Case> {
    let levels = prop::sample::select(vec![1_u32, 4, 100, 1 << 20]);
    let odd = prop::bool::weighted(0.3);
    let counts = (0_usize..6, 0.0..=1.0_f64, any::<bool>());
    (1_usize..4, 1_usize..5, prop::sample::select(tokens), counts, levels, odd, any::<u64>()).prop_map(
        |(batch, heads, tokens, (special, share, fuse), levels, odd, seed)| {
            let special = special.min(tokens);
            // A plan of no token at all is refused.
            let keep = (((tokens - special) as f64 * share).round() as usize).max(usize::from(special == 0));
            Case { batch, heads, tokens, selection: Selection { special, keep, fuse }, levels, odd, seed }
        },
    )
}

fn scores<T: Value>(case: &Case) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(case.seed);
    let value = |rng: &mut StdRng| {
        if case.odd && rng.random_bool(0.2) {
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, -1.5];
            return odd[rng.random_range(0..odd.len())];
        }
        rng.random_range(0..case.levels) as f32 / case.levels as f32
    };
    (0..case.batch * case.heads * case.tokens).map(|_| T::of(value(&mut rng)).wide()).collect()
}

type Planned = ((Vec<i32>, Vec<i32>, Vec<u32>), Vec<i32>);

fn on_device<T: Value>(turn: &Turn, case: &Case, scores: &[f32]) -> Planned {
    let stream = &turn.stream;
    let memory: CudaSlice<T> = turn.upload(scores);
    let out = case.selection.tokens_out(case.tokens).unwrap();
    let mut plan = DevicePlan::new(stream, case.batch, case.tokens, out).unwrap();
    let view = Strided::new(memory.as_view(), [case.batch, case.heads, case.tokens]);
    select(&turn.device, stream, &view, case.selection, &mut plan).unwrap();
    (arrays(&plan.download(stream).unwrap()), plan.download_groups(stream).unwrap())
}

fn reference(case: &Case, scores: Vec<f32>) -> Planned {
    let class_scores = tensor(&[case.batch, case.heads, case.tokens], scores);
    let Selection { special, keep, fuse } = case.selection;
    let plan = Reference::new().select(&Select { class_scores: &class_scores, special, keep, fuse }).unwrap();
    (arrays(&plan), groups_of(&plan))
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let scores = scores::<T>(case);
    let got = turn.in_every_order(|| on_device::<T>(turn, case, &scores));
    prop_assert_eq!(got, reference(case, scores));
    Ok(())
}

fn check_as(turn: &Turn, case: &Case, dtype: i32) -> Result<(), TestCaseError> {
    match dtype {
        0 => check::<f32>(turn, case),
        1 => check::<f16>(turn, case),
        _ => check::<bf16>(turn, case),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn ranked_plans_are_the_references(
        case in case(&[1, 2, 3, 31, 32, 33, 64, 65, 196, 197, 198, 257, 511, 512]), dtype in 0..3,
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check_as(&turn, &case, dtype)?;
        turn.end();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn sorted_plans_are_the_references(
        case in case(&[513, 514, 577, 1023, 1024, 1025, 1026, 1370, 2050]), dtype in 0..3,
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check_as(&turn, &case, dtype)?;
        turn.end();
    }
}

fn in_place<T: Value>(turn: &Turn, case: &Case, masked: bool) -> Result<(), TestCaseError> {
    let scores = scores::<T>(case);
    let &Case { batch, heads, tokens, selection: Selection { special, keep, .. }, .. } = case;
    let selection = InPlace { special, keep, masked };
    let out = selection.tokens_out(tokens).unwrap();
    let got = turn.in_every_order(|| {
        let memory: CudaSlice<T> = turn.upload(&scores);
        let mut plan = DevicePlan::new(&turn.stream, batch, tokens, out).unwrap();
        let view = Strided::new(memory.as_view(), [batch, heads, tokens]);
        keep_in_place(&turn.device, &turn.stream, &view, selection, &mut plan).unwrap();
        (arrays(&plan.download(&turn.stream).unwrap()), plan.download_groups(&turn.stream).unwrap())
    });
    let scores = tensor(&[batch, heads, tokens], scores);
    let want =
        Reference::new().keep_in_place(&KeepInPlace { scores: &scores, special, keep, masked }).unwrap();
    prop_assert_eq!(got, (arrays(&want), groups_of(&want)));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn plans_in_place_are_the_references(
        case in case(&[1, 2, 3, 31, 32, 33, 65, 197, 511, 513, 1026]), masked in any::<bool>(), dtype in 0..2,
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        if dtype == 0 { in_place::<f32>(&turn, &case, masked)? } else { in_place::<bf16>(&turn, &case, masked)? }
        turn.end();
    }
}

/// As many tokens as the sort's shared memory holds; and so many special ones that hardly anything is sorted.
#[test]
fn the_most_tokens_are_sorted() {
    let Some(turn) = Turn::new() else { return };
    for (special, keep) in [(0, 11_469), (1, 16_383), (16_383, 0), (16_384, 0)] {
        let selection = Selection { special, keep, fuse: true };
        let case = Case { batch: 1, heads: 2, tokens: 16_384, selection, levels: 3000, odd: true, seed: 11 };
        let scores = scores::<f32>(&case);
        assert_eq!(on_device::<f32>(&turn, &case, &scores), reference(&case, scores));
    }
    turn.end();
}

#[test]
fn strides_of_the_scores_are_followed() {
    let Some(turn) = Turn::new() else { return };
    // (B, H, N) as a part of (B, N, H·N'): heads outermost and gaps everywhere.
    let (batch, heads, tokens) = (2, 3, 40);
    let memory = random::<f32>(heads * (batch * (tokens + 5) + 7), 3, 1.0);
    let strides = [tokens + 5, batch * (tokens + 5) + 7];
    let at = |b: usize, h: usize, n: usize| memory[b * strides[0] + h * strides[1] + n];
    let mut dense = Vec::new();
    for b in 0..batch {
        for h in 0..heads {
            dense.extend((0..tokens).map(|n| at(b, h, n)));
        }
    }
    let selection = Selection { special: 1, keep: 20, fuse: true };
    let case = Case { batch, heads, tokens, selection, levels: 0, odd: false, seed: 0 };
    let mut plan = DevicePlan::new(&turn.stream, batch, tokens, 22).unwrap();
    let scores: CudaSlice<f32> = turn.upload(&memory);
    let view = Strided::new(scores.as_view(), [batch, heads, tokens]).with_strides(strides);
    select(&turn.device, &turn.stream, &view, selection, &mut plan).unwrap();
    let got = (arrays(&plan.download(&turn.stream).unwrap()), plan.download_groups(&turn.stream).unwrap());
    assert_eq!(got, reference(&case, dense));
    turn.end();
}

/// Selecting and merging, captured once and replayed on other scores.
#[test]
fn a_captured_graph_replays() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    // SAFETY: one stream only until tracking is switched on again: there is nothing that events would order.
    unsafe { device.context().disable_event_tracking() };
    let (batch, heads, tokens, width) = (2, 3, 65, 48);
    let selection = Selection { special: 1, keep: 30, fuse: true };
    let values = random::<f32>(batch * tokens * width, 5, 1.0);
    let x: CudaSlice<f32> = turn.upload(&values);
    let mut scores: CudaSlice<f32> = turn.upload(&vec![0.0; batch * heads * tokens]);
    let mut plan = DevicePlan::new(stream, batch, tokens, 32).unwrap();
    let mut merged: CudaSlice<f32> = turn.upload(&vec![0.0; batch * 32 * width]);
    let mut sizes: CudaSlice<f32> = turn.upload(&vec![0.0; batch * 32]);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let view = Strided::new(scores.as_view(), [batch, heads, tokens]);
    select(device, stream, &view, selection, &mut plan).unwrap();
    let arguments: Merge<'_, f32> = Merge {
        x: Strided::new(x.as_view(), [batch, tokens, width]),
        sizes: None,
        plan: &plan,
        pooling: Pooling::Weighted,
        norm: None,
    };
    let mut out = Merged {
        tokens: Strided::new(merged.as_view_mut(), [batch, 32, width]),
        sizes: sizes.as_view_mut(),
        normed: None,
    };
    merge(device, stream, &arguments, &mut out).unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");
    for seed in [1, 2] {
        let case = Case { batch, heads, tokens, selection, levels: 50, odd: false, seed };
        let chosen = self::scores::<f32>(&case);
        stream.memcpy_htod(&chosen, &mut scores).unwrap();
        graph.launch().unwrap();
        let class_scores = tensor(&[batch, heads, tokens], chosen);
        let reference = Reference::new();
        let want = reference
            .select(&Select { class_scores: &class_scores, special: 1, keep: 30, fuse: true })
            .unwrap();
        assert_eq!(arrays(&plan.download(stream).unwrap()), arrays(&want));
        let x = tensor(&[batch, tokens, width], values.clone());
        let want = reference.merge(&x, None, &want, Pooling::Weighted, None).unwrap();
        assert_eq!(turn.download(&merged), want.tokens.data());
        assert_eq!(turn.download(&sizes), want.sizes.data());
    }
    drop(graph);
    // SAFETY: as it was before.
    unsafe { device.context().enable_event_tracking() };
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let selection = Selection { special: 1, keep: 20, fuse: false };
    let case = Case { batch: 1, heads: 1, tokens: 50, selection, levels: 1 << 20, odd: false, seed: 3 };
    let mut scores = scores::<f32>(&case);
    let got = on_device::<f32>(&turn, &case, &scores);
    scores[1..].reverse();
    assert_ne!(got, reference(&case, scores), "other scores are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&[0.5; 60]);
    let run = |shape: [usize; 3], selection: Selection, out: usize| {
        let mut plan = DevicePlan::new(&turn.stream, shape[0], shape[2], out).unwrap();
        let scores = Strided::new(memory.as_view(), shape);
        select(&turn.device, &turn.stream, &scores, selection, &mut plan).unwrap_err().to_string()
    };
    let message = run([2, 3, 10], Selection { special: 1, keep: 10, fuse: false }, 10);
    assert!(message.contains("cannot keep 10 of 10 tokens of which 1 are special"), "{message}");
    let message = run([2, 3, 10], Selection { special: 1, keep: 5, fuse: true }, 6);
    assert!(message.contains("expected 2 of 10 that become 7"), "{message}");
    let message = run([2, 4, 10], Selection { special: 1, keep: 5, fuse: true }, 7);
    assert!(
        message.contains("class scores of shape [2, 4, 10] and strides [40, 10] reaches over 80"),
        "{message}"
    );
    turn.end();
}
