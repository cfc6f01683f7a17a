//! kernels/merge.cu and kernels/plan.cu against the reference: tokens, sizes and plans to the bit.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    TokenPlan,
    backend::{Backend, Norm, Pooling},
    cuda::{
        DevicePlan, Strided,
        merge::{Merge, Merged, merge, unmerge},
        norm::layer_norm,
        plan::compose,
    },
    reference::Reference,
};
use foveate_device_tests::{
    Layout, Turn, Value, arrays, bits, groups_of, norm_tolerance, random, random_plan, rounded, tensor,
};
use half::{bf16, f16};
use proptest::prelude::*;

const WIDTHS: [usize; 13] = [1, 3, 8, 31, 64, 65, 192, 384, 512, 768, 1000, 1024, 1280];

#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "the cross product of the options is what is tested")]
struct Case {
    batch: usize,
    tokens: usize,
    out: usize,
    width: usize,
    gap: usize,
    pooling: Pooling,
    sizes: bool,
    norm: bool,
    bias: bool,
    nan: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let tokens = prop::sample::select(vec![1_usize, 2, 3, 31, 65, 197, 257]);
    let pooling = prop::sample::select(vec![Pooling::Weighted, Pooling::Max]);
    let gap = prop::sample::select(vec![0_usize, 0, 8, 1]);
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.2));
    let width = prop::sample::select(&WIDTHS);
    (1_usize..4, tokens, 0.0..1.0_f64, width, gap, pooling, switches, any::<u64>()).prop_map(
        |(batch, tokens, share, width, gap, pooling, (sizes, norm, bias, nan), seed)| Case {
            batch,
            tokens,
            out: 1 + ((tokens - 1) as f64 * share) as usize,
            width,
            gap,
            pooling,
            sizes,
            norm,
            bias,
            nan,
            seed,
        },
    )
}

fn inputs<T: Value, O: Value>(case: &Case) -> (Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut x = random::<T>(case.batch * case.tokens * case.width, case.seed, 2.0);
    if case.nan {
        x.iter_mut().step_by(97).for_each(|x| *x = f32::NAN);
    }
    let sizes = random::<f32>(case.batch * case.tokens, case.seed ^ 1, 1.0);
    let sizes = sizes.iter().map(|s| 1.0 + (s.abs() * 9.0).floor()).collect();
    (x, sizes, random::<O>(case.width, case.seed ^ 2, 1.0), random::<O>(case.width, case.seed ^ 3, 1.0))
}

/// Tokens, sizes, LayerNorm, and the LayerNorm kernel's own result on the merged tokens; NaN has one pattern.
type Result = (Vec<u32>, Vec<u32>, Option<Vec<u32>>, Vec<u32>);

fn on_device<T: Value, O: Value>(turn: &Turn, case: &Case, plan: &TokenPlan) -> (Result, Vec<f32>) {
    let (device, stream) = (&turn.device, &turn.stream);
    let (x, sizes, weight, bias) = inputs::<T, O>(case);
    let source = Layout { shape: [case.batch, case.tokens, case.width], gap: case.gap, lead: 0 };
    let target = Layout { shape: [case.batch, case.out, case.width], gap: case.gap, lead: 0 };
    let x: CudaSlice<T> = turn.upload(&source.spread(&x));
    let sizes: CudaSlice<f32> = turn.upload(&sizes);
    let weight: CudaSlice<O> = turn.upload(&weight);
    let bias: CudaSlice<O> = turn.upload(&bias);
    let plan = DevicePlan::upload(stream, plan).unwrap();
    let norm = || Norm { weight: weight.as_view(), bias: case.bias.then(|| bias.as_view()), eps: 1e-6 };
    let mut tokens: CudaSlice<T> = turn.upload(&target.blank());
    let mut normed: CudaSlice<O> = turn.upload(&target.blank());
    let mut sizes_out = stream.alloc_zeros::<f32>(case.batch * case.out).unwrap();
    let arguments = Merge {
        x: source.over(x.as_view()),
        sizes: case.sizes.then(|| sizes.as_view()),
        plan: &plan,
        pooling: case.pooling,
        norm: case.norm.then(norm),
    };
    let mut out = Merged {
        tokens: target.over(tokens.as_view_mut()),
        sizes: sizes_out.as_view_mut(),
        normed: case.norm.then(|| target.over(normed.as_view_mut())),
    };
    merge(device, stream, &arguments, &mut out).unwrap();
    let mut separate: CudaSlice<O> = turn.upload(&target.blank());
    let mut view = target.over(separate.as_view_mut());
    layer_norm(device, stream, &target.over(tokens.as_view()), &norm(), &mut view).unwrap();
    let read = |memory: &CudaSlice<O>| target.gather(&turn.download(memory));
    let normed = case.norm.then(|| read(&normed));
    let values = normed.clone().unwrap_or_default();
    let result = (
        bits(&target.gather(&turn.download(&tokens))),
        bits(&turn.download(&sizes_out)),
        normed.map(|normed| bits(&normed)),
        bits(&read(&separate)),
    );
    (result, values)
}

