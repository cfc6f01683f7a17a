//! The kernels of `foveate` against its reference, through the launchers that users call.
//!
//! ```text
//! cargo test -p foveate-device-tests --features emulated   # on the emulated driver: no GPU needed
//! cargo test -p foveate-device-tests --features cuda --target-dir target/gpu   # on a GPU
//! ```
//!
//! Both need nvcc (`cargo xtask toolchain`); without either feature nothing here is built, and `cargo test --workspace`
//! needs none. A package of its own, because a dev-dependency of `foveate` on the emulator would put the emulated
//! `libcuda.so` in front of the real one whenever cargo runs anything; the target folder of its own keeps the one that
//! another run has built out of the way.
#![cfg(feature = "cuda")]

use std::{
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::{CudaSlice, CudaStream, sys};
use foveate::{
    Error, Tensor, TokenPlan,
    cuda::{Device, Element, Strided},
};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[path = "../../../benches/launches/mod.rs"]
pub mod launches;
pub mod mirror;
pub mod traffic;

/// The tests of a process share the device, and each wants to know that it caused no finding.
static TURN: Mutex<()> = Mutex::new(());
static DEVICE: OnceLock<Option<Device>> = OnceLock::new();

/// One test's turn at the device. Ends with the context free of errors and the emulator of findings.
pub struct Turn {
    /// The device with the kernels.
    pub device: Device,
    /// A stream of it.
    pub stream: Arc<CudaStream>,
    _guard: MutexGuard<'static, ()>,
}

impl Turn {
    /// `None` where there is no device: the test then says that it was skipped.
    ///
    /// # Panics
    /// When there should be a device (`FOVEATE_REQUIRE_GPU`, or the emulator) and there is none, or the other one.
    pub fn new() -> Option<Self> {
        let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let device = DEVICE.get_or_init(open).clone()?;
        if cfg!(feature = "emulated") {
            emulator::clear_findings();
            emulator::set(c"EMU_ORDER", c"");
        }
        let stream = device.context().new_stream().unwrap();
        Some(Self { device, stream, _guard: guard })
    }

    /// Runs `work` in each order of blocks and warps; on a GPU, which has its own, once.
    ///
    /// # Panics
    /// When the results differ.
    pub fn in_every_order<T: PartialEq + Debug>(&self, work: impl Fn() -> T) -> T {
        let first = work();
        if cfg!(feature = "emulated") {
            emulator::set(c"EMU_ORDER", c"reverse");
            let second = work();
            emulator::set(c"EMU_ORDER", c"");
            assert_eq!(first, second, "the order of blocks shows");
        }
        first
    }

    /// The end of a test.
    ///
    /// # Panics
    /// When the context has an error, or the emulator a finding.
    pub fn end(self) {
        self.stream.synchronize().unwrap();
        self.device.context().check_err().unwrap();
        if cfg!(feature = "emulated") {
            assert_eq!(emulator::findings(), Vec::<String>::new());
        }
    }

    /// Copies values to the device.
    ///
    /// # Panics
    /// When the driver fails.
    pub fn upload<T: Value>(&self, values: &[f32]) -> CudaSlice<T> {
        let values: Vec<T> = values.iter().map(|&x| T::of(x)).collect();
        self.stream.clone_htod(&values).unwrap()
    }

    /// Copies values to the host.
    ///
    /// # Panics
    /// When the driver fails.
    pub fn download<T: Value>(&self, values: &CudaSlice<T>) -> Vec<f32> {
        self.stream.clone_dtoh(values).unwrap().into_iter().map(T::wide).collect()
    }
}

fn open() -> Option<Device> {
    let device = match Device::new(0) {
        Ok(device) => device,
        Err(error @ Error::NoDriver { .. }) => {
            let required = cfg!(feature = "emulated") || std::env::var_os("FOVEATE_REQUIRE_GPU").is_some();
            assert!(!required, "{error}");
            println!("SKIPPED: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    if cfg!(feature = "emulated") {
        assert!(
            emulator::is_loaded(),
            "a real driver stands in front of the emulated one: {}",
            device.name()
        );
    } else {
        assert!(
            !emulator::is_loaded(),
            "the emulated driver stands in front of the real one: pass --target-dir target/gpu"
        );
    }
    println!("device: {}", device.name());
    Some(device)
}

/// The emulator's own exports, looked up in the loaded library: the crate linked into a test has statics of its own.
pub mod emulator {
    use std::ffi::{CStr, c_char};

    use super::sys;

    /// Whether the loaded driver is the emulated one.
    pub fn is_loaded() -> bool {
        // SAFETY: a lookup; nothing is called.
        unsafe { sys::culib().get::<unsafe extern "C" fn() -> i32>(b"emu_version\0").is_ok() }
    }

    /// What the checks have found.
    ///
    /// # Panics
    /// When the loaded driver is another one.
    pub fn findings() -> Vec<String> {
        // SAFETY: the signatures of these exports; only the emulator has them.
        unsafe {
            let library = sys::culib();
            let count = library.get::<unsafe extern "C" fn() -> usize>(b"emu_errors\0").unwrap();
            let text = library
                .get::<unsafe extern "C" fn(usize, *mut u8, usize) -> usize>(b"emu_error_text\0")
                .unwrap();
            let read = |i| {
                let mut buffer = vec![0; 1 << 14];
                text(i, buffer.as_mut_ptr(), buffer.len());
                let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(buffer.len());
                String::from_utf8_lossy(&buffer[..end]).into_owned()
            };
            (0..count()).map(read).collect()
        }
    }

    /// The counters of all launches since the last reset, as a JSON array.
    ///
    /// # Panics
    /// When the loaded driver is another one.
    pub fn counters() -> String {
        // SAFETY: as in `findings`; a null kernel means all.
        unsafe {
            let json = sys::culib()
                .get::<unsafe extern "C" fn(*const c_char, *mut u8, usize) -> usize>(b"emu_counters_json\0")
                .unwrap();
            let mut buffer = vec![0; json(std::ptr::null(), std::ptr::null_mut(), 0) + 1];
            json(std::ptr::null(), buffer.as_mut_ptr(), buffer.len());
            buffer.pop();
            String::from_utf8_lossy(&buffer).into_owned()
        }
    }

    /// Forgets all counters.
    ///
    /// # Panics
    /// When the loaded driver is another one.
    pub fn reset_counters() {
        // SAFETY: as in `findings`.
        unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"emu_reset_counters\0").unwrap()() };
    }

    /// Begins to log the driver's functions that are called.
    ///
    /// # Panics
    /// When the loaded driver is another one.
    pub fn log_calls() {
        // SAFETY: as in `findings`.
        unsafe { sys::culib().get::<unsafe extern "C" fn(i32)>(b"emu_call_log\0").unwrap()(1) };
    }

    /// The functions called since, in order; ends the log.
    ///
    /// # Panics
    /// When the loaded driver is another one.
    pub fn calls() -> Vec<String> {
        // SAFETY: as in `findings`; the first call asks for the length.
        unsafe {
            let library = sys::culib();
            let calls = library.get::<unsafe extern "C" fn(*mut u8, usize) -> usize>(b"emu_calls\0").unwrap();
            let mut buffer = vec![0; calls(std::ptr::null_mut(), 0) + 1];
            calls(buffer.as_mut_ptr(), buffer.len());
            library.get::<unsafe extern "C" fn(i32)>(b"emu_call_log\0").unwrap()(0);
            buffer.pop();
            String::from_utf8_lossy(&buffer).lines().map(str::to_owned).collect()
        }
    }

    /// Whatever takes memory fails once, after `after` times; or nothing does. Returns whether the failure asked for before
    /// was still to come.
    ///
    /// # Panics
    /// When the loaded driver is another one.
    pub fn fail_allocation(after: Option<u64>) -> bool {
        let name = after.map_or(std::ptr::null(), |_| c"*".as_ptr());
        // SAFETY: as in `findings`; the text is a constant.
        let pending = unsafe {
            sys::culib().get::<unsafe extern "C" fn(*const c_char, u64) -> i32>(b"emu_fail\0").unwrap()(
                name,
                after.unwrap_or_default(),
            )
        };
        pending != 0
    }

    pub(super) fn clear_findings() {
        // SAFETY: as in `findings`.
        unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"emu_clear_errors\0").unwrap()() };
    }

    /// Sets one of the emulator's settings (`EMU_CHECKS`, ...).
    ///
    /// # Panics
    /// When the loaded driver is another one, or the value is not one for the key.
    pub fn set(key: &CStr, value: &CStr) {
        // SAFETY: as in `findings`; the texts outlive the call.
        unsafe {
            let set = sys::culib()
                .get::<unsafe extern "C" fn(*const c_char, *const c_char) -> i32>(b"emu_set\0")
                .unwrap();
            assert_eq!(set(key.as_ptr(), value.as_ptr()), 0);
        }
    }
}

