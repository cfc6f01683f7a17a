//! kernels/norm.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{Backend, Norm},
    cuda::{
        Strided,
        norm::{add_layer_norm, layer_norm},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, norm_tolerance, random, rounded, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

const WIDTHS: [usize; 24] = [
    1, 2, 3, 7, 8, 31, 64, 65, 96, 192, 197, 256, 264, 384, 512, 520, 768, 770, 1024, 1025, 1280, 2048, 2056,
    4096,
];

#[derive(Clone, Debug)]
struct Case {
    layout: Layout,
    residual: bool,
    bias: bool,
    spread: f32,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let tokens = prop::sample::select(vec![1_usize, 2, 3, 5, 33]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 8), (8, 0), (1, 0), (0, 1), (3, 5)]);
    let spread = prop::sample::select(vec![1e-3_f32, 1.0, 100.0]);
    (1_usize..4, tokens, prop::sample::select(&WIDTHS), place, any::<(bool, bool)>(), spread, any::<u64>())
        .prop_map(|(batch, tokens, width, (gap, lead), (residual, bias), spread, seed)| Case {
            layout: Layout { shape: [batch, tokens, width], gap, lead },
            residual,
            bias,
            spread,
            seed,
        })
}

/// The sum as stored and its LayerNorm, on the device.
fn on_device<T: Value, O: Value>(turn: &Turn, case: &Case, norm: &Norm<Tensor>) -> (Vec<f32>, Vec<f32>) {
    let Case { layout, .. } = case;
    let count: usize = layout.shape.iter().product();
    let mut x: CudaSlice<T> = turn.upload(&layout.spread(&random::<T>(count, case.seed, case.spread)));
    let residual: CudaSlice<T> = turn.upload(&layout.spread(&random::<T>(count, case.seed ^ 1, case.spread)));
    let mut out: CudaSlice<O> = turn.upload(&layout.blank());
    let weight: CudaSlice<O> = turn.upload(norm.weight.data());
    let bias: Option<CudaSlice<O>> = norm.bias.as_ref().map(|bias| turn.upload(bias.data()));
    let norm = Norm { weight: weight.as_view(), bias: bias.as_ref().map(CudaSlice::as_view), eps: norm.eps };
    let mut target = layout.over(out.slice_mut(layout.lead..));
    if case.residual {
        let mut x = layout.over(x.slice_mut(layout.lead..));
        let residual = layout.over(residual.slice(layout.lead..));
        add_layer_norm(&turn.device, &turn.stream, &mut x, &residual, &norm, &mut target).unwrap();
    } else {
        let x = layout.over(x.slice(layout.lead..));
        layer_norm(&turn.device, &turn.stream, &x, &norm, &mut target).unwrap();
    }
    (layout.gather(&turn.download(&x)), layout.gather(&turn.download(&out)))
}

