//! kernels/cluster.cu against the reference: the same tokens in the same groups.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor, TokenPlan,
    backend::{Backend, Cluster, Inattentive},
    cuda::{
        DevicePlan, Strided,
        cluster::{Decoupling, cluster, workspace_bytes},
    },
    reference::{Reference, cluster::decide},
};
use foveate_device_tests::{Layout, Turn, Value, groups_of, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    heads: usize,
    tokens: usize,
    width: usize,
    decoupling: Decoupling,
    /// Values behind a row, and before the first.
    place: (usize, usize),
    seed: u64,
}

impl Case {
    fn layout(&self) -> Layout {
        let shape = [self.batch, self.tokens, self.width];
        Layout { shape, gap: self.place.0, lead: self.place.1 }
    }

    fn x<T: Value>(&self) -> Vec<f32> {
        random::<T>(self.batch * self.tokens * self.width, self.seed, 1.0)
    }

    fn scores(&self) -> Vec<f32> {
        // Attention: positive.
        let values = random::<f32>(self.batch * self.heads * self.tokens, self.seed ^ 9, 1.0);
        values.iter().map(|x| x.abs() + 0.01).collect()
    }

    fn decide(&self, x: &[f32], scores: &[f32]) -> Vec<Vec<Vec<usize>>> {
        let x = tensor(&[self.batch, self.tokens, self.width], x.to_vec());
        let scores = tensor(&[self.batch, self.heads, self.tokens], scores.to_vec());
        let cluster = self.cluster(&x, &scores);
        (0..self.batch).map(|image| decide(&cluster, image).unwrap().groups(cluster.special)).collect()
    }

    fn cluster<'a>(&self, tokens: &'a Tensor, class_scores: &'a Tensor) -> Cluster<'a, Tensor> {
        let Decoupling { special, keep, inattentive } = self.decoupling;
        Cluster { tokens, class_scores, special, keep, inattentive }
    }

    /// Whether errors in the last places of f32 would change a decision: sums in another order then may, too.
    fn fragile(&self, x: &[f32], scores: &[f32]) -> bool {
        let known = self.decide(x, scores);
        (0..3).any(|round| {
            let noise = random::<f32>(x.len(), self.seed ^ (100 + round), 4e-6);
            let moved: Vec<f32> = x.iter().zip(noise).map(|(x, noise)| x * (1.0 + noise)).collect();
            self.decide(&moved, scores) != known
        })
    }
}

fn case(tokens: &'static [usize]) -> impl Strategy<Value = Case> {
    let widths = prop::sample::select(vec![3_usize, 16, 30, 48, 64, 100, 130]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]);
    let peaks = (0_usize..8, 0_usize..7, prop::sample::select(vec![0_usize, 0, 1, 3, 50]));
    let counts = (0_usize..4, 0.0..=1.0_f64, any::<bool>(), peaks);
    let sizes = (1_usize..3, 1_usize..4, prop::sample::select(tokens));
    (sizes, widths, counts, place, any::<u64>()).prop_map(
        |((batch, heads, tokens), width, (special, share, join, peaks), place, seed)| {
            let special = special.min(tokens - 1);
            let keep = (((tokens - special) as f64 * share).round() as usize).max(1);
            let (pairs, clusters, neighbours) = peaks;
            let inattentive =
                if join { Inattentive::Join } else { Inattentive::Peaks { pairs, clusters, neighbours } };
            let decoupling = Decoupling { special, keep, inattentive };
            Case { batch, heads, tokens, width, decoupling, place, seed }
        },
    )
}

