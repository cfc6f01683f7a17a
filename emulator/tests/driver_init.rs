//! Before cuInit nothing works. One test: the state belongs to the process.
// SAFETY of every call in this file: pointers are to live locals of the sizes given, or are wrong on purpose in a way that the driver
// must answer with an error code without following them.
#![allow(clippy::undocumented_unsafe_blocks, reason = "stated above, once for all calls")]

mod driver;

use driver::*;
use std::ptr::null_mut;

#[test]
fn nothing_works_before_the_driver_and_a_context_are_there() {
    let (mut n, mut address, mut handle) = (0, 0, null_mut());
    unsafe {
        assert_eq!(cuDriverGetVersion(&raw mut n), OK);
        assert_eq!(n, 13050);
        assert_eq!(cuDeviceGetCount(&raw mut n), 3);
        assert_eq!(cuDevicePrimaryCtxRetain(&raw mut handle, 0), 3);
        assert_eq!(cuMemAlloc_v2(&raw mut address, 4), 3);
        assert_eq!(cuMemFree_v2(0), 3);
        assert_eq!(cuInit(1), INVALID_VALUE);
        assert_eq!(cuDeviceGetCount(&raw mut n), 3);
        assert_eq!(cuInit(0), OK);
        assert_eq!(cuDeviceGetCount(&raw mut n), OK);
        assert_eq!(n, 1);
        assert_eq!(cuDeviceGet(&raw mut n, 1), 101);
        assert_eq!(cuDeviceGet(&raw mut n, 0), OK);
        // No context yet, and none that can be made current.
        assert_eq!(cuCtxGetCurrent(&raw mut handle), OK);
        assert!(handle.is_null());
        assert_eq!(cuMemAlloc_v2(&raw mut address, 4), 201);
        assert_eq!(cuStreamSynchronize(null_mut()), 201);
        assert_eq!(cuDevicePrimaryCtxRetain(&raw mut handle, 0), OK);
        assert_eq!(cuMemAlloc_v2(&raw mut address, 4), 201);
        assert_eq!(cuCtxSetCurrent(handle), OK);
        assert_eq!(cuMemAlloc_v2(&raw mut address, 4), OK);
        // Another thread has no context of its own.
        let code = std::thread::spawn(|| {
            let mut address = 0;
            cuMemAlloc_v2(&raw mut address, 4)
        });
        assert_eq!(code.join().unwrap(), 201);
        // The same handle each time; after the last release nothing can be used.
        let mut again = null_mut();
        assert_eq!(cuDevicePrimaryCtxRetain(&raw mut again, 0), OK);
        assert_eq!(again, handle);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), OK);
        assert_eq!(cuMemFree_v2(address), OK);
        silent();
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), OK);
        silent();
        assert_eq!(cuMemAlloc_v2(&raw mut address, 4), 201);
        assert_eq!(cuCtxSetCurrent(handle), 201);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 201);
    }
}
