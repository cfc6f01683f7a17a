//! Bipartite matching, ToMe on keys and MCTF on the residual stream: on a GPU with the feature `cuda`, and on the CPU.

#[cfg(feature = "cuda")]
mod gpu;

use std::hint::black_box;

use criterion::{Criterion, criterion_group};
use foveate::{
    Tensor,
    backend::{Attraction, Backend, Matching, Metric, Weighting},
    reference::Reference,
};

fn tensor(shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    let data =
        (0..n).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 11) as u8).map(|v| f32::from(v) / 255.0);
    Tensor::new(shape, data.collect()).expect("matching shapes")
}

fn matching(c: &mut Criterion) {
    let reference = Reference::new();
    for (batch, tokens) in [(1, 197), (8, 197), (1, 577)] {
        let mut group = c.benchmark_group(format!("matching/{batch}x{tokens}/f32"));
        let (keys, stream) = (tensor(&[batch, tokens, 64]), tensor(&[batch, tokens, 384]));
        let received = tensor(&[batch, 6, tokens]);
        let tome = Matching {
            metric: Metric::Rows(&keys),
            attraction: Attraction::Cosine,
            weighting: Weighting::Uniform,
            special: 1,
            merges: 13,
            both_ways: false,
        };
        let mctf = Matching {
            metric: Metric::Rows(&stream),
            attraction: Attraction::MultiCriteria {
                tau_similarity: 1.0,
                informativeness: (&received, 20.0),
                size: (None, 40.0),
            },
            weighting: Weighting::SizeAndReceived(None, &received),
            special: 1,
            merges: 16,
            both_ways: true,
        };
        group.bench_function("tome", |b| {
            b.iter(|| reference.matching(black_box(&tome)).expect("matching shapes"));
        });
        group.bench_function("mctf", |b| {
            b.iter(|| reference.matching(black_box(&mctf)).expect("matching shapes"));
        });
        group.finish();
    }
}

criterion_group!(benches, matching);

fn main() {
    #[cfg(feature = "cuda")]
    gpu::run("matching");
    benches();
    Criterion::default().configure_from_args().final_summary();
}
