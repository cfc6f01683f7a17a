//! Seeded faults: for each check a kernel that commits exactly that fault, reported with its kind, line and thread, and a corrected
//! twin that is silent (specification section 12.4). Races are in `races.rs`.

mod common;

use common::{Arg, Ran, config, kernel, run, run_with, words};
use cuda::config::Config;
use cuda::device::{DeviceError, Shape};
use cuda::report::{Fault, Report};

/// The mark that stands on the faulty line.
const HERE: &str = "// HERE";

fn marked(ptx: &str) -> u32 {
    1 + ptx.lines().position(|line| line.contains(HERE)).expect("a line is marked") as u32
}

/// The first finding starts with `title`, names the marked line and the thread, and failed the launch with `fault`.
#[track_caller]
fn caught<'a>(ran: &'a Ran, ptx: &str, title: &str, thread: &str, fault: Fault) -> &'a Report {
    let report = ran.device.reports.all().first().expect("something was found");
    assert!(report.text.starts_with(&format!("========= {title}")), "{}", report.text);
    assert_eq!(report.line, marked(ptx), "{}", report.text);
    assert!(report.text.contains(&format!("by thread ({thread}) ")), "{}", report.text);
    assert_eq!(ran.device.fault, Some(fault));
    report
}

/// Word `%r0` of the buffer in `%rd1` at `%rd2`.
const OWN: &str = "    mul.wide.u32 %rd2, %r0, 4;\n    add.s64 %rd2, %rd1, %rd2;\n";

#[test]
fn one_past_the_end() {
    let ptx = kernel(1, &format!("{OWN}    st.global.u32 [%rd2], %r0; {HERE}"));
    let ran = run(&ptx, "test", 64, &[Arg::Out(63 * 4)]);
    let report =
        caught(&ran, &ptx, "Invalid __global__ write of size 4 bytes", "63,0,0", Fault::IllegalAddress);
    assert!(report.text.contains("0 bytes past the end of allocation #"), "{}", report.text);
    assert!(report.text.contains("lanes 80000000, warp 1"), "{}", report.text);
    let ran = run(&ptx, "test", 63, &[Arg::Out(63 * 4)]).silent();
    assert_eq!(ran.words(0), (0..63).collect::<Vec<u32>>());
}

#[test]
fn one_past_the_end_of_shared_memory() {
    let body = |size: u32| {
        format!(
            "    .shared .align 4 .b8 s[{size}];\n    mov.u32 %r1, s;\n    mad.lo.u32 %r1, %r0, 4, %r1;\n    st.shared.u32 [%r1], %r0; {HERE}"
        )
    };
    let ptx = kernel(0, &body(124));
    let ran = run(&ptx, "test", 32, &[]);
    caught(&ran, &ptx, "Invalid __shared__ write of size 4 bytes", "31,0,0", Fault::IllegalAddress);
    run(&kernel(0, &body(128)), "test", 32, &[]).silent();
}

#[test]
fn a_misaligned_vector() {
    let ptx = |offset: u32| {
        kernel(1, &format!("    ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1+{offset}]; {HERE}"))
    };
    let ran = run(&ptx(8), "test", 1, &[words(&[0; 8])]);
    caught(&ran, &ptx(8), "Misaligned __global__ read", "0,0,0", Fault::Misaligned);
    run(&ptx(16), "test", 1, &[words(&[0; 8])]).silent();
}

#[test]
fn a_freed_buffer() {
    let ptx = kernel(1, &format!("{OWN}    ld.global.u32 %r1, [%rd2]; {HERE}"));
    for free in [true, false] {
        let (mut device, module) = common::load(&ptx, Config::default());
        let address = device.allocate(128).unwrap();
        device.write(address, &[0; 128]).unwrap();
        if free {
            device.memory.free(address).unwrap();
        }
        let shape = Shape {
            grid: [1; 3],
            block: [32, 1, 1],
            dynamic_shared: 0,
            max_dynamic_shared: None,
            cooperative: false,
            stream: 0,
        };
        let launch = device.launch(&module.kernels["test"], &shape, &address.to_le_bytes()).unwrap();
        if !free {
            assert!(device.reports.all().is_empty());
            continue;
        }
        // The fault stays until the process ends.
        let again = device.launch(&module.kernels["test"], &shape, &address.to_le_bytes());
        assert_eq!(again.unwrap_err(), DeviceError::Fault(Fault::IllegalAddress));
        let ran = Ran { device, launch: Some(launch), buffers: Vec::new(), addresses: Vec::new() };
        let report =
            caught(&ran, &ptx, "Invalid __global__ read of size 4 bytes", "0,0,0", Fault::IllegalAddress);
        assert!(report.text.contains("which was freed"), "{}", report.text);
    }
}

