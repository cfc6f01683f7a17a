//! cuBLASLt: the library, a handle, and the products it has planned.
//!
//! The library is opened here and not by cudarc, which panics when the library or one of its functions is missing and looks
//! for names that depend on the toolkit it was built beside.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cudarc::driver::{CudaStream, sys};
use libloading::Library;

use super::{DType, Device, DevicePointer, device::driver, record};
use crate::{Error, Result};

/// The library, as a toolkit, a distribution or a Python wheel names it. The plain name comes first, so that a library put
/// in front of the others by the loader's path is the one that is used.
const LIBRARIES: &[&str] = if cfg!(windows) {
    &["cublasLt.dll", "cublasLt64_13.dll", "cublasLt64_12.dll"]
} else {
    &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"]
};

/// Products that are planned at a time. Static shapes need a few dozen; a program whose batches never repeat must not grow.
const MOST_PRODUCTS: usize = 4096;

/// Bytes of workspace that NVIDIA advises from Hopper on, and before.
const WORKSPACE: [usize; 2] = [32 << 20, 4 << 20];

/// What cuBLASLt asks of a workspace's address.
pub(super) const WORKSPACE_ALIGNMENT: u64 = 256;

/// The largest alignment that the choice of an algorithm depends on.
const LARGEST_ALIGNMENT: u64 = 256;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type SetAttribute = unsafe extern "C" fn(Handle, u32, *const c_void, usize) -> c_int;
type Matmul = unsafe extern "C" fn(
    library: Handle,
    description: Handle,
    alpha: *const c_void,
    a: *const c_void,
    a_layout: Handle,
    b: *const c_void,
    b_layout: Handle,
    beta: *const c_void,
    c: *const c_void,
    c_layout: Handle,
    d: *mut c_void,
    d_layout: Handle,
    algorithm: *const [u64; 8],
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: sys::CUstream,
) -> c_int;
type Heuristic = unsafe extern "C" fn(
    library: Handle,
    description: Handle,
    a: Handle,
    b: Handle,
    c: Handle,
    d: Handle,
    preference: Handle,
    requested: c_int,
    results: *mut HeuristicResult,
    count: *mut c_int,
) -> c_int;

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct HeuristicResult {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(
    size_of::<HeuristicResult>() == 96 && std::mem::offset_of!(HeuristicResult, workspace_bytes) == 64
);

/// Numbers of `cublasLt.h`.
mod number {
    pub(super) const COMPUTE_32F: i32 = 68;
    pub(super) const F32: i32 = 0;
    pub(super) const F16: i32 = 2;
    pub(super) const BF16: i32 = 14;
    pub(super) const TRANSPOSED: i32 = 1;
    /// Partial sums of a split product may only be added in the compute type, in a workspace: never rounded before.
    pub(super) const REDUCTION_IN_COMPUTE_TYPE: u32 = 2;
    pub(super) mod layout {
        pub(in super::super) const BATCH_COUNT: u32 = 5;
        pub(in super::super) const BATCH_STRIDE: u32 = 6;
    }
    pub(super) mod product {
        pub(in super::super) const TRANSPOSE_A: u32 = 3;
        pub(in super::super) const EPILOGUE: u32 = 7;
        pub(in super::super) const BIAS_POINTER: u32 = 8;
    }
    pub(super) mod preference {
        pub(in super::super) const WORKSPACE_BYTES: u32 = 1;
        pub(in super::super) const REDUCTION_SCHEMES: u32 = 3;
        /// A to D in this order.
        pub(in super::super) const ALIGNMENTS: [u32; 4] = [5, 6, 7, 8];
    }
}

/// The functions that are called, looked up once. The library stays loaded: it has state in the driver's contexts.
struct Functions {
    status_name: unsafe extern "C" fn(c_int) -> *const c_char,
    version: unsafe extern "C" fn() -> usize,
    create: Create,
    destroy: Destroy,
    layout_create: unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int,
    layout_destroy: Destroy,
    layout_set: SetAttribute,
    product_create: unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int,
    product_destroy: Destroy,
    product_set: SetAttribute,
    preference_create: Create,
    preference_destroy: Destroy,
    preference_set: SetAttribute,
    heuristic: Heuristic,
    matmul: Matmul,
    _library: Library,
}

impl Functions {
    /// The library of this process; loaded at the first call that finds one.
    fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<Functions> = OnceLock::new();
        if let Some(functions) = LOADED.get() {
            return Ok(functions);
        }
        let functions = Self::load()?;
        Ok(LOADED.get_or_init(|| functions))
    }

    fn load() -> Result<Self> {
        let open = |name: &&'static str| {
            // SAFETY: loading the library runs its initialisers, which any program that links it runs too.
            unsafe { Library::new(*name) }.ok().map(|library| (*name, library))
        };
        let (name, library) = LIBRARIES.iter().find_map(open).ok_or_else(|| Error::NoLibrary {
            library: "cuBLASLt",
            what: format!(
                "none of {} can be loaded; install cuBLAS (it comes with the CUDA toolkit, and as the Python package \
                 nvidia-cublas) and put its folder on the loader's path, or use the CPU backend",
                LIBRARIES.join(", ")
            ),
        })?;
        macro_rules! find {
            ($symbol:literal) => {{
                // SAFETY: the types of `Functions` are the declarations of cublasLt.h.
                let found = unsafe { library.get($symbol.as_bytes()) };
                *found.map_err(|_| Error::NoLibrary {
                    library: "cuBLASLt",
                    what: format!("{name} has no {}; install cuBLAS 12 or 13", $symbol),
                })?
            }};
        }
        Ok(Self {
            status_name: find!("cublasLtGetStatusName"),
            version: find!("cublasLtGetVersion"),
            create: find!("cublasLtCreate"),
            destroy: find!("cublasLtDestroy"),
            layout_create: find!("cublasLtMatrixLayoutCreate"),
            layout_destroy: find!("cublasLtMatrixLayoutDestroy"),
            layout_set: find!("cublasLtMatrixLayoutSetAttribute"),
            product_create: find!("cublasLtMatmulDescCreate"),
            product_destroy: find!("cublasLtMatmulDescDestroy"),
            product_set: find!("cublasLtMatmulDescSetAttribute"),
            preference_create: find!("cublasLtMatmulPreferenceCreate"),
            preference_destroy: find!("cublasLtMatmulPreferenceDestroy"),
            preference_set: find!("cublasLtMatmulPreferenceSetAttribute"),
            heuristic: find!("cublasLtMatmulAlgoGetHeuristic"),
            matmul: find!("cublasLtMatmul"),
            _library: library,
        })
    }

    /// A status as an error; `what` says of what.
    fn check(&self, call: &'static str, status: c_int, what: impl FnOnce() -> String) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library answers any number with a text that lives as long as itself.
        let name = unsafe {
            let name = (self.status_name)(status);
            if name.is_null() {
                status.to_string()
            } else {
                CStr::from_ptr(name).to_string_lossy().into_owned()
            }
        };
        Err(Error::Blas { call, what: format!("{}: {name}", what()) })
    }
}

