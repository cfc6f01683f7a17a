//! Decoupled tokens (BAT, MSTM) on every backend: the same groups and the same weights as the reference's, whose decisions are
//! the specification's.

use foveate::{
    Tensor,
    backend::{Backend, Cluster, Inattentive},
    reference::Reference,
};
use proptest::prelude::*;

mod backends;
use backends::backends;

#[derive(Clone, Debug)]
struct Case {
    shape: [usize; 3],
    heads: usize,
    special: usize,
    keep: usize,
    inattentive: Inattentive,
    /// Values of tokens and scores that differ: few make ties.
    levels: [u32; 2],
    seed: u32,
}

fn values(count: usize, levels: u32, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let mixed = (i as u32 ^ seed).wrapping_mul(2_654_435_761).wrapping_add(seed);
        (mixed ^ mixed >> 15).wrapping_mul(2_246_822_519) >> 8
    };
    (0..count).map(|i| (value(i) % levels) as f32 / levels as f32 - 0.45).collect()
}

impl Case {
    fn tokens(&self) -> Tensor {
        let count = self.shape.iter().product();
        Tensor::new(&self.shape, values(count, self.levels[0], self.seed)).unwrap()
    }

    fn scores(&self) -> Tensor {
        let [batch, n, _] = self.shape;
        let values = values(batch * self.heads * n, self.levels[1], !self.seed);
        let values = values.into_iter().map(|x| x + 0.5).collect();
        Tensor::new(&[batch, self.heads, n], values).unwrap()
    }

    fn cluster<'a>(&self, tokens: &'a Tensor, class_scores: &'a Tensor) -> Cluster<'a, Tensor> {
        let Self { special, keep, inattentive, .. } = *self;
        Cluster { tokens, class_scores, special, keep, inattentive }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let widths = prop::sample::select(vec![1_usize, 3, 8, 16, 30, 48, 67]);
    let tokens = prop::sample::select(vec![1_usize, 2, 3, 9, 17, 33, 50, 65, 90]);
    let peaks = (0_usize..8, 0_usize..7, prop::sample::select(vec![0_usize, 0, 1, 3, 50]));
    let levels = prop::sample::select(vec![1_u32, 2, 5, 1 << 20, 1 << 20, 1 << 20]);
    let counts = (0_usize..4, 0.0..=1.0_f64, any::<bool>(), peaks);
    ((1_usize..6, tokens, widths, 1_usize..4), counts, (levels.clone(), levels), any::<u32>()).prop_map(
        |((batch, n, width, heads), (special, share, join, peaks), levels, seed)| {
            let special = special.min(n - 1);
            let keep = (((n - special) as f64 * share).round() as usize).max(1);
            let (pairs, clusters, neighbours) = peaks;
            let inattentive =
                if join { Inattentive::Join } else { Inattentive::Peaks { pairs, clusters, neighbours } };
            let levels = [levels.0, levels.1];
            Case { shape: [batch, n, width], heads, special, keep, inattentive, levels, seed }
        },
    )
}

proptest! {
    /// To the bit, for the sums that decide are in double precision on both sides.
    #[test]
    fn plans_are_the_references(case in case()) {
        let (tokens, scores) = (case.tokens(), case.scores());
        let cluster = case.cluster(&tokens, &scores);
        let want = Reference::new().cluster(&cluster).unwrap();
        for backend in backends() {
            prop_assert_eq!(&backend.cluster(&cluster).unwrap(), &want);
        }
    }
}

fn some(n: usize, keep: usize, inattentive: Inattentive) -> Case {
    Case { shape: [2, n, 64], heads: 3, special: 1, keep, inattentive, levels: [1 << 20; 2], seed: 4 }
}

const fn peaks(pairs: usize, clusters: usize, neighbours: usize) -> Inattentive {
    Inattentive::Peaks { pairs, clusters, neighbours }
}

#[test]
fn published_counts_and_many_tokens() {
    for (tokens, keep, inattentive) in [
        (197, 138, Inattentive::Join),
        (197, 138, peaks(13, 13, 0)),
        (197, 98, peaks(9, 9, 5)),
        (600, 300, Inattentive::Join),
        (600, 310, peaks(40, 40, 0)),
    ] {
        let case = some(tokens, keep, inattentive);
        let (tokens, scores) = (case.tokens(), case.scores());
        let cluster = case.cluster(&tokens, &scores);
        let want = Reference::new().cluster(&cluster).unwrap();
        for backend in backends() {
            assert_eq!(backend.cluster(&cluster).unwrap(), want, "{case:?}");
        }
    }
}

/// Tokens and scores that are no numbers rank behind all others, and every token has a place, or none, as in the reference.
#[test]
fn what_is_no_number_ranks_last() {
    let fill = |x: &mut Tensor, token: usize, value: f32| x.data_mut()[64 * token..][..64].fill(value);
    for inattentive in [Inattentive::Join, peaks(3, 4, 0), peaks(3, 4, 3)] {
        for kind in 0..7 {
            let case = some(40, 20, inattentive);
            let (mut tokens, mut scores) = (case.tokens(), case.scores());
            match kind {
                0 => (0..40).step_by(3).for_each(|token| fill(&mut tokens, token, f32::NAN)),
                1 => tokens.data_mut().fill(f32::NAN),
                2 => (0..40).step_by(4).for_each(|token| fill(&mut tokens, token, f32::INFINITY)),
                3 => fill(&mut tokens, 5, 3e38),
                4 => tokens.data_mut().iter_mut().for_each(|x| *x *= 1e-40),
                5 => tokens.data_mut().fill(0.0),
                _ => scores.data_mut().iter_mut().step_by(7).for_each(|x| *x = f32::NAN),
            }
            let cluster = case.cluster(&tokens, &scores);
            let want = Reference::new().cluster(&cluster).unwrap();
            for backend in backends() {
                let got = backend.cluster(&cluster).unwrap();
                // Weights of no number are not equal to themselves.
                let parts = |plan: &foveate::TokenPlan| {
                    let weights: Vec<_> = plan.weights().iter().map(|w| w.to_bits()).collect();
                    (plan.offsets().to_vec(), plan.members().to_vec(), weights)
                };
                assert_eq!(parts(&got), parts(&want), "{inattentive:?}, kind {kind}");
            }
        }
    }
}

#[test]
fn impossible_counts_are_named() {
    let case = some(10, 10, Inattentive::Join);
    let (tokens, scores) = (case.tokens(), case.scores());
    for backend in backends() {
        let said = |keep, scores: &Tensor| {
            let cluster = Case { keep, ..case.clone() };
            backend.cluster(&cluster.cluster(&tokens, scores)).unwrap_err().to_string()
        };
        assert!(said(10, &scores).contains("cannot keep 10 of 10 tokens of which 1 are special"));
        assert!(said(0, &scores).contains("cannot keep 0 of 10"));
        assert!(said(3, &Tensor::zeros(&[2, 3, 9])).contains("class scores has shape [2, 3, 9]"));
    }
}
