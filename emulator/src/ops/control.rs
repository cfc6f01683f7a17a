//! Branches, exits, barriers, fences, and the functions that the runtime provides.

use crate::config::Check;
use crate::lower::{AnySlot, Decoder, Mods, Symbol};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst, Sync};
use crate::mem::LOCAL_WINDOW;
use crate::ops::cp_async;
use crate::ops::lanes::map1;
use crate::ops::printf;
use crate::ptx::ast::{Instruction, Operand, Ty};
use crate::report::Fault;

/// Decodes control instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let mut m = Mods::new(&i.modifiers);
    let inst = match i.opcode.as_str() {
        "bra" => {
            m.take("uni");
            m.finish()?;
            let [Operand::Name(label)] = i.operands.as_slice() else {
                return Err("bra needs one label".to_owned());
            };
            d.jumps_to(label, i.line);
            Inst { strict: true, ..Inst::new(bra, Class::Control) }
        }
        "brx" => {
            m.take("uni");
            if !m.take("idx") {
                return Err("only brx.idx exists".to_owned());
            }
            m.finish()?;
            let [index, Operand::Name(table)] = i.operands.as_slice() else {
                return Err("brx.idx needs an index and the name of .branchtargets".to_owned());
            };
            let a = d.src32(index, Ty::U32)?;
            let (x, aux) = d.jump_table(table, i.line)?;
            Inst { a, x, aux, strict: true, ..Inst::new(brx, Class::Control) }
        }
        "ret" | "exit" => {
            m.take("uni");
            m.finish()?;
            Inst { strict: true, ..Inst::new(exit, Class::Control) }
        }
        "trap" | "brkpt" => {
            m.finish()?;
            Inst {
                strict: true,
                ..Inst::new(if i.opcode == "trap" { trap } else { nothing }, Class::Control)
            }
        }
        "nanosleep" => {
            m.take("u32");
            m.finish()?;
            Inst::new(nothing, Class::Control)
        }
        "griddepcontrol" => {
            m.take_any(&["wait", "launch_dependents"]);
            m.finish()?;
            Inst::new(nothing, Class::Control)
        }
        "membar" | "fence" => {
            for word in ["cta", "gl", "sys", "gpu", "cluster", "acq_rel", "sc", "acquire", "release"] {
                m.take(word);
            }
            m.finish()?;
            Inst::new(fence, Class::Barrier)
        }
        "bar" | "barrier" => return barrier(d, i, m),
        _ => return Ok(None),
    };
    Ok(Some(inst))
}

