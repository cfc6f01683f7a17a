//! Counters of kernels whose numbers can be worked out on paper (specification section 9). The arithmetic stands beside each.

mod common;

use common::{Arg, Ran, config, kernel, run_with, words};
use cuda::count::{Counters, GlobalKind, GlobalUse, SharedUse};
use serde_json::{Value, json};

fn launch(blocks: u32, threads: u32, args: &[Arg], body: &str) -> Ran {
    let quiet = config(&[("EMU_CHECKS", "race=off,intra=off,global=warn,uninit=off")]);
    run_with(&kernel(args.len(), body), "test", [blocks, 1, 1], [threads, 1, 1], 0, args, quiet)
}

fn counters(ran: &Ran) -> &Counters {
    &ran.launch.as_ref().expect("it ran").counters
}

fn report(ran: &Ran) -> Value {
    let launch = ran.launch.as_ref().expect("it ran");
    launch.counters.json(launch, &ran.device.config)
}

/// One warp loads `%r10` (or more) from `%rd1` plus the byte offset that `address` puts into `%r5`.
fn load(address: &str, instruction: &str) -> GlobalUse {
    let body =
        format!("{address}    cvt.u64.u32 %rd5, %r5;\n    add.s64 %rd5, %rd1, %rd5;\n    {instruction}");
    let ran = launch(1, 32, &[Arg::Buffer(vec![0; 8192])], &body);
    counters(&ran).global_total(GlobalKind::Load)
}

#[track_caller]
fn expect(got: GlobalUse, sectors: u64, ideal: u64) {
    assert_eq!(
        (got.requests, got.sectors, got.ideal),
        (1, sectors, ideal),
        "requests, sectors, ideal sectors"
    );
    assert_eq!(got.scattered, u64::from(sectors > 2 * ideal));
}

#[test]
fn sectors_of_global_loads() {
    let stride = |bytes: u32| format!("    mul.lo.u32 %r5, %r0, {bytes};\n");
    let word = "ld.global.u32 %r10, [%rd5];";
    // 32 lanes × 4 bytes side by side = 128 bytes = 4 sectors of 32, and no fewer would do.
    expect(load(&stride(4), word), 4, 4);
    // Stride 2 words: the lanes span 256 bytes = 8 sectors for 128 wanted bytes.
    expect(load(&stride(8), word), 8, 4);
    // Stride 32 words = 128 bytes: every lane has a sector of its own.
    expect(load(&stride(128), word), 32, 4);
    // Stride 33 words = 132 bytes: again no two lanes within 32 bytes of each other.
    expect(load(&stride(132), word), 32, 4);
    // Stride 8 words = 32 bytes: exactly one sector a lane.
    expect(load(&stride(32), word), 32, 4);
    // Stride 3 words: the last byte is 31·12 + 3 = 375, so sectors 0 to 11.
    expect(load(&stride(12), word), 12, 4);
    // 8 bytes a lane: 256 bytes = 8 sectors; 16 bytes: 512 = 16.
    expect(load(&stride(8), "ld.global.v2.u32 {%r10, %r11}, [%rd5];"), 8, 8);
    expect(load(&stride(8), "ld.global.u64 %rd6, [%rd5];"), 8, 8);
    expect(load(&stride(16), "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];"), 16, 16);
    // Two bytes a lane: 64 bytes; one byte: 32.
    expect(load(&stride(2), "ld.global.u16 %h1, [%rd5];"), 2, 2);
    expect(load(&stride(1), "ld.global.u8 %h1, [%rd5];"), 1, 1);
    // float4 at a stride of 8 words: 32 lanes × 32 bytes = 32 sectors, half of each wanted.
    expect(load(&stride(32), "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];"), 32, 16);
}

