//! Loads and stores.

use crate::lower::Decoder;
use crate::machine::inst::Inst;
use crate::ptx::ast::Instruction;

/// Decodes this family's instructions.
///
/// # Errors
/// Unknown modifier or wrong operands.
pub fn decode(_: &mut Decoder<'_>, _: &Instruction) -> Result<Option<Inst>, String> {
    Ok(None)
}
