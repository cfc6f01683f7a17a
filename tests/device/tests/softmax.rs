//! kernels/softmax.cu against the definition in f64.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::cuda::{
    Strided,
    softmax::{softmax, softmax_in_place},
};
use foveate_device_tests::{Layout, Turn, Value, bits, random};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    /// Images, rows of each, values of a row; and their place in memory.
    layout: Layout,
    sized: bool,
    scale: f32,
    spread: f32,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let width = prop::sample::select(vec![
        1_usize, 2, 3, 8, 31, 32, 33, 64, 197, 255, 256, 257, 264, 577, 1024, 1025, 4096, 4097, 4104, 5000,
    ]);
    let rows = prop::sample::select(vec![1_usize, 2, 3, 5]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]);
    let scale = prop::sample::select(vec![1.0_f32, 0.125, -2.0]);
    let spread = prop::sample::select(vec![0.1_f32, 3.0, 50.0]);
    (1_usize..3, rows, width, place, any::<bool>(), scale, spread, any::<u64>()).prop_map(
        |(batch, rows, width, (gap, lead), sized, scale, spread, seed)| Case {
            layout: Layout { shape: [batch, rows, width], gap, lead },
            sized,
            scale,
            spread,
            seed,
        },
    )
}

fn sizes_of(case: &Case) -> Option<Vec<f32>> {
    let [batch, _, width] = case.layout.shape;
    case.sized
        .then(|| random::<f32>(batch * width, case.seed ^ 1, 8.0).iter().map(|s| s.abs().ceil()).collect())
}

fn on_device<T: Value>(turn: &Turn, case: &Case, x: &[f32], sizes: Option<&[f32]>) -> Vec<f32> {
    let layout = case.layout;
    let memory: CudaSlice<T> = turn.upload(&layout.spread(x));
    let sizes: Option<CudaSlice<f32>> = sizes.map(|sizes| turn.upload(sizes));
    let sizes = sizes.as_ref().map(CudaSlice::as_view);
    let mut out: CudaSlice<T> = turn.upload(&layout.blank());
    let source = layout.over(memory.slice(layout.lead..));
    let mut target = layout.over(out.slice_mut(layout.lead..));
    softmax(&turn.device, &turn.stream, &source, sizes.as_ref(), case.scale, &mut target).unwrap();
    let mut whole = memory.clone();
    let mut target = layout.over(whole.slice_mut(layout.lead..));
    softmax_in_place(&turn.device, &turn.stream, &mut target, sizes.as_ref(), case.scale).unwrap();
    let out = layout.gather(&turn.download(&out));
    assert_eq!(bits(&layout.gather(&turn.download(&whole))), bits(&out), "in place");
    out
}

/// What goes into the exponential, exactly, and the size of the terms it is made of: each is rounded to f32.
fn scores(case: &Case, x: &[f32], sizes: Option<&[f32]>) -> Vec<(f64, f64)> {
    let score = |(n, &x): (usize, &f32)| {
        let product = f64::from(x) * f64::from(case.scale);
        let log = sizes.map_or(0.0, |sizes| f64::from(sizes[n]).ln());
        (product + log, product.abs() + 2.0 * log.abs() + (product + log).abs())
    };
    x.iter().enumerate().map(score).collect()
}

/// A result is off by, relative to itself: what its own and the others' scores are off by (the largest that counts, twice),
/// their distance from the maximum times the roundings on its way (4), the exponential, the sum over lanes and warps and up
/// to N/512 values in line, the last two products (together less than 40 + N/512 units); then it is rounded to `T`.
fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let [batch, rows, width] = case.layout.shape;
    let x = random::<T>(batch * rows * width, case.seed, case.spread);
    let sizes = sizes_of(case);
    let got = turn.in_every_order(|| on_device::<T>(turn, case, &x, sizes.as_deref()));
    let smallest = if T::DTYPE == foveate::cuda::DType::F16 { 6.0e-8 } else { 1.0e-37 };
    for (row, (got, x)) in got.chunks(width).zip(x.chunks(width)).enumerate() {
        let sizes = sizes.as_ref().map(|sizes| &sizes[row / rows * width..][..width]);
        let scores = scores(case, x, sizes);
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(s.0));
        let sum: f64 = scores.iter().map(|s| (s.0 - max).exp()).sum();
        let counting = scores.iter().filter(|s| s.0 > max - 104.0);
        let largest = counting.fold(0.0_f64, |largest, s| largest.max(s.1));
        for (n, (&got, score)) in got.iter().zip(&scores).enumerate() {
            let want = (score.0 - max).exp() / sum;
            let units = 2.0 * largest + 4.0 * (max - score.0) + 40.0 + width as f64 / 512.0;
            let tolerance = want * (units * f64::from(f32::EPSILON) + f64::from(T::EPSILON)) + smallest;
            prop_assert!(
                (f64::from(got) - want).abs() <= tolerance,
                "row {}, column {}: {} instead of {}, tolerance {}",
                row,
                n,
                got,
                want,
                tolerance
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn rows_are_those_of_the_definition(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check::<f32>(&turn, &case)?,
            1 => check::<f16>(&turn, &case)?,
            _ => check::<bf16>(&turn, &case)?,
        }
        turn.end();
    }
}

