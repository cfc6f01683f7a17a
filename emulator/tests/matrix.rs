//! ldmatrix, stmatrix and movmatrix: where every element goes, what is checked, and a small attention that needs them with mma.
#![allow(
    clippy::cloned_ref_to_slice_refs,
    clippy::format_collect,
    clippy::format_push_string,
    reason = "tests say it the short way"
)]

mod common;

use common::{Arg, Ran, halves, kernel, run, words};
use cuda::config::Config;

/// A number for each 16-bit element of shared memory, all different.
fn number(element: usize) -> u16 {
    (element as u16).wrapping_mul(40_503) ^ 0x5a5a
}

/// Bytes of shared memory in these tests.
const BYTES: usize = 4096;

/// The offset of the row that a lane gives: rows lie scattered, 16 bytes each.
fn row_offset(lane: usize) -> usize {
    (lane * 37 + 11) % 256 * 16
}

/// Element (row, column) of matrix `i`, as its number in shared memory.
fn element(i: usize, row: usize, column: usize) -> usize {
    row_offset(8 * i + row) / 2 + column
}

/// What thread `lane` has in half `h` of register `i` after ldmatrix: the manual's figure gives a thread the elements 2t and 2t+1 of row g.
fn held(i: usize, lane: usize, h: usize, transposed: bool) -> usize {
    let (g, t) = (lane / 4, lane % 4);
    if transposed { element(i, 2 * t + h, g) } else { element(i, g, 2 * t + h) }
}

/// Copies the first buffer to shared memory, leaves each lane's row address in `%r8` (32 bits) and `%rd8` (generic), and runs `body`.
fn with_shared(body: &str) -> String {
    let copy: String = (0..BYTES / 128)
        .map(|i| format!("    ld.global.u32 %r2, [%rd4+{0}];\n    st.shared.u32 [%r3+{0}], %r2;\n", i * 128))
        .collect();
    kernel(
        3,
        &format!(
            "    .shared .align 16 .b8 tile[{BYTES}];
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    add.s64 %rd6, %rd3, %rd3;
    mov.u32 %r4, tile;
    shl.b32 %r3, %r0, 2;
    add.u32 %r3, %r3, %r4;
{copy}    bar.sync 0;
    ld.param.u64 %rd7, [p2];
    add.s64 %rd7, %rd7, %rd3;
    ld.global.u32 %r8, [%rd7];
    add.u32 %r8, %r8, %r4;
    cvt.u64.u32 %rd9, %r8;
    cvta.shared.u64 %rd8, %rd9;
{body}"
        ),
    )
}

fn contents() -> Arg {
    halves(&(0..BYTES / 2).map(number).collect::<Vec<_>>())
}

fn offsets() -> Arg {
    words(&(0..32).map(|lane| row_offset(lane) as u32).collect::<Vec<_>>())
}

/// Bytes of buffer `i` that nobody has written, by 16 bits.
fn undefined(ran: &Ran, i: usize) -> Vec<bool> {
    let index = ran.device.memory.find(ran.addresses[i], ran.buffers[i].len() as u64).expect("the buffer");
    let shadow = &ran.device.memory.get(index).shadow;
    shadow[..ran.buffers[i].len()].chunks_exact(2).map(|w| w.iter().any(|&b| b != 0)).collect()
}

fn store_registers(count: usize) -> String {
    (0..count).map(|i| format!("    st.global.u32 [%rd5+{}], %r{};\n", 128 * i, 20 + i)).collect()
}

