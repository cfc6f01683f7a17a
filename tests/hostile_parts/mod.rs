//! Operations with arguments drawn at random, many of them wrong: what backends must answer alike.

use std::panic::{AssertUnwindSafe, catch_unwind};

use foveate::{
    Images, Pixels, Result, Tensor, TokenPlan,
    backend::{
        Attraction, Cluster, Convolution, Depthwise, Epilogue, Frequency, GridBackend, Heads, Inattentive,
        KeepInPlace, Linear, Matching, Metric, Mlp, Norm, NormOver, Pooling, Predictor, ScoreRequest, Scores,
        Select, Weighting, Window,
    },
    model::Activation,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A backend that takes and gives host tensors.
pub(crate) type Any = dyn GridBackend<Tensor = Tensor, Plan = TokenPlan>;

/// What comes of an operation, as far as backends must agree on it.
#[derive(Debug)]
pub(crate) enum Outcome {
    Values(Vec<Tensor>),
    Plan(TokenPlan),
}

/// Arguments drawn at random. Extents that belong together are drawn once, and replaced here and there by others.
pub(crate) struct Draw {
    rng: StdRng,
    /// Images, tokens, heads, head dimension, grid, special tokens.
    extents: [usize; 7],
    /// How often an extent is replaced by another one.
    wrong: f64,
    /// How often a value is NaN or infinite.
    odd: f64,
}

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let grid = [rng.random_range(1..5), rng.random_range(1..5)];
        let special = rng.random_range(0..3);
        let extents = [
            rng.random_range(1..3),
            special + grid[0] * grid[1],
            rng.random_range(1..4),
            rng.random_range(1..20),
            grid[0],
            grid[1],
            special,
        ];
        Self {
            rng,
            extents,
            wrong: [0.0, 0.02, 0.2][seed as usize % 3],
            odd: [0.0, 0.0, 0.0, 0.02][seed as usize / 3 % 4],
        }
    }

    /// The same with heads of 8, 16 or 24 values: what kernels take, and wide enough that similarities do not tie.
    #[allow(dead_code, reason = "the processor takes any")]
    pub(crate) fn with_heads_of_eights(mut self) -> Self {
        self.extents[3] = 8 * (1 + self.extents[3] % 3);
        self
    }

    /// Whether NaN and infinity are among the values.
    #[allow(dead_code, reason = "the backends of the processor agree on them")]
    pub(crate) fn is_odd(&self) -> bool {
        self.odd > 0.0
    }

    fn yes(&mut self) -> bool {
        self.rng.random()
    }

    /// An extent, or now and then another.
    fn extent(&mut self, right: usize) -> usize {
        if !self.rng.random_bool(self.wrong) {
            return right;
        }
        match self.rng.random_range(0..4) {
            0 => 0,
            1 => right + 1,
            2 => right.saturating_sub(1),
            _ => self.rng.random_range(0..6),
        }
    }

    /// A number that is no extent of memory: any will do.
    fn number(&mut self, right: usize) -> usize {
        if self.rng.random_bool(self.wrong / 4.0) {
            usize::MAX - self.rng.random_range(0..3)
        } else {
            self.extent(right)
        }
    }

    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let mut shape: Vec<usize> = shape.iter().map(|&extent| self.extent(extent)).collect();
        if self.rng.random_bool(self.wrong / 4.0) {
            shape.pop();
        }
        if self.rng.random_bool(self.wrong / 8.0) {
            shape.resize(10, 1);
        }
        let count: usize = shape.iter().product();
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0];
        let values = (0..count).map(|_| {
            if self.rng.random_bool(self.odd) {
                odd[self.rng.random_range(0..5)]
            } else {
                self.rng.random_range(-1.0..1.0)
            }
        });
        let values = values.collect();
        Tensor::new(&shape, values).unwrap()
    }

    /// What no NaN is put into, and nothing below 0: sizes and attention.
    fn positive(&mut self, shape: &[usize]) -> Tensor {
        let tensor = self.tensor(shape);
        let shape = tensor.shape().to_vec();
        Tensor::new(&shape, tensor.data().iter().map(|x| x.abs()).collect()).unwrap()
    }

    fn linear(&mut self, outputs: usize, inputs: usize) -> Linear<Tensor> {
        let weight = self.tensor(&[outputs, inputs]);
        Linear { weight, bias: self.yes().then(|| self.tensor(&[outputs])) }
    }

    fn norm(&mut self, width: usize) -> Norm<Tensor> {
        Norm { weight: self.tensor(&[width]), bias: self.yes().then(|| self.tensor(&[width])), eps: 1e-3 }
    }

    fn plan(&mut self, batch: usize, n: usize) -> TokenPlan {
        let (batch, n) = (self.extent(batch), self.extent(n));
        let m = self.rng.random_range(0..=n);
        let image = |rng: &mut StdRng| {
            let mut groups = vec![Vec::new(); m];
            for token in 0..n {
                let group = rng.random_range(0..=m);
                if group < m {
                    groups[group].push((token as i32, rng.random_range(0.0..1.0)));
                }
            }
            groups
        };
        let (mut offsets, mut members, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..batch {
            let first = members.len();
            offsets.push(0);
            for group in image(&mut self.rng) {
                members.extend(group.iter().map(|(token, _)| *token));
                weights.extend(group.iter().map(|(_, weight)| *weight));
                offsets.push((members.len() - first) as i32);
            }
            members.resize(first + n, -1);
            weights.resize(first + n, 0.0);
        }
        TokenPlan::new(batch, n, m, offsets, members, weights).unwrap()
    }
}

