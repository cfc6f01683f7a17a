//! What a forward pass will take, told without running it.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::{
    super::{
        Cuda, LaunchRecord,
        backend::{Layout, Memory, room},
        device::driver,
        patch::PixelType,
    },
    model::{EngineModel, Forward, filtered, reduced},
};
use crate::{
    Result,
    model::{AffNet, Vit},
    reduction::Method,
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
        let (forecast, output) = Self::of(model, &reduced(method), batch, pixels)?;
        Ok(Self { token_counts: output.token_counts, ..forecast })
    }

    /// The forecast of an AFFNet. Its launches belong to its parts: `conv_1`, `layer_1` to `layer_5`, the classifier.
    ///
    /// # Errors
    /// When the batch is 0 or too large.
    pub fn of_affnet(model: &AffNet<Cuda>, batch: usize, pixels: PixelType) -> Result<Self> {
        Self::of(model, &filtered, batch, pixels).map(|(forecast, _)| forecast)
    }

    /// A dry pass.
    fn of<M: EngineModel>(
        model: &M,
        run: &impl Forward<M>,
        batch: usize,
        pixels: PixelType,
    ) -> Result<(Self, M::Output)> {
        let stream = model.backend().device().context().new_stream();
        Self::over(&stream.map_err(|error| driver("making a stream", error))?, model, run, batch, pixels)
    }

    /// A dry pass over a stream, on which nothing happens.
    fn over<M: EngineModel>(
        stream: &Arc<CudaStream>,
        model: &M,
        run: &impl Forward<M>,
        batch: usize,
        pixels: PixelType,
    ) -> Result<(Self, M::Output)> {
        let pass =
            |backend| forward(&model.on(backend), run, batch, pixels, |_| Ok(())).map(|(_, output)| output);
        let (output, layout, launches) = room::dry(model.backend(), stream, pass)?;
        let layout = Arc::new(layout);
        Ok((Self { layout, launches, token_counts: Vec::new() }, output))
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
        Self::largest(model, &reduced(method), pixels, bytes)
    }

    /// As [`Forecast::largest_batch`], of an AFFNet.
    ///
    /// # Errors
    /// As [`Forecast::of_affnet`].
    pub fn largest_affnet_batch(model: &AffNet<Cuda>, pixels: PixelType, bytes: usize) -> Result<usize> {
        Self::largest(model, &filtered, pixels, bytes)
    }

    pub(super) fn largest<M: EngineModel>(
        model: &M,
        run: &impl Forward<M>,
        pixels: PixelType,
        bytes: usize,
    ) -> Result<usize> {
        let stream = model.backend().device().context().new_stream();
        let stream = stream.map_err(|error| driver("making a stream", error))?;
        let takes = |batch| Self::over(&stream, model, run, batch, pixels).map(|(it, _)| it.arena_bytes());
        room::largest(takes, bytes, LARGEST_BATCH)
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

    /// Tokens entering block 0 and leaving each block; none of an AFFNet, which has no tokens.
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
pub(super) fn forward<M: EngineModel>(
    model: &M,
    run: &impl Forward<M>,
    batch: usize,
    pixels: PixelType,
    prepare: impl FnOnce(&Memory) -> Result<()>,
) -> Result<(Memory, M::Output)> {
    let shape = model.images(batch)?;
    let bytes = shape.iter().product::<usize>() * pixels.bytes();
    let input = Memory::constant(model.backend().space(), bytes)?;
    prepare(&input)?;
    let rows = model.rows(&input, pixels, shape)?;
    let output = run(model, rows)?;
    Ok((input, output))
}
