//! The way to device memory: the emulated driver runs our work in stream order, after it has checked every byte of it.

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_char, c_void},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};

use crate::status::{Failure, Status};

/// Bytes of device memory that the work reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Range {
    /// Device address of the first byte.
    pub address: u64,
    /// Length.
    pub bytes: u64,
    /// 1 when the work writes all of these bytes, 0 when it reads them.
    pub write: u32,
    /// Zero.
    pub padding: u32,
}

/// The driver's `emu_enqueue_host`: stream, name, work, its argument, the argument's end, ranges and their count. The work
/// gets its argument and a host pointer for each range; it may run any number of times, on any thread.
pub type Enqueue = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    unsafe extern "C" fn(*mut c_void, *const *mut u8),
    *mut c_void,
    unsafe extern "C" fn(*mut c_void),
    *const Range,
    usize,
) -> i32;

static DRIVER: OnceLock<Enqueue> = OnceLock::new();

/// Uses this driver instead of the loaded `libcuda.so`; the first one stays.
pub fn use_driver(enqueue: Enqueue) {
    let _ = DRIVER.set(enqueue);
}

/// `RTLD_NOLOAD`: only a library that this process has loaded before.
const ALREADY_LOADED: i32 = if cfg!(target_os = "macos") { 0x10 } else { 0x4 };

/// The driver to use: the `libcuda.so` of this process, else the one that the loader finds.
fn driver() -> Result<Enqueue, Failure> {
    if let Some(driver) = DRIVER.get() {
        return Ok(*driver);
    }
    let missing = |reason: String| Failure {
        status: Status::NotInitialized,
        reason: format!("no emulated CUDA driver: {reason}"),
    };
    // SAFETY: the initialisers of a CUDA driver, real or emulated, have no requirements on their caller.
    let library = unsafe {
        Library::open(Some("libcuda.so"), RTLD_LAZY | RTLD_LOCAL | ALREADY_LOADED)
            .or_else(|_| Library::open(Some("libcuda.so"), RTLD_LAZY | RTLD_LOCAL))
    }
    .map_err(|error| missing(error.to_string()))?;
    // SAFETY: the symbol is exported by the emulated driver alone, with this signature.
    let enqueue =
        unsafe { library.get::<Enqueue>(b"emu_enqueue_host\0") }.map(|symbol| *symbol).map_err(|_| {
            missing(
                "libcuda.so does not export emu_enqueue_host; a real driver needs a real cublasLt".to_owned(),
            )
        })?;
    // The function must stay where it is.
    std::mem::forget(library);
    Ok(*DRIVER.get_or_init(|| enqueue))
}

/// Work on device memory.
pub(crate) trait Work: Send + Sync {
    /// What reports call it.
    fn name(&self) -> &CStr;

    /// Does it; `pointers` has one host pointer a range.
    ///
    /// # Safety
    /// Every pointer must be valid for its range's bytes, and written ranges must not be accessed by others meanwhile.
    unsafe fn run(&self, pointers: *const *mut u8);
}

struct Pending {
    last: usize,
    work: BTreeMap<usize, Arc<dyn Work>>,
}

// The driver gets a number for each piece of work, so that a second release of the same one does no harm.
static PENDING: Mutex<Pending> = Mutex::new(Pending { last: 0, work: BTreeMap::new() });

fn pending() -> MutexGuard<'static, Pending> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

unsafe extern "C" fn run(user: *mut c_void, pointers: *const *mut u8) {
    let work = pending().work.get(&user.addr()).cloned();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        if let Some(work) = work {
            // SAFETY: the driver passes one valid host pointer for each range that came with this work, in stream order.
            unsafe { work.run(pointers) };
        }
    }));
    if result.is_err() {
        // No error can be returned from here, and going on would leave a result that nobody computed.
        eprintln!("========= cublasLt: the product could not be computed");
        std::process::abort();
    }
}

unsafe extern "C" fn release(user: *mut c_void) {
    pending().work.remove(&user.addr());
}

/// Hands `work` to the driver: it runs now, or at each launch of the graph that the stream is being captured into.
pub(crate) fn enqueue(stream: *mut c_void, work: &Arc<dyn Work>, ranges: &[Range]) -> Result<(), Failure> {
    let driver = driver()?;
    let user = {
        let mut pending = pending();
        pending.last += 1;
        let number = pending.last;
        pending.work.insert(number, Arc::clone(work));
        std::ptr::without_provenance_mut(number)
    };
    // SAFETY: name, ranges and work are valid for the call; the driver copies the first two, and releases the third.
    let result =
        unsafe { driver(stream, work.name().as_ptr(), run, user, release, ranges.as_ptr(), ranges.len()) };
    if result == 0 {
        return Ok(());
    }
    pending().work.remove(&user.addr());
    Err(Failure {
        status: Status::ExecutionFailed,
        reason: format!("the driver refused the product: CUDA error {result}"),
    })
}
