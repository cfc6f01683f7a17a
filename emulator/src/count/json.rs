//! Counters as JSON: one object a launch.
//!
//! | key | meaning |
//! | --- | --- |
//! | `kernel`, `launch`, `grid`, `block`, `dynamic_shared` | which launch it was |
//! | `device` | `sm_80` or `sm_90`, the modelled device |
//! | `insts` | warp instructions |
//! | `insts_by_class` | the same by class: `int`, `fp32`, `fp64`, `fp16`, `sfu`, `cvt`, `move`, `ldg`, `stg`, `lds`, `sts`, `local`, `atomic`, `cp_async`, `ldmatrix`, `mma`, `warp`, `barrier`, `control` |
//! | `thread_insts`, `simt_efficiency` | active lanes summed; over 32 times `insts` |
//! | `divergent_branches` | branches that split a group |
//! | `global` | an object a kind (`ld`, `st`, `atom`, `cp_async`): `requests`, `sectors`, `ideal_sectors`, `sectors_per_request`, `ideal_per_request`, `efficiency` |
//! | `unique_bytes_read`, `unique_bytes_written` | 32 for each distinct sector; an atomic counts as a write |
//! | `traffic_ratio` | 32 times all sectors over the unique bytes |
//! | `scattered` | instructions with requests of more than twice their ideal sectors: `line`, `source`, `instruction`, `requests`, `scattered_requests`, `sectors`, `ideal_sectors` |
//! | `shared` | `requests`, `wavefronts`, `ideal`, `bank_conflicts` |
//! | `bank_conflict_lines` | instructions with bank conflicts: `line`, `source`, `instruction`, `requests`, `wavefronts`, `ideal` |
//! | `mma` | executions by shape and types |
//! | `mma_flops`, `mma_useful_flops` | 2·m·n·k each; what the launcher declared, or null |
//! | `barriers`, `barriers_per_block` | completed block barriers, named ones too |
//! | `nondeterministic_atomics` | float atomics of threads to addresses that more than one warp hit |
//! | `registers`, `shared_bytes`, `blocks_per_sm`, `occupancy` | a thread, a block; resident blocks; resident warps over 64 |
//! | `modelled_seconds`, `modelled_bound` | a bound, not a measurement, and the pipe that makes it |

use super::{Counters, GlobalKind, GlobalUse};
use crate::config::Config;
use crate::device::{Launch, blocks_per_sm};
use crate::machine::inst::{Class, Kernel};
use crate::ops::mma::shape_of;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

/// Names of the classes, in the order of [`Class`].
const CLASSES: [(Class, &str); 19] = [
    (Class::Int, "int"),
    (Class::Fp32, "fp32"),
    (Class::Fp64, "fp64"),
    (Class::Fp16, "fp16"),
    (Class::Sfu, "sfu"),
    (Class::Cvt, "cvt"),
    (Class::Move, "move"),
    (Class::LdGlobal, "ldg"),
    (Class::StGlobal, "stg"),
    (Class::LdShared, "lds"),
    (Class::StShared, "sts"),
    (Class::Local, "local"),
    (Class::Atomic, "atomic"),
    (Class::CpAsync, "cp_async"),
    (Class::LdMatrix, "ldmatrix"),
    (Class::Mma, "mma"),
    (Class::Warp, "warp"),
    (Class::Barrier, "barrier"),
    (Class::Control, "control"),
];

const KINDS: [(GlobalKind, &str); 4] = [
    (GlobalKind::Load, "ld"),
    (GlobalKind::Store, "st"),
    (GlobalKind::Atomic, "atom"),
    (GlobalKind::CpAsync, "cp_async"),
];

/// A quotient, or null where there is nothing to divide by.
fn ratio(a: u64, b: u64) -> Value {
    if b == 0 { Value::Null } else { json!(a as f64 / b as f64) }
}

fn requests(total: &GlobalUse) -> Value {
    json!({
        "requests": total.requests,
        "sectors": total.sectors,
        "ideal_sectors": total.ideal,
        "sectors_per_request": ratio(total.sectors, total.requests),
        "ideal_per_request": ratio(total.ideal, total.requests),
        "efficiency": ratio(total.ideal, total.sectors),
    })
}

fn place(kernel: &Kernel, pc: usize) -> Map<String, Value> {
    let mut out = Map::new();
    out.insert("line".to_owned(), json!(kernel.meta[pc].line));
    out.insert("source".to_owned(), json!(kernel.source_of(pc as u32)));
    out.insert("instruction".to_owned(), json!(kernel.meta[pc].text));
    out
}

