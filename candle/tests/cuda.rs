//! The operations on CUDA, through candle's own device, stream and memory, against the reference.
//!
//!     cargo test -p foveate-candle --features cuda --test cuda
//!
//!     cargo xtask candle    # the same on the emulated driver
//!
//! Without a GPU nothing is tested, and that is said; `FOVEATE_REQUIRE_GPU=1` insists on one. No kernel of candle's is used:
//! the emulated run has none.
#![cfg(feature = "cuda")]

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{BOTH, Check, Inputs, on_host, tensor};
use foveate_candle::{
    Attraction, Heads, Matching, Metric, Plan, Pooling, Select, Weighting, attention, matching, merge,
    select, unmerge,
};

fn device() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            assert!(std::env::var_os("FOVEATE_REQUIRE_GPU").is_none(), "{error}");
            println!("SKIPPED: candle opens no CUDA device: {error}");
            None
        }
    }
}

/// What the kernels round: results to their type, attention's probabilities too, and sums in another order.
fn tolerance(dtype: DType) -> Check {
    let relative = match dtype {
        DType::F16 => 2.0 * f32::from(half::f16::EPSILON),
        DType::BF16 => 2.0 * f32::from(half::bf16::EPSILON),
        _ => 0.0,
    };
    // Two orders of at most 197 additions.
    Check { dtype, relative, relative_f32: 64.0 * f32::EPSILON }
}

fn everywhere(work: impl Fn(&Inputs, &Check) -> Result<()>) -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for shape in [[2, 33, 2, 32], [1, 70, 3, 64]] {
            work(&Inputs::new(shape, dtype, &device)?, &tolerance(dtype))?;
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
    let Some(device) = device() else { return Ok(()) };
    common::layouts(&Inputs::new([2, 33, 2, 32], DType::F16, &device)?, &tolerance(DType::F16))
}

fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("not refused"),
        Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

#[test]
fn what_the_kernels_cannot_read_is_refused() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let inputs = Inputs::new([2, 9, 2, 32], DType::F32, &device)?;
    let plan = select(&Select { class_scores: &inputs.received, special: 1, keep: 3, fuse: true })?;
    // Columns of the right shape: `t` twice, with a copy between.
    let turned = |shape: &[usize]| tensor(shape, 9, DType::F32, &Device::Cpu)?.t()?.contiguous()?.t();
    let upload = |x: Tensor| -> Result<Tensor> { x.t()?.contiguous()?.to_device(&device)?.t() };
    let columns = upload(turned(&[2, 9, 64])?)?;
    let told = refusal(merge(&columns, None, &plan, Pooling::Weighted, None));
    assert!(told.contains("the values of a row must follow each other; call contiguous()"), "{told}");
    let sizes = upload(turned(&[2, 9])?)?;
    let told = refusal(merge(&inputs.x, Some(&sizes), &plan, Pooling::Weighted, None));
    assert!(told.contains("sizes has strides [1, 2]: its values must follow each other"), "{told}");

    // Rows of attention must begin at multiples of 16 bytes, those of merging need not.
    let shifted = |x: &Tensor| {
        let padded = tensor(&[2, 9, x.dim(2)? + 1], 9, DType::F32, &device)?;
        padded.narrow(2, 1, x.dim(2)?)
    };
    let qkv = shifted(&inputs.qkv)?;
    let told = refusal(attention(&Heads { packed: &qkv, ..inputs.view(None) }, BOTH));
    assert!(told.contains("rows that do not begin at multiples of 16 bytes"), "{told}");
    let x = shifted(&inputs.x)?;
    let found = merge(&x, None, &plan, Pooling::Max, None)?;
    let copied = merge(
        &x.to_device(&Device::Cpu)?,
        None,
        &Plan::from_host(plan.to_host()?, &Device::Cpu)?,
        Pooling::Max,
        None,
    )?;
    assert_eq!(on_host(&found.tokens)?, on_host(&copied.tokens)?);

    // Heads that no kernel has.
    let odd = tensor(&[1, 9, 3 * 36], 1, DType::F16, &device)?;
    refusal(attention(&Heads { packed: &odd, heads: 1, head_dim: 36, scale: 1.0, sizes: None }, BOTH));
    Ok(())
}

#[test]
fn tensors_on_two_devices_are_refused() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let inputs = Inputs::new([2, 9, 2, 32], DType::F32, &device)?;
    let here = Inputs::new([2, 9, 2, 32], DType::F32, &Device::Cpu)?;
    let plan = select(&Select { class_scores: &inputs.received, special: 1, keep: 3, fuse: true })?;
    let told = refusal(merge(&here.x, None, &plan, Pooling::Weighted, None));
    assert!(
        told.starts_with("merge: the plan lies on Cuda { gpu_id: 0 }, the first argument on Cpu"),
        "{told}"
    );
    let told = refusal(merge(&inputs.x, Some(&here.sizes), &plan, Pooling::Weighted, None));
    assert!(told.starts_with("merge: sizes lies on Cpu, the first argument on Cuda"), "{told}");
    let told = refusal(attention(&inputs.view(Some(&here.sizes)), BOTH));
    assert!(told.starts_with("attention: sizes lies on Cpu"), "{told}");
    let told = refusal(unmerge(&here.x, &plan));
    assert!(told.starts_with("unmerge: the plan lies on Cuda"), "{told}");
    Ok(())
}

#[test]
fn results_stay_in_the_graph() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let x = Var::from_tensor(&tensor(&[1, 8, 32], 1, DType::F32, &device)?)?;
    let plan = matching(&Matching {
        metric: Metric::Rows(&x),
        attraction: Attraction::Cosine,
        weighting: Weighting::Uniform,
        special: 0,
        merges: 2,
        both_ways: false,
    })?;
    let merged = merge(&x, None, &plan, Pooling::Weighted, None)?;
    // The result is a node of candle's graph; what happens when a backward pass reaches it is tested on the CPU.
    assert!(merged.tokens.track_op());
    Ok(())
}
