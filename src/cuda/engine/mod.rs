//! Models of static shape: planned, placed and captured once, replayed for every batch.
//!
//! # What happens when
//! 1. A dry pass of the model writes down what it allocates, frees and launches ([`Forecast`]).
//! 2. Everything gets a place in one allocation, the arena: what is alive at the same time lies side by side.
//! 3. An eager pass within the arena chooses cuBLASLt's algorithms, loads kernels that the driver loads lazily, and uploads
//!    what the method uploads. It must allocate and free as the dry pass did, or the engine is not built.
//! 4. A third pass is captured as a CUDA graph.
//!
//! # Streams and lifetimes
//! Each engine has a stream of its own, so several run side by side. It reads the model's weights where they lie: nothing is
//! copied. The weights were made on the stream of the model's backend, behind which the engine's stream begins. The engine
//! holds them as long as it lives; when it is dropped, the backend's stream is put behind the engine's, so that memory which
//! is freed there afterwards is freed behind its last use. Neither needs the host to wait.

mod forecast;
mod model;
mod stream;
mod upload;

use std::{fmt, sync::Arc};

use cudarc::driver::{CudaGraph, CudaStream, result, sys};

pub use forecast::Forecast;
use forecast::forward;
pub use model::EngineModel;
use model::{Forward, filtered, reduced};
use upload::Upload;

use super::{
    Cuda, CudaTensor,
    backend::{Memory, Space, megabytes, room},
    device::driver,
    patch::PixelType,
};
use crate::{
    Error, Images, Pixels, Result, SourceMap, Tensor, TokenPlan,
    model::{AffNet, Vit, affnet::AffOutput},
    reduction::Method,
};

/// A model, a method and a batch size as one CUDA graph over one allocation. An [`AffNet`] takes no method
/// ([`Engine::of_affnet`]); all else is the same.
///
/// [`run`](Self::run) copies pixels into page-locked memory, enqueues their upload and the graph, and returns: it allocates
/// nothing, waits for nothing, and does no work per block. What it returns reads the results. An engine may be moved to
/// other threads; `run` takes it mutably, so threads that share one put it behind a [`Mutex`](std::sync::Mutex).
///
/// ```no_run
/// use foveate::{Images, Pixels, Reduction, cuda::{Cuda, DType, Engine, patch::PixelType}};
/// use foveate::weights::{Checkpoint, Overrides, load_vit};
///
/// # fn main() -> foveate::Result<()> {
/// let cuda = Cuda::new(0, DType::F16)?;
/// let model = load_vit(&Checkpoint::open("deit_small.safetensors")?, None, &Overrides::default())?.build(cuda)?;
/// let method: Reduction = "tome:r=13".parse()?;
/// let mut engine = Engine::new(&model, &method, 64, PixelType::U8)?;
/// println!("{} bytes", engine.forecast().arena_bytes());
/// // 50 images of the model's size: fewer than the batch are fine.
/// let images = Images::new([50, 3, 224, 224], Pixels::U8(vec![0; 50 * 3 * 224 * 224]))?;
/// let run = engine.run(&images)?;
/// let logits = run.logits()?.expect("a model with a head");
/// assert_eq!(logits.shape(), [50, 1000]);
/// let where_patches_went = run.source_map()?;
/// # let _ = where_patches_went;
/// # Ok(())
/// # }
/// ```
pub struct Engine<M: EngineModel = Vit<Cuda>> {
    // In the order in which they are dropped.
    graph: Graph,
    uploads: [Upload; 2],
    turn: usize,
    input: Memory,
    output: M::Output,
    /// Before the weights.
    _loan: Loan,
    /// Holds the weights.
    _model: M,
    forecast: Forecast,
    shape: [usize; 4],
    pixels: PixelType,
    stream: Arc<CudaStream>,
}

impl<M: EngineModel> fmt::Debug for Engine<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("shape", &self.shape)
            .field("pixels", &self.pixels)
            .field("forecast", &self.forecast)
            .finish_non_exhaustive()
    }
}

/// A captured graph.
struct Graph(CudaGraph);

// SAFETY: the driver lets any thread use a graph, one at a time: it is launched through `&mut Engine` and destroyed once.
unsafe impl Send for Graph {}
// SAFETY: as above; nothing of it is reached through a shared reference.
unsafe impl Sync for Graph {}

/// Weights that `stream` reads and that are freed on the stream `lender`.
struct Loan {
    lender: Arc<CudaStream>,
    stream: Arc<CudaStream>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if self.lender.join(&self.stream).is_err() {
            // No event to be had: then the host waits, so that what is freed next is freed behind its last use.
            let context = self.stream.context();
            context.record_err(self.stream.synchronize());
        }
    }
}

