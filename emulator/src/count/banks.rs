//! Shared memory banks: 32 of them, four bytes wide.

/// Passes with an active lane and their wavefronts, for `size` bytes at the offset of each lane of `mask`.
#[inline]
pub(super) fn passes(offsets: &[u32; 32], mask: u32, size: u32) -> (u32, u32) {
    match size {
        0..=4 => (1, wavefronts(offsets, mask, 1)),
        5..=8 => halves(offsets, mask, 16, 2),
        _ => halves(offsets, mask, 8, 4),
    }
}

#[inline]
fn halves(offsets: &[u32; 32], mask: u32, lanes: u32, words: u32) -> (u32, u32) {
    let (mut ideal, mut total) = (0, 0);
    let whole = u32::MAX >> (32 - lanes);
    let mut first = 0;
    while first < 32 {
        let part = mask & (whole << first);
        if part != 0 {
            ideal += 1;
            total += wavefronts(offsets, part, words);
        }
        first += lanes;
    }
    (ideal, total)
}

/// Wavefronts of one pass: the largest number of distinct words wanted from one bank.
#[inline]
fn wavefronts(offsets: &[u32; 32], mask: u32, words: u32) -> u32 {
    // Columns are groups of `words` banks; when every lane has its own, or all lanes want the same, there is one wavefront.
    let shift = 2 + words.trailing_zeros();
    let columns = 32 / words;
    let lowest = offsets[mask.trailing_zeros() as usize & 31];
    let (mut used, mut differ, mut crooked) = (0u32, 0u32, 0u32);
    let mut rest = mask;
    while rest != 0 {
        let offset = offsets[rest.trailing_zeros() as usize];
        rest &= rest - 1;
        used |= 1 << ((offset >> shift) & (columns - 1));
        differ |= offset ^ lowest;
        crooked |= offset;
    }
    let straight = words == 1 || crooked & ((4 << words.trailing_zeros()) - 1) == 0;
    if straight && (used.count_ones() == mask.count_ones() || differ >> 2 == 0) {
        return 1;
    }
    conflicts(offsets, mask, words)
}

fn conflicts(offsets: &[u32; 32], mask: u32, words: u32) -> u32 {
    const NONE: u8 = u8::MAX;
    // Distinct words, in one chain a bank. A pass wants at most 32 of them.
    let mut seen = [0u32; 32];
    let mut next = [NONE; 32];
    let mut head = [NONE; 32];
    let mut depth = [0u32; 32];
    let mut count = 0usize;
    let mut rest = mask;
    while rest != 0 {
        let offset = offsets[rest.trailing_zeros() as usize];
        rest &= rest - 1;
        for k in 0..words {
            let word = (offset >> 2).wrapping_add(k);
            let bank = (word & 31) as usize;
            let mut at = head[bank];
            while at != NONE && seen[at as usize] != word {
                at = next[at as usize];
            }
            if at == NONE && count < 32 {
                seen[count] = word;
                next[count] = head[bank];
                head[bank] = count as u8;
                depth[bank] += 1;
                count += 1;
            }
        }
    }
    depth.into_iter().max().unwrap_or(1).max(1)
}

/// The largest number of lanes with one address.
pub(super) fn most_on_one_address(offsets: &[u32; 32], mask: u32) -> u32 {
    let mut most = 1;
    let mut rest = mask;
    while rest.count_ones() > most {
        let offset = offsets[rest.trailing_zeros() as usize];
        let same = (0..32).filter(|&lane| rest >> lane & 1 == 1 && offsets[lane as usize] == offset);
        let same = same.fold(0u32, |lanes, lane| lanes | 1 << lane);
        most = most.max(same.count_ones());
        rest &= !same;
    }
    most
}
