//! kernels/attention*.cu against the reference.
#![cfg(feature = "cuda")]

use cudarc::driver::{CudaSlice, CudaView};
use foveate::{
    Tensor, TokenPlan,
    backend::{Backend, Heads, Pooling, ScoreRequest},
    cuda::{
        Cuda, DevicePlan, Strided,
        attention::{
            Attention, Scores, Split, attention, attention_folded, attention_grouped, attention_scores,
            needs_log_sum_exp,
        },
    },
    reference::Reference,
};
use foveate_device_tests::{Layout, Turn, Value, random, random_plan, tensor};
use half::{bf16, f16};
use proptest::prelude::*;

/// Below, at and above the edges of tiles, of resident kernels and of what they hand out.
const TOKENS: [usize; 26] = [
    1, 2, 3, 8, 15, 16, 17, 33, 50, 63, 64, 65, 99, 128, 129, 160, 161, 192, 193, 197, 208, 209, 257, 272,
    273, 321,
];
const DIMS: [usize; 8] = [32, 40, 48, 64, 72, 80, 96, 128];

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    dim: usize,
    /// Values are drawn from -spread..spread.
    spread: f32,
    /// None, ones, or anything from 0 on.
    sizes: u8,
    class_rows: usize,
    received: bool,
    log_sum_exp: bool,
    split: Split,
    /// Elements between rows of the output.
    gap: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    // The head dimension of ViTs half of the time.
    let dim = prop_oneof![Just(64_usize), prop::sample::select(&DIMS)];
    let shape = (1_usize..3, prop::sample::select(&TOKENS), 1_usize..3, dim);
    let spread = prop_oneof![4 => Just(1.0_f32), 1 => Just(0.0_f32), 1 => Just(12.0)];
    let scores = (0_u8..3, 0_usize..4, any::<(bool, bool)>());
    (shape, spread, scores, any::<bool>(), prop::sample::select(vec![0_usize, 8]), any::<u64>()).prop_map(
        |(
            (batch, tokens, heads, dim),
            spread,
            (sizes, class_rows, (received, log_sum_exp)),
            least,
            gap,
            seed,
        )| Case {
            batch,
            tokens,
            heads,
            dim,
            spread,
            sizes,
            class_rows: class_rows.min(tokens),
            received,
            log_sum_exp,
            split: if least { Split::Least } else { Split::Auto },
            gap,
            seed,
        },
    )
}

impl Case {
    fn scale(&self) -> f32 {
        (self.dim as f32).powf(-0.5)
    }

    fn width(&self) -> usize {
        self.heads * self.dim
    }

    fn packed<T: Value>(&self, parts: usize) -> Tensor {
        let shape = [self.batch, self.tokens, parts * self.width()];
        tensor(&shape, random::<T>(shape.iter().product(), self.seed, self.spread))
    }

    /// Sizes of tokens; some are 0, never all of an image.
    fn token_sizes(&self) -> Option<Tensor> {
        let count = self.batch * self.tokens;
        let values = match self.sizes {
            0 => return None,
            1 => vec![1.0; count],
            _ => {
                let draw = random::<f32>(count, self.seed ^ 5, 4.0);
                let size = |(i, x): (usize, f32)| if i % self.tokens == 0 { 1.0 } else { x.max(0.0).ceil() };
                draw.into_iter().enumerate().map(size).collect()
            }
        };
        Some(tensor(&[self.batch, self.tokens], values))
    }

    /// The relative error of a probability: that of its score times log e, where sums of D products in another order, the scaling and
    /// the approximate exponential (2^-22) count.
    fn relative_error(&self) -> f32 {
        let largest = self.dim as f32 * self.spread * self.spread * self.scale();
        16.0 * f32::EPSILON * (2.0 + largest)
    }
}

/// Part `part` of packed rows on the device.
fn view<'a, T>(packed: &'a CudaSlice<T>, case: &Case, parts: usize, part: usize) -> Strided<CudaView<'a, T>> {
    let (row, width) = (parts * case.width(), case.width());
    Strided::new(packed.slice(part * width..), [case.batch, case.tokens, width])
        .with_strides([case.tokens * row, row])
}

/// Queries and keys of packed rows on the device.
fn call<'a, T>(
    packed: &'a CudaSlice<T>,
    sizes: Option<&'a CudaSlice<f32>>,
    case: &Case,
    parts: usize,
) -> Attention<'a, T> {
    Attention {
        q: view(packed, case, parts, 0),
        k: view(packed, case, parts, 1),
        heads: case.heads,
        scale: case.scale(),
        sizes: sizes.map(CudaSlice::as_view),
        split: case.split,
    }
}

