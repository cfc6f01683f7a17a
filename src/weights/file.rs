//! Safetensors files: opened, checked, and read one tensor at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    ops::Range,
    path::Path,
    sync::Arc,
};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::{
    header,
    text::{shape, shown},
};
use crate::{Error, Result, Tensor};

/// A safetensors file whose header has been checked. Tensors are converted when they are asked for.
///
/// Cloning is cheap, and so is a view on a part of the names ([`Checkpoint::with_prefix`]): both share the bytes.
///
/// # Examples
/// ```
/// use foveate::weights::Checkpoint;
/// let header = br#"{"bias":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
/// let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
/// bytes.extend_from_slice(header);
/// bytes.extend_from_slice(&[0x00, 0x3c, 0x00, 0xc0]); // 1 and -2 in half precision
///
/// let checkpoint = Checkpoint::from_bytes("tiny.safetensors", bytes)?;
/// assert_eq!(checkpoint.shape("bias"), Some(&[2][..]));
/// assert_eq!(checkpoint.tensor("bias")?.data(), [1.0, -2.0]);
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    file: String,
    /// What a view has cut off the front of the names.
    prefix: String,
    bytes: Arc<Bytes>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

/// Where the bytes of a checkpoint live.
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
    Static(&'static [u8]),
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.all().len())
    }
}

impl Bytes {
    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
            Self::Static(bytes) => bytes,
        }
    }
}

/// One tensor of the header.
#[derive(Clone, Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the file.
    range: Range<usize>,
}

