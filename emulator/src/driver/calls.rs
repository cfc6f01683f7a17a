//! The calls that programs make: kept in a log, and made to fail on purpose.

use super::ffi::{Code, Text, copy_text};
use super::state::internal_error;
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What takes memory: of the device, or of the driver for an object that it hands out.
const TAKERS: [&str; 12] = [
    "cuMemAlloc_v2",
    "cuMemAllocPitch_v2",
    "cuMemAllocAsync",
    "cuMemAllocFromPoolAsync",
    "cuMemAllocManaged",
    "cuMemHostAlloc",
    "cuMemAllocHost_v2",
    "cuStreamCreate",
    "cuStreamCreateWithPriority",
    "cuEventCreate",
    "cuGraphInstantiateWithFlags",
    "cuGraphInstantiate_v2",
];

/// A call that is to fail.
#[derive(Debug)]
struct Failure {
    /// Its name; `*` is any of [`TAKERS`].
    call: String,
    /// So many of them succeed before.
    after: u64,
    code: Code,
}

#[derive(Debug)]
struct Calls {
    log: Option<Vec<&'static str>>,
    failure: Option<Failure>,
}

static CALLS: Mutex<Calls> = Mutex::new(Calls { log: None, failure: None });
/// Whether there is anything to do at a call.
static LOOKED_AT: AtomicBool = AtomicBool::new(false);

fn calls() -> MutexGuard<'static, Calls> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn change(change: impl FnOnce(&mut Calls)) {
    let mut calls = calls();
    change(&mut calls);
    LOOKED_AT.store(calls.log.is_some() || calls.failure.is_some(), Ordering::Relaxed);
}

/// A call begins: it is logged, and fails where that was asked for.
pub(crate) fn begin(name: &'static str) -> Result<(), Code> {
    if !LOOKED_AT.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut failed = None;
    change(|calls| {
        if let Some(log) = &mut calls.log {
            log.push(name);
        }
        let meant =
            |failure: &&mut Failure| failure.call == name || failure.call == "*" && TAKERS.contains(&name);
        if let Some(failure) = calls.failure.as_mut().filter(meant) {
            if failure.after == 0 {
                failed = calls.failure.take().map(|failure| failure.code);
            } else {
                failure.after -= 1;
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

/// For exports whose result is no `CUresult`: a panic gives `other`.
fn plain<T>(name: &str, other: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        internal_error(name, panic.as_ref());
        other
    })
}

/// Forgets the log of calls, and begins another one (or none).
#[unsafe(no_mangle)]
pub extern "C" fn emu_call_log(on: c_int) {
    plain("emu_call_log", (), || change(|calls| calls.log = (on != 0).then(Vec::new)));
}

/// Writes the names of the driver's functions called since the log began, one a line in order, cut to the buffer, with a NUL.
/// Returns its length.
///
/// # Safety
/// `buffer` is null or has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emu_calls(buffer: *mut c_char, len: usize) -> usize {
    plain("emu_calls", 0, || copy_text(&calls().log.as_deref().unwrap_or_default().join("\n"), buffer, len))
}

/// The call of `name` that comes after so many of it fails with `CUDA_ERROR_OUT_OF_MEMORY` and does nothing; once. `*` stands
/// for every function that takes memory. A null name takes the failure back. Returns 1 when an earlier failure was still to
/// come, else 0.
///
/// # Safety
/// `name` is null or a text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emu_fail(name: Text, after: u64) -> c_int {
    plain("emu_fail", 0, || {
        let mut pending = false;
        let failure = name.get().ok().map(|call| Failure { call, after, code: Code::OutOfMemory });
        change(|calls| {
            pending = calls.failure.is_some();
            calls.failure = failure;
        });
        c_int::from(pending)
    })
}
