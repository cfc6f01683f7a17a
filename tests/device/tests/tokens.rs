//! kernels/tokens.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    backend::Backend,
    cuda::{
        Strided,
        tokens::{max_tokens, mean_tokens, tokens},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, bits, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

const WIDTHS: [usize; 12] = [1, 2, 3, 8, 31, 64, 65, 96, 192, 197, 384, 770];

fn place() -> impl Strategy<Value = (usize, usize)> {
    prop::sample::select(vec![(0, 0), (0, 0), (8, 8), (2, 0), (1, 0), (0, 1)])
}

fn check_tokens<T: Value>(turn: &Turn, layout: Layout, range: &std::ops::Range<usize>, seed: u64) {
    let [batch, _, width] = layout.shape;
    let mut x = random::<T>(layout.shape.iter().product(), seed, 3.0);
    x[0] = f32::NAN;
    x[width - 1] = f32::NEG_INFINITY;
    let want = Reference::new().tokens(&tensor(&layout.shape, x.clone()), range.clone()).unwrap();
    let memory: CudaSlice<T> = turn.upload(&layout.spread(&x));
    let to = Layout { shape: [batch, range.len(), width], ..layout };
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&to.blank());
        let source = layout.over(memory.slice(layout.lead..));
        let mut target = to.over(out.slice_mut(to.lead..));
        tokens(&turn.device, &turn.stream, &source, range.clone(), &mut target).unwrap();
        bits(&to.gather(&turn.download(&out)))
    });
    assert_eq!(got, bits(want.data()), "tokens {range:?} of {layout:?}");
}

/// Both sum K terms `size·x` in f32, in orders of their own, and divide by sums of K sizes: at most eps·K of the sum of the
/// terms' sizes for the worst order, half of that for each; then the result is rounded to `T`.
fn check_mean<T: Value>(
    turn: &Turn,
    layout: Layout,
    first: usize,
    sized: bool,
    seed: u64,
) -> Result<(), TestCaseError> {
    let [batch, n, width] = layout.shape;
    let x = random::<T>(layout.shape.iter().product(), seed, 3.0);
    let sizes = sized.then(|| {
        random::<f32>(batch * n, seed ^ 1, 2.0).into_iter().map(|s| s.abs().ceil() + 1.0).collect::<Vec<_>>()
    });
    let host_sizes = sizes.clone().map(|sizes| tensor(&[batch, n], sizes));
    let want =
        Reference::new().mean_tokens(&tensor(&layout.shape, x.clone()), host_sizes.as_ref(), first).unwrap();
    let memory: CudaSlice<T> = turn.upload(&layout.spread(&x));
    let device_sizes: Option<CudaSlice<f32>> = sizes.as_ref().map(|sizes| turn.upload(sizes));
    let device_sizes = device_sizes.as_ref().map(CudaSlice::as_view);
    let to = Layout { shape: [batch, 1, width], ..layout };
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&to.blank());
        let source = layout.over(memory.slice(layout.lead..));
        let mut target = to.over(out.slice_mut(to.lead..));
        mean_tokens(&turn.device, &turn.stream, &source, device_sizes.as_ref(), first, &mut target).unwrap();
        to.gather(&turn.download(&out))
    });
    let size = |image: usize, token: usize| sizes.as_ref().map_or(1.0, |sizes| sizes[image * n + token]);
    for (at, (&got, &want)) in got.iter().zip(want.data()).enumerate() {
        let (image, column) = (at / width, at % width);
        let terms: f32 =
            (first..n).map(|token| size(image, token) * x[(image * n + token) * width + column].abs()).sum();
        let total: f32 = (first..n).map(|token| size(image, token)).sum();
        let sums = (n - first + 2) as f32 * f32::EPSILON * terms / total;
        let tolerance = sums + T::EPSILON * (want.abs() + sums) + 6.0e-8;
        prop_assert!(
            (got - want).abs() <= tolerance,
            "image {image}, column {column}: {got} instead of {want}"
        );
    }
    Ok(())
}

