//! Top-k selection against a plain sort, with ties planted on purpose.

use foveate::{
    Tensor,
    backend::{Pooling, Select},
};
use proptest::prelude::*;

mod backends;
use backends::backends;

proptest! {
    #[test]
    fn selection_is_a_stable_descending_sort(
        heads in 1_usize..4, n in 1_usize..80, special in 0_usize..5, share in 0.0..=1.0_f64,
        levels in prop_oneof![Just(1_u32), Just(4), Just(100_000)], fuse in any::<bool>(), seed in any::<u32>(),
    ) {
        let special = special.min(n);
        let keep = ((n - special) as f64 * share).round() as usize;
        let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) % levels;
        let scores: Vec<f32> = (0..heads * n).map(|i| value(i) as f32 / levels as f32).collect();
        let mean: Vec<f32> =
            (0..n).map(|t| (0..heads).map(|h| scores[h * n + t]).sum::<f32>() / heads as f32).collect();
        let mut order: Vec<usize> = (special..n).collect();
        order.sort_by(|&a, &b| mean[b].total_cmp(&mean[a]));
        let class_scores = Tensor::new(&[1, heads, n], scores).unwrap();
        for backend in backends() {
        let plan = backend.select(&Select { class_scores: &class_scores, special, keep, fuse }).unwrap();
        let fused = fuse && keep < n - special;
        prop_assert_eq!(plan.tokens_out(), special + keep + usize::from(fused));
        for token in 0..special {
            prop_assert_eq!(plan.group(0, token), (&[token as i32][..], &[1.0][..]));
        }
        for (at, &token) in order[..keep].iter().enumerate() {
            prop_assert_eq!(plan.group(0, special + at), (&[token as i32][..], &[1.0][..]));
        }
        if fused {
            let (members, weights) = plan.group(0, special + keep);
            let mut rest = order[keep..].to_vec();
            rest.sort_unstable();
            prop_assert_eq!(members, &rest.iter().map(|&t| t as i32).collect::<Vec<_>>()[..]);
            prop_assert_eq!(weights, &rest.iter().map(|&t| mean[t]).collect::<Vec<_>>()[..]);
        }
        // Kept rows are copies, to the bit.
        let x = Tensor::new(&[1, n, 3], (0..n * 3).map(|i| (i as f32).sin()).collect()).unwrap();
        let merged = backend.merge(&x, None, &plan, Pooling::Weighted, None).unwrap();
        for (at, &token) in order[..keep].iter().enumerate() {
            prop_assert_eq!(&merged.tokens.data()[(special + at) * 3..][..3], &x.data()[token * 3..][..3]);
        }
        }
    }
}

#[test]
fn nan_scores_rank_last() {
    let class_scores = Tensor::new(&[1, 1, 4], vec![0.1, f32::NAN, 0.3, 0.2]).unwrap();
    for backend in backends() {
        let plan = backend
            .select(&Select { class_scores: &class_scores, special: 0, keep: 4, fuse: false })
            .unwrap();
        assert_eq!(plan.members(), [2, 3, 0, 1]);
    }
}

#[test]
fn impossible_counts_are_named() {
    let class_scores = Tensor::zeros(&[1, 2, 5]);
    for backend in backends() {
        let error = backend.select(&Select { class_scores: &class_scores, special: 1, keep: 5, fuse: false });
        assert!(error.unwrap_err().to_string().contains("cannot keep 5 of 5 tokens of which 1 are special"));
    }
}
