//! The instructions. Each family decodes its own opcodes and holds the functions that run them.

pub(crate) mod access;
pub mod approx;
mod approx_values;
pub mod atomics;
pub mod compare;
pub(crate) mod conflicts;
pub mod control;
pub mod convert;
mod convert_packed;
mod convert_small;
pub mod cp_async;
mod exact;
pub mod float;
mod half_bits;
pub mod half_float;
pub mod integer;
pub mod lanes;
pub mod load_store;
mod loads;
pub mod logic;
pub mod matrix;
pub mod mma;
pub mod moves;
mod operands;
mod printf;
mod stores;
pub mod warp_sync;

use crate::lower::Decoder;
use crate::machine::inst::Inst;
use crate::ptx::ast::Instruction;

/// A family's decoder: `None` when the instruction is not its own.
type Family = fn(&mut Decoder<'_>, &Instruction) -> Result<Option<Inst>, String>;

const FAMILIES: [Family; 15] = [
    control::decode,
    moves::decode,
    integer::decode,
    logic::decode,
    compare::decode,
    float::decode,
    half_float::decode,
    approx::decode,
    convert::decode,
    load_store::decode,
    atomics::decode,
    cp_async::decode,
    matrix::decode,
    mma::decode,
    warp_sync::decode,
];

/// Decodes one instruction. Some families push further instructions before it.
///
/// # Errors
/// Unknown opcode, modifier or operand.
pub fn decode(decoder: &mut Decoder<'_>, instruction: &Instruction) -> Result<Inst, String> {
    for family in FAMILIES {
        if let Some(inst) = family(decoder, instruction)? {
            return Ok(inst);
        }
    }
    let mut name = instruction.opcode.clone();
    for word in &instruction.modifiers {
        name.push('.');
        name.push_str(word);
    }
    Err(format!("unknown instruction {name}"))
}
