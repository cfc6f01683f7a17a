//! Statements, instructions and operands.

use super::ast::{Instruction, Operand, Statement};
use super::lex::Kind;
use super::parse::{Parsed, Parser};
use super::parse_expr::Value;

/// Deepest nesting of `{ }`; inline assembly in inlined functions nests a few levels.
const MAX_BLOCKS: u32 = 64;

impl Parser<'_> {
    /// The statements after a `{`, and the `}`.
    pub(super) fn block(&mut self, files: &mut Vec<(u32, String)>, depth: u32) -> Parsed<Vec<Statement>> {
        if depth > MAX_BLOCKS {
            return self.fail(format!("blocks are nested more than {MAX_BLOCKS} deep"));
        }
        let mut statements = Vec::new();
        loop {
            match self.token().kind {
                Kind::Punct(b'}') => {
                    self.advance();
                    return Ok(statements);
                }
                Kind::Punct(b'{') => {
                    self.advance();
                    statements.push(Statement::Block(self.block(files, depth + 1)?));
                }
                Kind::Punct(b';') => {
                    self.advance();
                }
                Kind::Dot => self.directive(files, &mut statements)?,
                Kind::Word if self.next_token().kind == Kind::Punct(b':') => {
                    let statement = self.label()?;
                    statements.push(statement);
                }
                Kind::Word | Kind::Punct(b'@') => {
                    let instruction = self.instruction()?;
                    statements.push(Statement::Instruction(Box::new(instruction)));
                }
                _ => return self.expected("a statement or `}`"),
            }
        }
    }

    fn directive(&mut self, files: &mut Vec<(u32, String)>, out: &mut Vec<Statement>) -> Parsed<()> {
        if self.note(files)? {
            return Ok(());
        }
        if self.dot() == Some("reg") {
            return self.register(out);
        }
        let external = self.linkage();
        match self.dot() {
            Some("shared" | "shared::cta" | "local" | "param" | "const" | "global") => {
                self.variables(external, &mut |variable| out.push(Statement::Variable(variable)))
            }
            Some(other) => self.fail(format!("`.{other}` is not a directive known in a function")),
            None => self.expected("a variable"),
        }
    }

    /// `name:` and, for the directives that need one, what it names.
    fn label(&mut self) -> Parsed<Statement> {
        let line = self.token().line;
        let name = self.word("a label")?.to_owned();
        self.expect(b':')?;
        match self.dot() {
            Some("branchtargets") => {
                self.advance();
                let mut labels = vec![self.word("a label")?.to_owned()];
                while self.eat(b',') {
                    labels.push(self.word("a label")?.to_owned());
                }
                self.expect(b';')?;
                Ok(Statement::BranchTargets { name, labels, line })
            }
            // What an indirect call may reach; the call itself is what decides.
            Some("callprototype" | "calltargets") => {
                while !self.at_punct(b';') {
                    if matches!(self.token().kind, Kind::End | Kind::Punct(b'{' | b'}')) {
                        return self.expected("`;`");
                    }
                    self.advance();
                }
                self.advance();
                Ok(Statement::CallPrototype { name, line })
            }
            _ => Ok(Statement::Label { name, line }),
        }
    }

    fn instruction(&mut self) -> Parsed<Instruction> {
        let guard = if self.eat(b'@') {
            let negated = self.eat(b'!');
            Some((self.word("a predicate")?.to_owned(), negated))
        } else {
            None
        };
        let line = self.token().line;
        let from = self.position();
        let mut words = self.word("an instruction")?.split('.').map(str::to_owned);
        let opcode = words.next().unwrap_or_default();
        let mut modifiers: Vec<String> = words.collect();
        while let Some(modifier) = self.dot() {
            modifiers.push(modifier.to_owned());
            self.advance();
        }
        let mut operands = Vec::new();
        if !self.at_punct(b';') {
            let call = opcode == "call";
            loop {
                let operand = if call && self.at_punct(b'(') { self.list()? } else { self.operand()? };
                operands.push(operand);
                if !self.eat(b',') {
                    break;
                }
            }
        }
        if !self.at_punct(b';') {
            return self.expected("`,` or `;` after an operand");
        }
        let text = self.source(from);
        self.advance();
        Ok(Instruction { guard, opcode, modifiers, operands, line, loc: self.loc, text })
    }

    /// `(a, b)` of a call.
    fn list(&mut self) -> Parsed<Operand> {
        self.expect(b'(')?;
        let mut items = Vec::new();
        if self.eat(b')') {
            return Ok(Operand::List(items));
        }
        loop {
            items.push(self.scalar()?);
            if self.eat(b')') {
                return Ok(Operand::List(items));
            }
            if !self.eat(b',') {
                return self.expected("`,` or `)` in a list");
            }
        }
    }

    fn operand(&mut self) -> Parsed<Operand> {
        if self.eat(b'[') {
            let base = if self.token().kind == Kind::Word && self.text() != "WARP_SZ" {
                Some(self.word("a base")?.to_owned())
            } else {
                None
            };
            let offset = if base.is_some() { self.offset()? } else { self.unsigned()? as i64 };
            if !self.eat(b']') {
                return self.expected("`]` after an address");
            }
            return Ok(Operand::Address { base, offset });
        }
        if self.eat(b'{') {
            let mut items = vec![self.scalar()?];
            while self.eat(b',') {
                items.push(self.scalar()?);
            }
            if !self.eat(b'}') {
                return self.expected("`,` or `}` in a vector");
            }
            return Ok(Operand::Vector(items));
        }
        let first = self.scalar()?;
        if matches!(first, Operand::Name(_) | Operand::Sink) && self.eat(b'|') {
            let name = self.word("a second destination")?;
            return Ok(Operand::Pair(Box::new(first), Box::new(word(name))));
        }
        Ok(first)
    }

    /// A name, number or constant expression.
    fn scalar(&mut self) -> Parsed<Operand> {
        match self.token().kind {
            Kind::Punct(b'!') if self.next_token().kind == Kind::Word => {
                self.advance();
                Ok(Operand::Not(self.word("a predicate")?.to_owned()))
            }
            Kind::Word => {
                let name = self.word("an operand")?;
                if name != "_" && (self.at_punct(b'+') || self.at_punct(b'-')) {
                    let name = name.to_owned();
                    return Ok(Operand::Sum { name, offset: self.offset()? });
                }
                Ok(word(name))
            }
            Kind::Number | Kind::Punct(b'-' | b'+' | b'~' | b'(' | b'!') => {
                let minus = self.at_punct(b'-');
                Ok(match self.constant()? {
                    Value::Int { bits, unsigned } => {
                        Operand::Int { bits, negative: minus || (!unsigned && (bits as i64) < 0) }
                    }
                    Value::F32(bits) => Operand::F32(bits),
                    Value::F64(bits) => Operand::F64(bits),
                })
            }
            _ => self.expected("an operand"),
        }
    }
}

/// `_` or a name.
fn word(text: &str) -> Operand {
    if text == "_" { Operand::Sink } else { Operand::Name(text.to_owned()) }
}
