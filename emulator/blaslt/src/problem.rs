//! From attributes to a product whose sizes, types and addresses agree, or a reason why not.

use std::ffi::CString;

use crate::{
    attributes::{Attributes, layout, product},
    driver::Range,
    status::{Failure, invalid, unsupported},
};

/// Element types that are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
}

impl Kind {
    /// From `cudaDataType_t`.
    fn from_number(number: i32) -> Result<Self, Failure> {
        match number {
            0 => Ok(Self::F32),
            2 => Ok(Self::F16),
            14 => Ok(Self::Bf16),
            other => Err(unsupported(format!("data type {other}: f32, f16 and bf16 are computed"))),
        }
    }

    pub(crate) fn bytes(self) -> u64 {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// One batch of matrices in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) row_major: bool,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Elements from one column (of a row-major matrix: row) to the next.
    pub(crate) leading: usize,
    pub(crate) batches: usize,
    /// Elements from one matrix of the batch to the next.
    pub(crate) stride: i64,
}

/// No device has as much memory; keeps every product of sizes far from overflow.
const LARGEST: i128 = 1 << 46;

/// More separate pieces than this are checked as one range from the first to the last byte.
const MOST_PIECES: usize = 1 << 20;

impl Layout {
    fn new(name: char, attributes: &Attributes) -> Result<Self, Failure> {
        let kind = Kind::from_number(attributes.signed(layout::TYPE))
            .map_err(|failure| unsupported(format!("{name}: {}", failure.reason)))?;
        let row_major = match attributes.signed(layout::ORDER) {
            0 => false,
            1 => true,
            2..=4 => return Err(unsupported(format!("{name}: column- and row-major order are computed"))),
            other => return Err(invalid(format!("{name}: order {other}"))),
        };
        if !attributes.is_default(layout::PLANE_OFFSET) {
            return Err(unsupported(format!("{name}: a plane offset")));
        }
        let size =
            |attribute| usize::try_from(attributes.value(attribute) as i64).ok().filter(|&size| size > 0);
        let (Some(rows), Some(columns)) = (size(layout::ROWS), size(layout::COLUMNS)) else {
            let (rows, columns) = (attributes.value(layout::ROWS), attributes.value(layout::COLUMNS));
            return Err(invalid(format!("{name}: {rows} x {columns}; no extent may be zero")));
        };
        let inner = if row_major { columns } else { rows };
        let leading = size(layout::LEADING).filter(|&leading| leading >= inner).ok_or_else(|| {
            let leading = attributes.value(layout::LEADING) as i64;
            let line = if row_major { "row" } else { "column" };
            invalid(format!("{name}: leading dimension {leading}, and a {line} has {inner} elements"))
        })?;
        let batches = usize::try_from(attributes.signed(layout::BATCH_COUNT)).ok().filter(|&count| count > 0);
        let batches = batches.ok_or_else(|| invalid(format!("{name}: no batch count below 1")))?;
        let stride = attributes.value(layout::BATCH_STRIDE) as i64;
        let matrix = Self { kind, row_major, rows, columns, leading, batches, stride };
        let (first, end) = matrix.extent();
        if first < -LARGEST || end > LARGEST {
            return Err(invalid(format!(
                "{name}: {rows} x {columns}, {batches} times, exceeds any device's memory"
            )));
        }
        Ok(matrix)
    }

    /// Elements that lie side by side.
    pub(crate) fn inner(&self) -> usize {
        if self.row_major { self.columns } else { self.rows }
    }

    /// How many times `inner` of them there are in a matrix.
    pub(crate) fn outer(&self) -> usize {
        if self.row_major { self.rows } else { self.columns }
    }

    /// Matrices in memory: one when all of the batch are the same.
    pub(crate) fn distinct(&self) -> usize {
        if self.stride == 0 { 1 } else { self.batches }
    }

