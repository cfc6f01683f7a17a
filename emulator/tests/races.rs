//! Races in shared memory and between blocks: each mistake is found, each correct twin is silent.
#![allow(clippy::decimal_bitwise_operands, reason = "tests say it the short way")]

mod common;

use common::{Arg, Ran, config, kernel, run, run_with, words};
use cuda::config::{Check, Config};
use cuda::device::Shape;

/// Pointers to `s + 4 * index` for registers: `slot(5, "%r2")` gives `%r5` the address of word `%r2` of `s`.
fn slot(register: u32, index: &str) -> String {
    format!("    shl.b32 %r{register}, {index}, 2;\n    add.u32 %r{register}, %r{register}, %r1;\n")
}

/// A kernel with `bytes` of shared memory `s` (its address in `%r1`), the warp's number in `%r2` and the lane in `%r3`; the value in
/// `%r20` goes to the thread's word of the only buffer.
fn shared(bytes: u32, body: &str) -> String {
    kernel(
        1,
        &format!(
            "    .shared .align 16 .b8 s[{bytes}];
    mov.u32 %r1, s;
    shr.u32 %r2, %r0, 5;
    and.b32 %r3, %r0, 31;
    mov.u32 %r20, 0;
{body}
    mul.wide.u32 %rd20, %r0, 4;
    add.s64 %rd20, %rd1, %rd20;
    st.global.u32 [%rd20], %r20;"
        ),
    )
}

fn launch(bytes: u32, threads: u32, body: &str) -> Ran {
    run(&shared(bytes, body), "test", threads, &[Arg::Out(4 * threads as usize)])
}

/// The same, looking for races between warps only.
fn between_warps(bytes: u32, threads: u32, body: &str) -> Ran {
    let config = config(&[("EMU_CHECKS", "intra=off")]);
    run_with(
        &shared(bytes, body),
        "test",
        [1; 3],
        [threads, 1, 1],
        0,
        &[Arg::Out(4 * threads as usize)],
        config,
    )
}

/// The PTX line of a kernel that hold a mark.
fn line(ptx: &str, mark: &str) -> usize {
    1 + ptx.lines().position(|line| line.contains(mark)).expect("the mark is there")
}

#[track_caller]
fn only(ran: &Ran, check: Check) {
    let reports = ran.device.reports.all();
    assert!(!reports.is_empty(), "nothing was found");
    for report in reports {
        assert_eq!(report.check, check, "{}", report.text);
    }
}

/// Each thread writes its word, then reads that of the same lane in the other warp.
fn exchange(between: &str) -> String {
    shared(
        256,
        &format!(
            "{}    st.shared.u32 [%r5], %r0; // WRITE
    {between}
    xor.b32 %r4, %r0, 32;
{}    ld.shared.u32 %r20, [%r6]; // READ",
            slot(5, "%r0"),
            slot(6, "%r4")
        ),
    )
}

#[test]
fn a_missing_syncthreads_is_found_with_both_lines() {
    for order in ["forward", "reverse", "random:5"] {
        let ptx = exchange("");
        let config = config(&[("EMU_ORDER", order)]);
        let ran = run_with(&ptx, "test", [1; 3], [64, 1, 1], 0, &[Arg::Out(256)], config).found("Race");
        only(&ran, Check::Race);
        let text = &ran.device.reports.all()[0].text;
        // Whichever warp runs first reads what the other has not written yet, so the write comes second.
        assert!(text.contains("Race: "), "{text}");
        for mark in ["WRITE", "READ"] {
            let place = format!("ptx line {} ", line(&ptx, mark));
            assert!(text.contains(&place), "{place} is not in\n{text}");
        }
        assert!(ran.device.fault.is_some());
    }
}