fn barrier(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Option<Inst>, String> {
    if m.take("warp") {
        if !m.take("sync") {
            return Err("only bar.warp.sync exists".to_owned());
        }
        m.finish()?;
        let [mask] = i.operands.as_slice() else {
            return Err("bar.warp.sync needs a member mask".to_owned());
        };
        let e = d.src32(mask, Ty::B32)?;
        return Ok(Some(Inst {
            e,
            sync: Sync::WarpBarrier,
            strict: true,
            ..Inst::new(warp_barrier, Class::Barrier)
        }));
    }
    m.take("cta");
    let aligned = m.take("aligned") || i.opcode == "bar";
    let kind = m.take_any(&["sync", "arrive", "red"]).ok_or("sync, arrive or red is missing")?;
    let mut inst = Inst::new(block_barrier, Class::Barrier);
    inst.strict = true;
    if aligned {
        inst.sync = Sync::Aligned;
    }
    let mut operands = i.operands.as_slice();
    let mut take = |what: &str| -> Result<&Operand, String> {
        let (first, rest) = operands.split_first().ok_or_else(|| format!("{what} is missing"))?;
        operands = rest;
        Ok(first)
    };
    let mut predicate = None;
    let mut destination = None;
    let mut vote = 0;
    if kind == "red" {
        vote = match m.take_any(&["popc", "and", "or"]) {
            Some("popc") => 1,
            Some("and") => 2,
            Some(_) => 3,
            None => return Err("bar.red needs popc, and, or".to_owned()),
        };
        m.take("u32");
        m.take("pred");
        destination = Some(take("the destination")?.clone());
    }
    m.finish()?;
    inst.a = d.src32(take("the barrier's number")?, Ty::U32)?;
    let rest: Vec<Operand> = operands.to_vec();
    let mut rest = rest.as_slice();
    if kind == "red" {
        let (last, before) = rest.split_last().ok_or("the predicate is missing")?;
        predicate = Some(last.clone());
        rest = before;
    }
    match rest {
        [] if kind == "arrive" => return Err("arrive needs a number of threads".to_owned()),
        [] => inst.aux = 0,
        [count] => {
            inst.b = d.src32(count, Ty::U32)?;
            inst.aux = 1;
        }
        _ => return Err("too many operands".to_owned()),
    }
    // aux bit 0: a count is given; bit 1: arrive; bits 2..4: vote; bit 4: predicate negated.
    inst.aux |= u32::from(kind == "arrive") << 1 | vote << 2;
    if let Some(p) = predicate {
        let (slot, not) = d.src_pred(&p)?;
        inst.c = slot;
        inst.aux |= u32::from(not) << 4;
    }
    if let Some(to) = destination {
        inst.d = if vote == 1 { d.dst32(&to)? } else { d.dst_pred(&to)? };
    }
    Ok(Some(inst))
}

/// Jumps to `imm`.
pub fn bra(_: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    Flow::Branch { taken: mask, target: inst.imm as u32 }
}

fn brx(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let undefined = core.warp.regs.any_undef32(inst.a) & mask;
    if undefined != 0 && core.undefined(inst, undefined, "branch index") == Flow::Fault {
        return Flow::Fault;
    }
    let index = *core.warp.regs.get32(inst.a);
    let past = (0..32)
        .filter(|&lane| mask >> lane & 1 == 1 && index[lane as usize] >= inst.aux)
        .fold(0, |m, lane| m | 1u32 << lane);
    if past != 0 {
        let text = format!("Invalid branch index: the table has {} targets", inst.aux);
        core.find(Check::Bounds, Fault::IllegalAddress, inst, past, vec![text]);
        return Flow::Fault;
    }
    core.warp.targets = index
        .iter()
        .map(|&i| core.kernel.extra[inst.x as usize + i.min(inst.aux.saturating_sub(1)) as usize])
        .collect();
    Flow::Indirect
}

/// Ends the lanes.
pub fn exit(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    if !core.warp.copies.is_empty() && cp_async::abandon(core, inst, mask) == Flow::Fault {
        return Flow::Fault;
    }
    Flow::Exit
}

fn trap(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    core.find(
        Check::Bounds,
        Fault::LaunchFailed,
        inst,
        mask,
        vec!["Invalid state: the kernel executed trap".to_owned()],
    );
    Flow::Fault
}

fn nothing(_: &mut Core<'_>, _: &Inst, _: u32) -> Flow {
    Flow::Next
}

fn fence(core: &mut Core<'_>, _: &Inst, _: u32) -> Flow {
    core.global_race.fence(core.block.index, core.warp.id);
    Flow::Next
}

fn warp_barrier(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let Some(race) = &mut core.block.race else { return Flow::Next };
    // Lanes at one instruction may be several teams, each with its own member mask.
    let members = core.warp.regs.get32(inst.e);
    let mut rest = mask;
    while rest != 0 {
        let team = members[rest.trailing_zeros() as usize] & mask;
        race.warp_sync(core.warp.id, team);
        rest &= !(team | rest & rest.wrapping_neg());
    }
    Flow::Next
}

fn block_barrier(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let (has_count, arrive, vote, negated) =
        (inst.aux & 1 == 1, inst.aux >> 1 & 1 == 1, inst.aux >> 2 & 3, inst.aux >> 4 & 1 == 1);
    let lane = mask.trailing_zeros() as usize;
    let id = core.warp.regs.get32(inst.a)[lane];
    if core.resumed {
        return vote_result(core, inst, mask, vote, id);
    }
    let mut undefined = core.warp.regs.any_undef32(inst.a) & mask;
    if has_count {
        undefined |= core.warp.regs.any_undef32(inst.b) & mask;
    }
    if undefined != 0 && core.undefined(inst, undefined, "barrier number or count") == Flow::Fault {
        return Flow::Fault;
    }
    let count = has_count.then(|| core.warp.regs.get32(inst.b)[lane]);
    let problem = if id > 15 {
        Some(format!("Barrier number {id} does not exist: there are 16"))
    } else if count.is_some_and(|c| c == 0 || !c.is_multiple_of(32)) {
        Some(format!("Barrier count {} is not a multiple of 32", count.unwrap_or(0)))
    } else if count.is_some_and(|c| c > core.block.warps * 32) {
        Some(format!("Barrier count {} is more than the threads of the block", count.unwrap_or(0)))
    } else if core.block.barriers[id as usize].count != count && !core.block.barriers[id as usize].idle() {
        Some(format!("Barrier {id} is waited for with different numbers of threads"))
    } else {
        None
    };
    if let Some(text) = problem {
        // Whatever the level, there is no way to go on that means anything.
        core.find(Check::Barrier, Fault::LaunchFailed, inst, mask, vec![text]);
        core.fault.get_or_insert(Fault::LaunchFailed);
        return Flow::Fault;
    }
    let warp = core.warp.id as usize;
    let barrier = &mut core.block.barriers[id as usize];
    barrier.count = count;
    barrier.arrive_only[warp] = arrive;
    barrier.arrived[warp] |= mask;
    barrier.pc[warp] = inst.pc;
    if vote != 0 {
        let value = core.warp.regs.pred[inst.c as usize];
        barrier.votes += ((if negated { !value } else { value }) & mask).count_ones();
        barrier.voters += mask.count_ones();
        barrier.undefined |= core.warp.regs.undef_pred[inst.c as usize] & mask != 0;
    }
    if arrive && let Some(race) = &mut core.block.race {
        race.arrive(id, core.warp.id);
    }
    if arrive { Flow::Arrived } else { Flow::Wait { barrier: id } }
}

fn vote_result(core: &mut Core<'_>, inst: &Inst, mask: u32, vote: u32, id: u32) -> Flow {
    let barrier = &core.block.barriers[id as usize & 15];
    let (votes, voters) = barrier.result;
    let undef = if barrier.result_undefined { mask } else { 0 };
    match vote {
        1 => core.warp.regs.put32(inst.d, &[votes; 32], mask, [undef; 2]),
        2 => core.warp.regs.put_pred(inst.d, if votes == voters { u32::MAX } else { 0 }, mask, undef),
        3 => core.warp.regs.put_pred(inst.d, if votes > 0 { u32::MAX } else { 0 }, mask, undef),
        _ => {}
    }
    Flow::Next
}

/// Copies a 32-bit slot with the definedness of its halves.
pub fn copy32() -> Exec {
    fn copy(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
        let value = *core.warp.regs.get32(inst.a);
        let undef = core.warp.regs.undef32[inst.a as usize];
        core.warp.regs.put32(inst.d, &value, mask, undef);
        Flow::Next
    }
    copy
}

/// Copies a 64-bit slot.
pub fn copy64() -> Exec {
    map1(|a: u64| a)
}

/// Copies a predicate.
pub fn copy_pred(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let value = core.warp.regs.pred[inst.a as usize];
    let undef = core.warp.regs.undef_pred[inst.a as usize];
    core.warp.regs.put_pred(inst.d, value, mask, undef);
    Flow::Next
}

/// A call of a function that the driver provides: `vprintf`, `__assertfail`.
///
/// # Errors
/// Any other name.
pub fn system_call(
    d: &mut Decoder<'_>,
    name: &str,
    returns: &[Operand],
    args: &[Operand],
) -> Result<Inst, String> {
    let mut offsets = Vec::new();
    for arg in args {
        match arg {
            Operand::Name(arg) => match d.symbol(arg) {
                Some(Symbol::Local(offset)) => offsets.push(offset),
                _ => return Err(format!("argument {arg} of {name} is not a .param variable")),
            },
            other => return Err(format!("argument {other:?} of {name} is not a .param variable")),
        }
    }
    let mut result = u32::MAX;
    if let Some(Operand::Name(to)) = returns.first() {
        match d.symbol(to) {
            Some(Symbol::Local(offset)) => result = offset,
            _ => {
                if let Some(AnySlot::R32(_) | AnySlot::R64(_)) = d.register(to) {
                    return Err(format!("{name} returns through a .param variable"));
                }
            }
        }
    }
    let x = d.extra(&offsets);
    match (name, offsets.len()) {
        ("vprintf", 2) => Ok(Inst { x, d: result, ..Inst::new(printf::vprintf, Class::Control) }),
        ("__assertfail", 5) => Ok(Inst { x, ..Inst::new(printf::assert_fail, Class::Control) }),
        ("vprintf" | "__assertfail", n) => Err(format!("{name} with {n} arguments")),
        _ => Err(format!("function {name} has no body and is not provided")),
    }
}

/// `size` bytes of a thread's local memory as a number.
pub(crate) fn local_value(core: &Core<'_>, lane: usize, offset: u32, size: usize) -> u64 {
    let frame = core.kernel.local_bytes as usize;
    let at = lane * frame + offset as usize;
    let mut bytes = [0; 8];
    if let Some(from) = core.warp.local.get(at..at + size) {
        bytes[..size].copy_from_slice(from);
    }
    u64::from_le_bytes(bytes)
}

/// Reads bytes at a generic address of a lane (device memory or local memory), as far as they exist.
pub(crate) fn read_generic(core: &Core<'_>, lane: usize, address: u64, size: usize) -> Option<Vec<u8>> {
    let frame = core.kernel.local_bytes as usize;
    if (LOCAL_WINDOW..LOCAL_WINDOW + frame as u64).contains(&address) {
        let at = (address - LOCAL_WINDOW) as usize;
        return core
            .warp
            .local
            .get(lane * frame + at..lane * frame + (at + size).min(frame))
            .map(<[u8]>::to_vec);
    }
    let index = core.memory.containing(address)?;
    let a = core.memory.get(index);
    let at = (address - a.base) as usize;
    let bytes = a.bytes();
    bytes.get(at..(at + size).min(bytes.len())).map(<[u8]>::to_vec)
}
