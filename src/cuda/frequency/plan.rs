//! How a frequency filter is launched: what of it fits a block.

use super::{FrequencyShape, LONGEST_SIDE, OP};
use crate::{Error, Result};

/// Outputs that a thread of the mask network computes: instantiations of the kernel.
pub(super) const TILES: [usize; 2] = [6, 8];
/// Threads of a block: the largest that fits and has work.
const THREADS: [usize; 3] = [512, 256, 128];
/// Scratch, in complex values, for axes with prime factors that no butterfly has.
pub(super) const DEFINITION_SCRATCH: usize = 512;
/// Shared memory of a block beside the dynamic kind, as the driver reserves it.
pub(super) const RESERVED_BYTES: usize = 1024;

/// The factors of `n` that butterflies exist for, as few as there are, and primes beyond.
pub(super) fn radices(n: usize) -> Vec<usize> {
    let mut rest = n;
    let mut factors = Vec::new();
    for radix in [7, 5, 3] {
        while rest.is_multiple_of(radix) {
            factors.push(radix);
            rest /= radix;
        }
    }
    let twos = rest.trailing_zeros() as usize;
    rest >>= twos;
    // 8s as long as they leave nothing, 4 or two 4s.
    let (eights, fours, two) = match twos % 3 {
        0 => (twos / 3, 0, false),
        1 if twos >= 4 => (twos / 3 - 1, 2, false),
        1 => (0, 0, true),
        _ => (twos / 3, 1, false),
    };
    factors.extend(std::iter::repeat_n(8, eights).chain(std::iter::repeat_n(4, fours)));
    factors.extend(two.then_some(2));
    let mut prime = 11;
    while rest > 1 {
        while rest.is_multiple_of(prime) {
            factors.push(prime);
            rest /= prime;
        }
        prime += 2;
    }
    factors
}

/// How a filter is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) resident: bool,
    /// Index of [`TILES`].
    pub(super) tile: usize,
    pub(super) tiles: usize,
    pub(super) threads: usize,
    /// Bins at a time.
    pub(super) chunk: usize,
    pub(super) bins: usize,
    /// From row to row of a plane.
    pub(super) row: usize,
    /// Complex values.
    pub(super) scratch: usize,
    /// Of the resident kernel, or of the one of bins.
    pub(super) shared_bytes: usize,
    pub(super) transform_scratch: usize,
    pub(super) transform_bytes: usize,
    pub(super) spectrum_bytes: usize,
}

