//! Matrix multiply and accumulate.
//!
//! # Fragments
//!
//! One register of a fragment is, over its 32 lanes, eight rows of 128 bits: lane `4g + t` holds the quarter `t` of row `g`. For A the
//! rows are rows of the matrix, for B its columns, and a quarter row is 128 / 4 bits of consecutive `k`. Registers of A alternate
//! between the upper and the lower eight rows, then go on to the next `k`. Register `2h + o` of a 32-bit accumulator holds at
//! (`g`, `t`) row `g + 8h`, column `2t + o`; a 16-bit accumulator has both columns in one register. So all shapes but the
//! `m8n8k4` of `sm_70` follow from the width of an element.
//!
//! # What the numbers mean
//!
//! Products of f16, bf16, tf32 and the 8-bit floats are exact in f64. They are added to the accumulator in f64, in the order of `k`, and the
//! sum is rounded to nearest once: the error of an element is that rounding plus at most `k` times 2^-53 of its largest partial sum.
//! The code for AVX2 uses fused operations, the portable code does not; as the products are exact both give the same
//! bits. A tensor core aligns and truncates, so its last bits differ: compare with a tolerance. `EMU_MMA=rz8` is pessimistic instead: eight
//! products at a time are added and each sum is cut to 24 bits. Operands of type tf32 count with their upper 19 bits. f64 is a
//! chain of fused operations; integers are exact, wrapped or, with `.satfinite`, clamped at the end.

mod float;
mod fragments;
mod integer;
#[cfg(target_arch = "x86_64")]
mod vector;

use crate::lower::{Decoder, Mods};
use crate::machine::inst::{Class, Exec, Inst, Sync};
use crate::ptx::ast::{Instruction, Operand, Ty};
use std::fmt;

/// The type of an operand's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Num {
    F16,
    Bf16,
    Tf32,
    F32,
    F64,
    E4m3,
    E5m2,
    S8,
    U8,
    S4,
    U4,
    S32,
}

const NUMS: [(Num, &str, u32); 12] = [
    (Num::F16, "f16", 16),
    (Num::Bf16, "bf16", 16),
    (Num::Tf32, "tf32", 32),
    (Num::F32, "f32", 32),
    (Num::F64, "f64", 64),
    (Num::E4m3, "e4m3", 8),
    (Num::E5m2, "e5m2", 8),
    (Num::S8, "s8", 8),
    (Num::U8, "u8", 8),
    (Num::S4, "s4", 4),
    (Num::U4, "u4", 4),
    (Num::S32, "s32", 32),
];

impl Num {
    fn parse(word: &str) -> Option<Self> {
        NUMS.iter().find(|(_, name, _)| *name == word).map(|(num, ..)| *num)
    }

    /// As PTX writes it.
    pub fn name(self) -> &'static str {
        NUMS[self as usize].1
    }

    /// Bits of an element.
    pub fn bits(self) -> u32 {
        NUMS[self as usize].2
    }

    /// Elements of one row of a fragment register.
    fn a_row(self) -> u32 {
        if self == Self::F64 { 4 } else { 128 / self.bits() }
    }

    fn small_float(self) -> bool {
        matches!(self, Self::E4m3 | Self::E5m2)
    }

    fn integer(self) -> bool {
        matches!(self, Self::S8 | Self::U8 | Self::S4 | Self::U4)
    }
}

/// Shape and types of an `mma`: D (m×n) = A (m×k) · B (k×n) + C (m×n).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows of A and D.
    pub m: u32,
    /// Columns of B and D.
    pub n: u32,
    /// Columns of A.
    pub k: u32,
    /// Types of D, A, B, C.
    pub types: [Num; 4],
}

impl Shape {
    /// Bytes of A that the tensor core takes in; tf32 has 32 bits.
    pub fn a_bytes(&self) -> u64 {
        u64::from(self.m) * u64::from(self.k) * u64::from(self.types[1].bits()) / 8
    }

    /// Operations of one instruction: a multiplication and an addition for each product.
    pub fn flops(&self) -> u64 {
        2 * u64::from(self.m) * u64::from(self.n) * u64::from(self.k)
    }

    /// Registers a lane has of D, A, B and C.
    fn registers(&self) -> [usize; 4] {
        let [d, a, _, c] = self.types;
        let halves = self.m / 8;
        let blocks = self.k / a.a_row();
        let accumulator = |num: Num| (halves * if num == Num::F16 { 1 } else { 2 }) as usize;
        [accumulator(d), (halves * blocks) as usize, blocks as usize, accumulator(c)]
    }

    fn pack(&self) -> u32 {
        let [d, a, b, c] = self.types.map(|num| num as u32);
        self.m | self.k << 8 | d << 16 | a << 20 | b << 24 | c << 28
    }

    fn unpack(aux: u32) -> Self {
        let num = |shift: u32| NUMS[(aux >> shift & 15) as usize % NUMS.len()].0;
        Self { m: aux & 0xff, n: 8, k: aux >> 8 & 0xff, types: [num(16), num(20), num(24), num(28)] }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [d, a, b, c] = self.types.map(Num::name);
        write!(f, "m{}n{}k{}.{d}.{a}.{b}.{c}", self.m, self.n, self.k)
    }
}

