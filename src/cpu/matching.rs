//! Bipartite soft matching: similarities in one small product per image, partners and order from its rows.

use super::{
    Context, Plan, Tensor,
    check::{expect_shape, tokens_shape},
    gemm::{Blocks, Finish, Out, Product, block_values, cut},
    pack::{PANEL, PackTransposed, Panels, Shared, panel_values},
    plan::build,
    pool::LINE,
    select::mean_over_heads,
    simd::{Kernel, Simd},
};
use crate::{
    Error, Result,
    backend::{Attraction, Matching, Metric, Weighting},
    reference::matching::precedes,
};

const OP: &str = "matching";
/// How many tokens ahead keys are asked for: they lie apart, between queries and values, where the processor does not look ahead.
const SOON: usize = 4;

/// (B, N) of a matching whose tensors fit each other.
fn check(matching: &Matching<'_, Tensor>) -> Result<[usize; 2]> {
    let [batch, n, _] = match &matching.metric {
        Metric::Rows(rows) => tokens_shape(OP, "metric", rows)?,
        Metric::Keys(heads) => {
            let shape = tokens_shape(OP, "packed heads", heads.packed)?;
            let width = heads.heads.saturating_mul(heads.head_dim);
            if width == 0 || shape[2] < width.saturating_mul(2) {
                return Err(Error::argument(
                    OP,
                    format!("packed rows of {} hold no keys of {} heads", shape[2], heads.heads),
                ));
            }
            shape
        }
    };
    let heads_shape = |t: &Tensor| match *t.shape() {
        [b, h, m] if b == batch && m == n && h > 0 => Ok(()),
        _ => Err(Error::argument(
            OP,
            format!("scores have shape {:?}, expected ({batch}, heads, {n})", t.shape()),
        )),
    };
    let sizes_shape =
        |sizes: Option<&Tensor>| sizes.map_or(Ok(()), |sizes| expect_shape(OP, "sizes", sizes, &[batch, n]));
    if let Attraction::MultiCriteria { informativeness, size, .. } = &matching.attraction {
        heads_shape(informativeness.0)?;
        sizes_shape(size.0)?;
    }
    match matching.weighting {
        Weighting::Uniform => {}
        Weighting::Size(sizes) => sizes_shape(sizes)?,
        Weighting::SizeAndReceived(sizes, received) => {
            heads_shape(received)?;
            sizes_shape(sizes)?;
        }
    }
    let Matching { special, merges, .. } = *matching;
    if special > n || merges > (n - special) / 2 {
        return Err(Error::argument(
            OP,
            format!(
                "{} scores and {merges} merges do not fit {n} tokens of which {special} are special; at most {} can be \
                 merged",
                n.div_ceil(2) * (n / 2),
                n.saturating_sub(special) / 2
            ),
        ));
    }
    Ok([batch, n])
}

/// [`Backend::matching`](crate::backend::Backend::matching).
pub(super) fn matching(context: &Context, matching: &Matching<'_, Tensor>) -> Result<Plan> {
    let [batch, n] = check(matching)?;
    let (packed, heads) = match &matching.metric {
        Metric::Rows(rows) => (rows.view(), None),
        Metric::Keys(heads) => (heads.packed.view(), Some((heads.heads, heads.head_dim))),
    };
    let stride = packed.len() / (batch * n);
    let job = Job {
        context,
        special: matching.special,
        merges: matching.merges,
        both_ways: matching.both_ways,
        width: heads.map_or(stride, |(_, d)| d),
        stride,
        heads,
        n,
        na: n.div_ceil(2),
        nb: n / 2,
    };
    let criteria = match &matching.attraction {
        Attraction::Cosine => None,
        Attraction::MultiCriteria { tau_similarity, informativeness, size } => Some(Criteria {
            tau: *tau_similarity,
            received: informativeness.0.view(),
            heads: informativeness.0.shape()[1],
            received_tau: informativeness.1,
            sizes: size.0.map(Tensor::view),
            size_tau: size.1,
        }),
    };
    let (sizes, received) = match matching.weighting {
        Weighting::Uniform | Weighting::Size(None) => (None, None),
        Weighting::Size(Some(sizes)) => (Some(sizes.view()), None),
        Weighting::SizeAndReceived(sizes, received) => (sizes.map(Tensor::view), Some(received.view())),
    };
    let room = job.room();
    let mut scratch = context.pool.take(context.threads.count() * room.total);
    let scratches = Shared::of(scratch.make_mut());
    let plan = build(context, [batch, n, n - matching.merges], |thread, image, mut part| {
        // SAFETY: each thread has a part of the scratch.
        let scratch = unsafe { scratches.part(thread * room.total, room.total) };
        let mut work = job.work(scratch, &room);
        let rows = &packed[image * n * stride..(image + 1) * n * stride];
        job.similarities(rows, &mut work);
        if let Some(criteria) = &criteria {
            criteria.apply(&job, image, &mut work);
        }
        job.groups(&mut work);
        let mean = work.tokens;
        if let Some(received) = &received {
            let of_image = received.len() / batch;
            mean_over_heads(&received[image * of_image..(image + 1) * of_image], mean);
        }
        let size = |token: usize| sizes.as_ref().map_or(1.0, |sizes| sizes[image * n + token]);
        part.fill(work.group_of, true, |t| if received.is_some() { mean[t] * size(t) } else { size(t) });
    });
    drop(scratch);
    Ok(plan)
}

