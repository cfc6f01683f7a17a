//! Products of 8-bit and 4-bit integers.

use super::fragments::{Slots, undefined, write};
use super::{Num, Shape};
use crate::both;
use crate::machine::core::Core;
use crate::machine::inst::{Exec, Flow, Inst};
use crate::machine::regs::Regs;

/// The function for integers.
pub(super) fn exec() -> Exec {
    both!(body)
}

/// Most elements of a row of A.
const MOST: usize = 64;

/// Rows of A or columns of B: `groups` registers a row of eight lie one above the other, the others behind.
#[inline(always)]
fn unpack<const ROWS: usize>(num: Num, regs: &Regs, slots: &[u32], groups: usize) -> [[i32; MOST]; ROWS] {
    let mut out = [[0; MOST]; ROWS];
    let bits = num.bits();
    let per_word = 32 / bits as usize;
    for (i, &slot) in slots.iter().enumerate() {
        for (lane, &word) in regs.get32(slot).iter().enumerate() {
            let at = (i / groups * 4 + lane % 4) * per_word;
            let row = &mut out[(lane / 4 + i % groups * 8) % ROWS][at..at + per_word];
            for (e, element) in row.iter_mut().enumerate() {
                // To the top, and down again with or without the sign.
                let top = word << (32 - bits - bits * e as u32);
                *element = match num {
                    Num::S8 | Num::S4 => top as i32 >> (32 - bits),
                    _ => (top >> (32 - bits)) as i32,
                };
            }
        }
    }
    out
}

#[inline(always)]
fn body(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let shape = Shape::unpack(inst.aux);
    let slots = Slots::new(core.kernel, inst, shape.registers());
    let regs = &mut core.warp.regs;
    let undef = undefined(regs, &slots, &shape);
    let halves = shape.m as usize / 8;
    let a: [[i32; MOST]; 16] = unpack(shape.types[1], regs, slots.a, halves);
    let b: [[i32; MOST]; 8] = unpack(shape.types[2], regs, slots.b, 1);
    let k = (shape.k as usize).min(MOST);
    let mut out = [[0; 32]; 4];
    for (register, value) in out.iter_mut().enumerate().take(2 * halves) {
        let c = regs.get32(slots.c[register]);
        for (lane, value) in value.iter_mut().enumerate() {
            let (row, column) = (&a[lane / 4 + register / 2 * 8], &b[lane % 4 * 2 + register % 2]);
            // At most 64 products of 16 bits: no overflow before the accumulator is added.
            let sum: i32 = row[..k].iter().zip(&column[..k]).map(|(x, y)| x * y).sum();
            let c = c[lane] as i32;
            *value = if inst.imm == 1 { c.saturating_add(sum) } else { c.wrapping_add(sum) } as u32;
        }
    }
    write(regs, slots.d, &out, mask, undef);
    Flow::Next
}
