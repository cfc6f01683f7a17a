//! Modules, functions, launches, faults, and calls nobody should make.
#![allow(clippy::cast_ptr_alignment, clippy::used_underscore_binding, reason = "tests say it the short way")]
// SAFETY of every call in this file: pointers are to live locals of the sizes given, or are wrong on purpose in a way that the driver
// must answer with an error code without following them.
#![allow(clippy::undocumented_unsafe_blocks, reason = "stated above, once for all calls")]

mod driver;

use driver::Value::{U32, U64};
use driver::*;
use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut, without_provenance_mut};

#[test]
fn each_load_has_variables_of_its_own() {
    let _session = Session::new(&[]);
    let (a, b) = (module(PTX), module(PTX));
    let global = |m| {
        let (mut address, mut bytes) = (0, 0);
        assert_eq!(
            unsafe { cuModuleGetGlobal_v2(&raw mut address, &raw mut bytes, m, text("counter").as_ptr()) },
            OK
        );
        assert_eq!(bytes, 4);
        address
    };
    let (x, y) = (global(a), global(b));
    assert_ne!(x, y);
    let count = function(a, "count");
    assert_eq!(count, function(a, "count"));
    for _ in 0..3 {
        assert_eq!(launch(count, 1, 1, null_mut(), &[]), OK);
    }
    assert_eq!((download(x, 1), download(y, 1)), (vec![10], vec![7]));
    let mut f = null_mut();
    unsafe {
        assert_eq!(cuModuleGetFunction(&raw mut f, a, text("nothing").as_ptr()), 500);
        assert_eq!(cuModuleGetGlobal_v2(&mut 0, null_mut(), a, text("nothing").as_ptr()), 500);
        assert_eq!(cuModuleUnload(a), OK);
        assert_eq!(cuModuleUnload(a), INVALID_HANDLE);
        assert_eq!(launch(count, 1, 1, null_mut(), &[]), INVALID_HANDLE);
        assert_eq!(cuModuleGetFunction(&raw mut f, a, text("count").as_ptr()), INVALID_HANDLE);
        silent();
        // Its variables are gone, the other module's are not.
        assert_eq!(cuMemcpyDtoH_v2((&raw mut f).cast(), x, 4), INVALID_VALUE);
    }
    assert_eq!(download(y, 1), [7]);
}

#[test]
fn images_that_cannot_be_loaded_say_why() {
    let _session = Session::new(&[]);
    let mut m = null_mut();
    let mut load = |bytes: &[u8]| unsafe {
        emu_clear_errors();
        cuModuleLoadData(&raw mut m, bytes.as_ptr().cast())
    };
    assert_eq!(load(b"\x7fELF\x02\x01\x01\0"), 200);
    found_one("Invalid module: ");
    assert!(texts()[0].contains("-gencode arch=compute_80,code=compute_80"), "{}", texts()[0]);
    let wrong = b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n    frobnicate.s32;\n    ret;\n}\n\0";
    assert_eq!(load(wrong), 218);
    found_one("Invalid module: ptx line 6");
    assert_eq!(load(b"int main() { return 0; }\0"), 218);
    assert_eq!(load(b".version 8.0\n.target sm_90\n.address_size 64\n\0"), 209);
    assert!(texts()[0].contains("EMU_DEVICE"), "{}", texts()[0]);
    assert_eq!(load(b"\x50\xed\x55\xba\x01\0\x10\0\xff\xff\xff\xff\xff\xff\xff\xff"), 200);
    unsafe {
        assert_eq!(cuModuleLoadData(&raw mut m, null()), INVALID_VALUE);
        assert_eq!(cuModuleLoadData(null_mut(), text(PTX).as_ptr().cast()), INVALID_VALUE);
        // A refused image is no failure of the device.
        assert_eq!(cuCtxSynchronize(), OK);
    }
}

#[test]
fn a_driver_knows_the_ptx_of_its_own_time() {
    for (driver, version, known, unknown) in
        [("12.4", 12_040, "8.4", "8.5"), ("12.8", 12_080, "8.7", "8.8"), ("13", 13_000, "9.0", "9.1")]
    {
        let _session = Session::new(&[("EMU_DRIVER", driver)]);
        let load = |ptx: &str| {
            let mut m = null_mut();
            let image = text(&format!(".version {ptx}\n.target sm_80\n.address_size 64\n"));
            unsafe { cuModuleLoadData(&raw mut m, image.as_ptr().cast()) }
        };
        let mut reported = 0;
        assert_eq!((unsafe { cuDriverGetVersion(&raw mut reported) }, reported), (OK, version));
        assert_eq!((load(known), load(unknown)), (OK, 222));
        assert!(texts()[0].contains("EMU_DRIVER"), "{}", texts()[0]);
        unsafe { emu_clear_errors() };
    }
}

