//! Integer arithmetic against definitions over wide numbers.

mod common;
#[path = "common/forms.rs"]
mod forms;

use forms::Kind::{D, H, W};
use forms::{INTEGERS, check, check_finding, edges, few, kind, number, ones, wrap};

/// `op.type d, a, b` for a type.
fn two(op: &str, ty: (&str, u32, bool), f: impl Fn(i128, i128) -> i128) {
    let (name, bits, signed) = ty;
    let (k, v) = (kind(bits), edges(bits));
    check(&format!("{op}.{name} $d, $a, $b;"), &[k], &[k, k], &[&v, &v], |s| {
        vec![wrap(f(number(s[0], bits, signed), number(s[1], bits, signed)), bits)]
    });
}

#[test]
fn sums_and_differences_wrap() {
    for ty in INTEGERS {
        two("add", ty, |a, b| a + b);
        two("sub", ty, |a, b| a - b);
    }
}

#[test]
fn saturated_sums_stop_at_the_ends() {
    let clamp = |v: i128| v.clamp(i128::from(i32::MIN), i128::from(i32::MAX));
    two("add.sat", ("s32", 32, true), |a, b| clamp(a + b));
    two("sub.sat", ("s32", 32, true), |a, b| clamp(a - b));
}

#[test]
fn products() {
    for ty @ (name, bits, signed) in INTEGERS {
        // An i128 holds the product of signed 64-bit numbers; of unsigned ones it holds the bits.
        let whole = |a: i128, b: i128| if signed { (a * b) as u128 } else { (a as u128) * (b as u128) };
        let high = |a: i128, b: i128| {
            let product = whole(a, b);
            if signed { (product as i128) >> bits } else { (product >> bits) as i128 }
        };
        two("mul.lo", ty, |a, b| whole(a, b) as i128);
        two("mul.hi", ty, high);
        let (k, v) = (kind(bits), few(bits));
        let n = |v: u64| number(v, bits, signed);
        check(&format!("mad.lo.{name} $d, $a, $b, $c;"), &[k], &[k; 3], &[&v, &v, &v], |s| {
            vec![wrap(i128::from(wrap(whole(n(s[0]), n(s[1])) as i128, bits)) + n(s[2]), bits)]
        });
        check(&format!("mad.hi.{name} $d, $a, $b, $c;"), &[k], &[k; 3], &[&v, &v, &v], |s| {
            vec![wrap(i128::from(wrap(high(n(s[0]), n(s[1])), bits)) + n(s[2]), bits)]
        });
        if bits < 64 {
            let wide = kind(2 * bits);
            let (v, sums) = (edges(bits), few(2 * bits));
            check(&format!("mul.wide.{name} $d, $a, $b;"), &[wide], &[k; 2], &[&v, &v], |s| {
                vec![wrap(n(s[0]) * n(s[1]), 2 * bits)]
            });
            check(
                &format!("mad.wide.{name} $d, $a, $b, $c;"),
                &[wide],
                &[k, k, wide],
                &[&v, &v, &sums],
                |s| vec![wrap(n(s[0]) * n(s[1]) + number(s[2], 2 * bits, signed), 2 * bits)],
            );
        }
    }
    let v = few(32);
    check("mad.hi.sat.s32 $d, $a, $b, $c;", &[W], &[W; 3], &[&v, &v, &v], |s| {
        let n = |i: usize| number(s[i], 32, true);
        let sum = ((n(0) * n(1)) >> 32) + n(2);
        vec![wrap(sum.clamp(i128::from(i32::MIN), i128::from(i32::MAX)), 32)]
    });
}

#[test]
fn products_of_24_bits() {
    let v = edges(32);
    let sums = few(32);
    for (name, signed) in [("u32", false), ("s32", true)] {
        for (part, shift) in [("lo", 0), ("hi", 16)] {
            let f = move |s: &[u64]| {
                let product = number(s[0], 24, signed) * number(s[1], 24, signed);
                wrap(product >> shift, 32)
            };
            check(&format!("mul24.{part}.{name} $d, $a, $b;"), &[W], &[W; 2], &[&v, &v], |s| vec![f(s)]);
            check(&format!("mad24.{part}.{name} $d, $a, $b, $c;"), &[W], &[W; 3], &[&v, &sums, &sums], |s| {
                vec![wrap(i128::from(f(s)) + i128::from(s[2]), 32)]
            });
        }
    }
    check("mad24.hi.sat.s32 $d, $a, $b, $c;", &[W], &[W; 3], &[&v, &sums, &sums], |s| {
        let high = number(wrap((number(s[0], 24, true) * number(s[1], 24, true)) >> 16, 32), 32, true);
        let sum = high + number(s[2], 32, true);
        vec![wrap(sum.clamp(i128::from(i32::MIN), i128::from(i32::MAX)), 32)]
    });
}