#[test]
fn alignment_broadcast_and_partial_masks_of_global_loads() {
    let word = "ld.global.u32 %r10, [%rd5];";
    // Bytes 4 to 131: sectors 0 to 4, five of them.
    expect(load("    shl.b32 %r5, %r0, 2;\n", "ld.global.u32 %r10, [%rd5+4];"), 5, 4);
    // Bytes 16 to 143: also five.
    expect(load("    shl.b32 %r5, %r0, 2;\n", "ld.global.u32 %r10, [%rd5+16];"), 5, 4);
    // Bytes 32 to 159: aligned again.
    expect(load("    shl.b32 %r5, %r0, 2;\n", "ld.global.u32 %r10, [%rd5+32];"), 4, 4);
    // All lanes want the same four bytes: one sector.
    expect(load("    mov.u32 %r5, 64;\n", word), 1, 1);
    // Neighbours in pairs: 16 distinct words = 64 bytes.
    expect(load("    shr.u32 %r5, %r0, 1;\n    shl.b32 %r5, %r5, 2;\n", word), 2, 2);
    // Backwards: the same 128 bytes.
    expect(load("    shl.b32 %r5, %r0, 2;\n    sub.u32 %r5, 124, %r5;\n", word), 4, 4);
    // Lanes 3 to 7 only: bytes 12 to 31, 20 of them, in one sector.
    let some =
        "    setp.ge.u32 %p1, %r0, 3;\n    setp.lt.and.u32 %p1, %r0, 8, %p1;\n    shl.b32 %r5, %r0, 2;\n";
    expect(load(some, "@%p1 ld.global.u32 %r10, [%rd5];"), 1, 1);
    // Every other lane: 16 words over 128 bytes; 64 wanted bytes need 2 sectors, 4 are touched.
    let odd = "    and.b32 %r6, %r0, 1;\n    setp.eq.u32 %p1, %r6, 1;\n    shl.b32 %r5, %r0, 2;\n";
    expect(load(odd, "@%p1 ld.global.u32 %r10, [%rd5];"), 4, 2);
    // Nobody: no request.
    let nobody =
        load("    setp.gt.u32 %p1, %r0, 99;\n    mov.u32 %r5, 0;\n", "@%p1 ld.global.u32 %r10, [%rd5];");
    assert_eq!(nobody.requests, 0);
}

#[test]
fn kinds_and_unique_bytes() {
    // Two blocks of two warps. Every warp loads words 0 to 31 (4 sectors), stores its own 32 words (4 sectors), adds to one counter
    // (1 sector), and copies 16 bytes a lane from the block's half of the 2048 bytes (2 warps × 16 sectors).
    let ran = launch(
        2,
        64,
        &[words(&[1; 32]), Arg::Out(512), words(&[0; 8]), Arg::Buffer(vec![7; 2048])],
        "    .shared .align 16 .b8 s[1024];
    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r1, 6;
    add.u32 %r2, %r2, %r0;
    and.b32 %r3, %r0, 31;
    mul.wide.u32 %rd5, %r3, 4;
    add.s64 %rd5, %rd1, %rd5;
    ld.global.u32 %r4, [%rd5];
    mul.wide.u32 %rd6, %r2, 4;
    add.s64 %rd6, %rd2, %rd6;
    st.global.u32 [%rd6], %r4;
    red.global.add.u32 [%rd3], 1;
    mul.wide.u32 %rd7, %r2, 16;
    add.s64 %rd7, %rd4, %rd7;
    mov.u32 %r5, s;
    mad.lo.u32 %r5, %r0, 16, %r5;
    cp.async.cg.shared.global [%r5], [%rd7], 16;
    cp.async.wait_all;",
    );
    let c = counters(&ran);
    let of = |kind| {
        let total = c.global_total(kind);
        (total.requests, total.sectors, total.ideal)
    };
    assert_eq!(of(GlobalKind::Load), (4, 16, 16));
    assert_eq!(of(GlobalKind::Store), (4, 16, 16));
    assert_eq!(of(GlobalKind::Atomic), (4, 4, 4));
    assert_eq!(of(GlobalKind::CpAsync), (4, 64, 64));
    // Read: 4 sectors of the words and 64 of the 2048 bytes; written: 16 of the output, 1 of the counter.
    assert_eq!(c.unique_bytes(), [68 * 32, 17 * 32]);
    let json = report(&ran);
    assert_eq!(json["unique_bytes_read"], 68 * 32);
    assert_eq!(json["unique_bytes_written"], 17 * 32);
    // All sectors, 16 + 16 + 4 + 64 = 100, over the 85 distinct ones.
    assert_eq!(json["traffic_ratio"], json!(100.0 / 85.0));
    assert_eq!(json["global"]["ld"]["sectors_per_request"], json!(4.0));
    assert_eq!(json["global"]["cp_async"]["efficiency"], json!(1.0));
    // The destination of a 16-byte copy is like a 16-byte store: 4 passes, no conflicts, 4 warps.
    assert_eq!(json["shared"], json!({"requests": 4, "wavefronts": 16, "ideal": 16, "bank_conflicts": 0}));
}

