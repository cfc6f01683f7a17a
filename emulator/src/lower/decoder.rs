//! Resolves operands of one kernel to slots, constants and addresses.

use crate::machine::inst::{Class, Exec, Inst, Kernel, Meta, NO_GUARD, Special, Sync};
use crate::mem::{LOCAL_WINDOW, PARAM_WINDOW};
use crate::ptx::ast::{Instruction, Operand, Space, Ty};
use std::collections::HashMap;

/// A register as its file and slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnySlot {
    /// 16- or 32-bit register.
    R32(u32),
    /// 64-bit register.
    R64(u32),
    /// Predicate.
    Pred(u32),
}

/// What a name that is not a register stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symbol {
    /// Device address of a `.global` variable.
    Global(u64),
    /// Device address of a `.const` variable.
    Const(u64),
    /// Offset in the block's shared memory.
    Shared(u32),
    /// The dynamic shared memory; its offset is known when the kernel's static variables are.
    SharedDynamic,
    /// Offset in the thread's local frame (`.local` variables and the `.param` variables of calls).
    Local(u32),
    /// Offset in the kernel's parameters.
    Param(u32),
    /// A register parameter of an inlined function stands for this register.
    Register(AnySlot),
}

/// An address operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Slot of the base.
    pub slot: u32,
    /// The base is a 64-bit slot.
    pub wide: bool,
    /// Added to the base.
    pub offset: i64,
    /// The state space of the variable when the base is one (`ld.param` of a call's `.param` variable is local).
    pub space: Option<Space>,
}

/// Builds one kernel.
#[derive(Debug)]
pub struct Decoder<'a> {
    /// What has been built so far.
    pub kernel: Kernel,
    symbols: &'a HashMap<String, Symbol>,
    scopes: Vec<Scope>,
    next_scope: u32,
    const32: HashMap<u32, u32>,
    const64: HashMap<u64, u32>,
    const_pred: HashMap<bool, u32>,
    special: HashMap<(Special, bool), u32>,
    labels: HashMap<(u32, String), u32>,
    fixups: Vec<Fixup>,
    /// Jump tables of `brx.idx`, resolved when all labels are known: index in `Kernel::extra`, labels.
    tables: Vec<(u32, Vec<String>, Vec<u32>, u32)>,
    sinks: [Option<u32>; 3],
    /// First and last mention of each declared register, for the estimate of registers.
    mentions: HashMap<(bool, u32), (u32, u32)>,
}

#[derive(Debug, Default)]
struct Scope {
    id: u32,
    registers: HashMap<String, AnySlot>,
    /// `%r<10>`: type and count by prefix.
    families: HashMap<String, (Ty, u32)>,
    symbols: HashMap<String, Symbol>,
    branch_targets: HashMap<String, Vec<String>>,
}

#[derive(Debug)]
struct Fixup {
    pc: u32,
    label: String,
    scopes: Vec<u32>,
    line: u32,
}

/// # Errors
/// Every method that takes an operand fails when the operand is not of the kind it asks for, or names nothing; the text says
/// which.
#[expect(clippy::missing_errors_doc, reason = "stated above, once for all methods")]
impl<'a> Decoder<'a> {
    /// An empty kernel over the module's symbols.
    pub fn new(kernel: Kernel, symbols: &'a HashMap<String, Symbol>) -> Self {
        Self {
            kernel,
            symbols,
            scopes: vec![Scope::default()],
            next_scope: 1,
            const32: HashMap::new(),
            const64: HashMap::new(),
            const_pred: HashMap::new(),
            special: HashMap::new(),
            labels: HashMap::new(),
            fixups: Vec::new(),
            tables: Vec::new(),
            sinks: [None; 3],
            mentions: HashMap::new(),
        }
    }

    // ---- scopes and declarations

    /// Opens a `{`.
    pub fn enter(&mut self) {
        self.scopes.push(Scope { id: self.next_scope, ..Scope::default() });
        self.next_scope += 1;
    }

