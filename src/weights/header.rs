//! What is wrong with a file that is not a readable safetensors file, in words.
//!
//! The safetensors crate decides whether a file is sound. When it is not, its error seldom says which tensor and what to
//! do, so this module looks again at the rejected file and finds the first thing a person can act on.

use std::{collections::HashSet, fs::File, io::Read};

use serde_json::{Map, Value};

use super::text::{shape, shown};

/// Longest header accepted. The largest vision transformers need about 100 kB; class names can add some more.
pub(super) const LONGEST_HEADER_BYTES: u64 = 8 << 20;

/// The bytes of the header, or why there is none.
pub(super) fn header(bytes: &[u8]) -> Result<&str, String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(match bytes.len() {
            0 => "is empty; download or export it again".into(),
            n => format!("is {n} bytes long, too short for a safetensors file; download or export it again"),
        });
    };
    let length = u64::from_le_bytes(*length);
    // Two bytes of a pickle could be the length of a sound header, so the length and the brace are looked at as well.
    if (rest.first() != Some(&b'{') || length > LONGEST_HEADER_BYTES)
        && let Some(what) = other_format(bytes)
    {
        return Err(what.into());
    }
    if length > LONGEST_HEADER_BYTES {
        return Err(format!(
            "is not a safetensors file: it claims a header of {length} bytes (at most {LONGEST_HEADER_BYTES} are read)"
        ));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Err(format!(
            "is cut off: its header should be {length} bytes long, {} follow; download or export it again",
            rest.len()
        ));
    };
    std::str::from_utf8(header).map_err(|e| {
        format!("has a damaged header: not UTF-8 after byte {}; export it again", e.valid_up_to())
    })
}

/// The kind of file this is, when its first bytes tell.
fn other_format(bytes: &[u8]) -> Option<&'static str> {
    const CONVERT: &str = "is a PyTorch pickle or archive, which this crate does not run; convert it to safetensors \
                           (Python: safetensors.torch.save_file(torch.load(path, weights_only=True), ...))";
    let known: [(&[u8], &'static str); 12] = [
        (b"PK\x03\x04", CONVERT),
        (b"\x80\x02", CONVERT),
        (b"\x80\x03", CONVERT),
        (b"\x80\x04", CONVERT),
        (b"\x80\x05", CONVERT),
        (b"version https://git-lfs", "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
        (b"GGUF", "is a GGUF file; convert it to safetensors"),
        (b"\x89HDF", "is an HDF5 file; convert it to safetensors"),
        (b"\x93NUMPY", "is a NumPy array; convert it to safetensors"),
        (b"<", "is a web page or XML, not the weights; download the file itself"),
        (b"{", "is JSON, not weights; give the .safetensors file"),
        (b"\x08", "looks like an ONNX file; convert it to safetensors"),
    ];
    known.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|&(_, what)| what)
}

