//! Logic, shifts and bit fields against definitions bit by bit.

mod common;
#[path = "common/forms.rs"]
mod forms;

use common::{Arg, Ran, kernel, run, words};
use forms::Kind::{D, H, P, W};
use forms::{check, edges, few, kind, ones};

/// The bit `n`.
fn bit(value: u64, n: u32) -> u64 {
    value >> n & 1
}

/// A value made of its bits.
fn from_bits(bits: u32, f: impl Fn(u32) -> u64) -> u64 {
    (0..bits).map(|n| f(n) << n).sum()
}

#[test]
fn and_or_xor_not() {
    for bits in [16, 32, 64] {
        let (k, v) = (kind(bits), edges(bits));
        let two = |op: &str, f: fn(u64, u64) -> u64| {
            check(&format!("{op}.b{bits} $d, $a, $b;"), &[k], &[k, k], &[&v, &v], |s| {
                vec![from_bits(bits, |n| f(bit(s[0], n), bit(s[1], n)))]
            });
        };
        two("and", |a, b| a * b);
        two("or", |a, b| (a + b).min(1));
        two("xor", |a, b| (a + b) % 2);
        check(&format!("not.b{bits} $d, $a;"), &[k], &[k], &[&v], |s| vec![ones(bits) - s[0]]);
        check(&format!("cnot.b{bits} $d, $a;"), &[k], &[k], &[&v], |s| vec![u64::from(s[0] == 0)]);
    }
    let truth = [0, 1];
    check("and.pred $d, $a, $b;", &[P], &[P, P], &[&truth, &truth], |s| vec![s[0] * s[1]]);
    check("or.pred $d, $a, $b;", &[P], &[P, P], &[&truth, &truth], |s| vec![(s[0] + s[1]).min(1)]);
    check("xor.pred $d, $a, $b;", &[P], &[P, P], &[&truth, &truth], |s| vec![(s[0] + s[1]) % 2]);
    check("not.pred $d, $a;", &[P], &[P], &[&truth], |s| vec![1 - s[0]]);
    let v = edges(32);
    check("and.b32 $d, $a, -256;", &[W], &[W], &[&v], |s| vec![s[0] / 256 * 256]);
    check("xor.b64 $d, $a, -1;", &[D], &[D], &[&edges(64)], |s| vec![u64::MAX - s[0]]);
}

#[test]
fn shifts_by_the_width_and_more() {
    let amounts = [0, 1, 5, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 255, 256, 0x8000_0000, 0xffff_ffff];
    for bits in [16, 32, 64] {
        let (k, v) = (kind(bits), edges(bits));
        let shift = |op: &str, f: &dyn Fn(u64, u64, u32) -> u64| {
            check(&format!("{op} $d, $a, $b;"), &[k], &[k, W], &[&v, &amounts], |s| {
                vec![from_bits(bits, |n| f(s[0], s[1], n))]
            });
        };
        let width = u64::from(bits);
        shift(&format!("shl.b{bits}"), &|a, by, n| {
            if u64::from(n) >= by { bit(a, n - by as u32) } else { 0 }
        });
        for ty in ["b", "u"] {
            shift(&format!("shr.{ty}{bits}"), &|a, by, n| {
                if u64::from(n) + by < width { bit(a, n + by as u32) } else { 0 }
            });
        }
        shift(&format!("shr.s{bits}"), &|a, by, n| bit(a, (u64::from(n) + by).min(width - 1) as u32));
    }
    check("shl.b32 $d, $a, 7;", &[W], &[W], &[&edges(32)], |s| vec![(s[0] * 128) & 0xffff_ffff]);
}

#[test]
fn funnel_shifts() {
    let v = few(32);
    let amounts = [0, 1, 13, 31, 32, 33, 63, 64, 0xffff_ffff];
    for (mode, clamp) in [("clamp", true), ("wrap", false)] {
        let by = move |n: u64| if clamp { n.min(32) } else { n % 32 } as u32;
        let whole = |s: &[u64]| u128::from(s[0] | s[1] << 32);
        check(&format!("shf.l.{mode}.b32 $d, $a, $b, $c;"), &[W], &[W; 3], &[&v, &v, &amounts], |s| {
            vec![((whole(s) << by(s[2])) >> 32) as u64 & 0xffff_ffff]
        });
        check(&format!("shf.r.{mode}.b32 $d, $a, $b, $c;"), &[W], &[W; 3], &[&v, &v, &amounts], |s| {
            vec![(whole(s) >> by(s[2])) as u64 & 0xffff_ffff]
        });
    }
}

