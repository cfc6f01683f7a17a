//! Shuffles, votes, matches and reductions of a warp.
//!
//! The scheduler brings the live lanes of a member mask together before one of these runs. Lanes that name different masks may be
//! there at once: they are teams, and each is handled by itself.

use crate::both;
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Exec, Flow, Inst, Sync};
use crate::machine::regs::{FULL, Regs};
use crate::ptx::ast::{Instruction, Operand, Ty};

/// Decodes shfl, vote, match, redux, activemask and elect.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let m = Mods::new(&i.modifiers);
    Ok(Some(match i.opcode.as_str() {
        "shfl" => decode_shfl(d, i, m)?,
        "vote" => decode_vote(d, i, m)?,
        "match" => decode_match(d, i, m)?,
        "redux" => decode_redux(d, i, m)?,
        "activemask" => decode_activemask(d, i, m)?,
        "elect" => decode_elect(d, i, m)?,
        _ => return Ok(None),
    }))
}

/// Makes `inst` wait for its member mask; without one (the forms before `.sync`) the lanes that are there are the team.
fn team(d: &mut Decoder<'_>, mut inst: Inst, members: Option<&Operand>) -> Result<Inst, String> {
    if let Some(members) = members {
        inst.e = d.src32(members, Ty::B32)?;
        inst.sync = Sync::Member;
    } else {
        inst.e = d.constant32(FULL);
    }
    Ok(inst)
}

/// The operands before the member mask, and the mask when the instruction has one.
fn split(i: &Instruction, sync: bool, sources: usize) -> Result<(&[Operand], Option<&Operand>), String> {
    if i.operands.len() != sources + usize::from(sync) {
        return Err(format!("{} operands expected", sources + usize::from(sync)));
    }
    let (operands, members) = i.operands.split_at(sources);
    Ok((operands, members.first()))
}

/// A destination `d` or `d|p`; without a predicate the slot is `u32::MAX`.
fn destinations(d: &mut Decoder<'_>, operand: &Operand) -> Result<(u32, u32), String> {
    match operand {
        Operand::Pair(value, predicate) => Ok((d.dst32(value)?, d.dst_pred(predicate)?)),
        value => Ok((d.dst32(value)?, u32::MAX)),
    }
}

fn decode_shfl(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let sync = m.take("sync");
    let mode = m.take_any(&["up", "down", "bfly", "idx"]).ok_or("up, down, bfly or idx is missing")?;
    m.take("b32").then_some(()).ok_or("shfl moves .b32 only")?;
    m.finish()?;
    let (operands, members) = split(i, sync, 4)?;
    let exec: Exec = match mode {
        "up" => both!(shfl::<UP>),
        "down" => both!(shfl::<DOWN>),
        "bfly" => both!(shfl::<BFLY>),
        _ => both!(shfl::<IDX>),
    };
    let mut inst = Inst::new(exec, Class::Warp);
    (inst.d, inst.aux) = destinations(d, &operands[0])?;
    inst.a = d.src32(&operands[1], Ty::B32)?;
    inst.b = d.src32(&operands[2], Ty::U32)?;
    inst.c = d.src32(&operands[3], Ty::U32)?;
    team(d, inst, members)
}

fn decode_vote(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let sync = m.take("sync");
    let mode = m.take_any(&["ballot", "any", "all", "uni"]).ok_or("ballot, any, all or uni is missing")?;
    let ty = if mode == "ballot" { "b32" } else { "pred" };
    m.take(ty).then_some(()).ok_or_else(|| format!("vote.{mode} needs .{ty}"))?;
    m.finish()?;
    let (operands, members) = split(i, sync, 2)?;
    let exec = match mode {
        "ballot" => ballot,
        "any" => vote::<ANY>,
        "all" => vote::<ALL>,
        _ => vote::<UNI>,
    };
    let mut inst = Inst::new(exec, Class::Warp);
    inst.d = if mode == "ballot" { d.dst32(&operands[0])? } else { d.dst_pred(&operands[0])? };
    let (slot, not) = d.src_pred(&operands[1])?;
    (inst.a, inst.aux) = (slot, u32::from(not));
    team(d, inst, members)
}

fn decode_match(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    let mode = m.take_any(&["any", "all"]).ok_or("any or all is missing")?;
    let ty = m.ty()?;
    m.take("sync").then_some(()).ok_or("match exists with .sync only")?;
    m.finish()?;
    let (operands, members) = split(i, true, 2)?;
    let exec = match (mode, ty) {
        ("any", Ty::B32) => match_any::<false>,
        ("any", Ty::B64) => match_any::<true>,
        ("all", Ty::B32) => match_all::<false>,
        ("all", Ty::B64) => match_all::<true>,
        _ => return Err("match compares .b32 or .b64".to_owned()),
    };
    let mut inst = Inst::new(exec, Class::Warp);
    (inst.d, inst.aux) = destinations(d, &operands[0])?;
    if mode == "any" && inst.aux != u32::MAX {
        return Err("match.any has no predicate destination".to_owned());
    }
    inst.a = d.src(&operands[1], ty)?;
    team(d, inst, members)
}

