//! The C functions of the driver as a program sees them, and a session of it for one test at a time.
#![allow(dead_code)]

// The functions below are found in the library that this links.
use cuda as _;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) type Handle = *mut c_void;

/// Results.
pub(crate) const OK: c_int = 0;
pub(crate) const INVALID_VALUE: c_int = 1;
pub(crate) const OUT_OF_MEMORY: c_int = 2;
pub(crate) const INVALID_HANDLE: c_int = 400;

unsafe extern "C" {
    pub(crate) fn cuInit(flags: c_uint) -> c_int;
    pub(crate) fn cuDriverGetVersion(version: *mut c_int) -> c_int;
    pub(crate) fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int;
    pub(crate) fn cuDeviceGetCount(count: *mut c_int) -> c_int;
    pub(crate) fn cuDeviceGetName(text: *mut c_char, len: c_int, device: c_int) -> c_int;
    pub(crate) fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> c_int;
    pub(crate) fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> c_int;
    pub(crate) fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> c_int;
    pub(crate) fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int;
    pub(crate) fn cuCtxGetCurrent(context: *mut Handle) -> c_int;
    pub(crate) fn cuCtxSetCurrent(context: Handle) -> c_int;
    pub(crate) fn cuCtxPushCurrent_v2(context: Handle) -> c_int;
    pub(crate) fn cuCtxPopCurrent_v2(context: *mut Handle) -> c_int;
    pub(crate) fn cuCtxCreate_v4(
        context: *mut Handle,
        params: *mut c_void,
        flags: c_uint,
        device: c_int,
    ) -> c_int;
    pub(crate) fn cuCtxDestroy_v2(context: Handle) -> c_int;
    pub(crate) fn cuCtxSynchronize() -> c_int;
    pub(crate) fn cuCtxGetLimit(value: *mut usize, limit: c_uint) -> c_int;
    pub(crate) fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int;
    pub(crate) fn cuMemFree_v2(address: u64) -> c_int;
    pub(crate) fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: Handle) -> c_int;
    pub(crate) fn cuMemFreeAsync(address: u64, stream: Handle) -> c_int;
    pub(crate) fn cuMemAllocManaged(address: *mut u64, bytes: usize, flags: c_uint) -> c_int;
    pub(crate) fn cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int;
    pub(crate) fn cuMemFreeHost(pointer: *mut c_void) -> c_int;
    pub(crate) fn cuMemHostRegister_v2(pointer: *mut c_void, bytes: usize, flags: c_uint) -> c_int;
    pub(crate) fn cuMemHostUnregister(pointer: *mut c_void) -> c_int;
    pub(crate) fn cuMemHostGetDevicePointer_v2(
        address: *mut u64,
        pointer: *mut c_void,
        flags: c_uint,
    ) -> c_int;
    pub(crate) fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int;
    pub(crate) fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, address: u64) -> c_int;
    pub(crate) fn cuPointerGetAttribute(value: *mut c_void, attribute: c_uint, address: u64) -> c_int;
    pub(crate) fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> c_int;
    pub(crate) fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> c_int;
    pub(crate) fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> c_int;
    pub(crate) fn cuMemcpy(to: u64, from: u64, bytes: usize) -> c_int;
    pub(crate) fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) -> c_int;
    pub(crate) fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> c_int;
    pub(crate) fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> c_int;
    pub(crate) fn cuMemcpy2D_v2(copy: *const [usize; 16]) -> c_int;
    pub(crate) fn cuMemsetD8_v2(address: u64, value: u8, count: usize) -> c_int;
    pub(crate) fn cuMemsetD16_v2(address: u64, value: u16, count: usize) -> c_int;
    pub(crate) fn cuMemsetD32_v2(address: u64, value: u32, count: usize) -> c_int;
    pub(crate) fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: Handle) -> c_int;
    pub(crate) fn cuMemsetD32Async(address: u64, value: u32, count: usize, stream: Handle) -> c_int;
    pub(crate) fn cuStreamCreate(stream: *mut Handle, flags: c_uint) -> c_int;
    pub(crate) fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int) -> c_int;
    pub(crate) fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) -> c_int;
    pub(crate) fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) -> c_int;
    pub(crate) fn cuStreamDestroy_v2(stream: Handle) -> c_int;
    pub(crate) fn cuStreamSynchronize(stream: Handle) -> c_int;
    pub(crate) fn cuStreamQuery(stream: Handle) -> c_int;
    pub(crate) fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) -> c_int;
    pub(crate) fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) -> c_int;
    pub(crate) fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> c_int;
    pub(crate) fn cuStreamIsCapturing(stream: Handle, status: *mut c_int) -> c_int;
    pub(crate) fn cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) -> c_int;
    pub(crate) fn cuLaunchHostFunc(
        stream: Handle,
        f: Option<unsafe extern "C" fn(*mut c_void)>,
        user: *mut c_void,
    ) -> c_int;
    pub(crate) fn cuEventCreate(event: *mut Handle, flags: c_uint) -> c_int;
    pub(crate) fn cuEventRecord(event: Handle, stream: Handle) -> c_int;
    pub(crate) fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) -> c_int;
    pub(crate) fn cuEventQuery(event: Handle) -> c_int;
    pub(crate) fn cuEventSynchronize(event: Handle) -> c_int;
    pub(crate) fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) -> c_int;
    pub(crate) fn cuEventDestroy_v2(event: Handle) -> c_int;
    pub(crate) fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> c_int;
    pub(crate) fn cuModuleLoad(module: *mut Handle, path: *const c_char) -> c_int;
    pub(crate) fn cuModuleUnload(module: Handle) -> c_int;
    pub(crate) fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> c_int;
    pub(crate) fn cuModuleGetGlobal_v2(
        address: *mut u64,
        bytes: *mut usize,
        module: Handle,
        name: *const c_char,
    ) -> c_int;
    pub(crate) fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Handle) -> c_int;
    pub(crate) fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> c_int;
    pub(crate) fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: Handle,
        threads: c_int,
        dynamic: usize,
    ) -> c_int;
    pub(crate) fn cuOccupancyMaxPotentialBlockSize(
        grid: *mut c_int,
        block: *mut c_int,
        function: Handle,
        shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
        dynamic: usize,
        limit: c_int,
    ) -> c_int;
    pub(crate) fn cuLaunchKernel(
        function: Handle,
        gx: c_uint,
        gy: c_uint,
        gz: c_uint,
        bx: c_uint,
        by: c_uint,
        bz: c_uint,
        shared: c_uint,
        stream: Handle,
        params: *const *const c_void,
        extra: *const *const c_void,
    ) -> c_int;
    pub(crate) fn cuLaunchCooperativeKernel(
        function: Handle,
        gx: c_uint,
        gy: c_uint,
        gz: c_uint,
        bx: c_uint,
        by: c_uint,
        bz: c_uint,
        shared: c_uint,
        stream: Handle,
        params: *const *const c_void,
    ) -> c_int;
    pub(crate) fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) -> c_int;
    pub(crate) fn cuGraphLaunch(exec: Handle, stream: Handle) -> c_int;
    pub(crate) fn cuGraphUpload(exec: Handle, stream: Handle) -> c_int;
    pub(crate) fn cuGraphExecDestroy(exec: Handle) -> c_int;
    pub(crate) fn cuGraphDestroy(graph: Handle) -> c_int;
    pub(crate) fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) -> c_int;
    pub(crate) fn cuGraphNodeGetType(node: Handle, kind: *mut c_int) -> c_int;
    pub(crate) fn cuGetErrorName(code: c_int, text: *mut *const c_char) -> c_int;
    pub(crate) fn cuGetErrorString(code: c_int, text: *mut *const c_char) -> c_int;
    pub(crate) fn cuGetProcAddress_v2(
        symbol: *const c_char,
        function: *mut *const c_void,
        version: c_int,
        flags: u64,
        found: *mut c_int,
    ) -> c_int;
    pub(crate) fn cuLibraryLoadData(
        library: *mut Handle,
        image: *const c_void,
        a: *const c_int,
        b: *const *mut c_void,
        c: c_uint,
        d: *const c_int,
        e: *const *mut c_void,
        f: c_uint,
    ) -> c_int;
    pub(crate) fn cuLibraryGetKernel(kernel: *mut Handle, library: Handle, name: *const c_char) -> c_int;
    pub(crate) fn cuKernelGetFunction(function: *mut Handle, kernel: Handle) -> c_int;
    pub(crate) fn cuLibraryUnload(library: Handle) -> c_int;
    pub(crate) fn cuTexRefCreate(texture: *mut Handle) -> c_int;

    pub(crate) fn emu_version() -> c_int;
    pub(crate) fn emu_errors() -> usize;
    pub(crate) fn emu_error_text(index: usize, buffer: *mut c_char, len: usize) -> usize;
    pub(crate) fn emu_clear_errors();
    pub(crate) fn emu_reset_counters();
    pub(crate) fn emu_counters_json(kernel: *const c_char, buffer: *mut c_char, len: usize) -> usize;
    pub(crate) fn emu_expect_flops(flops: u64);
    pub(crate) fn emu_call_log(on: c_int);
    pub(crate) fn emu_calls(buffer: *mut c_char, len: usize) -> usize;
    pub(crate) fn emu_fail(name: *const c_char, after: u64) -> c_int;
    pub(crate) fn emu_set(key: *const c_char, value: *const c_char) -> c_int;
    pub(crate) fn emu_name(address: u64, name: *const c_char) -> c_int;
    pub(crate) fn emu_enqueue_host(
        stream: Handle,
        name: *const c_char,
        run: Option<unsafe extern "C" fn(*mut c_void, *const *mut u8)>,
        user: *mut c_void,
        drop_user: Option<unsafe extern "C" fn(*mut c_void)>,
        ranges: *const Range,
        count: usize,
    ) -> c_int;
}

