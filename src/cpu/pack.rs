//! Weights in the order in which products read them.

use super::{
    amx::{self, Amx, Tiles, place, tile_values},
    memory::Lines,
    pool::lines,
    simd::{Kernel, Kernels, Simd},
    threads::Threads,
};

/// Columns of a panel: two of the widest registers, a multiple of two of every other one's.
pub(super) const PANEL: usize = 32;

/// The right factor of a product, (depth, columns), in panels of [`PANEL`] columns: element (i, j) is
/// `data[(j / PANEL · depth + i)·PANEL + j % PANEL]`. Columns that fill up the last panel hold anything.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) data: &'a [f32],
    pub(super) depth: usize,
    pub(super) columns: usize,
}

/// Values that panels of such a factor take.
pub(super) fn panel_values(depth: usize, columns: usize) -> usize {
    columns.div_ceil(PANEL) * depth * PANEL
}

/// A right factor, as products take it.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    F32(Panels<'a>),
    Bf16(Amx, Tiles<'a>),
}

/// What a packed weight was and is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// It was (outputs, inputs), as the weight of an affine layer is.
    Transposed,
    /// As above, and its values are rounded to bf16.
    TransposedBf16,
    /// It was a right factor as it stands, (inputs, outputs).
    Columns,
}

/// A weight, packed. Its outputs are the columns.
pub(super) struct Packed {
    lines: Lines,
    form: Form,
    /// What multiplies bf16.
    amx: Option<Amx>,
    inputs: usize,
    outputs: usize,
}

impl Packed {
    /// Packs a weight (outputs, inputs).
    pub(super) fn new(
        weight: &[f32],
        [outputs, inputs]: [usize; 2],
        kernels: Kernels,
        threads: &Threads,
    ) -> Self {
        let mut lines = lines(panel_values(inputs, outputs));
        let panels = Shared::of(bytemuck::cast_slice_mut(&mut lines));
        threads.run(outputs.div_ceil(PANEL), |_, panel| {
            let first = panel * PANEL;
            let rows = &weight[first * inputs..(first + PANEL).min(outputs) * inputs];
            // SAFETY: each task has a panel of its own.
            let to = unsafe { panels.part(panel * inputs * PANEL, inputs * PANEL) };
            kernels.run(PackTransposed { from: rows, stride: inputs, depth: inputs, to });
        });
        Self { lines, form: Form::Transposed, amx: None, inputs, outputs }
    }

    /// Packs a weight (outputs, inputs), rounded to bf16.
    pub(super) fn bf16(weight: &[f32], [outputs, inputs]: [usize; 2], amx: Amx, threads: &Threads) -> Self {
        let mut lines = lines(tile_values(inputs, outputs) / 2);
        let panels = Shared::of(bytemuck::cast_slice_mut::<_, u16>(&mut lines));
        let values = tile_values(inputs, amx::PANEL);
        threads.run(outputs.div_ceil(amx::PANEL), |_, panel| {
            let first = panel * amx::PANEL;
            let rows = &weight[first * inputs..(first + amx::PANEL).min(outputs) * inputs];
            // SAFETY: each task has a panel of its own.
            let to = unsafe { panels.part(panel * values, values) };
            amx::pack_transposed(amx, rows, inputs, inputs, to);
        });
        Self { lines, form: Form::TransposedBf16, amx: Some(amx), inputs, outputs }
    }

    /// Packs a right factor (inputs, outputs).
    pub(super) fn of_columns(weight: &[f32], outputs: usize) -> Self {
        let inputs = weight.len().checked_div(outputs).unwrap_or(0);
        let mut lines = lines(panel_values(inputs, outputs));
        let panels: &mut [f32] = bytemuck::cast_slice_mut(&mut lines);
        for (panel, to) in panels.chunks_exact_mut((inputs * PANEL).max(1)).enumerate() {
            let width = PANEL.min(outputs - panel * PANEL);
            PackRows { from: &weight[panel * PANEL..], stride: outputs, width, to }.run();
        }
        Self { lines, form: Form::Columns, amx: None, inputs, outputs }
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn right(&self) -> Right<'_> {
        let (depth, columns) = (self.inputs, self.outputs);
        match self.amx {
            None => Right::F32(Panels { data: bytemuck::cast_slice(&self.lines), depth, columns }),
            Some(amx) => Right::Bf16(amx, Tiles { data: bytemuck::cast_slice(&self.lines), depth, columns }),
        }
    }

