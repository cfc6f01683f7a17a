//! The kernels' parameter struct, made of a matching that has been checked.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::DeviceRepr;

use super::{
    super::{
        DType, DevicePointer, PlanPointers, Strided,
        launch::int,
        strided::{check_pointer, is_wide},
    },
    Attraction, MOST_TOKENS, Matching, MatchingPointers, MatchingScratch, Metric, OP, Weighting,
};
use crate::{Error, Result};

/// `MatchParams` of `kernels/include/match_params.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Params {
    metric: DevicePointer,
    informativeness: DevicePointer,
    factor_sizes: DevicePointer,
    received: DevicePointer,
    sizes: DevicePointer,
    offsets: DevicePointer,
    members: DevicePointer,
    weights: DevicePointer,
    groups: DevicePointer,
    arrived: DevicePointer,
    stays: DevicePointer,
    chosen: DevicePointer,
    metric_strides: [i64; 2],
    informativeness_strides: [i64; 2],
    received_strides: [i64; 2],
    heads: i32,
    pub(super) width: i32,
    pub(super) tokens: i32,
    pub(super) special: i32,
    merges: i32,
    forward: i32,
    informativeness_heads: i32,
    received_heads: i32,
    direction: i32,
    pub(super) attraction: i32,
    wide: i32,
    padded_width: i32,
    tiles: i32,
    similarity_exponent: f32,
    informativeness_exponent: f32,
    size_exponent: f32,
}

