//! Variables, their initialisers, parameters and registers.

use super::ast::{Init, Space, Statement, Ty, Variable};
use super::lex::Kind;
use super::parse::{Parsed, Parser};
use super::parse_expr::Value;

/// Most registers a function may declare; nvcc stays in the thousands, ptxas could not place more either.
const MAX_REGISTERS: u64 = 1 << 20;
/// Most dimensions of an array, which bounds the nesting of its initialiser.
const MAX_DIMENSIONS: usize = 16;
/// Most elements of an initialiser whose rows are filled up with zeros.
const MAX_INIT: u64 = 1 << 20;

/// What the words before a variable's name say.
struct Declaration {
    space: Space,
    ty: Ty,
    /// Elements of one entry: 2 or 4 for `.v2` and `.v4`.
    lanes: u64,
    align: Option<u64>,
}

/// Largest variable of a space: what the hardware has, with room above where the limit depends on the device.
fn limit(space: Space) -> u64 {
    match space {
        Space::Global | Space::Generic => 1 << 36,
        Space::Shared => 1 << 20,
        Space::Local => 1 << 19,
        Space::Const => 1 << 16,
        Space::Param => 1 << 15,
    }
}

/// Elements of an array of this shape.
fn elements(shape: &[u64]) -> u64 {
    shape.iter().fold(1, |product: u64, &count| product.saturating_mul(count))
}