#[test]
fn a_missing_syncthreads() {
    let ptx = |sync: &str, mark: &str| {
        kernel(
            0,
            &format!(
                "    .shared .align 4 .b8 s[256];
    mov.u32 %r1, s;
    mad.lo.u32 %r2, %r0, 4, %r1;
    sub.u32 %r3, 63, %r0;
    mad.lo.u32 %r3, %r3, 4, %r1;
    st.shared.u32 [%r2], %r0; {mark}
    {sync}
    ld.shared.u32 %r4, [%r3];"
            ),
        )
    };
    let bad = ptx("", HERE);
    let ran = run(&bad, "test", 64, &[]);
    // Warp 0 has read what warp 1 writes only now: lane 0 of warp 1 first.
    caught(&ran, &bad, "Race: ", "32,0,0", Fault::LaunchFailed);
    run(&ptx("bar.sync 0;", HERE), "test", 64, &[]).silent();
}

#[test]
fn a_missing_wait_group() {
    let ptx = |wait: &str| {
        kernel(
            2,
            &format!(
                "    .shared .align 16 .b8 s[512];
    mov.u32 %r1, s;
    mad.lo.u32 %r2, %r0, 16, %r1;
    mul.wide.u32 %rd3, %r0, 16;
    add.s64 %rd3, %rd1, %rd3;
    cp.async.ca.shared.global [%r2], [%rd3], 16;
    cp.async.commit_group;
    {wait}
    bar.sync 0;
    ld.shared.u32 %r3, [%r2+4]; {HERE}
    cp.async.wait_all;
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd3, %rd2, %rd3;
    st.global.u32 [%rd3], %r3;"
            ),
        )
    };
    let data: Vec<u32> = (0..128).collect();
    let args = [words(&data), Arg::Out(128)];
    let bad = ptx("");
    caught(&run(&bad, "test", 32, &args), &bad, "Race: ", "0,0,0", Fault::LaunchFailed);
    let ran = run(&ptx("cp.async.wait_group 0;"), "test", 32, &args).silent();
    assert_eq!(ran.words(1), (0..32).map(|i| 4 * i + 1).collect::<Vec<u32>>());
}

#[test]
fn a_barrier_in_a_divergent_branch() {
    let ptx = |limit: u32| {
        kernel(
            0,
            &format!(
                "    setp.ge.u32 %p1, %r0, {limit};
    @%p1 bra OTHER;
    bar.sync 0; {HERE}
    bra DONE;
OTHER:
    bar.sync 1;
DONE:"
            ),
        )
    };
    let bad = ptx(16);
    let ran = run(&bad, "test", 32, &[]);
    caught(&ran, &bad, "Barrier: ", "0,0,0", Fault::LaunchFailed);
    run(&ptx(32), "test", 32, &[]).silent();
}

#[test]
fn barriers_that_wait_for_too_many() {
    // Warps 0 and 1 wait for 96 threads; warp 2 goes to another barrier, where it waits for 64.
    let ptx = |count: u32, other: &str| {
        kernel(
            0,
            &format!(
                "    setp.ge.u32 %p1, %r0, 64;
    @%p1 bra OTHER;
    bar.sync 1, {count}; {HERE}
    bra DONE;
OTHER:
    {other}
DONE:"
            ),
        )
    };
    let bad = ptx(96, "bar.sync 2, 64;");
    let ran = run(&bad, "test", 96, &[]);
    let report = caught(&ran, &bad, "Deadlock: ", "0,0,0", Fault::LaunchFailed);
    for waiting in ["warp 0 ", "warp 1 ", "warp 2 ", "at barrier 1", "at barrier 2", "bar.sync 2, 64"] {
        assert!(report.text.contains(waiting), "{waiting} is not in\n{}", report.text);
    }
    run(&ptx(64, "bar.sync 2, 32;"), "test", 96, &[]).silent();
    run(&ptx(96, "bar.sync 1, 96;"), "test", 96, &[]).silent();
}

