//! Moves, packing, addresses, special registers and byte permutation.
#![allow(clippy::format_push_string, reason = "tests say it the short way")]

mod common;
#[path = "common/forms.rs"]
mod forms;

use common::{Arg, Ran, kernel, run, run_with, words};
use forms::Kind::{D, H, P, W};
use forms::{check, edges, few, kind};

#[test]
fn copies() {
    for (types, bits) in [
        (&["b16", "u16", "s16", "f16", "bf16"][..], 16),
        (&["b32", "u32", "s32", "f32"], 32),
        (&["b64", "u64", "s64", "f64"], 64),
    ] {
        let (k, v) = (kind(bits), edges(bits));
        for ty in types {
            check(&format!("mov.{ty} $d, $a;"), &[k], &[k], &[&v], <[u64]>::to_vec);
        }
    }
    check("mov.pred $d, $a;", &[P], &[P], &[&[0, 1]], <[u64]>::to_vec);
    check("mov.pred $d, 0;", &[P], &[P], &[&[0, 1]], |_| vec![0]);
    let any = [0];
    check("mov.u32 $d, -2;", &[W], &[W], &[&any], |_| vec![0xffff_fffe]);
    check("mov.u64 $d, -2;", &[D], &[W], &[&any], |_| vec![u64::MAX - 1]);
    check("mov.b16 $d, 0x3C00;", &[H], &[W], &[&any], |_| vec![0x3c00]);
    check("mov.f32 $d, 0f3FC00000;", &[W], &[W], &[&any], |_| vec![0x3fc0_0000]);
    check("mov.f64 $d, 0d3FF8000000000000;", &[D], &[W], &[&any], |_| vec![0x3ff8 << 48]);
    check("mov.u32 $d, WARP_SZ;", &[W], &[W], &[&any], |_| vec![32]);
}

#[test]
fn packing_and_unpacking() {
    let (h, w, d) = (edges(16), edges(32), edges(64));
    check("mov.b32 $d, {$a, $b};", &[W], &[H, H], &[&h, &h], |s| vec![s[0] + s[1] * 0x1_0000]);
    check("mov.b32 {$d, $e}, $a;", &[H, H], &[W], &[&w], |s| vec![s[0] % 0x1_0000, s[0] / 0x1_0000]);
    check("mov.b32 {_, $d}, $a;", &[H], &[W], &[&w], |s| vec![s[0] / 0x1_0000]);
    check("mov.b32 {$d, _}, $a;", &[H], &[W], &[&w], |s| vec![s[0] % 0x1_0000]);
    check("mov.b64 $d, {$a, $b};", &[D], &[W, W], &[&w, &w], |s| vec![s[0] + (s[1] << 32)]);
    check("mov.b64 {$d, $e}, $a;", &[W, W], &[D], &[&d], |s| vec![s[0] & 0xffff_ffff, s[0] >> 32]);
    check("mov.b64 {_, $d}, $a;", &[W], &[D], &[&d], |s| vec![s[0] >> 32]);
    check("mov.b64 {$d, _}, $a;", &[W], &[D], &[&d], |s| vec![s[0] & 0xffff_ffff]);
    let v = few(16);
    check("mov.b64 $d, {$a, $b, $c, $f};", &[D], &[H; 4], &[&v, &v, &v, &v], |s| {
        vec![s[0] | s[1] << 16 | s[2] << 32 | s[3] << 48]
    });
    check("mov.b64 {%h0, $d, %h1, $e}, $a;", &[H, H], &[D], &[&d], |s| vec![s[0] >> 16 & 0xffff, s[0] >> 48]);
    check("mov.b64 {$d, _, $e, _}, $a;", &[H, H], &[D], &[&d], |s| vec![s[0] & 0xffff, s[0] >> 32 & 0xffff]);
    // Bytes, in registers whose other bits do not matter.
    let b = [0, 1, 0x7f, 0x80, 0xff, 0x1234];
    check("mov.b32 $d, {$a, $b, $c, $f};", &[W], &[H; 4], &[&b, &b, &b, &b], |s| {
        vec![s.iter().rev().fold(0, |word, byte| word * 256 + byte % 256)]
    });
    check("mov.b32 {%h0, $d, %h1, $e}, $a;", &[H, H], &[W], &[&w], |s| vec![s[0] >> 8 & 0xff, s[0] >> 24]);
    check("mov.b16 $d, {$a, $b};", &[H], &[H, H], &[&b, &b], |s| vec![s[0] % 256 + s[1] % 256 * 256]);
    check("mov.b16 {$d, $e}, $a;", &[H, H], &[H], &[&h], |s| vec![s[0] % 256, s[0] / 256]);
    // Literals inside.
    check("mov.b32 $d, {$a, 0x3C00};", &[W], &[H], &[&h], |s| vec![s[0] | 0x3c00_0000]);
    check("mov.b64 $d, {-1, $a};", &[D], &[W], &[&w], |s| vec![0xffff_ffff | s[0] << 32]);
}

