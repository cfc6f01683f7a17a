//! The operations on the CPU: the reference's results to the bit, and errors instead of panics.

mod common;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use common::{BOTH, Check, Inputs, on_host, positive, tensor};
use foveate_candle::{
    Attraction, Heads, Matching, Merged, Metric, Norm, Parts, Plan, Pooling, ScoreRequest, Select, Weighting,
    attention, attention_parts, attention_scores, matching, merge, select, unmerge,
};

const CPU: Device = Device::Cpu;
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn exact(dtype: DType) -> Check {
    Check { dtype, relative: 0.0, relative_f32: 0.0 }
}

fn everywhere(work: impl Fn(&Inputs, &Check) -> Result<()>) -> Result<()> {
    for dtype in TYPES {
        for shape in [[2, 9, 2, 8], [1, 2, 1, 8], [3, 33, 3, 16]] {
            work(&Inputs::new(shape, dtype, &CPU)?, &exact(dtype))?;
        }
    }
    Ok(())
}

#[test]
fn attention_is_the_references() -> Result<()> {
    everywhere(common::attention)
}

#[test]
fn matchings_are_the_references() -> Result<()> {
    everywhere(common::matching)
}

#[test]
fn selections_are_the_references() -> Result<()> {
    everywhere(common::select)
}

#[test]
fn merging_is_the_references() -> Result<()> {
    everywhere(common::merge)
}

#[test]
fn layouts_do_not_matter() -> Result<()> {
    everywhere(|inputs, check| if inputs.tokens > 2 { common::layouts(inputs, check) } else { Ok(()) })?;
    // A row's values need not follow each other on the CPU.
    let inputs = Inputs::new([2, 9, 2, 8], DType::F32, &CPU)?;
    let turned = |x: &Tensor| x.t()?.contiguous()?.t();
    let plan = select(&Select { class_scores: &turned(&inputs.received)?, special: 1, keep: 3, fuse: true })?;
    let straight = select(&Select { class_scores: &inputs.received, special: 1, keep: 3, fuse: true })?;
    assert_eq!(plan.to_host()?, straight.to_host()?);
    let found = merge(&turned(&inputs.x)?, Some(&turned(&inputs.sizes)?), &plan, Pooling::Weighted, None)?;
    let expected = merge(&inputs.x, Some(&inputs.sizes), &plan, Pooling::Weighted, None)?;
    assert_eq!(on_host(&found.tokens)?, on_host(&expected.tokens)?);
    assert_eq!(on_host(&found.sizes)?, on_host(&expected.sizes)?);
    Ok(())
}

#[test]
#[should_panic(expected = "merged tokens")]
fn a_wrong_merge_is_noticed() {
    let inputs = Inputs::new([2, 9, 2, 8], DType::F32, &CPU).unwrap();
    let plan = select(&Select { class_scores: &inputs.received, special: 1, keep: 3, fuse: true }).unwrap();
    let rows: Vec<_> = [1, 0].iter().map(|&image| inputs.x.narrow(0, image, 1).unwrap()).collect();
    let swapped = Tensor::cat(&rows, 0).unwrap();
    let found = merge(&swapped, None, &plan, Pooling::Weighted, None).unwrap();
    let expected = merge(&inputs.x, None, &plan, Pooling::Weighted, None).unwrap();
    exact(DType::F32).same("merged tokens", &found.tokens, &on_host(&expected.tokens).unwrap()).unwrap();
}

/// The one line that a refusal says.
fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("not refused"),
        Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

