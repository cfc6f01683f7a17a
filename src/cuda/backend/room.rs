//! Which batch fits in how much memory.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::{
    super::{LaunchRecord, record},
    Cuda, Layout, Space,
    ledger::ALIGNMENT,
    megabytes,
};
use crate::{Error, Result};

/// The largest batch up to `limit` that takes at most `bytes`; 0 when even one image takes more.
pub(in super::super) fn largest(
    takes: impl Fn(usize) -> Result<usize>,
    bytes: usize,
    limit: usize,
) -> Result<usize> {
    if takes(1)? > bytes {
        return Ok(0);
    }
    // What one image can have, more can have; unless they are too many to address.
    let fits = |batch| takes(batch).is_ok_and(|taken| taken <= bytes);
    let limit = limit.max(1);
    let (mut fitting, mut too_large) = (1, 2.min(limit + 1));
    while too_large <= limit && fits(too_large) {
        (fitting, too_large) = (too_large, too_large.saturating_mul(2).min(limit + 1));
    }
    while too_large - fitting > 1 {
        let between = fitting.midpoint(too_large);
        if fits(between) {
            fitting = between;
        } else {
            too_large = between;
        }
    }
    Ok(fitting)
}

/// What to do where `asked` images did not fit and `most` would.
pub(in super::super) fn advice(most: usize, asked: usize) -> String {
    match most {
        0 => "not even 1 image fits; use a smaller model, or free memory".to_owned(),
        most if most >= asked => {
            format!("{most} images would fit if the free memory were in one piece; try again, or fewer")
        }
        1 => "a batch of 1 image would fit".to_owned(),
        most => format!("a batch of {most} images would fit"),
    }
}

/// A dry pass: runs `work` on a backend without memory, over a stream on which nothing happens. Gives what it returns, what it
/// allocates and what it launches.
pub(in super::super) fn dry<R>(
    cuda: &Cuda,
    stream: &Arc<CudaStream>,
    work: impl FnOnce(Cuda) -> Result<R>,
) -> Result<(R, Layout, Vec<LaunchRecord>)> {
    let (told, launches) = record::record(stream, true, || {
        let backend = cuda.within(Space::ledger(stream.clone()))?;
        let result = work(backend.clone())?;
        let layout = backend.space().end()?;
        Ok((result, layout.ok_or_else(|| Error::argument("engine", "the dry pass left no ledger"))?))
    });
    told.map(|(result, layout)| (result, layout, launches))
}

/// An eager pass's [`Error::OutOfMemory`], with the batch that would fit: found by dry passes. Within an engine's space, the engine
/// knows more.
pub(super) fn explained(
    cuda: &Cuda,
    error: Error,
    batch: usize,
    pass: &dyn Fn(Cuda, usize) -> Result<()>,
) -> Error {
    let Error::OutOfMemory { bytes, .. } = error else { return error };
    // What the failed pass had goes back first.
    let free = cuda.synchronize().ok().and_then(|()| result::mem_get_info().ok());
    let Some((free, total)) = free.filter(|_| cuda.space().is_driver()) else { return error };
    let Ok(stream) = cuda.device().context().new_stream() else { return error };
    // The backend has its workspace already.
    let there = cuda.inner.workspace.bytes().next_multiple_of(ALIGNMENT);
    let takes = |batch| {
        dry(cuda, &stream, |backend| pass(backend, batch))
            .map(|((), layout, _)| layout.bytes.saturating_sub(there))
    };
    let Ok(most) = largest(takes, free, batch) else { return error };
    Error::OutOfMemory {
        bytes,
        what: format!(
            "a pass over {batch} images found no room for {}, {} of {} are free without it; {}",
            megabytes(bytes),
            megabytes(free),
            megabytes(total),
            advice(most, batch)
        ),
        fits: Some(most),
    }
}
