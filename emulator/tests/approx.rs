//! Approximate functions against the f64 functions of the platform: within the documented error, exactly rounded on request,
//! and the special values of the manual's tables.

#[path = "common/apply.rs"]
mod apply;
mod common;
#[path = "common/oracle.rs"]
mod oracle;

use apply::{Random, Values, apply_with};
use common::config;
use oracle::{BF16, F16, F32, F64, Format, Mode};

/// Bound of the error: relative to the result, absolute, or in units of the last place.
#[derive(Clone, Copy, Debug)]
enum Bound {
    Relative(f64),
    Absolute(f64),
    Units(f64),
}

struct Function {
    text: &'static str,
    value: fn(f64) -> f64,
    bound: fn(f64) -> Bound,
    /// Arguments are uniform in exponent (bits) or between these.
    range: Option<(f32, f32)>,
}

fn power(exponent: f64) -> f64 {
    exponent.exp2()
}

fn functions() -> Vec<Function> {
    let circle = |x: f64| {
        if x.abs() <= std::f64::consts::TAU {
            Bound::Absolute(power(-20.5))
        } else {
            Bound::Absolute(power(-14.7))
        }
    };
    let ex2: fn(f64) -> Bound = |_| Bound::Relative(power(-22.5));
    let lg2: fn(f64) -> Bound =
        |x| if x > 0.5 && x < 2.0 { Bound::Absolute(power(-22.6)) } else { Bound::Relative(power(-22.0)) };
    vec![
        Function { text: "ex2.approx.f32", value: f64::exp2, bound: ex2, range: Some((-125.0, 127.9)) },
        Function { text: "ex2.approx.ftz.f32", value: f64::exp2, bound: ex2, range: Some((-4.0, 4.0)) },
        Function { text: "lg2.approx.f32", value: f64::log2, bound: lg2, range: None },
        Function { text: "lg2.approx.ftz.f32", value: f64::log2, bound: lg2, range: Some((0.4, 2.5)) },
        Function { text: "sin.approx.f32", value: f64::sin, bound: circle, range: Some((-6.25, 6.25)) },
        Function { text: "sin.approx.ftz.f32", value: f64::sin, bound: circle, range: Some((-314.0, 314.0)) },
        Function { text: "cos.approx.f32", value: f64::cos, bound: circle, range: Some((-6.25, 6.25)) },
        Function { text: "cos.approx.ftz.f32", value: f64::cos, bound: circle, range: Some((-314.0, 314.0)) },
        Function {
            text: "tanh.approx.f32",
            value: f64::tanh,
            bound: |_| Bound::Relative(power(-11.0)),
            range: Some((-12.0, 12.0)),
        },
        Function {
            text: "tanh.approx.f32",
            value: f64::tanh,
            bound: |_| Bound::Relative(power(-11.0)),
            range: None,
        },
        Function {
            text: "rsqrt.approx.f32",
            value: |x| 1.0 / x.sqrt(),
            bound: |_| Bound::Relative(power(-22.9)),
            range: None,
        },
        Function {
            text: "rsqrt.approx.ftz.f32",
            value: |x| 1.0 / x.sqrt(),
            bound: |_| Bound::Relative(power(-22.9)),
            range: Some((0.1, 10.0)),
        },
        Function { text: "rcp.approx.f32", value: |x| 1.0 / x, bound: |_| Bound::Units(1.0), range: None },
        Function {
            text: "rcp.approx.ftz.f32",
            value: |x| 1.0 / x,
            bound: |_| Bound::Units(1.0),
            range: Some((-9.0, 9.0)),
        },
        Function {
            text: "sqrt.approx.f32",
            value: f64::sqrt,
            bound: |_| Bound::Relative(power(-23.0)),
            range: None,
        },
        Function {
            text: "sqrt.approx.ftz.f32",
            value: f64::sqrt,
            bound: |_| Bound::Relative(power(-23.0)),
            range: Some((0.0, 100.0)),
        },
    ]
}

/// What the last place of a float near `y` is worth.
fn unit(y: f64, format: Format) -> f64 {
    let least = 2 - ((1 << (format.exponent - 1)) - 1) - format.digits as i32;
    let exponent = y.abs().log2().floor() as i32 + 1 - format.digits as i32;
    2f64.powi(exponent.max(least))
}

fn to_f64(bits: u64, format: Format) -> f64 {
    if format == F32 {
        return f64::from(f32::from_bits(bits as u32));
    }
    f64::from_bits(format.convert(bits, F64, Mode::Rn))
}

fn arguments(range: Option<(f32, f32)>) -> Vec<u64> {
    let mut random = Random(17);
    (0..6000)
        .map(|_| match range {
            Some((low, high)) => {
                let t = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
                u64::from((low + (high - low) * t as f32).to_bits())
            }
            None => loop {
                let bits = random.next() >> 33;
                // Positive, and not so near the ends that results are subnormal.
                if (0x0100_0000..0x7e00_0000).contains(&bits) {
                    break bits;
                }
            },
        })
        .collect()
}