#[test]
fn files() {
    let _session = Session::new(&[]);
    let mut m = null_mut();
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("driver_modules.ptx");
    std::fs::write(&path, PTX).unwrap();
    let fatbin = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fatbins/stored.fatbin");
    let cubin = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fatbins/elf.fatbin");
    unsafe {
        assert_eq!(cuModuleLoad(&raw mut m, text(path.to_str().unwrap()).as_ptr()), OK);
        function(m, "fill");
        assert_eq!(cuModuleLoad(&raw mut m, text(fatbin).as_ptr()), OK);
        silent();
        assert_eq!(cuModuleLoad(&raw mut m, text(cubin).as_ptr()), 200);
        assert_eq!(cuModuleLoad(&raw mut m, text("/nowhere/at/all").as_ptr()), 301);
        assert_eq!(cuModuleLoad(&raw mut m, null()), INVALID_VALUE);
        let bytes = std::fs::read(fatbin).unwrap();
        assert_eq!(cuModuleLoadData(&raw mut m, bytes.as_ptr().cast()), OK);
    }
}

#[test]
fn libraries_are_modules() {
    let _session = Session::new(&[]);
    let (mut library, mut kernel, mut f) = (null_mut(), null_mut(), null_mut());
    let p = upload(&[0]);
    unsafe {
        let image = text(PTX);
        let code =
            cuLibraryLoadData(&raw mut library, image.as_ptr().cast(), null(), null(), 0, null(), null(), 0);
        assert_eq!(code, OK);
        assert_eq!(cuLibraryGetKernel(&raw mut kernel, library, text("fill").as_ptr()), OK);
        assert_eq!(cuKernelGetFunction(&raw mut f, kernel), OK);
        assert_eq!(launch(f, 1, 1, null_mut(), &[U64(p), U32(4)]), OK);
        assert_eq!(launch(kernel, 1, 1, null_mut(), &[U64(p), U32(5)]), OK);
        assert_eq!(download(p, 1), [5]);
        assert_eq!(cuLibraryUnload(library), OK);
        assert_eq!(launch(f, 1, 1, null_mut(), &[U64(p), U32(4)]), INVALID_HANDLE);
    }
}

#[test]
fn device_attributes() {
    for (device, major, sms, per_sm, opt_in) in
        [("sm_80", 8, 108, 167_936, 166_912), ("sm_90", 9, 132, 233_472, 232_448)]
    {
        let _session = Session::new(&[("EMU_DEVICE", device)]);
        let attribute = |n| {
            let mut value = -1;
            assert_eq!(unsafe { cuDeviceGetAttribute(&raw mut value, n, 0) }, OK);
            value
        };
        let expected = [
            (1, 1024),
            (2, 1024),
            (3, 1024),
            (4, 64),
            (5, 2_147_483_647),
            (6, 65535),
            (7, 65535),
            (8, 49152),
            (10, 32),
            (12, 65536),
            (16, sms),
            (39, 2048),
            (75, major),
            (76, 0),
            (81, per_sm),
            (82, 65536),
            (97, opt_in),
            (106, 32),
            (115, 1),
            (12345, 0),
            (-1, 0),
        ];
        for (n, value) in expected {
            assert_eq!(attribute(n), value, "attribute {n}");
        }
        unsafe { assert_eq!(cuDeviceGetAttribute(&mut 0, 1, 1), 101) };
        let mut name = [0u8; 8];
        unsafe { assert_eq!(cuDeviceGetName(name.as_mut_ptr().cast(), 8, 0), OK) };
        assert_eq!(&name, b"foveate\0");
    }
}

