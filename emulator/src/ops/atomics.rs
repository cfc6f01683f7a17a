//! Atomics and reductions. Lanes on one address take their turns in lane order.

use super::access::{
    GlobalNote, Lanes, WIDE, addresses, aligned, defined_address, in_shared, lanes_where, low, not_pending,
    note_global, note_shared, place_bits, same_allocation, space_from, space_of, split_generic, split_global,
};
use crate::check::shared::Touch;
use crate::config::Check;
use crate::count::GlobalKind;
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Flow, Inst};
use crate::machine::regs::Regs;
use crate::mem::{DEFINED, UNDEFINED};
use crate::ptx::ast::{Instruction, Operand, Space, Ty};
use crate::report::Fault;
use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

const OPS: [(&str, Op); 10] = [
    ("add", Op::Add),
    ("min", Op::Min),
    ("max", Op::Max),
    ("and", Op::And),
    ("or", Op::Or),
    ("xor", Op::Xor),
    ("exch", Op::Exch),
    ("cas", Op::Cas),
    ("inc", Op::Inc),
    ("dec", Op::Dec),
];

/// How the bits of an element are meant.
const TYPES: [Ty; 13] = [
    Ty::B16,
    Ty::B32,
    Ty::B64,
    Ty::U32,
    Ty::S32,
    Ty::U64,
    Ty::S64,
    Ty::F16,
    Ty::F16x2,
    Ty::BF16,
    Ty::BF16x2,
    Ty::F32,
    Ty::F64,
];

/// `Inst::aux` behind the bits of [`place_bits`]: bits 4 to 7 the operation, bits 8 to 11 the type, bits 12 to 15 the number of elements.
#[derive(Clone, Copy)]
struct Form {
    op: Op,
    ty: Ty,
    count: usize,
}

impl Form {
    fn of(aux: u32) -> Self {
        let op = OPS[(aux >> 4 & 15) as usize % OPS.len()].1;
        let ty = TYPES[(aux >> 8 & 15) as usize % TYPES.len()];
        Self { op, ty, count: (aux >> 12 & 15) as usize }
    }

    fn size(self) -> u32 {
        self.count as u32 * self.ty.size() as u32
    }

    /// The order of several such atomics on one address changes the result.
    fn float_add(self) -> bool {
        self.op == Op::Add && self.ty.float()
    }
}

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let returns = match i.opcode.as_str() {
        "atom" => true,
        "red" => false,
        _ => return Ok(None),
    };
    let mut m = Mods::new(&i.modifiers);
    let written = m.space();
    let policy = m.has("L2::cache_hint");
    let half = m.has("noftz");
    m.skip_memory_hints();
    let name = m
        .take_map(|w| OPS.iter().position(|(name, _)| *name == w))
        .ok_or("add, min, max, and, or, xor, exch, cas, inc or dec is missing")?;
    let op = OPS[name].1;
    let count = match m.take_any(&["v2", "v4", "v8"]) {
        Some("v2") => 2,
        Some("v4") => 4,
        Some(_) => 8,
        None => 1,
    };
    let ty = m.ty()?;
    m.finish()?;
    let code = TYPES.iter().position(|t| *t == ty).filter(|_| allowed(op, ty, count, written));
    let code = code.ok_or_else(|| format!("{} does not exist for {ty:?} here", OPS[name].0))?;
    if half != (ty.float() && ty.size() <= 4 && ty != Ty::F32) {
        return Err(format!(".noftz is for additions, minima and maxima of 16-bit floats: {}", i.text));
    }
    let mut operands = i.operands.as_slice();
    if policy {
        let (last, rest) = operands.split_last().ok_or("the cache policy is missing")?;
        d.src64(last, Ty::B64)?;
        operands = rest;
    }
    let mut result = &Operand::Sink;
    if returns {
        let (first, rest) = operands.split_first().ok_or("the destination is missing")?;
        result = first;
        operands = rest;
    }
    let (address, value, third) = match operands {
        [address, value] if op != Op::Cas => (address, value, None),
        [address, value, third] if op == Op::Cas => (address, value, Some(third)),
        _ => return Err("wrong number of operands".to_owned()),
    };
    let address = d.address(address)?;
    let space = space_of(&address, written)?;
    if !matches!(space, Space::Generic | Space::Global | Space::Shared) {
        return Err(format!("there are no atomics in .{space:?} memory").to_lowercase());
    }
    let aux = place_bits(&address, space) | (name as u32) << 4 | (code as u32) << 8 | (count as u32) << 12;
    let mut inst =
        Inst { a: address.slot, imm: address.offset, aux, strict: true, ..Inst::new(atomic, Class::Atomic) };
    if count == 1 {
        inst.d = d.dst(result, ty)?;
        inst.b = d.src(value, ty)?;
        inst.c = third.map_or(Ok(inst.b), |third| d.src(third, ty))?;
        return Ok(Some(inst));
    }
    let Operand::Vector(values) = value else { return Err("a vector of operands is missing".to_owned()) };
    let sinks = vec![Operand::Sink; count];
    let results = match result {
        Operand::Vector(results) => results,
        Operand::Sink => &sinks,
        _ => return Err("a vector of destinations is missing".to_owned()),
    };
    if values.len() != count || results.len() != count {
        return Err(format!("{} operands for a vector of {count}", values.len()));
    }
    let mut slots = Vec::new();
    for value in values {
        slots.push(d.src(value, ty)?);
    }
    for result in results {
        slots.push(d.dst(result, ty)?);
    }
    inst.x = d.extra(&slots);
    Ok(Some(inst))
}

