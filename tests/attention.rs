//! Attention and its scores against the definition in double precision.

use foveate::{
    Tensor, TokenPlan,
    backend::{Heads, Pooling, ScoreRequest},
    reference::attention::fold_map,
};
use proptest::prelude::*;

mod backends;
use backends::backends;

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    sizes: bool,
    scale: f32,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![Just(1_usize), Just(2), 3..40_usize, Just(197), Just(257)];
    let shape = (1_usize..3, tokens, 1_usize..4, prop_oneof![Just(8_usize), Just(20), Just(32), Just(64)]);
    (shape, any::<bool>(), prop_oneof![Just(0.125_f32), Just(1.0), Just(20.0)], any::<u64>()).prop_map(
        |((batch, tokens, heads, head_dim), sizes, scale, seed)| Case {
            batch,
            tokens,
            heads,
            head_dim,
            sizes,
            scale,
            seed,
        },
    )
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let n = shape.iter().product();
    Tensor::new(shape, (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()).unwrap()
}

impl Case {
    fn qkv(&self) -> Tensor {
        random(&[self.batch, self.tokens, 3 * self.heads * self.head_dim], self.seed)
    }

    fn sizes(&self) -> Option<Tensor> {
        let mut sizes = random(&[self.batch, self.tokens], self.seed ^ 1);
        sizes.data_mut().iter_mut().for_each(|s| *s = (*s * 4.0).abs().floor() + 1.0);
        self.sizes.then_some(sizes)
    }

    /// One head's attention map by the definition.
    fn map(&self, qkv: &Tensor, sizes: Option<&Tensor>, image: usize, head: usize) -> Vec<Vec<f64>> {
        let (n, d, c) = (self.tokens, self.head_dim, self.heads * self.head_dim);
        let value =
            |t: usize, part: usize, k: usize| f64::from(qkv.item(image)[t * 3 * c + part * c + head * d + k]);
        let row = |q: usize| {
            let logit = |key: usize| {
                let dot: f64 = (0..d).map(|k| value(q, 0, k) * value(key, 1, k)).sum();
                dot * f64::from(self.scale) + sizes.map_or(0.0, |s| f64::from(s.item(image)[key]).ln())
            };
            let logits: Vec<f64> = (0..n).map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
            logits.iter().map(|l| (l - max).exp() / sum).collect()
        };
        (0..n).map(row).collect()
    }

    /// Error of a softmax weight in f32: the logit's, 4·eps·sqrt(D)·scale for entries below 1, plus its own rounding.
    fn tolerance(&self) -> f64 {
        4.0 * f64::from(f32::EPSILON) * ((self.head_dim as f64).sqrt() * f64::from(self.scale).max(1.0) + 4.0)
    }
}

fn close(got: &[f32], want: &[f64], limit: f64) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.len(), want.len());
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        prop_assert!(
            (f64::from(got) - want).abs() <= limit,
            "[{}]: {} instead of {}, limit {:e}",
            at,
            got,
            want,
            limit
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn contexts_and_scores_match_the_definition(case in case()) {
        let (qkv, sizes) = (case.qkv(), case.sizes());
        let (n, d, c) = (case.tokens, case.head_dim, case.heads * case.head_dim);
        let heads = Heads { packed: &qkv, heads: case.heads, head_dim: d, scale: case.scale, sizes: sizes.as_ref() };
        let request = ScoreRequest { class: true, received: true };
        let results: Vec<_> = backends().map(|backend| backend.attention(&heads, request).unwrap()).collect();
        for image in 0..case.batch {
            let mut wanted = vec![0.0; n * c];
            for head in 0..case.heads {
                let map = case.map(&qkv, sizes.as_ref(), image, head);
                for q in 0..n {
                    for k in 0..d {
                        let value = |t: usize| f64::from(qkv.item(image)[t * 3 * c + 2 * c + head * d + k]);
                        wanted[q * c + head * d + k] = (0..n).map(|t| map[q][t] * value(t)).sum();
                    }
                }
                let row = (image * case.heads + head) * n..(image * case.heads + head + 1) * n;
                let mean: Vec<f64> = (0..n).map(|t| map.iter().map(|r| r[t]).sum::<f64>() / n as f64).collect();
                for (_, scores) in &results {
                    let (class, received) = (scores.class.as_ref().unwrap(), scores.received.as_ref().unwrap());
                    close(&class.data()[row.clone()], &map[0], case.tolerance())?;
                    close(&received.data()[row.clone()], &mean, case.tolerance())?;
                }
            }
            for (context, _) in &results {
                close(context.item(image), &wanted, 2.0 * case.tolerance())?;
            }
        }
        // Scores asked for alone, from queries and keys without values, are the same bits.
        let qk: Vec<f32> = qkv.data().chunks(3 * c).flat_map(|row| row[..2 * c].to_vec()).collect();
        let qk = Tensor::new(&[case.batch, n, 2 * c], qk).unwrap();
        for (backend, (_, scores)) in backends().zip(&results) {
            let alone = backend.attention_scores(&Heads { packed: &qk, ..heads }, request).unwrap();
            let class: Vec<f64> = scores.class.iter().flat_map(Tensor::data).map(|&x| f64::from(x)).collect();
            close(alone.class.unwrap().data(), &class, case.tolerance())?;
        }
    }

    /// The reduced attention is the folded map times the values (MCTF, section 3.3).
    #[test]
    fn reduced_attention_is_the_folded_map(case in case(), max in any::<bool>()) {
        let (qkv, sizes) = (case.qkv(), case.sizes());
        let (n, d, c) = (case.tokens, case.head_dim, case.heads * case.head_dim);
        let m = n.div_ceil(3);
        let groups: Vec<Vec<(usize, f32)>> = (0..m)
            .map(|g| {
                let members: Vec<usize> = (0..n).filter(|t| t * 7 % m == g).collect();
                let weight = 1.0 / members.len() as f32;
                members.into_iter().map(|t| (t, weight)).collect()
            })
            .collect();
        let plan = TokenPlan::from_groups(n, &vec![groups; case.batch]).unwrap();
        let pooling = if max { Pooling::Max } else { Pooling::Weighted };
        let qk: Vec<f32> = qkv.data().chunks(3 * c).flat_map(|row| row[..2 * c].to_vec()).collect();
        let qk = Tensor::new(&[case.batch, n, 2 * c], qk).unwrap();
        let values = random(&[case.batch, m, c], case.seed ^ 2);
        let heads = Heads { packed: &qk, heads: case.heads, head_dim: d, scale: case.scale, sizes: sizes.as_ref() };
        let mut results: Vec<_> = backends()
            .map(|backend| backend.attention_reduced(&heads, &values, &plan, pooling).unwrap())
            .collect();
        // And from a map that was kept since the scores were asked for, where a backend keeps one.
        let request = ScoreRequest { class: true, received: true };
        for backend in backends() {
            let (scores, map) = backend.attention_scores_and_map(&heads, request).unwrap();
            let alone = backend.attention_scores(&heads, request).unwrap();
            prop_assert_eq!(scores.class.unwrap(), alone.class.unwrap());
            prop_assert_eq!(scores.received.unwrap(), alone.received.unwrap());
            let reduced = backend.attention_reduced_of(map.as_ref(), &heads, &values, &plan, pooling);
            results.push(reduced.unwrap());
        }
        for image in 0..case.batch {
            let mut wanted = vec![0.0; m * c];
            for head in 0..case.heads {
                let map: Vec<f32> =
                    case.map(&qkv, sizes.as_ref(), image, head).concat().iter().map(|&p| p as f32).collect();
                let folded = fold_map(&map, &plan, image, pooling).unwrap();
                for q in 0..m {
                    for k in 0..d {
                        let value = |t: usize| f64::from(values.item(image)[t * c + head * d + k]);
                        wanted[q * c + head * d + k] = (0..m).map(|t| f64::from(folded[q * m + t]) * value(t)).sum();
                    }
                }
            }
            // With the maximum, rows sum to more than one: up to the size of the group.
            let spread = if max { 4.0 } else { 1.0 };
            for got in &results {
                close(got.item(image), &wanted, 4.0 * spread * case.tolerance())?;
            }
        }
    }
}

