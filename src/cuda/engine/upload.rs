//! Pixels on their way to the device.

use std::{ptr::NonNull, sync::Arc};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};

use super::super::{DevicePointer, device::driver};
use crate::Result;

/// Page-locked host memory.
struct Pinned {
    start: NonNull<u8>,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: plain memory, owned.
unsafe impl Send for Pinned {}
// SAFETY: written through a mutable reference only.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let refused = |error| driver("taking page-locked host memory", error);
        context.bind_to_thread().map_err(refused)?;
        // SAFETY: freed once, in `drop`; written before it is read.
        let start = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(refused)?;
        let start = NonNull::new(start.cast())
            .ok_or_else(|| refused(cudarc::driver::DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)))?;
        Ok(Self { start, bytes, context: context.clone() })
    }

    /// Takes the first values of the memory.
    fn fill(&mut self, values: &[u8]) -> &[u8] {
        assert!(values.len() <= self.bytes, "values beyond their memory");
        // SAFETY: so many bytes are there (checked above), borrowed mutably, and `values` is other memory.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.as_ptr(), values.len());
            std::slice::from_raw_parts(self.start.as_ptr(), values.len())
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: allocated by `malloc_host`, freed here only; whoever copies from it waits before it is dropped.
        self.context.record_err(unsafe { result::free_host(self.start.as_ptr().cast()) });
    }
}

/// A page-locked buffer whose content is copied to the device.
pub(super) struct Upload {
    host: Pinned,
    /// The last copy out of the buffer.
    copied: CudaEvent,
}

impl Upload {
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let copied = context.new_event(Some(flags)).map_err(|error| driver("making an event", error))?;
        Ok(Self { host: Pinned::new(context, bytes)?, copied })
    }

    /// Enqueues a copy of `values` to the device. They may go away when this returns.
    pub(super) fn send(&mut self, stream: &CudaStream, values: &[u8], target: DevicePointer) -> Result<()> {
        let failed = |error| driver("copying images to the device", error);
        stream.context().bind_to_thread().map_err(failed)?;
        if !self.copied.try_is_complete().map_err(failed)? {
            self.wait().map_err(failed)?;
        }
        let values = self.host.fill(values);
        // SAFETY: the caller gives memory of the buffer's size that is used on this stream; the buffer stays as it is until
        // the event that is recorded next, which its next use and its end wait for.
        let copied = unsafe { result::memcpy_htod_async(target, values, stream.cu_stream()) };
        let recorded = copied.and_then(|()| self.copied.record(stream));
        if recorded.is_err() {
            // Nothing tells when the buffer is free again, so it has to be now.
            stream.context().record_err(stream.synchronize());
        }
        recorded.map_err(failed)
    }

    /// What happened last to the buffer: another stream can wait for it.
    pub(super) fn copied(&self) -> &CudaEvent {
        &self.copied
    }

    /// Waits until the buffer is free.
    pub(super) fn wait(&self) -> Result<(), cudarc::driver::DriverError> {
        self.copied.synchronize()
    }
}
