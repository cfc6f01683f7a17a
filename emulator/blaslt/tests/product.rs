//! Products of random shapes, layouts, types and epilogues against sums in double precision.

mod common;

use std::collections::BTreeSet;

use common::{Call, SEEN, description, layout, library, set_description, set_layout};
use half::{bf16, f16};
use proptest::prelude::*;

/// `cudaDataType_t`.
const F32: i32 = 0;
const F16: i32 = 2;
const BF16: i32 = 14;

/// A value in storage and back.
fn rounded(kind: i32, value: f64) -> (f64, Vec<u8>) {
    match kind {
        F32 => (f64::from(value as f32), (value as f32).to_le_bytes().to_vec()),
        F16 => (f16::from_f64(value).to_f64(), f16::from_f64(value).to_le_bytes().to_vec()),
        _ => (bf16::from_f64(value).to_f64(), bf16::from_f64(value).to_le_bytes().to_vec()),
    }
}

fn read(kind: i32, bytes: &[u8]) -> f64 {
    match kind {
        F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
    }
}

/// Half a unit in the last place of a value of about this size.
fn half_ulp(kind: i32, size: f64) -> f64 {
    match kind {
        F32 => size * 2f64.powi(-24),
        // The second term is half a step among f16's subnormals.
        F16 => size * 2f64.powi(-11) + 2f64.powi(-25),
        _ => size * 2f64.powi(-8),
    }
}

/// A batch of matrices inside a buffer of poison.
struct Matrix {
    kind: i32,
    rows: usize,
    columns: usize,
    row_major: bool,
    leading: usize,
    batches: usize,
    stride: usize,
    buffer: Vec<u64>,
}

/// All ones: a NaN in every type.
const POISON: u64 = u64::MAX;

impl Matrix {
    #[allow(clippy::too_many_arguments)]
    fn new(
        kind: i32,
        rows: usize,
        columns: usize,
        row_major: bool,
        gap: usize,
        batches: usize,
        stride: usize,
    ) -> Self {
        let (inner, outer) = if row_major { (columns, rows) } else { (rows, columns) };
        let leading = inner + gap;
        // Stride 0 repeats one matrix; 1 and 2 are dense and with a gap; 3 lays the batch side by side in each line.
        let (leading, stride) = match stride {
            0 => (leading, 0),
            3 => (leading * batches, leading),
            extra => (leading, leading * outer + (extra - 1) * 5),
        };
        let elements = (batches - 1) * stride + (outer - 1) * leading + inner;
        Self { kind, rows, columns, row_major, leading, batches, stride, buffer: vec![POISON; elements + 1] }
    }

    fn size(&self) -> usize {
        if self.kind == F32 { 4 } else { 2 }
    }

    fn place(&self, batch: usize, row: usize, column: usize) -> usize {
        let (inner, outer) = if self.row_major { (column, row) } else { (row, column) };
        (batch * self.stride + outer * self.leading + inner) * self.size()
    }

    fn bytes(&mut self) -> &mut [u8] {
        let length = self.buffer.len() * 8;
        // SAFETY: the bytes of the vector's own words.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.as_mut_ptr().cast(), length) }
    }

    fn get(&mut self, batch: usize, row: usize, column: usize) -> f64 {
        let (kind, size, place) = (self.kind, self.size(), self.place(batch, row, column));
        read(kind, &self.bytes()[place..place + size])
    }

