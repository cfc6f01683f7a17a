//! kernels/structured.cu against the reference: sums to rounding, masks from equal scores exactly.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::{
    cuda::{
        Strided,
        structured::{HeadSums, head_sums, neuron_scores, update_heads, update_neurons},
    },
    reference::connectivity as reference,
};
use foveate_device_tests::{Layout, Turn, Value, random, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

fn check_neurons<T: Value>(turn: &Turn, neurons: usize, width: usize, gap: usize, seed: u64) {
    let (rows, columns) = ([1, neurons, width], [1, width, neurons]);
    let [fc1, fc2] = [1, 2].map(|n| random::<T>(neurons * width, seed ^ n, 2.0));
    let [of_rows, of_columns] = [rows, columns].map(|shape| Layout { shape, gap, lead: gap });
    let got = turn.in_every_order(|| {
        let (rows, columns) =
            (turn.upload::<T>(&of_rows.spread(&fc1)), turn.upload::<T>(&of_columns.spread(&fc2)));
        let mut scores: CudaSlice<f32> = turn.upload(&vec![0.0; neurons]);
        let (rows, columns) = (of_rows.over(rows.slice(gap..)), of_columns.over(columns.slice(gap..)));
        neuron_scores(&turn.device, &turn.stream, &rows, &columns, &mut scores.as_view_mut()).unwrap();
        turn.download(&scores)
    });
    let want =
        reference::neuron_scores(&tensor(&[neurons, width], fc1), &tensor(&[width, neurons], fc2)).unwrap();
    // 2C terms of one sign, added in f32.
    let limit = f32::EPSILON * (2.0 * width as f32).sqrt() * 4.0;
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= limit * want.max(1.0), "{got} instead of {want}");
    }
}

fn check_heads<T: Value>(turn: &Turn, shape: [usize; 4], gap: usize, seed: u64, rate: f64) {
    let [batch, tokens, heads, dim] = shape;
    let layout = Layout { shape: [batch, tokens, heads * dim], gap, lead: gap };
    let count = shape.iter().product();
    let [output, gradient] = [1, 2].map(|n| random::<T>(count, seed ^ n, 1.0));
    let active: Vec<u8> = (0..heads).map(|head| u8::from((seed >> (head % 64)) & 3 != 0)).collect();
    let (products, sizes, mask) = turn.in_every_order(|| {
        let [o, g] = [&output, &gradient].map(|values| turn.upload::<T>(&layout.spread(values)));
        let [mut products, mut sizes] = [(); 2].map(|()| turn.upload::<f32>(&vec![0.0; batch * heads]));
        let mut mask = turn.stream.clone_htod(&active).unwrap();
        let (device, stream) = (&turn.device, &turn.stream);
        let sums = &mut HeadSums { products: products.as_view_mut(), sizes: sizes.as_view_mut() };
        head_sums(device, stream, &layout.over(o.slice(gap..)), &layout.over(g.slice(gap..)), heads, sums)
            .unwrap();
        let sums = &HeadSums { products: products.as_view(), sizes: sizes.as_view() };
        update_heads(device, stream, sums, &mut mask.as_view_mut(), rate).unwrap();
        (turn.download(&products), turn.download(&sizes), turn.stream.clone_dtoh(&mask).unwrap())
    });
    let mean = |of: &dyn Fn(usize) -> f32, head: usize| {
        (0..batch).fold(0.0, |sum, image| sum + of(image * heads + head)) / batch as f32
    };
    let got = reference::HeadScores {
        importance: (0..heads).map(|head| mean(&|at| products[at].abs(), head)).collect(),
        call: (0..heads).map(|head| mean(&|at| sizes[at], head)).collect(),
    };
    let want = reference::head_scores(&tensor(&shape, output), &tensor(&shape, gradient)).unwrap();
    let limit = f32::EPSILON * 4.0 * ((tokens * dim) as f32).sqrt();
    for head in 0..heads {
        let (a, b) = (got.importance[head], want.importance[head]);
        assert!((a - b).abs() <= limit * b.max(1.0), "importance of {head}: {a} instead of {b}");
        let (a, b) = (got.call[head], want.call[head]);
        assert!((a - b).abs() <= limit * b.max(1.0), "call of {head}: {a} instead of {b}");
    }
    assert_eq!(mask, reference::update_heads(&got, &active, rate).unwrap());
}