    /// Closes a `}`.
    pub fn leave(&mut self) {
        self.scopes.pop();
    }

    /// Takes all scopes but the outermost (shared variables) away: an inlined function must not see its caller's names. Give them back with
    /// [`Decoder::unhide`].
    pub(super) fn hide(&mut self) -> HiddenScopes {
        let hidden = self.scopes.split_off(1);
        self.enter();
        HiddenScopes(hidden)
    }

    pub(super) fn unhide(&mut self, hidden: HiddenScopes) {
        self.scopes.truncate(1);
        self.scopes.extend(hidden.0);
    }

    fn scope(&mut self) -> &mut Scope {
        if self.scopes.is_empty() {
            self.enter();
        }
        let last = self.scopes.len() - 1;
        &mut self.scopes[last]
    }

    /// A fresh register of a type.
    pub fn fresh(&mut self, ty: Ty) -> AnySlot {
        let file = match ty {
            Ty::Pred => 2,
            _ if ty.size() == 8 => 1,
            _ => 0,
        };
        let slot = self.kernel.slots[file];
        self.kernel.slots[file] += 1;
        match file {
            0 => AnySlot::R32(slot),
            1 => AnySlot::R64(slot),
            _ => AnySlot::Pred(slot),
        }
    }

    /// Declares a register, or a family `%r<count>` whose members get a slot when they are first named.
    pub fn declare_register(&mut self, ty: Ty, name: &str, count: Option<u32>) -> Result<(), String> {
        if ty.size() > 8 {
            return Err(format!("registers of type {ty:?} are not supported"));
        }
        if let Some(count) = count {
            self.scope().families.insert(name.to_owned(), (ty, count));
        } else {
            let slot = self.fresh(ty);
            self.scope().registers.insert(name.to_owned(), slot);
        }
        Ok(())
    }

    /// Makes a name stand for a symbol in the innermost scope.
    pub fn declare_symbol(&mut self, name: &str, symbol: Symbol) {
        self.scope().symbols.insert(name.to_owned(), symbol);
    }

    /// `.branchtargets`.
    pub fn declare_targets(&mut self, name: &str, labels: &[String]) {
        self.scope().branch_targets.insert(name.to_owned(), labels.to_vec());
    }

    /// The register of this name, innermost scope first.
    pub fn register(&mut self, name: &str) -> Option<AnySlot> {
        let slot = self.look_up(name)?;
        let here = self.here();
        let key = match slot {
            AnySlot::R32(slot) => (false, slot),
            AnySlot::R64(slot) => (true, slot),
            AnySlot::Pred(_) => return Some(slot),
        };
        self.mentions.entry(key).or_insert((here, here)).1 = here;
        Some(slot)
    }

    fn look_up(&mut self, name: &str) -> Option<AnySlot> {
        for i in (0..self.scopes.len()).rev() {
            if let Some(&slot) = self.scopes[i].registers.get(name) {
                return Some(slot);
            }
            let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
            let member = (0..=digits.min(9)).rev().filter(|d| *d > 0).find_map(|d| {
                let (prefix, number) = name.split_at(name.len() - d);
                let number: u32 = if number.len() > 1 && number.starts_with('0') {
                    return None;
                } else {
                    number.parse().ok()?
                };
                let &(ty, count) = self.scopes[i].families.get(prefix)?;
                (number < count).then_some(ty)
            });
            if let Some(ty) = member {
                let slot = self.fresh(ty);
                self.scopes[i].registers.insert(name.to_owned(), slot);
                return Some(slot);
            }
            if let Some(Symbol::Register(slot)) = self.scopes[i].symbols.get(name) {
                return Some(*slot);
            }
        }
        None
    }

    /// The symbol of this name, innermost scope first, then the module's.
    pub fn symbol(&self, name: &str) -> Option<Symbol> {
        self.scopes.iter().rev().find_map(|s| s.symbols.get(name)).or_else(|| self.symbols.get(name)).copied()
    }

    // ---- constants

