//! kernels/performer.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::Backend,
    cuda::{
        Strided,
        performer::{partial_length, performer},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    width: usize,
    features: usize,
    gap: usize,
    lead: usize,
    /// Of the values; the features' arguments are some tens times its square.
    spread: f32,
    seed: u64,
}

impl Case {
    fn layout(&self, width: usize) -> Layout {
        Layout { shape: [self.batch, self.tokens, width], gap: self.gap, lead: self.lead }
    }

    fn inputs<T: Value>(&self) -> (Tensor, Tensor) {
        let Self { batch, tokens, width, features, seed, spread, .. } = *self;
        let packed = random::<T>(batch * tokens * 3 * width, seed, spread);
        let w = random::<f32>(features * width, seed ^ 1, 2.0);
        (tensor(&[batch, tokens, 3 * width], packed), tensor(&[features, width], w))
    }

    fn on_device<T: Value>(&self, turn: &Turn, packed: &Tensor, w: &Tensor) -> Vec<f32> {
        let (from, to) = (self.layout(3 * self.width), self.layout(self.width));
        let memory: CudaSlice<T> = turn.upload(&from.spread(packed.data()));
        let weight: CudaSlice<f32> = turn.upload(w.data());
        let length = partial_length(self.batch, self.tokens, self.width, self.features);
        turn.in_every_order(|| {
            let mut out: CudaSlice<T> = turn.upload(&to.blank());
            let mut partial: CudaSlice<f32> = turn.upload(&vec![f32::NAN; length]);
            let (source, mut target) =
                (from.over(memory.slice(from.lead..)), to.over(out.slice_mut(to.lead..)));
            let (weight, mut partial) = (weight.as_view(), partial.as_view_mut());
            let (device, stream) = (&turn.device, &turn.stream);
            performer(device, stream, &source, &weight, self.features, &mut partial, &mut target).unwrap();
            to.gather(&turn.download(&out))
        })
    }
}

/// The definition in double precision: the N x N way, and how large each result's terms are.
fn defined(packed: &Tensor, w: &Tensor) -> (Vec<f64>, Vec<f64>) {
    let (batch, n, width) = (packed.dim(0), packed.dim(1), packed.width() / 3);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let scale = (w.dim(0) as f64).powf(-0.5);
    let phi = |a: &[f32]| -> Vec<f64> {
        w.data().chunks(width).map(|row| (dot(a, row) - dot(a, a) / 2.0).exp() * scale).collect()
    };
    let (mut values, mut sizes) = (Vec::new(), Vec::new());
    for image in 0..batch {
        let row = |token: usize| &packed.item(image)[token * 3 * width..(token + 1) * 3 * width];
        let keys: Vec<Vec<f64>> = (0..n).map(|token| phi(&row(token)[..width])).collect();
        for token in 0..n {
            let query = phi(&row(token)[width..2 * width]);
            let map = keys.iter().map(|key| key.iter().zip(&query).map(|(a, b)| a * b).sum::<f64>());
            let map: Vec<f64> = map.collect();
            let below = map.iter().sum::<f64>() + 1e-8;
            for column in 2 * width..3 * width {
                let terms =
                    || map.iter().enumerate().map(|(s, weight)| weight * f64::from(row(s)[column]) / below);
                values.push(terms().sum());
                sizes.push(terms().map(f64::abs).sum());
            }
        }
    }
    (values, sizes)
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let (packed, w) = case.inputs::<T>();
    let got = case.on_device::<T>(turn, &packed, &w);
    let want = Reference::new().performer(&packed, &w).unwrap();
    let (exact, sizes) = defined(&packed, &w);
    // A feature's argument is off by eps·sqrt(D) of its terms, at most D·(2·spread + spread²/2), which its exponential takes over;
    // numerator and denominator are sums of N·m features.
    let argument = case.width as f32 * (2.0 * case.spread + case.spread.powi(2) / 2.0);
    let sums = ((case.tokens * case.features) as f32).sqrt();
    let relative = f32::EPSILON * (4.0 * argument + 8.0 + 4.0 * sums);
    for (at, &got) in got.iter().enumerate() {
        let size = sizes[at] as f32;
        let tolerance = relative * size + T::EPSILON * (exact[at].abs() as f32 + relative * size) + 6.0e-8;
        for (name, want) in [("the definition", exact[at] as f32), ("the reference", want.data()[at])] {
            prop_assert!(
                (got - want).abs() <= 2.0 * tolerance,
                "{case:?}[{at}]: {got} instead of {want} by {name}"
            );
        }
    }
    Ok(())
}

