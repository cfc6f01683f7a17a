//! Captures and graphs.
// SAFETY of every call in this file: pointers are to live locals of the sizes given, or are wrong on purpose in a way that the driver
// must answer with an error code without following them.
#![allow(clippy::undocumented_unsafe_blocks, reason = "stated above, once for all calls")]

mod driver;

use driver::Value::{U32, U64};
use driver::*;
use std::ffi::c_void;
use std::ptr::null_mut;

const NON_BLOCKING: u32 = 1;
const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;
const UNSUPPORTED: i32 = 900;
const INVALIDATED: i32 = 901;

/// Captures what `body` submits to a stream.
#[track_caller]
fn capture(s: Handle, body: impl FnOnce()) -> Handle {
    let mut graph = null_mut();
    assert_eq!(unsafe { cuStreamBeginCapture_v2(s, THREAD_LOCAL) }, OK);
    body();
    assert_eq!(unsafe { cuStreamEndCapture(s, &raw mut graph) }, OK);
    assert!(!graph.is_null());
    graph
}

#[track_caller]
fn instantiate(graph: Handle) -> Handle {
    let mut exec = null_mut();
    assert_eq!(unsafe { cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) }, OK);
    exec
}

fn status(s: Handle) -> i32 {
    let mut status = -1;
    assert_eq!(unsafe { cuStreamIsCapturing(s, &raw mut status) }, OK);
    status
}

#[test]
fn a_graph_keeps_parameter_values_and_uses_the_contents_that_are_there_at_its_launch() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let (fill, next) = (function(m, "fill"), function(m, "next"));
    let s = stream(NON_BLOCKING);
    let (a, b, c) = (upload(&[1; 8]), upload(&[0; 8]), upload(&[0; 8]));
    unsafe { assert_eq!(cuCtxSynchronize(), OK) };
    let mut value = 5;
    let graph = capture(s, || {
        assert_eq!(launch(next, 1, 8, s, &[U64(b), U64(a)]), OK);
        assert_eq!(launch(fill, 1, 8, s, &[U64(c), U32(value)]), OK);
        assert_eq!(status(s), 1);
    });
    value += 1;
    assert_eq!(value, 6);
    // Nothing has run.
    assert_eq!((download(b, 8), download(c, 8)), (vec![0; 8], vec![0; 8]));
    let exec = instantiate(graph);
    unsafe {
        assert_eq!(cuGraphUpload(exec, s), OK);
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!((download(b, 8), download(c, 8)), (vec![2; 8], vec![5; 8]));
        assert_eq!(cuMemcpyHtoD_v2(a, [41u32; 8].as_ptr().cast(), 32), OK);
        // What was made ready does not need the graph.
        assert_eq!(cuGraphDestroy(graph), OK);
        for _ in 0..3 {
            assert_eq!(cuGraphLaunch(exec, s), OK);
        }
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(download(b, 8), [42; 8]);
        assert_eq!(cuGraphExecDestroy(exec), OK);
        assert_eq!(cuGraphLaunch(exec, s), INVALID_HANDLE);
        assert_eq!(cuGraphDestroy(graph), INVALID_HANDLE);
    }
    silent();
}

#[test]
fn every_kind_of_node() {
    unsafe extern "C" fn add(user: *mut c_void) {
        unsafe { *user.cast::<u32>() += 1 };
    }
    let _session = Session::new(&[]);
    let m = module(PTX);
    let s = stream(NON_BLOCKING);
    let e = event(0);
    let (a, b) = (upload(&[0; 8]), upload(&[0; 8]));
    let mut calls = 0u32;
    let mut locked = null_mut();
    unsafe {
        assert_eq!(cuMemHostAlloc(&raw mut locked, 32, 0), OK);
        assert_eq!(cuCtxSynchronize(), OK);
    }
    let graph = capture(s, || unsafe {
        assert_eq!(cuMemsetD32Async(a, 9, 8, s), OK);
        assert_eq!(launch(function(m, "next"), 1, 8, s, &[U64(b), U64(a)]), OK);
        assert_eq!(cuMemcpyDtoHAsync_v2(locked, b, 32, s), OK);
        assert_eq!(cuLaunchHostFunc(s, Some(add), (&raw mut calls).cast()), OK);
        assert_eq!(cuEventRecordWithFlags(e, s, 1), OK);
        assert_eq!(cuStreamWaitEvent(s, e, 1), OK);
    });
    let mut count = 0;
    unsafe {
        assert_eq!(cuGraphGetNodes(graph, null_mut(), &raw mut count), OK);
        assert_eq!(count, 6);
        let mut nodes = vec![null_mut(); 6];
        assert_eq!(cuGraphGetNodes(graph, nodes.as_mut_ptr(), &raw mut count), OK);
        let kinds: Vec<i32> = nodes
            .iter()
            .map(|&node| {
                let mut kind = -1;
                assert_eq!(cuGraphNodeGetType(node, &raw mut kind), OK);
                kind
            })
            .collect();
        // memset, kernel, memcpy, host, event record, event wait
        assert_eq!(kinds, [2, 0, 1, 3, 7, 6]);
        assert_eq!(calls, 0);
        let exec = instantiate(graph);
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!(calls, 2);
        assert_eq!(locked.cast::<[u32; 8]>().read(), [10; 8]);
        assert_eq!(cuEventSynchronize(e), OK);
        assert_eq!(cuMemFreeHost(locked), OK);
    }
    silent();
}

