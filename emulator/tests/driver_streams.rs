//! Order between streams: what is not ordered is found, what is ordered is silent.
// SAFETY of every call in this file: pointers are to live locals of the sizes given, or are wrong on purpose in a way that the driver
// must answer with an error code without following them.
#![allow(clippy::undocumented_unsafe_blocks, reason = "stated above, once for all calls")]

mod driver;

use driver::Value::{U32, U64};
use driver::*;
use std::ffi::c_void;
use std::ptr::null_mut;

const BLOCKING: u32 = 0;
const NON_BLOCKING: u32 = 1;
const THREADS: u32 = 8;
const DISABLE_TIMING: u32 = 2;

/// Two kernels that fill a buffer, on the given streams, with something between.
fn two_writers(first: Handle, second: Handle, between: impl FnOnce()) -> u64 {
    let m = module(PTX);
    let fill = function(m, "fill");
    let buffer = alloc(4 * THREADS as usize);
    assert_eq!(launch(fill, 1, THREADS, first, &[U64(buffer), U32(1)]), OK);
    between();
    let code = launch(fill, 1, THREADS, second, &[U64(buffer), U32(2)]);
    assert!(code == OK, "{code}");
    buffer
}

#[test]
fn two_streams_without_an_event_are_found() {
    let _session = Session::new(&[]);
    let (a, b) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    let buffer = alloc(4);
    assert_eq!(unsafe { emu_name(buffer, text("logits").as_ptr()) }, OK);
    let m = module(PTX);
    assert_eq!(launch(function(m, "fill"), 1, 1, a, &[U64(buffer), U32(1)]), OK);
    silent();
    assert_eq!(launch(function(m, "next"), 1, 1, b, &[U64(buffer), U64(buffer)]), OK);
    found_one("StreamOrder: kernel next (launch #");
    let report = &texts()[0];
    assert!(report.contains("kernel fill (launch #"), "{report}");
    assert!(report.contains("\"logits\""), "{report}");
    assert!(
        report.contains(&format!("{:#x}", a.addr())) && report.contains(&format!("{:#x}", b.addr())),
        "{report}"
    );
    // At level error it is a failure of the device, as silent corruption would be too late to see.
    assert_eq!(unsafe { cuCtxSynchronize() }, 719);
}

#[test]
fn two_streams_with_an_event_are_silent() {
    let _session = Session::new(&[]);
    let (a, b, e) = (stream(NON_BLOCKING), stream(NON_BLOCKING), event(DISABLE_TIMING));
    let buffer = two_writers(a, b, || unsafe {
        assert_eq!(cuEventRecord(e, a), OK);
        assert_eq!(cuStreamWaitEvent(b, e, 0), OK);
    });
    silent();
    assert_eq!(unsafe { cuStreamSynchronize(b) }, OK);
    assert_eq!(download(buffer, 8), [2; 8]);
    silent();
}

#[test]
fn an_event_recorded_before_the_work_does_not_help() {
    let _session = Session::new(&[("EMU_CHECKS", "stream=warn")]);
    let (a, b, e) = (stream(NON_BLOCKING), stream(NON_BLOCKING), event(DISABLE_TIMING));
    assert_eq!(unsafe { cuEventRecord(e, a) }, OK);
    two_writers(a, b, || assert_eq!(unsafe { cuStreamWaitEvent(b, e, 0) }, OK));
    found_one("StreamOrder: ");
    // A warning does not fail the device.
    assert_eq!(unsafe { cuCtxSynchronize() }, OK);
}

#[test]
fn the_host_orders_streams_by_waiting() {
    for wait in 0..5 {
        let _session = Session::new(&[]);
        let (a, b, e) = (stream(NON_BLOCKING), stream(NON_BLOCKING), event(DISABLE_TIMING));
        two_writers(a, b, || unsafe {
            assert_eq!(cuEventRecord(e, a), OK);
            let code = match wait {
                0 => cuStreamSynchronize(a),
                1 => cuCtxSynchronize(),
                2 => cuEventSynchronize(e),
                3 => cuEventQuery(e),
                _ => cuStreamQuery(a),
            };
            assert_eq!(code, OK);
        });
        silent();
    }
}

#[test]
fn waiting_for_another_stream_does_not_help() {
    let _session = Session::new(&[]);
    let (a, b, c) = (stream(NON_BLOCKING), stream(NON_BLOCKING), stream(NON_BLOCKING));
    two_writers(a, b, || assert_eq!(unsafe { cuStreamSynchronize(c) }, OK));
    found_one("StreamOrder: ");
}

