//! Bodies: a kernel with every device function it calls inlined.

use super::LoadError;
use super::decoder::{AnySlot, Decoder, Symbol};
use crate::machine::inst::{Class, Inst, Kernel, Param, SharedSymbol};
use crate::ops::{self, control};
use crate::ptx::ast::{self, Function, Instruction, Operand, Space, Statement, Ty, Variable};
use std::collections::HashMap;

/// Largest local frame of a thread.
const FRAME_LIMIT: u64 = 512 << 10;
/// Statements of one kernel after inlining, and how deep blocks and calls may nest: files that double at every level must neither
/// hang the loader nor exhaust its stack.
const STATEMENT_LIMIT: u32 = 8_000_000;
const DEPTH_LIMIT: u32 = 128;
/// Largest parameter space.
const PARAM_LIMIT: u64 = 32_764;

pub(super) fn kernel(
    module: &ast::Module,
    f: &Function,
    symbols: &HashMap<String, Symbol>,
    functions: &HashMap<&str, &Function>,
) -> Result<Kernel, LoadError> {
    let error = |line, message| LoadError { line, message };
    let sm =
        module.target.trim_start_matches("sm_").trim_end_matches(char::is_alphabetic).parse().unwrap_or(0);
    let mut kernel = Kernel {
        name: f.name.clone(),
        maxntid: f.maxntid,
        reqntid: f.reqntid,
        ptx_version: module.version.0 * 10 + module.version.1,
        sm,
        files: module.files.clone(),
        const_bytes: module.variables.iter().filter(|v| v.space == Space::Const).map(|v| v.size).sum(),
        ..Kernel::default()
    };
    let mut shared = SharedLayout::default();
    shared.place(module, f, functions, &mut kernel).map_err(|(line, m)| error(line, m))?;
    let mut decoder = Decoder::new(kernel, symbols);
    for (name, symbol) in shared.symbols {
        decoder.declare_symbol(&name, symbol);
    }
    decoder.enter();
    let mut offset = 0u64;
    for p in &f.params {
        let size = p.size.max(1);
        offset = offset.next_multiple_of(p.align.clamp(1, 128));
        decoder.declare_symbol(&p.name, Symbol::Param(offset as u32));
        decoder.kernel.params.push(Param { name: p.name.clone(), offset, size });
        offset = offset.saturating_add(size);
        if offset > PARAM_LIMIT {
            return Err(error(
                p.line,
                format!("kernel {} has more than {PARAM_LIMIT} bytes of parameters", f.name),
            ));
        }
    }
    decoder.kernel.param_bytes = offset;
    let mut lowering = Lowering {
        decoder,
        functions,
        stack: vec![f.name.clone()],
        seen: 0,
        depth: 0,
        frame: 0,
        returns: None,
    };
    lowering.statements(f.body.as_deref().unwrap_or_default(), f.line).map_err(|(line, m)| error(line, m))?;
    let end = instruction("exit", &[], f.line);
    let exit = Inst::new(control::exit, Class::Control);
    lowering.decoder.push(exit, &end).map_err(|m| error(f.line, m))?;
    lowering.decoder.kernel.local_bytes = lowering.frame.next_multiple_of(16) as u32;
    lowering.decoder.finish().map_err(|(line, m)| error(line, m))
}

/// Offsets of the shared variables a kernel can reach: its own, the module's that it or a function names.
#[derive(Default)]
struct SharedLayout {
    symbols: Vec<(String, Symbol)>,
    size: u64,
    dynamic_align: u64,
}

