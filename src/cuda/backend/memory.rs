//! Device memory that belongs to one stream, and where it comes from.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{CudaStream, DriverError, result, sys};

use super::{
    super::{DevicePointer, device::driver, record},
    ledger::{Layout, Ledger, Progress},
};
use crate::{Error, Result};

/// Where the memory of a backend comes from.
#[derive(Debug)]
pub(in super::super) struct Space {
    stream: Arc<CudaStream>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// The driver's stream-ordered allocator.
    Driver,
    /// Nowhere: a dry pass, which writes its allocations down. Nothing may be launched.
    Ledger(Mutex<Ledger>),
    /// Planned places in one allocation.
    Arena {
        memory: Arc<Memory>,
        layout: Arc<Layout>,
        progress: Mutex<Progress>,
        /// What the host uploads is written; else it is there already, from an earlier pass over the same places.
        writes: bool,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    /// Memory of the driver.
    pub(in super::super) fn driver(stream: Arc<CudaStream>) -> Self {
        Self { stream, source: Source::Driver }
    }

    /// No memory.
    pub(in super::super) fn ledger(stream: Arc<CudaStream>) -> Self {
        Self { stream, source: Source::Ledger(Mutex::default()) }
    }

    /// The places of `layout` in `memory`.
    pub(in super::super) fn arena(memory: Arc<Memory>, layout: Arc<Layout>, writes: bool) -> Self {
        let stream = memory.space.stream.clone();
        Self { stream, source: Source::Arena { memory, layout, progress: Mutex::default(), writes } }
    }

    pub(in super::super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Whether memory comes and goes as it is needed.
    pub(super) fn is_driver(&self) -> bool {
        matches!(self.source, Source::Driver)
    }

    /// Ends a pass: of a dry one, gives the layout; in an arena, makes sure that it went as planned.
    pub(in super::super) fn end(&self) -> Result<Option<Layout>> {
        match &self.source {
            Source::Driver => Ok(None),
            Source::Ledger(ledger) => {
                let mut ledger = lock(ledger);
                ledger.close();
                Ok(Some(ledger.lay_out()))
            }
            Source::Arena { layout, progress, .. } => lock(progress).seal(layout).map(|()| None),
        }
    }

    /// What lies here can be used by this thread now.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        if matches!(self.source, Source::Ledger(_)) && !record::is_dry(&self.stream) {
            return Err(Error::argument(
                op,
                "an engine's pass runs on one thread: a method must not call the backend from others",
            ));
        }
        Ok(())
    }

    /// The host may read what lies here.
    fn check_download(&self) -> Result<()> {
        let forbidden = match &self.source {
            Source::Driver => false,
            Source::Ledger(_) => true,
            Source::Arena { progress, .. } => !lock(progress).is_sealed(),
        };
        if forbidden {
            return Err(Error::argument(
                "download",
                "an engine's forward pass stays on the device, but the method reads from it; run it without an engine",
            ));
        }
        Ok(())
    }

    /// Whether a copy or a fill is to be enqueued; `kernel` is what it is recorded as.
    fn goes_on(&self, kernel: &'static str) -> bool {
        record::launch(&self.stream, |record| kernel.clone_into(&mut record.kernel))
    }
}

/// Memory that is 0 between launches, which follow each other on the backend's stream: kernels count there which of their blocks is
/// the last, and clear it again.
#[derive(Debug, Default)]
pub(super) struct Cleared(Mutex<Option<Memory>>);

impl Cleared {
    /// At least `bytes` of it, for the one who holds the guard: two threads must not share it between the launches of an operation.
    pub(super) fn hold(
        &self,
        space: &Arc<Space>,
        bytes: usize,
    ) -> Result<(DevicePointer, MutexGuard<'_, Option<Memory>>)> {
        let mut held = lock(&self.0);
        let known = held.take().filter(|memory| memory.bytes() >= bytes);
        let memory = known.map_or_else(|| Memory::upload(space, &vec![0_u8; bytes]), Ok)?;
        let pointer = held.insert(memory).pointer();
        Ok((pointer, held))
    }
}

/// Memory whose every use is enqueued on its space's stream. The driver's is freed there in order: no waiting and no events.
/// On a driver without an asynchronous allocator freeing waits.
pub(in super::super) struct Memory {
    pointer: DevicePointer,
    bytes: usize,
    /// Its number in a ledger or an arena.
    item: usize,
    /// Its content is the same in every pass, so nobody may write to it.
    constant: bool,
    space: Arc<Space>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.pointer)
    }
}

