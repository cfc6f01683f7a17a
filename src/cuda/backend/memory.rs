//! Device memory that belongs to one stream.

use std::{fmt, sync::Arc};

use cudarc::driver::{CudaStream, DriverError, result, sys};

use super::super::{DevicePointer, device::driver};
use crate::{Error, Result};

/// Memory whose every use is enqueued on `stream`, where it is freed in order: no waiting and no events. On a driver
/// without an asynchronous allocator freeing waits.
pub(super) struct Memory {
    pointer: DevicePointer,
    bytes: usize,
    stream: Arc<CudaStream>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.pointer)
    }
}

/// Megabytes, for messages.
fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

impl Memory {
    /// Memory of any content.
    pub(super) fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        let context = stream.context();
        context.bind_to_thread().map_err(|error| driver("making the device's context current", error))?;
        // The driver has nothing to give for 0 bytes.
        let asked = bytes.max(1);
        // SAFETY: the memory is written before it is read, which each operation sees to, and is freed once, in `drop`.
        let pointer = unsafe {
            if context.has_async_alloc() {
                result::malloc_async(stream.cu_stream(), asked)
            } else {
                result::malloc_sync(asked)
            }
        };
        let pointer = pointer.map_err(|error| match error {
            DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Error::OutOfMemory {
                bytes: asked,
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
        })?;
        Ok(Self { pointer, bytes, stream: stream.clone() })
    }

    /// Memory with `values` in it. Waits until they have been read.
    pub(super) fn upload<T: bytemuck::NoUninit>(stream: &Arc<CudaStream>, values: &[T]) -> Result<Self> {
        let memory = Self::new(stream, size_of_val(values))?;
        memory.write(0, values)?;
        memory.wait()?;
        Ok(memory)
    }

    /// Copies `values` to `offset` bytes from the start. The caller waits before they go away.
    pub(super) fn write<T: bytemuck::NoUninit>(&self, offset: usize, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(offset + bytes.len() <= self.bytes, "values beyond their memory");
        self.bind()?;
        // SAFETY: the target lies within this memory (checked above), which only this stream uses.
        unsafe {
            result::memcpy_htod_async(self.pointer + offset as DevicePointer, bytes, self.stream.cu_stream())
        }
        .map_err(|error| driver("copying to the device", error))
    }

    /// Copies `count` values from `offset` bytes on to the host; waits for the stream.
    pub(super) fn download<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        offset: usize,
        count: usize,
    ) -> Result<Vec<T>> {
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
                self.stream.cu_stream(),
            )
        };
        // Also after a failure: what was begun writes to `values`.
        self.wait()?;
        copied.map_err(|error| driver("copying from the device", error))?;
        Ok(values)
    }

    /// Other memory with the same content.
    pub(super) fn copy(&self) -> Result<Self> {
        let copy = Self::new(&self.stream, self.bytes)?;
        if self.bytes > 0 {
            // SAFETY: both are of this length and used on this stream only.
            unsafe {
                result::memcpy_dtod_async(copy.pointer, self.pointer, self.bytes, self.stream.cu_stream())
            }
            .map_err(|error| driver("copying on the device", error))?;
        }
        Ok(copy)
    }

    /// Waits for the stream.
    pub(super) fn wait(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| driver("waiting for the device", error))
    }

    pub(super) fn pointer(&self) -> DevicePointer {
        self.pointer
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_of(&self, stream: &Arc<CudaStream>) -> bool {
        Arc::ptr_eq(&self.stream, stream)
    }

    fn bind(&self) -> Result<()> {
        let bound = self.stream.context().bind_to_thread();
        bound.map_err(|error| driver("making the device's context current", error))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let context = self.stream.context();
        // A failure here cannot be returned: it is kept where the next call finds it.
        context.record_err(context.bind_to_thread());
        if context.has_async_alloc() {
            // SAFETY: allocated by `malloc_async`, freed here only; all uses are enqueued on this stream before.
            context.record_err(unsafe { result::free_async(self.pointer, self.stream.cu_stream()) });
        } else {
            context.record_err(self.stream.synchronize());
            // SAFETY: allocated by `malloc_sync`, freed here only; the stream has got past all uses.
            context.record_err(unsafe { result::free_sync(self.pointer) });
        }
    }
}