/// The first name that the JSON object `header` uses twice. JSON readers keep the last one silently, which would let
/// two readers see two models in one file.
pub(super) fn duplicate(header: &str) -> Option<String> {
    let bytes = header.as_bytes();
    let mut seen = HashSet::new();
    let (mut depth, mut at) = (0_usize, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => {
                let start = at;
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                let is_key = depth == 1
                    && bytes.get(at + 1..)?.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b':');
                if is_key {
                    let name: String = serde_json::from_str(header.get(start..=at)?).ok()?;
                    if let Some(name) = seen.replace(name) {
                        return Some(name);
                    }
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// What is wrong with a header that the safetensors crate refused with the message `refusal`: the tensor, if one can be
/// blamed, and the words.
pub(super) fn diagnose(header: &str, bytes: usize, refusal: &str) -> (Option<String>, String) {
    let tensors: Map<String, Value> = match serde_json::from_str(header) {
        Ok(tensors) => tensors,
        Err(e) => return (None, format!("has a damaged header: {}; export it again", shown(&e.to_string()))),
    };
    let mut ranges = Vec::new();
    for (name, info) in tensors.iter().filter(|(name, _)| *name != "__metadata__") {
        match range(info) {
            Ok(range) => ranges.push((range, name)),
            Err(what) => return (Some(name.clone()), what),
        }
    }
    ranges.sort();
    let available = bytes - 8 - header.len();
    let mut end = 0;
    for &((first, last), name) in &ranges {
        if last > available {
            let what = format!(
                "its bytes {first}..{last} lie beyond the {available} bytes of data; the file is cut off or damaged, \
                 download or export it again"
            );
            return (Some(name.clone()), what);
        }
        if first != end {
            let kind = if first < end { "overlap another tensor's" } else { "leave a gap before them" };
            return (Some(name.clone()), format!("its bytes {first}..{last} {kind}; export the file again"));
        }
        end = last;
    }
    if end < available {
        return (
            None,
            format!("has {} bytes after its last tensor; download or export it again", available - end),
        );
    }
    (None, format!("is not a sound safetensors file: {}; export it again", shown(refusal)))
}

/// The byte range of a tensor, if its description is sound in itself.
fn range(info: &Value) -> Result<(usize, usize), String> {
    let numbers = |key: &str| -> Option<Vec<usize>> {
        info.get(key)?.as_array()?.iter().map(|v| v.as_u64()?.try_into().ok()).collect()
    };
    let Some(dtype) = info.get("dtype").and_then(Value::as_str) else {
        return Err("has no data type; export the file again".into());
    };
    let Some(extents) = numbers("shape") else {
        return Err("its shape is not a list of whole numbers; export the file again".into());
    };
    let Some(&[first, last]) = numbers("data_offsets").as_deref() else {
        return Err("its data_offsets are not two whole numbers; export the file again".into());
    };
    let Ok(known) = serde_json::from_value::<safetensors::Dtype>(Value::from(dtype)) else {
        return Err(format!("its data type `{}` is unknown; convert it to F32", shown(dtype)));
    };
    let bits = extents
        .iter()
        .try_fold(known.bitsize(), |n, &extent| n.checked_mul(extent))
        .filter(|bits| bits % 8 == 0);
    let Some(bits) = bits else {
        return Err(format!("its shape {} is impossible; export the file again", shape(&extents)));
    };
    if last.checked_sub(first) != Some(bits / 8) {
        return Err(format!(
            "its shape {} in {dtype} takes {} bytes, but its data_offsets are {first}..{last}; export the file again",
            shape(&extents),
            bits / 8
        ));
    }
    Ok((first, last))
}

/// Reads a file of at most `limit` bytes.
pub(super) fn read_limited(path: &std::path::Path, limit: u64) -> crate::Result<String> {
    let io = |e| crate::Error::io(path, e);
    let name = path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(io)?;
    // Opening a pipe would wait for a writer, perhaps for ever.
    if !metadata.is_file() {
        return Err(crate::Error::file(name, "is not a regular file"));
    }
    let mut text = Vec::new();
    File::open(path).map_err(io)?.take(limit + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > limit {
        return Err(crate::Error::file(
            name,
            format!("is larger than {limit} bytes, too large for a configuration"),
        ));
    }
    String::from_utf8(text).map_err(|_| crate::Error::file(name, "is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_found_by_decoded_name_and_only_at_the_top() {
        assert_eq!(duplicate(r#"{"a": {"x": 1, "x": 2}, "b": 1}"#), None);
        assert_eq!(duplicate(r#"{"a": 1, "b": ["a", "a"], "a" : 2}"#).as_deref(), Some("a"));
        assert_eq!(duplicate(r#"{"a": 1, "\u0061": 2}"#).as_deref(), Some("a"));
        assert_eq!(duplicate(r#"{"a\"": "a\":", "a": 2}"#), None);
        assert_eq!(duplicate("{\"a"), None);
        assert_eq!(duplicate("{\"a\\"), None);
    }
}
