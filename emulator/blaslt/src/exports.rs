//! The C interface: names, arguments and return values as in `cublasLt.h`.

use std::{
    ffi::{c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::Arc,
};

use crate::{
    attributes::{Attributes, layout, preference, product},
    driver,
    handles::{self, Kind},
    problem::{Addresses, Problem, Shape},
    status::{self, Failure, Status, invalid},
};

/// cuBLAS of CUDA 13.0.
const VERSION: [i32; 3] = [13, 0, 0];

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct HeuristicResult {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: i32,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<HeuristicResult>() == 96);

/// Runs the body of an export: no panic leaves it, and a failure is told on the standard error.
fn answer(name: &str, body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Status::Success as i32,
        Ok(Err(failure)) => failure,
        Err(_) => Failure { status: Status::InternalError, reason: "a defect of the emulator".to_owned() },
    };
    let status = status::text(failure.status as i32).0.to_string_lossy();
    eprintln!("========= {name} returns {status}: {}", failure.reason);
    failure.status as i32
}

/// Stores a new object's handle behind `target`.
///
/// # Safety
/// `target` must be null or valid for a write.
unsafe fn give(target: *mut *mut c_void, kind: Kind, attributes: Attributes) -> Result<(), Failure> {
    if target.is_null() {
        return Err(invalid("the place for the new handle is null"));
    }
    // SAFETY: not null, and so valid for a write.
    unsafe { target.write(handles::create(kind, attributes)) };
    Ok(())
}

/// # Safety
/// `buffer` must be null or valid for reads of `bytes` bytes.
unsafe fn set(
    kind: Kind,
    handle: *mut c_void,
    attribute: u32,
    buffer: *const c_void,
    bytes: usize,
) -> Result<(), Failure> {
    if buffer.is_null() || bytes > 8 {
        return Err(invalid(format!("attribute {attribute}: {bytes} bytes at {buffer:?}")));
    }
    // SAFETY: not null, and so valid for this many bytes.
    let value = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), bytes) };
    handles::with(kind, handle, |attributes| attributes.set(attribute, value))?
}

/// # Safety
/// `buffer` must be null or valid for writes of `bytes` bytes, `written` null or valid for a write.
unsafe fn get(
    kind: Kind,
    handle: *mut c_void,
    attribute: u32,
    buffer: *mut c_void,
    bytes: usize,
    written: *mut usize,
) -> Result<(), Failure> {
    let (value, size) = handles::with(kind, handle, |attributes| attributes.bytes(attribute))??;
    if bytes == 0 && written.is_null() || bytes > 0 && (buffer.is_null() || bytes < size) {
        return Err(invalid(format!(
            "attribute {attribute} has {size} bytes; there is place for {bytes} at {buffer:?}"
        )));
    }
    // SAFETY: the buffer holds at least `size` bytes when it is used, and `written` is written when it is not null.
    unsafe {
        if bytes > 0 {
            ptr::copy_nonoverlapping(value.as_ptr(), buffer.cast(), size);
        }
        if !written.is_null() {
            written.write(size);
        }
    }
    Ok(())
}

/// Makes a library handle.
///
/// # Safety
/// `handle` must be null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut *mut c_void) -> i32 {
    // SAFETY: the caller's promise.
    answer("cublasLtCreate", || unsafe { give(handle, Kind::Library, Attributes::new(&[])) })
}

/// Ends a library handle.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtDestroy(handle: *mut c_void) -> i32 {
    answer("cublasLtDestroy", || handles::destroy(Kind::Library, handle))
}

/// 10000·major + 100·minor + patch.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    let [major, minor, patch] = VERSION.map(|number| number as usize);
    major * 10_000 + minor * 100 + patch
}

/// The CUDA runtime that this version belongs to.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetCudartVersion() -> usize {
    13_000
}

/// One of the three numbers of the version.
///
/// # Safety
/// `value` must be null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtGetProperty(property: c_int, value: *mut c_int) -> i32 {
    answer("cublasLtGetProperty", || {
        let number = usize::try_from(property).ok().and_then(|index| VERSION.get(index));
        match number {
            // SAFETY: not null, and so valid for a write.
            Some(&number) if !value.is_null() => unsafe { value.write(number) },
            _ => return Err(invalid(format!("property {property}, to be written to {value:?}"))),
        }
        Ok(())
    })
}