#[test]
fn a_shuffle_with_a_mask_that_leaves_lanes_out() {
    let ptx = |mask: &str| {
        kernel(
            1,
            &format!(
                "{OWN}    shfl.sync.bfly.b32 %r1, %r0, 1, 31, {mask}; {HERE}\n    st.global.u32 [%rd2], %r1;"
            ),
        )
    };
    let bad = ptx("0x0000ffff");
    let ran = run(&bad, "test", 32, &[Arg::Out(128)]);
    caught(&ran, &bad, "Barrier: ", "16,0,0", Fault::LaunchFailed);
    let ran = run(&ptx("0xffffffff"), "test", 32, &[Arg::Out(128)]).silent();
    assert_eq!(ran.words(0), (0..32).map(|i| i ^ 1).collect::<Vec<u32>>());
}

/// Shared rows 0 and 1 of 32 words; only row 0 was written. `%r3` is the pad row's word, `%f1` the other.
fn padded(rest: &str) -> String {
    kernel(
        1,
        &format!(
            "{OWN}    .shared .align 4 .b8 s[256];
    mov.u32 %r1, s;
    mad.lo.u32 %r2, %r0, 4, %r1;
    cvt.rn.f32.u32 %f1, %r0;
    st.shared.f32 [%r2], %f1;
    bar.sync 0;
    ld.shared.f32 %f1, [%r2];
    ld.shared.f32 %f2, [%r2+128];
{rest}"
        ),
    )
}

#[test]
fn an_undefined_pad_row_in_a_maximum() {
    // The maximum decides a branch.
    let branch = padded(&format!(
        "    max.f32 %f3, %f1, %f2;\n    setp.gt.f32 %p1, %f3, 0f40000000;\n    @%p1 bra DONE; {HERE}\n    st.global.f32 [%rd2], %f1;\nDONE:"
    ));
    let ran = run(&branch, "test", 32, &[Arg::Out(128)]);
    caught(&ran, &branch, "Undefined value used as ", "0,0,0", Fault::LaunchFailed);
    // The maximum is stored: nothing is decided until the host reads it.
    let stored = padded("    max.f32 %f3, %f1, %f2;\n    st.global.f32 [%rd2], %f3;");
    let mut ran = run(&stored, "test", 32, &[Arg::Out(128)]).silent();
    let mut host = [0; 128];
    ran.device.read(ran.addresses[0], &mut host).unwrap();
    let found = ran.found("Undefined bytes copied to the host: 128 of 128");
    assert!(found.device.reports.all()[0].text.contains("the first is byte 0 of allocation"));
}

#[test]
fn an_undefined_pad_row_masked_by_a_select() {
    let masked = padded(
        "    setp.lt.u32 %p1, %r0, 99;
    selp.f32 %f2, 0fFF800000, %f2, %p1;
    max.f32 %f3, %f1, %f2;
    setp.gt.f32 %p2, %f3, 0f40000000;
    @%p2 bra DONE;
    st.global.f32 [%rd2], %f3;
DONE:",
    );
    let mut ran = run(&masked, "test", 32, &[words(&[7; 32])]).silent();
    let mut host = [0; 128];
    ran.device.read(ran.addresses[0], &mut host).unwrap();
    let ran = ran.silent();
    let expected: Vec<u32> = (0..32u32).map(|i| if i <= 2 { (i as f32).to_bits() } else { 7 }).collect();
    assert_eq!(ran.words(0), expected);
}

#[test]
fn an_undefined_address() {
    let body = |set: &str| {
        format!("    {set}\n    add.s64 %rd4, %rd1, %rd3;\n    st.global.u32 [%rd4], %r0; {HERE}")
    };
    let bad = kernel(1, &body(""));
    let ran = run(&bad, "test", 1, &[words(&[0; 4])]);
    caught(&ran, &bad, "Undefined value used as ", "0,0,0", Fault::LaunchFailed);
    run(&kernel(1, &body("mov.u64 %rd3, 4;")), "test", 1, &[words(&[0; 4])]).silent();
}

