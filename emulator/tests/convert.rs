//! cvt between all types, against exact integers: every f16 and bf16, edges and samples of the wider types.

#[path = "common/apply.rs"]
mod apply;
mod common;
#[path = "common/oracle.rs"]
mod oracle;

use apply::{Random, Values, apply, check, float_bits};
use oracle::{BF16, Exact, F16, F32, F64, Format, MODES, Mode, Number};
use proptest::prelude::*;

const FLOATS: [(&str, Format, usize); 4] =
    [("f16", F16, 2), ("bf16", BF16, 2), ("f32", F32, 4), ("f64", F64, 8)];
/// Name, bits, signed.
const INTEGERS: [(&str, u32, bool); 8] = [
    ("u8", 8, false),
    ("s8", 8, true),
    ("u16", 16, false),
    ("s16", 16, true),
    ("u32", 32, false),
    ("s32", 32, true),
    ("u64", 64, false),
    ("s64", 64, true),
];

fn equal(a: u64, b: u64) -> bool {
    a == b
}

/// The integer that the low bits of a register stand for.
fn integer(bits: u64, width: u32, signed: bool) -> i128 {
    let low = i128::from(bits) & ((1 << width) - 1);
    if signed && low >> (width - 1) & 1 == 1 { low - (1 << width) } else { low }
}

fn range(width: u32, signed: bool) -> (i128, i128) {
    if signed { (-(1 << (width - 1)), (1 << (width - 1)) - 1) } else { (0, (1 << width) - 1) }
}

/// A register of so many bytes with the value extended.
fn register(value: i128, bytes: usize) -> u64 {
    value as u64 & (u64::MAX >> (64 - 8 * bytes))
}

fn samples(format: Format, seed: u64, count: usize) -> Vec<u64> {
    if format.digits <= 11 {
        return (0..0x1_0000).collect();
    }
    let mut values = format.edges();
    let mut random = Random(seed);
    let all = format.sign() | (format.sign() - 1);
    let step = 1 << (format.digits - 1);
    let one = format.infinity() / 2 / step * step;
    values.extend((0..count).map(|i| {
        let bits = random.next() & all;
        // Half of them where integers and half-integers are.
        if i % 2 == 0 {
            bits
        } else {
            (bits % step) | (one + (random.next() % 66) * step - step) | (bits & format.sign())
        }
    }));
    // Integers and halves around the ends of the integer types.
    for exponent in [7u32, 8, 15, 16, 31, 32, 63, 64] {
        for half in -4i32..=4 {
            let x = Exact::integer((1i128 << (exponent + 1)) + i128::from(half));
            let twice = format.round(&x, Mode::Rz);
            let halved = twice - step;
            values.extend([halved, halved | format.sign()]);
        }
    }
    values
}

fn integer_samples(width: u32) -> Vec<u64> {
    let mut random = Random(u64::from(width));
    let mut values: Vec<u64> =
        (0..64).flat_map(|bit| [1u64 << bit, (1 << bit) - 1, (1u64 << bit).wrapping_neg()]).collect();
    values.extend((0..600).map(|_| {
        let bits = random.next();
        bits >> (bits % 64)
    }));
    values.push(u64::MAX);
    values
}

#[test]
fn integers_to_integers() {
    for (from, from_bits, from_signed) in INTEGERS {
        for (to, to_bits, to_signed) in INTEGERS {
            for sat in [false, true] {
                // Registers may be wider than the types.
                for (source, dest) in [(0, 0), (4, 4), (8, 8), (4, 8), (8, 4)] {
                    let source = source.max(from_bits as usize / 8).max(2);
                    let dest = dest.max(to_bits as usize / 8).max(2);
                    let values = integer_samples(from_bits);
                    let values = values.iter().map(|&v| register(i128::from(v), source)).collect();
                    let sources = [Values(source, values)];
                    let text = format!("cvt{}.{to}.{from} d, a;", if sat { ".sat" } else { "" });
                    let got = apply(&text, dest, &sources);
                    let want = |v: &[u64]| {
                        let value = integer(v[0], from_bits, from_signed);
                        let (low, high) = range(to_bits, to_signed);
                        let value = if sat {
                            value.clamp(low, high)
                        } else {
                            integer(value as u64, to_bits, to_signed)
                        };
                        register(value, dest)
                    };
                    check(&text, &sources, &got, want, equal);
                }
            }
        }
    }
}