    /// A 32-bit slot that always holds `value`.
    pub fn constant32(&mut self, value: u32) -> u32 {
        if let Some(&slot) = self.const32.get(&value) {
            return slot;
        }
        let slot = self.kernel.slots[0];
        self.kernel.slots[0] += 1;
        self.kernel.const32.push((slot, value));
        self.const32.insert(value, slot);
        slot
    }

    /// A 64-bit slot that always holds `value`.
    pub fn constant64(&mut self, value: u64) -> u32 {
        if let Some(&slot) = self.const64.get(&value) {
            return slot;
        }
        let slot = self.kernel.slots[1];
        self.kernel.slots[1] += 1;
        self.kernel.const64.push((slot, value));
        self.const64.insert(value, slot);
        slot
    }

    /// A predicate slot that always holds `value`.
    pub fn constant_pred(&mut self, value: bool) -> u32 {
        if let Some(&slot) = self.const_pred.get(&value) {
            return slot;
        }
        let slot = self.kernel.slots[2];
        self.kernel.slots[2] += 1;
        self.kernel.const_pred.push((slot, value));
        self.const_pred.insert(value, slot);
        slot
    }

    fn special_slot(&mut self, special: Special, wide: bool) -> u32 {
        if let Some(&slot) = self.special.get(&(special, wide)) {
            return slot;
        }
        let file = usize::from(wide);
        let slot = self.kernel.slots[file];
        self.kernel.slots[file] += 1;
        if wide {
            self.kernel.special64.push((slot, special));
        } else {
            self.kernel.special32.push((slot, special));
        }
        self.special.insert((special, wide), slot);
        slot
    }

    // ---- operands

    /// A source read as 32 bits (16-bit types too: the low half counts). `ty` says how a literal is meant.
    pub fn src32(&mut self, operand: &Operand, ty: Ty) -> Result<u32, String> {
        match operand {
            Operand::Name(name) => {
                if let Some(slot) = self.register(name) {
                    return match slot {
                        AnySlot::R32(slot) => Ok(slot),
                        _ => Err(format!("{name} is not a 32-bit register")),
                    };
                }
                if let Some(special) = special(name) {
                    return Ok(self.special_slot(special, false));
                }
                if name == "WARP_SZ" {
                    return Ok(self.constant32(32));
                }
                let address = self.symbol_value(name)?;
                Ok(self.constant32(address as u32))
            }
            Operand::Sum { name, offset } => {
                let address = self.symbol_value(name)?.wrapping_add(*offset as u64);
                Ok(self.constant32(address as u32))
            }
            Operand::Int { .. } | Operand::F32(_) | Operand::F64(_) => {
                let bits = literal(operand, ty)?;
                Ok(self.constant32(bits as u32))
            }
            other => Err(format!("operand {other:?} cannot be a 32-bit source")),
        }
    }

    /// A source read as 64 bits.
    pub fn src64(&mut self, operand: &Operand, ty: Ty) -> Result<u32, String> {
        match operand {
            Operand::Name(name) => {
                if let Some(slot) = self.register(name) {
                    return match slot {
                        AnySlot::R64(slot) => Ok(slot),
                        _ => Err(format!("{name} is not a 64-bit register")),
                    };
                }
                if let Some(special) = special(name) {
                    return Ok(self.special_slot(special, true));
                }
                let address = self.symbol_value(name)?;
                Ok(self.constant64(address))
            }
            Operand::Sum { name, offset } => {
                let address = self.symbol_value(name)?.wrapping_add(*offset as u64);
                Ok(self.constant64(address))
            }
            Operand::Int { .. } | Operand::F32(_) | Operand::F64(_) => {
                let bits = literal(operand, ty)?;
                Ok(self.constant64(bits))
            }
            other => Err(format!("operand {other:?} cannot be a 64-bit source")),
        }
    }

    /// A source in the file of its type: 64-bit slot for 8-byte types, else 32-bit.
    pub fn src(&mut self, operand: &Operand, ty: Ty) -> Result<u32, String> {
        if ty.size() == 8 { self.src64(operand, ty) } else { self.src32(operand, ty) }
    }