#[test]
fn quotients_truncate_and_a_zero_divisor_gives_ones() {
    for (name, bits, signed) in INTEGERS {
        let (k, v) = (kind(bits), edges(bits));
        let n = |v: u64| number(v, bits, signed);
        let allowed = |finding: &str| finding.contains("Misuse: integer division by zero");
        check_finding(
            &format!("div.{name} $d, $a, $b;"),
            &[k],
            &[k; 2],
            &[&v, &v],
            |s| vec![if s[1] == 0 { ones(bits) } else { wrap(n(s[0]) / n(s[1]), bits) }],
            allowed,
        );
        check_finding(
            &format!("rem.{name} $d, $a, $b;"),
            &[k],
            &[k; 2],
            &[&v, &v],
            |s| vec![if s[1] == 0 { ones(bits) } else { wrap(n(s[0]) % n(s[1]), bits) }],
            allowed,
        );
        let nonzero: Vec<u64> = v.iter().copied().filter(|&b| b != 0).collect();
        check(&format!("div.{name} $d, $a, $b;"), &[k], &[k; 2], &[&v, &nonzero], |s| {
            vec![wrap(n(s[0]) / n(s[1]), bits)]
        });
    }
}

#[test]
fn a_division_by_zero_is_reported_with_its_lanes() {
    let body = "sub.u32 %r1, %r0, 5; add.u32 %r2, %r0, 7; div.u32 %r3, %r2, %r1;";
    let ran = common::run(&common::kernel(0, body), "test", 32, &[]);
    let report = &ran.device.reports.all()[0].text;
    assert!(report.starts_with("========= Misuse: integer division by zero"), "{report}");
    assert!(report.contains("lanes 00000020"), "{report}");
    // A lane that does not take part divides nothing.
    let body = "sub.u32 %r1, %r0, 5; setp.ne.u32 %p1, %r1, 0; @%p1 rem.s32 %r3, %r0, %r1;";
    common::run(&common::kernel(0, body), "test", 32, &[]).silent();
}

#[test]
fn smaller_and_larger() {
    for ty in INTEGERS {
        two("min", ty, i128::min);
        two("max", ty, i128::max);
    }
    two("min.relu", ("s32", 32, true), |a, b| a.min(b).max(0));
    two("max.relu", ("s32", 32, true), |a, b| a.max(b).max(0));
}

#[test]
fn signs() {
    for (name, bits) in [("s16", 16), ("s32", 32), ("s64", 64)] {
        let (k, v) = (kind(bits), edges(bits));
        check(&format!("abs.{name} $d, $a;"), &[k], &[k], &[&v], |s| {
            vec![wrap(number(s[0], bits, true).abs(), bits)]
        });
        check(&format!("neg.{name} $d, $a;"), &[k], &[k], &[&v], |s| {
            vec![wrap(-number(s[0], bits, true), bits)]
        });
    }
}

/// `f` on both halves of words.
fn halves(s: &[u64], signed: bool, f: impl Fn(i128, i128) -> i128) -> Vec<u64> {
    let half = |n: u32| {
        wrap(f(number(s[0] >> (16 * n), 16, signed), number(s[1] >> (16 * n), 16, signed)), 16) << (16 * n)
    };
    vec![half(0) | half(1)]
}