impl Counters {
    /// Warp instructions of a class.
    pub fn class(&self, kernel: &Kernel, class: Class) -> u64 {
        let pairs = kernel.insts.iter().zip(&self.executed);
        pairs.filter(|(inst, _)| inst.class == class).map(|(_, executed)| executed).sum()
    }

    /// Floating-point operations of all matrix instructions.
    pub fn mma_flops(&self, kernel: &Kernel) -> u64 {
        self.mma(kernel).values().map(|(executed, flops)| executed * flops).sum()
    }

    /// Executions of each shape and type, and operations of one.
    fn mma(&self, kernel: &Kernel) -> BTreeMap<String, (u64, u64)> {
        let mut out = BTreeMap::new();
        for (pc, inst) in kernel.insts.iter().enumerate() {
            if self.executed[pc] > 0
                && let Some(shape) = shape_of(inst)
            {
                out.entry(shape.to_string()).or_insert((0, shape.flops())).0 += self.executed[pc];
            }
        }
        out
    }

    /// Everything, with the keys that the module's documentation lists.
    pub fn json(&self, launch: &Launch, config: &Config) -> Value {
        let kernel = &*launch.kernel;
        let blocks = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
        let threads = launch.block.iter().product::<u32>();
        let insts: u64 = self.executed.iter().sum();
        let lanes: u64 = self.lanes.iter().sum();
        let classes: Map<String, Value> = CLASSES
            .iter()
            .map(|&(class, name)| (name.to_owned(), json!(self.class(kernel, class))))
            .collect();
        let global: Map<String, Value> =
            KINDS.iter().map(|&(kind, name)| (name.to_owned(), requests(&self.global_total(kind)))).collect();
        let mut scattered = Vec::new();
        for (pc, entry) in self.global.iter().enumerate().filter(|(_, entry)| entry.scattered > 0) {
            let mut line = place(kernel, pc);
            line.insert("requests".to_owned(), json!(entry.requests));
            line.insert("scattered_requests".to_owned(), json!(entry.scattered));
            line.insert("sectors".to_owned(), json!(entry.sectors));
            line.insert("ideal_sectors".to_owned(), json!(entry.ideal));
            scattered.push(Value::Object(line));
        }
        let mut conflicts = Vec::new();
        for (pc, entry) in self.shared.iter().enumerate().filter(|(_, entry)| entry.conflicts() > 0) {
            let mut line = place(kernel, pc);
            line.insert("requests".to_owned(), json!(entry.requests));
            line.insert("wavefronts".to_owned(), json!(entry.wavefronts));
            line.insert("ideal".to_owned(), json!(entry.ideal));
            conflicts.push(Value::Object(line));
        }
        let shared = self.shared_total();
        let [read, written] = self.unique_bytes();
        let mma: Map<String, Value> =
            self.mma(kernel).into_iter().map(|(shape, (executed, _))| (shape, json!(executed))).collect();
        let resident = blocks_per_sm(&config.model, kernel, threads, launch.dynamic_shared);
        json!({
            "kernel": kernel.name,
            "launch": launch.ordinal,
            "grid": launch.grid,
            "block": launch.block,
            "dynamic_shared": launch.dynamic_shared,
            "device": format!("sm_{}", config.model.sm),
            "insts": insts,
            "insts_by_class": classes,
            "thread_insts": lanes,
            "simt_efficiency": ratio(lanes, 32 * insts),
            "divergent_branches": self.divergent.iter().sum::<u64>(),
            "global": global,
            "unique_bytes_read": read,
            "unique_bytes_written": written,
            "traffic_ratio": ratio(32 * self.global_all().sectors, read + written),
            "scattered": scattered,
            "shared": {
                "requests": shared.requests,
                "wavefronts": shared.wavefronts,
                "ideal": shared.ideal,
                "bank_conflicts": shared.conflicts(),
            },
            "bank_conflict_lines": conflicts,
            "mma": mma,
            "mma_flops": self.mma_flops(kernel),
            "mma_useful_flops": self.useful_flops,
            "barriers": self.barriers,
            "barriers_per_block": ratio(self.barriers, blocks),
            "nondeterministic_atomics": self.nondeterministic_atomics,
            "registers": kernel.registers,
            "shared_bytes": kernel.shared_dynamic + launch.dynamic_shared,
            "blocks_per_sm": resident,
            "occupancy": f64::from(resident * threads.div_ceil(32)) / 64.0,
            "modelled_seconds": launch.modelled_seconds,
            "modelled_bound": launch.modelled_bound,
        })
    }
}

/// Appends one line to a file of JSON lines, which is made when it does not exist.
///
/// # Errors
/// The file cannot be written.
pub fn append_report(path: impl AsRef<Path>, value: &Value) -> io::Result<()> {
    let mut line = value.to_string();
    line.push('\n');
    OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
}