    /// A source predicate: slot, and whether it is negated.
    pub fn src_pred(&mut self, operand: &Operand) -> Result<(u32, bool), String> {
        let (name, not) = match operand {
            Operand::Name(name) => (name, false),
            Operand::Not(name) => (name, true),
            Operand::Int { bits, .. } => return Ok((self.constant_pred(*bits != 0), false)),
            other => return Err(format!("operand {other:?} cannot be a predicate")),
        };
        match self.register(name) {
            Some(AnySlot::Pred(slot)) => Ok((slot, not)),
            _ => Err(format!("{name} is not a predicate register")),
        }
    }

    /// A register of any file, as a source or destination whose width the instruction does not fix.
    pub fn any_register(&mut self, operand: &Operand) -> Result<AnySlot, String> {
        match operand {
            Operand::Name(name) => self.register(name).ok_or_else(|| format!("no register {name}")),
            other => Err(format!("operand {other:?} is not a register")),
        }
    }

    /// A destination of 32 (or 16) bits; `_` gives a slot nobody reads.
    pub fn dst32(&mut self, operand: &Operand) -> Result<u32, String> {
        match self.destination(operand, 0)? {
            AnySlot::R32(slot) => Ok(slot),
            _ => Err(format!("{operand:?} is not a 32-bit register")),
        }
    }

    /// A destination of 64 bits; `_` gives a slot nobody reads.
    pub fn dst64(&mut self, operand: &Operand) -> Result<u32, String> {
        match self.destination(operand, 1)? {
            AnySlot::R64(slot) => Ok(slot),
            _ => Err(format!("{operand:?} is not a 64-bit register")),
        }
    }

    /// A destination in the file of its type.
    pub fn dst(&mut self, operand: &Operand, ty: Ty) -> Result<u32, String> {
        if ty.size() == 8 { self.dst64(operand) } else { self.dst32(operand) }
    }

    /// A destination predicate; `_` gives a slot nobody reads.
    pub fn dst_pred(&mut self, operand: &Operand) -> Result<u32, String> {
        match self.destination(operand, 2)? {
            AnySlot::Pred(slot) => Ok(slot),
            _ => Err(format!("{operand:?} is not a predicate register")),
        }
    }

    fn destination(&mut self, operand: &Operand, file: usize) -> Result<AnySlot, String> {
        match operand {
            Operand::Sink => {
                let slot = if let Some(slot) = self.sinks[file] {
                    slot
                } else {
                    let slot = self.kernel.slots[file];
                    self.kernel.slots[file] += 1;
                    self.sinks[file] = Some(slot);
                    slot
                };
                Ok([AnySlot::R32(slot), AnySlot::R64(slot), AnySlot::Pred(slot)][file])
            }
            Operand::Name(name) => self.register(name).ok_or_else(|| format!("no register {name}")),
            other => Err(format!("operand {other:?} cannot be a destination")),
        }
    }

    /// The value of a symbol used as a number: a device address, an offset in shared memory, or an address in the generic windows
    /// of local memory and of the parameters.
    pub fn symbol_value(&mut self, name: &str) -> Result<u64, String> {
        match self.symbol(name) {
            Some(Symbol::Global(address) | Symbol::Const(address)) => Ok(address),
            Some(Symbol::Shared(offset)) => Ok(u64::from(offset)),
            Some(Symbol::SharedDynamic) => Ok(u64::from(self.kernel.shared_dynamic)),
            Some(Symbol::Local(offset)) => Ok(LOCAL_WINDOW + u64::from(offset)),
            Some(Symbol::Param(offset)) => Ok(PARAM_WINDOW + u64::from(offset)),
            Some(Symbol::Register(_)) | None => {
                Err(format!("no register, variable or special register {name}"))
            }
        }
    }

