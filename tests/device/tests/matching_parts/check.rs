//! Judging a plan by the reference's scores and by how far two `f32` computations of a score may be apart.
//!
//! The bound. A cosine is a sum of D products of numbers whose squares sum to 1, each rounded to within `eps/2` of a partial
//! sum of magnitude at most 1, and two lengths whose own sums are rounded likewise. Errors of D roundings that are
//! independent add up to their size times √D: `4·eps·√D` leaves eight times that size. Reference and kernel add in different
//! orders, so two scores may be `8·eps·√D` apart. A criterion `f = ratio^e` is within `(2·|ln f| + 4)·eps` of itself in either
//! (ratio and exponent are rounded, their product is what an exponential magnifies), and a power of the similarity within
//! `(2·|ln f| + 2·e + 3)·eps` (the hardware's logarithm is off by 2^-22 around 1). Where criteria or products come near the smallest
//! numbers of `f32`, their steps count instead: four criteria and a similarity, at most 1 each, and their four products are within
//! half a step (the reference) or one (the device) of what they should be, so that two products may be 13.5 steps apart.

use foveate::{
    Tensor, TokenPlan,
    backend::{self, Attraction},
    reference::matching::{Matches, attractions, match_scores, metric_rows},
};

use super::{Case, Data, planned, weights_of};

const EPS: f64 = f32::EPSILON as f64;
/// Between the smallest numbers of `f32`.
const STEP: f64 = 1.401_298_464_324_817e-45;
/// How many ways of explaining a plan are tried.
const EXPLANATIONS: u32 = 4096;

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
            let slack = spread + relative * f64::from(score[at]).abs() + 14.0 * STEP;
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

/// What the best of a token's scores can be on either side, and the token's class.
#[derive(Clone, Copy)]
struct Best {
    high: f64,
    low: f64,
    class: usize,
}

impl Best {
    fn of(class: usize, pairs: impl Iterator<Item = Pair>) -> Self {
        let (high, low) = pairs.fold((f64::NEG_INFINITY, f64::NEG_INFINITY), |(high, low), pair| {
            (high.max(pair.high()), low.max(pair.low()))
        });
        Self { high, low, class }
    }

    /// Whether this may stand before the other in descending order.
    fn may_precede(self, other: Self) -> bool {
        self.high >= other.low
    }

    /// Whether both sides put the two in the same order, or see a tie, without doubt.
    fn definite(self, other: Self) -> bool {
        let exact = |best: Self| best.high == best.low;
        self.class == other.class
            || self.low > other.high
            || other.low > self.high
            || exact(self) && exact(other)
    }
}

/// Whether both sides must decide alike everything that shows in the plan.
fn decided(scores: &Scores, matches: &Matches, special: usize) -> bool {
    let (sa, sb) = (special.div_ceil(2), special / 2);
    let candidates = sb..scores.columns;
    // A pair's own slack does not say how far the best of its token may be: another pair, lower here, may be it there.
    let best = |a: usize| Best::of(scores.class[2 * a], candidates.clone().map(|b| scores.pair(a, b)));
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
    let best = |b: usize| Best::of(scores.class[2 * b + 1], places().map(|place| at(b, place)));
    forward
        && back.merged.iter().all(|&(b, place)| {
            places().all(|other| other == place || at(b, place).definite(at(b, other)))
                && back.kept.iter().all(|&other| best(b).definite(best(other)))
        })
        && back.kept.windows(2).all(|two| best(two[0]).definite(best(two[1])))
}

/// Checks that some course of the matching, every choice of it optimal within the slack of the scores, ends in one image's plan.
fn optimal(scores: &Scores, case: &Case, groups: &[i32], image: usize) {
    let course = Course::new(scores, case, groups);
    course
        .special_tokens()
        .and_then(|()| course.search())
        .unwrap_or_else(|why| panic!("image {image}: {why}"));
}

/// One image's plan, to be explained: which token a group is named after does not show in it.
struct Course<'a> {
    scores: &'a Scores,
    case: &'a Case,
    groups: &'a [i32],
    /// Of A tokens, over all candidates.
    best: Vec<Best>,
    /// Tokens that leave A.
    forward: usize,
    /// The first group of B.
    tail: usize,
}

impl<'a> Course<'a> {
    fn new(scores: &'a Scores, case: &'a Case, groups: &'a [i32]) -> Self {
        let (na, nb) = (case.tokens.div_ceil(2), case.tokens / 2);
        let (sa, sb) = (case.special.div_ceil(2), case.special / 2);
        let forward = if case.both_ways { case.merges / 2 } else { case.merges };
        let best = |a: usize| Best::of(scores.class[2 * a], (sb..nb).map(|b| scores.pair(a, b)));
        let best = (0..na).map(best).collect();
        Self { scores, case, groups, best, forward, tail: case.special + na - sa - forward }
    }

    fn a(&self) -> std::ops::Range<usize> {
        self.case.special.div_ceil(2)..self.case.tokens.div_ceil(2)
    }

    fn b(&self) -> std::ops::Range<usize> {
        self.case.special / 2..self.case.tokens / 2
    }

    fn group_of_a(&self, a: usize) -> usize {
        self.groups[2 * a] as usize
    }

    fn group_of_b(&self, b: usize) -> usize {
        self.groups[2 * b + 1] as usize
    }

    fn special_tokens(&self) -> Result<(), String> {
        let stay = (0..self.case.special).all(|token| self.groups[token] as usize == token);
        stay.then_some(()).ok_or_else(|| "a special token does not stay where it is".into())
    }

    /// Whether an A token has chosen, of all, one of its group.
    fn chosen(&self, a: usize) -> bool {
        let group = self.group_of_a(a);
        self.b().any(|b| self.group_of_b(b) == group && self.scores.pair(a, b).high() >= self.best[a].low)
    }

