//! What the kernels move, by the emulator's counters: against the bytes that they must move.
#![cfg(feature = "emulated")]

use cudarc::driver::CudaSlice;
use foveate::{
    TokenPlan,
    backend::{Norm, Pooling},
    cuda::{
        DevicePlan, Strided,
        merge::{Merge, Merged, merge, unmerge},
        norm::add_layer_norm,
        select::{Selection, select},
    },
};
use foveate_device_tests::{Turn, Value, emulator, random};
use half::f16;
use serde_json::Value as Json;

/// DeiT-S, a small batch.
const BATCH: usize = 4;
const TOKENS: usize = 197;
const WIDTH: usize = 384;

/// The counters of the one launch since the last reset.
fn counters(turn: &Turn) -> Json {
    turn.stream.synchronize().unwrap();
    let all: Vec<Json> = serde_json::from_str(&emulator::counters()).unwrap();
    let [one] = <[Json; 1]>::try_from(all).expect("one launch");
    one
}

fn number(json: &Json) -> f64 {
    json.as_f64().expect("a number")
}

/// Prints what a launch moved and checks it against `bytes`, with `slack` of it on top.
fn check(json: &Json, bytes: usize, slack: f64) {
    let moved = number(&json["unique_bytes_read"]) + number(&json["unique_bytes_written"]);
    let over = moved / bytes as f64;
    let sectors = |kind: &str| number(&json["global"][kind]["efficiency"]);
    println!(
        "{}: {moved} bytes, {over:.3} of what it must; ideal/sectors {:.3} read, {:.3} written; {} warp instructions",
        json["kernel"],
        sectors("ld"),
        sectors("st"),
        json["insts"]
    );
    assert!(over <= slack, "{over} times the bytes");
    assert_eq!(json["shared"]["bank_conflicts"], 0, "{}", json["bank_conflict_lines"]);
    assert_eq!(json["nondeterministic_atomics"], 0);
}

/// Pairs of neighbours become one token until `merges` are gone.
fn pairs(merges: usize) -> TokenPlan {
    let image: Vec<Vec<(usize, f32)>> = (0..TOKENS - merges)
        .map(|m| match m {
            0 => vec![(0, 1.0)],
            m if m <= merges => vec![(2 * m - 1, 0.5), (2 * m, 0.5)],
            m => vec![(m + merges, 1.0)],
        })
        .collect();
    TokenPlan::from_groups(TOKENS, &vec![image; BATCH]).unwrap()
}

#[test]
fn merging_reads_tokens_once_and_writes_both_outputs_once() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream, merges) = (&turn.device, &turn.stream, 13);
    let out = TOKENS - merges;
    let x: CudaSlice<f16> = turn.upload(&random::<f16>(BATCH * TOKENS * WIDTH, 1, 1.0));
    let weight: CudaSlice<f16> = turn.upload(&random::<f16>(WIDTH, 2, 1.0));
    let sizes: CudaSlice<f32> = turn.upload(&vec![1.0; BATCH * TOKENS]);
    let plan = DevicePlan::upload(stream, &pairs(merges)).unwrap();
    let mut tokens: CudaSlice<f16> = turn.upload(&vec![0.0; BATCH * out * WIDTH]);
    let mut normed: CudaSlice<f16> = turn.upload(&vec![0.0; BATCH * out * WIDTH]);
    let mut sizes_out: CudaSlice<f32> = turn.upload(&vec![0.0; BATCH * out]);
    let arguments = Merge {
        x: Strided::new(x.as_view(), [BATCH, TOKENS, WIDTH]),
        sizes: Some(sizes.as_view()),
        plan: &plan,
        pooling: Pooling::Weighted,
        norm: Some(Norm { weight: weight.as_view(), bias: Some(weight.as_view()), eps: 1e-6 }),
    };
    let mut written = Merged {
        tokens: Strided::new(tokens.as_view_mut(), [BATCH, out, WIDTH]),
        sizes: sizes_out.as_view_mut(),
        normed: Some(Strided::new(normed.as_view_mut(), [BATCH, out, WIDTH])),
    };
    emulator::reset_counters();
    merge(device, stream, &arguments, &mut written).unwrap();
    let json = counters(&turn);
    check(&json, BATCH * (TOKENS + 2 * out) * WIDTH * 2, 1.05);
    // Whole rows: what a request touches, it uses.
    assert!(number(&json["global"]["ld"]["efficiency"]) >= 0.95);
    assert!(number(&json["global"]["st"]["efficiency"]) >= 0.95);

    let mut back: CudaSlice<f16> = turn.upload(&vec![0.0; BATCH * TOKENS * WIDTH]);
    let source = Strided::new(tokens.as_view(), [BATCH, out, WIDTH]);
    let mut view = Strided::new(back.as_view_mut(), [BATCH, TOKENS, WIDTH]);
    emulator::reset_counters();
    unmerge(device, stream, &source, &plan, &mut view).unwrap();
    check(&counters(&turn), BATCH * (TOKENS + out) * WIDTH * 2, 1.05);
    turn.end();
}

