//! cvt to and from pairs of 8-bit floats.

use super::convert::finish;
use super::exact::{E4M3, E5M2, F16, F32, Format, Rounding, Value};
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Flow, Inst};
use crate::ptx::ast::{Instruction, Ty};

const NAMES: [&str; 2] = ["e4m3x2", "e5m2x2"];

/// A word names a pair of 8-bit floats.
pub(super) fn is_small(word: &str) -> bool {
    NAMES.contains(&word)
}

const TO_F16: u32 = 0;
const FROM_F16: u32 = 1;
const FROM_F32: u32 = 2;

/// `cvt.rn.satfinite.e4m3x2.f32 d, a, b` (`a` in the upper byte), `cvt.rn.satfinite.e4m3x2.f16x2 d, a`,
/// `cvt.rn.f16x2.e4m3x2 d, a`.
pub(super) fn decode(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    if !m.take("rn") {
        return Err("cvt of 8-bit floats needs .rn".to_owned());
    }
    let relu = m.take("relu");
    let finite = m.take("satfinite");
    let small = m.rest().iter().position(|w| is_small(w));
    let name = m.take_any(&NAMES).unwrap_or(NAMES[0]);
    let other = m.ty()?;
    m.finish()?;
    let direction = match (small, other) {
        (Some(0), Ty::F32) => FROM_F32,
        (Some(0), Ty::F16x2) => FROM_F16,
        (Some(1), Ty::F16x2) => TO_F16,
        _ => return Err(format!("cvt between {name} and {other:?} does not exist")),
    };
    if finite != (direction != TO_F16) {
        return Err("cvt to 8-bit floats needs .satfinite, cvt from them does not know it".to_owned());
    }
    let sources = if direction == FROM_F32 { 2 } else { 1 };
    if i.operands.len() != sources + 1 {
        return Err(format!("this cvt needs a destination and {sources} sources"));
    }
    let a = d.src32(&i.operands[1], Ty::B32)?;
    let b = if sources == 2 { d.src32(&i.operands[2], Ty::B32)? } else { a };
    let aux = direction | u32::from(name == NAMES[1]) << 8 | u32::from(relu) << 9;
    Ok(Inst { d: d.dst32(&i.operands[0])?, a, b, aux, ..Inst::new(run, Class::Cvt) })
}

fn run(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let small = if inst.aux >> 8 & 1 == 1 { E5M2 } else { E4M3 };
    let relu = inst.aux >> 9 & 1 == 1;
    let direction = inst.aux & 0xff;
    let convert = |bits: u32, from: Format, to: Format, finite: bool| {
        let rounded = Value::of(u64::from(bits), from).round(to, Rounding::Nearest, finite);
        finish(rounded, to, false, relu) as u32
    };
    let regs = &mut core.warp.regs;
    let (a, b) = (*regs.get32(inst.a), *regs.get32(inst.b));
    let mut out = [0; 32];
    for (lane, value) in out.iter_mut().enumerate() {
        if mask >> lane & 1 == 0 {
            continue;
        }
        let (a, b) = (a[lane], b[lane]);
        *value = match direction {
            TO_F16 => convert(a & 0xff, small, F16, false) | convert(a >> 8 & 0xff, small, F16, false) << 16,
            FROM_F16 => convert(a & 0xffff, F16, small, true) | convert(a >> 16, F16, small, true) << 8,
            _ => convert(b, F32, small, true) | convert(a, F32, small, true) << 8,
        };
    }
    let undef = match direction {
        TO_F16 => [regs.undef32[inst.a as usize][0]; 2],
        FROM_F16 => [regs.any_undef32(inst.a), 0],
        _ => [regs.any_undef32(inst.a) | regs.any_undef32(inst.b), 0],
    };
    regs.put32(inst.d, &out, mask, undef);
    Flow::Next
}
