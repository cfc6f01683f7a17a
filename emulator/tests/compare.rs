//! Comparisons and selections against the relations as the manual words them.

mod common;
#[path = "common/forms.rs"]
mod forms;

use common::{Ran, kernel, run};
use forms::Kind::{H, P, W};
use forms::{INTEGERS, Kind, check, edges, few, kind, number};
use std::cmp::Ordering;

const FLOATS: [&str; 14] =
    ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];

/// Does the relation hold between values in this order (`None`: one of them is not a number)?
fn holds(relation: &str, order: Option<Ordering>) -> bool {
    let Some(order) = order else {
        return matches!(relation, "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" | "nan");
    };
    match relation {
        "eq" | "equ" => order == Ordering::Equal,
        "ne" | "neu" => order != Ordering::Equal,
        "lt" | "ltu" | "lo" => order == Ordering::Less,
        "le" | "leu" | "ls" => order != Ordering::Greater,
        "gt" | "gtu" | "hi" => order == Ordering::Greater,
        "ge" | "geu" | "hs" => order != Ordering::Less,
        "num" => true,
        _ => false,
    }
}

/// A float format: exponent bits, mantissa bits.
#[derive(Clone, Copy)]
struct Format {
    name: &'static str,
    exponent: u32,
    mantissa: u32,
}

const F16: Format = Format { name: "f16", exponent: 5, mantissa: 10 };
const BF16: Format = Format { name: "bf16", exponent: 8, mantissa: 7 };
const F32: Format = Format { name: "f32", exponent: 8, mantissa: 23 };
const F64: Format = Format { name: "f64", exponent: 11, mantissa: 52 };

impl Format {
    fn bits(self) -> u32 {
        1 + self.exponent + self.mantissa
    }

    fn exponent_of(self, value: u64) -> u64 {
        value >> self.mantissa & ((1 << self.exponent) - 1)
    }

    fn mantissa_of(self, value: u64) -> u64 {
        value & ((1 << self.mantissa) - 1)
    }

    fn is_nan(self, value: u64) -> bool {
        self.exponent_of(value) == (1 << self.exponent) - 1 && self.mantissa_of(value) != 0
    }

    fn is_infinite(self, value: u64) -> bool {
        self.exponent_of(value) == (1 << self.exponent) - 1 && self.mantissa_of(value) == 0
    }

    fn is_subnormal(self, value: u64) -> bool {
        self.exponent_of(value) == 0 && self.mantissa_of(value) != 0
    }

    /// Order of two values: sign and magnitude.
    fn order(self, a: u64, b: u64, flush: bool) -> Option<Ordering> {
        let number = |value: u64| {
            let magnitude = i128::from(value & !(1 << (self.bits() - 1)));
            let magnitude = if flush && self.is_subnormal(value) { 0 } else { magnitude };
            (!self.is_nan(value)).then_some(if value >> (self.bits() - 1) == 1 {
                -magnitude
            } else {
                magnitude
            })
        };
        Some(number(a)?.cmp(&number(b)?))
    }

    /// Both zeros, subnormals, ones, the largest, infinities, NaNs.
    fn values(self) -> Vec<u64> {
        let one = ((1 << (self.exponent - 1)) - 1) << self.mantissa;
        let infinity = ((1u64 << self.exponent) - 1) << self.mantissa;
        let positive = [
            0,
            1,
            (1 << self.mantissa) - 1,
            1 << self.mantissa,
            one,
            one + 1,
            infinity - 1,
            infinity,
            infinity + 1,
            infinity | 1 << (self.mantissa - 1),
        ];
        positive.iter().flat_map(|&v| [v, v | 1 << (self.bits() - 1)]).collect()
    }
}

