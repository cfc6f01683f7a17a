//! Judging a plan by the reference's scores and by how far two `f32` computations of a score may be apart.
//!
//! The bound. A cosine is a sum of D products of numbers whose squares sum to 1, each rounded to within `eps/2` of a partial
//! sum of magnitude at most 1, and two lengths whose own sums are rounded likewise. Errors of D roundings that are
//! independent add up to their size times √D: `4·eps·√D` leaves eight times that size. Reference and kernel add in different
//! orders, so two scores may be `8·eps·√D` apart. A criterion `f = ratio^e` is within `(2·|ln f| + 4)·eps` of itself in either
//! (ratio and exponent are rounded, their product is what an exponential magnifies), and a power of the similarity within
//! `(2·|ln f| + 2·e + 3)·eps` (the hardware's logarithm is off by 2^-22 around 1).

use foveate::{
    Tensor, TokenPlan,
    backend::{self, Attraction},
    reference::matching::{Matches, attractions, match_scores, metric_rows},
};

use super::{Case, Data, planned, weights_of};

const EPS: f64 = f32::EPSILON as f64;

/// Scores of one image with their uncertainty: (A tokens, B tokens).
struct Scores {
    columns: usize,
    score: Vec<f32>,
    /// How far the device's may be.
    slack: Vec<f64>,
    /// Tokens with the same number are the same in everything: their scores are the same bits on either side.
    class: Vec<usize>,
}

/// A score of a pair of tokens.
#[derive(Clone, Copy)]
struct Pair {
    score: f32,
    slack: f64,
    classes: [usize; 2],
}

impl Pair {
    /// Whether both sides put the pairs in the same order, or see a tie, without doubt.
    fn definite(self, other: Self) -> bool {
        let apart = (f64::from(self.score) - f64::from(other.score)).abs();
        self.classes == other.classes
            || self.score.is_nan()
            || other.score.is_nan()
            || self.score.is_infinite()
            || other.score.is_infinite()
            || apart > self.slack + other.slack
            || self.slack + other.slack == 0.0
    }

    fn high(self) -> f64 {
        if self.score.is_nan() { f64::NEG_INFINITY } else { f64::from(self.score) + self.slack }
    }

    fn low(self) -> f64 {
        if self.score.is_nan() { f64::NEG_INFINITY } else { f64::from(self.score) - self.slack }
    }
}

impl Scores {
    fn new(matching: &backend::Matching<'_, Tensor>, data: &Data, image: usize) -> Self {
        let score = attractions(matching, image).unwrap();
        let cosine = backend::Matching {
            attraction: Attraction::Cosine,
            metric: match matching.metric {
                backend::Metric::Rows(rows) => backend::Metric::Rows(rows),
                backend::Metric::Keys(heads) => backend::Metric::Keys(heads),
            },
            weighting: backend::Weighting::Uniform,
            ..*matching
        };
        let cosines = attractions(&cosine, image).unwrap();
        let (rows, width) = metric_rows(&matching.metric, image);
        let tokens = rows.len() / width;
        let columns = tokens / 2;
        let zero: Vec<bool> = rows.chunks(width).map(|row| row.iter().all(|&x| x == 0.0)).collect();
        let factors = factors(matching, image, tokens);
        let error = 8.0 * EPS * (width as f64).sqrt();
        let slack = (0..score.len()).map(|at| {
            let (a, b) = (2 * (at / columns), 2 * (at % columns) + 1);
            let error = if zero[a] || zero[b] { 0.0 } else { error };
            let Attraction::MultiCriteria { tau_similarity, .. } = matching.attraction else { return error };
            let exponent = if tau_similarity == 0.0 { 0.0 } else { 1.0 / tau_similarity };
            let power = |x: f64| if exponent == 0.0 { 1.0 } else { x.max(0.0).powf(exponent) };
            let similarity = f64::midpoint(f64::from(cosines[at]), 1.0);
            let similarity = if similarity.is_nan() { 0.0 } else { similarity };
            let [low, middle, high] =
                [similarity - error / 2.0, similarity, similarity + error / 2.0].map(power);
            let factor = factors[a].0 * factors[b].0;
            let spread = (high - middle).max(middle - low) * factor;
            let logarithms = factors[a].1 + factors[b].1 + middle.max(1e-30).ln().abs();
            let relative = EPS * (2.0 * logarithms + 2.0 * exponent + 24.0);
            let slack = spread + relative * f64::from(score[at]).abs();
            if slack.is_finite() { slack } else { 0.0 }
        });
        let slack = slack.collect();
        Self { columns, score, slack, class: classes(&rows, width, data, image) }
    }

    fn pair(&self, a: usize, b: usize) -> Pair {
        let at = a * self.columns + b;
        let classes = [self.class[2 * a], self.class[2 * b + 1]];
        Pair { score: self.score[at], slack: self.slack[at], classes }
    }
}

