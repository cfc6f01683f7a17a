//! The C interface: attributes, statuses, what is refused, and work that a graph replays.

mod common;

use std::{
    ffi::{CStr, c_void},
    process::Command,
    ptr,
};

use common::*;

const NOT_INITIALIZED: i32 = 1;
const INVALID_VALUE: i32 = 7;
const EXECUTION_FAILED: i32 = 13;
const NOT_SUPPORTED: i32 = 15;

/// A 2 x 2 product of f32 that works, to be spoilt.
struct Small {
    buffers: [Vec<f32>; 4],
    call: Call,
}

impl Small {
    fn new() -> Self {
        let mut buffers =
            [vec![1.0, 2.0, 3.0, 4.0], vec![1.0, 0.0, 0.0, 1.0], vec![10.0; 4], vec![f32::NAN; 4]];
        let data = buffers.each_mut().map(|buffer| buffer.as_mut_ptr().expose_provenance());
        let layouts = std::array::from_fn(|_| layout(0, 2, 2, 2));
        let call = Call {
            library: library(),
            description: description(68, 0),
            layouts,
            data,
            alpha: 1.0,
            beta: 0.0,
        };
        Self { buffers, call }
    }
}

#[test]
fn a_product_works_and_its_objects_end_once() {
    let small = Small::new();
    assert_eq!(small.call.matmul(), 0);
    assert_eq!(small.buffers[3], [1.0, 2.0, 3.0, 4.0]);
    for layout in small.call.layouts {
        assert_eq!(cublasLtMatrixLayoutDestroy(layout), 0);
        assert_eq!(cublasLtMatrixLayoutDestroy(layout), INVALID_VALUE);
    }
    assert_eq!(small.call.matmul(), INVALID_VALUE, "the layouts are gone");
    assert_eq!(cublasLtMatmulDescDestroy(small.call.library), INVALID_VALUE, "a handle of another kind");
    assert_eq!(cublasLtMatmulDescDestroy(small.call.description), 0);
    assert_eq!(cublasLtDestroy(small.call.library), 0);
    assert_eq!(cublasLtDestroy(small.call.library), NOT_INITIALIZED);
    assert_eq!(cublasLtDestroy(ptr::null_mut()), NOT_INITIALIZED);
}

#[test]
fn null_and_wild_pointers_are_refused() {
    // SAFETY: null is what these calls are here to refuse.
    unsafe {
        assert_eq!(cublasLtCreate(ptr::null_mut()), INVALID_VALUE);
        assert_eq!(cublasLtMatrixLayoutCreate(ptr::null_mut(), 0, 1, 1, 1), INVALID_VALUE);
        assert_eq!(cublasLtMatmulDescCreate(ptr::null_mut(), 68, 0), INVALID_VALUE);
        assert_eq!(cublasLtMatmulPreferenceCreate(ptr::null_mut()), INVALID_VALUE);
    }
    let wild = ptr::without_provenance_mut(0xDEAD_BEEF);
    for bad in [ptr::null_mut(), wild] {
        assert_eq!(set_layout(bad, 1, 0i32), INVALID_VALUE);
        assert_eq!(Call { library: bad, ..Small::new().call }.matmul(), NOT_INITIALIZED);
        assert_eq!(Call { description: bad, ..Small::new().call }.matmul(), INVALID_VALUE);
        for i in 0..4 {
            let mut small = Small::new();
            small.call.layouts[i] = bad;
            assert_eq!(small.call.matmul(), INVALID_VALUE);
        }
    }
    for (i, expected) in [(0, INVALID_VALUE), (1, INVALID_VALUE), (2, 0), (3, INVALID_VALUE)] {
        let mut small = Small::new();
        small.call.data[i] = 0;
        assert_eq!(small.call.matmul(), expected, "C is not read when beta is zero; matrix {i}");
    }
    let mut small = Small::new();
    small.call.data[2] = 0;
    assert_eq!(Call { beta: 1.0, ..small.call }.matmul(), INVALID_VALUE);
}