/// A status's name.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetStatusName(status: c_int) -> *const c_char {
    status::text(status).0.as_ptr()
}

/// A status's meaning.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetStatusString(status: c_int) -> *const c_char {
    status::text(status).1.as_ptr()
}

/// Describes a matrix: `cudaDataType_t`, extents, leading dimension.
///
/// # Safety
/// `handle` must be null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    handle: *mut *mut c_void,
    kind: c_int,
    rows: u64,
    columns: u64,
    leading: i64,
) -> i32 {
    answer("cublasLtMatrixLayoutCreate", || {
        let mut attributes = Attributes::new(layout::ALL);
        attributes.set(layout::TYPE, &kind.to_le_bytes())?;
        attributes.set(layout::ROWS, &rows.to_le_bytes())?;
        attributes.set(layout::COLUMNS, &columns.to_le_bytes())?;
        attributes.set(layout::LEADING, &leading.to_le_bytes())?;
        // SAFETY: the caller's promise.
        unsafe { give(handle, Kind::Layout, attributes) }
    })
}

/// Ends a matrix layout.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatrixLayoutDestroy(handle: *mut c_void) -> i32 {
    answer("cublasLtMatrixLayoutDestroy", || handles::destroy(Kind::Layout, handle))
}

/// Describes a product: `cublasComputeType_t`, and the scalars' `cudaDataType_t`.
///
/// # Safety
/// `handle` must be null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(
    handle: *mut *mut c_void,
    compute: c_int,
    scale: c_int,
) -> i32 {
    answer("cublasLtMatmulDescCreate", || {
        let mut attributes = Attributes::new(product::ALL);
        attributes.set(product::COMPUTE_TYPE, &compute.to_le_bytes())?;
        attributes.set(product::SCALE_TYPE, &scale.to_le_bytes())?;
        // SAFETY: the caller's promise.
        unsafe { give(handle, Kind::Product, attributes) }
    })
}

/// Ends a matmul descriptor.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulDescDestroy(handle: *mut c_void) -> i32 {
    answer("cublasLtMatmulDescDestroy", || handles::destroy(Kind::Product, handle))
}

/// Makes the preferences of a search.
///
/// # Safety
/// `handle` must be null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(handle: *mut *mut c_void) -> i32 {
    answer("cublasLtMatmulPreferenceCreate", || {
        // SAFETY: the caller's promise.
        unsafe { give(handle, Kind::Preference, Attributes::new(preference::ALL)) }
    })
}

/// Ends the preferences of a search.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceDestroy(handle: *mut c_void) -> i32 {
    answer("cublasLtMatmulPreferenceDestroy", || handles::destroy(Kind::Preference, handle))
}

macro_rules! attribute_exports {
    ($($set:ident $get:ident $kind:ident;)*) => { $(
        /// Sets an attribute from exactly as many bytes as it has.
        ///
        /// # Safety
        /// `buffer` must be null or valid for reads of `bytes` bytes.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $set(handle: *mut c_void, attribute: u32, buffer: *const c_void, bytes: usize) -> i32 {
            // SAFETY: the caller's promise.
            answer(stringify!($set), || unsafe { set(Kind::$kind, handle, attribute, buffer, bytes) })
        }

        /// Reads an attribute; with `bytes` 0 its size alone.
        ///
        /// # Safety
        /// `buffer` must be null or valid for writes of `bytes` bytes, `written` null or valid for a write.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $get(
            handle: *mut c_void,
            attribute: u32,
            buffer: *mut c_void,
            bytes: usize,
            written: *mut usize,
        ) -> i32 {
            // SAFETY: the caller's promise.
            answer(stringify!($get), || unsafe { get(Kind::$kind, handle, attribute, buffer, bytes, written) })
        }
    )* };
}

attribute_exports! {
    cublasLtMatrixLayoutSetAttribute cublasLtMatrixLayoutGetAttribute Layout;
    cublasLtMatmulDescSetAttribute cublasLtMatmulDescGetAttribute Product;
    cublasLtMatmulPreferenceSetAttribute cublasLtMatmulPreferenceGetAttribute Preference;
}