/// Megabytes, for messages.
pub(in super::super) fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// An allocation that the driver refused.
fn refused(asked: usize, error: DriverError) -> Error {
    match error {
        DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Error::OutOfMemory {
            bytes: asked,
            fits: None,
            what: result::mem_get_info().map_or_else(
                |_| "use a smaller batch".to_owned(),
                |(free, total)| {
                    format!(
                        "{} asked for, {} of {} free; use a smaller batch",
                        megabytes(asked),
                        megabytes(free),
                        megabytes(total)
                    )
                },
            ),
        },
        other => driver("allocating memory", other),
    }
}

impl Memory {
    /// Memory of any content.
    pub(in super::super) fn new(space: &Arc<Space>, bytes: usize) -> Result<Self> {
        Self::take(space, bytes, false)
    }

    /// Memory that in an engine keeps its content from pass to pass, and its place to itself.
    pub(in super::super) fn constant(space: &Arc<Space>, bytes: usize) -> Result<Self> {
        Self::take(space, bytes, true)
    }

    fn take(space: &Arc<Space>, bytes: usize, constant: bool) -> Result<Self> {
        let (item, pointer) = match &space.source {
            Source::Driver => (0, allocate(&space.stream, bytes)?),
            Source::Ledger(ledger) => {
                space.check("engine")?;
                lock(ledger).allocate(bytes, constant)?
            }
            Source::Arena { memory, layout, progress, .. } => {
                let (item, offset) = lock(progress).allocate(layout, bytes, constant)?;
                (item, memory.pointer + offset as DevicePointer)
            }
        };
        let constant = constant && !matches!(space.source, Source::Driver);
        Ok(Self { pointer, bytes, item, constant, space: space.clone() })
    }

    /// Memory with `values` in it. Waits until they have been read.
    pub(super) fn upload<T: bytemuck::NoUninit>(space: &Arc<Space>, values: &[T]) -> Result<Self> {
        let memory = Self::constant(space, size_of_val(values))?;
        memory.write(0, values)?;
        memory.wait()?;
        Ok(memory)
    }

    /// Copies `values` to `offset` bytes from the start. The caller waits before they go away.
    pub(super) fn write<T: bytemuck::NoUninit>(&self, offset: usize, values: &[T]) -> Result<()> {
        if values.is_empty() || !self.is_written() {
            return Ok(());
        }
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(offset + bytes.len() <= self.bytes, "values beyond their memory");
        self.bind()?;
        // SAFETY: the target lies within this memory (checked above), which only this stream uses.
        unsafe {
            result::memcpy_htod_async(
                self.pointer + offset as DevicePointer,
                bytes,
                self.space.stream.cu_stream(),
            )
        }
        .map_err(|error| driver("copying to the device", error))
    }

    /// Whether what the host writes goes to the device: not in a dry pass, nor where an earlier pass has written it.
    fn is_written(&self) -> bool {
        match self.space.source {
            Source::Driver => true,
            Source::Ledger(_) => false,
            Source::Arena { writes, .. } => writes,
        }
    }

