//! Bipartite matching against a plain statement of the rules, with ties planted on purpose.

use foveate::{
    Tensor,
    backend::{Attraction, Heads, Matching, Metric, Weighting},
    reference::matching::{match_every_kth, match_scores},
};
use proptest::prelude::*;

mod backends;
use backends::backends;

/// ToMe's rules, one sentence each (spec section 6): A tokens by descending best score, ties to the lower index; the
/// first `merges` go to their best B token, ties to the lower index; special tokens are left alone.
fn expected_groups(scores: &[f32], tokens: usize, special: usize, merges: usize) -> Vec<Vec<usize>> {
    let nb = tokens / 2;
    let score = |a: usize, b: usize| scores[a / 2 * nb + b / 2];
    let sources: Vec<usize> = (special..tokens).filter(|t| t % 2 == 0).collect();
    let targets: Vec<usize> = (special..tokens).filter(|t| t % 2 == 1).collect();
    let best = |a: usize| {
        let top = targets.iter().map(|&b| score(a, b)).fold(f32::NEG_INFINITY, f32::max);
        (top, targets.iter().copied().find(|&b| score(a, b) == top))
    };
    let mut order = sources.clone();
    order.sort_by(|&x, &y| best(y).0.total_cmp(&best(x).0).then(x.cmp(&y)));
    let merged = &order[..merges];
    let mut kept: Vec<usize> = order[merges..].to_vec();
    if special > 0 {
        kept.sort_unstable();
    }
    let mut groups: Vec<Vec<usize>> = (0..special).map(|t| vec![t]).collect();
    groups.extend(kept.into_iter().map(|t| vec![t]));
    for &target in &targets {
        let mut group: Vec<usize> = merged.iter().copied().filter(|&a| best(a).1 == Some(target)).collect();
        group.push(target);
        group.sort_unstable();
        groups.push(group);
    }
    groups
}

proptest! {
    #[test]
    fn one_way_matching_follows_the_rules(
        tokens in 1_usize..60, special in 0_usize..6, share in 0.0..=1.0_f64,
        levels in prop_oneof![Just(2_u32), Just(5), Just(1000)], seed in any::<u32>(),
    ) {
        let special = special.min(tokens);
        let merges = ((tokens - special) as f64 / 2.0 * share) as usize;
        // Few levels make many ties.
        let count = tokens.div_ceil(2) * (tokens / 2);
        let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) % levels;
        let scores: Vec<f32> = (0..count).map(|i| value(i) as f32 / levels as f32).collect();
        let matches = match_scores(&scores, tokens, special, merges, false).unwrap();
        prop_assert_eq!(matches.groups(tokens, special), expected_groups(&scores, tokens, special, merges));
    }

    #[test]
    fn both_ways_every_token_lands_somewhere(
        tokens in 1_usize..60, special in 0_usize..6, share in 0.0..=1.0_f64,
        levels in prop_oneof![Just(1_u32), Just(3), Just(1000)], seed in any::<u32>(), nan in any::<bool>(),
    ) {
        let special = special.min(tokens);
        let merges = ((tokens - special) as f64 / 2.0 * share) as usize;
        let count = tokens.div_ceil(2) * (tokens / 2);
        let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) % levels;
        let mut scores: Vec<f32> = (0..count).map(|i| value(i) as f32).collect();
        if nan && !scores.is_empty() {
            let at = seed as usize % scores.len();
            scores[at] = f32::NAN;
        }
        let matches = match_scores(&scores, tokens, special, merges, true).unwrap();
        let groups = matches.groups(tokens, special);
        prop_assert_eq!(groups.len(), tokens - merges);
        let mut all: Vec<usize> = groups.concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..tokens).collect::<Vec<_>>());
        for (token, group) in groups.iter().take(special).enumerate() {
            prop_assert_eq!(group, &vec![token], "special tokens stay where they are, alone");
        }
        let back = matches.back.unwrap();
        prop_assert_eq!(matches.merged.len(), merges / 2);
        prop_assert_eq!(back.merged.len(), merges - merges / 2);
        let scores: Vec<f32> = back.kept.iter().map(|&j| back.best[j]).filter(|s| !s.is_nan()).collect();
        prop_assert!(scores.is_sorted_by(|a, b| a >= b));
    }
}

fn cosine_plan(rows: &Tensor, special: usize, merges: usize) -> Vec<Vec<i32>> {
    let matching = Matching {
        metric: Metric::Rows(rows),
        attraction: Attraction::Cosine,
        weighting: Weighting::Uniform,
        special,
        merges,
        both_ways: false,
    };
    let mut plans = backends().map(|backend| backend.matching(&matching).unwrap());
    let plan = plans.next().unwrap();
    plans.for_each(|other| assert_eq!(other, plan));
    (0..plan.tokens_out()).map(|t| plan.group(0, t).0.to_vec()).collect()
}

#[test]
fn equal_tokens_merge_into_the_lower_index_first() {
    // All rows alike: every score is the same.
    let rows = Tensor::new(&[1, 9, 4], vec![0.5; 36]).unwrap();
    let groups = cosine_plan(&rows, 1, 2);
    assert_eq!(groups, [vec![0], vec![6], vec![8], vec![1, 2, 4], vec![3], vec![5], vec![7]]);
}