#[test]
fn a_barrier_makes_it_silent() {
    for barrier in ["bar.sync 0;", "barrier.sync 0;", "bar.sync 3, 64;", "bar.red.popc.u32 %r9, 0, %p1;"] {
        let body = if barrier.contains("%p1") {
            format!("setp.eq.u32 %p1, %r0, 0;\n    {barrier}")
        } else {
            barrier.to_owned()
        };
        let ran = run(&exchange(&body), "test", 64, &[Arg::Out(256)]).silent();
        assert_eq!(ran.words(0), (0..64).map(|i| i ^ 32).collect::<Vec<u32>>());
    }
}

#[test]
fn a_warp_barrier_does_not_order_two_warps() {
    let ran = run(&exchange("bar.warp.sync 0xffffffff;"), "test", 64, &[Arg::Out(256)]).found("Race");
    only(&ran, Check::Race);
}

#[test]
fn a_second_round_needs_a_second_barrier() {
    let rounds = |second: &str| {
        format!(
            "{}    st.shared.u32 [%r5], %r0;
    bar.sync 0;
    xor.b32 %r4, %r0, 32;
{}    ld.shared.u32 %r20, [%r6];
    {second}
    st.shared.u32 [%r5], %r20;",
            slot(5, "%r0"),
            slot(6, "%r4")
        )
    };
    launch(256, 64, &rounds("bar.sync 0;")).silent();
    let ran = launch(256, 64, &rounds("")).found("Race");
    only(&ran, Check::Race);
}

/// Warp 0 produces, warp 1 consumes.
fn producer(arrive: &str, after: &str, wait: &str) -> String {
    format!(
        "{}{}    setp.eq.u32 %p1, %r2, 0;
    @!%p1 bra CONSUME;
    st.shared.u32 [%r5], %r0;
    {arrive}
    {after}
    bra DONE;
CONSUME:
    {wait}
    ld.shared.u32 %r20, [%r6];
DONE:",
        slot(5, "%r0"),
        slot(6, "%r3")
    )
}

#[test]
fn producer_and_consumer_meet_at_a_named_barrier() {
    let right = producer("bar.arrive 1, 64;", "", "bar.sync 1, 64;");
    for order in ["forward", "reverse"] {
        let config = config(&[("EMU_ORDER", order)]);
        let ran =
            run_with(&shared(256, &right), "test", [1; 3], [64, 1, 1], 0, &[Arg::Out(256)], config).silent();
        assert_eq!(ran.words(0)[32..], (0..32).collect::<Vec<u32>>());
    }
}

#[test]
fn a_consumer_at_another_barrier_races() {
    for wait in ["bar.sync 2, 32;", "bar.sync 1, 32;"] {
        let ran = launch(256, 64, &producer("bar.arrive 3, 64;", "", wait)).found("Race");
        only(&ran, Check::Race);
    }
}

#[test]
fn what_a_producer_does_after_it_arrived_is_not_ordered() {
    let ran = launch(256, 64, &producer("bar.arrive 1, 64;", "st.shared.u32 [%r5], 7;", "bar.sync 1, 64;"));
    only(&ran.found("Race"), Check::Race);
}

#[test]
fn pairs_of_warps_with_their_own_barriers_are_ordered_in_pairs_only() {
    let exchange = |other: u32| {
        format!(
            "    shr.u32 %r8, %r2, 1;
    add.u32 %r8, %r8, 1;
{}    st.shared.u32 [%r5], %r0;
    bar.sync %r8, 64;
    xor.b32 %r4, %r0, {other};
{}    ld.shared.u32 %r20, [%r6];",
            slot(5, "%r0"),
            slot(6, "%r4")
        )
    };
    launch(512, 128, &exchange(32)).silent();
    only(&launch(512, 128, &exchange(64)).found("Race"), Check::Race);
}