/// A storage type of the kernels, as the tests see it.
pub trait Value: Element + Debug + PartialEq + Default + cudarc::driver::ValidAsZeroBits {
    /// Twice the relative error of rounding to it.
    const EPSILON: f32;
    /// Rounds to nearest, ties to even.
    fn of(x: f32) -> Self;
    /// The exact value.
    fn wide(self) -> f32;
}

impl Value for f32 {
    const EPSILON: f32 = f32::EPSILON;
    fn of(x: f32) -> Self {
        x
    }
    fn wide(self) -> f32 {
        self
    }
}

impl Value for f16 {
    const EPSILON: f32 = 1.0 / 1024.0;
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Value for bf16 {
    const EPSILON: f32 = 1.0 / 128.0;
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

/// Values rounded to a storage type.
pub fn rounded<T: Value>(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&x| T::of(x).wide()).collect()
}

/// Values in -spread..spread that the storage type holds exactly.
pub fn random<T: Value>(count: usize, seed: u64, spread: f32) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| T::of(spread * rng.random_range(-1.0_f32..1.0)).wide()).collect()
}

/// A tensor of the reference.
///
/// # Panics
/// When the shape does not fit.
pub fn tensor(shape: &[usize], values: Vec<f32>) -> Tensor {
    Tensor::new(shape, values).unwrap()
}