/// What the device gives: output, class rows, received attention, logarithms of sums.
type Given = (Vec<f32>, Option<Vec<f32>>, Option<Vec<f32>>, Option<Vec<f32>>);

fn on_device<T: Value>(turn: &Turn, case: &Case, packed: &Tensor, values: bool) -> Given {
    let parts = if values { 3 } else { 2 };
    let memory: CudaSlice<T> = turn.upload(packed.data());
    let sizes: Option<CudaSlice<f32>> = case.token_sizes().map(|sizes| turn.upload(sizes.data()));
    let call = call(&memory, sizes.as_ref(), case, parts);
    let maps = case.batch * case.heads * case.tokens;
    let room = |count: usize| turn.upload::<f32>(&vec![f32::NAN; count]);
    let mut class = (case.class_rows > 0).then(|| room(maps * case.class_rows));
    let mut received = case.received.then(|| room(maps));
    let needed = needs_log_sum_exp(T::DTYPE, case.tokens, case.dim, case.class_rows > 0, case.received);
    let mut lse = (case.log_sum_exp || needed).then(|| room(maps));
    let mut scores = Scores {
        class_rows: class.as_mut().map(|class| (class.as_view_mut(), case.class_rows)),
        received: received.as_mut().map(CudaSlice::as_view_mut),
        log_sum_exp: lse.as_mut().map(CudaSlice::as_view_mut),
    };
    let layout = Layout { shape: [case.batch, case.tokens, case.width()], gap: case.gap, lead: case.gap };
    let mut out: CudaSlice<T> = turn.upload(&layout.blank());
    let (device, stream) = (&turn.device, &turn.stream);
    if values {
        let mut target = layout.over(out.slice_mut(layout.lead..));
        attention(device, stream, &call, &view(&memory, case, parts, 2), &mut target, &mut scores).unwrap();
    } else {
        attention_scores(device, stream, &call, &mut scores).unwrap();
    }
    let back = |x: Option<CudaSlice<f32>>| x.map(|x| turn.download(&x));
    (layout.gather(&turn.download(&out)), back(class), back(received), back(lse))
}

