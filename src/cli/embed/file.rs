//! A safetensors file that grows image by image: however many images there are, one batch is in memory.
//!
//! Room for the header and for every tensor is set aside for all images. Images that turn out to be unusable leave room
//! over at the end of each tensor; then the tensors behind it (small ones, the largest comes first) are moved up.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use foveate::Error;
use serde_json::{Map, Value, json};

use crate::cli::failure::Failure;

/// The longest header that readers accept.
const LONGEST_HEADER: usize = 100_000_000;

/// One tensor of the file.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Its name.
    pub(super) name: &'static str,
    /// Its shape behind the image axis.
    pub(super) shape: Vec<usize>,
    integers: bool,
}

impl Part {
    /// A tensor of `f32` values.
    pub(super) fn new(name: &'static str, shape: Vec<usize>) -> Self {
        Self { name, shape, integers: false }
    }

    /// A tensor of `i32` values.
    pub(super) fn integers(name: &'static str, shape: Vec<usize>) -> Self {
        Self { name, shape, integers: true }
    }

    /// What safetensors calls the type of its values.
    pub(super) fn dtype(&self) -> &'static str {
        if self.integers { "I32" } else { "F32" }
    }

    /// Bytes for one image.
    fn bytes(&self) -> u64 {
        4 * self.shape.iter().product::<usize>() as u64
    }
}

/// Values of one tensor.
pub(super) enum Values {
    Floats(Vec<f32>),
    Integers(Vec<i32>),
}

impl Values {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Floats(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Integers(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// The file while it is being written, under a name of its own; [`EmbeddingFile::finish`] gives it the final one.
pub(super) struct EmbeddingFile {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    /// Bytes before the first tensor.
    start: u64,
    /// Images there is room for.
    room: u64,
    parts: Vec<Part>,
    /// Bytes written of each tensor.
    written: Vec<u64>,
    finished: bool,
}

impl EmbeddingFile {
    /// Sets a file aside for `room` images; `notes` is the longest `__metadata__` there will be.
    pub(super) fn create(path: &Path, parts: Vec<Part>, room: usize, notes: &Value) -> Result<Self, Failure> {
        let header = header(&parts, room, notes).to_string();
        // Tensors begin at a multiple of 8.
        let start = (8 + header.len()).next_multiple_of(8);
        if start - 8 > LONGEST_HEADER {
            return Err(Failure::input(format!(
                "{room} images are too many for one safetensors file: their names alone take more than 100 MB"
            )));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let open = File::options().read(true).write(true).create(true).truncate(true).open(&partial);
        let file = open.map_err(|e| Error::io(path, e))?;
        let written = vec![0; parts.len()];
        let (path, room) = (path.to_owned(), room as u64);
        Ok(Self { path, partial, file, start: start as u64, room, parts, written, finished: false })
    }

    /// Appends the values of some images to tensor `name`.
    pub(super) fn write(&mut self, name: &str, values: &Values) -> Result<(), Failure> {
        let Some(index) = self.parts.iter().position(|part| part.name == name) else {
            return Err(Failure::Other(format!("no tensor is called {name}")));
        };
        let bytes = values.to_bytes();
        let at = self.offset(index, self.room) + self.written[index];
        self.written[index] += bytes.len() as u64;
        let file = &mut self.file;
        let written = file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&bytes));
        Ok(written.map_err(|e| Error::io(&self.path, e))?)
    }

    /// Closes gaps, writes the header for `images` images and names the file. Returns the tensors and their shapes.
    pub(super) fn finish(mut self, images: usize, notes: &Value) -> Result<Vec<(Part, Vec<usize>)>, Failure> {
        self.complete(images, notes).map_err(|e| Error::io(&self.path, e))?;
        self.finished = true;
        let shape = |part: &Part| [&[images], &part.shape[..]].concat();
        Ok(self.parts.iter().map(|part| (part.clone(), shape(part))).collect())
    }

    fn complete(&mut self, images: usize, notes: &Value) -> io::Result<()> {
        let count = images as u64;
        for (index, part) in self.parts.iter().enumerate() {
            if self.written[index] != count * part.bytes() {
                return Err(io::Error::other(format!("tensor {} is incomplete", part.name)));
            }
            let (from, to) = (self.offset(index, self.room), self.offset(index, count));
            shift(&mut self.file, from, to, self.written[index])?;
        }
        let end = self.offset(self.parts.len(), count);
        let mut text = header(&self.parts, images, notes).to_string();
        let room = usize::try_from(self.start - 8).map_err(io::Error::other)?;
        text.extend(std::iter::repeat_n(' ', room.saturating_sub(text.len())));
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&(text.len() as u64).to_le_bytes())?;
        self.file.write_all(text.as_bytes())?;
        self.file.set_len(end)?;
        self.file.flush()?;
        fs::rename(&self.partial, &self.path)
    }

    /// Where tensor `index` begins when the file has `images` images.
    fn offset(&self, index: usize, images: u64) -> u64 {
        self.start + self.parts[..index].iter().map(|part| part.bytes() * images).sum::<u64>()
    }
}

impl Drop for EmbeddingFile {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// The header of a file with `images` images.
fn header(parts: &[Part], images: usize, notes: &Value) -> Value {
    let mut map = Map::new();
    map.insert("__metadata__".to_owned(), notes.clone());
    let mut offset = 0;
    for part in parts {
        let end = offset + part.bytes() * images as u64;
        let shape = [&[images], &part.shape[..]].concat();
        map.insert(
            part.name.to_owned(),
            json!({"dtype": part.dtype(), "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    Value::Object(map)
}

/// Moves `length` bytes towards the front of the file.
fn shift(file: &mut File, from: u64, to: u64, length: u64) -> io::Result<()> {
    if from == to {
        return Ok(());
    }
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < length {
        let piece = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
        file.seek(SeekFrom::Start(from + done))?;
        file.read_exact(&mut buffer[..piece])?;
        file.seek(SeekFrom::Start(to + done))?;
        file.write_all(&buffer[..piece])?;
        done += piece as u64;
    }
    Ok(())
}