/// Where rows lie in memory: gaps of `gap` elements behind each row, `lead` elements before the first.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Images, tokens, width.
    pub shape: [usize; 3],
    /// Elements between the end of a row and the next.
    pub gap: usize,
    /// Elements before the first row.
    pub lead: usize,
}

/// What stands where nobody may write.
pub const UNTOUCHED: f32 = -77.0;

impl Layout {
    fn step(&self) -> usize {
        self.shape[2] + self.gap
    }

    /// Values with their gaps, as they are uploaded.
    pub fn spread(&self, values: &[f32]) -> Vec<f32> {
        let mut memory = vec![UNTOUCHED; self.lead];
        for row in values.chunks(self.shape[2]) {
            memory.extend_from_slice(row);
            memory.extend(std::iter::repeat_n(UNTOUCHED, self.gap));
        }
        memory
    }

    /// The memory of an output before the launch.
    pub fn blank(&self) -> Vec<f32> {
        self.spread(&vec![UNTOUCHED; self.shape.iter().product()])
    }

    /// The values without their gaps.
    ///
    /// # Panics
    /// When a gap was written to.
    pub fn gather(&self, memory: &[f32]) -> Vec<f32> {
        let (lead, rows) = memory.split_at(self.lead);
        assert!(lead.iter().all(|&x| x == UNTOUCHED), "written before the first row");
        let rows = rows.chunks(self.step()).flat_map(|row| {
            assert!(row[self.shape[2]..].iter().all(|&x| x == UNTOUCHED), "written behind a row");
            &row[..self.shape[2]]
        });
        rows.copied().collect()
    }

    /// The tensor behind the view that `part` takes of its memory.
    pub fn over<V>(&self, view: V) -> Strided<V> {
        let step = self.step();
        Strided::new(view, self.shape).with_strides([self.shape[1] * step, step])
    }
}

/// A random plan: each token goes to one of `out` groups or is dropped; weights sum to one in a group. A lone member has
/// weight 1 or, now and then, another one.
///
/// # Panics
/// Never: what it builds is a plan.
pub fn random_plan(batch: usize, tokens: usize, out: usize, seed: u64) -> TokenPlan {
    let mut rng = StdRng::seed_from_u64(seed);
    // Few large groups, or none.
    let favour = rng.random_bool(0.3);
    let groups: Vec<Vec<Vec<(usize, f32)>>> = (0..batch)
        .map(|_| {
            let mut groups: Vec<Vec<(usize, f32)>> = vec![Vec::new(); out];
            for token in 0..tokens {
                let group = if favour && rng.random_bool(0.5) { 0 } else { rng.random_range(0..=out) };
                if let Some(group) = groups.get_mut(group) {
                    group.push((token, rng.random_range(0.1_f32..1.0)));
                }
            }
            for group in &mut groups {
                let total: f32 = group.iter().map(|member| member.1).sum();
                if group.len() > 1 || rng.random_bool(0.8) {
                    group.iter_mut().for_each(|member| member.1 /= total);
                }
            }
            groups
        })
        .collect();
    TokenPlan::from_groups(tokens, &groups).unwrap()
}

/// Bits, with one pattern for NaN and for zero: plans and rows compare exactly, whatever they hold.
pub fn bits(values: &[f32]) -> Vec<u32> {
    let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { (x + 0.0).to_bits() };
    values.iter().map(|&x| bits(x)).collect()
}

/// A plan's arrays, comparable also with NaN among the weights.
pub fn arrays(plan: &TokenPlan) -> (Vec<i32>, Vec<i32>, Vec<u32>) {
    (plan.offsets().to_vec(), plan.members().to_vec(), bits(plan.weights()))
}

/// The output token of each input token of all images.
pub fn groups_of(plan: &TokenPlan) -> Vec<i32> {
    (0..plan.batch()).flat_map(|image| plan.group_of(image)).collect()
}

/// How far a LayerNorm on the device may be from the reference's `value` in a row of `x`, with weights and biases of at most
/// 1: both sum in f32 in an order of their own, and the result is rounded to `T`.
///
/// The mean of K values is off by about eps·sqrt(K)·max|x|, which the division by the deviation magnifies where a row is
/// nearly constant; the deviation itself is off by eps·sqrt(K) of its size.
pub fn norm_tolerance<T: Value>(x: &[f32], epsilon: f32, value: f32) -> f32 {
    let count = x.len() as f32;
    let mean = x.iter().sum::<f32>() / count;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / count;
    let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let magnified = largest / (variance + epsilon).sqrt();
    let sums = 4.0 * f32::EPSILON * count.sqrt() * (2.0 + magnified + value.abs());
    // Two last places where the sums stand on different sides of a rounding boundary; below 2^-14 f16 is subnormal.
    sums + T::EPSILON * (value.abs() + sums) + 6.0e-8
}
