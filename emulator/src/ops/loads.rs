//! Runs loads.
//!
//! A whole warp that reads one row of memory, or one place, takes a short way; everything else goes lane by lane. The functions are
//! inlined into one body a state space, which is compiled for two processors: none of them may become a call.

use super::access::{
    Lanes, Part, Shape, addresses, aligned, block_of, global_is_watched, in_local, in_params, in_shared, low,
    not_pending, note_global, note_shared, same_allocation, shared_length, split_generic, split_global,
    whole,
};
use super::load_store::{Form, SIGNED, entry, known_addresses};
use crate::check::shared::Touch;
use crate::count::GlobalKind;
use crate::machine::core::Core;
use crate::machine::inst::{Flow, Inst};
use crate::machine::regs::{FULL, Regs};
use crate::mem::{LOCAL_WINDOW, UNDEFINED};
use crate::ptx::ast::Space;

entry!(load_global, from_global);
entry!(load_const, from_const);
entry!(load_shared, from_shared);
entry!(load_local, from_local);
entry!(load_param, from_param);
entry!(load_generic, from_anywhere);

#[inline(always)]
fn from_global(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    if mask == FULL && whole_global(core, inst)? {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    read_global(core, inst, Space::Global, &at, mask)
}

#[inline(always)]
fn from_const(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    let at = known_addresses(core, inst, mask)?;
    read_global(core, inst, Space::Const, &at, mask)
}

#[inline(always)]
fn from_shared(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    if mask == FULL && whole_shared(core, inst)? {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    read_shared(core, inst, &at, mask)
}

#[inline(always)]
fn from_local(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    let at = known_addresses(core, inst, mask)?;
    read_local(core, inst, &at, mask)
}

/// Parameters of the kernel, or a `.param` variable of a call whose address was taken.
#[inline(always)]
fn from_param(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    if mask == FULL && whole_param(core, inst) {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    let [_, _, (_, local), _] = split_generic(&at, mask);
    if mask & !local != 0 {
        read_params(core, inst, &at, mask & !local)?;
    }
    if local == 0 { Ok(()) } else { read_local(core, inst, &at, local) }
}

#[inline(always)]
fn from_anywhere(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    // An address in an allocation is in none of the windows.
    if mask == FULL && whole_global(core, inst)? {
        return Ok(());
    }
    let at = known_addresses(core, inst, mask)?;
    for (space, lanes) in split_generic(&at, mask) {
        match space {
            _ if lanes == 0 => {}
            Space::Shared => read_shared(core, inst, &at, lanes)?,
            Space::Local => read_local(core, inst, &at, lanes)?,
            Space::Param => read_params(core, inst, &at, lanes)?,
            _ => read_global(core, inst, Space::Global, &at, lanes)?,
        }
    }
    Ok(())
}

// ---- the whole warp at once

/// False when the access needs the long way; nothing has happened then.
#[inline(always)]
fn whole_global(core: &mut Core<'_>, inst: &Inst) -> Result<bool, Flow> {
    let form = Form(inst.aux);
    let size = form.size();
    let Some((first, shape)) = whole(core, inst.a, form.wide(), inst.imm, size) else { return Ok(false) };
    let length = shape.length(size);
    let Some(index) = core.memory.hint(inst.pc) else { return Ok(false) };
    let a = core.memory.get(index);
    let Some(block) = block_of(a, Touch::Read, first, length, size) else { return Ok(false) };
    if a.maybe_undefined && core.warp.regs.track && a.shadow[block.clone()].iter().fold(0, |a, b| a | b) != 0
    {
        return Ok(false);
    }
    if global_is_watched(core) {
        let at = addresses(core, inst.a, form.wide(), inst.imm);
        note_global(core, inst, &at, FULL, size, form.note(GlobalKind::Load))?;
    }
    let a = core.memory.get_mut(index);
    a.was_read = true;
    spread(&mut core.warp.regs, &core.kernel.extra, inst, &a.bytes()[block], shape);
    Ok(true)
}

#[inline(always)]
fn whole_shared(core: &mut Core<'_>, inst: &Inst) -> Result<bool, Flow> {
    let form = Form(inst.aux);
    let size = form.size();
    let Some((first, shape)) = whole(core, inst.a, form.wide(), inst.imm, size) else { return Ok(false) };
    let (first, length) = (first as u32 as usize, shape.length(size));
    if first + length > shared_length(core) as usize || first & (size as usize - 1) != 0 {
        return Ok(false);
    }
    let block = first..first + length;
    if (core.warp.regs.track || core.block.pending.count > 0)
        && core.block.shared_shadow[block.clone()].iter().fold(0, |a, b| a | b) != 0
    {
        return Ok(false);
    }
    if core.counters.memory || core.block.race.is_some() {
        let offsets = low(&addresses(core, inst.a, form.wide(), inst.imm));
        if core.counters.memory {
            core.counters.shared(inst.pc, &offsets, FULL, size, false);
        }
        note_shared(core, inst, &offsets, FULL, size, form.shared_touch(Touch::Read), None)?;
    }
    spread(&mut core.warp.regs, &core.kernel.extra, inst, &core.block.shared[block], shape);
    Ok(true)
}

/// A parameter by its name: all lanes read one place.
#[inline(always)]
fn whole_param(core: &mut Core<'_>, inst: &Inst) -> bool {
    let form = Form(inst.aux);
    let size = form.size();
    let Some((first, Shape::Point)) = whole(core, inst.a, form.wide(), inst.imm, size) else { return false };
    let at = first as u32 as usize;
    if first >> 32 == LOCAL_WINDOW >> 32 || at & (size as usize - 1) != 0 {
        return false;
    }
    let Some(bytes) = core.params.get(at..at + size as usize) else { return false };
    spread(&mut core.warp.regs, &core.kernel.extra, inst, bytes, Shape::Point);
    true
}

/// Moves a row, or one place for all, into the destination registers; all of it is defined.
#[inline(always)]
fn spread(regs: &mut Regs, extra: &[u32], inst: &Inst, block: &[u8], shape: Shape) {
    let form = Form(inst.aux);
    let (element, size) = (form.element(), form.size() as usize);
    for j in 0..form.count() {
        let (slot, wide) = form.data(inst, extra, j);
        let at = j * element;
        if shape == Shape::Point {
            let value = extended(&block[at..at + element], form.has(SIGNED));
            if wide {
                regs.put64(slot, &[value; 32], FULL, [0; 2]);
            } else {
                regs.put32(slot, &[value as u32; 32], FULL, [0; 2]);
            }
        } else if element == 4 && !wide {
            let out = match size {
                4 => column32::<4>(block, at),
                8 => column32::<8>(block, at),
                16 => column32::<16>(block, at),
                _ => column32::<32>(block, at),
            };
            regs.put32(slot, &out, FULL, [0; 2]);
        } else {
            let mut out = [0u64; 32];
            for (out, row) in out.iter_mut().zip(block.chunks_exact(size)) {
                *out = extended(&row[at..at + element], form.has(SIGNED));
            }
            if wide {
                regs.put64(slot, &out, FULL, [0; 2]);
            } else {
                regs.put32(slot, &out.map(|v| v as u32), FULL, [0; 2]);
            }
        }
    }
}

/// The word at `at` of each row of `SIZE` bytes.
#[inline(always)]
fn column32<const SIZE: usize>(block: &[u8], at: usize) -> [u32; 32] {
    let mut out = [0; 32];
    for (out, row) in out.iter_mut().zip(block.as_chunks::<SIZE>().0) {
        *out = u32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
    }
    out
}

#[inline(always)]
fn extended(bytes: &[u8], signed: bool) -> u64 {
    let (value, bits) = match *bytes {
        [a] => (u64::from(a), 8),
        [a, b] => (u64::from(u16::from_le_bytes([a, b])), 16),
        [a, b, c, d] => (u64::from(u32::from_le_bytes([a, b, c, d])), 32),
        [a, b, c, d, e, f, g, h] => (u64::from_le_bytes([a, b, c, d, e, f, g, h]), 64),
        _ => (0, 64),
    };
    if signed { ((value << (64 - bits)) as i64 >> (64 - bits)) as u64 } else { value }
}

// ---- lane by lane

#[inline(always)]
fn read_global(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    at: &[u64; 32],
    mask: u32,
) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    aligned(core, inst, space, Touch::Read, at, mask, size)?;
    if let Some(part) = same_allocation(core, inst, space, Touch::Read, at, mask, size) {
        if space == Space::Global {
            note_global(core, inst, at, mask, size, Form(inst.aux).note(GlobalKind::Load))?;
        }
        read_part(core, inst, &part);
        return Ok(());
    }
    read_elsewhere(core, inst, space, at, mask)
}

#[inline(never)]
fn read_elsewhere(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    at: &[u64; 32],
    mask: u32,
) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    let parts = split_global(core, inst, space, Touch::Read, at, mask, size)?;
    if space == Space::Global {
        note_global(core, inst, at, mask, size, Form(inst.aux).note(GlobalKind::Load))?;
    }
    for part in &parts {
        read_part(core, inst, part);
    }
    Ok(())
}

#[inline(always)]
fn read_part(core: &mut Core<'_>, inst: &Inst, part: &Part) {
    let a = core.memory.get_mut(part.index);
    a.was_read = true;
    let shadow = a.maybe_undefined.then_some(a.shadow.as_slice());
    take(&mut core.warp.regs, &core.kernel.extra, inst, a.bytes(), shadow, &part.lanes, part.mask);
}

#[inline(always)]
fn read_shared(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let form = Form(inst.aux);
    let (size, offsets) = (form.size(), low(at));
    let at = offsets.map(u64::from);
    aligned(core, inst, Space::Shared, Touch::Read, &at, mask, size)?;
    let lanes = in_shared(core, inst, Touch::Read, &at, mask, size)?;
    if core.counters.memory {
        core.counters.shared(inst.pc, &offsets, mask, size, false);
    }
    not_pending(core, inst, &lanes, mask, Touch::Read)?;
    note_shared(core, inst, &offsets, mask, size, form.shared_touch(Touch::Read), None)?;
    let block = &core.block;
    take(
        &mut core.warp.regs,
        &core.kernel.extra,
        inst,
        &block.shared,
        Some(&block.shared_shadow),
        &lanes,
        mask,
    );
    Ok(())
}

#[inline(always)]
fn read_local(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    let at = low(at).map(u64::from);
    aligned(core, inst, Space::Local, Touch::Read, &at, mask, size)?;
    let lanes = in_local(core, inst, Touch::Read, &at, mask, size)?;
    let warp = &mut *core.warp;
    take(&mut warp.regs, &core.kernel.extra, inst, &warp.local, Some(&warp.local_shadow), &lanes, mask);
    Ok(())
}

#[inline(always)]
fn read_params(core: &mut Core<'_>, inst: &Inst, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let size = Form(inst.aux).size();
    let at = low(at).map(u64::from);
    aligned(core, inst, Space::Param, Touch::Read, &at, mask, size)?;
    let lanes = in_params(core, inst, Touch::Read, &at, mask, size)?;
    take(&mut core.warp.regs, &core.kernel.extra, inst, core.params, None, &lanes, mask);
    Ok(())
}

/// Moves the bytes of the lanes into the destination registers.
#[inline(always)]
fn take(
    regs: &mut Regs,
    extra: &[u32],
    inst: &Inst,
    bytes: &[u8],
    shadow: Option<&[u8]>,
    lanes: &Lanes,
    mask: u32,
) {
    let form = Form(inst.aux);
    let shadow = shadow.filter(|shadow| regs.track && lanes.any_shadow(shadow, mask) & UNDEFINED != 0);
    let signed = form.has(SIGNED);
    let element = form.element();
    for j in 0..form.count() {
        let (slot, wide) = form.data(inst, extra, j);
        let at = j * element;
        let undef = shadow.map_or([0; 2], |s| undefined_lanes(s, lanes, mask, at, element, wide, signed));
        if wide {
            let mut out = [0u64; 32];
            match (element, signed) {
                (1, false) => lanes.fetch(bytes, at, &mut out, |v: u8| u64::from(v)),
                (1, true) => lanes.fetch(bytes, at, &mut out, |v: i8| v as u64),
                (2, false) => lanes.fetch(bytes, at, &mut out, |v: u16| u64::from(v)),
                (2, true) => lanes.fetch(bytes, at, &mut out, |v: i16| v as u64),
                (4, false) => lanes.fetch(bytes, at, &mut out, |v: u32| u64::from(v)),
                (4, true) => lanes.fetch(bytes, at, &mut out, |v: i32| v as u64),
                _ => lanes.fetch(bytes, at, &mut out, |v: u64| v),
            }
            regs.put64(slot, &out, mask, undef);
        } else {
            let mut out = [0u32; 32];
            match (element, signed) {
                (1, false) => lanes.fetch(bytes, at, &mut out, |v: u8| u32::from(v)),
                (1, true) => lanes.fetch(bytes, at, &mut out, |v: i8| v as u32),
                (2, false) => lanes.fetch(bytes, at, &mut out, |v: u16| u32::from(v)),
                (2, true) => lanes.fetch(bytes, at, &mut out, |v: i16| v as u32),
                _ => lanes.fetch(bytes, at, &mut out, |v: u32| v),
            }
            regs.put32(slot, &out, mask, undef);
        }
    }
}

/// Undefined lanes of the two parts of a register after a load. A part that the load fills with zeros is defined; one that repeats the
/// sign is as undefined as the sign.
#[cold]
fn undefined_lanes(
    shadow: &[u8],
    lanes: &Lanes,
    mask: u32,
    at: usize,
    element: usize,
    wide: bool,
    signed: bool,
) -> [u32; 2] {
    let parts = usize::from(element == 8 || element == 4 && !wide) + 1;
    let mut out = [0; 2];
    for lane in (0..32).filter(|&lane| mask >> lane & 1 == 1) {
        let bytes = &lanes.slice(shadow, lane)[at..at + element];
        for (part, bytes) in bytes.chunks(element / parts).enumerate() {
            out[part] |= u32::from(bytes.iter().any(|b| b & UNDEFINED != 0)) << lane;
        }
    }
    if parts == 1 && signed {
        out[1] = out[0];
    }
    out
}