fn on_device<T: Value>(turn: &Turn, case: &Case, x: &[f32], scores: &[f32]) -> (TokenPlan, Vec<i32>) {
    let (device, stream, layout) = (&turn.device, &turn.stream, case.layout());
    let memory: CudaSlice<T> = turn.upload(&layout.spread(x));
    let scores: CudaSlice<f32> = turn.upload(scores);
    let out = case.decoupling.tokens_out(case.tokens).unwrap();
    let mut plan = DevicePlan::new(stream, case.batch, case.tokens, out).unwrap();
    let words = workspace_bytes(case.batch, case.tokens) / 4;
    let mut workspace: CudaSlice<u32> = stream.alloc_zeros(words).unwrap();
    let x = layout.over(memory.slice(layout.lead..));
    let scores = Strided::new(scores.as_view(), [case.batch, case.heads, case.tokens]);
    cluster(device, stream, &x, &scores, case.decoupling, &mut workspace.as_view_mut(), &mut plan).unwrap();
    (plan.download(stream).unwrap(), plan.download_groups(stream).unwrap())
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let (x, scores) = (case.x::<T>(), case.scores());
    prop_assume!(!case.fragile(&x, &scores));
    let (got, groups) = turn.in_every_order(|| on_device::<T>(turn, case, &x, &scores));
    let x = tensor(&[case.batch, case.tokens, case.width], x);
    let scores = tensor(&[case.batch, case.heads, case.tokens], scores);
    let want = Reference::new().cluster(&case.cluster(&x, &scores)).unwrap();
    // Weights are quotients of means over heads and their sums in one order: the same bits.
    prop_assert_eq!(&got, &want);
    prop_assert_eq!(groups, groups_of(&want));
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
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn plans_are_the_references(
        case in case(&[2, 3, 9, 31, 33, 50, 64, 65, 90, 131]), dtype in 0..3,
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check_as(&turn, &case, dtype)?;
        turn.end();
    }
}

fn some(tokens: usize, keep: usize, inattentive: Inattentive) -> Case {
    let decoupling = Decoupling { special: 1, keep, inattentive };
    Case { batch: 1, heads: 3, tokens, width: 64, decoupling, place: (0, 0), seed: 4 }
}

/// The published counts, and more tokens than one round of a block's threads takes.
#[test]
fn published_counts_and_many_tokens() {
    let Some(turn) = Turn::new() else { return };
    let peaks = |pairs, clusters, neighbours| Inattentive::Peaks { pairs, clusters, neighbours };
    for (tokens, keep, inattentive) in [
        (197, 138, Inattentive::Join),
        (197, 138, peaks(13, 13, 0)),
        (197, 98, peaks(9, 9, 5)),
        (600, 300, Inattentive::Join),
        (600, 310, peaks(40, 40, 0)),
    ] {
        let case = some(tokens, keep, inattentive);
        check_as(&turn, &Case { width: 40, ..case }, 1).unwrap();
    }
    turn.end();
}

/// Tokens that are all alike: every decision is a tie, which the lower index wins.
#[test]
fn ties_go_to_the_lower_index() {
    let Some(turn) = Turn::new() else { return };
    for inattentive in [Inattentive::Join, Inattentive::Peaks { pairs: 3, clusters: 4, neighbours: 2 }] {
        let case = some(40, 20, inattentive);
        let (x, scores) = (vec![0.25; 40 * 64], vec![0.5; 3 * 40]);
        let (got, _) = on_device::<f32>(&turn, &case, &x, &scores);
        let (x, scores) = (tensor(&[1, 40, 64], x), tensor(&[1, 3, 40], scores));
        assert_eq!(got, Reference::new().cluster(&case.cluster(&x, &scores)).unwrap());
    }
    turn.end();
}

