//! Accumulators between registers and rows, and which elements of a result are undefined.

use super::{Num, Shape};
use crate::machine::inst::{Inst, Kernel};
use crate::machine::regs::Regs;

/// The slots of an instruction's operands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots<'k> {
    pub(super) d: &'k [u32],
    pub(super) a: &'k [u32],
    pub(super) b: &'k [u32],
    pub(super) c: &'k [u32],
}

impl<'k> Slots<'k> {
    #[inline(always)]
    pub(super) fn new(kernel: &'k Kernel, inst: &Inst, [d, a, b, c]: [usize; 4]) -> Self {
        let all = &kernel.extra[inst.x as usize..inst.x as usize + d + a + b + c];
        let (to, all) = all.split_at(d);
        let (left, all) = all.split_at(a);
        let (right, add) = all.split_at(b);
        Self { d: to, a: left, b: right, c: add }
    }
}

/// Sixteen rows of an accumulator. A row has its even columns first, then the odd ones: that is how the registers hold them, and nothing
/// but B has to be put into this order.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Rows(pub(super) [[f64; 8]; 16]);

/// Where column `n` is in a row of [`Rows`].
pub(super) const fn place(n: usize) -> usize {
    n / 2 + n % 2 * 4
}

/// Elements of a result that depend on something undefined, as the undefined lanes of D's registers. An element of D depends on a row of
/// A, a column of B and its element of C. `None` when everything is defined.
#[inline(always)]
pub(super) fn undefined(regs: &Regs, slots: &Slots<'_>, shape: &Shape) -> Option<[[u32; 2]; 4]> {
    if !regs.track {
        return None;
    }
    let mut any = 0;
    for slot in slots.a.iter().chain(slots.b).chain(slots.c) {
        any |= if shape.types[1] == Num::F64 { regs.any_undef64(*slot) } else { regs.any_undef32(*slot) };
    }
    if any == 0 { None } else { Some(spread(regs, slots, shape)) }
}

#[cold]
fn spread(regs: &Regs, slots: &Slots<'_>, shape: &Shape) -> [[u32; 2]; 4] {
    let wide = shape.types[1] == Num::F64;
    let of = |slot: u32| if wide { regs.undef64[slot as usize] } else { regs.undef32[slot as usize] };
    let both = |slot: u32| of(slot)[0] | of(slot)[1];
    let halves = shape.m as usize / 8;
    // Bit r: row r of A has an undefined element; bit n: column n of B.
    let (mut rows, mut columns) = (0u32, 0u32);
    for g in 0..8 {
        for (i, &slot) in slots.a.iter().enumerate() {
            rows |= u32::from(both(slot) >> (4 * g) & 15 != 0) << (g + 8 * (i % halves));
        }
        for &slot in slots.b {
            columns |= u32::from(both(slot) >> (4 * g) & 15 != 0) << g;
        }
    }
    let packed = shape.types[0] == Num::F16;
    let mut out = [[0; 2]; 4];
    for (register, undef) in out.iter_mut().enumerate().take(slots.d.len()) {
        let c = of(slots.c[register]);
        for lane in 0..32 {
            let (g, t) = (lane >> 2, lane & 3);
            let element = |half: usize, column: usize| (rows >> (g + 8 * half) | columns >> column) & 1;
            if packed {
                undef[0] |= (element(register, 2 * t) | c[0] >> lane & 1) << lane;
                undef[1] |= (element(register, 2 * t + 1) | c[1] >> lane & 1) << lane;
            } else {
                let one = element(register / 2, 2 * t + register % 2) | (c[0] | c[1]) >> lane & 1;
                undef[0] |= one << lane;
                undef[1] |= one << lane;
            }
        }
    }
    out
}

/// Writes D.
#[inline(always)]
pub(super) fn write(
    regs: &mut Regs,
    slots: &[u32],
    values: &[[u32; 32]],
    mask: u32,
    undef: Option<[[u32; 2]; 4]>,
) {
    let undef = undef.unwrap_or_default();
    for ((slot, value), undef) in slots.iter().zip(values).zip(undef) {
        regs.put32(*slot, value, mask, undef);
    }
}

/// Reads a 32-bit accumulator.
#[inline(always)]
pub(super) fn read_f32(regs: &Regs, c: &[u32]) -> Rows {
    let mut rows = Rows([[0.0; 8]; 16]);
    for (register, &slot) in c.iter().enumerate() {
        let value = regs.get32(slot);
        for g in 0..8 {
            for t in 0..4 {
                rows.0[g + register / 2 * 8][t + register % 2 * 4] =
                    f64::from(f32::from_bits(value[4 * g + t]));
            }
        }
    }
    rows
}

/// Rounds to f32 and lays the rows out as registers.
#[inline(always)]
pub(super) fn to_f32(rows: &Rows) -> [[u32; 32]; 4] {
    let mut out = [[0; 32]; 4];
    for (register, value) in out.iter_mut().enumerate() {
        for g in 0..8 {
            for t in 0..4 {
                let rounded = rows.0[g + register / 2 * 8][t + register % 2 * 4] as f32;
                value[4 * g + t] = if rounded.is_nan() { 0x7fff_ffff } else { rounded.to_bits() };
            }
        }
    }
    out
}

/// Reads a 16-bit accumulator.
pub(super) fn read_f16(regs: &Regs, c: &[u32]) -> Rows {
    let mut rows = Rows([[0.0; 8]; 16]);
    for (half, &slot) in c.iter().enumerate() {
        for (lane, &word) in regs.get32(slot).iter().enumerate() {
            let row = &mut rows.0[lane / 4 + 8 * half];
            row[lane % 4] = half::f16::from_bits(word as u16).to_f64();
            row[lane % 4 + 4] = half::f16::from_bits((word >> 16) as u16).to_f64();
        }
    }
    rows
}

/// Rounds to f16, once, and lays the rows out as registers.
pub(super) fn to_f16(rows: &Rows) -> [[u32; 32]; 2] {
    let mut out = [[0; 32]; 2];
    for (half, value) in out.iter_mut().enumerate() {
        for (lane, word) in value.iter_mut().enumerate() {
            let row = &rows.0[lane / 4 + 8 * half];
            *word = u32::from(round_f16(row[lane % 4])) | u32::from(round_f16(row[lane % 4 + 4])) << 16;
        }
    }
    out
}

/// The nearest f16. Going through f32 would round twice, unless the first rounding keeps in the last bit whether anything was lost
/// (round to odd).
fn round_f16(value: f64) -> u16 {
    if value.is_nan() {
        return 0x7fff;
    }
    let nearest = value as f32;
    let mut bits = nearest.to_bits();
    if f64::from(nearest) != value && nearest.is_finite() {
        if f64::from(nearest).abs() > value.abs() {
            bits -= 1;
        }
        bits |= 1;
    }
    half::f16::from_f32(f32::from_bits(bits)).to_bits()
}

/// Cuts to 24 significant bits (towards zero).
pub(super) fn truncate(value: f64) -> f64 {
    let nearest = value as f32;
    if f64::from(nearest).abs() > value.abs() {
        f64::from(f32::from_bits(nearest.to_bits() - 1))
    } else {
        f64::from(nearest)
    }
}
