//! A device with the kernels loaded.

use std::{ffi::c_int, sync::Arc};

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use super::{attention, image::Kernels, select};
use crate::{Error, Result};

/// The driver's library, as cudarc looks for it.
const DRIVER_LIBRARIES: &[&str] =
    if cfg!(windows) { &["nvcuda.dll", "cuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };

/// A CUDA device with all kernels loaded. Clones share them.
#[derive(Clone, Debug)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<CudaContext>,
    kernels: Kernels,
    name: String,
    multiprocessors: usize,
    shared_bytes: usize,
}

impl Device {
    /// Opens device `ordinal` with its primary context, the one that other CUDA libraries of the process use too.
    ///
    /// # Errors
    /// [`Error::NoDriver`] without a driver's library; [`Error::Driver`] when it is older than CUDA 12.0 or there is no such device;
    /// [`Error::Kernels`] when the kernels do not run on it.
    pub fn new(ordinal: usize) -> Result<Self> {
        probe()?;
        let context = CudaContext::new(ordinal).map_err(|error| driver("opening the device", error))?;
        Self::with_context(context)
    }

    /// Loads the kernels into a context that the caller has opened.
    ///
    /// # Errors
    /// [`Error::Kernels`] when the kernels do not run on its device; [`Error::Driver`] when the driver fails.
    pub fn with_context(context: Arc<CudaContext>) -> Result<Self> {
        let ask = |error| driver("asking for the device's properties", error);
        let capability = context.compute_capability().map_err(ask)?;
        let name = format!(
            "{} (compute capability {}.{})",
            context.name().map_err(ask)?,
            capability.0,
            capability.1
        );
        let limit = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(ask)?;
        let kernels = Kernels::load(&context, &name, capability)?;
        select::permit_shared_memory(&kernels, &name, limit)?;
        attention::permit_shared_memory(&kernels.attention, &name, limit)?;
        kernels.frequency.permit_shared_memory(&name, limit)?;
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(ask)?;
        let multiprocessors = usize::try_from(multiprocessors).unwrap_or(1).max(1);
        let shared_bytes = usize::try_from(limit).unwrap_or_default();
        Ok(Self { inner: Arc::new(Inner { context, kernels, name, multiprocessors, shared_bytes }) })
    }

    /// The context that the kernels were loaded into.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// The device's name and compute capability.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Whether the driver is not NVIDIA's but the emulated one that this crate is tested on: thousands of times slower than
    /// a card, so nothing should run on it unasked, and its times say nothing.
    pub fn is_emulated(&self) -> bool {
        self.name().starts_with("foveate emulator")
    }

    /// Multiprocessors.
    pub(super) fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors
    }

    /// Shared memory that a block may have, in bytes.
    pub(super) fn shared_bytes(&self) -> usize {
        self.inner.shared_bytes
    }

    pub(super) fn kernels(&self) -> &Kernels {
        &self.inner.kernels
    }

    /// Checks that `stream` belongs to this device's context.
    pub(super) fn check_stream(&self, op: &'static str, stream: &CudaStream) -> Result<()> {
        self.check_context(op, "stream", stream.context())
    }

    /// Checks that argument `name` belongs to this device's context.
    pub(super) fn check_context(
        &self,
        op: &'static str,
        name: &str,
        context: &Arc<CudaContext>,
    ) -> Result<()> {
        if context == self.context() {
            return Ok(());
        }
        Err(Error::argument(op, format!("{name} belongs to another CUDA context than the kernels")))
    }
}

/// The oldest CUDA whose driver has every function that is called, times 1,000: graphs are updated by one of 12.0.
const OLDEST_DRIVER: c_int = 12_000;

/// Looks for the driver and asks for its version before cudarc does anything: cudarc panics at its first call when there is no
/// driver, and at the first call of a function that an old one lacks.
fn probe() -> Result<()> {
    // SAFETY: loading the driver's library runs its initialisers, as cudarc's own load right after this does.
    let load = |name: &&str| unsafe { libloading::Library::new(*name) }.ok();
    let Some(library) = DRIVER_LIBRARIES.iter().find_map(load) else {
        return Err(Error::NoDriver {
            what: format!(
                "{} cannot be loaded; install NVIDIA's driver, or use the CPU backend",
                DRIVER_LIBRARIES.join(" and ")
            ),
        });
    };
    let mut version: c_int = 0;
    // SAFETY: the function has this type in every driver since CUDA 2.2 and may be called before the driver is initialised; it
    // writes one number.
    let asked = unsafe {
        library
            .get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0")
            .map(|ask| ask(&raw mut version))
    };
    let found = match asked {
        Ok(0) if version >= OLDEST_DRIVER => return Ok(()),
        Ok(0) => format!("it is of CUDA {}.{}", version / 1000, version % 1000 / 10),
        Ok(code) => format!("it does not tell its version (error {code})"),
        Err(error) => format!("it has no version ({error})"),
    };
    Err(Error::Driver {
        action: "looking at the driver",
        what: format!(
            "{found}; the kernels need one of CUDA {}.{} or newer: update NVIDIA's driver, or use the CPU backend",
            OLDEST_DRIVER / 1000,
            OLDEST_DRIVER % 1000 / 10
        ),
    })
}

/// An [`Error::Driver`]; [`Error::OutOfMemory`] where the driver itself had no memory left.
pub(super) fn driver(action: &'static str, error: DriverError) -> Error {
    if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        let what = format!("{action} failed; use a smaller batch, or free memory");
        return Error::OutOfMemory { bytes: 0, what, fits: None };
    }
    Error::Driver { action, what: format!("{error:?}") }
}