/// The shape of a decoded `mma`; nothing for other instructions.
pub fn shape_of(inst: &Inst) -> Option<Shape> {
    (inst.class == Class::Mma).then(|| Shape::unpack(inst.aux))
}

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands, or a shape that is not supported.
pub fn decode(d: &mut Decoder<'_>, i: &Instruction) -> Result<Option<Inst>, String> {
    match i.opcode.as_str() {
        "mma" => {}
        "wmma" => {
            return Err("wmma is not supported: where its fragments keep the elements is not specified; \
                        use mma.sync and ldmatrix"
                .to_owned());
        }
        "wgmma" | "tcgen05" => {
            return Err(format!(
                "{} is not supported: the modelled devices are sm_80 and sm_90 without it",
                i.opcode
            ));
        }
        _ => return Ok(None),
    }
    let mut m = Mods::new(&i.modifiers);
    if m.take("sp") || m.has("sp::ordered_metadata") {
        return Err("mma.sp (sparse matrices) is not supported".to_owned());
    }
    let together = m.take("sync") & m.take("aligned");
    together.then_some(()).ok_or("mma needs .sync.aligned")?;
    let (rows, k) = m.take_map(parse_shape).ok_or("the shape is missing or not of the form .m16n8k16")?;
    m.take("kind::f8f6f4");
    let saturate = m.take("satfinite");
    m.take("rn");
    let [types @ .., _, _, _, _] = m.rest() else {
        return Err("mma needs .row.col and four types".to_owned());
    };
    if !(types.contains(&"row") && types.contains(&"col")) {
        return Err("only A by rows and B by columns (.row.col) is supported".to_owned());
    }
    m.take("row");
    m.take("col");
    let mut types = [Num::F32; 4];
    for ty in &mut types {
        // In the order they are written: D, A, B, C.
        let word = m.rest().first().copied().unwrap_or_default().to_owned();
        *ty = Num::parse(&word).ok_or_else(|| format!("mma has no type .{word}"))?;
        m.take(&word);
    }
    m.finish()?;
    let shape = Shape { m: rows, n: 8, k, types };
    let exec = choose(&shape)?;
    let [_, a, ..] = types;
    if saturate && !a.integer() {
        return Err(".satfinite is for integers".to_owned());
    }
    let x = operands(d, i, &shape)?;
    Ok(Some(Inst {
        x,
        aux: shape.pack(),
        imm: i64::from(saturate),
        sync: Sync::Aligned,
        ..Inst::new(exec, Class::Mma)
    }))
}

fn parse_shape(word: &str) -> Option<(u32, u32)> {
    let (m, rest) = word.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    let m = m.parse().ok()?;
    (n == "8").then_some(())?;
    Some((m, k.parse().ok()?))
}

/// Slots of D, A, B and C one after the other.
fn operands(d: &mut Decoder<'_>, i: &Instruction, shape: &Shape) -> Result<u32, String> {
    let counts = shape.registers();
    if i.operands.len() != 4 {
        return Err("mma needs four operands".to_owned());
    }
    let mut slots = Vec::new();
    for (which, operand) in i.operands.iter().enumerate() {
        let registers = match operand {
            Operand::Vector(registers) => registers.as_slice(),
            one => std::slice::from_ref(one),
        };
        if registers.len() != counts[which] {
            let name = ["D", "A", "B", "C"][which];
            return Err(format!(
                "{name} of mma.{shape} has {} registers, not {}",
                counts[which],
                registers.len()
            ));
        }
        let ty = match shape.types[which] {
            Num::F64 => Ty::F64,
            Num::F32 => Ty::F32,
            _ => Ty::B32,
        };
        for register in registers {
            slots.push(if which == 0 { d.dst(register, ty)? } else { d.src(register, ty)? });
        }
    }
    Ok(d.extra(&slots))
}

/// The function for a shape.
fn choose(shape: &Shape) -> Result<Exec, String> {
    let [d, a, b, c] = shape.types;
    let blocks = shape.k / a.a_row();
    let whole = shape.k.is_multiple_of(a.a_row()) && shape.k > 0;
    let float_accumulator = c == d && matches!(d, Num::F32 | Num::F16);
    let exec = match (shape.m, blocks) {
        _ if !whole => None,
        (16, 1 | 2) if matches!(a, Num::F16 | Num::Bf16 | Num::Tf32) && a == b && float_accumulator => {
            (d == Num::F32 || a == Num::F16).then(|| float::exec(a, blocks, d))
        }
        (16, 1 | 2) if a.small_float() && b.small_float() && float_accumulator => {
            Some(float::portable as Exec)
        }
        (8 | 16, 1) | (16, 2)
            if a.integer() && b.integer() && a.bits() == b.bits() && [c, d] == [Num::S32; 2] =>
        {
            Some(integer::exec())
        }
        (8 | 16, 1) | (16, 2 | 4) if shape.types == [Num::F64; 4] => Some(float::double()),
        _ => None,
    };
    exec.ok_or_else(|| {
        format!(
            "mma.{shape} is not supported; known are m16n8k8 and m16n8k16 of f16 and bf16, m16n8k4 and m16n8k8 of tf32, \
             m16n8k16 and m16n8k32 of 8-bit numbers, m16n8k32 and m16n8k64 of 4-bit integers, m8n8k16 and m8n8k32 of \
             integers, m8n8k4, m16n8k4, m16n8k8 and m16n8k16 of f64"
        )
    })
}