/// The manual: NaN gives 0 when the source is not f64 and the destination has no 64 bits, else the highest bit alone.
fn float_to_integer(format: Format, bits: u64, mode: Mode, width: u32, signed: bool) -> i128 {
    let (low, high) = range(width, signed);
    match format.number(bits) {
        Number::Nan if format != F64 && width < 64 => 0,
        Number::Nan => {
            if signed {
                low
            } else {
                1 << (width - 1)
            }
        }
        Number::Infinite(negative) => {
            if negative {
                low
            } else {
                high
            }
        }
        Number::Finite(x) => {
            let magnitude = x.whole(mode) as i128;
            (if x.negative { -magnitude } else { magnitude }).clamp(low, high)
        }
    }
}

#[test]
fn floats_to_integers() {
    for (from, format, size) in FLOATS {
        let values = samples(format, 1, 500);
        // The search takes a while: every f16 to one type, a part of them to the others.
        let some: Vec<u64> = values.iter().copied().step_by(if size == 2 { 37 } else { 1 }).collect();
        for (to, bits, signed) in INTEGERS {
            let sources =
                [Values(size, if to == "s32" && format == F16 { values.clone() } else { some.clone() })];
            let dest = (bits as usize / 8).max(4);
            for (mode_name, mode) in MODES {
                for words in ["", ".ftz", ".sat"] {
                    if words == ".ftz" && format != F32 {
                        continue;
                    }
                    if to == "s32" && size == 2 && words == ".sat" {
                        continue;
                    }
                    let text = format!("cvt.{mode_name}i{words}.{to}.{from} d, a;");
                    let got = apply(&text, dest, &sources);
                    let want = |v: &[u64]| {
                        let x = if words == ".ftz" { format.flush(v[0]) } else { v[0] };
                        register(float_to_integer(format, x, mode, bits, signed), dest)
                    };
                    check(&text, &sources, &got, want, equal);
                }
            }
        }
    }
}

#[test]
fn integers_to_floats() {
    for (from, bits, signed) in INTEGERS {
        let source = (bits as usize / 8).max(2);
        let values = integer_samples(bits).iter().map(|&v| register(i128::from(v), source)).collect();
        let sources = [Values(source, values)];
        for (to, format, size) in FLOATS {
            for (mode_name, mode) in MODES {
                for sat in [false, true] {
                    let text = format!("cvt.{mode_name}{}.{to}.{from} d, a;", if sat { ".sat" } else { "" });
                    let got = apply(&text, size, &sources);
                    let want = |v: &[u64]| {
                        let value = integer(v[0], bits, signed);
                        format.round(&Exact::integer(if sat { value.clamp(0, 1) } else { value }), mode)
                    };
                    check(&text, &sources, &got, want, equal);
                }
            }
        }
    }
}

fn same(format: Format) -> impl Fn(u64, u64) -> bool {
    move |got, want| got == want || (format == F64 && format.is_nan(got) && format.is_nan(want))
}

/// `.sat`, `.relu`, `.satfinite` of a rounded value.
fn end(format: Format, words: &str, mut bits: u64) -> u64 {
    let one = (format.infinity() / 2) >> (format.digits - 1) << (format.digits - 1);
    let nan = bits == format.nan || format.is_nan(bits);
    if words.contains(".satfinite") && bits & (format.sign() - 1) == format.infinity() {
        bits -= 1;
    }
    let (negative, sat) = (bits & format.sign() != 0, words.split('.').any(|word| word == "sat"));
    if sat && (nan || negative) || words.contains(".relu") && !nan && negative {
        return 0;
    }
    if sat { bits.min(one) } else { bits }
}

