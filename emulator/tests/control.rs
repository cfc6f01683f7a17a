//! Branches, reconvergence, barriers, calls and what the runtime provides: each against what the lanes must have seen.

mod common;

use common::{Arg, config, kernel, run, run_with, words};

const STORE: &str = "
    mul.wide.u32 %rd100, %r0, 4;
    add.u64 %rd101, %rd1, %rd100;
    st.global.u32 [%rd101], %r9;";

fn line_of(ptx: &str, needle: &str) -> usize {
    ptx.lines().position(|l| l.contains(needle)).unwrap() + 1
}

#[test]
fn a_divergent_branch_takes_both_sides_and_meets_again() {
    let body = format!(
        "
    and.b32 %r1, %r0, 3;
    mov.u32 %r9, 0;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra $A;
    setp.eq.u32 %p2, %r1, 1;
    @!%p2 bra $B;
    add.u32 %r9, %r9, 100;
    bra $END;
$A: add.u32 %r9, %r9, 7;
    bra.uni $END;
$B: add.u32 %r9, %r9, %r1;
$END:
    activemask.b32 %r2;
    popc.b32 %r2, %r2;
    mad.lo.u32 %r9, %r2, 1000, %r9;
{STORE}"
    );
    let out = run(&kernel(1, &body), "test", 48, &[Arg::Out(192)]).silent().words(0);
    for (thread, value) in out.iter().enumerate() {
        let lanes = if thread < 32 { 32 } else { 16 };
        assert_eq!(*value, lanes * 1000 + [7, 100, 2, 3][thread & 3], "thread {thread}");
    }
}

#[test]
fn a_loop_of_different_lengths_counts_each_lane_and_reconverges() {
    let body = format!(
        "
    mov.u32 %r9, 0;
    mov.u32 %r1, %r0;
$LOOP:
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra $OUT;
    add.u32 %r9, %r9, %r1;
    sub.u32 %r1, %r1, 1;
    bra $LOOP;
$OUT:
{STORE}"
    );
    let ran = run(&kernel(1, &body), "test", 32, &[Arg::Out(128)]).silent();
    assert_eq!(ran.words(0), (0..32).map(|n| n * (n + 1) / 2).collect::<Vec<u32>>());
    let counters = &ran.launch.as_ref().unwrap().counters;
    assert_eq!(counters.divergent.iter().sum::<u64>(), 31, "one lane leaves at each turn but the last");
}

#[test]
fn a_jump_table_sends_each_lane_to_its_target() {
    let body = format!(
        "
    and.b32 %r1, %r0, 3;
T:  .branchtargets $C0, $C1, $C2, $C1;
    brx.idx %r1, T;
$C0: mov.u32 %r9, 10;
    bra $END;
$C1: mov.u32 %r9, 11;
    bra $END;
$C2: mov.u32 %r9, 12;
$END:
{STORE}"
    );
    let out = run(&kernel(1, &body), "test", 32, &[Arg::Out(128)]).silent().words(0);
    assert!(out.iter().enumerate().all(|(lane, &v)| v == [10, 11, 12, 11][lane & 3]));
    let past = body.replace("and.b32 %r1, %r0, 3;", "mov.u32 %r1, %r0;");
    let ran = run(&kernel(1, &past), "test", 32, &[Arg::Out(128)]).found("Invalid branch index");
    assert!(ran.device.fault.is_some());
}

#[test]
fn a_lane_that_spins_does_not_starve_the_lane_that_frees_it() {
    // Lanes 1 to 31 spin on a word that lane 0 writes after the branch: possible since every thread makes progress by itself.
    let body = "
    setp.eq.u32 %p1, %r0, 0;
    @%p1 bra $FREE;
$SPIN:
    ld.volatile.global.u32 %r1, [%rd1];
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra $SPIN;
    bra $END;
$FREE:
    mov.u32 %r2, 1;
    st.volatile.global.u32 [%rd1], %r2;
$END:";
    let ran = run(&kernel(1, body), "test", 32, &[words(&[0])]);
    assert_eq!(ran.words(0), [1]);
    assert_eq!(ran.device.fault, None);
}

