//! What most decoders do with operands: destination first, sources in the order of the slots `a`, `b`, `c`, `e`.

use crate::lower::Decoder;
use crate::machine::inst::{Class, Exec, Inst};
use crate::ptx::ast::{Instruction, Operand, Ty};

/// The operands, exactly `N` of them.
pub(super) fn operands<const N: usize>(i: &Instruction) -> Result<&[Operand; N], String> {
    i.operands
        .as_slice()
        .try_into()
        .map_err(|_| format!("{} takes {N} operands here, not {}", i.opcode, i.operands.len()))
}

/// An instruction with one destination and up to four sources of the given types.
pub(super) fn build(
    d: &mut Decoder<'_>,
    i: &Instruction,
    exec: Exec,
    class: Class,
    to: Ty,
    from: &[Ty],
) -> Result<Inst, String> {
    if i.operands.len() != from.len() + 1 {
        return Err(format!("{} takes {} operands here, not {}", i.opcode, from.len() + 1, i.operands.len()));
    }
    let mut inst = Inst { d: d.dst(&i.operands[0], to)?, ..Inst::new(exec, class) };
    for (n, &ty) in from.iter().enumerate() {
        let slot = d.src(&i.operands[n + 1], ty)?;
        match n {
            0 => inst.a = slot,
            1 => inst.b = slot,
            2 => inst.c = slot,
            _ => inst.e = slot,
        }
    }
    Ok(inst)
}

/// A type that this instruction does not have.
pub(super) fn no_type(i: &Instruction, ty: Ty) -> String {
    format!("{} has no form for type {ty:?}", i.opcode)
}

/// Picks a branch by type; inside it `T` is the Rust type.
macro_rules! by_type {
    ($i:expr, $ty:expr, [$($variant:ident $rust:ty),+ $(,)?], $make:expr) => {
        match $ty {
            $($crate::ptx::ast::Ty::$variant => {
                type T = $rust;
                $make
            })+
            other => return Err($crate::ops::operands::no_type($i, other)),
        }
    };
}

/// [`by_type`] over the integers of 16 to 64 bits.
macro_rules! by_int {
    ($i:expr, $ty:expr, $make:expr) => {
        $crate::ops::operands::by_type!(
            $i,
            $ty,
            [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
            $make
        )
    };
}

pub(super) use {by_int, by_type};