    /// Copies `count` values from `offset` bytes on to the host; waits for the stream.
    pub(super) fn download<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        offset: usize,
        count: usize,
    ) -> Result<Vec<T>> {
        self.space.check_download()?;
        let mut values = vec![T::zeroed(); count];
        if count == 0 {
            return Ok(values);
        }
        assert!(offset + size_of_val(&*values) <= self.bytes, "values beyond their memory");
        self.bind()?;
        let copied = unsafe {
            // SAFETY: the source lies within this memory (checked above); `values` lives until the stream has been waited
            // for, in `wait`.
            result::memcpy_dtoh_async(
                &mut values,
                self.pointer + offset as DevicePointer,
                self.space.stream.cu_stream(),
            )
        };
        // Also after a failure: what was begun writes to `values`.
        let waited = self.space.stream.synchronize();
        waited.map_err(|error| driver("waiting for the device", error))?;
        copied.map_err(|error| driver("copying from the device", error))?;
        Ok(values)
    }

    /// Other memory with the same content.
    pub(super) fn copy(&self) -> Result<Self> {
        let copy = Self::new(&self.space, self.bytes)?;
        copy.copy_from(0, self.bytes, self.pointer, self.bytes, self.bytes, 1)?;
        Ok(copy)
    }

    /// Copies `rows` rows of `width` bytes, one every `step` bytes from `source` on, to rows every `pitch` bytes from
    /// `offset` on. The source lies in memory of the same stream.
    pub(in super::super) fn copy_from(
        &self,
        offset: usize,
        pitch: usize,
        source: DevicePointer,
        step: usize,
        width: usize,
        rows: usize,
    ) -> Result<()> {
        if width == 0 || rows == 0 || !self.space.goes_on("memcpy") {
            return Ok(());
        }
        assert!(
            width <= pitch && offset + (rows - 1) * pitch + width <= self.bytes,
            "rows beyond their memory"
        );
        self.bind()?;
        let target = self.pointer + offset as DevicePointer;
        let stream = self.space.stream.cu_stream();
        // SAFETY: the target lies within this memory (checked above), the source in memory of this stream, and nobody else
        // uses either.
        let copied = unsafe {
            if rows == 1 || (pitch == width && step == width) {
                result::memcpy_dtod_async(target, source, width * rows, stream)
            } else {
                let copy = sys::CUDA_MEMCPY2D {
                    srcXInBytes: 0,
                    srcY: 0,
                    srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                    srcHost: std::ptr::null(),
                    srcDevice: source,
                    srcArray: std::ptr::null_mut(),
                    srcPitch: step,
                    dstXInBytes: 0,
                    dstY: 0,
                    dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                    dstHost: std::ptr::null_mut(),
                    dstDevice: target,
                    dstArray: std::ptr::null_mut(),
                    dstPitch: pitch,
                    WidthInBytes: width,
                    Height: rows,
                };
                sys::cuMemcpy2DAsync_v2(&raw const copy, stream).result()
            }
        };
        copied.map_err(|error| driver("copying on the device", error))
    }

    /// Writes `value` to `width` words of each of `rows` rows, which begin every `pitch` bytes from `offset` on.
    pub(super) fn fill(
        &self,
        offset: usize,
        pitch: usize,
        value: u32,
        width: usize,
        rows: usize,
    ) -> Result<()> {
        if width == 0 || rows == 0 || !self.space.goes_on("memset") {
            return Ok(());
        }
        assert!(
            4 * width <= pitch && offset + (rows - 1) * pitch + 4 * width <= self.bytes,
            "rows beyond their memory"
        );
        self.bind()?;
        // SAFETY: the target lies within this memory (checked above), which only this stream uses.
        unsafe {
            sys::cuMemsetD2D32Async(
                self.pointer + offset as DevicePointer,
                pitch,
                value,
                width,
                rows,
                self.space.stream.cu_stream(),
            )
        }
        .result()
        .map_err(|error| driver("filling memory", error))
    }

    /// Fills all of it with zeros.
    pub(in super::super) fn clear(&self) -> Result<()> {
        if !self.space.goes_on("memset") {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the target is this memory, which only this stream uses.
        unsafe { result::memset_d8_async(self.pointer, 0, self.bytes, self.space.stream.cu_stream()) }
            .map_err(|error| driver("filling memory", error))
    }

    /// Waits for what has been written.
    pub(super) fn wait(&self) -> Result<()> {
        if !self.is_written() {
            return Ok(());
        }
        self.space.stream.synchronize().map_err(|error| driver("waiting for the device", error))
    }

    pub(in super::super) fn pointer(&self) -> DevicePointer {
        self.pointer
    }

    pub(in super::super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_constant(&self) -> bool {
        self.constant
    }

    pub(super) fn is_of(&self, space: &Arc<Space>) -> bool {
        Arc::ptr_eq(&self.space, space)
    }

    fn bind(&self) -> Result<()> {
        let bound = self.space.stream.context().bind_to_thread();
        bound.map_err(|error| driver("making the device's context current", error))
    }
}

/// Memory of the driver.
fn allocate(stream: &CudaStream, bytes: usize) -> Result<DevicePointer> {
    let context = stream.context();
    context.bind_to_thread().map_err(|error| driver("making the device's context current", error))?;
    // The driver has nothing to give for 0 bytes.
    let asked = bytes.max(1);
    // SAFETY: the memory is written before it is read, which each operation sees to, and is freed once, when `Memory` is
    // dropped.
    let pointer = unsafe {
        if context.has_async_alloc() {
            result::malloc_async(stream.cu_stream(), asked)
        } else {
            result::malloc_sync(asked)
        }
    };
    pointer.map_err(|error| refused(asked, error))
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.space.source {
            Source::Driver => {}
            Source::Ledger(ledger) => return lock(ledger).free(self.item),
            Source::Arena { layout, progress, .. } => {
                if !self.constant {
                    lock(progress).free(layout, self.item);
                }
                return;
            }
        }
        let stream = &self.space.stream;
        let context = stream.context();
        // A failure here cannot be returned: it is kept where the next call finds it.
        context.record_err(context.bind_to_thread());
        if context.has_async_alloc() {
            // SAFETY: allocated by `malloc_async`, freed here only; all uses are enqueued on this stream before.
            context.record_err(unsafe { result::free_async(self.pointer, stream.cu_stream()) });
        } else {
            context.record_err(stream.synchronize());
            // SAFETY: allocated by `malloc_sync`, freed here only; the stream has got past all uses.
            context.record_err(unsafe { result::free_sync(self.pointer) });
        }
    }
}
