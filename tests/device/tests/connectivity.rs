//! kernels/connectivity.cu against the reference, bit for bit.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    connectivity::Update,
    cuda::connectivity::{drop_and_grow, workspace_bytes},
    reference::connectivity::drop_and_grow as reference,
};
use foveate_device_tests::{Turn, Value, random};
use half::{bf16, f16};
use proptest::prelude::*;

/// A layer as the device stores it.
struct Layer<T> {
    weight: Vec<T>,
    gradient: Vec<T>,
    mask: Vec<u8>,
}

/// What values are like.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// All different, more or less.
    Plain,
    /// Few different ones, so that they tie; many zeros.
    Ties,
    /// NaN, infinities, negative zero and denormal numbers among them.
    Odd,
    /// Gradients of zero.
    Dead,
}

const KINDS: [Kind; 4] = [Kind::Plain, Kind::Ties, Kind::Odd, Kind::Dead];

impl<T: Value> Layer<T> {
    fn new(count: usize, density: f32, kind: Kind, seed: u64) -> Self {
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-7, -1e-7, 65504.0, 0.0];
        let of = |x: f32| match kind {
            Kind::Ties => (3.0 * x).round() / 4.0,
            Kind::Odd if x.abs() < 0.4 => odd[(x.abs() * 19.9) as usize],
            Kind::Plain | Kind::Dead | Kind::Odd => x,
        };
        let uniform = random::<f32>(count, seed, 1.0);
        let mask = uniform.iter().map(|&x| u8::from(f32::midpoint(x, 1.0) < density) * 3).collect();
        let gradient = random::<f32>(count, seed ^ 2, 1.0);
        let gradient =
            gradient.into_iter().map(|x| T::of(if matches!(kind, Kind::Dead) { 0.0 } else { of(x) }));
        // What is outside the mask is not zero here: it counts as that.
        let weight = random::<f32>(count, seed ^ 1, 1.0).into_iter().map(|x| T::of(of(x)));
        Self { weight: weight.collect(), gradient: gradient.collect(), mask }
    }
}

/// Bits of the new weights, the new mask, and what was done.
type Outcome = (Vec<u32>, Vec<u8>, Update);

fn bits<T: Value>(values: &[T]) -> Vec<u32> {
    values.iter().map(|&x| x.wide().to_bits()).collect()
}

fn on_host<T: Value>(layer: &Layer<T>, rate: f64) -> Outcome {
    let wide = |values: &[T]| values.iter().map(|&x| x.wide()).collect::<Vec<f32>>();
    let (mut weight, mut mask) = (wide(&layer.weight), layer.mask.clone());
    let update = reference(&mut weight, &wide(&layer.gradient), &mut mask, rate).unwrap();
    (weight.iter().map(|x| x.to_bits()).collect(), mask, update)
}

/// With the tensors `lead` values into their memory, so that not all is aligned.
fn on_device<T: Value>(turn: &Turn, layer: &Layer<T>, rate: f64, lead: usize) -> Outcome {
    let count = layer.weight.len();
    let (device, stream) = (&turn.device, &turn.stream);
    let spread = |values: &[T]| -> CudaSlice<T> {
        let padding = std::iter::repeat_n(T::of(f32::NAN), lead);
        stream.clone_htod(&padding.chain(values.iter().copied()).collect::<Vec<_>>()).unwrap()
    };
    let (mut weight, gradient) = (spread(&layer.weight), spread(&layer.gradient));
    let mut mask = stream.clone_htod(&layer.mask).unwrap();
    // Whatever the workspace holds.
    let mut workspace = stream.clone_htod(&vec![0xa5_u8; workspace_bytes(count).unwrap()]).unwrap();
    drop_and_grow(
        device,
        stream,
        &mut weight.slice_mut(lead..),
        &gradient.slice(lead..),
        &mut mask.as_view_mut(),
        rate,
        &mut workspace.as_view_mut(),
    )
    .unwrap();
    let words = stream.clone_dtoh(&workspace.slice(..12)).unwrap();
    let word = |at: usize| u32::from_le_bytes(words[4 * at..4 * at + 4].try_into().unwrap()) as usize;
    let update = Update { active: word(0), asked: word(1), dropped: word(2) };
    let weight = stream.clone_dtoh(&weight).unwrap();
    assert!(weight[..lead].iter().all(|x| x.wide().is_nan()), "memory before the weights was touched");
    (bits(&weight[lead..]), stream.clone_dtoh(&mask).unwrap(), update)
}

