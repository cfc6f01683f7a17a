//! Runs stores; see `loads`.
// Loops over the lanes index several arrays at once, and vectorise as they are.
#![allow(clippy::needless_range_loop)]

use super::access::{
    Lanes, Part, Shape, addresses, aligned, block_of, global_is_watched, in_local, in_params, in_shared, low,
    not_pending, note_global, note_shared, same_allocation, shared_length, space_from, split_generic,
    split_global, whole,
};
use super::load_store::{Form, entry, known_addresses};
use crate::check::shared::Touch;
use crate::count::GlobalKind;
use crate::machine::core::Core;
use crate::machine::inst::{Flow, Inst};
use crate::machine::regs::{FULL, Regs};
use crate::mem::{DEFINED, PENDING, UNDEFINED};
use crate::ptx::ast::Space;

entry!(store_global, to_global);
entry!(store_shared, to_shared);
entry!(store_local, to_local);
entry!(store_param, to_param);
entry!(store_generic, to_anywhere);

#[inline(always)]
fn to_global(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    if mask == FULL && whole_global(core, inst)? {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    write_global(core, inst, &at, mask)
}

#[inline(always)]
fn to_shared(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    if mask == FULL && whole_shared(core, inst)? {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    write_shared(core, inst, &at, mask)
}

#[inline(always)]
fn to_local(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    let at = known_addresses(core, inst, mask)?;
    write_local(core, inst, &at, mask)
}

/// `.param` variables of calls are in the frame; the kernel's own cannot be written.
#[inline(always)]
fn to_param(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    let at = known_addresses(core, inst, mask)?;
    let [_, _, (_, local), _] = split_generic(&at, mask);
    if mask & !local != 0 {
        write_params(core, inst, &at, mask & !local)?;
    }
    if local == 0 { Ok(()) } else { write_local(core, inst, &at, local) }
}

#[inline(always)]
fn to_anywhere(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    if mask == FULL && whole_global(core, inst)? {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    for (space, lanes) in split_generic(&at, mask) {
        match space {
            _ if lanes == 0 => {}
            Space::Shared => write_shared(core, inst, &at, lanes)?,
            Space::Local => write_local(core, inst, &at, lanes)?,
            Space::Param => write_params(core, inst, &at, lanes)?,
            _ => write_global(core, inst, &at, lanes)?,
        }
    }
    Ok(())
}

// ---- the whole warp at once

/// Words or doublewords that are all defined, as registers of their own width: what `gather` can write.
#[inline(always)]
fn plain(core: &Core<'_>, inst: &Inst) -> bool {
    let form = Form(inst.aux);
    let regs = &core.warp.regs;
    for j in 0..form.count() {
        let (slot, wide) = form.data(inst, &core.kernel.extra, j);
        if form.element() != if wide { 8 } else { 4 } {
            return false;
        }
        if regs.track && (if wide { regs.any_undef64(slot) } else { regs.any_undef32(slot) }) != 0 {
            return false;
        }
    }
    true
}

/// False when the access needs the long way; nothing has happened then.
#[inline(always)]
fn whole_global(core: &mut Core<'_>, inst: &Inst) -> Result<bool, Flow> {
    let form = Form(inst.aux);
    let size = form.size();
    let Some((first, Shape::Row)) = whole(core, inst.a, form.wide(), inst.imm, size) else {
        return Ok(false);
    };
    let Some(index) = core.memory.hint(inst.pc) else { return Ok(false) };
    let length = Shape::Row.length(size);
    let Some(block) = block_of(core.memory.get(index), Touch::Write, first, length, size) else {
        return Ok(false);
    };
    if !plain(core, inst) {
        return Ok(false);
    }
    if global_is_watched(core) {
        let at = addresses(core, inst.a, form.wide(), inst.imm);
        note_global(core, inst, &at, FULL, size, form.note(GlobalKind::Store))?;
    }
    let a = core.memory.get_mut(index);
    a.was_written = true;
    if a.maybe_undefined {
        a.shadow[block.clone()].fill(DEFINED);
    }
    gather(&core.warp.regs, &core.kernel.extra, inst, &mut a.bytes_mut()[block]);
    Ok(true)
}

#[inline(always)]
fn whole_shared(core: &mut Core<'_>, inst: &Inst) -> Result<bool, Flow> {
    let form = Form(inst.aux);
    let size = form.size();
    let Some((first, Shape::Row)) = whole(core, inst.a, form.wide(), inst.imm, size) else {
        return Ok(false);
    };
    let (first, length) = (first as u32 as usize, Shape::Row.length(size));
    if first + length > shared_length(core) as usize || first & (size as usize - 1) != 0 || !plain(core, inst)
    {
        return Ok(false);
    }
    let block = first..first + length;
    if core.block.pending.count > 0
        && core.block.shared_shadow[block.clone()].iter().fold(0, |a, b| a | b) & PENDING != 0
    {
        return Ok(false);
    }
    if core.counters.memory || core.block.race.is_some() {
        let offsets = low(&addresses(core, inst.a, form.wide(), inst.imm));
        if core.counters.memory {
            core.counters.shared(inst.pc, &offsets, FULL, size, false);
        }
        if core.block.race.is_some() {
            // In a row no two lanes write one word, so the values do not matter.
            note_shared(core, inst, &offsets, FULL, size, form.shared_touch(Touch::Write), None)?;
        }
    }
    if core.warp.regs.track {
        core.block.shared_shadow[block.clone()].fill(DEFINED);
    }
    gather(&core.warp.regs, &core.kernel.extra, inst, &mut core.block.shared[block]);
    Ok(true)
}

/// Writes a row from the source registers.
#[inline(always)]
fn gather(regs: &Regs, extra: &[u32], inst: &Inst, block: &mut [u8]) {
    let form = Form(inst.aux);
    let (element, size) = (form.element(), form.size() as usize);
    for j in 0..form.count() {
        let slot = form.data(inst, extra, j).0;
        let at = j * element;
        if element == 4 {
            let value = regs.get32(slot);
            match size {
                4 => column32::<4>(block, at, value),
                8 => column32::<8>(block, at, value),
                16 => column32::<16>(block, at, value),
                _ => column32::<32>(block, at, value),
            }
        } else {
            for (row, value) in block.chunks_exact_mut(size).zip(regs.get64(slot)) {
                row[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

#[inline(always)]
fn column32<const SIZE: usize>(block: &mut [u8], at: usize, value: &[u32; 32]) {
    for (row, value) in block.as_chunks_mut::<SIZE>().0.iter_mut().zip(value) {
        row[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

// ---- lane by lane

#[inline(always)]
fn write_global(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    let space = if space_from(inst.aux) == Space::Const { Space::Const } else { Space::Global };
    aligned(core, inst, space, Touch::Write, at, mask, size)?;
    if let Some(part) = same_allocation(core, inst, space, Touch::Write, at, mask, size) {
        note_global(core, inst, at, mask, size, Form(inst.aux).note(GlobalKind::Store))?;
        write_part(core, inst, &part);
        return Ok(());
    }
    write_elsewhere(core, inst, space, at, mask)
}

#[inline(never)]
fn write_elsewhere(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    at: &[u64; 32],
    mask: u32,
) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    let parts = split_global(core, inst, space, Touch::Write, at, mask, size)?;
    note_global(core, inst, at, mask, size, Form(inst.aux).note(GlobalKind::Store))?;
    for part in &parts {
        write_part(core, inst, part);
    }
    Ok(())
}

#[inline(always)]
fn write_part(core: &mut Core<'_>, inst: &Inst, part: &Part) {
    let a = core.memory.get_mut(part.index);
    a.was_written = true;
    let mut undefined = a.maybe_undefined;
    let (bytes, shadow) = a.parts_mut();
    give(&core.warp.regs, &core.kernel.extra, inst, bytes, shadow, &mut undefined, &part.lanes, part.mask);
    a.maybe_undefined = undefined;
}

#[inline(always)]
fn write_shared(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let form = Form(inst.aux);
    let (size, offsets) = (form.size(), low(at));
    let at = offsets.map(u64::from);
    aligned(core, inst, Space::Shared, Touch::Write, &at, mask, size)?;
    let lanes = in_shared(core, inst, Touch::Write, &at, mask, size)?;
    if core.counters.memory {
        core.counters.shared(inst.pc, &offsets, mask, size, false);
    }
    not_pending(core, inst, &lanes, mask, Touch::Write)?;
    if core.block.race.is_some() {
        let values = written_values(&core.warp.regs, &core.kernel.extra, inst);
        let touch = form.shared_touch(Touch::Write);
        note_shared(core, inst, &offsets, mask, size, touch, Some(&values))?;
    }
    let block = &mut *core.block;
    let mut undefined = core.warp.regs.track;
    give(
        &core.warp.regs,
        &core.kernel.extra,
        inst,
        &mut block.shared,
        &mut block.shared_shadow,
        &mut undefined,
        &lanes,
        mask,
    );
    Ok(())
}

#[inline(always)]
fn write_local(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    let at = low(at).map(u64::from);
    aligned(core, inst, Space::Local, Touch::Write, &at, mask, size)?;
    let lanes = in_local(core, inst, Touch::Write, &at, mask, size)?;
    let warp = &mut *core.warp;
    let mut undefined = warp.regs.track;
    give(
        &warp.regs,
        &core.kernel.extra,
        inst,
        &mut warp.local,
        &mut warp.local_shadow,
        &mut undefined,
        &lanes,
        mask,
    );
    Ok(())
}

/// Kernel parameters cannot be written: this always reports.
#[cold]
fn write_params(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let at = low(at).map(u64::from);
    in_params(core, inst, Touch::Write, &at, mask, Form(inst.aux).size()).map(|_| ())
}

/// What each lane writes, little-endian.
#[inline(always)]
fn written_values(regs: &Regs, extra: &[u32], inst: &Inst) -> [u128; 32] {
    let form = Form(inst.aux);
    let bits = 8 * form.element() as u32;
    let keep = u128::MAX >> (128 - bits);
    let mut out = [0; 32];
    for j in 0..form.count() {
        let (slot, wide) = form.data(inst, extra, j);
        let shift = bits * j as u32;
        if shift >= 128 {
            break;
        }
        for lane in 0..32 {
            let value =
                if wide { u128::from(regs.get64(slot)[lane]) } else { u128::from(regs.get32(slot)[lane]) };
            out[lane] |= (value & keep) << shift;
        }
    }
    out
}

/// Moves the source registers into the bytes of the lanes. `undefined` says whether the shadow may have undefined bytes, before and after.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn give(
    regs: &Regs,
    extra: &[u32],
    inst: &Inst,
    bytes: &mut [u8],
    shadow: &mut [u8],
    undefined: &mut bool,
    lanes: &Lanes,
    mask: u32,
) {
    let form = Form(inst.aux);
    let element = form.element();
    for j in 0..form.count() {
        let (slot, wide) = form.data(inst, extra, j);
        let at = j * element;
        let undef = if wide {
            let value = regs.get64(slot);
            match element {
                1 => lanes.store(bytes, at, mask, |lane| value[lane] as u8),
                2 => lanes.store(bytes, at, mask, |lane| value[lane] as u16),
                4 => lanes.store(bytes, at, mask, |lane| value[lane] as u32),
                _ => lanes.store(bytes, at, mask, |lane| value[lane]),
            }
            regs.undef64[slot as usize]
        } else {
            let value = regs.get32(slot);
            match element {
                1 => lanes.store(bytes, at, mask, |lane| value[lane] as u8),
                2 => lanes.store(bytes, at, mask, |lane| value[lane] as u16),
                _ => lanes.store(bytes, at, mask, |lane| value[lane]),
            }
            regs.undef32[slot as usize]
        };
        // The high part of a register counts only where it is stored.
        let two = element == 8 || element == 4 && !wide;
        let undef = [undef[0] & mask, if two { undef[1] & mask } else { undef[0] & mask }];
        if regs.track && (undef[0] | undef[1]) != 0 {
            *undefined = true;
            store_undefined(shadow, lanes, mask, at, element, undef);
        } else if *undefined {
            match element {
                1 => lanes.store(shadow, at, mask, |_| 0u8),
                2 => lanes.store(shadow, at, mask, |_| 0u16),
                4 => lanes.store(shadow, at, mask, |_| 0u32),
                _ => lanes.store(shadow, at, mask, |_| 0u64),
            }
        }
    }
}

#[cold]
fn store_undefined(shadow: &mut [u8], lanes: &Lanes, mask: u32, at: usize, element: usize, undef: [u32; 2]) {
    for lane in (0..32).filter(|&lane| mask >> lane & 1 == 1) {
        let bytes = &mut lanes.slice_mut(shadow, lane)[at..at + element];
        for (n, byte) in bytes.iter_mut().enumerate() {
            let part = usize::from(n >= element.div_ceil(2));
            *byte = if undef[part] >> lane & 1 == 1 { UNDEFINED } else { DEFINED };
        }
    }
}
