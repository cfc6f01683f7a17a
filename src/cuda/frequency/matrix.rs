//! Which filters run on tensor cores (`kernels/frequency_mma.cu`), and how.

use super::{
    DType, FrequencyShape, LONGEST_SIDE,
    plan::{DEFINITION_SCRATCH, RESERVED_BYTES, radices},
};
use crate::Result;

/// Group widths that the kernels take. Groups of 2 channels, padded to 8, gain nothing on 8x8 positions; above 40, a bin's sums do not
/// fit the registers.
const WIDTHS: std::ops::RangeInclusive<usize> = 4..=40;
/// Lengths of transforms that are one product, padded to 16: as many as an instruction's tile holds. Butterflies take them in two
/// passes through shared memory, but 8 and 7 in one, which costs less than a product (`kernels/frequency_mma.cu` has the count).
const BASES: std::ops::RangeInclusive<usize> = 9..=16;
/// Bytes of one such matrix in shared memory: `kMatrixWords` of `kernels/include/fourier_mma.cuh`.
const MATRIX_BYTES: usize = 8 * 32 * 16;
/// Bytes of the weights from 8 channels to 8 others, of either part: `kUnit` of `kernels/frequency_mma.cu`.
const UNIT_BYTES: usize = 32 * 16;

/// Instantiations of the kernel, by eights of channels.
pub(super) const STEPS: [usize; 5] = [1, 2, 3, 4, 5];

/// How many values of an axis of `n` are one product with a matrix: all or half of them; 0 where butterflies are used.
pub(super) fn base(n: usize) -> usize {
    match n {
        _ if BASES.contains(&n) => n,
        _ if n.is_multiple_of(2) && BASES.contains(&(n / 2)) => n / 2,
        _ => 0,
    }
}

/// The factors of an axis of `n` in the order of the forward transform: of its products, else of its butterflies.
pub(super) fn factors(n: usize) -> Vec<usize> {
    match base(n) {
        0 => radices(n),
        all if all == n => vec![n],
        half => vec![2, half],
    }
}

/// From plane to plane, for a plane of `values` complex ones: neighbouring lanes have neighbouring pairs of channels, in the network
/// and where channels are contiguous in memory, so planes begin one of the sixteen 8-byte banks apart, four where there are
/// four of them.
fn plane(values: usize, pairs: usize) -> usize {
    let apart = if pairs <= 8 { 4 } else { 1 };
    values + (16 + apart - values % 16) % 16
}

/// How a filter is launched on tensor cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MatrixPlan {
    /// Index of [`STEPS`].
    pub(super) steps: usize,
    pub(super) threads: usize,
    /// Complex values from plane to plane.
    pub(super) plane: usize,
    /// Complex values, for butterflies of large primes.
    pub(super) scratch: usize,
    pub(super) shared_bytes: usize,
}