/// Tokens and scores that are no numbers rank behind all others, and every token has a place, or none, as on the CPU.
#[test]
fn what_is_no_number_ranks_last() {
    let Some(turn) = Turn::new() else { return };
    let peaks = |neighbours| Inattentive::Peaks { pairs: 3, clusters: 4, neighbours };
    let row = |x: &mut [f32], token: usize| x[64 * token..64 * (token + 1)].fill(f32::NAN);
    for inattentive in [Inattentive::Join, peaks(0), peaks(3)] {
        for kind in 0..4 {
            let case = some(40, 20, inattentive);
            let (mut x, mut scores) = (case.x::<f32>(), case.scores());
            let means: Vec<f32> = (0..40).map(|t| (0..3).map(|h| scores[40 * h + t]).sum()).collect();
            let by = |better: fn(&f32, &f32) -> bool| {
                (1..40).reduce(|a, b| if better(&means[b], &means[a]) { b } else { a }).unwrap()
            };
            match kind {
                // The first of the attentive, the last of the others, all.
                0 => row(&mut x, by(|b, a| b > a)),
                1 => row(&mut x, by(|b, a| b < a)),
                2 => x.fill(f32::NAN),
                _ => scores[40 + 7] = f32::NAN,
            }
            let (got, _) = on_device::<f32>(&turn, &case, &x, &scores);
            let (x, scores) = (tensor(&[1, 40, 64], x), tensor(&[1, 3, 40], scores));
            let want = Reference::new().cluster(&case.cluster(&x, &scores)).unwrap();
            assert_eq!(got, want, "{inattentive:?}, kind {kind}");
        }
    }
    turn.end();
}

/// Scores that sum to nothing: plain means.
#[test]
fn groups_without_weight_are_plain_means() {
    let Some(turn) = Turn::new() else { return };
    let case = some(30, 3, Inattentive::Join);
    let x = case.x::<f32>();
    let (got, _) = on_device::<f32>(&turn, &case, &x, &vec![0.0; 90]);
    for token in 1..4 {
        let (members, weights) = got.group(0, token);
        assert!(weights.iter().all(|&weight| weight == 1.0 / members.len() as f32), "{weights:?}");
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = some(60, 20, Inattentive::Join);
    let (mut x, scores) = (case.x::<f32>(), case.scores());
    let (got, _) = on_device::<f32>(&turn, &case, &x, &scores);
    x[64..].reverse();
    let (x, scores) = (tensor(&[1, 60, 64], x), tensor(&[1, 3, 60], scores));
    assert_ne!(got, Reference::new().cluster(&case.cluster(&x, &scores)).unwrap(), "other tokens are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let run = |shape: [usize; 3], keep: usize, out: usize, words: usize| {
        let x: CudaSlice<f32> = turn.stream.alloc_zeros(shape.iter().product()).unwrap();
        let scores: CudaSlice<f32> = turn.stream.alloc_zeros(shape[0] * shape[1]).unwrap();
        let mut workspace: CudaSlice<u32> = turn.stream.alloc_zeros(words).unwrap();
        let mut plan = DevicePlan::new(&turn.stream, shape[0], shape[1], out).unwrap();
        let decoupling = Decoupling { special: 1, keep, inattentive: Inattentive::Join };
        let x = Strided::new(x.as_view(), shape);
        let scores = Strided::new(scores.as_view(), [shape[0], 1, shape[1]]);
        let (device, stream) = (&turn.device, &turn.stream);
        cluster(device, stream, &x, &scores, decoupling, &mut workspace.as_view_mut(), &mut plan)
            .unwrap_err()
            .to_string()
    };
    let words = workspace_bytes(2, 10) / 4;
    let message = run([2, 10, 8], 10, 10, words);
    assert!(message.contains("cannot keep 10 of 10 tokens of which 1 are special"), "{message}");
    let message = run([2, 10, 8], 0, 1, words);
    assert!(message.contains("cannot keep 0 of 10"), "{message}");
    let message = run([2, 10, 8], 5, 7, words);
    assert!(message.contains("expected 2 of 10 that become 6"), "{message}");
    let message = run([2, 10, 8], 5, 6, words - 1);
    assert!(message.contains("workspace has"), "{message}");
    let message = run([1, 4097, 1], 5, 6, workspace_bytes(1, 4097) / 4);
    assert!(message.contains("4097 tokens of 1 values, the kernels take up to 4096"), "{message}");
    turn.end();
}
