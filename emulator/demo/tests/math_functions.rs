//! The CUDA maths library as nvcc compiles it, run through the emulator and held to double precision. Errors are counted as
//! the CUDA Programming Guide does: in units in the last place, from the correctly rounded result.
//!
//! Everything runs twice: with `EMU_APPROX=exact`, and by default, where the approximating instructions are as far off as PTX
//! allows them to be, which is further than the hardware that the guide was measured on.

#[path = "../../tests/cuda/mod.rs"]
mod sources;

use std::{
    ffi::c_char,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::{
    driver::{CudaContext, CudaModule, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg, sys},
    nvrtc::Ptx,
};
use half::{bf16, f16};

/// The tests share the loaded library's settings.
static SETTINGS: Mutex<()> = Mutex::new(());

struct Device {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    _guard: MutexGuard<'static, ()>,
}

impl Device {
    fn new(degraded: bool) -> Self {
        let guard = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let context = CudaContext::new(0).unwrap();
        let value = if degraded { c"" } else { c"exact" };
        // SAFETY: the signature of this export of the emulator, which is the loaded library: no other has it.
        unsafe {
            let set = sys::culib()
                .get::<unsafe extern "C" fn(*const c_char, *const c_char) -> i32>(b"emu_set\0")
                .expect("the emulated driver");
            assert_eq!(set(c"EMU_APPROX".as_ptr(), value.as_ptr()), 0);
        }
        let module = context.load_module(Ptx::from_src(sources::ptx("mathfn"))).unwrap();
        Self { stream: context.default_stream(), module, _guard: guard }
    }

    fn run<T: DeviceRepr + Clone + Default>(&self, name: &str, xs: &[T], ys: Option<&[T]>) -> Vec<T> {
        let function = self.module.load_function(name).unwrap();
        let device_xs = self.stream.clone_htod(xs).unwrap();
        let device_ys = ys.map(|ys| self.stream.clone_htod(ys).unwrap());
        // SAFETY: the kernel writes every value.
        let mut out = unsafe { self.stream.alloc::<T>(xs.len()) }.unwrap();
        let count = xs.len() as i32;
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&device_xs);
        if let Some(ys) = &device_ys {
            assert_eq!(ys.len(), xs.len());
            launch.arg(ys);
        }
        launch.arg(&mut out).arg(&count);
        let grid_dim = ((count as u32).div_ceil(128), 1, 1);
        // SAFETY: the parameters of the kernels of this file, with buffers of `count` values.
        unsafe { launch.launch(LaunchConfig { grid_dim, block_dim: (128, 1, 1), shared_mem_bytes: 0 }) }
            .unwrap();
        self.stream.clone_dtoh(&out).unwrap()
    }
}

/// erf by its Maclaurin series, and beyond 3 by the continued fraction of its complement (Lentz).
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-20 * sum {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        return (2.0 / std::f64::consts::PI.sqrt() * sum).copysign(x);
    }
    let mut fraction = a;
    for k in (1..=60).rev() {
        fraction = a + f64::from(k) / 2.0 / fraction;
    }
    let complement = (-a * a).exp() / (std::f64::consts::PI.sqrt() * fraction);
    (1.0 - complement).copysign(x)
}

/// The distance between neighbouring values of a type with `bits` bits of significand and least exponent `least`.
fn ulp(value: f64, bits: i32, least: i32) -> f64 {
    let exponent = if value == 0.0 { least } else { (value.abs().log2().floor() as i32).max(least) };
    2f64.powi(exponent - bits + 1)
}

/// A number type of the kernels: its rounding and the size of its last place.
trait Real: DeviceRepr + Copy + Default + std::fmt::Debug {
    const PREFIX: &'static str;
    fn from(value: f64) -> Self;
    fn to(self) -> f64;
    fn ulp(value: f64) -> f64;
}

impl Real for f32 {
    const PREFIX: &'static str = "f32";
    fn from(value: f64) -> Self {
        value as Self
    }
    fn to(self) -> f64 {
        f64::from(self)
    }
    fn ulp(value: f64) -> f64 {
        ulp(value, 24, -126)
    }
}

impl Real for f16 {
    const PREFIX: &'static str = "f16";
    fn from(value: f64) -> Self {
        Self::from_f64(value)
    }
    fn to(self) -> f64 {
        self.to_f64()
    }
    fn ulp(value: f64) -> f64 {
        ulp(value, 11, -14)
    }
}

impl Real for bf16 {
    const PREFIX: &'static str = "bf16";
    fn from(value: f64) -> Self {
        Self::from_f64(value)
    }
    fn to(self) -> f64 {
        self.to_f64()
    }
    fn ulp(value: f64) -> f64 {
        ulp(value, 8, -126)
    }
}