    fn fill(&mut self, mut value: impl FnMut() -> f64) {
        for batch in 0..self.batches {
            for row in 0..self.rows {
                for column in 0..self.columns {
                    let (_, bytes) = rounded(self.kind, value());
                    let place = self.place(batch, row, column);
                    self.bytes()[place..place + bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
    }

    fn address(&mut self) -> usize {
        self.buffer.as_mut_ptr().expose_provenance()
    }

    fn layout(&self) -> *mut std::ffi::c_void {
        let handle = layout(self.kind, self.rows as u64, self.columns as u64, self.leading as i64);
        assert_eq!(set_layout(handle, 1, i32::from(self.row_major)), 0);
        assert_eq!(set_layout(handle, 5, self.batches as i32), 0);
        assert_eq!(set_layout(handle, 6, self.stride as i64), 0);
        handle
    }

    /// Addresses of all bytes of all elements.
    fn touched(&mut self) -> BTreeSet<u64> {
        let start = self.address() as u64;
        let mut all = BTreeSet::new();
        for batch in 0..self.batches {
            for row in 0..self.rows {
                for column in 0..self.columns {
                    let place = start + self.place(batch, row, column) as u64;
                    all.extend(place..place + self.size() as u64);
                }
            }
        }
        all
    }
}

/// A xorshift generator: proptest chooses the seed.
struct Random(u64);

impl Random {
    fn value(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    }
}

#[derive(Clone, Debug)]
struct Case {
    extents: (usize, usize, usize),
    /// Storage of A and B, of C and D.
    kinds: (i32, i32),
    transpose: (bool, bool),
    row_major: [bool; 4],
    gaps: [usize; 4],
    strides: [usize; 4],
    batches: usize,
    alpha: f32,
    beta: f32,
    in_place: bool,
    epilogue: i32,
    bias_stride: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let kinds = prop::sample::select(vec![(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]);
    let shapes = ((1usize..20, 1usize..20, 1usize..40), kinds, any::<(bool, bool)>(), any::<[bool; 4]>());
    let memory = (prop::array::uniform4(0usize..4), prop::array::uniform4(0usize..4), 1usize..4);
    let scalars = (
        prop::sample::select(vec![1.0f32, -0.5, 0.125, 0.0]),
        prop::sample::select(vec![0.0f32, 1.0, -2.0]),
        any::<bool>(),
    );
    let ends = (prop::sample::select(vec![1, 2, 4, 6, 32, 36]), 0usize..3, 1u64..u64::MAX);
    (shapes, memory, scalars, ends).prop_map(|(shapes, memory, scalars, ends)| {
        let (extents, kinds, transpose, row_major) = shapes;
        let (gaps, mut strides, batches) = memory;
        let (alpha, beta, in_place) = scalars;
        let (epilogue, bias_stride, seed) = ends;
        // The results of a batch need places of their own.
        if batches > 1 && strides[3] == 0 {
            strides[3] = 1;
        }
        Case {
            extents,
            kinds,
            transpose,
            row_major,
            gaps,
            strides,
            batches,
            alpha,
            beta,
            in_place,
            epilogue,
            bias_stride,
            seed,
        }
    })
}

fn activation(epilogue: i32, x: f64) -> f64 {
    match epilogue & !4 {
        2 => x.max(0.0),
        32 => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()),
        _ => x,
    }
}

fn check(case: &Case) {
    let (m, n, k) = case.extents;
    let (input, output) = case.kinds;
    let mut random = Random(case.seed);
    let matrix = |i: usize, kind, rows, columns| {
        Matrix::new(kind, rows, columns, case.row_major[i], case.gaps[i], case.batches, case.strides[i])
    };
    let turn = |transposed, rows, columns| if transposed { (columns, rows) } else { (rows, columns) };
    let (a_rows, a_columns) = turn(case.transpose.0, m, k);
    let (b_rows, b_columns) = turn(case.transpose.1, k, n);
    let mut a = matrix(0, input, a_rows, a_columns);
    let mut b = matrix(1, input, b_rows, b_columns);
    let mut d = matrix(3, output, m, n);
    let mut c = matrix(if case.in_place { 3 } else { 2 }, output, m, n);
    a.fill(|| random.value() * 2.0);
    b.fill(|| random.value() * 2.0);
    c.fill(|| random.value() * 2.0);
    if case.in_place {
        d.buffer.clone_from(&c.buffer);
    }
    // A bias of one line a matrix, apart by m, by m + 3 or not at all.
    let apart = [0, m, m + 3][case.bias_stride];
    let mut bias = Matrix::new(output, m, 1, false, 0, 1, 0);
    bias.buffer = vec![POISON; (case.batches - 1) * apart + m + 1];
    (bias.batches, bias.stride) = (case.batches, apart);
    bias.fill(|| random.value());
    let has_bias = case.epilogue & 4 != 0;

    // TF32 is for f32 inputs alone.
    let compute = if input == F32 && case.seed.is_multiple_of(2) { 77 } else { 68 };
    let product = description(compute, F32);
    assert_eq!(set_description(product, 3, i32::from(case.transpose.0)), 0);
    assert_eq!(set_description(product, 4, i32::from(case.transpose.1)), 0);
    assert_eq!(set_description(product, 7, case.epilogue), 0);
    if has_bias {
        assert_eq!(set_description(product, 8, bias.address() as u64), 0);
        assert_eq!(set_description(product, 10, bias.stride as i64), 0);
        assert_eq!(set_description(product, 26, output), 0);
    }
    let before = d.buffer.clone();
    let c_address = if case.in_place { d.address() } else { c.address() };
    let call = Call {
        library: library(),
        description: product,
        layouts: [a.layout(), b.layout(), c.layout(), d.layout()],
        data: [a.address(), b.address(), c_address, d.address()],
        alpha: case.alpha,
        beta: case.beta,
    };
    assert_eq!(call.matmul(), 0);

    // The driver was told of exactly the bytes that the definition reads and writes: no gap, and no C without beta.
    let mut reads = a.touched();
    reads.append(&mut b.touched());
    if case.beta != 0.0 {
        reads.append(&mut if case.in_place { d.touched() } else { c.touched() });
    }
    if has_bias {
        reads.append(&mut bias.touched());
    }
    let ranges = SEEN.with_borrow(|seen| {
        assert_eq!(seen.stream, 0x20);
        assert!(
            seen.name.starts_with("cublasLtMatmul ") && seen.name.contains(&format!("m={m} n={n} k={k}"))
        );
        seen.ranges.clone()
    });
    let told = |write| -> BTreeSet<u64> {
        let matching = ranges.iter().filter(|range| range.write == write);
        matching.flat_map(|range| range.address..range.address + range.bytes).collect()
    };
    assert_eq!(told(0), reads);
    assert_eq!(told(1), d.touched());

    let eps = 2f64.powi(-24);
    for batch in 0..case.batches {
        for row in 0..m {
            for column in 0..n {
                let (mut sum, mut size) = (0.0, 0.0);
                for i in 0..k {
                    let left = if case.transpose.0 { a.get(batch, i, row) } else { a.get(batch, row, i) };
                    let right =
                        if case.transpose.1 { b.get(batch, column, i) } else { b.get(batch, i, column) };
                    sum += left * right;
                    size += (left * right).abs();
                }
                let mut x = f64::from(case.alpha) * sum;
                let mut terms = f64::from(case.alpha).abs() * size;
                if case.beta != 0.0 {
                    x += f64::from(case.beta) * c.get(batch, row, column);
                    terms += (f64::from(case.beta) * c.get(batch, row, column)).abs();
                }
                if has_bias {
                    x += bias.get(batch, row, 0);
                    terms += bias.get(batch, row, 0).abs();
                }
                let expected = activation(case.epilogue, x);
                // k products, k - 1 sums and the epilogue's five operations, each off by half a unit of the largest
                // partial sum; GELU's slope is at most 1.13 and its own arithmetic is within 8 units.
                let error = 1.13 * (2 * k + 5) as f64 * eps * terms + 8.0 * eps * x.abs();
                let tolerance = error + half_ulp(output, expected.abs() + error);
                let found = d.get(batch, row, column);
                assert!(
                    (found - expected).abs() <= tolerance,
                    "batch {batch} row {row} column {column}: {found}, expected {expected} within {tolerance}"
                );
            }
        }
    }

    // Nothing outside the result's elements has changed, and the same call gives the same bits.
    let elements = d.touched();
    let start = d.address() as u64;
    let mut old = Matrix { buffer: before, ..matrix(3, output, m, n) };
    let old = old.bytes().to_vec();
    for (i, (new, old)) in d.bytes().iter().zip(old).enumerate() {
        assert!(elements.contains(&(start + i as u64)) || *new == old, "byte {i} is not the result's");
    }
    if !case.in_place {
        let first = d.buffer.clone();
        assert_eq!(call.matmul(), 0);
        assert_eq!(d.buffer, first);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_match_their_definition(case in cases()) {
        check(&case);
    }
}

/// Large enough for the threads: the sums stay within the bound, and are the same in two runs.
#[test]
fn a_product_on_all_threads_matches_its_definition() {
    for (kinds, epilogue) in [((F32, F32), 1), ((F16, F16), 36)] {
        check(&Case {
            extents: (130, 97, 70),
            kinds,
            transpose: (true, false),
            row_major: [false; 4],
            gaps: [0, 2, 0, 3],
            strides: [1; 4],
            batches: 2,
            alpha: 1.0,
            beta: 0.0,
            in_place: false,
            epilogue,
            bias_stride: 0,
            seed: 7,
        });
    }
}

/// The check can fail: a definition with another activation is told apart.
#[test]
#[should_panic(expected = "expected")]
fn another_activation_is_noticed() {
    let case = Case {
        extents: (4, 4, 4),
        kinds: (F32, F32),
        transpose: (false, false),
        row_major: [false; 4],
        gaps: [0; 4],
        strides: [1; 4],
        batches: 1,
        alpha: 1.0,
        beta: 0.0,
        in_place: false,
        epilogue: 32,
        bias_stride: 0,
        seed: 3,
    };
    // The library is asked for ReLU, the definition for GELU.
    let mut random = Random(case.seed);
    let mut matrices: Vec<Matrix> = (0..3).map(|_| Matrix::new(F32, 4, 4, false, 0, 1, 1)).collect();
    matrices[0].fill(|| random.value());
    matrices[1].fill(|| random.value());
    let product = description(68, F32);
    assert_eq!(set_description(product, 7, 2), 0);
    let data = [0, 1, 2, 2].map(|i: usize| matrices[i].address());
    let layouts = [0, 1, 2, 2].map(|i: usize| matrices[i].layout());
    let call = Call { library: library(), description: product, layouts, data, alpha: 1.0, beta: 0.0 };
    assert_eq!(call.matmul(), 0);
    for row in 0..4 {
        for column in 0..4 {
            let sum: f64 = (0..4).map(|i| matrices[0].get(0, row, i) * matrices[1].get(0, i, column)).sum();
            let (found, expected) = (matrices[2].get(0, row, column), activation(case.epilogue, sum));
            assert!((found - expected).abs() <= 1e-5, "{found}, expected {expected}");
        }
    }
}

/// Overflow is infinity, NaN stays NaN, also through `ReLU`.
#[test]
fn special_values_are_kept() {
    for (kind, epilogue) in [(F16, 1), (F16, 2), (BF16, 36), (F32, 36)] {
        let mut matrices: Vec<Matrix> = (0..4).map(|_| Matrix::new(kind, 1, 1, false, 0, 1, 1)).collect();
        let product = description(68, F32);
        matrices[3].fill(|| 0.0);
        assert_eq!(set_description(product, 7, epilogue), 0);
        assert_eq!(set_description(product, 8, matrices[3].address() as u64), 0);
        let largest = if kind == F16 { 60_000.0 } else { 3e38 };
        for (left, right, expected) in [(f64::NAN, 1.0, f64::NAN), (largest, largest, f64::INFINITY)] {
            matrices[0].fill(|| left);
            matrices[1].fill(|| right);
            let layouts = [0, 1, 2, 2].map(|i: usize| matrices[i].layout());
            let data = [0, 1, 2, 2].map(|i: usize| matrices[i].address());
            let call =
                Call { library: library(), description: product, layouts, data, alpha: 1.0, beta: 0.0 };
            assert_eq!(call.matmul(), 0);
            let found = matrices[2].get(0, 0, 0);
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{kind} {epilogue}: {found}, {expected}"
            );
        }
    }
}
