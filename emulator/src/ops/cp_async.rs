//! Asynchronous copies from global to shared memory.
//!
//! A copy reads at its issue and writes at the last possible moment: when its thread waits for it. Until then its destination is
//! pending, and nobody may touch it. Hardware may write at any time between, so the race detector sees a write at both ends.
// Loops over the lanes index several arrays at once, and vectorise as they are.
#![allow(clippy::needless_range_loop)]

use super::access::{
    GlobalNote, Part, addresses, aligned, defined_address, in_shared, lanes_where, low, not_pending,
    note_global, note_shared, same_allocation, space_of, split_global,
};
use super::conflicts::shared_place;
use crate::check::shared::Touch;
use crate::config::Check;
use crate::count::GlobalKind;
use crate::lower::{AnySlot, Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Flow, Inst};
use crate::machine::warp::PendingCopy;
use crate::mem::{DEFINED, PENDING};
use crate::ptx::ast::{Instruction, Operand, Space, Ty};
use crate::report::Fault;

/// `Inst::aux` of a copy: bits 0 to 4 its size, then how much of the source counts and how wide the addresses are.
const SIZE: u32 = 31;
const SOURCE_SIZE: u32 = 1 << 5;
const IGNORE: u32 = 1 << 6;
const IGNORE_NOT: u32 = 1 << 7;
const TO_WIDE: u32 = 1 << 8;
const FROM_WIDE: u32 = 1 << 9;

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    if i.opcode != "cp" {
        return Ok(None);
    }
    let mut m = Mods::new(&i.modifiers);
    let named = || i.text.split(' ').next().unwrap_or_default().to_owned();
    if !m.take("async") || ["bulk", "mbarrier", "reduce"].iter().any(|w| m.has(w)) {
        return Err(format!(
            "{} is not supported: only copies of 4, 8 or 16 bytes and their groups are",
            named()
        ));
    }
    if let Some(word) = m.take_any(&["commit_group", "wait_group", "wait_all"]) {
        m.finish()?;
        let inst = match (word, i.operands.as_slice()) {
            ("commit_group", []) => Inst::new(commit, Class::CpAsync),
            ("wait_all", []) => Inst::new(wait_all, Class::CpAsync),
            ("wait_group", [Operand::Int { bits, negative: false }]) => {
                Inst { imm: (*bits).min(u64::from(u32::MAX)) as i64, ..Inst::new(wait, Class::CpAsync) }
            }
            _ => return Err(format!("wrong operands of {}", named())),
        };
        return Ok(Some(inst));
    }
    copy(d, i, m).map(Some)
}

fn copy(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let cache = m.take_any(&["ca", "cg"]).ok_or(".ca or .cg is missing")?;
    if !m.take("shared") && !m.take("shared::cta") || !m.take("global") {
        return Err("a copy goes from .global to .shared".to_owned());
    }
    let policy = m.has("L2::cache_hint");
    m.skip_memory_hints();
    m.finish()?;
    let mut operands = i.operands.as_slice();
    if policy {
        let (last, rest) = operands.split_last().ok_or("the cache policy is missing")?;
        d.src64(last, Ty::B64)?;
        operands = rest;
    }
    let (to, from, size, rest) = match operands {
        [to, from, Operand::Int { bits, .. }, rest @ ..] if rest.len() <= 1 => (to, from, *bits, rest),
        _ => return Err("a copy needs two addresses and a size".to_owned()),
    };
    if !(size == 16 || cache == "ca" && (size == 4 || size == 8)) {
        return Err(format!("cp.async.{cache} does not copy {size} bytes"));
    }
    let (to, from) = (d.address(to)?, d.address(from)?);
    space_of(&to, Space::Shared)?;
    space_of(&from, Space::Global)?;
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    let mut inst = Inst { strict: true, ..Inst::new(issue, Class::CpAsync) };
    inst.aux = size as u32 | flag(to.wide, TO_WIDE) | flag(from.wide, FROM_WIDE);
    (inst.a, inst.b) = (to.slot, from.slot);
    inst.x = d.extra(&[to.offset as u32]);
    inst.imm = from.offset;
    match rest {
        [] => {}
        [Operand::Not(_)] => {
            inst.e = d.src_pred(&rest[0])?.0;
            inst.aux |= IGNORE | IGNORE_NOT;
        }
        [operand @ Operand::Name(name)] if matches!(d.register(name), Some(AnySlot::Pred(_))) => {
            inst.e = d.src_pred(operand)?.0;
            inst.aux |= IGNORE;
        }
        [operand, ..] => {
            inst.c = d.src32(operand, Ty::U32)?;
            inst.aux |= SOURCE_SIZE;
        }
    }
    Ok(inst)
}

fn issue(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    match start(core, inst, mask) {
        Ok(()) => Flow::Next,
        Err(flow) => flow,
    }
}