/// Evenly spaced values, with the ends.
fn span(from: f64, to: f64) -> Vec<f64> {
    const COUNT: u32 = 3000;
    (0..=COUNT).map(|i| from + (to - from) * f64::from(i) / f64::from(COUNT)).collect()
}

/// Values over many powers of two, positive.
fn powers(from: i32, to: i32) -> Vec<f64> {
    span(f64::from(from), f64::from(to)).into_iter().map(f64::exp2).collect()
}

/// Holds a kernel to `reference`: no result may be more than `bound` units off.
fn hold<T: Real>(device: &Device, name: &str, bound: f64, xs: &[f64], reference: impl Fn(f64) -> f64) {
    let xs: Vec<T> = xs.iter().map(|&x| T::from(x)).collect();
    let found = device.run(&format!("{}_{name}", T::PREFIX), &xs, None);
    let results = xs.iter().zip(found).map(|(x, found)| (format!("{x:?}"), reference(x.to()), found));
    within::<T>(name, bound, results);
}

/// The same for a function of two values: every x with every y.
fn hold2<T: Real>(
    device: &Device,
    name: &str,
    bound: f64,
    xs: &[f64],
    ys: &[f64],
    reference: impl Fn(f64, f64) -> f64,
) {
    let pairs: Vec<(T, T)> =
        xs.iter().flat_map(|&x| ys.iter().map(move |&y| (T::from(x), T::from(y)))).collect();
    let (xs, ys): (Vec<T>, Vec<T>) = pairs.into_iter().unzip();
    let found = device.run(&format!("{}_{name}", T::PREFIX), &xs, Some(&ys));
    let pairs = xs.iter().zip(&ys).zip(found);
    let results = pairs.map(|((x, y), found)| (format!("{x:?}, {y:?}"), reference(x.to(), y.to()), found));
    within::<T>(name, bound, results);
}

fn within<T: Real>(name: &str, bound: f64, results: impl Iterator<Item = (String, f64, T)>) {
    let (mut worst, mut place) = (0.0, String::new());
    for (x, expected, found) in results {
        let (rounded, found) = (T::from(expected).to(), found.to());
        let error = if rounded == found || rounded.is_nan() && found.is_nan() {
            0.0
        } else if rounded.is_finite() && found.is_finite() {
            (found - rounded).abs() / T::ulp(expected)
        } else {
            f64::INFINITY
        };
        if error > worst {
            (worst, place) = (error, format!("{x}: {found:e}, expected {rounded:e}"));
        }
    }
    println!("{}_{name}: {worst} ulp of {bound} at {place}", T::PREFIX);
    assert!(worst <= bound, "{}_{name}({place}) is {worst} ulp off, {bound} allowed", T::PREFIX);
}

/// The reference itself against published digits (Abramowitz and Stegun, table 7.1), on both sides of its seam.
#[test]
fn the_reference_of_erf() {
    let table =
        [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (3.5, 0.999_999_256_9)];
    for (x, expected) in table {
        assert!((erf(x) - expected).abs() < 1e-10, "{x}: {}", erf(x));
        assert_eq!(erf(-x), -erf(x));
    }
    assert!((erf(3.0 - 1e-12) - erf(3.0)).abs() < 1e-12);
}