#[test]
fn attributes_have_the_sizes_and_defaults_of_the_manual() {
    let object = layout(2, 3, 5, 7);
    let (mut value, mut size) = ([0xAAu8; 8], 0);
    let read = |attribute, place: *mut c_void, bytes, size: &mut usize| {
        // SAFETY: the place has this many bytes.
        unsafe { cublasLtMatrixLayoutGetAttribute(object, attribute, place, bytes, &raw mut *size) }
    };
    for (attribute, expected_size, expected) in
        [(0, 4, 2), (2, 8, 3), (3, 8, 5), (4, 8, 7), (5, 4, 1), (6, 8, 0)]
    {
        assert_eq!(read(attribute, ptr::null_mut(), 0, &mut size), 0);
        assert_eq!(size, expected_size);
        assert_eq!(
            read(attribute, value.as_mut_ptr().cast(), 3, &mut size),
            INVALID_VALUE,
            "too little place"
        );
        value = [0; 8];
        assert_eq!(read(attribute, value.as_mut_ptr().cast(), 8, &mut size), 0);
        assert_eq!(u64::from_le_bytes(value), expected);
    }
    assert_eq!(set_layout(object, 5, 2i64), INVALID_VALUE, "the batch count has four bytes");
    assert_eq!(set_layout(object, 99, 2i32), INVALID_VALUE, "no such attribute");
    assert_eq!(set_layout(object, 5, 2i32), 0);
    assert_eq!(set_layout(object, 5, [0u8; 16]), INVALID_VALUE, "larger than any attribute");
    // SAFETY: null is refused.
    assert_eq!(unsafe { cublasLtMatrixLayoutSetAttribute(object, 5, ptr::null(), 4) }, INVALID_VALUE);
    let product = description(68, 0);
    for (attribute, result) in [(3, 0), (4, 0), (5, 0), (7, 0), (9, INVALID_VALUE), (26, 0)] {
        assert_eq!(set_description(product, attribute, 1i32), result, "attribute {attribute}");
    }
    assert_eq!(set_description(product, 8, 16u64), 0);
    assert_eq!(set_description(product, 8, 16u32), INVALID_VALUE);
}

fn spoilt(attribute: u32, value: i32) -> i32 {
    let small = Small::new();
    assert_eq!(set_description(small.call.description, attribute, value), 0);
    small.call.matmul()
}

#[test]
fn what_is_not_computed_is_not_supported() {
    for epilogue in [0, 130, 134, 152, 160, 164, 208, 256, 512, -1] {
        assert_eq!(spoilt(7, epilogue), NOT_SUPPORTED, "epilogue {epilogue}");
    }
    for (attribute, value) in [(5, 1), (2, 1), (6, 0), (1, 1), (0, 64), (0, 70), (0, 72), (0, 74)] {
        assert_eq!(spoilt(attribute, value), NOT_SUPPORTED, "attribute {attribute} = {value}");
    }
    assert_eq!(spoilt(3, 3), INVALID_VALUE, "no such operation");
    let small = Small::new();
    assert_eq!(set_description(small.call.description, 11, 64u64), 0);
    assert_eq!(small.call.matmul(), NOT_SUPPORTED, "an auxiliary buffer");
    for kind in [1, 3, 4, 28] {
        let mut small = Small::new();
        small.call.layouts[0] = layout(kind, 2, 2, 2);
        assert_eq!(small.call.matmul(), NOT_SUPPORTED, "type {kind}");
    }
    for kinds in [[0, 2, 0, 0], [2, 14, 2, 2], [0, 0, 2, 2], [2, 2, 14, 14], [2, 2, 2, 0]] {
        let mut small = Small::new();
        small.call.layouts = kinds.map(|kind| layout(kind, 2, 2, 2));
        assert_eq!(small.call.matmul(), NOT_SUPPORTED, "types {kinds:?}");
    }
    let mut small = Small::new();
    small.call.layouts = [2, 2, 2, 2].map(|kind| layout(kind, 2, 2, 2));
    small.call.description = description(77, 0);
    assert_eq!(small.call.matmul(), NOT_SUPPORTED, "TF32 of f16");
    let small = Small::new();
    assert_eq!(set_layout(small.call.layouts[1], 1, 2i32), 0);
    assert_eq!(small.call.matmul(), NOT_SUPPORTED, "a tiled order");
}