fn start(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    let size = inst.aux & SIZE;
    let (to_wide, from_wide) = (inst.aux & TO_WIDE != 0, inst.aux & FROM_WIDE != 0);
    let lengths = source_lengths(core, inst, mask, size)?;
    let reading = lanes_where(mask, |lane| lengths[lane] > 0);
    defined_address(core, inst, inst.a, to_wide, mask)?;
    defined_address(core, inst, inst.b, from_wide, reading)?;
    let to_offset = i64::from(core.kernel.extra[inst.x as usize]);
    let offsets = low(&addresses(core, inst.a, to_wide, to_offset));
    let to = offsets.map(u64::from);
    let from = addresses(core, inst.b, from_wide, inst.imm);

    // All checks of both sides come before the first effect.
    aligned(core, inst, Space::Global, Touch::Read, &from, reading, size)?;
    aligned(core, inst, Space::Shared, Touch::Write, &to, mask, size)?;
    let lanes = in_shared(core, inst, Touch::Write, &to, mask, size)?;
    let mut parts: Vec<(Part, u32)> = Vec::new();
    let mut rest = reading;
    while rest != 0 {
        let length = lengths[rest.trailing_zeros() as usize];
        let same = lanes_where(rest, |lane| lengths[lane] == length);
        rest &= !same;
        if let Some(part) = same_allocation(core, inst, Space::Global, Touch::Read, &from, same, length) {
            parts.push((part, length));
        } else {
            let split = split_global(core, inst, Space::Global, Touch::Read, &from, same, length)?;
            parts.extend(split.into_iter().map(|part| (part, length)));
        }
    }
    if core.counters.memory {
        core.counters.shared(inst.pc, &offsets, mask, size, false);
    }
    let note =
        GlobalNote { kind: GlobalKind::CpAsync, touch: Touch::Read, read_only: false, float_atomic: false };
    note_sources(core, inst, &from, reading, &lengths, note)?;
    not_pending(core, inst, &lanes, mask, Touch::Write)?;

    let mut data = [[0u8; 16]; 32];
    let mut shadow = [[DEFINED; 16]; 32];
    for (part, length) in &parts {
        let a = core.memory.get_mut(part.index);
        a.was_read = true;
        let length = *length as usize;
        let undefined = a.maybe_undefined;
        let (bytes, marks) = (a.bytes(), a.shadow.as_slice());
        for lane in (0..32).filter(|&lane| part.mask >> lane & 1 == 1) {
            put(&mut data[lane], part.lanes.slice(bytes, lane), length);
            if undefined {
                put(&mut shadow[lane], part.lanes.slice(marks, lane), length);
            }
        }
    }
    if core.block.race.is_some() {
        let values = data.map(u128::from_le_bytes);
        note_shared(core, inst, &offsets, mask, size, Touch::Write, Some(&values))?;
    }
    let bytes = core.block.shared.len();
    for lane in (0..32).filter(|&lane| mask >> lane & 1 == 1) {
        let thread = core.warp.id * 32 + lane as u32;
        core.block.pending.issue(offsets[lane], size, bytes, inst.pc, thread);
        for mark in lanes.slice_mut(&mut core.block.shared_shadow, lane) {
            *mark |= PENDING;
        }
    }
    core.warp.copies.push(PendingCopy {
        lanes: mask,
        open: mask,
        groups: [0; 32],
        offsets,
        size,
        data,
        shadow,
        pc: inst.pc,
    });
    Ok(())
}

/// Copies the first `length` bytes; the usual lengths are no calls.
#[inline(always)]
fn put(to: &mut [u8], from: &[u8], length: usize) {
    match length {
        16 => to[..16].copy_from_slice(&from[..16]),
        8 => to[..8].copy_from_slice(&from[..8]),
        4 => to[..4].copy_from_slice(&from[..4]),
        _ => to[..length].copy_from_slice(&from[..length]),
    }
}

/// Counts the lanes that read, and looks for races, one length at a time (nearly always there is one).
fn note_sources(
    core: &mut Core<'_>,
    inst: &Inst,
    from: &[u64; 32],
    mut rest: u32,
    lengths: &[u32; 32],
    note: GlobalNote,
) -> Result<(), Flow> {
    while rest != 0 {
        let length = lengths[rest.trailing_zeros() as usize];
        let same = lanes_where(rest, |lane| lengths[lane] == length);
        rest &= !same;
        note_global(core, inst, from, same, length, note)?;
    }
    Ok(())
}

