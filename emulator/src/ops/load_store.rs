//! Loads, stores, and instructions that only say how memory will be used.

use super::access::{
    GlobalNote, Lanes, Part, WIDE, addresses, aligned, defined_address, in_local, in_params, in_shared, low,
    not_pending, note_global, note_shared, place_bits, same_allocation, space_from, space_of, split_generic,
    split_global,
};
use crate::both;
use crate::check::shared::Touch;
use crate::count::GlobalKind;
use crate::lower::{AnySlot, Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::machine::regs::Regs;
use crate::mem::{DEFINED, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, UNDEFINED};
use crate::ptx::ast::{Instruction, Operand, Space, Ty};

/// `Inst::aux` of a load or store, behind the bits of [`place_bits`]: bits 4 to 6 the logarithm of an element's size, bits 8 to 11 the
/// number of elements, then these flags.
const SIGNED: u32 = 1 << 12;
const READ_ONLY: u32 = 1 << 13;
const STRONG: u32 = 1 << 14;
/// The only data register is a 64-bit one.
const DATA_WIDE: u32 = 1 << 15;

#[derive(Clone, Copy)]
struct Form(u32);

impl Form {
    #[inline(always)]
    fn wide(self) -> bool {
        self.0 & WIDE != 0
    }

    #[inline(always)]
    fn element(self) -> usize {
        1 << (self.0 >> 4 & 7)
    }

    #[inline(always)]
    fn count(self) -> usize {
        (self.0 >> 8 & 15) as usize
    }

    #[inline(always)]
    fn size(self) -> u32 {
        (self.count() * self.element()) as u32
    }

    #[inline(always)]
    fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }

    /// Slot of data element `j`, and whether it is a 64-bit one.
    #[inline(always)]
    fn data(self, inst: &Inst, extra: &[u32], j: usize) -> (u32, bool) {
        if self.count() == 1 {
            (inst.d, self.has(DATA_WIDE))
        } else {
            let packed = extra[inst.x as usize + j];
            (packed >> 1, packed & 1 == 1)
        }
    }

    fn note(self, kind: GlobalKind) -> GlobalNote {
        let touch = match kind {
            _ if self.has(STRONG) => Touch::Atomic,
            GlobalKind::Load => Touch::Read,
            _ => Touch::Write,
        };
        GlobalNote { kind, touch, read_only: self.has(READ_ONLY), float_atomic: false }
    }

    fn shared_touch(self, plain: Touch) -> Touch {
        if self.has(STRONG) { Touch::Atomic } else { plain }
    }
}

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let inst = match i.opcode.as_str() {
        "ld" | "ldu" => transfer(d, i, true)?,
        "st" => transfer(d, i, false)?,
        "prefetch" | "prefetchu" | "discard" | "applypriority" => advice(d, i)?,
        "createpolicy" => create_policy(d, i)?,
        "isspacep" => is_space(d, i)?,
        _ => return Ok(None),
    };
    Ok(Some(inst))
}

fn transfer(d: &mut Decoder<'_>, i: &Instruction, load: bool) -> Result<Inst, String> {
    let mut m = Mods::new(&i.modifiers);
    let written = m.space();
    if m.has("async") || m.has("bulk") {
        return Err(format!("{} is not supported", i.text.split(' ').next().unwrap_or_default()));
    }
    let read_only = load && m.take("nc");
    // A strong access may meet another strong one without a barrier; a volatile one in shared memory is no way to synchronise.
    let strong = ["relaxed", "acquire", "release", "mmio"].iter().any(|w| m.has(w))
        || m.has("volatile") && written != Space::Shared;
    let policy = m.has("L2::cache_hint");
    m.skip_memory_hints();
    let count = match m.take_any(&["v2", "v4", "v8"]) {
        Some("v2") => 2,
        Some("v4") => 4,
        Some(_) => 8,
        None => 1,
    };
    let ty = m.ty()?;
    m.finish()?;
    if ty == Ty::Pred || ty.size() > 8 {
        return Err(format!("a load or store of type {ty:?} is not supported"));
    }
    if count * ty.size() > 32 || count == 8 && ty.size() != 4 {
        return Err(format!("a vector of {count} elements of {} bytes does not exist", ty.size()));
    }
    let mut operands: Vec<&Operand> = i.operands.iter().collect();
    if policy {
        let last = operands.pop().ok_or("the cache policy is missing")?;
        d.src64(last, Ty::B64)?;
    }
    let (data, address) = match (operands.as_slice(), load) {
        ([data, address], true) | ([address, data], false) => (*data, *address),
        _ => return Err("a load or store needs data and an address".to_owned()),
    };
    let address = d.address(address)?;
    let space = space_of(&address, written)?;
    let single = [data.clone()];
    let elements = match data {
        Operand::Vector(list) => list.as_slice(),
        _ => &single,
    };
    if elements.len() as u64 != count {
        return Err(format!("{} registers for a vector of {count}", elements.len()));
    }
    let mut slots = Vec::new();
    for element in elements {
        slots.push(if load { target(d, element, ty)? } else { source(d, element, ty)? });
    }
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    let aux = place_bits(&address, space)
        | (ty.size().trailing_zeros()) << 4
        | (count as u32) << 8
        | flag(ty.signed(), SIGNED)
        | flag(read_only, READ_ONLY)
        | flag(strong, STRONG)
        | flag(count == 1 && slots[0].1, DATA_WIDE);
    let packed: Vec<u32> = slots.iter().map(|&(slot, wide)| slot << 1 | u32::from(wide)).collect();
    let class = match (space, load) {
        (Space::Global | Space::Generic, true) => Class::LdGlobal,
        (Space::Global | Space::Generic, false) => Class::StGlobal,
        (Space::Shared, true) => Class::LdShared,
        (Space::Shared, false) => Class::StShared,
        (Space::Local, _) => Class::Local,
        (Space::Const | Space::Param, _) => Class::Move,
    };
    let exec = if load { load_in(space) } else { store_in(space) };
    let x = if count > 1 { d.extra(&packed) } else { 0 };
    Ok(Inst {
        d: slots[0].0,
        a: address.slot,
        imm: address.offset,
        x,
        aux,
        strict: !load,
        ..Inst::new(exec, class)
    })
}