#[test]
fn byte_permutation() {
    let v = [0x7f80_01ff, 0x3322_1100, 0x80c0_40e0];
    let bytes = |s: &[u64]| -> Vec<u64> { (0..8).map(|n| s[n / 4] >> (8 * (n % 4)) & 0xff).collect() };
    let word = |list: [u64; 4]| list.iter().rev().fold(0, |word, byte| word << 8 | byte);
    let mut selectors: Vec<u64> = (0..16).map(|n| n * 0x1111).collect();
    selectors.extend([0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0x6420, 0x7531, 0xfedc, 0x98ba, 0xffff_0321]);
    check("prmt.b32 $d, $a, $b, $c;", &[W], &[W; 3], &[&v, &v, &selectors], |s| {
        let bytes = bytes(s);
        vec![word([0, 1, 2, 3].map(|n| {
            let nibble = s[2] >> (4 * n) & 15;
            let byte = bytes[nibble as usize % 8];
            if nibble < 8 { byte } else { byte / 128 * 255 }
        }))]
    });
    // The bytes that each mode takes, lowest first.
    let modes: [(&str, [[usize; 4]; 4]); 6] = [
        ("f4e", [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]),
        ("b4e", [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]]),
        ("rc8", [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]]),
        ("ecl", [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]]),
        ("ecr", [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]),
        ("rc16", [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]]),
    ];
    for (mode, table) in modes {
        check(
            &format!("prmt.b32.{mode} $d, $a, $b, $c;"),
            &[W],
            &[W; 3],
            &[&v, &v, &[0, 1, 2, 3, 4, 7, 0xffff_fffe]],
            |s| {
                let bytes = bytes(s);
                vec![word(table[s[2] as usize % 4].map(|n| bytes[n]))]
            },
        );
    }
}

/// Runs a body that leaves 64-bit results in `%rd20`, `%rd21`, ...; gives them for each thread.
fn results(head: &str, body: &str, count: usize, grid: [u32; 3], block: [u32; 3]) -> Vec<Vec<u64>> {
    let threads = (grid.iter().product::<u32>() * block.iter().product::<u32>()) as usize;
    let mut stores = String::new();
    for n in 0..count {
        stores += &format!("st.global.u64 [%rd11+{}], %rd{};\n", 8 * n, 20 + n);
    }
    let position = format!(
        "mov.u32 %r200, %ctaid.z; mov.u32 %r201, %nctaid.y; mov.u32 %r202, %ctaid.y; mad.lo.u32 %r203, %r200, %r201, %r202;\n\
         mov.u32 %r201, %nctaid.x; mov.u32 %r202, %ctaid.x; mad.lo.u32 %r203, %r203, %r201, %r202;\n\
         mov.u32 %r201, %ntid.z; mov.u32 %r202, %tid.z; mad.lo.u32 %r203, %r203, %r201, %r202;\n\
         mov.u32 %r201, %ntid.y; mov.u32 %r202, %tid.y; mad.lo.u32 %r203, %r203, %r201, %r202;\n\
         mov.u32 %r201, %ntid.x; mov.u32 %r202, %tid.x; mad.lo.u32 %r203, %r203, %r201, %r202;\n\
         mul.wide.u32 %rd10, %r203, {}; add.s64 %rd11, %rd1, %rd10;\n",
        8 * count
    );
    let ptx =
        kernel(1, &format!("{position}{body}\n{stores}")).replace(".visible", &format!("{head}\n.visible"));
    let args = [Arg::Out(threads * count * 8)];
    let ran = run_with(&ptx, "test", grid, block, 0, &args, cuda::config::Config::default()).silent();
    ran.doubles(0).chunks(count).map(<[u64]>::to_vec).collect()
}