#[test]
fn bit_fields() {
    let places = [0, 1, 7, 16, 31, 32, 33, 63, 64, 200, 255, 256, 0x0101_0108];
    let lengths = [0, 1, 8, 31, 32, 33, 63, 64, 65, 255, 256, 0xffff_ff10];
    for bits in [32, 64] {
        let (k, v) = (kind(bits), few(bits));
        for signed in [false, true] {
            let ty = if signed { "s" } else { "u" };
            let text = format!("bfe.{ty}{bits} $d, $a, $b, $c;");
            check(&text, &[k], &[k, W, W], &[&v, &places, &lengths], |s| {
                let (pos, len) = (s[1] as u32 & 0xff, s[2] as u32 & 0xff);
                let sign = if signed && len > 0 { bit(s[0], (pos + len - 1).min(bits - 1)) } else { 0 };
                vec![from_bits(bits, |n| if n < len && pos + n < bits { bit(s[0], pos + n) } else { sign })]
            });
        }
        let text = format!("bfi.b{bits} $d, $a, $b, $c, $f;");
        check(&text, &[k], &[k, k, W, W], &[&v, &v, &places, &lengths], |s| {
            let (pos, len) = (s[2] as u32 & 0xff, s[3] as u32 & 0xff);
            vec![from_bits(
                bits,
                |n| if n >= pos && n - pos < len { bit(s[0], n - pos) } else { bit(s[1], n) },
            )]
        });
    }
}

#[test]
fn masks_and_extensions() {
    let numbers = [0, 1, 5, 8, 16, 30, 31, 32, 33, 63, 64, 0x8000_0000, 0xffff_ffff];
    check("bmsk.clamp.b32 $d, $a, $b;", &[W], &[W, W], &[&numbers, &numbers], |s| {
        vec![from_bits(32, |n| u64::from(u64::from(n) >= s[0] && u64::from(n) < s[0] + s[1]))]
    });
    check("bmsk.wrap.b32 $d, $a, $b;", &[W], &[W, W], &[&numbers, &numbers], |s| {
        let (pos, len) = (s[0] % 32, s[1] % 32);
        vec![from_bits(32, |n| u64::from(u64::from(n) >= pos && u64::from(n) < pos + len))]
    });
    let v = edges(32);
    for (mode, clamp) in [("clamp", true), ("wrap", false)] {
        for (ty, signed) in [("u32", false), ("s32", true)] {
            check(&format!("szext.{mode}.{ty} $d, $a, $b;"), &[W], &[W, W], &[&v, &numbers], |s| {
                let len = if clamp { s[1].min(32) } else { s[1] % 32 } as u32;
                let sign = if signed && len > 0 { bit(s[0], len - 1) } else { 0 };
                vec![from_bits(32, |n| if n < len { bit(s[0], n) } else { sign })]
            });
        }
    }
}

