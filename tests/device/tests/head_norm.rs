//! `kernels/head_norm.cu` against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{Backend, Norm},
    cuda::{Strided, head_norm::head_norm},
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, bits, norm_tolerance, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    parts: usize,
    part: usize,
    bias: bool,
    /// Values behind a row, and before the first.
    place: (usize, usize),
    spread: f32,
    seed: u64,
}

impl Case {
    fn layout(&self) -> Layout {
        let width = self.parts * self.heads * self.head_dim;
        Layout { shape: [self.batch, self.tokens, width], gap: self.place.0, lead: self.place.1 }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let dims =
        prop::sample::select(vec![1_usize, 3, 8, 20, 31, 32, 33, 40, 48, 64, 65, 72, 80, 96, 100, 127, 128]);
    let sizes = (1_usize..3, prop::sample::select(vec![1_usize, 2, 5, 17]), 1_usize..8, dims, 2_usize..4);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]);
    let spread = prop::sample::select(vec![1e-3_f32, 1.0, 100.0]);
    (sizes, any::<(bool, bool)>(), place, spread, any::<u64>()).prop_map(
        |((batch, tokens, heads, head_dim, parts), (bias, keys), place, spread, seed)| Case {
            batch,
            tokens,
            heads,
            head_dim,
            parts,
            part: usize::from(keys),
            bias,
            place,
            spread,
            seed,
        },
    )
}

fn on_device<T: Value>(turn: &Turn, case: &Case, x: &[f32], norm: &Norm<Tensor>) -> Vec<f32> {
    let layout = case.layout();
    let mut packed: CudaSlice<T> = turn.upload(&layout.spread(x));
    let weight: CudaSlice<T> = turn.upload(norm.weight.data());
    let bias: Option<CudaSlice<T>> = norm.bias.as_ref().map(|bias| turn.upload(bias.data()));
    let norm = Norm { weight: weight.as_view(), bias: bias.as_ref().map(CudaSlice::as_view), eps: norm.eps };
    let mut view = layout.over(packed.slice_mut(layout.lead..));
    head_norm(&turn.device, &turn.stream, &mut view, case.part, case.heads, &norm).unwrap();
    layout.gather(&turn.download(&packed))
}

fn norm_of<T: Value>(case: &Case) -> Norm<Tensor> {
    let d = case.head_dim;
    Norm {
        weight: tensor(&[d], random::<T>(d, case.seed ^ 2, 1.0)),
        bias: case.bias.then(|| tensor(&[d], random::<T>(d, case.seed ^ 3, 1.0))),
        eps: 1e-6,
    }
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let shape = case.layout().shape;
    let x = random::<T>(shape.iter().product(), case.seed, case.spread);
    let norm = norm_of::<T>(case);
    let want = Reference::new().head_norm(tensor(&shape, x.clone()), case.part, case.heads, &norm).unwrap();
    let got = turn.in_every_order(|| on_device::<T>(turn, case, &x, &norm));
    let (width, part_width) = (shape[2], case.heads * case.head_dim);
    for (at, (&got, &want)) in got.iter().zip(want.data()).enumerate() {
        if at % width / part_width != case.part {
            prop_assert_eq!(got, x[at], "another part was touched at {}", at);
            continue;
        }
        let head = &x[at / case.head_dim * case.head_dim..][..case.head_dim];
        prop_assert!(
            (got - want).abs() <= norm_tolerance::<T>(head, norm.eps, want),
            "row {}, column {}: {} instead of {}",
            at / width,
            at % width,
            got,
            want
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn heads_are_those_of_the_reference(case in case(), dtype in 0..3) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check::<f32>(&turn, &case)?,
            1 => check::<f16>(&turn, &case)?,
            _ => check::<bf16>(&turn, &case)?,
        }
        turn.end();
    }
}

fn some(head_dim: usize) -> Case {
    Case {
        batch: 2,
        tokens: 3,
        heads: 3,
        head_dim,
        parts: 3,
        part: 1,
        bias: true,
        place: (0, 0),
        spread: 1.0,
        seed: head_dim as u64,
    }
}

/// Every kernel at its widest head, and 8 values less or more.
#[test]
fn every_head_dimension_boundary() {
    let Some(turn) = Turn::new() else { return };
    for head_dim in [24, 32, 40, 56, 64, 72, 120, 128] {
        check::<f32>(&turn, &some(head_dim)).unwrap();
        check::<f16>(&turn, &some(head_dim)).unwrap();
        check::<bf16>(&turn, &some(head_dim)).unwrap();
    }
    turn.end();
}

