//! What stands between pixels and the first block: windows, convolutions; and the largest values behind the last.

use foveate::{
    Images, Pixels, Tensor,
    backend::{Backend, Linear, Window},
    cpu::{Cpu, Instructions},
    model::{Activation, Stem, arch},
    reference::Reference,
};
use proptest::prelude::*;

mod backends;
use backends::{Hosted, backends};

fn values(count: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| (i as u32).wrapping_add(seed).wrapping_mul(2_654_435_761) >> 16;
    (0..count).map(|i| value(i) as f32 / 65536.0 - 0.5).collect()
}

prop_compose! {
    fn window()(kernel in 1_usize..8, stride in 1_usize..5)
        (padding in 0..kernel, kernel in Just(kernel), stride in Just(stride)) -> Window {
        Window { kernel, stride, padding }
    }
}

/// What lies at (row, column) of a window's place, by the definition: None beyond the border.
fn seen(window: Window, place: [usize; 2], tap: [usize; 2], grid: [usize; 2]) -> Option<[usize; 2]> {
    let at = [0, 1].map(|i| (place[i] * window.stride + tap[i]) as isize - window.padding as isize);
    let inside = |i: usize| at[i] >= 0 && at[i] < grid[i] as isize;
    (inside(0) && inside(1)).then(|| at.map(|at| at as usize))
}

proptest! {
    #[test]
    fn windows_see_what_they_stand_over(
        batch in 1_usize..3, channels in 1_usize..4, height in 1_usize..14, width in 1_usize..14, window in window(),
        seed in any::<u32>(),
    ) {
        let shape = [batch, channels, height, width];
        let bytes: Vec<u8> = values(shape.iter().product(), seed).iter().map(|v| (v * 255.0 + 128.0) as u8).collect();
        let (mean, std) = (&[0.4, 0.5, 0.6][..channels], &[0.2, 0.3, 0.4][..channels]);
        let images = Images::new(shape, Pixels::U8(bytes.clone())).unwrap();
        for reference in backends() {
        let got = reference.unfold_images(&images, window, mean, std);
        let Some([rows, columns]) = window.over([height, width]) else {
            prop_assert!(got.unwrap_err().to_string().contains("has no place on a grid of"));
            return Ok(());
        };
        let (got, k) = (got.unwrap(), window.kernel);
        prop_assert_eq!(got.shape(), &[batch, rows * columns, channels * k * k][..]);
        let pixel = |image: usize, c: usize, [y, x]: [usize; 2]| {
            let byte = bytes[((image * channels + c) * height + y) * width + x];
            (f32::from(byte) / 255.0 - mean[c]) / std[c]
        };
        // The same images as a feature map: channels last.
        let map = (0..batch * height * width * channels).map(|at| {
            let (c, x, y) = (at % channels, at / channels % width, at / (channels * width) % height);
            pixel(at / (channels * width * height), c, [y, x])
        });
        let map = Tensor::new(&[batch, height * width, channels], map.collect()).unwrap();
        let unfolded = reference.unfold(&map, [height, width], window).unwrap();
        for image in 0..batch {
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                for at in 0..channels * k * k {
                    let (c, y, x) = (at / (k * k), at / k % k, at % k);
                    let want = seen(window, [row, column], [y, x], [height, width]);
                    let want = want.map_or(0.0, |at| pixel(image, c, at));
                    let place = (row * columns + column) * channels * k * k;
                    prop_assert_eq!(got.item(image)[place + at], want);
                    prop_assert_eq!(unfolded.item(image)[place + (y * k + x) * channels + c], want);
                }
            }
        }
        let normalised = Tensor::new(&shape, (0..bytes.len()).map(|at| {
            let (x, y, c) = (at % width, at / width % height, at / (width * height) % channels);
            pixel(at / (width * height * channels), c, [y, x])
        }).collect()).unwrap();
        let images = Images::new(shape, Pixels::F32(normalised.into_data())).unwrap();
        prop_assert_eq!(reference.unfold_images(&images, window, mean, std).unwrap(), got);
        }
    }

    #[test]
    fn convolutions_are_sums_over_what_windows_see(
        batch in 1_usize..3, channels in 1_usize..6, outputs in 1_usize..5, grid in (1_usize..8, 1_usize..8),
        window in window(), relu in any::<bool>(), biased in any::<bool>(), seed in any::<u32>(),
    ) {
        let grid = <[usize; 2]>::from(grid);
        let Some([rows, columns]) = window.over(grid) else { return Ok(()) };
        let inputs = window.taps() * channels;
        let x = Tensor::new(&[batch, grid[0] * grid[1], channels], values(batch * grid[0] * grid[1] * channels, seed)).unwrap();
        let weight = Tensor::new(&[outputs, inputs], values(outputs * inputs, seed ^ 1)).unwrap();
        let bias = biased.then(|| Tensor::new(&[outputs], values(outputs, seed ^ 2)).unwrap());
        let layer = Linear { weight, bias };
        let activation = relu.then_some(Activation::Relu);
        for backend in backends() {
        let got = backend.convolve(&x, grid, window, &layer, activation).unwrap();
        prop_assert_eq!(got.shape(), &[batch, rows * columns, outputs][..]);
        for (at, &got) in got.data().iter().enumerate() {
            let (o, place, image) = (at % outputs, at / outputs % (rows * columns), at / (outputs * rows * columns));
            let mut want = layer.bias.as_ref().map_or(0.0, |bias| f64::from(bias.data()[o]));
            // How large the terms are together: partial sums reach that.
            let mut size = want.abs();
            for tap in 0..window.taps() {
                let taps = [tap / window.kernel, tap % window.kernel];
                let Some([y, x_]) = seen(window, [place / columns, place % columns], taps, grid) else { continue };
                for c in 0..channels {
                    let value = x.item(image)[(y * grid[1] + x_) * channels + c];
                    let term = f64::from(layer.weight.data()[o * inputs + tap * channels + c]) * f64::from(value);
                    want += term;
                    size += term.abs();
                }
            }
            let want = if relu { want.max(0.0) } else { want };
            let limit = 4.0 * f64::from(f32::EPSILON) * (inputs as f64).sqrt() * size;
            prop_assert!((f64::from(got) - want).abs() <= limit, "{got} instead of {want}");
        }
        }
    }
}