#[test]
fn every_function_of_three_bits() {
    // One row of the table a bit: all eight rows occur in each byte of these words.
    let (a, b, c) = ([0xf0f0_f0f0, 0x1234_5678], [0xcccc_cccc, 0x9abc_def0], [0xaaaa_aaaa, 0x0f1e_2d3c]);
    let value = |s: &[u64], table: u64| {
        from_bits(32, |n| bit(table, (bit(s[0], n) * 4 + bit(s[1], n) * 2 + bit(s[2], n)) as u32))
    };
    for table in 0..256 {
        check(&format!("lop3.b32 $d, $a, $b, $c, {table};"), &[W], &[W; 3], &[&a, &b, &c], |s| {
            vec![value(s, table)]
        });
    }
    let (v, truth) = ([0, 0xffff_ffff, 0x8000_0001], [0, 1]);
    for (op, or) in [("or", true), ("and", false)] {
        for not in ["", "!"] {
            let text = format!("lop3.{op}.b32 $d|$e, $a, $b, $c, 0x80, {not}$f;");
            check(&text, &[W, P], &[W, W, W, P], &[&v, &v, &v, &truth], |s| {
                let d = s[0] & s[1] & s[2];
                let (nonzero, q) = (d != 0, (s[3] == 1) != (not == "!"));
                vec![d, u64::from(if or { nonzero || q } else { nonzero && q })]
            });
        }
    }
    check("lop3.and.b32 _|$d, $a, $b, $b, 0xc0, $c;", &[P], &[W, W, P], &[&v, &v, &truth], |s| {
        vec![u64::from(s[0] & s[1] != 0 && s[2] == 1)]
    });
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "and.u32 %r1, %r2, %r3",
        "and.b32.foo %r1, %r2, %r3",
        "or.b32 %r1, %r2",
        "xor.b32 %rd1, %r2, %r3",
        "not.f32 %f1, %f2",
        "shl.u32 %r1, %r2, %r3",
        "shl.b32 %r1, %r2, %rd3",
        "shf.l.b32 %r1, %r2, %r3, %r4",
        "shf.l.clamp.u32 %r1, %r2, %r3, %r4",
        "bfe.b32 %r1, %r2, %r3, %r4",
        "bfi.u32 %r1, %r2, %r3, %r4, %r5",
        "bmsk.b32 %r1, %r2, %r3",
        "szext.clamp.b32 %r1, %r2, %r3",
        "lop3.b32 %r1, %r2, %r3, %r4, 256",
        "lop3.b32 %r1, %r2, %r3, %r4, %r5",
        "lop3.xor.b32 %r1|%p1, %r2, %r3, %r4, 3, %p2",
    ] {
        forms::refused(text);
    }
}

// ---- undefined values: %r90, %rd90, %p30 are never written

/// Branches on a value, which is an error where it is undefined.
fn decide32(setup: &str, value: &str) -> Ran {
    let body = format!("{setup} setp.eq.u32 %p31, {value}, 77; @%p31 bra END; END:");
    run(&kernel(0, &body), "test", 32, &[])
}

fn decide16(setup: &str, value: &str) -> Ran {
    let body = format!("{setup} setp.eq.u16 %p31, {value}, 77; @%p31 bra END; END:");
    run(&kernel(0, &body), "test", 32, &[])
}

fn decide_pred(setup: &str, value: &str) -> Ran {
    run(&kernel(0, &format!("{setup} @{value} bra END; END:")), "test", 32, &[])
}

#[test]
fn a_zero_or_all_ones_decides_for_an_undefined_partner() {
    decide32("and.b32 %r1, %r90, 0;", "%r1").silent();
    decide32("mov.u32 %r2, 0; and.b32 %r1, %r2, %r90;", "%r1").silent();
    decide32("and.b32 %r1, %r90, 1;", "%r1").found("Undefined");
    decide32("and.b32 %r1, %r90, %r90;", "%r1").found("Undefined");
    decide32("or.b32 %r1, %r90, -1;", "%r1").silent();
    decide32("or.b32 %r1, %r90, 0;", "%r1").found("Undefined");
    decide32("xor.b32 %r1, %r90, %r90;", "%r1").found("Undefined");
    // Half by half.
    decide16("and.b32 %r1, %r90, 0xffff0000; mov.b32 {%h1, %h2}, %r1;", "%h1").silent();
    decide16("and.b32 %r1, %r90, 0xffff0000; mov.b32 {%h1, %h2}, %r1;", "%h2").found("Undefined");
    decide16("or.b32 %r1, %r90, 0xffff0000; mov.b32 {%h1, %h2}, %r1;", "%h1").found("Undefined");
    decide16("or.b32 %r1, %r90, 0xffff0000; mov.b32 {%h1, %h2}, %r1;", "%h2").silent();
    decide32("and.b64 %rd1, %rd90, 0xffffffff00000000; mov.b64 {%r1, %r2}, %rd1;", "%r1").silent();
    decide32("and.b64 %rd1, %rd90, 0xffffffff00000000; mov.b64 {%r1, %r2}, %rd1;", "%r2").found("Undefined");
    // Only the lanes in which the partner decides: odd lanes keep the undefined bits.
    let ran = decide32("and.b32 %r2, %r0, 1; and.b32 %r1, %r90, %r2;", "%r1").found("Undefined");
    assert!(ran.device.reports.all()[0].text.contains("lanes aaaaaaaa"));
    // Predicates.
    decide_pred("setp.eq.u32 %p1, %r0, 99; and.pred %p2, %p30, %p1;", "%p2").silent();
    decide_pred("setp.ne.u32 %p1, %r0, 99; and.pred %p2, %p30, %p1;", "%p2").found("Undefined");
    decide_pred("setp.ne.u32 %p1, %r0, 99; or.pred %p2, %p1, %p30;", "%p2").silent();
    decide_pred("setp.eq.u32 %p1, %r0, 99; or.pred %p2, %p1, %p30;", "%p2").found("Undefined");
    decide_pred("setp.eq.u32 %p1, %r0, 99; xor.pred %p2, %p1, %p30;", "%p2").found("Undefined");
}