#[test]
fn a_barrier_holds_every_warp_back() {
    // Each thread publishes its number and reads the one of a thread of another warp.
    let body = format!(
        "
    .shared .align 4 .b8 box[512];
    mov.u32 %r1, box;
    shl.b32 %r2, %r0, 2;
    add.u32 %r3, %r1, %r2;
    st.shared.u32 [%r3], %r0;
    bar.sync 0;
    add.u32 %r4, %r0, 37;
    and.b32 %r4, %r4, 127;
    shl.b32 %r4, %r4, 2;
    add.u32 %r4, %r1, %r4;
    ld.shared.u32 %r9, [%r4];
{STORE}"
    );
    for settings in [
        &[][..],
        &[("EMU_ORDER", "reverse")],
        &[("EMU_SEED", "5")],
        &[("EMU_ORDER", "random:9"), ("EMU_SEED", "1")],
    ] {
        let ran = run_with(
            &kernel(1, &body),
            "test",
            [1, 1, 1],
            [128, 1, 1],
            0,
            &[Arg::Out(512)],
            config(settings),
        )
        .silent();
        assert_eq!(ran.words(0), (0..128).map(|n| (n + 37) % 128).collect::<Vec<u32>>());
        assert_eq!(ran.launch.as_ref().unwrap().counters.barriers, 1);
    }
}

#[test]
fn barrier_votes_count_over_the_block() {
    let body = |op: &str, to: &str| {
        format!(
            "
    setp.lt.u32 %p1, %r0, 70;
    mov.u32 %r9, 0;
    bar.red.{op} {to}, 0, %p1;
    {}
{STORE}",
            if to == "%p2" { "selp.u32 %r9, 1, 0, %p2;" } else { "mov.u32 %r9, %r8;" }
        )
    };
    for (op, to, expect) in [("popc.u32", "%r8", 70), ("and.pred", "%p2", 0), ("or.pred", "%p2", 1)] {
        let out = run(&kernel(1, &body(op, to)), "test", 96, &[Arg::Out(384)]).silent().words(0);
        assert_eq!(out, vec![expect; 96], "{op}");
    }
    let negated = body("popc.u32", "%r8").replace("0, %p1;", "0, !%p1;");
    assert_eq!(run(&kernel(1, &negated), "test", 96, &[Arg::Out(384)]).silent().words(0), vec![26; 96]);
}

#[test]
fn named_barriers_with_counts_pass_on_work() {
    // Warp 0 produces, warp 1 consumes; warp 2 takes no part.
    let body = "
    .shared .align 4 .b8 box[128];
    mov.u32 %r1, box;
    shr.u32 %r2, %r0, 5;
    and.b32 %r3, %r0, 31;
    shl.b32 %r4, %r3, 2;
    add.u32 %r5, %r1, %r4;
    setp.eq.u32 %p1, %r2, 0;
    setp.eq.u32 %p2, %r2, 1;
    @%p1 bra $PRODUCE;
    @%p2 bra $CONSUME;
    bra $END;
$PRODUCE:
    mul.lo.u32 %r6, %r3, 3;
    st.shared.u32 [%r5], %r6;
    bar.arrive 1, 64;
    bra $END;
$CONSUME:
    bar.sync 1, 64;
    ld.shared.u32 %r7, [%r5];
    mul.wide.u32 %rd100, %r3, 4;
    add.u64 %rd101, %rd1, %rd100;
    st.global.u32 [%rd101], %r7;
$END:";
    for settings in [&[][..], &[("EMU_ORDER", "reverse")], &[("EMU_SEED", "11")]] {
        let ran =
            run_with(&kernel(1, body), "test", [1, 1, 1], [96, 1, 1], 0, &[Arg::Out(128)], config(settings))
                .silent();
        assert_eq!(ran.words(0), (0..32).map(|n| n * 3).collect::<Vec<u32>>());
    }
}

#[test]
fn threads_that_wait_for_ever_are_reported_with_their_places() {
    // The second warp waits at another barrier than the first.
    let body = "
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $A;
    bar.sync 1;
    bra $END;
$A: bar.sync 2;
$END:";
    let ptx = kernel(1, body);
    let ran = run(&ptx, "test", 64, &[Arg::Out(4)]).found("Deadlock");
    let text = &ran.device.reports.all()[0].text;
    for place in ["bar.sync 1", "bar.sync 2"] {
        assert!(text.contains(&format!("ptx line {}", line_of(&ptx, place))), "{text}");
    }
    let one = body.replace("bar.sync 2", "bar.sync 1");
    run(&kernel(1, &one), "test", 64, &[Arg::Out(4)]).silent();
}

#[test]
fn a_barrier_in_a_divergent_branch_is_reported() {
    let body = "
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra $A;
    bar.sync 0;
    bra $END;
$A: bar.sync 0;
$END:";
    let ran = run(&kernel(1, body), "test", 32, &[Arg::Out(4)]).found("Barrier");
    assert!(
        ran.device.reports.all()[0].text.contains("lanes 0000ffff wait"),
        "{}",
        ran.device.reports.all()[0].text
    );
    run(&kernel(1, "bar.sync 0;"), "test", 32, &[Arg::Out(4)]).silent();
}

