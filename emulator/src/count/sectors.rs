//! Sectors of global memory: how many a warp instruction touches, and which ones a launch has touched.

use std::collections::HashMap;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 32;

/// Sectors of a page of [`Touched`].
const PAGE: u64 = 4096;

/// Distinct sectors that one instruction touches and distinct bytes, for `size` bytes at the address of each lane of `mask`.
/// Every sector is noted in `touched`.
#[inline]
pub(super) fn measure(
    addresses: &[u64; 32],
    mask: u32,
    size: u32,
    touched: &mut Touched,
    write: bool,
) -> (u32, u32) {
    if mask == u32::MAX && contiguous(addresses, u64::from(size)) {
        let end = addresses[0].wrapping_add(u64::from(size) * 32 - 1);
        if end > addresses[0] {
            let (first, last) = (addresses[0] / SECTOR, end / SECTOR);
            touched.mark(first, last, write);
            return ((last - first + 1) as u32, size * 32);
        }
    }
    scattered(addresses, mask, size, touched, write)
}

#[inline]
fn contiguous(addresses: &[u64; 32], size: u64) -> bool {
    let base = addresses[0];
    let mut difference = 0;
    for (lane, &address) in addresses.iter().enumerate() {
        difference |= address ^ base.wrapping_add(size * lane as u64);
    }
    difference == 0
}

fn scattered(addresses: &[u64; 32], mask: u32, size: u32, touched: &mut Touched, write: bool) -> (u32, u32) {
    // Each lane touches one sector, or two where it is misaligned: at most 64 of them, each with a bit a byte.
    let mut sectors = [0u64; 64];
    let mut bytes = [0u32; 64];
    let mut count = 0;
    let mut highest = 0;
    let mut add = |sector: u64, within: u32| {
        // Most instructions touch sectors in rising order: the last one again, or one above all others.
        if count > 0 && sectors[count - 1] == sector {
            bytes[count - 1] |= within;
            return;
        }
        if (count == 0 || sector > highest || !sectors[..count].contains(&sector)) && count < 64 {
            highest = highest.max(sector);
            sectors[count] = sector;
            bytes[count] = within;
            count += 1;
        } else if let Some(at) = sectors[..count].iter().position(|&s| s == sector) {
            bytes[at] |= within;
        }
    };
    let wanted = (1u64 << size.min(32)) - 1;
    let mut rest = mask;
    while rest != 0 {
        let address = addresses[rest.trailing_zeros() as usize];
        rest &= rest - 1;
        let within = wanted << (address % SECTOR);
        add(address / SECTOR, within as u32);
        if within >> 32 != 0 {
            add((address / SECTOR).wrapping_add(1), (within >> 32) as u32);
        }
    }
    for &sector in &sectors[..count] {
        touched.mark(sector, sector, write);
    }
    (count as u32, bytes[..count].iter().map(|b| b.count_ones()).sum())
}

#[derive(Clone)]
struct Page {
    /// Bits of the sectors that were read, and that were written.
    bits: [[u64; (PAGE / 64) as usize]; 2],
}

/// The sectors that a launch has touched.
#[derive(Clone, Default)]
pub(super) struct Touched {
    index: HashMap<u64, usize>,
    pages: Vec<Page>,
    /// The page used last.
    last: Option<(u64, usize)>,
}

impl std::fmt::Debug for Touched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Touched({} pages)", self.pages.len())
    }
}

impl Touched {
    /// Notes the sectors `first..=last`.
    #[inline]
    fn mark(&mut self, first: u64, last: u64, write: bool) {
        let mut sector = first;
        loop {
            let page = self.page(sector / PAGE);
            let end = last.min(sector | (PAGE - 1));
            let bits = &mut self.pages[page].bits[usize::from(write)];
            let (low, high) = ((sector % PAGE) as usize, (end % PAGE) as usize);
            let (first_word, last_word) = (low / 64, high / 64);
            for (k, word) in bits[first_word..=last_word].iter_mut().enumerate() {
                let from = if k == 0 { low % 64 } else { 0 };
                let to = if first_word + k == last_word { high % 64 } else { 63 };
                *word |= (u64::MAX << from) & (u64::MAX >> (63 - to));
            }
            if end == last {
                return;
            }
            sector = end + 1;
        }
    }

    #[inline]
    fn page(&mut self, key: u64) -> usize {
        match self.last {
            Some((last, page)) if last == key => page,
            _ => {
                let pages = &mut self.pages;
                let page = *self.index.entry(key).or_insert_with(|| {
                    pages.push(Page { bits: [[0; (PAGE / 64) as usize]; 2] });
                    pages.len() - 1
                });
                self.last = Some((key, page));
                page
            }
        }
    }

    /// Distinct sectors read and written.
    pub(super) fn count(&self) -> [u64; 2] {
        let mut out = [0; 2];
        for page in &self.pages {
            for (sum, bits) in out.iter_mut().zip(&page.bits) {
                *sum += bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            }
        }
        out
    }
}