fn shape(
    library: *mut c_void,
    description: *mut c_void,
    layouts: [*mut c_void; 4],
) -> Result<Shape, Failure> {
    handles::with(Kind::Library, library, |_| ())?;
    let description = handles::attributes(Kind::Product, description)?;
    let mut read = Vec::with_capacity(4);
    for (name, layout) in ['A', 'B', 'C', 'D'].into_iter().zip(layouts) {
        let attributes = handles::attributes(Kind::Layout, layout)
            .map_err(|failure| Failure { reason: format!("{name}: {}", failure.reason), ..failure })?;
        read.push(attributes);
    }
    Shape::new(&description, [&read[0], &read[1], &read[2], &read[3]])
}

/// The algorithms for a product: there is one, without workspace.
///
/// # Safety
/// `results` must be null or valid for writes of `requested` results, `count` null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    library: *mut c_void,
    description: *mut c_void,
    a: *mut c_void,
    b: *mut c_void,
    c: *mut c_void,
    d: *mut c_void,
    preference: *mut c_void,
    requested: c_int,
    results: *mut HeuristicResult,
    count: *mut c_int,
) -> i32 {
    answer("cublasLtMatmulAlgoGetHeuristic", || {
        if requested < 1 || results.is_null() || count.is_null() {
            return Err(invalid(format!(
                "{requested} algorithms wanted at {results:?}, their count at {count:?}"
            )));
        }
        // SAFETY: not null, and so valid for a write.
        unsafe { count.write(0) };
        handles::with(Kind::Preference, preference, |_| ())?;
        shape(library, description, [a, b, c, d])?;
        // SAFETY: not null, and so valid for writes; one result at least was wanted.
        unsafe {
            results.write(HeuristicResult::default());
            count.write(1);
        }
        Ok(())
    })
}

/// Whether an algorithm can compute a product.
///
/// # Safety
/// `result` must be null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoCheck(
    library: *mut c_void,
    description: *mut c_void,
    a: *mut c_void,
    b: *mut c_void,
    c: *mut c_void,
    d: *mut c_void,
    algorithm: *const c_void,
    result: *mut HeuristicResult,
) -> i32 {
    answer("cublasLtMatmulAlgoCheck", || {
        if algorithm.is_null() || result.is_null() {
            return Err(invalid(format!("algorithm at {algorithm:?}, result at {result:?}")));
        }
        shape(library, description, [a, b, c, d])?;
        // SAFETY: not null, and so valid for a write.
        unsafe { result.write(HeuristicResult::default()) };
        Ok(())
    })
}

/// D = epilogue(alpha·op(A)·op(B) + beta·C), in the order of `stream`.
///
/// # Safety
/// `alpha` and `beta` must be null or valid for reads of one f32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    library: *mut c_void,
    description: *mut c_void,
    alpha: *const c_void,
    a: *const c_void,
    a_layout: *mut c_void,
    b: *const c_void,
    b_layout: *mut c_void,
    beta: *const c_void,
    c: *const c_void,
    c_layout: *mut c_void,
    d: *mut c_void,
    d_layout: *mut c_void,
    _algorithm: *const c_void,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> i32 {
    answer("cublasLtMatmul", || {
        let shape = shape(library, description, [a_layout, b_layout, c_layout, d_layout])?;
        if alpha.is_null() || beta.is_null() {
            return Err(invalid(format!("alpha at {alpha:?}, beta at {beta:?}")));
        }
        if workspace.is_null() && workspace_bytes > 0 {
            return Err(invalid(format!("a workspace of {workspace_bytes} bytes at null")));
        }
        // SAFETY: not null, and so valid for reads; the pointer mode is that of the host, or `shape` had failed.
        let (alpha, beta) =
            unsafe { (alpha.cast::<f32>().read_unaligned(), beta.cast::<f32>().read_unaligned()) };
        let address = |pointer: *const c_void| pointer.addr() as u64;
        let addresses = Addresses { a: address(a), b: address(b), c: address(c), d: address(d) };
        let problem = Arc::new(Problem::new(&shape, addresses, alpha, beta)?);
        let work: Arc<dyn driver::Work> = problem.clone();
        driver::enqueue(stream, &work, &problem.ranges)
    })
}