#[test]
fn a_zero_token_is_similar_to_nothing() {
    // Token 2 is zero; token 4 points the way token 3 does, token 1 the other way.
    let rows = [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]].concat();
    let rows = Tensor::new(&[1, 5, 2], rows).unwrap();
    assert_eq!(cosine_plan(&rows, 1, 1), [vec![0], vec![2], vec![1], vec![3, 4]]);
}

#[test]
fn too_many_merges_and_wrong_shapes_are_named() {
    let rows = Tensor::zeros(&[1, 6, 2]);
    let matching = |special, merges| Matching {
        metric: Metric::Rows(&rows),
        attraction: Attraction::Cosine,
        weighting: Weighting::Uniform,
        special,
        merges,
        both_ways: false,
    };
    for backend in backends() {
        let error = backend.matching(&matching(1, 3)).unwrap_err().to_string();
        assert!(error.contains("at most 2 can be merged"), "{error}");
    }
    let sizes = Tensor::zeros(&[1, 5]);
    let wrong = Matching { weighting: Weighting::Size(Some(&sizes)), ..matching(0, 1) };
    for backend in backends() {
        let error = backend.matching(&wrong).unwrap_err().to_string();
        assert!(error.contains("sizes has shape [1, 5], expected [1, 6]"), "{error}");
    }
}

#[test]
fn merging_by_runs_needs_tokens_with_values() {
    // Rows (1,0) (0,1) (0.9,0.1) (0.1,0.9): tokens 1 and 3 end their runs of two; both others lean towards token 3.
    let groups = match_every_kth(&[1.0, 0.0, 0.0, 1.0, 0.9, 0.1, 0.1, 0.9], 4, 2).unwrap();
    assert_eq!(groups, [vec![1], vec![0, 2, 3]]);
    for (metric, tokens, every) in
        [(&[][..], 4, 2), (&[1.0, 2.0][..], 0, 2), (&[1.0, 2.0][..], 2, 0), (&[1.0; 5][..], 2, 2)]
    {
        let error = match_every_kth(metric, tokens, every).unwrap_err().to_string();
        assert!(error.contains(&format!("{} values are not {tokens} tokens", metric.len())), "{error}");
    }
}

/// Plans of all backends for the same tokens, all criteria and weightings. The seeds are fixed: scores that differ by no more
/// than rounding would be told apart by chance.
#[test]
fn all_backends_match_alike() {
    use rand::{Rng, SeedableRng};
    for seed in 0..60_u64 {
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let (batch, n) = (rng.random_range(1..3), rng.random_range(2..90));
        let (heads, d) = (rng.random_range(1..4), [3, 8, 16, 20, 33][rng.random_range(0..5)]);
        let special = rng.random_range(0..4_usize).min(n);
        let merges = rng.random_range(0..=(n - special) / 2);
        let mut random = |shape: &[usize], low: f32| {
            let values = (0..shape.iter().product()).map(|_| rng.random_range(low..1.0)).collect();
            Tensor::new(shape, values).unwrap()
        };
        // Very short and very long rows among them.
        let mut packed = random(&[batch, n, 2 * heads * d], -1.0);
        let scale = [1.0, 1e-20, 1e20][seed as usize % 3];
        packed.data_mut().iter_mut().take(2 * heads * d).for_each(|x| *x *= scale);
        let (sizes, received) = (random(&[batch, n], 0.1), random(&[batch, heads, n], 0.01));
        let keys = Heads { packed: &packed, heads, head_dim: d, scale: 1.0, sizes: None };
        let metric = || if seed % 2 == 0 { Metric::Keys(&keys) } else { Metric::Rows(&packed) };
        let attraction = || match seed % 4 {
            0 | 1 => Attraction::Cosine,
            other => Attraction::MultiCriteria {
                tau_similarity: [1.0, 2.0][other as usize % 2],
                informativeness: (&received, [0.0, 1.0, 3.0][seed as usize % 3]),
                size: ((seed % 5 > 0).then_some(&sizes), [0.0, 1.0, 40.0][seed as usize / 3 % 3]),
            },
        };
        let weighting = || match seed % 5 {
            0 => Weighting::Uniform,
            1 => Weighting::Size(None),
            2 => Weighting::Size(Some(&sizes)),
            3 => Weighting::SizeAndReceived(None, &received),
            _ => Weighting::SizeAndReceived(Some(&sizes), &received),
        };
        let matching = Matching {
            metric: metric(),
            attraction: attraction(),
            weighting: weighting(),
            special,
            merges,
            both_ways: seed % 3 > 0,
        };
        let mut plans = backends().map(|backend| backend.matching(&matching).unwrap());
        let want = plans.next().unwrap();
        for got in plans {
            assert_eq!(got.offsets(), want.offsets(), "seed {seed}");
            assert_eq!(got.members(), want.members(), "seed {seed}");
            for (got, want) in got.weights().iter().zip(want.weights()) {
                // A quotient of sums of a few sizes.
                assert!(
                    (got - want).abs() <= 4.0 * f32::EPSILON * want,
                    "seed {seed}: {got} instead of {want}"
                );
            }
        }
    }
}