/// Bytes of the source that each lane copies; the rest of the destination becomes zero.
fn source_lengths(core: &mut Core<'_>, inst: &Inst, mask: u32, size: u32) -> Result<[u32; 32], Flow> {
    let mut lengths = [size; 32];
    let regs = &core.warp.regs;
    let mut undef = 0;
    if inst.aux & SOURCE_SIZE != 0 {
        lengths = *regs.get32(inst.c);
        undef = regs.any_undef32(inst.c) & mask;
    } else if inst.aux & IGNORE != 0 {
        let ignored = regs.pred[inst.e as usize] ^ if inst.aux & IGNORE_NOT != 0 { u32::MAX } else { 0 };
        for (lane, length) in lengths.iter_mut().enumerate() {
            *length = if ignored >> lane & 1 == 1 { 0 } else { size };
        }
        undef = regs.undef_pred[inst.e as usize] & mask;
    }
    if regs.track && undef != 0 && core.undefined(inst, undef, "size of an asynchronous copy") == Flow::Fault
    {
        return Err(Flow::Fault);
    }
    let long = lanes_where(mask, |lane| lengths[lane] > size);
    if long != 0 {
        let length = lengths[long.trailing_zeros() as usize];
        let text = format!("Invalid asynchronous copy of {size} bytes: its source size is {length}");
        core.find(Check::Bounds, Fault::IllegalAddress, inst, long, vec![text]);
        return Err(Flow::Fault);
    }
    Ok(lengths)
}

fn commit(core: &mut Core<'_>, _: &Inst, mask: u32) -> Flow {
    close(core, mask);
    Flow::Next
}

/// Ends the open group of each lane; it may be empty.
fn close(core: &mut Core<'_>, mask: u32) {
    let committed = &mut core.warp.committed;
    for copy in core.warp.copies.iter_mut().filter(|copy| copy.open & mask != 0) {
        for lane in 0..32 {
            if (copy.open & mask) >> lane & 1 == 1 {
                copy.groups[lane] = committed[lane];
            }
        }
        copy.open &= !mask;
    }
    for (lane, count) in committed.iter_mut().enumerate() {
        *count += mask >> lane & 1;
    }
}

fn wait(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    complete(core, mask, u32::try_from(inst.imm).unwrap_or(u32::MAX))
}

/// As a commit and a wait for everything.
fn wait_all(core: &mut Core<'_>, _: &Inst, mask: u32) -> Flow {
    close(core, mask);
    complete(core, mask, 0)
}

/// Writes what the lanes' groups hold, all but the `pending` most recent ones.
fn complete(core: &mut Core<'_>, mask: u32, pending: u32) -> Flow {
    if core.warp.copies.is_empty() {
        return Flow::Next;
    }
    let mut copies = std::mem::take(&mut core.warp.copies);
    let mut flow = Flow::Next;
    for copy in &mut copies {
        let committed = &core.warp.committed;
        let closed = copy.lanes & mask & !copy.open;
        let due = lanes_where(closed, |lane| committed[lane].wrapping_sub(copy.groups[lane]) > pending);
        if due == 0 || flow == Flow::Fault {
            continue;
        }
        copy.lanes &= !due;
        let size = copy.size as usize;
        for lane in (0..32).filter(|&lane| due >> lane & 1 == 1) {
            let at = copy.offsets[lane] as usize..copy.offsets[lane] as usize + size;
            put(&mut core.block.shared[at.clone()], &copy.data[lane], size);
            put(&mut core.block.shared_shadow[at], &copy.shadow[lane], size);
        }
        core.block.pending.count = core.block.pending.count.saturating_sub(due.count_ones());
        if core.block.race.is_some() {
            let values = copy.data.map(u128::from_le_bytes);
            let issued = &core.kernel.insts[copy.pc as usize];
            let (offsets, size) = (&copy.offsets, copy.size);
            if let Err(fault) = note_shared(core, issued, offsets, due, size, Touch::Write, Some(&values)) {
                flow = fault;
            }
        }
    }
    copies.retain(|copy| copy.lanes != 0);
    core.warp.copies = copies;
    flow
}

/// Lanes end: copies that they never waited for are reported and dropped. Their destination stays pending, for hardware may still write
/// there.
pub(super) fn abandon(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (mut lanes, mut lost, mut uncommitted, mut first) = (0, 0, 0, None);
    for copy in core.warp.copies.iter_mut().filter(|copy| copy.lanes & mask != 0) {
        let gone = copy.lanes & mask;
        lanes |= gone;
        lost += gone.count_ones();
        uncommitted += (gone & copy.open).count_ones();
        first.get_or_insert((copy.offsets[gone.trailing_zeros() as usize & 31], copy.pc));
        copy.lanes &= !gone;
        copy.open &= !gone;
    }
    core.warp.copies.retain(|copy| copy.lanes != 0);
    let Some((offset, pc)) = first else { return Flow::Next };
    let lines = vec![
        format!(
            "Misuse: threads end without waiting for {lost} asynchronous copies, {uncommitted} of them not committed"
        ),
        format!("the first goes to {}", shared_place(core, offset)),
        format!("it was issued {}", core.place(pc)),
    ];
    core.find(Check::Misuse, Fault::LaunchFailed, inst, lanes, lines)
}
