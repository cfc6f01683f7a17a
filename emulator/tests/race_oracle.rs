//! The race detector of shared memory against a plain one that remembers every access to every byte.

use cuda::check::shared::{Access, SharedRace, Touch};
use proptest::prelude::*;

const WARPS: u32 = 3;
const BYTES: u32 = 64;

/// What a warp does next.
#[derive(Clone, Debug)]
enum Step {
    /// An instruction: each lane of the mask touches `size` bytes at its offset, and writes its value.
    Access { warp: u32, touch: Touch, size: u32, mask: u32, offsets: Vec<u32>, values: Vec<u128> },
    /// All warps meet.
    Barrier,
    /// Two warps meet.
    Pair(u32, u32),
    /// The lanes of a warp meet.
    Warp(u32),
}

/// One instruction's accesses to a byte.
struct Past {
    time: usize,
    warp: u32,
    lanes: u32,
    touch: Touch,
}

/// `known[w][v]`: what warp v did before that step is ordered before what warp w does next.
struct Plain {
    known: [[usize; WARPS as usize]; WARPS as usize],
    bytes: Vec<Vec<Past>>,
}

impl Plain {
    fn meet(&mut self, time: usize, warps: &[u32]) {
        let mut joined = [0; WARPS as usize];
        for &w in warps {
            joined
                .iter_mut()
                .zip(self.known[w as usize])
                .for_each(|(join, known)| *join = (*join).max(known));
        }
        warps.iter().for_each(|&w| joined[w as usize] = time);
        warps.iter().for_each(|&w| self.known[w as usize] = joined);
    }

    /// Whether the access races, and whether with nothing but other lanes of its own warp.
    fn access(&mut self, time: usize, step: &Step) -> Option<bool> {
        let Step::Access { warp, touch, size, mask, offsets, values } = step else { return None };
        let (mut between, mut inside) = (false, false);
        let harmless =
            |a: Touch, b: Touch| (a == b && a != Touch::Write) || (a == Touch::Read && b == Touch::Read);
        for lane in (0..32).filter(|lane| mask >> lane & 1 == 1) {
            let first = offsets[lane as usize];
            for byte in first..first + size {
                // Of several lanes that write the same value at once, the first stands for all where it is about their own warp.
                let later = *touch == Touch::Write
                    && (0..lane).any(|l| mask >> l & 1 == 1 && offsets[l as usize] == first);
                for past in &self.bytes[byte as usize] {
                    let ordered = past.time < self.known[*warp as usize][past.warp as usize];
                    if ordered || harmless(past.touch, *touch) {
                        continue;
                    }
                    if past.warp != *warp {
                        between = true;
                    } else if !later
                        && past.lanes & !(1 << lane) != 0
                        && (past.touch != Touch::Write || past.lanes >> lane & 1 == 0)
                    {
                        inside = true;
                    }
                }
                // The same value may be written by several lanes at once.
                let value = |l: u32| (values[l as usize] >> (8 * (byte - offsets[l as usize]))) as u8;
                between |= *touch == Touch::Write
                    && (0..lane).any(|l| {
                        let there = offsets[l as usize]..offsets[l as usize] + size;
                        mask >> l & 1 == 1 && there.contains(&byte) && value(l) != value(lane)
                    });
            }
        }
        for byte in 0..BYTES {
            let touches = |l: &u32| {
                let there = offsets[*l as usize]..offsets[*l as usize] + size;
                mask >> l & 1 == 1 && there.contains(&byte)
            };
            let lanes = (0..32).filter(touches).fold(0, |m, l| m | 1 << l);
            if lanes != 0 {
                self.bytes[byte as usize].push(Past { time, warp: *warp, lanes, touch: *touch });
            }
        }
        (between || inside).then_some(!between)
    }
}

