//! kernels/unfold.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    Images, Pixels,
    backend::{Backend, Window},
    cuda::{
        Strided,
        patch::DeviceImages,
        unfold::{unfold, unfold_images},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, bits, random, rounded, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

prop_compose! {
    fn window()(kernel in 1_usize..8, stride in 1_usize..5)
        (padding in 0..kernel, kernel in Just(kernel), stride in Just(stride)) -> Window {
        Window { kernel, stride, padding }
    }
}

fn place() -> impl Strategy<Value = (usize, usize)> {
    prop::sample::select(vec![(0, 0), (0, 0), (8, 8), (2, 0), (1, 0), (0, 1)])
}

/// Copies: every bit is the reference's.
fn check_map<T: Value>(turn: &Turn, from: Layout, grid: [usize; 2], window: Window, seed: u64) {
    let [rows, columns] = window.over(grid).unwrap();
    let [batch, _, channels] = from.shape;
    let mut x = random::<T>(from.shape.iter().product(), seed, 3.0);
    x[0] = f32::NAN;
    let want = Reference::new().unfold(&tensor(&from.shape, x.clone()), grid, window).unwrap();
    let memory: CudaSlice<T> = turn.upload(&from.spread(&x));
    let to = Layout { shape: [batch, rows * columns, window.taps() * channels], ..from };
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&to.blank());
        let (source, mut target) = (from.over(memory.slice(from.lead..)), to.over(out.slice_mut(to.lead..)));
        unfold(&turn.device, &turn.stream, &source, grid, window, &mut target).unwrap();
        bits(&to.gather(&turn.download(&out)))
    });
    assert_eq!(got, bits(want.data()), "{window:?} over {from:?} of {grid:?}");
}

/// Pixels are normalised as the reference does, then rounded to `T`.
fn check_images<T: Value>(
    turn: &Turn,
    shape: [usize; 4],
    bytes: bool,
    window: Window,
    layout: Layout,
    seed: u64,
) {
    let [batch, channels, height, width] = shape;
    let [rows, columns] = window.over([height, width]).unwrap();
    let to = Layout { shape: [batch, rows * columns, channels * window.taps()], ..layout };
    let (mean, std) = (&[0.485, 0.456, 0.406][..channels], &[0.229, 0.224, 0.225][..channels]);
    let values = random::<f32>(shape.iter().product(), seed, 1.0);
    let pixels: Vec<u8> = values.iter().map(|v| (v * 127.0 + 128.0) as u8).collect();
    let images = if bytes { Pixels::U8(pixels.clone()) } else { Pixels::F32(values.clone()) };
    let images = Images::new(shape, images).unwrap();
    let want = Reference::new().unfold_images(&images, window, mean, std).unwrap();
    let (device, stream) = (&turn.device, &turn.stream);
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&to.blank());
        let mut target = to.over(out.slice_mut(to.lead..));
        if bytes {
            let memory = stream.clone_htod(&pixels).unwrap();
            let images = DeviceImages::planes(memory.as_view(), shape);
            unfold_images(device, stream, &images, window, mean, std, &mut target).unwrap();
        } else {
            let memory = stream.clone_htod(&values).unwrap();
            let images = DeviceImages::planes(memory.as_view(), shape);
            unfold_images(device, stream, &images, window, mean, std, &mut target).unwrap();
        }
        bits(&to.gather(&turn.download(&out)))
    });
    assert_eq!(got, bits(&rounded::<T>(want.data())), "{window:?} over {shape:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn windows_over_feature_maps(
        batch in 1_usize..3, grid in (1_usize..9, 1_usize..9), channels in prop::sample::select(vec![1_usize, 2, 3, 8, 24]),
        window in window(), (gap, lead) in place(), dtype in 0..3, seed in any::<u64>(),
    ) {
        let grid = <[usize; 2]>::from(grid);
        prop_assume!(window.over(grid).is_some());
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, grid[0] * grid[1], channels], gap, lead };
        match dtype {
            0 => check_map::<f32>(&turn, layout, grid, window, seed),
            1 => check_map::<f16>(&turn, layout, grid, window, seed),
            _ => check_map::<bf16>(&turn, layout, grid, window, seed),
        }
        turn.end();
    }

    #[test]
    fn windows_over_images(
        batch in 1_usize..3, channels in 1_usize..4, sides in (1_usize..20, 1_usize..20), window in window(),
        bytes in any::<bool>(), (gap, lead) in place(), dtype in 0..3, seed in any::<u64>(),
    ) {
        prop_assume!(window.over(sides.into()).is_some());
        let Some(turn) = Turn::new() else { return Ok(()) };
        let shape = [batch, channels, sides.0, sides.1];
        let layout = Layout { shape: [0; 3], gap, lead };
        match dtype {
            0 => check_images::<f32>(&turn, shape, bytes, window, layout, seed),
            1 => check_images::<f16>(&turn, shape, bytes, window, layout, seed),
            _ => check_images::<bf16>(&turn, shape, bytes, window, layout, seed),
        }
        turn.end();
    }
}

