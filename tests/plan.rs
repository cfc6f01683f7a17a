//! Token plans and source maps: invariants on random plans.

use foveate::{
    SourceMap, Tensor, TokenPlan,
    backend::{Backend, Pooling},
    reference::Reference,
};
use proptest::prelude::*;

mod backends;
use backends::backends;

/// A random plan: `tokens` go to one of `out` groups each, or are dropped; weights sum to one in a group.
fn plan(batch: usize, tokens: usize, out: usize) -> impl Strategy<Value = TokenPlan> {
    let image = prop::collection::vec((0..=out, 1_u32..100), tokens);
    prop::collection::vec(image, batch).prop_map(move |images| {
        let groups: Vec<Vec<Vec<(usize, f32)>>> = images
            .into_iter()
            .map(|tokens| {
                let mut groups: Vec<Vec<(usize, f32)>> = vec![Vec::new(); out];
                for (token, (group, weight)) in tokens.into_iter().enumerate() {
                    if let Some(group) = groups.get_mut(group) {
                        group.push((token, weight as f32));
                    }
                }
                for group in &mut groups {
                    let total: f32 = group.iter().map(|m| m.1).sum();
                    group.iter_mut().for_each(|m| m.1 /= total);
                }
                groups
            })
            .collect();
        TokenPlan::from_groups(tokens, &groups).unwrap()
    })
}

fn two_plans() -> impl Strategy<Value = (TokenPlan, TokenPlan)> {
    (1_usize..4, 1_usize..20, 1_usize..12, 1_usize..8)
        .prop_flat_map(|(batch, n, m, k)| (plan(batch, n, m), plan(batch, m, k)))
}

fn tokens(batch: usize, n: usize, width: usize) -> Tensor {
    let value = |i: usize| ((i * 7919) % 1009) as f32 / 500.0 - 1.0;
    Tensor::new(&[batch, n, width], (0..batch * n * width).map(value).collect()).unwrap()
}

proptest! {
    #[test]
    fn every_token_is_a_member_at_most_once_and_weights_sum_to_one((plan, _) in two_plans()) {
        for image in 0..plan.batch() {
            let mut seen = vec![0; plan.tokens_in()];
            for token in 0..plan.tokens_out() {
                let (members, weights) = plan.group(image, token);
                prop_assert!(members.is_sorted());
                members.iter().for_each(|&m| seen[m as usize] += 1);
                let sum: f32 = weights.iter().sum();
                prop_assert!(members.is_empty() || (sum - 1.0).abs() < 1e-5);
            }
            let groups = plan.group_of(image);
            prop_assert!(seen.iter().zip(&groups).all(|(&n, &g)| n == i32::from(g >= 0)));
        }
    }

    #[test]
    fn a_composed_plan_does_what_its_parts_do((first, second) in two_plans()) {
        let reference = Reference::new();
        let composed = first.then(&second).unwrap();
        let x = tokens(first.batch(), first.tokens_in(), 5);
        let one = reference.merge(&x, None, &first, Pooling::Weighted, None).unwrap();
        let two = reference.merge(&one.tokens, Some(&one.sizes), &second, Pooling::Weighted, None).unwrap();
        let whole = reference.merge(&x, None, &composed, Pooling::Weighted, None).unwrap();
        prop_assert_eq!(&two.sizes, &whole.sizes);
        for (a, b) in two.tokens.data().iter().zip(whole.tokens.data()) {
            // Two roundings of weights and sums of at most 20 values of magnitude 1.
            prop_assert!((a - b).abs() <= 4.0 * f32::EPSILON * 20.0_f32.sqrt(), "{a} {b}");
        }
        let mut map = SourceMap::identity(first.batch(), first.tokens_in());
        map.apply(&first).unwrap();
        map.apply(&second).unwrap();
        for image in 0..first.batch() {
            prop_assert_eq!(map.groups(image), &composed.group_of(image)[..]);
        }
        let spread = |image| map.unmerge(image, whole.tokens.item(image), 5, 0.0).unwrap();
        let spread: Vec<f32> = (0..first.batch()).flat_map(spread).collect();
        for backend in backends() {
            let back = backend.unmerge(&whole.tokens, &composed).unwrap();
            prop_assert_eq!(back.data(), &spread[..]);
        }
    }

    #[test]
    fn the_identity_changes_nothing(batch in 1_usize..4, n in 1_usize..30) {
        let reference = Reference::new();
        let (plan, x) = (TokenPlan::identity(batch, n), tokens(batch, n, 3));
        let merged = reference.merge(&x, None, &plan, Pooling::Weighted, None).unwrap();
        prop_assert_eq!(&merged.tokens, &x);
        prop_assert!(merged.sizes.data().iter().all(|&s| s == 1.0));
        prop_assert_eq!(&reference.unmerge(&x, &plan).unwrap(), &x);
        prop_assert_eq!(&plan.then(&plan).unwrap(), &plan);
    }

    #[test]
    fn arbitrary_arrays_never_panic(
        batch in 0_usize..3, n in 0_usize..6, m in 0_usize..6,
        offsets in prop::collection::vec(-3_i32..9, 0..12),
        members in prop::collection::vec(-3_i32..9, 0..12),
    ) {
        let weights = vec![1.0; members.len()];
        if let Ok(plan) = TokenPlan::new(batch, n, m, offsets, members, weights) {
            for image in 0..batch {
                prop_assert_eq!(plan.group_of(image).len(), n);
            }
        }
    }
}

/// SViTE's mask: the token keeps its place, but no final token stands for its patch.
#[test]
fn a_token_times_zero_is_dropped() {
    let plan = TokenPlan::from_groups(3, &[vec![vec![(0, 1.0)], vec![(1, 0.0)], vec![(2, 1.0)]]]).unwrap();
    let mut map = SourceMap::identity(1, 3);
    map.apply(&plan).unwrap();
    map.apply(&plan).unwrap();
    assert_eq!((map.groups(0), map.tokens_out()), (&[0, -1, 2][..], 3));
}

#[test]
fn impossible_plans_are_refused_by_name() {
    let refused =
        |groups: &[Vec<Vec<(usize, f32)>>]| TokenPlan::from_groups(3, groups).unwrap_err().to_string();
    assert!(refused(&[vec![vec![(0, 1.0), (0, 1.0)]]]).contains("token 0 is a member twice"));
    assert!(refused(&[vec![vec![(3, 1.0)]]]).contains("member 3 is not a token of 3"));
    assert!(refused(&[vec![vec![(0, 1.0)]], vec![]]).contains("image 1 has 0 output tokens"));
    let (a, b) = (TokenPlan::identity(1, 3), TokenPlan::identity(1, 4));
    assert!(a.then(&b).unwrap_err().to_string().contains("cannot follow"));
    assert!(SourceMap::identity(2, 3).apply(&a).unwrap_err().to_string().contains("cannot follow"));
}