impl Checkpoint {
    /// Opens and maps a file. Nothing but the header is read.
    ///
    /// The file must not be changed or shortened by anyone while the checkpoint is in use: its bytes are read from the
    /// file system when a tensor is asked for, and reading a part that has gone stops the process.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses, [`Error::File`] or [`Error::Weights`] when the file is not a sound
    /// safetensors file: what it seems to be instead, or the tensor that is described wrongly.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if metadata.is_dir() {
            return Err(Error::file(name, "is a directory; give the .safetensors file in it"));
        }
        // Opening a pipe would wait for a writer, perhaps for ever.
        if !metadata.is_file() {
            return Err(Error::file(name, "is not a regular file; give a .safetensors file"));
        }
        if metadata.len() == 0 {
            return Err(Error::file(name, "is empty; download or export it again"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only and private to this value. That nobody changes the file meanwhile cannot be
        // enforced; the documentation above asks for it, and no reference into the map outlives a method call.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Self::new(name, Bytes::Mapped(map))
    }

    /// Reads a checkpoint from memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Result<Self> {
        Self::new(name.into(), Bytes::Owned(bytes))
    }

    /// Reads a checkpoint that is part of the program; `name` stands for it in messages.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_static(name: impl Into<String>, bytes: &'static [u8]) -> Result<Self> {
        Self::new(name.into(), Bytes::Static(bytes))
    }

    fn new(file: String, bytes: Bytes) -> Result<Self> {
        let all = bytes.all();
        let header = header::header(all).map_err(|what| Error::file(&file, what))?;
        let start = 8 + header.len();
        let parsed = match SafeTensors::read_metadata(all) {
            Ok((_, parsed)) => parsed,
            Err(refusal) => {
                return Err(match header::diagnose(header, all.len(), &refusal.to_string()) {
                    (Some(tensor), what) => Error::weights(file, shown(&tensor), what),
                    (None, what) => Error::file(file, what),
                });
            }
        };
        if let Some(name) = header::duplicate(header) {
            return Err(Error::weights(file, shown(&name), "is described twice; export the file again"));
        }
        let mut tensors = BTreeMap::new();
        for (name, info) in parsed.tensors() {
            if info.shape.len() > 8 {
                let what = format!("has {} axes; no parameter has more than 8", info.shape.len());
                return Err(Error::weights(file, shown(&name), what));
            }
            let (first, last) = info.data_offsets;
            let entry =
                Entry { dtype: info.dtype, shape: info.shape.clone(), range: start + first..start + last };
            tensors.insert(name, entry);
        }
        let metadata = parsed.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { file, prefix: String::new(), bytes: Arc::new(bytes), metadata, tensors })
    }

    /// A view of the tensors whose names start with `prefix`, under their names without it.
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> Self {
        let tensors = self
            .tensors
            .iter()
            .filter_map(|(name, entry)| Some((name.strip_prefix(prefix)?.to_owned(), entry.clone())))
            .collect();
        Self { prefix: format!("{}{prefix}", self.prefix), tensors, ..self.clone() }
    }

    /// The same without the tensors `names`.
    pub(super) fn without(&self, names: &BTreeSet<String>) -> Self {
        let mut rest = self.clone();
        rest.tensors.retain(|name, _| !names.contains(name));
        rest
    }

    /// The values of tensor `name` where each is one byte.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let entry = self.tensors.get(name).filter(|entry| matches!(entry.dtype, Dtype::U8 | Dtype::BOOL))?;
        self.bytes.all().get(entry.range.clone())
    }

    /// The file, as messages name it.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The extents of tensor `name`, outermost first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| &entry.shape[..])
    }

    /// The storage type of tensor `name` as safetensors spells it: `F32`, `F16`, `BF16`, `I64`, ...
    pub fn dtype(&self, name: &str) -> Option<String> {
        self.tensors.get(name).map(|entry| entry.dtype.to_string())
    }

    /// The bytes that tensor `name` takes in the file.
    pub fn size_bytes(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|entry| entry.range.len())
    }

    /// The file's own notes (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The values of tensor `name`, as f32.
    ///
    /// # Errors
    /// [`Error::Weights`] when there is no such tensor, when it is not stored as F32, F16, BF16 or F64, or when a value
    /// is NaN, infinite or, stored as F64, beyond the range of f32.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(self.error(name, "missing"));
        };
        let bytes = &self.bytes.all()[entry.range.clone()];
        let data = match entry.dtype {
            Dtype::F32 => convert(bytes, f32::from_le_bytes),
            Dtype::F16 => convert(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => convert(bytes, |b| f64::from_le_bytes(b) as f32),
            other => {
                let what =
                    format!("is stored as {other}; parameters must be F32, F16, BF16 or F64, convert it");
                return Err(self.error(name, what));
            }
        };
        if let Some(index) = data.iter().position(|v| !v.is_finite()) {
            let what = format!(
                "holds {} at {} (or a value beyond the range of f32); the checkpoint is damaged",
                data[index],
                shape(&coordinates(index, &entry.shape))
            );
            return Err(self.error(name, what));
        }
        Tensor::new(&entry.shape, data)
    }

    /// An [`Error::Weights`] about tensor `name` of this view, under its name in the file.
    pub(super) fn error(&self, name: &str, what: impl Into<String>) -> Error {
        Error::weights(&self.file, shown(&format!("{}{name}", self.prefix)), what)
    }
}

/// The values of `bytes`, `S` bytes each, in any alignment.
fn convert<const S: usize>(bytes: &[u8], value: impl Fn([u8; S]) -> f32 + Sync) -> Vec<f32> {
    /// Values per task: large enough to hide the cost of a task, small enough to spread one matrix.
    const TASK: usize = 1 << 16;
    let (values, _) = bytes.as_chunks::<S>();
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(TASK).zip(values.par_chunks(TASK)).for_each(|(out, values)| {
        for (o, &v) in out.iter_mut().zip(values) {
            *o = value(v);
        }
    });
    out
}

/// The coordinates of the value with row-major number `index`.
fn coordinates(mut index: usize, extents: &[usize]) -> Vec<usize> {
    let mut out = vec![0; extents.len()];
    for (coordinate, &extent) in out.iter_mut().zip(extents).rev() {
        *coordinate = index % extent;
        index /= extent;
    }
    out
}