/// The numbers of a matching. Set A is the tokens at even positions, set B those at odd positions.
struct Job<'a> {
    context: &'a Context,
    special: usize,
    merges: usize,
    both_ways: bool,
    /// Width of a compared row.
    width: usize,
    /// Values from one token to the next.
    stride: usize,
    /// Heads and their width, where keys are compared.
    heads: Option<(usize, usize)>,
    n: usize,
    na: usize,
    nb: usize,
}

/// Where the parts of a thread's scratch end.
struct Room {
    unit: usize,
    blocks: usize,
    panels: usize,
    scores: usize,
    total: usize,
}

/// A thread's scratch.
struct Work<'a> {
    /// (PANEL + 1, width): some compared rows of length 1.
    unit: &'a mut [f32],
    /// Those of A in blocks.
    blocks: &'a mut [f32],
    /// Those of B in panels.
    panels: &'a mut [f32],
    /// (A, row) with rows of whole panels.
    scores: &'a mut [f32],
    /// Something for each token.
    tokens: &'a mut [f32],
    /// The best score of each token of A, then of B.
    best: &'a mut [f32],
    /// Its partner's index in the other set.
    partner: &'a mut [u32],
    /// Indices in A, in order of precedence.
    order: &'a mut [u32],
    group_of: &'a mut [u32],
}