/// The criteria of every token, and the sum of their logarithms' magnitudes.
fn factors(matching: &backend::Matching<'_, Tensor>, image: usize, tokens: usize) -> Vec<(f64, f64)> {
    let mut all = vec![(1.0, 0.0); tokens];
    let Attraction::MultiCriteria { informativeness, size, .. } = &matching.attraction else { return all };
    let scores = informativeness.0.item(image);
    let heads = scores.len() / tokens;
    let mean = |t: usize| (0..heads).map(|h| scores[h * tokens + t]).sum::<f32>() / heads as f32;
    let received: Vec<f32> = (0..tokens).map(mean).collect();
    let sizes = size.0.map(|sizes| sizes.item(image).to_vec());
    for (values, temperature) in [(Some(received), informativeness.1), (sizes, size.1)] {
        let Some(values) = values.filter(|_| temperature != 0.0) else { continue };
        let inverse: Vec<f64> = values.iter().map(|&v| 1.0 / f64::from(v)).collect();
        let most = inverse.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (factor, inverse) in all.iter_mut().zip(inverse) {
            let ratio = inverse / most;
            if ratio.is_finite() {
                let value = ratio.powf(1.0 / temperature);
                factor.0 *= value;
                factor.1 += if value > 0.0 { value.ln().abs() } else { 0.0 };
            }
        }
    }
    all
}

/// A number for every token; equal tokens have equal ones.
fn classes(rows: &[f32], width: usize, data: &Data, image: usize) -> Vec<usize> {
    let tokens = rows.len() / width;
    let mut seen = std::collections::HashMap::new();
    let token = |t: usize| {
        let mut key: Vec<u32> = rows[t * width..(t + 1) * width].iter().map(|x| x.to_bits()).collect();
        key.extend(data.received.item(image).iter().skip(t).step_by(tokens).map(|x| x.to_bits()));
        key.extend(data.sizes.as_ref().map(|sizes| sizes.item(image)[t].to_bits()));
        key
    };
    (0..tokens)
        .map(|t| {
            let next = seen.len();
            *seen.entry(token(t)).or_insert(next)
        })
        .collect()
}

/// Whether both sides must decide alike everything that shows in the plan.
fn decided(scores: &Scores, matches: &Matches, special: usize) -> bool {
    let (sa, sb) = (special.div_ceil(2), special / 2);
    let candidates = sb..scores.columns;
    let best = |a: usize| scores.pair(a, matches.best_in_b[a]);
    let partner = |a: usize, b: usize| {
        candidates.clone().all(|other| other == b || scores.pair(a, b).definite(scores.pair(a, other)))
    };
    let kept: Vec<usize> = matches.kept.iter().copied().filter(|&a| a >= sa).collect();
    if candidates.is_empty() {
        return true;
    }
    let forward = matches
        .merged
        .iter()
        .all(|&(a, b)| partner(a, b) && kept.iter().all(|&other| best(a).definite(best(other))))
        && (special > 0 || kept.windows(2).all(|two| best(two[0]).definite(best(two[1]))));
    let Some(back) = &matches.back else { return forward };
    let at = |b: usize, place: usize| scores.pair(matches.kept[place], b);
    let places = || (0..matches.kept.len()).filter(|&place| matches.kept[place] >= sa);
    let best = |b: usize| at(b, back.best_in_kept[b]);
    forward
        && back.merged.iter().all(|&(b, place)| {
            places().all(|other| other == place || at(b, place).definite(at(b, other)))
                && back.kept.iter().all(|&other| best(b).definite(best(other)))
        })
        && back.kept.windows(2).all(|two| best(two[0]).definite(best(two[1])))
}