#[test]
fn lanes_of_a_warp_need_a_warp_barrier() {
    let exchange = |sync: &str, other: u32| {
        format!(
            "    and.b32 %r9, %r3, 16;
    mov.u32 %r10, 0xffff;
    shl.b32 %r10, %r10, %r9;
{}    st.shared.u32 [%r5], %r0;
    {sync}
    xor.b32 %r4, %r0, {other};
{}    ld.shared.u32 %r20, [%r6];",
            slot(5, "%r0"),
            slot(6, "%r4")
        )
    };
    let ran = launch(128, 32, &exchange("", 1)).found("Race");
    only(&ran, Check::Intra);
    assert!(ran.device.fault.is_none(), "a warning by default");
    assert_eq!(ran.words(0)[..2], [1, 0]);
    launch(128, 32, &exchange("bar.warp.sync 0xffffffff;", 1)).silent();
    launch(128, 32, &exchange("bar.sync 0;", 17)).silent();
    // Each half of the warp with its own mask: neighbours are ordered, the halves are not.
    launch(128, 32, &exchange("bar.warp.sync %r10;", 1)).silent();
    only(&launch(128, 32, &exchange("bar.warp.sync %r10;", 16)).found("Race"), Check::Intra);
}

#[test]
fn partial_warp_barriers_pass_on_what_they_know() {
    // Quarters first, then the lower and the upper half of the warp: lane 0 and lane 12 meet through the second.
    let body = |second: &str| {
        format!(
            "{}    st.shared.u32 [%r5], %r0;
    and.b32 %r9, %r3, 24;
    mov.u32 %r10, 0xff;
    shl.b32 %r10, %r10, %r9;
    bar.warp.sync %r10;
    and.b32 %r9, %r3, 16;
    mov.u32 %r10, 0xffff;
    shl.b32 %r10, %r10, %r9;
    {second}
    xor.b32 %r4, %r0, 12;
{}    ld.shared.u32 %r20, [%r6];",
            slot(5, "%r0"),
            slot(6, "%r4")
        )
    };
    launch(128, 32, &body("bar.warp.sync %r10;")).silent();
    only(&launch(128, 32, &body("")).found("Race"), Check::Intra);
}

#[test]
fn a_lane_never_races_with_itself() {
    let body = format!(
        "{}    st.shared.u32 [%r5], %r0;\n    ld.shared.u32 %r20, [%r5];\n    st.shared.u32 [%r5], 1;",
        slot(5, "%r0")
    );
    launch(256, 64, &body).silent();
}

#[test]
fn one_instruction_that_writes_different_values_to_a_word() {
    let ran = launch(16, 32, "    st.shared.u32 [%r1], %r0; // HERE").found("Race");
    only(&ran, Check::Race);
    launch(16, 32, "    st.shared.u32 [%r1], 7;\n    ld.shared.u32 %r20, [%r1];").silent();
    // Only two lanes disagree, and only in the upper half of a wider store.
    let wide = |value: &str| {
        format!(
            "    setp.eq.u32 %p1, %r0, 9;
    mov.u32 %r4, 5;
    @%p1 mov.u32 %r4, {value};
    st.shared.v4.u32 [%r1], {{5, 5, 5, %r4}};"
        )
    };
    launch(16, 32, &wide("5")).silent();
    let ran = launch(16, 32, &wide("6")).found("Race");
    only(&ran, Check::Race);
    assert!(ran.device.reports.all()[0].text.contains("offset 12 "), "{}", ran.device.reports.all()[0].text);
}

/// Warp `w` writes piece `2 * lane + w` of `size` bytes, so both warps write into every word.
fn pieces(size: u32, ty: &str, offset: &str, sync: &str) -> String {
    format!(
        "    shl.b32 %r4, %r3, 1;
    add.u32 %r4, %r4, {offset};
    mul.lo.u32 %r4, %r4, {size};
    add.u32 %r4, %r4, %r1;
    cvt.u16.u32 %h1, %r0;
    st.shared.{ty} [%r4], %h1;
    {sync}
    and.b32 %r6, %r3, {};
{}    ld.shared.u32 %r20, [%r5];",
        16 * size - 1,
        slot(5, "%r6")
    )
}