impl Job<'_> {
    /// Length of a row of scores.
    fn row(&self) -> usize {
        self.nb.next_multiple_of(PANEL).max(PANEL)
    }

    fn room(&self) -> Room {
        let unit = ((PANEL + 1) * self.width).next_multiple_of(LINE);
        let blocks = unit + block_values(self.na, self.width);
        let panels = blocks + panel_values(self.width, self.nb);
        let scores = panels + self.na * self.row();
        Room { unit, blocks, panels, scores, total: scores + 5 * self.n }
    }

    fn work<'a>(&self, scratch: &'a mut [f32], room: &Room) -> Work<'a> {
        let (unit, rest) = scratch.split_at_mut(room.unit);
        let (blocks, rest) = rest.split_at_mut(room.blocks - room.unit);
        let (panels, rest) = rest.split_at_mut(room.panels - room.blocks);
        let (scores, rest) = rest.split_at_mut(room.scores - room.panels);
        let (tokens, rest) = rest.split_at_mut(self.n);
        let (best, rest) = rest.split_at_mut(self.n);
        let (partner, rest) = bytemuck::cast_slice_mut::<f32, u32>(rest).split_at_mut(self.n);
        let (order, group_of) = rest.split_at_mut(self.n);
        Work { unit, blocks, panels, scores, tokens, best, partner, order, group_of }
    }

    /// The special tokens of A, and of B.
    fn special_in(&self) -> (usize, usize) {
        (self.special.div_ceil(2), self.special / 2)
    }

    /// The cosine of every token of A and every token of B.
    fn similarities(&self, rows: &[f32], work: &mut Work<'_>) {
        let (width, kernels) = (self.width, self.context.kernels);
        kernels.run(UnitRows { job: self, rows, some: work.unit, blocks: work.blocks, panels: work.panels });
        let a = Blocks { data: work.blocks, count: self.na, depth: width };
        kernels.run(Product {
            a,
            b: Panels { data: work.panels, depth: width, columns: self.nb },
            columns: 0..self.nb,
            out: Out::of(work.scores, self.row()),
            finish: Finish::default(),
        });
    }

    /// Who goes where: the group of each token.
    fn groups(&self, work: &mut Work<'_>) {
        let (na, nb, row) = (self.na, self.nb, self.row());
        let (sa, sb) = self.special_in();
        let forward = if self.both_ways { self.merges / 2 } else { self.merges };
        let Work { scores, best, partner, order, group_of, .. } = work;
        let (best_a, best_b) = best.split_at_mut(na);
        let (partner_a, partner_b) = partner.split_at_mut(na);
        let (order_a, order_b) = order.split_at_mut(na);
        for i in sa..na {
            let scores = &scores[i * row..i * row + nb];
            (best_a[i], partner_a[i]) = self.context.kernels.run(FirstBest { scores, from: sb });
        }
        sorted(order_a, sa, best_a);
        let order_a = &mut order_a[sa..];
        let (merged, kept) = order_a.split_at_mut(forward);
        if self.special > 0 {
            kept.sort_unstable();
        }
        // Special tokens, what stays of A, what stays of B.
        group_of[..self.special].iter_mut().zip(0..).for_each(|(group, token)| *group = token);
        let mut group = self.special as u32;
        for &i in &*kept {
            group_of[2 * i as usize] = group;
            group += 1;
        }
        if self.both_ways {
            // Column by column in the order of the rows that stay: ties go to the first of them.
            best_b.fill(f32::NEG_INFINITY);
            partner_b.fill(u32::MAX);
            for &i in &*kept {
                let scores = &scores[i as usize * row..i as usize * row + nb];
                self.context.kernels.run(BetterColumns { scores, row: i, best: best_b, partner: partner_b });
            }
            sorted(order_b, sb, best_b);
            let (leaving, staying) = order_b[sb..].split_at(self.merges - forward);
            for &j in staying {
                group_of[2 * j as usize + 1] = group;
                group += 1;
            }
            for &j in leaving {
                group_of[2 * j as usize + 1] = group_of[2 * partner_b[j as usize] as usize];
            }
        } else {
            for j in sb..nb {
                group_of[2 * j + 1] = group;
                group += 1;
            }
        }
        for &i in &*merged {
            group_of[2 * i as usize] = group_of[2 * partner_a[i as usize] as usize + 1];
        }
    }
}

/// `order` from `first` on becomes the indices there, in order of precedence of their scores.
fn sorted(order: &mut [u32], first: usize, scores: &[f32]) {
    order.iter_mut().zip(0..).for_each(|(order, index)| *order = index);
    order[first..].sort_unstable_by(|&a, &b| {
        precedes((scores[a as usize], a as usize), (scores[b as usize], b as usize))
    });
}

/// The largest of the scores from one on and the first index that has it; NaN counts where there is nothing else.
struct FirstBest<'a> {
    scores: &'a [f32],
    from: usize,
}

impl Kernel for FirstBest<'_> {
    type Output = (f32, u32);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, u32) {
        let Self { scores, from } = self;
        let candidates = &scores[from..];
        // Of each lane the largest and its first place: whole numbers up to 2^24, and there are fewer columns.
        let mut places = [0.0; 16];
        places.iter_mut().zip(0_u8..).for_each(|(place, lane)| *place = f32::from(lane));
        let (mut best, mut best_at, mut at) =
            (s.splat(f32::NEG_INFINITY), s.splat(f32::INFINITY), s.load(&places));
        let chunks = candidates.chunks_exact(S::LANES);
        let tail = s.load_some(chunks.remainder(), f32::NEG_INFINITY);
        for x in chunks {
            let x = s.load(x);
            best_at = s.where_less(best, x, at, best_at);
            best = s.where_less(best, x, x, best);
            at = s.add(at, s.splat(S::LANES as f32));
        }
        best_at = s.where_less(best, tail, at, best_at);
        best = s.where_less(best, tail, tail, best);
        let (mut values, mut place) = ([f32::NEG_INFINITY; 16], f32::INFINITY);
        s.store(&mut values, best);
        s.store(&mut places, best_at);
        let max = values.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
        for (&value, &at) in values[..S::LANES].iter().zip(&places) {
            place = if value == max && at < place { at } else { place };
        }
        if place.is_finite() {
            return (max, (from + place as usize) as u32);
        }
        // Nothing above minus infinity: the first that is just that, else NaN.
        match candidates.iter().position(|&x| x == max) {
            Some(at) => (max, (from + at) as u32),
            None if candidates.is_empty() => (f32::NEG_INFINITY, 0),
            None => (f32::NAN, from as u32),
        }
    }
}

