//! Tokens by the class token's attention: the attentive ones stay or pair up, the others join them or form clusters.
//!
//! Some images at a time, one for each thread: their tokens are put in order, then all threads compute similarities and
//! distances, some rows each, then each image's groups follow from those.

use std::ops::Range;

use super::{
    Context, Plan, Tensor,
    check::{expect_shape, tokens_shape},
    pack::Shared,
    pairs::{Dot, Pairs, Places},
    plan::{Image, Images, written},
    pool::{Buffer, LINE},
    select::{before, best_first, mean_over_heads},
    simd::Kernels,
};
use crate::{
    Error, Result,
    backend::{Cluster, Inattentive},
};

const OP: &str = "cluster";

/// Rows of one task.
const TASK_ROWS: usize = 8;
/// Instead of a group, until those have numbers.
const LEAVES: u32 = u32::MAX;

/// (B, H, N, C) of tensors that fit each other.
fn check(cluster: &Cluster<'_, Tensor>) -> Result<[usize; 4]> {
    let [batch, n, width] = tokens_shape(OP, "tokens", cluster.tokens)?;
    let heads = cluster.class_scores.shape().get(1).copied().unwrap_or(0).max(1);
    expect_shape(OP, "class scores", cluster.class_scores, &[batch, heads, n])?;
    if cluster.special > n || cluster.keep == 0 || cluster.keep > n - cluster.special {
        return Err(Error::argument(
            OP,
            format!("cannot keep {} of {n} tokens of which {} are special", cluster.keep, cluster.special),
        ));
    }
    Ok([batch, heads, n, width])
}

/// [`Backend::cluster`](crate::backend::Backend::cluster).
pub(super) fn cluster(context: &Context, cluster: &Cluster<'_, Tensor>) -> Result<Plan> {
    let [batch, heads, n, width] = check(cluster)?;
    let job = Job::new(cluster, n, width);
    let (tokens, scores) = (cluster.tokens.view(), cluster.class_scores.view());
    let input = Input { context, tokens: &tokens, scores: &scores, heads };
    let turn = batch.min(context.threads.count());
    let mut memory = Memory::of(context, &job, turn);
    let m = job.special + job.keep - job.pairs + job.centres;
    Ok(written(context, [batch, n, m], |images| {
        for first in (0..batch).step_by(turn) {
            let turn = first..batch.min(first + turn);
            job.rank(&input, turn.clone(), &mut memory);
            job.compare(&input, turn.clone(), &mut memory);
            job.decide(&input, turn, &mut memory, images);
        }
    }))
}

/// What an operation is given.
struct Input<'a> {
    context: &'a Context,
    /// (B, N, C).
    tokens: &'a [f32],
    /// (B, H, N).
    scores: &'a [f32],
    heads: usize,
}

/// What is known of the images of a turn.
struct Memory {
    /// (N): each token's score.
    mean: Buffer,
    /// Tokens by place.
    order: Buffer,
    /// (places) in `f64`: the lengths of rows.
    lengths: Buffer,
    /// (sources): how similar the nearest destination of each is.
    similarity: Buffer,
    /// Its number among the destinations.
    nearest: Buffer,
    /// (side, side) in `f64`: squares of distances.
    squares: Buffer,
    /// For each thread, in `f64`: products of a task's rows.
    products: Buffer,
    /// For each thread.
    scratch: Buffer,
}

impl Memory {
    fn of(context: &Context, job: &Job, turn: usize) -> Self {
        let threads = context.threads.count();
        let take = |count: usize| context.pool.take(count);
        Self {
            mean: take(turn * job.n),
            order: take(turn * job.places()),
            lengths: take(turn * 2 * job.places()),
            similarity: take(turn * job.sources.count),
            nearest: take(turn * job.sources.count),
            squares: take(turn * 2 * job.side() * job.side()),
            products: take(threads * 2 * TASK_ROWS * job.destinations.count),
            scratch: take(threads * job.room()),
        }
    }
}

/// Places in the order of tokens: `first`, `first + step`, and so on.
#[derive(Clone, Copy)]
struct Every {
    first: usize,
    step: usize,
    count: usize,
}