    /// The weight as it came, or as it was rounded.
    pub(super) fn unpacked(&self) -> Vec<f32> {
        let at = |i: usize, j: usize| match self.right() {
            Right::F32(panels) => panels.data[(j / PANEL * self.inputs + i) * PANEL + j % PANEL],
            Right::Bf16(_, tiles) => half::bf16::from_bits(tiles.data[place(self.inputs, i, j)]).to_f32(),
        };
        if self.form == Form::Columns {
            (0..self.inputs).flat_map(|i| (0..self.outputs).map(move |j| at(i, j))).collect()
        } else {
            (0..self.outputs).flat_map(|j| (0..self.inputs).map(move |i| at(i, j))).collect()
        }
    }
}

/// A slice whose parts go to different threads.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T = f32> {
    start: *mut T,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out what a `&mut [f32]` would, and `part` is where the promise is made that nothing is given out twice.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn of(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: std::marker::PhantomData }
    }

    /// The values `first..first + len`.
    ///
    /// # Safety
    /// Nobody else has any of them.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(super) unsafe fn part(&self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first, "a part beyond its slice");
        // SAFETY: inside the slice by the assertion, nobody else's by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }

    /// The address of value `at`, and how many values follow from there.
    pub(super) fn from(&self, at: usize) -> (*mut T, usize) {
        assert!(at <= self.len, "an address beyond its slice");
        // SAFETY: inside the slice or at its end.
        (unsafe { self.start.add(at) }, self.len - at)
    }
}

/// Rows of `depth` values, at most [`PANEL`], become the columns of a panel. Missing ones are left as they are.
pub(super) struct PackTransposed<'a> {
    pub(super) from: &'a [f32],
    /// Values from one row to the next.
    pub(super) stride: usize,
    pub(super) depth: usize,
    /// `depth·PANEL` values.
    pub(super) to: &'a mut [f32],
}

impl Kernel for PackTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, stride, depth, to } = self;
        if depth == 0 {
            return;
        }
        let rows = (from.len() + stride - depth) / stride;
        assert!(to.len() == depth * PANEL && rows <= PANEL && depth <= stride);
        let (row_blocks, column_blocks) = (rows / S::LANES * S::LANES, depth / S::LANES * S::LANES);
        for row in (0..row_blocks).step_by(S::LANES) {
            for column in (0..column_blocks).step_by(S::LANES) {
                // SAFETY: rows below `rows` and columns below `depth` lie in `from`, by how `rows` is computed; the
                // transposed block lies in `to` because rows stay below PANEL and columns below `depth`.
                unsafe {
                    let (from, to) =
                        (from.as_ptr().add(row * stride + column), to.as_mut_ptr().add(column * PANEL + row));
                    s.transpose(from, stride, to, PANEL);
                }
            }
        }
        for row in 0..rows {
            let first = if row < row_blocks { column_blocks } else { 0 };
            for column in first..depth {
                to[column * PANEL + row] = from[row * stride + column];
            }
        }
    }
}

/// Rows of at most [`PANEL`] values become the rows of a panel. Missing columns are left as they are.
pub(super) struct PackRows<'a> {
    pub(super) from: &'a [f32],
    /// Values from one row to the next.
    pub(super) stride: usize,
    pub(super) width: usize,
    /// A row of PANEL values for each.
    pub(super) to: &'a mut [f32],
}

impl PackRows<'_> {
    pub(super) fn run(self) {
        for (to, from) in self.to.chunks_exact_mut(PANEL).zip(self.from.chunks(self.stride)) {
            to[..self.width].copy_from_slice(&from[..self.width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::simd::Instructions, *};

    #[test]
    fn packing_comes_undone() {
        let threads = Threads::new(2).unwrap();
        for kernels in Instructions::ALL.into_iter().filter_map(|instructions| instructions.checked().ok()) {
            for (outputs, inputs) in [(1, 1), (32, 16), (33, 17), (70, 40), (16, 64), (15, 15)] {
                let weight: Vec<f32> = (0..outputs * inputs).map(|i| i as f32).collect();
                let packed = Packed::new(&weight, [outputs, inputs], kernels, &threads);
                assert_eq!(packed.unpacked(), weight, "{outputs} x {inputs}");
                assert_eq!(Packed::of_columns(&weight, inputs).unpacked(), weight, "{outputs} x {inputs}");
            }
        }
    }
}