    /// Looks for tokens of A, one for each of its groups, that can have stayed.
    fn search(&self) -> Result<(), String> {
        let mut able = Vec::new();
        for slot in self.case.special..self.tail {
            let here: Vec<usize> = self.a().filter(|&a| self.group_of_a(a) == slot).collect();
            // The others have chosen a token of the group, and went before.
            let stays = |&a: &usize| {
                here.iter().all(|&other| {
                    other == a || self.chosen(other) && self.best[other].may_precede(self.best[a])
                })
            };
            able.push(here.iter().copied().filter(stays).collect::<Vec<usize>>());
            if able.last().is_some_and(Vec::is_empty) {
                return Err(format!("no token of A can have stayed in group {slot}, where {here:?} are"));
            }
        }
        if self.case.both_ways {
            let special = self.case.special;
            still_chosen(self.scores, &mut able, |slot| {
                self.b().filter(move |&b| self.group_of_b(b) == special + slot)
            });
        }
        let mut why = String::from("no order of the tokens of A that stayed");
        let mut left = EXPLANATIONS;
        if self.choose(&able, &mut Vec::new(), &mut left, &mut why) {
            Ok(())
        } else if left == 0 {
            Err(format!("none of {EXPLANATIONS} ways, and there are more; of the last: {why}"))
        } else {
            Err(why)
        }
    }

    /// Goes through the choices for the groups behind `kept`; `why` is left with what is wrong with the last.
    fn choose(&self, able: &[Vec<usize>], kept: &mut Vec<usize>, left: &mut u32, why: &mut String) -> bool {
        let Some(candidates) = able.get(kept.len()) else {
            *left = left.saturating_sub(1);
            return self.explains(kept).map_err(|wrong| *why = wrong).is_ok();
        };
        for &a in candidates {
            let in_order = if self.case.special > 0 {
                kept.last().is_none_or(|&before| before < a)
            } else {
                kept.iter().all(|&before| self.best[before].may_precede(self.best[a]))
            };
            if in_order && *left > 0 {
                kept.push(a);
                if self.choose(able, kept, left, why) {
                    return true;
                }
                kept.pop();
            }
        }
        false
    }

    /// Whether everything else is optimal if these tokens stayed in A.
    fn explains(&self, kept: &[usize]) -> Result<(), String> {
        let must = |holds: bool, what: &dyn Fn() -> String| if holds { Ok(()) } else { Err(what()) };
        let left: Vec<usize> = self.a().filter(|a| !kept.contains(a)).collect();
        must(left.len() == self.forward, &|| format!("{} tokens left A", left.len()))?;
        for &a in &left {
            must(self.chosen(a), &|| format!("token {} has a better partner", 2 * a))?;
            for &other in kept {
                must(self.best[a].may_precede(self.best[other]), &|| {
                    format!("token {} should leave before {}", 2 * other, 2 * a)
                })?;
            }
        }
        if !self.case.both_ways {
            let first = self.b().start;
            let in_order = self.b().all(|b| self.group_of_b(b) == self.tail + b - first);
            return must(in_order, &|| "B is not in order of position".into());
        }
        let best =
            |b: usize| Best::of(self.scores.class[2 * b + 1], kept.iter().map(|&a| self.scores.pair(a, b)));
        let (left, mut stayed): (Vec<usize>, Vec<usize>) =
            self.b().partition(|&b| self.group_of_b(b) < self.tail);
        must(left.len() == self.case.merges - self.forward, &|| format!("{} tokens left B", left.len()))?;
        for &b in &left {
            let pair = self.scores.pair(kept[self.group_of_b(b) - self.case.special], b);
            must(pair.high() >= best(b).low, &|| format!("token {} has a better partner", 2 * b + 1))?;
            for &other in &stayed {
                must(best(b).may_precede(best(other)), &|| {
                    format!("token {} should leave before {}", 2 * other + 1, 2 * b + 1)
                })?;
            }
        }
        stayed.sort_by_key(|&b| self.group_of_b(b));
        let bests: Vec<Best> = stayed.iter().map(|&b| best(b)).collect();
        let in_order =
            (1..bests.len()).all(|at| bests[..at].iter().all(|before| before.may_precede(bests[at])));
        must(in_order, &|| "B is not in descending order".into())
    }
}

/// Of several that may have stayed in a slot, leaves those whom the slot's tokens of B can have chosen before whoever stayed in the
/// other slots. Where tokens repeat each other, several go first with the highest score there is, and only this tells who.
fn still_chosen<I: Iterator<Item = usize>>(
    scores: &Scores,
    able: &mut [Vec<usize>],
    members: impl Fn(usize) -> I,
) {
    loop {
        let mut fewer = false;
        for slot in 0..able.len() {
            for b in members(slot) {
                if able[slot].len() == 1 {
                    break;
                }
                // Somebody else offered at least this.
                let least = |able: &Vec<usize>| {
                    able.iter().map(|&a| scores.pair(a, b).low()).fold(f64::INFINITY, f64::min)
                };
                let others = able.iter().enumerate().filter(|&(other, _)| other != slot);
                let offered = others.map(|(_, able)| least(able)).fold(f64::NEG_INFINITY, f64::max);
                let chosen = |&a: &usize| scores.pair(a, b).high() >= offered;
                // Where none is left, the plan is wrong; what is checked with any of them says so.
                if able[slot].iter().any(chosen) {
                    let before = able[slot].len();
                    able[slot].retain(chosen);
                    fewer |= able[slot].len() < before;
                }
            }
        }
        if !fewer {
            return;
        }
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
