//! Position tables of another grid: bicubic resampling as PyTorch's `interpolate` computes it.

use crate::{Error, Result, Tensor};

/// Which of the variants of bicubic resampling a checkpoint's authors use. They differ visibly (1e-2 of the values),
/// so the choice belongs to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionResampling {
    /// Cubic convolution with a = -0.75, four taps whatever the scale: DeiT, EViT, Hugging Face's ViT.
    Bicubic,
    /// a = -0.5, the filter widened when the grid shrinks, as Pillow does: DINOv2 with registers.
    Antialiased,
    /// [`PositionResampling::Bicubic`] with the scale `(n + 0.1)/M` instead of `n/M` for `n` of `M` patches: the
    /// official DINOv2 without registers, whose authors guard against rounding that way and trained with it.
    Offset,
}

impl PositionResampling {
    /// The name shown by `foveate info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bicubic => "bicubic",
            Self::Antialiased => "bicubic, antialiased",
            Self::Offset => "bicubic, scale offset 0.1",
        }
    }
}

/// Resamples a position table (rows·columns, C), row-major over the grid `from`, to the grid `to`.
///
/// Equals `interpolate(mode="bicubic", align_corners=False)` on the (1, C, rows, columns) table up to the rounding of
/// f32: pixel centres at halves, borders clamped (antialiased: cut off and renormalised). Equal grids are a copy.
/// Sums are in f64.
///
/// # Errors
/// When `from` does not describe the table or a grid has an empty side.
///
/// # Examples
/// ```
/// use foveate::{Tensor, weights::{PositionResampling, resample_positions}};
/// let flat = Tensor::new(&[4, 1], vec![2.0; 4])?;
/// let larger = resample_positions(&flat, [2, 2], [3, 5], PositionResampling::Bicubic)?;
/// assert_eq!(larger.shape(), [15, 1]);
/// assert!(larger.data().iter().all(|v| (v - 2.0).abs() < 1e-6));
/// # Ok::<(), foveate::Error>(())
/// ```
pub fn resample_positions(
    table: &Tensor,
    from: [usize; 2],
    to: [usize; 2],
    mode: PositionResampling,
) -> Result<Tensor> {
    const OP: &str = "resample_positions";
    let fits = table.shape().len() == 2 && from[0].checked_mul(from[1]) == Some(table.dim(0));
    if !fits || from.contains(&0) || to.contains(&0) {
        return Err(Error::argument(
            OP,
            format!("a table of shape {:?} cannot go from grid {from:?} to grid {to:?}", table.shape()),
        ));
    }
    if from == to {
        return Ok(table.clone());
    }
    let width = table.width();
    let [rows, columns] = to;
    let Some(size) = rows.checked_mul(columns).and_then(|n| n.checked_mul(width)) else {
        return Err(Error::argument(OP, format!("grid {to:?} is too large to address")));
    };

    // Columns first, then rows: the kernel is separable.
    let along_columns = Taps::new(from[1], columns, mode);
    let mut wide = vec![0.0_f64; from[0] * columns * width];
    for (index, out) in wide.chunks_exact_mut(width.max(1)).enumerate() {
        let (row, column) = (index / columns, index % columns);
        for (source, weight) in along_columns.of(column) {
            let start = (row * from[1] + source) * width;
            for (o, &v) in out.iter_mut().zip(&table.data()[start..start + width]) {
                *o += weight * f64::from(v);
            }
        }
    }
    let along_rows = Taps::new(from[0], rows, mode);
    let mut data = Vec::with_capacity(size);
    let mut sum = vec![0.0_f64; columns * width];
    for row in 0..rows {
        sum.fill(0.0);
        for (source, weight) in along_rows.of(row) {
            let line = &wide[source * columns * width..(source + 1) * columns * width];
            for (o, &v) in sum.iter_mut().zip(line) {
                *o += weight * v;
            }
        }
        data.extend(sum.iter().map(|&v| v as f32));
    }
    Tensor::new(&[rows * columns, width], data)
}

/// The source positions and weights of every output position along one axis.
struct Taps {
    starts: Vec<usize>,
    entries: Vec<(usize, f64)>,
}

impl Taps {
    fn new(from: usize, to: usize, mode: PositionResampling) -> Self {
        let mut taps = Self { starts: vec![0], entries: Vec::new() };
        for position in 0..to {
            match mode {
                PositionResampling::Bicubic => taps.clamped(from, position, from as f64 / to as f64),
                PositionResampling::Offset => taps.clamped(from, position, from as f64 / (to as f64 + 0.1)),
                PositionResampling::Antialiased => taps.widened(from, position, from as f64 / to as f64),
            }
            taps.starts.push(taps.entries.len());
        }
        taps
    }

