//! Compiled kernels, kept in the target folder for builds with other features and profiles: each has a folder of its own to
//! build in, but the same kernels.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process,
    time::SystemTime,
};

/// Images kept of one kernel file: the lists of architectures that one works with, and a few older states.
const KEPT: usize = 8;

/// Where images are kept, if anywhere. What fails here costs a compilation and nothing else.
pub(crate) struct Cache {
    folder: Option<PathBuf>,
    /// Of all that every kernel depends on.
    common: u64,
}

impl Cache {
    /// The cache of the target folder around `out`, for kernels that are compiled in this way with these headers.
    pub(crate) fn around(out: &Path, way: &str, include: &Path) -> Self {
        let target = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
        let mut hasher = DefaultHasher::new();
        way.hash(&mut hasher);
        let read = hash_folder(include, &mut hasher);
        let folder = target.filter(|_| read.is_ok()).map(|target| target.join("foveate-kernels"));
        Self { folder, common: hasher.finish() }
    }

    /// The place of an image.
    pub(crate) fn place(&self, name: &str, source: &Path) -> Option<PathBuf> {
        let folder = self.folder.as_ref()?;
        let mut hasher = DefaultHasher::new();
        (self.common, fs::read(source).ok()?).hash(&mut hasher);
        // The compiler writes the path beside the lines of the source.
        source.hash(&mut hasher);
        Some(folder.join(format!("{name}-{:016x}", hasher.finish())))
    }

    /// Copies an image and the list of its dependencies out of their place; whether they were there.
    pub(crate) fn fetch(place: &Path, image: &Path, dependencies: &Path) -> bool {
        [(image, "fatbin"), (dependencies, "d")]
            .into_iter()
            .all(|(to, ending)| fs::copy(place.with_extension(ending), to).is_ok())
    }

    /// Copies them there, the image last: where it is, both are.
    pub(crate) fn keep(place: &Path, image: &Path, dependencies: &Path) {
        let Some(folder) = place.parent() else { return };
        let _ = fs::create_dir_all(folder);
        for (from, ending) in [(dependencies, "d"), (image, "fatbin")] {
            // Another build may be at it: nothing is there before it is whole.
            let part = place.with_extension(format!("{}.part", process::id()));
            if fs::copy(from, &part).and_then(|_| fs::rename(&part, place.with_extension(ending))).is_err() {
                let _ = fs::remove_file(&part);
                return;
            }
        }
        drop_oldest(folder, place);
    }
}

fn hash_folder(folder: &Path, hasher: &mut DefaultHasher) -> std::io::Result<()> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    files.sort();
    for file in files {
        (&file, fs::read(&file)?).hash(hasher);
    }
    Ok(())
}

/// Removes the oldest images of the kernel file at `place` beyond [`KEPT`].
fn drop_oldest(folder: &Path, place: &Path) {
    let kernel = |path: &Path| {
        let stem = path.file_stem()?.to_str()?;
        Some(stem.rsplit_once('-')?.0.to_owned())
    };
    let (Some(wanted), Ok(entries)) = (kernel(place), fs::read_dir(folder)) else { return };
    let mut images: Vec<(SystemTime, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let counts = path.extension()? == "fatbin" && kernel(&path)? == wanted;
            Some((fs::metadata(&path).and_then(|data| data.modified()).ok()?, path)).filter(|_| counts)
        })
        .collect();
    images.sort();
    let surplus = images.len().saturating_sub(KEPT);
    for (_, image) in images.into_iter().take(surplus) {
        let _ = fs::remove_file(&image);
        let _ = fs::remove_file(image.with_extension("d"));
    }
}