#[test]
fn function_attributes_and_occupancy() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let (fill, shared) = (function(m, "fill"), function(m, "shared"));
    let attribute = |f, n| {
        let mut value = -1;
        assert_eq!(unsafe { cuFuncGetAttribute(&raw mut value, n, f) }, OK);
        value
    };
    assert_eq!((attribute(fill, 0), attribute(fill, 1)), (1024, 0));
    assert_eq!((attribute(shared, 0), attribute(shared, 1)), (128, 1000));
    assert_eq!((attribute(fill, 5), attribute(fill, 6)), (80, 80));
    assert!((1..=255).contains(&attribute(fill, 4)));
    unsafe {
        // 166912 bytes are the most a block can have, static ones included.
        assert_eq!(cuFuncSetAttribute(fill, 8, 166_913), INVALID_VALUE);
        assert_eq!(cuFuncSetAttribute(fill, 8, -1), INVALID_VALUE);
        assert_eq!(cuFuncSetAttribute(fill, 8, 166_912), OK);
        assert_eq!(attribute(fill, 8), 166_912);
        assert_eq!(cuFuncSetAttribute(shared, 8, 166_912 - 999), INVALID_VALUE);
        assert_eq!(cuFuncSetAttribute(shared, 8, 165_000), OK);
        assert_eq!(cuFuncSetAttribute(shared, 99, 0), INVALID_VALUE);
        emu_clear_errors();
        let active = |f, threads, dynamic| {
            let mut blocks = -1;
            assert_eq!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&raw mut blocks, f, threads, dynamic), OK);
            blocks
        };
        // By threads; by blocks; by shared memory, of which 1 KiB a block is the system's.
        assert_eq!(active(fill, 1024, 0), 2);
        assert_eq!(active(fill, 32, 0), 32);
        assert_eq!(active(fill, 32, 40_000), 4);
        assert_eq!(active(fill, 32, 166_912), 1);
        assert_eq!(active(fill, 32, 170_000), 0);
        assert_eq!(active(shared, 256, 0), 0);
        let (mut grid, mut block) = (0, 0);
        assert_eq!(cuOccupancyMaxPotentialBlockSize(&raw mut grid, &raw mut block, fill, None, 0, 0), OK);
        assert_eq!((grid, block), (216, 1024));
        assert_eq!(cuOccupancyMaxPotentialBlockSize(&raw mut grid, &raw mut block, fill, None, 0, 100), OK);
        // 32 blocks of 64 threads are more than 21 of 96.
        assert_eq!((grid, block), (32 * 108, 64));
        assert_eq!(
            cuOccupancyMaxPotentialBlockSize(&raw mut grid, &raw mut block, m, None, 0, 0),
            INVALID_HANDLE
        );
    }
    silent();
}

#[test]
fn launches_that_cannot_be() {
    let _session = Session::new(&[("EMU_CHECKS", "misuse=off")]);
    let m = module(PTX);
    let (fill, shared) = (function(m, "fill"), function(m, "shared"));
    let p = upload(&[0; 1024]);
    let (address, value) = (p, 1u32);
    let values: [*const c_void; 2] = [(&raw const address).cast(), (&raw const value).cast()];
    let go = |f, grid: [u32; 3], block: [u32; 3], bytes| unsafe {
        cuLaunchKernel(
            f,
            grid[0],
            grid[1],
            grid[2],
            block[0],
            block[1],
            block[2],
            bytes,
            null_mut(),
            values.as_ptr(),
            null(),
        )
    };
    assert_eq!(go(fill, [1, 1, 1], [1024, 1, 1], 0), OK);
    for (grid, block) in [
        ([0, 1, 1], [1, 1, 1]),
        ([1, 0, 1], [1, 1, 1]),
        ([1, 1, 1], [1, 1, 0]),
        ([1 << 31, 1, 1], [1, 1, 1]),
        ([1, 65536, 1], [1, 1, 1]),
        ([1, 1, 65536], [1, 1, 1]),
        ([1, 1, 1], [1025, 1, 1]),
        ([1, 1, 1], [1, 1, 65]),
        ([1, 1, 1], [32, 33, 1]),
        ([1, 1, 1], [u32::MAX, u32::MAX, u32::MAX]),
    ] {
        assert_eq!(go(fill, grid, block, 0), INVALID_VALUE, "{grid:?} {block:?}");
    }
    // .maxntid 128
    assert_eq!(go(shared, [1, 1, 1], [128, 1, 1], 0), OK);
    assert_eq!(go(shared, [1, 1, 1], [129, 1, 1], 0), INVALID_VALUE);
    assert_eq!(go(fill, [1, 1, 1], [1, 1, 1], 49153), INVALID_VALUE);
    unsafe { assert_eq!(cuFuncSetAttribute(fill, 8, 50_000), OK) };
    assert_eq!(go(fill, [1, 1, 1], [1, 1, 1], 50_000), OK);
    assert_eq!(go(fill, [1, 1, 1], [1, 1, 1], 50_001), INVALID_VALUE);
    // Static and dynamic together.
    assert_eq!(go(shared, [1, 1, 1], [1, 1, 1], 48_000), OK);
    assert_eq!(go(shared, [1, 1, 1], [1, 1, 1], 49_000), INVALID_VALUE);
    unsafe {
        let null_value: [*const c_void; 2] = [null(), values[1]];
        let one = |params: *const *const c_void, extra: *const *const c_void| {
            cuLaunchKernel(fill, 1, 1, 1, 1, 1, 1, 0, null_mut(), params, extra)
        };
        assert_eq!(one(null(), null()), INVALID_VALUE);
        assert_eq!(one(null_value.as_ptr(), null()), INVALID_VALUE);
        assert_eq!(one(values.as_ptr(), values.as_ptr()), 801);
        let cooperative = |blocks| {
            cuLaunchCooperativeKernel(fill, blocks, 1, 1, 1024, 1, 1, 0, null_mut(), values.as_ptr())
        };
        // Two blocks of 1024 threads on each of 108 multiprocessors.
        assert_eq!(cooperative(217), 720);
        assert_eq!(cuCtxSynchronize(), OK);
    }
    silent();
}

