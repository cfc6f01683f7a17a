//! The CUDA mathematical functions, as nvcc compiles them, against f64 references.

#[path = "common/apply.rs"]
mod apply;
mod common;
#[path = "cuda/mod.rs"]
mod cuda_sources;
#[path = "common/oracle.rs"]
mod oracle;

use apply::Random;
use common::{Arg, config, halves, run_with, words};
use oracle::{BF16, F16, F32, F64, Format, Mode};

/// erf by the series of positive terms `2/sqrt(pi) e^(-x^2) sum (2^n x^(2n+1) / (1 * 3 * ... (2n+1)))`.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, 0.0);
    for n in 0..400 {
        sum += term;
        term *= 2.0 * x * x / f64::from(2 * n + 3);
    }
    if x.abs() > 6.0 { x.signum() } else { std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum }
}

/// What the last place of an f32 near `y` is worth.
fn unit(y: f64, format: Format) -> f64 {
    let least = 2 - ((1 << (format.exponent - 1)) - 1) - format.digits as i32;
    let exponent = y.abs().max(1e-300).log2().floor() as i32 + 1 - format.digits as i32;
    2f64.powi(exponent.max(least))
}

fn launch(name: &str, inputs: &[Arg], size: usize, count: usize, exact: bool) -> common::Ran {
    let settings = if exact { config(&[("EMU_APPROX", "exact")]) } else { config(&[]) };
    let mut args = inputs.to_vec();
    args.push(Arg::Out(size * count));
    args.push(Arg::U32(count as u32));
    let ptx = cuda_sources::stored("mathfn");
    run_with(&ptx, name, [count.div_ceil(256) as u32, 1, 1], [256, 1, 1], 0, &args, settings).silent()
}

fn uniform(seed: u64, low: f32, high: f32, count: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..count).map(|_| low + (high - low) * ((random.next() >> 40) as f32 / (1u64 << 24) as f32)).collect()
}

/// Positive numbers of every size.
fn sizes(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..count).map(|_| f32::from_bits((random.next() % 0x7e00_0000) as u32 + 0x0080_0000)).collect()
}

struct Unary {
    name: &'static str,
    value: fn(f64) -> f64,
    arguments: Vec<f32>,
    /// Units in the last place, exact and with the documented errors of the approximations inside.
    bounds: [f64; 2],
}

#[test]
fn f32_functions() {
    let near = |low, high| uniform(1, low, high, 4000);
    // The second bound is larger only where nvcc's code uses an approximation: ex2 adds 2^-22.5 (up to 3 units), as does
    // rsqrt with 2^-22.9.
    let functions = [
        Unary { name: "f32_exp", value: f64::exp, arguments: near(-87.0, 88.5), bounds: [2.0, 5.0] },
        Unary { name: "f32_exp2", value: f64::exp2, arguments: near(-126.0, 127.9), bounds: [2.0, 4.0] },
        Unary { name: "f32_expm1", value: f64::exp_m1, arguments: near(-20.0, 88.0), bounds: [2.0, 5.0] },
        Unary { name: "f32_expm1", value: f64::exp_m1, arguments: near(-0.5, 0.5), bounds: [2.0, 5.0] },
        Unary { name: "f32_log", value: f64::ln, arguments: sizes(2, 4000), bounds: [2.0; 2] },
        Unary { name: "f32_log", value: f64::ln, arguments: near(0.4, 2.5), bounds: [2.0; 2] },
        Unary { name: "f32_log2", value: f64::log2, arguments: sizes(3, 4000), bounds: [2.0; 2] },
        Unary { name: "f32_log2", value: f64::log2, arguments: near(0.4, 2.5), bounds: [2.0; 2] },
        Unary { name: "f32_log1p", value: f64::ln_1p, arguments: near(-0.9, 10.0), bounds: [2.0; 2] },
        Unary { name: "f32_tanh", value: f64::tanh, arguments: near(-10.0, 10.0), bounds: [2.0, 4.0] },
        Unary { name: "f32_tanh", value: f64::tanh, arguments: near(-0.7, 0.7), bounds: [2.0, 4.0] },
        Unary { name: "f32_sin", value: f64::sin, arguments: near(-100.0, 100.0), bounds: [2.0; 2] },
        // Above 105615 the reduction of the argument takes another way.
        Unary { name: "f32_sin", value: f64::sin, arguments: near(1e5, 1e9), bounds: [2.0; 2] },
        Unary { name: "f32_cos", value: f64::cos, arguments: near(-100.0, 100.0), bounds: [2.0; 2] },
        Unary { name: "f32_cos", value: f64::cos, arguments: near(1e5, 1e9), bounds: [2.0; 2] },
        Unary { name: "f32_sqrt", value: f64::sqrt, arguments: sizes(4, 4000), bounds: [0.5; 2] },
        Unary { name: "f32_rsqrt", value: |x| 1.0 / x.sqrt(), arguments: sizes(5, 4000), bounds: [2.0, 3.0] },
        Unary {
            name: "f32_reciprocal",
            value: |x| 1.0 / x,
            arguments: near(-1000.0, 1000.0),
            bounds: [0.5; 2],
        },
    ];
    for f in functions {
        let bits: Vec<u32> = f.arguments.iter().map(|x| x.to_bits()).collect();
        for (exact, bound) in [(true, f.bounds[0]), (false, f.bounds[1])] {
            let ran = launch(f.name, &[words(&bits)], 4, bits.len(), exact);
            for (x, got) in f.arguments.iter().zip(ran.words(1)) {
                let (got, want) = (f64::from(f32::from_bits(got)), (f.value)(f64::from(*x)));
                let units = (got - want).abs() / unit(want, F32);
                assert!(units <= bound, "{} of {x:e}: {got:e}, not {want:e}: {units} units", f.name);
            }
        }
    }
}