pub(crate) type Operation = fn(&mut Draw) -> Box<dyn Fn(&Any) -> Result<Outcome>>;

fn values(tensors: impl IntoIterator<Item = Tensor>) -> Outcome {
    Outcome::Values(tensors.into_iter().collect())
}

fn scores(scores: Scores<Tensor>) -> impl Iterator<Item = Tensor> {
    scores.class.into_iter().chain(scores.received)
}

fn activation(draw: &mut Draw) -> Activation {
    let all = [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Silu,
        Activation::Relu,
        Activation::SwiGlu,
    ];
    all[draw.rng.random_range(0..6)]
}

/// Packed heads of so many parts.
fn packed(draw: &mut Draw, parts: usize) -> (Tensor, [usize; 2], Option<Tensor>) {
    let [b, n, h, d, ..] = draw.extents;
    let heads = [draw.number(h), draw.number(d)];
    (draw.tensor(&[b, n, parts * h * d]), heads, draw.yes().then(|| draw.positive(&[b, n])))
}

fn heads<'a>(
    packed: &'a Tensor,
    [heads, head_dim]: [usize; 2],
    sizes: Option<&'a Tensor>,
) -> Heads<'a, Tensor> {
    Heads { packed, heads, head_dim, scale: 0.5, sizes }
}

fn pooling(draw: &mut Draw) -> Pooling {
    if draw.yes() { Pooling::Weighted } else { Pooling::Max }
}

fn window(draw: &mut Draw) -> Window {
    Window { kernel: draw.number(3), stride: draw.number(2), padding: draw.number(1) }
}

fn images(draw: &mut Draw) -> Images {
    let [b, _, _, _, rows, columns, _] = draw.extents;
    let shape = [b, 3, 2 * rows, 2 * columns];
    let count = shape.iter().product();
    let pixels = if draw.yes() {
        Pixels::U8((0..count).map(|_| draw.rng.random()).collect())
    } else {
        Pixels::F32((0..count).map(|_| draw.rng.random()).collect())
    };
    Images::new(shape, pixels).unwrap()
}

