//! Moves, packing, address conversions, byte permutation.

use super::control::{copy_pred, copy32};
use super::operands::{build, no_type, operands};
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst};
use crate::mem::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::ops::lanes::map1;
use crate::ptx::ast::{Instruction, Operand, Space, Ty};

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let m = Mods::new(&i.modifiers);
    match i.opcode.as_str() {
        "mov" => mov(d, i, m).map(Some),
        "cvta" => cvta(d, i, m).map(Some),
        "prmt" => prmt(d, i, m).map(Some),
        _ => Ok(None),
    }
}

fn mov(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let ty = m.ty()?;
    m.finish()?;
    let [to, from] = operands(i)?;
    match (to, from) {
        (Operand::Vector(parts), from) => unpack(d, ty, parts, from),
        (to, Operand::Vector(parts)) => pack(d, ty, to, parts),
        _ if ty == Ty::Pred => {
            let (a, not) = d.src_pred(from)?;
            let exec = if not { not_pred } else { copy_pred };
            Ok(Inst { d: d.dst_pred(to)?, a, ..Inst::new(exec, Class::Move) })
        }
        (to, Operand::Name(name)) if clock(name).is_some() => {
            let (clock, wide) = clock(name).ok_or("no such clock")?;
            if wide != (ty.size() == 8) || ty.size() < 4 {
                return Err(format!("{name} has {} bits", if wide { 64 } else { 32 }));
            }
            let imm = ty.size() as i64;
            Ok(Inst { d: d.dst(to, ty)?, aux: clock as u32, imm, ..Inst::new(read_clock, Class::Move) })
        }
        _ => match ty.size() {
            2 | 4 => build(d, i, copy32(), Class::Move, ty, &[ty]),
            8 => build(d, i, copy64, Class::Move, ty, &[ty]),
            _ => Err(no_type(i, ty)),
        },
    }
}

pub(super) fn not_pred(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let value = !core.warp.regs.pred[inst.a as usize];
    let undef = core.warp.regs.undef_pred[inst.a as usize];
    core.warp.regs.put_pred(inst.d, value, mask, undef);
    Flow::Next
}

fn copy64(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let value = *core.warp.regs.get64(inst.a);
    let undef = core.warp.regs.undef64[inst.a as usize];
    core.warp.regs.put64(inst.d, &value, mask, undef);
    Flow::Next
}

// ---- clocks

#[derive(Clone, Copy)]
enum Clock {
    Cycles = 0,
    CyclesHigh = 1,
    Timer = 2,
    TimerHigh = 3,
}

/// Special registers whose value changes while the kernel runs: which, and whether all 64 bits are read.
fn clock(name: &str) -> Option<(Clock, bool)> {
    Some(match name {
        "%clock" => (Clock::Cycles, false),
        "%clock_hi" => (Clock::CyclesHigh, false),
        "%clock64" => (Clock::Cycles, true),
        "%globaltimer" => (Clock::Timer, true),
        "%globaltimer_lo" => (Clock::Timer, false),
        "%globaltimer_hi" => (Clock::TimerHigh, false),
        _ => return None,
    })
}

/// `%clock` counts the instructions of the warp. `%globaltimer` counts those of the launch, above the number of the launch, so that
/// it never runs backwards. Neither is a time, but both are the same in every run.
fn read_clock(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let timer = inst.aux >= Clock::Timer as u32;
    let now = if timer {
        (u64::from(core.block.ids.gridid) << 40) + core.counters.executed.iter().sum::<u64>()
    } else {
        core.warp.executed
    };
    let high = inst.aux == Clock::CyclesHigh as u32 || inst.aux == Clock::TimerHigh as u32;
    if inst.imm == 8 {
        core.warp.regs.put64(inst.d, &[now; 32], mask, [0; 2]);
    } else {
        let word = if high { now >> 32 } else { now };
        core.warp.regs.put32(inst.d, &[word as u32; 32], mask, [0; 2]);
    }
    Flow::Next
}

// ---- packing

/// Bits of each of `count` elements of a vector that fills `ty`.
fn element_bits(ty: Ty, count: usize) -> Result<u64, String> {
    match (ty.size(), count) {
        (2 | 4 | 8, 2) | (4 | 8, 4) => Ok(ty.size() * 8 / count as u64),
        (size, _) => Err(format!("{count} elements do not make up {} bits", size * 8)),
    }
}