#[test]
fn different_bytes_of_a_word_are_different() {
    for (size, ty) in [(1, "u8"), (2, "u16")] {
        let ran = launch(128, 64, &pieces(size, ty, "%r2", "bar.sync 0;")).silent();
        if size == 2 {
            assert_eq!(ran.words(0)[0], 32 << 16);
        }
        only(&between_warps(128, 64, &pieces(size, ty, "%r2", "")).found("Race"), Check::Race);
        // Both warps write the same pieces.
        only(&launch(128, 64, &pieces(size, ty, "0", "bar.sync 0;")).found("Race"), Check::Race);
    }
}

#[test]
fn bytes_and_words_of_one_place_in_turns() {
    let turns = |last: &str| {
        format!(
            "{}    st.shared.u32 [%r5], %r0;
    bar.sync 0;
    xor.b32 %r4, %r0, 32;
{}    ld.shared.u16 %h1, [%r6+2];
    ld.shared.u8 %h2, [%r6];
    bar.sync 0;
    st.shared.u16 [%r6], %h1;
    st.shared.u16 [%r6+2], %h2;
    bar.sync 0;
    ld.shared.u32 %r20, [%r5];
    {last}
    st.shared.u8 [%r6+1], %h1;",
            slot(5, "%r0"),
            slot(6, "%r4")
        )
    };
    let ran = launch(256, 64, &turns("bar.sync 0;")).silent();
    assert_eq!(ran.words(0)[5], 5 << 16);
    only(&launch(256, 64, &turns("")).found("Race"), Check::Race);
}

#[test]
fn atomics_conflict_with_plain_accesses_only() {
    let count = |sync: &str| {
        format!(
            "    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.shared.u32 [%r1], 0;
    bar.sync 0;
    atom.shared.add.u32 %r7, [%r1], 1;
    {sync}
    ld.shared.u32 %r20, [%r1];"
        )
    };
    let ran = launch(16, 96, &count("bar.sync 0;")).silent();
    assert_eq!(ran.words(0), vec![96; 96]);
    only(&between_warps(16, 96, &count("")).found("Race"), Check::Race);
}

#[test]
fn several_readers_are_all_remembered() {
    // Every warp reads word 0; then warp 3 writes it, having waited for warp 2 only.
    let body = |meet: &str| {
        format!(
            "    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.shared.u32 [%r1], 1;
    bar.sync 0;
    ld.shared.u32 %r20, [%r1];
    setp.ge.u32 %p2, %r2, 2;
    setp.eq.u32 %p3, %r0, 96;
{meet}
    @%p3 st.shared.u32 [%r1], 2;"
        )
    };
    launch(16, 128, &body("    bar.sync 0;")).silent();
    let some = "    @!%p2 bra SKIP;\n    bar.sync 1, 64;\nSKIP:";
    let ran = launch(16, 128, &body(some)).found("Race: write after read");
    only(&ran, Check::Race);
}

#[test]
fn a_new_block_knows_nothing_of_the_last_one() {
    // The word order is reversed from block to block; there is no barrier between blocks and none is needed.
    let ptx = shared(
        256,
        &format!(
            "    mov.u32 %r7, %ctaid.x;
    and.b32 %r7, %r7, 1;
    mul.lo.u32 %r7, %r7, 63;
    xor.b32 %r7, %r7, %r0;
{}    st.shared.u32 [%r5], %r0;
    ld.shared.u32 %r20, [%r5];",
            slot(5, "%r7")
        ),
    );
    run_with(
        &ptx,
        "test",
        [6, 1, 1],
        [64, 1, 1],
        0,
        &[Arg::Out(256)],
        config(&[("EMU_CHECKS", "global=off")]),
    )
    .silent();
}

