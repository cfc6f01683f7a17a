//! The one door to the GEMM library.

/// A matrix inside a slice: element (i, j) is `data[i·row_stride + j·column_stride]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `columns` contiguous values, `row_stride` apart.
    pub(super) fn rows(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let matrix = Self { data, rows, columns, row_stride, column_stride: 1 };
        assert!(matrix.fits(), "a matrix of {rows} x {columns} reaches beyond its slice");
        matrix
    }

    /// The same values, rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn fits(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride < self.data.len()
    }
}

/// Whether a product may spread over the current thread pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    /// This thread only.
    One,
    /// All threads of the pool; the sums run in the same order as with one.
    Pool,
}

/// `out = alpha·a·b`, or `out += alpha·a·b`; `out` is row-major with rows of `b.columns` values, `out_stride` apart.
pub(super) fn gemm(
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
    alpha: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner extents of a product");
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.fits() && b.fits() && (m - 1) * out_stride + n <= out.len() && n <= out_stride);
    let parallelism = match threads {
        Threads::One => gemm_common::Parallelism::None,
        Threads::Pool => gemm_common::Parallelism::Rayon(0),
    };
    // The kernels prefer a destination whose columns are contiguous: the transposed product, bᵀ·aᵀ, has one.
    let product = gemm_f32::gemm::f32::get_gemm_fn();
    // SAFETY: the assertions above put every element of the three matrices inside its slice; `out` is borrowed mutably,
    // so it overlaps neither `a` nor `b`, and its rows do not overlap each other because n ≤ out_stride. All strides
    // come from slice lengths and fit isize.
    unsafe {
        product(
            n,
            m,
            k,
            out.as_mut_ptr(),
            out_stride as isize,
            1,
            accumulate,
            b.data.as_ptr(),
            b.row_stride as isize,
            b.column_stride as isize,
            a.data.as_ptr(),
            a.row_stride as isize,
            a.column_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_product_matches_the_definition() {
        let a: Vec<f32> = (0..60).map(|i| (i % 7) as f32 - 3.0).collect();
        let b: Vec<f32> = (0..60).map(|i| (i % 5) as f32 - 2.0).collect();
        let (a, b) = (Matrix::rows(&a, 4, 5, 12), Matrix::rows(&b, 3, 5, 9).transposed());
        let mut out = vec![1.0; 4 * 6];
        gemm(&mut out, 6, true, 2.0, a, b, Threads::One);
        for i in 0..4 {
            for j in 0..6 {
                let sum: f32 =
                    if j < 3 { (0..5).map(|k| a.data[i * 12 + k] * b.data[j * 9 + k]).sum() } else { 0.0 };
                assert_eq!(out[i * 6 + j], 1.0 + 2.0 * sum);
            }
        }
    }
}