#[test]
fn the_default_stream_waits_for_blocking_streams_and_they_for_it() {
    for default in [null_mut(), std::ptr::without_provenance_mut::<c_void>(1)] {
        for (flags, ordered) in [(BLOCKING, true), (NON_BLOCKING, false)] {
            for default_first in [true, false] {
                let _session = Session::new(&[]);
                let s = stream(flags);
                let (first, second) = if default_first { (default, s) } else { (s, default) };
                two_writers(first, second, || {});
                assert_eq!(findings().is_empty(), ordered, "{flags} {default_first} {:?}", findings());
            }
        }
    }
}

#[test]
fn two_blocking_streams_are_not_ordered_with_each_other() {
    let _session = Session::new(&[]);
    two_writers(stream(BLOCKING), stream(BLOCKING), || {});
    found_one("StreamOrder: ");
}

#[test]
fn two_blocking_streams_are_ordered_by_work_on_the_default_stream() {
    let _session = Session::new(&[]);
    let other = alloc(4);
    two_writers(stream(BLOCKING), stream(BLOCKING), || {
        assert_eq!(unsafe { cuMemsetD8Async(other, 0, 4, null_mut()) }, OK);
    });
    silent();
}

#[test]
fn the_streams_of_two_threads_are_two() {
    let _session = Session::new(&[]);
    let own = std::ptr::without_provenance_mut::<c_void>(2);
    let m = module(PTX);
    let fill = function(m, "fill").addr();
    let buffer = alloc(4);
    let mut context = null_mut();
    assert_eq!(unsafe { cuCtxGetCurrent(&raw mut context) }, OK);
    let context = context.addr();
    assert_eq!(launch(std::ptr::without_provenance_mut(fill), 1, 1, own, &[U64(buffer), U32(1)]), OK);
    assert_eq!(launch(std::ptr::without_provenance_mut(fill), 1, 1, own, &[U64(buffer), U32(1)]), OK);
    silent();
    std::thread::spawn(move || {
        assert_eq!(unsafe { cuCtxSetCurrent(std::ptr::without_provenance_mut(context)) }, OK);
        let own = std::ptr::without_provenance_mut::<c_void>(2);
        assert_eq!(launch(std::ptr::without_provenance_mut(fill), 1, 1, own, &[U64(buffer), U32(1)]), OK);
    })
    .join()
    .unwrap();
    found_one("StreamOrder: ");
}

#[test]
fn readers_are_not_ordered_but_a_later_writer_must_be() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let next = function(m, "next");
    let from = upload(&[5; 8]);
    let (a, b) = (alloc(32), alloc(32));
    let (s, t) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    assert_eq!(launch(next, 1, 8, s, &[U64(a), U64(from)]), OK);
    assert_eq!(launch(next, 1, 8, t, &[U64(b), U64(from)]), OK);
    silent();
    // Stream t has read it too, so an order with s alone is not enough.
    assert_eq!(unsafe { cuMemsetD8Async(from, 0, 32, s) }, OK);
    found_one("StreamOrder: memset of 32 bytes on stream");
    assert!(texts()[0].contains("the earlier one reads and the later one writes"), "{}", texts()[0]);
}

#[test]
fn copies_and_frees_are_operations_of_their_stream() {
    let _session = Session::new(&[]);
    let (a, b) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    let (mut p, mut q, mut r) = (0, 0, 0);
    unsafe {
        for address in [&raw mut p, &raw mut q, &raw mut r] {
            assert_eq!(cuMemAllocAsync(address, 64, a), OK);
        }
        assert_eq!(cuMemcpyHtoDAsync_v2(p, [1u8; 64].as_ptr().cast(), 64, a), OK);
        silent();
        // Allocated on a, used on b.
        assert_eq!(cuMemsetD8Async(q, 0, 64, b), OK);
        found_one("StreamOrder: memset of 64 bytes");
        assert!(texts()[0].contains("allocation of 64 bytes"), "{}", texts()[0]);
        emu_clear_errors();
        assert_eq!(cuMemcpyDtoDAsync_v2(r, p, 64, b), OK);
        assert_eq!(findings().len(), 2, "{:?}", findings());
        emu_clear_errors();
        // Written on a, freed on b.
        assert_eq!(cuMemFreeAsync(p, b), 719);
        found_one("StreamOrder: free of 64 bytes");
        emu_clear_errors();
        // cuMemFree waits for everything.
        assert_eq!(cuMemFree_v2(q), OK);
        assert_eq!(cuMemFree_v2(r), OK);
    }
    silent();
}