/// A destination may be wider than what is loaded.
fn target(d: &mut Decoder<'_>, operand: &Operand, ty: Ty) -> Result<(u32, bool), String> {
    if *operand == Operand::Sink {
        return Ok(if ty.size() == 8 { (d.dst64(operand)?, true) } else { (d.dst32(operand)?, false) });
    }
    sized(d.any_register(operand)?, ty)
}

fn source(d: &mut Decoder<'_>, operand: &Operand, ty: Ty) -> Result<(u32, bool), String> {
    if let Operand::Name(name) = operand
        && let Some(register) = d.register(name)
    {
        return sized(register, ty);
    }
    Ok((d.src(operand, ty)?, ty.size() == 8))
}

fn sized(register: AnySlot, ty: Ty) -> Result<(u32, bool), String> {
    match register {
        AnySlot::R64(slot) => Ok((slot, true)),
        AnySlot::R32(slot) if ty.size() <= 4 => Ok((slot, false)),
        AnySlot::R32(_) => Err(format!("a 32-bit register cannot hold .{ty:?}").to_lowercase()),
        AnySlot::Pred(_) => Err("a predicate cannot be loaded or stored".to_owned()),
    }
}

fn load_in(space: Space) -> Exec {
    match space {
        Space::Global => both!(load_global),
        Space::Const => both!(load_const),
        Space::Shared => both!(load_shared),
        Space::Local => both!(load_local),
        Space::Param => both!(load_param),
        Space::Generic => both!(load_generic),
    }
}

fn store_in(space: Space) -> Exec {
    match space {
        Space::Global | Space::Const => both!(store_global),
        Space::Shared => both!(store_shared),
        Space::Local => both!(store_local),
        Space::Param => both!(store_param),
        Space::Generic => both!(store_generic),
    }
}

#[inline(always)]
fn done(result: Result<(), Flow>) -> Flow {
    match result {
        Ok(()) => Flow::Next,
        Err(flow) => flow,
    }
}

/// The addresses of an access, none of them undefined.
#[inline(always)]
fn known_addresses(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<[u64; 32], Flow> {
    let wide = Form(inst.aux).wide();
    defined_address(core, inst, inst.a, wide, mask)?;
    Ok(addresses(core, inst.a, wide, inst.imm))
}

// ---- loads

#[inline(always)]
fn load_global(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| read_global(core, inst, Space::Global, &a, mask)))
}

#[inline(always)]
fn load_const(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| read_global(core, inst, Space::Const, &a, mask)))
}

#[inline(always)]
fn load_shared(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| read_shared(core, inst, &a, mask)))
}

#[inline(always)]
fn load_local(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| read_local(core, inst, &a, mask)))
}

/// Parameters of the kernel, or a `.param` variable of a call whose address was taken.
#[inline(always)]
fn load_param(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| {
        let [_, _, (_, local), _] = split_generic(&a, mask);
        if mask & !local != 0 {
            read_params(core, inst, &a, mask & !local)?;
        }
        if local == 0 { Ok(()) } else { read_local(core, inst, &a, local) }
    }))
}

#[inline(always)]
fn load_generic(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| {
        for (space, lanes) in split_generic(&a, mask) {
            match space {
                _ if lanes == 0 => {}
                Space::Shared => read_shared(core, inst, &a, lanes)?,
                Space::Local => read_local(core, inst, &a, lanes)?,
                Space::Param => read_params(core, inst, &a, lanes)?,
                _ => read_global(core, inst, Space::Global, &a, lanes)?,
            }
        }
        Ok(())
    }))
}

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

// ---- stores

#[inline(always)]
fn store_global(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| write_global(core, inst, &a, mask)))
}

#[inline(always)]
fn store_shared(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| write_shared(core, inst, &a, mask)))
}

