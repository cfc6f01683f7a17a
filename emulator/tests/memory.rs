//! Loads and stores: every space, width and vector, against bytes put together by hand; and each way to miss.
#![allow(clippy::format_push_string, reason = "tests say it the short way")]

mod common;

use common::{Arg, Ran, config, kernel, line_of, load, run, run_with, words};
use cuda::device::{Device, Shape};
use cuda::report::Fault;

/// A module with variables in front of one kernel `test` with pointer parameters `p0`, `p1`, ... in `%rd1`, `%rd2`, ...
fn with_variables(variables: &str, buffers: usize, body: &str) -> String {
    kernel(buffers, body).replacen(".visible", &format!("{variables}\n.visible"), 1)
}

/// Bytes that differ from their neighbours and have all signs.
fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i as u8).wrapping_mul(73) ^ 0x5a).collect()
}

/// The first report of a run that must have one: its title begins with `title`, its line is that of `text` in the PTX.
#[track_caller]
fn reported(ran: &Ran, ptx: &str, title: &str, text: &str) -> String {
    let report = ran.device.reports.all().first().unwrap_or_else(|| panic!("nothing found in {ptx}"));
    assert!(report.text.starts_with(&format!("========= {title}")), "expected {title}\n{}", report.text);
    assert_eq!(report.line, line_of(ptx, text), "{}", report.text);
    report.text.clone()
}

#[test]
fn scalars_are_extended_as_their_type_says() {
    // type, bytes, sign-extended; a .b register as wide as the type and all wider ones.
    let types = [
        ("b8", 1, false),
        ("u8", 1, false),
        ("s8", 1, true),
        ("b16", 2, false),
        ("u16", 2, false),
        ("s16", 2, true),
        ("b32", 4, false),
        ("u32", 4, false),
        ("s32", 4, true),
        ("f32", 4, false),
        ("b64", 8, false),
        ("u64", 8, false),
        ("s64", 8, true),
        ("f64", 8, false),
    ];
    let input = pattern(32 * 8);
    for (ty, size, signed) in types {
        for (register, width) in [("%h5", 2), ("%r5", 4), ("%rd20", 8)] {
            // Bytes go to 16-bit registers too.
            if width < size {
                continue;
            }
            let body = format!(
                "mul.wide.u32 %rd10, %r0, {size}; add.s64 %rd11, %rd1, %rd10; mul.wide.u32 %rd12, %r0, {width}; add.s64 %rd13, %rd2, %rd12;\n\
                 ld.global.{ty} {register}, [%rd11]; st.global.b{} [%rd13], {register};",
                8 * width
            );
            let arguments = [Arg::Buffer(input.clone()), Arg::Out(32 * width)];
            let ran = run(&kernel(2, &body), "test", 32, &arguments).silent();
            for lane in 0..32 {
                let mut expected = [0; 8];
                expected[..size].copy_from_slice(&input[lane * size..(lane + 1) * size]);
                if signed && expected[size - 1] >= 128 {
                    expected[size..].fill(0xff);
                }
                assert_eq!(
                    ran.buffers[1][lane * width..(lane + 1) * width],
                    expected[..width],
                    "ld.{ty} into {register}, lane {lane}"
                );
            }
        }
    }
}

#[test]
fn stores_keep_the_low_bytes() {
    for (ty, size) in
        [("b8", 1), ("u8", 1), ("s8", 1), ("u16", 2), ("s16", 2), ("b32", 4), ("f32", 4), ("u64", 8)]
    {
        for (register, from, width) in
            [("%r5", "mov.u32 %r5, 0x89abcdef;", 4), ("%rd20", "mov.u64 %rd20, 0x0123456789abcdef;", 8)]
        {
            if width < size {
                continue;
            }
            let body = format!("{from} st.global.{ty} [%rd1+8], {register};");
            let ran = run(&kernel(1, &body), "test", 1, &[Arg::Buffer(vec![0x11; 24])]).silent();
            let mut expected = vec![0x11; 24];
            expected[8..8 + size].copy_from_slice(&0x0123_4567_89ab_cdef_u64.to_le_bytes()[..size]);
            assert_eq!(ran.buffers[0], expected, "st.{ty} of {register}");
        }
    }
    // Literals and special registers are sources too; a float literal is stored as its bits.
    let body = "st.global.u32 [%rd1], 7; st.global.f32 [%rd1+4], 0f40490fdb; st.global.u16 [%rd1+8], -2; st.global.u32 [%rd1+12], %ntid.x; st.global.u64 [%rd1+16], -1; st.global.u8 [%rd1+10], 300;";
    let ran = run(&kernel(1, body), "test", 3, &[words(&[0; 6])]).silent();
    assert_eq!(ran.words(0), [7, 0x4049_0fdb, 0x002c_fffe, 3, u32::MAX, u32::MAX]);
}