fn check<T: Value>(turn: &Turn, layer: &Layer<T>, rate: f64, lead: usize) {
    let got = turn.in_every_order(|| on_device(turn, layer, rate, lead));
    let want = on_host(layer, rate);
    assert_eq!(got.2, want.2);
    if let Some(at) = (0..want.1.len()).find(|&at| got.1[at] != want.1[at] || got.0[at] != want.0[at]) {
        panic!(
            "weight {at} of {}: mask {} instead of {}, weight {:#x} instead of {:#x}, gradient {:?}",
            want.1.len(),
            got.1[at],
            want.1[at],
            got.0[at],
            want.0[at],
            layer.gradient[at].wide()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    /// Counts around the edges of accesses, warps and blocks.
    #[test]
    fn updates_are_those_of_the_reference(
        count in prop::sample::select(vec![1_usize, 3, 8, 31, 33, 255, 257, 1023, 1025, 3073, 6145]),
        density in prop::sample::select(vec![0.0_f32, 0.05, 0.5, 0.9, 1.1]),
        rate in prop::sample::select(vec![0.0_f64, 0.005, 0.3, 0.5, 1.0]),
        kind in prop::sample::select(&KINDS[..]),
        lead in 0_usize..3,
        dtype in 0..3,
        seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check(&turn, &Layer::<f32>::new(count, density, kind, seed), rate, lead),
            1 => check(&turn, &Layer::<f16>::new(count, density, kind, seed), rate, lead),
            _ => check(&turn, &Layer::<bf16>::new(count, density, kind, seed), rate, lead),
        }
        turn.end();
    }
}

/// Several blocks of histograms and more tiles than one warp looks back over, with and without ties that are cut.
#[test]
fn large_layers() {
    let Some(turn) = Turn::new() else { return };
    for (kind, seed) in [(Kind::Plain, 1), (Kind::Ties, 2), (Kind::Dead, 3)] {
        check(&turn, &Layer::<f32>::new(40_001, 0.5, kind, seed), 0.4, 0);
    }
    turn.end();
}

/// A mask that is wrong shows: the comparison above can fail.
#[test]
fn another_rate_gives_another_mask() {
    let Some(turn) = Turn::new() else { return };
    let layer = Layer::<f32>::new(257, 0.5, Kind::Plain, 7);
    assert_ne!(on_device(&turn, &layer, 0.3, 0).1, on_host(&layer, 0.5).1);
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    let mut weight: CudaSlice<f32> = turn.upload(&[0.5; 8]);
    let gradient: CudaSlice<f32> = turn.upload(&[0.5; 8]);
    let mut mask = stream.clone_htod(&[1_u8; 8]).unwrap();
    let mut workspace = stream.clone_htod(&vec![0_u8; workspace_bytes(8).unwrap()]).unwrap();
    let mut run = |gradients: usize, masks: usize, cut: usize, rate: f64| {
        let bytes = workspace.len() - cut;
        drop_and_grow(
            device,
            stream,
            &mut weight.as_view_mut(),
            &gradient.slice(..gradients),
            &mut mask.slice_mut(..masks),
            rate,
            &mut workspace.slice_mut(..bytes),
        )
        .map_err(|error| error.to_string())
    };
    assert!(run(7, 8, 0, 0.5).unwrap_err().contains("gradient has 7 values, expected 8"));
    assert!(run(8, 6, 0, 0.5).unwrap_err().contains("mask has 6 values, expected 8"));
    assert!(run(8, 8, 1, 0.5).unwrap_err().contains("workspace has"));
    assert!(run(8, 8, 0, 1.5).unwrap_err().contains("rate 1.5 is not between 0 and 1"));
    run(8, 8, 0, 0.5).unwrap();
    assert!(workspace_bytes(1 << 30).unwrap_err().to_string().contains("at most 1073741823"));
    turn.end();
}
