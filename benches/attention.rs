//! Attention with and without scores: on a GPU with the feature `cuda`, and on the CPU.

#[cfg(feature = "cuda")]
mod gpu;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group};
use foveate::{
    Tensor,
    backend::{Backend, Heads, ScoreRequest},
    reference::Reference,
};

fn attention(c: &mut Criterion) {
    let reference = Reference::new();
    let mut group = c.benchmark_group("attention/h6d64/f32");
    for tokens in [50, 99, 197, 257, 577, 1370] {
        let n = tokens * 3 * 384;
        let data =
            (0..n).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 11) as u8).map(|v| f32::from(v) / 255.0);
        let packed = Tensor::new(&[1, tokens, 3 * 384], data.collect()).expect("matching shapes");
        let heads = Heads { packed: &packed, heads: 6, head_dim: 64, scale: 0.125, sizes: None };
        for (name, class, received) in
            [("plain", false, false), ("class", true, false), ("received", false, true)]
        {
            let request = ScoreRequest { class, received };
            group.bench_with_input(BenchmarkId::new(name, tokens), &request, |b, &request| {
                b.iter(|| reference.attention(black_box(&heads), request).expect("matching shapes"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention);

fn main() {
    #[cfg(feature = "cuda")]
    gpu::run("attention");
    benches();
    Criterion::default().configure_from_args().final_summary();
}
