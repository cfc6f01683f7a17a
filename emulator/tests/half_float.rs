//! f16 and bf16 arithmetic against exact integers: every value of the unary operations, edges and samples of the others,
//! alone and in pairs.

#[path = "common/apply.rs"]
mod apply;
mod common;
#[path = "common/oracle.rs"]
mod oracle;

use apply::{Random, Values, apply, check, float_bits, pairs};
use oracle::{BF16, F16, Format, Mode};
use proptest::prelude::*;

const FORMATS: [(&str, Format); 2] = [("f16", F16), ("bf16", BF16)];

fn equal(a: u64, b: u64) -> bool {
    a == b
}

fn by_the_book(format: Format, op: &str, v: &[u64]) -> u64 {
    match op {
        "add" => format.add(v[0], v[1], Mode::Rn),
        "sub" if format.is_nan(v[1]) => format.nan,
        "sub" => format.add(v[0], v[1] ^ format.sign(), Mode::Rn),
        "mul" => format.mul(v[0], v[1], Mode::Rn),
        _ => format.fma(v[0], v[1], v[2], Mode::Rn),
    }
}

/// `.sat` and `.relu`, by the values: NaN is 0 or stays.
fn end(format: Format, word: &str, bits: u64) -> u64 {
    let one = (format.infinity() / 2) >> (format.digits - 1) << (format.digits - 1);
    let negative = bits & format.sign() != 0;
    match word {
        ".sat" if negative || format.is_nan(bits) => 0,
        ".sat" => bits.min(one),
        ".relu" if negative && !format.is_nan(bits) => 0,
        _ => bits,
    }
}

/// One form on single values and, two neighbours to a register, on pairs.
fn both_shapes(op: &str, words: &str, ty: &str, columns: &[Vec<u64>], want: impl Fn(&[u64]) -> u64) {
    let operands = ["d, a;", "d, a, b;", "d, a, b, c;"][columns.len() - 1];
    let sources: Vec<Values> = columns.iter().map(|c| Values(2, c.clone())).collect();
    let text = format!("{op}{words}.{ty} {operands}");
    check(&text, &sources, &apply(&text, 2, &sources), &want, equal);
    let paired: Vec<Values> = columns
        .iter()
        .map(|c| Values(4, c.iter().zip(c.iter().rev()).map(|(low, high)| low | high << 16).collect()))
        .collect();
    let text = format!("{op}{words}.{ty}x2 {operands}");
    let half = |v: &[u64], shift: u32| want(&v.iter().map(|x| x >> shift & 0xffff).collect::<Vec<_>>());
    check(&text, &paired, &apply(&text, 4, &paired), |v| half(v, 0) | half(v, 16) << 16, equal);
}

fn arithmetic(format: Format, ty: &str, op: &str, columns: &[Vec<u64>]) {
    let brain = format == BF16;
    let flush = |on: bool, x: u64| if on { format.flush(x) } else { x };
    for ftz in [false, true] {
        for word in ["", ".sat", ".relu"] {
            if (brain && (ftz || word == ".sat")) || (op != "fma" && word == ".relu") {
                continue;
            }
            // Triton writes .rn, nvcc leaves it out where it may.
            let rn = if op == "fma" || ftz { ".rn" } else { "" };
            let words = format!("{rn}{}{word}", if ftz { ".ftz" } else { "" });
            both_shapes(op, &words, ty, columns, |v| {
                let v: Vec<u64> = v.iter().map(|&x| flush(ftz, x)).collect();
                end(format, word, flush(ftz, by_the_book(format, op, &v)))
            });
        }
    }
}

#[test]
fn edges() {
    for (ty, format) in FORMATS {
        let edges = format.edges();
        let [a, b] = pairs(&edges, &edges);
        for op in ["add", "sub", "mul"] {
            arithmetic(format, ty, op, &[a.clone(), b.clone()]);
        }
        let mut random = Random(9);
        let columns =
            [0; 3].map(|_| (0..8000).map(|_| edges[random.next() as usize % edges.len()]).collect());
        arithmetic(format, ty, "fma", &columns);
    }
}

/// bf16 products half way between two numbers, with an addend that is too small to show in an f32 or f64 sum.
#[test]
fn fma_sees_the_smallest_addend() {
    let mut columns = [const { Vec::new() }; 3];
    for a in 0x3f81..0x3fff_u64 {
        for c in [0x0001, 0x8001, 0x0080, 0x8080, 0x2000, 0xa000] {
            for (column, x) in columns.iter_mut().zip([a, 0x3fc0, c]) {
                column.push(x);
            }
        }
    }
    arithmetic(BF16, "bf16", "fma", &columns);
    let mut columns = [const { Vec::new() }; 3];
    for a in 0x3c01..0x3fff_u64 {
        for (column, x) in columns.iter_mut().zip([a, 0x3e00, if a % 2 == 0 { 0x0001 } else { 0x8001 }]) {
            column.push(x);
        }
    }
    arithmetic(F16, "f16", "fma", &columns);
}

fn triples(format: Format) -> impl Strategy<Value = Vec<[u64; 3]>> {
    let one = || float_bits(format);
    prop::collection::vec((one(), one(), one()).prop_map(|(a, b, c)| [a, b, c]), 256)
}

