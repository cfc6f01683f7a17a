//! Why the command did not do what was asked, and how that is said.

use std::io::{self, Write};

/// Why the command stopped.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The input cannot be used; exit code 2.
    Input(String),
    /// What was wrong has been printed; exit code 2.
    Reported,
    /// Anything else; exit code 1.
    Other(String),
    /// Whoever read our output has seen enough; no failure at all.
    ClosedPipe,
}

impl Failure {
    /// A [`Failure::Input`].
    pub(crate) fn input(what: impl Into<String>) -> Self {
        Self::Input(what.into())
    }
}

impl From<foveate::Error> for Failure {
    fn from(error: foveate::Error) -> Self {
        match error {
            #[cfg(feature = "cuda")]
            foveate::Error::NoDriver { .. }
            | foveate::Error::NoLibrary { .. }
            | foveate::Error::OutOfMemory { .. }
            | foveate::Error::Driver { .. }
            | foveate::Error::Kernels { .. }
            | foveate::Error::Launch { .. }
            | foveate::Error::Blas { .. } => Self::Other(error.to_string()),
            _ => Self::Input(error.to_string()),
        }
    }
}

/// Errors of writing to stdout.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::ClosedPipe,
            _ => Self::Other(format!("cannot write the output: {error}")),
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::from(io::Error::from(error))
    }
}

/// One line on stderr. If nobody listens there, nobody can be told.
pub(crate) fn complain(what: &str) {
    let _ = writeln!(io::stderr().lock(), "foveate: {}", one_line(what));
}

/// `text` on one line and without control characters: file names and contents may hold anything.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\r' | '\t' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_whatever_is_in_them() {
        assert_eq!(one_line("a\nb\u{1b}[31mc"), "a b\\u{1b}[31mc");
    }

    #[test]
    fn a_closed_pipe_is_not_a_failure() {
        assert!(matches!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)), Failure::ClosedPipe));
        assert!(matches!(Failure::from(io::Error::from(io::ErrorKind::StorageFull)), Failure::Other(_)));
    }
}
