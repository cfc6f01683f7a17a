//! The allocations of a pass, written down, and places for them in one allocation.
//!
//! Shapes depend on counts alone, so every pass of a model, a method and a batch allocates and frees the same sizes in the
//! same order. A dry pass writes them down; what is alive at the same time gets places side by side.

use crate::{Error, Result};

/// Where allocations begin: what the driver's own do, so that kernels and algorithms are those of any other pass.
pub(in super::super) const ALIGNMENT: usize = 256;

/// Where the addresses of a dry pass begin. Nothing is there.
const NOWHERE: u64 = 1 << 40;

/// Memory of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Item {
    bytes: usize,
    /// It keeps its content from pass to pass: the workspace, the images, what the host uploads.
    constant: bool,
    /// Events before it was allocated.
    born: usize,
    /// Events before it was freed; none when the pass ended before.
    died: Option<usize>,
}

/// What happens to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Allocated { bytes: usize, constant: bool },
    Freed { item: usize },
}

/// The allocations of a pass.
#[derive(Debug, Default)]
pub(in super::super) struct Ledger {
    items: Vec<Item>,
    events: Vec<Event>,
    next: u64,
    closed: bool,
}

impl Ledger {
    /// Writes down an allocation; returns its number and an address with nothing behind it.
    pub(super) fn allocate(&mut self, bytes: usize, constant: bool) -> Result<(usize, u64)> {
        if self.closed {
            return Err(Error::argument("engine", "the dry pass has ended"));
        }
        let address = NOWHERE.saturating_add(self.next);
        let room = bytes.max(1).checked_next_multiple_of(ALIGNMENT).and_then(|room| u64::try_from(room).ok());
        let next = room.and_then(|room| self.next.checked_add(room)).filter(|&next| next < 1 << 62);
        self.next = next.ok_or_else(|| {
            Error::argument("engine", "the forward pass takes more memory than can be addressed")
        })?;
        self.items.push(Item { bytes, constant, born: self.events.len(), died: None });
        self.events.push(Event::Allocated { bytes, constant });
        Ok((self.items.len() - 1, address))
    }

    /// Writes down that an item is freed.
    pub(super) fn free(&mut self, item: usize) {
        let now = self.events.len();
        if let (false, Some(item)) = (self.closed, self.items.get_mut(item).filter(|item| !item.constant)) {
            item.died = Some(now);
        } else {
            return;
        }
        self.events.push(Event::Freed { item });
    }

    /// The pass has ended: what is alive is its result.
    pub(in super::super) fn close(&mut self) {
        self.closed = true;
    }

    /// Finds places.
    pub(in super::super) fn lay_out(&self) -> Layout {
        let rows: Vec<Row> = self.items.iter().map(|item| Row::of(item, self.events.len())).collect();
        // The order decides how well gaps are filled, and no one order is best.
        let orders: [Key; 3] = [
            |row| (row.bytes, row.end - row.start),
            |row| (row.bytes.saturating_mul(row.end - row.start), row.bytes),
            |row| (row.end - row.start, row.bytes),
        ];
        let by = |key: Key| {
            let mut order: Vec<usize> = (0..rows.len()).collect();
            order.sort_by_key(|&row| std::cmp::Reverse(key(&rows[row])));
            improve(&rows, order, self.largest_live())
        };
        let (offsets, bytes) = orders.map(by).into_iter().min_by_key(|(_, bytes)| *bytes).unwrap_or_default();
        let largest_live = self.largest_live();
        let constants = self.items.iter().filter(|item| item.constant).map(|item| item.bytes).sum();
        Layout { offsets, events: self.events.clone(), bytes, largest_live, constants }
    }

    /// The most bytes that are alive at a time.
    fn largest_live(&self) -> usize {
        let constant: usize = self.items.iter().filter(|item| item.constant).map(|item| item.bytes).sum();
        let (mut now, mut most) = (constant, constant);
        for event in &self.events {
            match *event {
                Event::Allocated { constant: true, .. } => {}
                Event::Allocated { bytes, .. } => now += bytes,
                Event::Freed { item } => now -= self.items[item].bytes,
            }
            most = most.max(now);
        }
        most
    }
}