/// An object of the library, destroyed with it.
struct Object {
    handle: Handle,
    destroy: Destroy,
}

impl Object {
    fn new(
        functions: &Functions,
        call: &'static str,
        destroy: Destroy,
        create: impl FnOnce(*mut Handle) -> c_int,
    ) -> Result<Self> {
        let mut handle = ptr::null_mut();
        functions.check(call, create(&raw mut handle), String::new)?;
        Ok(Self { handle, destroy })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the handle was made by the function's counterpart and is destroyed here only. A failure leaves nothing to
        // be done.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

/// A handle of cuBLASLt on a device, with the algorithms it has chosen. Clones share both.
#[derive(Clone)]
pub struct Blas {
    inner: Arc<Inner>,
}

struct Inner {
    functions: &'static Functions,
    // Before the handle: descriptors go first.
    products: Mutex<HashMap<Problem, Product>>,
    handle: Object,
    device: Device,
    workspace_bytes: usize,
}

// SAFETY: cublasLt's handle may be used from any thread, several at a time; the descriptors of the products, which may not,
// are behind the mutex.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Blas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blas")
            .field("device", &self.inner.device.name())
            .field("version", &self.version())
            .finish()
    }
}

/// A product's shape: all that the choice of an algorithm depends on. In the row-major terms of `y = x Wᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    /// Of W and x.
    pub(super) dtype: DType,
    /// Of y and the bias: the same, or `f32`.
    pub(super) out: DType,
    pub(super) batch: usize,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// Elements from one row, and one matrix of the batch, to the next.
    pub(super) x_strides: [usize; 2],
    pub(super) y_strides: [usize; 2],
    /// `cublasLtEpilogue_t`.
    pub(super) epilogue: u32,
    /// Of W, x and y; what the bias has counts as y's.
    pub(super) alignments: [u32; 3],
    pub(super) workspace_bytes: usize,
}