fn random_values(format: Format, ty: &str, op: &str, values: &[[u64; 3]]) {
    let columns: Vec<Vec<u64>> =
        (0..if op == "fma" { 3 } else { 2 }).map(|i| values.iter().map(|v| v[i]).collect()).collect();
    arithmetic(format, ty, op, &columns);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f16_values(values in triples(F16), op in prop::sample::select(vec!["add", "sub", "mul", "fma", "fma"])) {
        random_values(F16, "f16", op, &values);
    }

    #[test]
    fn bf16_values(values in triples(BF16), op in prop::sample::select(vec!["add", "sub", "mul", "fma", "fma"])) {
        random_values(BF16, "bf16", op, &values);
    }
}

#[test]
fn neg_and_abs_of_every_value() {
    let all: Vec<u64> = (0..0x1_0000).collect();
    for (ty, format) in FORMATS {
        for ftz in [false, true] {
            if ftz && format == BF16 {
                continue;
            }
            let words = if ftz { ".ftz" } else { "" };
            let flush = |x: u64| if ftz { format.flush(x) } else { x };
            both_shapes("neg", words, ty, std::slice::from_ref(&all), |v| flush(v[0]) ^ 0x8000);
            both_shapes("abs", words, ty, std::slice::from_ref(&all), |v| flush(v[0]) & 0x7fff);
        }
    }
}

/// Magnitudes of finite numbers and infinities order as their bits do.
fn extreme(format: Format, max: bool, nan: bool, a: u64, b: u64) -> u64 {
    let rank = |x: u64| if x & 0x8000 != 0 { -1 - (x & 0x7fff) as i64 } else { x as i64 };
    match (format.is_nan(a), format.is_nan(b)) {
        (true, true) => 0x7fff,
        (true, false) => {
            if nan {
                0x7fff
            } else {
                b
            }
        }
        (false, true) => {
            if nan {
                0x7fff
            } else {
                a
            }
        }
        (false, false) => {
            if (rank(a) < rank(b)) == max {
                b
            } else {
                a
            }
        }
    }
}

#[test]
fn min_and_max() {
    for (ty, format) in FORMATS {
        let edges = format.edges();
        let [a, b] = pairs(&edges, &edges);
        let columns = [a, b];
        for (op, max) in [("min", false), ("max", true)] {
            for nan in [false, true] {
                for xor in [false, true] {
                    for ftz in [false, true] {
                        if ftz && format == BF16 {
                            continue;
                        }
                        let word = |on, word| if on { word } else { "" };
                        let words = format!(
                            "{}{}{}",
                            word(ftz, ".ftz"),
                            word(nan, ".NaN"),
                            word(xor, ".xorsign.abs")
                        );
                        both_shapes(op, &words, ty, &columns, |v| {
                            let [a, b] = [v[0], v[1]].map(|x| if ftz { format.flush(x) } else { x });
                            if !xor {
                                return extreme(format, max, nan, a, b);
                            }
                            let magnitude = extreme(format, max, nan, a & 0x7fff, b & 0x7fff);
                            let sign = if format.is_nan(magnitude) { 0 } else { (a ^ b) & 0x8000 };
                            magnitude | sign
                        });
                    }
                }
            }
        }
        let mut random = Random(3);
        let triple = [0; 3].map(|_| (0..2000).map(|_| edges[random.next() as usize % edges.len()]).collect());
        both_shapes("max", "", ty, &triple, |v| {
            extreme(format, true, false, extreme(format, true, false, v[0], v[1]), v[2])
        });
        both_shapes("min", ".NaN", ty, &triple, |v| {
            extreme(format, false, true, extreme(format, false, true, v[0], v[1]), v[2])
        });
    }
}

/// Each half of a pair is undefined by itself.
#[test]
fn undefined_halves_stay_apart() {
    let body = |store: &str| {
        format!(
            ".reg .b16 low, high; mov.b16 low, 0x3c00; mov.b32 %r1, {{low, high}}; add.f16x2 %r2, %r1, %r1; mov.b32 {{%h1, %h2}}, %r2; mul.wide.u32 %rd2, %r0, 2; add.s64 %rd2, %rd2, %rd1; st.global.u16 [%rd2], {store};"
        )
    };
    for (store, undefined) in [("%h1", false), ("%h2", true)] {
        let ran = common::run(&common::kernel(1, &body(store)), "test", 32, &[common::Arg::Out(64)]);
        assert_eq!(apply::undefined(&ran, 0), [undefined; 64], "{store}");
        assert!(undefined || ran.halves(0).iter().all(|&h| h == 0x4000), "{:x?}", ran.halves(0));
    }
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "fma.f16 d, a, b, c;",
        "add.rz.f16 d, a, b;",
        "add.ftz.bf16 d, a, b;",
        "fma.rn.sat.bf16 d, a, b, c;",
        "fma.rn.sat.relu.f16 d, a, b, c;",
        "mul.relu.f16 d, a, b;",
        "max.xorsign.bf16 d, a, b;",
        "neg.f16 d, a, b;",
    ] {
        let ptx = apply::module(text, 2, &[0; 3].map(|_| Values(2, vec![0])));
        let mut device = cuda::device::Device::new(cuda::config::Config::default());
        device.reports.print = false;
        assert!(device.load(&ptx).is_err(), "{text} was accepted");
    }
}