/// Two buffers of 64 × 16 bytes, filled by cp.async one round ahead; each thread reads what its neighbour in the other warp copied.
fn pipeline(wait: &str, ready: &str, free: &str) -> String {
    kernel(
        2,
        &format!(
            "    .shared .align 16 .b8 s[2048];
    mov.u32 %r1, s;
    mul.wide.u32 %rd3, %r0, 16;
    add.s64 %rd3, %rd2, %rd3;
    shl.b32 %r2, %r0, 4;
    add.u32 %r2, %r2, %r1;
    xor.b32 %r3, %r0, 33;
    shl.b32 %r3, %r3, 4;
    add.u32 %r3, %r3, %r1;
    mov.u32 %r20, 0;
    cp.async.cg.shared.global [%r2], [%rd3], 16;
    cp.async.commit_group;
    mov.u32 %r4, 0;
LOOP:
    add.u32 %r5, %r4, 1;
    setp.lt.u32 %p1, %r5, 6;
    and.b32 %r6, %r5, 1;
    shl.b32 %r6, %r6, 10;
    add.u32 %r6, %r6, %r2;
    add.s64 %rd3, %rd3, 1024;
    @%p1 cp.async.cg.shared.global [%r6], [%rd3], 16;
    cp.async.commit_group;
    {wait}
    {ready}
    and.b32 %r7, %r4, 1;
    shl.b32 %r7, %r7, 10;
    add.u32 %r7, %r7, %r3;
    ld.shared.u32 %r8, [%r7+4];
    add.u32 %r20, %r20, %r8;
    {free}
    mov.u32 %r4, %r5;
    @%p1 bra LOOP;
    mul.wide.u32 %rd20, %r0, 4;
    add.s64 %rd20, %rd1, %rd20;
    st.global.u32 [%rd20], %r20;"
        ),
    )
}

#[test]
fn a_double_buffered_loop() {
    let data: Vec<u32> = (0..6 * 256).collect();
    let go = |wait: &str, ready: &str, free: &str, order: &str| {
        let args = [Arg::Out(256), words(&data)];
        let config = config(&[("EMU_ORDER", order)]);
        run_with(&pipeline(wait, ready, free), "test", [1; 3], [64, 1, 1], 0, &args, config)
    };
    let (wait, sync) = ("cp.async.wait_group 1;", "bar.sync 0;");
    for order in ["forward", "reverse"] {
        let ran = go(wait, sync, sync, order).silent();
        let expected: Vec<u32> =
            (0..64u32).map(|t| (0..6).map(|round| round * 256 + (t ^ 33) * 4 + 1).sum()).collect();
        assert_eq!(ran.words(0), expected);
        // No wait at all; one group too few; no barrier after the wait; none before the buffer is filled again.
        only(&go("", sync, sync, order).found("Race"), Check::Race);
        only(&go("cp.async.wait_group 2;", sync, sync, order).found("Race"), Check::Race);
        only(&go(wait, "", sync, order).found("Race"), Check::Race);
        only(&go(wait, sync, "", order).found("Race"), Check::Race);
    }
}

// ---- between blocks ----

fn global(config: Config, blocks: u32, buffers: &[Arg], body: &str) -> Ran {
    let body = format!("    mov.u32 %r1, %ctaid.x;\n    mov.u32 %r2, %nctaid.x;\n{body}");
    run_with(&kernel(buffers.len(), &body), "test", [blocks, 1, 1], [64, 1, 1], 0, buffers, config)
}

fn strict() -> Config {
    config(&[("EMU_CHECKS", "global=error,readonly=error")])
}

#[test]
fn two_blocks_write_one_word() {
    let ran = global(strict(), 2, &[words(&[0; 4])], "    st.global.u32 [%rd1], 5;")
        .found("Race: write after write");
    only(&ran, Check::Global);
    let text = &ran.device.reports.all()[0].text;
    assert!(text.contains("by block 0") && text.contains("by block 1"), "{text}");
    // One block alone may.
    global(strict(), 1, &[words(&[0; 4])], "    st.global.u32 [%rd1], 5;").silent();
}