fn decode_redux(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    m.take("sync").then_some(()).ok_or("redux exists with .sync only")?;
    let op = m
        .take_any(&["add", "min", "max", "and", "or", "xor"])
        .ok_or("add, min, max, and, or or xor is missing")?;
    let ty = m.ty()?;
    m.finish()?;
    let exec = match (op, ty) {
        ("add", Ty::U32 | Ty::S32) => redux::<0>,
        ("min", Ty::U32) => redux::<1>,
        ("max", Ty::U32) => redux::<2>,
        ("min", Ty::S32) => redux::<3>,
        ("max", Ty::S32) => redux::<4>,
        ("and", Ty::B32) => redux::<5>,
        ("or", Ty::B32) => redux::<6>,
        ("xor", Ty::B32) => redux::<7>,
        _ => return Err(format!("redux.{op} does not exist for {ty:?} on this device")),
    };
    let (operands, members) = split(i, true, 2)?;
    let mut inst = Inst::new(exec, Class::Warp);
    inst.d = d.dst32(&operands[0])?;
    inst.a = d.src32(&operands[1], ty)?;
    team(d, inst, members)
}

fn decode_activemask(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    m.take("b32").then_some(()).ok_or("activemask needs .b32")?;
    m.finish()?;
    let (operands, _) = split(i, false, 1)?;
    Ok(Inst { d: d.dst32(&operands[0])?, ..Inst::new(activemask, Class::Warp) })
}

fn decode_elect(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    m.take("sync").then_some(()).ok_or("elect exists with .sync only")?;
    m.finish()?;
    let (operands, members) = split(i, true, 1)?;
    let mut inst = Inst::new(elect, Class::Warp);
    (inst.d, inst.aux) = destinations(d, &operands[0])?;
    team(d, inst, members)
}

/// Calls `f` with each team: the lanes of `mask` that name one member mask.
#[inline(always)]
fn teams(regs: &Regs, inst: &Inst, mask: u32, mut f: impl FnMut(u32)) {
    if inst.sync == Sync::None {
        f(mask);
        return;
    }
    let members = regs.get32(inst.e);
    let mut rest = mask;
    while rest != 0 {
        let name = members[rest.trailing_zeros() as usize];
        let mut same = 0;
        for (lane, &other) in members.iter().enumerate() {
            same |= u32::from(other == name) << lane;
        }
        same &= rest;
        rest &= !same;
        f(same);
    }
}

fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

/// All lanes of `who` when one of them is in `undefined`.
fn spread(undefined: u32, who: u32) -> u32 {
    if undefined & who == 0 { 0 } else { who }
}

const UP: u8 = 0;
const DOWN: u8 = 1;
const BFLY: u8 = 2;
const IDX: u8 = 3;

#[inline(always)]
fn shfl<const MODE: u8>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (b, c) = (regs.get32(inst.b), regs.get32(inst.c));
    let mut from = [0u32; 32];
    let mut inside = 0;
    for lane in 0..32 {
        let (l, by, clamp, seg) = (lane as i32, (b[lane] & 31) as i32, c[lane] & 31, c[lane] >> 8 & 31);
        let (clamp, seg) = (clamp as i32, seg as i32);
        let low = l & seg;
        let max = low | (clamp & !seg);
        let (j, ok) = match MODE {
            UP => (l - by, l - by >= max),
            DOWN => (l + by, l + by <= max),
            BFLY => (l ^ by, (l ^ by) <= max),
            _ => (low | (by & !seg), (low | (by & !seg)) <= max),
        };
        from[lane] = if ok { j as u32 & 31 } else { l as u32 };
        inside |= u32::from(ok) << lane;
    }
    let a = regs.get32(inst.a);
    let mut value = [0; 32];
    for lane in 0..32 {
        value[lane] = a[from[lane] as usize & 31];
    }
    let mut undef = [0; 2];
    let mut undef_pred = 0;
    let [low, high] = regs.undef32[inst.a as usize];
    let members = regs.get32(inst.e);
    let alike = mask == FULL && *members == [FULL; 32];
    if !alike || low | high != 0 {
        for lane in lanes_of(mask) {
            let j = from[lane];
            // A lane that is not in the instruction, or not in this lane's team, has nothing to give.
            let absent = if (members[lane] & mask) >> j & 1 == 1 || j == lane as u32 {
                0
            } else {
                value[lane] = u32::MAX;
                1
            };
            undef[0] |= (low >> j & 1 | absent) << lane;
            undef[1] |= (high >> j & 1 | absent) << lane;
        }
    }
    if regs.track {
        undef_pred = regs.any_undef32(inst.b) | regs.any_undef32(inst.c);
        undef = undef.map(|u| u | undef_pred);
    }
    regs.put32(inst.d, &value, mask, undef);
    if inst.aux != u32::MAX {
        regs.put_pred(inst.aux, inside, mask, undef_pred);
    }
    Flow::Next
}

