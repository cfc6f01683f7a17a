//! Syntax tree to decoded instructions: names become slots and addresses, labels become instruction indices, device functions are
//! inlined.

mod decoder;
mod function;
mod mods;
mod registers;
mod variables;

pub use decoder::{Address, AnySlot, Decoder, Symbol};
pub use mods::Mods;

use crate::machine::inst::Kernel;
use crate::mem::Memory;
use crate::ptx::ast;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Why a module could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError {
    /// Line in the PTX text; 0 = none.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "ptx line {}: {}", self.line, self.message)
        } else {
            f.write_str(&self.message)
        }
    }
}

impl std::error::Error for LoadError {}

/// A module ready to launch.
#[derive(Debug, Default)]
pub struct Module {
    /// Kernels by symbol.
    pub kernels: HashMap<String, Arc<Kernel>>,
    /// Address and size of `.global` and `.const` variables by symbol.
    pub globals: HashMap<String, (u64, u64)>,
}

/// Lowers a parsed module: allocates and fills its variables, decodes every kernel.
///
/// # Errors
/// An instruction, modifier or operand that is not understood; a symbol that does not exist; out of memory.
pub fn lower(module: &ast::Module, memory: &mut Memory) -> Result<Module, LoadError> {
    let mut globals = HashMap::new();
    let built = build(module, memory, &mut globals);
    if built.is_err() {
        for (address, _) in globals.values() {
            // A module that failed to load leaves nothing behind; its addresses were allocated just now.
            memory.free(*address).ok();
        }
    }
    built.map(|kernels| Module { kernels, globals })
}

fn build(
    module: &ast::Module,
    memory: &mut Memory,
    globals: &mut HashMap<String, (u64, u64)>,
) -> Result<HashMap<String, Arc<Kernel>>, LoadError> {
    let symbols = variables::allocate(module, memory, globals)?;
    let mut functions: HashMap<&str, &ast::Function> =
        module.functions.iter().filter(|f| f.body.is_some()).map(|f| (f.name.as_str(), f)).collect();
    for (alias, _) in &module.aliases {
        if let Some(f) = module.function(alias).filter(|f| f.body.is_some()) {
            functions.insert(alias, f);
        }
    }
    let mut kernels = HashMap::new();
    for f in module.functions.iter().filter(|f| f.kernel && f.body.is_some()) {
        kernels.insert(f.name.clone(), Arc::new(function::kernel(module, f, &symbols, &functions)?));
    }
    Ok(kernels)
}