#[test]
fn extreme_scores_stay_finite() {
    for reference in backends() {
        let mut qkv = random(&[1, 5, 24], 3);
        qkv.data_mut()[..8].fill(1e18);
        let heads = Heads { packed: &qkv, heads: 1, head_dim: 8, scale: 1.0, sizes: None };
        let (context, scores) =
            reference.attention(&heads, ScoreRequest { class: true, received: true }).unwrap();
        assert!(context.data().iter().all(|x| x.is_finite()));
        assert!((scores.received.unwrap().data().iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn a_plan_that_leaves_nothing_is_refused() {
    let plan = TokenPlan::from_groups(2, &[vec![]]).unwrap();
    assert!(fold_map(&[0.5; 4], &plan, 0, Pooling::Weighted).is_err());
    let qk = random(&[1, 2, 16], 1);
    let heads = Heads { packed: &qk, heads: 1, head_dim: 8, scale: 1.0, sizes: None };
    let values = Tensor::zeros(&[1, 0, 8]);
    for backend in backends() {
        let error = backend.attention_reduced(&heads, &values, &plan, Pooling::Weighted).unwrap_err();
        assert!(error.to_string().contains("leaves no token"));
    }
}

/// The processor's backend keeps small maps, and refuses one of another attention.
#[test]
fn a_kept_map_is_checked() {
    let qk = random(&[1, 4, 16], 1);
    let heads = Heads { packed: &qk, heads: 1, head_dim: 8, scale: 1.0, sizes: None };
    let plan = TokenPlan::from_groups(4, &[vec![vec![(0, 1.0)], vec![(1, 0.5), (2, 0.5)]]]).unwrap();
    let values = random(&[1, 2, 8], 2);
    let mut kept = 0;
    for backend in backends() {
        let (_, map) = backend.attention_scores_and_map(&heads, ScoreRequest::default()).unwrap();
        let Some(map) = map else { continue };
        kept += 1;
        let other = Tensor::zeros(&[1, 2, 4, map.shape()[3]]);
        let error = backend.attention_reduced_of(Some(&other), &heads, &values, &plan, Pooling::Weighted);
        assert!(error.unwrap_err().to_string().contains("map has shape [1, 2, 4"));
    }
    assert_eq!(kept, backends().count() - 1, "all but the reference keep it");
}

#[test]
fn wrong_shapes_are_named() {
    for reference in backends() {
        let packed = random(&[1, 4, 24], 1);
        let attention = |heads, head_dim, sizes: Option<&Tensor>| {
            let view = Heads { packed: &packed, heads, head_dim, scale: 1.0, sizes };
            reference.attention(&view, ScoreRequest::default()).unwrap_err().to_string()
        };
        assert!(attention(3, 8, None).contains("24 values are not 3 parts of 3 heads of 8"));
        assert!(attention(0, 8, None).starts_with("attention: "));
        let sizes = random(&[1, 3], 1);
        assert!(attention(1, 8, Some(&sizes)).contains("sizes has shape [1, 3], expected [1, 4]"));
    }
}
