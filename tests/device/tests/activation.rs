//! kernels/activation.cu against the definitions in f64.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    cuda::{
        DType, Strided,
        activation::{activate, activate_in_place},
    },
    model::Activation,
};
use foveate_device_tests::{Layout, Turn, Value, bits, random, rounded};
use half::{bf16, f16};
use proptest::prelude::*;

const ALL: [Activation; 6] = [
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::QuickGelu,
    Activation::Silu,
    Activation::Relu,
    Activation::SwiGlu,
];

/// erf by its Maclaurin series, good to 1e-9 for |x| up to 4; beyond, 1 is good to 2e-8.
fn erf(x: f64) -> f64 {
    if x.abs() > 4.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// The value, and how far f32 may be from it.
///
/// GELU: erff is within 2 units in the last place of 1, and 1 + erf within another: 2 eps·|x| with the roundings of the
/// products. The others are x/(1 + e^-a): e^-a is off by 2 units, by |a| units for the rounding of its argument's product and
/// by 4|a| for the roundings that make `a`; the quotient by 2; products by one each.
fn exact(activation: Activation, x: f32) -> (f64, f64) {
    let (x, eps) = (f64::from(x), f64::from(f32::EPSILON));
    let sigmoid = |a: f64| {
        let y = x / (1.0 + (-a).exp());
        // Where e^-a is beyond f32 the result is 0.
        (y, y.abs() * eps * (8.0 + 5.0 * a.abs()) + 1e-35 * (1.0 + x.abs()))
    };
    match activation {
        Activation::Gelu => {
            (0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)), 2.0 * eps * x.abs() + 1e-45)
        }
        Activation::GeluTanh => {
            sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3)))
        }
        Activation::QuickGelu => sigmoid(1.702 * x),
        Activation::Silu | Activation::SwiGlu => sigmoid(x),
        Activation::Relu => (x.max(0.0), 0.0),
    }
}

/// Layouts of the input and of the output: for SwiGLU the input is twice as wide.
fn layouts(activation: Activation, layout: Layout) -> (Layout, Layout) {
    let [batch, tokens, width] = layout.shape;
    let wide = if activation == Activation::SwiGlu { 2 * width } else { width };
    (Layout { shape: [batch, tokens, wide], ..layout }, layout)
}

fn on_device<T: Value>(turn: &Turn, activation: Activation, layout: Layout, x: &[f32]) -> Vec<f32> {
    let (from, to) = layouts(activation, layout);
    let memory: CudaSlice<T> = turn.upload(&from.spread(x));
    let mut out: CudaSlice<T> = turn.upload(&to.blank());
    let source = from.over(memory.slice(from.lead..));
    let mut target = to.over(out.slice_mut(to.lead..));
    activate(&turn.device, &turn.stream, activation, &source, &mut target).unwrap();
    let got = to.gather(&turn.download(&out));

    let mut memory = memory.clone();
    let mut target = from.over(memory.slice_mut(from.lead..));
    activate_in_place(&turn.device, &turn.stream, activation, &mut target).unwrap();
    let (width, wide) = (to.shape[2], from.shape[2]);
    let whole = from.gather(&turn.download(&memory));
    for ((after, before), got) in whole.chunks(wide).zip(x.chunks(wide)).zip(got.chunks(width)) {
        assert_eq!(bits(&after[..width]), bits(got), "in place");
        assert_eq!(bits(&after[width..]), bits(&before[width..]), "the second half stays");
    }
    got
}

fn check<T: Value>(
    turn: &Turn,
    activation: Activation,
    layout: Layout,
    spread: f32,
    seed: u64,
) -> Result<(), TestCaseError> {
    let (from, _) = layouts(activation, layout);
    let x = random::<T>(from.shape.iter().product(), seed, spread);
    let got = turn.in_every_order(|| on_device::<T>(turn, activation, layout, &x));
    let width = layout.shape[2];
    for (at, &got) in got.iter().enumerate() {
        let row = &x[at / width * from.shape[2]..][..from.shape[2]];
        let value = row[at % width];
        let (mut want, mut tolerance) = exact(activation, value);
        if activation == Activation::SwiGlu {
            let gate = f64::from(row[width + at % width]);
            want *= gate;
            tolerance = tolerance * gate.abs() + want.abs() * f64::from(f32::EPSILON);
        }
        let smallest = if T::DTYPE == DType::F16 { 6.0e-8 } else { 0.0 };
        let tolerance = tolerance + f64::from(T::EPSILON) / 2.0 * (want.abs() + tolerance) + smallest;
        prop_assert!(
            (f64::from(got) - want).abs() <= tolerance,
            "{:?} of {}: {} instead of {}, tolerance {}",
            activation,
            value,
            got,
            want,
            tolerance
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn values_are_those_of_the_definition(
        batch in 1_usize..4, tokens in prop::sample::select(vec![1_usize, 2, 5, 17]),
        width in prop::sample::select(vec![1_usize, 3, 8, 64, 65, 96, 384, 1540]),
        place in prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]),
        activation in prop::sample::select(&ALL), spread in prop::sample::select(vec![0.01_f32, 3.0, 12.0, 200.0]),
        dtype in 0..3, seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, tokens, width], gap: place.0, lead: place.1 };
        match dtype {
            0 => check::<f32>(&turn, activation, layout, spread, seed)?,
            1 => check::<f16>(&turn, activation, layout, spread, seed)?,
            _ => check::<bf16>(&turn, activation, layout, spread, seed)?,
        }
        turn.end();
    }
}