#[inline(always)]
fn store_local(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| write_local(core, inst, &a, mask)))
}

#[inline(always)]
fn store_param(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| {
        let [_, _, (_, local), _] = split_generic(&a, mask);
        if mask & !local != 0 {
            write_params(core, inst, &a, mask & !local)?;
        }
        write_local(core, inst, &a, local)
    }))
}

#[inline(always)]
fn store_generic(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    done(known_addresses(core, inst, mask).and_then(|a| {
        for (space, lanes) in split_generic(&a, mask) {
            match space {
                _ if lanes == 0 => {}
                Space::Shared => write_shared(core, inst, &a, lanes)?,
                Space::Local => write_local(core, inst, &a, lanes)?,
                Space::Param => write_params(core, inst, &a, lanes)?,
                _ => write_global(core, inst, &a, lanes)?,
            }
        }
        Ok(())
    }))
}

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
    if mask == 0 {
        return Ok(());
    }
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
        let undef;
        if wide {
            let value = regs.get64(slot);
            match element {
                1 => lanes.store(bytes, at, mask, |lane| value[lane] as u8),
                2 => lanes.store(bytes, at, mask, |lane| value[lane] as u16),
                4 => lanes.store(bytes, at, mask, |lane| value[lane] as u32),
                _ => lanes.store(bytes, at, mask, |lane| value[lane]),
            }
            undef = regs.undef64[slot as usize];
        } else {
            let value = regs.get32(slot);
            match element {
                1 => lanes.store(bytes, at, mask, |lane| value[lane] as u8),
                2 => lanes.store(bytes, at, mask, |lane| value[lane] as u16),
                _ => lanes.store(bytes, at, mask, |lane| value[lane]),
            }
            undef = regs.undef32[slot as usize];
        }
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

// ---- advice about memory

fn nothing(_: &mut Core<'_>, _: &Inst, _: u32) -> Flow {
    Flow::Next
}

/// `prefetch`, `prefetchu`, `discard`, `applypriority`: the caches are not modelled.
fn advice(d: &mut Decoder<'_>, i: &Instruction) -> Result<Inst, String> {
    let mut m = Mods::new(&i.modifiers);
    m.space();
    m.take_any(&["L1", "L2"]);
    m.take("tensormap");
    m.skip_memory_hints();
    m.finish()?;
    let (address, rest) = i.operands.split_first().ok_or("the address is missing")?;
    d.address(address)?;
    if rest.len() > 1 {
        return Err("too many operands".to_owned());
    }
    Ok(Inst::new(nothing, Class::Control))
}

/// `createpolicy`: a 64-bit value that only `.L2::cache_hint` reads.
fn create_policy(d: &mut Decoder<'_>, i: &Instruction) -> Result<Inst, String> {
    fn policy(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
        core.warp.regs.put64(inst.d, &[0x12f0_0000_0000_0000; 32], mask, [0; 2]);
        Flow::Next
    }
    let mut m = Mods::new(&i.modifiers);
    m.take_any(&["fractional", "range", "cvt"]);
    m.take("global");
    m.take("L2");
    m.skip_memory_hints();
    m.take("b64");
    m.finish()?;
    let first = i.operands.first().ok_or("the destination is missing")?;
    Ok(Inst { d: d.dst64(first)?, ..Inst::new(policy, Class::Move) })
}

/// `isspacep`: which window a generic address is in.
fn is_space(d: &mut Decoder<'_>, i: &Instruction) -> Result<Inst, String> {
    fn test(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
        let value = *core.warp.regs.get64(inst.a);
        let undef = core.warp.regs.any_undef64(inst.a);
        let window = |a: u64| match a >> 32 {
            w if w == SHARED_WINDOW >> 32 => Space::Shared,
            w if w == LOCAL_WINDOW >> 32 => Space::Local,
            w if w == PARAM_WINDOW >> 32 => Space::Param,
            _ => Space::Global,
        };
        let wanted = space_from(inst.aux);
        let mut out = 0;
        for lane in 0..32 {
            let constant = |a: u64| {
                core.memory.find(a, 1).is_some_and(|i| core.memory.get(i).kind == crate::mem::Kind::Const)
            };
            let hit = match wanted {
                Space::Const => constant(value[lane]),
                Space::Global => window(value[lane]) == Space::Global && !constant(value[lane]),
                space => window(value[lane]) == space,
            };
            out |= u32::from(hit) << lane;
        }
        core.warp.regs.put_pred(inst.d, out, mask, undef);
        Flow::Next
    }
    let mut m = Mods::new(&i.modifiers);
    let space = if m.take("shared::cluster") { Space::Shared } else { m.space() };
    m.finish()?;
    let [to, from] = i.operands.as_slice() else {
        return Err("isspacep needs a predicate and an address".to_owned());
    };
    let address = crate::lower::Address { slot: 0, wide: true, offset: 0, space: None };
    let aux = place_bits(&address, space);
    Ok(Inst { d: d.dst_pred(to)?, a: d.src64(from, Ty::B64)?, aux, ..Inst::new(test, Class::Move) })
}
