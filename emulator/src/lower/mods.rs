//! Modifiers of an instruction: each must be taken by somebody.

use crate::ptx::ast::{Space, Ty};

/// The dotted words of an instruction, taken off one by one. What is left at the end is an error: a modifier is never skipped.
#[derive(Clone, Debug)]
pub struct Mods<'a> {
    words: Vec<&'a str>,
}

impl<'a> Mods<'a> {
    /// All words, in order.
    pub fn new(words: &'a [String]) -> Self {
        Self { words: words.iter().map(String::as_str).collect() }
    }

    /// Takes one word if it is there.
    pub fn take(&mut self, word: &str) -> bool {
        match self.words.iter().position(|w| *w == word) {
            Some(i) => {
                self.words.remove(i);
                true
            }
            None => false,
        }
    }

    /// Takes the first word that is one of `words`.
    pub fn take_any(&mut self, words: &[&'static str]) -> Option<&'static str> {
        let (at, word) = self
            .words
            .iter()
            .enumerate()
            .find_map(|(i, w)| words.iter().find(|x| *x == w).map(|x| (i, *x)))?;
        self.words.remove(at);
        Some(word)
    }

    /// Takes the first word for which `parse` gives something.
    pub fn take_map<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (at, value) = self.words.iter().enumerate().find_map(|(i, w)| parse(w).map(|v| (i, v)))?;
        self.words.remove(at);
        Some(value)
    }

    /// Takes the first type.
    ///
    /// # Errors
    /// There is none.
    pub fn ty(&mut self) -> Result<Ty, String> {
        self.take_map(Ty::parse).ok_or_else(|| "a type is missing".to_owned())
    }

    /// Takes the last type (the sources' type of `cvt`, `setp`, `set`).
    ///
    /// # Errors
    /// There is none.
    pub fn last_ty(&mut self) -> Result<Ty, String> {
        let at = self.words.iter().rposition(|w| Ty::parse(w).is_some()).ok_or("a type is missing")?;
        Ok(Ty::parse(self.words.remove(at)).unwrap_or(Ty::B32))
    }

    /// Looks at the first type without taking it.
    pub fn peek_ty(&self) -> Option<Ty> {
        self.words.iter().find_map(|w| Ty::parse(w))
    }

    /// Looks at the last type without taking it.
    pub fn peek_last_ty(&self) -> Option<Ty> {
        self.words.iter().rev().find_map(|w| Ty::parse(w))
    }

    /// Takes a state space; [`Space::Generic`] when none is written.
    pub fn space(&mut self) -> Space {
        self.take_map(|w| {
            Some(match w {
                "global" => Space::Global,
                "shared" | "shared::cta" => Space::Shared,
                "local" => Space::Local,
                "const" => Space::Const,
                "param" | "param::entry" | "param::func" => Space::Param,
                _ => return None,
            })
        })
        .unwrap_or(Space::Generic)
    }

    /// Takes words that say how to cache and order an access and do not change values: `.ca`, `.L1::no_allocate`, `.relaxed`, ...
    pub fn skip_memory_hints(&mut self) {
        const HINTS: [&str; 24] = [
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "wb",
            "wt",
            "nc",
            "volatile",
            "weak",
            "relaxed",
            "acquire",
            "release",
            "acq_rel",
            "sc",
            "cta",
            "cluster",
            "gpu",
            "sys",
            "gl",
            "mmio",
            "noftz",
            "level::prefetch_size",
            "unified",
        ];
        self.words.retain(|w| {
            !(HINTS.contains(w) || w.starts_with("L1::") || w.starts_with("L2::") || w.starts_with("level::"))
        });
    }

    /// Is this word there?
    pub fn has(&self, word: &str) -> bool {
        self.words.contains(&word)
    }

    /// The words left, in order.
    pub fn rest(&self) -> &[&'a str] {
        &self.words
    }

    /// Everything was understood.
    ///
    /// # Errors
    /// Names the words that are left.
    pub fn finish(&self) -> Result<(), String> {
        if self.words.is_empty() {
            Ok(())
        } else {
            Err(format!("unknown modifier .{}", self.words.join(" .")))
        }
    }
}
