//! What stands between the pixels and the first block of a transformer that does not cut images into patches at once.

/// A square window that moves over a grid in rows and columns. Beyond the border it sees zeros.
///
/// ```
/// use foveate::backend::Window;
/// // T2T-ViT's first soft split, and its second and third.
/// let [first, next] = [Window { kernel: 7, stride: 4, padding: 2 }, Window { kernel: 3, stride: 2, padding: 1 }];
/// assert_eq!(first.over([224, 224]), Some([56, 56]));
/// assert_eq!(next.over([56, 56]), Some([28, 28]));
/// assert_eq!(first.over([2, 224]), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// Its side.
    pub kernel: usize,
    /// From one place of it to the next.
    pub stride: usize,
    /// How far it reaches over the border, on every side; less than its own side.
    pub padding: usize,
}

impl Window {
    /// The grid of its places over another grid: `floor((n + 2·padding - kernel)/stride) + 1` along each side. `None` where it
    /// finds no place, or its numbers make no sense.
    pub fn over(self, grid: [usize; 2]) -> Option<[usize; 2]> {
        let Self { kernel, stride, padding } = self;
        let places = |side: usize| {
            let room = side.checked_add(padding.checked_mul(2)?)?.checked_sub(kernel)?;
            Some(room.checked_div(stride)? + 1)
        };
        if kernel == 0 || padding >= kernel || grid.contains(&0) {
            return None;
        }
        Some([places(grid[0])?, places(grid[1])?])
    }

    /// Positions it sees at once.
    pub fn taps(self) -> usize {
        self.kernel.saturating_mul(self.kernel)
    }
}