#[track_caller]
fn within(text: &str, x: f64, got: f64, want: f64, bound: Bound, format: Format) {
    let error = (got - want).abs();
    let allowed = match bound {
        Bound::Relative(e) => e * want.abs(),
        Bound::Absolute(e) => e,
        Bound::Units(u) => u * unit(want, format),
    };
    assert!(
        error <= allowed,
        "{text} of {x:e}: {got:e} is {error:e} from {want:e}, allowed {allowed:e} ({bound:?})"
    );
}

#[test]
fn f32_functions_keep_their_documented_error() {
    for f in functions() {
        let values = arguments(f.range);
        let text = format!("{} d, a;", f.text);
        let sources = [Values(4, values.clone())];
        let exact = apply_with(&text, 4, &sources, config(&[("EMU_APPROX", "exact")]));
        let rough = apply_with(&text, 4, &sources, config(&[]));
        let again = apply_with(&text, 4, &sources, config(&[]));
        assert_eq!(rough, again, "{text} is not the same from run to run");
        let (mut wrong, mut moved) = (0, 0);
        for i in 0..values.len() {
            let x = to_f64(values[i], F32);
            let want = (f.value)(x);
            within(f.text, x, to_f64(rough[i], F32), want, (f.bound)(x), F32);
            within(f.text, x, to_f64(exact[i], F32), want, Bound::Units(0.51), F32);
            wrong += usize::from(exact[i] != u64::from((want as f32).to_bits()));
            moved += usize::from(exact[i] != rough[i]);
        }
        // The f64 in between is good to 1e-9 or better: only then are nearly all results the nearest ones.
        assert!(wrong < values.len() / 50, "{text}: {wrong} not rounded correctly");
        // The error is not only documented but there: a rounding that hides it would hide it from kernels too.
        assert!(moved > values.len() / 10, "{text}: only {moved} differ from the exact values");
    }
}

fn bits(x: f32) -> u64 {
    x.to_bits().into()
}

#[test]
fn special_values() {
    let (inf, zero) = (f32::INFINITY, 0.0f32);
    let nan = f32::from_bits(0x7fff_ffff);
    let small = f32::from_bits(1);
    let cases: &[(&str, &[(f32, f32)])] = &[
        (
            "ex2.approx.f32",
            &[
                (-inf, 0.0),
                (inf, inf),
                (zero, 1.0),
                (-zero, 1.0),
                (small, 1.0),
                (nan, nan),
                (-3.0, 0.125),
                (10.0, 1024.0),
                (-149.0, 1e-45),
                (-160.0, 0.0),
                (128.0, inf),
            ],
        ),
        ("ex2.approx.ftz.f32", &[(-inf, 0.0), (small, 1.0), (-130.0, 0.0), (5.0, 32.0), (nan, nan)]),
        (
            "lg2.approx.f32",
            &[
                (zero, -inf),
                (-zero, -inf),
                (-1.0, nan),
                (-inf, nan),
                (inf, inf),
                (nan, nan),
                (1.0, 0.0),
                (8.0, 3.0),
                (0.25, -2.0),
                (small, -149.0),
                (-small, nan),
            ],
        ),
        ("lg2.approx.ftz.f32", &[(small, -inf), (-small, -inf), (1.0, 0.0), (2.0, 1.0)]),
        (
            "rcp.approx.f32",
            &[
                (zero, inf),
                (-zero, -inf),
                (inf, 0.0),
                (-inf, -zero),
                (nan, nan),
                (4.0, 0.25),
                (-2.0, -0.5),
                (small, inf),
            ],
        ),
        (
            "rcp.approx.ftz.f32",
            &[(small, inf), (-small, -inf), (2f32.powi(127), 0.0), (-2f32.powi(127), -zero)],
        ),
        (
            "rsqrt.approx.f32",
            &[
                (zero, inf),
                (-zero, -inf),
                (inf, 0.0),
                (-1.0, nan),
                (-inf, nan),
                (nan, nan),
                (4.0, 0.5),
                (1.0, 1.0),
            ],
        ),
        ("rsqrt.approx.ftz.f32", &[(small, inf), (-small, -inf), (16.0, 0.25)]),
        ("sqrt.approx.f32", &[(zero, 0.0), (-zero, -zero), (inf, inf), (-1.0, nan), (nan, nan), (4.0, 2.0)]),
        ("sqrt.approx.ftz.f32", &[(small, 0.0), (-small, -zero), (0.25, 0.5)]),
        ("sin.approx.f32", &[(zero, 0.0), (-zero, -zero), (inf, nan), (-inf, nan), (nan, nan)]),
        ("sin.approx.ftz.f32", &[(small, 0.0), (-small, -zero)]),
        ("cos.approx.f32", &[(zero, 1.0), (-zero, 1.0), (inf, nan), (-inf, nan), (nan, nan), (small, 1.0)]),
        ("tanh.approx.f32", &[(zero, 0.0), (-zero, -zero), (inf, 1.0), (-inf, -1.0), (nan, nan)]),
    ];
    for approx in ["exact", "degraded"] {
        let settings = config(if approx == "exact" { &[("EMU_APPROX", "exact")] } else { &[] });
        for (name, table) in cases {
            let text = format!("{name} d, a;");
            let sources = [Values(4, table.iter().map(|&(x, _)| bits(x)).collect())];
            let got = apply_with(&text, 4, &sources, settings.clone());
            for (&(x, want), got) in table.iter().zip(got) {
                assert_eq!(
                    got,
                    bits(want),
                    "{approx}: {text} of {x:e} gave {:e}",
                    f32::from_bits(got as u32)
                );
            }
        }
    }
}

