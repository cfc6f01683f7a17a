//! Attention of one head: queries times keys and the map times values in tiles, softmax between them in vector registers.

use super::{
    super::{
        attention::QueryRun,
        gemm::{Out, OutForm, Rows},
        simd::{Avx512, Simd, math},
    },
    Amx, BLOCK_ROWS, CHUNK, PANEL, TILE, TILE_ROWS,
    detect::Kernel,
    pack::{PackLeft, PackRows, PackTransposed, left_values, store_rounded},
    product::{AsItIs, Done, Scaled, left_len},
    tile::{Block, Configured},
    tile_values,
};

static NO_BIAS: [f32; PANEL] = [0.0; PANEL];

/// `f32` values that the work on one head takes.
pub(in crate::cpu) fn head_values(tokens: usize, head_dim: usize) -> usize {
    Room::new(tokens, head_dim).all()
}

/// The parts of that memory, each of whole cache lines.
struct Room {
    keys: usize,
    values: usize,
    queries: usize,
    scores: usize,
    map: usize,
}

impl Room {
    fn new(tokens: usize, head_dim: usize) -> Self {
        Self {
            keys: tile_values(head_dim, tokens) / 2,
            values: tile_values(tokens, head_dim) / 2,
            queries: left_values(BLOCK_ROWS, head_dim) / 2,
            scores: BLOCK_ROWS * tokens.next_multiple_of(PANEL),
            map: left_values(BLOCK_ROWS, tokens) / 2,
        }
    }

    fn all(&self) -> usize {
        self.keys + self.values + self.queries + self.scores + self.map + BLOCK_ROWS * PANEL
    }
}

/// The scores and contexts of a head's queries.
pub(in crate::cpu) fn attend(amx: Amx, head: QueryRun<'_>) {
    amx.run(Attend { amx, head });
}

struct Attend<'a> {
    amx: Amx,
    head: QueryRun<'a>,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: Avx512) {
        let Self { amx, head } = self;
        let (mut class_scores, mut received, mut kept) = (head.class, head.received, head.kept);
        let (tokens, head_dim) = (head.tokens, head.head_dim);
        let (row, room) = (tokens.next_multiple_of(PANEL), Room::new(tokens, head_dim));
        assert!(head.bias.len() == row && tokens > 0 && head_dim > 0, "a row of biases for other tokens");
        let (keys, rest) = head.scratch.split_at_mut(room.keys);
        let (values, rest) = rest.split_at_mut(room.values);
        let (queries, rest) = rest.split_at_mut(room.queries);
        let (scores, rest) = rest.split_at_mut(room.scores);
        let (map, sums) = rest.split_at_mut(room.map);
        let [keys, values, queries, map]: [&mut [u16]; 4] =
            [keys, values, queries, map].map(bytemuck::cast_slice_mut);
        assert!(sums.len() >= BLOCK_ROWS * PANEL);
        for (panel, to) in keys.chunks_exact_mut(tile_values(head_dim, PANEL)).enumerate() {
            let (first, last) = (panel * PANEL, tokens.min((panel + 1) * PANEL));
            let from = first * head.stride + head.keys;
            let from = &head.rows[from..from + (last - first - 1) * head.stride + head_dim];
            PackTransposed { from, stride: head.stride, depth: head_dim, to }.run(s);
        }
        if let Some((from, stride)) = head.values {
            PackRows { from, stride, depth: tokens, width: head_dim, to: values }.run(s);
        }
        let configured = Configured::new(amx);
        for first in head.queries.clone().step_by(BLOCK_ROWS) {
            let part = first..head.queries.end.min(first + BLOCK_ROWS);
            let two = part.len() > TILE_ROWS;
            let rows = &head.rows[first * head.stride + head.queries_at..];
            let rows = Rows { data: rows, count: part.len(), stride: head.stride };
            let used = left_values(part.len(), head_dim);
            PackLeft { rows, depth: head_dim, to: &mut queries[..used] }.run(s);
            let chunks = head_dim.div_ceil(CHUNK);
            for panel in 0..row / PANEL {
                let b = keys[panel * chunks * 2 * TILE..].as_ptr();
                // SAFETY: the queries' tiles, the panel's and 32 rows of scores lie in their parts of the memory.
                unsafe {
                    let scores = scores[panel * PANEL..].as_mut_ptr();
                    block(&configured, two, queries.as_ptr(), b, chunks, scores, row);
                }
            }
            let class = if first == 0 { class_scores.as_deref_mut() } else { None };
            if class.is_some() {
                let query = &head.rows[head.queries_at..][..head_dim];
                products_in_f32(s, query, &head.rows[head.keys..], head.stride, &mut scores[..tokens]);
            }
            let softmax = Softmax {
                scores: &mut scores[..part.len() * row],
                map,
                tokens,
                bias: head.bias,
                scale: head.scale,
                class,
                received: received.as_deref_mut(),
                kept: kept.as_deref_mut().map(|kept| &mut kept[(first - head.queries.start) * row..]),
            };
            let inverse = softmax.run(s);
            if head.values.is_none() {
                continue;
            }
            let chunks = tokens.div_ceil(CHUNK);
            let OutForm::Rows { stride } = head.out.form() else { unreachable!("contexts are rows") };
            head.out.check(first - head.queries.start + part.len(), &(0..head_dim), left_len);
            for panel in 0..head_dim.div_ceil(PANEL) {
                let at = panel * PANEL;
                let b = values[panel * chunks * 2 * TILE..].as_ptr();
                // SAFETY: as above; the queries' rows of the result are this task's own, by the assertion of `check`.
                unsafe {
                    block(&configured, two, map.as_ptr(), b, chunks, sums.as_mut_ptr(), PANEL);
                    let done = Done {
                        sums: sums.as_ptr(),
                        rows: part.len(),
                        bias: NO_BIAS.as_ptr(),
                        valid: 0..PANEL.min(head_dim - at),
                        to: head.out.pointer().add((first - head.queries.start) * stride + at),
                        stride,
                    };
                    done.write(s, Scaled(&inverse), 0..part.len());
                }
            }
        }
    }
}