/// A maximum rounds nothing: every bit is the reference's. A few tokens have size 0, a few values are NaN or infinite.
fn check_max<T: Value>(turn: &Turn, layout: Layout, first: usize, sized: bool, seed: u64) {
    let [batch, n, width] = layout.shape;
    let mut x = random::<T>(layout.shape.iter().product(), seed, 3.0);
    let count = x.len();
    for (at, value) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY)] {
        x[(seed as usize).wrapping_mul(31).wrapping_add(at * 97) % count] = value;
    }
    let sizes = random::<f32>(batch * n, seed ^ 1, 1.0).into_iter().map(|s| if s < 0.3 { 0.0 } else { s });
    let sizes = sized.then(|| sizes.collect::<Vec<f32>>());
    let host_sizes = sizes.clone().map(|sizes| tensor(&[batch, n], sizes));
    let want = Reference::new().max_tokens(&tensor(&layout.shape, x.clone()), host_sizes.as_ref(), first);
    let memory: CudaSlice<T> = turn.upload(&layout.spread(&x));
    let device_sizes: Option<CudaSlice<f32>> = sizes.as_ref().map(|sizes| turn.upload(sizes));
    let device_sizes = device_sizes.as_ref().map(CudaSlice::as_view);
    let to = Layout { shape: [batch, 1, width], ..layout };
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&to.blank());
        let source = layout.over(memory.slice(layout.lead..));
        let mut target = to.over(out.slice_mut(to.lead..));
        max_tokens(&turn.device, &turn.stream, &source, device_sizes.as_ref(), first, &mut target).unwrap();
        bits(&to.gather(&turn.download(&out)))
    });
    assert_eq!(got, bits(want.unwrap().data()), "from {first} on of {layout:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn maxima_are_those_of_the_reference(
        batch in 1_usize..4, n in prop::sample::select(vec![1_usize, 2, 31, 33, 129, 197]), width in prop::sample::select(&WIDTHS),
        (gap, lead) in place(), first in any::<prop::sample::Index>(), sized in any::<bool>(), dtype in 0..3, seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, n, width], gap, lead };
        let first = first.index(n);
        match dtype {
            0 => check_max::<f32>(&turn, layout, first, sized, seed),
            1 => check_max::<f16>(&turn, layout, first, sized, seed),
            _ => check_max::<bf16>(&turn, layout, first, sized, seed),
        }
        turn.end();
    }

    #[test]
    fn ranges_are_copied(
        batch in 1_usize..4, n in prop::sample::select(vec![1_usize, 2, 5, 33]), width in prop::sample::select(&WIDTHS),
        (gap, lead) in place(), ends in any::<(prop::sample::Index, prop::sample::Index)>(), dtype in 0..3, seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, n, width], gap, lead };
        let start = ends.0.index(n);
        let range = start..start + 1 + ends.1.index(n - start);
        match dtype {
            0 => check_tokens::<f32>(&turn, layout, &range, seed),
            1 => check_tokens::<f16>(&turn, layout, &range, seed),
            _ => check_tokens::<bf16>(&turn, layout, &range, seed),
        }
        turn.end();
    }

    #[test]
    fn means_are_those_of_the_reference(
        batch in 1_usize..4, n in prop::sample::select(vec![1_usize, 2, 31, 33, 129, 197]), width in prop::sample::select(&WIDTHS),
        (gap, lead) in place(), first in any::<prop::sample::Index>(), sized in any::<bool>(), dtype in 0..3, seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, n, width], gap, lead };
        let first = first.index(n);
        match dtype {
            0 => check_mean::<f32>(&turn, layout, first, sized, seed)?,
            1 => check_mean::<f16>(&turn, layout, first, sized, seed)?,
            _ => check_mean::<bf16>(&turn, layout, first, sized, seed)?,
        }
        turn.end();
    }
}

fn mean_of(turn: &Turn, x: &[f32], shape: [usize; 3], sizes: Option<&[f32]>) -> Vec<f32> {
    let memory: CudaSlice<f32> = turn.upload(x);
    let sizes: Option<CudaSlice<f32>> = sizes.map(|sizes| turn.upload(sizes));
    let sizes = sizes.as_ref().map(CudaSlice::as_view);
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; shape[0] * shape[2]]);
    let mut target = Strided::new(out.as_view_mut(), [shape[0], 1, shape[2]]);
    let source = Strided::new(memory.as_view(), shape);
    mean_tokens(&turn.device, &turn.stream, &source, sizes.as_ref(), 1, &mut target).unwrap();
    turn.download(&out)
}

