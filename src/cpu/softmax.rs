//! Softmax of some rows of a map, between the two products of attention.

use super::{
    gemm::cut,
    pack::PANEL,
    pool::LINE,
    simd::{Kernel, Simd, math},
};

/// Products become `e^(scale·product + bias - largest)`, in blocks of rows, with one over the rows' sums beside them.
pub(super) struct Softmax<'a> {
    /// Rows as long as `bias`.
    pub(super) scores: &'a mut [f32],
    /// As [`Blocks`](super::gemm::Blocks).
    pub(super) map: &'a mut [f32],
    pub(super) tokens: usize,
    pub(super) bias: &'a [f32],
    pub(super) scale: f32,
    pub(super) inverse: &'a mut [f32],
    /// The columns of the softmax are added here.
    pub(super) received: Option<&'a mut [f32]>,
    /// Its rows go here, as long as `bias`.
    pub(super) kept: Option<&'a mut [f32]>,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, map, tokens, bias, scale, inverse, mut received, mut kept } = self;
        let scale = s.splat(scale);
        // Whole vectors only: what is behind the last one is not looked at by anyone.
        let used = tokens.next_multiple_of(S::LANES);
        const { assert!(LINE.is_multiple_of(S::LANES) && PANEL.is_multiple_of(S::LANES)) };
        let length = bias.len();
        let bias = &bias[..used];
        let padded = tokens.next_multiple_of(LINE);
        for block in cut::<S>(scores.len() / length) {
            let map = &mut map[block.start * padded..block.end * padded];
            for (i, row) in block.clone().enumerate() {
                let scores = &mut scores[row * length..][..used];
                scores[tokens..].fill(0.0);
                let mut largest = s.splat(f32::NEG_INFINITY);
                for (x, b) in scores.chunks_exact_mut(S::LANES).zip(bias.chunks_exact(S::LANES)) {
                    let score = s.fma(s.load(x), scale, s.load(b));
                    s.store(x, score);
                    largest = s.largest(score, largest);
                }
                let largest = s.maximum(largest);
                let largest = s.splat(if largest == f32::NEG_INFINITY { 0.0 } else { largest });
                let mut sum = s.splat(0.0);
                let place = |at: usize| (at / LINE * block.len() + i) * LINE + at % LINE;
                for (x, at) in scores.chunks_exact(S::LANES).zip((0..).step_by(S::LANES)) {
                    let e = math::exp_negative(s, s.sub(s.load(x), largest));
                    s.store(&mut map[place(at)..], e);
                    sum = s.add(sum, e);
                }
                let sum = s.sum(sum);
                let inverse = &mut inverse[row];
                *inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                if let Some(received) = &mut received {
                    let inverse = s.splat(*inverse);
                    let received = &mut received[..used];
                    for (y, at) in received.chunks_exact_mut(S::LANES).zip((0..).step_by(S::LANES)) {
                        let y_new = s.fma(s.load(&map[place(at)..]), inverse, s.load(y));
                        s.store(y, y_new);
                    }
                }
                if let Some(kept) = &mut kept {
                    let inverse = s.splat(*inverse);
                    let kept = &mut kept[row * length..][..used];
                    for (y, at) in kept.chunks_exact_mut(S::LANES).zip((0..).step_by(S::LANES)) {
                        s.store(y, s.mul(s.load(&map[place(at)..]), inverse));
                    }
                }
            }
        }
    }
}