prop_compose! {
    fn case()(
        batch in 1_usize..3, tokens in prop::sample::select(vec![1_usize, 2, 63, 64, 65, 197, 257]),
        width in prop::sample::select(vec![1_usize, 8, 16, 33, 64]), features in prop::sample::select(vec![1_usize, 8, 31, 32]),
        (gap, lead) in prop::sample::select(vec![(0_usize, 0_usize), (8, 8), (1, 3)]),
        spread in prop::sample::select(vec![0.25_f32, 1.0]), seed in any::<u64>(),
    ) -> Case {
        Case { batch, tokens, width, features, gap, lead, spread, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn results_are_those_of_the_definition_and_of_the_reference(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check::<f32>(&turn, &case)?,
            1 => check::<f16>(&turn, &case)?,
            _ => check::<bf16>(&turn, &case)?,
        }
        turn.end();
    }
}

const PLAIN: Case =
    Case { batch: 2, tokens: 70, width: 16, features: 8, gap: 0, lead: 0, spread: 1.0, seed: 4 };

/// An image alone gives the bits it gives in a batch; where all features are 0, so is the result.
#[test]
fn images_are_independent_and_nothing_is_divided_by_nothing() {
    let Some(turn) = Turn::new() else { return };
    let (packed, w) = PLAIN.inputs::<f32>();
    let both = PLAIN.on_device::<f32>(&turn, &packed, &w);
    let second = tensor(&[1, 70, 48], packed.item(1).to_vec());
    let alone = Case { batch: 1, ..PLAIN }.on_device::<f32>(&turn, &second, &w);
    assert_eq!(both[70 * 16..], alone);
    let far = tensor(&[2, 70, 48], vec![40.0; packed.data().len()]);
    assert!(PLAIN.on_device::<f32>(&turn, &far, &w).iter().all(|&y| y == 0.0));
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let (packed, w) = PLAIN.inputs::<f32>();
    let got = PLAIN.on_device::<f32>(&turn, &packed, &w);
    // Queries in the place of keys.
    let swapped = packed.data().chunks(16).collect::<Vec<_>>();
    let swapped = swapped.chunks(3).flat_map(|row| [row[1], row[0], row[2]].concat()).collect();
    let (swapped, _) = defined(&tensor(&[2, 70, 48], swapped), &w);
    assert!(got.iter().zip(swapped).any(|(got, want)| (f64::from(*got) - want).abs() > 1e-3));
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&[0.0; 4096]);
    let (mut partial, mut out): (CudaSlice<f32>, CudaSlice<f32>) =
        (turn.upload(&[0.0; 4096]), turn.upload(&[0.0; 4096]));
    let mut run = |shape: [usize; 3], out_shape: [usize; 3], features: usize, weights: usize, room: usize| {
        let source = Strided::new(memory.as_view(), shape);
        let mut target = Strided::new(out.as_view_mut(), out_shape);
        let (weight, mut partial) = (memory.slice(..weights), partial.slice_mut(..room));
        let result =
            performer(&turn.device, &turn.stream, &source, &weight, features, &mut partial, &mut target);
        result.unwrap_err().to_string()
    };
    for (message, part) in [
        (run([1, 4, 24], [1, 4, 8], 3, 23, 27), "weight has 23 values, expected 24"),
        (run([1, 4, 24], [1, 4, 8], 3, 24, 26), "partial has 26 values, expected 27"),
        (run([1, 4, 25], [1, 4, 8], 3, 24, 27), "packed has shape [1, 4, 25], expected [1, 4, 24]"),
        (
            run([1, 4, 24], [1, 4, 8], 33, 264, 297),
            "33 random features of 8 values; the kernels take up to 32 of up to 64",
        ),
        (run([1, 4, 195], [1, 4, 65], 3, 195, 198), "3 random features of 65 values"),
        (run([1, 4, 24], [1, 4, 8], 0, 0, 0), "0 random features"),
    ] {
        assert!(message.contains(part), "{message}");
    }
    turn.end();
}