impl MatrixPlan {
    /// The plan where `dtype` has 16 bits, the group's width is one of [`WIDTHS`], and its spectrum fits a block that may have
    /// `limit` bytes of shared memory.
    pub(super) fn new(shape: FrequencyShape, dtype: DType, limit: usize) -> Result<Option<Self>> {
        let FrequencyShape { grid: [height, width], .. } = shape;
        let group = shape.group_width()?;
        let parts = match dtype {
            DType::F32 => return Ok(None),
            DType::F16 => 2,
            DType::Bf16 => 1,
        };
        let sides = [height, width].iter().all(|side| (1..=LONGEST_SIDE).contains(side));
        if !WIDTHS.contains(&group) || !sides {
            return Ok(None);
        }
        let eights = group.div_ceil(8);
        let by_definition =
            [height, width].iter().any(|&n| base(n) == 0 && radices(n).iter().any(|&radix| radix > 8));
        let scratch = if by_definition { DEFINITION_SCRATCH } else { 0 };
        let matrices = match [base(height), base(width)] {
            [0, 0] => 0,
            [first, second] if first == second || first == 0 || second == 0 => 1,
            _ => 2,
        };
        let pairs = group.div_ceil(2);
        let plane = plane(height * (width | 1), pairs);
        let values = 2 * 8 * eights + scratch + width + height + pairs * plane;
        let shared_bytes = 2 * parts * eights * eights * UNIT_BYTES
            + matrices * MATRIX_BYTES
            + 8 * values
            + 2 * (height + width)
            + width / 2;
        let bins = height * (width / 2 + 1);
        // Sixteen bins keep a warp busy.
        let threads = if bins <= 4 * 16 { 128 } else { 256 };
        let room = limit.saturating_sub(RESERVED_BYTES.min(limit));
        Ok((shared_bytes <= room).then_some(Self {
            steps: eights - 1,
            threads,
            plane,
            scratch,
            shared_bytes,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(channels: usize, grid: [usize; 2]) -> FrequencyShape {
        FrequencyShape { batch: 1, grid, channels, groups: 8 }
    }

    /// 99 KiB are the least that a card of compute capability 8.0 or higher gives a block.
    fn plan(channels: usize, side: usize, dtype: DType) -> Option<MatrixPlan> {
        MatrixPlan::new(shape(channels, [side; 2]), dtype, 99 * 1024).unwrap()
    }

    #[test]
    fn axes_are_one_product_or_two_or_butterflies() {
        let all =
            [(7, 0), (8, 0), (9, 9), (14, 14), (16, 16), (17, 0), (20, 10), (28, 14), (32, 16), (33, 0)];
        for (n, want) in all {
            assert_eq!(base(n), want, "{n}");
        }
        assert_eq!([base(18), base(34), base(56), base(64)], [9, 0, 0, 0]);
        assert_eq!(factors(16), [16]);
        assert_eq!(factors(28), [2, 14]);
        assert_eq!(factors(64), [8, 8]);
        for n in 1..=128 {
            assert_eq!(factors(n).iter().product::<usize>(), n);
        }
    }

    #[test]
    fn every_published_filter_of_16_bits_takes_tensor_cores() {
        for (channels, side, steps, threads) in [
            (64, 32, 1, 256),
            (104, 16, 2, 256),
            (144, 8, 3, 128),
            (96, 32, 2, 256),
            (160, 16, 3, 256),
            (192, 8, 3, 128),
            (128, 32, 2, 256),
            (256, 16, 4, 256),
            (320, 8, 5, 128),
        ] {
            for dtype in [DType::F16, DType::Bf16] {
                let plan = plan(channels, side, dtype).unwrap();
                assert_eq!(
                    (STEPS[plan.steps], plan.threads),
                    (steps, threads),
                    "{channels} on {side}x{side}"
                );
            }
            assert_eq!(plan(channels, side, DType::F32), None);
        }
    }

    #[test]
    fn what_has_no_plan() {
        assert_eq!(plan(8 * 3, 16, DType::F16), None, "narrow groups");
        assert_eq!(plan(8 * 41, 8, DType::F16), None, "wide groups");
        assert_eq!(plan(128, 64, DType::Bf16), None, "a spectrum of 264 KiB");
        assert_eq!(MatrixPlan::new(shape(64, [0, 4]), DType::F16, 99 * 1024).unwrap(), None);
        assert!(MatrixPlan::new(shape(60, [8, 8]), DType::F16, 99 * 1024).is_err(), "no groups");
    }

    /// By hand, 16 channels on 32x32 in f16: weights 2 layers of 2 parts of 4 units of 512 bytes, a matrix of 4,096 bytes, biases
    /// of 2*16 values, turns of 64, planes of 8*(32*33 + 4); 128 places and 16 more.
    #[test]
    fn shared_memory_is_the_sum_of_its_parts() {
        let bytes = 2 * 2 * 4 * 512 + 4096 + 8 * (32 + 64 + 8480) + 128 + 16;
        assert_eq!(plan(128, 32, DType::F16).unwrap().shared_bytes, bytes);
        assert_eq!(plan(128, 32, DType::Bf16).unwrap().shared_bytes, bytes - 2 * 4 * 512);
    }
}