fn single_precision(degraded: bool) {
    let device = Device::new(degraded);
    let all: Vec<f64> = span(-30.0, 30.0);
    let (tiny, around_one) = (powers(-30, 0), span(0.5, 2.0));
    let normal = powers(-125, 127);
    // The guide's bound is the hardware's. By PTX's word ex2.approx is within 2^-22.5 of its result, which is 2.83 units of f32
    // just below a power of two; the rounding of the argument, which is carried in two parts, adds no more.
    let exp = if degraded { 3.0 } else { 1.0 };
    hold::<f32>(&device, "exp", exp, &[span(-87.0, 88.7), tiny.clone()].concat(), f64::exp);
    hold::<f32>(&device, "exp2", 2.0, &span(-125.0, 127.9), f64::exp2);
    hold::<f32>(&device, "expm1", 1.0, &[span(-20.0, 88.0), tiny.clone()].concat(), f64::exp_m1);
    hold::<f32>(&device, "log", 1.0, &[normal.clone(), around_one.clone()].concat(), f64::ln);
    hold::<f32>(&device, "log2", 1.0, &[normal.clone(), around_one].concat(), f64::log2);
    hold::<f32>(&device, "log1p", 1.0, &[powers(-30, 100), span(-0.9, 2.0)].concat(), f64::ln_1p);
    hold::<f32>(&device, "erf", 2.0, &[span(-5.0, 5.0), tiny.clone()].concat(), erf);
    hold::<f32>(&device, "tanh", 2.0, &[span(-10.0, 10.0), tiny].concat(), f64::tanh);
    hold::<f32>(&device, "sin", 2.0, &[all.clone(), span(-1e5, 1e5)].concat(), f64::sin);
    hold::<f32>(&device, "cos", 2.0, &[all, span(-1e5, 1e5)].concat(), f64::cos);
    hold::<f32>(&device, "sqrt", 0.0, &normal, f64::sqrt);
    hold::<f32>(&device, "rsqrt", 2.0, &normal, |x| 1.0 / x.sqrt());
    hold::<f32>(&device, "reciprocal", 0.0, &powers(-125, 125), |x| 1.0 / x);
    let few: Vec<f64> = powers(-20, 20).into_iter().step_by(101).collect();
    let signed: Vec<f64> = few.iter().flat_map(|&x| [x, -x]).collect();
    let exponents: Vec<f64> = span(-4.0, 4.0).into_iter().step_by(60).collect();
    hold2::<f32>(&device, "pow", 4.0, &few, &exponents, f64::powf);
    hold2::<f32>(&device, "divide", 0.0, &signed, &few, |x, y| x / y);
    hold2::<f32>(&device, "fdividef", 0.0, &signed, &few, |x, y| x / y);
    hold2::<f32>(&device, "approximate_divide", 2.0, &signed, &few, |x, y| x / y);
    hold2::<f32>(&device, "remainder", 0.0, &signed, &few, |x, y| x % y);

    let infinity = f64::INFINITY;
    let specials = [0.0, -0.0, infinity, -infinity, f64::NAN];
    let negative = [specials.as_slice(), &[-1.0]].concat();
    hold::<f32>(&device, "exp", 0.0, &specials, f64::exp);
    hold::<f32>(&device, "log", 0.0, &negative, f64::ln);
    hold::<f32>(&device, "tanh", 0.0, &specials, f64::tanh);
    hold::<f32>(&device, "sqrt", 0.0, &negative, f64::sqrt);
    hold::<f32>(&device, "sin", 0.0, &specials, f64::sin);
    hold::<f32>(&device, "erf", 0.0, &specials, |x| if x.is_infinite() { x.signum() } else { erf(x) });
    let two = [0.0, 1.0, -1.0, infinity, -infinity, f64::NAN];
    hold2::<f32>(&device, "pow", 0.0, &two, &two, f64::powf);
    hold2::<f32>(&device, "divide", 0.0, &two, &two, |x, y| x / y);
}

#[test]
fn single_precision_with_exact_approximations() {
    single_precision(false);
}

#[test]
fn single_precision_as_far_off_as_documented() {
    single_precision(true);
}

fn half_precision<T: Real>(degraded: bool) {
    let device = &Device::new(degraded);
    // These compute in f32 and round once, which an error of a few units of f32 can tip to the neighbour; and for a few
    // arguments the library moves the result by one unit, where the hardware's own approximation tips.
    let tipped = 1.0;
    hold::<T>(device, "exp", tipped, &span(-9.0, 11.0), f64::exp);
    hold::<T>(device, "exp2", tipped, &span(-13.0, 15.9), f64::exp2);
    hold::<T>(device, "log", tipped, &[powers(-13, 15), span(0.5, 2.0)].concat(), f64::ln);
    hold::<T>(device, "log2", tipped, &[powers(-13, 15), span(0.5, 2.0)].concat(), f64::log2);
    hold::<T>(device, "tanh", tipped, &span(-8.0, 8.0), f64::tanh);
    hold::<T>(device, "sin", tipped, &span(-6.0, 6.0), f64::sin);
    hold::<T>(device, "cos", tipped, &span(-6.0, 6.0), f64::cos);
    hold::<T>(device, "sqrt", tipped, &powers(-13, 15), f64::sqrt);
    hold::<T>(device, "rsqrt", tipped, &powers(-13, 15), |x| 1.0 / x.sqrt());
    hold::<T>(device, "reciprocal", tipped, &powers(-13, 13), |x| 1.0 / x);
    let few: Vec<f64> = powers(-7, 7).into_iter().step_by(101).flat_map(|x| [x, -x]).collect();
    hold2::<T>(device, "add", 0.0, &few, &few, |x, y| x + y);
    hold2::<T>(device, "multiply", 0.0, &few, &few, |x, y| x * y);
    hold2::<T>(device, "divide", tipped, &few, &few, |x, y| x / y);
    hold2::<T>(device, "maximum", 0.0, &few, &few, f64::max);
}

#[test]
fn half_precision_with_exact_approximations() {
    half_precision::<f16>(false);
    half_precision::<bf16>(false);
}

#[test]
fn half_precision_as_far_off_as_documented() {
    half_precision::<f16>(true);
    half_precision::<bf16>(true);
}

/// The bounds can fail: a result three units off is noticed.
#[test]
#[should_panic(expected = "3 ulp off, 2 allowed")]
fn a_worse_result_is_noticed() {
    within::<f32>("exp", 2.0, [("0".to_owned(), 1.0, 1.0 + 3.0 * f32::EPSILON)].into_iter());
}
