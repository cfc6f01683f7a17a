//! Whole forward passes on the processor: models, batches and threads, dense and with each method, the plain reference beside
//! them.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use foveate::{
    Images, Pixels, Reduction,
    backend::Backend,
    cpu::Cpu,
    model::{Vit, arch},
    reference::Reference,
};

const SPECS: [&str; 4] = ["none", "tome:r=13", "mctf:r=16", "evit:keep=0.5"];

fn images(batch: usize) -> Images {
    let pixels = (0..batch * 3 * 224 * 224).map(|i| (i * 31 % 251) as u8).collect();
    Images::new([batch, 3, 224, 224], Pixels::U8(pixels)).expect("matching shapes")
}

fn on<B: Backend>(c: &mut Criterion, name: &str, model: &str, threads: usize, backend: B) {
    let config = arch::config(model).expect("a known name");
    let vit = Vit::new(backend, config.clone(), arch::random_params(&config, 1)).expect("matching shapes");
    for batch in [1, 8] {
        let mut group = c.benchmark_group(format!("{name}/{model}/batch{batch}/{threads}threads"));
        group.sample_size(10).throughput(Throughput::Elements(batch as u64));
        let images = images(batch);
        for spec in SPECS {
            let reduction: Reduction = spec.parse().expect("a valid specification");
            let mut output = Some(vit.forward(&images, &reduction).expect("a suitable method"));
            group.bench_function(BenchmarkId::from_parameter(spec), |b| {
                b.iter(|| {
                    let earlier = output.take().expect("the pass before gave one");
                    output =
                        Some(vit.forward_again(black_box(&images), &reduction, earlier).expect("as before"));
                });
            });
        }
        group.finish();
    }
}

fn forward(c: &mut Criterion) {
    for model in ["deit_tiny", "deit_small"] {
        for threads in [1, 2] {
            on(c, "cpu", model, threads, Cpu::with_threads(threads).expect("threads"));
        }
        on(c, "reference", model, 1, Reference::with_threads(1).expect("threads"));
    }
}

criterion_group!(benches, forward);
criterion_main!(benches);