impl Every {
    /// Some of these places from number `begin` on.
    fn some(self, tokens: &[u32], begin: usize, count: usize) -> Places<'_> {
        Places { tokens, first: self.first + begin * self.step, step: self.step, count }
    }

    fn place(self, number: usize) -> usize {
        self.first + number * self.step
    }
}

/// The numbers of a decoupling. An image's tokens that are not special have places: the attentive ones by rank, then the others
/// in order of index.
struct Job {
    n: usize,
    width: usize,
    special: usize,
    /// Attentive tokens.
    keep: usize,
    /// Whether the others join them.
    joins: bool,
    /// Those who look for the nearest among the destinations.
    sources: Every,
    destinations: Every,
    /// Where tokens form clusters, how many of the sources merge into it.
    pairs: usize,
    centres: usize,
    /// How many nearest ones make the density; 0 for all.
    neighbours: usize,
}

/// What is known of an image before its groups are.
struct Found<'a> {
    /// Each token's score.
    mean: &'a [f32],
    /// Tokens by place.
    order: &'a [u32],
    /// How similar the nearest destination of each source is.
    similarity: &'a [f32],
    /// Its number among the destinations.
    nearest: &'a [u32],
}

/// A thread's scratch.
struct Work<'a> {
    /// (side): the distances of one token.
    near: &'a mut [f64],
    /// (N) each.
    density: &'a mut [f32],
    gamma: &'a mut [f32],
    ranked: &'a mut [u32],
    group_of: &'a mut [u32],
    /// The group of each attentive token, by rank.
    group_of_rank: &'a mut [u32],
}

impl Job {
    fn new(cluster: &Cluster<'_, Tensor>, n: usize, width: usize) -> Self {
        let Cluster { special, keep, .. } = *cluster;
        let rest = n - special - keep;
        let join = Self {
            n,
            width,
            special,
            keep,
            joins: true,
            sources: Every { first: keep, step: 1, count: rest },
            destinations: Every { first: 0, step: 1, count: keep },
            pairs: 0,
            centres: 0,
            neighbours: 0,
        };
        match cluster.inattentive {
            Inattentive::Join => join,
            // Odd ranks propose to even ones.
            Inattentive::Peaks { pairs, clusters, neighbours } => Self {
                joins: false,
                sources: Every { first: 1, step: 2, count: if pairs > 0 { keep / 2 } else { 0 } },
                destinations: Every { first: 0, step: 2, count: keep.div_ceil(2) },
                pairs: pairs.min(keep / 2),
                centres: clusters.min(rest),
                neighbours,
                ..join
            },
        }
    }

    fn places(&self) -> usize {
        self.n - self.special
    }

    /// Tokens whose distances are needed: those that form clusters, if somebody is to be a centre.
    fn side(&self) -> usize {
        if self.centres > 0 { self.places() - self.keep } else { 0 }
    }

    /// Values of a thread's scratch.
    fn room(&self) -> usize {
        (2 * self.side() + 5 * self.n).next_multiple_of(LINE)
    }

