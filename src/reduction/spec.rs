//! Specification strings: `method:key=value,key=value`, lists in brackets, blocks separated by slashes.

use crate::{Error, Result};

/// The longest specification that is looked at: far beyond any sensible one.
const MAX_LENGTH: usize = 4096;

/// The keys and values of one specification, each to be taken once.
pub(super) struct Fields<'a> {
    text: &'a str,
    name: &'a str,
    pairs: Vec<(&'a str, &'a str)>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self> {
        if text.len() > MAX_LENGTH {
            let start: String = text.chars().take(32).collect();
            return Err(Error::spec(format!("{start}..."), format!("longer than {MAX_LENGTH} bytes")));
        }
        let text = text.trim();
        let (name, rest) = text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest)));
        let mut fields = Self { text, name: name.trim(), pairs: Vec::new(), known: Vec::new() };
        for part in rest.map(split_outside_brackets).unwrap_or_default() {
            let Some((key, value)) = part.split_once('=') else {
                return Err(fields.error(format!("`{part}` is not of the form key=value")));
            };
            let (key, value) = (key.trim(), value.trim());
            if fields.pairs.iter().any(|&(k, _)| k == key) {
                return Err(fields.error(format!("`{key}` is given twice")));
            }
            fields.pairs.push((key, value));
        }
        Ok(fields)
    }

    pub(super) fn name(&self) -> &'a str {
        self.name
    }

    pub(super) fn error(&self, what: impl Into<String>) -> Error {
        Error::spec(self.text, what)
    }

    /// The value of `key`, if given.
    pub(super) fn take(&mut self, key: &'static str) -> Option<&'a str> {
        self.known.push(key);
        let at = self.pairs.iter().position(|&(k, _)| k == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// The value of `key` read by `parse`; `expected` completes "must be ...".
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => match parse(value) {
                Some(parsed) => Ok(Some(parsed)),
                None => Err(self.error(format!("{key}={value}: must be {expected}"))),
            },
        }
    }

    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> Result<bool> {
        let parse = |value: &str| match value {
            "true" | "on" | "1" => Some(true),
            "false" | "off" | "0" => Some(false),
            _ => None,
        };
        Ok(self.read(key, "true or false", parse)?.unwrap_or(default))
    }

    /// Ascending block numbers, `3/6/9`.
    pub(super) fn layers(&mut self) -> Result<Option<Vec<usize>>> {
        let parse = |value: &str| {
            let layers: Option<Vec<usize>> = value.split('/').map(|l| l.trim().parse().ok()).collect();
            layers.filter(|l| l.windows(2).all(|w| w[0] < w[1]))
        };
        self.read("layers", "ascending block numbers from 0 such as 3/6/9", parse)
    }

    /// Refuses keys that nobody took.
    pub(super) fn finish(self) -> Result<()> {
        match self.pairs.first() {
            None => Ok(()),
            Some((key, _)) if self.known.is_empty() => {
                Err(self.error(format!("unknown key `{key}`; `{}` has none", self.name)))
            }
            Some((key, _)) => {
                Err(self.error(format!("unknown key `{key}`; known are {}", self.known.join(", "))))
            }
        }
    }
}

/// The items of `[a,b,c]`; `None` if the brackets are missing.
pub(super) fn list(value: &str) -> Option<Vec<&str>> {
    let inner = value.strip_prefix('[')?.strip_suffix(']')?.trim();
    Some(if inner.is_empty() { Vec::new() } else { inner.split(',').map(str::trim).collect() })
}

/// `3/6/9` of block numbers.
pub(super) fn slashed(layers: &[usize]) -> String {
    layers.iter().map(ToString::to_string).collect::<Vec<_>>().join("/")
}

fn split_outside_brackets(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_usize, 0);
    for (at, c) in text.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().map(str::trim).collect()
}