/// Compared rows of length 1, those of A in blocks, those of B in panels: token by token, so that each is fetched once, and without all
/// of them in between, which would be more memory than the first-level cache has.
struct UnitRows<'a> {
    job: &'a Job<'a>,
    rows: &'a [f32],
    /// (PANEL + 1, width).
    some: &'a mut [f32],
    blocks: &'a mut [f32],
    panels: &'a mut [f32],
}

impl UnitRows<'_> {
    /// The row of one token.
    #[inline(always)]
    fn row<S: Simd>(s: S, job: &Job<'_>, rows: &[f32], token: usize, out: &mut [f32]) {
        let row = &rows[token * job.stride..(token + 1) * job.stride];
        match job.heads {
            None => out.copy_from_slice(row),
            Some((heads, d)) => {
                let keys = heads * d..2 * heads * d;
                if token + SOON < job.n {
                    for line in rows[(token + SOON) * job.stride..][keys.clone()].chunks(LINE) {
                        s.expect_read(line.as_ptr());
                    }
                }
                SumHeads { keys: &row[keys], out }.run(s);
            }
        }
        UnitLength(out).run(s);
    }
}

impl Kernel for UnitRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job, rows, some, blocks, panels } = self;
        let width = job.width;
        let (of_a, of_b) = some.split_at_mut(width);
        for block in cut::<S>(job.na) {
            let to = &mut blocks[block_values(block.start, width)..block_values(block.end, width)];
            for (i, at) in block.clone().enumerate() {
                Self::row(s, job, rows, 2 * at, of_a);
                for (chunk, from) in of_a.chunks(LINE).enumerate() {
                    to[(chunk * block.len() + i) * LINE..][..from.len()].copy_from_slice(from);
                }
                if at >= job.nb {
                    continue;
                }
                let (panel, column) = (at / PANEL, at % PANEL);
                Self::row(s, job, rows, 2 * at + 1, &mut of_b[column * width..][..width]);
                if column == PANEL - 1 || at == job.nb - 1 {
                    let to = &mut panels[panel * width * PANEL..][..width * PANEL];
                    let from = &of_b[..(column + 1) * width];
                    PackTransposed { from, stride: width, depth: width, to }.run(s);
                }
            }
        }
    }
}

/// The sum over heads of a token's keys: as good as their mean for a cosine.
struct SumHeads<'a> {
    keys: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SumHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.out.len();
        self.out.copy_from_slice(&self.keys[..d]);
        for key in self.keys[d..].chunks_exact(d) {
            let mut out = self.out.chunks_exact_mut(S::LANES);
            let mut key = key.chunks_exact(S::LANES);
            for (out, key) in (&mut out).zip(&mut key) {
                let sum = s.add(s.load(out), s.load(key));
                s.store(out, sum);
            }
            out.into_remainder().iter_mut().zip(key.remainder()).for_each(|(sum, key)| *sum += key);
        }
    }
}

/// A row divided by its length. A zero row stays zero: it is similar to nothing.
struct UnitLength<'a>(&'a mut [f32]);

impl Kernel for UnitLength<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let row = self.0;
        let mut sum = s.splat(0.0);
        let chunks = row.chunks_exact(S::LANES);
        let tail = s.load_some(chunks.remainder(), 0.0);
        for x in chunks {
            sum = s.fma(s.load(x), s.load(x), sum);
        }
        let square = s.sum(s.fma(tail, tail, sum));
        // Squares of very long and very short rows do not fit an f32.
        // Divided, as the reference does: one over the length would part similarities that are equal.
        if (1e-30..1e30).contains(&square) {
            let length = square.sqrt();
            let (lengths, inverse) = (s.splat(length), s.splat(1.0 / length));
            let mut chunks = row.chunks_exact_mut(S::LANES);
            for x in &mut chunks {
                let y = s.quotient(s.load(x), lengths, inverse);
                s.store(x, y);
            }
            chunks.into_remainder().iter_mut().for_each(|x| *x /= length);
        } else {
            let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let length = if square > 0.0 { square.sqrt() as f32 } else { 1.0 };
            row.iter_mut().for_each(|x| *x /= length);
        }
    }
}

/// A row of scores beside the best ones of its columns so far, with the rows that these are of: the first of equals, a number before
/// what is none.
struct BetterColumns<'a> {
    scores: &'a [f32],
    row: u32,
    best: &'a mut [f32],
    /// `u32::MAX` where there was none yet.
    partner: &'a mut [u32],
}