#[test]
fn every_position_of_every_matrix() {
    let spellings = [
        "ldmatrix.sync.aligned.m8n8.COUNT.trans.shared.b16",
        "ldmatrix.sync.aligned.COUNT.m8n8.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.COUNT.trans.shared::cta.b16",
        "ldmatrix.sync.aligned.m8n8.COUNT.trans.b16",
    ];
    for (n, spelling) in spellings.into_iter().enumerate() {
        for (count, list) in [(1, "{%r20}"), (2, "{%r20, %r21}"), (4, "{%r20, %r21, %r22, %r23}")] {
            for transposed in [false, true] {
                let name = spelling.replace("COUNT", &format!("x{count}"));
                let name = if transposed { name } else { name.replace(".trans", "") };
                // Without a state space the address is generic.
                let address = if n == 3 {
                    "%rd8"
                } else if n == 1 {
                    "%rd9"
                } else {
                    "%r8"
                };
                let ptx =
                    with_shared(&format!("    {name} {list}, [{address}];\n{}", store_registers(count)));
                let ran = run(&ptx, "test", 32, &[contents(), Arg::Out(128 * count), offsets()]).silent();
                for (at, value) in ran.halves(1).into_iter().enumerate() {
                    let (i, lane, h) = (at / 64, at % 64 / 2, at % 2);
                    assert_eq!(
                        value,
                        number(held(i, lane, h, transposed)),
                        "{name} r{i} lane {lane} half {h}"
                    );
                }
            }
        }
    }
    // An offset in the address, a single register without braces, and the address register as a destination.
    let ptx = with_shared(&format!(
        "    sub.u32 %r9, %r8, 48;\n    ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r20, [%r9+48];\n    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r21, %r8}}, [%r8];\n    mov.u32 %r22, %r8;\n{}",
        store_registers(3)
    ));
    let ran = run(&ptx, "test", 32, &[contents(), Arg::Out(384), offsets()]).silent();
    for (at, value) in ran.halves(1).into_iter().enumerate() {
        let (i, lane, h) = (at / 64, at % 64 / 2, at % 2);
        assert_eq!(value, number(held(i.saturating_sub(1), lane, h, false)));
    }
}

#[test]
fn stores_put_every_element_back() {
    for (count, list) in [(1, "{%r20}"), (2, "{%r20, %r21}"), (4, "{%r20, %r21, %r22, %r23}")] {
        for transposed in [false, true] {
            let trans = if transposed { ".trans" } else { "" };
            let load: String = (0..count)
                .map(|i| format!("    ld.global.u32 %r{}, [%rd4+{}];\n", 20 + i, 128 * i))
                .collect();
            let back: String = (0..BYTES / 128)
                .map(|i| {
                    format!(
                        "    ld.shared.u32 %r2, [%r3+{0}];\n    st.global.u32 [%rd5+{0}], %r2;\n",
                        i * 128
                    )
                })
                .collect();
            let ptx = with_shared(&format!(
                "{load}    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r8], {list};\n    bar.sync 0;\n{back}"
            ));
            let ran = run(&ptx, "test", 32, &[contents(), Arg::Out(BYTES), offsets()]).silent();
            let mut want: Vec<u16> = (0..BYTES / 2).map(number).collect();
            for at in 0..64 * count {
                // The registers were filled with the first elements of the buffer.
                want[held(at / 64, at % 64 / 2, at % 2, transposed)] = number(at);
            }
            assert_eq!(ran.halves(1), want, "x{count}{trans}");
        }
    }
}

#[test]
fn movmatrix_transposes_across_the_warp() {
    let body = "    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    ld.global.u32 %r5, [%rd1];
    movmatrix.sync.aligned.m8n8.trans.b16 %r6, %r5;
    st.global.u32 [%rd2], %r6;";
    let input: Vec<u16> = (0..64).map(number).collect();
    let ran = run(&kernel(2, body), "test", 32, &[halves(&input), Arg::Out(128)]).silent();
    let got = ran.halves(1);
    for row in 0..8 {
        for column in 0..8 {
            assert_eq!(got[8 * row + column], number(8 * column + row));
        }
    }
    // Lane 6 (row 1, columns 4 and 5) is undefined: column 1 of rows 4 and 5 is.
    let partly = body.replace("    ld.global", "    setp.ne.u32 %p1, %r0, 6;\n    @%p1 ld.global");
    let ran = run(&kernel(2, &partly), "test", 32, &[halves(&input), Arg::Out(128)]).silent();
    let want: Vec<bool> = (0..64).map(|i| i == 8 * 4 + 1 || i == 8 * 5 + 1).collect();
    assert_eq!(undefined(&ran, 1), want);
}

/// Shared memory of which only the first buffer's non-zero bytes are written, one byte a thread and step.
fn partly_written(body: &str) -> String {
    let mut copy = String::new();
    for i in 0..BYTES / 256 {
        copy += &format!(
            "    ld.global.u8 %r2, [%rd4+{0}];\n    setp.ne.u32 %p1, %r2, 0;\n    @%p1 st.shared.u8 [%r3+{0}], %r2;\n",
            i * 256
        );
    }
    kernel(
        3,
        &format!(
            "    .shared .align 16 .b8 tile[{BYTES}];
    cvt.u64.u32 %rd3, %r0;
    add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r4, tile;
    add.u32 %r3, %r0, %r4;
{copy}    bar.sync 0;
    setp.ge.u32 %p2, %r0, 32;
    @%p2 bra $END;
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd5, %rd2, %rd3;
    ld.param.u64 %rd7, [p2];
    add.s64 %rd7, %rd7, %rd3;
    ld.global.u32 %r8, [%rd7];
    add.u32 %r8, %r8, %r4;
{body}
$END:"
        ),
    )
}