impl Plan {
    pub(super) fn new(shape: FrequencyShape, limit: usize) -> Result<Self> {
        let FrequencyShape { batch, grid: [height, width], groups, .. } = shape;
        let group = shape.group_width()?;
        if [height, width].iter().any(|side| !(1..=LONGEST_SIDE).contains(side)) {
            return Err(Error::argument(
                OP,
                format!("a grid of {height}x{width}; sides of 1 to {LONGEST_SIDE} are supported"),
            ));
        }
        let pairs = group.div_ceil(2);
        let row = width | 1;
        let bins = height * (width / 2 + 1);
        // The tile that pads the group least, the wider of two.
        let padded = |tile: usize| group.div_ceil(TILES[tile]) * TILES[tile];
        let tile = usize::from(padded(1) <= padded(0));
        let (tiles, outputs) = (group.div_ceil(TILES[tile]), padded(tile));
        let by_definition = [height, width].iter().any(|&n| radices(n).iter().any(|&radix| radix > 8));
        let least = if by_definition { DEFINITION_SCRATCH } else { 0 };
        let places = 2 * (height + width) + width / 2;
        let weights = 2 * (2 * pairs * outputs + outputs);
        let bytes = |values: usize| 8 * (values + height + width) + places;
        let plane = height * row;
        let room = limit.saturating_sub(RESERVED_BYTES.min(limit));

        let transform_scratch = least;
        let transform_bytes = bytes(transform_scratch + plane);
        let too_large = |needed: usize, what: &str| {
            Error::argument(
                OP,
                format!(
                    "{what} takes {needed} bytes of shared memory, this device has {room} a block; use a smaller {}",
                    if what.starts_with('a') { "grid" } else { "group" }
                ),
            )
        };
        let candidate = |threads: usize, planes: usize| {
            let chunk = ((threads / tiles) & !1).min(bins.next_multiple_of(2));
            let scratch = (group * chunk).max(least);
            (chunk, scratch, bytes(weights + scratch + planes * plane))
        };
        let usable = |&threads: &usize| {
            // Threads beyond the bins' tiles and beyond the transforms' butterflies have nothing to do.
            let work = (bins.next_multiple_of(2) * tiles).max(pairs * height * width / 4);
            threads / tiles >= 2 && (threads <= 128 || threads / 2 < work)
        };
        let mut plan = Self {
            resident: true,
            tile,
            tiles,
            threads: 0,
            chunk: 0,
            bins,
            row,
            scratch: 0,
            shared_bytes: 0,
            transform_scratch,
            transform_bytes,
            spectrum_bytes: [groups, pairs, plane, 8]
                .iter()
                .try_fold(batch, |bytes, &n| bytes.checked_mul(n))
                .ok_or_else(|| Error::argument(OP, format!("{shape:?} is too large to address")))?,
        };
        for (resident, planes) in [(true, pairs), (false, 0)] {
            for threads in THREADS.into_iter().filter(usable) {
                let (chunk, scratch, shared_bytes) = candidate(threads, planes);
                if shared_bytes <= room {
                    plan = Self { resident, threads, chunk, scratch, shared_bytes, ..plan };
                    if !resident && transform_bytes > room {
                        return Err(too_large(transform_bytes, "a plane of the grid"));
                    }
                    return Ok(plan);
                }
            }
        }
        let (_, _, needed) = candidate(128, 0);
        Err(too_large(needed, "the network of a group"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_products_of_few_radices() {
        for n in 1..=LONGEST_SIDE {
            let factors = radices(n);
            assert_eq!(factors.iter().product::<usize>(), n);
            assert!(factors.len() <= 8 && factors.iter().all(|&f| f < 9 || n % f == 0), "{n}: {factors:?}");
        }
        assert_eq!(radices(8), [8]);
        assert_eq!(radices(16), [4, 4]);
        assert_eq!(radices(32), [8, 4]);
        assert_eq!(radices(64), [8, 8]);
        assert_eq!(radices(128), [8, 4, 4]);
        assert_eq!(radices(14), [7, 2]);
        assert_eq!(radices(122), [2, 61]);
    }

    #[test]
    fn every_published_filter_runs_in_one_launch() {
        // 99 KiB are the least that a card of compute capability 8.0 or higher gives a block.
        for (channels, side) in
            [(64, 32), (104, 16), (144, 8), (96, 32), (160, 16), (192, 8), (128, 32), (256, 16), (320, 8)]
        {
            let shape = FrequencyShape { batch: 1, grid: [side; 2], channels, groups: 8 };
            let plan = Plan::new(shape, 99 * 1024).unwrap();
            assert!(plan.resident, "{channels} channels on {side}x{side}: {plan:?}");
        }
    }

    #[test]
    fn plans_fit_what_they_are_given() {
        for limit in [48 * 1024, 99 * 1024, 163 * 1024, 227 * 1024] {
            for group in 1..=64 {
                for side in [1, 7, 13, 32, 64, 97, 128] {
                    let shape = FrequencyShape { batch: 2, grid: [side; 2], channels: 8 * group, groups: 8 };
                    let Ok(plan) = Plan::new(shape, limit) else { continue };
                    assert!(plan.shared_bytes <= limit && plan.chunk >= 2 && plan.chunk % 2 == 0);
                    assert!(
                        plan.chunk * plan.tiles <= plan.threads && plan.tiles * TILES[plan.tile] >= group
                    );
                    assert!(plan.scratch >= group * plan.chunk);
                    assert!(plan.resident || plan.transform_bytes <= limit);
                }
            }
        }
        let shape = FrequencyShape { batch: 1, grid: [64; 2], channels: 320, groups: 8 };
        assert!(!Plan::new(shape, 227 * 1024).unwrap().resident);
        let message = |shape| Plan::new(shape, 99 * 1024).unwrap_err().to_string();
        assert!(message(FrequencyShape { grid: [129, 8], ..shape }).contains("129x8; sides of 1 to 128"));
        assert!(message(FrequencyShape { groups: 7, ..shape }).contains("320 channels are not 7 groups"));
        assert!(message(FrequencyShape { grid: [128, 128], ..shape }).contains("a plane of the grid takes"));
    }
}
