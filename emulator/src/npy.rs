//! Reads the `.npy` arrays of case folders (little-endian, C order).

/// An array as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Element type as numpy writes it, without the byte order: `f2`, `i4`, `u2`, `b1`.
    pub dtype: String,
    /// Sizes.
    pub shape: Vec<usize>,
    /// Elements.
    pub bytes: Vec<u8>,
}

impl Array {
    /// Parses a file.
    ///
    /// # Errors
    /// Not an `.npy` file of a kind that is understood; the text says why.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        let rest = file.strip_prefix(b"\x93NUMPY").ok_or("not an .npy file")?;
        let (version, rest) = rest.split_at_checked(2).ok_or("the header is cut off")?;
        let (len, rest) = match version[0] {
            1 => {
                let (n, rest) = rest.split_at_checked(2).ok_or("the header is cut off")?;
                (usize::from(u16::from_le_bytes([n[0], n[1]])), rest)
            }
            2 | 3 => {
                let (n, rest) = rest.split_at_checked(4).ok_or("the header is cut off")?;
                (u32::from_le_bytes([n[0], n[1], n[2], n[3]]) as usize, rest)
            }
            other => return Err(format!("version {other} of the .npy format")),
        };
        let (header, bytes) = rest.split_at_checked(len).ok_or("the header is cut off")?;
        let header = String::from_utf8_lossy(header);
        let value = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
        let descr = value("descr").and_then(|v| v.strip_prefix('\'')).and_then(|v| v.split('\'').next());
        let descr = descr.ok_or("the header has no descr")?;
        if value("fortran_order").is_some_and(|v| v.starts_with("True")) {
            return Err("Fortran order".to_owned());
        }
        let dtype = match descr.split_at_checked(1) {
            Some(("<" | "|" | "=", kind)) => kind.to_owned(),
            _ => return Err(format!("element type {descr}")),
        };
        let inside = value("shape").and_then(|v| v.strip_prefix('(')).and_then(|v| v.split(')').next());
        let sizes =
            inside.ok_or("the header has no shape")?.split(',').map(str::trim).filter(|s| !s.is_empty());
        let shape: Vec<usize> =
            sizes.map(|s| s.parse().map_err(|_| format!("size {s:?}"))).collect::<Result<_, String>>()?;
        let width: usize =
            dtype.get(1..).unwrap_or_default().parse().map_err(|_| format!("element type {descr}"))?;
        let elements =
            shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s)).ok_or("the shape overflows")?;
        if elements.checked_mul(width) != Some(bytes.len()) {
            return Err(format!("{} bytes for {elements} elements of {width}", bytes.len()));
        }
        Ok(Self { dtype, shape, bytes: bytes.to_vec() })
    }
}

/// Element `i` of raw bytes as a number; `dtype` is a case file's name (see [`width`]).
///
/// # Errors
/// The type is not known.
pub fn element(dtype: &str, bytes: &[u8], i: usize) -> Result<f64, String> {
    fn at<const N: usize>(bytes: &[u8], i: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&bytes[i * N..(i + 1) * N]);
        out
    }
    Ok(match dtype {
        "f16" => half::f16::from_le_bytes(at(bytes, i)).to_f64(),
        "bf16" => half::bf16::from_le_bytes(at(bytes, i)).to_f64(),
        "f32" => f64::from(f32::from_le_bytes(at(bytes, i))),
        "f64" => f64::from_le_bytes(at(bytes, i)),
        "i8" => f64::from(i8::from_le_bytes(at(bytes, i))),
        "u8" | "bool" => f64::from(bytes[i]),
        "i16" => f64::from(i16::from_le_bytes(at(bytes, i))),
        "u16" => f64::from(u16::from_le_bytes(at(bytes, i))),
        "i32" => f64::from(i32::from_le_bytes(at(bytes, i))),
        "u32" => f64::from(u32::from_le_bytes(at(bytes, i))),
        "i64" => i64::from_le_bytes(at(bytes, i)) as f64,
        "u64" => u64::from_le_bytes(at(bytes, i)) as f64,
        other => return Err(format!("element type {other}")),
    })
}

/// Bytes of an element of a case file's type (`f16`, `bf16`, `f32`, `f64`, `i8` ... `u64`, `bool`).
///
/// # Errors
/// The type is not known.
pub fn width(dtype: &str) -> Result<usize, String> {
    Ok(match dtype {
        "i8" | "u8" | "bool" => 1,
        "f16" | "bf16" | "i16" | "u16" => 2,
        "f32" | "i32" | "u32" => 4,
        "f64" | "i64" | "u64" => 8,
        other => return Err(format!("element type {other}")),
    })
}

/// A case file's name of a numpy type: `f2` is `f16`.
pub fn case_name(numpy: &str) -> &str {
    match numpy {
        "f2" => "f16",
        "f4" => "f32",
        "f8" => "f64",
        "i1" => "i8",
        "u1" => "u8",
        "b1" => "bool",
        "i2" => "i16",
        "u2" => "u16",
        "i4" => "i32",
        "u4" => "u32",
        "i8" => "i64",
        "u8" => "u64",
        other => other,
    }
}