/// Checks that every choice of one image's plan is optimal within the slack of the scores.
fn optimal(scores: &Scores, case: &Case, groups: &[i32], image: usize) {
    let (tokens, special) = (case.tokens, case.special);
    let (sa, sb) = (special.div_ceil(2), special / 2);
    let (na, nb) = (tokens.div_ceil(2), tokens / 2);
    let forward = if case.both_ways { case.merges / 2 } else { case.merges };
    let tail = special + na - sa - forward;
    let group = |token: usize| groups[token] as usize;
    assert!((0..special).all(|token| group(token) == token), "special tokens stay");
    let extreme = |pairs: &mut dyn Iterator<Item = Pair>| {
        pairs.fold((f64::NEG_INFINITY, f64::NEG_INFINITY), |(high, low), pair| {
            (high.max(pair.high()), low.max(pair.low()))
        })
    };
    let best: Vec<(f64, f64)> = (0..na).map(|a| extreme(&mut (sb..nb).map(|b| scores.pair(a, b)))).collect();
    let chosen = |a: usize| {
        (sb..nb).any(|b| group(2 * b + 1) == group(2 * a) && scores.pair(a, b).high() >= best[a].1)
    };
    // Of several A tokens in one group one stayed: the others have chosen a token of the group, and went before it.
    let mut kept: Vec<usize> = Vec::new();
    for slot in special..tail {
        let here: Vec<usize> = (sa..na).filter(|&a| group(2 * a) == slot).collect();
        let may_stay = |&&a: &&usize| {
            here.iter().all(|&other| other == a || chosen(other) && best[other].0 >= best[a].1)
        };
        let after = kept.last().copied().filter(|_| special > 0);
        let in_order = |&&a: &&usize| after.is_none_or(|before| a > before);
        let stayed = if special > 0 {
            here.iter().filter(may_stay).find(in_order)
        } else {
            here.iter().filter(may_stay).min_by(|&&a, &&b| best[a].0.total_cmp(&best[b].0))
        };
        kept.push(
            *stayed.unwrap_or_else(|| panic!("image {image}: nobody of A may have stayed in {here:?}")),
        );
    }
    let left: Vec<usize> = (sa..na).filter(|a| !kept.contains(a)).collect();
    assert_eq!(left.len(), forward, "image {image}: tokens that left A");
    for &a in &left {
        assert!(chosen(a), "image {image}: token {} has a better partner", 2 * a);
        for &other in &kept {
            assert!(
                best[a].0 >= best[other].1,
                "image {image}: token {} should leave before {}",
                2 * other,
                2 * a
            );
        }
    }
    if special == 0 {
        descending(kept.iter().map(|&a| best[a]));
    }
    if !case.both_ways {
        assert!((sb..nb).all(|b| group(2 * b + 1) == tail + b - sb), "image {image}: B in order of position");
        return;
    }
    let best: Vec<(f64, f64)> =
        (0..nb).map(|b| extreme(&mut kept.iter().map(|&a| scores.pair(a, b)))).collect();
    let (left, mut stayed): (Vec<usize>, Vec<usize>) = (sb..nb).partition(|&b| group(2 * b + 1) < tail);
    assert_eq!(left.len(), case.merges - forward, "image {image}: tokens that left B");
    for &b in &left {
        let pair = scores.pair(kept[group(2 * b + 1) - special], b);
        assert!(pair.high() >= best[b].1, "image {image}: token {} has a better partner", 2 * b + 1);
        for &other in &stayed {
            assert!(best[b].0 >= best[other].1, "image {image}: token {} should leave first", 2 * other + 1);
        }
    }
    stayed.sort_by_key(|&b| group(2 * b + 1));
    descending(stayed.iter().map(|&b| best[b]));
}

/// Each highest possible score is at least the lowest possible of all behind it.
fn descending(best: impl DoubleEndedIterator<Item = (f64, f64)>) {
    let mut least = f64::NEG_INFINITY;
    for (high, low) in best.rev() {
        assert!(high >= least, "not in descending order: {high} before {least}");
        least = least.max(low);
    }
}

/// Checks a plan of the device; says whether it had to be the reference's to the bit.
pub(crate) fn judge(case: &Case, data: &Data, plan: &TokenPlan) -> bool {
    case.with_reference(data, |matching| {
        let mut all_decided = true;
        let groups = super::groups_of(plan);
        for image in 0..case.batch {
            let scores = Scores::new(matching, data, image);
            let matches =
                match_scores(&scores.score, case.tokens, case.special, case.merges, case.both_ways).unwrap();
            let of_image = &groups[image * case.tokens..(image + 1) * case.tokens];
            if decided(&scores, &matches, case.special) {
                let mut want = vec![0; case.tokens];
                for (at, group) in matches.groups(case.tokens, case.special).iter().enumerate() {
                    group.iter().for_each(|&token| want[token] = at as i32);
                }
                assert_eq!(of_image, want, "image {image}");
            } else {
                all_decided = false;
                optimal(&scores, case, of_image, image);
            }
        }
        if all_decided {
            let reference =
                backend::Backend::matching(&foveate::reference::Reference::new(), matching).unwrap();
            assert_eq!(planned(plan), planned(&reference));
        }
        let sizes =
            |image: usize, token: usize| data.sizes.as_ref().map_or(1.0, |sizes| sizes.item(image)[token]);
        let received = |image: usize, token: usize| {
            let scores = data.received.item(image);
            let heads = scores.len() / case.tokens;
            (0..heads).map(|h| scores[h * case.tokens + token]).sum::<f32>() / heads as f32
        };
        let weights = weights_of(plan, |image, token| match case.weighting {
            0 => 1.0,
            1 => sizes(image, token),
            _ => received(image, token) * sizes(image, token),
        });
        assert_eq!(foveate_device_tests::bits(plan.weights()), weights, "weights");
        all_decided
    })
}
