//! kernels/patch.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::{CudaSlice, CudaView};
use foveate::{
    Images, Pixels,
    backend::Backend,
    cuda::{
        Strided,
        patch::{DeviceImages, Pixel, embed, embed_in_place, patches},
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, bits, random, rounded, tensor};
use half::{bf16, f16};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A pixel type as the tests see it.
trait Source: Pixel + std::fmt::Debug + PartialEq {
    /// What lies where nobody may read: it would show.
    const POISON: Self;
    fn draw(rng: &mut StdRng) -> Self;
    fn pixels(values: Vec<Self>) -> Pixels;
}

impl Source for u8 {
    const POISON: Self = 255;
    fn draw(rng: &mut StdRng) -> Self {
        rng.random_range(0..255)
    }
    fn pixels(values: Vec<Self>) -> Pixels {
        Pixels::U8(values)
    }
}

impl Source for f32 {
    const POISON: Self = f32::NAN;
    fn draw(rng: &mut StdRng) -> Self {
        match rng.random_range(0..200) {
            0 => f32::INFINITY,
            1 => -1e30,
            2 => -0.0,
            3 => 1e-40,
            _ => rng.random_range(-3.0..3.0),
        }
    }
    fn pixels(values: Vec<Self>) -> Pixels {
        Pixels::F32(values)
    }
}

#[derive(Clone, Debug)]
struct Case {
    /// Images, channels, rows and columns of patches, height and width of a patch.
    extents: [usize; 6],
    interleaved: bool,
    /// Pixels between the end of a line and the next, and before the first.
    crop: (usize, usize),
    /// Values between the end of an output row and the next, and before the first.
    place: (usize, usize),
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let columns = prop::sample::select(vec![1_usize, 2, 3, 4, 5, 8, 9]);
    let side = prop::sample::select(vec![1_usize, 2, 3, 4, 7, 8, 14, 16, 24]);
    let extents = (1_usize..4, 1_usize..5, 1_usize..4, columns, side.clone(), side);
    let crop = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (16, 0), (16, 16), (5, 0), (0, 3)]);
    let place = prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (2, 0), (1, 0), (0, 1)]);
    (extents, any::<bool>(), crop, place, any::<u64>()).prop_map(
        |((batch, channels, rows, columns, ph, pw), interleaved, crop, place, seed)| Case {
            extents: [batch, channels, rows, columns, ph, pw],
            interleaved,
            crop,
            place,
            seed,
        },
    )
}

impl Case {
    fn shape(&self) -> [usize; 4] {
        let [batch, channels, rows, columns, ph, pw] = self.extents;
        [batch, channels, rows * ph, columns * pw]
    }

    fn patch(&self) -> [usize; 2] {
        [self.extents[4], self.extents[5]]
    }

    fn layout(&self) -> Layout {
        let [batch, channels, rows, columns, ph, pw] = self.extents;
        Layout { shape: [batch, rows * columns, channels * ph * pw], gap: self.place.0, lead: self.place.1 }
    }

    /// The images within larger ones.
    fn over<V>(&self, data: V) -> DeviceImages<V> {
        let shape @ [batch, channels, height, width] = self.shape();
        let around = [batch, channels, height, width + self.crop.0];
        let images = if self.interleaved {
            DeviceImages::interleaved(data, around)
        } else {
            DeviceImages::planes(data, around)
        };
        DeviceImages { shape, ..images }
    }

    /// The memory of images, row-major in (image, channel, line, pixel).
    fn spread<P: Source>(&self, values: &[P]) -> Vec<P> {
        let [batch, channels, height, width] = self.shape();
        let strides = self.over(()).strides;
        let length = batch * channels * height * (width + self.crop.0);
        let mut memory = vec![P::POISON; self.crop.1 + length];
        let mut values = values.iter();
        for image in 0..batch {
            for channel in 0..channels {
                for y in 0..height {
                    for x in 0..width {
                        let at = [image, channel, y, x].into_iter().zip(strides).map(|(i, step)| i * step);
                        memory[self.crop.1 + at.sum::<usize>()] = *values.next().unwrap();
                    }
                }
            }
        }
        memory
    }
}

fn statistics(channels: usize) -> (Vec<f32>, Vec<f32>) {
    let mean = [0.485, 0.456, 0.406, 0.0];
    let std = [0.229, 0.224, 0.225, 1.0];
    (mean[..channels].to_vec(), std[..channels].to_vec())
}

