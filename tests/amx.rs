//! Products of bf16 through AMX: against their definition in double precision, and whole models against `f32`.

use foveate::{
    Images, Pixels, Reduction, Tensor, TokenPlan,
    backend::{Backend, Epilogue, Heads, Linear, Mlp, Norm, Pooling, ScoreRequest, Window},
    cpu::{Cpu, Products},
    model::{Activation, Vit, VitConfig, arch},
    reference::Reference,
};
use half::bf16;
use proptest::prelude::*;

/// A backend of bf16 products; `None`, and a line that says why, where there can be none.
fn cpu(threads: usize) -> Option<Cpu> {
    match Products::Bf16.check() {
        Ok(()) => Some(Cpu::with_threads(threads).unwrap().with_products(Products::Bf16).unwrap()),
        Err(missing) => {
            println!("SKIPPED: {missing}");
            None
        }
    }
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let n = shape.iter().product();
    Tensor::new(shape, (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()).unwrap()
}

/// A factor as a tile takes it.
fn rounded(x: f32) -> f64 {
    if x.is_subnormal() { 0.0 } else { bf16::from_f32(x).to_f64() }
}

/// The sum for one value, and that of the terms' magnitudes.
fn definition(x: &Tensor, layer: &Linear<Tensor>, row: usize, output: usize) -> (f64, f64) {
    let k = x.width();
    let bias = layer.bias.as_ref().map_or(0.0, |bias| f64::from(bias.data()[output]));
    (0..k).fold((bias, bias.abs()), |(sum, magnitudes), i| {
        let term = rounded(x.data()[row * k + i]) * rounded(layer.weight.data()[output * k + i]);
        (sum + term, magnitudes + term.abs())
    })
}

/// What `f32` sums of `depth` products in any order may be off, for each unit of the terms' magnitudes.
fn limit(depth: usize) -> f64 {
    (depth + 2) as f64 * f64::from(f32::EPSILON) / 2.0
}

fn on(cpu: &Cpu, x: &Tensor, layer: &Linear<Tensor>, first: usize, epilogue: Epilogue<Tensor>) -> Tensor {
    let up = |tensor: &Tensor| cpu.upload(tensor.clone()).unwrap();
    let layer = Linear { weight: up(&layer.weight), bias: layer.bias.as_ref().map(up) };
    let outputs = layer.weight.shape()[0];
    let epilogue = match epilogue {
        Epilogue::None => Epilogue::None,
        Epilogue::Activation(activation) => Epilogue::Activation(activation),
        Epilogue::AddTo(residual) => Epilogue::AddTo(up(&residual)),
    };
    cpu.download(&cpu.linear(&up(x), layer.rows(first..outputs), epilogue).unwrap()).unwrap()
}

/// The activations in double precision.
fn activated(activation: Activation, x: f64) -> f64 {
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        if x.abs() > 4.5 { x.signum() } else { sum * 2.0 / std::f64::consts::PI.sqrt() }
    };
    match activation {
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Relu => x.max(0.0),
        other => panic!("{other:?} is not tried"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn products_match_the_definition(
        rows in 1_usize..100, inputs in prop_oneof![1_usize..70, 300_usize..900], outputs in 1_usize..140,
        bias in any::<bool>(), epilogue in 0_usize..5, part in 0.0..1.0_f64, threads in 1_usize..4, seed in any::<u64>(),
    ) {
        let Some(cpu) = cpu(threads) else { return Ok(()) };
        let layer = Linear {
            weight: random(&[outputs, inputs], seed),
            bias: bias.then(|| random(&[outputs], seed ^ 1)),
        };
        let x = random(&[1, rows, inputs], seed ^ 2);
        let first = (part * outputs as f64) as usize;
        let added = random(&[1, rows, outputs - first], seed ^ 3);
        let activation = [Activation::Gelu, Activation::QuickGelu, Activation::Relu].get(epilogue);
        let end = match (activation, epilogue) {
            (Some(&activation), _) => Epilogue::Activation(activation),
            (None, 3) => Epilogue::AddTo(added.clone()),
            _ => Epilogue::None,
        };
        let got = on(&cpu, &x, &layer, first, end);
        prop_assert_eq!(got.shape(), &[1, rows, outputs - first][..]);
        for (at, &got) in got.data().iter().enumerate() {
            let (row, output) = (at / (outputs - first), first + at % (outputs - first));
            let (mut want, mut magnitudes) = definition(&x, &layer, row, output);
            if epilogue == 3 {
                want += f64::from(added.data()[at]);
                magnitudes += f64::from(added.data()[at].abs());
            }
            let mut limit = limit(inputs) * magnitudes;
            if let Some(&activation) = activation {
                want = activated(activation, want);
                // The steepest of them rises by 1.13; four units in the last place are the function's own.
                limit = 1.13 * limit + 4.0 * f64::from(f32::EPSILON) * magnitudes.max(1.0);
            }
            prop_assert!((f64::from(got) - want).abs() <= limit, "[{}, {}]: {} instead of {}", row, output, got, want);
        }
    }

    /// Whole numbers that bf16 holds, with sums that `f32` holds: nothing is rounded, and everything must be in its place.
    #[test]
    fn whole_numbers_come_out_exactly(
        rows in 1_usize..300, inputs in 1_usize..1000, outputs in 1_usize..100, seed in any::<u64>(),
    ) {
        let Some(cpu) = cpu(2) else { return Ok(()) };
        let whole = |shape: &[usize], seed| {
            let values = random(shape, seed).data().iter().map(|x| (x * 100.0).round()).collect();
            Tensor::new(shape, values).unwrap()
        };
        let layer = Linear { weight: whole(&[outputs, inputs], seed), bias: Some(whole(&[outputs], seed ^ 1)) };
        let x = whole(&[1, rows, inputs], seed ^ 2);
        let got = on(&cpu, &x, &layer, 0, Epilogue::None);
        for (at, &got) in got.data().iter().enumerate() {
            prop_assert_eq!(f64::from(got), definition(&x, &layer, at / outputs, at % outputs).0);
        }
    }
}

#[test]
fn rows_have_the_same_bits_alone_and_among_others_with_any_threads() {
    let Some(one) = cpu(1) else { return };
    for (inputs, outputs) in [(40, 70), (384, 33), (1536, 384)] {
        let layer = Linear { weight: random(&[outputs, inputs], 1), bias: Some(random(&[outputs], 2)) };
        let x = random(&[1, 500, inputs], 3);
        let want = on(&one, &x, &layer, 0, Epilogue::Activation(Activation::Gelu));
        for threads in [2, 5] {
            let got = on(&cpu(threads).unwrap(), &x, &layer, 0, Epilogue::Activation(Activation::Gelu));
            assert!(got == want, "{inputs} to {outputs}, {threads} threads");
        }
        for row in [0, 15, 16, 255, 499] {
            let alone = Tensor::new(&[1, 1, inputs], x.data()[row * inputs..][..inputs].to_vec()).unwrap();
            let got = on(&one, &alone, &layer, 0, Epilogue::Activation(Activation::Gelu));
            assert_eq!(
                got.data(),
                &want.data()[row * outputs..][..outputs],
                "row {row} of {inputs} to {outputs}"
            );
        }
    }
}

/// What lies between a network's layers is rounded when it is made instead of when it is read: the same bits.
#[test]
fn a_network_is_its_operations() {
    for (rows, width, hidden) in [(1, 5, 32), (40, 64, 96), (197, 192, 768), (600, 33, 160), (1100, 384, 64)]
    {
        for (threads, known) in [(1, false), (2, true), (3, false), (3, true)] {
            let Some(cpu) = cpu(threads) else { return };
            let up = |shape: &[usize], seed| cpu.upload_f32(random(shape, seed)).unwrap();
            let norm = Norm { weight: up(&[width], 1), bias: Some(up(&[width], 2)), eps: 1e-5 };
            let layer = |outputs, inputs, seed| Linear {
                weight: up(&[outputs, inputs], seed),
                bias: Some(up(&[outputs], seed + 1)),
            };
            let (fc1, fc2) = (layer(hidden, width, 3), layer(width, hidden, 5));
            let x = || up(&[1, rows, width], 7);
            let normed = || known.then(|| up(&[1, rows, width], 8));
            for activation in [Activation::Gelu, Activation::Silu] {
                let mlp = Mlp { norm: &norm, fc1: &fc1, activation, inner_norm: None, fc2: &fc2 };
                let got = cpu.mlp(x(), normed(), &mlp).unwrap().to_vec();
                let want = mlp.composed(&cpu, x(), normed()).unwrap().to_vec();
                assert!(got == want, "{rows} rows, {width} to {hidden}, {threads} threads, {activation:?}");
            }
            let got = cpu.norm_linear(&x(), &norm, fc1.rows(17..hidden)).unwrap().to_vec();
            let normed = cpu.layer_norm(&x(), &norm).unwrap();
            let want = cpu.linear(&normed, fc1.rows(17..hidden), Epilogue::None).unwrap().to_vec();
            assert!(got == want, "norm and layer: {rows} rows, {width} to {hidden}, {threads} threads");
        }
    }
}

#[test]
fn numbers_at_the_ends_of_the_range() {
    let Some(cpu) = cpu(1) else { return };
    let (inputs, outputs) = (35, 40);
    let mut x = vec![0.0_f32; 8 * inputs];
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    // A row each; weights are 1 but for those of output 1, which are tiny.
    for (row, values) in [
        vec![nan],
        vec![inf, 1.0],
        vec![inf, -inf],
        // Denormal factors are 0, and so are denormal sums.
        vec![1e-40; 35],
        vec![1e30, 1.0],
        vec![1e38; 35],
        // Half way between two bf16 numbers, to the even one: 1 and 1 + 2^-7.
        vec![1.0 + f32::powi(2.0, -8)],
        vec![1.0 + 3.0 * f32::powi(2.0, -8)],
    ]
    .into_iter()
    .enumerate()
    {
        x[row * inputs..][..values.len()].copy_from_slice(&values);
    }
    let x = Tensor::new(&[1, 8, inputs], x).unwrap();
    let mut weight = vec![1.0; outputs * inputs];
    weight[inputs..2 * inputs].fill(1e-38 / 2.0);
    let layer = Linear { weight: Tensor::new(&[outputs, inputs], weight).unwrap(), bias: None };
    let got = on(&cpu, &x, &layer, 0, Epilogue::None);
    let value = |row: usize, output: usize| got.data()[row * outputs + output];
    for output in [0, 2, 31, 32, 39] {
        assert!(value(0, output).is_nan() && value(2, output).is_nan());
        assert_eq!(value(1, output), inf);
        assert_eq!((value(3, output), value(5, output)), (0.0, inf));
        assert_eq!((value(6, output), value(7, output)), (1.0, 1.0 + f32::powi(2.0, -6)));
    }
    // The weights of output 1 are denormal: 0.
    assert_eq!((value(4, 1), value(5, 1), value(6, 1)), (0.0, 0.0, 0.0));
    assert!(value(0, 1).is_nan() && value(1, 1).is_nan(), "NaN and infinity times 0");
    // A product below the smallest normal number, of normal factors.
    let small = Tensor::new(&[1, 1, 1], vec![1e-20]).unwrap();
    let layer = Linear { weight: Tensor::new(&[1, 1], vec![1e-20]).unwrap(), bias: None };
    assert_eq!(on(&cpu, &small, &layer, 0, Epilogue::None).data(), [0.0]);
}

#[test]
fn layers_without_rows_or_inputs() {
    let Some(cpu) = cpu(2) else { return };
    let empty = |shape: &[usize]| Tensor::new(shape, Vec::new()).unwrap();
    let layer = Linear { weight: empty(&[40, 0]), bias: Some(random(&[40], 1)) };
    let got = on(&cpu, &empty(&[1, 3, 0]), &layer, 0, Epilogue::None);
    assert_eq!(got.data(), layer.bias.as_ref().unwrap().data().repeat(3));
    let layer = Linear { weight: random(&[40, 50], 1), bias: None };
    assert_eq!(on(&cpu, &empty(&[1, 0, 50]), &layer, 0, Epilogue::None).shape(), [1, 0, 40]);
}

#[test]
fn convolutions_match_the_definition() {
    let Some(cpu) = cpu(2) else { return };
    let (grid, window) = ([13, 9], Window { kernel: 3, stride: 2, padding: 1 });
    let (channels, outputs, batch) = (7, 37, 3);
    let x = random(&[batch, 13 * 9, channels], 1);
    let layer = Linear { weight: random(&[outputs, 9 * channels], 2), bias: Some(random(&[outputs], 3)) };
    let up = |tensor: &Tensor| cpu.upload(tensor.clone()).unwrap();
    let unfolded = cpu.download(&cpu.unfold(&up(&x), grid, window).unwrap()).unwrap();
    let uploaded = Linear { weight: up(&layer.weight), bias: layer.bias.as_ref().map(up) };
    let got = cpu.convolve(&up(&x), grid, window, &uploaded, None).unwrap();
    let got = cpu.download(&got).unwrap();
    assert_eq!(got.shape(), [batch, 7 * 5, outputs]);
    for (at, &got) in got.data().iter().enumerate() {
        let (want, magnitudes) = definition(&unfolded, &layer, at / outputs, at % outputs);
        assert!((f64::from(got) - want).abs() <= limit(9 * channels) * magnitudes, "{at}: {got}, {want}");
    }
}

/// A weight takes its rounded form at its first product, and reads back so.
#[test]
fn weights_read_back_as_they_were_rounded() {
    let Some(cpu) = cpu(1) else { return };
    let weight = random(&[70, 45], 1);
    let uploaded = Linear { weight: cpu.upload(weight.clone()).unwrap(), bias: None };
    let x = cpu.upload(random(&[1, 3, 45], 2)).unwrap();
    cpu.linear(&x, uploaded.all(), Epilogue::None).unwrap();
    let back = cpu.download(&uploaded.weight).unwrap();
    let want: Vec<f32> = weight.data().iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    assert_eq!(back.data(), want);
    // A backend of f32 products takes the same tensor.
    let plain = Cpu::with_threads(1).unwrap();
    let got = plain.download(&plain.linear(&x, uploaded.all(), Epilogue::None).unwrap()).unwrap();
    let x = x.to_vec();
    let sum: f64 = (0..45).map(|i| f64::from(x[i]) * f64::from(want[i])).sum();
    assert!((f64::from(got.data()[0]) - sum).abs() < 1e-5);
}

#[test]
fn clones_keep_their_products() {
    let Some(cpu) = cpu(2) else { return };
    let plain = cpu.clone().with_products(Products::F32).unwrap();
    assert_eq!((cpu.products(), plain.products()), (Products::Bf16, Products::F32));
    assert_eq!((plain.threads(), plain.instructions()), (2, cpu.instructions()));
}

#[test]
fn whole_models_are_near_those_of_f32() {
    let Some(bf16) = cpu(2) else { return };
    let config = VitConfig { image: [112, 112], depth: 4, ..arch::config("deit_tiny").unwrap() };
    let shape = [3, config.channels, config.image[0], config.image[1]];
    let pixels = (0..shape.iter().product::<usize>()).map(|i| (i * i % 251 + i * 31 % 173) as u8).collect();
    let images = Images::new(shape, Pixels::U8(pixels)).unwrap();
    for spec in ["none", "tome:r=3", "mctf:r=3", "mctf:r=3,ahead=0", "evit:keep=0.6"] {
        let reduction: Reduction = spec.parse().unwrap();
        let run = |cpu: Cpu| {
            let vit = Vit::new(cpu, config.clone(), arch::random_params(&config, 7)).unwrap();
            let output = vit.forward(&images, &reduction).unwrap();
            let map = output.source_map(vit.backend()).unwrap();
            let groups: Vec<_> = (0..3).map(|image| map.groups(image).to_vec()).collect();
            (vit.backend().download(output.logits.as_ref().unwrap()).unwrap(), groups)
        };
        let (got, groups) = run(bf16.clone());
        let (want, wanted) = run(Cpu::with_threads(2).unwrap());
        let differing = groups.iter().zip(&wanted).filter(|(a, b)| a != b).count();
        let scale = want.data().iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let error = got.data().iter().zip(want.data()).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        println!("{spec}: {:.4} of the largest logit, {differing} other decisions", error / scale);
        // Where tokens that are nearly alike are ordered otherwise, others merge, and more follows than from rounding.
        let limit = if differing == 0 { 1e-2 } else { 5e-2 };
        assert!(error <= limit * scale, "{spec}: {error} of {scale}");
    }
}

fn near(what: &str, got: &[f32], want: &[f32], limit: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= limit, "{what}, value {at}: {got} instead of {want}");
    }
}

