//! An estimate of the registers a thread needs, where ptxas has not said.

/// The most 32-bit values alive at once among `instructions`, by first and last mention in program order (`ranges`: first, last,
/// words), where a value that is alive at the head of a loop (`loops`: target and place of each backward jump) is alive to its end;
/// 8 more for what ptxas needs itself, at least 16, at most 255.
pub(super) fn estimate(
    instructions: usize,
    mut loops: Vec<(u32, u32)>,
    mut ranges: Vec<(u32, u32, u32)>,
) -> u32 {
    // An estimate is not worth minutes: a file with that many loops and registers is taken to need them all.
    if loops.len().saturating_mul(ranges.len()) > 200_000_000 {
        return 255;
    }
    // Inner loops first, so that an extended range is seen by the loops around.
    loops.sort_by_key(|&(from, to)| to - from);
    for &(from, to) in &loops {
        for (first, last, _) in &mut ranges {
            if *first < from && *last >= from && *last < to {
                *last = to;
            }
        }
    }
    let mut change = vec![0i64; instructions + 2];
    for (first, last, words) in ranges {
        change[first as usize] += i64::from(words);
        change[last as usize + 1] -= i64::from(words);
    }
    let mut alive = 0;
    let mut most = 0;
    for step in change {
        alive += step;
        most = most.max(alive);
    }
    (most + 8).clamp(16, 255) as u32
}