    /// Strides of a dense copy, from row to row and from column to column.
    pub(crate) fn dense_strides(&self) -> (isize, isize) {
        let inner = self.inner() as isize;
        if self.row_major { (inner, 1) } else { (1, inner) }
    }

    /// Bytes from the start address to the first one of the batch, and to behind the last one.
    fn extent(&self) -> (i128, i128) {
        let one = (self.outer() as i128 - 1) * self.leading as i128 + self.inner() as i128;
        let last = (self.batches as i128 - 1) * i128::from(self.stride);
        let bytes = i128::from(self.kind.bytes());
        (last.min(0) * bytes, (last.max(0) + one) * bytes)
    }

    /// Whether every line of `inner` elements is a range of its own. Gaps between lines belong to somebody else: they may
    /// be undefined, and they stay as they are.
    pub(crate) fn by_line(&self) -> bool {
        self.leading > self.inner()
            && self.outer() > 1
            && self.outer().saturating_mul(self.distinct()) <= MOST_PIECES
    }

    /// The ranges from `address` on: of each distinct matrix, its lines in order or the whole.
    fn ranges(&self, address: u64, write: bool) -> Result<Vec<Range>, Failure> {
        let (first, end) = self.extent();
        let address = i128::from(address);
        if self.distinct() > MOST_PIECES || address + first < 0 || address + end > i128::from(u64::MAX) {
            return Err(invalid(format!("{} matrices around address {address:#x}", self.batches)));
        }
        let bytes = i128::from(self.kind.bytes());
        let (pieces, length) = if self.by_line() {
            (self.outer(), self.inner())
        } else {
            (1, (self.outer() - 1) * self.leading + self.inner())
        };
        let mut ranges = Vec::with_capacity(pieces * self.distinct());
        for batch in 0..self.distinct() {
            for piece in 0..pieces {
                let elements = batch as i128 * i128::from(self.stride) + piece as i128 * self.leading as i128;
                ranges.push(Range {
                    address: (address + elements * bytes) as u64,
                    bytes: length as u64 * self.kind.bytes(),
                    write: u32::from(write),
                    padding: 0,
                });
            }
        }
        Ok(ranges)
    }
}

/// What follows the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    None,
    Relu,
    /// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
    Gelu,
}

/// D = activation(alpha·op(A)·op(B) + beta·C + bias), before addresses are known.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) a: Layout,
    pub(crate) b: Layout,
    pub(crate) c: Layout,
    pub(crate) d: Layout,
    pub(crate) transpose_a: bool,
    pub(crate) transpose_b: bool,
    /// Terms of each sum.
    pub(crate) depth: usize,
    pub(crate) activation: Activation,
    has_bias: bool,
    bias_pointer: u64,
    bias_stride: i64,
}

