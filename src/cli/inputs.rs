//! Image arguments: files, globs and folders become batches of model inputs.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use foveate::{
    Error, Images,
    image::{Picture, Transform, batch, load},
};
use rayon::prelude::*;

use super::{
    failure::{Failure, one_line},
    progress::Progress,
};

/// Endings by which image files in a folder are recognised; what a file named outright holds, its content tells.
const ENDINGS: [&str; 16] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ico", "pnm", "pbm", "pgm",
    "ppm", "qoi",
];

/// The files that the arguments name, in their order; folders and globs sorted by name.
pub(crate) fn expand(arguments: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut paths = Vec::new();
    for argument in arguments {
        if argument.is_dir() {
            paths.extend(folder(argument)?);
        } else if let (false, Some(pattern)) = (argument.exists(), pattern(argument)) {
            paths.extend(matches(pattern)?);
        } else {
            // What is not there is reported with the images that cannot be read.
            paths.push(argument.clone());
        }
    }
    Ok(paths)
}

/// The image files in a folder, not those in folders below it.
fn folder(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let ending = path.extension().map(OsStr::to_ascii_lowercase);
        let known = ending.is_some_and(|ending| ENDINGS.iter().any(|known| ending == *known));
        if known && !hidden && path.is_file() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(Failure::Input(format!(
            "{}: no image files in this folder (folders below it are not searched; use a pattern such as '{}')",
            folder.display(),
            folder.join("*").join("*.jpg").display()
        )));
    }
    paths.sort();
    Ok(paths)
}

/// The argument as a glob pattern, if it looks like one.
fn pattern(argument: &Path) -> Option<&str> {
    argument.to_str().filter(|text| text.contains(['*', '?', '[']))
}

fn matches(pattern: &str) -> Result<Vec<PathBuf>, Failure> {
    let found = glob::glob(pattern).map_err(|e| Failure::Input(format!("{pattern}: {e}")))?;
    let mut paths = Vec::new();
    for path in found {
        let path = path.map_err(|e| Failure::Input(format!("{}: {}", e.path().display(), e.error())))?;
        if !path.is_dir() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(Failure::Input(format!("{pattern}: no file matches this pattern")));
    }
    Ok(paths)
}

/// Images ready for the model.
pub(crate) struct Batch {
    /// The files as they were named.
    pub(crate) names: Vec<String>,
    /// The model's input, in 8 bits.
    pub(crate) pictures: Vec<Picture>,
    /// The same as a batch.
    pub(crate) images: Images,
}

/// An image that could not be used.
pub(crate) struct Rejected {
    /// The file as it was named.
    pub(crate) name: String,
    /// Why.
    pub(crate) error: String,
}

/// Files as batches of inputs: at most the one that is handed out is in memory. Decoding runs on all threads. Images that cannot
/// be used are reported on stderr at once, left out, and kept in `rejected`.
pub(crate) struct Batches<'a> {
    paths: std::slice::Chunks<'a, PathBuf>,
    size: usize,
    input: (&'a Transform, [usize; 2]),
    progress: &'a Progress,
    /// Files of the batch that was handed out last.
    out: usize,
    /// What could not be used so far.
    pub(crate) rejected: Vec<Rejected>,
}

impl<'a> Batches<'a> {
    /// `paths`, through a transform to a height and width, `size` at a time.
    pub(crate) fn new(
        paths: &'a [PathBuf],
        input: (&'a Transform, [usize; 2]),
        size: usize,
        progress: &'a Progress,
    ) -> Self {
        Self { paths: paths.chunks(size), size, input, progress, out: 0, rejected: Vec::new() }
    }

    /// Images at a time, at most.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Batches still to come, at most.
    pub(crate) fn expected(&self) -> usize {
        self.paths.len()
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<Batch, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.progress.advance(std::mem::take(&mut self.out));
            let chunk = self.paths.next()?;
            self.out = chunk.len();
            let read: Vec<_> = chunk.par_iter().map(|path| prepare(path, self.input)).collect();
            let (mut names, mut pictures) = (Vec::new(), Vec::new());
            for (path, outcome) in chunk.iter().zip(read) {
                let name = path.display().to_string();
                match outcome {
                    Ok(picture) => {
                        names.push(name);
                        pictures.push(picture);
                    }
                    Err(error) => {
                        let error = one_line(&error.to_string());
                        self.progress.complain(&error);
                        self.rejected.push(Rejected { name, error });
                    }
                }
            }
            if !pictures.is_empty() {
                let images = batch(&pictures).map_err(Failure::from);
                return Some(images.map(|images| Batch { names, pictures, images }));
            }
        }
    }
}

/// One file as the model's input.
fn prepare(path: &Path, (transform, size): (&Transform, [usize; 2])) -> Result<Picture, Error> {
    let picture = load(path)?;
    // Whatever the transform refuses, it refuses because of this picture.
    transform.apply(&picture, size).map_err(|e| Error::image(path.display().to_string(), e.to_string()))
}

/// Ends a command that has reported the images it could not use.
pub(crate) fn verdict(rejected: &[Rejected]) -> Result<(), Failure> {
    if rejected.is_empty() { Ok(()) } else { Err(Failure::Reported) }
}
