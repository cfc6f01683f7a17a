//! kernels/predictor.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{Backend, Epilogue, Linear, Norm, Predictor, Select},
    cuda::{
        Cuda, DType, Strided,
        predictor::{Scratch, ScratchExtents, keep_scores},
    },
    model::Activation,
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, random, rounded, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    special: usize,
    width: usize,
    bias: bool,
    /// Values behind a row, and before the first.
    place: (usize, usize),
    spread: f32,
    seed: u64,
}

impl Case {
    fn layout(&self) -> Layout {
        Layout {
            shape: [self.batch, self.special + self.tokens, self.width],
            gap: self.place.0,
            lead: self.place.1,
        }
    }

    fn x<T: Value>(&self) -> Vec<f32> {
        random::<T>(self.layout().shape.iter().product(), self.seed, self.spread)
    }

    fn predictor<T: Value>(&self) -> Predictor<Tensor> {
        let c = self.width;
        let values = |count: usize, salt: u64, spread: f32| random::<T>(count, self.seed ^ salt, spread);
        let bias = |count: usize, salt: u64| self.bias.then(|| tensor(&[count], values(count, salt, 0.5)));
        let linear = |outputs: usize, inputs: usize, salt: u64| Linear {
            weight: tensor(&[outputs, inputs], values(outputs * inputs, salt, 2.0 / (inputs as f32).sqrt())),
            bias: bias(outputs, salt + 1),
        };
        Predictor {
            norm: Norm { weight: tensor(&[c], values(c, 2, 1.0)), bias: bias(c, 3), eps: 1e-5 },
            hidden: linear(c, c, 4),
            first: linear(c / 2, c, 6),
            second: linear(c / 4, c / 2, 8),
            last: linear(2, c / 4, 10),
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let widths = prop::sample::select(vec![4_usize, 6, 9, 16, 40, 48, 64, 96, 128, 160]);
    let tokens = prop::sample::select(vec![1_usize, 2, 31, 32, 33, 63, 64, 65, 130]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]);
    let spread = prop::sample::select(vec![1e-2_f32, 1.0, 50.0]);
    ((1_usize..3, tokens, 0_usize..3), widths, any::<bool>(), place, spread, any::<u64>()).prop_map(
        |((batch, tokens, special), width, bias, place, spread, seed)| Case {
            batch,
            tokens,
            special,
            width,
            bias,
            place,
            spread,
            seed,
        },
    )
}

fn on_device<T: Value>(turn: &Turn, case: &Case, x: &[f32], predictor: &Predictor<Tensor>) -> Vec<f32> {
    let layout = case.layout();
    let memory: CudaSlice<T> = turn.upload(&layout.spread(x));
    let up = |tensor: &Tensor| -> CudaSlice<T> { turn.upload(tensor.data()) };
    let up_linear = |layer: &Linear<Tensor>| (up(&layer.weight), layer.bias.as_ref().map(&up));
    let norm = (up(&predictor.norm.weight), predictor.norm.bias.as_ref().map(&up));
    let layers = [&predictor.hidden, &predictor.first, &predictor.second, &predictor.last].map(up_linear);
    let [hidden, first, second, last] = layers.each_ref().map(|(weight, bias)| Linear {
        weight: weight.as_view(),
        bias: bias.as_ref().map(CudaSlice::as_view),
    });
    let norm = Norm {
        weight: norm.0.as_view(),
        bias: norm.1.as_ref().map(CudaSlice::as_view),
        eps: predictor.norm.eps,
    };
    let predictor = Predictor { norm, hidden, first, second, last };
    let extents = ScratchExtents::new(case.batch, case.tokens, case.width);
    let mut local: CudaSlice<T> = turn.stream.alloc_zeros(extents.local).unwrap();
    let mut partial: CudaSlice<f32> = turn.stream.alloc_zeros(extents.partial).unwrap();
    let mut scores: CudaSlice<f32> = turn.upload(&vec![7.0; case.batch * (case.special + case.tokens)]);
    let mut scratch = Scratch { local: local.as_view_mut(), partial: partial.as_view_mut() };
    let view = layout.over(memory.slice(layout.lead..));
    let (device, stream) = (&turn.device, &turn.stream);
    keep_scores(device, stream, &view, &predictor, case.special, &mut scratch, &mut scores.as_view_mut())
        .unwrap();
    turn.download(&scores)
}

/// What rounding to the storage type where the kernels round does to the scores.
fn emulated<T: Value>(case: &Case, x: &[f32], predictor: &Predictor<Tensor>) -> Vec<f32> {
    let reference = Reference::new();
    let (c, half) = (case.width, case.width / 2);
    let store = |x: &Tensor| tensor(x.shape(), rounded::<T>(x.data()));
    let gelu = || Epilogue::Activation(Activation::Gelu);
    let mut scores = Vec::new();
    for rows in x.chunks((case.special + case.tokens) * c) {
        let patches = tensor(&[1, case.tokens, c], rows[case.special * c..].to_vec());
        let normed = store(&reference.layer_norm(&patches, &predictor.norm).unwrap());
        let mut h = reference.linear(&normed, predictor.hidden.all(), gelu()).unwrap();
        let mut mean = vec![0.0_f32; c - half];
        for row in h.data().chunks(c) {
            mean.iter_mut().zip(&row[half..]).for_each(|(m, h)| *m += h / case.tokens as f32);
        }
        for row in h.data_mut().chunks_mut(c) {
            row[half..].copy_from_slice(&mean);
        }
        let a = store(&reference.linear(&store(&h), predictor.first.all(), gelu()).unwrap());
        let z = reference.linear(&a, predictor.second.all(), gelu()).unwrap();
        let u = reference.linear(&z, predictor.last.all(), Epilogue::None).unwrap();
        scores.extend(std::iter::repeat_n(0.0, case.special));
        scores.extend(u.data().chunks(2).map(|u| {
            let behind = u[1] - u[0];
            -(behind.max(0.0) + (-behind.abs()).exp().ln_1p())
        }));
    }
    scores
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| {
        let error = (a - b).abs();
        if error > worst || error.is_nan() { error } else { worst }
    })
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let (x, predictor) = (case.x::<T>(), case.predictor::<T>());
    let shape = case.layout().shape;
    let want = Reference::new().keep_scores(&tensor(&shape, x.clone()), &predictor, case.special).unwrap();
    let got = turn.in_every_order(|| on_device::<T>(turn, case, &x, &predictor));
    let (want, emulated) = (want.data(), emulated::<T>(case, &x, &predictor));
    // The error of rounding alone, twice; few tokens show less of it than they could, so one rounding of a score at least.
    // Sums of C values in f32 in four layers, each of weights that keep the scale.
    let scale = want.iter().fold(1.0_f32, |scale, x| scale.max(x.abs()));
    let half_type = T::EPSILON > f32::EPSILON;
    let rounding = if half_type { 2.0 * worst(&emulated, want) + T::EPSILON * scale } else { 0.0 };
    let sums = 4.0 * 4.0 * f32::EPSILON * (case.width as f32).sqrt() * scale;
    let error = worst(&got, want);
    prop_assert!(error <= rounding + sums, "off by {error:e}, limit {:e}", rounding + sums);
    Ok(())
}