#[test]
fn blocks_write_different_parts_of_a_sector() {
    for (ty, size) in [("u32", 4), ("u16", 2), ("u8", 1)] {
        let store = |place: &str| {
            format!(
                "    mov.u16 %h1, 3;
    mov.u32 %r5, 3;
    mul.wide.u32 %rd2, {place}, {size};
    add.s64 %rd2, %rd1, %rd2;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.global.{ty} [%rd2], {};",
                if size == 4 { "%r5" } else { "%h1" }
            )
        };
        global(strict(), 7, &[words(&[0; 8])], &store("%r1")).silent();
        let half = format!("    shr.u32 %r6, %r1, 1;\n{}", store("%r6"));
        only(&global(strict(), 2, &[words(&[0; 8])], &half).found("Race"), Check::Global);
    }
}

#[test]
fn a_read_and_a_write_of_two_blocks() {
    let body = "    setp.eq.u32 %p1, %r1, 1;
    @%p1 bra WRITER;
    ld.global.u32 %r5, [%rd1];
    bra DONE;
WRITER:
    st.global.u32 [%rd1], 5;
DONE:";
    for order in ["forward", "reverse"] {
        let mut config = strict();
        config.set("EMU_ORDER", order).unwrap();
        only(&global(config, 2, &[words(&[0; 4])], body).found("Race"), Check::Global);
    }
    // Many readers, then a writer.
    let last = body.replace("%r1, 1;", "%r1, 5;");
    only(&global(strict(), 6, &[words(&[0; 4])], &last).found("Race: write after read"), Check::Global);
    global(strict(), 5, &[words(&[0; 4])], &last).silent();
}

#[test]
fn atomics_of_many_blocks() {
    let ran = global(strict(), 3, &[words(&[0])], "    red.global.add.u32 [%rd1], 1;").silent();
    assert_eq!(ran.words(0), [192]);
    // A plain write among them.
    let mixed = "    red.global.add.u32 [%rd1], 1;\n    setp.eq.u32 %p1, %r1, 2;\n    @%p1 st.global.u32 [%rd1+4], 1;\n    @!%p1 red.global.add.u32 [%rd1+4], 1;";
    only(&global(strict(), 3, &[words(&[0, 0])], mixed).found("Race"), Check::Global);
}

/// Each block writes its sum; the last one to count itself adds them up.
fn reduction(fence: &str) -> String {
    format!(
        "    .shared .align 4 .b8 s[4];
    setp.ne.u32 %p1, %r0, 0;
    mul.wide.u32 %rd4, %r1, 4;
    add.s64 %rd4, %rd2, %rd4;
    add.u32 %r5, %r1, 10;
    @!%p1 st.global.u32 [%rd4], %r5;
    {fence}
    bar.sync 0;
    mov.u32 %r6, s;
    @%p1 bra WAIT;
    atom.global.add.u32 %r7, [%rd3], 1;
    st.shared.u32 [%r6], %r7;
WAIT:
    bar.sync 0;
    ld.shared.u32 %r7, [%r6];
    add.u32 %r7, %r7, 1;
    setp.ne.u32 %p2, %r7, %r2;
    @%p2 bra DONE;
    {fence}
    @%p1 bra DONE;
    mov.u32 %r8, 0;
    mov.u32 %r9, 0;
LOOP:
    ld.global.u32 %r10, [%rd2];
    add.u32 %r8, %r8, %r10;
    add.s64 %rd2, %rd2, 4;
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p3, %r9, %r2;
    @%p3 bra LOOP;
    st.global.u32 [%rd1], %r8;
    st.global.u32 [%rd3], 0;
DONE:"
    )
}

#[test]
fn the_last_block_adds_up() {
    for order in ["forward", "reverse", "random:3"] {
        let go = |fence: &str| {
            let mut config = strict();
            config.set("EMU_ORDER", order).unwrap();
            global(config, 9, &[words(&[0]), words(&[0; 9]), words(&[0])], &reduction(fence))
        };
        for fence in ["membar.gl;", "fence.acq_rel.gpu;", "fence.sc.gpu;"] {
            let ran = go(fence).silent();
            assert_eq!(ran.words(0), [9 * 10 + 36]);
            assert_eq!(ran.words(2), [0]);
        }
        only(&go("").found("Race: read after write"), Check::Global);
    }
}

