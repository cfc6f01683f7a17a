//! Bipartite matching: ToMe's, by keys, one way; MCTF's, by the residual stream and two further criteria, both ways.

use cudarc::driver::{CudaSlice, CudaView};
use foveate::{
    Result,
    cuda::{
        DevicePlan, Element, Strided,
        matching::{Attraction, Matching, MatchingWorkspace, Metric, Weighting, match_tokens},
    },
};

use super::{
    ALL_TYPES, Counted, Launch, Operation, Place, Shape, Units, Value, Work, by_type, noise,
    plan::{bytes, merges},
};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("matching_mctf", ALL_TYPES, |place, dtype, shape| by_type!(dtype, mctf(place, shape)))
        .counted(Counted::UpTo(577)),
    Operation::new("matching_tome", ALL_TYPES, |place, dtype, shape| by_type!(dtype, tome(place, shape)))
        .counted(Counted::UpTo(1370)),
];

fn tome<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    let head_dim = width / heads.max(1);
    let packed: CudaSlice<T> = place.values(batch * tokens * 3 * width, 1)?;
    let mut workspace = MatchingWorkspace::new(&stream, batch, tokens)?;
    let merges = merges(tokens);
    let mut plan = DevicePlan::new(&stream, batch, tokens, tokens - merges)?;
    let read = batch * tokens * width * <T as Element>::DTYPE.bytes();
    let work = Work {
        bytes: read + bytes(batch, tokens, tokens - merges),
        flops: products(shape, head_dim),
        units: Units::Lanes,
    };
    Ok(Launch::new(work, move || {
        let matching = Matching {
            metric: Metric::Keys {
                packed: Strided::new(packed.as_view(), [batch, tokens, 3 * width]),
                heads,
                head_dim,
            },
            attraction: Attraction::Cosine,
            weighting: Weighting::Uniform,
            special: 1,
            merges,
            both_ways: false,
        };
        match_tokens(&device, &stream, &matching, &mut workspace, &mut plan)
    }))
}

fn mctf<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    let rows: CudaSlice<T> = place.values(batch * tokens * width, 1)?;
    let received: Vec<f32> =
        (0..batch * heads * tokens).map(|i| (1.5 + noise(i, 2)) / tokens as f32).collect();
    let received = place.upload(&received)?;
    let sizes = place.upload(&(0..batch * tokens).map(|i| (1 + i % 4) as f32).collect::<Vec<_>>())?;
    let mut workspace = MatchingWorkspace::new(&stream, batch, tokens)?;
    let merges = merges(tokens);
    let mut plan = DevicePlan::new(&stream, batch, tokens, tokens - merges)?;
    let read = batch * tokens * (width * <T as Element>::DTYPE.bytes() + 4 * (heads + 1));
    let work = Work {
        bytes: read + bytes(batch, tokens, tokens - merges),
        flops: products(shape, width),
        units: Units::Lanes,
    };
    Ok(Launch::new(work, move || {
        let scores =
            || -> Strided<CudaView<'_, f32>> { Strided::new(received.as_view(), [batch, heads, tokens]) };
        let matching = Matching {
            metric: Metric::Rows(Strided::new(rows.as_view(), [batch, tokens, width])),
            attraction: Attraction::MultiCriteria {
                tau_similarity: 1.0,
                informativeness: (scores(), 20.0),
                size: (Some(sizes.as_view()), 40.0),
            },
            weighting: Weighting::SizeAndReceived(Some(sizes.as_view()), scores()),
            special: 1,
            merges,
            both_ways: true,
        };
        match_tokens(&device, &stream, &matching, &mut workspace, &mut plan)
    }))
}

/// Every token of one side with every token of the other.
fn products(shape: Shape, width: usize) -> usize {
    2 * shape.batch * (shape.tokens / 2) * shape.tokens.div_ceil(2) * width
}
