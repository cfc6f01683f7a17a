//! Tensors of three axes in device memory.

use super::{DType, DevicePointer};
use crate::{Error, Result};

/// Bytes of the kernels' widest access.
pub(super) const WIDE_BYTES: usize = 16;

/// A tensor of three axes, the last one contiguous: `data` is a cudarc view, or a [`DevicePointer`] in the `unsafe` entry
/// points.
///
/// Rows need not follow each other: the queries of packed rows, a part of the tokens, or a tensor with its first two axes
/// swapped are all strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided<P> {
    /// Where the first value lies.
    pub data: P,
    /// Extents in memory order.
    pub shape: [usize; 3],
    /// From one index of the first and second axis to the next, in elements.
    pub strides: [usize; 2],
}

impl<P> Strided<P> {
    /// A tensor without gaps.
    pub const fn new(data: P, shape: [usize; 3]) -> Self {
        Self { data, shape, strides: [shape[1].saturating_mul(shape[2]), shape[2]] }
    }

    /// The same tensor with other strides, in elements.
    #[must_use]
    pub fn with_strides(self, strides: [usize; 2]) -> Self {
        Self { strides, ..self }
    }

    /// The same tensor behind another pointer.
    pub(super) fn at(&self, data: DevicePointer) -> Strided<DevicePointer> {
        Strided { data, shape: self.shape, strides: self.strides }
    }

    /// Elements from the first to past the last one.
    fn extent(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let steps = |axis: usize| (self.shape[axis] - 1).checked_mul(self.strides[axis]);
        steps(0)?.checked_add(steps(1)?)?.checked_add(self.shape[2])
    }

    /// Checks that `held` elements of memory suffice.
    pub(super) fn check_length(&self, op: &'static str, name: &str, held: usize) -> Result<()> {
        match self.extent() {
            Some(needed) if needed <= held => Ok(()),
            needed => Err(Error::argument(
                op,
                format!(
                    "{name} of shape {:?} and strides {:?} reaches over {} elements, its memory holds {held}",
                    self.shape,
                    self.strides,
                    needed.map_or_else(|| "too many".to_owned(), |n| n.to_string())
                ),
            )),
        }
    }
}

impl Strided<DevicePointer> {
    /// Checks that no axis is empty, that the kernels' integers hold the shape, and that the address fits the type.
    pub(super) fn check(&self, op: &'static str, name: &str, dtype: DType) -> Result<()> {
        let fits = |&n: &usize| n > 0 && i32::try_from(n).is_ok();
        let bytes = self.extent().and_then(|n| n.checked_mul(dtype.bytes()));
        if !self.shape.iter().all(fits) || bytes.is_none_or(|n| i64::try_from(n).is_err()) {
            return Err(Error::argument(
                op,
                format!(
                    "{name} has shape {:?} and strides {:?}: every axis must hold 1 to 2^31 - 1 and all of it be \
                     addressable",
                    self.shape, self.strides
                ),
            ));
        }
        check_pointer(op, name, self.data, dtype.bytes())
    }

    /// Checks as [`Strided::check`], and that no element has two places: two threads would write it.
    pub(super) fn check_output(&self, op: &'static str, name: &str, dtype: DType) -> Result<()> {
        self.check(op, name, dtype)?;
        let mut axes = [(self.strides[0], self.shape[0]), (self.strides[1], self.shape[1])];
        axes.sort_unstable();
        let mut run = self.shape[2];
        for (stride, extent) in axes {
            if extent > 1 && stride < run {
                return Err(Error::argument(
                    op,
                    format!(
                        "{name} of shape {:?} has strides {:?}: its rows overlap",
                        self.shape, self.strides
                    ),
                ));
            }
            if extent > 1 {
                run += stride * (extent - 1);
            }
        }
        Ok(())
    }

    pub(super) fn expect_shape(&self, op: &'static str, name: &str, expected: [usize; 3]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::argument(op, format!("{name} has shape {:?}, expected {expected:?}", self.shape)))
    }

    /// Whether every row starts, and ends, at a multiple of 16 bytes.
    pub(super) fn wide(&self, dtype: DType) -> bool {
        self.aligned(dtype, WIDE_BYTES)
    }

    /// The largest access in bytes that divides every row: 16, 4 or 2.
    pub(super) fn access(&self, dtype: DType) -> usize {
        [16, 4].into_iter().find(|&bytes| self.aligned(dtype, bytes)).unwrap_or(2)
    }

