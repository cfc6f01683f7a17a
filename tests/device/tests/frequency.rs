//! kernels/frequency.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor,
    backend::{Frequency, GridBackend},
    cuda::{
        Element, Strided,
        frequency::{Filtering, FrequencyShape, Layout, frequency, workspace_bytes},
    },
    model::Activation,
    reference::Reference,
};
use foveate_device_tests::{Turn, Value, random, rounded, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    grid: [usize; 2],
    groups: usize,
    width: usize,
    layout: Layout,
    residual: bool,
    relu: bool,
    /// Values of about 20,000, whose sums no 16-bit float of half precision holds, and a mask that does not hang on them.
    loud: bool,
    /// Elements before the first value, and between rows.
    lead: usize,
    gap: usize,
    seed: u64,
}

impl Case {
    fn new(batch: usize, grid: [usize; 2], groups: usize, width: usize) -> Self {
        let seed = (grid[0] * 1000 + grid[1] * 10 + width) as u64;
        let layout = Layout::Tokens;
        Self {
            batch,
            grid,
            groups,
            width,
            layout,
            residual: true,
            relu: false,
            loud: false,
            lead: 0,
            gap: 0,
            seed,
        }
    }

    fn channels(&self) -> usize {
        self.groups * self.width
    }

    fn positions(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// (B, N, C) of random values, as `T` holds them.
    fn map<T: Value>(&self, salt: u64) -> Tensor {
        let shape = [self.batch, self.positions(), self.channels()];
        let values = random::<T>(shape.iter().product(), self.seed ^ salt, 1.0);
        let loud = |v: &f32| 20_000.0 + 500.0 * v;
        tensor(
            &shape,
            if self.loud { rounded::<T>(&values.iter().map(loud).collect::<Vec<_>>()) } else { values },
        )
    }

    fn filter<T: Value>(&self) -> Frequency<Tensor> {
        let scale = 0.7 / (self.width as f32).sqrt();
        let part = |shape: &[usize], salt: u64, scale: f32| {
            tensor(shape, random::<T>(shape.iter().product(), self.seed ^ salt, scale))
        };
        let (g, s) = (self.groups, self.width);
        Frequency {
            w1: part(&[2, g, s, s], 11, scale),
            b1: part(&[2, g, s], 12, 0.3),
            w2: if self.loud { Tensor::zeros(&[2, g, s, s]) } else { part(&[2, g, s, s], 13, scale) },
            b2: part(&[2, g, s], 14, 0.3),
            activation: if self.relu { Activation::Relu } else { Activation::Silu },
            threshold: 0.05,
        }
    }

    /// The extents and strides in memory.
    fn place<P>(&self, data: P) -> Strided<P> {
        let [second, third] = match self.layout {
            Layout::Tokens => [self.positions(), self.channels()],
            Layout::Planes => [self.channels(), self.positions()],
        };
        let row = third + self.gap;
        Strided::new(data, [self.batch, second, third]).with_strides([second * row + self.gap, row])
    }

    fn length(&self) -> usize {
        let Strided { shape, strides, .. } = self.place(());
        self.lead + shape[0] * strides[0]
    }

    /// Where value (image, position, channel) lies.
    fn at(&self, index: usize) -> usize {
        let (n, c) = (self.positions(), self.channels());
        let (image, position, channel) = (index / (n * c), index / c % n, index % c);
        let [images, rows] = self.place(()).strides;
        let (row, column) = match self.layout {
            Layout::Tokens => (position, channel),
            Layout::Planes => (channel, position),
        };
        self.lead + image * images + row * rows + column
    }

    fn spread(&self, map: &Tensor) -> Vec<f32> {
        let mut values = vec![f32::NAN; self.length()];
        map.data().iter().enumerate().for_each(|(i, &value)| values[self.at(i)] = value);
        values
    }
}

fn on_device<T: Value>(turn: &Turn, case: &Case) -> Vec<f32> {
    computed::<T, T>(turn, case)
}

/// By the kernel for `T`, of values as `V` holds them.
fn computed<T: Value, V: Value>(turn: &Turn, case: &Case) -> Vec<f32> {
    let filter = case.filter::<V>();
    let x: CudaSlice<T> = turn.upload(&case.spread(&case.map::<V>(1)));
    let residual: CudaSlice<T> = turn.upload(&case.spread(&case.map::<V>(2)));
    let mut out: CudaSlice<T> = turn.upload(&vec![f32::NAN; case.length()]);
    let up = |tensor: &Tensor| -> CudaSlice<T> { turn.upload(tensor.data()) };
    let [w1, b1, w2, b2] = [&filter.w1, &filter.b1, &filter.w2, &filter.b2].map(up);
    let shape =
        FrequencyShape { batch: case.batch, grid: case.grid, channels: case.channels(), groups: case.groups };
    let bytes = workspace_bytes(&turn.device, shape).unwrap();
    let mut workspace = turn.stream.alloc_zeros::<u8>(bytes.max(8)).unwrap();
    let filtering = Filtering {
        x: case.place(x.slice(case.lead..)),
        residual: case.residual.then(|| case.place(residual.slice(case.lead..))),
        layout: case.layout,
        grid: case.grid,
        groups: case.groups,
        filter: Frequency {
            w1: w1.as_view(),
            b1: b1.as_view(),
            w2: w2.as_view(),
            b2: b2.as_view(),
            activation: filter.activation,
            threshold: filter.threshold,
        },
    };
    let mut target = case.place(out.slice_mut(case.lead..));
    let mut room = workspace.slice_mut(..bytes);
    frequency(&turn.device, &turn.stream, &filtering, &mut target, &mut room).unwrap();
    turn.download(&out)
}

fn reference<T: Value>(case: &Case) -> Tensor {
    let residual = case.residual.then(|| case.map::<T>(2));
    Reference::new().frequency(&case.map::<T>(1), case.grid, &case.filter::<T>(), residual.as_ref()).unwrap()
}

/// The largest error over the largest value: 1e-5 in f32, the rounding of the result in the others.
fn error(case: &Case, got: &[f32], want: &Tensor) -> f32 {
    let largest = want.data().iter().fold(1.0_f32, |largest, v| largest.max(v.abs()));
    let worst = want.data().iter().enumerate().map(|(i, want)| (got[case.at(i)] - want).abs());
    worst.fold(0.0_f32, |worst, error| if error > worst || error.is_nan() { error } else { worst }) / largest
}

fn tolerance<T: Value>() -> f32 {
    match <T as Element>::DTYPE {
        foveate::cuda::DType::F32 => 1e-5,
        // Half a unit in the last place of the largest value, and the f32 arithmetic before it.
        foveate::cuda::DType::F16 => 4.9e-4 + 1e-5,
        foveate::cuda::DType::Bf16 => 3.91e-3 + 1e-5,
    }
}

fn check<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let want = reference::<T>(case);
    let got = on_device::<T>(turn, case);
    let worst = error(case, &got, &want);
    prop_assert!(worst <= tolerance::<T>(), "{case:?}: {worst:e}");
    let mut written = vec![false; got.len()];
    (0..want.data().len()).for_each(|i| written[case.at(i)] = true);
    prop_assert!(got.iter().zip(&written).all(|(v, written)| *written || v.is_nan()), "{case:?}: gaps");
    Ok(())
}