fn check<T: Value, O: Value>(turn: &Turn, case: &Case) -> std::result::Result<(), TestCaseError> {
    let plan = random_plan(case.batch, case.tokens, case.out, case.seed);
    let (x, sizes, weight, bias) = inputs::<T, O>(case);
    let sizes = tensor(&[case.batch, case.tokens], sizes);
    let norm = Norm {
        weight: tensor(&[case.width], weight),
        bias: case.bias.then(|| tensor(&[case.width], bias)),
        eps: 1e-6,
    };
    let reference = Reference::new();
    let x = tensor(&[case.batch, case.tokens, case.width], x);
    let want = reference.merge(&x, case.sizes.then_some(&sizes), &plan, case.pooling, None).unwrap();
    // The reference sums in f32; storage rounds once.
    let stored = rounded::<T>(want.tokens.data());
    let ((tokens, sizes, normed, separate), values) = turn.in_every_order(|| {
        let (result, values) = on_device::<T, O>(turn, case, &plan);
        (result, values.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    });
    prop_assert_eq!(tokens, bits(&stored), "tokens");
    prop_assert_eq!(sizes, bits(want.sizes.data()), "sizes");
    if let Some(normed) = normed {
        prop_assert_eq!(&normed, &separate, "the LayerNorm kernel's bits");
        let want = reference.layer_norm(&tensor(want.tokens.shape(), stored.clone()), &norm).unwrap();
        for (at, (&got, &want)) in values.iter().zip(want.data()).enumerate() {
            let (got, row) = (f32::from_bits(got), &stored[at / case.width * case.width..][..case.width]);
            let close = (got - want).abs() <= norm_tolerance::<O>(row, norm.eps, want);
            prop_assert!(close || got.is_nan() && want.is_nan(), "{} instead of {}", got, want);
        }
    }
    Ok(())
}

/// Spreads tokens back on the device and in the reference.
fn check_unmerge<T: Value>(turn: &Turn, case: &Case) -> std::result::Result<(), TestCaseError> {
    let plan = random_plan(case.batch, case.tokens, case.out, case.seed);
    let source = Layout { shape: [case.batch, case.out, case.width], gap: case.gap, lead: 0 };
    let target = Layout { shape: [case.batch, case.tokens, case.width], gap: case.gap, lead: 0 };
    let values = random::<T>(case.batch * case.out * case.width, case.seed, 3.0);
    let got = turn.in_every_order(|| {
        let plan = DevicePlan::upload(&turn.stream, &plan).unwrap();
        let x: CudaSlice<T> = turn.upload(&source.spread(&values));
        let mut out: CudaSlice<T> = turn.upload(&target.blank());
        let mut view = target.over(out.as_view_mut());
        unmerge(&turn.device, &turn.stream, &source.over(x.as_view()), &plan, &mut view).unwrap();
        target.gather(&turn.download(&out))
    });
    let want = Reference::new().unmerge(&tensor(&source.shape, values), &plan).unwrap();
    prop_assert_eq!(got, want.data());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn merging_is_the_references(case in case(), dtype in 0..5) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check::<f32, f32>(&turn, &case)?,
            1 => check::<f16, f16>(&turn, &case)?,
            2 => check::<bf16, bf16>(&turn, &case)?,
            3 => check::<f32, f16>(&turn, &case)?,
            _ => check::<f32, bf16>(&turn, &case)?,
        }
        turn.end();
    }

    #[test]
    fn unmerging_is_the_references(case in case(), half in any::<bool>()) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        if half { check_unmerge::<bf16>(&turn, &case)? } else { check_unmerge::<f32>(&turn, &case)? }
        turn.end();
    }

    #[test]
    fn composed_plans_are_the_references(
        batch in 1_usize..4, tokens in prop::sample::select(vec![1_usize, 2, 33, 197, 600]),
        shares in (0.0..1.0_f64, 0.0..1.0_f64), seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let middles = 1 + ((tokens - 1) as f64 * shares.0) as usize;
        let outputs = 1 + ((middles - 1) as f64 * shares.1) as usize;
        let (first, next) = (random_plan(batch, tokens, middles, seed), random_plan(batch, middles, outputs, !seed));
        let got = turn.in_every_order(|| composed(&turn, &first, &next));
        let want = first.then(&next).unwrap();
        prop_assert_eq!(got, (arrays(&want), groups_of(&want)));
        turn.end();
    }
}