#[test]
fn scattered_requests_are_listed_by_line() {
    let body = "    mul.wide.u32 %rd5, %r0, 128;
    add.s64 %rd5, %rd1, %rd5;
    ld.global.u32 %r5, [%rd5];
    ld.global.u32 %r6, [%rd1];";
    let ran = launch(1, 64, &[Arg::Buffer(vec![0; 8192])], body);
    let json = report(&ran);
    let listed = json["scattered"].as_array().expect("a list");
    assert_eq!(listed.len(), 1, "{json}");
    assert_eq!(listed[0]["requests"], 2);
    assert_eq!(listed[0]["scattered_requests"], 2);
    assert_eq!(listed[0]["sectors"], 64);
    assert_eq!(listed[0]["ideal_sectors"], 8);
    let text = kernel(1, body);
    let line = 1 + text.lines().position(|l| l.contains("%r5, [%rd5]")).unwrap();
    assert_eq!(listed[0]["line"], line);
}

/// One warp stores to shared memory at the byte offset that `address` puts into `%r5`.
fn store(address: &str, instruction: &str) -> SharedUse {
    let body = format!(
        "    .shared .align 128 .b8 s[8192];
    mov.u32 %r1, s;
    mov.u32 %r10, 0;
    mov.u64 %rd5, 0;
    mov.u16 %h1, 0;
{address}    add.u32 %r5, %r5, %r1;
    {instruction}"
    );
    counters(&launch(1, 32, &[], &body)).shared_total()
}

#[track_caller]
fn waves(got: SharedUse, wavefronts: u64, ideal: u64) {
    assert_eq!(
        (got.requests, got.wavefronts, got.ideal),
        (1, wavefronts, ideal),
        "requests, wavefronts, ideal"
    );
    assert_eq!(got.conflicts(), wavefronts - ideal);
}

#[test]
fn banks_of_single_words() {
    let stride = |words: u32| format!("    mul.lo.u32 %r5, %r0, {};\n", 4 * words);
    let word = "st.shared.u32 [%r5], %r10;";
    // Stride 1: every lane its bank.
    waves(store(&stride(1), word), 1, 1);
    // Stride 2: the even banks, two words each. Stride 4: eight banks, four words each.
    waves(store(&stride(2), word), 2, 1);
    waves(store(&stride(4), word), 4, 1);
    // Stride 32: all in bank 0. Stride 33: word 33·l is in bank l.
    waves(store(&stride(32), word), 32, 1);
    waves(store(&stride(33), word), 1, 1);
    // Stride 3 and 32 have no common factor: no conflict. Stride 48 = 16·3: banks 0 and 16, 16 words each.
    waves(store(&stride(3), word), 1, 1);
    waves(store(&stride(48), word), 16, 1);
    // All lanes one word; pairs of lanes one word each.
    waves(store("    mov.u32 %r5, 20;\n", "ld.shared.u32 %r10, [%r5];"), 1, 1);
    waves(store("    shr.u32 %r5, %r0, 1;\n    shl.b32 %r5, %r5, 2;\n", "ld.shared.u32 %r10, [%r5];"), 1, 1);
    // Two words of one bank (0 and 32), half the lanes each.
    waves(store("    and.b32 %r5, %r0, 1;\n    shl.b32 %r5, %r5, 7;\n", "ld.shared.u32 %r10, [%r5];"), 2, 1);
    // Bytes and halves: 8 and 16 words, each wanted by several lanes.
    waves(store("    mov.u32 %r5, %r0;\n", "st.shared.u8 [%r5], %h1;"), 1, 1);
    waves(store("    shl.b32 %r5, %r0, 1;\n", "st.shared.u16 [%r5], %h1;"), 1, 1);
    // A column of a 32 × 32 tile: row l, column 5, conflicts in full; with the column xor the row it is free of them.
    waves(store("    mad.lo.u32 %r5, %r0, 128, 20;\n", word), 32, 1);
    let swizzled = "    xor.b32 %r6, %r0, 5;\n    shl.b32 %r6, %r6, 2;\n    mad.lo.u32 %r5, %r0, 128, %r6;\n";
    waves(store(swizzled, word), 1, 1);
    // Half of the lanes at stride 2: 16 lanes on 16 banks.
    let half = format!("    setp.lt.u32 %p1, %r0, 16;\n{}", stride(2));
    waves(store(&half, "@%p1 st.shared.u32 [%r5], %r10;"), 1, 1);
}

