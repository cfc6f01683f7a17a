//! Runs one warp until it ends, waits at a barrier or has used its slice.
//!
//! The lanes of a warp are groups of (instruction, mask). The group with the smallest instruction index runs; groups at the
//! same instruction become one. A group of all lanes runs in a tight loop.

use super::core::Core;
use super::inst::{Class, Flow, Inst, NO_GUARD, Sync};
use super::warp::{Group, State};
use crate::config::Check;
use crate::report::Fault;

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// All lanes have exited.
    Done,
    /// Every group waits at a barrier.
    Waiting,
    /// The slice is used up.
    Slice,
    /// Lanes arrived at a barrier without waiting: it may be complete.
    Arrived,
    /// A fault was reported.
    Fault,
}

/// A group may take this many steps in a row while others could run: a spinning lane must not starve the one that frees it.
const FAIR: u32 = 65_536;

/// Runs the core's warp for at most `slice` steps.
pub fn run(core: &mut Core<'_>, slice: &mut u64) -> Stop {
    let kernel = core.kernel;
    let mut yielded: Option<u32> = None;
    loop {
        let Some(index) = pick(core, yielded.take()) else {
            return if core.warp.live == 0 { Stop::Done } else { settle(core) };
        };
        let mut group = core.warp.groups.swap_remove(index);
        // The group may run on without looking around until it reaches the next group in line.
        let others =
            core.warp.groups.iter().filter(|g| g.pc >= group.pc).map(|g| g.pc).min().unwrap_or(u32::MAX);
        let alone = core.warp.groups.is_empty();
        // The streak outlives the slice: slices are shorter than what fairness allows.
        let (last, mut steps) = core.warp.streak;
        if group.mask & last == 0 {
            steps = 0;
        }
        let outcome = loop {
            if *slice == 0 {
                break Outcome::Stop(Stop::Slice);
            }
            if !alone {
                if group.pc >= others {
                    break Outcome::Regroup;
                }
                steps += 1;
                if steps > FAIR {
                    steps = 0;
                    yielded = Some(group.mask);
                    break Outcome::Regroup;
                }
            }
            *slice -= 1;
            let inst = &kernel.insts[group.pc as usize];
            match step(core, inst, &mut group) {
                Step::Go => {}
                Step::Jump if alone => {}
                Step::Split(other) => {
                    core.warp.groups.push(other);
                    break Outcome::Regroup;
                }
                Step::Jump | Step::Regroup => break Outcome::Regroup,
                Step::Arrived => break Outcome::Stop(Stop::Arrived),
                Step::Gone => break Outcome::Gone,
                Step::Fault => break Outcome::Stop(Stop::Fault),
            }
        };
        core.warp.streak = (group.mask, steps);
        match outcome {
            Outcome::Gone => {}
            Outcome::Regroup => core.warp.groups.push(group),
            Outcome::Stop(stop) => {
                core.warp.groups.push(group);
                return stop;
            }
        }
    }
}

enum Outcome {
    Regroup,
    Gone,
    Stop(Stop),
}

enum Step {
    Go,
    Jump,
    Split(Group),
    Arrived,
    Regroup,
    Gone,
    Fault,
}

/// The runnable group with the smallest instruction index, after groups at one instruction have become one.
fn pick(core: &mut Core<'_>, avoid: Option<u32>) -> Option<usize> {
    let groups = &mut core.warp.groups;
    let mut i = 0;
    while i < groups.len() {
        let mut j = i + 1;
        while j < groups.len() {
            let meet = |s: State| matches!(s, State::Ready | State::Converging);
            if groups[i].pc == groups[j].pc && meet(groups[i].state) && meet(groups[j].state) {
                groups[i].mask |= groups[j].mask;
                groups[i].state = State::Ready;
                groups.swap_remove(j);
            } else {
                j += 1;
            }
        }
        i += 1;
    }
    let ready = |g: &&(usize, &Group)| matches!(g.1.state, State::Ready | State::Released);
    let all: Vec<(usize, &Group)> = if groups.len() == 1 {
        let only = &groups[0];
        return matches!(only.state, State::Ready | State::Released).then_some(0);
    } else {
        groups.iter().enumerate().collect()
    };
    let best = all
        .iter()
        .filter(ready)
        .filter(|g| avoid.is_none_or(|mask| g.1.mask & mask == 0))
        .min_by_key(|g| g.1.pc);
    best.or_else(|| all.iter().filter(ready).min_by_key(|g| g.1.pc)).map(|g| g.0)
}

/// No group can run: either barriers hold some of them, or lanes wait for each other for ever.
fn settle(core: &mut Core<'_>) -> Stop {
    if release_warp_barriers(core) {
        return Stop::Slice;
    }
    if core.warp.groups.iter().any(|g| matches!(g.state, State::Barrier(_))) {
        return Stop::Waiting;
    }
    let groups = core.warp.groups.clone();
    let Some(first) = groups.iter().min_by_key(|g| g.pc) else { return Stop::Done };
    let mut lines =
        vec!["Barrier: lanes of a warp wait for each other at different instructions for ever".to_owned()];
    for g in &groups {
        lines.push(format!("lanes {:08x} wait {}", g.mask, core.place(g.pc)));
    }
    let inst = &core.kernel.insts[first.pc as usize];
    core.find(Check::Barrier, Fault::LaunchFailed, inst, first.mask, lines);
    core.fault.get_or_insert(Fault::LaunchFailed);
    Stop::Fault
}

