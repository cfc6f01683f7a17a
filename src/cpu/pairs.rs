//! Products and distances of pairs of rows, in `f64`: decisions that hang on them then are those of the
//! [reference](crate::reference), where sums in `f32` would turn many a close one. A few tens of thousands of pairs an image are
//! less than a hundredth of what a block of a transformer computes.

use super::simd::{Kernel, Simd};

/// Rows of a tile, on either side.
const ROWS: usize = 4;
const COLUMNS: usize = 2;

/// Some tokens out of a list: those at the places `first`, `first + step`, and so on.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) first: usize,
    pub(super) step: usize,
    pub(super) count: usize,
}

impl Places<'_> {
    pub(super) fn at(&self, index: usize) -> usize {
        self.tokens[self.first + index * self.step] as usize
    }

    /// The rows of some of these tokens from number `begin` on, the last one again where there are no more.
    #[inline(always)]
    fn rows<'r, const N: usize>(&self, rows: &'r [f32], width: usize, begin: usize) -> [&'r [f32]; N] {
        std::array::from_fn(|i| &rows[self.at((begin + i).min(self.count - 1)) * width..][..width])
    }
}

/// The product of each row with each other, or the square of their distance.
pub(super) struct Pairs<'a, const DISTANCE: bool> {
    /// Rows of `width` values, one for each token.
    pub(super) rows: &'a [f32],
    pub(super) width: usize,
    pub(super) from: Places<'a>,
    pub(super) to: Places<'a>,
    /// A row of `stride` values for each of `from`, the first of which are written.
    pub(super) out: &'a mut [f64],
    pub(super) stride: usize,
}

impl<const DISTANCE: bool> Kernel for Pairs<'_, DISTANCE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, width, from, to, out, stride } = self;
        if from.count == 0 || to.count == 0 {
            return;
        }
        assert!(to.count <= stride && (from.count - 1) * stride + to.count <= out.len());
        for first in (0..from.count).step_by(ROWS) {
            let a: [&[f32]; ROWS] = from.rows(rows, width, first);
            for column in (0..to.count).step_by(COLUMNS) {
                let b: [&[f32]; COLUMNS] = to.rows(rows, width, column);
                let sums = tile::<S, DISTANCE>(s, a, b);
                for (i, sums) in sums.into_iter().enumerate().take(from.count - first) {
                    for (j, sum) in sums.into_iter().enumerate().take(to.count - column) {
                        out[(first + i) * stride + column + j] = s.wide_sum(sum);
                    }
                }
            }
        }
    }
}

/// The sums of a tile. The same bits for a pair wherever it stands, and whichever of the two comes first.
#[inline(always)]
fn tile<S: Simd, const DISTANCE: bool>(
    s: S,
    a: [&[f32]; ROWS],
    b: [&[f32]; COLUMNS],
) -> [[S::Wide; COLUMNS]; ROWS] {
    let width = a[0].len();
    assert!(a.iter().chain(&b).all(|row| row.len() == width));
    let half = S::LANES / 2;
    let whole = width / half * half;
    let mut sums = [[s.wide_zero(); COLUMNS]; ROWS];
    // SAFETY: half a register's values from each place up to `whole` lie in each row.
    unsafe {
        for at in (0..whole).step_by(half) {
            let mut right = [s.wide_zero(); COLUMNS];
            for j in 0..COLUMNS {
                right[j] = s.widen(b[j].as_ptr().add(at));
            }
            for i in 0..ROWS {
                let left = s.widen(a[i].as_ptr().add(at));
                for j in 0..COLUMNS {
                    sums[i][j] = more::<S, DISTANCE>(s, left, right[j], sums[i][j]);
                }
            }
        }
    }
    if whole < width {
        // Zeros fill up: they add nothing to either kind of sum.
        let (a, b) = (a.map(|row| filled(&row[whole..])), b.map(|row| filled(&row[whole..])));
        for i in 0..ROWS {
            for j in 0..COLUMNS {
                // SAFETY: half a register has at most 8 values.
                let (left, right) = unsafe { (s.widen(a[i].as_ptr()), s.widen(b[j].as_ptr())) };
                sums[i][j] = more::<S, DISTANCE>(s, left, right, sums[i][j]);
            }
        }
    }
    sums
}