/// What `emu_enqueue_host` wants to know of a piece of memory.
#[repr(C)]
pub(crate) struct Range {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) write: u32,
    pub(crate) padding: u32,
}

/// Kernels of the tests.
pub(crate) const PTX: &str = r"
.version 8.0
.target sm_80
.address_size 64
.visible .global .align 4 .u32 counter = 7;

// p[i] = value, for the threads of the grid.
.visible .entry fill(.param .u64 p, .param .u32 value)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [p];
    ld.param.u32 %r1, [value];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    mul.wide.u32 %rd2, %r5, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r1;
    ret;
}

// to[i] = from[i] + 1, for the threads of one block.
.visible .entry next(.param .u64 to, .param .u64 from)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [to];
    ld.param.u64 %rd2, [from];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.u32 %r2, [%rd5];
    add.s32 %r3, %r2, 1;
    st.global.u32 [%rd4], %r3;
    ret;
}

// counter += 1
.visible .entry count()
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    mov.u64 %rd1, counter;
    ld.global.u32 %r1, [%rd1];
    add.s32 %r1, %r1, 1;
    st.global.u32 [%rd1], %r1;
    ret;
}

.visible .entry broken()
{
    trap;
    ret;
}

.visible .entry shared(.param .u64 p)
.maxntid 128, 1, 1
{
    .shared .align 4 .b8 buffer[1000];
    ret;
}
";