#[test]
fn the_windows_of_published_stems() {
    let Some(turn) = Turn::new() else { return };
    let layout =
        |grid: [usize; 2], channels| Layout { shape: [1, grid[0] * grid[1], channels], gap: 0, lead: 0 };
    for (kernel, stride, padding) in [(3, 1, 1), (3, 2, 1), (8, 8, 0)] {
        let window = Window { kernel, stride, padding };
        check_map::<f16>(&turn, layout([16, 8], 64), [16, 8], window, 3);
    }
    for (stride, padding) in [(2, 3), (4, 2)] {
        let window = Window { kernel: 7, stride, padding };
        check_images::<f16>(&turn, [1, 3, 32, 16], true, window, layout([1, 1], 1), 4);
    }
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let memory: CudaSlice<f32> = turn.upload(&[0.0; 1024]);
    let mut out: CudaSlice<f32> = turn.upload(&[0.0; 1024]);
    let fine = Window { kernel: 3, stride: 2, padding: 1 };
    let mut run = |grid: [usize; 2], window: Window, shape: [usize; 3]| {
        let x = Strided::new(memory.as_view(), [1, 12, 4]);
        let mut out = Strided::new(out.as_view_mut(), shape);
        unfold(&turn.device, &turn.stream, &x, grid, window, &mut out).unwrap_err().to_string()
    };
    for (message, part) in [
        (run([3, 5], fine, [1, 4, 36]), "x has shape [1, 12, 4], which is no feature map of 3x5"),
        (
            run([3, 4], Window { stride: 0, ..fine }, [1, 4, 36]),
            "a window of 3x3, stride 0, padding 1 has no place",
        ),
        (run([3, 4], Window { padding: 3, ..fine }, [1, 4, 36]), "padding 3 has no place on a grid of 3x4"),
        (run([3, 4], fine, [1, 4, 32]), "out has shape [1, 4, 32], expected [1, 4, 36]"),
    ] {
        assert!(message.contains(part), "{message}");
    }
    let pixels = turn.stream.clone_htod(&[0_u8; 17 * 16]).unwrap();
    let mut images = |shape: [usize; 4], channels: usize| {
        let images = DeviceImages::planes(pixels.as_view(), shape);
        let mut out = Strided::new(out.as_view_mut(), [1, 4, 9]);
        let (mean, std) = (vec![0.5; channels], vec![0.5; channels]);
        unfold_images(&turn.device, &turn.stream, &images, fine, &mean, &std, &mut out)
            .unwrap_err()
            .to_string()
    };
    for (message, part) in [
        (images([1, 18, 4, 4], 18), "do not lie within their memory of 272 values"),
        (images([1, 17, 4, 4], 17), "8-bit images have 17 channels, the kernels normalise up to 16"),
        (images([1, 1, 4, 4], 3), "mean and deviation of 3 and 3 channels, the images have 1"),
        (images([1, 2, 4, 4], 2), "out has shape [1, 4, 9], expected [1, 4, 18]"),
    ] {
        assert!(message.contains(part), "{message}");
    }
    turn.end();
}
