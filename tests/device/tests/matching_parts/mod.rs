//! What the tests of matching share: random cases, launching them, and judging the plans.

pub(crate) mod check;
pub(crate) mod golden;

use cudarc::driver::CudaSlice;
use foveate::{
    Tensor, TokenPlan,
    backend::{self, Heads},
    cuda::{
        DevicePlan, Strided,
        matching::{Attraction, Matching, MatchingViews, MatchingWorkspace, Metric, Weighting, match_tokens},
    },
};
use foveate_device_tests::{Layout, Turn, Value, arrays, bits, groups_of, tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// The inputs of a matching, for both sides.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    /// 0: the rows themselves are compared, of `width`; else keys of so many heads of `width`.
    pub(crate) heads: usize,
    pub(crate) width: usize,
    /// Elements between rows, and before the first.
    pub(crate) gap: usize,
    pub(crate) lead: usize,
    pub(crate) special: usize,
    pub(crate) merges: usize,
    pub(crate) both_ways: bool,
    /// Temperatures of similarity, informativeness and size; none: the cosine.
    pub(crate) temperatures: Option<[f64; 3]>,
    pub(crate) sized: bool,
    /// 0: uniform, 1: size, 2: size and received.
    pub(crate) weighting: usize,
    pub(crate) oddities: Oddities,
    pub(crate) seed: u64,
}

/// What is planted into random rows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Oddities {
    /// Share of rows that repeat an earlier one.
    pub(crate) repeats: f64,
    pub(crate) zeros: f64,
    /// Share of rows with NaN, and with an infinity.
    pub(crate) nan: f64,
    /// Share of rows times 1e25, where the type holds that, or times 1e-30.
    pub(crate) extreme: f64,
    /// Attention received or sizes that are 0, infinite or NaN.
    pub(crate) criteria: f64,
}

/// The values of a case as the storage type holds them.
pub(crate) struct Data {
    /// (B, N, W): rows, or packed queries, keys and values.
    pub(crate) metric: Tensor,
    /// (B, 3, N).
    pub(crate) received: Tensor,
    /// (B, N).
    pub(crate) sizes: Option<Tensor>,
}

/// Heads of the attention received.
const SCORE_HEADS: usize = 3;

/// A plan to the bit, and its inverse.
pub(crate) type Planned = ((Vec<i32>, Vec<i32>, Vec<u32>), Vec<i32>);

impl Case {
    fn packed_width(&self) -> usize {
        if self.heads == 0 { self.width } else { 3 * self.heads * self.width }
    }

    pub(crate) fn data<T: Value>(&self) -> Data {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (batch, tokens, width) = (self.batch, self.tokens, self.packed_width());
        let mut rows: Vec<f32> = Vec::with_capacity(batch * tokens * width);
        let mut received = Vec::new();
        let mut sizes: Vec<f32> = Vec::new();
        let odd = self.oddities;
        let huge = if T::of(1e25).wide().is_finite() { 1e25 } else { 256.0 };
        for image in 0..batch {
            let start = image * tokens;
            let mut scores = vec![0.0_f32; SCORE_HEADS * tokens];
            for token in 0..tokens {
                let mut row: Vec<f32> = (0..width).map(|_| rng.random_range(-1.0_f32..1.0)).collect();
                let mut size = rng.random_range(1_u8..5).into();
                for head in 0..SCORE_HEADS {
                    scores[head * tokens + token] = rng.random_range(0.0_f32..1.0).powi(2) + 1e-6;
                }
                if rng.random_bool(odd.extreme) {
                    let scale = if rng.random_bool(0.5) { huge } else { 1e-30 };
                    row.iter_mut().for_each(|x| *x *= scale);
                }
                if rng.random_bool(odd.zeros) {
                    row.fill(0.0);
                }
                if rng.random_bool(odd.nan) {
                    row[width / 2] = if rng.random_bool(0.7) { f32::NAN } else { f32::INFINITY };
                }
                if rng.random_bool(odd.criteria) {
                    let values = [0.0, f32::INFINITY, f32::NAN, 1e-42, 3e38];
                    scores[token] = values[rng.random_range(0..values.len())];
                    size = values[rng.random_range(0..values.len())];
                }
                if token > 0 && rng.random_bool(odd.repeats) {
                    let from = rng.random_range(0..token);
                    row = rows[(start + from) * width..(start + from + 1) * width].to_vec();
                    size = sizes[start + from];
                    for head in 0..SCORE_HEADS {
                        scores[head * tokens + token] = scores[head * tokens + from];
                    }
                }
                rows.extend(row.iter().map(|&x| T::of(x).wide()));
                sizes.push(size);
            }
            received.extend(scores);
        }
        Data {
            metric: tensor(&[batch, tokens, width], rows),
            received: tensor(&[batch, SCORE_HEADS, tokens], received),
            sizes: self.sized.then(|| tensor(&[batch, tokens], sizes)),
        }
    }

