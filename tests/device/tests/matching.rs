//! kernels/matching.cu against the reference and against the official code's own results.
//!
//! Plans are the reference's to the bit wherever its scores are further apart than two `f32` computations of them can be;
//! elsewhere every choice is optimal within that distance (`matching_parts/check.rs` says how far that is).
#![cfg(feature = "cuda")]

mod matching_parts;

use cudarc::driver::{
    CudaSlice,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use foveate::cuda::{
    DevicePlan, Strided,
    matching::{Attraction, MOST_TOKENS, Matching, MatchingWorkspace, Metric, Weighting, match_tokens},
};
use foveate::{backend::Backend, reference::Reference};
use foveate_device_tests::{Turn, Value, random};
use half::{bf16, f16};
use matching_parts::{Case, Oddities, check::judge, golden, planned};
use proptest::prelude::*;

fn oddities() -> impl Strategy<Value = Oddities> {
    let share = || prop::sample::select(vec![0.0, 0.0, 0.0, 0.1, 0.4]);
    (share(), share(), share(), share(), share()).prop_map(|(repeats, zeros, nan, extreme, criteria)| {
        Oddities { repeats, zeros, nan, extreme, criteria }
    })
}

fn case(tokens: &'static [usize], widths: &'static [usize]) -> impl Strategy<Value = Case> {
    let temperature = || prop::sample::select(vec![0.0, 0.5, 1.0, 3.0, 20.0, 40.0]);
    let temperatures = prop::option::weighted(0.6, [temperature(), temperature(), temperature()]);
    (
        (1_usize..4, prop::sample::select(tokens), prop::sample::select(widths), 0_usize..4),
        (prop::sample::select(vec![0_usize, 0, 1, 8]), prop::sample::select(vec![0_usize, 0, 1, 8])),
        (0_usize..4, 0.0..=1.0_f64, any::<bool>()),
        (temperatures, any::<bool>(), 0_usize..3),
        (oddities(), any::<u64>()),
    )
        .prop_map(
            |((batch, tokens, width, heads), (gap, lead), (special, share, both_ways), rest, end)| {
                let special = special.min(tokens);
                let most = (tokens - special) / 2;
                let (temperatures, sized, weighting) = rest;
                Case {
                    batch,
                    tokens,
                    heads,
                    width,
                    gap,
                    lead,
                    special,
                    merges: ((most as f64 * share).round() as usize).min(tokens - 1),
                    both_ways,
                    temperatures,
                    sized,
                    weighting,
                    oddities: end.0,
                    seed: end.1,
                }
            },
        )
}

/// Whether the plan had to be the reference's to the bit.
fn check<T: Value>(turn: &Turn, case: &Case) -> bool {
    let data = case.data::<T>();
    let plan = turn.in_every_order(|| {
        let plan = case.on_device::<T>(turn, &data);
        (planned(&plan), plan)
    });
    judge(case, &data, &plan.1)
}

fn check_as(turn: &Turn, case: &Case, dtype: i32) -> bool {
    match dtype {
        0 => check::<f32>(turn, case),
        1 => check::<f16>(turn, case),
        _ => check::<bf16>(turn, case),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn small_plans_are_the_references(
        case in case(&[1, 2, 3, 4, 5, 7, 16, 31, 32, 33, 63, 64, 65], &[1, 3, 8, 20, 32, 64, 72, 96, 100, 128]),
        dtype in 0..3,
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check_as(&turn, &case, dtype);
        turn.end();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn plans_of_images_are_the_references(
        case in case(&[101, 131, 196, 197, 198, 257, 577], &[8, 24, 64, 80]), dtype in 0..3,
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let case = Case { batch: 1 + case.batch % 2, ..case };
        check_as(&turn, &case, dtype);
        turn.end();
    }
}

const TOME: Case = Case {
    batch: 2,
    tokens: 197,
    heads: 6,
    width: 64,
    gap: 0,
    lead: 0,
    special: 1,
    merges: 13,
    both_ways: false,
    temperatures: None,
    sized: true,
    weighting: 1,
    oddities: Oddities { repeats: 0.0, zeros: 0.0, nan: 0.0, extreme: 0.0, criteria: 0.0 },
    seed: 1,
};

const MCTF: Case = Case {
    heads: 0,
    width: 192,
    merges: 16,
    both_ways: true,
    temperatures: Some([1.0, 20.0, 40.0]),
    weighting: 2,
    ..TOME
};

/// The papers' own settings; that their plans can be compared to the bit shows that the checks above are not all lenient.
#[test]
fn deit_s_is_decided_and_exact() {
    let Some(turn) = Turn::new() else { return };
    let exact = (0..4).filter(|&seed| check::<f16>(&turn, &Case { seed, ..TOME })).count();
    assert!(exact >= 3, "{exact} of 4 decided");
    let one_way = Case { both_ways: false, ..MCTF };
    assert!((0..3).any(|seed| check::<bf16>(&turn, &Case { seed, ..one_way })), "one way");
    assert!((0..3).any(|seed| check::<f32>(&turn, &Case { seed, ..MCTF })), "both ways");
    turn.end();
}

/// Rows of ±1 whose lengths are powers of two: every score is exact on both sides, there are few of them, and each of the many
/// ties must go to the lower index.
#[test]
fn exact_ties_go_to_the_lower_index() {
    let Some(turn) = Turn::new() else { return };
    let reference = Reference::new();
    for (tokens, width, merges) in [(33, 4, 16), (65, 16, 20), (197, 64, 13), (577, 16, 200)] {
        for (special, both_ways, attraction) in [
            (1, false, None),
            (0, false, None),
            (2, true, None),
            (0, true, Some([1.0, 0.0, 0.0])),
            (1, true, None),
        ] {
            let case = Case {
                tokens,
                heads: 0,
                width,
                special,
                merges: merges.min((tokens - special) / 2),
                both_ways,
                temperatures: attraction,
                ..TOME
            };
            let mut data = case.data::<f16>();
            data.metric.data_mut().iter_mut().for_each(|x| *x = 1.0_f32.copysign(*x));
            let got = turn.in_every_order(|| planned(&case.on_device::<f16>(&turn, &data)));
            let want = case.with_reference(&data, |matching| planned(&reference.matching(matching).unwrap()));
            assert_eq!(got, want, "{case:?}");
        }
    }
    turn.end();
}

#[test]
fn a_large_image_takes_the_sort() {
    let Some(turn) = Turn::new() else { return };
    let large = Case { batch: 1, tokens: 1370, heads: 2, width: 16, merges: 500, ..TOME };
    check::<f16>(&turn, &large);
    check::<f32>(&turn, &Case { tokens: 1375, heads: 0, special: 0, width: 9, both_ways: true, ..large });
    turn.end();
}

/// As many tokens as there may be; rows of two values make the ties that every step of the sort has to carry.
#[test]
fn the_most_tokens_are_matched() {
    let Some(turn) = Turn::new() else { return };
    let case = Case { batch: 1, tokens: MOST_TOKENS, heads: 0, width: 2, merges: 5000, sized: false, ..TOME };
    let repeats = Oddities { repeats: 0.9, ..TOME.oddities };
    let case = Case { oddities: repeats, weighting: 0, ..case };
    let data = case.data::<f32>();
    let plan = case.on_device::<f32>(&turn, &data);
    assert_eq!((plan.tokens_in(), plan.tokens_out()), (MOST_TOKENS, MOST_TOKENS - 5000));
    judge(&case, &data, &plan);
    turn.end();
}

/// Rows whose squares leave f32's range on either side.
#[test]
fn extremes_of_the_range_are_compared_by_direction() {
    let Some(turn) = Turn::new() else { return };
    let extreme = Oddities { extreme: 0.7, ..TOME.oddities };
    for (heads, width) in [(0, 48), (2, 48), (0, 200)] {
        let case = Case { tokens: 65, heads, width, oddities: extreme, ..TOME };
        check::<f32>(&turn, &case);
        check::<bf16>(&turn, &Case { both_ways: true, special: 0, ..case });
    }
    turn.end();
}

#[test]
fn golden_files_of_tome_and_mctf() {
    let Some(turn) = Turn::new() else { return };
    assert!(golden::tome(&turn) >= 20);
    assert!(golden::mctf(&turn) >= 15);
    turn.end();
}

/// A batch is its images, whatever stands beside them.
#[test]
fn images_do_not_see_each_other() {
    let Some(turn) = Turn::new() else { return };
    for case in [Case { batch: 3, tokens: 65, ..TOME }, Case { batch: 3, tokens: 65, ..MCTF }] {
        let data = case.data::<f32>();
        let all = planned(&case.on_device::<f32>(&turn, &data));
        for image in 0..3 {
            let part = |t: &foveate::Tensor| {
                foveate_device_tests::tensor(&[&[1], &t.shape()[1..]].concat(), t.item(image).to_vec())
            };
            let data = matching_parts::Data {
                metric: part(&data.metric),
                received: part(&data.received),
                sizes: data.sizes.as_ref().map(part),
            };
            let alone = planned(&Case { batch: 1, ..case.clone() }.on_device::<f32>(&turn, &data));
            assert_eq!(alone.0.1, all.0.1[image * 65..(image + 1) * 65], "members of image {image}");
            assert_eq!(alone.0.2, all.0.2[image * 65..(image + 1) * 65], "weights of image {image}");
        }
    }
    turn.end();
}

/// Both launches of MCTF, captured once and replayed on other rows with the same workspace.
#[test]
fn a_captured_graph_replays() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    // SAFETY: one stream only until tracking is switched on again: there is nothing that events would order.
    unsafe { device.context().disable_event_tracking() };
    let case = Case { tokens: 65, width: 40, temperatures: None, weighting: 0, sized: false, ..MCTF };
    let shape = [case.batch, case.tokens, case.width];
    let mut x: CudaSlice<f32> = turn.upload(&vec![0.0; shape.iter().product()]);
    let mut workspace = MatchingWorkspace::new(stream, case.batch, case.tokens).unwrap();
    let mut plan = DevicePlan::new(stream, case.batch, case.tokens, case.tokens - case.merges).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let matching = Matching {
        metric: Metric::Rows(Strided::new(x.as_view(), shape)),
        attraction: Attraction::Cosine,
        weighting: Weighting::Uniform,
        special: case.special,
        merges: case.merges,
        both_ways: true,
    };
    match_tokens(device, stream, &matching, &mut workspace, &mut plan).unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");
    for seed in [1, 2] {
        let case = Case { seed, ..case.clone() };
        let data = case.data::<f32>();
        stream.memcpy_htod(data.metric.data(), &mut x).unwrap();
        graph.launch().unwrap();
        judge(&case, &data, &plan.download(stream).unwrap());
    }
    drop(graph);
    // SAFETY: as it was before.
    unsafe { device.context().enable_event_tracking() };
    turn.end();
}

/// A size of 3e38 beside one of 1e-42: the cube root of their ratio is a number of `f32`, the ratio is not.
#[test]
fn criteria_may_be_as_far_apart_as_their_type_reaches() {
    let Some(turn) = Turn::new() else { return };
    for temperature in [0.5, 1.0, 3.0, 40.0] {
        let temperatures = Some([0.0, 0.0, temperature]);
        let case = Case {
            batch: 1,
            tokens: 31,
            heads: 1,
            special: 0,
            merges: 4,
            temperatures,
            oddities: Oddities { criteria: 0.5, ..TOME.oddities },
            ..MCTF
        };
        (0..4).for_each(|seed| _ = check::<f32>(&turn, &Case { seed, ..case.clone() }));
    }
    turn.end();
}

/// Other rows, another partner, another weight: each would be noticed.
#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    for case in [TOME, MCTF] {
        let data = case.data::<f32>();
        let plan = case.on_device::<f32>(&turn, &data);
        let mut other = case.data::<f32>();
        let width = other.metric.width();
        other.metric.data_mut()[width..].reverse();
        let judged = std::panic::catch_unwind(|| judge(&case, &other, &plan));
        assert!(judged.is_err(), "other rows are seen");
        let unweighted = Case { weighting: 0, ..case.clone() };
        let judged = std::panic::catch_unwind(|| judge(&unweighted, &data, &plan));
        assert!(judged.is_err(), "other weights are seen");
    }
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&random::<f32>(600, 1, 1.0));
    let stream = &turn.stream;
    let rows = |shape: [usize; 3]| Strided::new(memory.as_view(), shape);
    let plain = |shape: [usize; 3], special, merges| Matching {
        metric: Metric::Rows(rows(shape)),
        attraction: Attraction::Cosine,
        weighting: Weighting::Uniform,
        special,
        merges,
        both_ways: false,
    };
    let criteria = |scores: [usize; 3], temperature: f64| Matching {
        attraction: Attraction::MultiCriteria {
            tau_similarity: temperature,
            informativeness: (rows(scores), 20.0),
            size: (None, 40.0),
        },
        ..plain([2, 10, 4], 1, 2)
    };
    let expect = |matching: &_, out: usize, images: usize, part: &str| {
        let mut workspace = MatchingWorkspace::new(stream, images, 10).unwrap();
        let mut plan = DevicePlan::new(stream, 2, 10, out).unwrap();
        let result = match_tokens(&turn.device, stream, matching, &mut workspace, &mut plan);
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part), "`{message}` should say `{part}`");
    };
    expect(
        &plain([2, 10, 4], 1, 5),
        5,
        2,
        "5 merges do not fit 10 tokens of which 1 are special; at most 4 can",
    );
    expect(&plain([2, 10, 4], 11, 0), 10, 2, "of which 11 are special");
    expect(&plain([2, 10, 4], 1, 2), 7, 2, "10 tokens that become 7, expected 2 of 10 that become 8");
    expect(&plain([2, 10, 4], 1, 2), 8, 1, "the workspace serves 1 images of 10 tokens, 2 of 10 are to");
    expect(
        &plain([2, 10, 40], 1, 2),
        8,
        2,
        "metric of shape [2, 10, 40] and strides [400, 40] reaches over 800",
    );
    expect(&plain([2, 10, 0], 1, 2), 8, 2, "metric has shape [2, 10, 0]");
    expect(&criteria([2, 3, 9], 1.0), 8, 2, "informativeness has shape [2, 3, 9], expected [2, 3, 10]");
    expect(&criteria([1, 3, 10], 1.0), 8, 2, "informativeness has shape [1, 3, 10], expected [2, 3, 10]");
    expect(&criteria([2, 3, 10], f64::NAN), 8, 2, "the temperature of the similarity is NaN");
    let keys = |heads, head_dim| Matching {
        metric: Metric::Keys { packed: rows([2, 10, 24]), heads, head_dim },
        ..plain([2, 10, 4], 1, 2)
    };
    expect(&keys(2, 7), 8, 2, "packed rows of 24 values hold no keys of 2 heads of 7");
    expect(&keys(0, 8), 8, 2, "hold no keys of 0 heads");
    let sized = |weighting| Matching { weighting, ..plain([2, 10, 4], 1, 2) };
    expect(&sized(Weighting::Size(Some(memory.slice(..19)))), 8, 2, "sizes has 19 values, expected 20");
    let weighting = Weighting::SizeAndReceived(None, rows([2, 3, 11]));
    expect(&sized(weighting), 8, 2, "received has shape [2, 3, 11], expected [2, 3, 10]");
    let many: CudaSlice<f32> = turn.upload(&vec![1.0; MOST_TOKENS + 1]);
    let matching = Matching {
        metric: Metric::Rows(Strided::new(many.as_view(), [1, MOST_TOKENS + 1, 1])),
        ..plain([2, 10, 4], 0, 0)
    };
    expect(&matching, 10, 1, "16385 tokens, at most 16384");
    turn.end();
}