fn check<P: Source, T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    let shape = case.shape();
    let mut rng = StdRng::seed_from_u64(case.seed);
    let values: Vec<P> = (0..shape.iter().product()).map(|_| P::draw(&mut rng)).collect();
    let (mean, std) = statistics(shape[1]);
    let images = Images::new(shape, P::pixels(values.clone())).unwrap();
    let want = Reference::new().patches(&images, case.patch(), &mean, &std).unwrap();
    let memory = turn.stream.clone_htod(&case.spread(&values)).unwrap();
    let layout = case.layout();
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&layout.blank());
        let images = case.over(memory.slice(case.crop.1..));
        let mut view = layout.over(out.slice_mut(layout.lead..));
        patches(&turn.device, &turn.stream, &images, case.patch(), &mean, &std, &mut view).unwrap();
        bits(&layout.gather(&turn.download(&out)))
    });
    let want = bits(&rounded::<T>(want.data()));
    let width = layout.shape[2];
    let wrong = got.iter().zip(&want).position(|(got, want)| got != want);
    prop_assert!(
        wrong.is_none(),
        "row {:?}, column {:?}",
        wrong.map(|at| at / width),
        wrong.map(|at| at % width)
    );
    Ok(())
}

fn check_type(turn: &Turn, case: &Case, kind: usize) -> Result<(), TestCaseError> {
    match kind {
        0 => check::<u8, f32>(turn, case),
        1 => check::<u8, f16>(turn, case),
        2 => check::<u8, bf16>(turn, case),
        3 => check::<f32, f32>(turn, case),
        4 => check::<f32, f16>(turn, case),
        _ => check::<f32, bf16>(turn, case),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn patches_are_those_of_the_reference(case in case(), kind in 0_usize..6) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        check_type(&turn, &case, kind)?;
        turn.end();
    }
}

/// Each way of reading and writing, for each pair of types: patches of 16 and of 14, planes and interleaved, then one channel
/// more than a pixel's three.
#[test]
fn every_kernel() {
    let Some(turn) = Turn::new() else { return };
    for kind in 0..6 {
        for (channels, side, interleaved) in
            [(3, 16, false), (3, 14, false), (3, 16, true), (3, 14, true), (4, 16, true)]
        {
            let case = Case {
                extents: [2, channels, 2, 5, side, side],
                interleaved,
                crop: (0, 0),
                place: (0, 0),
                seed: 1,
            };
            check_type(&turn, &case, kind).unwrap();
        }
    }
    turn.end();
}

/// Of every byte, for statistics that are no round numbers: two divisions and a subtraction, each rounded once.
#[test]
fn every_byte_is_normalised_exactly() {
    let Some(turn) = Turn::new() else { return };
    let bytes: Vec<u8> = (0..=255).collect();
    let memory = turn.stream.clone_htod(&bytes).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let drawn = (0..24).map(|_| (rng.random_range(-2.0_f32..2.0), rng.random_range(1e-3_f32..4.0)));
    let edges = [(0.0, 1.0), (0.0, 0.0), (1.0, -0.5), (0.5, 1e-40), (f32::NAN, 1.0), (0.5, f32::INFINITY)];
    for (mean, std) in drawn.chain(edges) {
        let images = DeviceImages::planes(memory.as_view(), [1, 1, 16, 16]);
        let mut out: CudaSlice<f32> = turn.upload(&[0.0; 256]);
        let mut view = Strided::new(out.as_view_mut(), [1, 1, 256]);
        patches(&turn.device, &turn.stream, &images, [16, 16], &[mean], &[std], &mut view).unwrap();
        let want: Vec<f32> = bytes.iter().map(|&p| (f32::from(p) / 255.0 - mean) / std).collect();
        assert_eq!(bits(&turn.download(&out)), bits(&want), "mean {mean}, deviation {std}");
    }
    turn.end();
}

/// A tensor's bytes in the golden file.
fn golden(name: &str) -> Vec<u8> {
    let file =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../golden/preprocess.safetensors")).unwrap();
    let (length, rest) = file.split_at(8);
    let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let offset = |i: usize| header[name]["data_offsets"][i].as_u64().unwrap() as usize;
    data[offset(0)..offset(1)].to_vec()
}