#[test]
fn undefined_elements_arrive_where_they_belong() {
    // Every seventh byte is missing: it spoils the element it is half of.
    let missing = |byte: usize| byte % 7 == 3;
    let bytes: Vec<u8> = (0..BYTES).map(|b| if missing(b) { 0 } else { 1 + (b % 200) as u8 }).collect();
    for trans in ["", ".trans"] {
        let load = format!(
            "    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r8];\n"
        );
        let ptx = partly_written(&(load.clone() + &store_registers(4)));
        let ran = run(&ptx, "test", 256, &[Arg::Buffer(bytes.clone()), Arg::Out(512), offsets()]).silent();
        let place = |at: usize| held(at / 64, at % 64 / 2, at % 2, !trans.is_empty());
        let want: Vec<bool> =
            (0..256).map(|at| missing(2 * place(at)) || missing(2 * place(at) + 1)).collect();
        assert_eq!(undefined(&ran, 1), want, "{trans}");
        // And back: what stmatrix writes over is as undefined as the registers, whatever was there.
        let there = format!(
            "{load}    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [tile], {{%r20, %r21, %r22, %r23}};\n"
        );
        let rows = there.replace("[tile]", "[%r9]").replace(
            "    stmatrix",
            "    shl.b32 %r9, %r0, 4;\n    add.u32 %r9, %r9, %r4;\n    bar.warp.sync 0xffffffff;\n    stmatrix",
        );
        let back: String = (0..4)
            .map(|i| {
                format!("    ld.shared.u32 %r2, [%r10+{0}];\n    st.global.u32 [%rd5+{0}], %r2;\n", i * 128)
            })
            .collect();
        let ptx = partly_written(&format!(
            "{rows}    bar.warp.sync 0xffffffff;\n    shl.b32 %r10, %r0, 2;\n    add.u32 %r10, %r10, %r4;\n{back}"
        ));
        let ran = run(&ptx, "test", 256, &[Arg::Buffer(bytes.clone()), Arg::Out(512), offsets()]).silent();
        let source = |at: usize| element(at / 64, at % 64 / 8, at % 8);
        let want: Vec<bool> =
            (0..256).map(|at| missing(2 * source(at)) || missing(2 * source(at) + 1)).collect();
        assert_eq!(undefined(&ran, 1), want, "{trans}");
    }
}

#[test]
fn rows_outside_or_misaligned_are_reported_with_their_lane() {
    let load = |count: usize, registers: &str| {
        with_shared(&format!("    ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {registers}, [%r8];"))
    };
    let four = load(4, "{%r20, %r21, %r22, %r23}");
    let two = load(2, "{%r20, %r21}");
    let with = |lane: usize, offset: u32| {
        let mut list: Vec<u32> = (0..32).map(|lane| row_offset(lane) as u32).collect();
        list[lane] = offset;
        words(&list)
    };
    let last = BYTES as u32 - 16;
    for (lane, offset, kind, lanes) in [
        (9, BYTES as u32, "Invalid __shared__ read of size 16", "lanes 00000200"),
        (31, u32::MAX - 15, "Invalid", "lanes 80000000"),
        (17, 8, "Misaligned", "lanes 00020000"),
        (0, last + 2, "", "lanes 00000001"),
    ] {
        let ran = run(&four, "test", 32, &[contents(), Arg::Out(4), with(lane, offset)]).found(kind);
        let text = &ran.device.reports.all()[0].text;
        assert!(text.contains(lanes) && text.contains("ldmatrix.sync"), "{text}");
        assert!(ran.device.fault.is_some());
    }
    run(&four, "test", 32, &[contents(), Arg::Out(4), with(9, last)]).silent();
    // The addresses of lanes 16 to 31 do not count for two matrices.
    run(&two, "test", 32, &[contents(), Arg::Out(4), with(17, 8)]).silent();
    run(&two, "test", 32, &[contents(), Arg::Out(4), with(15, 8)]).found("Misaligned");
    // A store, an undefined address, a generic address that is not in shared memory.
    let store = four
        .replace("ldmatrix", "stmatrix")
        .replace("{%r20, %r21, %r22, %r23}, [%r8]", "[%r8], {%r0, %r0, %r0, %r0}");
    run(&store, "test", 32, &[contents(), Arg::Out(4), with(9, BYTES as u32)])
        .found("Invalid __shared__ write of size 16");
    run(&store, "test", 32, &[contents(), Arg::Out(4), with(9, last)]).silent();
    run(&two.replace("[%r8]", "[%r100]"), "test", 32, &[contents(), Arg::Out(4), offsets()])
        .found("Undefined");
    let generic = two.replace(".shared.b16", ".b16").replace("[%r8]", "[%rd1]");
    run(&generic, "test", 32, &[contents(), Arg::Out(4), offsets()]).found("Invalid");
}