static ONE: Mutex<()> = Mutex::new(());

/// The driver for one test: other tests of the process wait.
pub(crate) struct Session {
    _one: MutexGuard<'static, ()>,
}

impl Session {
    /// Default settings but for those given, no findings, the primary context current.
    pub(crate) fn new(settings: &[(&str, &str)]) -> Self {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: every pointer is to a live local or a string with its final zero.
        unsafe {
            for key in ["EMU_CHECKS", "EMU_POOLS", "EMU_DEVICE", "EMU_DRIVER", "EMU_MEM_LIMIT", "EMU_BUDGET"]
            {
                assert_eq!(emu_set(text(key).as_ptr(), text("").as_ptr()), OK);
            }
            for (key, value) in settings {
                assert_eq!(emu_set(text(key).as_ptr(), text(value).as_ptr()), OK, "{key}={value}");
            }
            assert_eq!(cuInit(0), OK);
            let mut context = null_mut();
            assert_eq!(cuDevicePrimaryCtxRetain(&raw mut context, 0), OK);
            assert_eq!(cuCtxSetCurrent(context), OK);
            emu_clear_errors();
            emu_reset_counters();
        }
        Self { _one: one }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: neither call takes a pointer.
        unsafe {
            // Whatever happened, the next test finds an empty device.
            while cuDevicePrimaryCtxRelease_v2(0) == OK {}
            emu_clear_errors();
        }
    }
}