fn check_as(turn: &Turn, case: &Case, dtype: i32) -> Result<(), TestCaseError> {
    match dtype {
        0 => check::<f32>(turn, case),
        1 => check::<f16>(turn, case),
        _ => check::<bf16>(turn, case),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn scores_are_those_of_the_reference(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check_as(&turn, &case, dtype)?;
        turn.end();
    }
}

fn some(width: usize, tokens: usize) -> Case {
    Case { batch: 1, tokens, special: 1, width, bias: true, place: (0, 0), spread: 1.0, seed: 5 }
}

/// The published widths, and the widest: its tile of the middle layer takes the most shared memory.
#[test]
fn published_widths() {
    let Some(turn) = Turn::new() else { return };
    for (width, tokens, dtype) in [(192, 196, 1), (384, 40, 1), (384, 20, 0), (768, 5, 2), (1024, 3, 0)] {
        check_as(&turn, &some(width, tokens), dtype).unwrap();
    }
    turn.end();
}

/// Confident keeps are told apart: their scores are tiny, not 0.
#[test]
fn confident_scores_do_not_tie() {
    let Some(turn) = Turn::new() else { return };
    let case = some(64, 70);
    let (x, mut predictor) = (case.x::<f16>(), case.predictor::<f16>());
    predictor.last.bias = Some(tensor(&[2], vec![20.0, -20.0]));
    let mut scores = on_device::<f16>(&turn, &case, &x, &predictor).split_off(1);
    assert!(scores.iter().all(|&score| score < 0.0 && score > -1e-10), "{scores:?}");
    scores.sort_by(f32::total_cmp);
    scores.dedup();
    assert!(scores.len() > 60, "{} different scores", scores.len());
    turn.end();
}

/// The plan made in the launch of the last scores is the one that `select` makes of them, whichever block comes last; beyond
/// 512 tokens it is `select`'s.
#[test]
fn the_plan_is_that_of_the_scores() {
    let Some(turn) = Turn::new() else { return };
    let cuda = Cuda::on(&turn.device, DType::F32).unwrap();
    for (tokens, special, keep) in [
        (1, 0, 1),
        (1, 1, 1),
        (31, 2, 0),
        (33, 1, 32),
        (97, 0, 50),
        (196, 1, 137),
        (511, 1, 7),
        (512, 1, 300),
    ] {
        let case = Case { batch: 2, special, ..some(8, tokens) };
        let mut x = case.x::<f32>();
        // Some of the second image alike; the first is all NaN, which the mean passes on.
        if tokens > 31 {
            let second = 8 * (special + tokens);
            for at in [3, 5, 20] {
                let from = second + 8 * special;
                x.copy_within(from..from + 8, from + 8 * at);
            }
            x[8 * (special + 11)] = f32::NAN;
        }
        let x = cuda.upload(tensor(&case.layout().shape, x)).unwrap();
        let up = |tensor: &Tensor| cuda.upload(tensor.clone()).unwrap();
        let linear =
            |layer: &Linear<Tensor>| Linear { weight: up(&layer.weight), bias: layer.bias.as_ref().map(up) };
        let host = case.predictor::<f32>();
        let predictor = Predictor {
            norm: Norm {
                weight: up(&host.norm.weight),
                bias: host.norm.bias.as_ref().map(up),
                eps: host.norm.eps,
            },
            hidden: linear(&host.hidden),
            first: linear(&host.first),
            second: linear(&host.second),
            last: linear(&host.last),
        };
        let scores = cuda.keep_scores(&x, &predictor, special).unwrap();
        let select = Select { class_scores: &scores, special, keep, fuse: false };
        let apart = cuda.download_plan(&cuda.select(&select).unwrap()).unwrap();
        let together = turn.in_every_order(|| {
            cuda.download_plan(&cuda.keep_predicted(&x, &predictor, special, keep).unwrap()).unwrap()
        });
        assert_eq!(together, apart, "{keep} of {tokens} behind {special}");
        let many = cuda.keep_predicted(&x, &predictor, special, tokens + 1).unwrap_err().to_string();
        assert!(many.contains("cannot keep"), "{many}");
    }
    drop(cuda);
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = some(64, 33);
    let (x, mut predictor) = (case.x::<f32>(), case.predictor::<f32>());
    let got = on_device::<f32>(&turn, &case, &x, &predictor);
    let rows = predictor.second.weight.data_mut();
    rows.swap(3, 40);
    let want = emulated::<f32>(&case, &x, &predictor);
    assert!(worst(&got, &want) > 1e-4, "two weights in other places are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&vec![0.5; 5000]);
    let run = |shape: [usize; 3], special: usize, first: usize, scores: usize| {
        let view = |n: usize| memory.slice(..n);
        let linear = |n: usize| Linear { weight: view(n), bias: None };
        let c = shape[2];
        let predictor = Predictor {
            norm: Norm { weight: view(c), bias: None, eps: 1e-5 },
            hidden: linear(c * c),
            first: linear(first),
            second: linear(c / 4 * (c / 2)),
            last: linear(2 * (c / 4)),
        };
        let extents = ScratchExtents::new(shape[0], shape[1].saturating_sub(special), c);
        let mut local: CudaSlice<f32> = turn.stream.alloc_zeros(extents.local.max(1)).unwrap();
        let mut partial: CudaSlice<f32> = turn.stream.alloc_zeros(extents.partial.max(1)).unwrap();
        let mut out: CudaSlice<f32> = turn.stream.alloc_zeros(scores).unwrap();
        let mut scratch = Scratch {
            local: local.slice_mut(..extents.local),
            partial: partial.slice_mut(..extents.partial),
        };
        let x = Strided::new(memory.as_view(), shape);
        let (device, stream) = (&turn.device, &turn.stream);
        keep_scores(device, stream, &x, &predictor, special, &mut scratch, &mut out.as_view_mut())
            .unwrap_err()
            .to_string()
    };
    let message = run([1, 3, 8], 1, 31, 3);
    assert!(message.contains("the first layer's weight has 31 values, expected 32"), "{message}");
    let message = run([1, 3, 8], 1, 32, 4);
    assert!(message.contains("scores has 4 values, expected 3"), "{message}");
    let message = run([1, 3, 8], 3, 32, 3);
    assert!(message.contains("3 of 3 tokens are special"), "{message}");
    let message = run([1, 3, 2], 1, 2, 3);
    assert!(message.contains("tokens of 2 values, the kernels take 4 to 1024"), "{message}");
    let message = run([400, 3, 8], 1, 32, 1200);
    assert!(message.contains("x of shape [400, 3, 8]"), "{message}");
    turn.end();
}