/// The operations that exist for a type.
fn allowed(op: Op, ty: Ty, count: usize, space: Space) -> bool {
    let small = matches!(ty, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2);
    if count > 1 {
        // sm_90: vectors of floats in global memory, 16 bytes at most.
        return space != Space::Shared
            && count as u64 * ty.size() <= 16
            && (small && matches!(op, Op::Add | Op::Min | Op::Max) || ty == Ty::F32 && op == Op::Add);
    }
    match op {
        Op::Add => small || matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64 | Ty::F32 | Ty::F64),
        Op::Min | Op::Max => small || matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64),
        Op::And | Op::Or | Op::Xor => !ty.float() && ty.size() >= 4,
        Op::Exch => ty.size() >= 4 && !small,
        Op::Cas => !small,
        Op::Inc | Op::Dec => ty == Ty::U32,
    }
}

fn atomic(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    match run(core, inst, mask) {
        Ok(()) => Flow::Next,
        Err(flow) => flow,
    }
}

fn run(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<(), Flow> {
    let form = Form::of(inst.aux);
    let wide = inst.aux & WIDE != 0;
    defined_address(core, inst, inst.a, wide, mask)?;
    let at = addresses(core, inst.a, wide, inst.imm);
    if core.warp.regs.track {
        let mut undef = undefined_source(&core.warp.regs, form, inst.b) & mask;
        if form.op == Op::Cas {
            undef |= undefined_source(&core.warp.regs, form, inst.c) & mask;
        }
        if form.count > 1 {
            undef = (0..form.count)
                .map(|j| undefined_source(&core.warp.regs, form, core.kernel.extra[inst.x as usize + j]))
                .fold(0, |a, b| a | b)
                & mask;
        }
        if undef != 0 && core.undefined(inst, undef, "atomic operand") == Flow::Fault {
            return Err(Flow::Fault);
        }
    }
    match space_from(inst.aux) {
        Space::Shared => in_block(core, inst, form, &at, mask),
        Space::Global => on_device(core, inst, form, &at, mask),
        _ => {
            let [(_, global), (_, shared), (_, local), (_, param)] = split_generic(&at, mask);
            if local | param != 0 {
                return Err(nowhere(core, inst, form, local | param, &at));
            }
            if global != 0 {
                on_device(core, inst, form, &at, global)?;
            }
            if shared != 0 {
                in_block(core, inst, form, &at, shared)?;
            }
            Ok(())
        }
    }
}

fn undefined_source(regs: &Regs, form: Form, slot: u32) -> u32 {
    match form.ty.size() {
        2 => regs.undef32[slot as usize][0],
        8 => regs.any_undef64(slot),
        _ => regs.any_undef32(slot),
    }
}

#[cold]
fn nowhere(core: &mut Core<'_>, inst: &Inst, form: Form, lanes: u32, at: &[u64; 32]) -> Flow {
    let first = at[lanes.trailing_zeros() as usize & 31];
    let lines = vec![
        format!("Invalid __local__ atomic of size {} bytes", form.size()),
        format!(
            "generic address {first:#x} is in local memory or in the parameters, where there are no atomics"
        ),
    ];
    core.find(Check::Bounds, Fault::IllegalAddress, inst, lanes, lines);
    Flow::Fault
}

fn on_device(core: &mut Core<'_>, inst: &Inst, form: Form, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let size = form.size();
    let note = GlobalNote {
        kind: GlobalKind::Atomic,
        touch: Touch::Atomic,
        read_only: false,
        float_atomic: form.float_add(),
    };
    aligned(core, inst, Space::Global, Touch::Atomic, at, mask, size)?;
    let parts = match same_allocation(core, inst, Space::Global, Touch::Atomic, at, mask, size) {
        Some(part) => vec![part],
        None => split_global(core, inst, Space::Global, Touch::Atomic, at, mask, size)?,
    };
    for part in &parts {
        let a = core.memory.get(part.index);
        if a.maybe_undefined && form.op != Op::Exch {
            let undef = undefined_memory(&part.lanes, &a.shadow, part.mask);
            if undef != 0
                && core.warp.regs.track
                && core.undefined(inst, undef, "atomic operand (in memory)") == Flow::Fault
            {
                return Err(Flow::Fault);
            }
        }
    }
    note_global(core, inst, at, mask, size, note)?;
    for part in &parts {
        let a = core.memory.get_mut(part.index);
        (a.was_read, a.was_written) = (true, true);
        let (bytes, shadow) = a.parts_mut();
        let (regs, extra) = (&mut core.warp.regs, &core.kernel.extra);
        apply(regs, extra, inst, form, bytes, shadow, &part.lanes, part.mask, true);
    }
    Ok(())
}

fn in_block(core: &mut Core<'_>, inst: &Inst, form: Form, at: &[u64; 32], mask: u32) -> Result<(), Flow> {
    let (size, offsets) = (form.size(), low(at));
    let at = offsets.map(u64::from);
    aligned(core, inst, Space::Shared, Touch::Atomic, &at, mask, size)?;
    let lanes = in_shared(core, inst, Touch::Atomic, &at, mask, size)?;
    if core.counters.memory {
        core.counters.shared(inst.pc, &offsets, mask, size, true);
    }
    not_pending(core, inst, &lanes, mask, Touch::Atomic)?;
    if form.op != Op::Exch && core.warp.regs.track {
        let undef = undefined_memory(&lanes, &core.block.shared_shadow, mask);
        if undef != 0 && core.undefined(inst, undef, "atomic operand (in memory)") == Flow::Fault {
            return Err(Flow::Fault);
        }
    }
    note_shared(core, inst, &offsets, mask, size, Touch::Atomic, None)?;
    let block = &mut *core.block;
    let (bytes, shadow) = (block.shared.as_mut_slice(), block.shared_shadow.as_mut_slice());
    let (regs, extra) = (&mut core.warp.regs, &core.kernel.extra);
    apply(regs, extra, inst, form, bytes, shadow, &lanes, mask, false);
    Ok(())
}

fn undefined_memory(lanes: &Lanes, shadow: &[u8], mask: u32) -> u32 {
    if lanes.any_shadow(shadow, mask) & UNDEFINED == 0 {
        return 0;
    }
    lanes_where(mask, |lane| lanes.slice(shadow, lane).iter().any(|s| s & UNDEFINED != 0))
}

/// Reads, changes and writes the bytes of each lane; the old values go to the destination. The common operations have loops of their own.
#[allow(clippy::too_many_arguments)]
fn apply(
    regs: &mut Regs,
    extra: &[u32],
    inst: &Inst,
    form: Form,
    bytes: &mut [u8],
    shadow: &mut [u8],
    lanes: &Lanes,
    mask: u32,
    global: bool,
) {
    for j in 0..form.count {
        let (source, destination) = if form.count == 1 {
            (inst.b, inst.d)
        } else {
            (extra[inst.x as usize + j], extra[inst.x as usize + form.count + j])
        };
        let third = if form.op == Op::Cas { inst.c } else { source };
        let turn = Turn { lanes, mask, at: j * form.ty.size() as usize, source, third, destination };
        let Form { op, ty, .. } = form;
        match (op, ty) {
            (Op::Add, Ty::U32 | Ty::S32) => {
                turn.words(regs, bytes, shadow, u32::wrapping_add);
            }
            (Op::Add, Ty::F32) => turn.words(regs, bytes, shadow, |old, b| {
                float(Op::Add, Ty::F32, u64::from(old), u64::from(b), global) as u32
            }),
            _ => turn.any(regs, bytes, shadow, op, ty, global),
        }
    }
}

/// One element of an atomic: where its operands are.
struct Turn<'a> {
    lanes: &'a Lanes,
    mask: u32,
    at: usize,
    source: u32,
    third: u32,
    destination: u32,
}