/// The softmax rows of one head, in f64.
fn rows(case: &Case, packed: &Tensor, parts: usize, image: usize, head: usize) -> Vec<Vec<f64>> {
    let (row, n) = (parts * case.width(), case.tokens);
    let of = |token: usize, part: usize| {
        let at = part * case.width() + head * case.dim;
        &packed.item(image)[token * row + at..][..case.dim]
    };
    let sizes = case.token_sizes();
    let bias = |key: usize| sizes.as_ref().map_or(0.0, |sizes| f64::from(sizes.item(image)[key]).ln());
    let score = |q: usize, k: usize| {
        let dot: f64 = of(q, 0).iter().zip(of(k, 1)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        dot * f64::from(case.scale()) + bias(k)
    };
    (0..n).map(|q| (0..n).map(|k| score(q, k)).collect()).collect()
}

fn close(name: &str, given: f32, expected: f32, tolerance: f32) -> Result<(), TestCaseError> {
    prop_assert!(
        given == expected || (given - expected).abs() <= tolerance,
        "{name}: {given}, expected {expected} within {tolerance}"
    );
    Ok(())
}

fn check<T: Value>(turn: &Turn, case: &Case, values: bool) -> Result<(), TestCaseError> {
    let parts = if values { 3 } else { 2 };
    let packed = case.packed::<T>(parts);
    let sizes = case.token_sizes();
    let heads = Heads {
        packed: &packed,
        heads: case.heads,
        head_dim: case.dim,
        scale: case.scale(),
        sizes: sizes.as_ref(),
    };
    let request = ScoreRequest { class: true, received: true };
    let (context, scores) = if values {
        let (context, scores) = Reference::new().attention(&heads, request).unwrap();
        (Some(context), scores)
    } else {
        (None, Reference::new().attention_scores(&heads, request).unwrap())
    };
    let (out, class, received, lse) = turn.in_every_order(|| on_device::<T>(turn, case, &packed, values));
    let relative = case.relative_error();
    if let Some(context) = context {
        // Probabilities and the result are rounded to the storage type.
        let rounding = if T::EPSILON > f32::EPSILON { T::EPSILON } else { 0.0 };
        for (given, expected) in out.iter().zip(context.data()) {
            close(
                "output",
                *given,
                *expected,
                (relative + rounding) * case.spread + rounding * expected.abs(),
            )?;
        }
    }
    // Underflow to zero where the reference keeps a subnormal.
    let tiny = 1e-37;
    if let Some(received) = received {
        for (given, expected) in received.iter().zip(scores.received.unwrap().data()) {
            close("received", *given, *expected, 2.0 * relative * expected + tiny)?;
        }
    }
    let n = case.tokens;
    if let Some(class) = &class {
        let reference = scores.class.unwrap();
        for (map, rows) in class.chunks(n * case.class_rows).enumerate() {
            for (given, expected) in rows[..n].iter().zip(&reference.data()[map * n..]) {
                close("class row", *given, *expected, 2.0 * relative * expected + tiny)?;
            }
        }
    }
    if class.is_some() || lse.is_some() {
        for map in [0, case.batch * case.heads - 1] {
            let all = rows(case, &packed, parts, map / case.heads, map % case.heads);
            let log_sum = |row: &[f64]| {
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                top + row.iter().map(|s| (s - top).exp()).sum::<f64>().ln()
            };
            for (r, row) in all.iter().enumerate() {
                let sum = log_sum(row);
                if let Some(lse) = &lse {
                    // The logarithm has the score's absolute error.
                    let tolerance = relative * (1.0 + sum.abs() as f32);
                    close("log_sum_exp", lse[map * n + r], sum as f32, tolerance)?;
                }
                if let Some(class) = class.as_ref().filter(|_| r < case.class_rows) {
                    for (k, score) in row.iter().enumerate() {
                        let expected = (score - sum).exp() as f32;
                        let given = class[(map * case.class_rows + r) * n + k];
                        close("softmax row", given, expected, 2.0 * relative * expected + tiny)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn run<T: Value>(turn: &Turn, case: &Case) -> Result<(), TestCaseError> {
    check::<T>(turn, case, true)?;
    if case.class_rows > 0 || case.received || case.log_sum_exp {
        check::<T>(turn, case, false)
    } else {
        Ok(())
    }
}

/// Few cases of each type: the emulated device takes its time.
fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { max_shrink_iters: 40, ..ProptestConfig::with_cases(count) }
}

#[test]
fn half_precision_is_the_reference() {
    let Some(turn) = Turn::new() else { return };
    proptest!(cases(40), |(case in case())| run::<f16>(&turn, &case)?);
    turn.end();
}

#[test]
fn bfloat_is_the_reference() {
    let Some(turn) = Turn::new() else { return };
    proptest!(cases(16), |(case in case())| run::<bf16>(&turn, &case)?);
    turn.end();
}

#[test]
fn single_precision_is_the_reference() {
    let Some(turn) = Turn::new() else { return };
    proptest!(cases(16), |(case in case())| run::<f32>(&turn, &case)?);
    turn.end();
}

fn plain(tokens: usize, dim: usize) -> Case {
    Case {
        batch: 1,
        tokens,
        heads: 1,
        dim,
        spread: 1.0,
        sizes: 2,
        class_rows: 1,
        received: true,
        log_sum_exp: true,
        split: Split::Auto,
        gap: 0,
        seed: 7,
    }
}

#[test]
fn every_head_dimension_and_every_edge_of_tokens() {
    let Some(turn) = Turn::new() else { return };
    for dim in DIMS {
        run::<f16>(&turn, &plain(70, dim)).unwrap();
        run::<bf16>(&turn, &plain(18, dim)).unwrap();
        run::<f32>(&turn, &plain(70, dim)).unwrap();
    }
    for dim in [8, 16, 24, 56, 88, 120] {
        run::<f32>(&turn, &plain(33, dim)).unwrap();
    }
    for tokens in TOKENS {
        run::<f16>(&turn, &plain(tokens, 64)).unwrap();
    }
    turn.end();
}

#[test]
fn long_sequences_stream() {
    let Some(turn) = Turn::new() else { return };
    run::<f16>(&turn, &plain(577, 64)).unwrap();
    run::<f16>(&turn, &Case { class_rows: 2, ..plain(1370, 64) }).unwrap();
    turn.end();
}

/// All sizes 0: no key counts for any query.
fn without_keys<T: Value>(turn: &Turn, case: &Case) {
    let (tokens, width) = (case.tokens, case.width());
    let packed: CudaSlice<T> = turn.upload(case.packed::<T>(3).data());
    let sizes: CudaSlice<f32> = turn.upload(&vec![0.0; tokens]);
    let mut lse: CudaSlice<f32> = turn.upload(&vec![f32::NAN; tokens]);
    let mut received: CudaSlice<f32> = turn.upload(&vec![f32::NAN; tokens]);
    let mut class: CudaSlice<f32> = turn.upload(&vec![f32::NAN; tokens]);
    let mut out: CudaSlice<T> = turn.upload(&vec![f32::NAN; tokens * width]);
    let mut scores = Scores {
        class_rows: Some((class.as_view_mut(), 1)),
        received: Some(received.as_view_mut()),
        log_sum_exp: Some(lse.as_view_mut()),
    };
    let mut target = Strided::new(out.as_view_mut(), [1, tokens, width]);
    let (call, v) = (call(&packed, Some(&sizes), case, 3), view(&packed, case, 3, 2));
    attention(&turn.device, &turn.stream, &call, &v, &mut target, &mut scores).unwrap();
    assert_eq!(turn.download(&out), vec![0.0; tokens * width], "{case:?}");
    assert_eq!(turn.download(&received), vec![0.0; tokens], "{case:?}");
    assert_eq!(turn.download(&class), vec![0.0; tokens], "{case:?}");
    assert_eq!(turn.download(&lse), vec![f32::NEG_INFINITY; tokens], "{case:?}");
}

#[test]
fn a_row_without_keys_is_zero() {
    let Some(turn) = Turn::new() else { return };
    // Resident, streamed by width, by length, and in f32.
    without_keys::<f16>(&turn, &plain(37, 64));
    without_keys::<bf16>(&turn, &plain(37, 32));
    without_keys::<f16>(&turn, &plain(300, 64));
    without_keys::<f32>(&turn, &plain(37, 64));
    turn.end();
}

/// A query that is no number has a row that is none, and takes received attention with it; nobody else notices.
fn with_a_bad_query<T: Value>(turn: &Turn, case: &Case, bad: f32) {
    const BAD: usize = 9;
    let mut packed = case.packed::<T>(3);
    let row = 3 * case.width();
    packed.data_mut()[BAD * row] = bad;
    let case = Case { sizes: 0, ..case.clone() };
    let heads =
        Heads { packed: &packed, heads: case.heads, head_dim: case.dim, scale: case.scale(), sizes: None };
    let (expected, _) = Reference::new().attention(&heads, ScoreRequest::default()).unwrap();
    let (out, class, received, _) = on_device::<T>(turn, &case, &packed, true);
    let tolerance = 2.0 * (case.relative_error() + T::EPSILON);
    for (token, (given, expected)) in
        out.chunks(case.width()).zip(expected.data().chunks(case.width())).enumerate()
    {
        if token == BAD {
            assert!(given.iter().chain(expected).all(|x| x.is_nan()), "{case:?}");
        } else {
            let close = |(given, expected): (&f32, &f32)| (given - expected).abs() <= tolerance;
            assert!(given.iter().zip(expected).all(close), "{case:?}: token {token}");
        }
    }
    assert!(class.unwrap().iter().all(|p| p.is_finite()), "{case:?}");
    assert!(received.unwrap().iter().all(|p| p.is_nan()), "{case:?}");
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let Some(turn) = Turn::new() else { return };
    for bad in [f32::NAN, f32::INFINITY] {
        with_a_bad_query::<f16>(&turn, &plain(37, 64), bad);
        with_a_bad_query::<bf16>(&turn, &plain(37, 32), bad);
        with_a_bad_query::<f16>(&turn, &plain(300, 64), bad);
        with_a_bad_query::<f32>(&turn, &plain(37, 64), bad);
    }
    turn.end();
}

/// A key that is infinite receives nothing of queries that look the other way, nor of rows that fill up a tile.
fn with_an_infinite_key<T: Value>(turn: &Turn, case: &Case) {
    const BAD: usize = 5;
    let mut packed = case.packed::<T>(3);
    let (row, width) = (3 * case.width(), case.width());
    packed.data_mut().chunks_exact_mut(row).for_each(|row| row[0] = 1.0);
    packed.data_mut()[BAD * row + width] = f32::NEG_INFINITY;
    let (out, class, received, _) = on_device::<T>(turn, case, &packed, true);
    let (class, received) = (class.unwrap(), received.unwrap());
    assert!(out.iter().chain(&class).chain(&received).all(|x| x.is_finite()), "{case:?}: {received:?}");
    assert_eq!((class[BAD], received[BAD]), (0.0, 0.0), "{case:?}");
    let total: f32 = received.iter().sum();
    assert!((total - 1.0).abs() < 1e-3, "{case:?}: {total} received");
}

#[test]
fn an_infinite_key_receives_nothing_of_nobody() {
    let Some(turn) = Turn::new() else { return };
    for tokens in [6, 37, 70] {
        with_an_infinite_key::<f16>(&turn, &plain(tokens, 64));
        with_an_infinite_key::<bf16>(&turn, &plain(tokens, 32));
        with_an_infinite_key::<f32>(&turn, &plain(tokens, 64));
    }
    with_an_infinite_key::<f16>(&turn, &plain(300, 64));
    turn.end();
}

/// MCTF's attention of fused tokens: `attention_grouped` and the plan's pooling, or `attention_folded`.
fn reduced<T: Value>(turn: &Turn, case: &Case, out_tokens: usize) -> Result<(), TestCaseError> {
    let packed = case.packed::<T>(2);
    let plan: TokenPlan = random_plan(case.batch, case.tokens, out_tokens, case.seed);
    let shape = [case.batch, out_tokens, case.width()];
    let values = tensor(&shape, random::<T>(shape.iter().product(), case.seed ^ 9, 1.0));
    let sizes = case.token_sizes();
    let heads = Heads {
        packed: &packed,
        heads: case.heads,
        head_dim: case.dim,
        scale: case.scale(),
        sizes: sizes.as_ref(),
    };
    let folded_map = |pooling| Reference::new().attention_reduced(&heads, &values, &plan, pooling).unwrap();
    let [weighted, largest] = [Pooling::Weighted, Pooling::Max].map(folded_map);
    let rounding = if T::EPSILON > f32::EPSILON { T::EPSILON } else { 0.0 };
    let tolerance = 3.0 * (case.relative_error() + rounding);
    let memory: CudaSlice<T> = turn.upload(packed.data());
    let device_values: CudaSlice<T> = turn.upload(values.data());
    let device_sizes: Option<CudaSlice<f32>> = sizes.as_ref().map(|sizes| turn.upload(sizes.data()));
    let device_plan = DevicePlan::upload(&turn.stream, &plan).unwrap();
    let call = call(&memory, device_sizes.as_ref(), case, 2);
    let view = Strided::new(device_values.as_view(), shape);
    let count = case.batch * case.tokens * case.width();
    let mut grouped: CudaSlice<T> = turn.upload(&vec![f32::NAN; count]);
    let mut target = Strided::new(grouped.as_view_mut(), [case.batch, case.tokens, case.width()]);
    attention_grouped(&turn.device, &turn.stream, &call, &view, &device_plan, &mut target).unwrap();
    let grouped = tensor(&[case.batch, case.tokens, case.width()], turn.download(&grouped));
    let pooled = Reference::new().merge(&grouped, None, &plan, Pooling::Weighted, None).unwrap().tokens;
    for (given, expected) in pooled.data().iter().zip(weighted.data()) {
        close("pooled by weight", *given, *expected, tolerance)?;
    }
    // In one launch to the bit what the two steps give, whichever block comes last.
    let cuda = Cuda::on(&turn.device, T::DTYPE).unwrap();
    let [packed, values] = [&packed, &values].map(|tensor| cuda.upload(tensor.clone()).unwrap());
    let sizes = sizes.map(|sizes| cuda.upload_f32(sizes).unwrap());
    let plan = cuda.upload_plan(plan).unwrap();
    let on_cuda = Heads {
        packed: &packed,
        sizes: sizes.as_ref(),
        heads: case.heads,
        head_dim: case.dim,
        scale: case.scale(),
    };
    let together = turn.in_every_order(|| {
        let pooled = cuda.attention_reduced(&on_cuda, &values, &plan, Pooling::Weighted).unwrap();
        cuda.download(&pooled).unwrap().data().to_vec()
    });
    for (at, (given, expected)) in together.iter().zip(pooled.data()).enumerate() {
        let expected = T::of(*expected).wide();
        prop_assert!(given.to_bits() == expected.to_bits(), "pooled at {at}: {given}, apart {expected}");
    }
    let mut folded: CudaSlice<T> = turn.upload(&vec![f32::NAN; shape.iter().product()]);
    let mut target = Strided::new(folded.as_view_mut(), shape);
    attention_folded(&turn.device, &turn.stream, &call, &view, &device_plan, &mut target).unwrap();
    for (given, expected) in turn.download(&folded).iter().zip(largest.data()) {
        // Rows pooled by maximum may sum to more than one.
        close("pooled by maximum", *given, *expected, tolerance * (1.0 + case.tokens as f32 / 16.0))?;
    }
    Ok(())
}

#[test]
fn attention_over_groups_is_the_folded_map() {
    let Some(turn) = Turn::new() else { return };
    proptest!(cases(10), |(case in case(), part in 0.0_f64..1.0)| {
        let case = Case { tokens: case.tokens.min(197), spread: case.spread.min(1.0), ..case };
        let out = 1 + ((case.tokens - 1) as f64 * part) as usize;
        reduced::<f16>(&turn, &case, out)?;
        if case.tokens < 70 {
            reduced::<f32>(&turn, &case, out)?;
            reduced::<bf16>(&turn, &case, out)?;
        }
    });
    turn.end();
}

/// The error of a call with some argument wrong.
fn refused(turn: &Turn, change: impl Fn(&mut Attention<'_, f16>, &mut Strided<CudaView<'_, f16>>)) -> String {
    let case = plain(20, 64);
    let packed: CudaSlice<f16> = turn.upload(case.packed::<f16>(3).data());
    let mut v = view(&packed, &case, 3, 2);
    let mut call = call(&packed, None, &case, 3);
    change(&mut call, &mut v);
    let mut out: CudaSlice<f16> = turn.upload(&vec![0.0; 20 * 64]);
    let mut target = Strided::new(out.as_view_mut(), [1, 20, 64]);
    attention(&turn.device, &turn.stream, &call, &v, &mut target, &mut Scores::default())
        .unwrap_err()
        .to_string()
}

#[test]
fn bad_arguments_are_refused_by_name() {
    let Some(turn) = Turn::new() else { return };
    let message = refused(&turn, |call, _| call.heads = 3);
    assert!(message.contains("rows of 64 values are not 3 heads"), "{message}");
    let message = refused(&turn, |call, _| call.heads = 4);
    assert!(message.contains("heads have 16 values") && message.contains("compute it in f32"), "{message}");
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = refused(&turn, |call, _| call.scale = scale);
        assert!(message.contains("expected a positive number"), "{message}");
    }
    let message = refused(&turn, |call, _| call.k.strides[1] = 193);
    assert!(message.contains('k') && message.contains("multiples of 16 bytes"), "{message}");
    let message = refused(&turn, |_, v| v.shape[1] = 19);
    assert!(message.contains("values has shape [1, 19, 64]"), "{message}");
    let message = refused(&turn, |call, _| call.q.shape[1] = 2000);
    assert!(message.contains("q of shape [1, 2000, 64]") && message.contains("reaches over"), "{message}");
    let message = refused(&turn, |call, _| call.k.shape[1] = 19);
    assert!(message.contains("k has shape [1, 19, 64], expected [1, 20, 64]"), "{message}");

    // Scores without room for what they need.
    let case = plain(300, 64);
    let packed: CudaSlice<f16> = turn.upload(case.packed::<f16>(2).data());
    let call = call(&packed, None, &case, 2);
    let mut received: CudaSlice<f32> = turn.upload(&vec![0.0; 300]);
    let mut scores = Scores { received: Some(received.as_view_mut()), ..Scores::default() };
    let message = attention_scores(&turn.device, &turn.stream, &call, &mut scores).unwrap_err().to_string();
    assert!(message.contains("needs log_sum_exp (B, H, N)"), "{message}");
    let message = attention_scores(&turn.device, &turn.stream, &call, &mut Scores::default()).unwrap_err();
    assert!(message.to_string().contains("neither values nor scores"), "{message}");
    let mut rows: CudaSlice<f32> = turn.upload(&vec![0.0; 300 * 9]);
    let mut scores = Scores { class_rows: Some((rows.as_view_mut(), 9)), ..Scores::default() };
    let message = attention_scores(&turn.device, &turn.stream, &call, &mut scores).unwrap_err().to_string();
    assert!(message.contains("9 softmax rows") && message.contains("1 to 8"), "{message}");
    let mut scores = Scores { class_rows: Some((rows.slice_mut(..299), 1)), ..Scores::default() };
    let message = attention_scores(&turn.device, &turn.stream, &call, &mut scores).unwrap_err().to_string();
    assert!(message.contains("class rows has 299 values, expected 300"), "{message}");
    turn.end();
}