fn step() -> impl Strategy<Value = Step> {
    let access = (
        0..WARPS,
        prop_oneof![5 => Just(Touch::Read), 3 => Just(Touch::Write), 1 => Just(Touch::Atomic)],
        prop_oneof![Just(1u32), Just(2), Just(4), Just(8), Just(16)],
        // Few lanes, few places and two values, or everything would be a race.
        prop::collection::vec(0..32u32, 1..4),
        prop::collection::vec(0..BYTES, 32),
        prop::collection::vec(prop_oneof![8 => Just(0u128), 1 => Just(1 << 64)], 32),
    );
    let access = access.prop_map(|(warp, touch, size, lanes, places, values)| {
        let size = if touch == Touch::Atomic { size.clamp(4, 8) } else { size };
        Step::Access {
            warp,
            touch,
            size,
            mask: lanes.iter().fold(0, |mask, lane| mask | 1 << lane),
            offsets: places.iter().map(|p| p / size * size).collect(),
            values,
        }
    });
    prop_oneof![
        4 => access,
        2 => Just(Step::Barrier),
        1 => (0..WARPS, 1..WARPS).prop_map(|(a, d)| Step::Pair(a, (a + d) % WARPS)),
        1 => (0..WARPS).prop_map(Step::Warp),
    ]
}

/// Steps in a line each, without the lanes that do nothing.
struct Short<'a>(&'a [Step]);

impl std::fmt::Debug for Short<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (time, step) in self.0.iter().enumerate() {
            match step {
                Step::Access { warp, touch, size, mask, offsets, values } => {
                    write!(f, "\n{time}: warp {warp} {touch:?} {size}:")?;
                    for lane in (0..32usize).filter(|lane| mask >> lane & 1 == 1) {
                        write!(f, " lane {lane} at {} ({:x})", offsets[lane], values[lane])?;
                    }
                }
                other => write!(f, "\n{time}: {other:?}")?,
            }
        }
        Ok(())
    }
}

/// Blocks one after the other, each up to its first race.
fn check(blocks: &[Vec<Step>]) -> Result<(), TestCaseError> {
    let mut race = SharedRace::default();
    for steps in blocks {
        race.start(WARPS, BYTES);
        let mut plain = Plain { known: Default::default(), bytes: (0..BYTES).map(|_| Vec::new()).collect() };
        for (time, step) in steps.iter().enumerate() {
            match step {
                Step::Access { warp, touch, size, mask, offsets, values } => {
                    let offsets: &[u32; 32] = offsets[..].try_into().unwrap();
                    let values: &[u128; 32] = values[..].try_into().unwrap();
                    let values = (*touch == Touch::Write).then_some(values);
                    let (warp, pc, mask, size, touch) = (*warp, time as u32, *mask, *size, *touch);
                    let access = Access { warp, pc, mask, offsets, size, touch, values };
                    let found = race.access(&access).map(|conflict| conflict.intra_warp);
                    let expected = plain.access(time, step);
                    prop_assert_eq!(found, expected, "step {} of {:#?}", time, Short(steps));
                    if expected.is_some() {
                        break;
                    }
                }
                Step::Barrier => {
                    race.barrier(0, &[0, 1, 2]);
                    plain.meet(time, &[0, 1, 2]);
                }
                Step::Pair(a, b) => {
                    race.barrier(1, &[*a, *b]);
                    plain.meet(time, &[*a, *b]);
                }
                Step::Warp(w) => {
                    race.warp_sync(*w, u32::MAX);
                    plain.known[*w as usize][*w as usize] = time;
                }
            }
        }
    }
    Ok(())
}

/// One lane's access.
fn one(warp: u32, touch: Touch, size: u32, lane: u32, offset: u32) -> Step {
    Step::Access { warp, touch, size, mask: 1 << lane, offsets: vec![offset; 32], values: vec![0; 32] }
}

/// What is ordered before one warp may not be forgotten: another warp may know nothing of it.
#[test]
fn what_one_warp_knows_of_another_may_not() {
    for touch in [Touch::Write, Touch::Atomic] {
        let size = if touch == Touch::Write { 1 } else { 4 };
        check(&[vec![
            one(2, touch, size, 25, 8),
            Step::Pair(1, 0),
            Step::Pair(2, 1),
            one(1, Touch::Read, 16, 3, 0),
            one(0, Touch::Read, 4, 8, 8),
        ]])
        .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_first_race_is_found_and_nothing_before_it(
        blocks in prop::collection::vec(prop::collection::vec(step(), 1..40), 1..4),
    ) {
        check(&blocks)?;
    }
}