fn check_update(turn: &Turn, scores: &[f32], calls: &[f32], active: &[u8], rate: f64) {
    let got = turn.in_every_order(|| {
        let [s, c] = [scores, calls].map(|values| turn.upload::<f32>(values));
        let mut mask = turn.stream.clone_htod(active).unwrap();
        update_neurons(&turn.device, &turn.stream, &s.as_view(), &c.as_view(), &mut mask.as_view_mut(), rate)
            .unwrap();
        turn.stream.clone_dtoh(&mask).unwrap()
    });
    assert_eq!(got, reference::update_neurons(scores, calls, active, rate).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn scores_of_neurons(
        neurons in prop::sample::select(vec![1_usize, 31, 33, 115]),
        width in prop::sample::select(vec![1_usize, 7, 48, 65]),
        gap in 0_usize..2,
        dtype in 0..3,
        seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        match dtype {
            0 => check_neurons::<f32>(&turn, neurons, width, gap, seed),
            1 => check_neurons::<f16>(&turn, neurons, width, gap, seed),
            _ => check_neurons::<bf16>(&turn, neurons, width, gap, seed),
        }
        turn.end();
    }

    #[test]
    fn scores_and_masks_of_heads(
        batch in 1_usize..4,
        tokens in prop::sample::select(vec![1_usize, 17, 50]),
        heads in prop::sample::select(vec![1_usize, 3, 6, 33]),
        dim in prop::sample::select(vec![1_usize, 8, 32]),
        gap in 0_usize..2,
        rate in prop::sample::select(vec![0.0, 0.005, 0.43, 1.0]),
        dtype in 0..3,
        seed in any::<u64>(),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let shape = [batch, tokens, heads, dim];
        match dtype {
            0 => check_heads::<f32>(&turn, shape, gap, seed, rate),
            1 => check_heads::<f16>(&turn, shape, gap, seed, rate),
            _ => check_heads::<bf16>(&turn, shape, gap, seed, rate),
        }
        turn.end();
    }

    /// Few different values, so that they tie, NaN among them.
    #[test]
    fn masks_of_neurons(
        neurons in prop::collection::vec(
            (
                prop::sample::select(vec![0.0_f32, 0.5, 1.0, 2.0, 3.0, f32::NAN, f32::INFINITY, 1e-40]),
                prop::sample::select(vec![0.0_f32, 0.25, 1.0, 7.0, f32::NAN]),
                any::<bool>(),
            ),
            1..1200,
        ),
        rate in prop::sample::select(vec![0.0, 0.005, 0.43, 1.0]),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        let scores: Vec<f32> = neurons.iter().map(|neuron| neuron.0).collect();
        let calls: Vec<f32> = neurons.iter().map(|neuron| neuron.1).collect();
        let active: Vec<u8> = neurons.iter().map(|neuron| u8::from(neuron.2)).collect();
        check_update(&turn, &scores, &calls, &active, rate);
        turn.end();
    }
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let (device, stream) = (&turn.device, &turn.stream);
    let x: CudaSlice<f32> = turn.upload(&[0.5; 60]);
    let mut out: CudaSlice<f32> = turn.upload(&[0.0; 6]);
    let mut mask = stream.clone_htod(&[1_u8; 4]).unwrap();
    let view = |shape: [usize; 3]| Strided::new(x.slice(..shape.iter().product::<usize>()), shape);
    let error = neuron_scores(device, stream, &view([1, 6, 10]), &view([1, 10, 5]), &mut out.as_view_mut());
    assert!(error.unwrap_err().to_string().contains("fc2 has shape [1, 10, 5], expected [1, 10, 6]"));
    let mut sizes: CudaSlice<f32> = turn.upload(&[0.0; 6]);
    let sums = &mut HeadSums { products: out.as_view_mut(), sizes: sizes.as_view_mut() };
    let error = head_sums(device, stream, &view([2, 3, 10]), &view([2, 3, 10]), 3, sums);
    assert!(error.unwrap_err().to_string().contains("3 heads do not divide the width 10"));
    let sums = &HeadSums { products: x.slice(..6), sizes: x.slice(..6) };
    let error = update_heads(device, stream, sums, &mut mask.as_view_mut(), 0.5);
    assert!(error.unwrap_err().to_string().contains("6 products of 4 heads"));
    let error = update_neurons(device, stream, &x.slice(..4), &x.slice(..4), &mut mask.as_view_mut(), -0.5);
    assert!(error.unwrap_err().to_string().contains("rate -0.5"));
    turn.end();
}
