//! Tensors of the processor: a shape and a buffer, or a weight.

use std::{
    fmt,
    ops::Deref,
    sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard},
};

use super::{
    pack::{Form, Packed},
    pool::{Buffer, Pool},
};
use crate::{Error, HostTensor, Result};

/// The extents of a tensor, without memory of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    extents: [usize; Self::AXES],
    axes: usize,
}

impl Shape {
    const AXES: usize = 8;

    pub(super) fn new(extents: &[usize]) -> Result<Self> {
        if extents.len() > Self::AXES {
            let what = format!("shape {extents:?} has more than {} axes", Self::AXES);
            return Err(Error::argument("tensor", what));
        }
        let mut all = [0; Self::AXES];
        all[..extents.len()].copy_from_slice(extents);
        Ok(Self { extents: all, axes: extents.len() })
    }

    /// The same with another last extent.
    pub(super) fn with_width(mut self, width: usize) -> Self {
        if let Some(last) = self.extents[..self.axes].last_mut() {
            *last = width;
        }
        self
    }

    /// The number of values, `None` when it cannot be addressed.
    pub(super) fn elements(&self) -> Option<usize> {
        crate::tensor::elements(self)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        let mut all = [0; Self::AXES];
        all[..N].copy_from_slice(&extents);
        Self { extents: all, axes: N }
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.extents[..self.axes]
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&**self).finish()
    }
}

/// A dense row-major `f32` tensor of [`Cpu`](super::Cpu). Clones share their values; when the last one is dropped, the memory
/// goes back to the backend.
#[derive(Clone)]
pub struct Tensor {
    pub(super) shape: Shape,
    data: Data,
}

#[derive(Clone)]
enum Data {
    Pooled(Buffer),
    Weight(std::sync::Arc<Weight>),
}

/// A matrix that came from the host. The first product it takes part in replaces it by its packed form.
pub(super) struct Weight {
    /// The values row by row until they are packed.
    plain: RwLock<Option<Vec<f32>>>,
    packed: OnceLock<Packed>,
}

impl Weight {
    /// The packed form, which `pack` makes of the values row by row. `None` where the first product made another form: a matrix
    /// that is used in both ways is packed again for the rarer one each time.
    pub(super) fn packed(&self, form: Form, pack: impl Fn(&[f32]) -> Packed) -> Option<&Packed> {
        let packed = self.packed.get_or_init(|| {
            let plain = self.plain.read().unwrap_or_else(PoisonError::into_inner);
            pack(plain.as_deref().unwrap_or_default())
        });
        // Nobody needs the values twice. A reader at this moment keeps them a little longer.
        if let Ok(mut plain) = self.plain.try_write() {
            *plain = None;
        }
        (packed.form() == form).then_some(packed)
    }
}

impl Tensor {
    /// A tensor over a buffer of the right length.
    pub(super) fn pooled(shape: impl Into<Shape>, data: Buffer) -> Self {
        let shape = shape.into();
        debug_assert_eq!(shape.elements(), Some(data.len()));
        Self { shape, data: Data::Pooled(data) }
    }

    /// A host tensor: matrices may turn out to be weights, all else is copied.
    pub(super) fn from_host(tensor: crate::Tensor, pool: &Pool) -> Result<Self> {
        let shape = Shape::new(tensor.shape())?;
        let data = if shape.len() == 2 && !tensor.data().is_empty() {
            let plain = RwLock::new(Some(tensor.into_data()));
            Data::Weight(std::sync::Arc::new(Weight { plain, packed: OnceLock::new() }))
        } else {
            Data::Pooled(pool.copy(tensor.data()))
        };
        Ok(Self { shape, data })
    }

    /// The extents, outermost axis first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// A copy of the values, row-major.
    pub fn to_vec(&self) -> Vec<f32> {
        self.view().to_vec()
    }

    /// The extent of the last axis.
    pub(super) fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The number of rows: the product of all axes but the last.
    pub(super) fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The packed form: the tensor's own, or one in `passing` that is made for this time only.
    pub(super) fn packed<'a>(
        &'a self,
        form: Form,
        passing: &'a mut Option<Packed>,
        pack: impl Fn(&[f32]) -> Packed,
    ) -> &'a Packed {
        let own = match &self.data {
            Data::Pooled(_) => None,
            Data::Weight(weight) => weight.packed(form, &pack),
        };
        own.unwrap_or_else(|| passing.insert(pack(&self.view())))
    }

    /// The values to read.
    pub(super) fn view(&self) -> View<'_> {
        let values = match &self.data {
            Data::Pooled(buffer) => Values::Slice(buffer),
            Data::Weight(weight) => {
                let plain = weight.plain.read().unwrap_or_else(PoisonError::into_inner);
                match (&*plain, weight.packed.get()) {
                    (None, Some(packed)) => Values::Unpacked(packed.unpacked()),
                    _ => Values::Guarded(plain),
                }
            }
        };
        View { shape: self.shape, values }
    }

    /// The values to write to: this tensor's own, whoever shared them before.
    pub(super) fn into_buffer(self, pool: &Pool) -> Buffer {
        match self.data {
            Data::Pooled(buffer) => buffer,
            Data::Weight(_) => pool.copy(&self.view()),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// A tensor's values while someone reads them.
pub(super) struct View<'a> {
    shape: Shape,
    values: Values<'a>,
}

enum Values<'a> {
    Slice(&'a [f32]),
    Guarded(RwLockReadGuard<'a, Option<Vec<f32>>>),
    Unpacked(Vec<f32>),
}

impl View<'_> {
    pub(super) fn to_host(&self) -> Result<crate::Tensor> {
        crate::Tensor::new(&self.shape, self.to_vec())
    }
}

impl Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.values {
            Values::Slice(values) => values,
            Values::Guarded(guard) => guard.as_deref().unwrap_or_default(),
            Values::Unpacked(values) => values,
        }
    }
}

impl HostTensor for View<'_> {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> &[f32] {
        self
    }
}