#[test]
fn streams_are_forked_into_a_capture_and_joined() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let (fill, next) = (function(m, "fill"), function(m, "next"));
    let (s, t) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    let (fork, join) = (event(2), event(2));
    let (a, b, c) = (alloc(32), alloc(32), alloc(32));
    let graph = capture(s, || unsafe {
        assert_eq!(launch(fill, 1, 8, s, &[U64(a), U32(1)]), OK);
        assert_eq!(cuEventRecord(fork, s), OK);
        assert_eq!(cuStreamWaitEvent(t, fork, 0), OK);
        assert_eq!(status(t), 1);
        assert_eq!(launch(next, 1, 8, t, &[U64(b), U64(a)]), OK);
        assert_eq!(launch(next, 1, 8, s, &[U64(c), U64(a)]), OK);
        assert_eq!(cuEventRecord(join, t), OK);
        assert_eq!(cuStreamWaitEvent(s, join, 0), OK);
    });
    assert_eq!(status(t), 0);
    let exec = instantiate(graph);
    unsafe {
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!((download(b, 8), download(c, 8)), (vec![2; 8], vec![2; 8]));
        // An event that recorded in a capture tells the host nothing.
        assert_eq!(cuEventQuery(join), 907);
    }
    silent();
}

#[test]
fn branches_of_a_graph_are_not_ordered_with_each_other() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let fill = function(m, "fill");
    let (s, t) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    let (fork, join) = (event(2), event(2));
    let a = alloc(32);
    let graph = capture(s, || unsafe {
        assert_eq!(cuEventRecord(fork, s), OK);
        assert_eq!(cuStreamWaitEvent(t, fork, 0), OK);
        assert_eq!(launch(fill, 1, 8, s, &[U64(a), U32(1)]), OK);
        assert_eq!(launch(fill, 1, 8, t, &[U64(a), U32(2)]), OK);
        assert_eq!(cuEventRecord(join, t), OK);
        assert_eq!(cuStreamWaitEvent(s, join, 0), OK);
    });
    silent();
    let exec = instantiate(graph);
    assert_eq!(unsafe { cuGraphLaunch(exec, s) }, OK);
    found_one("StreamOrder: kernel fill");
}

#[test]
fn a_graph_is_an_operation_of_its_stream() {
    for ordered in [true, false] {
        let _session = Session::new(&[]);
        let m = module(PTX);
        let (s, t) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
        let a = alloc(32);
        let graph = capture(s, || {
            assert_eq!(launch(function(m, "fill"), 1, 8, s, &[U64(a), U32(1)]), OK);
        });
        let exec = instantiate(graph);
        let e = event(2);
        unsafe {
            assert_eq!(cuGraphLaunch(exec, s), OK);
            assert_eq!(cuEventRecord(e, s), OK);
            if ordered {
                assert_eq!(cuStreamWaitEvent(t, e, 0), OK);
            }
            assert_eq!(cuMemsetD8Async(a, 0, 32, t), OK);
        }
        assert_eq!(findings().is_empty(), ordered, "{:?}", findings());
    }
}

#[test]
fn a_graph_launched_into_a_capture_becomes_part_of_it() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let next = function(m, "next");
    let s = stream(NON_BLOCKING);
    let a = upload(&[0; 8]);
    unsafe { assert_eq!(cuCtxSynchronize(), OK) };
    let one = instantiate(capture(s, || {
        assert_eq!(launch(next, 1, 8, s, &[U64(a), U64(a)]), OK);
        assert_eq!(launch(next, 1, 8, s, &[U64(a), U64(a)]), OK);
    }));
    let two = instantiate(capture(s, || unsafe {
        assert_eq!(cuGraphLaunch(one, s), OK);
        assert_eq!(launch(next, 1, 8, s, &[U64(a), U64(a)]), OK);
        assert_eq!(cuGraphLaunch(one, s), OK);
    }));
    assert_eq!(download(a, 8), [0; 8]);
    assert_eq!(unsafe { cuGraphLaunch(two, s) }, OK);
    assert_eq!(unsafe { cuStreamSynchronize(s) }, OK);
    assert_eq!(download(a, 8), [5; 8]);
    silent();
}