/// Blocks in teams of three: each reads its team's word and counts itself; the last of a team writes the word. `skipped` does not
/// count itself, the last of its team waits for one less.
fn teams(skipped: Option<u32>) -> String {
    let skip = skipped
        .map_or(String::new(), |block| format!("    setp.eq.u32 %p2, %r1, {block};\n    @%p2 bra DONE;\n"));
    let of_team =
        |block: u32| format!("    setp.eq.u32 %p3, %r6, {};\n    @%p3 sub.u32 %r9, %r9, 1;\n", block % 4);
    let less = skipped.map_or(String::new(), of_team);
    format!(
        "    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra DONE;
    and.b32 %r6, %r1, 3;
    mul.wide.u32 %rd4, %r6, 4;
    add.s64 %rd5, %rd1, %rd4;
    add.s64 %rd6, %rd2, %rd4;
    ld.global.u32 %r7, [%rd5];
{skip}    membar.gl;
    atom.global.add.u32 %r8, [%rd6], 1;
    membar.gl;
    mov.u32 %r9, 2;
{less}    setp.ne.u32 %p4, %r8, %r9;
    @%p4 bra DONE;
    add.u32 %r7, %r7, 1;
    st.global.u32 [%rd5], %r7;
DONE:"
    )
}

/// Blocks of other teams have read other words of the same sector, and may have begun before; they have nothing to do with it.
#[test]
fn the_last_reader_of_a_team_writes() {
    for order in ["forward", "reverse", "random:5"] {
        let go = |skipped: Option<u32>| {
            let mut config = strict();
            config.set("EMU_ORDER", order).unwrap();
            global(config, 12, &[words(&[7; 4]), words(&[0; 4])], &teams(skipped))
        };
        let ran = go(None).silent();
        assert_eq!(ran.words(0), [8; 4]);
        for block in [0, 5, 11] {
            let ran = go(Some(block));
            let reports = ran.device.reports.all();
            // Where the one that does not count comes after the write it reads what was written.
            assert!(reports.iter().any(|report| report.text.contains("Race")), "{order} {block}");
            let text = &reports[0].text;
            assert!(
                text.contains(&format!("by block {block} "))
                    || text.contains(&format!("block ({block},0,0)")),
                "{text}"
            );
        }
    }
}

/// A barrier of the whole grid: count up, then wait for the others. The first block waits until the second one has had its turn.
const GRID_BARRIER: &str = "    setp.ne.u32 %p1, %r0, 0;
    mul.wide.u32 %rd4, %r1, 4;
    add.s64 %rd4, %rd2, %rd4;
    @!%p1 st.global.u32 [%rd4], %r1;
    bar.sync 0;
    @%p1 bra MEET;
    membar.gl;
    red.global.add.u32 [%rd3], 1;
SPIN:
    ld.volatile.global.u32 %r5, [%rd3];
    setp.lt.u32 %p2, %r5, %r2;
    @%p2 bra SPIN;
    membar.gl;
MEET:
    bar.sync 0;
    xor.b32 %r6, %r1, 1;
    mul.wide.u32 %rd5, %r6, 4;
    add.s64 %rd6, %rd2, %rd5;
    ld.global.u32 %r7, [%rd6];
    add.s64 %rd5, %rd1, %rd5;
    @!%p1 st.global.u32 [%rd5], %r7;";