impl Parser<'_> {
    /// `.space words name[size] = initialiser, name;`
    pub(super) fn variables(&mut self, external: bool, sink: &mut dyn FnMut(Variable)) -> Parsed<()> {
        let declaration = self.declaration()?;
        loop {
            sink(self.variable(&declaration, external)?);
            if self.eat(b';') {
                return Ok(());
            }
            if !self.eat(b',') {
                return self.expected("`,` or `;` after a variable");
            }
        }
    }

    /// `(.param .u64 a, .reg .b32 b)`.
    pub(super) fn parameters(&mut self) -> Parsed<Vec<Variable>> {
        self.expect(b'(')?;
        let mut parameters = Vec::new();
        if self.eat(b')') {
            return Ok(parameters);
        }
        loop {
            let declaration = self.declaration()?;
            if !matches!(declaration.space, Space::Param | Space::Generic) {
                return self.fail("a parameter is .param or .reg");
            }
            parameters.push(self.variable(&declaration, false)?);
            if self.eat(b')') {
                return Ok(parameters);
            }
            if !self.eat(b',') {
                return self.expected("`,` or `)` after a parameter");
            }
        }
    }

    /// The dotted words of a declaration, in any order after the space.
    fn declaration(&mut self) -> Parsed<Declaration> {
        let space = match self.dot() {
            Some("global") => Space::Global,
            Some("shared" | "shared::cta") => Space::Shared,
            Some("local") => Space::Local,
            Some("const") => Space::Const,
            Some("param") => Space::Param,
            Some("reg") => Space::Generic,
            _ => return self.expected("a state space such as .param or .shared"),
        };
        self.advance();
        let (mut ty, mut lanes, mut align, mut pointee) = (None, 1, None, false);
        while let Some(word) = self.dot() {
            match word {
                "align" => {
                    self.advance();
                    let value = self.unsigned()?;
                    if !value.is_power_of_two() || value > 1 << 16 {
                        return self.fail(format!(".align {value} is not a small power of two"));
                    }
                    if !pointee {
                        align = Some(value);
                    }
                    continue;
                }
                "attribute" => {
                    self.attribute()?;
                    continue;
                }
                // From here on the words are about what the pointer points to.
                "ptr" if space == Space::Param => pointee = true,
                "global" | "shared" | "local" | "const" | "generic" if pointee => {}
                "v2" => lanes = 2,
                "v4" => lanes = 4,
                _ => match Ty::parse(word) {
                    Some(found) if ty.is_none() => ty = Some(found),
                    Some(_) => return self.fail(format!("`.{word}` is a second type")),
                    None => return self.fail(format!("`.{word}` is not known in a declaration")),
                },
            }
            self.advance();
        }
        match ty {
            Some(Ty::Pred) if space != Space::Generic => self.fail("a predicate can only be a register"),
            Some(ty) => Ok(Declaration { space, ty, lanes, align }),
            None => self.expected("a type"),
        }
    }

    /// `name[4][8] = { ... }`.
    fn variable(&mut self, declaration: &Declaration, external: bool) -> Parsed<Variable> {
        let &Declaration { space, ty, lanes, align } = declaration;
        let line = self.token().line;
        let name = self.word("a variable's name")?.to_owned();
        let element = lanes * ty.size();
        // Elements of the array along each of its dimensions, the lanes of a vector last.
        let mut shape = Vec::new();
        let mut unsized_array = false;
        while self.eat(b'[') {
            if shape.is_empty() && self.eat(b']') {
                unsized_array = true;
                shape.push(1);
            } else {
                shape.push(self.unsigned()?);
                self.expect(b']')?;
            }
            if shape.len() > MAX_DIMENSIONS {
                return self.fail(format!("`{name}` has more than {MAX_DIMENSIONS} dimensions"));
            }
        }
        if lanes > 1 {
            shape.push(lanes);
        }
        let size = shape.iter().try_fold(ty.size(), |size, &count| size.checked_mul(count));
        let Some(mut size) = size.filter(|&size| size <= limit(space)) else {
            return self.fail(format!("`{name}` is larger than {} bytes", limit(space)));
        };
        let mut init = Vec::new();
        if self.at_punct(b'=') {
            if !matches!(space, Space::Global | Space::Const) {
                return self.fail("only .global and .const variables have initialisers");
            }
            self.advance();
            let row = size;
            if unsized_array {
                shape[0] = limit(space) / row.max(1);
            }
            self.initialiser(ty, &shape, &mut init)?;
            if unsized_array {
                size = row * (init.len() as u64 * ty.size()).div_ceil(row.max(1));
            }
        } else if unsized_array {
            size = 0;
        }
        if size == 0 && !external && space != Space::Param {
            return self.fail(format!("`{name}` has no size and is not .extern"));
        }
        Ok(Variable { space, name, ty, align: align.unwrap_or(element), size, external, init, line })
    }

    /// What initialises an array of this shape (one element when empty).
    fn initialiser(&mut self, ty: Ty, shape: &[u64], out: &mut Vec<Init>) -> Parsed<()> {
        let most = elements(shape);
        if self.token().kind == Kind::Str {
            return self.text_initialiser(ty, most, out);
        }
        if !self.eat(b'{') {
            let element = self.element(ty)?;
            out.push(element);
            return Ok(());
        }
        let begin = out.len();
        let inner = shape.get(1..).unwrap_or(&[]);
        while !self.eat(b'}') {
            let nested = self.at_punct(b'{') || self.token().kind == Kind::Str;
            if nested && shape.is_empty() {
                return self.fail("an initialiser has more braces than the variable has dimensions");
            }
            let from = out.len();
            self.initialiser(ty, inner, out)?;
            if nested {
                // A row with fewer numbers than elements ends in zeros, so that the next one starts where it should.
                let row = elements(inner).saturating_add(from as u64);
                if row > MAX_INIT {
                    return self.fail(format!("an initialiser of more than {MAX_INIT} elements"));
                }
                out.resize(row as usize, Init::Bits(0));
            }
            if (out.len() - begin) as u64 > most {
                return self.fail("more initialisers than the variable has elements");
            }
            if !self.at_punct(b'}') && !self.eat(b',') {
                return self.expected("`,` or `}` in an initialiser");
            }
        }
        Ok(())
    }

    /// A string gives one byte an element and a final NUL where there is room.
    fn text_initialiser(&mut self, ty: Ty, most: u64, out: &mut Vec<Init>) -> Parsed<()> {
        if ty.size() != 1 {
            return self.fail("a string can only initialise bytes");
        }
        let begin = out.len();
        let quoted = self.text().as_bytes();
        let mut bytes = quoted[1..quoted.len() - 1].iter().copied();
        while let Some(byte) = bytes.next() {
            let byte = match (byte, if byte == b'\\' { bytes.next() } else { None }) {
                (b'\\', Some(b'n')) => b'\n',
                (b'\\', Some(b't')) => b'\t',
                (b'\\', Some(b'r')) => b'\r',
                (b'\\', Some(b'0')) => 0,
                (b'\\', Some(other @ (b'\\' | b'"' | b'\''))) => other,
                (b'\\', _) => return self.fail("an escape in a string that is not known"),
                (byte, _) => byte,
            };
            out.push(Init::Bits(u64::from(byte)));
        }
        self.advance();
        let length = (out.len() - begin) as u64;
        if length > most {
            return self.fail("a string is longer than what it initialises");
        }
        if length < most {
            out.push(Init::Bits(0));
        }
        Ok(())
    }

    /// A number, `symbol`, `symbol+8` or `generic(symbol)+8`.
    fn element(&mut self, ty: Ty) -> Parsed<Init> {
        if self.token().kind == Kind::Word && self.text() != "WARP_SZ" {
            if ty.size() != 8 && ty.size() != 4 {
                return self.fail("an address does not fit an element of this type");
            }
            let mut name = self.word("a symbol")?;
            let generic = name == "generic" && self.eat(b'(');
            if generic {
                name = self.word("a symbol")?;
                self.expect(b')')?;
            }
            return Ok(Init::Symbol { name: name.to_owned(), offset: self.offset()?, generic });
        }
        let value = self.constant()?;
        if self.at_punct(b'(') {
            return self.fail("initialisers of single bytes of an address are not supported");
        }
        let bits = match (value, ty) {
            (Value::Int { .. }, Ty::F32 | Ty::F64) => {
                return self.fail("a float variable is initialised by an integer; write 0f... or 0d...");
            }
            (Value::Int { bits, .. }, _) if ty.size() < 8 => bits & ((1 << (8 * ty.size())) - 1),
            (Value::Int { bits, .. }, _) | (Value::F64(bits), Ty::F64 | Ty::B64) => bits,
            (Value::F32(bits), Ty::F32 | Ty::B32) => u64::from(bits),
            (Value::F32(bits), Ty::F64) => f64::from(f32::from_bits(bits)).to_bits(),
            (Value::F64(bits), Ty::F32) => u64::from((f64::from_bits(bits) as f32).to_bits()),
            _ => return self.fail("a float does not fit an element of this type"),
        };
        Ok(Init::Bits(bits))
    }

    /// `+8`, `+-8`, `-8+4`, or nothing.
    pub(super) fn offset(&mut self) -> Parsed<i64> {
        let mut offset = 0_i64;
        loop {
            if self.eat(b'+') {
                offset = offset.wrapping_add(self.product()? as i64);
            } else if self.eat(b'-') {
                offset = offset.wrapping_sub(self.product()? as i64);
            } else {
                return Ok(offset);
            }
        }
    }

    /// `.reg .b32 %r<10>, a, b;`
    pub(super) fn register(&mut self, out: &mut Vec<Statement>) -> Parsed<()> {
        let declaration = self.declaration()?;
        if declaration.lanes != 1 {
            return self.fail("vector registers are not supported");
        }
        loop {
            let line = self.token().line;
            let name = self.word("a register's name")?.to_owned();
            let count = if self.eat(b'<') {
                // Not a constant expression: its `>` would be a comparison.
                let count = self.count()?;
                self.expect(b'>')?;
                Some(count)
            } else {
                None
            };
            self.registers += u64::from(count.unwrap_or(1));
            if self.registers > MAX_REGISTERS {
                return self.fail(format!("a function declares more than {MAX_REGISTERS} registers"));
            }
            out.push(Statement::Register { ty: declaration.ty, name, count, line });
            if self.eat(b';') {
                return Ok(());
            }
            if !self.eat(b',') {
                return self.expected("`,` or `;` after a register");
            }
        }
    }

    /// The number between `<` and `>`.
    fn count(&mut self) -> Parsed<u32> {
        match self.text().parse() {
            Ok(count) if self.token().kind == Kind::Number => {
                self.advance();
                Ok(count)
            }
            _ => self.expected("a number of registers"),
        }
    }
}
