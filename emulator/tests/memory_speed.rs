//! Time of one warp instruction on memory, printed: `cargo test -p emulator --test memory_speed -- --ignored --nocapture`.

mod common;

use common::{Arg, config, kernel, run_with, words};

/// Instructions in a loop's body and turns of the loop.
const COPIES: usize = 16;
const TURNS: usize = 20_000;

/// Seconds this thread has run: the machine may be busy with other things.
fn processor_time() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() * 1e-9
}

fn nanoseconds(body: &str, settings: &[(&str, &str)]) -> f64 {
    let setup = ".shared .align 16 .b8 s[8192]; .local .align 16 .b8 l[16]; mov.u32 %r1, s; mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd1, %rd10; mul.wide.u32 %rd12, %r0, 16; add.s64 %rd13, %rd1, %rd12; add.s64 %rd14, %rd2, %rd10; add.s64 %rd15, %rd2, %rd12;\n\
        shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; shl.b32 %r4, %r0, 4; add.s32 %r5, %r1, %r4; mul.wide.u32 %rd16, %r0, 132; add.s64 %rd17, %rd1, %rd16; mul.lo.u32 %r6, %r0, 132; add.s32 %r6, %r6, %r1;\n\
        st.shared.u32 [%r3], %r0; st.shared.v4.u32 [%r5], {%r0, %r0, %r0, %r0}; mov.u32 %r20, %r0; mov.u32 %r21, %r0; mov.u32 %r22, %r0; mov.u32 %r23, %r0; st.shared.u32 [%r6], %r0; mov.u32 %r100, 0;\n";
    let time = |copies: usize| {
        let body = format!(
            "{setup}bar.warp.sync -1;\nloop:\n{} add.u32 %r100, %r100, 1; setp.lt.u32 %p1, %r100, {TURNS}; @%p1 bra loop;",
            body.repeat(copies)
        );
        let ptx = kernel(2, &body);
        let arguments = [words(&[1; 4096]), Arg::Out(4096)];
        (0..3)
            .map(|_| {
                let start = processor_time();
                let ran = run_with(&ptx, "test", [1; 3], [32, 1, 1], 0, &arguments, config(settings));
                assert_eq!(ran.device.fault, None);
                processor_time() - start
            })
            .fold(f64::INFINITY, f64::min)
    };
    (time(COPIES) - time(0)) * 1e9 / (COPIES * TURNS) as f64
}

#[test]
#[ignore = "prints times"]
fn times_of_memory_instructions() {
    let cases = [
        ("mov", "mov.u32 %r20, %r21;"),
        ("add", "add.s32 %r20, %r21, %r22;"),
        ("ld.global.u32 coalesced", "ld.global.u32 %r20, [%rd11];"),
        ("ld.global.v4.u32 coalesced", "ld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%rd13];"),
        ("ld.global.u16 coalesced", "ld.global.u16 %r20, [%rd11];"),
        ("ld.global.u32 strided", "ld.global.u32 %r20, [%rd17];"),
        ("ld.global.u32 uniform", "ld.global.u32 %r20, [%rd1];"),
        ("st.global.u32 coalesced", "st.global.u32 [%rd14], %r20;"),
        ("st.global.v4.u32 coalesced", "st.global.v4.u32 [%rd15], {%r20, %r21, %r22, %r23};"),
        ("ld.shared.u32", "ld.shared.u32 %r20, [%r3];"),
        ("ld.shared.v4.u32", "ld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r5];"),
        ("ld.shared.u32 strided", "ld.shared.u32 %r20, [%r6];"),
        ("st.shared.u32", "st.shared.u32 [%r3], %r20;"),
        ("st.shared.v4.u32", "st.shared.v4.u32 [%r5], {%r20, %r21, %r22, %r23};"),
        ("ld.param.u64", "ld.param.u64 %rd20, [p0];"),
        ("st.local.u32", "st.local.u32 [l], %r20;"),
        ("cp.async 16 + wait", "cp.async.cg.shared.global [%r5], [%rd13], 16; cp.async.wait_all;"),
        ("red.shared.add", "red.shared.add.u32 [%r3], %r20;"),
    ];
    let off = [("EMU_CHECKS", "all=off"), ("EMU_COUNT", "0")];
    println!("{:32} {:>9} {:>9} {:>9}", "ns a warp instruction", "unchecked", "counted", "checked");
    for (name, body) in cases {
        let times = [nanoseconds(body, &off), nanoseconds(body, &off[..1]), nanoseconds(body, &[])];
        println!("{name:32} {:9.1} {:9.1} {:9.1}", times[0], times[1], times[2]);
    }
}
