//! PTX text to tokens.
//!
//! A token is a span of the source with its line; numbers keep their spelling and are read by the parser, so that
//! whatever a skipped debug section holds never has to mean anything.

use std::fmt;

/// Why a PTX text was refused, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Line in the PTX text, from 1.
    pub line: u32,
    /// What is wrong there.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for ParseError {}

/// Kinds of token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A name or a dotted opcode: `%tid.x`, `ld.global.L2::128B.u32`, `_`.
    Word,
    /// A dot and one word: `.reg`, `.b32`.
    Dot,
    /// A number, not yet read: `12U`, `0f3F800000`, `9.5`.
    Number,
    /// A string with its quotes.
    Str,
    /// One punctuation character.
    Punct(u8),
    /// The end of the text.
    End,
}

/// A token: bytes `start..end` of the source.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) start: u32,
    pub(super) end: u32,
    pub(super) line: u32,
}

/// Longest text accepted: offsets are 32 bits wide, and no compiler comes near it.
const MAX_BYTES: usize = 1 << 30;

/// Splits `source` into tokens; the last one is always [`Kind::End`].
pub(super) fn tokenize(source: &str) -> Result<Vec<Token>, ParseError> {
    if source.len() > MAX_BYTES {
        return Err(ParseError {
            line: 1,
            message: format!("{} bytes are too many for a PTX text", source.len()),
        });
    }
    // A token and the blank before it rarely take less than four bytes.
    let mut lexer =
        Lexer { bytes: source.as_bytes(), at: 0, line: 1, tokens: Vec::with_capacity(source.len() / 4 + 1) };
    while lexer.token()? {}
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    bytes: &'a [u8],
    at: usize,
    line: u32,
    tokens: Vec<Token>,
}

/// Can stand inside a name.
fn follows(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$')
}

fn fail<T>(line: u32, message: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError { line, message: message.into() })
}

impl Lexer<'_> {
    /// The byte `ahead` of the current one, 0 past the end.
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    /// Reads one token; false once the end is reached.
    fn token(&mut self) -> Result<bool, ParseError> {
        self.skip_blanks()?;
        let (start, line) = (self.at, self.line);
        let first = self.peek(0);
        let kind = match first {
            0 => Kind::End,
            b'"' => {
                self.string()?;
                Kind::Str
            }
            b'0'..=b'9' => {
                self.number();
                Kind::Number
            }
            b'.' if self.peek(1).is_ascii_digit() => {
                self.number();
                Kind::Number
            }
            b'.' if follows(self.peek(1)) => {
                self.at += 1;
                self.name();
                Kind::Dot
            }
            b'%' if follows(self.peek(1)) => {
                self.at += 1;
                self.dotted();
                Kind::Word
            }
            _ if follows(first) => {
                self.dotted();
                Kind::Word
            }
            _ if first.is_ascii_graphic() => {
                self.at += 1;
                Kind::Punct(first)
            }
            _ => return fail(line, format!("byte 0x{first:02x} outside a comment or string")),
        };
        self.tokens.push(Token { kind, start: start as u32, end: self.at as u32, line });
        Ok(kind != Kind::End)
    }

    /// Skips white space, comments and `#` lines of a preprocessor.
    fn skip_blanks(&mut self) -> Result<(), ParseError> {
        loop {
            match (self.peek(0), self.peek(1)) {
                (b'\n', _) => {
                    self.line += 1;
                    self.at += 1;
                }
                (b' ' | b'\t' | b'\r' | 0x0b | 0x0c, _) => self.at += 1,
                (b'/', b'/') | (b'#', _) => {
                    while !matches!(self.peek(0), b'\n' | 0) {
                        self.at += 1;
                    }
                }
                (b'/', b'*') => {
                    let line = self.line;
                    self.at += 2;
                    loop {
                        match (self.peek(0), self.peek(1)) {
                            (b'*', b'/') => break,
                            (0, _) => return fail(line, "this comment does not end"),
                            (b'\n', _) => self.line += 1,
                            _ => {}
                        }
                        self.at += 1;
                    }
                    self.at += 2;
                }
                _ => return Ok(()),
            }
        }
    }

    fn string(&mut self) -> Result<(), ParseError> {
        let line = self.line;
        self.at += 1;
        loop {
            match self.peek(0) {
                b'"' => break,
                0 | b'\n' => return fail(line, "this string does not end"),
                b'\\' if !matches!(self.peek(1), 0 | b'\n') => self.at += 1,
                _ => {}
            }
            self.at += 1;
        }
        self.at += 1;
        Ok(())
    }

    /// Everything that may belong to a number; a sign only after a decimal exponent.
    fn number(&mut self) {
        let hex = self.peek(0) == b'0' && matches!(self.peek(1) | 0x20, b'x' | b'f' | b'd' | b'b');
        while follows(self.peek(0)) || self.peek(0) == b'.' {
            let exponent = !hex && self.peek(0) | 0x20 == b'e';
            self.at += 1;
            if exponent && matches!(self.peek(0), b'+' | b'-') && self.peek(1).is_ascii_digit() {
                self.at += 1;
            }
        }
    }

    /// One word; `::` inside it belongs to it (`shared::cta`), a label's `:` does not.
    fn name(&mut self) {
        loop {
            while follows(self.peek(0)) {
                self.at += 1;
            }
            if self.peek(0) == b':' && self.peek(1) == b':' && follows(self.peek(2)) {
                self.at += 2;
            } else {
                return;
            }
        }
    }

    /// Words joined by dots.
    fn dotted(&mut self) {
        self.name();
        while self.peek(0) == b'.' && follows(self.peek(1)) {
            self.at += 1;
            self.name();
        }
    }
}
