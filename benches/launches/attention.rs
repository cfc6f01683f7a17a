//! Attention on packed queries, keys and values: alone, with token sizes, with the scores of the methods, and MCTF's forms of
//! it over merged tokens.

use cudarc::driver::{CudaSlice, CudaView};
use foveate::{
    Result,
    cuda::{
        DevicePlan, Element, Strided,
        attention::{
            Attention, Scores, Split, attention, attention_folded, attention_grouped, attention_scores,
            needs_log_sum_exp,
        },
    },
};

use super::{
    ALL_TYPES, Counted, Launch, Operation, Place, Prepare, Shape, Units, Value, Work, by_type, plan::pairs,
};

pub(super) const OPERATIONS: &[Operation] = &[
    counted("attention", |place, dtype, shape| by_type!(dtype, plain(place, shape)))
        .counted(Counted::UpTo(1370)),
    counted("attention_class", |place, dtype, shape| by_type!(dtype, class(place, shape))),
    counted("attention_folded", |place, dtype, shape| by_type!(dtype, folded(place, shape)))
        .counted(Counted::UpTo(197)),
    counted("attention_grouped", |place, dtype, shape| by_type!(dtype, grouped(place, shape))),
    counted("attention_received", |place, dtype, shape| by_type!(dtype, received(place, shape))),
    counted("attention_scores", |place, dtype, shape| by_type!(dtype, scores(place, shape))),
    counted("attention_sizes", |place, dtype, shape| by_type!(dtype, sizes(place, shape))),
];

const fn counted(name: &'static str, prepare: Prepare) -> Operation {
    Operation::new(name, ALL_TYPES, prepare).counted(Counted::UpTo(577))
}

/// What is asked for beside, or instead of, the values.
#[derive(Clone, Copy, Default)]
struct Wanted {
    class: bool,
    received: bool,
    scores_alone: bool,
}

fn plain<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, false, Wanted::default())
}

/// ToMe's proportional attention.
fn sizes<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, true, Wanted::default())
}

/// EViT's.
fn class<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, false, Wanted { class: true, ..Wanted::default() })
}

/// MCTF's in blocks that reduce by what earlier ones have seen.
fn received<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, true, Wanted { received: true, ..Wanted::default() })
}

/// The first half of MCTF's one-step-ahead attention.
fn scores<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, true, Wanted { received: true, scores_alone: true, ..Wanted::default() })
}

/// Packed rows (B, N, 3·C), and token sizes.
struct Packed<T> {
    rows: CudaSlice<T>,
    sizes: CudaSlice<f32>,
    shape: Shape,
}

impl<T: Value> Packed<T> {
    fn new(place: &Place, shape: Shape) -> Result<Self> {
        let Shape { batch, tokens, width, .. } = shape;
        let sizes: Vec<f32> = (0..batch * tokens).map(|i| (1 + i % 4) as f32).collect();
        Ok(Self { rows: place.values(batch * tokens * 3 * width, 1)?, sizes: place.upload(&sizes)?, shape })
    }

    /// Queries, keys or values.
    fn part(&self, part: usize) -> Strided<CudaView<'_, T>> {
        let Shape { batch, tokens, width, .. } = self.shape;
        Strided::new(self.rows.slice(part * width..), [batch, tokens, width])
            .with_strides([tokens * 3 * width, 3 * width])
    }

    fn attention(&self, sizes: bool) -> Attention<'_, T> {
        let Shape { width, heads, .. } = self.shape;
        Attention {
            q: self.part(0),
            k: self.part(1),
            heads,
            scale: 1.0 / ((width / heads) as f32).sqrt(),
            sizes: sizes.then(|| self.sizes.as_view()),
            split: Split::Auto,
        }
    }
}

/// Both matrix products, or those of the scores alone, and every tensor once.
fn work<T: Value>(shape: Shape, products: usize, parts: usize, floats: usize) -> Work {
    let Shape { batch, tokens, width, .. } = shape;
    Work {
        bytes: parts * batch * tokens * width * <T as Element>::DTYPE.bytes() + 4 * floats,
        flops: products * 2 * batch * tokens * tokens * width,
        units: Units::of(<T as Element>::DTYPE),
    }
}

fn prepare<T: Value>(place: &Place, shape: Shape, sizes: bool, wanted: Wanted) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, heads } = shape;
    let packed = Packed::<T>::new(place, shape)?;
    let row = batch * heads * tokens;
    let second =
        needs_log_sum_exp(<T as Element>::DTYPE, tokens, width / heads, wanted.class, wanted.received);
    let buffer = |there: bool| there.then(|| place.zeros::<f32>(row)).transpose();
    let (mut class, mut received) = (buffer(wanted.class)?, buffer(wanted.received)?);
    let mut sums = buffer(second || wanted.scores_alone)?;
    let mut out = place.zeros::<T>(batch * tokens * width)?;
    let scored = usize::from(wanted.class) + usize::from(wanted.received);
    let floats = scored * row + usize::from(sizes) * batch * tokens;
    let work =
        if wanted.scores_alone { work::<T>(shape, 1, 2, floats) } else { work::<T>(shape, 2, 4, floats) };
    Ok(Launch::new(work, move || {
        let call = packed.attention(sizes);
        let mut scores = Scores {
            class_rows: class.as_mut().map(|class| (class.as_view_mut(), 1)),
            received: received.as_mut().map(CudaSlice::as_view_mut),
            log_sum_exp: sums.as_mut().map(CudaSlice::as_view_mut),
        };
        if wanted.scores_alone {
            return attention_scores(&device, &stream, &call, &mut scores);
        }
        let mut out = Strided::new(out.as_view_mut(), [batch, tokens, width]);
        attention(&device, &stream, &call, &packed.part(2), &mut out, &mut scores)
    }))
}

/// MCTF's attention with the values of merged tokens, for all tokens.
fn grouped<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let packed = Packed::<T>::new(place, shape)?;
    let plan = DevicePlan::upload(&stream, &pairs(batch, tokens)?)?;
    let merged = plan.tokens_out();
    let values = place.values::<T>(batch * merged * width, 2)?;
    let mut out = place.zeros::<T>(batch * tokens * width)?;
    let mut work = work::<T>(shape, 2, 3, 2 * batch * tokens);
    work.bytes += batch * merged * width * <T as Element>::DTYPE.bytes();
    Ok(Launch::new(work, move || {
        let values = Strided::new(values.as_view(), [batch, merged, width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, tokens, width]);
        attention_grouped(&device, &stream, &packed.attention(true), &values, &plan, &mut out)
    }))
}

/// MCTF's attention of merged tokens, rows pooled by maximum.
fn folded<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let packed = Packed::<T>::new(place, shape)?;
    let plan = DevicePlan::upload(&stream, &pairs(batch, tokens)?)?;
    let merged = plan.tokens_out();
    let values = place.values::<T>(batch * merged * width, 2)?;
    let mut out = place.zeros::<T>(batch * merged * width)?;
    let mut work = work::<T>(shape, 1, 2, batch * (2 * tokens + merged + 1));
    work.bytes += 2 * batch * merged * width * <T as Element>::DTYPE.bytes();
    work.flops += 2 * batch * merged * merged * width;
    work.units = Units::Lanes;
    Ok(Launch::new(work, move || {
        let values = Strided::new(values.as_view(), [batch, merged, width]);
        let mut out = Strided::new(out.as_view_mut(), [batch, merged, width]);
        attention_folded(&device, &stream, &packed.attention(true), &values, &plan, &mut out)
    }))
}