impl Turn<'_> {
    #[inline(always)]
    fn words(&self, regs: &mut Regs, bytes: &mut [u8], shadow: &mut [u8], f: impl Fn(u32, u32) -> u32) {
        let b = *regs.get32(self.source);
        let mut old = [0; 32];
        let mut rest = self.mask;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            let at = self.lanes.offset(lane) + self.at;
            if let Some(word) = bytes.get_mut(at..).and_then(|tail| tail.first_chunk_mut::<4>()) {
                old[lane] = u32::from_le_bytes(*word);
                *word = f(old[lane], b[lane]).to_le_bytes();
            }
            if let Some(marks) = shadow.get_mut(at..).and_then(|tail| tail.first_chunk_mut::<4>()) {
                *marks = [DEFINED; 4];
            }
        }
        regs.put32(self.destination, &old, self.mask, [0; 2]);
    }

    fn any(&self, regs: &mut Regs, bytes: &mut [u8], shadow: &mut [u8], op: Op, ty: Ty, global: bool) {
        let size = ty.size() as usize;
        let mut old = [0u64; 32];
        let mut undef = 0;
        let mut rest = self.mask;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            let value = |slot: u32| match size {
                8 => regs.get64(slot)[lane],
                2 => u64::from(regs.get32(slot)[lane] as u16),
                _ => u64::from(regs.get32(slot)[lane]),
            };
            let (b, c) = (value(self.source), value(self.third));
            let at = &mut self.lanes.slice_mut(bytes, lane)[self.at..self.at + size];
            let mut word = [0; 8];
            word[..size].copy_from_slice(at);
            old[lane] = u64::from_le_bytes(word);
            let new = result(op, ty, old[lane], b, c, global);
            at.copy_from_slice(&new.to_le_bytes()[..size]);
            let marks = &mut self.lanes.slice_mut(shadow, lane)[self.at..self.at + size];
            undef |= u32::from(op == Op::Exch && marks.iter().any(|s| s & UNDEFINED != 0)) << lane;
            marks.fill(DEFINED);
        }
        if size == 8 {
            regs.put64(self.destination, &old, self.mask, [undef; 2]);
        } else {
            regs.put32(self.destination, &old.map(|v| v as u32), self.mask, [undef; 2]);
        }
    }
}