/// Values with zeros behind them.
fn filled(values: &[f32]) -> [f32; 8] {
    let mut all = [0.0; 8];
    all[..values.len()].copy_from_slice(values);
    all
}

#[inline(always)]
fn more<S: Simd, const DISTANCE: bool>(s: S, a: S::Wide, b: S::Wide, sum: S::Wide) -> S::Wide {
    if DISTANCE {
        let difference = s.wide_sub(a, b);
        s.wide_fma(difference, difference, sum)
    } else {
        s.wide_fma(a, b, sum)
    }
}

/// The product of two rows.
pub(super) struct Dot<'a>(pub(super) &'a [f32], pub(super) &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let Self(a, b) = self;
        assert_eq!(a.len(), b.len());
        let half = S::LANES / 2;
        let whole = a.len() / half * half;
        let mut sums = [s.wide_zero(); 4];
        let mut at = 0;
        // SAFETY: half a register's values from each place below `whole` lie in both.
        unsafe {
            while at + 4 * half <= whole {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = at + i * half;
                    *sum = s.wide_fma(s.widen(a.as_ptr().add(at)), s.widen(b.as_ptr().add(at)), *sum);
                }
                at += 4 * half;
            }
            while at < whole {
                sums[0] = s.wide_fma(s.widen(a.as_ptr().add(at)), s.widen(b.as_ptr().add(at)), sums[0]);
                at += half;
            }
        }
        let tail = a[whole..].iter().zip(&b[whole..]).map(|(&a, &b)| f64::from(a) * f64::from(b));
        sums.into_iter().map(|sum| s.wide_sum(sum)).sum::<f64>() + tail.sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::simd::Instructions, *};

    #[test]
    fn pairs_are_what_they_say() {
        for kernels in Instructions::ALL.into_iter().filter_map(|instructions| instructions.checked().ok()) {
            for width in [1, 3, 4, 8, 13, 16, 33] {
                let values: Vec<f32> = (0..9 * width).map(|i| (i as f32 * 0.37).sin()).collect();
                let row = |token: u32| &values[token as usize * width..][..width];
                let tokens = [5, 0, 7, 2, 8, 1, 3];
                let from = Places { tokens: &tokens, first: 1, step: 2, count: 3 };
                let to = Places { tokens: &tokens, first: 0, step: 1, count: 7 };
                let mut products = [7.0; 3 * 8];
                let (rows, stride) = (&values[..], 8);
                kernels.run(Pairs::<false> { rows, width, from, to, out: &mut products, stride });
                let mut distances = [7.0; 3 * 8];
                kernels.run(Pairs::<true> { rows, width, from, to, out: &mut distances, stride });
                for (i, a) in [0, 2, 1].into_iter().enumerate() {
                    for (j, &b) in tokens.iter().enumerate() {
                        let pairs = || row(a).iter().zip(row(b)).map(|(&a, &b)| (f64::from(a), f64::from(b)));
                        let product: f64 = pairs().map(|(a, b)| a * b).sum();
                        let distance: f64 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
                        assert!((products[i * 8 + j] - product).abs() < 1e-13, "{width} {i} {j}");
                        assert!((distances[i * 8 + j] - distance).abs() < 1e-13, "{width} {i} {j}");
                        assert!((kernels.run(Dot(row(a), row(b))) - product).abs() < 1e-13);
                    }
                    assert_eq!((products[i * 8 + 7], distances[i * 8 + 7]), (7.0, 7.0), "beyond the row");
                }
            }
        }
    }
}