/// timm's own pixels and what it makes of them.
#[test]
fn normalised_pixels_are_those_of_timm() {
    let Some(turn) = Turn::new() else { return };
    let size = 96;
    let shape = [1, 3, size, size];
    let planes = golden("coffee.2.u8");
    let want: Vec<f32> =
        golden("coffee.2.normalised").as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let memory = turn.stream.clone_htod(&planes).unwrap();
    let images = DeviceImages::planes(memory.as_view(), shape);
    let (mean, std) = ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);
    let side = 16;
    let grid = size / side;
    let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; planes.len()]);
    let mut view = Strided::new(out.as_view_mut(), [1, grid * grid, 3 * side * side]);
    patches(&turn.device, &turn.stream, &images, [side, side], &mean, &std, &mut view).unwrap();
    let got = turn.download(&out);
    for (at, want) in want.into_iter().enumerate() {
        let (c, y, x) = (at / (size * size), at / size % size, at % size);
        let row = y / side * grid + x / side;
        let got = got[row * 3 * side * side + (c * side + y % side) * side + x % side];
        assert!((got - want).abs() <= 1e-6, "channel {c}, line {y}, pixel {x}: {got} instead of {want}");
    }
    turn.end();
}

#[test]
fn a_comparison_that_must_fail() {
    let Some(turn) = Turn::new() else { return };
    let case = Case { extents: [1, 3, 2, 2, 8, 8], interleaved: true, crop: (0, 0), place: (0, 0), seed: 3 };
    // The same memory, read as planes.
    let wrong = Case { interleaved: false, ..case.clone() };
    let mut rng = StdRng::seed_from_u64(case.seed);
    let values: Vec<u8> = (0..3 * 16 * 16).map(|_| u8::draw(&mut rng)).collect();
    let memory = turn.stream.clone_htod(&case.spread(&values)).unwrap();
    let (mean, std) = statistics(3);
    let run = |case: &Case| {
        let mut out: CudaSlice<f32> = turn.upload(&vec![0.0; values.len()]);
        let mut view = Strided::new(out.as_view_mut(), case.layout().shape);
        let images = case.over(memory.as_view());
        patches(&turn.device, &turn.stream, &images, [8, 8], &mean, &std, &mut view).unwrap();
        turn.download(&out)
    };
    assert_ne!(run(&case), run(&wrong), "channels in the wrong order are seen");
    turn.end();
}

