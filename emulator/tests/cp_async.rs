//! Asynchronous copies: what arrives, when it may be used, and what is said of copies that nobody waits for.

mod common;

use common::{Arg, Ran, kernel, line_of, run, run_with, words};

fn numbers(n: u32) -> Vec<u32> {
    (0..n).map(|i| 0x1000_0000 + i * 0x0101).collect()
}

/// `%rd10` = 16-byte element of `p0` of this thread, `%r10` its element of `s`, `%rd11` its element of `p1`.
const SETUP: &str = ".shared .align 16 .b8 s[2048];\nmov.u32 %r9, s;\nshl.b32 %r8, %r0, 4;\nadd.s32 %r10, %r9, %r8;\nmul.wide.u32 %rd9, %r0, 16;\nadd.s64 %rd10, %rd1, %rd9;\nadd.s64 %rd11, %rd2, %rd9;\n";
const OUT: &str =
    "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r10];\nst.global.v4.u32 [%rd11], {%r1, %r2, %r3, %r4};\n";

fn copied(body: &str, threads: u32) -> (String, Ran) {
    let ptx = kernel(2, &format!("{SETUP}{body}"));
    let ran = run(&ptx, "test", threads, &[words(&numbers(threads * 4)), Arg::Out(threads as usize * 16)]);
    (ptx, ran)
}

#[test]
fn sixteen_bytes_of_each_thread_arrive() {
    for copy in [
        "cp.async.cg.shared.global [%r10], [%rd10], 16;",
        "cp.async.ca.shared.global [%r10], [%rd10], 16;",
        "cp.async.cg.shared.global.L2::128B [%r10], [%rd10], 16, 16;",
        "cp.async.cg.shared::cta.global.L2::cache_hint.L2::256B [%r10+0], [%rd10+0], 16, %rd9;",
        "cp.async.ca.shared.global [%r10], [%rd10], 8; cp.async.ca.shared.global [%r10+8], [%rd10+8], 4; cp.async.ca.shared.global [%r10+12], [%rd10+12], 4;",
    ] {
        for wait in ["cp.async.wait_all;", "cp.async.commit_group; cp.async.wait_group 0;"] {
            let (_, ran) = copied(&format!("{copy}{wait}{OUT}"), 48);
            let ran = ran.silent();
            assert_eq!(ran.words(1), numbers(48 * 4), "{copy}");
        }
    }
}

#[test]
fn what_the_source_lacks_becomes_zero() {
    // Source size 0, 4, 8 or 16 by thread; with 0 the address is wild.
    let body = format!(
        "and.b32 %r5, %r0, 3; mov.u32 %r6, 1; shl.b32 %r6, %r6, %r5; shl.b32 %r6, %r6, 1; setp.eq.u32 %p1, %r5, 0; selp.b32 %r6, 0, %r6, %p1; selp.b64 %rd10, 0x123456789abcdef1, %rd10, %p1;\n\
         cp.async.cg.shared.global [%r10], [%rd10], 16, %r6; cp.async.wait_all; {OUT}"
    );
    let (_, ran) = copied(&body, 32);
    let ran = ran.silent();
    let expected: Vec<u32> = numbers(128)
        .iter()
        .enumerate()
        .map(|(i, &v)| {
            let bytes = [0, 4, 8, 16][i / 4 % 4];
            if i % 4 * 4 < bytes { v } else { 0 }
        })
        .collect();
    assert_eq!(ran.words(1), expected);
    // The predicate that says to ignore the source, straight and negated.
    for (operand, ignored) in [("%p1", 0), ("!%p1", 1)] {
        let body = format!(
            "and.b32 %r5, %r0, 1; setp.eq.u32 %p1, %r5, 0; cp.async.ca.shared.global [%r10], [%rd10], 16, {operand}; cp.async.wait_all; {OUT}"
        );
        let (_, ran) = copied(&body, 32);
        let expected: Vec<u32> =
            numbers(128).iter().enumerate().map(|(i, &v)| if i / 4 % 2 == ignored { 0 } else { v }).collect();
        assert_eq!(ran.silent().words(1), expected);
    }
}

