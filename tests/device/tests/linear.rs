//! Affine layers over cuBLASLt against the reference; on the emulated driver over its stand-in for the library.
#![cfg(feature = "cuda")]

use std::ops::Range;

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{Backend, Epilogue, Linear, LinearRows},
    cuda::{
        Blas, Strided,
        linear::{Affine, Fused, linear},
    },
    model::Activation,
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, UNTOUCHED, Value, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    inputs: usize,
    outputs: usize,
    /// The outputs to compute.
    range: Option<Range<usize>>,
    /// Gaps behind each row of x and of the result, and elements before the first.
    x_place: (usize, usize),
    out_place: (usize, usize),
    /// Tokens of x and of the result in memory that do not take part.
    more_tokens: [usize; 2],
    bias: bool,
    fused: Fused,
    workspace: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let width = || prop::sample::select(vec![1_usize, 2, 3, 8, 33, 64, 65, 192, 197, 384]);
    let place = || prop::sample::select(vec![(0_usize, 0_usize), (0, 8), (8, 0), (1, 0), (0, 1), (3, 5)]);
    let fused = prop::sample::select(vec![Fused::None, Fused::GeluTanh, Fused::Relu, Fused::Add]);
    let shape = (1_usize..4, prop::sample::select(vec![1_usize, 2, 5, 17, 50]), width(), width());
    let rest = (any::<bool>(), fused, prop::sample::select(vec![0_usize, 1 << 16]), any::<u64>());
    let more = [0_usize..3, 0..3];
    (shape, prop::option::of((0.0_f64..1.0, 0.0_f64..1.0)), (place(), place()), more, rest).prop_map(
        |((batch, tokens, inputs, outputs), range, (x_place, out_place), more_tokens, rest)| {
            let (bias, fused, workspace, seed) = rest;
            let range = range.map(|(from, length)| {
                let from = (from * outputs as f64) as usize;
                from..from + 1 + (length * (outputs - from - 1) as f64) as usize
            });
            Case {
                batch,
                tokens,
                inputs,
                outputs,
                range,
                x_place,
                out_place,
                more_tokens,
                bias,
                fused,
                workspace,
                seed,
            }
        },
    )
}

/// The values of a case: x, weight, bias, and what the output holds before.
struct Values {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    before: Vec<f32>,
}

impl Case {
    fn width(&self) -> usize {
        self.range.as_ref().map_or(self.outputs, ExactSizeIterator::len)
    }

    fn values<T: Value>(&self) -> Values {
        let Self { batch, tokens, inputs, outputs, seed, .. } = *self;
        Values {
            x: random::<T>(batch * tokens * inputs, seed, 2.0),
            weight: random::<T>(outputs * inputs, seed ^ 1, 2.0 / (inputs as f32).sqrt()),
            bias: self.bias.then(|| random::<T>(outputs, seed ^ 2, 1.0)),
            before: random::<T>(batch * tokens * self.width(), seed ^ 3, 1.0),
        }
    }

    /// Where a tensor of `width` lies: `more` unused tokens behind those of each image.
    fn layout(&self, width: usize, (gap, lead): (usize, usize), more: usize) -> Layout {
        Layout { shape: [self.batch, self.tokens + more, width], gap, lead }
    }
}

/// Values of an image's first tokens, with `more` tokens of another value behind them.
fn with_more(values: &[f32], image: usize, more: usize, width: usize) -> Vec<f32> {
    let images = values.chunks(image * width);
    images.flat_map(|values| [values, &vec![UNTOUCHED; more * width]].concat()).collect()
}