impl Engine {
    /// An engine for up to `batch` images of `pixels` at a time.
    ///
    /// What the method uploads while it decides must be the same each time: it is uploaded here, once.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], which names the largest batch that would fit; [`Error::Argument`] and [`Error::Model`] when
    /// the method does not suit the model, reads from the device while it decides, or allocates otherwise in one pass than
    /// in another; those of the driver. The model and its backend stay usable.
    pub fn new(model: &Vit<Cuda>, method: &impl Method, batch: usize, pixels: PixelType) -> Result<Self> {
        let forecast = Forecast::new(model, method, batch, pixels)?;
        Self::capture(model, &reduced(method), forecast, batch, pixels)
    }
}

impl Engine<AffNet<Cuda>> {
    /// As [`Engine::new`], of an AFFNet.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn of_affnet(model: &AffNet<Cuda>, batch: usize, pixels: PixelType) -> Result<Self> {
        let forecast = Forecast::of_affnet(model, batch, pixels)?;
        Self::capture(model, &filtered, forecast, batch, pixels)
    }
}

impl<M: EngineModel> Engine<M> {
    /// Places what `forecast` has written down, and captures a pass.
    fn capture(
        model: &M,
        run: &impl Forward<M>,
        forecast: Forecast,
        batch: usize,
        pixels: PixelType,
    ) -> Result<Self> {
        let shape = model.images(batch)?;
        let (backend, layout) = (model.backend(), forecast.layout());
        let lender = backend.stream().clone();
        // A new stream behind all that has made the weights.
        let stream = lender.fork().map_err(|error| driver("making a stream", error))?;
        let loan = Loan { lender, stream: stream.clone() };
        let memory = Memory::new(&Arc::new(Space::driver(stream.clone())), layout.bytes);
        let arena = memory.map_err(|error| fitting(error, model, run, batch, pixels))?;
        let arena = Arc::new(arena);
        let bytes = shape.iter().product::<usize>() * pixels.bytes();
        let uploads = [Upload::new(stream.context(), bytes)?, Upload::new(stream.context(), bytes)?];
        let pass = |writes: bool| -> Result<_> {
            let model = model.on(backend.within(Space::arena(arena.clone(), layout.clone(), writes))?);
            let prepare = |input: &Memory| if writes { input.clear() } else { Ok(()) };
            let (input, output) = forward(&model, run, batch, pixels, prepare)?;
            model.backend().space().end()?;
            Ok((model, input, output))
        };

        let eager = pass(true);
        // Also after a failure: some of the pass may be running.
        let waited = stream.synchronize();
        drop(eager?);
        waited.map_err(|error| driver("waiting for the device", error))?;

        let begun = stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        begun.map_err(|error| driver("beginning a capture", error))?;
        let captured = pass(false);
        // Also after a failure: the stream must not go on capturing.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        let (model, input, output) = captured?;
        let graph = graph.map_err(|error| driver("making the graph", error))?;
        let graph = graph.ok_or_else(|| Error::argument("engine", "the capture left no graph"))?;
        graph.upload().map_err(|error| driver("uploading the graph", error))?;
        Ok(Self {
            graph: Graph(graph),
            uploads,
            turn: 0,
            input,
            output,
            _loan: loan,
            _model: model,
            forecast,
            shape,
            pixels,
            stream,
        })
    }

    /// The most images of a run.
    pub fn batch(&self) -> usize {
        self.shape[0]
    }

    /// What pixels are.
    pub fn pixels(&self) -> PixelType {
        self.pixels
    }

    /// What the engine takes and does: memory, launches, token counts.
    pub fn forecast(&self) -> &Forecast {
        &self.forecast
    }

    /// The stream it runs on, for launches of the caller's own behind a run.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Enqueues a run over 1 to [`batch`](Self::batch) images.
    ///
    /// The images have been copied when this returns, and may go away. The host waits only where the device is two runs
    /// behind.
    ///
    /// # Errors
    /// [`Error::Model`] when the images have another size, and [`Error::Argument`] when they have other pixels or are more
    /// than the batch; those of the driver. The engine stays usable.
    pub fn run(&mut self, images: &Images) -> Result<Run<'_, M>> {
        let bytes = self.check(images)?;
        let upload = &mut self.uploads[self.turn];
        upload.send(&self.stream, bytes, self.input.pointer())?;
        self.turn = 1 - self.turn;
        self.graph.0.launch().map_err(|error| driver("launching the graph", error))?;
        Ok(Run { engine: self, images: images.batch() })
    }

    /// The pixels of images that this engine runs on.
    fn check<'a>(&self, images: &'a Images) -> Result<&'a [u8]> {
        let ([count, channels, height, width], [batch, ..]) = (images.shape(), self.shape);
        if [channels, height, width] != self.shape[1..] {
            let [_, c, h, w] = self.shape;
            return Err(Error::model(format!(
                "the images are {height}x{width} with {channels} channels, the model takes {h}x{w} with {c}"
            )));
        }
        if count > batch {
            return Err(Error::argument(
                "engine",
                format!("{count} images, the engine was made for {batch}; make one for more, or send fewer"),
            ));
        }
        match (images.pixels(), self.pixels) {
            (Pixels::U8(pixels), PixelType::U8) => Ok(pixels),
            (Pixels::F32(pixels), PixelType::F32) => Ok(bytemuck::cast_slice(pixels)),
            (_, made) => Err(Error::argument(
                "engine",
                format!("the engine was made for pixels of type {made:?}, the images have others"),
            )),
        }
    }
}