#[test]
fn packed_halves() {
    let mut v = edges(32);
    v.extend([0x7fff_8000, 0x8000_7fff, 0x0001_ffff, 0xffff_0001]);
    for (ty, signed) in [("u16x2", false), ("s16x2", true)] {
        let run = |op: &str, f: &dyn Fn(i128, i128) -> i128| {
            check(&format!("{op}.{ty} $d, $a, $b;"), &[W], &[W; 2], &[&v, &v], |s| halves(s, signed, f));
        };
        run("add", &|a, b| a + b);
        run("sub", &|a, b| a - b);
        run("min", &i128::min);
        run("max", &i128::max);
        if signed {
            run("min.relu", &|a, b| a.min(b).max(0));
            run("max.relu", &|a, b| a.max(b).max(0));
        }
    }
    check("neg.s16x2 $d, $a;", &[W], &[W], &[&v], |s| halves(&[s[0], 0], true, |a, _| -a));
}

#[test]
fn carries_join_words() {
    let v = few(32);
    let wide = |low: u64, high: u64| u128::from(low) | u128::from(high) << 32;
    for ty in ["u32", "s32"] {
        // The third word shows what carry the second instruction leaves.
        let text = |first: &str, next: &str| {
            format!(
                "{first}.cc.{ty} %r4, $a, $c; {next}.cc.{ty} %r5, $b, $f; {next}.{ty} $e, 0, 0; mov.b64 $d, {{%r4, %r5}};"
            )
        };
        check(&text("add", "addc"), &[D, W], &[W; 4], &[&v, &v, &v, &v], |s| {
            let sum = wide(s[0], s[1]) + wide(s[2], s[3]);
            vec![sum as u64, (sum >> 64) as u64]
        });
        check(&text("sub", "subc"), &[D, W], &[W; 4], &[&v, &v, &v, &v], |s| {
            let difference = wide(s[0], s[1]).wrapping_sub(wide(s[2], s[3]));
            vec![difference as u64, (difference >> 64) as u64 & 0xffff_ffff]
        });
    }
    let v = few(64);
    for ty in ["u64", "s64"] {
        check(
            &format!("add.cc.{ty} $d, $a, $b; addc.{ty} $e, $c, 0;"),
            &[D, D],
            &[D; 3],
            &[&v, &v, &v],
            |s| {
                let sum = u128::from(s[0]) + u128::from(s[1]);
                vec![sum as u64, s[2].wrapping_add((sum >> 64) as u64)]
            },
        );
        check(
            &format!("sub.cc.{ty} $d, $a, $b; subc.{ty} $e, $c, 0;"),
            &[D, D],
            &[D; 3],
            &[&v, &v, &v],
            |s| vec![s[0].wrapping_sub(s[1]), s[2].wrapping_sub(u64::from(s[0] < s[1]))],
        );
    }
}

#[test]
fn products_with_carry() {
    for (ty, bits, signed) in INTEGERS.into_iter().filter(|ty| ty.1 > 16) {
        let (k, v) = (kind(bits), few(bits));
        for part in ["lo", "hi"] {
            let text = format!("mad.{part}.cc.{ty} $d, $a, $b, $c; addc.{ty} $e, 0, 0;");
            check(&text, &[k, k], &[k; 3], &[&v, &v, &v], |s| {
                let (a, b) = (number(s[0], bits, signed), number(s[1], bits, signed));
                let whole = if signed { (a * b) as u128 } else { a as u128 * b as u128 };
                let half = if part == "hi" { whole >> bits } else { whole } as u64 & ones(bits);
                let sum = u128::from(half) + u128::from(s[2]);
                vec![sum as u64 & ones(bits), (sum >> bits) as u64]
            });
            // The carry in is that of ones + c: set unless c is zero.
            let all = if bits == 64 { "-1" } else { "0xffffffff" };
            let text = format!("add.cc.{ty} $e, $c, {all}; madc.{part}.{ty} $d, $a, $b, 5;");
            check(&text, &[k, k], &[k; 3], &[&v, &v, &v], |s| {
                let (a, b) = (number(s[0], bits, signed), number(s[1], bits, signed));
                let whole = if signed { (a * b) as u128 } else { a as u128 * b as u128 };
                let half = if part == "hi" { whole >> bits } else { whole } as u64 & ones(bits);
                let sum = u128::from(half) + 5 + u128::from(s[2] != 0);
                vec![sum as u64 & ones(bits), s[2].wrapping_sub(1) & ones(bits)]
            });
        }
    }
    // Sums, differences and products that only pass a carry on.
    let v = few(32);
    check(
        "add.cc.u32 %r4, $a, $b; madc.hi.cc.u32 $d, $a, $b, $c; addc.u32 $e, 0, 0;",
        &[W, W],
        &[W; 3],
        &[&v, &v, &v],
        |s| {
            let carry = (s[0] + s[1]) >> 32;
            let sum = ((s[0] * s[1]) >> 32) + s[2] + carry;
            vec![sum & 0xffff_ffff, sum >> 32]
        },
    );
}