const _: () = assert!(
    size_of::<Params>() == 208
        && std::mem::offset_of!(Params, metric_strides) == 96
        && std::mem::offset_of!(Params, heads) == 144
        && std::mem::offset_of!(Params, similarity_exponent) == 196
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

impl Params {
    /// The same for one of the launches, with so many tiles of those who choose.
    pub(super) fn towards(self, direction: i32, tiles: i32) -> Self {
        Self { direction, tiles, ..self }
    }
}

/// `MatchParams::direction`.
pub(super) const ONE_WAY: i32 = 0;
pub(super) const FORTH: i32 = 1;
pub(super) const BACK: i32 = 2;
pub(super) const AT_ONCE: i32 = 3;
/// `MatchParams::attraction`.
pub(super) const COSINE: i32 = 0;
const LINEAR: i32 = 1;
const POWER: i32 = 2;
const IGNORED: i32 = 3;

/// Checks a matching and describes it to the kernels, all but the direction.
pub(super) fn parameters(
    dtype: DType,
    matching: &MatchingPointers,
    scratch: MatchingScratch,
    plan: &PlanPointers,
) -> Result<Params> {
    let (rows, first, heads, width) = match matching.metric {
        Metric::Rows(rows) => {
            rows.check(OP, "metric", dtype)?;
            (rows, rows.data, 1, rows.shape[2])
        }
        Metric::Keys { packed, heads, head_dim } => {
            packed.check(OP, "packed heads", dtype)?;
            let all = heads.saturating_mul(head_dim);
            if all == 0 || packed.shape[2] < all.saturating_mul(2) {
                return Err(Error::argument(
                    OP,
                    format!(
                        "packed rows of {} values hold no keys of {heads} heads of {head_dim} behind as many queries",
                        packed.shape[2]
                    ),
                ));
            }
            (packed, packed.data + (all * dtype.bytes()) as u64, heads, head_dim)
        }
    };
    let [batch, tokens, _] = rows.shape;
    let &Matching { special, merges, both_ways, .. } = matching;
    if tokens > MOST_TOKENS {
        return Err(Error::argument(OP, format!("{tokens} tokens, at most {MOST_TOKENS}")));
    }
    if special > tokens || merges > (tokens - special) / 2 {
        return Err(Error::argument(
            OP,
            format!(
                "{merges} merges do not fit {tokens} tokens of which {special} are special; at most {} can be merged",
                tokens.saturating_sub(special) / 2
            ),
        ));
    }
    if (plan.batch, plan.tokens_in, plan.tokens_out) != (batch, tokens, tokens - merges) {
        return Err(Error::argument(
            OP,
            format!(
                "the plan holds {} images of {} tokens that become {}, expected {batch} of {tokens} that become {}",
                plan.batch,
                plan.tokens_in,
                plan.tokens_out,
                tokens - merges
            ),
        ));
    }
    check_pointer(OP, "workspace: arrived", scratch.arrived, 4)?;
    check_pointer(OP, "workspace: stays", scratch.stays, 4)?;
    check_pointer(OP, "workspace: chosen", scratch.chosen, 8)?;
    if scratch.batch < batch || scratch.tokens < tokens {
        return Err(Error::argument(
            OP,
            format!(
                "the workspace serves {} images of {} tokens, {batch} of {tokens} are to be matched",
                scratch.batch, scratch.tokens
            ),
        ));
    }
    let wide = rows.wide(dtype) && is_wide(first) && (width * dtype.bytes()).is_multiple_of(16);
    let mut params = Params {
        metric: first,
        offsets: plan.offsets,
        members: plan.members,
        weights: plan.weights,
        groups: plan.groups,
        arrived: scratch.arrived,
        stays: scratch.stays,
        chosen: scratch.chosen,
        metric_strides: rows.kernel_strides(),
        heads: int(OP, "heads", heads)?,
        width: int(OP, "values a row", width)?,
        tokens: int(OP, "tokens", tokens)?,
        special: int(OP, "special tokens", special)?,
        merges: int(OP, "merges", merges)?,
        forward: int(OP, "merges", if both_ways { merges / 2 } else { merges })?,
        direction: ONE_WAY,
        attraction: COSINE,
        wide: i32::from(wide),
        padded_width: int(OP, "values a row", width.next_multiple_of(8))?,
        ..Params::zeroed()
    };
    attract(&mut params, &matching.attraction, [batch, tokens])?;
    weigh(&mut params, &matching.weighting, [batch, tokens])?;
    Ok(params)
}

/// Scores (B, H, N) that fit the metric.
fn check_scores(scores: &Strided<DevicePointer>, name: &str, [batch, tokens]: [usize; 2]) -> Result<()> {
    scores.check(OP, name, DType::F32)?;
    scores.expect_shape(OP, name, [batch, scores.shape[1], tokens])
}

fn attract(
    params: &mut Params,
    attraction: &Attraction<Strided<DevicePointer>, DevicePointer>,
    shape: [usize; 2],
) -> Result<()> {
    // What a criterion is raised to; 0, the neutral power, switches it off.
    let exponent = |name: &str, temperature: f64| {
        if temperature.is_nan() {
            return Err(Error::argument(OP, format!("the temperature of the {name} is NaN")));
        }
        Ok(if temperature == 0.0 { 0.0 } else { (1.0 / temperature) as f32 })
    };
    let Attraction::MultiCriteria { tau_similarity, informativeness, size } = attraction else {
        return Ok(());
    };
    params.similarity_exponent = exponent("similarity", *tau_similarity)?;
    params.attraction = match params.similarity_exponent {
        0.0 => IGNORED,
        1.0 => LINEAR,
        _ => POWER,
    };
    let scores = &informativeness.0;
    check_scores(scores, "informativeness", shape)?;
    params.informativeness_exponent = exponent("informativeness", informativeness.1)?;
    if params.informativeness_exponent != 0.0 {
        params.informativeness = scores.data;
        params.informativeness_strides = scores.kernel_strides();
        params.informativeness_heads = int(OP, "heads", scores.shape[1])?;
    }
    params.size_exponent = exponent("size", size.1)?;
    if let Some(sizes) = size.0 {
        check_pointer(OP, "sizes of the attraction", sizes, 4)?;
        if params.size_exponent != 0.0 {
            params.factor_sizes = sizes;
        }
    }
    Ok(())
}

fn weigh(
    params: &mut Params,
    weighting: &Weighting<Strided<DevicePointer>, DevicePointer>,
    shape: [usize; 2],
) -> Result<()> {
    let (sizes, received) = match weighting {
        Weighting::Uniform => (None, None),
        Weighting::Size(sizes) => (*sizes, None),
        Weighting::SizeAndReceived(sizes, received) => (*sizes, Some(received)),
    };
    if let Some(sizes) = sizes {
        check_pointer(OP, "sizes", sizes, 4)?;
        params.sizes = sizes;
    }
    if let Some(received) = received {
        check_scores(received, "received", shape)?;
        params.received = received.data;
        params.received_strides = received.kernel_strides();
        params.received_heads = int(OP, "heads", received.shape[1])?;
    }
    Ok(())
}