#[test]
fn contradictions_are_invalid() {
    let with = |i: usize, rows, columns, leading| {
        let mut small = Small::new();
        small.call.layouts[i] = layout(0, rows, columns, leading);
        small.call.matmul()
    };
    for i in 0..4 {
        assert_eq!(with(i, 2, 2, 1), INVALID_VALUE, "a leading dimension below the rows, matrix {i}");
        assert_eq!(with(i, 2, 2, -2), INVALID_VALUE, "a negative one, matrix {i}");
        assert_eq!(with(i, 3, 2, 3), INVALID_VALUE, "too many rows, matrix {i}");
        assert_eq!(with(i, 2, 3, 2), INVALID_VALUE, "too many columns, matrix {i}");
        assert_eq!(with(i, 0, 2, 2), INVALID_VALUE, "no rows, matrix {i}");
        assert_eq!(with(i, u64::MAX, 2, i64::MAX), INVALID_VALUE, "an absurd size, matrix {i}");
        let mut small = Small::new();
        small.call.data[i] += 2;
        let beta = 1.0;
        assert_eq!(Call { beta, ..small.call }.matmul(), INVALID_VALUE, "half an element off, matrix {i}");
        let small = Small::new();
        assert_eq!(set_layout(small.call.layouts[i], 5, 2i32), 0);
        assert_eq!(small.call.matmul(), INVALID_VALUE, "batch counts differ, matrix {i}");
        let small = Small::new();
        assert_eq!(set_layout(small.call.layouts[i], 5, 0i32), 0);
        assert_eq!(small.call.matmul(), INVALID_VALUE, "an empty batch, matrix {i}");
    }
    let batched = |stride: i64| {
        let small = Small::new();
        for (i, layout) in small.call.layouts.into_iter().enumerate() {
            assert_eq!(set_layout(layout, 5, 2i32), 0);
            assert_eq!(set_layout(layout, 6, if i == 3 { stride } else { 0 }), 0);
        }
        small.call.matmul()
    };
    assert_eq!(batched(0), INVALID_VALUE, "two results in one place");
    assert_eq!(batched(3), INVALID_VALUE, "results that overlap");
    assert_eq!(batched(i64::MAX), INVALID_VALUE);
    assert_eq!(batched(i64::MIN), INVALID_VALUE);
    for i in [0, 1] {
        let mut small = Small::new();
        small.call.data[i] = small.call.data[3] + 4;
        assert_eq!(small.call.matmul(), INVALID_VALUE, "the result overlaps input {i}");
    }
    let mut small = Small::new();
    small.call.data[2] = small.call.data[3];
    assert_eq!(set_layout(small.call.layouts[2], 1, 1i32), 0);
    assert_eq!(Call { beta: 1.0, ..small.call }.matmul(), INVALID_VALUE, "in place with two layouts");
    let small = Small::new();
    assert_eq!(set_description(small.call.description, 7, 4i32), 0);
    assert_eq!(small.call.matmul(), INVALID_VALUE, "a bias at null");
    assert_eq!(set_description(small.call.description, 8, small.call.data[2] as u64), 0);
    assert_eq!(set_description(small.call.description, 26, 2i32), 0);
    assert_eq!(small.call.matmul(), NOT_SUPPORTED, "a bias of another type");
}

#[test]
fn the_heuristic_writes_one_zeroed_result() {
    let small = Small::new();
    let mut preference = ptr::null_mut();
    // SAFETY: a valid place for a handle.
    assert_eq!(unsafe { cublasLtMatmulPreferenceCreate(&raw mut preference) }, 0);
    let bytes = 1u64 << 22;
    // SAFETY: the value is alive and has eight bytes.
    let set = unsafe { cublasLtMatmulPreferenceSetAttribute(preference, 1, (&raw const bytes).cast(), 8) };
    assert_eq!(set, 0);
    let ask = |call: &Call, preference, requested, results: &mut [[u64; 12]; 2], count: &mut i32| {
        let [a, b, c, d] = call.layouts;
        // SAFETY: two results of 96 bytes have place.
        unsafe {
            cublasLtMatmulAlgoGetHeuristic(
                call.library,
                call.description,
                a,
                b,
                c,
                d,
                preference,
                requested,
                results.as_mut_ptr().cast(),
                &raw mut *count,
            )
        }
    };
    let garbage = [[u64::MAX; 12]; 2];
    let (mut results, mut count) = (garbage, 9);
    assert_eq!(ask(&small.call, preference, 0, &mut results, &mut count), INVALID_VALUE);
    assert_eq!((results, count), (garbage, 9));
    assert_eq!(ask(&small.call, ptr::null_mut(), 1, &mut results, &mut count), INVALID_VALUE);
    assert_eq!(count, 0);
    assert_eq!(ask(&small.call, preference, 2, &mut results, &mut count), 0);
    assert_eq!((results, count), ([[0; 12], garbage[1]], 1));
    assert_eq!(set_description(small.call.description, 7, 130i32), 0);
    assert_eq!(ask(&small.call, preference, 1, &mut results, &mut count), NOT_SUPPORTED);
    assert_eq!(count, 0);
    assert_eq!(cublasLtMatmulPreferenceDestroy(preference), 0);
}