impl<M: EngineModel> Drop for Engine<M> {
    fn drop(&mut self) {
        // Page-locked memory must not go away under a copy.
        for upload in &self.uploads {
            self.stream.context().record_err(upload.wait());
        }
    }
}

/// An [`Error::OutOfMemory`] of an engine's arena, with the batch that would fit.
fn fitting<M: EngineModel>(
    error: Error,
    model: &M,
    run: &impl Forward<M>,
    batch: usize,
    pixels: PixelType,
) -> Error {
    let Error::OutOfMemory { bytes, .. } = error else { return error };
    let Ok((free, total)) = result::mem_get_info() else { return error };
    let Ok(most) = Forecast::largest(model, run, pixels, free) else { return error };
    Error::OutOfMemory {
        bytes,
        what: format!(
            "an engine for {batch} images takes {}, {} of {} are free; {}",
            megabytes(bytes),
            megabytes(free),
            megabytes(total),
            room::advice(most, batch)
        ),
        fits: Some(most),
    }
}

/// The results of a run, until the next one. Each method waits for the run and copies what it returns to the host; images
/// that were not given have no rows.
#[derive(Debug)]
pub struct Run<'a, M: EngineModel = Vit<Cuda>> {
    engine: &'a Engine<M>,
    images: usize,
}

impl<M: EngineModel> Run<'_, M> {
    /// The images that were given.
    pub fn images(&self) -> usize {
        self.images
    }

    /// Waits for the run.
    ///
    /// # Errors
    /// [`Error::Driver`] when the device failed.
    pub fn wait(&self) -> Result<()> {
        self.engine.stream.synchronize().map_err(|error| driver("waiting for the device", error))
    }

    /// The results on the device, for launches of the caller's own on [`Engine::stream`]: all images of the engine's batch,
    /// also those that were not given.
    pub fn device(&self) -> &M::Output {
        &self.engine.output
    }

    fn read(&self, tensor: &CudaTensor) -> Result<Tensor> {
        tensor.download_first(self.images)
    }
}

impl Run<'_, AffNet<Cuda>> {
    /// (images, classes).
    ///
    /// # Errors
    /// Those of the driver; so for all below.
    pub fn logits(&self) -> Result<Tensor> {
        self.read(&self.engine.output.logits)
    }

    /// What the classifier reads, (images, F).
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn features(&self) -> Result<Tensor> {
        self.read(&self.engine.output.features)
    }

    /// The last feature map, (images, positions, C), and its grid.
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn map(&self) -> Result<(Tensor, [usize; 2])> {
        let AffOutput { map, grid, .. } = &self.engine.output;
        Ok((self.read(map)?, *grid))
    }
}

impl Run<'_> {
    /// (images, classes), if the model has a head.
    ///
    /// # Errors
    /// Those of the driver; so for all below.
    pub fn logits(&self) -> Result<Option<Tensor>> {
        self.engine.output.logits.as_ref().map(|logits| self.read(logits)).transpose()
    }

    /// What the head reads, (images, C) or (images, 2C).
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn features(&self) -> Result<Tensor> {
        self.read(&self.engine.output.features)
    }

    /// The logits of the class token's and the distillation token's head, if the model has both.
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn head_logits(&self) -> Result<Option<[Tensor; 2]>> {
        let Some([class, distilled]) = &self.engine.output.head_logits else { return Ok(None) };
        Ok(Some([self.read(class)?, self.read(distilled)?]))
    }

    /// All final tokens after the final LayerNorm, (images, M, C).
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn tokens(&self) -> Result<Tensor> {
        self.read(&self.engine.output.tokens)
    }

    /// How many patches each final token stands for, (images, M); absent when nothing was reduced.
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn sizes(&self) -> Result<Option<Tensor>> {
        self.engine.output.sizes.as_ref().map(|sizes| self.read(sizes)).transpose()
    }

    /// Tokens entering block 0 and leaving each block.
    pub fn token_counts(&self) -> &[usize] {
        &self.engine.output.token_counts
    }

    /// The plans that were applied, with the block they were applied in.
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn plans(&self) -> Result<Vec<(usize, TokenPlan)>> {
        let plans = self.engine.output.plans.iter();
        plans.map(|(layer, plan)| Ok((*layer, plan.download_first(self.images)?))).collect()
    }

    /// Where each token of the input ended up.
    ///
    /// # Errors
    /// As [`Run::logits`].
    pub fn source_map(&self) -> Result<SourceMap> {
        let mut map = SourceMap::identity(self.images, self.token_counts()[0]);
        for (_, plan) in self.plans()? {
            map.apply(&plan)?;
        }
        Ok(map)
    }
}