pub(crate) const OPERATIONS: [(&str, Operation); 30] = [
    ("patches", |d| {
        let (images, patch) = (images(d), [d.number(2), d.number(2)]);
        let (mean, std) = (vec![0.5; d.extent(3)], vec![0.2; d.extent(3)]);
        Box::new(move |b| Ok(values([b.patches(&images, patch, &mean, &std)?])))
    }),
    ("unfold_images", |d| {
        let (images, window) = (images(d), window(d));
        let (mean, std) = (vec![0.5; d.extent(3)], vec![0.2; d.extent(3)]);
        Box::new(move |b| Ok(values([b.unfold_images(&images, window, &mean, &std)?])))
    }),
    ("unfold and convolve", |d| {
        let [b, _, _, c, rows, columns, _] = d.extents;
        let (x, grid, window) =
            (d.tensor(&[b, rows * columns, c]), [d.number(rows), d.number(columns)], window(d));
        let layer = d.linear(5, 9 * c);
        let activation = d.yes().then(|| activation(d));
        Box::new(move |b| {
            Ok(values([b.unfold(&x, grid, window)?, b.convolve(&x, grid, window, &layer, activation)?]))
        })
    }),
    ("embed", |d| {
        let [b, n, _, c, _, _, special] = d.extents;
        let patches = d.tensor(&[b, n, c]);
        let (prefix, position) =
            (d.yes().then(|| d.tensor(&[special, c])), d.yes().then(|| d.tensor(&[n, c])));
        Box::new(move |b| Ok(values([b.embed(&patches, prefix.as_ref(), position.as_ref())?])))
    }),
    ("layer_norm", |d| {
        let [b, n, h, c, ..] = d.extents;
        let (x, norm) = (d.tensor(&[b, n, h * c]), d.norm(h * c));
        Box::new(move |b| Ok(values([b.layer_norm(&x, &norm)?])))
    }),
    ("head_norm", |d| {
        let (packed, [heads, _], _) = packed(d, 3);
        let (norm, part) = (d.norm(d.extents[3]), d.number(1));
        Box::new(move |b| Ok(values([b.head_norm(packed.clone(), part, heads, &norm)?])))
    }),
    ("linear", |d| {
        let [b, n, h, c, ..] = d.extents;
        let x = d.tensor(&[b, n, c]);
        let layer = d.linear(6 * h, c);
        let rows = d.yes().then(|| d.number(h)..d.number(5 * h));
        let width = rows.as_ref().map_or(6 * h, |rows| rows.end.saturating_sub(rows.start).min(99));
        let add = d.yes().then(|| d.tensor(&[b, n, width]));
        let activation = d.yes().then(|| activation(d));
        Box::new(move |b| {
            let epilogue = match (&add, activation) {
                (Some(add), _) => Epilogue::AddTo(add.clone()),
                (None, Some(activation)) => Epilogue::Activation(activation),
                (None, None) => Epilogue::None,
            };
            let rows = match &rows {
                Some(rows) => layer.rows(rows.clone()),
                None => layer.all(),
            };
            Ok(values([b.linear(&x, rows, epilogue)?]))
        })
    }),
    ("norm_linear", |d| {
        let [b, n, h, c, ..] = d.extents;
        let x = d.tensor(&[b, n, c]);
        let (norm, layer) = (d.norm(c), d.linear(6 * h, c));
        Box::new(move |b| Ok(values([b.norm_linear(&x, &norm, layer.all())?])))
    }),
    ("mlp", |d| {
        let [b, n, h, c, ..] = d.extents;
        let x = d.tensor(&[b, n, c]);
        let normed = d.yes().then(|| d.tensor(&[b, n, c]));
        let hidden = if d.yes() { 32 } else { 6 * h };
        let (norm, inner) = (d.norm(c), d.yes().then(|| d.norm(hidden)));
        let (fc1, fc2) = (d.linear(hidden, c), d.linear(c, hidden));
        let activation = activation(d);
        Box::new(move |b| {
            let mlp = Mlp { norm: &norm, fc1: &fc1, activation, inner_norm: inner.as_ref(), fc2: &fc2 };
            Ok(values([b.mlp(x.clone(), normed.clone(), &mlp)?]))
        })
    }),
    ("attention", |d| {
        let (qkv, shape, sizes) = packed(d, 3);
        let request = ScoreRequest { class: d.yes(), received: d.yes() };
        Box::new(move |b| {
            let (context, found) = b.attention(&heads(&qkv, shape, sizes.as_ref()), request)?;
            Ok(values([context].into_iter().chain(scores(found))))
        })
    }),
    ("attention_scores", |d| {
        let (qk, shape, sizes) = packed(d, 2);
        let request = ScoreRequest { class: d.yes(), received: d.yes() };
        Box::new(move |b| {
            Ok(values(scores(b.attention_scores(&heads(&qk, shape, sizes.as_ref()), request)?)))
        })
    }),
    ("attention_reduced", |d| {
        let [b, n, h, dim, ..] = d.extents;
        let (qk, shape, sizes) = packed(d, 2);
        let (plan, pooling) = (d.plan(b, n), pooling(d));
        // The value of a group of nobody counts 0 times, or not at all.
        d.odd = 0.0;
        let reduced = d.tensor(&[b, plan.tokens_out(), h * dim]);
        Box::new(move |b| {
            Ok(values([b.attention_reduced(&heads(&qk, shape, sizes.as_ref()), &reduced, &plan, pooling)?]))
        })
    }),
    ("attention by a kept map", |d| {
        let [b, n, h, dim, ..] = d.extents;
        let (qk, shape, sizes) = packed(d, 2);
        let (plan, pooling) = (d.plan(b, n), pooling(d));
        let request = ScoreRequest { class: d.yes(), received: d.yes() };
        d.odd = 0.0;
        let reduced = d.tensor(&[b, plan.tokens_out(), h * dim]);
        Box::new(move |b| {
            let heads = heads(&qk, shape, sizes.as_ref());
            let (found, map) = b.attention_scores_and_map(&heads, request)?;
            let context = b.attention_reduced_of(map.as_ref(), &heads, &reduced, &plan, pooling)?;
            Ok(values([context].into_iter().chain(scores(found))))
        })
    }),
    ("matching of keys", |d| {
        let [_, n, _, _, _, _, special] = d.extents;
        let (qkv, shape, _) = packed(d, 3);
        let (special, merges, both_ways) = (d.number(special), d.number(n / 3), d.yes());
        Box::new(move |b| {
            Ok(Outcome::Plan(b.matching(&Matching {
                metric: Metric::Keys(&heads(&qkv, shape, None)),
                attraction: Attraction::Cosine,
                weighting: Weighting::Uniform,
                special,
                merges,
                both_ways,
            })?))
        })
    }),
    ("matching of rows", |d| {
        let [b, n, h, c, _, _, special] = d.extents;
        let (rows, received) = (d.tensor(&[b, n, c]), d.positive(&[b, h, n]));
        let sizes = d.yes().then(|| d.positive(&[b, n]));
        let taus = [[0.0, 1.0, 2.0][d.rng.random_range(0..3)], [0.0, 1.0, 20.0][d.rng.random_range(0..3)]];
        let (special, merges, both_ways) = (d.number(special), d.number(n / 4), d.yes());
        Box::new(move |b| {
            Ok(Outcome::Plan(b.matching(&Matching {
                metric: Metric::Rows(&rows),
                attraction: Attraction::MultiCriteria {
                    tau_similarity: taus[0],
                    informativeness: (&received, taus[1]),
                    size: (sizes.as_ref(), 40.0),
                },
                weighting: Weighting::SizeAndReceived(sizes.as_ref(), &received),
                special,
                merges,
                both_ways,
            })?))
        })
    }),
    ("keep_scores", |d| {
        let [b, n, _, _, _, _, special] = d.extents;
        let c = 8;
        let x = d.tensor(&[b, n, c]);
        let predictor = Predictor {
            norm: d.norm(c),
            hidden: d.linear(c, c),
            first: d.linear(c / 2, c),
            second: d.linear(c / 4, c / 2),
            last: d.linear(2, c / 4),
        };
        let special = d.number(special);
        Box::new(move |b| Ok(values([b.keep_scores(&x, &predictor, special)?])))
    }),
    ("keep_in_place", |d| {
        let [b, n, h, _, _, _, special] = d.extents;
        let (scores, special, keep, masked) =
            (d.tensor(&[b, h, n]), d.number(special), d.number(n / 2), d.yes());
        Box::new(move |b| {
            Ok(Outcome::Plan(b.keep_in_place(&KeepInPlace { scores: &scores, special, keep, masked })?))
        })
    }),
    ("token_scores", |d| {
        let [b, n, _, c, ..] = d.extents;
        let (x, selector) = (d.tensor(&[b, n, c]), d.linear(1, c));
        let noise = d.yes().then(|| d.tensor(&[b, n]));
        Box::new(move |b| Ok(values([b.token_scores(&x, &selector, noise.as_ref())?])))
    }),
    ("cluster", |d| {
        let [b, n, h, c, _, _, special] = d.extents;
        let (tokens, class_scores) = (d.tensor(&[b, n, c]), d.positive(&[b, h, n]));
        let (special, keep) = (d.number(special), d.number(n / 2));
        let inattentive = if d.yes() {
            Inattentive::Join
        } else {
            Inattentive::Peaks { pairs: d.number(n / 5), clusters: d.number(2), neighbours: d.number(2) }
        };
        Box::new(move |b| {
            let cluster =
                Cluster { tokens: &tokens, class_scores: &class_scores, special, keep, inattentive };
            Ok(Outcome::Plan(b.cluster(&cluster)?))
        })
    }),
    ("windows", |d| {
        let [b, n, _, c, rows, columns, special] = d.extents;
        let (x, grid) = (d.tensor(&[b, n, c]), [d.number(rows), d.number(columns)]);
        let (special, scale) = (d.number(special), d.number(2));
        let coarse = d.tensor(&[b, rows.div_ceil(2) * columns.div_ceil(2), c]);
        Box::new(move |b| {
            let pooled = b.pool_windows(&x, special, grid, scale);
            let added = b.add_windows(x.clone(), &coarse, special, grid, scale);
            Ok(values([pooled?, added?]))
        })
    }),
    ("select", |d| {
        let [b, n, h, _, _, _, special] = d.extents;
        let (class_scores, special, keep, fuse) =
            (d.tensor(&[b, h, n]), d.number(special), d.number(n / 2), d.yes());
        Box::new(move |b| {
            Ok(Outcome::Plan(b.select(&Select { class_scores: &class_scores, special, keep, fuse })?))
        })
    }),
    ("merge and unmerge", |d| {
        let [b, n, _, c, ..] = d.extents;
        let (x, plan, pooling) = (d.tensor(&[b, n, c]), d.plan(b, n), pooling(d));
        let sizes = d.yes().then(|| d.positive(&[b, n]));
        let norm = d.yes().then(|| d.norm(c));
        let left = d.tensor(&[b, plan.tokens_out(), c]);
        Box::new(move |b| {
            let merged = b.merge(&x, sizes.as_ref(), &plan, pooling, norm.as_ref());
            let back = b.unmerge(&left, &plan);
            let merged = merged?;
            Ok(values([merged.tokens, merged.sizes, back?].into_iter().chain(merged.normed)))
        })
    }),
    ("tokens and columns", |d| {
        let [b, n, _, c, ..] = d.extents;
        let (x, rows, columns) =
            (d.tensor(&[b, n, c]), d.number(0)..d.number(n / 2), d.number(0)..d.number(c / 2));
        Box::new(move |b| {
            let (rows, columns) = (b.tokens(&x, rows.clone()), b.columns(&x, columns.clone()));
            Ok(values([rows?, columns?]))
        })
    }),
    ("means and maxima", |d| {
        let [b, n, _, c, ..] = d.extents;
        let (x, first, sizes) = (d.tensor(&[b, n, c]), d.number(1), d.yes().then(|| d.positive(&[b, n])));
        Box::new(move |b| {
            let (mean, max) =
                (b.mean_tokens(&x, sizes.as_ref(), first), b.max_tokens(&x, sizes.as_ref(), first));
            Ok(values([mean?, max?]))
        })
    }),
    ("performer", |d| {
        let [b, n, _, c, ..] = d.extents;
        let (packed, w) = (d.tensor(&[b, n, 3 * c]), d.tensor(&[7, c]));
        Box::new(move |b| Ok(values([b.performer(&packed, &w)?])))
    }),
    ("read-outs", |d| {
        let [b, n, h, c, ..] = d.extents;
        let (left, right, same) = (d.tensor(&[b, c]), d.tensor(&[b, h]), d.tensor(&[b, c]));
        let (sizes, shape, hidden) =
            (d.yes().then(|| d.positive(&[b, n])), [d.number(b), d.number(n)], d.number(2));
        Box::new(move |b| {
            let all = [
                b.concat(&left, &right),
                b.average(&left, &same),
                b.hidden_sizes(sizes.as_ref(), shape, hidden),
            ];
            Ok(values(all.into_iter().collect::<Result<Vec<_>>>()?))
        })
    }),
    ("convolution", |d| {
        let [b, _, _, c, rows, columns, _] = d.extents;
        let (x, grid) = (d.tensor(&[b, rows * columns, c]), [d.number(rows), d.number(columns)]);
        // Weights beyond the border count 0 times, or not at all.
        d.odd = 0.0;
        let layer = Convolution {
            weight: d.tensor(&[9 * c, 5]),
            bias: d.tensor(&[5]),
            stride: d.number(2),
            activation: d.yes().then(|| activation(d)),
        };
        Box::new(move |b| Ok(values([b.convolution(&x, grid, &layer)?])))
    }),
    ("depthwise", |d| {
        let [b, _, _, c, rows, columns, _] = d.extents;
        let (x, grid) = (d.tensor(&[b, rows * columns, c]), [d.number(rows), d.number(columns)]);
        let layer = Depthwise {
            weight: d.tensor(&[9, c]),
            bias: d.tensor(&[c]),
            stride: d.number(1),
            before: d.yes().then(|| activation(d)),
            activation: d.yes().then(|| activation(d)),
        };
        Box::new(move |b| Ok(values([b.depthwise(&x, grid, &layer)?])))
    }),
    ("grid_norm and activate", |d| {
        let [b, _, _, c, rows, columns, _] = d.extents;
        let (x, norm, activation) = (d.tensor(&[b, rows * columns, c]), d.norm(c), activation(d));
        let over = [NormOver::Image, NormOver::Position, NormOver::Nothing][d.rng.random_range(0..3)];
        Box::new(move |b| {
            let (norm, active) = (b.grid_norm(&x, over, &norm), b.activate(x.clone(), activation));
            Ok(values([norm?, active?]))
        })
    }),
    ("frequency", |d| {
        let [b, _, g, s, rows, columns, _] = d.extents;
        let (x, grid) = (d.tensor(&[b, rows * columns, g * s]), [d.extent(rows), d.extent(columns)]);
        let filter = Frequency {
            w1: d.tensor(&[2, g, s, s]),
            b1: d.tensor(&[2, g, s]),
            w2: d.tensor(&[2, g, s, s]),
            b2: d.tensor(&[2, g, s]),
            activation: if d.yes() { Activation::Silu } else { activation(d) },
            threshold: 0.01,
        };
        let residual = d.yes().then(|| d.tensor(&[b, rows * columns, g * s]));
        Box::new(move |b| Ok(values([b.frequency(&x, grid, &filter, residual.as_ref())?])))
    }),
];