    fn work<'a>(&self, scratch: &'a mut [f32]) -> Work<'a> {
        let (near, rest) = scratch.split_at_mut(2 * self.side());
        let (density, rest) = rest.split_at_mut(self.n);
        let (gamma, rest) = rest.split_at_mut(self.n);
        let (ranked, rest) = bytemuck::cast_slice_mut::<f32, u32>(rest).split_at_mut(self.n);
        let (group_of, rest) = rest.split_at_mut(self.n);
        let near = bytemuck::cast_slice_mut(near);
        Work { near, density, gamma, ranked, group_of, group_of_rank: &mut rest[..self.n] }
    }

    /// The rows of an image's tokens.
    fn rows<'a>(&self, input: &Input<'a>, image: usize) -> &'a [f32] {
        &input.tokens[image * self.n * self.width..(image + 1) * self.n * self.width]
    }

    /// Scores, order and lengths of the images of a turn.
    fn rank(&self, input: &Input<'_>, turn: Range<usize>, memory: &mut Memory) {
        let (n, places) = (self.n, self.places());
        let means = Shared::of(memory.mean.make_mut());
        let orders = Shared::of(bytemuck::cast_slice_mut::<f32, u32>(memory.order.make_mut()));
        let all_lengths = Shared::of(bytemuck::cast_slice_mut::<f32, f64>(memory.lengths.make_mut()));
        input.context.threads.run(turn.len(), |_, slot| {
            let image = turn.start + slot;
            // SAFETY: each image has its own.
            let (mean, order, lengths) = unsafe {
                let lengths = all_lengths.part(slot * places, places);
                (means.part(slot * n, n), orders.part(slot * places, places), lengths)
            };
            let of_image = input.heads * n;
            mean_over_heads(&input.scores[image * of_image..(image + 1) * of_image], mean);
            self.put_in_order(mean, order);
            self.measure(input.context.kernels, self.rows(input, image), order, lengths);
        });
    }

    /// Similarities and distances, some rows a task.
    fn compare(&self, input: &Input<'_>, turn: Range<usize>, memory: &mut Memory) {
        let (places, side, columns) = (self.places(), self.side(), self.destinations.count);
        let Context { kernels, threads, .. } = input.context;
        let orders = bytemuck::cast_slice::<f32, u32>(&memory.order);
        let all_lengths = bytemuck::cast_slice::<f32, f64>(&memory.lengths);
        let similarities = Shared::of(memory.similarity.make_mut());
        let all_nearest = Shared::of(bytemuck::cast_slice_mut::<f32, u32>(memory.nearest.make_mut()));
        let all_squares = Shared::of(bytemuck::cast_slice_mut::<f32, f64>(memory.squares.make_mut()));
        let all_products = Shared::of(bytemuck::cast_slice_mut::<f32, f64>(memory.products.make_mut()));
        let proposing = self.sources.count.div_ceil(TASK_ROWS);
        let tasks = proposing + side.div_ceil(TASK_ROWS);
        threads.run(turn.len() * tasks, |thread, task| {
            let (slot, task) = (task / tasks, task % tasks);
            let rows = self.rows(input, turn.start + slot);
            let order = &orders[slot * places..(slot + 1) * places];
            if task < proposing {
                let first = task * TASK_ROWS;
                let some = TASK_ROWS.min(self.sources.count - first);
                let at = slot * self.sources.count + first;
                // SAFETY: each task has sources of its own, each thread a part of the scratch.
                let (products, similarity, nearest) = unsafe {
                    let products = all_products.part(thread * TASK_ROWS * columns, some * columns);
                    (products, similarities.part(at, some), all_nearest.part(at, some))
                };
                let lengths = &all_lengths[slot * places..(slot + 1) * places];
                self.propose(*kernels, rows, order, lengths, first, products, (similarity, nearest));
            } else {
                let first = (task - proposing) * TASK_ROWS;
                let some = TASK_ROWS.min(side - first);
                // SAFETY: each task has rows of its own.
                let squares = unsafe { all_squares.part((slot * side + first) * side, some * side) };
                self.distances(*kernels, rows, order, first, squares);
            }
        });
    }

    /// The plans of the images of a turn.
    fn decide(&self, input: &Input<'_>, turn: Range<usize>, memory: &mut Memory, images: &Images<'_>) {
        let (n, places, side, sources) = (self.n, self.places(), self.side(), self.sources.count);
        let (means, similarities) = (&memory.mean, &memory.similarity);
        let orders = bytemuck::cast_slice::<f32, u32>(&memory.order);
        let all_nearest = bytemuck::cast_slice::<f32, u32>(&memory.nearest);
        let all_squares = Shared::of(bytemuck::cast_slice_mut::<f32, f64>(memory.squares.make_mut()));
        let (room, scratches) = (self.room(), Shared::of(memory.scratch.make_mut()));
        input.context.threads.run(turn.len(), |thread, slot| {
            let found = Found {
                mean: &means[slot * n..(slot + 1) * n],
                order: &orders[slot * places..(slot + 1) * places],
                similarity: &similarities[slot * sources..(slot + 1) * sources],
                nearest: &all_nearest[slot * sources..(slot + 1) * sources],
            };
            // SAFETY: each image has its own, each thread a part of the scratch.
            let (image, squares, scratch) = unsafe {
                let squares = all_squares.part(slot * side * side, side * side);
                (images.part(turn.start + slot), squares, scratches.part(thread * room, room))
            };
            let work = self.work(scratch);
            if self.joins {
                self.join(&found, work, image);
            } else {
                self.form_clusters(&found, squares, work, image);
            }
        });
    }

    /// The tokens by place.
    fn put_in_order(&self, mean: &[f32], order: &mut [u32]) {
        order.iter_mut().zip(self.special as u32..).for_each(|(order, token)| *order = token);
        best_first(order, self.keep, mean);
        let (attentive, rest) = order.split_at_mut(self.keep);
        attentive.sort_unstable_by(before(mean));
        rest.sort_unstable();
    }

    /// The lengths of those whose similarity will be asked for, by place.
    fn measure(&self, kernels: Kernels, rows: &[f32], order: &[u32], lengths: &mut [f64]) {
        if self.sources.count == 0 {
            return;
        }
        for every in [self.sources, self.destinations] {
            for place in (0..every.count).map(|number| every.place(number)) {
                let row = &rows[order[place] as usize * self.width..][..self.width];
                lengths[place] = kernels.run(Dot(row, row)).sqrt().max(1e-12);
            }
        }
    }

    /// For some sources from number `first` on the destination of the highest cosine, and that cosine.
    #[expect(clippy::too_many_arguments, reason = "parts of one memory")]
    fn propose(
        &self,
        kernels: Kernels,
        rows: &[f32],
        order: &[u32],
        lengths: &[f64],
        first: usize,
        products: &mut [f64],
        (similarity, nearest): (&mut [f32], &mut [u32]),
    ) {
        let columns = self.destinations.count;
        kernels.run(Pairs::<false> {
            rows,
            width: self.width,
            from: self.sources.some(order, first, similarity.len()),
            to: self.destinations.some(order, 0, columns),
            out: products,
            stride: columns,
        });
        let all = products.chunks_exact(columns).zip(similarity.iter_mut().zip(nearest)).enumerate();
        for (at, (products, (best, nearest))) in all {
            let length = lengths[self.sources.place(first + at)];
            (*best, *nearest) = (f32::NAN, 0);
            for (number, &product) in products.iter().enumerate() {
                let cosine = (product / (length * lengths[self.destinations.place(number)])) as f32;
                // The first of equals; a number before what is none.
                if cosine > *best || (best.is_nan() && !cosine.is_nan()) {
                    (*best, *nearest) = (cosine, number as u32);
                }
            }
        }
    }

    /// Squares of the distances of some inattentive tokens from number `first` on to those from `first` on.
    fn distances(&self, kernels: Kernels, rows: &[f32], order: &[u32], first: usize, squares: &mut [f64]) {
        let side = order.len() - self.keep;
        let rest = Every { first: self.keep, step: 1, count: side };
        kernels.run(Pairs::<true> {
            rows,
            width: self.width,
            from: rest.some(order, first, squares.len() / side),
            to: rest.some(order, first, side - first),
            out: &mut squares[first..],
            stride: side,
        });
    }

    /// The plan of an image whose inattentive tokens join the attentive ones.
    fn join(&self, found: &Found<'_>, work: Work<'_>, mut image: Image<'_>) {
        let group_of = work.group_of;
        let groups = self.special as u32..;
        group_of[..self.special].iter_mut().zip(0..).for_each(|(group, token)| *group = token);
        let (attentive, rest) = found.order.split_at(self.keep);
        attentive.iter().zip(groups.clone()).for_each(|(&token, group)| group_of[token as usize] = group);
        for (&token, &rank) in rest.iter().zip(found.nearest) {
            group_of[token as usize] = groups.start + rank;
        }
        image.fill(group_of, true, |token| found.mean[token]);
    }

    /// The plan of an image whose attentive tokens pair up and whose others form clusters.
    fn form_clusters(
        &self,
        found: &Found<'_>,
        squares: &mut [f64],
        mut work: Work<'_>,
        mut image: Image<'_>,
    ) {
        let (attentive, rest) = found.order.split_at(self.keep);
        work.group_of[..self.special].iter_mut().zip(0..).for_each(|(group, token)| *group = token);
        let proposals = &mut work.ranked[..found.similarity.len()];
        by_precedence(proposals, found.similarity);
        let accepted = &proposals[..self.pairs];
        // First those that leave, then numbers for those that stay, then the numbers of those that left.
        let groups = &mut work.group_of_rank[..self.keep];
        groups.fill(0);
        for &source in accepted {
            groups[self.sources.place(source as usize)] = LEAVES;
        }
        let mut next = self.special as u32;
        for group in groups.iter_mut().filter(|group| **group != LEAVES) {
            *group = next;
            next += 1;
        }
        for &source in accepted {
            let destination = self.destinations.place(found.nearest[source as usize] as usize);
            groups[self.sources.place(source as usize)] = groups[destination];
        }
        for (&token, &group) in attentive.iter().zip(&*groups) {
            work.group_of[token as usize] = group;
        }
        if self.centres == 0 {
            // Nobody's members.
            rest.iter().for_each(|&token| work.group_of[token as usize] = next);
        } else {
            self.assign(rest, squares, &mut work, next);
        }
        image.fill(work.group_of, true, |token| found.mean[token]);
    }

    /// Density-peak clustering of the inattentive tokens; the clusters are groups from `first` on.
    fn assign(&self, rest: &[u32], squares: &mut [f64], work: &mut Work<'_>, first: u32) {
        let side = rest.len();
        let width = self.width as f64;
        for i in 0..side {
            for j in i..side {
                let square = squares[i * side + j];
                // What is no number is infinitely far.
                let square = if square.is_nan() { f64::INFINITY } else { square / width };
                squares[i * side + j] = square;
                squares[j * side + i] = square;
            }
        }
        let (density, gamma) = (&mut work.density[..side], &mut work.gamma[..side]);
        for (density, row) in density.iter_mut().zip(squares.chunks_exact(side)) {
            let mut near = row;
            if self.neighbours > 0 {
                let count = self.neighbours.min(side);
                work.near.copy_from_slice(row);
                if count < side {
                    work.near.select_nth_unstable_by(count, f64::total_cmp);
                }
                work.near[..count].sort_unstable_by(f64::total_cmp);
                near = &work.near[..count];
            }
            *density = (-near.iter().sum::<f64>() / near.len() as f64).exp() as f32;
        }
        for ((gamma, row), &own) in gamma.iter_mut().zip(squares.chunks_exact(side)).zip(&*density) {
            // Tokens infinitely far are nobody's neighbours, and nobody's farthest.
            let (mut denser, mut farthest) = (f64::INFINITY, 0.0_f64);
            for (&square, &other) in row.iter().zip(&*density).filter(|(square, _)| square.is_finite()) {
                farthest = farthest.max(square);
                if other > own {
                    denser = denser.min(square);
                }
            }
            let delta = if denser.is_finite() { denser } else { farthest };
            *gamma = own * delta.sqrt() as f32;
        }
        let centres = &mut work.ranked[..side];
        by_precedence(centres, gamma);
        let centres = &centres[..self.centres];
        for (&token, row) in rest.iter().zip(squares.chunks_exact(side)) {
            let (mut nearest, mut least) = (0, f64::INFINITY);
            for (cluster, &centre) in centres.iter().enumerate() {
                // The first of equals.
                if row[centre as usize] < least {
                    (nearest, least) = (cluster, row[centre as usize]);
                }
            }
            work.group_of[token as usize] = first + nearest as u32;
        }
        // A centre is its own, whoever lies as near.
        for (&centre, cluster) in centres.iter().zip(first..) {
            work.group_of[rest[centre as usize] as usize] = cluster;
        }
    }
}

/// `order` becomes the indices of some scores in order of precedence.
fn by_precedence(order: &mut [u32], scores: &[f32]) {
    order.iter_mut().zip(0..).for_each(|(order, index)| *order = index);
    order.sort_unstable_by(before(scores));
}