#[test]
fn calls_that_wait_end_a_capture() {
    type Call = fn(Handle) -> i32;
    let calls: [(&str, Call, i32); 6] = [
        ("stream synchronise", |s| unsafe { cuStreamSynchronize(s) }, UNSUPPORTED),
        ("stream query", |s| unsafe { cuStreamQuery(s) }, UNSUPPORTED),
        ("context synchronise", |_| unsafe { cuCtxSynchronize() }, UNSUPPORTED),
        ("allocate", |_| unsafe { cuMemAlloc_v2(&mut 0, 4) }, UNSUPPORTED),
        ("allocate in order", |s| unsafe { cuMemAllocAsync(&mut 0, 4, s) }, UNSUPPORTED),
        (
            "isolation",
            |s| {
                let e = event(2);
                assert_eq!(unsafe { cuEventRecord(e, stream(NON_BLOCKING)) }, OK);
                unsafe { cuStreamWaitEvent(s, e, 0) }
            },
            905,
        ),
    ];
    for (name, call, code) in calls {
        let _session = Session::new(&[]);
        let m = module(PTX);
        let s = stream(NON_BLOCKING);
        let mut graph = null_mut();
        assert_eq!(unsafe { cuStreamBeginCapture_v2(s, GLOBAL) }, OK);
        assert_eq!(launch(function(m, "count"), 1, 1, s, &[]), OK);
        assert_eq!(call(s), code, "{name}");
        assert_eq!(status(s), 2, "{name}");
        assert_eq!(launch(function(m, "count"), 1, 1, s, &[]), INVALIDATED, "{name}");
        assert_eq!(unsafe { cuStreamEndCapture(s, &raw mut graph) }, INVALIDATED, "{name}");
        assert!(graph.is_null());
        // The stream is free again.
        assert_eq!(status(s), 0);
        assert_eq!(launch(function(m, "count"), 1, 1, s, &[]), OK);
        assert_eq!(unsafe { cuStreamSynchronize(s) }, OK);
    }
}

#[test]
fn relaxed_captures_and_threads_allow_more() {
    let _session = Session::new(&[]);
    let s = stream(NON_BLOCKING);
    let mut graph = null_mut();
    let mut mode = 7;
    unsafe {
        assert_eq!(cuStreamBeginCapture_v2(s, 3), INVALID_VALUE);
        assert_eq!(cuStreamBeginCapture_v2(s, RELAXED), OK);
        let p = alloc(16);
        assert_eq!(cuMemFree_v2(p), OK);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), OK);
        assert_eq!(cuGraphDestroy(graph), OK);
        // A relaxed thread may disturb a strict capture.
        assert_eq!(cuThreadExchangeStreamCaptureMode(&raw mut mode), INVALID_VALUE);
        mode = RELAXED;
        assert_eq!(cuThreadExchangeStreamCaptureMode(&raw mut mode), OK);
        assert_eq!(mode, GLOBAL);
        assert_eq!(cuStreamBeginCapture_v2(s, GLOBAL), OK);
        let p = alloc(16);
        assert_eq!(cuMemFree_v2(p), OK);
        assert_eq!(status(s), 1);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), OK);
        assert_eq!(cuThreadExchangeStreamCaptureMode(&raw mut mode), OK);
        assert_eq!(mode, RELAXED);
    }
    silent();
}

