//! kernels/score.cu, and kernels/windows.cu, against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    backend::{Backend, Linear},
    cuda::{
        Strided,
        score::token_scores,
        windows::{Windows, add_windows, pool_windows},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    shape: [usize; 3],
    place: (usize, usize),
    bias: bool,
    noise: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let widths = prop::sample::select(vec![1_usize, 8, 31, 48, 64, 192, 384, 700]);
    let tokens = prop::sample::select(vec![1_usize, 2, 5, 33, 197]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]);
    (1_usize..3, tokens, widths, place, any::<(bool, bool)>(), any::<u64>()).prop_map(
        |(batch, tokens, width, place, (bias, noise), seed)| Case {
            shape: [batch, tokens, width],
            place,
            bias,
            noise,
            seed,
        },
    )
}

fn check_scores<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let &Case { shape: shape @ [batch, tokens, width], place, bias, noise, seed } = case;
    let layout = Layout { shape, gap: place.0, lead: place.1 };
    let x = random::<T>(shape.iter().product(), seed, 2.0);
    let weight = random::<T>(width, seed ^ 1, 1.0);
    let bias = bias.then(|| random::<T>(1, seed ^ 2, 1.0));
    let noise = noise.then(|| random::<f32>(batch * tokens, seed ^ 3, 3.0));
    let got = turn.in_every_order(|| {
        let memory: CudaSlice<T> = turn.upload(&layout.spread(&x));
        let weight: CudaSlice<T> = turn.upload(&weight);
        let bias: Option<CudaSlice<T>> = bias.as_ref().map(|bias| turn.upload(bias));
        let noise: Option<CudaSlice<f32>> = noise.as_ref().map(|noise| turn.upload(noise));
        let mut scores: CudaSlice<f32> = turn.upload(&vec![0.0; batch * tokens]);
        let selector = Linear { weight: weight.as_view(), bias: bias.as_ref().map(CudaSlice::as_view) };
        let noise = noise.as_ref().map(CudaSlice::as_view);
        let view = layout.over(memory.slice(layout.lead..));
        let mut out = scores.as_view_mut();
        token_scores(&turn.device, &turn.stream, &view, &selector, noise.as_ref(), &mut out).unwrap();
        turn.download(&scores)
    });
    let selector = Linear { weight: tensor(&[1, width], weight), bias: bias.map(|bias| tensor(&[1], bias)) };
    let noise = noise.map(|noise| tensor(&[batch, tokens], noise));
    let want = Reference::new().token_scores(&tensor(&shape, x), &selector, noise.as_ref()).unwrap();
    // A sum of C products of at most 2 in f32, a bias and a noise of at most 3.
    let limit = 4.0 * f32::EPSILON * (2.0 * (width as f32).sqrt() + 4.0);
    for (got, want) in got.iter().zip(want.data()) {
        prop_assert!((got - want).abs() <= limit, "{} instead of {}", got, want);
    }
    Ok(())
}

/// (rows, columns, special, width, scale)
type Grid = (usize, usize, usize, usize, usize);

fn check_windows<T: Value>(turn: &Turn, batch: usize, grid: Grid, seed: u64) -> Result<(), TestCaseError> {
    let (rows, columns, special, width, scale) = grid;
    let windows = Windows { batch, special, grid: [rows, columns], width, scale };
    let cells = windows.cells()[0] * windows.cells()[1];
    let shape = [batch, windows.tokens(), width];
    let x = random::<T>(shape.iter().product(), seed, 1.0);
    let coarse = random::<T>(batch * cells * width, seed ^ 1, 1.0);
    let (pooled, added) = turn.in_every_order(|| {
        let mut memory: CudaSlice<T> = turn.upload(&x);
        let mut pooled: CudaSlice<T> = turn.upload(&vec![0.0; batch * cells * width]);
        let coarse: CudaSlice<T> = turn.upload(&coarse);
        let (device, stream) = (&turn.device, &turn.stream);
        pool_windows(device, stream, &memory.as_view(), windows, &mut pooled.as_view_mut()).unwrap();
        add_windows(device, stream, &mut memory.as_view_mut(), windows, &coarse.as_view()).unwrap();
        (turn.download(&pooled), turn.download(&memory))
    });
    let (reference, x) = (Reference::new(), tensor(&shape, x));
    let want = reference.pool_windows(&x, special, [rows, columns], scale).unwrap();
    // The same sums in the same order, rounded once.
    let rounded: Vec<f32> = want.data().iter().map(|&v| T::of(v).wide()).collect();
    prop_assert_eq!(pooled, rounded);
    let coarse = tensor(&[batch, cells, width], coarse);
    let want = reference.add_windows(x, &coarse, special, [rows, columns], scale).unwrap();
    let rounded: Vec<f32> = want.data().iter().map(|&v| T::of(v).wide()).collect();
    prop_assert_eq!(added, rounded);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn scores_are_those_of_the_reference(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check_scores::<f32>(&turn, &case)?,
            1 => check_scores::<f16>(&turn, &case)?,
            _ => check_scores::<bf16>(&turn, &case)?,
        }
        turn.end();
    }

    #[test]
    fn windows_are_those_of_the_reference(
        batch in 1_usize..3,
        grid in (1_usize..15, 1_usize..9, 0_usize..3, prop::sample::select(vec![1_usize, 5, 8, 64]), 1_usize..6),
        dtype in 0..3,
        seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check_windows::<f32>(&turn, batch, grid, seed)?,
            1 => check_windows::<f16>(&turn, batch, grid, seed)?,
            _ => check_windows::<bf16>(&turn, batch, grid, seed)?,
        }
        turn.end();
    }
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    let x: CudaSlice<f32> = turn.upload(&[0.5; 60]);
    let mut out: CudaSlice<f32> = turn.upload(&[0.0; 6]);
    let selector = Linear { weight: x.slice(..9), bias: None };
    let view = Strided::new(x.as_view(), [2, 3, 10]);
    let error = token_scores(device, stream, &view, &selector, None, &mut out.as_view_mut()).unwrap_err();
    assert!(error.to_string().contains("token_scores: weight has 9 values, expected 10"), "{error}");
    let windows = Windows { batch: 1, special: 1, grid: [2, 3], width: 8, scale: 2 };
    let error = pool_windows(device, stream, &x.as_view(), windows, &mut out.as_view_mut()).unwrap_err();
    assert!(error.to_string().contains("pool_windows: x has 60 values, expected 56"), "{error}");
    let nothing = Windows { scale: 0, ..windows };
    let error = pool_windows(device, stream, &x.slice(..56), nothing, &mut out.as_view_mut()).unwrap_err();
    assert!(error.to_string().contains("pool_windows"), "{error}");
    turn.end();
}