/// What rows are placed by, the largest first.
type Key = fn(&Row) -> (usize, usize);

/// An item as a rectangle: bytes over events.
#[derive(Clone, Copy, Debug)]
struct Row {
    bytes: usize,
    start: usize,
    end: usize,
}

impl Row {
    fn of(item: &Item, end: usize) -> Self {
        let bytes = item.bytes.max(1).next_multiple_of(ALIGNMENT);
        if item.constant {
            return Self { bytes, start: 0, end };
        }
        Self { bytes, start: item.born, end: item.died.unwrap_or(end) }
    }

    fn meets(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// Places rows in `order`, each in the smallest gap that holds it between those it meets; returns offsets and the total.
fn place(rows: &[Row], order: &[usize]) -> (Vec<usize>, usize) {
    let mut offsets = vec![0_usize; rows.len()];
    // By offset.
    let mut placed: Vec<usize> = Vec::with_capacity(rows.len());
    let mut total = 0;
    for &row in order {
        let (mut end, mut best) = (0_usize, None::<(usize, usize)>);
        for &other in placed.iter().filter(|&&other| rows[other].meets(&rows[row])) {
            let gap = offsets[other].saturating_sub(end);
            if gap >= rows[row].bytes && best.is_none_or(|(smallest, _)| gap < smallest) {
                best = Some((gap, end));
            }
            end = end.max(offsets[other] + rows[other].bytes);
        }
        offsets[row] = best.map_or(end, |(_, offset)| offset);
        total = total.max(offsets[row] + rows[row].bytes);
        let at = placed.partition_point(|&other| offsets[other] <= offsets[row]);
        placed.insert(at, row);
    }
    (offsets, total)
}

/// Places rows in `order`, and again with what stuck out placed first, as long as there is something to win.
fn improve(rows: &[Row], mut order: Vec<usize>, least: usize) -> (Vec<usize>, usize) {
    let mut best = place(rows, &order);
    for _ in 0..ROUNDS {
        if best.1 <= least + least / 64 {
            break;
        }
        let (offsets, bytes) = place(rows, &order);
        let sticks_out = |&at: &usize| offsets[order[at]] + rows[order[at]].bytes == bytes;
        let Some(last) = (0..order.len()).find(sticks_out) else { break };
        if bytes < best.1 {
            best = (offsets, bytes);
        }
        let row = order.remove(last);
        order.insert(0, row);
    }
    best
}

/// Attempts to place rows better.
const ROUNDS: usize = 32;

/// Places for the allocations of a pass.
#[derive(Debug)]
pub(in super::super) struct Layout {
    offsets: Vec<usize>,
    events: Vec<Event>,
    /// Bytes from the first place to the end of the last.
    pub(in super::super) bytes: usize,
    /// The most bytes that are alive at a time: no layout takes less.
    pub(in super::super) largest_live: usize,
    /// Bytes among them that keep their content from pass to pass.
    pub(in super::super) constants: usize,
}

/// How far a pass over planned places has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    event: usize,
    item: usize,
    astray: bool,
    sealed: bool,
}

impl Progress {
    /// The place of the next allocation: its number and its offset.
    pub(super) fn allocate(
        &mut self,
        layout: &Layout,
        bytes: usize,
        constant: bool,
    ) -> Result<(usize, usize)> {
        let planned = layout.events.get(self.event) == Some(&Event::Allocated { bytes, constant });
        if self.astray || self.sealed || !planned {
            self.astray = true;
            return Err(astray());
        }
        let item = self.item;
        (self.event, self.item) = (self.event + 1, item + 1);
        Ok((item, layout.offsets[item]))
    }

    /// An item is no longer used.
    pub(super) fn free(&mut self, layout: &Layout, item: usize) {
        if self.sealed {
            return;
        }
        if layout.events.get(self.event) == Some(&Event::Freed { item }) {
            self.event += 1;
        } else {
            // What is alive now is not what was alive when places were given: the next allocation could lie over it.
            self.astray = true;
        }
    }