/// Whether both say the same. Plans are the same tokens; values are close, or no numbers both: sums in another order may differ
/// in which of infinite and undefined they are.
fn agree(name: &str, want: &Outcome, got: &Outcome) -> bool {
    match (want, got) {
        (Outcome::Plan(want), Outcome::Plan(got)) => {
            let who = |plan: &TokenPlan| (plan.tokens_in(), plan.offsets().to_vec(), plan.members().to_vec());
            who(want) == who(got)
        }
        (Outcome::Values(want), Outcome::Values(got)) => {
            want.len() == got.len()
                && want.iter().zip(got).all(|(want, got)| {
                    let scale =
                        want.data().iter().filter(|x| x.is_finite()).fold(1.0_f32, |max, x| max.max(x.abs()));
                    let same = |(want, got): (&f32, &f32)| {
                        (want - got).abs() <= 1e-4 * scale || !want.is_finite() && !got.is_finite()
                    };
                    want.shape() == got.shape() && want.data().iter().zip(got.data()).all(same)
                })
        }
        _ => panic!("{name}: results of two kinds"),
    }
}

/// Where two outcomes differ first.
fn difference(want: &Outcome, got: &Outcome) -> String {
    let (Outcome::Values(want), Outcome::Values(got)) = (want, got) else {
        return format!("{got:?} instead of {want:?}");
    };
    for (number, (want, got)) in want.iter().zip(got).enumerate() {
        if want.shape() != got.shape() {
            return format!("result {number} has shape {:?} instead of {:?}", got.shape(), want.shape());
        }
        for (at, (want, got)) in want.data().iter().zip(got.data()).enumerate() {
            if !((want - got).abs() <= 1e-4 * want.abs().max(1.0) || !want.is_finite() && !got.is_finite()) {
                return format!("result {number}, value {at}: {got} instead of {want}");
            }
        }
    }
    "results of another number".to_owned()
}

/// What comes of an operation on a backend, or the text of its panic.
pub(crate) type Answer = std::result::Result<Result<Outcome>, String>;

/// Runs an operation on a backend.
pub(crate) fn outcome(run: &dyn Fn(&Any) -> Result<Outcome>, backend: &Any) -> Answer {
    catch_unwind(AssertUnwindSafe(|| run(backend))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}

/// What is wrong with an answer, beside the reference's.
pub(crate) fn complaint(name: &str, want: &Answer, got: &Answer) -> Option<String> {
    match (want, got) {
        (Err(panic), _) => Some(format!("the reference panics: {panic}")),
        (_, Err(panic)) => Some(format!("panics: {panic}")),
        (Ok(Ok(_)), Ok(Err(error))) => Some(format!("refuses what the reference takes: {error}")),
        (Ok(Err(error)), Ok(Ok(_))) => Some(format!("takes what the reference refuses: {error}")),
        (Ok(Err(_)), Ok(Err(_))) => None,
        (Ok(Ok(want)), Ok(Ok(got))) => (!agree(name, want, got)).then(|| difference(want, got)),
    }
}