/// The addresses of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) x: DevicePointer,
    pub(super) weight: DevicePointer,
    pub(super) bias: Option<DevicePointer>,
    pub(super) y: DevicePointer,
    /// y is added to.
    pub(super) accumulate: bool,
    pub(super) workspace: DevicePointer,
}

/// The descriptors of a problem, and the algorithm for it.
struct Product {
    description: Object,
    weight: Object,
    x: Object,
    y: Object,
    algorithm: [u64; 8],
    workspace_bytes: usize,
}

/// The largest power of two up to 256 that divides an address.
pub(super) fn alignment(pointer: DevicePointer) -> u32 {
    1 << pointer.trailing_zeros().min(LARGEST_ALIGNMENT.trailing_zeros())
}

impl Blas {
    /// Opens the library on a device.
    ///
    /// # Errors
    /// [`Error::NoLibrary`] when there is no cuBLASLt; [`Error::Blas`] when it refuses the device.
    pub fn new(device: &Device) -> Result<Self> {
        let functions = Functions::get()?;
        let context = device.context();
        context.bind_to_thread().map_err(|error| driver("making the device's context current", error))?;
        // SAFETY: the pointer is valid for a write.
        let handle = Object::new(functions, "cublasLtCreate", functions.destroy, |handle| unsafe {
            (functions.create)(handle)
        })?;
        let (major, _) = context
            .compute_capability()
            .map_err(|error| driver("asking for the device's properties", error))?;
        Ok(Self {
            inner: Arc::new(Inner {
                functions,
                products: Mutex::default(),
                handle,
                device: device.clone(),
                workspace_bytes: WORKSPACE[usize::from(major < 9)],
            }),
        })
    }

    /// The device it works on.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The library's version, 10,000·major + 100·minor + patch.
    pub fn version(&self) -> usize {
        // SAFETY: takes nothing and only returns a number.
        unsafe { (self.inner.functions.version)() }
    }

    /// Bytes of workspace that NVIDIA advises for this device. With less, also with none, there are fewer algorithms to
    /// choose from.
    pub fn workspace_bytes(&self) -> usize {
        self.inner.workspace_bytes
    }

    /// Shapes for which an algorithm has been chosen.
    pub fn planned(&self) -> usize {
        self.inner.products.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// As the operation's entry: the operands must describe memory of the problem's extents that is valid until the stream
    /// has got past the product.
    pub(super) unsafe fn multiply(
        &self,
        stream: &CudaStream,
        problem: &Problem,
        operands: &Operands,
    ) -> Result<()> {
        let Inner { functions, products, handle, device, .. } = &*self.inner;
        let go_on = record::launch(stream, |record| {
            "cublasLtMatmul".clone_into(&mut record.kernel);
            let Problem { batch, rows, inputs, outputs, .. } = *problem;
            record.macs = [rows, inputs, outputs].iter().fold(batch as u64, |macs, &n| macs * n as u64);
        });
        if !go_on {
            return Ok(());
        }
        device
            .context()
            .bind_to_thread()
            .map_err(|error| driver("making the device's context current", error))?;
        let mut products = products.lock().unwrap_or_else(PoisonError::into_inner);
        if products.len() >= MOST_PRODUCTS {
            products.clear();
        }
        let product = match products.entry(*problem) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Product::plan(functions, handle, problem)?),
        };
        if let Some(bias) = operands.bias {
            product.description.set(functions, functions.product_set, number::product::BIAS_POINTER, bias)?;
        }
        let (alpha, beta) = (1.0_f32, if operands.accumulate { 1.0_f32 } else { 0.0 });
        let address = |pointer: DevicePointer| pointer as usize as *mut c_void;
        // SAFETY: the descriptors are alive and of this problem, whose operands the caller vouches for; the scalars are read
        // before the call returns. C is D, which the library allows as their layouts are one.
        let status = unsafe {
            (functions.matmul)(
                handle.handle,
                product.description.handle,
                (&raw const alpha).cast(),
                address(operands.weight),
                product.weight.handle,
                address(operands.x),
                product.x.handle,
                (&raw const beta).cast(),
                address(operands.y),
                product.y.handle,
                address(operands.y),
                product.y.handle,
                &raw const product.algorithm,
                if product.workspace_bytes == 0 { ptr::null_mut() } else { address(operands.workspace) },
                product.workspace_bytes,
                stream.cu_stream(),
            )
        };
        functions.check("cublasLtMatmul", status, || problem.describe())
    }
}

impl Problem {
    fn describe(&self) -> String {
        format!(
            "{} rows of {} {} values to {} of {}, {} times",
            self.rows, self.inputs, self.dtype, self.outputs, self.out, self.batch
        )
    }