/// Class scores are computed of queries and keys as they come.
#[test]
fn class_scores_are_not_rounded() {
    let Some(cpu) = cpu(1) else { return };
    let (plain, packed) = (Cpu::with_threads(1).unwrap(), random(&[2, 50, 3 * 128], 5));
    let packed = cpu.upload_f32(packed).unwrap();
    let view = Heads { packed: &packed, heads: 2, head_dim: 64, scale: 1.0, sizes: None };
    let request = ScoreRequest { class: true, received: false };
    let class = |cpu: &Cpu| cpu.attention(&view, request).unwrap().1.class.unwrap().to_vec();
    // Sums of 64 products below 1, and an exponential of them.
    near("class scores", &class(&cpu), &class(&plain), 1e-6);
}

/// Attention of factors that bf16 holds: scores are those of `f32`, and of the contexts only the map was rounded.
#[test]
fn attention_is_near_the_reference() {
    let Some(cpu) = cpu(2) else { return };
    let reference = Reference::with_threads(1).unwrap();
    for (tokens, heads, head_dim, batch) in
        [(1, 1, 1, 1), (5, 2, 16, 2), (16, 1, 40, 1), (33, 3, 64, 2), (197, 2, 64, 1), (150, 1, 100, 1)]
    {
        for sized in [false, true] {
            let exact = |x: &f32| bf16::from_f32(*x * 3.0).to_f32();
            let shape = [batch, tokens, 3 * heads * head_dim];
            let packed = random(&shape, 1).data().iter().map(exact).collect();
            let packed = Tensor::new(&shape, packed).unwrap();
            let sizes = (0..batch * tokens).map(|i| 1.0 + (i % 3) as f32).collect();
            let sizes = sized.then(|| Tensor::new(&[batch, tokens], sizes).unwrap());
            let scale = 1.0 / (head_dim as f32).sqrt();
            let request = ScoreRequest { class: true, received: true };
            let view = Heads { packed: &packed, heads, head_dim, scale, sizes: sizes.as_ref() };
            let (want, scores) = reference.attention(&view, request).unwrap();
            let up = |tensor: &Tensor| cpu.upload_f32(tensor.clone()).unwrap();
            let (on_cpu, sizes_on_cpu) = (up(&packed), sizes.as_ref().map(up));
            let view = Heads { packed: &on_cpu, heads, head_dim, scale, sizes: sizes_on_cpu.as_ref() };
            let (got, got_scores) = cpu.attention(&view, request).unwrap();
            let what = format!("{batch} of {tokens} tokens, {heads} heads of {head_dim}, sizes: {sized}");
            near(&what, &got.to_vec(), want.data(), f32::powi(2.0, -8) * 3.0);
            for (got, want) in [(got_scores.class, scores.class), (got_scores.received, scores.received)] {
                near(&what, &got.unwrap().to_vec(), want.unwrap().data(), 2e-6);
            }
            // The class token's context comes of scores in another order of sums where they are asked for.
            let (again, none) = cpu.attention(&view, ScoreRequest::default()).unwrap();
            assert!(none.class.is_none() && none.received.is_none());
            near(&what, &again.to_vec(), want.data(), f32::powi(2.0, -8) * 3.0);
            // Queries and keys only, and values of groups.
            let width = heads * head_dim;
            let part = |row: &[f32]| row[..2 * width].to_vec();
            let qk = packed.data().chunks(3 * width).flat_map(part).collect();
            let qk = Tensor::new(&[batch, tokens, 2 * width], qk).unwrap();
            let qk_on_cpu = up(&qk);
            let view = Heads { packed: &qk_on_cpu, ..view };
            let on_reference = Heads { packed: &qk, heads, head_dim, scale, sizes: sizes.as_ref() };
            let want = reference.attention_scores(&on_reference, request).unwrap();
            let got = cpu.attention_scores(&view, request).unwrap();
            for (got, want) in [(got.class, want.class), (got.received, want.received)] {
                near(&what, &got.unwrap().to_vec(), want.unwrap().data(), 2e-6);
            }
            if tokens > 1 {
                // Pairs, the last token dropped where there is no partner for it.
                let pairs = (0..tokens / 2).map(|pair| vec![(2 * pair, 0.5), (2 * pair + 1, 0.5)]).collect();
                let plan = TokenPlan::from_groups(tokens, &vec![pairs; batch]).unwrap();
                let m = tokens / 2;
                let values = random(&[batch, m, width], 9).data().iter().map(exact).collect();
                let values = Tensor::new(&[batch, m, width], values).unwrap();
                let want =
                    reference.attention_reduced(&on_reference, &values, &plan, Pooling::Weighted).unwrap();
                let plan = cpu.upload_plan(plan).unwrap();
                let got = cpu.attention_reduced(&view, &up(&values), &plan, Pooling::Weighted).unwrap();
                let (_, map) = cpu.attention_scores_and_map(&view, ScoreRequest::default()).unwrap();
                let (map, values) = (map.expect("small enough to be kept"), up(&values));
                let kept =
                    cpu.attention_reduced_of(Some(&map), &view, &values, &plan, Pooling::Weighted).unwrap();
                for got in [got, kept] {
                    near(&what, &got.to_vec(), want.data(), f32::powi(2.0, -8) * 3.0);
                }
            }
        }
    }
}
