//! ldmatrix, stmatrix, movmatrix: 8×8 matrices of 16-bit elements between shared memory and registers.
//!
//! Lane `4g + t` of a fragment register holds elements `2t` and `2t + 1` of row `g`. So the 32 lanes of a register, taken as 64
//! halves in memory order, are the matrix row by row: an `ldmatrix` copies eight rows of 16 bytes one after the other, and `.trans`
//! transposes what was copied.

use super::access;
use crate::check::shared::Touch;
use crate::config::Check;
use crate::lower::{Decoder, Mods};
use crate::machine::core::Core;
use crate::machine::inst::{Class, Flow, Inst, Sync};
use crate::mem::{DEFINED, FILL, PENDING, SHARED_WINDOW, UNDEFINED};
use crate::ptx::ast::{Instruction, Operand, Space, Ty};
use crate::report::Fault;

/// Bytes of a row, and what its address must be a multiple of.
const ROW: u32 = 16;

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    let mut m = Mods::new(&i.modifiers);
    let load = match i.opcode.as_str() {
        "ldmatrix" => true,
        "stmatrix" => false,
        "movmatrix" => return movmatrix(d, i, m).map(Some),
        _ => return Ok(None),
    };
    aligned(&mut m)?;
    m.take("m8n8").then_some(()).ok_or("only matrices of shape .m8n8 are supported")?;
    let matrices = match m.take_any(&["x1", "x2", "x4"]) {
        Some("x1") => 1,
        Some("x2") => 2,
        Some(_) => 4,
        None => return Err(".x1, .x2 or .x4 is missing".to_owned()),
    };
    let transposed = m.take("trans");
    m.take("b16").then_some(()).ok_or("only elements of type .b16 are supported")?;
    let space = m.space();
    m.finish()?;
    let [first, second] = i.operands.as_slice() else {
        return Err("an address and a vector of registers are needed".to_owned());
    };
    let (vector, address) = if load { (first, second) } else { (second, first) };
    let registers = match vector {
        Operand::Vector(registers) => registers.as_slice(),
        one => std::slice::from_ref(one),
    };
    if registers.len() != matrices as usize {
        return Err(format!("{matrices} matrices need as many registers, not {}", registers.len()));
    }
    let mut slots = [0; 4];
    for (slot, register) in slots.iter_mut().zip(registers) {
        *slot = if load { d.dst32(register)? } else { d.src32(register, Ty::B32)? };
    }
    let address = d.address(address)?;
    let generic = match (space, address.space) {
        (Space::Shared, None | Some(Space::Shared)) | (Space::Generic, Some(Space::Shared)) => false,
        (Space::Generic, None) => true,
        _ => return Err("the rows must be in shared memory".to_owned()),
    };
    let exec = match (load, transposed) {
        (true, false) => ldmatrix::<false>,
        (true, true) => ldmatrix::<true>,
        (false, false) => stmatrix::<false>,
        (false, true) => stmatrix::<true>,
    };
    let mut inst = Inst::new(exec, Class::LdMatrix);
    inst.x = d.extra(&slots[..matrices as usize]);
    inst.a = address.slot;
    inst.imm = address.offset;
    // aux: number of matrices; bit 8: the base is 64 bits wide; bit 9: the address is generic.
    inst.aux = matrices | u32::from(address.wide) << 8 | u32::from(generic) << 9;
    inst.sync = Sync::Aligned;
    inst.strict = !load;
    Ok(Some(inst))
}

fn aligned(m: &mut Mods<'_>) -> Result<(), String> {
    let both = m.take("sync") & m.take("aligned");
    both.then_some(()).ok_or_else(|| ".sync.aligned is missing".to_owned())
}

fn movmatrix(d: &mut Decoder<'_>, i: &Instruction, mut m: Mods<'_>) -> Result<Inst, String> {
    aligned(&mut m)?;
    for word in ["m8n8", "trans", "b16"] {
        m.take(word).then_some(()).ok_or_else(|| format!("movmatrix needs .{word}"))?;
    }
    m.finish()?;
    let [to, from] = i.operands.as_slice() else {
        return Err("movmatrix needs two registers".to_owned());
    };
    let mut inst = Inst::new(transpose_register, Class::LdMatrix);
    inst.d = d.dst32(to)?;
    inst.a = d.src32(from, Ty::B32)?;
    inst.sync = Sync::Aligned;
    Ok(inst)
}

