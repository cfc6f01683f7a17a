//! f32 and f64 arithmetic against exact integers: every operation in every rounding mode.

#[path = "common/apply.rs"]
mod apply;
mod common;
#[path = "common/oracle.rs"]
mod oracle;

use apply::{Random, Values, apply, check, float_bits, pairs};
use oracle::{F32, F64, Format, MODES, Mode};
use proptest::prelude::*;

/// f64 leaves the bits of NaN open.
fn same(format: Format) -> impl Fn(u64, u64) -> bool {
    move |got, want| got == want || (format == F64 && F64.is_nan(got) && F64.is_nan(want))
}

fn name(format: Format) -> (&'static str, usize) {
    if format == F32 { ("f32", 4) } else { ("f64", 8) }
}

fn by_the_book(format: Format, op: &str, mode: Mode, v: &[u64]) -> u64 {
    let one = if format == F32 { 1f32.to_bits().into() } else { 1f64.to_bits() };
    match op {
        "add" => format.add(v[0], v[1], mode),
        "sub" if format.is_nan(v[1]) => format.nan,
        "sub" => format.add(v[0], v[1] ^ format.sign(), mode),
        "mul" => format.mul(v[0], v[1], mode),
        "div" => format.div(v[0], v[1], mode),
        "fma" => format.fma(v[0], v[1], v[2], mode),
        "rcp" => format.div(one, v[0], mode),
        _ => format.sqrt(v[0], mode),
    }
}

const OPERANDS: [&str; 3] = ["d, a", "d, a, b", "d, a, b, c"];

/// One operation in all modes, with and without .ftz where there is one.
fn all_modes(format: Format, op: &str, sources: &[Vec<u64>]) {
    let (ty, size) = name(format);
    let sources: Vec<Values> = sources.iter().map(|v| Values(size, v.clone())).collect();
    for (mode_name, mode) in MODES {
        for ftz in [false, true] {
            if ftz && format == F64 {
                continue;
            }
            let flush = |bits| if ftz { format.flush(bits) } else { bits };
            let text = format!(
                "{op}.{mode_name}{}.{ty} {};",
                if ftz { ".ftz" } else { "" },
                OPERANDS[sources.len() - 1]
            );
            let got = apply(&text, size, &sources);
            let want = |v: &[u64]| {
                let v: Vec<u64> = v.iter().map(|&bits| flush(bits)).collect();
                flush(by_the_book(format, op, mode, &v))
            };
            check(&text, &sources, &got, want, same(format));
        }
    }
}

fn edge_triples(format: Format, count: usize) -> [Vec<u64>; 3] {
    let edges = format.edges();
    let mut random = Random(format.digits.into());
    [0; 3].map(|_| (0..count).map(|_| edges[random.next() as usize % edges.len()]).collect())
}

#[test]
fn f32_edges() {
    let edges = F32.edges();
    let [a, b] = pairs(&edges, &edges);
    for op in ["add", "sub", "mul", "div"] {
        all_modes(F32, op, &[a.clone(), b.clone()]);
    }
    for op in ["rcp", "sqrt"] {
        all_modes(F32, op, std::slice::from_ref(&edges));
    }
    all_modes(F32, "fma", &edge_triples(F32, 6000));
}

#[test]
fn f64_edges() {
    let [a, b, c] = edge_triples(F64, 1500);
    for op in ["add", "sub", "mul", "div"] {
        all_modes(F64, op, &[a.clone(), b.clone()]);
    }
    for op in ["rcp", "sqrt"] {
        all_modes(F64, op, &[F64.edges()]);
    }
    all_modes(F64, "fma", &[a, b, c]);
}

fn triples(format: Format) -> impl Strategy<Value = Vec<[u64; 3]>> {
    let one = || float_bits(format);
    prop::collection::vec((one(), one(), one()).prop_map(|(a, b, c)| [a, b, c]), 64)
}

fn random_values(format: Format, op: &str, values: &[[u64; 3]]) {
    let sources = if op == "fma" {
        3
    } else if matches!(op, "rcp" | "sqrt") {
        1
    } else {
        2
    };
    let columns: Vec<Vec<u64>> = (0..sources).map(|i| values.iter().map(|v| v[i]).collect()).collect();
    all_modes(format, op, &columns);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f32_values(values in triples(F32), op in prop::sample::select(vec!["add", "sub", "mul", "div", "rcp", "sqrt", "fma"])) {
        random_values(F32, op, &values);
    }

    #[test]
    fn f64_values(values in triples(F64), op in prop::sample::select(vec!["add", "sub", "mul", "div", "rcp", "sqrt", "fma"])) {
        random_values(F64, op, &values);
    }
}