/// What is in memory afterwards.
fn result(op: Op, ty: Ty, old: u64, b: u64, c: u64, global: bool) -> u64 {
    let wide = ty.size() == 8;
    match op {
        Op::And => old & b,
        Op::Or => old | b,
        Op::Xor => old ^ b,
        Op::Exch => b,
        Op::Cas => {
            if old == b {
                c
            } else {
                old
            }
        }
        Op::Inc => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        Op::Dec => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        Op::Add | Op::Min | Op::Max if ty.float() => float(op, ty, old, b, global),
        Op::Add if wide => old.wrapping_add(b),
        Op::Add => u64::from((old as u32).wrapping_add(b as u32)),
        Op::Min | Op::Max => {
            let less = match ty {
                Ty::S32 => (old as u32 as i32) < b as u32 as i32,
                Ty::S64 => (old as i64) < b as i64,
                _ => old < b,
            };
            if less == (op == Op::Min) { old } else { b }
        }
    }
}

#[inline]
fn float(op: Op, ty: Ty, old: u64, b: u64, global: bool) -> u64 {
    match ty {
        Ty::F16x2 | Ty::BF16x2 => {
            let half = if ty == Ty::F16x2 { Ty::F16 } else { Ty::BF16 };
            let low = float(op, half, old & 0xffff, b & 0xffff, global);
            low | float(op, half, old >> 16, b >> 16, global) << 16
        }
        // The sum of two 16-bit floats rounded to f32 and then to 16 bits is the sum rounded once: f32 has more than twice their digits.
        Ty::F16 => {
            let value = |bits: u64| f16::from_bits(bits as u16).to_f32();
            match small(op, value(old), value(b)) {
                v if v.is_nan() => 0x7fff,
                v => u64::from(f16::from_f32(v).to_bits()),
            }
        }
        Ty::BF16 => {
            let value = |bits: u64| bf16::from_bits(bits as u16).to_f32();
            match small(op, value(old), value(b)) {
                v if v.is_nan() => 0x7fff,
                v => u64::from(bf16::from_f32(v).to_bits()),
            }
        }
        Ty::F64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        // The manual: on global memory atom.add.f32 flushes subnormal inputs and results to zero with their sign; on shared memory it
        // does not.
        _ => {
            let flush = |v: f32| if global && v.is_subnormal() { 0.0f32.copysign(v) } else { v };
            let sum = flush(flush(f32::from_bits(old as u32)) + flush(f32::from_bits(b as u32)));
            u64::from(if sum.is_nan() { 0x7fff_ffff } else { sum.to_bits() })
        }
    }
}

/// `add`, or `min` and `max`: the number of a number and a NaN, and -0 below +0.
fn small(op: Op, a: f32, b: f32) -> f32 {
    let less = || a < b || a == b && a.is_sign_negative();
    match op {
        Op::Add => a + b,
        _ if a.is_nan() => b,
        _ if b.is_nan() => a,
        Op::Min => {
            if less() {
                a
            } else {
                b
            }
        }
        _ => {
            if less() {
                b
            } else {
                a
            }
        }
    }
}
