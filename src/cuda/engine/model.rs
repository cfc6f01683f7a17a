//! What an engine asks of a model.

use super::super::{Cuda, CudaPlan, CudaTensor, backend::Memory, patch::PixelType, record};
use crate::{
    Error, Result,
    backend::Merged,
    macs::GridMacs,
    model::{AffNet, Observer, Output, Vit, affnet::AffOutput},
    reduction::{Evidence, Method},
};

/// A model that engines run: [`Vit`], with a method, or [`AffNet`].
pub trait EngineModel: sealed::Model {
    /// What a pass of it gives.
    type Output;
}

impl EngineModel for Vit<Cuda> {
    type Output = Output<Cuda>;
}

impl EngineModel for AffNet<Cuda> {
    type Output = AffOutput<Cuda>;
}

pub(super) mod sealed {
    use super::{Cuda, CudaTensor, Error, Memory, PixelType, Result};

    /// What both kinds of models have.
    #[expect(private_interfaces, reason = "sealed: nobody outside can call it")]
    pub trait Model: Sized {
        /// The backend it was made on.
        fn backend(&self) -> &Cuda;
        /// The same weights on another backend that can use them.
        fn on(&self, backend: Cuda) -> Self;
        /// Channels, height and width of an image.
        fn image(&self) -> [usize; 3];
        /// Pixels in device memory, as its first product reads them.
        fn rows(&self, input: &Memory, pixels: PixelType, shape: [usize; 4]) -> Result<CudaTensor>;

        /// The shape of a batch.
        fn images(&self, batch: usize) -> Result<[usize; 4]> {
            let [channels, height, width] = self.image();
            let shape = [batch, channels, height, width];
            let values = shape.iter().try_fold(1_usize, |values, &extent| values.checked_mul(extent));
            if batch == 0 || values.is_none_or(|values| i64::try_from(values).is_err()) {
                return Err(Error::argument(
                    "engine",
                    format!("{batch} images are no batch; take one image at least"),
                ));
            }
            Ok(shape)
        }
    }
}

use sealed::Model;

#[expect(private_interfaces, reason = "see the trait")]
impl Model for Vit<Cuda> {
    fn backend(&self) -> &Cuda {
        self.backend()
    }

    fn on(&self, backend: Cuda) -> Self {
        self.on(backend)
    }

    fn image(&self) -> [usize; 3] {
        let (channels, [height, width]) = (self.config().channels, self.config().image);
        [channels, height, width]
    }

    fn rows(&self, input: &Memory, pixels: PixelType, shape: [usize; 4]) -> Result<CudaTensor> {
        let (backend, config) = (self.backend(), self.config());
        let (mean, std) = (&config.transform.mean, &config.transform.std);
        match config.first_window() {
            None => backend.patches_of(input, pixels, shape, config.patch, mean, std),
            Some(window) => backend.windows_of(input, pixels, shape, window, mean, std),
        }
    }
}

#[expect(private_interfaces, reason = "see the trait")]
impl Model for AffNet<Cuda> {
    fn backend(&self) -> &Cuda {
        self.backend()
    }

    fn on(&self, backend: Cuda) -> Self {
        self.on(backend)
    }

    fn image(&self) -> [usize; 3] {
        let (channels, [height, width]) = (self.config().channels, self.config().image);
        [channels, height, width]
    }

    fn rows(&self, input: &Memory, pixels: PixelType, shape: [usize; 4]) -> Result<CudaTensor> {
        let transform = &self.config().transform;
        self.backend().patches_of(input, pixels, shape, [1, 1], &transform.mean, &transform.std)
    }
}

/// The rest of a pass, from [`Model::rows`] on.
pub(super) trait Forward<M: EngineModel>: Fn(&M, CudaTensor) -> Result<M::Output> {}

impl<M: EngineModel, F: Fn(&M, CudaTensor) -> Result<M::Output>> Forward<M> for F {}

/// A transformer's pass with a method. Launches belong to its blocks.
pub(super) fn reduced(method: &impl Method) -> impl Forward<Vit<Cuda>> {
    move |vit: &Vit<Cuda>, rows| vit.forward_patches(rows, method, &mut Layers { depth: vit.config().depth })
}

/// An AFFNet's pass. Launches belong to its parts, as [`GridMacs::of`] numbers them.
pub(super) fn filtered(model: &AffNet<Cuda>, rows: CudaTensor) -> Result<AffOutput<Cuda>> {
    let parts = GridMacs::of(model.config());
    let mut behind = 0;
    record::layer(Some(0));
    model.forward_pixels(rows, &mut |place, _| {
        if parts.get(behind).is_some_and(|(part, _)| *part == place) {
            behind += 1;
            record::layer(Some(behind));
        }
    })
}

/// Says which block launches belong to.
struct Layers {
    depth: usize,
}

impl Layers {
    fn begin(&self, layer: usize) {
        record::layer(Some(layer).filter(|&layer| layer < self.depth));
    }
}

impl Observer<Cuda> for Layers {
    fn embedded(&mut self, _: &CudaTensor) {
        self.begin(0);
    }

    fn reduced(&mut self, _: &Evidence<'_, Cuda>, _: &CudaPlan, _: &Merged<CudaTensor>) {}

    fn block(&mut self, layer: usize, _: &CudaTensor) {
        self.begin(layer + 1);
    }
}