#[test]
fn vectors_of_every_width() {
    for (count, bits) in [(2, 8), (4, 8), (2, 16), (4, 16), (2, 32), (4, 32), (2, 64), (8, 32), (4, 64)] {
        let size = count * bits / 8;
        let register = |n: usize| match bits {
            64 => format!("%rd{}", 30 + n),
            32 => format!("%r{}", 30 + n),
            _ => format!("%h{}", 30 + n),
        };
        let forward: Vec<String> = (0..count).map(register).collect();
        let backward: Vec<String> = forward.iter().rev().cloned().collect();
        let body = format!(
            "mul.wide.u32 %rd10, %r0, {size}; add.s64 %rd11, %rd1, %rd10; add.s64 %rd12, %rd2, %rd10;\n\
             ld.global.nc.v{count}.b{bits} {{{}}}, [%rd11]; st.global.v{count}.b{bits} [%rd12], {{{}}};",
            forward.join(", "),
            backward.join(", ")
        );
        let input = pattern(size * 40);
        let ran =
            run(&kernel(2, &body), "test", 40, &[Arg::Buffer(input.clone()), Arg::Out(size * 40)]).silent();
        let expected: Vec<u8> = input
            .chunks(size)
            .flat_map(|v| v.chunks(bits / 8).rev().flatten().copied().collect::<Vec<_>>())
            .collect();
        assert_eq!(ran.buffers[1], expected, "v{count}.b{bits}");
    }
    // A vector may drop elements.
    let body = "ld.global.v4.u32 {_, %r1, _, %r2}, [%rd1]; st.global.v2.u32 [%rd1], {%r2, %r1};";
    let ran = run(&kernel(1, body), "test", 1, &[words(&[1, 2, 3, 4])]).silent();
    assert_eq!(ran.words(0), [4, 2, 3, 4]);
}

#[test]
fn lanes_outside_the_mask_keep_their_registers_and_memory() {
    for mask in [1u32, 0x8000_0000, 0xffff_0000, 0x5555_5555, 0x0ff0_0810] {
        for stride in [4, 8, 20] {
            let body = format!(
                "mov.u32 %r20, 1; shl.b32 %r20, %r20, %r0; and.b32 %r20, %r20, {mask}; setp.ne.u32 %p1, %r20, 0;\n\
                 mul.wide.u32 %rd10, %r0, {stride}; add.s64 %rd11, %rd1, %rd10; mul.wide.u32 %rd12, %r0, 4; add.s64 %rd13, %rd2, %rd12;\n\
                 mov.u32 %r5, 1000; @%p1 ld.global.u32 %r5, [%rd11]; st.global.u32 [%rd13], %r5; @!%p1 st.global.u32 [%rd11], %r0;"
            );
            let input: Vec<u32> = (0..160).map(|i| 0x100 + i).collect();
            let ran = run(&kernel(2, &body), "test", 32, &[words(&input), Arg::Out(128)]).silent();
            let mut memory = input.clone();
            for lane in 0..32usize {
                let on = mask >> lane & 1 == 1;
                assert_eq!(ran.words(1)[lane], if on { input[lane * stride / 4] } else { 1000 });
                if !on {
                    memory[lane * stride / 4] = lane as u32;
                }
            }
            assert_eq!(ran.words(0), memory, "mask {mask:x} stride {stride}");
        }
    }
}

#[test]
fn words_for_caches_and_order_change_nothing() {
    let loads = [
        "ld.global.ca.u32",
        "ld.global.cg.u32",
        "ld.global.cs.u32",
        "ld.global.lu.u32",
        "ld.global.cv.u32",
        "ld.volatile.global.u32",
        "ld.relaxed.gpu.global.u32",
        "ld.acquire.sys.global.u32",
        "ld.weak.global.u32",
        "ldu.global.u32",
        "ld.global.nc.L1::no_allocate.L2::128B.u32",
        "ld.global.L1::evict_last.u32",
        "ld.u32",
        "ld.global.nc.u32",
    ];
    for (n, text) in loads.into_iter().enumerate() {
        let store = [
            "st.global.wb.u32",
            "st.global.cs.u32",
            "st.release.gpu.global.u32",
            "st.volatile.global.u32",
            "st.global.wt.u32",
            "st.u32",
        ][n % 6];
        let body = format!(
            "prefetch.global.L2 [%rd1]; prefetchu.L1 [%rd1]; {text} %r1, [%rd1+4]; {store} [%rd2], %r1; discard.global.L2 [%rd1], 128;"
        );
        let ran = run(&kernel(2, &body), "test", 1, &[words(&[1, 2]), Arg::Out(4)]).silent();
        assert_eq!(ran.words(1), [2], "{text} {store}");
    }
    let body = "createpolicy.fractional.L2::evict_last.b64 %rd10, 1.0; ld.global.L2::cache_hint.v2.u32 {%r1, %r2}, [%rd1], %rd10; st.global.L2::cache_hint.u32 [%rd1], %r2, %rd10; createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %rd11, 0.5;";
    let ran = run(&kernel(1, body), "test", 1, &[words(&[1, 2])]).silent();
    assert_eq!(ran.words(0), [2, 2]);
}

