//! Floating-point products, for any processor.

use super::fragments::{Rows, Slots, place, read_f16, read_f32, to_f16, to_f32, truncate, undefined, write};
use super::{Num, Shape};
use crate::both;
use crate::machine::core::Core;
use crate::machine::inst::{Exec, Flow, Inst};

/// The function for f16, bf16 and tf32.
pub(super) fn exec(a: Num, blocks: u32, d: Num) -> Exec {
    #[cfg(target_arch = "x86_64")]
    if crate::ops::lanes::fast_processor() {
        return super::vector::exec(a, blocks, d);
    }
    let _ = (a, blocks, d);
    portable
}

/// Most elements of a row of A: two registers of 8-bit floats.
const MOST: usize = 32;

/// One product, decoded element by element; with `EMU_MMA=rz8` the truncating one.
pub(super) fn portable(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let shape = Shape::unpack(inst.aux);
    let slots = Slots::new(core.kernel, inst, shape.registers());
    let truncates = core.config.mma_truncates;
    let regs = &mut core.warp.regs;
    let undef = undefined(regs, &slots, &shape);
    let [d, left, right, _] = shape.types;
    let k = (shape.k as usize).min(MOST);
    let per_row = left.a_row() as usize;
    let mut a = [[0.0; MOST]; 16];
    for (i, &slot) in slots.a.iter().enumerate() {
        for (lane, &word) in regs.get32(slot).iter().enumerate() {
            for e in 0..per_row / 4 {
                a[lane / 4 + i % 2 * 8][i / 2 * per_row + lane % 4 * (per_row / 4) + e] =
                    value(left, word, e);
            }
        }
    }
    let mut b = [[0.0; 8]; MOST];
    for (i, &slot) in slots.b.iter().enumerate() {
        for (lane, &word) in regs.get32(slot).iter().enumerate() {
            for e in 0..per_row / 4 {
                b[i * per_row + lane % 4 * (per_row / 4) + e][place(lane / 4)] = value(right, word, e);
            }
        }
    }
    let mut c = if d == Num::F16 { read_f16(regs, slots.c) } else { read_f32(regs, slots.c) };
    for (sums, row) in c.0.iter_mut().zip(&a) {
        for (eight, right) in row[..k].chunks(8).zip(b.chunks(8)) {
            for (x, ys) in eight.iter().zip(right) {
                for (sum, y) in sums.iter_mut().zip(ys) {
                    *sum += x * y;
                }
            }
            if truncates {
                *sums = sums.map(truncate);
            }
        }
    }
    store(core, &slots, &c, d, mask, undef);
    Flow::Next
}

fn store(
    core: &mut Core<'_>,
    slots: &Slots<'_>,
    rows: &Rows,
    d: Num,
    mask: u32,
    undef: Option<[[u32; 2]; 4]>,
) {
    let regs = &mut core.warp.regs;
    if d == Num::F16 {
        write(regs, slots.d, &to_f16(rows), mask, undef);
    } else {
        write(regs, slots.d, &to_f32(rows), mask, undef);
    }
}

/// Element `e` of a register.
fn value(num: Num, word: u32, e: usize) -> f64 {
    match num {
        Num::F16 => half::f16::from_bits((word >> (16 * e)) as u16).to_f64(),
        Num::Bf16 => f64::from(f32::from_bits(word >> (16 * e) << 16)),
        Num::Tf32 => f64::from(f32::from_bits(word & 0xffff_e000)),
        // Five bits of exponent and two of significand are the upper half of an f16.
        Num::E5m2 => half::f16::from_bits(((word >> (8 * e)) as u16 & 0xff) << 8).to_f64(),
        Num::E4m3 => e4m3((word >> (8 * e)) as u8),
        _ => f64::from(f32::from_bits(word)),
    }
}

/// Four bits of exponent with bias 7, three of significand, no infinity.
fn e4m3(bits: u8) -> f64 {
    let (exponent, significand) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f64::NAN,
        (0, _) => significand * 2f64.powi(-9),
        _ => (8.0 + significand) * 2f64.powi(exponent - 10),
    };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

/// The function for f64.
pub(super) fn double() -> Exec {
    both!(double_body)
}

#[inline(always)]
fn double_body(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let shape = Shape::unpack(inst.aux);
    let slots = Slots::new(core.kernel, inst, shape.registers());
    let regs = &mut core.warp.regs;
    let undef = undefined(regs, &slots, &shape).unwrap_or_default();
    let halves = shape.m as usize / 8;
    let mut out = [[0u64; 32]; 4];
    for (register, value) in out.iter_mut().enumerate().take(2 * halves) {
        let c = regs.get64(slots.c[register]);
        for (lane, value) in value.iter_mut().enumerate() {
            let (row, column) = (lane / 4, lane % 4 * 2 + register % 2);
            let mut sum = f64::from_bits(c[lane]);
            for (block, &b) in slots.b.iter().enumerate() {
                let (a, b) = (regs.get64(slots.a[block * halves + register / 2]), regs.get64(b));
                for k in 0..4 {
                    sum = f64::from_bits(a[4 * row + k]).mul_add(f64::from_bits(b[4 * column + k]), sum);
                }
            }
            *value = if sum.is_nan() { 0x7fff_ffff_ffff_ffff } else { sum.to_bits() };
        }
    }
    for ((slot, value), undef) in slots.d.iter().zip(&out).zip(undef) {
        regs.put64(*slot, value, mask, undef);
    }
    Flow::Next
}