impl SharedLayout {
    fn place(
        &mut self,
        module: &ast::Module,
        f: &Function,
        functions: &HashMap<&str, &Function>,
        kernel: &mut Kernel,
    ) -> Result<(), (u32, String)> {
        let mut named = std::collections::HashSet::new();
        let mut queue = vec![f];
        let mut visited = std::collections::HashSet::new();
        let mut bodies = Vec::new();
        while let Some(f) = queue.pop() {
            if !visited.insert(&f.name) {
                continue;
            }
            bodies.push(f);
            let mut names = Vec::new();
            collect_names(f.body.as_deref().unwrap_or_default(), &mut names);
            for name in names {
                if let Some(callee) = functions.get(name) {
                    queue.push(callee);
                }
                named.insert(name);
            }
        }
        self.dynamic_align = 16;
        let mut dynamic = Vec::new();
        for v in
            module.variables.iter().filter(|v| v.space == Space::Shared && named.contains(v.name.as_str()))
        {
            if v.size == 0 || v.external {
                self.dynamic_align = self.dynamic_align.max(v.align.clamp(1, 1024));
                dynamic.push(v.name.clone());
            } else {
                self.variable(v, kernel)?;
            }
        }
        // Static shared variables of device functions have one copy a block, whoever calls them.
        for function in bodies {
            let mut own = Vec::new();
            collect_shared(function.body.as_deref().unwrap_or_default(), &mut own);
            for v in own {
                self.variable(v, kernel)?;
            }
        }
        kernel.shared_static = self.size as u32;
        kernel.shared_dynamic = self.size.next_multiple_of(self.dynamic_align) as u32;
        for name in dynamic {
            kernel.shared_symbols.push(SharedSymbol {
                name: name.clone(),
                offset: kernel.shared_dynamic,
                size: 0,
            });
            self.symbols.push((name, Symbol::SharedDynamic));
        }
        Ok(())
    }

    fn variable(&mut self, v: &Variable, kernel: &mut Kernel) -> Result<(), (u32, String)> {
        let offset = self.size.next_multiple_of(v.align.clamp(1, 1024));
        self.size = offset.saturating_add(v.size);
        if self.size > 1 << 20 {
            return Err((v.line, format!("shared variable {} does not fit", v.name)));
        }
        self.symbols.push((v.name.clone(), Symbol::Shared(offset as u32)));
        kernel.shared_symbols.push(SharedSymbol {
            name: v.name.clone(),
            offset: offset as u32,
            size: v.size as u32,
        });
        Ok(())
    }
}

fn collect_names<'a>(body: &'a [Statement], out: &mut Vec<&'a str>) {
    fn operand<'a>(o: &'a Operand, out: &mut Vec<&'a str>) {
        match o {
            Operand::Name(name) | Operand::Sum { name, .. } | Operand::Address { base: Some(name), .. } => {
                out.push(name);
            }
            Operand::Vector(list) | Operand::List(list) => list.iter().for_each(|o| operand(o, out)),
            Operand::Pair(a, b) => [a, b].into_iter().for_each(|o| operand(o, out)),
            _ => {}
        }
    }
    for statement in body {
        match statement {
            Statement::Instruction(i) => i.operands.iter().for_each(|o| operand(o, out)),
            Statement::Block(inner) => collect_names(inner, out),
            _ => {}
        }
    }
}

fn collect_shared<'a>(body: &'a [Statement], out: &mut Vec<&'a Variable>) {
    for statement in body {
        match statement {
            Statement::Variable(v) if v.space == Space::Shared => out.push(v),
            Statement::Block(inner) => collect_shared(inner, out),
            _ => {}
        }
    }
}

struct Lowering<'a> {
    decoder: Decoder<'a>,
    functions: &'a HashMap<&'a str, &'a Function>,
    /// Names of the functions being inlined.
    stack: Vec<String>,
    /// Statements seen so far, and blocks and calls open now.
    seen: u32,
    depth: u32,
    /// Bytes of the local frame used so far.
    frame: u64,
    /// Label behind the inlined body, where its `ret` goes; none in the kernel itself.
    returns: Option<String>,
}

type Located<T> = Result<T, (u32, String)>;