#[test]
fn shared_memory_of_both_kinds() {
    // Static memory first, then the dynamic one; the same bytes through 32-bit, 64-bit and generic addresses.
    let ptx = with_variables(
        ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[20];",
        1,
        "mov.u32 %r1, dynamic; mov.u64 %rd5, dynamic; mov.u32 %r2, fixed;\n\
         shl.b32 %r3, %r0, 2; add.s32 %r4, %r1, %r3; st.shared.u32 [%r4], %r0; st.shared.u32 [fixed+16], 99; bar.sync 0;\n\
         xor.b32 %r5, %r3, 124; cvt.u64.u32 %rd6, %r5; add.s64 %rd7, %rd5, %rd6; ld.shared.u32 %r6, [%rd7]; ld.shared.u32 %r7, [%r2+16];\n\
         mov.u64 %rd8, 0x0001000000000000; add.s64 %rd9, %rd8, %rd7; ld.u32 %r8, [%rd9]; ld.shared.u32 %r9, [%rd9];\n\
         add.s32 %r10, %r6, %r8; add.s32 %r10, %r10, %r9; add.s32 %r10, %r10, %r7; mul.wide.u32 %rd20, %r0, 4; add.s64 %rd21, %rd1, %rd20; st.global.u32 [%rd21], %r10;",
    );
    let ran = run_with(&ptx, "test", [1; 3], [32, 1, 1], 128, &[Arg::Out(128)], config(&[])).silent();
    assert_eq!(ran.words(0), (0..32).map(|lane| 99 + 3 * (31 - lane)).collect::<Vec<u32>>());
}

#[test]
fn every_thread_has_local_memory_of_its_own() {
    let body = ".local .align 16 .b8 frame[64]; mov.u64 %rd5, frame; and.b32 %r1, %r0, 3; mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd5, %rd6;\n\
        st.local.v4.u32 [%rd7], {%r0, %r1, %r0, 5}; ld.local.u32 %r2, [%rd7+8]; st.local.u8 [frame+15], %r0; ld.u32 %r3, [%rd7]; ld.local.s8 %r4, [frame+15];\n\
        mul.wide.u32 %rd8, %r0, 12; add.s64 %rd9, %rd1, %rd8; st.global.u32 [%rd9], %r2; st.global.u32 [%rd9+4], %r3; st.global.u32 [%rd9+8], %r4;";
    let ran = run(&kernel(1, body), "test", 70, &[Arg::Out(70 * 12)]).silent();
    assert_eq!(ran.words(0), (0..70).flat_map(|t| [t; 3]).collect::<Vec<u32>>());
}

#[test]
fn constants_and_module_variables() {
    let variables = ".const .align 4 .u32 table[4] = {10, 20, 30, 40};\n.global .align 8 .u64 where_table = generic(table);\n.global .align 4 .f32 scale = 0f40000000;\n.global .align 4 .u32 zeros[3];";
    let body = "mov.u64 %rd5, table; mul.wide.u32 %rd6, %r0, 4; add.s64 %rd7, %rd5, %rd6; ld.const.u32 %r1, [%rd7]; ld.const.u32 %r2, [table+12]; ld.global.u64 %rd8, [where_table];\n\
        add.s64 %rd9, %rd8, %rd6; ld.u32 %r3, [%rd9]; ld.global.u32 %r4, [scale]; ld.global.u32 %r5, [zeros+8]; st.global.u32 [zeros], %r1;\n\
        mul.wide.u32 %rd10, %r0, 16; add.s64 %rd11, %rd1, %rd10; st.global.v4.u32 [%rd11], {%r1, %r2, %r3, %r4}; st.global.u32 [%rd11+64], %r5;";
    let ran = run(&with_variables(variables, 1, body), "test", 4, &[Arg::Out(128)]).silent();
    for t in 0..4 {
        assert_eq!(
            ran.words(0)[t * 4..t * 4 + 4],
            [10 + 10 * t as u32, 40, 10 + 10 * t as u32, 2.0f32.to_bits()]
        );
        assert_eq!(ran.words(0)[16 + t * 4], 0);
    }
}

#[test]
fn parameters_by_name_and_by_address() {
    let ptx = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry test(.param .u64 out, .param .align 8 .b8 args[24], .param .u32 n)\n{\n.reg .b16 %h<4>; .reg .b32 %r<16>; .reg .b64 %rd<16>;\n\
        ld.param.u64 %rd1, [out]; ld.param.v2.u8 {%h1, %h2}, [args+2]; ld.param.s16 %r1, [args+4]; mov.b64 %rd2, args; mov.u32 %r0, %tid.x; mul.wide.u32 %rd3, %r0, 8; add.s64 %rd4, %rd2, %rd3;\n\
        ld.param.u64 %rd5, [%rd4]; ld.param.u32 %r2, [n]; st.global.u16 [%rd1], %h1; st.global.u16 [%rd1+2], %h2; st.global.u32 [%rd1+4], %r1; st.global.u32 [%rd1+8], %r2; add.s64 %rd6, %rd1, %rd3; st.global.u64 [%rd6+16], %rd5;\nret;\n}";
    let (mut device, module) = load(ptx, config(&[]));
    let out = device.allocate(40).unwrap();
    let kernel = module.kernels["test"].clone();
    let args = pattern(24);
    let mut params = out.to_le_bytes().to_vec();
    params.extend(&args);
    params.extend(0xdead_beef_u32.to_le_bytes());
    let shape = Shape {
        grid: [1; 3],
        block: [3, 1, 1],
        dynamic_shared: 0,
        max_dynamic_shared: None,
        cooperative: false,
        stream: 0,
    };
    device.launch(&kernel, &shape, &params).unwrap();
    let mut got = [0; 40];
    // Bytes 12 to 15 nobody wrote.
    device.read(out, &mut got[..12]).unwrap();
    device.read(out + 16, &mut got[16..]).unwrap();
    assert_eq!(device.reports.all(), []);
    let mut expected = vec![args[2], 0, args[3], 0, args[4], args[5]];
    expected.extend([if args[5] >= 128 { 0xff } else { 0 }; 2]);
    expected.extend(0xdead_beef_u32.to_le_bytes());
    expected.extend([0; 4]);
    expected.extend(&args);
    assert_eq!(got, *expected);
}