/// `bar.warp.sync` instructions at different places meet when the lanes of their mask are all there.
fn release_warp_barriers(core: &mut Core<'_>) -> bool {
    let kernel = core.kernel;
    let waits =
        |g: &Group| g.state == State::Converging && kernel.insts[g.pc as usize].sync == Sync::WarpBarrier;
    let here: u32 = core.warp.groups.iter().filter(|g| waits(g)).map(|g| g.mask).fold(0, |a, b| a | b);
    let mut released = false;
    for i in 0..core.warp.groups.len() {
        let g = core.warp.groups[i];
        if !waits(&g) {
            continue;
        }
        let lane = g.mask.trailing_zeros() as usize;
        let members = core.warp.regs.get32(kernel.insts[g.pc as usize].e)[lane] & core.warp.live;
        if members & !here == 0 {
            if let Some(race) = &mut core.block.race {
                race.warp_sync(core.warp.id, members);
            }
            core.warp.groups[i].pc += 1;
            core.warp.groups[i].state = State::Ready;
            released = true;
        }
    }
    released
}

#[inline(always)]
fn step(core: &mut Core<'_>, inst: &Inst, group: &mut Group) -> Step {
    let mut mask = group.mask;
    if inst.guard != NO_GUARD {
        let value = core.warp.regs.pred[inst.guard as usize];
        let undef = core.warp.regs.undef_pred[inst.guard as usize] & mask;
        mask &= if inst.guard_not { !value } else { value };
        if undef != 0 && group.state != State::Released {
            if inst.strict {
                if core.undefined(inst, undef, "guard predicate") == Flow::Fault {
                    return Step::Fault;
                }
            } else {
                core.warp.regs.poison = undef;
            }
        }
        if mask == 0 {
            if core.warp.regs.poison != 0 {
                only_poison(core, inst);
            }
            group.pc += 1;
            return Step::Go;
        }
    }
    if inst.sync != Sync::None && group.state != State::Released {
        match gather(core, inst, group, mask) {
            Gathered::Yes => {}
            Gathered::Not => {
                group.state = State::Converging;
                return Step::Regroup;
            }
            Gathered::Never => return Step::Fault,
        }
    }
    core.resumed = group.state == State::Released;
    if !core.resumed {
        core.counters.executed[inst.pc as usize] += 1;
        core.counters.lanes[inst.pc as usize] += u64::from(mask.count_ones());
        core.warp.executed += 1;
    }
    group.state = State::Ready;
    // SAFETY: the only obligation of an `Exec` is that the processor has the features it was compiled for, which was looked up when
    // it was chosen.
    let flow = unsafe { (inst.exec)(core, inst, mask) };
    core.warp.regs.poison = 0;
    match flow {
        Flow::Next | Flow::Branch { taken: 0, .. } => {
            group.pc += 1;
            Step::Go
        }
        Flow::Branch { taken, target } if taken == group.mask => {
            group.pc = target;
            Step::Jump
        }
        Flow::Branch { taken, target } => {
            core.counters.divergent[inst.pc as usize] += 1;
            group.mask &= !taken;
            group.pc += 1;
            Step::Split(Group { pc: target, mask: taken, state: State::Ready })
        }
        Flow::Indirect => {
            scatter(core, inst, group, mask);
            if group.mask == 0 { Step::Gone } else { Step::Regroup }
        }
        Flow::Exit => {
            leave(core, mask);
            group.mask &= !mask;
            group.pc += 1;
            if group.mask == 0 { Step::Gone } else { Step::Regroup }
        }
        Flow::Wait { barrier } => {
            group.state = State::Barrier(barrier);
            let passing = group.mask & !mask;
            if passing == 0 {
                return Step::Regroup;
            }
            group.mask = mask;
            Step::Split(Group { pc: group.pc + 1, mask: passing, state: State::Ready })
        }
        Flow::Arrived => {
            group.pc += 1;
            Step::Arrived
        }
        Flow::Fault => Step::Fault,
    }
}

/// No lane executes the instruction, but the guard of some is undefined: their results are. Arithmetic runs with an empty mask and marks
/// them; what touches memory or other lanes does not.
#[cold]
fn only_poison(core: &mut Core<'_>, inst: &Inst) {
    let arithmetic = matches!(
        inst.class,
        Class::Int | Class::Fp32 | Class::Fp64 | Class::Fp16 | Class::Sfu | Class::Cvt | Class::Move
    );
    if arithmetic && inst.sync == Sync::None && !core.kernel.meta[inst.pc as usize].text.starts_with("ld") {
        // SAFETY: as in `step`.
        unsafe { (inst.exec)(core, inst, 0) };
    }
    core.warp.regs.poison = 0;
}

