//! Decoupled tokens: joined by similarity (MSTM), or clustered (BAT).

use cudarc::driver::CudaSlice;
use foveate::{
    Result,
    backend::Inattentive,
    cuda::{
        DevicePlan, Element, Strided,
        cluster::{Decoupling, cluster, workspace_bytes},
    },
};

use super::{ALL_TYPES, Counted, Launch, Operation, Place, Shape, Value, Work, by_type, plan::bytes};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("cluster_join", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape, false))
    })
    .counted(Counted::UpTo(257)),
    Operation::new("cluster_peaks", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, prepare(place, shape, true))
    })
    .counted(Counted::UpTo(257)),
];

/// Seven tenths of the patches are attentive; a tenth of those pairs up, and there are as many clusters.
fn prepare<T: Value>(place: &Place, shape: Shape, peaks: bool) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    let keep = ((tokens - 1) * 7).div_ceil(10).max(1);
    let (rest, some) = (tokens - 1 - keep, (keep / 10).max(1));
    let inattentive = if peaks {
        Inattentive::Peaks { pairs: some, clusters: some, neighbours: 0 }
    } else {
        Inattentive::Join
    };
    let decoupling = Decoupling { special: 1, keep, inattentive };
    let out = decoupling.tokens_out(tokens)?;
    let x = place.values::<T>(batch * tokens * width, 1)?;
    let scores: CudaSlice<f32> = place.values(batch * heads * tokens, 2)?;
    let mut workspace = place.zeros::<u32>(workspace_bytes(batch, tokens) / 4)?;
    let mut plan = DevicePlan::new(&stream, batch, tokens, out)?;
    let read = batch * tokens * width * <T as Element>::DTYPE.bytes() + 4 * batch * heads * tokens;
    let pairs = if peaks { keep / 2 * keep.div_ceil(2) + rest * rest } else { rest * keep };
    let work =
        Work { bytes: read + bytes(batch, tokens, out), flops: 2 * batch * pairs * width, ..Work::default() };
    Ok(Launch::new(work, move || {
        let x = Strided::new(x.as_view(), [batch, tokens, width]);
        let scores = Strided::new(scores.as_view(), [batch, heads, tokens]);
        cluster(&device, &stream, &x, &scores, decoupling, &mut workspace.as_view_mut(), &mut plan)
    }))
}