/// Parameters as the official classes have them, in millions.
#[test]
fn published_models_have_their_parameters() {
    for (name, published) in [
        ("lvvit_t", 8.53),
        ("lvvit_s", 26.15),
        ("lvvit_m", 55.83),
        ("t2t_vit_7", 4.31),
        ("t2t_vit_10", 5.89),
        ("t2t_vit_12", 6.94),
        ("t2t_vit_14", 21.55),
        ("t2t_vit_19", 39.18),
        ("t2t_vit_t_14", 21.54),
    ] {
        let config = arch::config(name).unwrap();
        let params = arch::random_params(&config, 0);
        // A batch norm's weight is folded into the convolution, its bias stays.
        let mut count = if let Stem::Convolutions { filters } = config.stem { 3 * filters } else { 0 };
        let mut add = |tensor: Tensor| {
            count += tensor.data().len();
            Ok(tensor)
        };
        params.try_map(&mut add).unwrap();
        assert_eq!(format!("{:.2}", count as f64 / 1e6), format!("{published:.2}"), "{name}: {count}");
    }
}

#[test]
fn the_largest_values_of_tokens_that_count() {
    let x = Tensor::new(&[2, 3, 2], vec![9.0, 9.0, -1.0, 2.0, 5.0, -3.0, 0.0, 0.0, 1.0, f32::NAN, 2.0, 4.0])
        .unwrap();
    for reference in backends() {
        let all = reference.max_tokens(&x, None, 1).unwrap();
        assert_eq!(all.data()[..3], [5.0, 2.0, 2.0]);
        assert!(all.data()[3].is_nan());
        let sizes = Tensor::new(&[2, 3], vec![1.0, 3.0, 0.0, 1.0, 0.0, 1.0]).unwrap();
        assert_eq!(reference.max_tokens(&x, Some(&sizes), 1).unwrap().data(), [-1.0, 2.0, 2.0, 4.0]);
        let none = Tensor::zeros(&[2, 3]);
        assert_eq!(reference.max_tokens(&x, Some(&none), 0).unwrap().data(), [0.0; 4]);
        let said =
            |first, sizes: &Tensor| reference.max_tokens(&x, Some(sizes), first).unwrap_err().to_string();
        assert!(said(3, &sizes).contains("no tokens are left from 3 on, of 3"));
        assert!(said(0, &Tensor::zeros(&[2, 2])).contains("sizes has shape [2, 2], expected [2, 3]"));
    }
}

