//! The arithmetic: inputs to dense f32 panels, the product by the GEMM library, the epilogue in f32, the result rounded
//! once.

use std::{ffi::CStr, ptr};

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::{
    driver::Work,
    problem::{Activation, Kind, Operand, Problem},
};

/// Below this many multiply-adds the threads cost more than they save.
const WORTH_THREADS: usize = 1 << 18;

impl Work for Problem {
    fn name(&self) -> &CStr {
        &self.name
    }

    unsafe fn run(&self, pointers: *const *mut u8) {
        let (mut a, mut b, mut c) = (Panel::default(), Panel::default(), Panel::default());
        let mut bias = Panel::default();
        let mut sums = Vec::new();
        for batch in 0..self.d.layout.batches {
            // SAFETY: the caller vouches for every range; each panel reads the ranges of its own operand.
            unsafe {
                a.read(&self.a, batch, pointers);
                b.read(&self.b, batch, pointers);
                if let Some(operand) = &self.c {
                    c.read(operand, batch, pointers);
                }
                if let Some(operand) = &self.bias {
                    bias.read(operand, batch, pointers);
                }
            }
            self.multiply(&a.values, &b.values, &mut sums);
            self.finish(&mut sums, &c.values, &bias.values);
            // SAFETY: the caller vouches for the result's ranges too.
            unsafe { write(&self.d, batch, pointers, &sums) };
        }
    }
}

impl Problem {
    /// sums = op(a)·op(b), dense in the result's order.
    fn multiply(&self, a: &[f32], b: &[f32], sums: &mut Vec<f32>) {
        let result = &self.d.layout;
        let (rows, columns, depth) = (result.rows, result.columns, self.depth);
        sums.resize(rows * columns, 0.0);
        assert!(a.len() >= rows * depth && b.len() >= depth * columns, "panels as large as their matrices");
        let turned = |(row, column): (isize, isize), transposed| {
            if transposed { (column, row) } else { (row, column) }
        };
        let (a_row, a_column) = turned(self.a.layout.dense_strides(), self.transpose_a);
        let (b_row, b_column) = turned(self.b.layout.dense_strides(), self.transpose_b);
        let (row, column) = result.dense_strides();
        let threads = if rows * columns * depth >= WORTH_THREADS {
            gemm_common::Parallelism::Rayon(0)
        } else {
            gemm_common::Parallelism::None
        };
        let product = gemm_f32::gemm::f32::get_gemm_fn();
        // SAFETY: the three slices hold dense matrices of these extents and strides (checked above), and `sums` is
        // borrowed mutably, so it overlaps neither of the others.
        unsafe {
            product(
                rows,
                columns,
                depth,
                sums.as_mut_ptr(),
                column,
                row,
                false,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                b_column,
                b_row,
                0.0,
                1.0,
                false,
                false,
                false,
                threads,
            );
        }
    }

    /// sums = activation(alpha·sums + beta·c + bias).
    fn finish(&self, sums: &mut [f32], c: &[f32], bias: &[f32]) {
        let result = &self.d.layout;
        let c_strides = self.c.map(|operand| operand.layout.dense_strides());
        for (line, values) in sums.chunks_exact_mut(result.inner()).enumerate() {
            for (place, value) in values.iter_mut().enumerate() {
                let (row, column) = if result.row_major { (line, place) } else { (place, line) };
                let mut sum = self.alpha * *value;
                if let Some((c_row, c_column)) = c_strides {
                    sum += self.beta * c[row * c_row as usize + column * c_column as usize];
                }
                if self.bias.is_some() {
                    sum += bias[row];
                }
                *value = self.activation.apply(sum);
            }
        }
    }
}

impl Activation {
    fn apply(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            // NaN stays NaN.
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Self::Gelu => {
                let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }
}

/// One matrix in f32, line after line without gaps.
#[derive(Default)]
struct Panel {
    values: Vec<f32>,
    batch: Option<usize>,
    halves: Vec<u16>,
}

impl Panel {
    /// Fills the panel with the operand's matrix of this batch, unless it is there already.
    ///
    /// # Safety
    /// The pointers of the operand's ranges must be valid for reads of their ranges.
    unsafe fn read(&mut self, operand: &Operand, batch: usize, pointers: *const *mut u8) {
        let layout = &operand.layout;
        let batch = batch.min(layout.distinct() - 1);
        if self.batch.replace(batch) == Some(batch) {
            return;
        }
        let inner = layout.inner();
        self.values.resize(inner * layout.outer(), 0.0);
        self.halves.resize(inner, 0);
        for (line, values) in self.values.chunks_exact_mut(inner).enumerate() {
            // SAFETY: `line_pointer` stays inside the operand's ranges, which hold `inner` elements from there on; the
            // copies go byte by byte into slices of `inner` elements, so alignment does not matter.
            unsafe {
                let source = line_pointer(operand, batch, line, pointers);
                match layout.kind {
                    Kind::F32 => ptr::copy_nonoverlapping(source, values.as_mut_ptr().cast(), inner * 4),
                    Kind::F16 | Kind::Bf16 => {
                        ptr::copy_nonoverlapping(source, self.halves.as_mut_ptr().cast(), inner * 2);
                    }
                }
            }
            match layout.kind {
                Kind::F32 => {}
                Kind::F16 => as_f16(&mut self.halves).convert_to_f32_slice(values),
                Kind::Bf16 => as_bf16(&mut self.halves).convert_to_f32_slice(values),
            }
        }
    }
}

/// Rounds `values` to the operand's type and stores them.
///
/// # Safety
/// The pointers of the operand's ranges must be valid for writes of their ranges.
unsafe fn write(operand: &Operand, batch: usize, pointers: *const *mut u8, values: &[f32]) {
    let layout = &operand.layout;
    let inner = layout.inner();
    let mut halves = vec![0; inner];
    for (line, values) in values.chunks_exact(inner).enumerate() {
        match layout.kind {
            Kind::F32 => {}
            Kind::F16 => as_f16(&mut halves).convert_from_f32_slice(values),
            Kind::Bf16 => as_bf16(&mut halves).convert_from_f32_slice(values),
        }
        // SAFETY: as in `Panel::read`, in the other direction.
        unsafe {
            let target = line_pointer(operand, batch, line, pointers);
            match layout.kind {
                Kind::F32 => ptr::copy_nonoverlapping(values.as_ptr().cast(), target, inner * 4),
                Kind::F16 | Kind::Bf16 => ptr::copy_nonoverlapping(halves.as_ptr().cast(), target, inner * 2),
            }
        }
    }
}

/// Where a line of a matrix begins in host memory.
///
/// # Safety
/// `pointers` must have an entry for each of the operand's ranges, valid for its bytes.
unsafe fn line_pointer(operand: &Operand, batch: usize, line: usize, pointers: *const *mut u8) -> *mut u8 {
    let layout = &operand.layout;
    let (range, offset) = if layout.by_line() {
        (batch * layout.outer() + line, 0)
    } else {
        (batch, line * layout.leading * layout.kind.bytes() as usize)
    };
    // SAFETY: the operand has `distinct` ranges, or `outer` times as many, and a whole matrix's range reaches over all of
    // its lines.
    unsafe { (*pointers.add(operand.first_range + range)).add(offset) }
}

fn as_f16(bits: &mut [u16]) -> &mut [f16] {
    use half::slice::HalfBitsSliceExt;
    bits.reinterpret_cast_mut()
}

fn as_bf16(bits: &mut [u16]) -> &mut [bf16] {
    use half::slice::HalfBitsSliceExt;
    bits.reinterpret_cast_mut()
}
