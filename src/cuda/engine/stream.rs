//! Any number of batches through an engine: the next one is on its way while one is computed.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::{
    super::{
        backend::{Memory, Space},
        device::driver,
    },
    Engine, EngineModel, Loan, Run,
};
use crate::{Images, Result};

/// A second stream that brings images, and two buffers on the device that they arrive in.
struct Lane {
    /// Before the buffers: they are freed on the lane's stream, but read on the engine's.
    _loan: Loan,
    buffers: [Buffer; 2],
    stream: Arc<CudaStream>,
}

struct Buffer {
    memory: Memory,
    /// The engine has taken what was in it.
    taken: CudaEvent,
}

impl Lane {
    fn new<M: EngineModel>(engine: &Engine<M>, bytes: usize) -> Result<Self> {
        let stream = engine.stream.context().new_stream();
        let stream = stream.map_err(|error| driver("making a stream", error))?;
        let space = Arc::new(Space::driver(stream.clone()));
        let buffer = || -> Result<Buffer> {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            let taken = stream.context().new_event(Some(flags));
            let taken = taken.map_err(|error| driver("making an event", error))?;
            Ok(Buffer { memory: Memory::new(&space, bytes)?, taken })
        };
        let buffers = [buffer()?, buffer()?];
        let loan = Loan { lender: stream.clone(), stream: engine.stream.clone() };
        Ok(Self { _loan: loan, buffers, stream })
    }
}

impl<M: EngineModel> Engine<M> {
    /// Runs batch after batch: `each` gets a batch's number and its results, in order.
    ///
    /// While the device computes a batch, the next one is asked of `batches` (decoded, say), copied into page-locked memory and
    /// from there to the device, on a second stream. Two batches are held at a time, however many there are: page-locked, and
    /// in two buffers on the device beside the arena while this runs. The device waits while `each` works on the host.
    ///
    /// ```no_run
    /// # use foveate::{Images, Result, cuda::Engine};
    /// # fn decoded() -> impl Iterator<Item = Result<Images>> { std::iter::empty() }
    /// # fn run(engine: &mut Engine) -> Result<()> {
    /// let mut seen = 0;
    /// engine.stream_batches(decoded(), |batch, run| {
    ///     seen += run.images();
    ///     println!("batch {batch}: {:?}", run.features()?.shape());
    ///     Ok(())
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The first that `batches` or `each` returns, and those of [`Engine::run`]; [`crate::Error::OutOfMemory`] when there is
    /// no room for the buffers. The engine stays usable.
    pub fn stream_batches(
        &mut self,
        batches: impl IntoIterator<Item = Result<Images>>,
        mut each: impl FnMut(usize, &Run<'_, M>) -> Result<()>,
    ) -> Result<()> {
        let failed = |error| driver("handing images from stream to stream", error);
        let lane = Lane::new(self, self.input.bytes())?;
        let mut batches = batches.into_iter();
        let (mut batch, mut sent) = (0_usize, self.send(&lane, 0, batches.next())?);
        while let Some(images) = sent {
            let buffer = &lane.buffers[batch % 2];
            self.stream.wait(self.uploads[batch % 2].copied()).map_err(failed)?;
            let bytes = self.input.bytes() / self.batch() * images;
            self.input.copy_from(0, bytes, buffer.memory.pointer(), bytes, bytes, 1)?;
            buffer.taken.record(&self.stream).map_err(failed)?;
            self.graph.0.launch().map_err(|error| driver("launching the graph", error))?;
            sent = self.send(&lane, batch + 1, batches.next())?;
            each(batch, &Run { engine: self, images })?;
            batch += 1;
        }
        Ok(())
    }

    /// Sends a batch on its way; returns how many images it has.
    fn send(&mut self, lane: &Lane, batch: usize, images: Option<Result<Images>>) -> Result<Option<usize>> {
        let Some(images) = images.transpose()? else { return Ok(None) };
        let values = self.check(&images)?;
        let buffer = &lane.buffers[batch % 2];
        // An event that was never recorded holds nobody up.
        let waited = lane.stream.wait(&buffer.taken);
        waited.map_err(|error| driver("handing images from stream to stream", error))?;
        self.uploads[batch % 2].send(&lane.stream, values, buffer.memory.pointer())?;
        Ok(Some(images.batch()))
    }
}