#[test]
fn a_copy_to_pageable_memory_is_waited_for_and_one_to_pinned_memory_is_not() {
    for pinned in [false, true] {
        let _session = Session::new(&[]);
        let (a, b) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
        let device = upload(&[3; 16]);
        let mut pageable = [0u32; 16];
        let mut locked = null_mut();
        unsafe {
            assert_eq!(cuMemHostAlloc(&raw mut locked, 64, 0), OK);
            let target = if pinned { locked } else { pageable.as_mut_ptr().cast() };
            assert_eq!(cuMemcpyDtoHAsync_v2(target, device, 64, a), OK);
            assert_eq!(target.cast::<u32>().read(), 3);
            assert_eq!(cuMemsetD8Async(device, 0, 64, b), OK);
            assert_eq!(findings().len(), usize::from(pinned), "{:?}", findings());
            emu_clear_errors();
            assert_eq!(cuMemFreeHost(locked), OK);
        }
    }
}

#[test]
fn a_destroyed_stream_is_still_waited_for_by_the_context() {
    let _session = Session::new(&[]);
    let (a, b) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    two_writers(a, b, || unsafe {
        assert_eq!(cuStreamDestroy_v2(a), OK);
        assert_eq!(cuCtxSynchronize(), OK);
    });
    silent();
}

#[test]
fn the_check_can_be_switched_off() {
    let _session = Session::new(&[("EMU_CHECKS", "stream=off")]);
    two_writers(stream(NON_BLOCKING), stream(NON_BLOCKING), || {});
    silent();
}

#[test]
fn events_measure_modelled_time() {
    let _session = Session::new(&[]);
    let (start, end, untimed, never) = (event(0), event(0), event(DISABLE_TIMING), event(0));
    let m = module(PTX);
    let s = stream(NON_BLOCKING);
    let buffer = alloc(4 * 1024);
    let mut ms = -1.0;
    unsafe {
        assert_eq!(cuEventRecord(start, s), OK);
        assert_eq!(launch(function(m, "fill"), 4, 256, s, &[U64(buffer), U32(1)]), OK);
        assert_eq!(launch(function(m, "fill"), 4, 256, s, &[U64(buffer), U32(1)]), OK);
        assert_eq!(cuEventRecord(end, s), OK);
        assert_eq!(cuEventRecord(untimed, s), OK);
        assert_eq!(cuEventSynchronize(end), OK);
        assert_eq!(cuEventElapsedTime(&raw mut ms, start, end), OK);
        // Two launches of at least 2 us each.
        assert!((0.004..0.1).contains(&ms), "{ms}");
        assert_eq!(cuEventElapsedTime(&raw mut ms, end, start), OK);
        assert!(ms < 0.0);
        assert_eq!(cuEventElapsedTime(&raw mut ms, start, untimed), INVALID_HANDLE);
        assert_eq!(cuEventElapsedTime(&raw mut ms, never, end), INVALID_HANDLE);
        assert_eq!(cuEventElapsedTime(null_mut(), start, end), INVALID_VALUE);
        // Never recorded: nothing to wait for.
        assert_eq!(cuEventSynchronize(never), OK);
        assert_eq!(cuStreamWaitEvent(s, never, 0), OK);
    }
    silent();
}

#[test]
fn streams_keep_flags_and_priorities() {
    let _session = Session::new(&[]);
    let mut s = null_mut();
    let (mut priority, mut flags) = (9, 9);
    unsafe {
        assert_eq!(cuStreamCreateWithPriority(&raw mut s, NON_BLOCKING, -100), OK);
        assert_eq!(cuStreamGetPriority(s, &raw mut priority), OK);
        assert_eq!(cuStreamGetFlags(s, &raw mut flags), OK);
        assert_eq!((priority, flags), (-5, NON_BLOCKING));
        assert_eq!(cuStreamCreate(&raw mut s, 2), INVALID_VALUE);
        assert_eq!(cuStreamDestroy_v2(null_mut()), INVALID_VALUE);
    }
}

#[test]
fn functions_of_the_host_run_in_order_and_must_not_call_the_driver() {
    unsafe extern "C" fn call(user: *mut c_void) {
        let seen = user.cast::<i32>();
        unsafe { seen.write(cuCtxSynchronize()) };
    }
    let _session = Session::new(&[]);
    let mut seen = -1;
    unsafe {
        assert_eq!(cuLaunchHostFunc(stream(NON_BLOCKING), Some(call), (&raw mut seen).cast()), OK);
        assert_eq!(seen, 800);
        assert_eq!(cuLaunchHostFunc(null_mut(), None, null_mut()), INVALID_VALUE);
        assert_eq!(cuCtxSynchronize(), OK);
    }
}