#[test]
fn special_registers() {
    let names = [
        "%tid.x",
        "%tid.y",
        "%tid.z",
        "%ntid.x",
        "%ntid.y",
        "%ntid.z",
        "%ctaid.x",
        "%ctaid.y",
        "%ctaid.z",
        "%nctaid.x",
        "%nctaid.y",
        "%nctaid.z",
        "%laneid",
        "%warpid",
        "%nwarpid",
        "%lanemask_eq",
        "%lanemask_lt",
        "%lanemask_le",
        "%lanemask_gt",
        "%lanemask_ge",
    ];
    let mut body = String::new();
    for (n, name) in names.iter().enumerate() {
        body += &format!("mov.u32 %r1, {name}; cvt.u64.u32 %rd{}, %r1;\n", 20 + n);
    }
    let (grid, block) = ([3, 2, 2], [5, 4, 3]);
    let threads = results("", &body, names.len(), grid, block);
    for (index, values) in threads.iter().enumerate() {
        let index = index as u64;
        let (thread, group) = (index % 60, index / 60);
        let lane = thread % 32;
        let below = (1 << lane) - 1;
        let want = [
            thread % 5,
            thread / 5 % 4,
            thread / 20,
            5,
            4,
            3,
            group % 3,
            group / 3 % 2,
            group / 6,
            3,
            2,
            2,
            lane,
            thread / 32,
            2,
            1 << lane,
            below,
            below | 1 << lane,
            0xffff_ffff & !(below | 1 << lane),
            0xffff_ffff & !below,
        ];
        assert_eq!(values[..], want, "thread {index}");
    }
    // A whole 64-bit register, and 16 bits of one.
    let threads = results(
        "",
        "mov.u64 %rd20, %gridid; mov.u16 %h1, %tid.x; cvt.u64.u16 %rd21, %h1;",
        2,
        [1, 1, 1],
        [40, 1, 1],
    );
    assert!(threads.iter().enumerate().all(|(n, v)| v[0] == threads[0][0] && v[1] == n as u64));
}

#[test]
fn clocks_run_forwards() {
    let body = "mov.u32 %r1, %clock; mov.u64 %rd21, %clock64; mov.u32 %r2, %clock; sub.u32 %r3, %r2, %r1; cvt.u64.u32 %rd20, %r3;\n\
        mov.u64 %rd22, %globaltimer; mov.u32 %r4, %globaltimer_lo; mov.u32 %r5, %globaltimer_hi; mov.b64 %rd23, {%r4, %r5};\n\
        mov.u64 %rd24, %clock64; mov.u32 %r6, %clock_hi; cvt.u64.u32 %rd25, %r6;";
    for values in results("", body, 6, [2, 1, 1], [64, 1, 1]) {
        assert!(values[0] > 0 && values[0] < 100, "{values:?}");
        assert!(values[21 - 20] < values[24 - 20]);
        assert!(values[2] < values[3] && values[3] < values[2] + 1000, "{values:?}");
        assert_eq!(values[5], 0);
    }
    // A loop that waits for time to pass ends.
    let body = "mov.u64 %rd12, %globaltimer; L: mov.u64 %rd20, %globaltimer; sub.u64 %rd20, %rd20, %rd12;\n\
        setp.lt.u64 %p1, %rd20, 5000; @%p1 bra L;";
    assert!(results("", body, 1, [1, 1, 1], [32, 1, 1]).iter().all(|v| v[0] >= 5000));
}