/// A product plus almost its opposite: what is left is the product's rounding error, which only one rounding shows.
#[test]
fn fma_rounds_once() {
    let mut random = Random(5);
    let mut columns = [const { Vec::new() }; 3];
    for _ in 0..2000 {
        let [x, y] = [0; 2].map(|_| f32::from_bits(random.next() as u32 & 0x007f_ffff | 0x3f80_0000));
        for (column, bits) in columns.iter_mut().zip([x, y, -(x * y)]) {
            column.push(u64::from(bits.to_bits()));
        }
    }
    let sources: Vec<Values> = columns.iter().map(|c| Values(4, c.clone())).collect();
    let got = apply("fma.rn.f32 d, a, b, c;", 4, &sources);
    for (i, &got) in got.iter().enumerate() {
        let [x, y, z] = [0, 1, 2].map(|k| f64::from(f32::from_bits(columns[k][i] as u32)));
        // x * y is exact in f64, and so is the difference.
        assert_eq!(f64::from(f32::from_bits(got as u32)), x * y + z);
    }
    all_modes(F32, "fma", &columns.map(|c| c[..200].to_vec()));
}

#[test]
fn without_a_mode_add_sub_and_mul_round_to_nearest() {
    let [a, b, c] = edge_triples(F32, 500);
    for (text, op) in [("add", "add"), ("sub", "sub"), ("mul", "mul"), ("mad.rn", "fma")] {
        let sources: Vec<Values> =
            [&a, &b, &c].map(|v| Values(4, v.clone()))[..if op == "fma" { 3 } else { 2 }].to_vec();
        let text = format!("{text}.f32 {};", OPERANDS[sources.len() - 1]);
        let got = apply(&text, 4, &sources);
        check(&text, &sources, &got, |v| by_the_book(F32, op, Mode::Rn, v), same(F32));
    }
}

#[test]
fn sat_clamps_to_the_unit_interval() {
    let [a, b, c] = edge_triples(F32, 1500);
    for op in ["add", "sub", "mul", "fma"] {
        for (mode_name, mode) in MODES {
            for ftz in [false, true] {
                let sources: Vec<Values> =
                    [&a, &b, &c].map(|v| Values(4, v.clone()))[..if op == "fma" { 3 } else { 2 }].to_vec();
                let text = format!(
                    "{op}.{mode_name}{}.sat.f32 {};",
                    if ftz { ".ftz" } else { "" },
                    OPERANDS[sources.len() - 1]
                );
                let got = apply(&text, 4, &sources);
                let want = |v: &[u64]| {
                    let v: Vec<u64> = v.iter().map(|&x| if ftz { F32.flush(x) } else { x }).collect();
                    let exact = by_the_book(F32, op, mode, &v);
                    let x = f32::from_bits(if ftz { F32.flush(exact) } else { exact } as u32);
                    // NaN, negative numbers and both zeros give +0.
                    let clamped = if x > 0.0 { x.min(1.0) } else { 0.0 };
                    u64::from(clamped.to_bits())
                };
                check(&text, &sources, &got, want, same(F32));
            }
        }
    }
}

/// The manual's min and max: of a number and a NaN the number (or NaN with `.NaN`), -0 below +0.
fn extreme(a: f32, b: f32, max: bool, nan: bool) -> f32 {
    let canonical = f32::from_bits(0x7fff_ffff);
    match (a.is_nan(), b.is_nan()) {
        (true, true) => canonical,
        (true, false) => {
            if nan {
                canonical
            } else {
                b
            }
        }
        (false, true) => {
            if nan {
                canonical
            } else {
                a
            }
        }
        (false, false) if a == 0.0 && b == 0.0 => {
            let negative = if max {
                a.is_sign_negative() && b.is_sign_negative()
            } else {
                a.is_sign_negative() || b.is_sign_negative()
            };
            if negative { -0.0 } else { 0.0 }
        }
        (false, false) => {
            if (a < b) == max {
                b
            } else {
                a
            }
        }
    }
}

#[test]
fn f32_min_and_max() {
    let edges = F32.edges();
    let [a, b] = pairs(&edges, &edges);
    let sources = [Values(4, a), Values(4, b)];
    for max in [false, true] {
        for nan in [false, true] {
            for xor in [false, true] {
                for ftz in [false, true] {
                    let word = |on, word| if on { word } else { "" };
                    let text = format!(
                        "{}{}{}{}.f32 d, a, b;",
                        if max { "max" } else { "min" },
                        word(ftz, ".ftz"),
                        word(nan, ".NaN"),
                        word(xor, ".xorsign.abs")
                    );
                    let got = apply(&text, 4, &sources);
                    let want = |v: &[u64]| {
                        let [a, b] =
                            [v[0], v[1]].map(|x| f32::from_bits(if ftz { F32.flush(x) } else { x } as u32));
                        if !xor {
                            return u64::from(extreme(a, b, max, nan).to_bits());
                        }
                        let magnitude = extreme(a.abs(), b.abs(), max, nan);
                        let negative = a.is_sign_negative() != b.is_sign_negative() && !magnitude.is_nan();
                        u64::from(if negative { -magnitude } else { magnitude }.to_bits())
                    };
                    check(&text, &sources, &got, want, same(F32));
                }
            }
        }
    }
}