fn norm_traffic<T: Value>(turn: &Turn) {
    let count = BATCH * TOKENS * WIDTH;
    let shape = [BATCH, TOKENS, WIDTH];
    let mut x: CudaSlice<T> = turn.upload(&random::<T>(count, 1, 1.0));
    let residual: CudaSlice<T> = turn.upload(&random::<T>(count, 2, 1.0));
    let weight: CudaSlice<T> = turn.upload(&random::<T>(WIDTH, 3, 1.0));
    let mut out: CudaSlice<T> = turn.upload(&vec![0.0; count]);
    let norm = Norm { weight: weight.as_view(), bias: Some(weight.as_view()), eps: 1e-6 };
    emulator::reset_counters();
    add_layer_norm(
        &turn.device,
        &turn.stream,
        &mut Strided::new(x.as_view_mut(), shape),
        &Strided::new(residual.as_view(), shape),
        &norm,
        &mut Strided::new(out.as_view_mut(), shape),
    )
    .unwrap();
    let json = counters(turn);
    check(&json, 4 * count * T::DTYPE.bytes(), 1.01);
    assert_eq!(number(&json["global"]["ld"]["efficiency"]), 1.0);
    assert_eq!(number(&json["global"]["st"]["efficiency"]), 1.0);
}

#[test]
fn the_residual_and_its_norm_are_one_pass() {
    let Some(turn) = Turn::new() else { return };
    norm_traffic::<f32>(&turn);
    norm_traffic::<f16>(&turn);
    turn.end();
}

#[test]
fn selection_reads_scores_once_and_writes_the_plan() {
    let Some(turn) = Turn::new() else { return };
    for (batch, tokens) in [(8, TOKENS), (2, 577)] {
        let heads = 6;
        let selection = Selection { special: 1, keep: tokens * 7 / 10, fuse: true };
        let out = selection.tokens_out(tokens).unwrap();
        let scores: CudaSlice<f32> = turn.upload(&random::<f32>(batch * heads * tokens, 1, 1.0));
        let mut plan = DevicePlan::new(&turn.stream, batch, tokens, out).unwrap();
        let view = Strided::new(scores.as_view(), [batch, heads, tokens]);
        emulator::reset_counters();
        select(&turn.device, &turn.stream, &view, selection, &mut plan).unwrap();
        let json = counters(&turn);
        let bytes = 4 * batch * (heads * tokens + 3 * tokens + out + 1);
        let moved = number(&json["unique_bytes_read"]) + number(&json["unique_bytes_written"]);
        println!("{}: {moved} bytes of {bytes}, {} warp instructions", json["kernel"], json["insts"]);
        assert!(moved <= 1.1 * bytes as f64);
        assert_eq!(json["nondeterministic_atomics"], 0);
    }
    turn.end();
}