#[test]
fn lanes_without_the_guard_copy_nothing() {
    let body = format!(
        "st.shared.v4.u32 [%r10], {{%r0, %r0, %r0, %r0}}; setp.gt.u32 %p1, %r0, 20; @%p1 cp.async.cg.shared.global [%r10], [%rd10], 16; cp.async.wait_all; {OUT}"
    );
    let (_, ran) = copied(&body, 32);
    let expected: Vec<u32> =
        numbers(128).iter().enumerate().map(|(i, &v)| if i / 4 > 20 { v } else { i as u32 / 4 }).collect();
    assert_eq!(ran.silent().words(1), expected);
}

#[test]
fn the_source_is_read_at_the_issue() {
    let body = format!(
        "cp.async.cg.shared.global [%r10], [%rd10], 16; st.global.u32 [%rd10], 5; cp.async.wait_all; {OUT}"
    );
    let (_, ran) = copied(&body, 32);
    assert_eq!(ran.silent().words(1), numbers(128));
}

#[test]
fn groups_complete_in_order() {
    // Three groups of one copy each, an empty one between; waiting with one left makes two of the full ones usable.
    let stage = |n: u32| {
        format!("cp.async.cg.shared.global [%r10+{}], [%rd10], 16; cp.async.commit_group; ", n * 512)
    };
    let read = |n: u32| OUT.replace("[%r10]", &format!("[%r10+{}]", n * 512));
    let three = format!("{}{}cp.async.commit_group; {}", stage(0), stage(1), stage(2));
    for (pending, usable) in [(0, 3), (1, 2), (2, 2), (3, 1), (4, 0), (9, 0)] {
        for n in 0..3 {
            let body = format!("{three} cp.async.wait_group {pending}; {} cp.async.wait_group 0;", read(n));
            let (ptx, ran) = copied(&body, 32);
            if n < usable {
                assert_eq!(ran.silent().words(1), numbers(128), "wait_group {pending}, stage {n}");
            } else {
                let ran =
                    ran.found("Race: shared memory is accessed while an asynchronous copy to it is pending");
                let report = &ran.device.reports.all()[0];
                assert_eq!(report.line, line_of(&ptx, "ld.shared.v4"));
                let place = format!("(s+{})", n * 512);
                assert!(
                    report.text.contains(&place) && report.text.contains("thread (0,0,0)"),
                    "{}",
                    report.text
                );
                assert!(report.text.contains("cp.async.cg.shared.global"), "{}", report.text);
            }
        }
    }
}

#[test]
fn lanes_keep_groups_of_their_own() {
    // The upper half commits twice, so a wait with one left completes its first group and none of the others'.
    let copy = "setp.ge.u32 %p1, %r0, 16; cp.async.cg.shared.global [%r10], [%rd10], 16; cp.async.commit_group; @%p1 cp.async.commit_group; cp.async.wait_group 1;";
    let (_, ran) = copied(&format!("{copy} @%p1 st.shared.u32 [%r10], %r0; cp.async.wait_all; {OUT}"), 32);
    let expected: Vec<u32> = numbers(128)
        .iter()
        .enumerate()
        .map(|(i, &v)| if i >= 64 && i % 4 == 0 { i as u32 / 4 } else { v })
        .collect();
    assert_eq!(ran.silent().words(1), expected);
    let (_, ran) = copied(&format!("{copy} st.shared.u32 [%r10], %r0; cp.async.wait_all;"), 32);
    let ran = ran.found("Race");
    assert!(ran.device.reports.all()[0].text.contains("lanes 0000ffff"));
}