/// Every butterfly, odd sides and primes that have none, groups of every published width and odd ones, both layouts.
#[test]
fn grids_and_groups_of_every_kind() {
    let Some(turn) = Turn::new() else { return };
    for (at, (grid, groups, width)) in [
        ([8, 8], 1, 18),
        ([7, 7], 2, 13),
        ([14, 14], 1, 12),
        ([12, 20], 1, 8),
        ([16, 16], 1, 20),
        ([1, 1], 2, 3),
        ([1, 2], 1, 1),
        ([2, 1], 1, 2),
        ([5, 9], 2, 7),
        ([11, 13], 1, 8),
        ([3, 26], 1, 5),
        ([8, 8], 1, 40),
        ([32, 32], 1, 8),
        ([28, 28], 1, 3),
    ]
    .into_iter()
    .enumerate()
    {
        let layout = if at % 2 == 0 { Layout::Tokens } else { Layout::Planes };
        let case =
            Case { layout, relu: at % 3 == 0, residual: at % 4 != 1, ..Case::new(1, grid, groups, width) };
        check::<f32>(&turn, &case).unwrap();
    }
    let case = Case::new(2, [7, 8], 2, 8);
    check::<f16>(&turn, &case).unwrap();
    check::<bf16>(&turn, &Case { layout: Layout::Planes, ..case }).unwrap();
    turn.end();
}