    /// The end of a pass: what is alive stays as it is.
    pub(super) fn seal(&mut self, layout: &Layout) -> Result<()> {
        if self.astray || self.event != layout.events.len() {
            return Err(astray());
        }
        self.sealed = true;
        Ok(())
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.sealed
    }
}

fn astray() -> Error {
    Error::argument(
        "engine",
        "the forward pass takes other memory than in its dry pass: what a method does must depend on token counts alone",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places of what is alive at the same time do not overlap, and begin where the driver's allocations do.
    fn check(ledger: &Ledger) -> Layout {
        let layout = ledger.lay_out();
        let rows: Vec<Row> = ledger.items.iter().map(|item| Row::of(item, ledger.events.len())).collect();
        for (a, row) in rows.iter().enumerate() {
            let at = layout.offsets[a];
            assert!(at.is_multiple_of(ALIGNMENT) && at + row.bytes <= layout.bytes);
            for b in (0..a).filter(|&b| rows[b].meets(row)) {
                let other = layout.offsets[b];
                assert!(at + row.bytes <= other || other + rows[b].bytes <= at, "{a} and {b}");
            }
        }
        assert!(layout.bytes >= layout.largest_live);
        layout
    }

    #[test]
    fn what_is_freed_gives_its_place_away() {
        let mut ledger = Ledger::default();
        let take = |ledger: &mut Ledger, bytes| ledger.allocate(bytes, false).unwrap().0;
        let a = take(&mut ledger, 1024);
        let b = take(&mut ledger, 2048);
        ledger.free(a);
        take(&mut ledger, 1000);
        ledger.free(b);
        take(&mut ledger, 2048);
        ledger.close();
        let layout = check(&ledger);
        assert_eq!((layout.bytes, layout.largest_live), (3072, 3072));
    }

    #[test]
    fn constants_share_with_nobody() {
        let mut ledger = Ledger::default();
        let early = ledger.allocate(256, false).unwrap().0;
        ledger.free(early);
        let late = ledger.allocate(256, true).unwrap().0;
        // A constant is never freed.
        ledger.free(late);
        ledger.close();
        let layout = check(&ledger);
        assert_eq!((layout.bytes, layout.constants), (512, 256));
    }

    #[test]
    fn random_passes_fit_and_waste_little() {
        let (mut state, mut worst) = (1_u64, 1.0_f64);
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..50 {
            let (mut ledger, mut alive) = (Ledger::default(), Vec::new());
            for _ in 0..60 {
                if alive.len() < 2 || random(2) == 0 {
                    alive.push(ledger.allocate(256 * random(40) as usize, random(20) == 0).unwrap().0);
                } else {
                    ledger.free(alive.swap_remove(random(alive.len() as u64) as usize));
                }
            }
            ledger.close();
            let layout = check(&ledger);
            worst = worst.max(layout.bytes as f64 / layout.largest_live as f64);
        }
        assert!(worst < 1.4, "{worst}");
    }

    #[test]
    fn a_pass_that_goes_astray_is_stopped() {
        let mut ledger = Ledger::default();
        let a = ledger.allocate(256, false).unwrap().0;
        ledger.allocate(512, false).unwrap();
        ledger.free(a);
        ledger.close();
        let layout = ledger.lay_out();
        let mut progress = Progress::default();
        let (first, _) = progress.allocate(&layout, 256, false).unwrap();
        progress.allocate(&layout, 512, false).unwrap();
        assert!(progress.seal(&layout).is_err(), "one is alive that should not be");
        progress.free(&layout, first);
        progress.seal(&layout).unwrap();
        assert!(progress.is_sealed() && progress.allocate(&layout, 1, false).is_err());

        let mut other = Progress::default();
        let message = other.allocate(&layout, 257, false).unwrap_err().to_string();
        assert!(message.contains("other memory than in its dry pass"), "{message}");
        let mut early = Progress::default();
        let (first, _) = early.allocate(&layout, 256, false).unwrap();
        early.free(&layout, first);
        assert!(early.allocate(&layout, 512, false).is_err(), "freed too early, so order is another");
    }
}