#[test]
fn banks_of_wide_accesses() {
    let stride = |words: u32| format!("    mul.lo.u32 %r5, %r0, {};\n", 4 * words);
    let (two, four) = ("st.shared.u64 [%r5], %rd5;", "st.shared.v4.u32 [%r5], {%r10, %r10, %r10, %r10};");
    // 8 bytes: 2 passes of 16 lanes, each 32 words in 32 banks.
    waves(store(&stride(2), two), 2, 2);
    // 8 bytes at a stride of 4 words: 16 lanes use banks 4l, 4l+1 mod 32: 16 banks, 2 words each.
    waves(store(&stride(4), two), 4, 2);
    // 16 bytes: 4 passes of 8 lanes, each 32 words in 32 banks.
    waves(store(&stride(4), four), 4, 4);
    // 16 bytes at a stride of 8 words: 8 lanes use 16 banks, 2 words each.
    waves(store(&stride(8), four), 8, 4);
    // 16 bytes at a stride of 32 words: 8 lanes in banks 0 to 3, 8 words each, in every pass.
    waves(store(&stride(32), four), 32, 4);
    // The same with the 16-byte column xor the row: no conflicts.
    let swizzled = "    and.b32 %r6, %r0, 7;\n    xor.b32 %r6, %r6, 3;\n    shl.b32 %r6, %r6, 4;\n    mad.lo.u32 %r5, %r0, 128, %r6;\n";
    waves(store(swizzled, four), 4, 4);
    // All lanes the same 16 bytes: one wavefront a pass.
    waves(store("    mov.u32 %r5, 32;\n", "ld.shared.v4.u32 {%r11, %r12, %r13, %r14}, [%r5];"), 4, 4);
    // Lanes 0 to 7 only: the other passes do not happen.
    let some = format!("    setp.lt.u32 %p1, %r0, 8;\n{}", stride(4));
    waves(store(&some, "@%p1 st.shared.v4.u32 [%r5], {%r10, %r10, %r10, %r10};"), 1, 1);
    // Lanes 0 and 31 only: two passes.
    let ends = format!(
        "    add.u32 %r6, %r0, 1;\n    and.b32 %r6, %r6, 31;\n    setp.le.u32 %p1, %r6, 1;\n{}",
        stride(4)
    );
    waves(store(&ends, "@%p1 st.shared.v4.u32 [%r5], {%r10, %r10, %r10, %r10};"), 2, 2);
}

#[test]
fn banks_of_ldmatrix() {
    let x4 = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r11, %r12, %r13, %r14}, [%r5];";
    let x2 = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r11, %r12}, [%r5];";
    let x1 = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r11}, [%r5];";
    // Rows 128 bytes apart: the 8 rows of a matrix are all in banks 0 to 3, 8 wavefronts a matrix.
    waves(store("    mul.lo.u32 %r5, %r0, 128;\n", x4), 32, 4);
    waves(store("    mul.lo.u32 %r5, %r0, 128;\n", x2), 16, 2);
    waves(store("    mul.lo.u32 %r5, %r0, 128;\n", x1), 8, 1);
    // Row r's 16-byte column xor (r mod 8): the 8 rows are in 8 different groups of banks.
    let swizzled = "    and.b32 %r6, %r0, 7;\n    shl.b32 %r6, %r6, 4;\n    mad.lo.u32 %r5, %r0, 128, %r6;\n";
    waves(store(swizzled, x4), 4, 4);
    // Rows 144 bytes apart (padding by 16): banks 36·r mod 32 = 4·r, no conflicts.
    waves(store("    mul.lo.u32 %r5, %r0, 144;\n", x4), 4, 4);
    // Rows of 64 bytes: rows r and r + 2 share their banks, 4 wavefronts a matrix.
    waves(store("    mul.lo.u32 %r5, %r0, 64;\n", x4), 16, 4);
}