#[test]
fn quotients() {
    let mut random = Random(23);
    let mut near = || {
        (0..4000)
            .map(|_| random.next() & 0x807f_ffff | (64 + random.next() % 126) << 23)
            .collect::<Vec<u64>>()
    };
    let sources = [Values(4, near()), Values(4, near())];
    for text in [
        "div.approx.f32 d, a, b;",
        "div.full.f32 d, a, b;",
        "div.approx.ftz.f32 d, a, b;",
        "div.full.ftz.f32 d, a, b;",
    ] {
        let rough = apply_with(text, 4, &sources, config(&[]));
        let exact = apply_with(text, 4, &sources, config(&[("EMU_APPROX", "exact")]));
        for i in 0..rough.len() {
            let [x, y] = [0, 1].map(|k| to_f64(sources[k].1[i], F32));
            let want = x / y;
            // Results that .ftz makes zero are another matter.
            if want.abs() < f64::from(f32::MIN_POSITIVE) {
                continue;
            }
            within(text, x, to_f64(rough[i], F32), want, Bound::Units(2.0), F32);
            within(text, x, to_f64(exact[i], F32), want, Bound::Units(0.5001), F32);
        }
        assert_ne!(rough, exact);
    }
    let (inf, nan, large) = (f32::INFINITY, f32::from_bits(0x7fff_ffff), 2f32.powi(127));
    let table = [
        (1.0, 0.0, inf, inf),
        (-1.0, 0.0, -inf, -inf),
        (0.0, 0.0, nan, nan),
        (inf, inf, nan, nan),
        (1.0, inf, 0.0, 0.0),
        (6.0, 2.0, 3.0, 3.0),
        // Divisors above 2^126: .approx loses the quotient, .full does not.
        (large, large, 0.0, 1.0),
        (large, -large, -0.0, -1.0),
        (inf, large, nan, inf),
        (1.0, 2f32.powi(126), 2f32.powi(-126), 2f32.powi(-126)),
    ];
    let sources = [0, 1].map(|k| Values(4, table.iter().map(|row| bits([row.0, row.1][k])).collect()));
    let exact = || config(&[("EMU_APPROX", "exact")]);
    let approx = apply_with("div.approx.f32 d, a, b;", 4, &sources, exact());
    let full = apply_with("div.full.f32 d, a, b;", 4, &sources, exact());
    for (i, &(x, y, a, f)) in table.iter().enumerate() {
        assert_eq!((approx[i], full[i]), (bits(a), bits(f)), "{x:e} / {y:e}");
    }
}