/// Lanes end; a barrier that only they were missing at completes.
fn leave(core: &mut Core<'_>, mask: u32) {
    core.warp.live &= !mask;
    let warp = core.warp.id as usize;
    core.block.live[warp] = core.warp.live;
}

fn scatter(core: &mut Core<'_>, inst: &Inst, group: &mut Group, mask: u32) {
    let targets = std::mem::take(&mut core.warp.targets);
    let mut rest = mask;
    while rest != 0 {
        let target = targets[rest.trailing_zeros() as usize];
        let with_it = targets.iter().enumerate().filter(|&(lane, &to)| rest >> lane & 1 == 1 && to == target);
        let same = with_it.fold(0u32, |mask, (lane, _)| mask | 1 << lane);
        rest &= !same;
        core.warp.groups.push(Group { pc: target, mask: same, state: State::Ready });
    }
    if core.warp.groups.len() > 1 {
        core.counters.divergent[inst.pc as usize] += 1;
    }
    core.warp.targets = targets;
    group.mask &= !mask;
    group.pc += 1;
}

enum Gathered {
    Yes,
    Not,
    Never,
}

/// Are all lanes here that the instruction needs?
#[inline(always)]
fn gather(core: &mut Core<'_>, inst: &Inst, group: &Group, mask: u32) -> Gathered {
    let live = core.warp.live;
    let need = match inst.sync {
        Sync::None => return Gathered::Yes,
        Sync::Aligned => live,
        Sync::Member | Sync::WarpBarrier => {
            let members = core.warp.regs.get32(inst.e);
            let first = members[mask.trailing_zeros() as usize];
            let defined = core.warp.regs.any_undef32(inst.e) == 0;
            if defined && mask == u32::MAX && first == u32::MAX && *members == [u32::MAX; 32] {
                return Gathered::Yes;
            }
            return gather_members(core, inst, group, mask);
        }
    };
    if mask & need == need {
        Gathered::Yes
    } else if group.mask & need == need {
        aligned_but_predicated(core, inst, mask)
    } else {
        Gathered::Not
    }
}

/// An `.aligned` instruction that only some lanes execute because of their guard.
#[cold]
fn aligned_but_predicated(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Gathered {
    let lines = vec!["Barrier: an .aligned instruction is executed by a part of the warp only".to_owned()];
    match core.find(Check::Barrier, Fault::LaunchFailed, inst, mask, lines) {
        Flow::Fault => Gathered::Never,
        _ => Gathered::Yes,
    }
}

#[cold]
fn gather_members(core: &mut Core<'_>, inst: &Inst, group: &Group, mask: u32) -> Gathered {
    let members = *core.warp.regs.get32(inst.e);
    let undefined = core.warp.regs.any_undef32(inst.e) & mask;
    if undefined != 0 && core.undefined(inst, undefined, "member mask") == Flow::Fault {
        return Gathered::Never;
    }
    let lanes = || (0..32usize).filter(|&lane| mask >> lane & 1 == 1);
    let outside = lanes().filter(|&lane| members[lane] >> lane & 1 == 0).fold(0u32, |m, lane| m | 1 << lane);
    if outside != 0 {
        let text = "Barrier: a lane executes a warp instruction whose member mask leaves it out".to_owned();
        let detail = format!("its mask is {:08x}", members[outside.trailing_zeros() as usize]);
        if core.find(Check::Barrier, Fault::LaunchFailed, inst, outside, vec![text, detail]) == Flow::Fault {
            return Gathered::Never;
        }
        return Gathered::Yes;
    }
    // Lanes that name different masks may be different teams (each complete in itself) or a mistake.
    let need = lanes().fold(0u32, |m, lane| m | members[lane]) & core.warp.live;
    if need & !mask == 0 {
        for lane in lanes() {
            let team = members[lane] & core.warp.live;
            let disagree = (0..32usize).find(|&l| team >> l & 1 == 1 && members[l] != members[lane]);
            if let Some(other) = disagree {
                let text = "Barrier: lanes that name each other give different member masks".to_owned();
                let detail = format!(
                    "lane {lane} gives {:08x}, lane {other} gives {:08x}",
                    members[lane], members[other]
                );
                if core.find(Check::Barrier, Fault::LaunchFailed, inst, 1 << lane, vec![text, detail])
                    == Flow::Fault
                {
                    return Gathered::Never;
                }
                break;
            }
        }
        return Gathered::Yes;
    }
    if need & !group.mask == 0 {
        let text = "Barrier: lanes of the member mask pass the instruction with a false guard".to_owned();
        let detail = format!("missing lanes {:08x}", need & !mask);
        return match core.find(Check::Barrier, Fault::LaunchFailed, inst, mask, vec![text, detail]) {
            Flow::Fault => Gathered::Never,
            _ => Gathered::Yes,
        };
    }
    Gathered::Not
}