    /// Whether every row starts, and ends, at a multiple of `bytes`.
    pub(super) fn aligned(&self, dtype: DType, bytes: usize) -> bool {
        let step = |axis: usize| if self.shape[axis] > 1 { self.strides[axis] } else { 0 };
        [step(0), step(1), self.shape[2]].iter().all(|n| (n * dtype.bytes()).is_multiple_of(bytes))
            && self.data.is_multiple_of(bytes as u64)
    }

    /// The address of image `first`; [`Strided::check`] has bounded it.
    pub(super) fn image(&self, first: usize, dtype: DType) -> DevicePointer {
        self.data + (first * self.strides[0] * dtype.bytes()) as u64
    }

    /// Tokens `range` of every image, which the caller has checked to exist.
    pub(super) fn tokens(&self, range: &std::ops::Range<usize>, dtype: DType) -> Self {
        let [batch, _, width] = self.shape;
        Self {
            data: self.data + (range.start * self.strides[1] * dtype.bytes()) as u64,
            shape: [batch, range.len(), width],
            strides: self.strides,
        }
    }

    /// The strides as the kernels take them; [`Strided::check`] has bounded what is used of them.
    pub(super) fn kernel_strides(&self) -> [i64; 2] {
        self.strides.map(|stride| i64::try_from(stride).unwrap_or(i64::MAX))
    }
}

/// Whether an address takes 16-byte accesses.
pub(super) fn is_wide(pointer: DevicePointer) -> bool {
    pointer.is_multiple_of(WIDE_BYTES as u64)
}

/// Checks that an address is one, and a multiple of `bytes`.
pub(super) fn check_pointer(
    op: &'static str,
    name: &str,
    pointer: DevicePointer,
    bytes: usize,
) -> Result<()> {
    if pointer == 0 || !pointer.is_multiple_of(bytes as u64) {
        return Err(Error::argument(
            op,
            format!("{name} lies at {pointer:#x}, expected a multiple of {bytes} that is not 0"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: [usize; 3]) -> Strided<DevicePointer> {
        Strided::new(0x1000, shape)
    }

    fn message(result: Result<()>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn empty_and_endless_tensors_are_refused() {
        assert!(tensor([2, 3, 4]).check("op", "x", DType::F16).is_ok());
        assert!(message(tensor([2, 0, 4]).check("op", "x", DType::F16)).contains("x has shape [2, 0, 4]"));
        let endless = tensor([2, 3, 4]).with_strides([usize::MAX, 4]);
        assert!(message(endless.check("op", "x", DType::F16)).contains("addressable"));
        let odd = Strided { data: 0x1001, ..tensor([1, 1, 1]) };
        assert!(message(odd.check("op", "x", DType::F16)).contains("0x1001, expected a multiple of 2"));
        assert!(message(tensor([1, 1, 1]).at(0).check("op", "x", DType::F32)).contains("not 0"));
    }

    #[test]
    fn overlapping_outputs_are_refused_and_swapped_axes_are_not() {
        let check =
            |shape, strides| tensor(shape).with_strides(strides).check_output("op", "out", DType::F32);
        assert!(check([2, 3, 4], [12, 4]).is_ok());
        assert!(check([2, 3, 4], [4, 8]).is_ok(), "tokens outermost");
        assert!(check([1, 3, 4], [0, 4]).is_ok(), "the stride of one image does not matter");
        assert!(message(check([2, 3, 4], [11, 4])).contains("its rows overlap"));
        assert!(message(check([2, 3, 4], [12, 3])).contains("its rows overlap"));
        assert!(message(check([2, 1, 4], [0, 4])).contains("its rows overlap"));
    }

    #[test]
    fn wide_accesses_need_every_row_aligned() {
        assert!(tensor([2, 3, 8]).wide(DType::F16));
        assert!(tensor([2, 3, 4]).wide(DType::F32));
        assert!(!tensor([2, 3, 4]).wide(DType::F16));
        assert!(!tensor([2, 3, 8]).with_strides([28, 9]).wide(DType::F16));
        assert!(tensor([1, 1, 8]).with_strides([1, 1]).wide(DType::F16), "strides nobody takes");
        assert!(!Strided { data: 0x1008, ..tensor([1, 1, 8]) }.wide(DType::F16));
        assert_eq!(tensor([2, 3, 8]).access(DType::F16), 16);
        assert_eq!(tensor([2, 3, 6]).access(DType::F16), 4);
        assert_eq!(tensor([2, 3, 5]).access(DType::Bf16), 2);
        assert_eq!(tensor([2, 3, 5]).access(DType::F32), 4);
    }
}