/// Name, format, reference, documented error, flushes.
type Case = (&'static str, Format, fn(f64) -> f64, Bound, bool);

/// All halves, alone and in pairs.
#[test]
fn half_functions() {
    let all: Vec<u64> = (0..0x1_0000).collect();
    let pairs: Vec<u64> = all.iter().map(|&h| h | (0xffff - h) << 16).collect();
    let cases: [Case; 4] = [
        ("ex2.approx.f16", F16, f64::exp2, Bound::Relative(power(-9.9)), false),
        ("ex2.approx.ftz.bf16", BF16, f64::exp2, Bound::Relative(power(-7.0)), true),
        ("tanh.approx.f16", F16, f64::tanh, Bound::Absolute(power(-10.987)), false),
        ("tanh.approx.bf16", BF16, f64::tanh, Bound::Relative(power(-8.0)), false),
    ];
    for (name, format, value, bound, ftz) in cases {
        let text = format!("{name} d, a;");
        let exact = || config(&[("EMU_APPROX", "exact")]);
        let sources = [Values(2, all.clone())];
        let rough = apply_with(&text, 2, &sources, config(&[]));
        let best = apply_with(&text, 2, &sources, exact());
        let values: Vec<f64> = all.iter().map(|&h| to_f64(h, format)).collect();
        for (h, (&rough, &best)) in (0u64..).zip(rough.iter().zip(&best)) {
            let x = values[h as usize];
            let want = value(x);
            if x.is_nan() {
                assert_eq!((rough, best), (0x7fff, 0x7fff), "{text} of {h:x}");
                continue;
            }
            let flush = |bits| if ftz { format.flush(bits) } else { bits };
            let rounded = flush(F64.convert(want.to_bits(), format, Mode::Rn));
            assert_eq!(best, rounded, "{text} of {x:e}");
            // The documented errors are for normal results.
            let normal = rounded & format.infinity() != 0 && rounded & 0x7fff < format.infinity();
            if normal && rough & 0x7fff < format.infinity() {
                within(&text, x, values[rough as usize], want, bound, format);
            } else if !normal {
                assert!((rough as i64 - rounded as i64).abs() <= 1, "{text} of {x:e}: {rough:x}");
            }
        }
        let text = format!("{name}x2 d, a;");
        let sources = [Values(4, pairs.clone())];
        for (settings, single) in [(config(&[]), &rough), (exact(), &best)] {
            let got = apply_with(&text, 4, &sources, settings);
            for (h, got) in got.into_iter().enumerate() {
                assert_eq!(got, single[h] | single[0xffff - h] << 16, "{text} of {h:x}");
            }
        }
    }
}

#[test]
fn double_forms() {
    let values = [1.0, 3.0, -7.5, 0.1, 1e300, 1e-300, 12345.678];
    let sources = [Values(8, values.iter().map(|x: &f64| x.to_bits()).collect())];
    for (text, value) in [
        ("rcp.approx.ftz.f64 d, a;", (|x| 1.0 / x) as fn(f64) -> f64),
        ("rsqrt.approx.ftz.f64 d, a;", |x| 1.0 / x.sqrt()),
        ("rsqrt.approx.f64 d, a;", |x| 1.0 / x.sqrt()),
    ] {
        let got = apply_with(text, 8, &sources, config(&[]));
        for (x, got) in values.iter().zip(got) {
            let (want, y) = (value(*x), f64::from_bits(got));
            assert!(
                (want.is_nan() && y.is_nan()) || ((y - want) / want).abs() < power(-19.0),
                "{text} of {x}: {y}"
            );
            assert!(!text.contains("ftz") || got as u32 == 0, "{text} of {x}: the lower word is {got:x}");
        }
    }
    let special = [
        (0.0, f64::INFINITY),
        (-0.0, f64::NEG_INFINITY),
        (1e-310, f64::INFINITY),
        (f64::INFINITY, 0.0),
        (1e308, 0.0),
    ];
    let sources = [Values(8, special.iter().map(|s| s.0.to_bits()).collect())];
    let got = apply_with("rcp.approx.ftz.f64 d, a;", 8, &sources, config(&[]));
    for ((x, want), got) in special.iter().zip(got) {
        assert_eq!(got, want.to_bits(), "reciprocal of {x:e}");
    }
}

#[test]
fn lanes_outside_the_mask_keep_their_value() {
    for text in ["ex2.approx.f32 %f2, %f1;", "div.full.f32 %f2, %f1, %f1;", "tanh.approx.f16x2 %f2, %f1;"] {
        let body = format!(
            "mov.f32 %f1, 0f00000000; mov.f32 %f2, 0f42c80000; setp.gt.u32 %p1, %r0, 20; @%p1 {text} mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd1; st.global.f32 [%rd2], %f2;"
        );
        let ran = common::run(&common::kernel(1, &body), "test", 40, &[common::Arg::Out(160)]).silent();
        let inside = match &text[..3] {
            "ex2" => 0x3f80_0000,
            "div" => 0x7fff_ffff,
            _ => 0,
        };
        for (i, got) in ran.words(0).into_iter().enumerate() {
            assert_eq!(got, if i > 20 { inside } else { 0x42c8_0000 }, "{text} lane {i}");
        }
    }
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for (text, size) in [
        ("ex2.f32 d, a;", 4),
        ("sin.approx.f64 d, a;", 8),
        ("tanh.approx.ftz.f32 d, a;", 4),
        ("ex2.approx.bf16 d, a;", 2),
        ("rcp.approx.f64 d, a;", 8),
        ("rsqrt.approx.sat.f32 d, a;", 4),
        ("lg2.approx.f16 d, a;", 2),
    ] {
        let ptx = apply::module(text, size, &[Values(size, vec![0])]);
        let mut device = cuda::device::Device::new(cuda::config::Config::default());
        device.reports.print = false;
        assert!(device.load(&ptx).is_err(), "{text} was accepted");
    }
}