fn on_device<T: Value>(turn: &Turn, blas: &Blas, case: &Case, values: &Values) -> Vec<f32> {
    let width = case.width();
    let [x_more, out_more] = case.more_tokens;
    let x_layout = case.layout(case.inputs, case.x_place, x_more);
    let out_layout = case.layout(width, case.out_place, out_more);
    let part = |mut whole: Strided<_>| {
        whole.shape[1] = case.tokens;
        whole
    };
    let before =
        if case.fused == Fused::Add { values.before.clone() } else { vec![UNTOUCHED; values.before.len()] };
    let x: CudaSlice<T> =
        turn.upload(&x_layout.spread(&with_more(&values.x, case.tokens, x_more, case.inputs)));
    let mut out: CudaSlice<T> =
        turn.upload(&out_layout.spread(&with_more(&before, case.tokens, out_more, width)));
    let weight: CudaSlice<T> = turn.upload(&values.weight);
    let bias: Option<CudaSlice<T>> = values.bias.as_ref().map(|bias| turn.upload(bias));
    let mut workspace = turn.stream.alloc_zeros::<u8>(case.workspace.max(1)).unwrap();
    let affine = Affine {
        x: part(x_layout.over(x.slice(x_layout.lead..))),
        layer: Linear { weight: weight.as_view(), bias: bias.as_ref().map(CudaSlice::as_view) },
        outputs: case.range.clone(),
        fused: case.fused,
    };
    let whole = out_layout.over(out.slice_mut(out_layout.lead..));
    let mut target = Strided { shape: [case.batch, case.tokens, width], ..whole };
    linear(blas, &turn.stream, &affine, &mut target, &mut workspace.slice_mut(..case.workspace)).unwrap();
    let held = out_layout.gather(&turn.download(&out));
    let images = held.chunks((case.tokens + out_more) * width);
    let images = images.flat_map(|image| {
        let (ours, others) = image.split_at(case.tokens * width);
        assert!(others.iter().all(|&x| x == UNTOUCHED), "written to tokens that do not take part");
        ours
    });
    images.copied().collect()
}

/// The reference's result and, for each value, the sum of the magnitudes that were added up.
fn reference(case: &Case, values: &Values) -> (Vec<f32>, Vec<f32>) {
    let Case { batch, tokens, inputs, outputs, .. } = *case;
    let width = case.width();
    let layer = Linear {
        weight: tensor(&[outputs, inputs], values.weight.clone()),
        bias: values.bias.as_ref().map(|bias| tensor(&[outputs], bias.clone())),
    };
    let x = tensor(&[batch, tokens, inputs], values.x.clone());
    let epilogue: Epilogue<Tensor> = match case.fused {
        Fused::None => Epilogue::None,
        Fused::GeluTanh => Epilogue::Activation(Activation::GeluTanh),
        Fused::Relu => Epilogue::Activation(Activation::Relu),
        Fused::Add => Epilogue::AddTo(tensor(&[batch, tokens, width], values.before.clone())),
    };
    let rows = LinearRows { layer: &layer, rows: case.range.clone() };
    let want = Reference::new().linear(&x, rows, epilogue).unwrap();
    let first = case.range.as_ref().map_or(0, |range| range.start);
    let magnitudes = (0..batch * tokens * width).map(|at| {
        let (row, output) = (at / width, first + at % width);
        let x = &values.x[row * inputs..][..inputs];
        let weight = &values.weight[output * inputs..][..inputs];
        let sum: f32 = x.iter().zip(weight).map(|(x, w)| (x * w).abs()).sum();
        let bias = values.bias.as_ref().map_or(0.0, |bias| bias[output].abs());
        sum + bias + if case.fused == Fused::Add { values.before[at].abs() } else { 0.0 }
    });
    (want.data().to_vec(), magnitudes.collect())
}

/// Two sums of K products, a bias and a residual in f32, each in an order of its own, differ by at most (K + 3)·eps of the sum
/// of the magnitudes; an activation magnifies that by at most 1.13 (GELU's steepest slope) and has an error of its own of a
/// few eps; then the result is rounded to `T`, below 2^-14 to multiples of 2^-24 (f16).
fn tolerance<T: Value>(case: &Case, want: f32, magnitude: f32) -> f32 {
    let mut sums = (case.inputs + 3) as f32 * f32::EPSILON * magnitude;
    if case.fused == Fused::GeluTanh {
        sums = 1.13 * sums + 8.0 * f32::EPSILON * (magnitude + 1.0);
        if cfg!(not(feature = "emulated")) {
            // A card's tanh.approx: a relative error of 2^-11.
            sums += magnitude / 2048.0;
        }
    }
    sums + 0.5 * T::EPSILON * (want.abs() + sums) + 3.0e-8
}

