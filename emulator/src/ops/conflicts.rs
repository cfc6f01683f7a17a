//! Reports of accesses that no synchronisation orders.

use super::access::{Lanes, lanes_where, verb};
use crate::check::global::{GlobalAccess, GlobalConflict};
use crate::check::shared::{Conflict, Side, Touch};
use crate::config::Check;
use crate::machine::core::Core;
use crate::machine::inst::{Flow, Inst};
use crate::mem::PENDING;
use crate::report::Fault;

fn go_on(flow: Flow) -> Result<(), Flow> {
    if flow == Flow::Fault { Err(flow) } else { Ok(()) }
}

/// `offset 132 in shared memory (tile+4)`.
pub(crate) fn shared_place(core: &Core<'_>, offset: u32) -> String {
    let symbols = core.kernel.shared_symbols.iter();
    // The dynamic part has size 0 here and everything behind its start.
    let held = |s: &&crate::machine::inst::SharedSymbol| {
        offset >= s.offset && (s.size == 0 || offset - s.offset < s.size)
    };
    match symbols.filter(held).max_by_key(|s| s.offset) {
        Some(s) => format!("offset {offset} in shared memory ({}+{})", s.name, offset - s.offset),
        None => format!("offset {offset} in shared memory"),
    }
}

fn thread(core: &Core<'_>, warp: u32, lane: u32) -> String {
    let ntid = core.block.ids.ntid;
    let linear = warp * 32 + lane;
    let (x, y, z) = (linear % ntid[0], linear / ntid[0] % ntid[1], linear / (ntid[0] * ntid[1]));
    format!("thread ({x},{y},{z}), warp {warp} lane {lane}")
}

fn side(core: &Core<'_>, s: &Side) -> String {
    format!("{} by {} {}", verb(s.touch), thread(core, s.warp, s.lane), core.place(s.pc))
}

/// A race in shared memory.
#[cold]
pub(crate) fn shared(core: &mut Core<'_>, inst: &Inst, conflict: &Conflict) -> Result<(), Flow> {
    let Conflict { first, second, offset, intra_warp } = conflict;
    let (check, text) = if *intra_warp {
        (Check::Intra, "lanes of a warp use one word of shared memory without bar.warp.sync between")
    } else if first.warp == second.warp && first.pc == second.pc {
        (Check::Race, "lanes of one instruction write different values to one word of shared memory")
    } else {
        (Check::Race, "threads use one word of shared memory without a barrier between")
    };
    let lines = vec![
        format!("Race: {} after {}: {text}", verb(second.touch), verb(first.touch)),
        shared_place(core, *offset),
        format!("first:  {}", side(core, first)),
        format!("second: {}", side(core, second)),
    ];
    go_on(core.find(check, Fault::LaunchFailed, inst, 1 << (second.lane & 31), lines))
}

/// A race between blocks, or a read-only load of something the launch writes.
#[cold]
pub(crate) fn global(
    core: &mut Core<'_>,
    inst: &Inst,
    access: &GlobalAccess<'_>,
    conflict: &GlobalConflict,
) -> Result<(), Flow> {
    let (block, pc, touch) = conflict.first;
    let near = |lane: usize| {
        let start = access.addresses[lane] & !3;
        start <= conflict.address && conflict.address < access.addresses[lane] + u64::from(access.size)
    };
    let lanes = match lanes_where(access.mask, near) {
        0 => access.mask,
        lanes => lanes & lanes.wrapping_neg(),
    };
    let (check, title) = if conflict.read_only {
        (
            Check::ReadOnly,
            "ReadOnly: ld.global.nc and a write of the same launch use one word of global memory".to_owned(),
        )
    } else {
        let text = "blocks use one word of global memory without order";
        (Check::Global, format!("Race: {} after {}: {text}", verb(access.touch), verb(touch)))
    };
    let lines = vec![
        title,
        core.memory.describe(conflict.address, 4),
        format!("first:  {} by block {block} {}", verb(touch), core.place(pc)),
        format!("second: {} by block {} {}", verb(access.touch), access.block, core.place(access.pc)),
    ];
    go_on(core.find(check, Fault::LaunchFailed, inst, lanes, lines))
}

/// An access to bytes that an asynchronous copy is about to write.
#[cold]
pub(crate) fn pending(
    core: &mut Core<'_>,
    inst: &Inst,
    lanes: &Lanes,
    mask: u32,
    touch: Touch,
) -> Result<(), Flow> {
    let waiting =
        |lane: usize| lanes.slice(&core.block.shared_shadow, lane).iter().position(|s| s & PENDING != 0);
    let hit = lanes_where(mask, |lane| mask >> lane & 1 == 1 && waiting(lane).is_some());
    if hit == 0 {
        return Ok(());
    }
    let lane = hit.trailing_zeros() as usize;
    let offset = (lanes.offset(lane) + waiting(lane).unwrap_or(0)) as u32;
    let mut lines = vec![
        "Race: shared memory is accessed while an asynchronous copy to it is pending".to_owned(),
        format!("{} of {}", verb(touch), shared_place(core, offset)),
    ];
    if let Some((pc, thread_index)) = core.block.pending.by(offset) {
        let who = thread(core, thread_index / 32, thread_index % 32);
        lines.push(format!("the copy was issued by {who} {}", core.place(pc)));
    }
    go_on(core.find(Check::Race, Fault::LaunchFailed, inst, hit, lines))
}