#[test]
fn f32_erf() {
    let mut arguments = uniform(7, -4.5, 4.5, 6000);
    arguments.extend(uniform(8, -1e-3, 1e-3, 1000));
    let bits: Vec<u32> = arguments.iter().map(|x| x.to_bits()).collect();
    for exact in [true, false] {
        let ran = launch("f32_erf", &[words(&bits)], 4, bits.len(), exact);
        for (x, got) in arguments.iter().zip(ran.words(1)) {
            let (got, want) = (f64::from(f32::from_bits(got)), erf(f64::from(*x)));
            assert!((got - want).abs() <= 4e-7 * want.abs(), "erff of {x:e}: {got:e}, not {want:e}");
        }
    }
}

/// Name, reference, arguments, bounds as in [`Unary`].
type Binary<'a> = (&'a str, fn(f64, f64) -> f64, &'a [f32], &'a [f32], [f64; 2]);

#[test]
fn f32_functions_of_two_numbers() {
    let count = 4000;
    // Powers between 2^-126 and 2^127.
    let bases = uniform(11, 0.05, 20.0, count);
    let exponents = uniform(12, -25.0, 25.0, count);
    let (a, b) = (uniform(13, -1e4, 1e4, count), uniform(14, 0.5, 500.0, count));
    let cases: [Binary<'_>; 5] = [
        ("f32_pow", f64::powf, &bases, &exponents, [2.0, 5.0]),
        ("f32_divide", |x, y| x / y, &a, &b, [0.5; 2]),
        ("f32_fdividef", |x, y| x / y, &a, &b, [0.51, 2.0]),
        ("f32_approximate_divide", |x, y| x / y, &a, &b, [0.51, 2.0]),
        ("f32_remainder", |x, y| x % y, &a, &b, [0.0; 2]),
    ];
    for (name, value, xs, ys, bounds) in cases {
        let [x_bits, y_bits] = [xs, ys].map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<u32>>());
        for (exact, bound) in [(true, bounds[0]), (false, bounds[1])] {
            let ran = launch(name, &[words(&x_bits), words(&y_bits)], 4, count, exact);
            for (i, got) in ran.words(2).into_iter().enumerate() {
                let (x, y) = (f64::from(xs[i]), f64::from(ys[i]));
                let (got, want) = (f64::from(f32::from_bits(got)), value(x, y));
                let units = (got - want).abs() / unit(want, F32);
                assert!(units <= bound, "{name} of {x:e}, {y:e}: {got:e}, not {want:e}: {units} units");
            }
        }
    }
}