#[test]
fn warp_barriers_meet_across_branches_and_reject_wrong_masks() {
    let body = "
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra $A;
    bar.warp.sync 0xffffffff;
    bra $END;
$A: bar.warp.sync 0xffffffff;
$END:";
    run(&kernel(1, body), "test", 32, &[Arg::Out(4)]).silent();
    // Lanes that have exited are not waited for; lanes that wait elsewhere never come.
    let left = body.replacen("bar.warp.sync 0xffffffff;", "", 1);
    run(&kernel(1, &left), "test", 32, &[Arg::Out(4)]).silent();
    let elsewhere = body.replacen("bar.warp.sync 0xffffffff;", "bar.sync 0;", 1);
    run(&kernel(1, &elsewhere), "test", 32, &[Arg::Out(4)]).found("Barrier");
    let outside = "bar.warp.sync 0x0000ffff;";
    run(&kernel(1, outside), "test", 32, &[Arg::Out(4)]).found("Barrier");
}

#[test]
fn barrier_arguments_are_checked() {
    for (text, word) in [
        ("bar.sync 0, 48;", "Barrier count"),
        ("bar.sync 0, 96;", "Barrier count"),
        ("mov.u32 %r1, 16; bar.sync %r1;", "Barrier number"),
    ] {
        run(&kernel(1, text), "test", 64, &[Arg::Out(4)]).found(word);
    }
    run(&kernel(1, "bar.sync 15, 64;"), "test", 64, &[Arg::Out(4)]).silent();
}

#[test]
fn device_functions_are_inlined_with_their_own_names() {
    let ptx = "
.version 8.0
.target sm_80
.address_size 64
.func (.param .b32 out) twice_plus(.param .b32 x, .param .b32 y)
{
    .reg .pred %p<4>;
    .reg .b32 %r<10>;
    ld.param.u32 %r1, [x];
    ld.param.u32 %r2, [y];
    setp.gt.u32 %p1, %r1, 10;
    @%p1 bra $BIG;
    mad.lo.u32 %r3, %r1, 2, %r2;
    st.param.b32 [out], %r3;
    ret;
$BIG:
    st.param.b32 [out], %r2;
    ret;
}
.func (.reg .u32 o) plus_one(.reg .u32 i)
{
    add.u32 o, i, 1;
    ret;
}
.visible .entry test(.param .u64 p0)
{
    .reg .b32 %r<20>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [p0];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, 1000;
    {
        .param .b32 a;
        .param .b32 b;
        .param .b32 r;
        st.param.b32 [a], %r0;
        st.param.b32 [b], %r1;
        call.uni (r), twice_plus, (a, b);
        ld.param.b32 %r2, [r];
    }
    call (%r3), plus_one, (%r2);
    call (%r3), plus_one, (%r3);
    mul.wide.u32 %rd2, %r0, 4;
    add.u64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r3;
    ret;
}";
    let out = run(ptx, "test", 32, &[Arg::Out(128)]).silent().words(0);
    for (lane, value) in out.iter().enumerate() {
        let lane = lane as u32;
        assert_eq!(*value, if lane > 10 { 1002 } else { 1002 + 2 * lane });
    }
}

#[test]
fn recursion_and_missing_functions_are_load_errors_with_their_line() {
    let recursive = ".version 8.0\n.target sm_80\n.address_size 64\n.func f()\n{\n    call.uni f;\n    ret;\n}\n.entry test()\n{\n    call.uni f;\n    ret;\n}\n";
    let error = cuda::device::Device::new(config(&[])).load(recursive).unwrap_err();
    assert_eq!((error.line, error.message.contains("recursion")), (6, true), "{error}");
    let missing = ".version 8.0\n.target sm_80\n.address_size 64\n.entry test()\n{\n    call.uni nowhere;\n    ret;\n}\n";
    let error = cuda::device::Device::new(config(&[])).load(missing).unwrap_err();
    assert!(error.line == 6 && error.message.contains("nowhere"), "{error}");
    let label = ".version 8.0\n.target sm_80\n.address_size 64\n.entry test()\n{\n    bra $X;\n}\n";
    let error = cuda::device::Device::new(config(&[])).load(label).unwrap_err();
    assert!(error.line == 6 && error.message.contains("$X"), "{error}");
}

