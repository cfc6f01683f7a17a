//! The attributes of layouts, products and preferences: numbers, sizes and defaults as the manual lists them.

use crate::status::{Failure, invalid};

/// One attribute: its number in the C enumeration, its size in bytes, and its value's bits when nobody sets it.
#[derive(Debug)]
pub(crate) struct Attribute {
    number: u32,
    bytes: usize,
    default: u64,
}

const fn attribute(number: u32, bytes: usize, default: u64) -> Attribute {
    Attribute { number, bytes, default }
}

/// -1 in an attribute of four bytes.
const NONE: u64 = 0xFFFF_FFFF;

/// `cublasLtMatrixLayoutAttribute_t`.
pub(crate) mod layout {
    use super::{Attribute, attribute};

    pub(crate) const TYPE: u32 = 0;
    pub(crate) const ORDER: u32 = 1;
    pub(crate) const ROWS: u32 = 2;
    pub(crate) const COLUMNS: u32 = 3;
    pub(crate) const LEADING: u32 = 4;
    pub(crate) const BATCH_COUNT: u32 = 5;
    pub(crate) const BATCH_STRIDE: u32 = 6;
    pub(crate) const PLANE_OFFSET: u32 = 7;

    pub(crate) const ALL: &[Attribute] = &[
        attribute(TYPE, 4, 0),
        attribute(ORDER, 4, 0),
        attribute(ROWS, 8, 0),
        attribute(COLUMNS, 8, 0),
        attribute(LEADING, 8, 0),
        attribute(BATCH_COUNT, 4, 1),
        attribute(BATCH_STRIDE, 8, 0),
        attribute(PLANE_OFFSET, 8, 0),
    ];
}

/// `cublasLtMatmulDescAttributes_t`.
pub(crate) mod product {
    use super::{Attribute, NONE, attribute};

    pub(crate) const COMPUTE_TYPE: u32 = 0;
    pub(crate) const SCALE_TYPE: u32 = 1;
    pub(crate) const POINTER_MODE: u32 = 2;
    pub(crate) const TRANSPOSE_A: u32 = 3;
    pub(crate) const TRANSPOSE_B: u32 = 4;
    pub(crate) const TRANSPOSE_C: u32 = 5;
    pub(crate) const FILL_MODE: u32 = 6;
    pub(crate) const EPILOGUE: u32 = 7;
    pub(crate) const BIAS_POINTER: u32 = 8;
    pub(crate) const BIAS_BATCH_STRIDE: u32 = 10;
    pub(crate) const BIAS_TYPE: u32 = 26;

    pub(crate) const ALL: &[Attribute] = &[
        attribute(COMPUTE_TYPE, 4, 68),
        attribute(SCALE_TYPE, 4, 0),
        attribute(POINTER_MODE, 4, 0),
        attribute(TRANSPOSE_A, 4, 0),
        attribute(TRANSPOSE_B, 4, 0),
        attribute(TRANSPOSE_C, 4, 0),
        attribute(FILL_MODE, 4, 2),
        attribute(EPILOGUE, 4, 1),
        attribute(BIAS_POINTER, 8, 0),
        attribute(BIAS_BATCH_STRIDE, 8, 0),
        attribute(11, 8, 0),    // epilogue's auxiliary buffer
        attribute(12, 8, 0),    // its leading dimension
        attribute(13, 8, 0),    // its batch stride
        attribute(14, 8, 0),    // batch stride of a vector alpha
        attribute(15, 4, 0),    // multiprocessors to plan for
        attribute(17, 8, 0),    // scales of A, B, C, D: pointers
        attribute(18, 8, 0),    //
        attribute(19, 8, 0),    //
        attribute(20, 8, 0),    //
        attribute(21, 8, 0),    // largest magnitude of D: a pointer
        attribute(22, 4, NONE), // auxiliary buffer's type
        attribute(23, 8, 0),    // auxiliary buffer's scale and largest magnitude: pointers
        attribute(24, 8, 0),    //
        attribute(25, 1, 0),    // fast accumulation of 8-bit floats
        attribute(BIAS_TYPE, 4, NONE),
    ];

    /// Attributes that change the result in ways this library does not compute.
    pub(crate) const UNCOMPUTED: &[u32] = &[11, 14, 17, 18, 19, 20, 21, 23, 24];
}

/// `cublasLtMatmulPreferenceAttributes_t`: accepted and without effect, as there is one algorithm without workspace.
pub(crate) mod preference {
    use super::{Attribute, attribute};

    pub(crate) const ALL: &[Attribute] = &[
        attribute(0, 4, 0),
        attribute(1, 8, 0),
        attribute(2, 4, 0),
        attribute(3, 4, NONE),
        attribute(4, 4, NONE),
        attribute(5, 4, 256),
        attribute(6, 4, 256),
        attribute(7, 4, 256),
        attribute(8, 4, 256),
        attribute(9, 4, 0),
        attribute(10, 4, 0),
        attribute(11, 4, 0),
        attribute(12, 8, u64::MAX),
        attribute(13, 4, 0),
    ];

    use super::NONE;
}

/// The attributes of one object.
#[derive(Clone, Debug)]
pub(crate) struct Attributes {
    table: &'static [Attribute],
    values: Vec<u64>,
}

impl Attributes {
    pub(crate) fn new(table: &'static [Attribute]) -> Self {
        Self { table, values: table.iter().map(|attribute| attribute.default).collect() }
    }

    fn position(&self, number: u32) -> Result<usize, Failure> {
        self.table
            .iter()
            .position(|attribute| attribute.number == number)
            .ok_or_else(|| invalid(format!("there is no attribute {number}")))
    }

    /// Sets an attribute; `bytes` must be exactly of its size.
    pub(crate) fn set(&mut self, number: u32, bytes: &[u8]) -> Result<(), Failure> {
        let position = self.position(number)?;
        let expected = self.table[position].bytes;
        if bytes.len() != expected {
            return Err(invalid(format!("attribute {number} has {expected} bytes, not {}", bytes.len())));
        }
        let mut value = [0; 8];
        value[..expected].copy_from_slice(bytes);
        self.values[position] = u64::from_le_bytes(value);
        Ok(())
    }

    /// An attribute's bytes: as many of the result as the second value says.
    pub(crate) fn bytes(&self, number: u32) -> Result<([u8; 8], usize), Failure> {
        let position = self.position(number)?;
        Ok((self.values[position].to_le_bytes(), self.table[position].bytes))
    }

    /// An attribute of the table.
    ///
    /// # Panics
    /// When the table has no such attribute.
    pub(crate) fn value(&self, number: u32) -> u64 {
        self.values[self.position(number).expect("an attribute of this object's table")]
    }

    /// An attribute of four bytes, as the signed number it is in C.
    pub(crate) fn signed(&self, number: u32) -> i32 {
        self.value(number) as u32 as i32
    }

    /// Whether nobody has set another value than the default.
    pub(crate) fn is_default(&self, number: u32) -> bool {
        let position = self.position(number).expect("an attribute of this object's table");
        self.values[position] == self.table[position].default
    }
}
