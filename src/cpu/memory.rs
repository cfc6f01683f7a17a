//! Memory in huge pages, where the system gives any.
//!
//! A pass over a model reads every weight once. In pages of 4 KiB the processor looks up where each lies more often than it can keep
//! in mind: 3 to 6 % of the time of a pass over one image, the more the fewer tokens there are. So packed weights lie one behind the
//! other in chunks of huge pages, and so do large buffers, each in a chunk of its own.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use memmap2::MmapMut;

use super::pool::Line;

/// Bytes of a huge page on the processors that have them.
const HUGE: usize = 2 << 20;
/// Bytes of a chunk that several weights share.
const CHUNK: usize = 8 * HUGE;

/// The chunk that is being filled, and the lines of it that are taken.
static FILLING: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

/// Lines of a chunk, this value's alone.
pub(super) struct Lines {
    start: *mut Line,
    len: usize,
    /// Where they are.
    _chunk: Arc<Chunk>,
}

// SAFETY: what it points to is its own, like a box's.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

/// Mapped memory from the first huge page's border on. It is given back when the last of its lines is dropped.
struct Chunk {
    start: *mut Line,
    len: usize,
    _memory: Memory,
}

// SAFETY: nobody reads or writes through a chunk; its lines are given out once each.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

#[expect(dead_code, reason = "what is held is freed when it is dropped")]
enum Memory {
    Mapped(MmapMut),
    /// Where the system maps none.
    Heap(Vec<Line>),
}

impl Chunk {
    /// At least `lines` zeros.
    fn new(lines: usize) -> Self {
        let bytes =
            lines.checked_mul(size_of::<Line>()).and_then(|bytes| bytes.checked_next_multiple_of(HUGE));
        let mapped = bytes.and_then(|bytes| {
            let map = MmapMut::map_anon(bytes.checked_add(HUGE)?).ok()?;
            Some((bytes, map))
        });
        let Some((len, mut map)) = mapped else {
            let mut heap = super::pool::zeros(lines);
            return Self { start: heap.as_mut_ptr(), len: lines, _memory: Memory::Heap(heap) };
        };
        // A hint: small pages do as well, only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let before = (map.as_ptr() as usize).wrapping_neg() % HUGE;
        let start = map[before..].as_mut_ptr().cast();
        Self { start, len: len / size_of::<Line>(), _memory: Memory::Mapped(map) }
    }
}

impl Lines {
    /// Zeros beside others that stay as long as they, such as a model's weights.
    pub(super) fn beside_others(len: usize) -> Self {
        let mut filling = FILLING.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunk, taken) = match filling.0.upgrade() {
            Some(chunk) if len <= chunk.len - filling.1 => (chunk, filling.1),
            _ => (Arc::new(Chunk::new(len.max(CHUNK / size_of::<Line>()))), 0),
        };
        *filling = (Arc::downgrade(&chunk), taken + len);
        drop(filling);
        // SAFETY: lines up to `taken + len` are inside the chunk.
        Self { start: unsafe { chunk.start.add(taken) }, len, _chunk: chunk }
    }

    /// Zeros that go back to the system when they are dropped.
    pub(super) fn alone(len: usize) -> Self {
        let chunk = Arc::new(Chunk::new(len));
        Self { start: chunk.start, len, _chunk: chunk }
    }

    /// Whether so many lines are worth a chunk of their own.
    pub(super) fn are_large(len: usize) -> bool {
        len >= 2 * HUGE / size_of::<Line>()
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: inside the chunk, which lives as long, and given out once.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as for reading; borrowed mutably, so nobody else looks.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lie_apart_and_are_zero() {
        let sizes = [1, 3, 40_000, 1, 0, 300_000, 2, 200_000, 200_000];
        let mut all: Vec<_> = sizes.into_iter().map(Lines::beside_others).collect();
        all.extend([70_000, 0].map(Lines::alone));
        for (i, lines) in all.iter_mut().enumerate() {
            let values: &mut [f32] = bytemuck::cast_slice_mut(lines);
            assert!(values.iter().all(|&x| x == 0.0), "{i}");
            assert_eq!(values.as_ptr() as usize % 64, 0);
            values.fill(i as f32 + 1.0);
        }
        for (i, (lines, len)) in all.iter().zip(sizes.into_iter().chain([70_000, 0])).enumerate() {
            let values: &[f32] = bytemuck::cast_slice(lines);
            assert_eq!(values.len(), len * 16);
            assert!(values.iter().all(|&x| x == i as f32 + 1.0), "{i}");
        }
    }

    #[test]
    fn lines_outlive_their_neighbours_on_other_threads() {
        let lines: Vec<_> = (0..8).map(|_| Lines::beside_others(100_000)).collect();
        let sums = lines.into_iter().enumerate().map(|(i, mut lines)| {
            std::thread::spawn(move || {
                bytemuck::cast_slice_mut::<_, f32>(&mut lines).fill(i as f32);
                bytemuck::cast_slice::<_, f32>(&lines).iter().map(|&x| f64::from(x)).sum::<f64>()
            })
        });
        let sums: Vec<f64> =
            sums.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(sums, (0..8).map(|i| f64::from(i) * 1_600_000.0).collect::<Vec<_>>());
    }
}