#[test]
fn shared_atomics_take_turns_on_one_address() {
    let atomic = "red.shared.add.u32 [%r5], 1;";
    // All 32 lanes one word: 31 more than the one wavefront.
    waves(store("    mov.u32 %r5, 0;\n", atomic), 32, 1);
    // Pairs: one more.
    waves(store("    shr.u32 %r5, %r0, 1;\n    shl.b32 %r5, %r5, 2;\n", atomic), 2, 1);
    // Nobody shares.
    waves(store("    shl.b32 %r5, %r0, 2;\n", atomic), 1, 1);
}

#[test]
fn instructions_lanes_and_branches() {
    // Two warps and eight lanes of a third. The low half of each warp takes one more addition; lanes 0 to 7 of the third are all low.
    let ran = launch(
        1,
        72,
        &[],
        "    and.b32 %r1, %r0, 31;
    setp.ge.u32 %p1, %r1, 16;
    @%p1 bra HIGH;
    add.u32 %r2, %r0, 1;
HIGH:
    cvt.rn.f32.u32 %f1, %r0;
    fma.rn.f32 %f2, %f1, %f1, %f1;
    ex2.approx.ftz.f32 %f3, %f2;
    bar.sync 0;
    bar.sync 0;",
    );
    let json = report(&ran);
    let class = |name: &str| json["insts_by_class"][name].as_u64().unwrap();
    // and, setp and the addition, in each of 3 warps.
    assert_eq!(class("int"), 9, "{json}");
    assert_eq!(class("cvt"), 3);
    assert_eq!(class("fp32"), 3);
    assert_eq!(class("sfu"), 3);
    assert_eq!(class("barrier"), 6);
    // The branch is executed where some lane's predicate is true: in two warps; and ret in all.
    assert_eq!(class("control"), 2 + 3);
    // mov %r0, %tid.x.
    assert_eq!(class("move"), 3);
    assert_eq!(json["insts"], 9 + 3 + 3 + 3 + 6 + 5 + 3);
    assert_eq!(json["divergent_branches"], 2);
    // 72 threads: mov, and, setp, cvt, fma, ex2, 2 × bar, ret = 9 each; 32 lanes branch; 16 + 16 + 8 add.
    assert_eq!(json["thread_insts"], 72 * 9 + 32 + 40);
    assert_eq!(json["simt_efficiency"], json!(f64::from(72 * 9 + 32 + 40) / (32.0 * 32.0)));
    assert_eq!(json["barriers"], 2);
    assert_eq!(json["barriers_per_block"], json!(2.0));
}

#[test]
fn matrix_instructions_and_their_operations() {
    let body = "    mov.u32 %r1, 0;
    mov.f32 %f1, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2, %f3, %f4, %f5}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f1, %f1, %f1, %f1};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2, %f3, %f4, %f5}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f1, %f1, %f1, %f1};
    mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5}, {%r1, %r1}, {%r1}, {%f1, %f1, %f1, %f1};";
    let args: [Arg; 0] = [];
    let ran = launch(3, 64, &args, body);
    let json = report(&ran);
    // 6 warps.
    assert_eq!(json["mma"], json!({"m16n8k16.f32.bf16.bf16.f32": 12, "m16n8k8.f32.f16.f16.f32": 6}));
    // 2·16·8·16 = 4096 and 2·16·8·8 = 2048.
    assert_eq!(json["mma_flops"], 12 * 4096 + 6 * 2048);
    assert_eq!(json["mma_useful_flops"], Value::Null);
    // 3 blocks are on 3 multiprocessors of 4 partitions; 8 cycles, and 4 for half of the work.
    let seconds = (12.0 * 8.0 + 6.0 * 4.0) / (3.0 * 4.0 * 1.41e9) + 2e-6;
    assert!((json["modelled_seconds"].as_f64().unwrap() - seconds).abs() < 1e-12, "{json}");
    assert_eq!(json["modelled_bound"], "mma");
}