#[test]
fn using_a_copy_without_waiting_is_a_race() {
    let copy = "cp.async.cg.shared.global [%r10], [%rd10], 16;";
    for (use_it, text) in [
        (OUT, "ld.shared.v4"),
        ("st.shared.u32 [%r10+12], 1;", "st.shared"),
        ("atom.shared.exch.b32 %r5, [%r10], 1;", "atom.shared"),
        ("cp.async.ca.shared.global [%r10+8], [%rd10], 4;", "cp.async.ca"),
    ] {
        for commit in ["", "cp.async.commit_group;"] {
            let (ptx, ran) = copied(&format!("{copy}{commit}\n{use_it}\ncp.async.wait_all;"), 32);
            let ran = ran.found("Race: shared memory is accessed while");
            assert_eq!(ran.device.reports.all()[0].line, line_of(&ptx, text), "{use_it}");
            assert!(ran.device.fault.is_some());
        }
    }
    // Another warp's copy, even where it has been waited for by its own thread only after the read.
    let body = format!(
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 {copy}\nbar.sync 0;\nxor.b32 %r5, %r8, 512; add.s32 %r5, %r9, %r5; ld.shared.u32 %r6, [%r5];\ncp.async.wait_all;"
    );
    let ptx = kernel(2, &format!("{SETUP}{body}"));
    let arguments = [words(&numbers(256)), Arg::Out(1024)];
    // The warp that reads comes first: the other one has not waited yet.
    let reverse = common::config(&[("EMU_ORDER", "reverse")]);
    let ran = run_with(&ptx, "test", [1; 3], [64, 1, 1], 0, &arguments, reverse);
    let ran = ran.found("Race: shared memory is accessed while");
    let report = &ran.device.reports.all()[0];
    assert_eq!(report.line, line_of(&ptx, "ld.shared.u32"));
    assert!(
        report.text.contains("thread (32,0,0)") && report.text.contains("warp 0 lane 0"),
        "{}",
        report.text
    );
    // The corrected twin: wait, then the barrier.
    let body = body
        .replace("bar.sync 0;", "cp.async.wait_all; bar.sync 0;")
        .replace("xor.b32 %r5, %r8, 512", "and.b32 %r5, %r8, 511");
    let (_, ran) = copied(&body, 64);
    ran.silent();
}

#[test]
fn copies_nobody_waits_for_are_mentioned() {
    for (body, what) in [
        ("cp.async.cg.shared.global [%r10], [%rd10], 16;", "32 of them not committed"),
        ("cp.async.cg.shared.global [%r10], [%rd10], 16; cp.async.commit_group;", "0 of them not committed"),
        (
            "cp.async.cg.shared.global [%r10], [%rd10], 16; cp.async.commit_group; cp.async.wait_group 1;",
            "0 of them not committed",
        ),
    ] {
        let (_, ran) = copied(body, 32);
        let ran = ran.found("Misuse: threads end without waiting for 32 asynchronous copies");
        assert!(ran.device.reports.all()[0].text.contains(what), "{}", ran.device.reports.all()[0].text);
        assert_eq!(ran.device.fault, None);
    }
    let (_, ran) = copied(
        "cp.async.commit_group; cp.async.cg.shared.global [%r10], [%rd10], 16; cp.async.wait_all;",
        32,
    );
    ran.silent();
}

#[test]
fn both_sides_are_checked_at_the_issue() {
    let first = |body: &str| {
        let (ptx, ran) = copied(body, 32);
        let report = ran.device.reports.all()[0].clone();
        assert_eq!(report.line, line_of(&ptx, "cp.async.c"), "{}", report.text);
        report.text
    };
    let text = first("cp.async.cg.shared.global [%r10], [%rd10+16], 16;");
    assert!(text.starts_with("========= Invalid __global__ read of size 16 bytes"), "{text}");
    assert!(
        text.contains("thread (31,0,0)") && text.contains("is 0 bytes past the end of allocation #1"),
        "{text}"
    );
    let text = first("cp.async.ca.shared.global [%r10], [%rd10+2], 4;");
    assert!(text.starts_with("========= Misaligned __global__ read of size 4 bytes"), "{text}");
    let text = first("cp.async.cg.shared.global [%r10+8], [%rd10], 16;");
    assert!(text.starts_with("========= Misaligned __shared__ write of size 16 bytes"), "{text}");
    let text = first("cp.async.cg.shared.global [%r10+1552], [%rd10], 16;");
    assert!(text.starts_with("========= Invalid __shared__ write of size 16 bytes"), "{text}");
    assert!(
        text.contains("thread (31,0,0)") && text.contains("offset 2048 is 0 bytes past the end"),
        "{text}"
    );
    let text = first("mov.u32 %r5, 17; cp.async.cg.shared.global [%r10], [%rd10], 16, %r5;");
    assert!(text.contains("its source size is 17"), "{text}");
    let text = first("cp.async.cg.shared.global [%r10], [%rd10], 16, %r5;");
    assert!(text.starts_with("========= Undefined value used as size of an asynchronous copy"), "{text}");
    let text = first("cp.async.cg.shared.global [%r50], [%rd10], 16;");
    assert!(text.starts_with("========= Undefined value used as address"), "{text}");
    // A part of the source may lie at the end of the buffer.
    let (_, ran) = copied(
        "setp.eq.u32 %p1, %r0, 31; selp.b32 %r5, 12, 16, %p1; cp.async.cg.shared.global [%r10], [%rd10], 16, %r5; cp.async.wait_all;",
        32,
    );
    ran.silent();
}