#[test]
fn floats_to_floats() {
    for (from, source, source_size) in FLOATS {
        let values = samples(source, 2, 1200);
        for (to, dest, dest_size) in FLOATS {
            if from == to {
                continue;
            }
            let narrows = dest_size < source_size || (source_size == 2 && dest_size == 2);
            for (mode_name, mode) in &MODES[..if narrows { 4 } else { 1 }] {
                for words in ["", ".ftz", ".sat", ".relu", ".satfinite", ".relu.satfinite"] {
                    if words == ".ftz" && from != "f32" && to != "f32"
                        || (words.contains("relu") || words.contains("finite")) && dest_size != 2
                    {
                        continue;
                    }
                    // Every half in the plain form; the forms with words on a part of them.
                    let part = if words.is_empty() || source_size > 2 { 1 } else { 5 };
                    let sources = [Values(source_size, values.iter().copied().step_by(part).collect())];
                    let rounding = if narrows { format!(".{mode_name}") } else { String::new() };
                    let text = format!("cvt{rounding}{words}.{to}.{from} d, a;");
                    let got = apply(&text, dest_size, &sources);
                    let ftz = words == ".ftz";
                    let want = |v: &[u64]| {
                        let x = if ftz && source == F32 { source.flush(v[0]) } else { v[0] };
                        let mut y = source.convert(x, dest, *mode);
                        // Directed rounding of too large a number stops at the largest; of infinity only with .satfinite.
                        if ftz && dest == F32 {
                            y = dest.flush(y);
                        }
                        end(dest, words, y)
                    };
                    check(&text, &sources, &got, want, same(dest));
                }
            }
        }
    }
}

