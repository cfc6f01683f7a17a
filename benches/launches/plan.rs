//! Composition of plans, and the plans that the other operations are launched with.

use foveate::{
    Result, TokenPlan,
    cuda::{DType, DevicePlan, plan::compose},
};

use super::{Launch, Operation, Place, Shape, Work};

pub(super) const OPERATIONS: &[Operation] = &[
    // A plan has no storage type of its own: its weights are f32.
    Operation::new("compose", &[DType::F32], |place, _, shape| prepare(place, shape)).of_any_width(),
];

/// What one block of ToMe takes of `tokens`: 13, or as many as there are partners for.
pub(super) fn merges(tokens: usize) -> usize {
    13.min(tokens.saturating_sub(1) / 2)
}

/// A plan like ToMe's: the class token stays, and the first `merges` pairs of neighbours become one token each.
pub(super) fn pairs(batch: usize, tokens: usize) -> Result<TokenPlan> {
    let merges = merges(tokens);
    let image: Vec<Vec<(usize, f32)>> = (0..tokens - merges)
        .map(|m| match m {
            0 => vec![(0, 1.0)],
            m if m <= merges => vec![(2 * m - 1, 0.5), (2 * m, 0.5)],
            m => vec![(m + merges, 1.0)],
        })
        .collect();
    TokenPlan::from_groups(tokens, &vec![image; batch])
}

/// Bytes of a plan's four arrays.
pub(super) fn bytes(batch: usize, tokens: usize, out: usize) -> usize {
    4 * batch * (3 * tokens + out + 1)
}

fn prepare(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let first = pairs(shape.batch, shape.tokens)?;
    let next = pairs(shape.batch, first.tokens_out())?;
    let (middle, last) = (first.tokens_out(), next.tokens_out());
    let (first, next) = (DevicePlan::upload(&stream, &first)?, DevicePlan::upload(&stream, &next)?);
    let mut out = DevicePlan::new(&stream, shape.batch, shape.tokens, last)?;
    let written = bytes(shape.batch, shape.tokens, last);
    let work = Work {
        bytes: written + bytes(shape.batch, shape.tokens, middle) + bytes(shape.batch, middle, last),
        ..Work::default()
    };
    Ok(Launch::new(work, move || compose(&device, &stream, &first, &next, &mut out)))
}