#[test]
fn captured_work_runs_at_every_launch_with_the_scalars_of_the_call() {
    let mut small = Small::new();
    small.call.beta = 1.0;
    SEEN.with_borrow_mut(|seen| seen.capturing = true);
    assert_eq!(small.call.matmul(), 0);
    assert!(small.buffers[3].iter().all(|value| value.is_nan()), "nothing runs while capturing");
    // The call is over: its layouts, descriptor and scalars may end.
    for layout in small.call.layouts {
        cublasLtMatrixLayoutDestroy(layout);
    }
    cublasLtMatmulDescDestroy(small.call.description);
    let (work, user, release, ranges) = SEEN.with_borrow_mut(|seen| seen.captured.pop().unwrap());
    for i in 0..3u8 {
        small.buffers[0][0] = f32::from(i);
        run(work, user, &ranges);
        assert_eq!(small.buffers[3], [10.0 + f32::from(i), 12.0, 13.0, 14.0]);
    }
    // SAFETY: the graph ends here; a driver that releases twice does no harm either.
    unsafe {
        release(ptr::without_provenance_mut(user));
        release(ptr::without_provenance_mut(user));
    }
    small.buffers[3].fill(0.0);
    run(work, user, &ranges);
    assert_eq!(small.buffers[3], [0.0; 4], "what was released does not run");
}

#[test]
fn the_drivers_refusal_is_an_execution_failure() {
    SEEN.with_borrow_mut(|seen| seen.answer = 1);
    assert_eq!(Small::new().call.matmul(), EXECUTION_FAILED);
}

#[test]
fn versions_and_texts() {
    assert_eq!(cublasLtGetVersion(), 130_000);
    let text = |pointer| {
        // SAFETY: static C strings.
        unsafe { CStr::from_ptr(pointer) }.to_str().unwrap()
    };
    assert_eq!(text(cublasLtGetStatusName(15)), "CUBLAS_STATUS_NOT_SUPPORTED");
    assert_eq!(text(cublasLtGetStatusString(0)), "success");
    assert_eq!(text(cublasLtGetStatusName(2)), "<unknown>");
    let mut value = -1;
    // SAFETY: a valid place.
    unsafe {
        assert_eq!(cublasLtGetProperty(0, &raw mut value), 0);
        assert_eq!(value, 13);
        assert_eq!(cublasLtGetProperty(3, &raw mut value), INVALID_VALUE);
        assert_eq!(cublasLtGetProperty(0, ptr::null_mut()), INVALID_VALUE);
    }
}

/// In a process of its own, where no driver was named and none is on the library path.
#[test]
fn without_the_emulated_driver_nothing_is_computed() {
    const INNER: &str = "CUBLASLT_TEST_WITHOUT_DRIVER";
    if std::env::var_os(INNER).is_some() {
        let mut library = ptr::null_mut();
        // SAFETY: a valid place for a handle.
        assert_eq!(unsafe { cublasLtCreate(&raw mut library) }, 0);
        let mut buffer = [0.0f32; 8];
        let start = buffer.as_mut_ptr().expose_provenance();
        let data = [start, start, start, start + 16];
        let layouts = std::array::from_fn(|_| layout(0, 2, 2, 2));
        let call = Call { library, description: description(68, 0), layouts, data, alpha: 1.0, beta: 0.0 };
        assert_eq!(call.matmul(), NOT_INITIALIZED);
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "without_the_emulated_driver_nothing_is_computed", "--nocapture"])
        .env(INNER, "1")
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(
        errors.contains("cublasLtMatmul returns CUBLAS_STATUS_NOT_INITIALIZED: no emulated CUDA driver"),
        "{errors}"
    );
}