#[test]
fn a_fault_stays() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let (fill, broken) = (function(m, "fill"), function(m, "broken"));
    let p = upload(&[0; 4]);
    let mut code = null_mut();
    for (f, address, expected) in [(broken, 0, 719), (fill, p + 2, 716), (fill, 0, 700), (fill, p + 16, 700)]
    {
        unsafe {
            // The launch itself succeeds, every later call fails, also on other threads, until the error is cleared.
            let values: &[Value] = if expected == 719 { &[] } else { &[U64(address), U32(1)] };
            assert_eq!(launch(f, 1, 1, null_mut(), values), OK);
            assert_eq!(cuCtxSynchronize(), expected);
            assert_eq!(cuMemAlloc_v2(&mut 0, 4), expected);
            assert_eq!(launch(fill, 1, 1, null_mut(), &[U64(p), U32(1)]), expected);
            assert_eq!(cuEventCreate(&raw mut code, 0), expected);
            assert_eq!(cuStreamSynchronize(null_mut()), expected);
            // The context and the texts still answer.
            assert_eq!(cuCtxGetCurrent(&raw mut code), OK);
            let mut name = null();
            assert_eq!(cuGetErrorName(expected, &raw mut name), OK);
            assert_eq!(findings().len(), 1, "{:?}", findings());
            emu_clear_errors();
            assert_eq!(cuCtxSynchronize(), OK);
        }
    }
    // What is given back after a fault is gone, although the call returns the fault.
    let s = stream(1);
    unsafe {
        assert_eq!(launch(broken, 1, 1, null_mut(), &[]), OK);
        assert_eq!(cuMemFree_v2(p), 719);
        assert_eq!(cuStreamDestroy_v2(s), 719);
        emu_clear_errors();
        assert_eq!(cuMemFree_v2(p), INVALID_VALUE);
        assert_eq!(cuStreamSynchronize(s), INVALID_HANDLE);
    }
}

#[test]
fn a_kernel_that_does_not_end_is_stopped() {
    let _session = Session::new(&[("EMU_BUDGET", "100K")]);
    let m = module(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry spin()\n{\nL:\n    bra.uni L;\n}\n\
         .visible .entry nothing()\n{\n    ret;\n}\n",
    );
    assert_eq!(launch(function(m, "spin"), 1, 32, null_mut(), &[]), OK);
    assert_eq!(unsafe { cuCtxSynchronize() }, 702);
    unsafe { emu_clear_errors() };
    // The largest grid there is would run for ever too.
    unsafe {
        let f = function(m, "nothing");
        assert_eq!(
            cuLaunchKernel(f, 2_147_483_647, 65535, 65535, 1, 1, 1, 0, null_mut(), null(), null()),
            OK
        );
        assert_eq!(cuCtxSynchronize(), 702);
    }
}

