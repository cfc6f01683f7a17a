//! What reports look like, how many are kept, and what becomes of them (specification section 10).

mod common;

use common::{Arg, config, kernel, run_with, words};
use cuda::config::{Check, Config, Level};
use cuda::device::{Device, Shape};
use cuda::report::Reports;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A kernel with line information, as nvcc writes it.
const WITH_LINES: &str = ".version 8.0
.target sm_80
.address_size 64
.visible .entry attn_f16(.param .u64 p0)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<10>;
    .loc 1 55 1
    ld.param.u64 %rd1, [p0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 16;
    add.s64 %rd9, %rd1, %rd2;
    .loc 1 57 9
    ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd9+16];
    .loc 1 58 1
    ret;
}
.file 1 \"kernels/attn.cu\"
";

fn shape(grid: [u32; 3], block: [u32; 3]) -> Shape {
    Shape { grid, block, dynamic_shared: 0, max_dynamic_shared: None, cooperative: false, stream: 0x2000 }
}

#[test]
fn a_report_names_everything() {
    let text = WITH_LINES;
    let mut device = Device::new(Config::default());
    device.reports.print = false;
    let module = device.load(text).unwrap();
    let address = device.allocate(256).unwrap();
    device.write(address, &[0; 256]).unwrap();
    let index = device.memory.find(address, 1).unwrap();
    device.memory.get_mut(index).name = Some("qkv".to_owned());
    let ordinal = device.memory.get(index).ordinal;
    device
        .launch(&module.kernels["attn_f16"], &shape([1, 2, 1], [16, 2, 1]), &address.to_le_bytes())
        .unwrap();
    let line = 1 + text.lines().position(|line| line.contains("ld.global")).unwrap();
    let report = &device.reports.all()[0];
    let lines: Vec<&str> = report.text.lines().collect();
    // Threads with x = 15, lanes 15 and 31, read bytes 256 to 271.
    assert_eq!(lines[0], "========= Invalid __global__ read of size 16 bytes");
    assert_eq!(
        lines[1],
        format!(
            "=========     at attn_f16  ptx line {line}  (attn.cu:57)  instruction: ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd9+16]"
        )
    );
    assert_eq!(lines[2], "=========     by thread (15,0,0) in block (0,0,0), lanes 80008000, warp 0");
    let past = format!(
        "=========     address {:#x} is 0 bytes past the end of allocation #{ordinal} (size 256, \"qkv\")",
        address + 256
    );
    assert_eq!(lines[3], past);
    assert_eq!(
        lines.last().copied(),
        Some("=========     launch #1: grid (1,2,1) block (16,2,1) dynamic shared 0, stream 0x2000")
    );
    assert_eq!(
        (report.check, report.level, report.kernel.as_str(), report.line),
        (Check::Bounds, Level::Error, "attn_f16", line as u32)
    );
}

#[test]
fn twenty_of_a_kind_at_a_line_then_a_count() {
    // Every thread block reads through the read-only path what it has written: a warning each time.
    let body = "    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd2, %r1, 64;
    add.s64 %rd2, %rd1, %rd2;
    st.global.u32 [%rd2], 1;
    ld.global.nc.u32 %r2, [%rd2];
    ld.global.nc.u32 %r3, [%rd2];";
    let ran =
        run_with(&kernel(1, body), "test", [50, 1, 1], [1, 1, 1], 0, &[Arg::Out(64 * 50)], Config::default());
    let reports = ran.device.reports.all();
    // Two lines, each with 20 texts; the remaining 30 are counted on the first of each.
    assert_eq!(reports.len(), 40);
    let line = reports[0].line;
    assert_eq!(reports.iter().filter(|r| r.line == line).map(|r| r.count).sum::<u64>(), 50);
    assert_eq!(reports.iter().map(|r| r.count).sum::<u64>(), 100);
    assert_eq!(reports.iter().find(|r| r.line == line).unwrap().count, 31);
    assert!(reports[0].text.starts_with("========= ReadOnly: "), "{}", reports[0].text);
    assert!(reports[0].text.lines().next().unwrap().ends_with(" (warning)"));
    assert!(ran.device.fault.is_none());
}