#[test]
fn generic_addresses_of_one_instruction_may_be_in_four_places() {
    let body = ".shared .align 4 .b8 s[128]; .local .align 4 .b8 l[4]; mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; mul.lo.u32 %r4, %r0, 3; st.shared.u32 [%r3], %r4; st.local.u32 [l], %r0; bar.sync 0;\n\
        and.b32 %r5, %r0, 3; cvt.u64.u32 %rd5, %r3; mov.u64 %rd6, 0x0001000000000000; add.s64 %rd5, %rd5, %rd6; mov.u64 %rd7, l; mov.b64 %rd8, p1; cvt.u64.u32 %rd10, %r2; add.s64 %rd9, %rd1, %rd10;\n\
        setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r5, 1; setp.eq.u32 %p3, %r5, 2; selp.b64 %rd11, %rd5, %rd9, %p1; selp.b64 %rd11, %rd7, %rd11, %p2; selp.b64 %rd11, %rd8, %rd11, %p3;\n\
        ld.u32 %r6, [%rd11]; add.s64 %rd12, %rd2, %rd10; st.global.u32 [%rd12], %r6; bar.sync 0; @!%p3 st.u32 [%rd11], 77; bar.sync 0; ld.shared.u32 %r7, [%r3]; ld.local.u32 %r8, [l]; st.global.u32 [%rd12+128], %r7; st.global.u32 [%rd12+256], %r8;";
    let input: Vec<u32> = (0..32).map(|i| 500 + i).collect();
    let ran = run(&kernel(2, body), "test", 32, &[words(&input), Arg::Out(384)]).silent();
    for t in 0..32usize {
        let v = t as u32;
        let at = |n: usize| ran.words(1)[n * 32 + t];
        assert_eq!(at(0), [v * 3, v, ran.addresses[1] as u32, 500 + v][t % 4]);
        assert_eq!(at(1), if t % 4 == 0 { 77 } else { v * 3 });
        assert_eq!(at(2), if t % 4 == 1 { 77 } else { v });
        assert_eq!(ran.words(0)[t], if t % 4 == 3 { 77 } else { 500 + v });
    }
}

#[test]
fn isspacep_tells_the_windows_apart() {
    let variables = ".const .align 4 .u32 c = 1;\n.shared .align 4 .b8 s[8];";
    let body = ".local .align 4 .b8 l[4]; mov.u64 %rd5, 0x0001000000000004; mov.u64 %rd6, l; mov.u64 %rd7, c; mov.u64 %rd8, p0; st.shared.u32 [s], 0;\n";
    let mut text = body.to_owned();
    let spaces = ["global", "shared", "local", "const", "param"];
    for (i, space) in spaces.into_iter().enumerate() {
        for (j, register) in ["%rd1", "%rd5", "%rd6", "%rd7", "%rd8"].into_iter().enumerate() {
            text += &format!(
                "isspacep.{space} %p1, {register}; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%rd1+{}], %r1;\n",
                4 * (5 * i + j)
            );
        }
    }
    let ran = run(&with_variables(variables, 1, &text), "test", 1, &[Arg::Out(100)]).silent();
    let expected: Vec<u32> = (0..25).map(|n| u32::from(n / 5 == [0, 1, 2, 3, 4][n % 5])).collect();
    assert_eq!(ran.words(0), expected);
}