#[test]
fn rows_that_another_warp_writes_need_a_barrier() {
    // Warp 1 writes 2 KiB, warp 0 loads rows of it.
    let body = "    .shared .align 16 .b8 tile[512];
    mov.u32 %r4, tile;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $LOAD;
    sub.u32 %r5, %r0, 32;
    shl.b32 %r5, %r5, 4;
    add.u32 %r5, %r5, %r4;
    st.shared.v4.u32 [%r5], {%r0, %r0, %r0, %r0};
$LOAD:
    BARRIER
    @!%p1 bra $END;
    shl.b32 %r5, %r0, 4;
    add.u32 %r5, %r5, %r4;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r5];
$END:";
    let args = [Arg::Out(4)];
    let twin = kernel(1, &body.replace("BARRIER", "bar.sync 0;"));
    run(&twin, "test", 64, &args).silent();
    // In reverse order the writer runs first, so that only happens-before can tell.
    let wrong = kernel(1, &body.replace("BARRIER", ""));
    let ran = common::run_with(
        &wrong,
        "test",
        [1, 1, 1],
        [64, 1, 1],
        0,
        &args,
        common::config(&[("EMU_ORDER", "reverse")]),
    )
    .found("Race");
    assert!(ran.device.reports.all()[0].text.contains("ldmatrix"), "{}", ran.device.reports.all()[0].text);
}

#[test]
fn rows_of_a_pending_copy_are_reported() {
    let body = "    .shared .align 16 .b8 tile[512];
    mov.u32 %r4, tile;
    shl.b32 %r5, %r0, 4;
    add.u32 %r5, %r5, %r4;
    mul.wide.u32 %rd3, %r0, 16;
    add.s64 %rd1, %rd1, %rd3;
    cp.async.cg.shared.global [%r5], [%rd1], 16;
    cp.async.commit_group;
    WAIT
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r5];
    cp.async.wait_all;";
    let input = halves(&(0..256).map(number).collect::<Vec<_>>());
    run(&kernel(1, &body.replace("WAIT", "cp.async.wait_group 0;")), "test", 32, &[input.clone()]).silent();
    run(&kernel(1, &body.replace("WAIT", "")), "test", 32, &[input]).found("Race");
}

