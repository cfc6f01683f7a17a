//! Reading JSON that may say anything: every value comes with the name of its key in case it cannot be used.

use serde_json::{Map, Value};

use super::text::shown;
use crate::{Error, Result};

/// Largest whole number any key may hold: far beyond every model, far below what overflows.
const LARGEST_COUNT: u64 = 1 << 24;

/// A value and where it was found, as in `config.json: num_attention_heads`.
#[derive(Clone, Debug)]
pub(super) struct Sourced<T> {
    pub(super) value: T,
    pub(super) source: String,
}

/// A JSON object of a named file.
#[derive(Clone, Copy)]
pub(super) struct Object<'a> {
    file: &'a str,
    /// The keys that lead to it, each followed by a dot.
    path: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(super) fn new(file: &'a str, path: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { file, path, map }
    }

    pub(super) fn file(&self) -> &'a str {
        self.file
    }

    /// The value of `key`, if it is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn source(&self, key: &str) -> String {
        // The source is read by people who know which directory they are in.
        let file = self.file.rsplit(['/', '\\']).next().unwrap_or(self.file);
        format!("{file}: {}{key}", self.path)
    }

    pub(super) fn error(&self, key: &str, what: impl std::fmt::Display) -> Error {
        Error::file(self.file, format!("`{}{key}` {what}", self.path))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.error(key, format!("is {}; expected {expected}", shown(&value.to_string())))
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<Sourced<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match parse(value) {
            Some(parsed) => Ok(Some(Sourced { value: parsed, source: self.source(key) })),
            None => Err(self.wrong(key, value, expected)),
        }
    }

    /// A whole number, zero included.
    pub(super) fn count(&self, key: &str) -> Result<Option<Sourced<usize>>> {
        self.read(key, "a whole number of at most eight digits", count)
    }

    /// A whole number, or two (height and width), or an object of `height` and `width`.
    pub(super) fn sides(&self, key: &str) -> Result<Option<Sourced<[usize; 2]>>> {
        self.read(key, "a whole number or height and width", |value| match value {
            Value::Array(list) => match &list[..] {
                [height, width] => Some([count(height)?, count(width)?]),
                _ => None,
            },
            Value::Object(map) => Some([count(map.get("height")?)?, count(map.get("width")?)?]),
            _ => count(value).map(|side| [side, side]),
        })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<Sourced<f64>>> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<Sourced<bool>>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<Sourced<&'a str>>> {
        self.read(key, "a string", Value::as_str)
    }

    /// One number per channel.
    pub(super) fn channels(&self, key: &str) -> Result<Option<Sourced<Vec<f32>>>> {
        self.read(key, "a list of 1 to 4 numbers", numbers)
    }

    /// A list of whole numbers.
    pub(super) fn counts(&self, key: &str) -> Result<Option<Sourced<Vec<usize>>>> {
        self.read(key, "a list of whole numbers", |value| value.as_array()?.iter().map(count).collect())
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<Sourced<Vec<String>>>> {
        self.read(key, "a list of strings", |value| {
            value.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect()
        })
    }

    /// The object under `key`.
    pub(super) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        Ok(self.read(key, "an object", Value::as_object)?.map(|sourced| sourced.value))
    }

    /// Whether the value of `key` is an object: some keys hold either that or something simpler.
    pub(super) fn is_object(&self, key: &str) -> bool {
        self.get(key).is_some_and(Value::is_object)
    }
}

fn count(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&n| n <= LARGEST_COUNT).map(|n| n as usize)
}

/// One finite number per channel.
pub(super) fn numbers(value: &Value) -> Option<Vec<f32>> {
    let list = value.as_array().filter(|list| (1..=4).contains(&list.len()))?;
    list.iter().map(|v| v.as_f64().map(|v| v as f32).filter(|v| v.is_finite())).collect()
}