#[test]
fn undefined_source_bytes_travel() {
    // Half the source was never written: copying and waiting is fine, branching on it is not.
    let body = format!(
        "{SETUP}cp.async.cg.shared.global [%r10], [%rd10], 16; cp.async.wait_all; {OUT} setp.eq.u32 %p1, %r4, 0;\n@%p1 bra done;\ndone:"
    );
    let ptx = kernel(2, &body);
    let ran = run(&ptx, "test", 1, &[Arg::Out(16), Arg::Out(16)]).found("Undefined");
    assert_eq!(ran.device.reports.all()[0].line, line_of(&ptx, "@%p1 bra"));
    let ptx = kernel(2, &body.replace("@%p1 bra done;", ""));
    let ran = run(&ptx, "test", 1, &[Arg::Out(16), Arg::Out(16)]).silent();
    let index = ran.device.memory.find(ran.addresses[1], 16).unwrap();
    assert_eq!(ran.device.memory.get(index).shadow, [1; 16]);
}

#[test]
fn rounds_of_a_ring_of_stages() {
    // A pipeline of three stages over eight tiles, as GEMM kernels have it: wait, barrier, use the neighbour's part, refill.
    let body = format!(
        "{SETUP}mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u64 %rd20, %rd10; mov.u32 %r30, 0;\n\
         cp.async.cg.shared.global [%r10], [%rd20], 16; cp.async.commit_group; add.s64 %rd20, %rd20, 1024;\n\
         cp.async.cg.shared.global [%r10+1024], [%rd20], 16; cp.async.commit_group; add.s64 %rd20, %rd20, 1024;\n\
         loop:\ncp.async.wait_group 1; bar.sync 0;\n\
         xor.b32 %r22, %r8, 512; add.s32 %r22, %r22, %r21; add.s32 %r22, %r22, %r9; ld.shared.u32 %r23, [%r22]; add.s32 %r30, %r30, %r23;\n\
         {{BARRIER}}\n\
         add.s32 %r24, %r10, %r21; setp.lt.u32 %p1, %r20, 6; @%p1 cp.async.cg.shared.global [%r24], [%rd20], 16; cp.async.commit_group; add.s64 %rd20, %rd20, 1024;\n\
         xor.b32 %r21, %r21, 1024; add.s32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 8; @%p2 bra loop;\n\
         mul.wide.u32 %rd21, %r0, 4; add.s64 %rd22, %rd2, %rd21; st.global.u32 [%rd22], %r30;"
    );
    let input: Vec<u32> = (0..8 * 256).map(|i| i * i).collect();
    let arguments = [words(&input), Arg::Out(256)];
    for order in ["forward", "reverse", "random:3"] {
        let settings = common::config(&[("EMU_ORDER", order)]);
        let ptx = kernel(2, &body.replace("{BARRIER}", "bar.sync 0;"));
        let ran = run_with(&ptx, "test", [1; 3], [64, 1, 1], 0, &arguments, settings.clone()).silent();
        let expected: Vec<u32> = (0..64u32)
            .map(|t| (0..8).map(|k| input[(k * 256 + (t ^ 32) * 4) as usize]).fold(0u32, u32::wrapping_add))
            .collect();
        assert_eq!(ran.words(1), expected);
        // Refilling a stage that the other warp may still read.
        let ptx = kernel(2, &body.replace("{BARRIER}", ""));
        run_with(&ptx, "test", [1; 3], [64, 1, 1], 0, &arguments, settings).found("Race");
    }
}

#[test]
fn forms_that_are_not_supported_name_their_line() {
    for text in [
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 16, [%r2];",
        "cp.async.mbarrier.arrive.shared.b64 [%r1];",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "cp.async.ca.shared.global [%r1], [%rd1], 12;",
        "cp.async.wait_group %r1;",
        "cp.async.ca.global.shared [%rd1], [%r1];",
    ] {
        let mut device = cuda::device::Device::new(cuda::config::Config::default());
        let ptx = kernel(1, text);
        let error = device.load(&ptx).unwrap_err();
        assert_eq!(error.line, line_of(&ptx, text), "{text}: {}", error.message);
    }
}