#[test]
fn captures_begin_and_end_where_they_must() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let (s, t, u) = (stream(NON_BLOCKING), stream(NON_BLOCKING), stream(NON_BLOCKING));
    let (fork, other) = (event(2), event(2));
    let mut graph = null_mut();
    unsafe {
        assert_eq!(cuStreamBeginCapture_v2(null_mut(), GLOBAL), UNSUPPORTED);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), 401);
        // Begun twice.
        assert_eq!(cuStreamBeginCapture_v2(s, GLOBAL), OK);
        assert_eq!(cuStreamBeginCapture_v2(s, GLOBAL), 401);
        // Not joined.
        assert_eq!(cuEventRecord(fork, s), OK);
        assert_eq!(cuStreamWaitEvent(t, fork, 0), OK);
        assert_eq!(launch(function(m, "count"), 1, 1, t, &[]), OK);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), 904);
        assert_eq!((status(s), status(t)), (0, 0));
        // Ended on the stream that was pulled in.
        assert_eq!(cuStreamBeginCapture_v2(s, GLOBAL), OK);
        assert_eq!(cuEventRecord(fork, s), OK);
        assert_eq!(cuStreamWaitEvent(t, fork, 0), OK);
        assert_eq!(cuStreamEndCapture(t, &raw mut graph), 903);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), INVALIDATED);
        // Two captures cannot be merged.
        assert_eq!(cuStreamBeginCapture_v2(s, GLOBAL), OK);
        assert_eq!(cuStreamBeginCapture_v2(u, GLOBAL), OK);
        assert_eq!(cuEventRecord(other, u), OK);
        assert_eq!(cuStreamWaitEvent(s, other, 0), 902);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), INVALIDATED);
        assert_eq!(cuStreamEndCapture(u, &raw mut graph), INVALIDATED);
        // On another thread.
        assert_eq!(cuStreamBeginCapture_v2(s, THREAD_LOCAL), OK);
        let mut context = null_mut();
        assert_eq!(cuCtxGetCurrent(&raw mut context), OK);
        let (context, stream) = (context.addr(), s.addr());
        let code = std::thread::spawn(move || {
            let mut graph = null_mut();
            assert_eq!(cuCtxSetCurrent(std::ptr::without_provenance_mut(context)), OK);
            cuStreamEndCapture(std::ptr::without_provenance_mut(stream), &raw mut graph)
        });
        assert_eq!(code.join().unwrap(), 908);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), OK);
    }
}

#[test]
fn the_default_stream_cannot_wait_for_a_capture() {
    let _session = Session::new(&[]);
    let s = stream(0);
    let p = alloc(4);
    let mut graph = null_mut();
    unsafe {
        assert_eq!(cuStreamBeginCapture_v2(s, RELAXED), OK);
        assert_eq!(cuMemsetD8Async(p, 0, 4, null_mut()), 906);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), INVALIDATED);
        // A non-blocking stream is no concern of the default stream.
        let s = stream(NON_BLOCKING);
        assert_eq!(cuStreamBeginCapture_v2(s, RELAXED), OK);
        assert_eq!(cuMemsetD8Async(p, 0, 4, null_mut()), OK);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), OK);
    }
}

#[test]
fn an_event_that_never_recorded_orders_nothing_in_a_capture() {
    let _session = Session::new(&[]);
    let s = stream(NON_BLOCKING);
    let e = event(2);
    capture(s, || assert_eq!(unsafe { cuStreamWaitEvent(s, e, 0) }, OK));
    silent();
}

#[test]
fn what_a_graph_needs_must_still_be_there() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let s = stream(NON_BLOCKING);
    let (a, b) = (alloc(32), alloc(32));
    let kernel = instantiate(capture(s, || {
        assert_eq!(launch(function(m, "fill"), 1, 8, s, &[U64(a), U32(1)]), OK);
    }));
    let memset = instantiate(capture(s, || assert_eq!(unsafe { cuMemsetD8Async(b, 1, 32, s) }, OK)));
    unsafe {
        assert_eq!(cuMemFree_v2(b), OK);
        assert_eq!(cuGraphLaunch(memset, s), INVALID_VALUE);
        found_one("Invalid host write");
        assert!(texts()[0].contains("freed"), "{}", texts()[0]);
        assert_eq!(cuModuleUnload(m), OK);
        assert_eq!(cuGraphLaunch(kernel, s), INVALID_HANDLE);
    }
}

#[test]
fn instantiation_flags() {
    let _session = Session::new(&[]);
    let s = stream(NON_BLOCKING);
    let graph = capture(s, || {});
    let mut exec = null_mut();
    unsafe {
        for flags in [0, 1, 2, 8, 9] {
            assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, graph, flags), OK, "{flags}");
        }
        // An empty graph can be launched.
        assert_eq!(cuGraphLaunch(exec, s), OK);
        // Launch from the device.
        assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 4), INVALID_VALUE);
        assert!(exec.is_null());
        assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 1 << 40), INVALID_VALUE);
        assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, s, 0), INVALID_HANDLE);
    }
}

#[test]
fn a_fault_in_a_graph_stops_it() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let s = stream(NON_BLOCKING);
    let a = upload(&[0; 8]);
    unsafe { assert_eq!(cuCtxSynchronize(), OK) };
    let exec = instantiate(capture(s, || {
        assert_eq!(launch(function(m, "broken"), 1, 1, s, &[]), OK);
        assert_eq!(launch(function(m, "fill"), 1, 8, s, &[U64(a), U32(1)]), OK);
    }));
    unsafe {
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!(cuStreamSynchronize(s), 719);
        assert_eq!(cuGraphLaunch(exec, s), 719);
        emu_clear_errors();
    }
    assert_eq!(download(a, 8), [0; 8]);
}
