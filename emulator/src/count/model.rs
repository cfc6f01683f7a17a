//! A bound on the time of a launch from what it counted (specification section 9.6). It is no measurement: there are no latencies, no
//! caches and no dependencies in it, and only ratios between versions of a kernel mean anything.

use super::Counters;
use crate::config::Model;
use crate::machine::inst::{Class, Kernel};
use crate::ops::mma::shape_of;

/// Time before and after anything runs.
const OVERHEAD: f64 = 2e-6;

/// Partitions of a multiprocessor that issue instructions.
const PARTITIONS: f64 = 4.0;

/// The resulting bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Modelled {
    /// Seconds.
    pub seconds: f64,
    /// The pipe that takes longest.
    pub bound: &'static str,
}

/// Issue cycles of one warp instruction in one partition.
fn issue(kernel: &Kernel, pc: usize, sm: u32) -> Option<(&'static str, f64)> {
    let newer = sm >= 90;
    Some(match kernel.insts[pc].class {
        Class::Fp32 => ("fp32", if newer { 1.0 } else { 2.0 }),
        Class::Int => ("int", 2.0),
        Class::Fp16 => ("fp16", 1.0),
        Class::Fp64 => ("fp64", if newer { 2.0 } else { 4.0 }),
        Class::Cvt => ("cvt", 2.0),
        Class::Sfu => ("sfu", 8.0),
        Class::Mma => {
            // m16n8k16 with 16-bit elements is the measure: 512 bytes of A. Other forms take their share of it.
            let share = shape_of(&kernel.insts[pc]).map_or(1.0, |shape| shape.a_bytes() as f64 / 512.0);
            ("mma", share * if newer { 4.0 } else { 8.0 })
        }
        _ => return None,
    })
}

/// The bound for a launch of `blocks` blocks.
pub fn modelled_time(kernel: &Kernel, counters: &Counters, model: &Model, blocks: u64) -> Modelled {
    let sms = u64::from(model.sms).min(blocks).max(1) as f64;
    let mut pipes: Vec<(&'static str, f64)> = Vec::new();
    let mut add = |name: &'static str, seconds: f64| match pipes.iter_mut().find(|pipe| pipe.0 == name) {
        Some(pipe) => pipe.1 += seconds,
        None => pipes.push((name, seconds)),
    };
    for (pc, (inst, &executed)) in kernel.insts.iter().zip(&counters.executed).enumerate() {
        if executed == 0 {
            continue;
        }
        if let Some((name, cycles)) = issue(kernel, pc, model.sm) {
            add(name, cycles * executed as f64 / (sms * PARTITIONS * model.clock));
        }
        if inst.class == Class::Warp {
            add("shared", executed as f64 / (sms * model.clock));
        }
    }
    add("shared", counters.shared_total().wavefronts as f64 / (sms * model.clock));
    add("sectors", counters.global_all().sectors as f64 / 4.0 / (sms * model.clock));
    add("bandwidth", counters.unique_bytes().iter().sum::<u64>() as f64 / model.bandwidth);
    let (bound, most) = pipes.into_iter().fold(("overhead", 0.0), |a, b| if b.1 > a.1 { b } else { a });
    Modelled { seconds: most + OVERHEAD, bound }
}
