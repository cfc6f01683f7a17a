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

/// Reads `paths`, through a transform to a height and width, in batches of `size` images and hands each to `work`. At most one batch is in memory; decoding runs on
/// all threads. Images that cannot be used are reported on stderr at once, left out, and returned.
pub(crate) fn for_each_batch(
    paths: &[PathBuf],
    input: (&Transform, [usize; 2]),
    size: usize,
    mut work: impl FnMut(Batch, &Progress) -> Result<(), Failure>,
) -> Result<Vec<Rejected>, Failure> {
    let progress = Progress::bar(paths.len(), "images");
    let mut rejected = Vec::new();
    for chunk in paths.chunks(size) {
        let read: Vec<_> = chunk.par_iter().map(|path| prepare(path, input)).collect();
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
                    progress.complain(&error);
                    rejected.push(Rejected { name, error });
                }
            }
        }
        if !pictures.is_empty() {
            let images = batch(&pictures)?;
            work(Batch { names, pictures, images }, &progress)?;
        }
        progress.advance(chunk.len());
    }
    progress.finish();
    Ok(rejected)
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
