//! Decodes loads and stores (`loads` and `stores` run them), and instructions that only say how memory will be used.
// Loops over the lanes index several arrays at once, and vectorise as they are.
#![allow(clippy::needless_range_loop)]

use super::access::{GlobalNote, WIDE, addresses, defined_address, place_bits, space_from, space_of};
use super::{loads, stores};
use crate::both;
use crate::check::shared::Touch;
use crate::count::GlobalKind;
use crate::lower::{AnySlot, Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::mem::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::ptx::ast::{Instruction, Operand, Space, Ty};

/// `Inst::aux` of a load or store, behind the bits of [`place_bits`]: bits 4 to 6 the logarithm of an element's size, bits 8 to 11 the
/// number of elements, then these flags.
pub(super) const SIGNED: u32 = 1 << 12;
const READ_ONLY: u32 = 1 << 13;
const STRONG: u32 = 1 << 14;
/// The only data register is a 64-bit one.
const DATA_WIDE: u32 = 1 << 15;

#[derive(Clone, Copy)]
pub(super) struct Form(pub(super) u32);

impl Form {
    #[inline(always)]
    pub(super) fn wide(self) -> bool {
        self.0 & WIDE != 0
    }

    #[inline(always)]
    pub(super) fn element(self) -> usize {
        1 << (self.0 >> 4 & 7)
    }

    #[inline(always)]
    pub(super) fn count(self) -> usize {
        (self.0 >> 8 & 15) as usize
    }

    #[inline(always)]
    pub(super) fn size(self) -> u32 {
        (self.count() * self.element()) as u32
    }

    #[inline(always)]
    pub(super) fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }

    /// Slot of data element `j`, and whether it is a 64-bit one.
    #[inline(always)]
    pub(super) fn data(self, inst: &Inst, extra: &[u32], j: usize) -> (u32, bool) {
        if self.count() == 1 {
            (inst.d, self.has(DATA_WIDE))
        } else {
            let packed = extra[inst.x as usize + j];
            (packed >> 1, packed & 1 == 1)
        }
    }

    pub(super) fn note(self, kind: GlobalKind) -> GlobalNote {
        let touch = match kind {
            _ if self.has(STRONG) => Touch::Atomic,
            GlobalKind::Load => Touch::Read,
            _ => Touch::Write,
        };
        GlobalNote { kind, touch, read_only: self.has(READ_ONLY), float_atomic: false }
    }

    pub(super) fn shared_touch(self, plain: Touch) -> Touch {
        if self.has(STRONG) { Touch::Atomic } else { plain }
    }
}

/// The [`Exec`] of an access, from what carries it out or says how the launch ends.
macro_rules! entry {
    ($name:ident, $run:ident) => {
        #[inline(always)]
        pub(super) fn $name(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
            match $run(core, inst, mask) {
                Ok(()) => Flow::Next,
                Err(flow) => flow,
            }
        }
    };
}
pub(super) use entry;

/// The addresses of an access, none of them undefined.
#[inline(always)]
pub(super) fn known_addresses(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<[u64; 32], Flow> {
    let wide = Form(inst.aux).wide();
    defined_address(core, inst, inst.a, wide, mask)?;
    Ok(addresses(core, inst.a, wide, inst.imm))
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
        Space::Global => both!(loads::load_global),
        Space::Const => both!(loads::load_const),
        Space::Shared => both!(loads::load_shared),
        Space::Local => both!(loads::load_local),
        Space::Param => both!(loads::load_param),
        Space::Generic => both!(loads::load_generic),
    }
}

fn store_in(space: Space) -> Exec {
    match space {
        Space::Global | Space::Const => both!(stores::store_global),
        Space::Shared => both!(stores::store_shared),
        Space::Local => both!(stores::store_local),
        Space::Param => both!(stores::store_param),
        Space::Generic => both!(stores::store_generic),
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
