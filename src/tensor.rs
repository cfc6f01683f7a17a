//! Host tensors: what goes into a backend and what comes out of it.

use crate::{Error, Result};

/// A dense row-major `f32` tensor in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl Tensor {
    /// A tensor of `shape` over `data` (row-major, last axis contiguous).
    ///
    /// # Errors
    /// When the product of `shape` overflows or is not the length of `data`.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Result<Self> {
        match elements(shape) {
            Some(n) if n == data.len() => Ok(Self { shape: shape.to_vec(), data }),
            Some(n) => Err(Error::argument(
                "tensor",
                format!("shape {shape:?} holds {n} values, {} given", data.len()),
            )),
            None => Err(Error::argument("tensor", format!("shape {shape:?} is too large to address"))),
        }
    }

    /// A tensor of zeros.
    ///
    /// # Panics
    /// When the product of `shape` overflows; shapes reaching this point have been checked.
    pub fn zeros(shape: &[usize]) -> Self {
        let n = elements(shape).expect("a checked shape");
        Self { shape: shape.to_vec(), data: vec![0.0; n] }
    }

    /// The extents, outermost axis first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The extent of axis `axis`, 1 past the last one.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape.get(axis).copied().unwrap_or(1)
    }

    /// The extent of the last axis: the length of a row.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The number of rows: the product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The values, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The values, row-major, to write to.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, row-major, without the shape.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// The same values under another shape.
    ///
    /// # Errors
    /// When the new shape holds another number of values.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        Self::new(shape, self.data)
    }

    /// Item `index` of the outermost axis, as a slice.
    ///
    /// # Panics
    /// When `index` is out of range, as slice indexing does.
    pub fn item(&self, index: usize) -> &[f32] {
        let n = self.shape[1..].iter().product::<usize>();
        &self.data[index * n..(index + 1) * n]
    }
}

/// A dense row-major `f32` tensor in host memory that belongs to somebody else, such as an inference engine's storage.
///
/// ```
/// use foveate::{HostTensor, TensorView, backend::Pooling, reference::merge::merge};
/// # use foveate::TokenPlan;
/// // Two tokens of three values become their mean, without a copy of the tokens.
/// let tokens = [1.0, 2.0, 3.0, 3.0, 4.0, 5.0];
/// let plan = TokenPlan::from_groups(2, &[vec![vec![(0, 0.5), (1, 0.5)]]])?;
/// let merged = merge(&TensorView::new(&[1, 2, 3], &tokens)?, None, &plan, Pooling::Weighted, None)?;
/// assert_eq!(merged.tokens.data(), [2.0, 3.0, 4.0]);
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorView<'a> {
    shape: &'a [usize],
    data: &'a [f32],
}

impl<'a> TensorView<'a> {
    /// A view of `shape` over `data` (row-major, last axis contiguous).
    ///
    /// # Errors
    /// When the product of `shape` overflows or is not the length of `data`.
    pub fn new(shape: &'a [usize], data: &'a [f32]) -> Result<Self> {
        if elements(shape) == Some(data.len()) {
            return Ok(Self { shape, data });
        }
        Err(Error::argument("tensor view", format!("shape {shape:?} does not hold {} values", data.len())))
    }
}

/// What the operations in [`crate::reference`] read: a [`Tensor`], or a [`TensorView`] of memory that is not theirs.
pub trait HostTensor: Sync {
    /// The extents, outermost axis first.
    fn shape(&self) -> &[usize];

    /// The values, row-major.
    fn data(&self) -> &[f32];

    /// The extent of the last axis: the length of a row.
    fn width(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }

    /// Item `index` of the outermost axis, as a slice.
    ///
    /// # Panics
    /// When `index` is out of range, as slice indexing does.
    fn item(&self, index: usize) -> &[f32] {
        let n = self.shape()[1..].iter().product::<usize>();
        &self.data()[index * n..(index + 1) * n]
    }
}

impl HostTensor for Tensor {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> &[f32] {
        &self.data
    }
}

impl HostTensor for TensorView<'_> {
    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> &[f32] {
        self.data
    }
}

/// The product of `shape`, `None` when it overflows.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= isize::MAX as usize / 8)
}

/// The pixels of a batch, row-major in (image, channel, row, column).
#[derive(Clone, Debug)]
pub enum Pixels {
    /// Values 0 to 255, to be scaled to 0..1 and normalised with the model's mean and deviation.
    U8(Vec<u8>),
    /// Values that are already normalised.
    F32(Vec<f32>),
}

/// A batch of images of one size, shape (batch, channels, height, width).
#[derive(Clone, Debug)]
pub struct Images {
    shape: [usize; 4],
    pixels: Pixels,
}

impl Images {
    /// A batch of shape (batch, channels, height, width).
    ///
    /// # Errors
    /// When an extent is zero or the number of pixel values does not fit the shape.
    pub fn new(shape: [usize; 4], pixels: Pixels) -> Result<Self> {
        let given = match &pixels {
            Pixels::U8(p) => p.len(),
            Pixels::F32(p) => p.len(),
        };
        match elements(&shape) {
            Some(n) if n == given && n > 0 => Ok(Self { shape, pixels }),
            Some(0) => Err(Error::argument("images", format!("shape {shape:?} is empty"))),
            _ => Err(Error::argument("images", format!("shape {shape:?} does not fit {given} pixel values"))),
        }
    }

    /// (batch, channels, height, width).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The number of images.
    pub fn batch(&self) -> usize {
        self.shape[0]
    }

    /// The pixel values.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }

    /// So many images of zeros, of the same size and kind.
    pub(crate) fn blank(&self, batch: usize) -> Result<Self> {
        let shape = [batch, self.shape[1], self.shape[2], self.shape[3]];
        let values = elements(&shape).unwrap_or(0);
        let pixels = match self.pixels {
            Pixels::U8(_) => Pixels::U8(vec![0; values]),
            Pixels::F32(_) => Pixels::F32(vec![0.0; values]),
        };
        Self::new(shape, pixels)
    }
}
