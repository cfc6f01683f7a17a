//! The register file of a warp, with one "undefined" bit a lane and half.
//!
//! 16-bit values live in the low half of a 32-bit slot. Each slot carries two lane masks: for 32-bit slots the low and the
//! high 16 bits, for 64-bit slots the low and the high 32 bits. A set bit means that the value there depends on something
//! nobody wrote.

/// All 32 lanes.
pub const FULL: u32 = u32::MAX;

/// Registers of one warp.
#[derive(Clone, Debug, Default)]
pub struct Regs {
    /// 32-bit slots.
    pub r32: Vec<[u32; 32]>,
    /// 64-bit slots.
    pub r64: Vec<[u64; 32]>,
    /// Predicates as lane masks.
    pub pred: Vec<u32>,
    /// Undefined lanes of the low and high half of each 32-bit slot.
    pub undef32: Vec<[u32; 2]>,
    /// Undefined lanes of the low and high word of each 64-bit slot.
    pub undef64: Vec<[u32; 2]>,
    /// Undefined lanes of each predicate.
    pub undef_pred: Vec<u32>,
    /// Undefined values are followed at all.
    pub track: bool,
    /// Lanes whose results are undefined whatever the sources, because the guard of the instruction was; also where the guard was
    /// false, because the result might have been written.
    pub poison: u32,
}

impl Regs {
    /// Writes the lanes of `mask`; `undef` are the undefined lanes of the low and the high half.
    #[inline(always)]
    pub fn put32(&mut self, slot: u32, value: &[u32; 32], mask: u32, undef: [u32; 2]) {
        let out = &mut self.r32[slot as usize];
        if mask == FULL {
            *out = *value;
        } else {
            for lane in 0..32 {
                let keep = ((mask >> lane) & 1).wrapping_sub(1);
                out[lane] = (value[lane] & !keep) | (out[lane] & keep);
            }
        }
        if self.track {
            let u = &mut self.undef32[slot as usize];
            u[0] = (u[0] & !mask) | (undef[0] & mask) | self.poison;
            u[1] = (u[1] & !mask) | (undef[1] & mask) | self.poison;
        }
    }

    /// Writes the lanes of `mask`; `undef` are the undefined lanes of the low and the high word.
    #[inline(always)]
    pub fn put64(&mut self, slot: u32, value: &[u64; 32], mask: u32, undef: [u32; 2]) {
        let out = &mut self.r64[slot as usize];
        if mask == FULL {
            *out = *value;
        } else {
            for lane in 0..32 {
                let keep = u64::from((mask >> lane) & 1).wrapping_sub(1);
                out[lane] = (value[lane] & !keep) | (out[lane] & keep);
            }
        }
        if self.track {
            let u = &mut self.undef64[slot as usize];
            u[0] = (u[0] & !mask) | (undef[0] & mask) | self.poison;
            u[1] = (u[1] & !mask) | (undef[1] & mask) | self.poison;
        }
    }

    /// Writes the lanes of `mask` of a predicate.
    #[inline(always)]
    pub fn put_pred(&mut self, slot: u32, value: u32, mask: u32, undef: u32) {
        let out = &mut self.pred[slot as usize];
        *out = (value & mask) | (*out & !mask);
        if self.track {
            let u = &mut self.undef_pred[slot as usize];
            *u = (*u & !mask) | (undef & mask) | self.poison;
        }
    }

    /// Values of a 32-bit slot.
    #[inline(always)]
    pub fn get32(&self, slot: u32) -> &[u32; 32] {
        &self.r32[slot as usize]
    }

    /// Values of a 64-bit slot.
    #[inline(always)]
    pub fn get64(&self, slot: u32) -> &[u64; 32] {
        &self.r64[slot as usize]
    }

    /// Lanes in which any part of a 32-bit slot is undefined.
    #[inline(always)]
    pub fn any_undef32(&self, slot: u32) -> u32 {
        let u = self.undef32[slot as usize];
        u[0] | u[1]
    }

    /// Lanes in which any part of a 64-bit slot is undefined.
    #[inline(always)]
    pub fn any_undef64(&self, slot: u32) -> u32 {
        let u = self.undef64[slot as usize];
        u[0] | u[1]
    }
}