#[test]
fn accumulators_become_operands_of_the_next_product() {
    // O = f16(Q K^T) V with 16 rows, 16 keys and 16 columns, as attention kernels do it: S leaves the accumulators only to be packed.
    let body = "    .shared .align 16 .b8 q[1536];
    mul.wide.u32 %rd3, %r0, 16;
    add.s64 %rd1, %rd1, %rd3;
    mov.u32 %r4, q;
    shl.b32 %r5, %r0, 4;
    add.u32 %r5, %r5, %r4;
    ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1];
    st.shared.v4.u32 [%r5], {%r10, %r11, %r12, %r13};
    ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1+512];
    st.shared.v4.u32 [%r5+512], {%r10, %r11, %r12, %r13};
    ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1+1024];
    st.shared.v4.u32 [%r5+1024], {%r10, %r11, %r12, %r13};
    bar.sync 0;
    // Rows of Q and V: lane mod 16, the second half of the columns for lanes 16 to 31.
    and.b32 %r6, %r0, 15;
    shl.b32 %r6, %r6, 5;
    shr.u32 %r7, %r0, 4;
    shl.b32 %r7, %r7, 4;
    add.u32 %r6, %r6, %r7;
    add.u32 %r6, %r6, %r4;
    // Rows of K: eight keys, both halves of the columns, then the next eight keys.
    and.b32 %r7, %r0, 7;
    shl.b32 %r7, %r7, 5;
    and.b32 %r8, %r0, 8;
    shl.b32 %r8, %r8, 1;
    add.u32 %r7, %r7, %r8;
    and.b32 %r8, %r0, 16;
    shl.b32 %r8, %r8, 4;
    add.u32 %r7, %r7, %r8;
    add.u32 %r7, %r7, %r4;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r6];
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r7+512];
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r40, %r41, %r42, %r43}, [%r6+1024];
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r20, %r21, %r22, %r23}, {%r30, %r31}, {0f00000000, 0f00000000, 0f00000000, 0f00000000};
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f5, %f6, %f7, %f8}, {%r20, %r21, %r22, %r23}, {%r32, %r33}, {0f00000000, 0f00000000, 0f00000000, 0f00000000};
    cvt.rn.f16x2.f32 %r50, %f2, %f1;
    cvt.rn.f16x2.f32 %r51, %f4, %f3;
    cvt.rn.f16x2.f32 %r52, %f6, %f5;
    cvt.rn.f16x2.f32 %r53, %f8, %f7;
    mov.f32 %f10, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f11, %f12, %f13, %f14}, {%r50, %r51, %r52, %r53}, {%r40, %r41}, {%f10, %f10, %f10, %f10};
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f15, %f16, %f17, %f18}, {%r50, %r51, %r52, %r53}, {%r42, %r43}, {%f10, %f10, %f10, %f10};
    // Row g, columns 2t and 2t+1, of a matrix with 64 bytes a row.
    shr.u32 %r8, %r0, 2;
    shl.b32 %r8, %r8, 6;
    and.b32 %r9, %r0, 3;
    shl.b32 %r9, %r9, 3;
    add.u32 %r8, %r8, %r9;
    cvt.u64.u32 %rd4, %r8;
    add.s64 %rd2, %rd2, %rd4;
    st.global.v2.f32 [%rd2], {%f11, %f12};
    st.global.v2.f32 [%rd2+512], {%f13, %f14};
    st.global.v2.f32 [%rd2+32], {%f15, %f16};
    st.global.v2.f32 [%rd2+544], {%f17, %f18};";
    // Whole numbers small enough that every step is exact.
    let value = |i: usize| f64::from((number(i) >> 3) % 7) - 3.0;
    let matrix: Vec<f64> = (0..768).map(value).collect();
    let bits: Vec<u16> = matrix.iter().map(|&v| half::f16::from_f64(v).to_bits()).collect();
    let ran = run(&kernel(2, body), "test", 32, &[halves(&bits), Arg::Out(1024)]).silent();
    let (q, rest) = matrix.split_at(256);
    let (k, v) = rest.split_at(256);
    let got: Vec<f64> = ran.words(1).into_iter().map(|w| f64::from(f32::from_bits(w))).collect();
    for row in 0..16 {
        for column in 0..16 {
            let score = |key: usize| (0..16).map(|d| q[16 * row + d] * k[16 * key + d]).sum::<f64>();
            let want: f64 = (0..16).map(|key| score(key) * v[16 * key + column]).sum();
            assert_eq!(got[16 * row + column], want, "O({row},{column})");
        }
    }
}

#[test]
fn what_is_not_supported_says_so_with_its_line() {
    let cases = [
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r20, %r21}, [%r4];", "m8n8"),
        ("ldmatrix.sync.aligned.m8n8.shared.b16 {%r20}, [%r4];", ".x1"),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r20}, [%r4];", "registers"),
        ("ldmatrix.sync.aligned.m8n8.x1.global.b16 {%r20}, [%rd1];", "shared"),
        ("ldmatrix.aligned.m8n8.x1.shared.b16 {%r20}, [%r4];", ".sync.aligned"),
        ("ldmatrix.sync.aligned.m8n8.x1.fast.shared.b16 {%r20}, [%r4];", "fast"),
        ("movmatrix.sync.aligned.m8n8.b16 %r20, %r4;", ".trans"),
    ];
    for (instruction, what) in cases {
        let ptx = kernel(1, instruction);
        let line = ptx.lines().position(|l| l == instruction).expect("the line") + 1;
        let error =
            cuda::device::Device::new(Config::default()).load(&ptx).map(|_| ()).expect_err(instruction);
        assert_eq!(error.line as usize, line, "{error}");
        assert!(error.message.contains(what), "{instruction}: {error}");
    }
}
