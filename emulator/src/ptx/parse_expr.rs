//! Numbers and constant expressions.

use super::lex::Kind;
use super::parse::{Parsed, Parser};

/// A constant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    /// Two's complement bits. PTX computes in 64 bits; `unsigned` decides division, shifts and comparisons.
    Int { bits: u64, unsigned: bool },
    /// Bits of a single-precision number.
    F32(u32),
    /// Bits of a double-precision number.
    F64(u64),
}

/// Deepest nesting of parentheses and signs.
const MAX_DEPTH: u32 = 64;

/// Levels of the binary operators, from the weakest.
const OR_OR: u8 = 1;
const MULTIPLICATIVE: u8 = 10;

/// Reads a number as PTX spells it.
fn number(text: &str) -> Option<Value> {
    let lower = text.to_ascii_lowercase();
    if let Some(hex) = lower.strip_prefix("0f") {
        return (hex.len() == 8).then(|| u32::from_str_radix(hex, 16).ok().map(Value::F32))?;
    }
    if let Some(hex) = lower.strip_prefix("0d") {
        return (hex.len() == 16).then(|| u64::from_str_radix(hex, 16).ok().map(Value::F64))?;
    }
    let unsigned = text.ends_with('U');
    let digits = &lower[..lower.len() - usize::from(unsigned)];
    let (digits, radix) = if let Some(hex) = digits.strip_prefix("0x") {
        (hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        (binary, 2)
    } else if digits.contains(['.', 'e']) {
        return if unsigned { None } else { digits.parse::<f64>().ok().map(|v| Value::F64(v.to_bits())) };
    } else if digits.len() > 1 && digits.starts_with('0') {
        (digits, 8)
    } else {
        (digits, 10)
    };
    let bits = u64::from_str_radix(digits, radix).ok()?;
    // A literal that no signed number can hold is unsigned by itself.
    Some(Value::Int { bits, unsigned: unsigned || bits > i64::MAX as u64 })
}

/// The operator written `first second`, its length in characters and its level.
fn operator(first: u8, second: Option<u8>) -> Option<(&'static str, u8)> {
    Some(match (first, second) {
        (b'|', Some(b'|')) => ("||", OR_OR),
        (b'&', Some(b'&')) => ("&&", 2),
        (b'|', _) => ("|", 3),
        (b'^', _) => ("^", 4),
        (b'&', _) => ("&", 5),
        (b'=', Some(b'=')) => ("==", 6),
        (b'!', Some(b'=')) => ("!=", 6),
        (b'<', Some(b'=')) => ("<=", 7),
        (b'>', Some(b'=')) => (">=", 7),
        (b'<', Some(b'<')) => ("<<", 8),
        (b'>', Some(b'>')) => (">>", 8),
        (b'<', _) => ("<", 7),
        (b'>', _) => (">", 7),
        (b'+', _) => ("+", 9),
        (b'-', _) => ("-", 9),
        (b'*', _) => ("*", MULTIPLICATIVE),
        (b'/', _) => ("/", MULTIPLICATIVE),
        (b'%', _) => ("%", MULTIPLICATIVE),
        _ => return None,
    })
}

/// `a op b` on integers; `None` for a division that has no result.
fn apply(op: &str, (a, b): (u64, u64), unsigned: bool) -> Option<u64> {
    let (sa, sb) = (a as i64, b as i64);
    let less = if unsigned { a < b } else { sa < sb };
    Some(match op {
        "||" => u64::from(a != 0 || b != 0),
        "&&" => u64::from(a != 0 && b != 0),
        "|" => a | b,
        "^" => a ^ b,
        "&" => a & b,
        "==" => u64::from(a == b),
        "!=" => u64::from(a != b),
        "<" => u64::from(less),
        ">=" => u64::from(!less),
        ">" => u64::from(!less && a != b),
        "<=" => u64::from(less || a == b),
        "<<" => u32::try_from(b).ok().and_then(|n| a.checked_shl(n)).unwrap_or(0),
        ">>" if unsigned => u32::try_from(b).ok().and_then(|n| a.checked_shr(n)).unwrap_or(0),
        ">>" => (sa >> b.min(63)) as u64,
        "+" => a.wrapping_add(b),
        "-" => a.wrapping_sub(b),
        "*" => a.wrapping_mul(b),
        "/" if unsigned => a.checked_div(b)?,
        "/" => sa.checked_div(sb)? as u64,
        "%" if unsigned => a.checked_rem(b)?,
        _ => sa.checked_rem(sb)? as u64,
    })
}

impl Parser<'_> {
    /// A constant expression.
    pub(super) fn constant(&mut self) -> Parsed<Value> {
        self.binary(OR_OR, 0)
    }

    /// A constant expression of the strength of a product: what may follow `name +`.
    pub(super) fn product(&mut self) -> Parsed<u64> {
        let value = self.binary(MULTIPLICATIVE, 0)?;
        self.integer(value)
    }

    /// A constant that must be an integer; its bits.
    pub(super) fn unsigned(&mut self) -> Parsed<u64> {
        let value = self.constant()?;
        self.integer(value)
    }

    /// A constant from 0 to 2^32 - 1.
    pub(super) fn small(&mut self) -> Parsed<u32> {
        let bits = self.unsigned()?;
        u32::try_from(bits).or_else(|_| self.fail(format!("{} is out of range here", bits as i64)))
    }

    fn integer(&self, value: Value) -> Parsed<u64> {
        match value {
            Value::Int { bits, .. } => Ok(bits),
            _ => self.fail("an integer is needed here, not a float"),
        }
    }

    fn binary(&mut self, level: u8, depth: u32) -> Parsed<Value> {
        let mut left = self.unary(depth)?;
        loop {
            let Kind::Punct(first) = self.token().kind else { return Ok(left) };
            let next = self.next_token();
            let second = match next.kind {
                Kind::Punct(byte) if next.start == self.token().end => Some(byte),
                _ => None,
            };
            let Some((op, strength)) = operator(first, second) else { return Ok(left) };
            if strength < level {
                return Ok(left);
            }
            self.advance();
            if op.len() == 2 {
                self.advance();
            }
            let right = self.binary(strength + 1, depth + 1)?;
            let (Value::Int { bits: a, unsigned: ua }, Value::Int { bits: b, unsigned: ub }) = (left, right)
            else {
                return self.fail(format!("`{op}` needs integers"));
            };
            let Some(bits) = apply(op, (a, b), ua || ub) else {
                return self.fail("a constant is divided by zero");
            };
            left = Value::Int { bits, unsigned: ua || ub };
        }
    }

    fn unary(&mut self, depth: u32) -> Parsed<Value> {
        if depth > MAX_DEPTH {
            return self.fail("this constant expression is nested too deeply");
        }
        match self.token().kind {
            Kind::Punct(sign @ (b'-' | b'+' | b'~' | b'!')) => {
                self.advance();
                let value = self.unary(depth + 1)?;
                Ok(match (sign, value) {
                    (b'+', value) => value,
                    (b'-', Value::Int { bits, unsigned }) => {
                        Value::Int { bits: bits.wrapping_neg(), unsigned }
                    }
                    (b'-', Value::F32(bits)) => Value::F32(bits ^ 1 << 31),
                    (b'-', Value::F64(bits)) => Value::F64(bits ^ 1 << 63),
                    (b'~', Value::Int { bits, unsigned }) => Value::Int { bits: !bits, unsigned },
                    (b'!', Value::Int { bits, .. }) => {
                        Value::Int { bits: u64::from(bits == 0), unsigned: false }
                    }
                    _ => return self.fail(format!("`{}` needs an integer", sign as char)),
                })
            }
            Kind::Punct(b'(') => {
                self.advance();
                if let Some(cast @ ("s64" | "u64")) = self.dot() {
                    self.advance();
                    self.expect(b')')?;
                    let value = self.unary(depth + 1)?;
                    let bits = self.integer(value)?;
                    return Ok(Value::Int { bits, unsigned: cast == "u64" });
                }
                let value = self.binary(OR_OR, depth + 1)?;
                self.expect(b')')?;
                Ok(value)
            }
            Kind::Number => match number(self.text()) {
                Some(value) => {
                    self.advance();
                    Ok(value)
                }
                None => self.expected("a number that PTX knows and 64 bits hold"),
            },
            Kind::Word if self.text() == "WARP_SZ" => {
                self.advance();
                Ok(Value::Int { bits: 32, unsigned: false })
            }
            _ => self.expected("a constant"),
        }
    }
}
