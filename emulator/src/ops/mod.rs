//! The instructions. Each family decodes its own opcodes and holds the functions that run them.

pub mod control;
pub mod lanes;
mod printf;

use crate::lower::Decoder;
use crate::machine::inst::Inst;
use crate::ptx::ast::Instruction;

/// A family's decoder: `None` when the instruction is not its own.
type Family = fn(&mut Decoder<'_>, &Instruction) -> Result<Option<Inst>, String>;

const FAMILIES: [Family; 1] = [control::decode];

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