    /// An address operand `[...]`.
    pub fn address(&mut self, operand: &Operand) -> Result<Address, String> {
        let Operand::Address { base, offset } = operand else {
            return Err(format!("operand {operand:?} is not an address"));
        };
        let Some(name) = base else {
            return Ok(Address { slot: self.constant64(0), wide: true, offset: *offset, space: None });
        };
        match self.register(name) {
            Some(AnySlot::R32(slot)) => {
                return Ok(Address { slot, wide: false, offset: *offset, space: None });
            }
            Some(AnySlot::R64(slot)) => {
                return Ok(Address { slot, wide: true, offset: *offset, space: None });
            }
            Some(AnySlot::Pred(_)) => return Err(format!("{name} is a predicate, not an address")),
            None => {}
        }
        let value = self.symbol_value(name)?;
        let space = match self.symbol(name) {
            Some(Symbol::Global(_)) => Space::Global,
            Some(Symbol::Const(_)) => Space::Const,
            Some(Symbol::Shared(_) | Symbol::SharedDynamic) => Space::Shared,
            Some(Symbol::Local(_)) => Space::Local,
            _ => Space::Param,
        };
        Ok(Address { slot: self.constant64(value), wide: true, offset: *offset, space: Some(space) })
    }

    /// Keeps slots of an instruction with many operands; the index of the first.
    pub fn extra(&mut self, slots: &[u32]) -> u32 {
        let first = self.kernel.extra.len() as u32;
        self.kernel.extra.extend_from_slice(slots);
        first
    }

    // ---- instructions and labels

    /// Index the next instruction will get.
    pub fn here(&self) -> u32 {
        self.kernel.insts.len() as u32
    }

    /// Appends a decoded instruction, with the guard, line and text of where it came from.
    pub fn push(&mut self, mut inst: Inst, from: &Instruction) -> Result<(), String> {
        if let Some((name, not)) = &from.guard {
            let (slot, _) = self.src_pred(&Operand::Name(name.clone()))?;
            inst.guard = slot;
            inst.guard_not = *not;
        }
        inst.pc = self.here();
        if inst.pc > 4_000_000 {
            return Err("more than 4 million instructions after inlining".to_owned());
        }
        self.kernel.insts.push(inst);
        self.kernel.meta.push(Meta { line: from.line, loc: from.loc, text: from.text.clone() });
        Ok(())
    }

    /// Puts a label before the next instruction.
    pub fn label(&mut self, name: &str) -> Result<(), String> {
        let here = self.here();
        let scope = self.scope().id;
        match self.labels.insert((scope, name.to_owned()), here) {
            None => Ok(()),
            Some(_) => Err(format!("label {name} is defined twice")),
        }
    }

    /// The instruction that will be pushed next jumps to `label`: its `imm` becomes the target index once all labels are known.
    pub fn jumps_to(&mut self, label: &str, line: u32) {
        let scopes = self.scopes.iter().map(|s| s.id).collect();
        let pc = self.here();
        self.fixups.push(Fixup { pc, label: label.to_owned(), scopes, line });
    }

    /// The table of `brx.idx`: returns the index of its first entry in `Kernel::extra` (filled when all labels are known) and its
    /// length.
    pub fn jump_table(&mut self, name: &str, line: u32) -> Result<(u32, u32), String> {
        let labels = self.scopes.iter().rev().find_map(|s| s.branch_targets.get(name)).cloned();
        let labels = labels.ok_or_else(|| format!("no .branchtargets {name}"))?;
        let scopes: Vec<u32> = self.scopes.iter().map(|s| s.id).collect();
        let first = self.extra(&vec![u32::MAX; labels.len()]);
        let count = labels.len() as u32;
        self.tables.push((first, labels, scopes, line));
        Ok((first, count))
    }