#[test]
fn counts_and_positions_of_bits() {
    for bits in [32, 64] {
        let (k, mut v) = (kind(bits), edges(bits));
        v.extend((0..bits).map(|n| 1 << n));
        v.extend((0..bits).map(|n| ones(bits) & !ones(n + 1)));
        let bit = move |value: u64, n: u32| value >> n & 1;
        check(&format!("popc.b{bits} $d, $a;"), &[W], &[k], &[&v], |s| {
            vec![(0..bits).map(|n| bit(s[0], n)).sum()]
        });
        check(&format!("clz.b{bits} $d, $a;"), &[W], &[k], &[&v], |s| {
            vec![(0..bits).rev().take_while(|&n| bit(s[0], n) == 0).count() as u64]
        });
        check(&format!("brev.b{bits} $d, $a;"), &[k], &[k], &[&v], |s| {
            vec![(0..bits).map(|n| bit(s[0], n) << (bits - 1 - n)).sum()]
        });
        for (ty, signed) in [("u", false), ("s", true)] {
            let find = move |value: u64| {
                let sign = if signed { bit(value, bits - 1) } else { 0 };
                (0..bits).rev().find(|&n| bit(value, n) != sign)
            };
            check(&format!("bfind.{ty}{bits} $d, $a;"), &[W], &[k], &[&v], |s| {
                vec![find(s[0]).map_or(0xffff_ffff, u64::from)]
            });
            check(&format!("bfind.shiftamt.{ty}{bits} $d, $a;"), &[W], &[k], &[&v], |s| {
                vec![find(s[0]).map_or(0xffff_ffff, |n| u64::from(bits - 1 - n))]
            });
        }
    }
}

#[test]
fn the_nth_set_bit() {
    let v = [0, 1, 0x8000_0000, 0xffff_ffff, 0x0010_2481, 0x5a5a_1234];
    let bases = [0, 1, 7, 15, 30, 31, 32, 0xffff_ffff];
    let offsets: Vec<u64> =
        (-5i64..=5).chain([40, -40, i64::from(i32::MIN)]).map(|n| n as u64 & 0xffff_ffff).collect();
    check("fns.b32 $d, $a, $b, $c;", &[W], &[W; 3], &[&v, &bases, &offsets], |s| {
        let (base, offset) = (s[1] as i64, i64::from(s[2] as u32 as i32));
        let set = |n: &i64| s[0] >> n & 1 == 1;
        let mut places: Vec<i64> = match offset {
            0 => vec![base],
            1.. => (base..32).collect(),
            _ => (0..=base.min(31)).rev().filter(|_| base < 32).collect(),
        };
        places.retain(|n| (0..32).contains(n));
        let nth = (offset.unsigned_abs().max(1) - 1) as usize;
        vec![places.into_iter().filter(set).nth(nth).map_or(0xffff_ffff, |n| n as u64)]
    });
}

#[test]
fn sums_of_absolute_differences() {
    for (ty, bits, signed) in INTEGERS {
        let (k, v) = (kind(bits), few(bits));
        check(&format!("sad.{ty} $d, $a, $b, $c;"), &[k], &[k; 3], &[&v, &v, &v], |s| {
            let n = |i: usize| number(s[i], bits, signed);
            vec![wrap((n(0) - n(1)).abs() + n(2), bits)]
        });
    }
}