fn check_embed<T: Value>(
    turn: &Turn,
    layout: Layout,
    special: usize,
    position: bool,
    seed: u64,
) -> Result<(), TestCaseError> {
    let [batch, tokens, width] = layout.shape;
    let count = tokens - special;
    let mut x = random::<T>(batch * count * width, seed, 3.0);
    x[0] = f32::NAN;
    x[width - 1] = f32::INFINITY;
    let prefix = (special > 0).then(|| random::<T>(special * width, seed ^ 1, 1.0));
    let position = position.then(|| random::<T>(count * width, seed ^ 2, 1.0));
    let on_host = |values: &Option<Vec<f32>>, rows| values.clone().map(|v| tensor(&[rows, width], v));
    let (host_prefix, host_position) = (on_host(&prefix, special), on_host(&position, count));
    let want = Reference::new()
        .embed(&tensor(&[batch, count, width], x.clone()), host_prefix.as_ref(), host_position.as_ref())
        .unwrap();
    let from = Layout { shape: [batch, count, width], ..layout };
    let x_memory: CudaSlice<T> = turn.upload(&from.spread(&x));
    let upload =
        |values: &Option<Vec<f32>>| -> Option<CudaSlice<T>> { values.as_ref().map(|v| turn.upload(v)) };
    let (prefix, position) = (upload(&prefix), upload(&position));
    let (prefix, position) =
        (prefix.as_ref().map(CudaSlice::as_view), position.as_ref().map(CudaSlice::as_view));
    let got = turn.in_every_order(|| {
        let mut out: CudaSlice<T> = turn.upload(&layout.blank());
        let patches = from.over(x_memory.slice(from.lead..));
        let mut target = layout.over(out.slice_mut(layout.lead..));
        embed(&turn.device, &turn.stream, &patches, prefix.as_ref(), position.as_ref(), &mut target).unwrap();
        bits(&layout.gather(&turn.download(&out)))
    });
    prop_assert_eq!(&got, &bits(&rounded::<T>(want.data())));

    // The patches where they belong, and something else where the special tokens go.
    let mut whole = vec![9.0; batch * tokens * width];
    for (image, x) in x.chunks(count * width).enumerate() {
        whole[(image * tokens + special) * width..][..count * width].copy_from_slice(x);
    }
    let mut memory: CudaSlice<T> = turn.upload(&layout.spread(&whole));
    let mut target = layout.over(memory.slice_mut(layout.lead..));
    embed_in_place(&turn.device, &turn.stream, &mut target, special, prefix.as_ref(), position.as_ref())
        .unwrap();
    prop_assert_eq!(bits(&layout.gather(&turn.download(&memory))), got);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sequences_are_those_of_the_reference(
        batch in prop::sample::select(vec![1_usize, 2, 4, 5, 9]), patches in prop::sample::select(vec![1_usize, 3, 16, 33]),
        special in 0_usize..4, width in prop::sample::select(vec![1_usize, 3, 8, 64, 65, 96, 192, 384]),
        place in prop::sample::select(vec![(0_usize, 0_usize), (0, 0), (8, 8), (1, 0), (0, 1)]),
        position in any::<bool>(), dtype in 0..3, seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let layout = Layout { shape: [batch, special + patches, width], gap: place.0, lead: place.1 };
        match dtype {
            0 => check_embed::<f32>(&turn, layout, special, position, seed)?,
            1 => check_embed::<f16>(&turn, layout, special, position, seed)?,
            _ => check_embed::<bf16>(&turn, layout, special, position, seed)?,
        }
        turn.end();
    }
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let pixels = turn.stream.clone_htod(&[0_u8; 3 * 64]).unwrap();
    let mut out: CudaSlice<f16> = turn.upload(&[0.0; 4096]);
    let mut run = |shape: [usize; 4], patch, statistics: usize, to: [usize; 3]| {
        let images = DeviceImages::planes(pixels.as_view(), shape);
        let (mean, std) = (vec![0.0; statistics], vec![1.0; statistics]);
        let mut view = Strided::new(out.as_view_mut(), to);
        let result = patches(&turn.device, &turn.stream, &images, patch, &mean, &std, &mut view);
        result.unwrap_err().to_string()
    };
    let message = run([1, 3, 8, 8], [3, 4], 3, [1, 4, 48]);
    assert!(message.contains("8x8 images do not divide into 3x4 patches"), "{message}");
    assert!(run([1, 3, 8, 8], [0, 4], 3, [1, 4, 48]).contains("do not divide"));
    let message = run([1, 3, 8, 8], [4, 4], 2, [1, 4, 48]);
    assert!(message.contains("mean and deviation of 2 and 2 channels, the images have 3"), "{message}");
    let message = run([1, 3, 8, 8], [4, 4], 3, [1, 4, 47]);
    assert!(message.contains("out has shape [1, 4, 47], expected [1, 4, 48]"), "{message}");
    let message = run([2, 3, 8, 8], [4, 4], 3, [2, 4, 48]);
    assert!(message.contains("images of shape [2, 3, 8, 8]") && message.contains("192 values"), "{message}");
    let message = run([1, 17, 2, 2], [2, 2], 17, [1, 1, 68]);
    assert!(message.contains("17 channels, the kernels normalise up to 16"), "{message}");
    assert!(run([1, 3, 0, 8], [4, 4], 3, [1, 4, 48]).contains("every axis must hold"));
    let message = run([1, 3, 8, 8], [4, 4], 3, [1, 200, 48]);
    assert!(message.contains("out of shape [1, 200, 48]"), "{message}");

    let x: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let prefix: CudaSlice<f16> = turn.upload(&[0.0; 8]);
    let mut run = |special: usize, prefix: Option<CudaView<'_, f16>>, position: Option<CudaView<'_, f16>>| {
        let patches = Strided::new(x.as_view(), [1, 4, 8]);
        let mut view = Strided::new(out.as_view_mut(), [1, 4 + special, 8]);
        let result =
            embed(&turn.device, &turn.stream, &patches, prefix.as_ref(), position.as_ref(), &mut view);
        result.unwrap_err().to_string()
    };
    assert!(run(1, None, None).contains("no prefix is given"));
    let message = run(2, Some(prefix.as_view()), None);
    assert!(message.contains("prefix has 8 values, expected 16"), "{message}");
    let message = run(1, Some(prefix.as_view()), Some(x.slice(..31)));
    assert!(message.contains("position has 31 values, expected 32"), "{message}");
    let mut view = Strided::new(out.as_view_mut(), [1, 4, 8]);
    let message =
        embed_in_place(&turn.device, &turn.stream, &mut view, 4, None, None).unwrap_err().to_string();
    assert!(message.contains("4 special tokens leave none of 4 for patches"), "{message}");
    let patches = Strided::new(x.as_view(), [1, 8, 8]);
    let message = embed(&turn.device, &turn.stream, &patches, None, None, &mut view).unwrap_err().to_string();
    assert!(message.contains("out has 4 tokens, fewer than the 8 patches"), "{message}");
    turn.end();
}

