//! The values of `cublasStatus_t` that this library returns, and failures with a reason.

use std::ffi::CStr;

/// A member of `cublasStatus_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Status {
    Success = 0,
    NotInitialized = 1,
    InvalidValue = 7,
    ExecutionFailed = 13,
    InternalError = 14,
    NotSupported = 15,
}

/// A status and one line for the reader.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    pub(crate) reason: String,
}

/// The arguments contradict each other or themselves.
pub(crate) fn invalid(reason: impl Into<String>) -> Failure {
    Failure { status: Status::InvalidValue, reason: reason.into() }
}

/// cublasLt may know it; this library does not.
pub(crate) fn unsupported(reason: impl Into<String>) -> Failure {
    Failure { status: Status::NotSupported, reason: reason.into() }
}

/// The documented statuses: number, name, meaning.
const STATUSES: [(i32, &CStr, &CStr); 10] = [
    (0, c"CUBLAS_STATUS_SUCCESS", c"success"),
    (1, c"CUBLAS_STATUS_NOT_INITIALIZED", c"the library was not initialized"),
    (3, c"CUBLAS_STATUS_ALLOC_FAILED", c"the resource allocation failed"),
    (7, c"CUBLAS_STATUS_INVALID_VALUE", c"an unsupported value or parameter was passed to the function"),
    (8, c"CUBLAS_STATUS_ARCH_MISMATCH", c"the device lacks a feature that the function needs"),
    (11, c"CUBLAS_STATUS_MAPPING_ERROR", c"an access to GPU memory space failed"),
    (13, c"CUBLAS_STATUS_EXECUTION_FAILED", c"the GPU program failed to execute"),
    (14, c"CUBLAS_STATUS_INTERNAL_ERROR", c"an internal operation failed"),
    (15, c"CUBLAS_STATUS_NOT_SUPPORTED", c"the functionality requested is not supported"),
    (16, c"CUBLAS_STATUS_LICENSE_ERROR", c"an error with the license was detected"),
];

/// Name and meaning of a status number.
pub(crate) fn text(status: i32) -> (&'static CStr, &'static CStr) {
    STATUSES
        .iter()
        .find(|(number, ..)| *number == status)
        .map_or((c"<unknown>", c"<unknown>"), |(_, name, meaning)| (name, meaning))
}
