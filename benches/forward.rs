//! Whole forward passes on the CPU: dense, then each method, in one group so that they are measured in turn.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use foveate::{
    Images, Pixels, Reduction,
    cpu::Cpu,
    model::{Vit, arch},
};

fn forward(c: &mut Criterion) {
    let config = arch::config("deit_tiny").expect("a known name");
    let vit = Vit::new(Cpu::new(), config.clone(), arch::random_params(&config, 1)).expect("matching shapes");
    for batch in [1, 8] {
        let mut group = c.benchmark_group(format!("forward/deit_tiny/batch{batch}/f32"));
        group.sample_size(10).throughput(Throughput::Elements(batch as u64));
        let pixels = (0..batch * 3 * 224 * 224).map(|i| (i * 31 % 251) as u8).collect();
        let images = Images::new([batch, 3, 224, 224], Pixels::U8(pixels)).expect("matching shapes");
        for spec in ["none", "tome:r=13", "mctf:r=16", "evit:keep=0.5"] {
            let reduction: Reduction = spec.parse().expect("a valid specification");
            group.bench_with_input(BenchmarkId::from_parameter(spec), &reduction, |b, reduction| {
                b.iter(|| vit.forward(black_box(&images), reduction).expect("a suitable method"));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, forward);
criterion_main!(benches);