    /// Resolves all jumps.
    pub(super) fn finish(mut self) -> Result<Kernel, (u32, String)> {
        let labels = std::mem::take(&mut self.labels);
        let find = |label: &str, scopes: &[u32]| {
            scopes.iter().rev().find_map(|scope| labels.get(&(*scope, label.to_owned())).copied())
        };
        let mut loops = Vec::new();
        for fixup in std::mem::take(&mut self.fixups) {
            let target =
                find(&fixup.label, &fixup.scopes).ok_or((fixup.line, format!("no label {}", fixup.label)))?;
            self.kernel.insts[fixup.pc as usize].imm = i64::from(target);
            if target < fixup.pc {
                loops.push((target, fixup.pc));
            }
        }
        for (first, names, scopes, line) in std::mem::take(&mut self.tables) {
            for (i, name) in names.iter().enumerate() {
                let target = find(name, &scopes).ok_or((line, format!("no label {name}")))?;
                self.kernel.extra[first as usize + i] = target;
            }
        }
        let ranges =
            self.mentions.into_iter().map(|((wide, _), (first, last))| (first, last, 1 + u32::from(wide)));
        self.kernel.registers = super::registers::estimate(self.kernel.insts.len(), loops, ranges.collect());
        Ok(self.kernel)
    }
}

/// Scopes taken away while a function is inlined.
#[derive(Debug)]
pub(super) struct HiddenScopes(Vec<Scope>);

impl Inst {
    /// An instruction with no operands set.
    pub fn new(exec: Exec, class: Class) -> Self {
        Self {
            exec,
            test: None,
            d: 0,
            a: 0,
            b: 0,
            c: 0,
            e: 0,
            x: 0,
            imm: 0,
            aux: 0,
            guard: NO_GUARD,
            guard_not: false,
            sync: Sync::None,
            class,
            strict: false,
            pc: 0,
        }
    }
}

/// The bits of a literal in the width and meaning of `ty`.
fn literal(operand: &Operand, ty: Ty) -> Result<u64, String> {
    let float = |bits64: f64| match ty {
        Ty::F32 | Ty::TF32 => u64::from((bits64 as f32).to_bits()),
        Ty::F16 => u64::from(half::f16::from_f64(bits64).to_bits()),
        Ty::BF16 => u64::from(half::bf16::from_f64(bits64).to_bits()),
        _ => bits64.to_bits(),
    };
    match *operand {
        // A hexadecimal or decimal integer stands for its bits, also where a float is expected.
        Operand::Int { bits, .. } => Ok(bits),
        Operand::F32(bits) => Ok(match ty {
            Ty::F64 => f64::from(f32::from_bits(bits)).to_bits(),
            Ty::F16 | Ty::BF16 => float(f64::from(f32::from_bits(bits))),
            _ => u64::from(bits),
        }),
        Operand::F64(bits) => Ok(match ty {
            Ty::F32 | Ty::TF32 | Ty::F16 | Ty::BF16 => float(f64::from_bits(bits)),
            _ => bits,
        }),
        _ => Err("not a literal".to_owned()),
    }
}

/// A special register that is constant for a thread, by name.
fn special(name: &str) -> Option<Special> {
    let axis = |suffix: &str| match suffix {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    if let Some((base, suffix)) = name.split_once('.') {
        let axis = axis(suffix)?;
        return Some(match base {
            "%tid" => Special::Tid(axis),
            "%ntid" => Special::Ntid(axis),
            "%ctaid" => Special::Ctaid(axis),
            "%nctaid" => Special::Nctaid(axis),
            _ => return None,
        });
    }
    Some(match name {
        "%laneid" => Special::LaneId,
        "%warpid" => Special::WarpId,
        "%nwarpid" => Special::NWarpId,
        "%lanemask_eq" => Special::LaneMaskEq,
        "%lanemask_lt" => Special::LaneMaskLt,
        "%lanemask_le" => Special::LaneMaskLe,
        "%lanemask_gt" => Special::LaneMaskGt,
        "%lanemask_ge" => Special::LaneMaskGe,
        "%smid" => Special::SmId,
        "%nsmid" => Special::NSmId,
        "%gridid" => Special::GridIdLow,
        "%dynamic_smem_size" => Special::DynamicSmemSize,
        "%total_smem_size" | "%aggr_smem_size" => Special::TotalSmemSize,
        _ => return None,
    })
}
