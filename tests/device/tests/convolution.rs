//! kernels/convolution.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{Convolution, Depthwise, GridBackend},
    cuda::{
        Strided,
        convolution::{convolution, depthwise},
    },
    model::Activation,
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

const ACTIVATIONS: [Option<Activation>; 4] =
    [None, Some(Activation::Silu), Some(Activation::Relu), Some(Activation::Gelu)];

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    grid: [usize; 2],
    inputs: usize,
    /// Channels of a dense convolution's result; none for a depthwise one.
    outputs: Option<usize>,
    stride: usize,
    activations: [usize; 2],
    gap: usize,
    lead: usize,
    seed: u64,
}

impl Case {
    fn layouts(&self) -> [Layout; 2] {
        let Self { batch, grid, inputs, gap, lead, .. } = *self;
        let positions = grid[0].div_ceil(self.stride) * grid[1].div_ceil(self.stride);
        let outputs = self.outputs.unwrap_or(inputs);
        [[batch, grid[0] * grid[1], inputs], [batch, positions, outputs]].map(|shape| Layout {
            shape,
            gap,
            lead,
        })
    }
}

/// The reference's result and the device's.
fn both<T: Value>(turn: &Turn, case: &Case) -> (Tensor, Vec<f32>) {
    let [from, to] = case.layouts();
    let values = random::<T>(from.shape.iter().product(), case.seed, 2.0);
    let rows = if case.outputs.is_some() { 9 * case.inputs } else { 9 };
    let weight = tensor(&[rows, to.shape[2]], random::<T>(rows * to.shape[2], case.seed ^ 1, 0.5));
    let bias = tensor(&[to.shape[2]], random::<T>(to.shape[2], case.seed ^ 2, 1.0));
    let [before, activation] = case.activations.map(|which| ACTIVATIONS[which]);
    let x: CudaSlice<T> = turn.upload(&from.spread(&values));
    let mut out: CudaSlice<T> = turn.upload(&to.blank());
    let up = |tensor: &Tensor| -> CudaSlice<T> { turn.upload(tensor.data()) };
    let (w, b) = (up(&weight), up(&bias));
    let (source, mut target) = (from.over(x.slice(from.lead..)), to.over(out.slice_mut(to.lead..)));
    let (device, stream, stride) = (&turn.device, &turn.stream, case.stride);
    let (weight_view, bias_view) = (w.as_view(), b.as_view());
    let x = tensor(&from.shape, values);
    let want = if case.outputs.is_some() {
        let layer = Convolution { weight: weight_view, bias: bias_view, stride, activation };
        convolution(device, stream, &source, case.grid, &layer, &mut target).unwrap();
        Reference::new().convolution(&x, case.grid, &Convolution { weight, bias, stride, activation })
    } else {
        let layer = Depthwise { weight: weight_view, bias: bias_view, stride, before, activation };
        depthwise(device, stream, &source, case.grid, &layer, &mut target).unwrap();
        Reference::new().depthwise(&x, case.grid, &Depthwise { weight, bias, stride, before, activation })
    };
    (want.unwrap(), to.gather(&turn.download(&out)))
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let (want, got) = both::<T>(turn, case);
    // Sums of at most 9·I products of up to 1, in two orders, and exponentials within a few units; then the rounding.
    let terms = (9 * case.outputs.map_or(1, |_| case.inputs)) as f32;
    let sums = 8.0 * f32::EPSILON * terms.sqrt() * 4.0;
    for (at, (&got, &want)) in got.iter().zip(want.data()).enumerate() {
        let tolerance = sums + T::EPSILON * (want.abs() + sums) + 6.0e-8;
        prop_assert!((got - want).abs() <= tolerance, "{case:?}[{at}]: {got} instead of {want}");
    }
    Ok(())
}

fn case() -> impl Strategy<Value = Case> {
    let channels = prop::sample::select(vec![1_usize, 3, 4, 8, 12, 33]);
    let outputs = prop::option::of(prop::sample::select(vec![1_usize, 5, 8, 16]));
    let place = prop::sample::select(vec![(0_usize, 0_usize), (4, 8), (1, 0), (0, 3)]);
    let sides = (1_usize..12, 1_usize..22);
    (1_usize..3, sides, channels, outputs, 1_usize..3, (0_usize..4, 0_usize..4), place, any::<u64>())
        .prop_map(|(batch, grid, inputs, outputs, stride, activations, (gap, lead), seed)| Case {
            batch,
            grid: grid.into(),
            inputs,
            outputs,
            stride,
            activations: activations.into(),
            gap,
            lead,
            seed,
        })
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

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = Case {
        batch: 1,
        grid: [5, 6],
        inputs: 4,
        outputs: None,
        stride: 1,
        activations: [0, 0],
        gap: 0,
        lead: 0,
        seed: 5,
    };
    let (want, got) = both::<f32>(&turn, &case);
    let shifted: Vec<f32> = got[4..].iter().chain(&got[..4]).copied().collect();
    let far = |values: &[f32]| values.iter().zip(want.data()).any(|(a, b)| (a - b).abs() > 1e-4);
    assert!(!far(&got) && far(&shifted), "another position is seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&vec![0.0; 1024]);
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; 1024]);
    let mut run = |grid: [usize; 2], stride: usize, shape: [usize; 3], weights: usize, activation| {
        let layer = Depthwise {
            weight: memory.slice(..weights),
            bias: memory.slice(..4),
            stride,
            before: None,
            activation,
        };
        let x = Strided::new(memory.as_view(), [1, 12, 4]);
        let mut out = Strided::new(out.as_view_mut(), shape);
        depthwise(&turn.device, &turn.stream, &x, grid, &layer, &mut out).unwrap_err().to_string()
    };
    for (message, part) in [
        (run([3, 5], 1, [1, 12, 4], 36, None), "x has shape [1, 12, 4], which is no feature map of 3x5"),
        (run([3, 4], 3, [1, 12, 4], 36, None), "stride 3; 1 and 2 are supported"),
        (run([3, 4], 0, [1, 12, 4], 36, None), "stride 0"),
        (run([3, 4], 2, [1, 12, 4], 36, None), "out has shape [1, 12, 4], expected [1, 4, 4]"),
        (run([3, 4], 1, [1, 12, 5], 36, None), "out has 5 channels, expected the 4 of x"),
        (run([3, 4], 1, [1, 12, 4], 35, None), "weight has 35 values, expected 36"),
        (run([3, 4], 1, [1, 12, 4], 36, Some(Activation::QuickGelu)), "activation quick_gelu"),
    ] {
        assert!(message.contains(part), "{message}");
    }
    turn.end();
}