#[test]
fn kinds_and_kernels_are_counted_apart() {
    let mut reports = Reports::new(&Config::default());
    reports.print = false;
    for i in 0..25 {
        reports.push(Check::Race, Level::Warn, "a", 7, &["Race: one".to_owned()]);
        reports.push(
            Check::Race,
            Level::Warn,
            if i % 2 == 0 { "a" } else { "b" },
            8,
            &["Race: two".to_owned()],
        );
        reports.push(Check::Race, Level::Off, "a", 7, &["Race: not wanted".to_owned()]);
    }
    assert_eq!(reports.all().len(), 20 + 25);
    assert_eq!(reports.all().iter().filter(|r| r.line == 7).map(|r| r.count).sum::<u64>(), 25);
    reports.clear();
    assert!(reports.all().is_empty());
    reports.push(Check::Race, Level::Warn, "a", 7, &["Race: one".to_owned()]);
    assert_eq!(reports.all()[0].count, 1);
}

#[test]
fn levels_decide_what_a_finding_does() {
    let body =
        "    st.global.u32 [%rd1], 1;\n    ld.global.nc.u32 %r2, [%rd1];\n    st.global.u32 [%rd1+4], 2;";
    for (level, found, fault) in [("off", 0, false), ("warn", 1, false), ("error", 1, true)] {
        let config = config(&[("EMU_CHECKS", &format!("readonly={level}"))]);
        let ran = run_with(&kernel(1, body), "test", [1; 3], [1, 1, 1], 0, &[words(&[0, 0])], config);
        assert_eq!(ran.device.reports.all().len(), found, "{level}");
        assert_eq!(ran.device.fault.is_some(), fault, "{level}");
        assert_eq!(ran.words(0)[1], if fault { 0 } else { 2 }, "{level}: does the kernel go on?");
    }
}

fn scratch(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{}", std::process::id()));
    let _ = fs::remove_file(&path);
    path
}

#[test]
fn every_launch_adds_a_json_line() {
    let path = scratch("launches.jsonl");
    let (mut device, module) =
        common::load(&kernel(0, ""), config(&[("EMU_REPORT", path.to_str().unwrap())]));
    for blocks in 1..4 {
        device.launch(&module.kernels["test"], &shape([blocks, 1, 1], [32, 1, 1]), &[]).unwrap();
    }
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    for (i, line) in lines.iter().enumerate() {
        let blocks = i as u64 + 1;
        assert_eq!(line["kernel"], "test");
        assert_eq!(line["launch"], blocks);
        assert_eq!(line["grid"], serde_json::json!([blocks, 1, 1]));
        assert_eq!(line["block"], serde_json::json!([32, 1, 1]));
        // mov and ret.
        assert_eq!(line["insts"], 2 * blocks);
    }
    fs::remove_file(path).unwrap();
}

#[test]
fn a_report_file_that_cannot_be_written_is_said() {
    let path = std::env::temp_dir().join("no such folder").join("x.jsonl");
    let (mut device, module) =
        common::load(&kernel(0, ""), config(&[("EMU_REPORT", path.to_str().unwrap())]));
    device.launch(&module.kernels["test"], &shape([1; 3], [32, 1, 1]), &[]).unwrap();
    assert!(device.reports.all()[0].text.starts_with("========= Misuse: EMU_REPORT="));
    assert!(device.fault.is_none());
}

/// Runs one test of this binary again, with what it is to do in the environment.
fn again(test: &str, on_fault: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("REPORTS_CHILD", on_fault)
        .output()
        .unwrap()
}

#[test]
fn a_fault_can_abort_the_process() {
    if let Ok(on_fault) = std::env::var("REPORTS_CHILD") {
        let mut device = Device::new(config(&[("EMU_ON_FAULT", &on_fault)]));
        let module = device.load(&kernel(0, "    trap;")).unwrap();
        device.launch(&module.kernels["test"], &shape([1; 3], [32, 1, 1]), &[]).unwrap();
        return;
    }
    let name = "a_fault_can_abort_the_process";
    let report = "========= Invalid state: the kernel executed trap";
    let output = again(name, "abort");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(report));
    let output = again(name, "sticky");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(report));
}
