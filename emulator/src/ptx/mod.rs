//! PTX text to syntax tree.

pub mod ast;
mod lex;
mod parse;
mod parse_body;
mod parse_expr;
mod parse_vars;

pub use lex::ParseError;
pub use parse::parse;
