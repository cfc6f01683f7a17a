//! A driver whose device memory is host memory, and cublasLt's objects with less typing.

use std::{
    cell::RefCell,
    ffi::{CStr, c_char, c_void},
    ptr,
};

pub(crate) use cublasLt::*;

pub(crate) type Work = unsafe extern "C" fn(*mut c_void, *const *mut u8);
pub(crate) type Release = unsafe extern "C" fn(*mut c_void);

/// What the driver was given last on this thread.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) ranges: Vec<Range>,
    pub(crate) name: String,
    pub(crate) stream: usize,
    /// Whether work is kept instead of run.
    pub(crate) capturing: bool,
    pub(crate) captured: Vec<(Work, usize, Release, Vec<Range>)>,
    /// What the driver answers.
    pub(crate) answer: i32,
}

thread_local! {
    pub(crate) static SEEN: RefCell<Seen> = RefCell::default();
}

/// Runs captured or fresh work: addresses are host pointers here.
pub(crate) fn run(work: Work, user: usize, ranges: &[Range]) {
    let pointers: Vec<*mut u8> =
        ranges.iter().map(|range| ptr::with_exposed_provenance_mut(range.address as usize)).collect();
    // SAFETY: the tests pass addresses of buffers that are alive and as large as their layouts say.
    unsafe { work(ptr::without_provenance_mut(user), pointers.as_ptr()) };
}

unsafe extern "C" fn enqueue(
    stream: *mut c_void,
    name: *const c_char,
    work: Work,
    user: *mut c_void,
    release: Release,
    ranges: *const Range,
    count: usize,
) -> i32 {
    SEEN.with_borrow_mut(|seen| {
        // SAFETY: the library passes a C string and this many ranges.
        let (name, ranges) = unsafe { (CStr::from_ptr(name), std::slice::from_raw_parts(ranges, count)) };
        name.to_str().unwrap().clone_into(&mut seen.name);
        seen.ranges = ranges.to_vec();
        seen.stream = stream.addr();
        if seen.answer != 0 {
            return seen.answer;
        }
        if seen.capturing {
            seen.captured.push((work, user.addr(), release, ranges.to_vec()));
        } else {
            run(work, user.addr(), ranges);
            // SAFETY: this is the end of this work.
            unsafe { release(user) };
        }
        0
    })
}

pub(crate) fn library() -> *mut c_void {
    use_driver(enqueue);
    let mut handle = ptr::null_mut();
    // SAFETY: a valid place for a handle.
    assert_eq!(unsafe { cublasLtCreate(&raw mut handle) }, 0);
    handle
}

pub(crate) fn layout(kind: i32, rows: u64, columns: u64, leading: i64) -> *mut c_void {
    let mut handle = ptr::null_mut();
    // SAFETY: a valid place for a handle.
    assert_eq!(unsafe { cublasLtMatrixLayoutCreate(&raw mut handle, kind, rows, columns, leading) }, 0);
    handle
}

pub(crate) fn description(compute: i32, scale: i32) -> *mut c_void {
    let mut handle = ptr::null_mut();
    // SAFETY: a valid place for a handle.
    assert_eq!(unsafe { cublasLtMatmulDescCreate(&raw mut handle, compute, scale) }, 0);
    handle
}

pub(crate) fn set_layout<T: Copy>(handle: *mut c_void, attribute: u32, value: T) -> i32 {
    // SAFETY: the value is alive and of the size given.
    unsafe { cublasLtMatrixLayoutSetAttribute(handle, attribute, (&raw const value).cast(), size_of::<T>()) }
}

pub(crate) fn set_description<T: Copy>(handle: *mut c_void, attribute: u32, value: T) -> i32 {
    // SAFETY: the value is alive and of the size given.
    unsafe { cublasLtMatmulDescSetAttribute(handle, attribute, (&raw const value).cast(), size_of::<T>()) }
}

/// A product's arguments; everything but these is fixed.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub(crate) library: *mut c_void,
    pub(crate) description: *mut c_void,
    pub(crate) layouts: [*mut c_void; 4],
    /// Addresses of A, B, C, D.
    pub(crate) data: [usize; 4],
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
}

impl Call {
    pub(crate) fn matmul(&self) -> i32 {
        let [a, b, c, d] = self.data.map(ptr::with_exposed_provenance_mut::<c_void>);
        let [a_layout, b_layout, c_layout, d_layout] = self.layouts;
        // SAFETY: the scalars are alive; data addresses are only used by the driver above.
        unsafe {
            cublasLtMatmul(
                self.library,
                self.description,
                (&raw const self.alpha).cast(),
                a,
                a_layout,
                b,
                b_layout,
                (&raw const self.beta).cast(),
                c,
                c_layout,
                d,
                d_layout,
                ptr::null(),
                ptr::null_mut(),
                0,
                ptr::without_provenance_mut(0x20),
            )
        }
    }
}