#[test]
fn one_past_the_end_of_a_buffer() {
    let cases = [
        ("ld.global.u32 %r1, [%rd6];", "read", 4, "is 0 bytes past the end of allocation #1 (size 128)"),
        ("st.global.u16 [%rd6+18], %h1;", "write", 2, "is 18 bytes past the end of allocation #1 (size 128)"),
        (
            "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd6-4];",
            "read",
            16,
            "past the end of allocation #1 (size 128)",
        ),
        ("ld.f32 %f1, [%rd6];", "read", 4, "is 0 bytes past the end of allocation #1 (size 128)"),
    ];
    for (text, what, size, detail) in cases {
        // Thread 32 of 40 is the first outside, lane 0 of warp 1; with the vector everything is aligned and the 30th thread is.
        let scale = if size == 16 { 16 } else { 4 };
        let first = if size == 16 {
            8
        } else if size == 2 {
            28
        } else {
            32
        };
        let offset = if size == 16 { 4 } else { 0 };
        let body = format!(
            "mov.u16 %h1, 3; mul.wide.u32 %rd5, %r0, {scale}; add.s64 %rd6, %rd1, %rd5; add.s64 %rd6, %rd6, {offset};\n{text}"
        );
        let ptx = kernel(1, &body);
        let ran = run(&ptx, "test", 40, &[words(&[7; 32])]);
        let report = reported(&ran, &ptx, &format!("Invalid __global__ {what} of size {size} bytes\n"), text);
        assert!(report.contains(&format!("by thread ({first},0,0) in block (0,0,0)")), "{report}");
        assert!(size == 2 || report.contains(detail), "{report}");
        assert!(report.contains("launch #1: grid (1,1,1) block (40,1,1)"), "{report}");
        assert_eq!(ran.device.fault, Some(Fault::IllegalAddress));
        if what == "write" {
            // The warp that failed wrote nothing, not even its lanes inside.
            assert_eq!(ran.words(0), [7; 32]);
        }
        // The corrected twin stays inside.
        let twin = body.replace(text, &format!("setp.lt.u32 %p1, %r0, {first};\n@%p1 {text}"));
        run(&kernel(1, &twin), "test", 40, &[words(&[7; 32])]).silent();
    }
}

#[test]
fn pointers_that_point_nowhere() {
    let text = "ld.global.u32 %r1, [%rd5];";
    for (value, detail) in [
        ("0", "address 0x0 is the null pointer"),
        ("8", "address 0x8 is "),
        ("0x123456789abcdef0", "address 0x123456789abcdef0 is "),
        ("-4", "address 0xfffffffffffffffc is "),
        ("0x7effffffff00", "is 256 bytes before allocation #1"),
        ("0x0001000000000000", "address 0x1000000000000 is "),
    ] {
        let ptx = kernel(1, &format!("mov.u64 %rd5, {value};\n{text}"));
        let ran = run(&ptx, "test", 1, &[words(&[0])]);
        let report = reported(&ran, &ptx, "Invalid __global__ read of size 4 bytes", text);
        assert!(report.contains(detail), "{report}");
    }
    // An access that wraps around the end of the address space.
    let ptx = kernel(1, "mov.u64 %rd5, -8;\nld.global.v2.u64 {%rd6, %rd7}, [%rd5+8];");
    let ran = run(&ptx, "test", 1, &[words(&[0])]);
    reported(&ran, &ptx, "Invalid __global__ read of size 16 bytes", "ld.global.v2");
}

#[test]
fn a_freed_buffer_is_named() {
    let text = "st.global.u32 [%rd1+4], %r0;";
    let ptx = kernel(1, text);
    let (mut device, module) = load(&ptx, config(&[]));
    let kernel = module.kernels["test"].clone();
    let address = device.allocate(64).unwrap();
    let shape = Shape {
        grid: [1; 3],
        block: [1; 3],
        dynamic_shared: 0,
        max_dynamic_shared: None,
        cooperative: false,
        stream: 0,
    };
    device.launch(&kernel, &shape, &address.to_le_bytes()).unwrap();
    assert!(device.reports.all().is_empty() && device.fault.is_none());
    device.memory.free(address).unwrap();
    // A new buffer does not come to lie where the old one was.
    let other = device.allocate(64).unwrap();
    assert_ne!(address, other);
    device.launch(&kernel, &shape, &address.to_le_bytes()).unwrap();
    let report = &device.reports.all()[0];
    assert!(
        report.text.contains("is 4 bytes into allocation #1 (size 64), which was freed"),
        "{}",
        report.text
    );
    assert_eq!(report.line, line_of(&ptx, text));
    assert_eq!(device.fault, Some(Fault::IllegalAddress));
}