/// `f32` values that [`times`] takes.
pub(in crate::cpu) fn times_values(depth: usize, width: usize) -> usize {
    tile_values(depth, width) / 2 + left_values(BLOCK_ROWS, depth) / 2 + BLOCK_ROWS * PANEL
}

/// Rows of `depth` values times a right factor of as many rows, (depth, width) and `values.1` apart, into rows of `out`.
pub(in crate::cpu) fn times(
    amx: Amx,
    rows: Rows<'_>,
    depth: usize,
    values: (&[f32], usize),
    width: usize,
    out: Out<'_>,
    scratch: &mut [f32],
) {
    amx.run(Times { amx, rows, depth, values, width, out, scratch });
}

struct Times<'a> {
    amx: Amx,
    rows: Rows<'a>,
    depth: usize,
    values: (&'a [f32], usize),
    width: usize,
    out: Out<'a>,
    scratch: &'a mut [f32],
}

impl Kernel for Times<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: Avx512) {
        let Self { amx, rows, depth, values: (from, values_stride), width, out, scratch } = self;
        let (tiles, rest) = scratch.split_at_mut(tile_values(depth, width) / 2);
        let (left, sums) = rest.split_at_mut(left_values(BLOCK_ROWS, depth) / 2);
        let (tiles, left): (&mut [u16], &mut [u16]) =
            (bytemuck::cast_slice_mut(tiles), bytemuck::cast_slice_mut(left));
        assert!(sums.len() >= BLOCK_ROWS * PANEL && depth > 0);
        PackRows { from, stride: values_stride, depth, width, to: tiles }.run(s);
        out.check(rows.count, &(0..width), left_len);
        let OutForm::Rows { stride } = out.form() else { unreachable!("contexts are rows") };
        let (configured, chunks) = (Configured::new(amx), depth.div_ceil(CHUNK));
        for first in (0..rows.count).step_by(BLOCK_ROWS) {
            let count = BLOCK_ROWS.min(rows.count - first);
            let part = Rows { data: &rows.data[first * rows.stride..], count, stride: rows.stride };
            PackLeft { rows: part, depth, to: &mut left[..left_values(count, depth)] }.run(s);
            for panel in 0..width.div_ceil(PANEL) {
                let at = panel * PANEL;
                let b = tiles[panel * chunks * 2 * TILE..].as_ptr();
                // SAFETY: the rows' tiles, the panel's and the sums lie in their parts of the memory, the result's rows and
                // columns in `out`, by the assertion of `check`.
                unsafe {
                    let two = count > TILE_ROWS;
                    block(&configured, two, left.as_ptr(), b, chunks, sums.as_mut_ptr(), PANEL);
                    let done = Done {
                        sums: sums.as_ptr(),
                        rows: count,
                        bias: NO_BIAS.as_ptr(),
                        valid: 0..PANEL.min(width - at),
                        to: out.pointer().add(first * stride + at),
                        stride,
                    };
                    done.write(s, AsItIs, 0..count);
                }
            }
        }
    }
}

/// The sums of 16 or, if `two`, 32 rows times a panel.
///
/// # Safety
/// The factors' tiles can be read and the rows of sums, `stride` apart, written.
#[inline(always)]
unsafe fn block(
    configured: &Configured,
    two: bool,
    a: *const u16,
    b: *const u16,
    chunks: usize,
    sums: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if two {
            Block::<true>::begin(configured, false, sums, stride);
            for chunk in 0..chunks {
                let (a, b) = (a.add(chunk * TILE), b.add(chunk * 2 * TILE));
                Block::<true>::step(configured, a, a.add(chunks * TILE), b, b);
            }
            Block::<true>::end(configured, sums, stride);
        } else {
            Block::<false>::begin(configured, false, sums, stride);
            for chunk in 0..chunks {
                let (a, b) = (a.add(chunk * TILE), b.add(chunk * 2 * TILE));
                Block::<false>::step(configured, a, a, b, b);
            }
            Block::<false>::end(configured, sums, stride);
        }
    }
}