    /// Rows of `x` lie side by side as columns of a column-major matrix; so do rows of W, which is transposed, and of y.
    fn layout(
        &self,
        functions: &Functions,
        dtype: DType,
        width: usize,
        rows: usize,
        [row, matrix]: [usize; 2],
    ) -> Result<Object> {
        let dtype = match dtype {
            DType::F32 => number::F32,
            DType::F16 => number::F16,
            DType::Bf16 => number::BF16,
        };
        let (width, rows, row) = (width as u64, rows as u64, row as i64);
        // SAFETY: the pointer is valid for a write.
        let create = |handle| unsafe { (functions.layout_create)(handle, dtype, width, rows, row) };
        let layout = Object::new(functions, "cublasLtMatrixLayoutCreate", functions.layout_destroy, create)?;
        if self.batch > 1 {
            let count = i32::try_from(self.batch).unwrap_or(i32::MAX);
            layout.set(functions, functions.layout_set, number::layout::BATCH_COUNT, count)?;
            layout.set(functions, functions.layout_set, number::layout::BATCH_STRIDE, matrix as i64)?;
        }
        Ok(layout)
    }
}

impl Product {
    fn plan(functions: &Functions, library: &Object, problem: &Problem) -> Result<Self> {
        let Problem { dtype, out, rows, inputs, outputs, .. } = *problem;
        let weight = problem.layout(functions, dtype, inputs, outputs, [inputs, 0])?;
        let x = problem.layout(functions, dtype, inputs, rows, problem.x_strides)?;
        let y = problem.layout(functions, out, outputs, rows, problem.y_strides)?;

        // SAFETY: the pointer is valid for a write.
        let create = |handle| unsafe { (functions.product_create)(handle, number::COMPUTE_32F, number::F32) };
        let description =
            Object::new(functions, "cublasLtMatmulDescCreate", functions.product_destroy, create)?;
        let set = |attribute, value: u32| description.set(functions, functions.product_set, attribute, value);
        set(number::product::TRANSPOSE_A, number::TRANSPOSED.unsigned_abs())?;
        set(number::product::EPILOGUE, problem.epilogue)?;

        // SAFETY: the pointer is valid for a write.
        let create = |handle| unsafe { (functions.preference_create)(handle) };
        let preference =
            Object::new(functions, "cublasLtMatmulPreferenceCreate", functions.preference_destroy, create)?;
        let prefer =
            |attribute, value: u32| preference.set(functions, functions.preference_set, attribute, value);
        let bytes = problem.workspace_bytes as u64;
        preference.set(functions, functions.preference_set, number::preference::WORKSPACE_BYTES, bytes)?;
        prefer(number::preference::REDUCTION_SCHEMES, number::REDUCTION_IN_COMPUTE_TYPE)?;
        let [weight_alignment, x_alignment, y_alignment] = problem.alignments;
        let alignments = [weight_alignment, x_alignment, y_alignment, y_alignment];
        for (attribute, alignment) in number::preference::ALIGNMENTS.into_iter().zip(alignments) {
            prefer(attribute, alignment)?;
        }

        let (mut result, mut count) = (HeuristicResult::default(), 0);
        // SAFETY: all objects are alive; there is room for the one result asked for.
        let status = unsafe {
            (functions.heuristic)(
                library.handle,
                description.handle,
                weight.handle,
                x.handle,
                y.handle,
                y.handle,
                preference.handle,
                1,
                &raw mut result,
                &raw mut count,
            )
        };
        let call = "cublasLtMatmulAlgoGetHeuristic";
        functions.check(call, status, || problem.describe())?;
        if count < 1 {
            return Err(Error::Blas {
                call,
                what: format!("{}: no algorithm computes this", problem.describe()),
            });
        }
        functions.check(call, result.state, || problem.describe())?;
        let HeuristicResult { algorithm, workspace_bytes, .. } = result;
        Ok(Self { description, weight, x, y, algorithm, workspace_bytes })
    }
}

impl Object {
    fn set<V: bytemuck::Pod>(
        &self,
        functions: &Functions,
        set: SetAttribute,
        attribute: u32,
        value: V,
    ) -> Result<()> {
        // SAFETY: the object is alive, the value valid for reads of its size, and copied by the call.
        let status = unsafe { set(self.handle, attribute, (&raw const value).cast(), size_of::<V>()) };
        functions.check("cublasLt…SetAttribute", status, || format!("attribute {attribute}"))
    }
}