fn case() -> impl Strategy<Value = Case> {
    let sides = (1_usize..13, 1_usize..13);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (2, 0), (0, 2), (1, 3)]);
    let flags = any::<(bool, bool, bool)>();
    (1_usize..3, sides, 1_usize..3, 1_usize..14, place, flags, any::<u64>()).prop_map(
        |(batch, (height, columns), groups, width, (gap, lead), (planar, residual, relu), seed)| Case {
            batch,
            grid: [height, columns],
            groups,
            width,
            layout: if planar { Layout::Planes } else { Layout::Tokens },
            residual,
            relu,
            loud: false,
            lead,
            gap,
            seed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

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

/// What is off beyond the rounding of the result to `T`, over the largest value: a bound from below on the error before it, and
/// close to it, for some of many values are small.
fn beyond_rounding<T: Value>(got: &[f32], want: &[f32]) -> f32 {
    let (digits, least) = match <T as Element>::DTYPE {
        foveate::cuda::DType::F32 => (24, -126),
        foveate::cuda::DType::F16 => (11, -14),
        foveate::cuda::DType::Bf16 => (8, -126),
    };
    let largest = want.iter().fold(1.0_f32, |largest, v| largest.max(v.abs()));
    let excess = got.iter().zip(want).map(|(got, want)| {
        let exponent = (got.abs().max(want.abs()).log2().floor() as i32).max(least);
        (got - want).abs() - 2_f32.powi(exponent - digits)
    });
    excess.fold(0.0, f32::max) / largest
}

/// Grids with axes of every kind (a product, two, butterflies, a prime) and groups on either side of the widths that tensor
/// cores take.
fn products() -> impl Strategy<Value = Case> {
    let side = || prop::sample::select(vec![1_usize, 2, 5, 7, 8, 9, 11, 12, 14, 16, 17, 18, 20, 24, 28, 32]);
    (case(), side(), side(), 3_usize..43).prop_map(|(case, height, columns, width)| {
        // One group of one image where there is much to compute.
        let (batch, groups) =
            if height * columns * width > 4000 { (1, 1) } else { (case.batch, case.groups) };
        Case { grid: [height, columns], width, groups, batch, ..case }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn tensor_cores_give_what_the_reference_gives(case in products(), bf16_too: bool) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check::<f16>(&turn, &case)?;
        if bf16_too {
            check::<bf16>(&turn, &case)?;
        }
        turn.end();
    }
}

/// Beside the f32 kernel, which takes no tensor cores, on the same values: what differs beyond the rounding of the result is what
/// the tolerance of these tests leaves to arithmetic.
#[test]
fn products_differ_from_multiply_adds_by_the_rounding_of_the_result() {
    fn beyond<T: Value>(turn: &Turn, case: &Case) -> f32 {
        let worst = beyond_rounding::<T>(&on_device::<T>(turn, case), &computed::<f32, T>(turn, case));
        println!("{:?} {}: {worst:e}", case.grid, case.width);
        worst
    }
    let Some(turn) = Turn::new() else { return };
    for (grid, width) in [
        ([32, 32], 8),
        ([16, 16], 13),
        ([8, 8], 18),
        ([16, 16], 32),
        ([8, 8], 40),
        ([12, 20], 11),
        ([14, 28], 16),
        ([7, 9], 24),
    ] {
        let case = Case { residual: false, ..Case::new(1, grid, 1, width) };
        let worst = beyond::<f16>(&turn, &case).max(beyond::<bf16>(&turn, &case));
        assert!(worst <= 1e-5, "{case:?}: {worst:e}");
        // A layer of one bf16 part would be seen: 2^-9 of a value.
        let other = Case { seed: case.seed + 1, ..case };
        let far =
            beyond_rounding::<f16>(&on_device::<f16>(&turn, &case), &computed::<f32, f16>(&turn, &other));
        assert!(far > 1e-2, "other values are seen");
    }
    turn.end();
}

/// Half precision ends at 65,504, the mean of a map times the root of its positions does not.
#[test]
fn sums_beyond_half_precision_are_no_infinities() {
    let Some(turn) = Turn::new() else { return };
    for (grid, width) in [([16, 16], 13), ([32, 32], 8), ([8, 8], 24)] {
        let case = Case { loud: true, residual: false, ..Case::new(1, grid, 1, width) };
        let sum = case.map::<f16>(1).data().iter().step_by(width).sum::<f32>();
        assert!(sum / (case.positions() as f32).sqrt() > 65_504.0);
        check::<f16>(&turn, &case).unwrap();
        check::<bf16>(&turn, &case).unwrap();
    }
    turn.end();
}

/// Which kernel runs, how many products it takes, and that it moves x, residual, out and the weights once an image.
#[cfg(feature = "emulated")]
#[test]
fn what_has_16_bits_takes_tensor_cores() {
    use foveate_device_tests::traffic::Traffic;
    fn ran<T: Value>(turn: &Turn, case: &Case) -> Traffic {
        Traffic::of(turn, || drop(on_device::<T>(turn, case)))
    }
    let Some(turn) = Turn::new() else { return };
    for (grid, width, axes) in [([32, 32], 8, 2), ([16, 16], 20, 2), ([8, 8], 40, 0), ([14, 7], 13, 1)] {
        let case = Case::new(2, grid, 2, width);
        let steps = width.div_ceil(8);
        // By hand: a unit of 8 by 8 channels is 4 products, 6 in f16, for 16 bins and each of two layers; 16 lines of up to 16
        // values are 32, of up to 32 twice as many, there and back.
        let bins = (grid[0] * (grid[1] / 2 + 1)).div_ceil(16);
        let network = |unit: usize| 2 * bins * steps * steps * unit;
        let lines = |n: usize, other: usize| match n {
            9..=16 => (width.div_ceil(2) * other).div_ceil(16) * 32,
            18..=32 => (width.div_ceil(2) * other).div_ceil(16) * 64,
            _ => 0,
        };
        let transforms = 2 * (lines(grid[1], grid[0]) + lines(grid[0], grid[1]));
        assert_eq!(usize::from(lines(grid[1], grid[0]) > 0) + usize::from(lines(grid[0], grid[1]) > 0), axes);
        let blocks = case.batch * case.groups;
        let values = 3 * case.batch * case.positions() * case.channels();
        let weights = 4 * case.groups * width * (width + 1);
        for (traffic, name, unit) in
            [(ran::<f16>(&turn, &case), "f16", 6), (ran::<bf16>(&turn, &case), "bf16", 4)]
        {
            assert_eq!(traffic.kernel(), format!("fv_frequency_mma_{name}_{steps}"));
            let products = blocks * (network(unit) + transforms);
            assert_eq!(traffic.matrix_instructions(), products as f64, "{case:?} {name}");
            let over = traffic.moved() / (2 * (values + weights)) as f64;
            assert!(over <= 1.1, "{case:?} {name}: {over}");
        }
        let traffic = ran::<f32>(&turn, &case);
        assert!(traffic.kernel().starts_with("fv_frequency_f32"), "{}", traffic.kernel());
        assert_eq!(traffic.matrix_instructions(), 0.0);
    }
    for width in [3, 41] {
        let traffic = ran::<f16>(&turn, &Case::new(1, [8, 8], 1, width));
        assert!(traffic.kernel().starts_with("fv_frequency_f16"), "{}", traffic.kernel());
    }
    turn.end();
}

/// A spectrum that no block holds: three launches, through memory.
#[test]
fn large_spectra_go_through_memory() {
    let Some(turn) = Turn::new() else { return };
    for (grid, width, layout) in [([60, 64], 13, Layout::Tokens), ([100, 128], 3, Layout::Planes)] {
        let case = Case { layout, ..Case::new(2, grid, 1, width) };
        let shape = FrequencyShape { batch: 2, grid, channels: width, groups: 1 };
        assert!(workspace_bytes(&turn.device, shape).unwrap() > 0, "{case:?} does not fit");
        check::<f32>(&turn, &case).unwrap();
    }
    turn.end();
}

#[test]
fn no_order_of_blocks_and_no_batch_shows() {
    let Some(turn) = Turn::new() else { return };
    let case = Case::new(2, [6, 8], 2, 5);
    let both = turn
        .in_every_order(|| on_device::<f32>(&turn, &case).iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    let one = on_device::<f32>(&turn, &Case { batch: 1, ..case });
    let one: Vec<u32> = one.iter().map(|v| v.to_bits()).collect();
    assert_eq!(one, both[..one.len()]);
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = Case::new(1, [4, 6], 1, 4);
    let got = on_device::<f32>(&turn, &case);
    assert!(error(&case, &got, &reference::<f32>(&case)) <= 1e-5);
    let other = Case { relu: true, ..case };
    assert!(error(&case, &got, &reference::<f32>(&other)) > 1e-3, "another activation is seen");
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&vec![0.0; 4096]);
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; 4096]);
    let mut workspace = turn.stream.alloc_zeros::<u8>(8).unwrap();
    let mut run =
        |shape: [usize; 3], grid: [usize; 2], weights: usize, activation: Activation, threshold: f32| {
            let filtering = Filtering {
                x: Strided::new(memory.as_view(), shape),
                residual: None,
                layout: Layout::Tokens,
                grid,
                groups: 2,
                filter: Frequency {
                    w1: memory.slice(..weights),
                    b1: memory.slice(..16),
                    w2: memory.slice(..128),
                    b2: memory.slice(..16),
                    activation,
                    threshold,
                },
            };
            let mut target = Strided::new(out.as_view_mut(), [1, 12, 8]);
            let mut room = workspace.slice_mut(..0);
            frequency(&turn.device, &turn.stream, &filtering, &mut target, &mut room).unwrap_err().to_string()
        };
    let silu = Activation::Silu;
    for (message, part) in [
        (run([1, 12, 8], [3, 5], 64, silu, 0.0), "12 positions are no grid of 3x5"),
        (run([1, 12, 8], [3, 4], 63, silu, 0.0), "w1 has 63 values, expected 64"),
        (run([1, 12, 8], [3, 4], 64, silu, 0.0), "w2 has 128 values, expected 64"),
        (run([1, 12, 7], [3, 4], 64, silu, 0.0), "7 channels are not 2 groups"),
        (run([1, 129, 8], [1, 129], 64, silu, 0.0), "w2 has 128 values"),
    ] {
        assert!(message.contains(part), "{message}");
    }
    turn.end();
}