#[test]
fn integers_compare_in_all_relations() {
    for (name, bits, signed) in INTEGERS {
        let (k, v) = (kind(bits), edges(bits));
        let relations: &[&str] =
            if signed { &FLOATS[..6] } else { &["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"] };
        for relation in relations {
            let order = |s: &[u64]| Some(number(s[0], bits, signed).cmp(&number(s[1], bits, signed)));
            check(&format!("setp.{relation}.{name} $d, $a, $b;"), &[P], &[k, k], &[&v, &v], |s| {
                vec![u64::from(holds(relation, order(s)))]
            });
            check(&format!("set.{relation}.u32.{name} $d, $a, $b;"), &[W], &[k, k], &[&v, &v], |s| {
                vec![if holds(relation, order(s)) { 0xffff_ffff } else { 0 }]
            });
        }
        for relation in ["eq", "ne"] {
            check(&format!("setp.{relation}.b{bits} $d, $a, $b;"), &[P], &[k, k], &[&v, &v], |s| {
                vec![u64::from((s[0] == s[1]) == (relation == "eq"))]
            });
        }
    }
}

#[test]
fn floats_compare_in_all_relations() {
    for (format, flushes) in [(F16, true), (BF16, false), (F32, true), (F64, false)] {
        let (k, v, name) = (kind(format.bits()), format.values(), format.name);
        for relation in FLOATS {
            for flush in [false, true] {
                if flush && !flushes {
                    continue;
                }
                let ftz = if flush { ".ftz" } else { "" };
                let truth = |s: &[u64]| holds(relation, format.order(s[0], s[1], flush));
                check(&format!("setp.{relation}{ftz}.{name} $d, $a, $b;"), &[P], &[k, k], &[&v, &v], |s| {
                    vec![u64::from(truth(s))]
                });
                check(
                    &format!("set.{relation}{ftz}.u32.{name} $d, $a, $b;"),
                    &[W],
                    &[k, k],
                    &[&v, &v],
                    |s| vec![if truth(s) { 0xffff_ffff } else { 0 }],
                );
            }
        }
    }
}

#[test]
fn packed_floats_compare_half_by_half() {
    for (format, flushes) in [(F16, true), (BF16, false)] {
        let half = format.values();
        let pairs: Vec<u64> =
            (0..half.len()).map(|n| half[n] | half[(n * 7 + 3) % half.len()] << 16).collect();
        let name = format.name;
        let one = if name == "f16" { 0x3c00 } else { 0x3f80 };
        for relation in FLOATS {
            for flush in [false, true] {
                if flush && !flushes {
                    continue;
                }
                let ftz = if flush { ".ftz" } else { "" };
                let truth = |s: &[u64], n: u32| {
                    let of = |v: u64| v >> (16 * n) & 0xffff;
                    u64::from(holds(relation, format.order(of(s[0]), of(s[1]), flush)))
                };
                let text = format!("setp.{relation}{ftz}.{name}x2 $d|$e, $a, $b;");
                check(&text, &[P, P], &[W, W], &[&pairs, &pairs], |s| vec![truth(s, 0), truth(s, 1)]);
                let text = format!("set.{relation}{ftz}.{name}x2.{name}x2 $d, $a, $b;");
                check(&text, &[W], &[W, W], &[&pairs, &pairs], |s| {
                    vec![(truth(s, 0) * one) | ((truth(s, 1) * one) << 16)]
                });
                for to in ["u32", "s32"] {
                    let text = format!("set.{relation}{ftz}.{to}.{name}x2 $d, $a, $b;");
                    check(&text, &[W], &[W, W], &[&pairs, &pairs], |s| {
                        vec![(truth(s, 0) * 0xffff) | (truth(s, 1) * 0xffff_0000)]
                    });
                }
            }
        }
        // Combined with a predicate, both halves.
        let text = format!("setp.lt.and.{name}x2 $d|$e, $a, $b, !$c;");
        check(&text, &[P, P], &[W, W, P], &[&pairs, &pairs, &[0, 1]], |s| {
            [0, 1]
                .map(|n| {
                    let of = |v: u64| v >> (16 * n) & 0xffff;
                    u64::from(holds("lt", format.order(of(s[0]), of(s[1]), false)) && s[2] == 0)
                })
                .to_vec()
        });
    }
}

