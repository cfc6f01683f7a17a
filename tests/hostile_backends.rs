//! Shapes of nothing, shapes that do not fit, numbers that are none: every backend of the processor answers them as the reference
//! does, with a result or an error, and none panics.

mod backends;
mod hostile_parts;

use backends::{Hosted, backends};
use foveate::{
    Tensor,
    backend::{Backend, Convolution, Epilogue, GridBackend, Linear},
    cpu::{Cpu, Products},
    reference::Reference,
};
use hostile_parts::{Draw, OPERATIONS, complaint, outcome};

#[test]
fn every_backend_answers_alike_and_none_panics() {
    let mut kinds = [[0; 2]; OPERATIONS.len()];
    let mut failures = Vec::new();
    for seed in 0..600 {
        for (at, (name, operation)) in OPERATIONS.iter().enumerate() {
            let run = operation(&mut Draw::new(seed * 31 + at as u64));
            let outcomes: Vec<_> = backends().map(|backend| outcome(&run, backend)).collect();
            let [want, others @ ..] = &outcomes[..] else { panic!("no backend") };
            kinds[at][usize::from(!matches!(want, Ok(Ok(_))))] += 1;
            for (backend, got) in others.iter().enumerate() {
                let complaint = complaint(name, want, got);
                failures
                    .extend(complaint.map(|what| format!("{name}, seed {seed}, backend {backend}: {what}")));
            }
        }
    }
    for ((name, _), [taken, refused]) in OPERATIONS.iter().zip(kinds) {
        println!("{name}: {taken} taken, {refused} refused");
        assert!(taken >= 50 && refused >= 20, "{name}: {taken} and {refused} are too few to tell");
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Rounded factors give other values, and other plans where they decide. What is refused is the same, and nothing panics.
#[test]
fn products_of_bf16_refuse_what_the_reference_refuses() {
    if let Err(missing) = Products::Bf16.check() {
        return println!("SKIPPED: {missing}");
    }
    let bf16 = Hosted(Cpu::with_threads(2).unwrap().with_products(Products::Bf16).unwrap());
    let reference = Reference::with_threads(1).unwrap();
    for seed in 0..300 {
        for (at, (name, operation)) in OPERATIONS.iter().enumerate() {
            let run = operation(&mut Draw::new(seed * 31 + at as u64));
            let refusal = |backend| match outcome(&run, backend) {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(panic) => panic!("{name}, seed {seed}: {panic:?}"),
            };
            assert_eq!(refusal(&bf16).is_some(), refusal(&reference).is_some(), "{name}, seed {seed}");
        }
    }
}

/// What products with `square` in both places give: by itself, one way, the other way, the first way again.
fn products<B: Backend + GridBackend>(b: &B, square: &Tensor, map: &Tensor) -> Vec<Tensor> {
    let (weight, x) = (b.upload(square.clone()).unwrap(), b.upload(map.clone()).unwrap());
    let bias = b.upload(Tensor::zeros(&[9])).unwrap();
    let layer = Linear { weight: weight.clone(), bias: None };
    let convolution = Convolution { weight: weight.clone(), bias, stride: 1, activation: None };
    let results = [
        b.linear(&weight, layer.all(), Epilogue::None).unwrap(),
        b.convolution(&x, [3, 3], &convolution).unwrap(),
        b.linear(&weight, layer.rows(2..5), Epilogue::None).unwrap(),
        b.convolution(&x, [3, 3], &convolution).unwrap(),
        weight,
    ];
    results.iter().map(|tensor| b.download(tensor).unwrap()).collect()
}

/// A matrix is packed for the first product that it takes part in. It may take part in others.
#[test]
fn a_matrix_may_be_the_weight_of_anything() {
    let values: Vec<f32> = (0..81).map(|at| (at as f32 * 0.7).sin()).collect();
    let square = Tensor::new(&[9, 9], values.clone()).unwrap();
    let map = Tensor::new(&[1, 9, 1], values[..9].to_vec()).unwrap();
    let want = products(&Reference::new(), &square, &map);
    for (got, want) in products(&Cpu::new(), &square, &map).iter().zip(&want) {
        assert_eq!(got.shape(), want.shape());
        for (got, want) in got.data().iter().zip(want.data()) {
            assert!((got - want).abs() <= 1e-5, "{got} instead of {want}");
        }
    }
}
