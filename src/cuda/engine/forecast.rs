//! What a forward pass will take, told without running it.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::super::{
    Cuda, CudaPlan, CudaTensor, LaunchRecord,
    backend::{Layout, Memory, Space},
    device::driver,
    patch::PixelType,
    record,
};
use crate::{
    Error, Result,
    backend::Merged,
    model::{Observer, Output, Vit, VitConfig},
    reduction::{Evidence, Method},
};

/// What a forward pass of a model with a method and a batch takes: memory and launches, from a dry pass that allocates and
/// launches nothing.
///
/// ```no_run
/// use foveate::{Reduction, cuda::{Cuda, DType, Forecast, patch::PixelType}, weights::{Overrides, load_vit_file}};
/// # fn main() -> foveate::Result<()> {
/// let model = load_vit_file("deit_small.safetensors", &Overrides::default())?.build(Cuda::new(0, DType::F16)?)?;
/// let method: Reduction = "tome:r=13".parse()?;
/// let forecast = Forecast::new(&model, &method, 64, PixelType::U8)?;
/// println!("{} bytes, of which {} at a time", forecast.arena_bytes(), forecast.largest_live_bytes());
/// let block = forecast.launches().iter().filter(|launch| launch.layer == Some(0));
/// println!("{} launches in the first block", block.count());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Forecast {
    layout: Arc<Layout>,
    launches: Vec<LaunchRecord>,
    token_counts: Vec<usize>,
}

impl Forecast {
    /// The forecast of `model` with `method` for `batch` images of `pixels`.
    ///
    /// # Errors
    /// When the method does not suit the model, reads from the device while it decides, or the batch is 0 or too large.
    pub fn new(model: &Vit<Cuda>, method: &impl Method, batch: usize, pixels: PixelType) -> Result<Self> {
        let stream = model.backend().device().context().new_stream();
        Self::over(&stream.map_err(|error| driver("making a stream", error))?, model, method, batch, pixels)
    }

    /// A dry pass over a stream, on which nothing happens.
    fn over(
        stream: &Arc<CudaStream>,
        model: &Vit<Cuda>,
        method: &impl Method,
        batch: usize,
        pixels: PixelType,
    ) -> Result<Self> {
        let work = || {
            let backend = model.backend().within(Space::ledger(stream.clone()))?;
            let vit = model.on(backend);
            let (_, output) = forward(&vit, method, batch, pixels, |_| Ok(()))?;
            let layout = vit.backend().space().end()?;
            let layout = layout.ok_or_else(|| Error::argument("engine", "the dry pass left no ledger"))?;
            Ok((Arc::new(layout), output.token_counts))
        };
        let (told, launches) = record::record(stream, true, work);
        let (layout, token_counts) = told?;
        Ok(Self { layout, launches, token_counts })
    }

    /// The largest batch whose arena takes at most `bytes`; 0 when even one image takes more.
    ///
    /// # Errors
    /// As [`Forecast::new`].
    pub fn largest_batch(
        model: &Vit<Cuda>,
        method: &impl Method,
        pixels: PixelType,
        bytes: usize,
    ) -> Result<usize> {
        let stream = model.backend().device().context().new_stream();
        let stream = stream.map_err(|error| driver("making a stream", error))?;
        let takes = |batch| Self::over(&stream, model, method, batch, pixels).map(|it| it.arena_bytes());
        if takes(1)? > bytes {
            return Ok(0);
        }
        // What one image can have, more can have; unless they are too many to address.
        let fits = |batch| takes(batch).is_ok_and(|taken| taken <= bytes);
        let (mut fitting, mut too_large) = (1, 2);
        while fits(too_large) && too_large < LARGEST_BATCH {
            (fitting, too_large) = (too_large, 2 * too_large);
        }
        while too_large - fitting > 1 {
            let between = fitting.midpoint(too_large);
            if fits(between) {
                fitting = between;
            } else {
                too_large = between;
            }
        }
        Ok(fitting)
    }

    /// Bytes of the one allocation that holds everything but the weights: images, activations, plans, results, workspace.
    pub fn arena_bytes(&self) -> usize {
        self.layout.bytes
    }

    /// The most bytes of it that are in use at a time: what no arrangement can do without.
    pub fn largest_live_bytes(&self) -> usize {
        self.layout.largest_live
    }

    /// Bytes of it that are in use from the beginning to the end: images, cuBLASLt's workspace, counters.
    pub fn constant_bytes(&self) -> usize {
        self.layout.constants
    }

    /// Everything that a pass enqueues behind the images' upload, in order.
    pub fn launches(&self) -> &[LaunchRecord] {
        &self.launches
    }

    /// Tokens entering block 0 and leaving each block.
    pub fn token_counts(&self) -> &[usize] {
        &self.token_counts
    }

    pub(super) fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }
}

/// Batches that are tried; no device holds as much.
const LARGEST_BATCH: usize = 1 << 20;

/// A pass over the backend's space: takes memory for the images, which `prepare` may write to, and runs the model on what
/// is in it.
pub(super) fn forward(
    vit: &Vit<Cuda>,
    method: &impl Method,
    batch: usize,
    pixels: PixelType,
    prepare: impl FnOnce(&Memory) -> Result<()>,
) -> Result<(Memory, Output<Cuda>)> {
    let (backend, config) = (vit.backend(), vit.config());
    let shape = images(config, batch)?;
    let input = Memory::constant(backend.space(), shape.iter().product::<usize>() * pixels.bytes())?;
    prepare(&input)?;
    let transform = &config.transform;
    let (mean, std) = (&transform.mean, &transform.std);
    let rows = match config.first_window() {
        None => backend.patches_of(&input, pixels, shape, config.patch, mean, std)?,
        Some(window) => backend.windows_of(&input, pixels, shape, window, mean, std)?,
    };
    let output = vit.forward_patches(rows, method, &mut Layers { depth: config.depth })?;
    Ok((input, output))
}

/// The shape of a batch.
pub(super) fn images(config: &VitConfig, batch: usize) -> Result<[usize; 4]> {
    let shape = [batch, config.channels, config.image[0], config.image[1]];
    let values = shape.iter().try_fold(1_usize, |values, &extent| values.checked_mul(extent));
    if batch == 0 || values.is_none_or(|values| i64::try_from(values).is_err()) {
        return Err(Error::argument(
            "engine",
            format!("{batch} images are no batch; take one image at least"),
        ));
    }
    Ok(shape)
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