#[test]
fn comparisons_combine_with_a_predicate() {
    let v = few(32);
    let floats = F32.values();
    let combine = |op: &str, t: bool, c: bool| match op {
        "and" => t && c,
        "or" => t || c,
        _ => t != c,
    };
    for op in ["and", "or", "xor"] {
        for not in ["", "!"] {
            let c = |s: &[u64]| (s[2] == 1) != (not == "!");
            let text = format!("setp.lt.{op}.s32 $d|$e, $a, $b, {not}$c;");
            check(&text, &[P, P], &[W, W, P], &[&v, &v, &[0, 1]], |s| {
                let t = number(s[0], 32, true) < number(s[1], 32, true);
                vec![u64::from(combine(op, t, c(s))), u64::from(combine(op, !t, c(s)))]
            });
            let text = format!("setp.geu.{op}.ftz.f32 $d, $a, $b, {not}$c;");
            check(&text, &[P], &[W, W, P], &[&floats, &floats, &[0, 1]], |s| {
                vec![u64::from(combine(op, holds("geu", F32.order(s[0], s[1], true)), c(s)))]
            });
            let text = format!("set.hs.{op}.f32.u32 $d, $a, $b, {not}$c;");
            check(&text, &[W], &[W, W, P], &[&v, &v, &[0, 1]], |s| {
                vec![if combine(op, s[0] >= s[1], c(s)) { 0x3f80_0000 } else { 0 }]
            });
        }
    }
    check("setp.eq.s32 $d|$e, $a, $b;", &[P, P], &[W, W], &[&v, &v], |s| {
        vec![u64::from(s[0] == s[1]), u64::from(s[0] != s[1])]
    });
    check("setp.eq.s32 _|$d, $a, $b;", &[P], &[W, W], &[&v, &v], |s| vec![u64::from(s[0] != s[1])]);
    check("setp.gt.s32 $d, $a, -2;", &[P], &[W], &[&v], |s| vec![u64::from(number(s[0], 32, true) > -2)]);
    check("setp.lt.s64 $d, $a, -2;", &[P], &[Kind::D], &[&edges(64)], |s| {
        vec![u64::from(number(s[0], 64, true) < -2)]
    });
    check("setp.gt.s16 $d, $a, -2;", &[P], &[H], &[&edges(16)], |s| {
        vec![u64::from(number(s[0], 16, true) > -2)]
    });
    check("setp.gt.f32 $d, $a, 0f3F800000;", &[P], &[W], &[&floats], |s| {
        vec![u64::from(f32::from_bits(s[0] as u32) > 1.0)]
    });
}

#[test]
fn set_writes_the_truth_of_its_type() {
    let v = few(32);
    let halves = F16.values();
    let brains = BF16.values();
    let doubles = F64.values();
    let words: [(&str, Kind, u64); 7] = [
        ("u32", W, 0xffff_ffff),
        ("s32", W, 0xffff_ffff),
        ("f32", W, 0x3f80_0000),
        ("f16", H, 0x3c00),
        ("bf16", H, 0x3f80),
        ("u16", H, 0xffff),
        ("s16", H, 0xffff),
    ];
    for (to, k, one) in words {
        if !to.ends_with("16") || to.ends_with("f16") {
            check(&format!("set.lt.{to}.s32 $d, $a, $b;"), &[k], &[W, W], &[&v, &v], |s| {
                vec![if number(s[0], 32, true) < number(s[1], 32, true) { one } else { 0 }]
            });
            check(
                &format!("set.gtu.{to}.f64 $d, $a, $b;"),
                &[k],
                &[Kind::D; 2],
                &[&doubles, &doubles],
                |s| vec![if holds("gtu", F64.order(s[0], s[1], false)) { one } else { 0 }],
            );
        }
        check(&format!("set.le.{to}.f16 $d, $a, $b;"), &[k], &[H, H], &[&halves, &halves], |s| {
            vec![if holds("le", F16.order(s[0], s[1], false)) { one } else { 0 }]
        });
        check(&format!("set.neu.{to}.bf16 $d, $a, $b;"), &[k], &[H, H], &[&brains, &brains], |s| {
            vec![if holds("neu", BF16.order(s[0], s[1], false)) { one } else { 0 }]
        });
    }
}