#[test]
fn f32_min_and_max_of_three() {
    let columns = edge_triples(F32, 2000);
    let sources = columns.map(|c| Values(4, c));
    for (text, max, nan) in
        [("max", true, false), ("min.NaN", false, true), ("min", false, false), ("max.NaN", true, true)]
    {
        let text = format!("{text}.f32 d, a, b, c;");
        let got = apply(&text, 4, &sources);
        let want = |v: &[u64]| {
            let [a, b, c] = [v[0], v[1], v[2]].map(|x| f32::from_bits(x as u32));
            u64::from(extreme(extreme(a, b, max, nan), c, max, nan).to_bits())
        };
        check(&text, &sources, &got, want, same(F32));
    }
}

#[test]
fn f64_min_and_max() {
    let edges = F64.edges();
    let [a, b] = pairs(&edges, &edges);
    let sources = [Values(8, a), Values(8, b)];
    for (op, max) in [("min", false), ("max", true)] {
        let text = format!("{op}.f64 d, a, b;");
        let got = apply(&text, 8, &sources);
        let want = |v: &[u64]| {
            let [a, b] = [v[0], v[1]].map(f64::from_bits);
            match (a.is_nan(), b.is_nan()) {
                (true, true) => F64.nan,
                (true, false) => v[1],
                (false, true) => v[0],
                // Equal numbers differ in the sign of zero at most: min takes the set sign bit, max the clear one.
                _ if a == b => {
                    if max {
                        v[0] & v[1]
                    } else {
                        v[0] | v[1]
                    }
                }
                _ => {
                    if (a < b) == max {
                        v[1]
                    } else {
                        v[0]
                    }
                }
            }
        };
        check(&text, &sources, &got, want, same(F64));
    }
}

type Bits = fn(u64) -> u64;

#[test]
fn signs() {
    let edges = F32.edges();
    let wide = F64.edges();
    let (sign, sign64) = (1u64 << 31, 1u64 << 63);
    let flush: Bits = |x| F32.flush(x);
    let forms: [(&str, Bits); 6] = [
        ("neg.f32", |x| x ^ (1 << 31)),
        ("neg.ftz.f32", |x| F32.flush(x) ^ (1 << 31)),
        ("abs.f32", |x| x & 0x7fff_ffff),
        ("abs.ftz.f32", |x| F32.flush(x) & 0x7fff_ffff),
        ("neg.f64", |x| x ^ (1 << 63)),
        ("abs.f64", |x| x & (u64::MAX >> 1)),
    ];
    for (name, want) in forms {
        let size = if name.ends_with("f64") { 8 } else { 4 };
        let sources = [Values(size, if size == 8 { wide.clone() } else { edges.clone() })];
        let text = format!("{name} d, a;");
        let got = apply(&text, size, &sources);
        check(&text, &sources, &got, |v| want(v[0]), |a, b| a == b);
    }
    assert_eq!(flush(sign | 5), sign);
    for (size, sign, edges) in [(4, sign, &edges), (8, sign64, &wide)] {
        let [a, b] = pairs(edges, edges);
        let sources = [Values(size, a), Values(size, b)];
        let text = format!("copysign.f{} d, a, b;", size * 8);
        let got = apply(&text, size, &sources);
        // The sign of the first, the magnitude of the second.
        check(&text, &sources, &got, |v| v[0] & sign | v[1] & (sign - 1), |a, b| a == b);
    }
}

/// Lanes outside the guard keep their value, in the fast and in the exact forms.
#[test]
fn lanes_outside_the_mask_keep_their_value() {
    for op in [
        "add.f32 %f2, %f1, %f1;",
        "add.rm.f32 %f2, %f1, %f1;",
        "max.f32 %f2, %f1, %f1;",
        "sqrt.rp.f32 %f2, %f1;",
    ] {
        let body = format!(
            "cvt.rn.f32.u32 %f1, %r0; mov.f32 %f2, 0f42c80000; and.b32 %r1, %r0, 5; setp.eq.u32 %p1, %r1, 4; @%p1 {op} mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd1; st.global.f32 [%rd2], %f2;"
        );
        let ran = common::run(&common::kernel(1, &body), "test", 45, &[common::Arg::Out(180)]).silent();
        for (i, bits) in ran.words(0).into_iter().enumerate() {
            let x = i as f32;
            let inside = match &op[..3] {
                "add" => 2.0 * x,
                "max" => x,
                // Rounded up.
                _ => {
                    if f64::from(x.sqrt()).powi(2) < f64::from(x) {
                        x.sqrt().next_up()
                    } else {
                        x.sqrt()
                    }
                }
            };
            assert_eq!(f32::from_bits(bits), if i & 5 == 4 { inside } else { 100.0 }, "{op} lane {i}");
        }
    }
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "fma.f32 d, a, b, c;",
        "add.rn.ftz.f64 d, a, b;",
        "add.rna.f32 d, a, b;",
        "add.rn.full.f32 d, a, b;",
        "div.f32 d, a, b;",
        "max.xorsign.f32 d, a, b;",
        "add.f32 d, a;",
        "sqrt.rn.sat.f32 d, a;",
    ] {
        let size = if text.contains("f64") { 8 } else { 4 };
        let ptx = apply::module(text, size, &[0; 3].map(|_| Values(size, vec![0])));
        let mut device = cuda::device::Device::new(cuda::config::Config::default());
        device.reports.print = false;
        assert!(device.load(&ptx).is_err(), "{text} was accepted");
    }
}
