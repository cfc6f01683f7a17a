//! kernels/reduce.cu against the definitions in f64.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::cuda::{
    Strided,
    reduce::{Reduction, reduce},
};
use foveate_device_tests::{Layout, Turn, Value, bits, random};
use half::{bf16, f16};
use proptest::prelude::*;

fn on_device<T: Value>(turn: &Turn, reduction: Reduction, layout: Layout, x: &[f32]) -> Vec<f32> {
    let [batch, tokens, width] = layout.shape;
    let count = batch * if reduction == Reduction::ColumnMean { width } else { tokens };
    let memory: CudaSlice<T> = turn.upload(&layout.spread(x));
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; count]);
    let source = layout.over(memory.slice(layout.lead..));
    reduce(&turn.device, &turn.stream, reduction, &source, &mut out.as_view_mut()).unwrap();
    turn.download(&out)
}

/// The values behind each result.
fn groups(reduction: Reduction, [_, tokens, width]: [usize; 3], x: &[f32]) -> Vec<Vec<f32>> {
    if reduction != Reduction::ColumnMean {
        return x.chunks(width).map(<[f32]>::to_vec).collect();
    }
    let column = |image: &[f32], c: usize| image.iter().skip(c).step_by(width).copied().collect();
    x.chunks(tokens * width)
        .flat_map(|image| (0..width).map(|c| column(image, c)).collect::<Vec<_>>())
        .collect()
}

/// A sum of K values in f32 is off by half a unit in the last place of the sum of their sizes for every addition that a value
/// goes through: at most K/8 in line (8 rows of threads over the rows of narrow columns), and 24 across lanes and warps.
fn check<T: Value>(
    turn: &Turn,
    reduction: Reduction,
    layout: Layout,
    seed: u64,
) -> Result<(), TestCaseError> {
    let x = random::<T>(layout.shape.iter().product(), seed, 5.0);
    let got = turn.in_every_order(|| on_device::<T>(turn, reduction, layout, &x));
    let groups = groups(reduction, layout.shape, &x);
    prop_assert_eq!(got.len(), groups.len());
    for (at, (&got, group)) in got.iter().zip(&groups).enumerate() {
        if reduction == Reduction::RowMax {
            prop_assert_eq!(got, group.iter().copied().fold(f32::NEG_INFINITY, f32::max), "row {}", at);
            continue;
        }
        let count = group.len() as f64;
        let divisor = if reduction == Reduction::ColumnMean { count } else { 1.0 };
        let want = group.iter().map(|&x| f64::from(x)).sum::<f64>() / divisor;
        let sizes = group.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / divisor;
        let tolerance = f64::from(f32::EPSILON) / 2.0 * ((count / 8.0 + 24.0) * sizes + 2.0 * want.abs());
        prop_assert!(
            (f64::from(got) - want).abs() <= tolerance,
            "result {}: {} instead of {}",
            at,
            got,
            want
        );
    }
    Ok(())
}

fn reduction() -> impl Strategy<Value = Reduction> {
    prop::sample::select(vec![Reduction::RowSum, Reduction::RowMax, Reduction::ColumnMean])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn reductions_are_those_of_the_definition(
        batch in 1_usize..4, tokens in prop::sample::select(vec![1_usize, 2, 7, 33, 130]),
        width in prop::sample::select(vec![1_usize, 2, 8, 31, 64, 65, 197, 384, 1023, 1024, 1025, 1032, 3000]),
        place in prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]),
        reduction in reduction(), dtype in 0..3, seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, tokens, width], gap: place.0, lead: place.1 };
        match dtype {
            0 => check::<f32>(&turn, reduction, layout, seed)?,
            1 => check::<f16>(&turn, reduction, layout, seed)?,
            _ => check::<bf16>(&turn, reduction, layout, seed)?,
        }
        turn.end();
    }
}