/// The source predicate of a vote and its undefined lanes.
fn ballots(regs: &Regs, inst: &Inst) -> (u32, u32) {
    let value = regs.pred[inst.a as usize];
    (if inst.aux == 1 { !value } else { value }, regs.undef_pred[inst.a as usize])
}

fn ballot(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (value, undefined) = ballots(regs, inst);
    let mut out = [0; 32];
    let mut undef = 0;
    teams(regs, inst, mask, |team| {
        if team == FULL {
            out = [value; 32];
        } else {
            lanes_of(team).for_each(|lane| out[lane] = value & team);
        }
        undef |= spread(undefined, team);
    });
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

const ANY: u8 = 0;
const ALL: u8 = 1;
const UNI: u8 = 2;

fn vote<const MODE: u8>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (value, undefined) = ballots(regs, inst);
    let (mut out, mut undef) = (0, 0);
    teams(regs, inst, mask, |team| {
        let yes = value & team;
        let result = match MODE {
            ANY => yes != 0,
            ALL => yes == team,
            _ => yes == 0 || yes == team,
        };
        out |= if result { team } else { 0 };
        undef |= spread(undefined, team);
    });
    regs.put_pred(inst.d, out, mask, undef);
    Flow::Next
}

/// The values that `match` compares, and their undefined lanes.
fn compared<const WIDE: bool>(regs: &Regs, slot: u32) -> ([u64; 32], u32) {
    if WIDE {
        (*regs.get64(slot), regs.any_undef64(slot))
    } else {
        (regs.get32(slot).map(u64::from), regs.any_undef32(slot))
    }
}

fn match_any<const WIDE: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (value, undefined) = compared::<WIDE>(regs, inst.a);
    let mut out = [0; 32];
    let mut undef = 0;
    teams(regs, inst, mask, |team| {
        for lane in lanes_of(team) {
            out[lane] = lanes_of(team).filter(|&l| value[l] == value[lane]).fold(0, |m, l| m | 1 << l);
        }
        undef |= spread(undefined, team);
    });
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

fn match_all<const WIDE: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let (value, undefined) = compared::<WIDE>(regs, inst.a);
    let mut out = [0; 32];
    let (mut agree, mut undef) = (0, 0);
    teams(regs, inst, mask, |team| {
        let first = value[team.trailing_zeros() as usize];
        if lanes_of(team).all(|lane| value[lane] == first) {
            lanes_of(team).for_each(|lane| out[lane] = team);
            agree |= team;
        }
        undef |= spread(undefined, team);
    });
    regs.put32(inst.d, &out, mask, [undef; 2]);
    if inst.aux != u32::MAX {
        regs.put_pred(inst.aux, agree, mask, undef);
    }
    Flow::Next
}

fn redux<const OP: u8>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let value = *regs.get32(inst.a);
    let undefined = regs.any_undef32(inst.a);
    let mut out = [0; 32];
    let mut undef = 0;
    teams(regs, inst, mask, |team| {
        let reduced = lanes_of(team).map(|lane| value[lane]).reduce(|x, y| match OP {
            0 => x.wrapping_add(y),
            1 => x.min(y),
            2 => x.max(y),
            3 => (x as i32).min(y as i32) as u32,
            4 => (x as i32).max(y as i32) as u32,
            5 => x & y,
            6 => x | y,
            _ => x ^ y,
        });
        lanes_of(team).for_each(|lane| out[lane] = reduced.unwrap_or(0));
        undef |= spread(undefined, team);
    });
    regs.put32(inst.d, &out, mask, [undef; 2]);
    Flow::Next
}

fn activemask(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    core.warp.regs.put32(inst.d, &[mask; 32], mask, [0; 2]);
    Flow::Next
}

/// The manual leaves open which lane is elected; here it is the lowest.
fn elect(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let mut out = [0; 32];
    let mut elected = 0;
    teams(regs, inst, mask, |team| {
        lanes_of(team).for_each(|lane| out[lane] = team.trailing_zeros());
        elected |= team & team.wrapping_neg();
    });
    regs.put32(inst.d, &out, mask, [0; 2]);
    if inst.aux != u32::MAX {
        regs.put_pred(inst.aux, elected, mask, 0);
    }
    Flow::Next
}