/// Rows become columns. Interleaving the upper with the lower half of the rows rotates the bits of an element's index by one; three
/// times swap row and column.
#[cfg(target_arch = "x86_64")]
fn transpose(register: &[u32; 32]) -> [u32; 32] {
    // SAFETY: every x86-64 processor has SSE2.
    unsafe { interleave(register) }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
fn interleave(register: &[u32; 32]) -> [u32; 32] {
    use std::arch::x86_64::{__m128i, _mm_unpackhi_epi16, _mm_unpacklo_epi16};
    // SAFETY: both are 128 bytes without padding, and any bits will do for either.
    let mut x: [__m128i; 8] = unsafe { std::mem::transmute(*register) };
    for _ in 0..3 {
        x = [
            _mm_unpacklo_epi16(x[0], x[4]),
            _mm_unpackhi_epi16(x[0], x[4]),
            _mm_unpacklo_epi16(x[1], x[5]),
            _mm_unpackhi_epi16(x[1], x[5]),
            _mm_unpacklo_epi16(x[2], x[6]),
            _mm_unpackhi_epi16(x[2], x[6]),
            _mm_unpacklo_epi16(x[3], x[7]),
            _mm_unpackhi_epi16(x[3], x[7]),
        ];
    }
    // SAFETY: as above.
    unsafe { std::mem::transmute(x) }
}

#[cfg(not(target_arch = "x86_64"))]
fn transpose(register: &[u32; 32]) -> [u32; 32] {
    let half = |row: usize, column: usize| register[4 * row + column / 2] >> (column % 2 * 16) & 0xffff;
    std::array::from_fn(|lane| {
        let (row, column) = (lane / 4, lane % 4 * 2);
        half(column, row) | half(column + 1, row) << 16
    })
}

/// Undefined lanes of the low and the high half, one bit an element in the order of a tile.
fn undefined_tile([low, high]: [u32; 2]) -> u64 {
    let mut bits = 0;
    for lane in 0..32 {
        bits |= u64::from(low >> lane & 1) << (2 * lane) | u64::from(high >> lane & 1) << (2 * lane + 1);
    }
    bits
}

fn undefined_lanes(bits: u64) -> [u32; 2] {
    let mut undef = [0; 2];
    for lane in 0..32 {
        undef[0] |= ((bits >> (2 * lane) & 1) as u32) << lane;
        undef[1] |= ((bits >> (2 * lane + 1) & 1) as u32) << lane;
    }
    undef
}

fn transpose_bits(bits: u64) -> u64 {
    let mut out = 0;
    for (i, j) in (0..8).flat_map(|i| (0..8).map(move |j| (i, j))) {
        out |= (bits >> (8 * i + j) & 1) << (8 * j + i);
    }
    out
}

fn transpose_register(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let regs = &mut core.warp.regs;
    let value = transpose(regs.get32(inst.a));
    let undef = regs.undef32[inst.a as usize];
    let undef = if undef == [0; 2] { undef } else { undefined_lanes(transpose_bits(undefined_tile(undef))) };
    regs.put32(inst.d, &value, mask, undef);
    Flow::Next
}

/// Offsets of the rows in shared memory, and the lanes that gave them: in a short warp some rows have no lane.
struct Rows {
    offsets: [u32; 32],
    lanes: u32,
}

fn rows(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<Rows, Flow> {
    let matrices = inst.aux & 7;
    let (wide, generic) = (inst.aux >> 8 & 1 == 1, inst.aux >> 9 & 1 == 1);
    let lanes = mask & (u32::MAX >> (32 - 8 * matrices));
    access::defined_address(core, inst, inst.a, wide, lanes)?;
    let addresses = access::addresses(core, inst.a, wide, inst.imm);
    if generic {
        let elsewhere = access::lanes_where(lanes, |lane| addresses[lane] >> 32 != SHARED_WINDOW >> 32);
        if elsewhere != 0 {
            let address = addresses[elsewhere.trailing_zeros() as usize & 31];
            let lines = vec![
                format!("Invalid __shared__ access of size {ROW} bytes"),
                format!("generic address {address:#x} is not in shared memory"),
            ];
            core.find(Check::Bounds, Fault::IllegalAddress, inst, elsewhere, lines);
            return Err(Flow::Fault);
        }
    }
    Ok(Rows { offsets: access::low(&addresses), lanes })
}

/// The checks of the rows, and what the counters want to know.
fn check(
    core: &mut Core<'_>,
    inst: &Inst,
    rows: &Rows,
    touch: Touch,
    values: Option<&[u128; 32]>,
) -> Result<(), Flow> {
    access::shared_rows(core, inst, rows.lanes, &rows.offsets, ROW, touch, values)?;
    if core.counters.memory {
        core.counters.matrix_rows(inst.pc, &rows.offsets, inst.aux & 7);
    }
    Ok(())
}

#[inline(always)]
fn row(bytes: &[u8], offset: u32) -> [u8; ROW as usize] {
    let at = offset as usize;
    bytes.get(at..at + ROW as usize).and_then(|b| b.first_chunk()).copied().unwrap_or_default()
}

fn ldmatrix<const TRANSPOSED: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    load::<TRANSPOSED>(core, inst, mask).unwrap_or_else(|flow| flow)
}

fn load<const TRANSPOSED: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<Flow, Flow> {
    let rows = rows(core, inst, mask)?;
    check(core, inst, &rows, Touch::Read, None)?;
    let track = core.warp.regs.track;
    for matrix in 0..(inst.aux & 7) as usize {
        let mut register = [0; 32];
        let mut shadow = [0; 8];
        let present = rows.lanes >> (8 * matrix) & 0xff;
        for r in 0..8 {
            let offset = rows.offsets[8 * matrix + r];
            let here = present >> r & 1 == 1;
            let value = if here { row(&core.block.shared, offset) } else { [FILL; ROW as usize] };
            for j in 0..4 {
                let word = [value[4 * j], value[4 * j + 1], value[4 * j + 2], value[4 * j + 3]];
                register[4 * r + j] = u32::from_le_bytes(word);
            }
            if track {
                let shade =
                    if here { row(&core.block.shared_shadow, offset) } else { [UNDEFINED; ROW as usize] };
                shadow[r] = u128::from_le_bytes(shade);
            }
        }
        let mut undef = [0; 2];
        if track && shadow.iter().fold(0, |a, b| a | b) != 0 {
            let mut bits = undefined_rows(&shadow);
            if TRANSPOSED {
                bits = transpose_bits(bits);
            }
            undef = undefined_lanes(bits);
        }
        if TRANSPOSED {
            register = transpose(&register);
        }
        let slot = core.kernel.extra[inst.x as usize + matrix];
        core.warp.regs.put32(slot, &register, mask, undef);
    }
    Ok(Flow::Next)
}

/// One bit an element: one of its two shadow bytes is undefined.
fn undefined_rows(shadow: &[u128; 8]) -> u64 {
    let mut bits = 0;
    for (r, row) in shadow.iter().enumerate() {
        for (c, element) in row.to_le_bytes().chunks_exact(2).enumerate() {
            bits |= u64::from((element[0] | element[1]) & UNDEFINED) << (8 * r + c);
        }
    }
    bits
}

fn stmatrix<const TRANSPOSED: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    store::<TRANSPOSED>(core, inst, mask).unwrap_or_else(|flow| flow)
}