#[test]
fn addresses_of_variables() {
    let head =
        ".global .align 8 .b8 table[64] = {1, 2, 3, 4};\n.const .align 4 .u32 limits[4] = {10, 20, 30, 40};";
    let body = "\
        .shared .align 8 .b8 first[24]; .shared .align 8 .b8 second[8]; .local .align 8 .b8 mine[16];\n\
        mov.u64 %rd30, table; mov.u64 %rd31, table+8; sub.u64 %rd20, %rd31, %rd30;\n\
        cvta.global.u64 %rd32, %rd30; sub.u64 %rd21, %rd32, %rd30; ld.u8 %r1, [%rd32+3]; cvt.u64.u32 %rd22, %r1;\n\
        mov.u32 %r2, first; mov.u32 %r3, second; sub.u32 %r4, %r3, %r2; cvt.u64.u32 %rd23, %r4;\n\
        mov.u64 %rd33, second; cvta.shared.u64 %rd34, %rd33; cvta.to.shared.u64 %rd35, %rd34; sub.u64 %rd24, %rd35, %rd33;\n\
        cvt.u32.u64 %r5, %rd34; sub.u32 %r6, %r5, %r3; cvt.u64.u32 %rd25, %r6;\n\
        mov.u32 %r7, 77; setp.eq.u32 %p1, %r0, 0; @%p1 st.u32 [%rd34], %r7; bar.sync 0; ld.shared.u32 %r8, [%r3]; cvt.u64.u32 %rd26, %r8;\n\
        mov.u64 %rd36, mine; cvta.local.u64 %rd37, %rd36; add.u32 %r9, %r0, 5; st.u32 [%rd37+4], %r9; ld.local.u32 %r10, [%rd36+4];\n\
        cvt.u64.u32 %rd27, %r10; cvta.to.local.u64 %rd38, %rd37; ld.local.u32 %r11, [%rd38+4]; cvt.u64.u32 %rd28, %r11;\n\
        mov.u64 %rd39, limits; ld.const.u32 %r12, [%rd39+8]; cvta.const.u64 %rd40, %rd39; ld.u32 %r13, [%rd40+12];\n\
        cvta.to.const.u64 %rd41, %rd40; ld.const.u32 %r14, [%rd41]; add.u32 %r12, %r12, %r13; add.u32 %r12, %r12, %r14; cvt.u64.u32 %rd29, %r12;";
    for (thread, values) in results(head, body, 10, [1, 1, 1], [48, 1, 1]).iter().enumerate() {
        let own = thread as u64 + 5;
        assert_eq!(values[..], [8, 0, 4, 24, 0, 0, 77, own, own, 30 + 40 + 10], "thread {thread}");
    }
    // An index below the start of a shared variable, made good after the conversion.
    let body = ".shared .align 8 .b8 only[32]; mov.u64 %rd30, only; cvta.shared.u64 %rd31, %rd30; add.s64 %rd31, %rd31, -16;\n\
        cvta.to.shared.u64 %rd32, %rd31; mov.u64 %rd33, 9; st.shared.u64 [%rd32+16], %rd33; ld.shared.u64 %rd20, [only];";
    assert!(results("", body, 1, [1, 1, 1], [1, 1, 1]).iter().all(|v| v[0] == 9));
    // Kernel parameters have an address.
    let body = "mov.b64 %rd30, p0; ld.param.u64 %rd31, [%rd30]; sub.u64 %rd20, %rd31, %rd1;\n\
        cvta.param.u64 %rd32, %rd30; ld.u64 %rd33, [%rd32]; sub.u64 %rd21, %rd33, %rd1;";
    assert!(results("", body, 2, [1, 1, 1], [32, 1, 1]).iter().all(|v| v[..] == [0, 0]));
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    for text in [
        "mov.u32 %r1, %rd1",
        "mov.u64 %rd1, %r1",
        "mov.b8 %h1, %h2",
        "mov.u32.foo %r1, %r2",
        "mov.u32 %r1",
        "mov.u32 %r1, %envreg3",
        "mov.u32 %r1, %pm0",
        "mov.u32 %r1, %clock64",
        "mov.u64 %rd1, %clock",
        "mov.u32 %r1, nothing",
        "mov.b32 %r1, {%h1, %h2, %h3}",
        "mov.b64 {%r1, %r2}, %r3",
        "mov.b32 {%h1, %h2}, {%h3, %h4}",
        "mov.pred %p1, %r1",
        "cvta.u64 %rd1, %rd2",
        "cvta.shared.u32 %r1, %r2",
        "cvta.to.shared.s64 %rd1, %rd2",
        "prmt.u32 %r1, %r2, %r3, %r4",
        "prmt.b32.f5e %r1, %r2, %r3, %r4",
    ] {
        forms::refused(text);
    }
}

// ---- undefined values: %r90, %rd90, %h60 and %p30 are never written

