//! What all operations check before they compute.

use super::{Tensor, tensor::Shape};
use crate::{Error, Result};

/// Checks that `tensor` has shape `expected` and names it if not.
pub(super) fn expect_shape(op: &'static str, name: &str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::argument(op, format!("{name} has shape {:?}, expected {expected:?}", tensor.shape())))
}

/// (B, N, C) of a tensor of tokens.
pub(super) fn tokens_shape(op: &'static str, name: &str, tensor: &Tensor) -> Result<[usize; 3]> {
    match *tensor.shape() {
        [b, n, c] if b > 0 && n > 0 && c > 0 => Ok([b, n, c]),
        _ => Err(Error::argument(
            op,
            format!(
                "{name} has shape {:?}, expected three axes (images, tokens, width), none empty",
                tensor.shape()
            ),
        )),
    }
}

/// The number of values of a result.
pub(super) fn addressable(op: &'static str, shape: impl Into<Shape>) -> Result<usize> {
    let shape = shape.into();
    shape
        .elements()
        .ok_or_else(|| Error::argument(op, format!("a result of {shape:?} is too large to address")))
}
