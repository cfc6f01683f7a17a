//! The launches that are counted and timed: all run without a finding, and the timer times what it says.
#![cfg(feature = "emulated")]

use std::path::Path;

use foveate_device_tests::{
    Turn, emulator,
    launches::{
        self, Case, Counted, OPERATIONS, Place, Shape,
        timing::{Peak, Timer},
    },
};
use serde_json::Value as Json;

fn place(turn: &Turn) -> Place {
    Place::new(turn.device.clone()).unwrap()
}

fn cases(shape: Shape) -> impl Iterator<Item = Case> {
    let operations = OPERATIONS.iter().flat_map(|(_, operations)| *operations);
    operations
        .flat_map(move |operation| operation.types.iter().map(move |&dtype| Case { operation, dtype, shape }))
}

/// The emulator's checks, which counting switches off.
#[test]
fn every_operation_launches_again_and_again_without_a_finding() {
    let Some(turn) = Turn::new() else { return };
    let place = place(&turn);
    for case in cases(Shape { batch: 2, tokens: 33, width: 192, heads: 3 }) {
        let mut launch = case.prepare(&place).unwrap();
        assert!(launch.work.bytes > 0, "{case}");
        for _ in 0..3 {
            launch.run().unwrap();
        }
        place.synchronize().unwrap();
        assert_eq!(emulator::findings(), Vec::<String>::new(), "{case}");
    }
    turn.end();
}

#[test]
fn a_timer_launches_as_often_as_it_says() {
    let Some(turn) = Turn::new() else { return };
    let place = place(&turn);
    let peak = Peak::of(&place).unwrap();
    let shape = Shape { batch: 1, tokens: 5, width: 64, heads: 1 };
    for operation in OPERATIONS.iter().map(|(_, operations)| &operations[0]) {
        let case = Case { operation, dtype: operation.types[0], shape };
        let timer = Timer::new(&place, &case, &peak).unwrap();
        assert!((1..=32).contains(&timer.copies), "{case}");
        emulator::reset_counters();
        let seconds = timer.seconds(1).unwrap();
        let launches: Vec<Json> = serde_json::from_str(&emulator::counters()).unwrap();
        if case.operation.counted != Counted::Nowhere {
            assert!(
                !launches.is_empty() && launches.len().is_multiple_of(32),
                "{case}: {} in one graph",
                launches.len()
            );
        }
        // The emulator's clock runs by its model; at least the overhead of 2 µs is in every launch.
        assert!(seconds >= 2e-6, "{case}: {seconds}");
        let many = timer.seconds(96).unwrap() / 96.0;
        assert!((many / seconds - 1.0).abs() < 0.01, "{case}: {many} a launch of many, {seconds} of one");
    }
    turn.end();
}

/// The emulated device is an A100, whose figures are published: 1,555 GB/s, 19.5 and 312 TFLOP/s, 40 MiB.
#[test]
fn the_peak_of_an_a100_is_its_published_one() {
    let Some(turn) = Turn::new() else { return };
    let peak = Peak::of(&place(&turn)).unwrap();
    let close = |rate: Option<f64>, published: f64| (rate.unwrap() / published - 1.0).abs() < 0.01;
    assert!(close(peak.bandwidth, 1555e9), "{peak:?}");
    assert!(close(peak.f32_flops, 19.5e12), "{peak:?}");
    assert!(close(peak.matrix_flops, 312e12), "{peak:?}");
    assert_eq!(peak.cache_bytes, 40 << 20);
    turn.end();
}

#[test]
fn every_operation_has_a_bench_and_a_name_of_its_own() {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches");
    let mut names = Vec::new();
    for (bench, operations) in OPERATIONS {
        let source = std::fs::read_to_string(benches.join(bench).with_extension("rs")).unwrap();
        assert!(source.contains(&format!("gpu::run(\"{bench}\")")), "benches/{bench}.rs");
        assert!(!launches::timed(bench).is_empty());
        names.extend(operations.iter().map(|operation| operation.name));
    }
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(names.iter().all(|name| launches::operation(name).is_some()));
}