#[test]
fn blocks_that_wait_for_each_other() {
    let body = format!("    mov.u32 %r1, %ctaid.x;\n    mov.u32 %r2, %nctaid.x;\n{GRID_BARRIER}");
    let (mut device, module) = common::load(&kernel(3, &body), strict());
    let mut params = Vec::new();
    for content in [[9u32, 9], [8, 8], [0, 0]] {
        let address = device.allocate(8).unwrap();
        device.write(address, &content.map(u32::to_le_bytes).concat()).unwrap();
        params.extend(address.to_le_bytes());
    }
    // A cooperative launch, as the runtime has it for a barrier of the grid: blocks take short turns.
    let shape = Shape {
        grid: [2, 1, 1],
        block: [64, 1, 1],
        dynamic_shared: 0,
        max_dynamic_shared: None,
        cooperative: true,
        stream: 0,
    };
    let launch = device.launch(&module.kernels["test"], &shape, &params).unwrap();
    let mut out = [0; 8];
    device.read(u64::from_le_bytes(params[..8].try_into().unwrap()), &mut out).unwrap();
    assert_eq!(out, [0, 0, 0, 0, 1, 0, 0, 0]);
    Ran { device, launch: Some(launch), buffers: Vec::new(), addresses: Vec::new() }.silent();
}

#[test]
fn order_is_passed_on_from_block_to_block() {
    // Block 0 releases flag 0; block 1 acquires it and releases flag 1; block 2 acquires that and reads what block 0 wrote.
    let chain = |second: &str| {
        format!(
            "    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra DONE;
    setp.eq.u32 %p2, %r1, 1;
    setp.eq.u32 %p3, %r1, 2;
    @%p2 bra ONE;
    @%p3 bra TWO;
    st.global.u32 [%rd2], 42;
    membar.gl;
    red.global.add.u32 [%rd3], 1;
    bra DONE;
ONE:
    atom.global.add.u32 %r5, [%rd3], 0;
    {second}
    red.global.add.u32 [%rd3+64], 1;
    bra DONE;
TWO:
    atom.global.add.u32 %r5, [%rd3+64], 0;
    membar.gl;
    ld.global.u32 %r6, [%rd2];
    st.global.u32 [%rd1], %r6;
DONE:"
        )
    };
    let args = || [words(&[0]), words(&[0]), words(&[0; 32])];
    let ran = global(strict(), 3, &args(), &chain("membar.gl;")).silent();
    assert_eq!(ran.words(0), [42]);
    only(&global(strict(), 3, &args(), &chain("")).found("Race"), Check::Global);
}

#[test]
fn a_releasing_atomic_needs_no_fence() {
    let go = |atomic: &str| {
        let body = reduction("").replace("atom.global.add.u32", atomic);
        global(strict(), 9, &[words(&[0]), words(&[0; 9]), words(&[0])], &body)
    };
    for atomic in ["atom.acq_rel.gpu.global.add.u32", "atom.release.gpu.global.add.u32"] {
        assert_eq!(go(atomic).silent().words(0), [9 * 10 + 36]);
    }
    for atomic in ["atom.relaxed.gpu.global.add.u32", "atom.acquire.gpu.global.add.u32"] {
        only(&go(atomic).found("Race: read after write"), Check::Global);
    }
}

#[test]
fn the_read_only_path_is_for_what_nobody_writes() {
    let body = |first: &str, second: &str| {
        format!("    mul.wide.u32 %rd2, %r0, 4;\n    add.s64 %rd2, %rd1, %rd2;\n    {first}\n    {second}")
    };
    let (load, store) = ("ld.global.nc.u32 %r5, [%rd2];", "st.global.u32 [%rd2], %r0;");
    let args = || [words(&[3; 64])];
    only(&global(strict(), 1, &args(), &body(load, store)).found("ReadOnly"), Check::ReadOnly);
    only(&global(strict(), 1, &args(), &body(store, load)).found("ReadOnly"), Check::ReadOnly);
    global(strict(), 1, &args(), &body("ld.global.u32 %r5, [%rd2];", store)).silent();
    global(strict(), 1, &args(), &body(load, "")).silent();
    // The default only warns.
    let ran = global(Config::default(), 1, &args(), &body(load, store)).found("ReadOnly");
    assert!(ran.device.fault.is_none());
    assert_eq!(ran.words(0), (0..64).collect::<Vec<u32>>());
}