/// A head with NaN or infinity becomes NaN and its neighbours in the same warp do not; a constant head becomes the bias.
#[test]
fn heads_are_independent() {
    let Some(turn) = Turn::new() else { return };
    let case = some(32);
    let shape = case.layout().shape;
    let norm = norm_of::<f16>(&case);
    let x = random::<f16>(shape.iter().product(), 1, 1.0);
    let plain = on_device::<f16>(&turn, &case, &x, &norm);
    let mut changed = x.clone();
    let part = 3 * 32;
    changed[part] = f32::NAN;
    changed[part + 32 + 5] = f32::INFINITY;
    changed[part + 64..][..32].fill(60_000.0);
    let got = on_device::<f16>(&turn, &case, &changed, &norm);
    assert!(got[part..part + 64].iter().all(|y| y.is_nan()));
    assert_eq!(&got[part + 64..][..32], norm.bias.as_ref().unwrap().data());
    assert_eq!(bits(&got[2 * part..]), bits(&plain[2 * part..]));
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = some(64);
    let norm = norm_of::<f32>(&case);
    let x = random::<f32>(case.layout().shape.iter().product(), 1, 1.0);
    let got = on_device::<f32>(&turn, &case, &x, &norm);
    // Queries instead of keys.
    let wrong = Reference::new().head_norm(tensor(&case.layout().shape, x), 0, case.heads, &norm).unwrap();
    assert!(got.iter().zip(wrong.data()).any(|(a, b)| (a - b).abs() > 0.1));
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let mut packed: CudaSlice<f16> = turn.upload(&[0.0; 1024]);
    let weight: CudaSlice<f16> = turn.upload(&[1.0; 256]);
    let mut run = |width: usize, part: usize, heads: usize, head_dim: usize, bias: usize| {
        let norm = Norm { weight: weight.slice(..head_dim), bias: Some(weight.slice(..bias)), eps: 1e-6 };
        let mut view = Strided::new(packed.as_view_mut(), [1, 2, width]);
        head_norm(&turn.device, &turn.stream, &mut view, part, heads, &norm).unwrap_err().to_string()
    };
    let message = run(96, 3, 1, 32, 32);
    assert!(message.contains("rows of 96 values have no part 3 of 1 heads of 32"), "{message}");
    assert!(run(96, 0, 5, 32, 32).contains("no part 0 of 5 heads of 32"));
    assert!(run(96, 0, 0, 32, 32).contains("no part 0 of 0 heads of 32"));
    assert!(run(96, 0, 1, 32, 31).contains("bias has 31 values, expected 32"));
    let message = run(272, 0, 2, 136, 136);
    assert!(message.contains("heads have 136 values, the kernels hold up to 128"), "{message}");
    assert!(run(600, 0, 1, 32, 32).contains("packed heads of shape [1, 2, 600]"));
    turn.end();
}

#[cfg(feature = "emulated")]
#[test]
fn a_part_is_read_and_written_once() {
    use foveate_device_tests::traffic::Traffic;

    fn traffic<T: Value>(turn: &Turn, heads: usize, head_dim: usize) {
        let [batch, tokens, width] = [2, 50, 3 * heads * head_dim];
        let mut packed: CudaSlice<T> = turn.upload(&random::<T>(batch * tokens * width, 1, 1.0));
        let weight: CudaSlice<T> = turn.upload(&vec![1.0; head_dim]);
        let norm = Norm { weight: weight.as_view(), bias: Some(weight.as_view()), eps: 1e-6 };
        let traffic = Traffic::of(turn, || {
            let mut view = Strided::new(packed.as_view_mut(), [batch, tokens, width]);
            head_norm(&turn.device, &turn.stream, &mut view, 1, heads, &norm).unwrap();
        });
        assert!(traffic.over(2 * batch * tokens * heads * head_dim * size_of::<T>()) <= 1.01);
        assert_eq!((traffic.loads(), traffic.stores()), (1.0, 1.0));
    }
    let Some(turn) = Turn::new() else { return };
    for (heads, head_dim) in [(12, 32), (6, 64), (4, 80), (4, 96), (3, 128)] {
        traffic::<f16>(&turn, heads, head_dim);
        traffic::<f32>(&turn, heads, head_dim);
    }
    turn.end();
}
