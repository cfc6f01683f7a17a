//! `kernels/grid_norm.cu` against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{GridBackend, Norm, NormOver},
    cuda::{
        Strided,
        grid_norm::{grid_norm, moments_length},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, norm_tolerance, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

const KINDS: [NormOver; 3] = [NormOver::Image, NormOver::Position, NormOver::Nothing];

#[derive(Clone, Copy, Debug)]
struct Case {
    layout: Layout,
    over: NormOver,
    bias: bool,
    spread: f32,
    /// Added to every value: a mean far from 0 must not cost digits.
    shift: f32,
    seed: u64,
}

fn on_device<T: Value>(turn: &Turn, case: &Case, values: &[f32], norm: &Norm<Tensor>) -> Vec<f32> {
    let Case { layout, over, .. } = case;
    let x: CudaSlice<T> = turn.upload(&layout.spread(values));
    let mut out: CudaSlice<T> = turn.upload(&layout.blank());
    let weight: CudaSlice<T> = turn.upload(norm.weight.data());
    let bias: Option<CudaSlice<T>> = norm.bias.as_ref().map(|bias| turn.upload(bias.data()));
    let norm = Norm { weight: weight.as_view(), bias: bias.as_ref().map(CudaSlice::as_view), eps: norm.eps };
    let mut moments = turn.stream.alloc_zeros::<f32>(moments_length(layout.shape)).unwrap();
    let source = layout.over(x.slice(layout.lead..));
    let mut target = layout.over(out.slice_mut(layout.lead..));
    let room = &mut moments.as_view_mut();
    grid_norm(&turn.device, &turn.stream, &source, *over, &norm, &mut target, room).unwrap();
    layout.gather(&turn.download(&out))
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let [_, tokens, width] = case.layout.shape;
    let count: usize = case.layout.shape.iter().product();
    let norm = Norm {
        weight: tensor(&[width], random::<T>(width, case.seed ^ 2, 1.0)),
        bias: case.bias.then(|| tensor(&[width], random::<T>(width, case.seed ^ 3, 1.0))),
        eps: 1e-5,
    };
    let values = random::<T>(count, case.seed, case.spread).into_iter();
    let values: Vec<f32> = values.map(|value| T::of(value + case.shift).wide()).collect();
    let want =
        Reference::new().grid_norm(&tensor(&case.layout.shape, values.clone()), case.over, &norm).unwrap();
    let got = turn.in_every_order(|| on_device::<T>(turn, case, &values, &norm));
    let span = if case.over == NormOver::Image { tokens * width } else { width };
    for (at, (&got, &want)) in got.iter().zip(want.data()).enumerate() {
        let row = &values[at / span * span..][..span];
        let tolerance = match case.over {
            NormOver::Nothing => {
                T::EPSILON * (want.abs() + 1.0) + 4.0 * f32::EPSILON * (case.spread + case.shift)
            }
            _ => norm_tolerance::<T>(row, norm.eps, want),
        };
        prop_assert!((got - want).abs() <= tolerance, "{case:?}[{at}]: {got} instead of {want}");
    }
    Ok(())
}

fn case() -> impl Strategy<Value = Case> {
    let tokens = prop::sample::select(vec![1_usize, 2, 9, 64, 100]);
    let widths = prop::sample::select(vec![1_usize, 7, 8, 48, 64, 104, 264]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (8, 8), (1, 0), (0, 3)]);
    let values = prop::sample::select(vec![(1.0_f32, 0.0_f32), (1e-2, 0.0), (1.0, 30.0), (0.0, 2.0)]);
    (1_usize..4, tokens, widths, place, 0_usize..3, values, any::<bool>(), any::<u64>()).prop_map(
        |(batch, tokens, width, (gap, lead), over, (spread, shift), bias, seed)| Case {
            layout: Layout { shape: [batch, tokens, width], gap, lead },
            over: KINDS[over],
            bias,
            spread,
            shift,
            seed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn results_are_those_of_the_reference(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check::<f32>(&turn, &case)?,
            1 => check::<f16>(&turn, &case)?,
            _ => check::<bf16>(&turn, &case)?,
        }
        turn.end();
    }
}

/// One value less and one more than whole chunks of a block.
#[test]
fn every_chunk_boundary() {
    let Some(turn) = Turn::new() else { return };
    for (tokens, width) in [(4095, 1), (4096, 1), (4097, 1), (512, 8), (513, 8), (256, 64)] {
        let layout = Layout { shape: [2, tokens, width], gap: 0, lead: 0 };
        let case = Case { layout, over: NormOver::Image, bias: true, spread: 1.0, shift: 3.0, seed: 7 };
        check::<f32>(&turn, &case).unwrap();
        check::<f16>(&turn, &case).unwrap();
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let layout = Layout { shape: [2, 4, 8], gap: 0, lead: 0 };
    let case = Case { layout, over: NormOver::Image, bias: false, spread: 1.0, shift: 0.0, seed: 1 };
    let norm = Norm { weight: tensor(&[8], vec![1.0; 8]), bias: None, eps: 1e-5 };
    let mut values = random::<f32>(64, 1, 1.0);
    // A different spread at each position: statistics over positions or over the batch are not those over an image.
    values.iter_mut().enumerate().for_each(|(i, value)| *value *= (1 + i / 8) as f32);
    let got = on_device::<f32>(&turn, &case, &values, &norm);
    let x = tensor(&[2, 4, 8], values);
    let far = |over| {
        let want = Reference::new().grid_norm(&x, over, &norm).unwrap();
        got.iter().zip(want.data()).any(|(a, b)| (a - b).abs() > 1e-4)
    };
    assert!(!far(NormOver::Image) && far(NormOver::Position) && far(NormOver::Nothing));
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&vec![0.0; 8192]);
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; 8192]);
    let mut moments = turn.stream.alloc_zeros::<f32>(8).unwrap();
    let mut run = |over, shape: [usize; 3], weights: usize, target: [usize; 3], room: usize| {
        let norm = Norm { weight: memory.slice(..weights), bias: None, eps: 1e-5 };
        let x = Strided::new(memory.as_view(), shape);
        let mut out = Strided::new(out.as_view_mut(), target);
        let room = &mut moments.slice_mut(..room);
        grid_norm(&turn.device, &turn.stream, &x, over, &norm, &mut out, room).unwrap_err().to_string()
    };
    for (message, part) in [
        (run(NormOver::Image, [2, 4, 8], 7, [2, 4, 8], 8), "weight has 7 values, expected 8"),
        (run(NormOver::Image, [2, 4, 8], 8, [2, 4, 7], 8), "out has shape [2, 4, 7], expected [2, 4, 8]"),
        (run(NormOver::Image, [2, 4, 8], 8, [2, 4, 8], 2), "moments holds 2 values, 4 are needed"),
        (run(NormOver::Position, [1, 1, 4097], 4097, [1, 1, 4097], 0), "rows have 4097 values"),
        (run(NormOver::Nothing, [0, 4, 8], 8, [0, 4, 8], 0), "x has shape [0, 4, 8]"),
    ] {
        assert!(message.contains(part), "{message}");
    }
    turn.end();
}