#[test]
fn what_is_not_freed_is_a_leak() {
    let session = Session::new(&[]);
    let (p, q) = (alloc(100), alloc(200));
    unsafe {
        assert_eq!(emu_name(q, text("weights").as_ptr()), OK);
        assert_eq!(cuMemFree_v2(p), OK);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), OK);
    }
    found_one("Leak: 1 allocations of 200 bytes");
    assert!(texts()[0].contains("\"weights\""), "{}", texts()[0]);
    drop(session);
    // The next context starts with nothing, and the old memory is gone.
    let _session = Session::new(&[]);
    unsafe { assert_eq!(cuMemFree_v2(q), INVALID_VALUE) };
    // A module's variables are no leak of the program's.
    let _session = {
        drop(_session);
        Session::new(&[])
    };
    module(PTX);
    unsafe { assert_eq!(cuDevicePrimaryCtxRelease_v2(0), OK) };
    silent();
}

#[test]
fn handles_that_are_none() {
    let _session = Session::new(&[]);
    let (s, e, m) = (stream(0), event(0), module(PTX));
    let f = function(m, "count");
    let mut out = null_mut();
    let mut n = 0;
    for bad in [0x10, 0x1001, 0xdead_beef_dead_beef, usize::MAX].map(without_provenance_mut::<c_void>) {
        unsafe {
            for wrong in [bad, e, m, f] {
                assert_eq!(cuStreamSynchronize(wrong), INVALID_HANDLE);
                assert_eq!(cuStreamDestroy_v2(wrong), INVALID_HANDLE);
                assert_eq!(cuEventRecord(e, wrong), INVALID_HANDLE);
                assert_eq!(cuMemsetD8Async(0, 0, 4, wrong), INVALID_HANDLE);
                assert_eq!(cuStreamBeginCapture_v2(wrong, 0), INVALID_HANDLE);
                assert_eq!(launch(f, 1, 1, wrong, &[]), INVALID_HANDLE);
            }
            for wrong in [bad, s, m, f, null_mut()] {
                assert_eq!(cuEventRecord(wrong, s), INVALID_HANDLE);
                assert_eq!(cuEventQuery(wrong), INVALID_HANDLE);
                assert_eq!(cuEventDestroy_v2(wrong), INVALID_HANDLE);
                assert_eq!(cuStreamWaitEvent(s, wrong, 0), INVALID_HANDLE);
            }
            for wrong in [bad, s, e, f, null_mut()] {
                assert_eq!(cuModuleUnload(wrong), INVALID_HANDLE);
                assert_eq!(cuModuleGetFunction(&raw mut out, wrong, text("count").as_ptr()), INVALID_HANDLE);
            }
            for wrong in [bad, s, e, m, null_mut()] {
                assert_eq!(launch(wrong, 1, 1, s, &[]), INVALID_HANDLE);
                assert_eq!(cuFuncGetAttribute(&raw mut n, 0, wrong), INVALID_HANDLE);
                assert_eq!(cuFuncSetAttribute(wrong, 8, 0), INVALID_HANDLE);
                assert_eq!(cuGraphInstantiateWithFlags(&raw mut out, wrong, 0), INVALID_HANDLE);
                assert_eq!(cuGraphLaunch(wrong, s), INVALID_HANDLE);
                assert_eq!(cuGraphDestroy(wrong), INVALID_HANDLE);
                assert_eq!(cuGraphExecDestroy(wrong), INVALID_HANDLE);
            }
            assert_eq!(cuCtxSetCurrent(bad), 201);
            assert_eq!(cuCtxDestroy_v2(bad), 201);
        }
    }
    // Nowhere to write to.
    unsafe {
        for code in [
            cuMemAlloc_v2(null_mut(), 4),
            cuMemAllocAsync(null_mut(), 4, s),
            cuMemHostAlloc(null_mut(), 4, 0),
            cuMemAllocManaged(null_mut(), 4, 1),
            cuStreamCreate(null_mut(), 0),
            cuEventCreate(null_mut(), 0),
            cuModuleGetFunction(null_mut(), m, text("count").as_ptr()),
            cuModuleGetFunction(&raw mut out, m, null()),
            cuFuncGetAttribute(null_mut(), 0, f),
            cuDeviceGetAttribute(null_mut(), 1, 0),
            cuDeviceGetCount(null_mut()),
            cuCtxGetCurrent(null_mut()),
            cuDevicePrimaryCtxRetain(null_mut(), 0),
            cuStreamEndCapture(s, null_mut()),
            cuStreamIsCapturing(s, null_mut()),
            cuGraphInstantiateWithFlags(null_mut(), m, 0),
            cuGetErrorName(0, null_mut()),
            cuDeviceGetName(null_mut(), 8, 0),
            cuEventCreate(&raw mut out, 0xffff),
            cuMemAllocManaged(&mut 0, 4, 9),
        ] {
            assert_eq!(code, INVALID_VALUE);
        }
        assert_eq!(cuCtxGetLimit(&mut 0, 99), 215);
        // Part of the API that is left out.
        assert_eq!(cuTexRefCreate(&raw mut out), 801);
    }
    silent();
}