    fn of(&self, position: usize) -> impl Iterator<Item = (usize, f64)> + '_ {
        self.entries[self.starts[position]..self.starts[position + 1]].iter().copied()
    }

    /// The four neighbours of the position's centre; those beyond the border are the border.
    fn clamped(&mut self, from: usize, position: usize, scale: f64) {
        let centre = (position as f64 + 0.5) * scale - 0.5;
        let first = centre.floor() as i64 - 1;
        for tap in 0..4_i64 {
            let at = first + tap;
            let weight = cubic((centre - at as f64).abs(), -0.75);
            self.entries.push((at.clamp(0, from as i64 - 1) as usize, weight));
        }
    }

    /// All positions under the kernel, stretched by `scale` when that is above 1; weights sum to 1.
    fn widened(&mut self, from: usize, position: usize, scale: f64) {
        let centre = (position as f64 + 0.5) * scale;
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let last = ((centre + support + 0.5) as usize).min(from);
        let begin = self.entries.len();
        self.entries
            .extend((first..last).map(|at| (at, cubic(((at as f64 - centre + 0.5) / stretch).abs(), -0.5))));
        let total: f64 = self.entries[begin..].iter().map(|&(_, weight)| weight).sum();
        for (_, weight) in &mut self.entries[begin..] {
            *weight /= total;
        }
    }
}

/// Keys' cubic convolution kernel at distance `x ≥ 0`.
fn cubic(x: f64, a: f64) -> f64 {
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [PositionResampling; 3] =
        [PositionResampling::Bicubic, PositionResampling::Antialiased, PositionResampling::Offset];

    #[test]
    fn weights_sum_to_one_at_every_size() {
        for mode in MODES {
            for from in [1, 2, 3, 7, 37] {
                for to in [1, 2, 5, 16, 64] {
                    let taps = Taps::new(from, to, mode);
                    for position in 0..to {
                        let total: f64 = taps.of(position).map(|(_, weight)| weight).sum();
                        assert!(
                            (total - 1.0).abs() < 1e-12,
                            "{mode:?} {from} -> {to} at {position}: {total}"
                        );
                        assert!(taps.of(position).all(|(source, _)| source < from));
                    }
                }
            }
        }
    }

    /// Values that PyTorch's `interpolate` gave for this 4x4 table (size or scale factor, antialias off or on).
    #[test]
    fn both_filters_and_the_offset_match_pytorch() {
        let table =
            Tensor::new(&[16, 1], (0..16).map(|i| ((i * 37) % 17) as f32 / 8.0 - 1.0).collect()).unwrap();
        let small = [-0.646_519, -0.210_086, 0.695_837, -0.238_389, -0.489_649, 0.397_633];
        let small_antialiased = [-0.426_944, -0.281_866, 0.388_352, 0.123_951, -0.401_205, 0.385_186];
        let large =
            [-1.156_861, -0.934_318, -0.495_551, -0.052_651, 0.188_093, -0.24519, 0.13323, -0.223_897];
        let large_antialiased =
            [-1.11491, -0.865_614, -0.466_283, -0.066_952, 0.182_344, -0.273_579, 0.065_841, -0.257_353];
        for (to, mode, want) in [
            ([3, 2], PositionResampling::Offset, &small[..]),
            ([3, 2], PositionResampling::Antialiased, &small_antialiased),
            ([6, 5], PositionResampling::Offset, &large),
            ([6, 5], PositionResampling::Antialiased, &large_antialiased),
        ] {
            let got = resample_positions(&table, [4, 4], to, mode).unwrap();
            for (got, want) in got.data().iter().zip(want) {
                assert!((got - want).abs() < 2e-6, "{mode:?} to {to:?}: {got} instead of {want}");
            }
        }
    }

    #[test]
    fn doubling_four_positions_by_hand() {
        // Output 3 of 8 has its centre at 1.25: distances 1.25, 0.25, 0.75, 1.75 from sources 0, 1, 2, 3, and with
        // a = -0.75 the weights -0.10546875, 0.87890625, 0.26171875, -0.03515625.
        let table = Tensor::new(&[4, 1], vec![1.0, 10.0, 100.0, 1000.0]).unwrap();
        let out = resample_positions(&table, [1, 4], [1, 8], PositionResampling::Bicubic).unwrap();
        let expected = -0.105_468_75 + 8.789_062_5 + 26.171_875 - 35.156_25;
        assert!((out.data()[3] - expected).abs() < 1e-4, "{} {expected}", out.data()[3]);
    }

    #[test]
    fn the_axes_do_not_get_mixed_up() {
        // A table that varies along its rows only still does after resampling, and the other way round.
        let table = Tensor::new(&[6, 1], vec![0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).unwrap();
        for mode in MODES {
            let out = resample_positions(&table, [2, 3], [5, 4], mode).unwrap();
            for row in out.data().chunks(4) {
                assert!(row.iter().all(|v| (v - row[0]).abs() < 1e-6));
            }
            assert!(out.data()[0] < 0.2 && out.data()[19] > 0.8);
        }
    }

    #[test]
    fn equal_grids_are_untouched_and_impossible_ones_refused() {
        let table = Tensor::new(&[6, 2], (0..12_u8).map(f32::from).collect()).unwrap();
        for mode in MODES {
            assert_eq!(resample_positions(&table, [2, 3], [2, 3], mode).unwrap(), table);
            assert!(resample_positions(&table, [2, 2], [3, 3], mode).is_err());
            assert!(resample_positions(&table, [2, 3], [0, 3], mode).is_err());
            assert!(resample_positions(&table, [2, 3], [usize::MAX, 3], mode).is_err());
        }
    }
}