fn some(rows: usize, width: usize, sized: bool) -> Case {
    let layout = Layout { shape: [2, rows, width], gap: 0, lead: 0 };
    Case { layout, sized, scale: 1.0, spread: 4.0, seed: width as u64 }
}

/// Every kernel at its longest row, and around.
#[test]
fn every_length_boundary() {
    let Some(turn) = Turn::new() else { return };
    for width in [248, 255, 256, 264, 1016, 1023, 1024, 1032, 4095, 4096, 4104, 8200] {
        let case = some(3, width, true);
        check::<f32>(&turn, &case).unwrap();
        check::<f16>(&turn, &case).unwrap();
        check::<bf16>(&turn, &case).unwrap();
    }
    turn.end();
}

#[test]
fn extremes_are_defined() {
    let Some(turn) = Turn::new() else { return };
    for width in [40, 41, 1000, 5000] {
        let case = some(6, width, false);
        let mut x = random::<f32>(2 * 6 * width, 1, 1.0);
        let row = |at: usize| at * width..(at + 1) * width;
        x[row(0)].fill(f32::NEG_INFINITY);
        x[row(1)].fill(f32::NEG_INFINITY);
        x[width + 7] = -3.0;
        x[2 * width + 3] = f32::NAN;
        x[3 * width + 3] = f32::INFINITY;
        x[row(4)].fill(-1e30);
        x[4 * width + 1] = 1e30;
        x[row(5)].fill(-1e30);
        let got = on_device::<f32>(&turn, &case, &x, None);
        assert!(got[row(0)].iter().all(|&y| y == 0.0), "nothing but -inf");
        let one = |range: &[f32], at: usize| range.iter().enumerate().all(|(n, &y)| y == f32::from(n == at));
        assert!(one(&got[row(1)], 7) && one(&got[row(4)], 1));
        assert!(got[2 * width..4 * width].iter().all(|y| y.is_nan()));
        let sum: f32 = got[row(5)].iter().sum();
        assert!((sum - 1.0).abs() <= f32::EPSILON * width as f32, "equal values share: {sum}");
        // A token of size 0 gets nothing; an image alone gives the bits it gives in a batch.
        let sizes: Vec<f32> = (0..2 * width).map(|n| f32::from(n % 3 != 0)).collect();
        let weighted = on_device::<f32>(&turn, &case, &x, Some(&sizes));
        let second = &weighted[6 * width..];
        let nothing = |(n, &y): (usize, &f32)| (y == 0.0) == (sizes[width + n % width] == 0.0);
        assert!(second.iter().enumerate().all(nothing));
        let alone = Case { layout: Layout { shape: [1, 6, width], ..case.layout }, ..case };
        let again = on_device::<f32>(&turn, &alone, &x[6 * width..], Some(&sizes[width..]));
        assert_eq!(bits(&again), bits(second));
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = some(2, 197, true);
    let x = random::<f32>(2 * 2 * 197, 1, 1.0);
    let sizes = sizes_of(&case).unwrap();
    let got = on_device::<f32>(&turn, &case, &x, Some(&sizes));
    let without = on_device::<f32>(&turn, &case, &x, None);
    assert!(got.iter().zip(&without).any(|(a, b)| (a - b).abs() > 1e-3), "sizes show");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let x: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let sizes: CudaSlice<f32> = turn.upload(&[1.0; 8]);
    let mut out: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let mut run = |from: [usize; 3], held: usize, to: [usize; 3]| {
        let mut target = Strided::new(out.as_view_mut(), to);
        let sizes = sizes.slice(..held);
        let source = Strided::new(x.as_view(), from);
        let result = softmax(&turn.device, &turn.stream, &source, Some(&sizes), 1.0, &mut target);
        result.unwrap_err().to_string()
    };
    assert!(run([1, 8, 8], 8, [1, 8, 7]).contains("out has shape [1, 8, 7], expected [1, 8, 8]"));
    assert!(run([1, 8, 8], 7, [1, 8, 8]).contains("sizes has 7 values, expected 8"));
    assert!(run([1, 9, 8], 8, [1, 8, 8]).contains("x of shape [1, 9, 8]"));
    assert!(run([1, 0, 8], 8, [1, 0, 8]).contains("x has shape [1, 0, 8]"));
    turn.end();
}

#[cfg(feature = "emulated")]
#[test]
fn rows_are_read_once_and_written_once() {
    use foveate_device_tests::traffic::Traffic;

    let Some(turn) = Turn::new() else { return };
    let [batch, rows] = [2, 6];
    for width in [197, 200, 577, 1370, 4104] {
        let x: CudaSlice<f16> = turn.upload(&random::<f16>(batch * rows * width, 1, 1.0));
        let sizes: CudaSlice<f32> = turn.upload(&vec![2.0; batch * width]);
        let sizes = sizes.as_view();
        let mut out: CudaSlice<f16> = turn.upload(&vec![0.0; batch * rows * width]);
        let traffic = Traffic::of(&turn, || {
            let source = Strided::new(x.as_view(), [batch, rows, width]);
            let mut target = Strided::new(out.as_view_mut(), [batch, rows, width]);
            softmax(&turn.device, &turn.stream, &source, Some(&sizes), 0.125, &mut target).unwrap();
        });
        assert!(traffic.over(batch * width * (2 * 2 * rows + 4)) <= 1.01);
    }
    turn.end();
}