impl Kernel for BetterColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { scores, row, best, partner } = self;
        for ((best, partner), &score) in best.iter_mut().zip(partner).zip(scores) {
            let better = score > *best || *partner == u32::MAX || (best.is_nan() && !score.is_nan());
            // Written in any case: the compiler makes vectors of it.
            *best = if better { score } else { *best };
            *partner = if better { row } else { *partner };
        }
    }
}

/// MCTF's criteria beside similarity.
struct Criteria<'a> {
    tau: f64,
    received: super::tensor::View<'a>,
    heads: usize,
    received_tau: f64,
    sizes: Option<super::tensor::View<'a>>,
    size_tau: f64,
}

impl Criteria<'_> {
    /// Cosines become attractions.
    fn apply(&self, job: &Job<'_>, image: usize, work: &mut Work<'_>) {
        let n = job.n;
        // One criterion per token, those of A first, in the room of what comes later.
        let (mean, of_sets) = (&mut *work.tokens, &mut *work.best);
        mean_over_heads(&self.received[image * self.heads * n..(image + 1) * self.heads * n], mean);
        inverse_factor(mean, self.received_tau);
        for (token, &factor) in mean.iter().enumerate() {
            let at = if token % 2 == 0 { token / 2 } else { job.na + token / 2 };
            of_sets[at] = factor;
        }
        if let Some(sizes) = &self.sizes {
            mean.copy_from_slice(&sizes[image * n..(image + 1) * n]);
            inverse_factor(mean, self.size_tau);
            for (token, &factor) in mean.iter().enumerate() {
                let at = if token % 2 == 0 { token / 2 } else { job.na + token / 2 };
                of_sets[at] *= factor;
            }
        }
        let (of_a, of_b) = of_sets.split_at(job.na);
        for (row, &of_row) in work.scores.chunks_exact_mut(job.row()).zip(of_a) {
            let row = &mut row[..job.nb];
            if self.tau != 0.0 && self.tau != 1.0 {
                for score in &mut *row {
                    let similarity = f32::midpoint(*score, 1.0).max(0.0);
                    *score = f64::from(similarity).powf(1.0 / self.tau) as f32;
                }
            }
            job.context.kernels.run(Attract { row, of_row, of_column: of_b, tau: self.tau });
        }
    }
}

/// A row of cosines (or of powers already, where `tau` is neither 0 nor 1) becomes attractions.
struct Attract<'a> {
    row: &'a mut [f32],
    of_row: f32,
    of_column: &'a [f32],
    tau: f64,
}

impl Kernel for Attract<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (one, half) = (s.splat(1.0), s.splat(0.5));
        for (scores, of_column) in self.row.chunks_mut(S::LANES).zip(self.of_column.chunks(S::LANES)) {
            let whole = scores.len() == S::LANES;
            let x = if whole { s.load(scores) } else { s.load_some(scores, 0.0) };
            let column = if whole { s.load(of_column) } else { s.load_some(&of_column[..scores.len()], 0.0) };
            let similarity = match self.tau {
                0.0 => one,
                1.0 => s.largest(s.mul(s.add(x, one), half), s.splat(0.0)),
                _ => x,
            };
            let y = s.mul(similarity, s.mul(s.splat(self.of_row), column));
            if whole { s.store(scores, y) } else { s.store_some(scores, y) }
        }
    }
}

/// `(value/max)^exponent` of the inverse of each value, in place: how MCTF turns attention received and size into a factor of
/// the attraction. Infinite and undefined ratios become 1, the neutral factor.
fn inverse_factor(values: &mut [f32], temperature: f64) {
    if temperature == 0.0 {
        return values.fill(1.0);
    }
    let max = values.iter().map(|&v| 1.0 / f64::from(v)).fold(f64::NEG_INFINITY, f64::max);
    // Sizes repeat, and powers take long.
    let mut last = (f32::NAN.to_bits(), 1.0);
    for value in values {
        if value.to_bits() != last.0 {
            let ratio = 1.0 / f64::from(*value) / max;
            let factor = match (ratio.is_finite(), temperature) {
                (false, _) => 1.0,
                (true, 1.0) => ratio as f32,
                (true, temperature) => ratio.powf(1.0 / temperature) as f32,
            };
            last = (value.to_bits(), factor);
        }
        *value = last.1;
    }
}