#[test]
fn a_trap() {
    let ptx = |limit: u32| kernel(0, &format!("    setp.ge.u32 %p1, %r0, {limit};\n    @%p1 trap; {HERE}"));
    let bad = ptx(40);
    let ran = run(&bad, "test", 64, &[]);
    caught(&ran, &bad, "Invalid state: the kernel executed trap", "40,0,0", Fault::LaunchFailed);
    run(&ptx(64), "test", 64, &[]).silent();
}

#[test]
fn an_assertion() {
    let ptx = |limit: u32| {
        format!(
            ".version 8.0
.target sm_80
.address_size 64
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.global .align 1 .b8 said[10] = {{120, 32, 60, 32, 108, 105, 109, 105, 116, 0}};
.global .align 1 .b8 where[5] = {{97, 46, 99, 117, 0}};
.global .align 1 .b8 func[5] = {{116, 101, 115, 116, 0}};
.visible .entry test()
{{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<8>;
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p1, %r0, {limit};
    @%p1 bra DONE;
    mov.u64 %rd1, said;
    cvta.global.u64 %rd1, %rd1;
    mov.u64 %rd2, where;
    cvta.global.u64 %rd2, %rd2;
    mov.u64 %rd3, func;
    cvta.global.u64 %rd3, %rd3;
    mov.u64 %rd4, 1;
    mov.u32 %r1, 57;
    {{
    .param .b64 q0;
    st.param.b64 [q0], %rd1;
    .param .b64 q1;
    st.param.b64 [q1], %rd2;
    .param .b32 q2;
    st.param.b32 [q2], %r1;
    .param .b64 q3;
    st.param.b64 [q3], %rd3;
    .param .b64 q4;
    st.param.b64 [q4], %rd4;
    call.uni __assertfail, (q0, q1, q2, q3, q4); {HERE}
    }}
DONE:
    ret;
}}
"
        )
    };
    let bad = ptx(33);
    let ran = run(&bad, "test", 64, &[]);
    let report =
        caught(&ran, &bad, "Invalid state: an assertion of the kernel failed", "33,0,0", Fault::Assert);
    assert!(report.text.contains("a.cu:57: test: Assertion `x < limit` failed."), "{}", report.text);
    run(&ptx(64), "test", 64, &[]).silent();
}

#[test]
fn a_runaway_loop() {
    let ptx = |rounds: &str| {
        kernel(
            0,
            &format!(
                "    mov.u32 %r1, 0;\nLOOP:\n    add.u32 %r1, %r1, 1; {HERE}\n    setp.ne.u32 %p1, %r1, {rounds};\n    @%p1 bra LOOP;"
            ),
        )
    };
    let budget = config(&[("EMU_BUDGET", "100000")]);
    let bad = ptx("0");
    let ran = run_with(&bad, "test", [1; 3], [32, 1, 1], 0, &[], budget.clone());
    let report = &ran.device.reports.all()[0];
    assert!(report.text.starts_with("========= Deadlock: "), "{}", report.text);
    // Anywhere in the loop.
    assert!((marked(&bad)..marked(&bad) + 3).contains(&report.line), "{}", report.text);
    assert_eq!(ran.device.fault, Some(Fault::Timeout));
    run_with(&ptx("20000"), "test", [1; 3], [32, 1, 1], 0, &[], budget).silent();
}

#[test]
fn a_lock_between_blocks() {
    // Each block takes the lock, adds to a plain word, and lets it go.
    let body = "    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra DONE;
TAKE:
    atom.global.cas.b32 %r1, [%rd1], 0, 1;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra TAKE;
    membar.gl;
    ld.global.u32 %r2, [%rd1+64];
    add.u32 %r2, %r2, 1;
    st.global.u32 [%rd1+64], %r2;
    membar.gl;
    atom.global.exch.b32 %r1, [%rd1], 0;
DONE:";
    for order in ["forward", "reverse"] {
        let config = config(&[("EMU_CHECKS", "global=error"), ("EMU_ORDER", order)]);
        let ran =
            run_with(&kernel(1, body), "test", [8, 1, 1], [32, 1, 1], 0, &[words(&[0; 32])], config).silent();
        assert_eq!(ran.words(0)[16], 8);
    }
}