impl Shape {
    pub(crate) fn new(description: &Attributes, [a, b, c, d]: [&Attributes; 4]) -> Result<Self, Failure> {
        let (a, b) = (Layout::new('A', a)?, Layout::new('B', b)?);
        let (c, d) = (Layout::new('C', c)?, Layout::new('D', d)?);
        check_types(description, a.kind, b.kind, c.kind, d.kind)?;
        let transposed = |attribute, name| match description.signed(attribute) {
            0 => Ok(false),
            // The elements are real: their conjugates are themselves.
            1 | 2 => Ok(true),
            other => Err(invalid(format!("operation {other} on {name}"))),
        };
        let (transpose_a, transpose_b) =
            (transposed(product::TRANSPOSE_A, 'A')?, transposed(product::TRANSPOSE_B, 'B')?);
        if transposed(product::TRANSPOSE_C, 'C')? {
            return Err(unsupported("a transposed C"));
        }
        if !description.is_default(product::FILL_MODE) {
            return Err(unsupported("results of which a triangle is wanted"));
        }
        for &attribute in product::UNCOMPUTED {
            if !description.is_default(attribute) {
                return Err(unsupported(format!("descriptor attribute {attribute}")));
            }
        }
        let turned = |matrix: &Layout, transpose| {
            if transpose { (matrix.columns, matrix.rows) } else { (matrix.rows, matrix.columns) }
        };
        let ((rows, depth), (b_depth, columns)) = (turned(&a, transpose_a), turned(&b, transpose_b));
        if depth != b_depth || [(c.rows, c.columns), (d.rows, d.columns)] != [(rows, columns); 2] {
            return Err(invalid(format!(
                "op(A) is {rows} x {depth}, op(B) {b_depth} x {columns}, C {} x {}, D {} x {}",
                c.rows, c.columns, d.rows, d.columns
            )));
        }
        if [b.batches, c.batches, d.batches] != [a.batches; 3] {
            return Err(invalid(format!(
                "batches: A {}, B {}, C {}, D {}",
                a.batches, b.batches, c.batches, d.batches
            )));
        }
        if d.batches > d.distinct() {
            return Err(invalid(format!("all {} results of the batch would lie in one place", d.batches)));
        }
        let (activation, has_bias) = match description.signed(product::EPILOGUE) {
            1 => (Activation::None, false),
            2 => (Activation::Relu, false),
            4 => (Activation::None, true),
            6 => (Activation::Relu, true),
            32 => (Activation::Gelu, false),
            36 => (Activation::Gelu, true),
            other => return Err(unsupported(format!("epilogue {other}"))),
        };
        if has_bias && !description.is_default(product::BIAS_TYPE) {
            let kind = Kind::from_number(description.signed(product::BIAS_TYPE))?;
            if kind != d.kind {
                return Err(unsupported(format!(
                    "a bias of {} for a result of {}",
                    kind.name(),
                    d.kind.name()
                )));
            }
        }
        let bias_pointer = description.value(product::BIAS_POINTER);
        let bias_stride = description.value(product::BIAS_BATCH_STRIDE) as i64;
        let gap = i128::from(bias_stride).abs() * d.batches as i128;
        if has_bias && gap > LARGEST {
            return Err(invalid(format!("a batch stride of the bias of {bias_stride}")));
        }
        Ok(Self {
            a,
            b,
            c,
            d,
            transpose_a,
            transpose_b,
            depth,
            activation,
            has_bias,
            bias_pointer,
            bias_stride,
        })
    }

    /// What reports call it.
    fn name(&self) -> CString {
        let Layout { kind, rows, columns, batches, .. } = self.d;
        let name = format!(
            "cublasLtMatmul {} to {}, m={rows} n={columns} k={} batch={batches}",
            self.a.kind.name(),
            kind.name(),
            self.depth
        );
        CString::new(name).expect("no zero byte among letters and digits")
    }
}

fn check_types(description: &Attributes, a: Kind, b: Kind, c: Kind, d: Kind) -> Result<(), Failure> {
    let (compute, scale) =
        (description.signed(product::COMPUTE_TYPE), description.signed(product::SCALE_TYPE));
    if scale != 0 {
        return Err(unsupported(format!("scalars of data type {scale}: f32 is computed")));
    }
    match compute {
        68 | 69 => {}
        77 if a == Kind::F32 => {}
        77 => return Err(unsupported(format!("TF32 sums of {} inputs", a.name()))),
        other => {
            return Err(unsupported(format!(
                "compute type {other}: 32F (68, 69) and TF32 (77) are computed"
            )));
        }
    }
    if a != b || c != d || (d != a && d != Kind::F32) {
        let [a, b, c, d] = [a, b, c, d].map(Kind::name);
        return Err(unsupported(format!("types A {a}, B {b}, C {c}, D {d}")));
    }
    if description.signed(product::POINTER_MODE) != 0 {
        return Err(unsupported("alpha and beta in device memory"));
    }
    Ok(())
}

/// The device addresses of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) c: u64,
    pub(crate) d: u64,
}

/// A matrix batch and where its ranges begin in the product's list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) layout: Layout,
    pub(crate) first_range: usize,
}

