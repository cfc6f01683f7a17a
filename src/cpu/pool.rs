//! Memory that comes back: buffers of the tensors of a forward pass, kept for the next one.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::{Pod, Zeroable};

use super::memory::Lines;

/// A cache line: buffers start at one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([f32; LINE]);

/// Values in a cache line.
pub(super) const LINE: usize = 16;

/// Zeros, aligned to cache lines, for as long as a weight lasts.
pub(super) fn lines(values: usize) -> Lines {
    Lines::beside_others(values.div_ceil(LINE))
}

/// Zeros in the heap.
pub(super) fn zeros(lines: usize) -> Vec<Line> {
    vec![Line([0.0; LINE]); lines]
}

/// The memory of buffers: large ones in huge pages.
enum Block {
    Small(Vec<Line>),
    Large(Lines),
}

impl Block {
    fn new(lines: usize) -> Self {
        if Lines::are_large(lines) { Self::Large(Lines::alone(lines)) } else { Self::Small(zeros(lines)) }
    }
}

impl Deref for Block {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        match self {
            Self::Small(lines) => lines,
            Self::Large(lines) => lines,
        }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [Line] {
        match self {
            Self::Small(lines) => lines,
            Self::Large(lines) => lines,
        }
    }
}

/// Buffers that nobody uses at the moment, by size class; shared by all tensors that came from it.
#[derive(Clone, Default)]
pub(super) struct Pool {
    free: Arc<Mutex<Classes>>,
    plans: Arc<Mutex<Vec<PlanParts>>>,
}

/// The arrays of a plan.
#[derive(Default)]
pub(super) struct PlanParts {
    pub(super) offsets: Vec<i32>,
    pub(super) members: Vec<i32>,
    pub(super) weights: Vec<f32>,
}

/// Free blocks of each size class.
type Classes = Vec<Vec<Arc<Block>>>;

/// The number of a size class and the lines its blocks have. Blocks are handed out within their class only, the one that came back last
/// first, so a pass that is repeated finds what it gave back.
///
/// Classes are powers of 4 as long as caches matter: tensors that become smaller from layer to layer then share memory that is still in
/// them, and memory that nobody touches is not taken from the system. Large ones have four classes to each doubling.
fn class(lines: usize) -> (usize, usize) {
    const LARGE: usize = 1 << 18;
    let lines = lines.max(16);
    if lines <= LARGE {
        let octave = lines.next_power_of_two().ilog2().next_multiple_of(2);
        return ((octave as usize) * 4, 1 << octave);
    }
    let octave = lines.ilog2();
    let step = 1 << (octave - 2);
    let quarter = lines.div_ceil(step);
    ((octave as usize) * 4 + quarter - 4, quarter * step)
}

impl Pool {
    /// A buffer of `len` values; what is in them is left from whoever had it before.
    pub(super) fn take(&self, len: usize) -> Buffer {
        let (class, lines) = class(len.div_ceil(LINE));
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let block = free.get_mut(class).and_then(Vec::pop);
        drop(free);
        let block = block.unwrap_or_else(|| Arc::new(Block::new(lines)));
        Buffer { block: Some(block), len, pool: self.clone() }
    }

    /// A buffer with these values.
    pub(super) fn copy(&self, values: &[f32]) -> Buffer {
        let mut buffer = self.take(values.len());
        buffer.make_mut().copy_from_slice(values);
        buffer
    }

    fn give_back(&self, block: Arc<Block>) {
        let (class, _) = class(block.len());
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() <= class {
            free.resize_with(class + 1, Vec::new);
        }
        free[class].push(block);
    }

    /// Arrays of these lengths for a plan; what is in them is left from the plan before.
    pub(super) fn take_plan(&self, offsets: usize, members: usize) -> PlanParts {
        let fits = |parts: &PlanParts| {
            let [all, some] =
                [parts.offsets.capacity(), parts.members.capacity().min(parts.weights.capacity())];
            all >= offsets && some >= members
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, so that a pass that is repeated finds what it gave back.
        let candidates = plans.iter().enumerate().filter(|(_, parts)| fits(parts));
        let at = candidates.min_by_key(|(_, parts)| parts.members.capacity()).map(|(at, _)| at);
        let mut parts = at.map(|at| plans.swap_remove(at)).unwrap_or_default();
        drop(plans);
        parts.offsets.resize(offsets, 0);
        parts.members.resize(members, -1);
        parts.weights.resize(members, 0.0);
        parts
    }

    pub(super) fn give_back_plan(&self, parts: (Vec<i32>, Vec<i32>, Vec<f32>)) {
        let (offsets, members, weights) = parts;
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).push(PlanParts {
            offsets,
            members,
            weights,
        });
    }

    /// Bytes that lie ready.
    pub(super) fn idle_bytes(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.iter().flatten().map(|block| block.len() * size_of::<Line>()).sum()
    }

    /// Gives what lies ready back to the system.
    pub(super) fn clear(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().for_each(Vec::clear);
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Some values of a block, shared by clones.
pub(super) struct Buffer {
    /// Always there until the buffer is dropped.
    block: Option<Arc<Block>>,
    len: usize,
    pool: Pool,
}

impl Buffer {
    /// The values to write to; a copy of its own first if others share them.
    pub(super) fn make_mut(&mut self) -> &mut [f32] {
        let shared = self.block.as_mut().is_none_or(|block| Arc::get_mut(block).is_none());
        if shared {
            *self = self.pool.copy(self);
        }
        let block = self.block.as_mut().and_then(Arc::get_mut).map_or(&mut [][..], |block| &mut **block);
        &mut bytemuck::cast_slice_mut(block)[..self.len]
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let block = self.block.as_ref().map_or(&[][..], |block| &***block);
        &bytemuck::cast_slice(block)[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.make_mut()
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self { block: self.block.clone(), len: self.len, pool: self.pool.clone() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(mut block) = self.block.take()
            && Arc::get_mut(&mut block).is_some()
        {
            self.pool.give_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_they_are_asked_for() {
        let mut last = 0;
        for lines in
            (1..5000).chain((1 << 18) - 10..(1 << 18) + 10).chain(((1 << 18) + 10..1 << 23).step_by(997))
        {
            let (number, size) = class(lines);
            assert!(size >= lines && size <= 4 * lines.max(16), "{lines}: {size}");
            assert!(lines <= 1 << 18 || size * 4 <= lines * 5 + 4, "{lines}: {size}");
            assert_eq!(class(size), (number, size), "a block goes back to where it came from");
            assert!(number >= last, "{lines}");
            last = number;
        }
    }

    #[test]
    fn buffers_come_back_and_clones_are_not_written_to() {
        let pool = Pool::default();
        let mut a = pool.copy(&[1.0; 300]);
        let b = a.clone();
        a.make_mut()[0] = 2.0;
        assert_eq!((a[0], b[0], b.len()), (2.0, 1.0, 300));
        assert_eq!(pool.idle_bytes(), 0);
        drop((a, b));
        let idle = pool.idle_bytes();
        assert!(idle >= 2 * 1200);
        let again = pool.take(290);
        assert_eq!(again.as_ptr() as usize % 64, 0);
        assert!(pool.idle_bytes() < idle);
        drop(again);
        assert_eq!(pool.idle_bytes(), idle);
        pool.clear();
        assert_eq!(pool.idle_bytes(), 0);
    }
}