#[test]
fn contexts_of_their_own() {
    let _session = Session::new(&[]);
    let (mut primary, mut own, mut now) = (null_mut(), null_mut(), null_mut());
    unsafe {
        assert_eq!(cuCtxGetCurrent(&raw mut primary), OK);
        assert_eq!(cuCtxCreate_v4(&raw mut own, null_mut(), 0, 0), OK);
        assert_eq!(cuCtxGetCurrent(&raw mut now), OK);
        assert_eq!(now, own);
        assert_eq!(cuCtxPushCurrent_v2(primary), OK);
        assert_eq!(cuCtxPopCurrent_v2(&raw mut now), OK);
        assert_eq!(now, primary);
        assert_eq!(cuCtxDestroy_v2(own), OK);
        assert_eq!(cuCtxGetCurrent(&raw mut now), OK);
        assert_eq!(now, primary);
        assert_eq!(cuCtxSetCurrent(own), 201);
    }
    silent();
}

#[test]
fn error_texts() {
    for (code, name) in [
        (0, "CUDA_SUCCESS"),
        (1, "CUDA_ERROR_INVALID_VALUE"),
        (700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        (999, "CUDA_ERROR_UNKNOWN"),
    ] {
        let (mut found, mut description) = (null(), null());
        unsafe {
            assert_eq!(cuGetErrorName(code, &raw mut found), OK);
            assert_eq!(CStr::from_ptr(found).to_str().unwrap(), name);
            assert_eq!(cuGetErrorString(code, &raw mut description), OK);
            assert!(!CStr::from_ptr(description).is_empty());
        }
    }
    let mut found = null();
    unsafe { assert_eq!(cuGetErrorName(12345, &raw mut found), INVALID_VALUE) };
    assert!(found.is_null());
}

#[test]
fn functions_are_found_by_name() {
    let _session = Session::new(&[]);
    let find = |name: &str| {
        let (mut function, mut found) = (null(), -1);
        let code =
            unsafe { cuGetProcAddress_v2(text(name).as_ptr(), &raw mut function, 13000, 0, &raw mut found) };
        (code, function, found)
    };
    assert_eq!(find("cuMemAlloc"), (OK, cuMemAlloc_v2 as *const c_void, 0));
    assert_eq!(find("cuLaunchKernel"), (OK, cuLaunchKernel as *const c_void, 0));
    assert_eq!(find("cuGraphInstantiate"), (OK, cuGraphInstantiateWithFlags as *const c_void, 0));
    assert_eq!(find("cuGetProcAddress"), (OK, cuGetProcAddress_v2 as *const c_void, 0));
    assert_eq!(find("cuTexRefCreate"), (500, null(), 1));
    assert_eq!(find(""), (INVALID_VALUE, null(), 0));
}

#[test]
fn counters_of_launches() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let p = alloc(4 * 64);
    let json = |kernel: Option<&str>| {
        let kernel = kernel.map(text);
        let name = kernel.as_ref().map_or(null(), |k| k.as_ptr());
        unsafe {
            let n = emu_counters_json(name, null_mut(), 0);
            let mut buffer = vec![0u8; n + 1];
            assert_eq!(emu_counters_json(name, buffer.as_mut_ptr().cast(), n + 1), n);
            serde_json::from_slice::<serde_json::Value>(&buffer[..n]).unwrap()
        }
    };
    assert_eq!(json(None), serde_json::json!([]));
    assert_eq!(launch(function(m, "fill"), 2, 32, null_mut(), &[U64(p), U32(1)]), OK);
    assert_eq!(launch(function(m, "count"), 1, 1, null_mut(), &[]), OK);
    assert_eq!(json(None).as_array().unwrap().len(), 2);
    let fill = json(Some("fill"));
    assert_eq!(fill[0]["kernel"], "fill");
    // Two warps of ten instructions each.
    assert_eq!(fill[0]["insts"], 20);
    assert_eq!(fill[0]["thread_insts"], 640);
    assert_eq!(json(Some("next")), serde_json::json!([]));
    unsafe { emu_reset_counters() };
    assert_eq!(json(None), serde_json::json!([]));
}

