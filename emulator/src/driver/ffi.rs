//! What crosses the C interface: result codes, pointers given by the caller, structures.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// An opaque handle. Its bits are a number in a table, never an address: a stale or invented one is found out.
pub type Handle = *mut c_void;

/// Errors of the documented `CUresult` enumeration. Callers read the number as a Rust enum, so nothing else may be returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Code {
    InvalidValue = 1,
    OutOfMemory = 2,
    NotInitialized = 3,
    InvalidDevice = 101,
    InvalidImage = 200,
    InvalidContext = 201,
    NoBinaryForGpu = 209,
    UnsupportedLimit = 215,
    InvalidPtx = 218,
    UnsupportedPtxVersion = 222,
    FileNotFound = 301,
    InvalidHandle = 400,
    IllegalState = 401,
    NotFound = 500,
    IllegalAddress = 700,
    LaunchTimeout = 702,
    PeerAccessNotEnabled = 705,
    PrimaryContextActive = 708,
    Assert = 710,
    HostMemoryAlreadyRegistered = 712,
    HostMemoryNotRegistered = 713,
    MisalignedAddress = 716,
    LaunchFailed = 719,
    CooperativeLaunchTooLarge = 720,
    NotPermitted = 800,
    NotSupported = 801,
    CaptureUnsupported = 900,
    CaptureInvalidated = 901,
    CaptureMerge = 902,
    CaptureUnmatched = 903,
    CaptureUnjoined = 904,
    CaptureIsolation = 905,
    CaptureImplicit = 906,
    CapturedEvent = 907,
    CaptureWrongThread = 908,
    Unknown = 999,
}

/// Outcome of a driver call.
pub(crate) type Status<T = ()> = Result<T, Code>;

/// A pointer through which the caller wants a value.
#[derive(Debug)]
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T> Out<T> {
    /// Writes the value; a null pointer is an invalid value.
    pub(crate) fn set(self, value: T) -> Status {
        self.check()?;
        // SAFETY: not null, and the exported functions ask that such pointers can be written.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Writes the value where the caller wants it.
    pub(crate) fn set_if_wanted(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: as in `set`.
            unsafe { self.0.write_unaligned(value) };
        }
    }

    /// A null pointer is an invalid value: checked before the work is done.
    pub(crate) fn check(self) -> Status {
        if self.0.is_null() { Err(Code::InvalidValue) } else { Ok(()) }
    }

    /// What the caller has put there.
    pub(crate) fn get(self) -> Status<T>
    where
        T: Copy,
    {
        self.check()?;
        // SAFETY: not null, and the exported functions that read through such a pointer ask that it is initialised.
        Ok(unsafe { self.0.read_unaligned() })
    }
}

/// A NUL-terminated text given by the caller.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    /// The text; a null pointer is an invalid value.
    pub(crate) fn get(self) -> Status<String> {
        if self.0.is_null() {
            return Err(Code::InvalidValue);
        }
        // SAFETY: not null, and the exported functions ask that texts end with a NUL.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// Copies a text into the caller's buffer, cut to fit and always with its NUL; returns the length it has without.
pub(crate) fn copy_text(text: &str, buffer: *mut c_char, len: usize) -> usize {
    if !buffer.is_null() && len > 0 {
        let n = text.len().min(len - 1);
        // SAFETY: the exported functions ask that the buffer has `len` bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast::<u8>(), n);
            buffer.add(n).write(0);
        }
    }
    text.len()
}

/// `CUDA_MEMCPY2D`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Copy2D {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: c_uint,
    pub src_host: *const c_void,
    pub src_device: u64,
    pub src_array: Handle,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: c_uint,
    pub dst_host: *mut c_void,
    pub dst_device: u64,
    pub dst_array: Handle,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// `CUlaunchAttribute`: a number and a value of 64 bytes of which the first four are the integer ones.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
#[allow(missing_docs)]
pub struct LaunchAttribute {
    pub id: c_uint,
    pub pad: [u8; 4],
    pub value: [c_int; 16],
}

/// `CUlaunchConfig`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs)]
pub struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: Handle,
    pub attributes: *const LaunchAttribute,
    pub count: c_uint,
}

/// A function of the host to be called in stream order.
pub type HostFn = Option<unsafe extern "C" fn(*mut c_void)>;