#[test]
fn past_the_end_of_each_other_space() {
    let cases = [
        (
            ".shared .align 4 .b8 s[24];",
            "ld.shared.u32 %r1, [s+24];",
            "Invalid __shared__ read of size 4",
            "offset 24 is 0 bytes past the end of the block's 24 bytes of shared memory",
        ),
        (
            ".shared .align 16 .b8 s[32];",
            "st.shared.v4.u32 [s+32], {%r0, %r0, %r0, %r0};",
            "Invalid __shared__ write of size 16",
            "offset 32 is 0 bytes past the end of the block's 32 bytes of shared memory",
        ),
        (
            ".shared .align 4 .b8 s[12]; mov.u32 %r5, -4;",
            "ld.shared.u32 %r1, [%r5];",
            "Invalid __shared__ read of size 4",
            "offset 4294967292 is 4294967280 bytes past the end",
        ),
        (
            ".shared .align 4 .b8 s[12]; mov.u64 %rd5, 0x0001000000000010;",
            "ld.u32 %r1, [%rd5];",
            "Invalid __shared__ read of size 4",
            "offset 16 is 4 bytes past the end of the block's 12 bytes",
        ),
        (
            ".local .align 4 .b8 l[16]; mov.u64 %rd5, l;",
            "st.local.u32 [%rd5+16], 1;",
            "Invalid __local__ write of size 4",
            "offset 16 is 0 bytes past the end of the thread's 16 bytes of local memory",
        ),
        (
            ".local .align 4 .b8 l[16]; mov.u64 %rd5, l;",
            "ld.u64 %rd6, [%rd5+16];",
            "Invalid __local__ read of size 8",
            "offset 16 is 0 bytes past the end of the thread's 16 bytes of local memory",
        ),
        (
            "",
            "ld.param.u32 %r1, [p0+8];",
            "Invalid __param__ read of size 4",
            "offset 8 is 0 bytes past the end of the kernel's 8 bytes of parameters",
        ),
        (
            "mov.b64 %rd5, p0;",
            "ld.param.u64 %rd6, [%rd5+24];",
            "Invalid __param__ read of size 8",
            "offset 24 is 16 bytes past the end of the kernel's 8 bytes of parameters",
        ),
        (
            "mov.b64 %rd5, p0;",
            "st.u32 [%rd5], 1;",
            "Invalid __param__ write of size 4",
            "the kernel's 8 bytes of parameters are read-only",
        ),
    ];
    for (setup, text, title, detail) in cases {
        let ptx = kernel(1, &format!("{setup}\n{text}"));
        let ran = run(&ptx, "test", 2, &[words(&[0])]);
        let report = reported(&ran, &ptx, title, text);
        assert!(report.contains(detail) && report.contains("by thread (0,0,0)"), "{report}");
        assert_eq!(ran.device.fault, Some(Fault::IllegalAddress));
    }
    // Dynamic memory counts where there is some.
    let variables = ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[20];";
    for (offset, inside) in [(92, true), (96, false)] {
        let text = format!("st.shared.u32 [dynamic+{offset}], 1;");
        let ptx = with_variables(variables, 1, &format!("st.shared.u32 [fixed], 1;\n{text}"));
        let ran = run_with(&ptx, "test", [1; 3], [1; 3], 96, &[words(&[0])], config(&[]));
        if inside {
            ran.silent();
        } else {
            let report = reported(&ran, &ptx, "Invalid __shared__ write of size 4", &text);
            assert!(
                report.contains("offset 128 is 0 bytes past the end of the block's 128 bytes"),
                "{report}"
            );
        }
    }
}

#[test]
fn constants_cannot_be_written() {
    let variables = ".const .align 4 .u32 table[4] = {1, 2, 3, 4};\n.global .align 4 .u32 plain[4];";
    for text in ["st.global.u32 [%rd5], 9;", "st.u32 [%rd5+4], 9;", "red.global.add.u32 [%rd5], 1;"] {
        let ptx =
            with_variables(variables, 1, &format!("mov.u64 %rd5, table; st.global.u32 [plain], 1;\n{text}"));
        let ran = run(&ptx, "test", 1, &[words(&[0])]);
        let what = if text.starts_with("red") { "atomic" } else { "write" };
        let report = reported(&ran, &ptx, &format!("Invalid __constant__ {what} of size 4 bytes"), text);
        assert!(report.contains("constant #1 (size 16, \"table\")"), "{report}");
    }
    let text = "ld.const.u32 %r1, [%rd1];";
    let ptx = with_variables(variables, 1, text);
    let ran = run(&ptx, "test", 1, &[words(&[0])]);
    reported(&ran, &ptx, "Invalid __constant__ read of size 4 bytes", text);
}

#[test]
fn addresses_that_are_not_aligned() {
    let cases = [
        ("ld.global.u32 %r1, [%rd1+2];", "Misaligned __global__ read of size 4 bytes"),
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+8];", "Misaligned __global__ read of size 16 bytes"),
        ("st.global.u16 [%rd1+1], %h1;", "Misaligned __global__ write of size 2 bytes"),
        ("ld.shared.u64 %rd5, [s+4];", "Misaligned __shared__ read of size 8 bytes"),
        ("st.local.v2.u32 [l+4], {%r0, %r0};", "Misaligned __local__ write of size 8 bytes"),
        ("ld.param.u32 %r1, [p0+2];", "Misaligned __param__ read of size 4 bytes"),
    ];
    for (text, title) in cases {
        let body = format!(".shared .align 8 .b8 s[16]; .local .align 8 .b8 l[16]; mov.u16 %h1, 1;\n{text}");
        let ptx = kernel(1, &body);
        let ran = run(&ptx, "test", 3, &[words(&[0; 8])]);
        reported(&ran, &ptx, title, text);
        assert_eq!(ran.device.fault, Some(Fault::Misaligned));
        // As a warning the access goes on.
        let ran = run_with(
            &ptx,
            "test",
            [1; 3],
            [3, 1, 1],
            0,
            &[words(&[0; 8])],
            config(&[("EMU_CHECKS", "align=warn")]),
        );
        reported(&ran, &ptx, title, text);
        assert_eq!(ran.device.fault, None);
        let ran = run_with(
            &ptx,
            "test",
            [1; 3],
            [3, 1, 1],
            0,
            &[words(&[0; 8])],
            config(&[("EMU_CHECKS", "align=off")]),
        );
        ran.silent();
    }
    let body = "mul.wide.u32 %rd5, %r0, 6; add.s64 %rd6, %rd1, %rd5;\nld.global.u32 %r1, [%rd6];";
    let ran = run(&kernel(1, body), "test", 4, &[words(&[0; 8])]);
    assert!(ran.device.reports.all()[0].text.contains("by thread (1,0,0) in block (0,0,0), lanes 0000000a"));
}