type Arrays = (Vec<i32>, Vec<i32>, Vec<u32>);

fn composed(turn: &Turn, first: &TokenPlan, next: &TokenPlan) -> (Arrays, Vec<i32>) {
    let stream = &turn.stream;
    let mut out = DevicePlan::new(stream, first.batch(), first.tokens_in(), next.tokens_out()).unwrap();
    let (first, next) =
        (DevicePlan::upload(stream, first).unwrap(), DevicePlan::upload(stream, next).unwrap());
    compose(&turn.device, stream, &first, &next, &mut out).unwrap();
    (arrays(&out.download(stream).unwrap()), out.download_groups(stream).unwrap())
}

/// The largest plan: most of the shared memory that composing may ask for, and one group of thousands.
#[test]
fn the_most_tokens_compose() {
    let Some(turn) = Turn::new() else { return };
    let first = random_plan(1, 16_384, 16_000, 5);
    let next = random_plan(1, 16_000, 15_000, 6);
    let want = first.then(&next).unwrap();
    assert_eq!(composed(&turn, &first, &next), (arrays(&want), groups_of(&want)));
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let first = random_plan(1, 20, 10, 7);
    let (right, wrong) = (random_plan(1, 10, 4, 8), random_plan(1, 10, 4, 9));
    let want = first.then(&wrong).unwrap();
    assert_ne!(composed(&turn, &first, &right), (arrays(&want), groups_of(&want)));
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    let plan = DevicePlan::upload(stream, &random_plan(1, 6, 3, 1)).unwrap();
    let x: CudaSlice<f32> = turn.upload(&[0.0; 48]);
    let mut tokens: CudaSlice<f32> = turn.upload(&[0.0; 24]);
    let mut sizes: CudaSlice<f32> = turn.upload(&[0.0; 3]);
    let mut run = |shape: [usize; 3], out: [usize; 3], count: usize, norm: bool| {
        let norm = norm.then(|| Norm { weight: x.slice(..8), bias: None, eps: 1e-6 });
        let arguments = Merge {
            x: Strided::new(x.as_view(), shape),
            sizes: None,
            plan: &plan,
            pooling: Pooling::Weighted,
            norm,
        };
        let mut out = Merged {
            tokens: Strided::new(tokens.as_view_mut(), out),
            sizes: sizes.slice_mut(..count),
            normed: None,
        };
        merge(device, stream, &arguments, &mut out).unwrap_err().to_string()
    };
    let message = run([1, 5, 8], [1, 3, 8], 3, false);
    assert!(message.contains("the plan takes 1 images of 6 tokens, not 1 of 5"), "{message}");
    let message = run([1, 6, 8], [1, 2, 8], 3, false);
    assert!(message.contains("tokens has shape [1, 2, 8], expected [1, 3, 8]"), "{message}");
    let message = run([1, 6, 8], [1, 3, 8], 2, false);
    assert!(message.contains("output sizes has 2 values, expected 3"), "{message}");
    let message = run([1, 6, 8], [1, 3, 8], 3, true);
    assert!(message.contains("a LayerNorm is given without `normed`"), "{message}");

    let next = DevicePlan::upload(stream, &random_plan(1, 4, 2, 1)).unwrap();
    let mut out = DevicePlan::new(stream, 1, 6, 2).unwrap();
    let message = compose(device, stream, &plan, &next, &mut out).unwrap_err().to_string();
    assert!(message.contains("a plan for 1 images of 4 tokens cannot follow"), "{message}");
    assert!(
        DevicePlan::new(stream, 1, 3, 4).unwrap_err().to_string().contains("no device plan turns 1 images")
    );
    turn.end();
}