/// An image alone gives the bits it gives in a batch; NaN and infinity stay in their column; tokens before the first do not
/// count.
#[test]
fn images_and_columns_are_independent() {
    let Some(turn) = Turn::new() else { return };
    let (n, width) = (70, 96);
    let mut x = random::<f32>(3 * n * width, 5, 10.0);
    x[..width].fill(f32::NAN);
    x[7 * width + 3] = f32::NAN;
    x[8 * width + 40] = f32::INFINITY;
    let all = mean_of(&turn, &x, [3, n, width], None);
    for (image, x) in x.chunks(n * width).enumerate() {
        let alone = mean_of(&turn, x, [1, n, width], None);
        assert_eq!(bits(&alone), bits(&all[image * width..][..width]));
    }
    assert!(all[3].is_nan() && all[40] == f32::INFINITY);
    assert!(all.iter().enumerate().all(|(at, y)| at == 3 || at == 40 || y.is_finite()));
    // Sizes of nothing but 1 are no sizes.
    assert_eq!(bits(&mean_of(&turn, &x, [3, n, width], Some(&vec![1.0; 3 * n]))), bits(&all));
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let (n, width) = (4, 8);
    let x = random::<f32>(n * width, 5, 1.0);
    let sizes = [1.0, 2.0, 3.0, 4.0];
    let got = mean_of(&turn, &x, [1, n, width], Some(&sizes));
    let host = tensor(&[1, n, width], x);
    let mean = |sizes: [f32; 4]| {
        Reference::new().mean_tokens(&host, Some(&tensor(&[1, 4], sizes.to_vec())), 1).unwrap().into_data()
    };
    let close = |want: Vec<f32>| got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-5);
    assert!(close(mean(sizes)));
    assert!(!close(mean([1.0, 2.0, 4.0, 3.0])), "sizes in the wrong order are seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let x: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let sizes: CudaSlice<f32> = turn.upload(&[1.0; 8]);
    let mut out: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let source = Strided::new(x.as_view(), [1, 8, 8]);
    let mut run = |range: std::ops::Range<usize>, shape| {
        let mut target = Strided::new(out.as_view_mut(), shape);
        tokens(&turn.device, &turn.stream, &source, range, &mut target).unwrap_err().to_string()
    };
    assert!(run(3..9, [1, 6, 8]).contains("tokens 3..9 are not among 8"));
    assert!(run(3..3, [1, 1, 8]).contains("name one token at least"));
    assert!(run(3..5, [1, 3, 8]).contains("out has shape [1, 3, 8], expected [1, 2, 8]"));
    let mut run = |held: usize, first: usize, shape| {
        let mut target = Strided::new(out.as_view_mut(), shape);
        let sizes = sizes.slice(..held);
        let result = mean_tokens(&turn.device, &turn.stream, &source, Some(&sizes), first, &mut target);
        result.unwrap_err().to_string()
    };
    assert!(run(8, 8, [1, 1, 8]).contains("no tokens are left from 8 on, of 8"));
    assert!(run(7, 0, [1, 1, 8]).contains("sizes has 7 values, expected 8"));
    assert!(run(8, 0, [1, 2, 8]).contains("out has shape [1, 2, 8], expected [1, 1, 8]"));
    turn.end();
}

#[cfg(feature = "emulated")]
#[test]
fn tokens_are_moved_once() {
    use foveate_device_tests::traffic::Traffic;

    let Some(turn) = Turn::new() else { return };
    let [batch, n, width] = [4, 197, 384];
    let x: CudaSlice<f16> = turn.upload(&random::<f16>(batch * n * width, 1, 1.0));
    let source = Strided::new(x.as_view(), [batch, n, width]);
    let mut out: CudaSlice<f16> = turn.upload(&vec![0.0; batch * (n - 1) * width]);
    let traffic = Traffic::of(&turn, || {
        let mut target = Strided::new(out.as_view_mut(), [batch, n - 1, width]);
        tokens(&turn.device, &turn.stream, &source, 1..n, &mut target).unwrap();
    });
    assert!(traffic.over(2 * 2 * batch * (n - 1) * width) <= 1.01);
    assert_eq!((traffic.loads(), traffic.stores()), (1.0, 1.0));

    let sizes: CudaSlice<f32> = turn.upload(&vec![1.0; batch * n]);
    let sizes = sizes.as_view();
    let traffic = Traffic::of(&turn, || {
        let mut target = Strided::new(out.slice_mut(..batch * width), [batch, 1, width]);
        mean_tokens(&turn.device, &turn.stream, &source, Some(&sizes), 1, &mut target).unwrap();
    });
    let must = batch * (2 * (n - 1) * width + 4 * (n - 1) + 2 * width);
    assert!(traffic.over(must) <= 1.01);
    let traffic = Traffic::of(&turn, || {
        let mut target = Strided::new(out.slice_mut(..batch * width), [batch, 1, width]);
        max_tokens(&turn.device, &turn.stream, &source, Some(&sizes), 1, &mut target).unwrap();
    });
    assert!(traffic.over(must) <= 1.01);
    turn.end();
}
