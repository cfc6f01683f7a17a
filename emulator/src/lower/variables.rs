//! Module-scope variables: allocation, initialisers, addresses.

use super::{LoadError, Symbol};
use crate::mem::{DEFINED, Kind, Memory, SHARED_WINDOW};
use crate::ptx::ast::{Init, Module, Space, Variable};
use std::collections::HashMap;

/// Largest variable that is taken seriously.
const LIMIT: u64 = 1 << 32;

/// Gives every module-scope variable its place. Shared ones keep their symbol but get offsets per kernel (only the variables a kernel
/// names take room in it), so they are not in the result.
pub(super) fn allocate(
    module: &Module,
    memory: &mut Memory,
    globals: &mut HashMap<String, (u64, u64)>,
) -> Result<HashMap<String, Symbol>, LoadError> {
    let mut symbols = HashMap::new();
    let error = |v: &Variable, message: String| LoadError { line: v.line, message };
    let placed = |v: &&Variable| matches!(v.space, Space::Global | Space::Const);
    for v in module.variables.iter().filter(placed) {
        if v.size > LIMIT {
            return Err(error(v, format!("variable {} has {} bytes", v.name, v.size)));
        }
        if v.external && globals.contains_key(&v.name) {
            continue;
        }
        let kind = if v.space == Space::Const { Kind::Const } else { Kind::Global };
        let address = memory
            .allocate(v.size.max(1), kind, Some(v.name.clone()))
            .map_err(|e| error(v, format!("variable {}: {e}", v.name)))?;
        globals.insert(v.name.clone(), (address, v.size));
        let symbol = if v.space == Space::Const { Symbol::Const(address) } else { Symbol::Global(address) };
        symbols.insert(v.name.clone(), symbol);
    }
    // Initialisers may name variables that come later, hence the second pass.
    for v in module.variables.iter().filter(placed) {
        let Some(&(address, size)) = globals.get(&v.name) else { continue };
        let mut bytes = vec![0; size as usize];
        let width = v.ty.size() as usize;
        if v.init.len() * width > bytes.len() {
            return Err(error(
                v,
                format!("variable {} has {} initialisers for {size} bytes", v.name, v.init.len()),
            ));
        }
        for (i, init) in v.init.iter().enumerate() {
            let bits = match init {
                Init::Bits(bits) => *bits,
                Init::Symbol { name, offset, generic } => {
                    let base = match symbols.get(name) {
                        Some(Symbol::Global(a) | Symbol::Const(a)) => *a,
                        Some(Symbol::Shared(o)) if *generic => SHARED_WINDOW + u64::from(*o),
                        _ => {
                            return Err(error(
                                v,
                                format!("initialiser of {} names {name}, which has no address", v.name),
                            ));
                        }
                    };
                    base.wrapping_add(*offset as u64)
                }
            };
            bytes[i * width..(i + 1) * width].copy_from_slice(&bits.to_le_bytes()[..width]);
        }
        if let Some(index) = memory.find(address, 1) {
            // CUDA zeroes what has no initialiser.
            let a = memory.get_mut(index);
            let n = bytes.len();
            a.bytes_mut()[..n].copy_from_slice(&bytes);
            a.shadow.fill(DEFINED);
            a.maybe_undefined = false;
        }
    }
    Ok(symbols)
}