/// Within one type: rounding to integers, .sat, .ftz.
#[test]
fn floats_within_a_type() {
    for (ty, format, size) in FLOATS {
        if ty == "bf16" {
            continue;
        }
        let values = samples(format, 3, 1200);
        let sources =
            [Values(size, if size == 2 { values.into_iter().step_by(7).collect() } else { values })];
        let mut forms = vec![(String::new(), None)];
        forms.extend(MODES.map(|(name, mode)| (format!(".{name}i"), Some(mode))));
        for (word, mode) in forms {
            for end_word in ["", ".ftz", ".sat", ".ftz.sat"] {
                let ftz = end_word.contains("ftz");
                if ftz && ty != "f32" {
                    continue;
                }
                let text = format!("cvt{word}{end_word}.{ty}.{ty} d, a;");
                let got = apply(&text, size, &sources);
                let want = |v: &[u64]| {
                    let x = if ftz { format.flush(v[0]) } else { v[0] };
                    let y = match (format.number(x), mode) {
                        (Number::Nan, _) => format.nan,
                        (Number::Finite(x), Some(mode)) => {
                            let whole =
                                Exact::integer(x.whole(mode).min(1 << 100) as i128).signed(x.negative);
                            // Numbers beyond 2^99 are whole already.
                            if whole.compare(&Exact::integer(1 << 99)).is_ge() {
                                v[0]
                            } else {
                                format.round(&whole, mode)
                            }
                        }
                        _ => x,
                    };
                    if end_word.contains("sat") { end(format, ".sat", y) } else { y }
                };
                check(&text, &sources, &got, want, same(format));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_f32_and_f64(narrow in prop::collection::vec(float_bits(F32), 256), wide in prop::collection::vec(float_bits(F64), 256)) {
        for (name, mode) in MODES {
            let sources = [Values(8, wide.clone())];
            for (to, dest, size) in &FLOATS[..3] {
                let text = format!("cvt.{name}.{to}.f64 d, a;");
                check(&text, &sources, &apply(&text, *size, &sources), |v| F64.convert(v[0], *dest, mode), equal);
            }
            let text = format!("cvt.{name}i.s64.f64 d, a;");
            let want = |v: &[u64]| float_to_integer(F64, v[0], mode, 64, true) as u64;
            check(&text, &sources, &apply(&text, 8, &sources), want, equal);
            let sources = [Values(4, narrow.clone())];
            for (to, dest, size) in &FLOATS[..2] {
                let text = format!("cvt.{name}.{to}.f32 d, a;");
                check(&text, &sources, &apply(&text, *size, &sources), |v| F32.convert(v[0], *dest, mode), equal);
            }
            let text = format!("cvt.{name}i.u32.f32 d, a;");
            let want = |v: &[u64]| float_to_integer(F32, v[0], mode, 32, false) as u64;
            check(&text, &sources, &apply(&text, 4, &sources), want, equal);
        }
    }

    /// The first source goes to the upper half.
    #[test]
    fn pairs_of_halves(upper in prop::collection::vec(float_bits(F32), 256), lower in prop::collection::vec(float_bits(F32), 256)) {
        let sources = [Values(4, upper), Values(4, lower)];
        for (ty, format, _) in &FLOATS[..2] {
            for (name, mode) in &MODES[..2] {
                for words in ["", ".relu", ".satfinite", ".relu.satfinite"] {
                    let text = format!("cvt.{name}{words}.{ty}x2.f32 d, a, b;");
                    let half = |x: u64| end(*format, words, F32.convert(x, *format, *mode));
                    check(&text, &sources, &apply(&text, 4, &sources), |v| half(v[0]) << 16 | half(v[1]), equal);
                }
            }
        }
    }
}

/// tf32: 10 fraction bits in the upper bits of an f32.
#[test]
fn tf32() {
    let format = Format { digits: 11, exponent: 8, nan: 0x7fff_ffff >> 13 };
    let sources = [Values(4, samples(F32, 4, 3000))];
    for (name, mode) in [("rna", Mode::Rna), ("rn", Mode::Rn), ("rz", Mode::Rz)] {
        for words in ["", ".relu", ".satfinite"] {
            let text = format!("cvt.{name}{words}.tf32.f32 d, a;");
            let want = |v: &[u64]| {
                if F32.is_nan(v[0]) {
                    0x7fff_ffff
                } else {
                    end(format, words, F32.convert(v[0], format, mode)) << 13
                }
            };
            check(&text, &sources, &apply(&text, 4, &sources), want, equal);
        }
    }
}

/// A value of an 8-bit float by the formats' tables: 4 exponent bits with bias 7, or 5 with bias 15.
fn small(bits: u64, e4m3: bool) -> f64 {
    let (fraction_bits, bias) = if e4m3 { (3, 7) } else { (2, 15) };
    let fraction = (bits % (1 << fraction_bits)) as f64 / f64::from(1 << fraction_bits);
    let field = (bits >> fraction_bits & if e4m3 { 15 } else { 31 }) as i32;
    let nan = if e4m3 { bits & 0x7f == 0x7f } else { field == 31 && fraction != 0.0 };
    let magnitude = match field {
        _ if nan => f64::NAN,
        31 => f64::INFINITY,
        0 => fraction * 2f64.powi(1 - bias),
        _ => (1.0 + fraction) * 2f64.powi(field - bias),
    };
    if bits & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The nearest finite 8-bit float, by comparing with all of them; ties go to the even pattern.
fn nearest_small(x: f64, e4m3: bool, relu: bool) -> u64 {
    if x.is_nan() {
        return 0x7f;
    }
    if relu && x.is_sign_negative() {
        return 0;
    }
    let finite = |bits: &u64| small(*bits, e4m3).is_finite();
    let distance = |bits: u64| (small(bits, e4m3) - x.abs()).abs();
    let x_sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let best = (0..0x80).filter(finite).min_by(|&a, &b| {
        distance(a).partial_cmp(&distance(b)).unwrap_or(std::cmp::Ordering::Equal).then((a % 2).cmp(&(b % 2)))
    });
    // Far beyond the largest number all distances look the same.
    let largest = (0..0x80).filter(finite).max().unwrap();
    x_sign | if x.abs() >= small(largest, e4m3) { largest } else { best.unwrap() }
}

#[test]
fn eight_bit_floats() {
    for (ty, e4m3) in [("e4m3", true), ("e5m2", false)] {
        let all: Vec<u64> = (0..0x1_0000).collect();
        let sources = [Values(2, all.clone())];
        let text = format!("cvt.rn.f16x2.{ty}x2 d, a;");
        let exact = |bits: u64| {
            let x = small(bits, e4m3);
            if x.is_nan() { 0x7fff } else { F64.convert(x.to_bits(), F16, Mode::Rn) }
        };
        check(
            &text,
            &sources,
            &apply(&text, 4, &sources),
            |v| exact(v[0] & 0xff) | exact(v[0] >> 8) << 16,
            equal,
        );
        let mut values = samples(F32, 6, 600);
        // Around every value and every middle between two.
        for bits in 0..0x80 {
            let x = small(bits, e4m3) as f32;
            let middle = x.midpoint(small((bits + 1) % 0x80, e4m3) as f32);
            for y in [x, middle] {
                values.extend([y, -y, y.next_up(), y.next_down()].map(|y| u64::from(y.to_bits())));
            }
        }
        let mirrored = values.iter().rev().copied().collect();
        let sources = [Values(4, values), Values(4, mirrored)];
        for relu in [false, true] {
            let words = if relu { ".relu" } else { "" };
            let text = format!("cvt.rn.satfinite{words}.{ty}x2.f32 d, a, b;");
            let byte = |x: u64| nearest_small(f64::from(f32::from_bits(x as u32)), e4m3, relu);
            check(&text, &sources, &apply(&text, 2, &sources), |v| byte(v[0]) << 8 | byte(v[1]), equal);
            let halves = [Values(4, all.iter().step_by(3).map(|&h| h | (0xffff - h) << 16).collect())];
            let text = format!("cvt.rn.satfinite{words}.{ty}x2.f16x2 d, a;");
            let half = |h: u64| {
                let x = F16.convert(h, F64, Mode::Rn);
                if F16.is_nan(h) { 0x7f } else { nearest_small(f64::from_bits(x), e4m3, relu) }
            };
            check(
                &text,
                &halves,
                &apply(&text, 2, &halves),
                |v| half(v[0] >> 16) << 8 | half(v[0] & 0xffff),
                equal,
            );
        }
    }
}

#[test]
fn pack() {
    let values: Vec<u64> = integer_samples(32).iter().map(|v| v & 0xffff_ffff).collect();
    let turned = |n: usize| values.iter().cycle().skip(n).take(values.len()).copied().collect();
    let sources = [Values(4, values.clone()), Values(4, turned(7)), Values(4, turned(31))];
    for (ty, bits, signed) in [
        ("u16", 16, false),
        ("s16", 16, true),
        ("u8", 8, false),
        ("s8", 8, true),
        ("u4", 4, false),
        ("s4", 4, true),
        ("u2", 2, false),
        ("s2", 2, true),
    ] {
        let count = if bits == 16 { 2 } else { 3 };
        let text = format!(
            "cvt.pack.sat.{ty}.s32{} d, a, b{};",
            if count == 3 { ".b32" } else { "" },
            if count == 3 { ", c" } else { "" }
        );
        let got = apply(&text, 4, &sources[..count]);
        let (low, high) = range(bits, signed);
        let field = |v: u64| integer(v, 32, true).clamp(low, high) as u64 & ((1 << bits) - 1);
        let want = |v: &[u64]| {
            let rest = if count == 3 { v[2] << (2 * bits) } else { 0 };
            (rest | field(v[0]) << bits | field(v[1])) & 0xffff_ffff
        };
        check(&text, &sources[..count], &got, want, equal);
    }
}

/// Bytes that a conversion does not read may be undefined.
#[test]
fn what_is_not_read_may_be_undefined() {
    for (text, low, high) in [
        // The upper word of the source is undefined.
        ("mov.b64 %rd5, {%r1, %r9}; cvt.u32.u64 %r2, %rd5;", false, false),
        ("mov.b64 %rd5, {%r9, %r1}; cvt.u32.u64 %r2, %rd5;", true, true),
        // The upper half of the source is undefined, or of one of two sources.
        (".reg .b16 u; mov.b16 %h1, 7; mov.b32 %r3, {%h1, u}; cvt.u32.u16 %r2, %r3;", false, false),
        (".reg .b16 u; mov.b16 %h1, 7; mov.b32 %r3, {%h1, u}; cvt.u32.u32 %r2, %r3;", false, true),
        (".reg .b16 u; mov.b16 %h1, 7; mov.b32 %r3, {u, %h1}; cvt.u32.u16 %r2, %r3;", true, false),
        (".reg .b16 u; mov.b16 %h1, 7; mov.b32 %r3, {u, %h1}; cvt.s32.s16 %r2, %r3;", true, true),
        ("mov.f32 %f1, 0f3f800000; cvt.rn.f16x2.f32 %r2, %f1, %f9;", true, false),
        ("mov.f32 %f1, 0f3f800000; cvt.rn.bf16x2.f32 %r2, %f9, %f1;", false, true),
        ("cvt.rn.f32.s32 %r2, %r9;", true, true),
    ] {
        let body = format!(
            "mov.u32 %r1, 1; {text} mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd1; st.global.u32 [%rd2], %r2;"
        );
        let ran = common::run(&common::kernel(1, &body), "test", 32, &[common::Arg::Out(128)]);
        let want: Vec<bool> = (0..128).map(|i| if i % 4 < 2 { low } else { high }).collect();
        assert_eq!(apply::undefined(&ran, 0), want, "{text}");
    }
}

#[test]
fn lanes_outside_the_mask_keep_their_value() {
    for (text, want) in [
        ("cvt.s32.s8 %r2, %r0;", (|i| i) as fn(u32) -> u32),
        ("cvt.rn.f32.u32 %r2, %r0;", |i| (i as f32).to_bits()),
        ("cvt.rm.f32.u32 %r2, %r0;", |i| (i as f32).to_bits()),
        ("cvt.rn.satfinite.e5m2x2.f32 %r2, %r7, %r7;", |_| 0),
        ("cvt.rn.f16x2.f32 %r2, %r7, %r8;", |_| 0x3c00),
    ] {
        let body = format!(
            "mov.b32 %r7, 0; mov.b32 %r8, 0f3f800000; mov.u32 %r2, 1234; setp.gt.u32 %p1, %r0, 20; @%p1 {text} mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd1; st.global.u32 [%rd2], %r2;"
        );
        let ran = common::run(&common::kernel(1, &body), "test", 40, &[common::Arg::Out(160)]).silent();
        for (i, got) in (0u32..).zip(ran.words(0)) {
            assert_eq!(got, if i > 20 { want(i) } else { 1234 }, "{text} lane {i}");
        }
    }
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for (text, size, source) in [
        ("cvt.f16.f32 d, a;", 2, 4),
        ("cvt.s32.f32 d, a;", 4, 4),
        ("cvt.rn.s32.f32 d, a;", 4, 4),
        ("cvt.f32.s32 d, a;", 4, 4),
        ("cvt.rni.f32.s32 d, a;", 4, 4),
        ("cvt.rn.u32.u16 d, a;", 4, 2),
        ("cvt.rna.f16.f32 d, a;", 2, 4),
        ("cvt.rn.tf32.f64 d, a;", 4, 8),
        ("cvt.relu.f32.f16 d, a;", 4, 2),
        ("cvt.ftz.f64.f16 d, a;", 8, 2),
        ("cvt.u64.u32 d, a;", 4, 4),
        ("cvt.rn.e4m3x2.f32 d, a, a;", 2, 4),
        ("cvt.rm.f16x2.f32 d, a, a;", 4, 4),
        ("cvt.pack.sat.u8.s32 d, a, a;", 4, 4),
    ] {
        let ptx = apply::module(text, size, &[Values(source, vec![0])]);
        let mut device = cuda::device::Device::new(cuda::config::Config::default());
        device.reports.print = false;
        assert!(device.load(&ptx).is_err(), "{text} was accepted");
    }
}