fn check<T: Value, O: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let [_, _, width] = case.layout.shape;
    let count: usize = case.layout.shape.iter().product();
    let norm = Norm {
        weight: tensor(&[width], random::<O>(width, case.seed ^ 2, 1.0)),
        bias: case.bias.then(|| tensor(&[width], random::<O>(width, case.seed ^ 3, 1.0))),
        eps: 1e-6,
    };
    let mut sum = random::<T>(count, case.seed, case.spread);
    if case.residual {
        let residual = random::<T>(count, case.seed ^ 1, case.spread);
        sum.iter_mut().zip(residual).for_each(|(x, r)| *x += r);
        sum = rounded::<T>(&sum);
    }
    let want = Reference::new().layer_norm(&tensor(&case.layout.shape, sum.clone()), &norm).unwrap();
    let (got_sum, got) = turn.in_every_order(|| on_device::<T, O>(turn, case, &norm));
    prop_assert_eq!(&got_sum, &sum, "the residual stream");
    for (at, (&got, &want)) in got.iter().zip(want.data()).enumerate() {
        prop_assert!(
            (got - want).abs() <= norm_tolerance::<O>(&sum[at / width * width..][..width], norm.eps, want),
            "row {}, column {}: {} instead of {}",
            at / width,
            at % width,
            got,
            want
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_are_those_of_the_reference(case in case(), dtype in 0..5) {
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
}

/// Every instantiation at its widest row, and one value less or more.
#[test]
fn every_width_boundary() {
    let Some(turn) = Turn::new() else { return };
    for width in [255, 256, 257, 511, 512, 513, 767, 768, 776, 1023, 1024, 1032, 2048, 4095, 4096] {
        let layout = Layout { shape: [1, 5, width], gap: 0, lead: 0 };
        let case = Case { layout, residual: true, bias: true, spread: 1.0, seed: width as u64 };
        check::<f32, f32>(&turn, &case).unwrap();
        check::<f16, f16>(&turn, &case).unwrap();
        check::<bf16, bf16>(&turn, &case).unwrap();
        check::<f32, f16>(&turn, &case).unwrap();
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let layout = Layout { shape: [1, 2, 64], gap: 0, lead: 0 };
    let case = Case { layout, residual: false, bias: false, spread: 1.0, seed: 1 };
    let norm = Norm { weight: tensor(&[64], vec![1.0; 64]), bias: None, eps: 1e-6 };
    let (x, got) = on_device::<f32, f32>(&turn, &case, &norm);
    let swapped = [&x[64..], &x[..64]].concat();
    let wrong = Reference::new().layer_norm(&tensor(&[1, 2, 64], swapped), &norm).unwrap();
    let close =
        |(&got, &want): (&f32, &f32)| (got - want).abs() <= norm_tolerance::<f32>(&x[..64], 1e-6, want);
    assert!(!got.iter().zip(wrong.data()).all(close), "rows in the wrong order are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let wide: CudaSlice<f32> = turn.upload(&vec![0.0; 5000]);
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; 5000]);
    let run = |x: Strided<_>, weight: usize, out: &mut CudaSlice<f32>, shape: [usize; 3]| {
        let norm = Norm { weight: wide.slice(..weight), bias: None, eps: 1e-6 };
        let mut out = Strided::new(out.as_view_mut(), shape);
        layer_norm(&turn.device, &turn.stream, &x, &norm, &mut out).unwrap_err().to_string()
    };
    let message = run(Strided::new(memory.as_view(), [1, 9, 8]), 8, &mut out, [1, 9, 8]);
    assert!(
        message.contains("x of shape [1, 9, 8] and strides [72, 8] reaches over 72 elements"),
        "{message}"
    );
    let message = run(Strided::new(memory.as_view(), [1, 8, 8]), 7, &mut out, [1, 8, 8]);
    assert!(message.contains("weight has 7 values, expected 8"), "{message}");
    let message = run(Strided::new(memory.as_view(), [1, 8, 8]), 8, &mut out, [1, 8, 7]);
    assert!(message.contains("out has shape [1, 8, 7], expected [1, 8, 8]"), "{message}");
    let message = run(Strided::new(wide.as_view(), [1, 1, 4097]), 4097, &mut out, [1, 1, 4097]);
    assert!(message.contains("rows have 4097 values, the kernels hold up to 4096"), "{message}");
    let halves: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let norm = Norm { weight: wide.slice(..8), bias: None, eps: 1e-6 };
    let mut target = Strided::new(out.as_view_mut(), [1, 8, 8]);
    let x = Strided::new(halves.as_view(), [1, 8, 8]);
    let message = layer_norm(&turn.device, &turn.stream, &x, &norm, &mut target).unwrap_err().to_string();
    assert!(message.contains("no kernel normalises rows of f16 to f32"), "{message}");
    let message = run(Strided::new(memory.as_view(), [0, 8, 8]), 8, &mut out, [0, 8, 8]);
    assert!(message.contains("x has shape [0, 8, 8]"), "{message}");
    turn.end();
}