fn pack(d: &mut Decoder<'_>, ty: Ty, to: &Operand, parts: &[Operand]) -> Result<Inst, String> {
    let bits = element_bits(ty, parts.len())?;
    let element = if bits == 32 { Ty::B32 } else { Ty::B16 };
    let mut slots = Vec::new();
    for part in parts {
        slots.push(d.src32(part, element)?);
    }
    let mut inst = Inst::new(pack_any, Class::Move);
    inst.d = d.dst(to, ty)?;
    inst.exec = match (ty.size(), bits) {
        (4, 16) => crate::both!(pack_halves),
        (8, 32) => crate::both!(pack_words),
        _ => pack_any,
    };
    (inst.a, inst.b) = (slots[0], slots[1]);
    (inst.x, inst.aux, inst.imm) = (d.extra(&slots), bits as u32, ty.size() as i64);
    Ok(inst)
}

fn unpack(d: &mut Decoder<'_>, ty: Ty, parts: &[Operand], from: &Operand) -> Result<Inst, String> {
    let bits = element_bits(ty, parts.len())?;
    let mut slots = Vec::new();
    for part in parts {
        slots.push(if *part == Operand::Sink { SINK } else { d.dst32(part)? });
    }
    let mut inst = Inst::new(unpack_any, Class::Move);
    inst.a = d.src(from, ty)?;
    inst.exec = match (ty.size(), bits) {
        (4, 16) => crate::both!(unpack_halves),
        (8, 32) => crate::both!(unpack_words),
        _ => unpack_any,
    };
    (inst.d, inst.e) = (slots[0], slots[1]);
    (inst.x, inst.aux, inst.imm) = (d.extra(&slots), bits as u32, ty.size() as i64);
    Ok(inst)
}

/// An element nobody wants.
const SINK: u32 = u32::MAX;

#[inline(always)]
fn pack_halves(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (low, high) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        out[lane] = low[lane] & 0xffff | high[lane] << 16;
    }
    let undef = [regs.undef32[inst.a as usize][0], regs.undef32[inst.b as usize][0]];
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn pack_words(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (low, high) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for lane in 0..32 {
        out[lane] = u64::from(low[lane]) | u64::from(high[lane]) << 32;
    }
    let undef = [regs.any_undef32(inst.a), regs.any_undef32(inst.b)];
    regs.put64(inst.d, &out, mask, undef);
    Flow::Next
}

#[inline(always)]
fn unpack_halves(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let value = *regs.get32(inst.a);
    let undef = regs.undef32[inst.a as usize];
    if inst.d != SINK {
        let mut low = [0; 32];
        for lane in 0..32 {
            low[lane] = value[lane] & 0xffff;
        }
        regs.put32(inst.d, &low, mask, [undef[0], 0]);
    }
    if inst.e != SINK {
        let mut high = [0; 32];
        for lane in 0..32 {
            high[lane] = value[lane] >> 16;
        }
        regs.put32(inst.e, &high, mask, [undef[1], 0]);
    }
    Flow::Next
}

#[inline(always)]
fn unpack_words(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let value = *regs.get64(inst.a);
    let undef = regs.undef64[inst.a as usize];
    if inst.d != SINK {
        let mut low = [0; 32];
        for lane in 0..32 {
            low[lane] = value[lane] as u32;
        }
        regs.put32(inst.d, &low, mask, [undef[0]; 2]);
    }
    if inst.e != SINK {
        let mut high = [0; 32];
        for lane in 0..32 {
            high[lane] = (value[lane] >> 32) as u32;
        }
        regs.put32(inst.e, &high, mask, [undef[1]; 2]);
    }
    Flow::Next
}

/// Four elements, or bytes: an element makes the half (or word) it lies in undefined.
fn pack_any(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (bits, size) = (inst.aux, inst.imm as u32);
    let regs = &mut core.warp.regs;
    let mut out = [0u64; 32];
    let mut undef = [0; 2];
    for n in 0..size * 8 / bits {
        let slot = core.kernel.extra[(inst.x + n) as usize];
        let value = regs.get32(slot);
        let field = (1u64 << bits) - 1;
        for lane in 0..32 {
            out[lane] |= (u64::from(value[lane]) & field) << (n * bits);
        }
        undef[part(n * bits, size)] |= regs.undef32[slot as usize][0];
    }
    if size == 8 {
        regs.put64(inst.d, &out, mask, undef);
    } else {
        regs.put32(inst.d, &out.map(|v| v as u32), mask, undef);
    }
    Flow::Next
}

fn unpack_any(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (bits, size) = (inst.aux, inst.imm as u32);
    let regs = &mut core.warp.regs;
    let (value, undef) = if size == 8 {
        (*regs.get64(inst.a), regs.undef64[inst.a as usize])
    } else {
        (regs.get32(inst.a).map(u64::from), regs.undef32[inst.a as usize])
    };
    for n in 0..size * 8 / bits {
        let slot = core.kernel.extra[(inst.x + n) as usize];
        if slot != SINK {
            let field = value.map(|v| (v >> (n * bits) & ((1 << bits) - 1)) as u32);
            regs.put32(slot, &field, mask, [undef[part(n * bits, size)], 0]);
        }
    }
    Flow::Next
}