    /// Calls `with` with the reference's description of the case.
    pub(crate) fn with_reference<R>(
        &self,
        data: &Data,
        with: impl FnOnce(&backend::Matching<'_, Tensor>) -> R,
    ) -> R {
        let heads =
            Heads { packed: &data.metric, heads: self.heads, head_dim: self.width, scale: 1.0, sizes: None };
        let sizes = data.sizes.as_ref();
        with(&backend::Matching {
            metric: if self.heads == 0 {
                backend::Metric::Rows(&data.metric)
            } else {
                backend::Metric::Keys(&heads)
            },
            attraction: self.temperatures.map_or(
                backend::Attraction::Cosine,
                |[similarity, received, size]| backend::Attraction::MultiCriteria {
                    tau_similarity: similarity,
                    informativeness: (&data.received, received),
                    size: (sizes, size),
                },
            ),
            weighting: match self.weighting {
                0 => backend::Weighting::Uniform,
                1 => backend::Weighting::Size(sizes),
                _ => backend::Weighting::SizeAndReceived(sizes, &data.received),
            },
            special: self.special,
            merges: self.merges,
            both_ways: self.both_ways,
        })
    }

    /// The device's plan.
    pub(crate) fn on_device<T: Value>(&self, turn: &Turn, data: &Data) -> TokenPlan {
        let layout =
            Layout { shape: [self.batch, self.tokens, self.packed_width()], gap: self.gap, lead: self.lead };
        let metric: CudaSlice<T> = turn.upload(&layout.spread(data.metric.data()));
        let received: CudaSlice<f32> = turn.upload(data.received.data());
        let sizes: Option<CudaSlice<f32>> = data.sizes.as_ref().map(|sizes| turn.upload(sizes.data()));
        let rows = layout.over(metric.slice(self.lead..));
        let scores = || Strided::new(received.as_view(), [self.batch, SCORE_HEADS, self.tokens]);
        let sizes = || sizes.as_ref().map(CudaSlice::as_view);
        let matching = Matching {
            metric: if self.heads == 0 {
                Metric::Rows(rows)
            } else {
                Metric::Keys { packed: rows, heads: self.heads, head_dim: self.width }
            },
            attraction: self.temperatures.map_or(Attraction::Cosine, |[similarity, received, size]| {
                Attraction::MultiCriteria {
                    tau_similarity: similarity,
                    informativeness: (scores(), received),
                    size: (sizes(), size),
                }
            }),
            weighting: match self.weighting {
                0 => Weighting::Uniform,
                1 => Weighting::Size(sizes()),
                _ => Weighting::SizeAndReceived(sizes(), scores()),
            },
            special: self.special,
            merges: self.merges,
            both_ways: self.both_ways,
        };
        let mut workspace = MatchingWorkspace::new(&turn.stream, self.batch, self.tokens).unwrap();
        let (plan, groups) = launched(turn, &matching, &mut workspace, self.batch, self.tokens);
        assert_eq!(groups, groups_of(&plan), "groups are the inverse of the plan");
        plan
    }
}

/// The plan of a matching, and its fourth array.
pub(crate) fn launched<T: Value>(
    turn: &Turn,
    matching: &MatchingViews<'_, T>,
    workspace: &mut MatchingWorkspace,
    batch: usize,
    tokens: usize,
) -> (TokenPlan, Vec<i32>) {
    let stream = &turn.stream;
    let mut plan = DevicePlan::new(stream, batch, tokens, tokens - matching.merges).unwrap();
    match_tokens(&turn.device, stream, matching, workspace, &mut plan).unwrap();
    (plan.download(stream).unwrap(), plan.download_groups(stream).unwrap())
}

/// A plan as something to compare.
pub(crate) fn planned(plan: &TokenPlan) -> Planned {
    (arrays(plan), groups_of(plan))
}

/// The weights that the members of a plan should have, by the rule of the reference: in proportion to `weight`, equal where
/// those sum to nothing usable, 1 alone.
pub(crate) fn weights_of(plan: &TokenPlan, weight: impl Fn(usize, usize) -> f32) -> Vec<u32> {
    let mut all = Vec::new();
    for image in 0..plan.batch() {
        for token in 0..plan.tokens_out() {
            let raw: Vec<f32> =
                plan.group(image, token).0.iter().map(|&member| weight(image, member as usize)).collect();
            let total: f32 = raw.iter().sum();
            let usable = total.is_finite() && total > 0.0;
            all.extend(raw.iter().map(|&weight| match raw.len() {
                1 => 1.0,
                _ if usable => weight / total,
                count => 1.0 / count as f32,
            }));
        }
    }
    bits(&all)
}