#[test]
fn extremes_stay_where_they_are() {
    let Some(turn) = Turn::new() else { return };
    for width in [40, 41, 2000] {
        let layout = Layout { shape: [2, 5, width], gap: 0, lead: 0 };
        let mut x = random::<f32>(2 * 5 * width, 1, 1.0);
        x[7] = f32::NAN;
        x[width..2 * width].fill(f32::NAN);
        x[2 * width + 3] = f32::INFINITY;
        x[3 * width..4 * width].fill(f32::NEG_INFINITY);
        let max = on_device::<f32>(&turn, Reduction::RowMax, layout, &x);
        assert!(max[0].is_finite(), "NaN is not a maximum beside numbers");
        assert!(max[1].is_nan() && max[2] == f32::INFINITY && max[3] == f32::NEG_INFINITY);
        let sum = on_device::<f32>(&turn, Reduction::RowSum, layout, &x);
        assert!(sum[0].is_nan() && sum[1].is_nan() && sum[2] == f32::INFINITY && sum[3] == f32::NEG_INFINITY);
        assert!(sum[4..].iter().all(|y| y.is_finite()));
        let mean = on_device::<f32>(&turn, Reduction::ColumnMean, layout, &x);
        assert!(mean[..width].iter().all(|y| y.is_nan()) && mean[width..].iter().all(|y| y.is_finite()));
        // An image alone gives the bits it gives in a batch.
        let alone = Layout { shape: [1, 5, width], ..layout };
        for (reduction, all, results) in [
            (Reduction::RowSum, &sum, 5),
            (Reduction::RowMax, &max, 5),
            (Reduction::ColumnMean, &mean, width),
        ] {
            let again = on_device::<f32>(&turn, reduction, alone, &x[5 * width..]);
            assert_eq!(bits(&again), bits(&all[results..]));
        }
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let layout = Layout { shape: [1, 16, 16], gap: 0, lead: 0 };
    let x = random::<f32>(256, 1, 1.0);
    let columns = on_device::<f32>(&turn, Reduction::ColumnMean, layout, &x);
    let transposed: Vec<f32> = (0..256).map(|at| x[at % 16 * 16 + at / 16]).collect();
    let rows = on_device::<f32>(&turn, Reduction::ColumnMean, layout, &transposed);
    assert!(columns.iter().zip(rows).any(|(a, b)| (a - b).abs() > 0.01), "rows for columns are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let x: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let mut out: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let mut run = |reduction, shape: [usize; 3], held: usize| {
        let source = Strided::new(x.as_view(), shape);
        let mut out = out.slice_mut(..held);
        reduce(&turn.device, &turn.stream, reduction, &source, &mut out).unwrap_err().to_string()
    };
    assert!(run(Reduction::RowSum, [1, 8, 8], 7).contains("out has 7 values, expected 8"));
    assert!(run(Reduction::ColumnMean, [2, 8, 4], 16).contains("out has 16 values, expected 8"));
    assert!(run(Reduction::RowMax, [1, 9, 8], 9).contains("x of shape [1, 9, 8]"));
    assert!(run(Reduction::RowMax, [1, 8, 0], 8).contains("x has shape [1, 8, 0]"));
    turn.end();
}

#[cfg(feature = "emulated")]
#[test]
fn values_are_read_once() {
    use foveate_device_tests::traffic::Traffic;

    let Some(turn) = Turn::new() else { return };
    for [batch, tokens, width] in [[2, 197, 384], [2, 12, 4096], [2, 197, 197]] {
        let x: CudaSlice<f16> = turn.upload(&random::<f16>(batch * tokens * width, 1, 1.0));
        let source = Strided::new(x.as_view(), [batch, tokens, width]);
        let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; batch * tokens.max(width)]);
        for (reduction, results) in
            [(Reduction::RowSum, tokens), (Reduction::RowMax, tokens), (Reduction::ColumnMean, width)]
        {
            let traffic = Traffic::of(&turn, || {
                let mut out = out.slice_mut(..batch * results);
                reduce(&turn.device, &turn.stream, reduction, &source, &mut out).unwrap();
            });
            assert!(traffic.over(batch * (2 * tokens * width + 4 * results)) <= 1.01);
            assert!(width % 8 > 0 || traffic.loads() == 1.0);
        }
    }
    turn.end();
}