fn cosine(metric: Metric<'_, Tensor>, merges: usize) -> Matching<'_, Tensor> {
    let (attraction, weighting) = (Attraction::Cosine, Weighting::Uniform);
    Matching { metric, attraction, weighting, special: 1, merges, both_ways: false }
}

#[test]
fn wrong_types_are_refused() -> Result<()> {
    let inputs = Inputs::new([2, 9, 2, 8], DType::F32, &CPU)?;
    let double = inputs.qkv.to_dtype(DType::F64)?;
    let heads = Heads { packed: &double, ..inputs.view(None) };
    let told = "packed heads holds F64, expected F32, F16 or BF16; convert it with to_dtype";
    assert_eq!(refusal(attention(&heads, BOTH)), format!("attention: {told}"));
    assert_eq!(
        refusal(attention_scores(&Heads { packed: &double.narrow(2, 0, 32)?, ..heads }, BOTH)),
        format!("attention_scores: {told}")
    );
    let whole = inputs.x.to_dtype(DType::I64)?;
    assert!(refusal(matching(&cosine(Metric::Rows(&whole), 1))).starts_with("matching: rows holds I64"));

    let half = inputs.sizes.to_dtype(DType::F16)?;
    let told = "sizes holds F16, expected F32 whatever the tokens hold; convert it with to_dtype";
    assert_eq!(refusal(attention(&inputs.view(Some(&half)), BOTH)), format!("attention: {told}"));
    let plan = matching(&cosine(Metric::Rows(&inputs.x), 1))?;
    assert_eq!(
        refusal(merge(&inputs.x, Some(&half), &plan, Pooling::Weighted, None)),
        format!("merge: {told}")
    );
    let scores = inputs.received.to_dtype(DType::BF16)?;
    let told = refusal(select(&Select { class_scores: &scores, special: 1, keep: 3, fuse: true }));
    assert!(told.starts_with("select: class scores holds BF16, expected F32"), "{told}");

    let norm = Norm { weight: inputs.norm.weight.to_dtype(DType::F16)?, ..inputs.norm.clone() };
    let told = refusal(merge(&inputs.x, None, &plan, Pooling::Weighted, Some(&norm)));
    assert!(told.starts_with("merge: weight holds F16, expected F32 as the first argument does"), "{told}");
    let k = inputs.x.to_dtype(DType::BF16)?;
    let parts = Parts { q: &inputs.x, k: &k, v: &inputs.x, heads: 2, scale: 1.0, sizes: None };
    let told = refusal(attention_parts(&parts, BOTH));
    assert!(told.starts_with("attention: k holds BF16, expected F32"), "{told}");
    Ok(())
}

#[test]
fn wrong_shapes_are_refused() -> Result<()> {
    let inputs = Inputs::new([2, 9, 2, 8], DType::F32, &CPU)?;
    let told = refusal(attention(&Heads { heads: 3, ..inputs.view(None) }, BOTH));
    assert_eq!(told, "attention: packed rows of 48 values are not 3 parts of 3 heads of 8");
    let told = refusal(attention(&Heads { heads: usize::MAX, ..inputs.view(None) }, BOTH));
    assert!(told.contains("are not 3 parts of"), "{told}");
    let flat = inputs.qkv.flatten(0, 1)?;
    let told = refusal(attention(&Heads { packed: &flat, ..inputs.view(None) }, BOTH));
    assert!(told.contains("packed heads has shape [18, 48], expected three axes"), "{told}");
    let told = refusal(attention(&inputs.view(Some(&positive(&[2, 8], 1, &CPU)?)), BOTH));
    assert!(told.contains("attention: sizes has shape [2, 8], expected [2, 9]"), "{told}");
    let narrow = inputs.x.narrow(1, 0, 4)?;
    for (q, k) in [(&inputs.x, &narrow), (&narrow, &inputs.x)] {
        let parts = Parts { q, k, v: &inputs.x, heads: 2, scale: 1.0, sizes: None };
        refusal(attention_parts(&parts, BOTH));
    }
    let parts = Parts { q: &inputs.x, k: &inputs.x, v: &inputs.x, heads: 0, scale: 1.0, sizes: None };
    assert!(refusal(attention_parts(&parts, BOTH)).contains("rows of 16 values are not 0 heads"));

    let told = refusal(matching(&cosine(Metric::Rows(&inputs.x), 5)));
    assert!(told.contains("5 merges do not fit 9 tokens of which 1 are special; at most 4"), "{told}");
    let heads = Heads { heads: 4, ..inputs.view(None) };
    assert!(
        refusal(matching(&cosine(Metric::Keys(&heads), 1)))
            .contains("packed rows of 48 hold no keys of 4 heads")
    );
    let told = refusal(select(&Select { class_scores: &inputs.received, special: 1, keep: 9, fuse: true }));
    assert!(told.contains("cannot keep 9 of 9 tokens of which 1 are special"), "{told}");
    let told = refusal(select(&Select { class_scores: &inputs.sizes, special: 1, keep: 3, fuse: true }));
    assert!(told.contains("scores have shape [2, 9]"), "{told}");

    let plan = matching(&cosine(Metric::Rows(&inputs.x), 2))?;
    let told = refusal(merge(&narrow, None, &plan, Pooling::Weighted, None));
    assert!(told.contains("the plan takes 2 images of 9 tokens, not 2 of 4"), "{told}");
    let told = refusal(unmerge(&inputs.x, &plan));
    assert!(told.contains("the plan gives 2 images of 7 tokens, not 2 of 9"), "{told}");
    let norm = Norm { weight: tensor(&[15], 1, DType::F32, &CPU)?, bias: None, eps: 1e-6 };
    let told = refusal(merge(&inputs.x, None, &plan, Pooling::Weighted, Some(&norm)));
    assert!(told.contains("weight has shape [15], expected [16]"), "{told}");
    let empty = Tensor::zeros((2, 9, 0), DType::F32, &CPU)?;
    assert!(refusal(merge(&empty, None, &plan, Pooling::Weighted, None)).contains("none empty"));
    Ok(())
}

#[test]
fn a_backward_pass_is_refused_by_the_operations_name() -> Result<()> {
    let inputs = Inputs::new([2, 9, 2, 8], DType::F32, &CPU)?;
    let plan = matching(&cosine(Metric::Rows(&inputs.x), 2))?;
    let x = Var::from_tensor(&inputs.x)?;
    let refused = |name: &str, result: &Tensor| match result.sum_all().and_then(|sum| sum.backward()) {
        Err(Error::BackwardNotSupported { op }) => assert_eq!(op, name),
        Err(other) => assert!(other.to_string().contains(name), "{other}"),
        Ok(_) => panic!("{name}: gradients were lost"),
    };
    let Merged { tokens, sizes, normed } = merge(&x, None, &plan, Pooling::Weighted, Some(&inputs.norm))?;
    [tokens, sizes, normed.unwrap()].iter().for_each(|result| refused("merge", result));
    refused("unmerge", &unmerge(&x.narrow(1, 0, 7)?, &plan)?);
    // Also when it is the parameters that are trained, or the tokens come from something that is.
    let weight = Var::from_tensor(&inputs.norm.weight)?;
    let norm = Norm { weight: weight.as_tensor().clone(), ..inputs.norm.clone() };
    refused("merge", &merge(&inputs.x, None, &plan, Pooling::Weighted, Some(&norm))?.normed.unwrap());
    let qkv = Tensor::cat(&[&(x.as_tensor() * 2.0)?, &inputs.x, &inputs.x], 2)?;
    let (context, scores) = attention(&Heads { packed: &qkv, ..inputs.view(None) }, BOTH)?;
    [context, scores.class.unwrap(), scores.received.unwrap()]
        .iter()
        .for_each(|result| refused("attention", result));

    // What nobody trains has no history to carry.
    let plain = merge(&inputs.x, None, &plan, Pooling::Weighted, None)?;
    assert!(!plain.tokens.track_op());
    // And what is trained gives the values that the plain tensors give.
    let traced = attention(&Heads { packed: &qkv, ..inputs.view(None) }, ScoreRequest::default())?.0;
    let plain = attention(&Heads { packed: &qkv.detach(), ..inputs.view(None) }, ScoreRequest::default())?.0;
    assert_eq!(on_host(&traced)?, on_host(&plain)?);
    Ok(())
}

#[test]
fn a_plan_can_be_handed_in() -> Result<()> {
    let plan =
        foveate::TokenPlan::from_groups(3, &[vec![vec![(0, 1.0)], vec![(1, 0.25), (2, 0.75)]]]).unwrap();
    let plan = Plan::from_host(plan, &CPU)?;
    assert_eq!(plan.groups()?.to_vec2::<i32>()?, [[0, 1, 1]]);
    let x = Tensor::new(&[[[1_f32], [2.0], [6.0]]], &CPU)?;
    let merged = merge(&x, None, &plan, Pooling::Weighted, None)?;
    assert_eq!(merged.tokens.flatten_all()?.to_vec1::<f32>()?, [1.0, 5.0]);
    assert_eq!(merged.sizes.to_vec2::<f32>()?, [[1.0, 2.0]]);
    assert_eq!(unmerge(&merged.tokens, &plan)?.flatten_all()?.to_vec1::<f32>()?, [1.0, 5.0, 5.0]);
    Ok(())
}

/// The first Rust example of a text.
fn example(text: &str) -> &str {
    let (_, rest) = text.split_once("use candle_core").unwrap();
    rest.split_once("```").unwrap().0
}

#[test]
fn the_readmes_example_is_the_one_that_is_compiled() {
    assert_eq!(example(include_str!("../../README.md")), example(include_str!("../README.md")));
}