fn decide(setup: &str, value: &str) -> Ran {
    let width = if value.starts_with("%h") { 16 } else { 32 };
    let body = format!(
        "mov.b16 %h1, 3; mov.u32 %r1, 4; {setup} setp.eq.u{width} %p31, {value}, 77; @%p31 bra END; END:"
    );
    run(&kernel(0, &body), "test", 32, &[])
}

#[test]
fn undefined_values_travel_without_being_reported() {
    let body = "mov.u32 %r2, %r90; mov.b64 %rd2, {%r2, %r90}; mov.pred %p2, %p30; mov.b32 {%h2, %h3}, %r2; prmt.b32 %r3, %r2, %r2, 0x3210;";
    run(&kernel(0, body), "test", 32, &[]).silent();
}

#[test]
fn packing_keeps_what_is_known_of_each_half() {
    decide("mov.b32 %r2, {%h1, %h60}; mov.b32 {%h2, %h3}, %r2;", "%h2").silent();
    decide("mov.b32 %r2, {%h1, %h60}; mov.b32 {%h2, %h3}, %r2;", "%h3").found("Undefined");
    decide("mov.b32 %r2, {%h60, %h1}; mov.b32 %r3, %r2; mov.b32 {_, %h3}, %r3;", "%h3").silent();
    decide("mov.b64 %rd2, {%r1, %r90}; mov.b64 %rd3, %rd2; mov.b64 {%r2, %r3}, %rd3;", "%r2").silent();
    decide("mov.b64 %rd2, {%r1, %r90}; mov.b64 %rd3, %rd2; mov.b64 {%r2, %r3}, %rd3;", "%r3")
        .found("Undefined");
    decide("mov.b64 %rd2, {%h1, %h1, %h60, %h1}; mov.b64 {%r2, %r3}, %rd2;", "%r2").silent();
    decide("mov.b64 %rd2, {%h1, %h1, %h60, %h1}; mov.b64 {%r2, %r3}, %rd2;", "%r3").found("Undefined");
    decide("mov.b64 %rd2, {%r1, %r90}; mov.b64 {%h2, %h3, %h4, %h5}, %rd2;", "%h3").silent();
    decide("mov.b64 %rd2, {%r1, %r90}; mov.b64 {%h2, %h3, %h4, %h5}, %rd2;", "%h4").found("Undefined");
}

#[test]
fn permutation_takes_only_the_bytes_it_names() {
    let half = "mov.b32 %r2, {%h1, %h60};";
    decide(&format!("{half} prmt.b32 %r3, %r2, %r1, 0x5410;"), "%r3").silent();
    decide(&format!("{half} prmt.b32 %r3, %r2, %r1, 0x5430;"), "%r3").found("Undefined");
    decide(&format!("{half} prmt.b32 %r3, %r2, %r1, 0x5410; prmt.b32 %r4, %r90, %r3, 0x7654;"), "%r4")
        .silent();
    decide(&format!("{half} prmt.b32 %r3, %r2, %r1, 0x7632; mov.b32 {{%h2, %h3}}, %r3;"), "%h3").silent();
    decide(&format!("{half} prmt.b32 %r3, %r2, %r1, 0x7632; mov.b32 {{%h2, %h3}}, %r3;"), "%h2")
        .found("Undefined");
    decide("prmt.b32 %r3, %r1, %r1, %r90;", "%r3").found("Undefined");
    decide(&format!("{half} prmt.b32.rc16 %r3, %r2, %r90, 0;"), "%r3").silent();
}

#[test]
fn a_guard_of_unknown_value_makes_the_result_unknown() {
    decide("mov.u32 %r2, 5; @%p30 mov.u32 %r2, 5;", "%r2").found("Undefined");
    let ran = decide("setp.lt.u32 %p1, %r0, 8; @%p1 mov.u32 %r2, 5;", "%r2").found("Undefined");
    assert!(ran.device.reports.all()[0].text.contains("lanes ffffff00"));
    let args = [words(&[0; 32])];
    let body = "mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd1, %rd10; setp.lt.u32 %p1, %r0, 8; @%p1 mov.u32 %r2, 5; @%p1 st.global.u32 [%rd11], %r2;";
    let ran = run(&kernel(1, body), "test", 32, &args).silent();
    assert_eq!(ran.words(0).iter().filter(|&&v| v == 5).count(), 8);
}