#[test]
fn dot_products_of_bytes() {
    let v = [0, 0x8080_8080, 0x7f7f_7f7f, 0xffff_ffff, 0x0102_0304, 0x80ff_7f01, 0x9d2c_5680];
    for (at, signed_a) in [("u32", false), ("s32", true)] {
        for (bt, signed_b) in [("u32", false), ("s32", true)] {
            check(&format!("dp4a.{at}.{bt} $d, $a, $b, $c;"), &[W], &[W; 3], &[&v, &v, &v], |s| {
                let dot: i128 = (0..4)
                    .map(|n| number(s[0] >> (8 * n), 8, signed_a) * number(s[1] >> (8 * n), 8, signed_b))
                    .sum();
                vec![wrap(dot + i128::from(s[2]), 32)]
            });
            for (part, first) in [("lo", 0), ("hi", 2)] {
                check(&format!("dp2a.{part}.{at}.{bt} $d, $a, $b, $c;"), &[W], &[W; 3], &[&v, &v, &v], |s| {
                    let term = |n: u32| {
                        number(s[0] >> (16 * n), 16, signed_a)
                            * number(s[1] >> (8 * (first + n)), 8, signed_b)
                    };
                    vec![wrap(term(0) + term(1) + i128::from(s[2]), 32)]
                });
            }
        }
    }
}

#[test]
fn literals_are_read_in_the_width_of_the_type() {
    let (h, w, d) = (edges(16), edges(32), edges(64));
    check("add.s16 $d, $a, -3;", &[H], &[H], &[&h], |s| vec![wrap(i128::from(s[0]) - 3, 16)]);
    check("add.s32 $d, $a, -3;", &[W], &[W], &[&w], |s| vec![wrap(i128::from(s[0]) - 3, 32)]);
    check("add.s64 $d, $a, -3;", &[D], &[D], &[&d], |s| vec![s[0].wrapping_sub(3)]);
    check("mul.wide.s32 $d, $a, -3;", &[D], &[W], &[&w], |s| vec![wrap(number(s[0], 32, true) * -3, 64)]);
    check("mul.wide.u32 $d, $a, 0xfffffffd;", &[D], &[W], &[&w], |s| vec![s[0].wrapping_mul(0xffff_fffd)]);
    check("mad.lo.s32 $d, $a, 0b101, WARP_SZ;", &[W], &[W], &[&w], |s| {
        vec![wrap(i128::from(s[0]) * 5 + 32, 32)]
    });
    check("sub.u64 $d, 0x8000000000000000, $a;", &[D], &[D], &[&d], |s| {
        vec![(1u64 << 63).wrapping_sub(s[0])]
    });
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "add.sat.u32 %r1, %r2, %r3",
        "add.b32 %r1, %r2, %r3",
        "add.cc.sat.s32 %r1, %r2, %r3",
        "add.s32.foo %r1, %r2, %r3",
        "add.s32 %r1, %r2",
        "add.s32 %rd1, %r2, %r3",
        "addc.u16 %h1, %h2, %h3",
        "mul.s32 %r1, %r2, %r3",
        "mul.wide.u64 %rd1, %rd2, %rd3",
        "mul.lo.cc.u32 %r1, %r2, %r3",
        "mad.lo.sat.s32 %r1, %r2, %r3, %r4",
        "div.full.s32 %r1, %r2, %r3",
        "min.relu.u32 %r1, %r2, %r3",
        "abs.u32 %r1, %r2",
        "popc.u32 %r1, %r2",
        "bfind.b32 %r1, %r2",
        "dp4a.u32 %r1, %r2, %r3, %r4",
        "sad.b32 %r1, %r2, %r3, %r4",
    ] {
        forms::refused(text);
    }
}

#[test]
fn an_undefined_source_or_carry_makes_the_sum_undefined() {
    // Storing is no decision; branching on the sum is.
    for (body, what) in [
        ("add.u32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 3; @%p1 bra END; END:", "branch"),
        (
            "add.cc.u32 %r2, %r1, 1; addc.u32 %r3, 0, 0; setp.eq.u32 %p1, %r3, 3; @%p1 bra END; END:",
            "carry out",
        ),
        ("addc.u32 %r3, 0, 0; setp.eq.u32 %p1, %r3, 3; @%p1 bra END; END:", "carry that nobody made"),
    ] {
        let ran = common::run(&common::kernel(0, body), "test", 32, &[]);
        assert!(ran.findings().iter().any(|f| f.contains("Undefined")), "{what}");
    }
    let body = "add.cc.u32 %r2, %r0, 1; add.u32 %r4, %r1, 1; addc.u32 %r3, 0, 0; setp.eq.u32 %p1, %r3, 3; @%p1 bra END; END:";
    common::run(&common::kernel(0, body), "test", 32, &[]).silent();
}
