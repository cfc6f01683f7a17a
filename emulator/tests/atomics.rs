//! Atomics: each operation and type with several lanes on one address, against the manual's definition applied one lane after the other.
#![allow(clippy::too_many_arguments, reason = "tests say it the short way")]

mod common;

use common::{Arg, Ran, doubles, halves, kernel, line_of, run, words};

/// Lanes in `mask` add, ... `b[lane]` to element `lane % spread` of the buffer `p0`; the old values go to `p2`. `p1` holds the operands.
fn global(op: &str, ty: &str, bytes: usize, spread: u32, mask: u32, third: &str, memory: Arg, b: Arg) -> Ran {
    let (reg, load) = match bytes {
        2 => ("%h", "u16"),
        4 => ("%r", "u32"),
        _ => ("%rd4", "u64"),
    };
    let body = format!(
        "mov.u32 %r20, {mask};\nmov.u32 %r21, 1;\nshl.b32 %r22, %r21, %r0;\nand.b32 %r22, %r22, %r20;\nsetp.ne.u32 %p1, %r22, 0;\n\
         mul.wide.u32 %rd10, %r0, {bytes};\nadd.s64 %rd11, %rd2, %rd10;\nadd.s64 %rd12, %rd3, %rd10;\n\
         rem.u32 %r23, %r0, {spread};\nmul.wide.u32 %rd13, %r23, {bytes};\nadd.s64 %rd14, %rd1, %rd13;\n\
         ld.global.{load} {reg}5, [%rd11];\n\
         @%p1 atom.global.{op}.{ty} {reg}6, [%rd14], {reg}5{third};\n\
         @%p1 st.global.{load} [%rd12], {reg}6;"
    );
    let size = 32 * bytes;
    run(&kernel(3, &body), "test", 32, &[memory, b, Arg::Out(size)])
}

/// The definition: lanes of the mask in order, `f(old, b)` is the new value. Gives memory and what each lane read.
fn serial<T: Copy>(
    memory: &[T],
    b: &[T],
    spread: usize,
    mask: u32,
    fill: T,
    f: impl Fn(T, T) -> T,
) -> (Vec<T>, Vec<T>) {
    let mut memory = memory.to_vec();
    let mut old = vec![fill; 32];
    for lane in (0..32).filter(|&lane| mask >> lane & 1 == 1) {
        let at = &mut memory[lane % spread];
        old[lane] = *at;
        *at = f(*at, b[lane]);
    }
    (memory, old)
}

const MASKS: [u32; 4] = [u32::MAX, 0x8000_0001, 0x0f0f_00f0, 1 << 17];

fn noise(seed: u32) -> Vec<u32> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    (0..32)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x
        })
        .collect()
}

#[test]
fn integers_of_32_bits() {
    type F = fn(u32, u32) -> u32;
    let operations: [(&str, &str, F); 11] = [
        ("add", "u32", |a, b| a.wrapping_add(b)),
        ("add", "s32", |a, b| a.wrapping_add(b)),
        ("min", "u32", |a, b| a.min(b)),
        ("max", "u32", |a, b| a.max(b)),
        ("min", "s32", |a, b| (a as i32).min(b as i32) as u32),
        ("max", "s32", |a, b| (a as i32).max(b as i32) as u32),
        ("and", "b32", |a, b| a & b),
        ("or", "b32", |a, b| a | b),
        ("xor", "b32", |a, b| a ^ b),
        ("exch", "b32", |_, b| b),
        ("inc", "u32", |a, b| if a >= b { 0 } else { a + 1 }),
    ];
    let dec: (&str, &str, F) = ("dec", "u32", |a, b| if a == 0 || a > b { b } else { a - 1 });
    for (op, ty, f) in operations.into_iter().chain([dec]) {
        for (n, mask) in MASKS.into_iter().enumerate() {
            for spread in [1, 5, 32] {
                let mut memory = noise(7 + n as u32);
                let mut b = noise(91 + n as u32);
                if matches!(op, "inc" | "dec") {
                    memory.iter_mut().chain(&mut b).for_each(|v| *v %= 6);
                    (memory[1], b[3]) = (u32::MAX, 0);
                }
                let ran = global(op, ty, 4, spread, mask, "", words(&memory), words(&b)).silent();
                let (expected, old) = serial(&memory, &b, spread as usize, mask, u32::MAX, f);
                assert_eq!(ran.words(0), expected, "{op}.{ty} mask {mask:x} spread {spread}");
                assert_eq!(ran.words(2), old, "{op}.{ty} mask {mask:x} spread {spread}");
            }
        }
    }
}