#[test]
fn useful_operations_are_declared_for_one_launch() {
    let (mut device, module) = common::load(&kernel(0, ""), config(&[]));
    let shape = cuda::device::Shape {
        grid: [1; 3],
        block: [32, 1, 1],
        dynamic_shared: 0,
        max_dynamic_shared: None,
        cooperative: false,
        stream: 0,
    };
    device.expected_flops = Some(1234.0);
    let first = device.launch(&module.kernels["test"], &shape, &[]).unwrap();
    let second = device.launch(&module.kernels["test"], &shape, &[]).unwrap();
    assert_eq!(first.counters.json(&first, &device.config)["mma_useful_flops"], json!(1234.0));
    assert_eq!(second.counters.json(&second, &device.config)["mma_useful_flops"], Value::Null);
}

#[test]
fn float_atomics_whose_order_matters() {
    let add = |place: &str| {
        format!(
            "    mov.u32 %r1, %ctaid.x;\n    mov.f32 %f1, 0f3f800000;\n    mul.wide.u32 %rd2, {place}, 4;\n    add.s64 %rd2, %rd1, %rd2;\n    red.global.add.f32 [%rd2], %f1;"
        )
    };
    let count = |blocks, threads, place: &str| {
        counters(&launch(blocks, threads, &[words(&[0; 256])], &add(place))).nondeterministic_atomics
    };
    // One warp alone on an address has one order, that of its lanes.
    assert_eq!(count(1, 32, "0"), 0);
    // A word for each thread of each block.
    assert_eq!(count(1, 128, "%r0"), 0);
    // Two warps on one word; two blocks; and two blocks on 32 words: all their threads count.
    assert_eq!(count(1, 64, "0"), 64);
    assert_eq!(count(2, 32, "0"), 64);
    assert_eq!(count(2, 32, "%r0"), 64);
    // Block b on word b: nobody shares.
    assert_eq!(count(4, 32, "%r1"), 0);
    // Integer atomics have no order to lose.
    let body = "    red.global.add.u32 [%rd1], 1;";
    assert_eq!(counters(&launch(2, 64, &[words(&[0])], body)).nondeterministic_atomics, 0);
}

#[test]
fn modelled_time_of_a_copy() {
    // One block of one warp: 2 × 64 KiB in 16-byte pieces, 128 rounds.
    let body = "    mov.u32 %r1, 0;
    mul.wide.u32 %rd5, %r0, 16;
    add.s64 %rd3, %rd1, %rd5;
    add.s64 %rd4, %rd2, %rd5;
LOOP:
    ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd3];
    st.global.v4.u32 [%rd4], {%r4, %r5, %r6, %r7};
    add.s64 %rd3, %rd3, 512;
    add.s64 %rd4, %rd4, 512;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r1, 128;
    @%p1 bra LOOP;";
    let ran = launch(1, 32, &[Arg::Buffer(vec![1; 65536]), Arg::Out(65536)], body);
    let json = report(&ran);
    assert_eq!(json["unique_bytes_read"], 65536);
    assert_eq!(json["unique_bytes_written"], 65536);
    // 128 × 16 sectors each way through one multiprocessor, 4 a cycle.
    let seconds = 2.0 * 128.0 * 16.0 / 4.0 / 1.41e9 + 2e-6;
    assert!((json["modelled_seconds"].as_f64().unwrap() - seconds).abs() < 1e-12, "{json}");
    assert_eq!(json["modelled_bound"], "sectors");
    assert_eq!(ran.launch.unwrap().modelled_seconds, json["modelled_seconds"].as_f64().unwrap());
}

#[test]
fn memory_counters_can_be_left_out() {
    let body = "    ld.global.u32 %r5, [%rd1];\n    st.global.u32 [%rd1], %r0;";
    let off = config(&[("EMU_COUNT", "0")]);
    let ran = run_with(&kernel(1, body), "test", [1; 3], [32, 1, 1], 0, &[words(&[0])], off);
    let json = report(&ran);
    assert_eq!(json["global"]["ld"]["requests"], 0);
    assert_eq!(json["traffic_ratio"], Value::Null);
    assert_eq!(json["insts_by_class"]["ldg"], 1);
}