#[test]
fn selections() {
    for (types, bits) in [
        (&["b16", "u16", "s16", "f16", "bf16"][..], 16),
        (&["b32", "u32", "s32", "f32", "f16x2", "bf16x2"], 32),
        (&["b64", "u64", "s64", "f64"], 64),
    ] {
        let (k, v) = (kind(bits), few(bits));
        for ty in types {
            check(&format!("selp.{ty} $d, $a, $b, $c;"), &[k], &[k, k, P], &[&v, &v, &[0, 1]], |s| {
                vec![if s[2] == 1 { s[0] } else { s[1] }]
            });
            if *ty == "f16" || *ty == "bf16" || ty.ends_with("x2") {
                continue;
            }
            let by = edges(32);
            check(&format!("slct.{ty}.s32 $d, $a, $b, $c;"), &[k], &[k, k, W], &[&v, &v, &by], |s| {
                vec![if number(s[2], 32, true) >= 0 { s[0] } else { s[1] }]
            });
            let by = F32.values();
            for ftz in ["", ".ftz"] {
                let text = format!("slct{ftz}.{ty}.f32 $d, $a, $b, $c;");
                check(&text, &[k], &[k, k, W], &[&v, &v, &by], |s| {
                    let order = F32.order(s[2], 0, ftz == ".ftz");
                    vec![if matches!(order, Some(Ordering::Equal | Ordering::Greater)) { s[0] } else { s[1] }]
                });
            }
        }
    }
    check("selp.f32 $d, 0f3F800000, $a, $b;", &[W], &[W, P], &[&few(32), &[0, 1]], |s| {
        vec![if s[1] == 1 { 0x3f80_0000 } else { s[0] }]
    });
    check("selp.s64 $d, -1, 0, $a;", &[Kind::D], &[P], &[&[0, 1]], |s| {
        vec![if s[0] == 1 { u64::MAX } else { 0 }]
    });
}

#[test]
fn properties_of_floats() {
    for format in [F32, F64] {
        let (k, v, name) = (kind(format.bits()), format.values(), format.name);
        let property = |what: &str, f: &dyn Fn(u64) -> bool| {
            check(&format!("testp.{what}.{name} $d, $a;"), &[P], &[k], &[&v], |s| vec![u64::from(f(s[0]))]);
        };
        property("finite", &|v| !format.is_nan(v) && !format.is_infinite(v));
        property("infinite", &|v| format.is_infinite(v));
        property("number", &|v| !format.is_nan(v));
        property("notanumber", &|v| format.is_nan(v));
        // Zeros count as normal.
        property("normal", &|v| !format.is_nan(v) && !format.is_infinite(v) && !format.is_subnormal(v));
        property("subnormal", &|v| format.is_subnormal(v));
    }
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "setp.lt.b32 %p1, %r1, %r2",
        "setp.lo.s32 %p1, %r1, %r2",
        "setp.ltu.s32 %p1, %r1, %r2",
        "setp.num.u32 %p1, %r1, %r2",
        "setp.s32 %p1, %r1, %r2",
        "setp.lt.s32 %p1, %r1",
        "setp.lt.and.s32 %p1, %r1, %r2",
        "setp.lt.s32 %p1, %r1, %r2, %p2",
        "setp.lt.s32 %r1, %r1, %r2",
        "setp.lt.ftz.f64 %p1, %fd1, %fd2",
        "setp.lt.ftz.bf16 %p1, %h1, %h2",
        "setp.lt.f16x2 %p1, %r1, %r2",
        "setp.foo.s32 %p1, %r1, %r2",
        "setp.lt.s32.foo %p1, %r1, %r2",
        "set.lt.f64.s32 %fd1, %r1, %r2",
        "set.lt.u16.s32 %h1, %r1, %r2",
        "set.lt.f16x2.f32 %r1, %f1, %f2",
        "selp.pred %p1, %p2, %p3, %p4",
        "selp.b32 %r1, %r2, %r3, %r4",
        "slct.b32.u32 %r1, %r2, %r3, %r4",
        "testp.finite.f16 %p1, %h1",
        "testp.f32 %p1, %f1",
    ] {
        forms::refused(text);
    }
}

// ---- undefined values: %r90, %rd90 and %p30 are never written

fn branch_on(setup: &str) -> Ran {
    run(&kernel(0, &format!("{setup} @%p1 bra END; END:")), "test", 32, &[])
}

