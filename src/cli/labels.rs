//! `--labels`: class names from a file.

use std::{io::Read, path::Path};

use foveate::Error;
use serde_json::{Map, Value};

use super::failure::Failure;

/// No list of class names is longer.
const LONGEST_BYTES: u64 = 64 << 20;

/// The names of `classes` classes: a text file with one name a line, or JSON, which may be a list, an object from class
/// number to name (or to a list that ends in the name) or from name to class number, or a Hugging Face `config.json`.
pub(crate) fn read(path: &Path, classes: usize, model: &str) -> Result<Vec<String>, Failure> {
    let file = path.display().to_string();
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(LONGEST_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > LONGEST_BYTES {
        return Err(Failure::Input(format!("{file}: longer than 64 MiB; this is no list of labels")));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::Input(format!("{file}: not text; give one label a line, or a JSON list")))?;
    let labels = parse(&text).map_err(|what| Failure::Input(format!("{file}: {what}")))?;
    if labels.len() != classes {
        return Err(Failure::Input(format!(
            "{file} has {} labels, but the head of {model} has {classes} outputs",
            labels.len()
        )));
    }
    Ok(labels)
}

fn parse(text: &str) -> Result<Vec<String>, String> {
    let text = text.trim_start_matches('\u{feff}');
    if !text.trim_start().starts_with(['[', '{']) {
        return Ok(text.trim_end().lines().map(|line| line.trim().to_owned()).collect());
    }
    match serde_json::from_str(text).map_err(|e| format!("not valid JSON: {e}"))? {
        Value::Array(items) => items
            .iter()
            .map(name)
            .collect::<Option<_>>()
            .ok_or_else(|| "this JSON list does not hold names alone".to_owned()),
        Value::Object(map) => match map.get("id2label") {
            Some(Value::Object(inner)) => numbered(inner),
            _ => numbered(&map),
        },
        _ => Err("this JSON is neither a list nor an object".to_owned()),
    }
}

/// A name, or the last one of several (as in `["n02123045", "tabby"]`).
fn name(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(items) => items.last()?.as_str().map(str::to_owned),
        _ => None,
    }
}

/// Names by number or numbers by name, for the numbers from 0 on.
fn numbered(map: &Map<String, Value>) -> Result<Vec<String>, String> {
    let mut labels = vec![None; map.len()];
    for (key, value) in map {
        let entry = match value {
            Value::Number(number) => number.as_u64().map(|number| (number, key.clone())),
            _ => key.parse().ok().zip(name(value)),
        };
        let slot = entry.and_then(|(number, name)| Some((usize::try_from(number).ok()?, name)));
        match slot.and_then(|(number, name)| Some((labels.get_mut(number)?, name))) {
            Some((slot, name)) => *slot = Some(name),
            None => {
                return Err(format!("the entry `{key}` is not one of the classes 0 to {}", map.len() - 1));
            }
        }
    }
    labels.into_iter().collect::<Option<_>>().ok_or_else(|| "a class is named twice".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_are_read() {
        let expected = ["cat", "dog"];
        for text in [
            "cat\ndog\n\n",
            "\u{feff}cat\r\ndog",
            r#"["cat", "dog"]"#,
            r#"{"1": "dog", "0": "cat"}"#,
            r#"{"0": ["n1", "cat"], "1": ["n2", "dog"]}"#,
            r#"{"dog": 1, "cat": 0}"#,
            r#"{"id2label": {"0": "cat", "1": "dog"}, "hidden_size": 8}"#,
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        for text in [
            "[1, 2]",
            "{\"0\": \"cat\", \"2\": \"dog\"}",
            "{\"a\": \"b\"}",
            "[",
            "{\"0\": \"a\", \"00\": \"b\"}",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