#[test]
fn shifts_carry_undefined_halves_along() {
    // The low half is written, the high one is not.
    let half = "mov.b16 %h1, 5; mov.b32 %r1, {%h1, %h60};";
    let low = |shift: &str| decide16(&format!("{half} {shift} mov.b32 {{%h2, %h3}}, %r2;"), "%h2");
    let high = |shift: &str| decide16(&format!("{half} {shift} mov.b32 {{%h2, %h3}}, %r2;"), "%h3");
    low("shl.b32 %r2, %r1, 16;").silent();
    high("shl.b32 %r2, %r1, 16;").silent();
    low("shl.b32 %r2, %r1, 3;").silent();
    high("shl.b32 %r2, %r1, 3;").found("Undefined");
    low("shr.u32 %r2, %r1, 16;").found("Undefined");
    high("shr.u32 %r2, %r1, 16;").silent();
    high("shr.s32 %r2, %r1, 16;").found("Undefined");
    low("shr.u32 %r2, %r1, 1;").found("Undefined");
    low("shr.u32 %r2, %r1, 40;").silent();
    low("shr.s32 %r2, %r1, 40;").found("Undefined");
    low("shl.b32 %r2, %r1, %r90;").found("Undefined");
    let word = "mov.b32 %r1, 5; mov.b64 %rd1, {%r1, %r90};";
    decide32(&format!("{word} shl.b64 %rd2, %rd1, 32; mov.b64 {{%r2, %r3}}, %rd2;"), "%r3").silent();
    decide32(&format!("{word} shr.u64 %rd2, %rd1, 32; mov.b64 {{%r2, %r3}}, %rd2;"), "%r2")
        .found("Undefined");
}

#[test]
fn definedness_reaches_memory_half_by_half() {
    // Bytes 0, 1 written, 2, 3 not: a buffer of undefined bytes, the first halves stored, whole words moved through registers.
    let body = "mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd1, %rd10; add.s64 %rd12, %rd2, %rd10;\n\
        mov.b16 %h1, 7; st.global.u16 [%rd11], %h1; ld.global.u32 %r1, [%rd11];\n\
        not.b32 %r2, %r1; xor.b32 %r3, %r2, -1; st.global.u32 [%rd12], %r3;";
    let mut ran = run(&kernel(2, body), "test", 32, &[Arg::Out(128), words(&[0; 32])]).silent();
    let index = ran.device.memory.find(ran.addresses[1], 128).unwrap();
    let (bytes, shadow) = ran.device.memory.get_mut(index).parts_mut();
    assert!(shadow[..128].chunks(4).all(|w| w[0] == 0 && w[1] == 0 && w[2] != 0 && w[3] != 0), "{shadow:?}");
    assert!(bytes[..128].chunks(4).all(|w| w[..2] == [7, 0]));
}

#[test]
fn sixteen_bit_logic_looks_at_the_low_half_only() {
    decide16("mov.b16 %h1, 5; and.b16 %h2, %h1, 3;", "%h2").silent();
    decide16("and.b16 %h2, %h60, 0;", "%h2").silent();
    decide16("and.b16 %h2, %h60, 0xff;", "%h2").found("Undefined");
    let (h, v) = (H, edges(16));
    check("and.b16 $d, $a, 0xff00;", &[h], &[h], &[&v], |s| vec![s[0] / 256 * 256]);
}