#[test]
fn a_selection_is_as_undefined_as_what_it_takes() {
    // What a masked kernel does with the padding of a row, and its twin with the mask forgotten in one lane.
    let masked = |limit: u32| {
        let ty = |bits: u32, r: &str| {
            format!(
                "setp.lt.u32 %p2, %r0, {limit}; mov.u{bits} %{r}1, 7; @!%p2 bra PAD; bra KNOWN; PAD: mov.u{bits} %{r}2, %{r}90; KNOWN:\n\
                 @%p2 mov.u{bits} %{r}2, 5; setp.lt.u32 %p3, %r0, 20; selp.b{bits} %{r}3, %{r}2, %{r}1, %p3;\n\
                 setp.eq.u{bits} %p1, %{r}3, 5;"
            )
        };
        [ty(32, "r"), ty(64, "rd")]
    };
    for text in masked(20) {
        branch_on(&text).silent();
    }
    for text in masked(19) {
        let ran = branch_on(&text).found("Undefined");
        assert!(ran.device.reports.all()[0].text.contains("lanes 00080000"), "{text}");
    }
    branch_on("selp.b32 %r1, 5, 6, %p30; setp.eq.u32 %p1, %r1, 5;").found("Undefined");
    branch_on("slct.b32.s32 %r1, 5, %r90, %r0; setp.eq.u32 %p1, %r1, 5;").silent();
    branch_on("slct.b32.s32 %r1, %r90, 5, %r0; setp.eq.u32 %p1, %r1, 5;").found("Undefined");
    branch_on("slct.b32.s32 %r1, 5, 5, %r90; setp.eq.u32 %p1, %r1, 5;").found("Undefined");
    // Half by half.
    let halves = "mov.b32 %r2, {%h60, %h1}; selp.b32 %r3, %r2, 0, %p2; mov.b32 {%h3, %h4}, %r3;";
    let start = "mov.b16 %h1, 3; setp.lt.u32 %p2, %r0, 99;";
    branch_on(&format!("{start} {halves} setp.eq.u16 %p1, %h4, 3;")).silent();
    branch_on(&format!("{start} {halves} setp.eq.u16 %p1, %h3, 3;")).found("Undefined");
}

#[test]
fn a_comparison_is_undefined_unless_the_predicate_decides() {
    branch_on("setp.eq.u32 %p1, %r90, 1;").found("Undefined");
    branch_on("setp.eq.s64 %p1, %rd90, 1;").found("Undefined");
    branch_on("setp.num.f32 %p1, %f60, 0f00000000;").found("Undefined");
    // i < n && x[i] > 0, where x ends before i.
    let past = "setp.lt.u32 %p2, %r0, 0; setp.gt.and.s32 %p1, %r90, 0, %p2;";
    branch_on(past).silent();
    branch_on("setp.lt.u32 %p2, %r0, 1; setp.gt.and.s32 %p1, %r90, 0, %p2;").found("Undefined");
    branch_on("setp.lt.u32 %p2, %r0, 99; setp.gt.or.s32 %p1, %r90, 0, %p2;").silent();
    branch_on("setp.lt.u32 %p2, %r0, 99; setp.gt.xor.s32 %p1, %r90, 0, %p2;").found("Undefined");
    branch_on("setp.gt.and.s32 %p1, %r0, 99, %p30;").silent();
    branch_on("setp.lt.and.s32 %p1, %r0, 99, %p30;").found("Undefined");
    // The second predicate is the complement's.
    branch_on("setp.gt.and.s32 _|%p1, %r0, 99, %p30;").found("Undefined");
    // One predicate a half.
    let start = "mov.b16 %h1, 0x3c00; mov.b32 %r1, {%h1, %h60};";
    branch_on(&format!("{start} setp.eq.f16x2 %p1|%p2, %r1, %r1;")).silent();
    branch_on(&format!("{start} setp.eq.f16x2 %p2|%p1, %r1, %r1;")).found("Undefined");
    branch_on(&format!(
        "{start} set.eq.u32.f16x2 %r2, %r1, %r1; mov.b32 {{%h2, %h3}}, %r2; setp.eq.u16 %p1, %h2, 0;"
    ))
    .silent();
    branch_on(&format!(
        "{start} set.eq.u32.f16x2 %r2, %r1, %r1; mov.b32 {{%h2, %h3}}, %r2; setp.eq.u16 %p1, %h3, 0;"
    ))
    .found("Undefined");
}