impl Lowering<'_> {
    fn statements(&mut self, body: &[Statement], line: u32) -> Located<()> {
        if self.depth == DEPTH_LIMIT {
            return Err((line, format!("blocks and calls nest more than {DEPTH_LIMIT} deep")));
        }
        self.depth += 1;
        let done = body.iter().try_for_each(|statement| self.statement(statement, line));
        self.depth -= 1;
        done
    }

    fn statement(&mut self, statement: &Statement, line: u32) -> Located<()> {
        self.seen += 1;
        if self.seen > STATEMENT_LIMIT {
            return Err((line, format!("more than {STATEMENT_LIMIT} statements after inlining")));
        }
        match statement {
            Statement::Label { name, line } => self.decoder.label(name).map_err(|m| (*line, m)),
            Statement::Instruction(i) => self.instruction(i),
            Statement::Register { ty, name, count, line } => {
                self.decoder.declare_register(*ty, name, *count).map_err(|m| (*line, m))
            }
            Statement::Variable(v) => self.variable(v),
            Statement::Block(inner) => {
                self.decoder.enter();
                let done = self.statements(inner, line);
                self.decoder.leave();
                done
            }
            Statement::BranchTargets { name, labels, .. } => {
                self.decoder.declare_targets(name, labels);
                Ok(())
            }
            Statement::CallPrototype { .. } => Ok(()),
        }
    }

    fn variable(&mut self, v: &Variable) -> Located<()> {
        match v.space {
            // Placed before the first instruction.
            Space::Shared => Ok(()),
            Space::Local | Space::Param | Space::Generic => {
                let offset = self.local(v)?;
                self.decoder.declare_symbol(&v.name, Symbol::Local(offset));
                Ok(())
            }
            Space::Global | Space::Const => {
                Err((v.line, format!("variable {} must be declared outside of functions", v.name)))
            }
        }
    }

    fn local(&mut self, v: &Variable) -> Located<u32> {
        let offset = self.frame.next_multiple_of(v.align.clamp(1, 128));
        self.frame = offset.saturating_add(v.size.max(1));
        if self.frame > FRAME_LIMIT {
            return Err((
                v.line,
                format!("more than {FRAME_LIMIT} bytes of local memory a thread at {}", v.name),
            ));
        }
        Ok(offset as u32)
    }

    fn instruction(&mut self, i: &Instruction) -> Located<()> {
        let at = |m| (i.line, m);
        if i.opcode == "call" {
            // Opening and closing a function costs about as much as a few instructions.
            self.seen += 16;
            return self.call(i);
        }
        if i.opcode == "ret"
            && let Some(label) = self.returns.clone()
        {
            self.decoder.jumps_to(&label, i.line);
            let inst = Inst::new(control::bra, Class::Control);
            return self.decoder.push(inst, i).map_err(at);
        }
        let inst = ops::decode(&mut self.decoder, i).map_err(at)?;
        self.decoder.push(inst, i).map_err(at)
    }

    /// `call (ret), f, (args), prototype;` with the parts in parentheses optional.
    fn call(&mut self, i: &Instruction) -> Located<()> {
        let at = |m: String| (i.line, m);
        let empty: &[Operand] = &[];
        let (returns, rest) = match i.operands.split_first() {
            Some((Operand::List(list), rest)) => (list.as_slice(), rest),
            _ => (empty, i.operands.as_slice()),
        };
        let (name, rest) = match rest.split_first() {
            Some((Operand::Name(name), rest)) => (name.clone(), rest),
            _ => return Err(at("a call needs the name of a function".to_owned())),
        };
        let args = match rest.first() {
            Some(Operand::List(list)) => list.as_slice(),
            _ => empty,
        };
        let Some(&callee) = self.functions.get(name.as_str()) else {
            if self.decoder.register(&name).is_some() {
                return Err(at("calls through a register are not supported".to_owned()));
            }
            let inst = control::system_call(&mut self.decoder, &name, returns, args).map_err(at)?;
            return self.decoder.push(inst, i).map_err(at);
        };
        if callee.kernel {
            return Err(at(format!("{name} is a kernel and cannot be called")));
        }
        if self.stack.contains(&name) {
            return Err(at(format!("{name} calls itself: recursion is not supported")));
        }
        if callee.params.len() != args.len() || callee.returns.len() != returns.len() {
            return Err(at(format!(
                "{name} takes {} arguments and gives {}",
                callee.params.len(),
                callee.returns.len()
            )));
        }
        let after = format!("$after call {}", self.decoder.here());
        let skipped = i.guard.is_some();
        let end = format!("{after} skipped");
        if let Some((guard, not)) = &i.guard {
            // The lanes without the guard jump over the whole body.
            let mut over = instruction("bra", &[], i.line);
            over.guard = Some((guard.clone(), !not));
            over.loc = i.loc;
            self.decoder.jumps_to(&end, i.line);
            self.decoder.push(Inst::new(control::bra, Class::Control), &over).map_err(at)?;
        }
        let inputs = self.bind(&callee.params, args, i, true)?;
        let outputs = self.bind(&callee.returns, returns, i, false)?;
        let hidden = self.decoder.hide();
        for (name, symbol) in inputs.iter().chain(&outputs) {
            self.decoder.declare_symbol(name, *symbol);
        }
        let caller = self.returns.replace(after.clone());
        self.stack.push(name);
        let done = self.statements(callee.body.as_deref().unwrap_or_default(), i.line);
        self.stack.pop();
        self.returns = caller;
        let done = done.and_then(|()| self.decoder.label(&after).map_err(at));
        self.decoder.unhide(hidden);
        done?;
        for (formal, (_, symbol)) in returns.iter().zip(&outputs) {
            if let Symbol::Register(slot) = symbol
                && let Operand::Name(_) = formal
            {
                let to = self.decoder.any_register(formal).map_err(at)?;
                self.copy(to, *slot, i)?;
            }
        }
        if skipped {
            self.decoder.label(&end).map_err(at)?;
        }
        Ok(())
    }

    /// What the formal parameters of a function stand for in this call.
    fn bind(
        &mut self,
        formals: &[Variable],
        actuals: &[Operand],
        i: &Instruction,
        input: bool,
    ) -> Located<Vec<(String, Symbol)>> {
        let at = |m: String| (i.line, m);
        let mut bound = Vec::new();
        for (formal, actual) in formals.iter().zip(actuals) {
            if formal.space == Space::Param {
                let Operand::Name(name) = actual else {
                    return Err(at(format!(
                        "argument {actual:?} of a .param parameter must be a .param variable"
                    )));
                };
                let Some(symbol @ (Symbol::Local(_) | Symbol::Param(_))) = self.decoder.symbol(name) else {
                    return Err(at(format!("argument {name} is not a .param variable")));
                };
                bound.push((formal.name.clone(), symbol));
                continue;
            }
            let slot = self.decoder.fresh(formal.ty);
            if input {
                let from = match formal.ty.size() {
                    _ if formal.ty == Ty::Pred => AnySlot::Pred(self.decoder.src_pred(actual).map_err(at)?.0),
                    8 => AnySlot::R64(self.decoder.src64(actual, formal.ty).map_err(at)?),
                    _ => AnySlot::R32(self.decoder.src32(actual, formal.ty).map_err(at)?),
                };
                self.copy(slot, from, i)?;
            }
            bound.push((formal.name.clone(), Symbol::Register(slot)));
        }
        Ok(bound)
    }

    fn copy(&mut self, to: AnySlot, from: AnySlot, i: &Instruction) -> Located<()> {
        let at = |m: String| (i.line, m);
        let mut inst = match (to, from) {
            (AnySlot::R32(d), AnySlot::R32(a)) => Inst { d, a, ..Inst::new(control::copy32(), Class::Move) },
            (AnySlot::R64(d), AnySlot::R64(a)) => Inst { d, a, ..Inst::new(control::copy64(), Class::Move) },
            (AnySlot::Pred(d), AnySlot::Pred(a)) => {
                Inst { d, a, ..Inst::new(control::copy_pred, Class::Move) }
            }
            _ => return Err(at("an argument has another width than its parameter".to_owned())),
        };
        inst.pc = self.decoder.here();
        let mut plain = instruction("mov", &[], i.line);
        plain.loc = i.loc;
        plain.text = format!("(argument of) {}", i.text);
        self.decoder.push(inst, &plain).map_err(at)
    }
}

/// An instruction that stands in no file: jumps and copies that inlining adds.
fn instruction(opcode: &str, modifiers: &[&str], line: u32) -> Instruction {
    Instruction {
        guard: None,
        opcode: opcode.to_owned(),
        modifiers: modifiers.iter().map(|&m| m.to_owned()).collect(),
        operands: Vec::new(),
        line,
        loc: ast::Loc::default(),
        text: format!("({opcode} added by inlining)"),
    }
}