#[test]
fn undefined_bytes_are_carried_and_not_reported() {
    // A padded row is copied through a register, shared and local memory, and ends as undefined as it began.
    let body = ".shared .align 16 .b8 s[16]; .local .align 16 .b8 l[16]; st.global.u16 [%rd1+2], 7; st.global.u8 [%rd1+9], 1;\n\
        ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1]; st.shared.v4.u32 [s], {%r1, %r2, %r3, %r4}; ld.shared.v2.u64 {%rd5, %rd6}, [s]; st.local.v2.u64 [l], {%rd5, %rd6}; ld.local.v2.u32 {%r5, %r6}, [l]; ld.local.u64 %rd7, [l+8];\n\
        st.global.v2.u32 [%rd2], {%r5, %r6}; st.global.u64 [%rd2+8], %rd7; ld.global.u16 %r7, [%rd1+2]; st.global.u32 [%rd2+16], %r7; ld.global.u16 %r8, [%rd1]; st.global.u32 [%rd2+20], %r8; ld.global.s16 %r9, [%rd1]; st.global.u32 [%rd2+24], %r9;";
    let ran = run(&kernel(2, body), "test", 1, &[Arg::Out(16), Arg::Out(28)]).silent();
    let index = ran.device.memory.find(ran.addresses[1], 28).unwrap();
    let shadow = &ran.device.memory.get(index).shadow;
    // Registers know halves (or words, where they have 64 bits): the first word became wholly undefined on its way through a 64-bit one.
    assert_eq!(shadow[..16], [1; 16]);
    assert_eq!(shadow[16..28], [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]);
    let body = "st.global.u16 [%rd1+2], 7; ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd2], %r1; ld.global.u64 %rd5, [%rd1+8]; st.global.u64 [%rd2+8], %rd5;";
    let mut ran = run(&kernel(2, body), "test", 1, &[Arg::Out(16), Arg::Out(16)]).silent();
    let index = ran.device.memory.find(ran.addresses[1], 16).unwrap();
    assert_eq!(ran.device.memory.get(index).shadow[..4], [1, 1, 0, 0]);
    assert_eq!(ran.device.memory.get(index).shadow[8..], [1; 8]);
    // The host may have the defined bytes and is told of the others.
    let mut bytes = [0; 4];
    ran.device.read(ran.addresses[1] + 2, &mut bytes[..2]).unwrap();
    assert_eq!((bytes, ran.device.reports.all().len()), ([7, 0, 0, 0], 0));
    ran.device.read(ran.addresses[1], &mut bytes).unwrap();
    assert!(ran.device.reports.all()[0].text.contains("Undefined bytes copied to the host: 2 of 4"));
}

#[test]
fn a_defined_store_defines() {
    let body = "st.global.v4.u32 [%rd1], {%r0, %r0, %r0, %r0}; ld.global.u32 %r1, [%rd1+12]; setp.eq.u32 %p1, %r1, 0;\n@%p1 bra done;\ndone:";
    run(&kernel(1, body), "test", 1, &[Arg::Out(16)]).silent();
    let ptx = kernel(
        1,
        &body.replace("st.global.v4.u32 [%rd1], {%r0, %r0, %r0, %r0}", "st.global.v2.u32 [%rd1], {%r0, %r0}"),
    );
    let ran = run(&ptx, "test", 1, &[Arg::Out(16)]);
    reported(&ran, &ptx, "Undefined value used as", "@%p1 bra");
    // Undefined values that are stored undo an earlier definition.
    let ptx =
        kernel(1, &body.replace("ld.global.u32 %r1", "st.global.u32 [%rd1+12], %r200; ld.global.u32 %r1"));
    let ran = run(&ptx, "test", 1, &[words(&[0; 4])]);
    reported(&ran, &ptx, "Undefined value used as", "@%p1 bra");
}

