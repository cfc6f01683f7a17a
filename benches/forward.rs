//! Whole forward passes: dense, then each method, measured in turn. On the CPU by criterion; with the feature `cuda` and a
//! GPU also as engines, one captured graph a pass, by CUDA events.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use foveate::{
    Images, Pixels, Reduction,
    cpu::Cpu,
    model::{Vit, arch},
};

#[cfg(feature = "cuda")]
#[path = "gpu/forward.rs"]
mod engines;
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "the launches of single operations have benches of their own")]
mod gpu;

/// The methods, at the settings their papers give results for.
const SPECS: [&str; 7] =
    ["none", "tome:r=8", "tome:r=13", "mctf:r=16", "mctf:r=0.35", "evit:keep=0.7", "evit:keep=0.5"];

fn images(batch: usize) -> Images {
    let pixels = (0..batch * 3 * 224 * 224).map(|i| (i * 31 % 251) as u8).collect();
    Images::new([batch, 3, 224, 224], Pixels::U8(pixels)).expect("matching shapes")
}

fn reduction(spec: &str) -> Reduction {
    spec.parse().expect("a valid specification")
}

fn on_the_processor(c: &mut Criterion) {
    let config = arch::config("deit_tiny").expect("a known name");
    let vit = Vit::new(Cpu::new(), config.clone(), arch::random_params(&config, 1)).expect("matching shapes");
    for batch in [1, 8] {
        let mut group = c.benchmark_group(format!("forward/deit_tiny/batch{batch}/f32"));
        group.sample_size(10).throughput(Throughput::Elements(batch as u64));
        let images = images(batch);
        for spec in ["none", "tome:r=13", "mctf:r=16", "evit:keep=0.5"] {
            let reduction = reduction(spec);
            group.bench_with_input(BenchmarkId::from_parameter(spec), &reduction, |b, reduction| {
                b.iter(|| vit.forward(black_box(&images), reduction).expect("a suitable method"));
            });
        }
        group.finish();
    }
}

fn on_a_gpu(_: &mut Criterion) {
    #[cfg(feature = "cuda")]
    match gpu::place() {
        Ok(place) => engines::time(&place, &SPECS.map(|spec| (spec, reduction(spec))), images),
        Err(reason) => println!("forward: no GPU was timed: {reason}"),
    }
    #[cfg(not(feature = "cuda"))]
    println!("forward: {} methods as engines take the feature cuda and a GPU", SPECS.len());
}

criterion_group!(benches, on_a_gpu, on_the_processor);
criterion_main!(benches);