#[cfg(feature = "emulated")]
mod traffic {
    use foveate_device_tests::traffic::Traffic;

    use super::*;

    /// Pixels in and values out, once.
    fn patch_traffic<P: Source, T: Value>(
        turn: &Turn,
        side: usize,
        size: usize,
        interleaved: bool,
    ) -> Traffic {
        let grid = size / side;
        let case = Case {
            extents: [2, 3, grid, grid, side, side],
            interleaved,
            crop: (0, 0),
            place: (0, 0),
            seed: 0,
        };
        let count: usize = case.shape().iter().product();
        let mut rng = StdRng::seed_from_u64(1);
        let values: Vec<P> = (0..count).map(|_| P::draw(&mut rng)).collect();
        let memory = turn.stream.clone_htod(&values).unwrap();
        let mut out: CudaSlice<T> = turn.upload(&vec![0.0; count]);
        let (mean, std) = statistics(3);
        let traffic = Traffic::of(turn, || {
            let images = case.over(memory.as_view());
            let mut view = Strided::new(out.as_view_mut(), case.layout().shape);
            patches(&turn.device, &turn.stream, &images, [side, side], &mean, &std, &mut view).unwrap();
        });
        let over = traffic.over(count * (size_of::<P>() + size_of::<T>()));
        println!("  {:.1} instructions a value", traffic.instructions() * 32.0 / count as f64);
        assert!(over <= 1.05, "{over}");
        traffic
    }

    #[test]
    fn every_pixel_is_read_once_and_every_value_written_once() {
        let Some(turn) = Turn::new() else { return };
        for interleaved in [false, true] {
            for traffic in [
                patch_traffic::<u8, f16>(&turn, 16, 64, interleaved),
                patch_traffic::<u8, f32>(&turn, 16, 64, interleaved),
                patch_traffic::<f32, f16>(&turn, 16, 64, interleaved),
            ] {
                assert!(!traffic.kernel().contains("pair") && !traffic.kernel().contains("single"));
                assert_eq!(traffic.stores(), 1.0);
            }
            let traffic = patch_traffic::<u8, f16>(&turn, 14, 112, interleaved);
            assert!(traffic.kernel().ends_with("pair"), "{}", traffic.kernel());
            // Rows of 1,176 bytes: three of four start within a sector, which costs each request of 128 bytes a fifth.
            assert!(traffic.stores() > 0.8);
        }
        turn.end();
    }

    #[test]
    fn embedding_reads_positions_once_for_four_images() {
        let Some(turn) = Turn::new() else { return };
        let [batch, count, width, special] = [4, 64, 384, 1];
        let x: CudaSlice<f16> = turn.upload(&random::<f16>(batch * count * width, 1, 1.0));
        let position: CudaSlice<f16> = turn.upload(&random::<f16>(count * width, 2, 1.0));
        let prefix: CudaSlice<f16> = turn.upload(&random::<f16>(special * width, 3, 1.0));
        let mut out: CudaSlice<f16> = turn.upload(&vec![0.0; batch * (special + count) * width]);
        let traffic = Traffic::of(&turn, || {
            let patches = Strided::new(x.as_view(), [batch, count, width]);
            let mut view = Strided::new(out.as_view_mut(), [batch, special + count, width]);
            let (prefix, position) = (prefix.as_view(), position.as_view());
            embed(&turn.device, &turn.stream, &patches, Some(&prefix), Some(&position), &mut view).unwrap();
        });
        let must = 2 * width * (batch * (2 * count + special) + special + count);
        assert!(traffic.over(must) <= 1.01);
        assert_eq!((traffic.loads(), traffic.stores()), (1.0, 1.0));
        turn.end();
    }
}