#[test]
fn integers_of_64_bits() {
    type F = fn(u64, u64) -> u64;
    let operations: [(&str, &str, F); 9] = [
        ("add", "u64", |a, b| a.wrapping_add(b)),
        ("min", "u64", |a, b| a.min(b)),
        ("max", "u64", |a, b| a.max(b)),
        ("min", "s64", |a, b| (a as i64).min(b as i64) as u64),
        ("max", "s64", |a, b| (a as i64).max(b as i64) as u64),
        ("and", "b64", |a, b| a & b),
        ("or", "b64", |a, b| a | b),
        ("xor", "b64", |a, b| a ^ b),
        ("exch", "b64", |_, b| b),
    ];
    let wide = |seed| -> Vec<u64> {
        noise(seed).iter().zip(noise(seed + 1)).map(|(&a, b)| u64::from(a) << 32 | u64::from(b)).collect()
    };
    for (op, ty, f) in operations {
        for (n, mask) in MASKS.into_iter().enumerate() {
            let (memory, b) = (wide(3 + n as u32), wide(40 + n as u32));
            let ran = global(op, ty, 8, 3, mask, "", doubles(&memory), doubles(&b)).silent();
            let (expected, old) = serial(&memory, &b, 3, mask, u64::MAX, f);
            assert_eq!(ran.doubles(0), expected, "{op}.{ty}");
            assert_eq!(ran.doubles(2), old, "{op}.{ty}");
        }
    }
}

#[test]
fn compare_and_swap_of_each_width() {
    // Each lane swaps in its own number where it finds 7: the first one wins.
    let b = [7u32; 32];
    let ran = global("cas", "b32", 4, 2, u32::MAX, ", %r0", words(&[7, 8]), words(&b)).silent();
    assert_eq!(ran.words(0), [0, 8]);
    assert_eq!(ran.words(2)[..5], [7, 8, 0, 8, 0]);
    let ran = global("cas", "b64", 8, 1, 0xf0, ", %rd13", doubles(&[0]), doubles(&[0; 32])).silent();
    assert_eq!(ran.doubles(0), [0]);
    let ran = global("cas", "b64", 8, 1, u32::MAX, ", %rd1", doubles(&[9]), doubles(&[9; 32])).silent();
    assert_eq!(ran.doubles(0), [ran.addresses[0]]);
    assert_eq!(ran.doubles(2)[..2], [9, ran.addresses[0]]);
    // Halfwords beside each other stay as they were.
    let body = "cvt.u16.u32 %h1, %r0; mov.u16 %h2, 5; atom.global.cas.b16 %h3, [%rd1+2], %h2, %h1; mul.wide.u32 %rd5, %r0, 2; add.s64 %rd6, %rd2, %rd5; st.global.u16 [%rd6], %h3;";
    let ran = run(&kernel(2, body), "test", 32, &[halves(&[1, 5, 3, 4]), Arg::Out(64)]).silent();
    assert_eq!(ran.halves(0), [1, 0, 3, 4]);
    assert_eq!(ran.halves(1)[..3], [5, 0, 0]);
}