/// A C text.
pub(crate) fn text(s: &str) -> CString {
    CString::new(s).unwrap()
}

/// First lines of all findings, without their mark.
pub(crate) fn findings() -> Vec<String> {
    texts()
        .iter()
        .map(|t| t.lines().next().unwrap_or("").trim_start_matches("========= ").to_owned())
        .collect()
}

/// All findings.
pub(crate) fn texts() -> Vec<String> {
    // SAFETY: the buffer has the length that is passed with it.
    unsafe {
        (0..emu_errors())
            .map(|i| {
                let n = emu_error_text(i, null_mut(), 0);
                let mut buffer = vec![0u8; n + 1];
                assert_eq!(emu_error_text(i, buffer.as_mut_ptr().cast(), n + 1), n);
                assert_eq!(buffer.pop(), Some(0));
                String::from_utf8(buffer).unwrap()
            })
            .collect()
    }
}

/// Nothing was found.
#[track_caller]
pub(crate) fn silent() {
    assert!(texts().is_empty(), "{}", texts().join("\n"));
}

/// Just one thing was found, and its first line starts so.
#[track_caller]
pub(crate) fn found_one(start: &str) {
    let findings = findings();
    assert!(findings.len() == 1 && findings[0].starts_with(start), "{findings:?}");
}

/// Device memory.
#[track_caller]
pub(crate) fn alloc(bytes: usize) -> u64 {
    let mut address = 0;
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuMemAlloc_v2(&raw mut address, bytes) }, OK);
    address
}

/// Device memory with values.
#[track_caller]
pub(crate) fn upload(values: &[u32]) -> u64 {
    let address = alloc(values.len() * 4);
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuMemcpyHtoD_v2(address, values.as_ptr().cast(), values.len() * 4) }, OK);
    address
}

/// Values in device memory.
#[track_caller]
pub(crate) fn download(address: u64, count: usize) -> Vec<u32> {
    let mut values = vec![0; count];
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), address, count * 4) }, OK);
    values
}

/// A stream.
#[track_caller]
pub(crate) fn stream(flags: c_uint) -> Handle {
    let mut stream = null_mut();
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuStreamCreate(&raw mut stream, flags) }, OK);
    stream
}

/// An event.
#[track_caller]
pub(crate) fn event(flags: c_uint) -> Handle {
    let mut event = null_mut();
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuEventCreate(&raw mut event, flags) }, OK);
    event
}

/// A module of PTX text.
#[track_caller]
pub(crate) fn module(ptx: &str) -> Handle {
    let mut module = null_mut();
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuModuleLoadData(&raw mut module, text(ptx).as_ptr().cast()) }, OK);
    module
}

/// A kernel of a module.
#[track_caller]
pub(crate) fn function(module: Handle, name: &str) -> Handle {
    let mut function = null_mut();
    // SAFETY: the pointers are to live locals of the sizes given.
    assert_eq!(unsafe { cuModuleGetFunction(&raw mut function, module, text(name).as_ptr()) }, OK);
    function
}

/// A parameter value.
pub(crate) enum Value {
    U32(u32),
    U64(u64),
}

/// Launches and returns the result.
pub(crate) fn launch(function: Handle, blocks: u32, threads: u32, stream: Handle, values: &[Value]) -> c_int {
    let pointers: Vec<*const c_void> = values
        .iter()
        .map(|value| match value {
            Value::U32(v) => std::ptr::from_ref(v).cast(),
            Value::U64(v) => std::ptr::from_ref(v).cast(),
        })
        .collect();
    // SAFETY: one pointer a parameter, each to a value that lives in `values`.
    unsafe { cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers.as_ptr(), null()) }
}