#[test]
fn settings_that_do_not_exist_are_refused() {
    let _session = Session::new(&[]);
    unsafe {
        assert_eq!(emu_set(text("EMU_COLOUR").as_ptr(), text("red").as_ptr()), INVALID_VALUE);
        assert_eq!(emu_set(text("EMU_DEVICE").as_ptr(), text("sm_1").as_ptr()), INVALID_VALUE);
        assert_eq!(emu_set(text("EMU_DRIVER").as_ptr(), text("10.2").as_ptr()), INVALID_VALUE);
        assert_eq!(emu_set(null(), text("1").as_ptr()), INVALID_VALUE);
        assert!(emu_version() >= 1);
    }
}

/// What host work saw and how often its argument was dropped.
#[derive(Default)]
struct Seen {
    runs: u32,
    drops: u32,
}

unsafe extern "C" fn double(user: *mut c_void, pointers: *const *mut u8) {
    unsafe {
        (*user.cast::<Seen>()).runs += 1;
        let (from, to) = (pointers.read().cast::<u32>(), pointers.add(1).read().cast::<u32>());
        for i in 0..4 {
            to.add(i).write(from.add(i).read() * 2);
        }
    }
}

unsafe extern "C" fn dropped(user: *mut c_void) {
    unsafe { (*user.cast::<Seen>()).drops += 1 };
}

#[test]
fn host_work_on_device_memory() {
    let _session = Session::new(&[]);
    let (from, to) = (upload(&[1, 2, 3, 4]), alloc(16));
    let s = stream(1);
    let mut seen = Seen::default();
    let user = (&raw mut seen).cast::<c_void>();
    let range = |address, bytes, write| Range { address, bytes, write, padding: 0 };
    let go = |ranges: &[Range]| unsafe {
        emu_enqueue_host(
            s,
            text("double").as_ptr(),
            Some(double),
            user,
            Some(dropped),
            ranges.as_ptr(),
            ranges.len(),
        )
    };
    unsafe {
        assert_eq!(cuCtxSynchronize(), OK);
        assert_eq!(go(&[range(from, 16, 0), range(to, 16, 1)]), OK);
        assert_eq!((seen.runs, seen.drops), (1, 1));
        // Written bytes are defined now.
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(download(to, 4), [2, 4, 6, 8]);
        silent();
        // Past the end.
        assert_eq!(go(&[range(from, 16, 0), range(to + 4, 16, 1)]), INVALID_VALUE);
        assert_eq!((seen.runs, seen.drops), (1, 2));
        found_one("Invalid host call of size 16");
        emu_clear_errors();
        // Undefined input.
        let undefined = alloc(16);
        assert_eq!(go(&[range(undefined, 16, 0), range(to, 16, 1)]), OK);
        found_one("Undefined bytes read by double: 16 of 16");
        assert_eq!(cuCtxSynchronize(), 719);
        emu_clear_errors();
        // Another stream, without order.
        assert_eq!(cuMemsetD8Async(to, 0, 16, stream(1)), OK);
        assert!(findings().iter().any(|f| f.starts_with("StreamOrder: memset")), "{:?}", findings());
        emu_clear_errors();
        assert_eq!(cuCtxSynchronize(), OK);
        // In a graph.
        let (mut graph, mut exec) = (null_mut(), null_mut());
        seen = Seen::default();
        assert_eq!(cuStreamBeginCapture_v2(s, 1), OK);
        assert_eq!(go(&[range(from, 16, 0), range(to, 16, 1)]), OK);
        assert_eq!(cuStreamEndCapture(s, &raw mut graph), OK);
        assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 0), OK);
        assert_eq!(cuGraphDestroy(graph), OK);
        assert_eq!((seen.runs, seen.drops), (0, 0));
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!(cuGraphLaunch(exec, s), OK);
        assert_eq!((seen.runs, seen.drops), (2, 0));
        assert_eq!(cuGraphExecDestroy(exec), OK);
        assert_eq!((seen.runs, seen.drops), (2, 1));
        silent();
    }
}