#[test]
fn floats_add_in_lane_order_and_flush_in_global_memory_only() {
    let b: Vec<f32> = (0..32).map(|i| 0.1 * (i as f32) - 1.0 + if i == 20 { 1e6 } else { 0.0 }).collect();
    let bits: Vec<u32> = b.iter().map(|v| v.to_bits()).collect();
    for mask in MASKS {
        let ran = global("add", "f32", 4, 1, mask, "", words(&[1.5f32.to_bits()]), words(&bits)).silent();
        let (memory, old) = serial(&[1.5f32], &b, 1, mask, f32::from_bits(u32::MAX), |a, b| a + b);
        assert_eq!(ran.words(0), [memory[0].to_bits()]);
        assert_eq!(ran.words(2), old.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }
    let b64: Vec<u64> = b.iter().map(|&v| f64::from(v).to_bits()).collect();
    let ran = global("add", "f64", 8, 1, u32::MAX, "", doubles(&[0.3f64.to_bits()]), doubles(&b64)).silent();
    let sum = b.iter().fold(0.3f64, |a, &b| a + f64::from(b));
    assert_eq!(ran.doubles(0), [sum.to_bits()]);

    // Subnormals: to signed zero in global memory, kept in shared memory.
    let tiny = 0x8000_0123u32;
    let body = format!(
        ".shared .align 4 .b8 s[4]; mov.u32 %r1, {tiny}; mov.u32 %r2, 0x80000000; st.shared.u32 [s], %r2; atom.shared.add.f32 %f1, [s], 0f80000123;\n\
         ld.shared.f32 %f2, [s]; st.global.f32 [%rd1], %f2; red.global.add.f32 [%rd2], 0f80000123; mov.f32 %f3, 0f7fffffff; red.global.add.f32 [%rd2+4], %f3;"
    );
    let ran = run(&kernel(2, &body), "test", 1, &[Arg::Out(4), words(&[0x8000_0000, 0x7f80_0000])]).silent();
    assert_eq!(ran.words(0), [tiny]);
    assert_eq!(ran.words(1), [0x8000_0000, 0x7fff_ffff]);
}

#[test]
fn halves_add_with_one_rounding() {
    // 2048 + 1 is half way between two f16 numbers and goes to the even one; with 3 up to 2052. 2^-24 is the smallest subnormal.
    let h = |v: f32| u32::from(half::f16::from_f32(v).to_bits());
    let pair = |low: u32, high: u32| low | high << 16;
    let body = "mov.u32 %r1, %r0; red.global.add.noftz.f16x2 [%rd1], {V}; ";
    let cases = [
        (pair(h(2048.0), h(2048.0)), pair(h(1.0), h(3.0)), pair(h(2048.0), h(2052.0))),
        (pair(1, 0x8001), pair(1, 1), pair(2, 0)),
        (pair(h(65504.0), 0x7e01), pair(h(65504.0), h(1.0)), pair(0x7c00, 0x7fff)),
        (pair(h(-1.0), h(0.5)), pair(h(1.0), h(0.25)), pair(0, h(0.75))),
    ];
    for (memory, b, expected) in cases {
        let body = body.replace("{V}", "%r5").replace("mov.u32 %r1, %r0", &format!("mov.u32 %r5, {b}"));
        let ran = run(&kernel(1, &body), "test", 1, &[words(&[memory])]).silent();
        assert_eq!(ran.words(0)[0], expected, "{memory:08x} + {b:08x} gave {:08x}", ran.words(0)[0]);
    }
    // One half alone, in shared memory; the neighbour stays.
    let body = ".shared .align 4 .b8 s[4]; mov.u32 %r1, 0x3c003c00; st.shared.u32 [s], %r1; mov.b16 %h1, 0x3c00; atom.shared.add.noftz.f16 %h2, [s+2], %h1; ld.shared.u32 %r2, [s]; st.global.u32 [%rd1], %r2; st.global.u16 [%rd1+4], %h2;";
    let ran = run(&kernel(1, body), "test", 1, &[words(&[0, 0])]).silent();
    assert_eq!(ran.words(0), [0x4000_3c00, 0x3c00]);
    // bf16: 256 + 1 is half way, to even; as a pair and alone.
    let bf = |v: f32| v.to_bits() >> 16;
    let body = format!(
        "mov.u32 %r1, {}; red.global.add.noftz.bf16x2 [%rd1], %r1; mov.b16 %h1, {}; red.add.noftz.bf16 [%rd1+4], %h1;",
        pair(bf(1.0), bf(3.0)),
        bf(-2.0)
    );
    let memory = [pair(bf(256.0), bf(256.0)), pair(bf(5.0), 77)];
    let ran = run(&kernel(1, &body), "test", 1, &[words(&memory)]).silent();
    assert_eq!(ran.words(0), [pair(bf(256.0), bf(260.0)), pair(bf(3.0), 77)]);
}

#[test]
fn vectors_of_floats() {
    let body = "mov.f32 %f1, 0f3f800000; mov.f32 %f2, 0f40000000; red.global.add.v2.f32 [%rd1], {%f1, %f2}; atom.global.v4.f32.add {%f3, %f4, _, %f5}, [%rd1], {%f1, %f1, %f2, %f2}; st.global.v2.f32 [%rd2], {%f3, %f5};";
    let f = |v: f32| v.to_bits();
    let ran = run(&kernel(2, body), "test", 2, &[words(&[0, 0, 0, f(8.0)]), words(&[0, 0])]).silent();
    assert_eq!(ran.words(0), [f(4.0), f(6.0), f(4.0), f(12.0)]);
    // The last lane to run read what the other had left.
    assert_eq!(ran.words(1), [f(3.0), f(10.0)]);
    let body = "mov.u32 %r1, 0x40003c00; mov.u32 %r2, 0x3c00c000; red.global.max.noftz.v2.f16x2 [%rd1], {%r1, %r2}; red.global.min.noftz.v2.f16x2 [%rd1+8], {%r1, %r2};";
    let memory = [0x3c00_4000, 0x7e00_8000, 0x3c00_4000, 0x7e00_0000];
    let ran = run(&kernel(1, body), "test", 1, &[words(&memory)]).silent();
    assert_eq!(ran.words(0), [0x4000_4000, 0x3c00_8000, 0x3c00_3c00, 0x3c00_c000]);
}

#[test]
fn generic_addresses_reach_both_memories_at_once() {
    // Even lanes add to shared memory, odd ones to global memory, in one instruction.
    let body = ".shared .align 4 .b8 s[4]; st.shared.u32 [s], 0; bar.warp.sync -1;\n\
        mov.u64 %rd5, 0x0001000000000000; mov.u32 %r1, s; cvt.u64.u32 %rd6, %r1; add.s64 %rd5, %rd5, %rd6;\n\
        and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0; selp.b64 %rd7, %rd5, %rd1, %p1;\n\
        atom.add.u32 _, [%rd7], %r0; bar.warp.sync -1; ld.shared.u32 %r3, [s]; st.global.u32 [%rd1+4], %r3;";
    let ran = run(&kernel(1, body), "test", 32, &[words(&[1000, 0])]).silent();
    assert_eq!(ran.words(0), [1000 + 256, 240]);
}

#[test]
fn undefined_operands_are_reported_and_exchanges_pass_them_on() {
    let cases = [
        ("atom.global.add.u32 %r1, [%rd1], %r2;", words(&[1]), "used as atomic operand"),
        ("red.global.add.u32 [%rd1], 1;", Arg::Out(4), "used as atomic operand (in memory)"),
        ("atom.global.add.u32 %r1, [%rd5], 1;", words(&[1]), "used as address"),
        ("@%p7 red.global.add.u32 [%rd1], 1;", words(&[1]), "used as guard predicate"),
    ];
    for (body, memory, what) in cases {
        let ptx = kernel(1, body);
        let ran = run(&ptx, "test", 2, &[memory]).found("Undefined");
        let report = &ran.device.reports.all()[0];
        assert_eq!(report.line, line_of(&ptx, body));
        assert!(report.text.contains(what) && report.text.contains("thread (0,0,0)"), "{}", report.text);
    }
    let ran = run(
        &kernel(1, "atom.global.exch.b32 %r1, [%rd1], 1; st.global.u32 [%rd1+4], %r1;"),
        "test",
        1,
        &[Arg::Out(8)],
    )
    .silent();
    let index = ran.device.memory.find(ran.addresses[0], 8).unwrap();
    assert_eq!(ran.device.memory.get(index).shadow, [0, 0, 0, 0, 1, 1, 1, 1]);
}

#[test]
fn faults_of_atomics() {
    let first = |ran: &Ran| ran.device.reports.all()[0].text.clone();
    let at = |body: &str| run(&kernel(1, body), "test", 4, &[words(&[1, 2])]).found("");
    let ran = at("mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd1, %rd5;\nred.global.add.u32 [%rd6], 1;");
    let text = first(&ran);
    assert!(text.starts_with("========= Invalid __global__ atomic of size 4 bytes"), "{text}");
    assert!(text.contains("thread (2,0,0)") && text.contains("lanes 0000000c"), "{text}");
    assert!(text.contains("is 0 bytes past the end of allocation #1 (size 8)"), "{text}");
    assert_eq!(ran.words(0), [1, 2]);
    let text = first(&at("red.global.add.u64 [%rd1+4], 1;"));
    assert!(text.starts_with("========= Misaligned __global__ atomic of size 8 bytes"), "{text}");
    let text = first(&at(".shared .align 4 .b8 s[8]; red.shared.add.u32 [s+8], 1;"));
    assert!(
        text.contains("offset 8 is 0 bytes past the end of the block's 8 bytes of shared memory"),
        "{text}"
    );
    let text = first(&at("mov.u64 %rd5, 0x0002000000000000; red.add.u32 [%rd5], 1;"));
    assert!(text.starts_with("========= Invalid __local__ atomic"), "{text}");
}

#[test]
fn atomics_that_do_not_exist_are_refused() {
    for text in [
        "atom.global.and.f32 %f1, [%rd1], %f2;",
        "red.global.add.f16 [%rd1], %h1;",
        "atom.global.inc.s32 %r1, [%rd1], 1;",
        "red.shared.add.v2.f32 [%r1], {%f1, %f2};",
        "atom.global.add.u32 %r1, [%rd1], 1, 2;",
        "red.local.add.u32 [%rd1], 1;",
        "atom.global.mul.u32 %r1, [%rd1], 2;",
    ] {
        let mut device = cuda::device::Device::new(cuda::config::Config::default());
        let ptx = kernel(1, text);
        let error = device.load(&ptx).unwrap_err();
        assert_eq!(error.line, line_of(&ptx, text), "{text}: {}", error.message);
    }
}