#[test]
fn special_arguments() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let cases: &[(&str, &[(f32, f32)])] = &[
        ("f32_exp", &[(0.0, 1.0), (-inf, 0.0), (inf, inf), (nan, nan), (200.0, inf), (-200.0, 0.0)]),
        ("f32_log", &[(1.0, 0.0), (0.0, -inf), (inf, inf), (-1.0, nan), (nan, nan)]),
        ("f32_tanh", &[(0.0, 0.0), (inf, 1.0), (-inf, -1.0), (50.0, 1.0), (nan, nan)]),
        ("f32_erf", &[(0.0, 0.0), (inf, 1.0), (-inf, -1.0), (nan, nan)]),
        ("f32_sin", &[(0.0, 0.0), (inf, nan), (nan, nan)]),
        ("f32_cos", &[(0.0, 1.0), (inf, nan), (nan, nan)]),
        ("f32_rsqrt", &[(4.0, 0.5), (0.0, inf), (inf, 0.0), (-1.0, nan)]),
        ("f32_sqrt", &[(4.0, 2.0), (0.0, 0.0), (inf, inf), (-1.0, nan)]),
    ];
    for exact in [true, false] {
        for (name, table) in cases {
            let bits: Vec<u32> = table.iter().map(|(x, _)| x.to_bits()).collect();
            let ran = launch(name, &[words(&bits)], 4, bits.len(), exact);
            for ((x, want), got) in table.iter().zip(ran.words(1)) {
                let got = f32::from_bits(got);
                assert!(got == *want || got.is_nan() && want.is_nan(), "{name} of {x}: {got}, not {want}");
            }
        }
    }
}

fn to_f64(bits: u16, format: Format) -> f64 {
    f64::from_bits(format.convert(bits.into(), F64, Mode::Rn))
}

/// Half-precision functions on every finite argument in a range: one rounding of a good f32 value, two units at most.
#[test]
fn half_functions() {
    type Case = (&'static str, fn(f64) -> f64, f64, f64);
    let cases: [Case; 10] = [
        ("exp", f64::exp, -8.0, 10.0),
        ("exp2", f64::exp2, -13.0, 15.0),
        ("log", f64::ln, 1e-4, 6e4),
        ("log2", f64::log2, 1e-4, 6e4),
        ("tanh", f64::tanh, -8.0, 8.0),
        ("sin", f64::sin, -100.0, 100.0),
        ("cos", f64::cos, -100.0, 100.0),
        ("sqrt", f64::sqrt, 1e-4, 6e4),
        ("rsqrt", |x| 1.0 / x.sqrt(), 1e-4, 6e4),
        ("reciprocal", |x| 1.0 / x, 1e-4, 6e4),
    ];
    for (prefix, format) in [("f16", F16), ("bf16", BF16)] {
        let values: Vec<(u16, f64)> = (0..=u16::MAX).map(|h| (h, to_f64(h, format))).collect();
        for (function, value, low, high) in cases {
            let name = format!("{prefix}_{function}");
            let inside: Vec<(u16, f64)> =
                values.iter().copied().filter(|(_, x)| (low..=high).contains(x)).collect();
            let bits: Vec<u16> = inside.iter().map(|v| v.0).collect();
            for exact in [true, false] {
                let ran = launch(&name, &[halves(&bits)], 2, bits.len(), exact);
                for ((_, x), got) in inside.iter().zip(ran.halves(1)) {
                    let (got, want) = (values[usize::from(got)].1, value(*x));
                    let units = (got - want).abs() / unit(want, format);
                    assert!(units <= 2.0, "{name} of {x:e}: {got:e}, not {want:e}: {units} units");
                }
            }
        }
    }
}

#[test]
fn half_functions_of_two_numbers() {
    let mut random = Random(31);
    for (prefix, format) in [("f16", F16), ("bf16", BF16)] {
        let [xs, ys] = [0; 2].map(|_| (0..5000).map(|_| random.next() as u16).collect::<Vec<u16>>());
        for exact in [true, false] {
            for function in ["add", "multiply", "divide", "maximum"] {
                let name = format!("{prefix}_{function}");
                let ran = launch(&name, &[halves(&xs), halves(&ys)], 2, xs.len(), exact);
                for (i, got) in ran.halves(2).into_iter().enumerate() {
                    let (x, y) = (u64::from(xs[i]), u64::from(ys[i]));
                    let (a, b) = (to_f64(xs[i], format), to_f64(ys[i], format));
                    let want = match function {
                        "add" => format.add(x, y, Mode::Rn),
                        "multiply" => format.mul(x, y, Mode::Rn),
                        "divide" => format.div(x, y, Mode::Rn),
                        _ if a.is_nan() => {
                            if b.is_nan() {
                                0x7fff
                            } else {
                                y
                            }
                        }
                        _ if b.is_nan() || a > b || (a == b && y == 0x8000) => x,
                        _ => y,
                    };
                    let same = u64::from(got) == want || format.is_nan(got.into()) && format.is_nan(want);
                    assert!(same, "{name} of {a:e}, {b:e}: {got:x}, not {want:x}");
                }
            }
        }
    }
}
