//! What matching moves and issues, by the emulator's counters: against the bytes and multiply-adds that it must.
#![cfg(feature = "emulated")]

use cudarc::driver::CudaSlice;
use foveate::cuda::{
    DevicePlan, Strided,
    matching::{Attraction, Matching, MatchingViews, MatchingWorkspace, Metric, Weighting, match_tokens},
};
use foveate_device_tests::{Turn, Value, emulator, random};
use half::f16;
use serde_json::Value as Json;

const TOKENS: usize = 197;

fn number(json: &Json) -> f64 {
    json.as_f64().expect("a number")
}

/// The launches of a matching: prints what each moved and issued.
fn launches<T: Value>(
    turn: &Turn,
    matching: &MatchingViews<'_, T>,
    batch: usize,
    bytes: usize,
    multiply_adds: usize,
) -> Vec<Json> {
    let mut workspace = MatchingWorkspace::new(&turn.stream, batch, TOKENS).unwrap();
    let mut plan = DevicePlan::new(&turn.stream, batch, TOKENS, TOKENS - matching.merges).unwrap();
    emulator::reset_counters();
    match_tokens(&turn.device, &turn.stream, matching, &mut workspace, &mut plan).unwrap();
    turn.stream.synchronize().unwrap();
    let all: Vec<Json> = serde_json::from_str(&emulator::counters()).unwrap();
    for json in &all {
        let moved = number(&json["unique_bytes_read"]) + number(&json["unique_bytes_written"]);
        println!(
            "{}: {moved} bytes, {:.3} of what a matching must; {} warp instructions, {:.2} of its multiply-adds \
             ({} f32); bank conflicts {} {}",
            json["kernel"],
            moved / bytes as f64,
            json["insts"],
            number(&json["insts"]) * 32.0 / multiply_adds as f64,
            json["insts_by_class"]["fp32"],
            json["shared"]["bank_conflicts"],
            json["bank_conflict_lines"],
        );
        assert_eq!(json["nondeterministic_atomics"], 0);
    }
    all
}

/// ToMe in DeiT-S, the keys as f16: one launch that reads the keys and writes the plan.
#[test]
fn keys_are_read_once_and_the_plan_written_once() {
    let Some(turn) = Turn::new() else { return };
    let (batch, heads, head_dim, merges) = (64, 6, 64, 13);
    let width = 3 * heads * head_dim;
    let packed: CudaSlice<f16> = turn.upload(&random::<f16>(batch * TOKENS * width, 1, 1.0));
    let matching = Matching {
        metric: Metric::Keys {
            packed: Strided::new(packed.as_view(), [batch, TOKENS, width]),
            heads,
            head_dim,
        },
        attraction: Attraction::Cosine,
        weighting: Weighting::Size(None),
        special: 1,
        merges,
        both_ways: false,
    };
    let keys = 2 * batch * TOKENS * heads * head_dim;
    let plan = 4 * batch * (3 * TOKENS + TOKENS - merges + 1);
    let multiply_adds = batch * 98 * 98 * head_dim;
    let all = launches(&turn, &matching, batch, keys + plan, multiply_adds);
    let [one] = <[Json; 1]>::try_from(all).expect("one launch");
    let moved = number(&one["unique_bytes_read"]) + number(&one["unique_bytes_written"]);
    assert!(moved <= 1.1 * (keys + plan) as f64);
    // PTX instructions, addresses and conversions included: of 64,000 an image 20,800 are the products'.
    assert!(number(&one["insts"]) * 32.0 <= 3.5 * multiply_adds as f64);
    // None where the products are formed: 8 wavefronts instead of 4 where rows are stored, a few in the ordered part.
    let lines = one["bank_conflict_lines"].as_array().unwrap();
    let of_products =
        lines.iter().filter(|line| line["instruction"].as_str().unwrap().starts_with("ld.shared.v4.f32"));
    assert_eq!(of_products.count(), 0);
    assert!(number(&one["shared"]["bank_conflicts"]) <= 480.0 * batch as f64);
    turn.end();
}

/// MCTF in DeiT-S: one launch, which reads the residual stream once and forms little more than one product: beyond that of all of
/// A with all of B only those of B choose again whose choice leaves.
#[test]
fn both_ways_are_one_launch() {
    let Some(turn) = Turn::new() else { return };
    let (batch, heads, width, merges) = (4, 6, 384, 16);
    let x: CudaSlice<f32> = turn.upload(&random::<f32>(batch * TOKENS * width, 1, 1.0));
    let scores: Vec<f32> =
        random::<f32>(batch * heads * TOKENS, 2, 1.0).iter().map(|x| x.abs() + 1e-3).collect();
    let scores: CudaSlice<f32> = turn.upload(&scores);
    let received = || Strided::new(scores.as_view(), [batch, heads, TOKENS]);
    let matching = Matching {
        metric: Metric::Rows(Strided::new(x.as_view(), [batch, TOKENS, width])),
        attraction: Attraction::MultiCriteria {
            tau_similarity: 1.0,
            informativeness: (received(), 20.0),
            size: (None, 40.0),
        },
        weighting: Weighting::SizeAndReceived(None, received()),
        special: 1,
        merges,
        both_ways: true,
    };
    let bytes = 4 * batch * (TOKENS * (width + heads) + 3 * TOKENS + TOKENS - merges + 1);
    let all = launches(&turn, &matching, batch, bytes, batch * 98 * 98 * width);
    let [one] = <[Json; 1]>::try_from(all).expect("one launch");
    let moved = number(&one["unique_bytes_read"]) + number(&one["unique_bytes_written"]);
    assert!(moved <= 1.1 * bytes as f64);
    assert!(number(&one["insts"]) * 32.0 <= 5.0 * (batch * 98 * 98 * width) as f64);
    turn.end();
}
