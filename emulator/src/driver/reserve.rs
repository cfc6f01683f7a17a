//! Keeps the host away from the addresses of device memory, so that no pointer of the host looks like one of the device, and a host
//! program that follows a device pointer stops at once instead of reading something else.

#[cfg(target_os = "linux")]
use std::ffi::{c_int, c_void};

/// Bytes kept for one process; its addresses are never used twice.
#[cfg(target_os = "linux")]
const SPAN: u64 = 64 << 30;
/// Places to try: a library or another copy of the emulator may already be where the first one is.
#[cfg(target_os = "linux")]
const PLACES: u64 = 8;

#[cfg(target_os = "linux")]
unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        len: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
}

/// The first address at or after `base` from which on a span of addresses could be kept.
#[cfg(target_os = "linux")]
pub(crate) fn device_addresses(base: u64) -> Option<u64> {
    // PROT_NONE; MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED_NOREPLACE.
    const NO_ACCESS: c_int = 0;
    const FLAGS: c_int = 0x2 | 0x20 | 0x4000 | 0x10_0000;
    (0..PLACES).map(|place| base + place * SPAN).find(|&at| {
        let wanted = std::ptr::without_provenance_mut::<c_void>(at as usize);
        // SAFETY: a new mapping that replaces none; nothing ever reads or writes through it.
        let got = unsafe { mmap(wanted, SPAN as usize, NO_ACCESS, FLAGS, -1, 0) };
        if got != wanted && got.addr() != usize::MAX {
            // SAFETY: a kernel that does not know the last flag has put the new mapping elsewhere; nobody uses it.
            unsafe { munmap(got, SPAN as usize) };
        }
        got == wanted
    })
}

/// Elsewhere the addresses are only unlikely to be the host's.
#[cfg(not(target_os = "linux"))]
pub(crate) fn device_addresses(_base: u64) -> Option<u64> {
    None
}