/// The first query's products with all keys, `stride` apart, nothing rounded: what is decided by class scores is decided in `f32`.
#[inline(always)]
fn products_in_f32(s: Avx512, query: &[f32], keys: &[f32], stride: usize, scores: &mut [f32]) {
    for (score, key) in scores.iter_mut().zip(keys.chunks(stride)) {
        let (q, k) = (query.chunks_exact(Avx512::LANES), key[..query.len()].chunks_exact(Avx512::LANES));
        let rest = s.mul(s.load_some(q.remainder(), 0.0), s.load_some(k.remainder(), 0.0));
        *score = s.sum(q.zip(k).fold(rest, |sum, (q, k)| s.fma(s.load(q), s.load(k), sum)));
    }
}

/// Products become `e^(scale·product + bias - largest)`, rounded, as the left factor of the product with the values.
struct Softmax<'a> {
    /// Rows as long as `bias`. Their first vectors hold the exponentials afterwards if somebody asked for scores.
    scores: &'a mut [f32],
    map: &'a mut [u16],
    tokens: usize,
    bias: &'a [f32],
    scale: f32,
    /// The first row's softmax goes here.
    class: Option<&'a mut [f32]>,
    /// The columns of the softmax are added here.
    received: Option<&'a mut [f32]>,
    /// Its rows go here, as long as `bias`.
    kept: Option<&'a mut [f32]>,
}

impl Softmax<'_> {
    /// One over the rows' sums, which are of the exponentials before they are rounded.
    #[inline(always)]
    fn run(self, s: Avx512) -> [f32; BLOCK_ROWS] {
        const LANES: usize = Avx512::LANES;
        let Self { scores, map, tokens, bias, scale, mut class, mut received, mut kept } = self;
        let (length, scale) = (bias.len(), s.splat(scale));
        let chunks = length / CHUNK;
        let mut inverses = [0.0; BLOCK_ROWS];
        for (i, (scores, inverse)) in scores.chunks_exact_mut(length).zip(&mut inverses).enumerate() {
            scores[tokens..].fill(0.0);
            // Two at a time, so that they need not wait for each other.
            let mut largest = [s.splat(f32::NEG_INFINITY); 2];
            for (x, b) in scores.chunks_exact_mut(CHUNK).zip(bias.chunks_exact(CHUNK)) {
                for (j, largest) in largest.iter_mut().enumerate() {
                    let score = s.fma(s.load(&x[j * LANES..]), scale, s.load(&b[j * LANES..]));
                    s.store(&mut x[j * LANES..], score);
                    *largest = s.largest(score, *largest);
                }
            }
            let largest = s.maximum(s.largest(largest[0], largest[1]));
            let largest = s.splat(if largest == f32::NEG_INFINITY { 0.0 } else { largest });
            let keep = received.is_some() || kept.is_some() || (i == 0 && class.is_some());
            let mut sums = [s.splat(0.0); 2];
            let to = &mut map[i / TILE_ROWS * chunks * TILE + i % TILE_ROWS * CHUNK..];
            for (chunk, x) in scores.chunks_exact_mut(CHUNK).enumerate() {
                let mut e = [s.splat(0.0); 2];
                for (j, e) in e.iter_mut().enumerate() {
                    // The last chunk may be half empty.
                    if chunk * CHUNK + j * LANES < tokens {
                        *e = math::exp_negative(s, s.sub(s.load(&x[j * LANES..]), largest));
                        sums[j] = s.add(sums[j], *e);
                        if keep {
                            s.store(&mut x[j * LANES..], *e);
                        }
                    }
                }
                // SAFETY: this runs where there is AVX-512 with bf16.
                unsafe { store_rounded(e, &mut to[chunk * TILE..][..CHUNK]) };
            }
            let sum = s.sum(s.add(sums[0], sums[1]));
            *inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
            if let (0, Some(class)) = (i, &mut class) {
                class.iter_mut().zip(&*scores).for_each(|(score, e)| *score = e * *inverse);
            }
            let used = tokens.next_multiple_of(LANES);
            if let Some(received) = &mut received {
                let inverse = s.splat(*inverse);
                let columns = received[..used].chunks_exact_mut(LANES).zip(scores.chunks_exact(LANES));
                columns.for_each(|(y, e)| s.store(y, s.fma(s.load(e), inverse, s.load(y))));
            }
            if let Some(kept) = &mut kept {
                let inverse = s.splat(*inverse);
                let row = kept[i * length..][..used].chunks_exact_mut(LANES);
                row.zip(scores.chunks_exact(LANES)).for_each(|(y, e)| s.store(y, s.mul(s.load(e), inverse)));
            }
        }
        inverses
    }
}