proptest! {
    /// The definition the N x N way, in double precision.
    #[test]
    fn a_performer_is_attention_by_random_features(
        batch in 1_usize..3, n in 1_usize..40, width in 1_usize..20, features in 1_usize..10, seed in any::<u32>(),
    ) {
        let packed = Tensor::new(&[batch, n, 3 * width], values(batch * n * 3 * width, seed)).unwrap();
        let w = Tensor::new(&[features, width], values(features * width, seed ^ 1)).unwrap();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let phi = |a: &[f32]| -> Vec<f64> {
            let feature = |row| (dot(a, row) - dot(a, a) / 2.0).exp() / (features as f64).sqrt();
            w.data().chunks(width).map(feature).collect()
        };
        for backend in backends() {
            let got = backend.performer(&packed, &w).unwrap();
            let values = backend.columns(&packed, 2 * width..3 * width).unwrap();
            prop_assert_eq!(got.shape(), &[batch, n, width][..]);
            for image in 0..batch {
                let row = |token: usize| &packed.item(image)[token * 3 * width..(token + 1) * 3 * width];
                for token in 0..n {
                    let query = phi(&row(token)[width..2 * width]);
                    let weight = |s: usize| phi(&row(s)[..width]).iter().zip(&query).map(|(a, b)| a * b).sum::<f64>();
                    let below = (0..n).map(weight).sum::<f64>() + 1e-8;
                    for column in 0..width {
                        let value = |s: usize| f64::from(values.item(image)[s * width + column]);
                        prop_assert_eq!(values.item(image)[token * width + column], row(token)[2 * width + column]);
                        let want = (0..n).map(|s| weight(s) / below * value(s)).sum::<f64>();
                        // A mean of values of up to a half; its weights are off by the features' arguments, sums of D products.
                        let limit = 8.0 * f64::from(f32::EPSILON) * ((n * features) as f64).sqrt().max(width as f64);
                        let got = f64::from(got.item(image)[token * width + column]);
                        prop_assert!((got - want).abs() <= limit, "{got} instead of {want}");
                    }
                }
            }
        }
    }
}

/// More tokens than one task takes: what the tasks sum up is the same whoever does them.
#[test]
fn a_performer_of_many_tokens() {
    let (n, width, features) = (700, 40, 33);
    let packed = Tensor::new(&[2, n, 3 * width], values(2 * n * 3 * width, 3)).unwrap();
    let w = Tensor::new(&[features, width], values(features * width, 4)).unwrap();
    let want = Reference::new().performer(&packed, &w).unwrap();
    for instructions in Instructions::ALL.into_iter().filter(|instructions| instructions.available()) {
        let on = |threads| Hosted(Cpu::with(threads, instructions).unwrap()).performer(&packed, &w).unwrap();
        let got = on(1);
        for (got, want) in got.data().iter().zip(want.data()) {
            // Means of values of up to a half, by weights that are sums over 700 tokens in another order.
            assert!((got - want).abs() < 1e-5, "{got} instead of {want}, {instructions:?}");
        }
        assert!(on(2) == got && on(5) == got, "{instructions:?}");
    }
}

#[test]
fn wrong_performers_and_columns_are_named() {
    let x = Tensor::zeros(&[1, 4, 6]);
    for backend in backends() {
        let said = |x: &Tensor, w: &[usize]| backend.performer(x, &Tensor::zeros(w)).unwrap_err().to_string();
        assert!(
            said(&Tensor::zeros(&[1, 4, 7]), &[3, 2]).contains("no keys, queries and values of one width")
        );
        assert!(said(&x, &[3, 3]).contains("the random features has shape [3, 3], expected [3, 2]"));
        assert!(said(&x, &[0, 2]).contains("no random features"));
        let error = backend.columns(&x, 4..7).unwrap_err().to_string();
        assert!(error.contains("columns 4..7 are not among 6"), "{error}");
    }
}

#[test]
fn windows_that_make_no_sense_are_named() {
    let x = Tensor::zeros(&[1, 12, 2]);
    for reference in backends() {
        let said = |window, grid| reference.unfold(&x, grid, window).unwrap_err().to_string();
        for (kernel, stride, padding) in
            [(0, 1, 0), (3, 0, 1), (3, 1, 3), (9, 1, 2), (usize::MAX, 1, usize::MAX / 2)]
        {
            let message = said(Window { kernel, stride, padding }, [3, 4]);
            assert!(
                message.contains(&format!("a window of {kernel}x{kernel}, stride {stride}")),
                "{message}"
            );
        }
        let window = Window { kernel: 3, stride: 2, padding: 1 };
        assert!(said(window, [3, 5]).contains("x has shape [1, 12, 2], which is no feature map of 3x5"));
        assert!(said(window, [usize::MAX, 2]).contains("no feature map"));
        let images = Images::new([1, 3, 4, 4], Pixels::U8(vec![0; 48])).unwrap();
        let error = reference.unfold_images(&images, window, &[0.0; 2], &[1.0; 3]).unwrap_err();
        assert!(error.to_string().contains("mean and deviation of 2 and 3 channels, the images have 3"));
    }
}