fn check<T: Value>(turn: &Turn, blas: &Blas, case: &Case) -> Result<(), TestCaseError> {
    let values = case.values::<T>();
    let (want, magnitudes) = reference(case, &values);
    let got = on_device::<T>(turn, blas, case, &values);
    prop_assert_eq!(&got, &on_device::<T>(turn, blas, case, &values), "twice the same bits");
    prop_assert_eq!(got.len(), want.len());
    for (at, ((&got, &want), &magnitude)) in got.iter().zip(&want).zip(&magnitudes).enumerate() {
        prop_assert!(
            (got - want).abs() <= tolerance::<T>(case, want, magnitude),
            "row {}, output {}: {} instead of {}",
            at / case.width(),
            at % case.width(),
            got,
            want
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn rows_are_those_of_the_reference(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let blas = Blas::new(&turn.device).unwrap();
        match dtype {
            0 => check::<f32>(&turn, &blas, &case)?,
            1 => check::<f16>(&turn, &blas, &case)?,
            _ => check::<bf16>(&turn, &blas, &case)?,
        }
        turn.end();
    }
}

fn plain(tokens: usize, inputs: usize, outputs: usize) -> Case {
    Case {
        batch: 1,
        tokens,
        inputs,
        outputs,
        range: None,
        x_place: (0, 0),
        out_place: (0, 0),
        more_tokens: [0, 0],
        bias: true,
        fused: Fused::None,
        workspace: 1 << 16,
        seed: 7,
    }
}

/// The layers of a DeiT-S block with all their epilogues.
#[test]
fn layers_of_a_small_deit() {
    let Some(turn) = Turn::new() else { return };
    let blas = Blas::new(&turn.device).unwrap();
    for (inputs, outputs, fused) in [
        (384, 1152, Fused::None),
        (384, 384, Fused::Add),
        (384, 1536, Fused::GeluTanh),
        (1536, 384, Fused::Add),
        (768, 384, Fused::None),
    ] {
        let case = Case { fused, batch: 2, ..plain(98, inputs, outputs) };
        check::<f32>(&turn, &blas, &case).unwrap();
        check::<f16>(&turn, &blas, &case).unwrap();
        check::<bf16>(&turn, &blas, &case).unwrap();
    }
    turn.end();
}

/// A shape is planned once, whatever its operands; another shape, type or epilogue is another plan.
#[test]
fn algorithms_are_chosen_once_a_shape() {
    let Some(turn) = Turn::new() else { return };
    let blas = Blas::new(&turn.device).unwrap();
    let run = |case: &Case| {
        on_device::<f32>(&turn, &blas, case, &case.values::<f32>());
        blas.planned()
    };
    let case = plain(4, 64, 32);
    assert_eq!([run(&case), run(&case), run(&Case { seed: 8, ..case.clone() })], [1, 1, 1]);
    assert_eq!(run(&plain(5, 64, 32)), 2, "another number of rows");
    assert_eq!(run(&Case { fused: Fused::Add, ..case.clone() }), 2, "a residual needs no other algorithm");
    assert_eq!(run(&Case { fused: Fused::GeluTanh, ..case.clone() }), 3);
    assert_eq!(run(&Case { bias: false, ..case.clone() }), 4);
    assert_eq!(run(&Case { range: Some(0..16), ..case.clone() }), 5);
    assert_eq!(run(&Case { range: Some(16..32), ..case }), 6, "its bias lies at a smaller alignment");
    turn.end();
}

/// Several threads with a stream each and one handle: each bias goes to its own product.
#[test]
fn threads_share_a_handle() {
    let Some(turn) = Turn::new() else { return };
    let blas = Blas::new(&turn.device).unwrap();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (device, blas) = (&turn.device, &blas);
            scope.spawn(move || {
                let stream = device.context().new_stream().unwrap();
                let weight = stream.clone_htod(&[0.0_f32; 8 * 8]).unwrap();
                let bias = stream.clone_htod(&[seed as f32; 8]).unwrap();
                let x = stream.clone_htod(&[1.0_f32; 3 * 8]).unwrap();
                let mut workspace = stream.alloc_zeros::<u8>(1).unwrap();
                for _ in 0..50 {
                    let mut out = stream.clone_htod(&[UNTOUCHED; 3 * 8]).unwrap();
                    let affine = Affine {
                        x: Strided::new(x.as_view(), [1, 3, 8]),
                        layer: Linear { weight: weight.as_view(), bias: Some(bias.as_view()) },
                        outputs: None,
                        fused: Fused::None,
                    };
                    let mut target = Strided::new(out.as_view_mut(), [1, 3, 8]);
                    linear(blas, &stream, &affine, &mut target, &mut workspace.slice_mut(..0)).unwrap();
                    assert_eq!(stream.clone_dtoh(&out).unwrap(), [seed as f32; 3 * 8]);
                }
            });
        }
    });
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let blas = Blas::new(&turn.device).unwrap();
    let case = Case { bias: false, ..plain(3, 16, 8) };
    let mut values = case.values::<f32>();
    let got = on_device::<f32>(&turn, &blas, &case, &values);
    values.weight.rotate_left(16);
    let (want, magnitudes) = reference(&case, &values);
    let close = |((&got, &want), &magnitude): ((&f32, &f32), &f32)| {
        (got - want).abs() <= tolerance::<f32>(&case, want, magnitude)
    };
    assert!(!got.iter().zip(&want).zip(&magnitudes).all(close), "outputs in the wrong order are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let blas = Blas::new(&turn.device).unwrap();
    let x: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let weight: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let mut out: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let mut scratch = turn.stream.alloc_zeros::<u8>(1024).unwrap();
    let mut run = |x_shape: [usize; 3],
                   x_strides: Option<[usize; 2]>,
                   held: usize,
                   bias: Option<usize>,
                   outputs: Option<Range<usize>>,
                   out_shape: [usize; 3],
                   workspace: Range<usize>| {
        let view = Strided::new(x.as_view(), x_shape);
        let affine = Affine {
            x: Strided { strides: x_strides.unwrap_or(view.strides), ..view },
            layer: Linear { weight: weight.slice(..held), bias: bias.map(|length| weight.slice(..length)) },
            outputs,
            fused: Fused::None,
        };
        let mut out = Strided::new(out.as_view_mut(), out_shape);
        let result = linear(&blas, &turn.stream, &affine, &mut out, &mut scratch.slice_mut(workspace));
        result.unwrap_err().to_string()
    };
    let message = run([1, 9, 8], None, 64, None, None, [1, 9, 8], 0..0);
    assert!(message.contains("x of shape [1, 9, 8] and strides [72, 8] reaches over 72"), "{message}");
    let message = run([1, 4, 8], None, 60, None, None, [1, 4, 8], 0..0);
    assert!(message.contains("weight has 60 values, which are not rows of 8"), "{message}");
    let message = run([1, 4, 8], None, 64, Some(7), None, [1, 4, 8], 0..0);
    assert!(message.contains("bias has 7 values, expected 8"), "{message}");
    let message = run([1, 4, 8], None, 64, None, Some(4..9), [1, 4, 5], 0..0);
    assert!(message.contains("outputs 4..9 are not among the layer's 8"), "{message}");
    let message = run([1, 4, 8], None, 64, None, Some(4..4), [1, 4, 0], 0..0);
    assert!(message.contains("outputs 4..4 are not among the layer's 8"), "{message}");
    let message = run([1, 4, 8], None, 64, None, None, [1, 4, 7], 0..0);
    assert!(message.contains("out has shape [1, 4, 7], expected [1, 4, 8]"), "{message}");
    let message = run([1, 4, 8], Some([8, 2]), 64, None, None, [1, 4, 8], 0..0);
    assert!(message.contains("rows that overlap"), "{message}");
    let message = run([1, 4, 8], None, 64, None, None, [1, 4, 8], 8..1024);
    assert!(message.contains("expected a multiple of 256"), "{message}");
    turn.end();
}

/// Set for the process that must not find the library.
#[cfg(feature = "emulated")]
const CHILD: &str = "FOVEATE_TEST_WITHOUT_CUBLASLT";

/// The same test again in a process whose loader's path has the driver and no cuBLASLt.
#[cfg(feature = "emulated")]
#[test]
fn a_missing_library_is_an_error() {
    if std::env::var_os(CHILD).is_some() {
        let Some(turn) = Turn::new() else { panic!("the driver is there") };
        let error = Blas::new(&turn.device).unwrap_err();
        assert!(matches!(error, foveate::Error::NoLibrary { .. }), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains("there is no cuBLASLt") && message.contains("libcublasLt.so.13"),
            "{message}"
        );
        return;
    }
    let folder = std::env::temp_dir().join(format!("foveate-no-cublaslt-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = std::env::var("LD_LIBRARY_PATH").unwrap();
    let driver = path.split(':').map(|at| std::path::Path::new(at).join("libcuda.so"));
    let driver = driver.into_iter().find(|file| file.exists()).expect("the emulated driver's file");
    std::os::unix::fs::symlink(driver, folder.join("libcuda.so")).unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_missing_library_is_an_error", "--nocapture"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", &folder)
        .output()
        .unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}