#[test]
fn undefined_addresses_and_guards_are_reported() {
    for (text, what) in [
        ("ld.global.u32 %r1, [%rd50];", "Undefined value used as address"),
        ("st.shared.u32 [%r50], 1;", "Undefined value used as address"),
        ("st.local.u32 [%rd50], 1;", "Undefined value used as address"),
        ("ld.u32 %r1, [%rd50];", "Undefined value used as address"),
        ("@%p5 st.global.u32 [%rd1], 1;", "Undefined value used as guard predicate"),
        ("@!%p5 st.shared.u32 [s], 1;", "Undefined value used as guard predicate"),
    ] {
        let ptx = kernel(1, &format!(".shared .align 4 .b8 s[16]; .local .align 4 .b8 l[16];\n{text}"));
        let ran = run(&ptx, "test", 4, &[words(&[0])]);
        let report = reported(&ran, &ptx, what, text);
        assert!(report.contains("by thread (0,0,0)") && report.contains("lanes 0000000f"), "{report}");
        assert_eq!(ran.device.fault, Some(Fault::LaunchFailed));
    }
    // One lane among many: the index it read was never written.
    let body = "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd1, %rd5; ld.global.u32 %r1, [%rd6]; and.b32 %r1, %r1, 3; mul.wide.u32 %rd7, %r1, 4; add.s64 %rd8, %rd2, %rd7;\nld.global.u32 %r2, [%rd8];";
    let ptx = kernel(
        2,
        &format!(
            "setp.ne.u32 %p1, %r0, 5; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd1, %rd5; @%p1 st.global.u32 [%rd6], 1;\n{body}"
        ),
    );
    let ran = run(&ptx, "test", 8, &[Arg::Out(32), words(&[0; 4])]);
    let report = reported(&ran, &ptx, "Undefined value used as address", "ld.global.u32 %r2");
    assert!(report.contains("by thread (5,0,0)") && report.contains("lanes 00000020"), "{report}");
    // A load with an undefined guard gives an undefined value, which is fine until it decides something.
    let body = "mov.u32 %r1, 0; @!%p5 ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd1+4], %r1;";
    let ran = run(&kernel(1, body), "test", 1, &[words(&[1, 2])]).silent();
    let index = ran.device.memory.find(ran.addresses[0], 8).unwrap();
    assert_eq!(ran.device.memory.get(index).shadow, [0, 0, 0, 0, 1, 1, 1, 1]);
}

#[test]
fn the_launch_knows_what_it_touched() {
    let body = "ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd2], %r1; red.global.add.u32 [%rd3], 1; .shared .align 16 .b8 s[16]; cp.async.ca.shared.global [s], [%rd4], 4; cp.async.wait_all;";
    let arguments = [words(&[1]), words(&[2]), words(&[3]), words(&[4]), words(&[5])];
    let ran = run(&kernel(5, body), "test", 1, &arguments).silent();
    assert_eq!(
        ran.launch.unwrap().touched,
        [(0, true, false), (1, false, true), (2, true, true), (3, true, false)]
    );
}

#[test]
fn lanes_of_one_instruction_may_use_several_buffers() {
    // Lanes alternate between three buffers; then one lane in a fourth place is outside and nothing happens.
    let body = "rem.u32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 1; selp.b64 %rd10, %rd1, %rd2, %p1; selp.b64 %rd10, %rd3, %rd10, %p2; mul.wide.u32 %rd11, %r0, 4; add.s64 %rd12, %rd10, %rd11;\nst.global.u32 [%rd12], %r0; ld.global.u32 %r2, [%rd12]; add.s64 %rd13, %rd4, %rd11; st.global.u32 [%rd13], %r2;";
    let full = |n: usize| words(&vec![100; n]);
    let ran = run(&kernel(4, body), "test", 32, &[full(32), full(32), full(32), Arg::Out(128)]).silent();
    for t in 0..32u32 {
        for (buffer, residue) in [(0, 0), (1, 2), (2, 1)] {
            assert_eq!(ran.words(buffer)[t as usize], if t % 3 == residue { t } else { 100 });
        }
        assert_eq!(ran.words(3)[t as usize], t);
    }
    let ptx = kernel(4, body);
    let ran = run(&ptx, "test", 32, &[full(32), full(20), full(32), Arg::Out(128)]);
    let report = reported(&ran, &ptx, "Invalid __global__ write of size 4 bytes", "st.global.u32 [%rd12]");
    assert!(report.contains("by thread (20,0,0)"), "{report}");
    assert_eq!((ran.words(0), ran.words(1)), (vec![100; 32], vec![100; 20]));
}

#[test]
fn addresses_of_32_bits_wrap() {
    let body = ".shared .align 4 .b8 s[64]; mov.u32 %r1, 0xfffffff0; st.shared.u32 [%r1+20], 5; ld.shared.u32 %r2, [s+4]; st.global.u32 [%rd1], %r2;";
    assert_eq!(run(&kernel(1, body), "test", 1, &[Arg::Out(4)]).silent().words(0), [5]);
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "ld.global.b128 %rd5, [%rd1];",
        "ld.global.u64 %r1, [%rd1];",
        "ld.global.v3.u32 {%r1, %r2, %r3}, [%rd1];",
        "ld.global.v2.u32 {%r1, %r2, %r3}, [%rd1];",
        "ld.global.u32.fast %r1, [%rd1];",
        "ld.global.pred %p1, [%rd1];",
        "st.global.u32 [%rd1], %p1;",
        "ld.global.u32 %r1, %rd1;",
        "ld.shared.u32 %r1, [p0];",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r1], %r2, [%r3];",
        "ld.global.v8.u64 {%rd2, %rd3, %rd4, %rd5, %rd6, %rd7, %rd8, %rd9}, [%rd1];",
        "isspacep.texture %p1, %rd1;",
    ] {
        let mut device = Device::new(config(&[]));
        let ptx = kernel(1, text);
        let error = device.load(&ptx).unwrap_err();
        assert_eq!(error.line, line_of(&ptx, text), "{text}: {}", error.message);
    }
}