fn store<const TRANSPOSED: bool>(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Result<Flow, Flow> {
    let rows = rows(core, inst, mask)?;
    let mut values = [0; 32];
    let mut undefined = [0; 4];
    for matrix in 0..(inst.aux & 7) as usize {
        let slot = core.kernel.extra[inst.x as usize + matrix];
        let mut register = *core.warp.regs.get32(slot);
        let mut bits = undefined_tile(core.warp.regs.undef32[slot as usize]);
        if TRANSPOSED {
            register = transpose(&register);
            bits = transpose_bits(bits);
        }
        for (value, row) in values[8 * matrix..].iter_mut().zip(register.chunks_exact(4)) {
            *value = row.iter().rev().fold(0, |v, &word| v << 32 | u128::from(word));
        }
        undefined[matrix] = bits;
    }
    check(core, inst, &rows, Touch::Write, Some(&values))?;
    let block = &mut *core.block;
    for lane in (0..32).filter(|lane| rows.lanes >> lane & 1 == 1) {
        let at = rows.offsets[lane] as usize;
        let place = at..at + ROW as usize;
        block.shared[place.clone()].copy_from_slice(&values[lane].to_le_bytes());
        for (byte, shade) in block.shared_shadow[place].iter_mut().enumerate() {
            let undefined = undefined[lane / 8] >> (8 * (lane % 8) + byte / 2) & 1 == 1;
            *shade = *shade & PENDING | if undefined { UNDEFINED } else { DEFINED };
        }
    }
    Ok(Flow::Next)
}