/// Every value of f16, through each nonlinearity.
#[test]
fn every_half_is_right() {
    let Some(turn) = Turn::new() else { return };
    let halves = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).map(f32::from);
    let x: Vec<f32> = halves.collect();
    let layout = Layout { shape: [1, 1, x.len()], gap: 0, lead: 0 };
    for activation in ALL.into_iter().filter(|&activation| activation != Activation::SwiGlu) {
        let got = on_device::<f16>(&turn, activation, layout, &x);
        for (&got, &x) in got.iter().zip(&x) {
            let (want, tolerance) = exact(activation, x);
            let tolerance = tolerance + (want.abs() + tolerance) / 2048.0 + 3.0e-8;
            assert!(
                (f64::from(got) - want).abs() <= tolerance,
                "{activation:?} of {x}: {got} instead of {want}"
            );
        }
    }
    turn.end();
}

#[test]
fn extremes_are_defined() {
    let Some(turn) = Turn::new() else { return };
    let x = [f32::NAN, f32::INFINITY, 1e30, -1e30, 0.0, -0.0, 1e-40, f32::NEG_INFINITY];
    let layout = Layout { shape: [1, 1, 8], gap: 0, lead: 0 };
    for activation in ALL {
        let input = if activation == Activation::SwiGlu { [x, [1.0; 8]].concat() } else { x.to_vec() };
        let got = on_device::<f32>(&turn, activation, layout, &input);
        assert!(got[0].is_nan(), "{activation:?}");
        assert_eq!(got[1], f32::INFINITY, "{activation:?}");
        assert!((got[2] / 1e30 - 1.0).abs() <= 2.0 * f32::EPSILON, "{activation:?}: {}", got[2]);
        assert_eq!(got[3..6], [0.0; 3], "{activation:?}");
        assert!((0.0..=1e-40).contains(&got[6]), "{activation:?}");
        // -inf times 0, save where nothing is multiplied.
        assert!(
            if activation == Activation::Relu { got[7] == 0.0 } else { got[7].is_nan() },
            "{activation:?}"
        );
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let layout = Layout { shape: [1, 4, 64], gap: 0, lead: 0 };
    let x = random::<f32>(256, 1, 3.0);
    let got = ALL.map(|activation| {
        let input = if activation == Activation::SwiGlu { [&x[..], &x[..]].concat() } else { x.clone() };
        on_device::<f32>(&turn, activation, layout, &input)
    });
    for (i, a) in got.iter().enumerate() {
        for b in &got[..i] {
            let apart = a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-4);
            assert!(apart, "one nonlinearity for another is seen");
        }
    }
    assert_ne!(rounded::<bf16>(&got[0]), got[0]);
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let mut x: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let mut out: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let mut run = |activation, from: [usize; 3], to: [usize; 3]| {
        let source = Strided::new(x.as_view(), from);
        let mut target = Strided::new(out.as_view_mut(), to);
        activate(&turn.device, &turn.stream, activation, &source, &mut target).unwrap_err().to_string()
    };
    let message = run(Activation::Gelu, [1, 8, 8], [1, 8, 4]);
    assert!(message.contains("out has shape [1, 8, 4], expected [1, 8, 8]"), "{message}");
    let message = run(Activation::SwiGlu, [1, 8, 8], [1, 8, 8]);
    assert!(message.contains("out has shape [1, 8, 8], expected [1, 8, 4]"), "{message}");
    assert!(run(Activation::Relu, [1, 9, 8], [1, 8, 8]).contains("x of shape [1, 9, 8]"));
    let mut odd = Strided::new(x.as_view_mut(), [1, 8, 7]);
    let message =
        activate_in_place(&turn.device, &turn.stream, Activation::SwiGlu, &mut odd).unwrap_err().to_string();
    assert!(message.contains("x has rows of 7 values, which have no halves for SwiGLU"), "{message}");
    turn.end();
}

#[cfg(feature = "emulated")]
#[test]
fn values_are_read_once_and_written_once() {
    use foveate_device_tests::traffic::Traffic;

    fn traffic<T: Value>(turn: &Turn, activation: Activation) {
        let layout = Layout { shape: [2, 50, 384], gap: 0, lead: 0 };
        let (from, to) = layouts(activation, layout);
        let (read, written) = (from.shape.iter().product::<usize>(), to.shape.iter().product::<usize>());
        let x: CudaSlice<T> = turn.upload(&random::<T>(read, 1, 2.0));
        let mut out: CudaSlice<T> = turn.upload(&vec![0.0; written]);
        let traffic = Traffic::of(turn, || {
            let mut target = to.over(out.as_view_mut());
            activate(&turn.device, &turn.stream, activation, &from.over(x.as_view()), &mut target).unwrap();
        });
        assert!(traffic.over((read + written) * size_of::<T>()) <= 1.0);
        assert_eq!((traffic.loads(), traffic.stores()), (1.0, 1.0));
        // What compute capability 8.0 computes while memory moves a byte: 108 multiprocessors of 64 lanes at 1.41 GHz, beside
        // 1,555 GB/s.
        let budget = 108.0 * 64.0 * 1.41 / 1555.0 * ((read + written) * size_of::<T>()) as f64;
        let spent = traffic.instructions() * 32.0;
        println!(
            "  {:.1} instructions a value, {:.0} % of the budget",
            spent / written as f64,
            100.0 * spent / budget
        );
        assert!(spent <= budget, "bound by instructions");
    }
    let Some(turn) = Turn::new() else { return };
    for activation in ALL {
        traffic::<f16>(&turn, activation);
        traffic::<f32>(&turn, activation);
    }
    turn.end();
}