/// Which of the two masks of a slot covers a bit: halves of 32-bit slots (all that 16 bits have is the low one), words of 64-bit ones.
fn part(bit: u32, size: u32) -> usize {
    (bit / if size == 8 { 32 } else { 16 }) as usize
}

// ---- addresses

fn cvta(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let to_space = m.take("to");
    let space = m.space();
    let ty = m.ty()?;
    m.finish()?;
    if !matches!(ty, Ty::U64 | Ty::U32) {
        return Err(no_type(i, ty));
    }
    let exec: Exec = match (space, to_space) {
        (Space::Generic, _) => return Err("cvta needs a state space".to_owned()),
        (Space::Global | Space::Const, _) | (_, true) if ty == Ty::U32 => copy32(),
        (_, false) if ty == Ty::U32 => {
            return Err("a generic address of this device does not fit 32 bits".to_owned());
        }
        // A subtraction, not a mask: an address a little below the window must stay one after an offset is added.
        (Space::Shared, true) => map1(|a: u64| a.wrapping_sub(SHARED_WINDOW)),
        (Space::Shared, false) => map1(|a: u64| a.wrapping_add(SHARED_WINDOW)),
        // The addresses of these variables are generic ones from the start.
        (Space::Local, false) => map1(|a: u64| if a >> 32 == 0 { a + LOCAL_WINDOW } else { a }),
        (Space::Param, false) => map1(|a: u64| if a >> 32 == 0 { a + PARAM_WINDOW } else { a }),
        _ => copy64,
    };
    build(d, i, exec, Class::Move, ty, &[ty])
}

// ---- byte permutation

#[derive(Clone, Copy)]
enum Permute {
    Index,
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

fn prmt(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    if !m.take("b32") {
        return Err("prmt needs .b32".to_owned());
    }
    let mode = match m.take_any(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]) {
        None => Permute::Index,
        Some("f4e") => Permute::F4e,
        Some("b4e") => Permute::B4e,
        Some("rc8") => Permute::Rc8,
        Some("ecl") => Permute::Ecl,
        Some("ecr") => Permute::Ecr,
        Some(_) => Permute::Rc16,
    };
    m.finish()?;
    let inst = build(d, i, crate::both!(permute), Class::Int, Ty::B32, &[Ty::B32, Ty::B32, Ty::U32])?;
    Ok(Inst { aux: mode as u32, ..inst })
}

/// The four selector nibbles of each mode but the first, by the low two bits of the control operand.
const SELECTORS: [[u16; 4]; 6] = [
    [0x3210, 0x4321, 0x5432, 0x6543],
    [0x5670, 0x6701, 0x7012, 0x0123],
    [0x0000, 0x1111, 0x2222, 0x3333],
    [0x3210, 0x3211, 0x3222, 0x3333],
    [0x0000, 0x1110, 0x2210, 0x3210],
    [0x1010, 0x3232, 0x1010, 0x3232],
];

#[inline(always)]
fn permute(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (low, high) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut control = *regs.get32(inst.c);
    if let Some(selectors) = SELECTORS.get((inst.aux as usize).wrapping_sub(1)) {
        control = control.map(|c| u32::from(selectors[c as usize & 3]));
    }
    let mut out = [0; 32];
    for lane in 0..32 {
        let bytes = u64::from(low[lane]) | u64::from(high[lane]) << 32;
        for n in 0..4 {
            let nibble = control[lane] >> (4 * n) & 15;
            let byte = (bytes >> (8 * (nibble & 7))) as u8;
            // Bit 3 asks for the sign of the byte instead of the byte.
            let value = if nibble & 8 == 0 { byte } else { 0u8.wrapping_sub(byte >> 7) };
            out[lane] |= u32::from(value) << (8 * n);
        }
    }
    let mut undef = [0; 2];
    if regs.track {
        let (ua, ub) = (regs.undef32[inst.a as usize], regs.undef32[inst.b as usize]);
        let halves = [ua[0], ua[1], ub[0], ub[1]];
        let unknown = regs.any_undef32(inst.c);
        undef = [unknown; 2];
        if halves != [0; 4] {
            for (lane, control) in control.iter().enumerate() {
                for n in 0..4 {
                    let from = (control >> (4 * n) & 7) / 2;
                    undef[n / 2] |= halves[from as usize] & 1 << lane;
                }
            }
        }
    }
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}