/// A product that can run: checked, and with all ranges of memory that it touches.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) name: CString,
    pub(crate) a: Operand,
    pub(crate) b: Operand,
    /// Absent when beta is zero: it is not read then.
    pub(crate) c: Option<Operand>,
    pub(crate) d: Operand,
    /// One line of the result's rows for each matrix, or for all.
    pub(crate) bias: Option<Operand>,
    pub(crate) transpose_a: bool,
    pub(crate) transpose_b: bool,
    pub(crate) depth: usize,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    pub(crate) activation: Activation,
    pub(crate) ranges: Vec<Range>,
}

impl Problem {
    pub(crate) fn new(shape: &Shape, addresses: Addresses, alpha: f32, beta: f32) -> Result<Self, Failure> {
        let mut ranges = Vec::new();
        let mut operand = |name: &str, layout: Layout, address: u64, write: bool| {
            if address == 0 {
                return Err(invalid(format!("{name} is null")));
            }
            if !address.is_multiple_of(layout.kind.bytes()) {
                return Err(invalid(format!(
                    "{name}'s address {address:#x} is not one of {}",
                    layout.kind.name()
                )));
            }
            let first_range = ranges.len();
            ranges.extend(layout.ranges(address, write)?);
            Ok(Operand { layout, first_range })
        };
        let a = operand("A", shape.a, addresses.a, false)?;
        let b = operand("B", shape.b, addresses.b, false)?;
        let in_place = addresses.c == addresses.d;
        let c = if beta == 0.0 { None } else { Some(operand("C", shape.c, addresses.c, false)?) };
        if c.is_some() && in_place && shape.c != shape.d {
            return Err(invalid("C and D are one matrix with two layouts"));
        }
        let bias = if shape.has_bias {
            let line = Layout {
                kind: shape.d.kind,
                row_major: false,
                rows: shape.d.rows,
                columns: 1,
                leading: shape.d.rows,
                batches: shape.d.batches,
                stride: shape.bias_stride,
            };
            Some(operand("the bias", line, shape.bias_pointer, false)?)
        } else {
            None
        };
        let d = operand("D", shape.d, addresses.d, true)?;
        let read = |operand: Option<Operand>, next: usize| {
            operand.map_or(&[][..], |operand| &ranges[operand.first_range..next])
        };
        let after_c = bias.unwrap_or(d).first_range;
        let inputs = [
            ("A", read(Some(a), b.first_range)),
            ("B", read(Some(b), c.or(bias).unwrap_or(d).first_range)),
            ("C", if in_place { &[] } else { read(c, after_c) }),
            ("the bias", read(bias, d.first_range)),
        ];
        check_apart(&inputs, &ranges[d.first_range..])?;
        let Shape { transpose_a, transpose_b, depth, activation, .. } = *shape;
        Ok(Self {
            name: shape.name(),
            a,
            b,
            c,
            d,
            bias,
            transpose_a,
            transpose_b,
            depth,
            alpha,
            beta,
            activation,
            ranges,
        })
    }
}

/// The result must not lie on itself or on what is read: blocks of it are written while others still read.
fn check_apart(inputs: &[(&str, &[Range])], result: &[Range]) -> Result<(), Failure> {
    let mut written = result.to_vec();
    written.sort_unstable_by_key(|range| range.address);
    if written.windows(2).any(|pair| pair[0].address + pair[0].bytes > pair[1].address) {
        return Err(invalid("matrices of the result overlap each other"));
    }
    for (name, read) in inputs {
        let touches = |range: &&Range| {
            let next = written.partition_point(|written| written.address + written.bytes <= range.address);
            written.get(next).is_some_and(|written| written.address < range.address + range.bytes)
        };
        if let Some(range) = read.iter().find(touches) {
            return Err(invalid(format!("D overlaps {name} at {:#x}", range.address)));
        }
    }
    Ok(())
}