#[test]
fn unknown_instructions_and_modifiers_are_never_skipped() {
    for (text, part) in [
        ("frobnicate.u32 %r1, %r2;", "unknown instruction frobnicate.u32"),
        ("bra.sometimes $X; $X:", "unknown modifier .sometimes"),
        ("bar.sync.loud 0;", "unknown modifier .loud"),
        ("add.u32.wide %r1, %r1, %r1;", "wide"),
        ("mov.u32 %r1, %nosuch;", "%nosuch"),
        ("mov.u32 %r1, %rd1;", "%rd1"),
    ] {
        let ptx = kernel(1, text);
        let error = cuda::device::Device::new(config(&[])).load(&ptx).unwrap_err();
        assert_eq!(error.line as usize, line_of(&ptx, text), "{text}: {error}");
        assert!(error.message.contains(part), "{text}: {error}");
    }
}

#[test]
fn a_kernel_prints_and_asserts() {
    let ptx = r"
.version 8.0
.target sm_80
.address_size 64
.extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
.extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 g, .param .b64 s);
.global .align 1 .b8 fmt[] = {108, 97, 110, 101, 32, 37, 100, 58, 32, 37, 53, 46, 50, 102, 124, 37, 45, 52, 117, 124, 37, 37, 10, 0};
.global .align 1 .b8 what[] = {120, 32, 62, 32, 48, 0};
.visible .entry test(.param .u64 p0)
{
    .local .align 8 .b8 args[24];
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<8>;
    .reg .f64 %fd<2>;
    mov.u32 %r0, %tid.x;
    setp.ne.u32 %p1, %r0, 3;
    @%p1 bra $END;
    mov.u64 %rd1, args;
    cvta.local.u64 %rd2, %rd1;
    st.local.u32 [%rd1], %r0;
    mov.f64 %fd1, 0d3FF8000000000000;
    st.local.f64 [%rd1+8], %fd1;
    mov.u32 %r1, 42;
    st.local.u32 [%rd1+16], %r1;
    mov.u64 %rd3, fmt;
    cvta.global.u64 %rd4, %rd3;
    {
        .param .b64 f;
        st.param.b64 [f], %rd4;
        .param .b64 a;
        st.param.b64 [a], %rd2;
        .param .b32 r;
        call.uni (r), vprintf, (f, a);
        ld.param.b32 %r2, [r];
    }
    mov.u64 %rd5, what;
    cvta.global.u64 %rd6, %rd5;
    {
        .param .b64 m;
        st.param.b64 [m], %rd6;
        .param .b64 f;
        st.param.b64 [f], %rd4;
        .param .b32 l;
        st.param.b32 [l], 77;
        .param .b64 g;
        st.param.b64 [g], %rd6;
        .param .b64 s;
        st.param.b64 [s], 1;
        call.uni __assertfail, (m, f, l, g, s);
    }
$END:
    ret;
}";
    let ran = run(ptx, "test", 32, &[Arg::Out(4)]).found("Invalid state: an assertion");
    assert_eq!(ran.launch.as_ref().unwrap().printed, "lane 3:  1.50|42  |%\n");
    let text = &ran.device.reports.all()[0].text;
    assert!(text.contains(":77: x > 0: Assertion `x > 0` failed."), "{text}");
    assert!(text.contains("by thread (3,0,0)"), "{text}");
    assert_eq!(ran.device.fault.map(cuda::report::Fault::code), Some(710));
}

#[test]
fn a_runaway_kernel_ends_with_its_budget() {
    let body = "$L: bra $L;";
    let ran = run_with(
        &kernel(1, body),
        "test",
        [1, 1, 1],
        [32, 1, 1],
        0,
        &[Arg::Out(4)],
        config(&[("EMU_BUDGET", "1000000")]),
    );
    assert_eq!(ran.device.fault.map(cuda::report::Fault::code), Some(702));
    ran.found("Deadlock");
}

#[test]
fn blocks_that_wait_for_each_other_take_turns() {
    // Block 0 waits for a flag that the last block sets: it must give way.
    let body = "
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %nctaid.x;
    sub.u32 %r2, %r2, 1;
    setp.eq.u32 %p1, %r1, %r2;
    @%p1 bra $SET;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra $END;
$SPIN:
    atom.global.or.b32 %r3, [%rd1], 0;
    setp.eq.u32 %p3, %r3, 0;
    @%p3 bra $SPIN;
    bra $END;
$SET:
    atom.global.exch.b32 %r3, [%rd1], 1;
$END:";
    let ran =
        run_with(&kernel(1, body), "test", [4, 1, 1], [1, 1, 1], 0, &[words(&[0])], config(&[])).silent();
    assert_eq!(ran.words(0), [1]);
}
