//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// Everything that can go wrong, as one line that names the thing and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read, map or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is not what its name or its header says: a truncated checkpoint, an impossible header, a broken config.json.
    #[error("{file}: {what}")]
    File {
        /// The file, as the caller named it.
        file: String,
        /// What is wrong with it and what to do.
        what: String,
    },
    /// A tensor of a checkpoint is missing, superfluous, misshapen, of an unusable type, or holds NaN or infinities.
    #[error("{file}: tensor `{tensor}`: {what}")]
    Weights {
        /// The checkpoint.
        file: String,
        /// The tensor's name in that checkpoint.
        tensor: String,
        /// What is wrong and what was expected.
        what: String,
    },
    /// An image cannot be used as a model's input.
    #[error("{file}: {what}")]
    Image {
        /// The image, as the caller named it.
        file: String,
        /// What is wrong with it and what to do.
        what: String,
    },
    /// A reduction specification such as `tome:r=13` is malformed or out of range.
    #[error("reduction `{spec}`: {what}")]
    Spec {
        /// The specification as it was given.
        spec: String,
        /// What is wrong and what is accepted.
        what: String,
    },
    /// An architecture's numbers contradict each other, or the architecture cannot do what was asked of it.
    #[error("{what}")]
    Model {
        /// What is wrong and what to do.
        what: String,
    },
    /// An operation was given an argument of the wrong shape or range.
    #[error("{op}: {what}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// The argument, the value given and the value expected.
        what: String,
    },
    /// The CUDA driver's library is not on this machine.
    #[cfg(feature = "cuda")]
    #[error("there is no CUDA driver: {what}")]
    NoDriver {
        /// Which libraries were looked for.
        what: String,
    },
    /// The CUDA driver refused something other than a launch.
    #[cfg(feature = "cuda")]
    #[error("CUDA: {action}: {what}")]
    Driver {
        /// What was asked of it.
        action: &'static str,
        /// What it answered.
        what: String,
    },
    /// The device has no more memory. It stays usable.
    #[cfg(feature = "cuda")]
    #[error("the device's memory is used up: {what}")]
    OutOfMemory {
        /// How much was asked for; 0 where the driver took it for itself and does not say.
        bytes: usize,
        /// How much there is, and what to do.
        what: String,
        /// The largest batch that would fit, 0 when not even one image would; absent where nobody knows.
        fits: Option<usize>,
    },
    /// A library that comes beside the CUDA driver is not on this machine.
    #[cfg(feature = "cuda")]
    #[error("there is no {library}: {what}")]
    NoLibrary {
        /// The library.
        library: &'static str,
        /// Which files were looked for, or what they lack, and what to do.
        what: String,
    },
    /// cuBLASLt refused a call.
    #[cfg(feature = "cuda")]
    #[error("cuBLASLt: {call}: {what}")]
    Blas {
        /// The function.
        call: &'static str,
        /// What was asked of it, and what it answered.
        what: String,
    },
    /// The embedded kernels cannot run on a device.
    #[cfg(feature = "cuda")]
    #[error("{device}: {what}")]
    Kernels {
        /// The device and its compute capability.
        device: String,
        /// What is wrong, what the binary holds, and what to do.
        what: String,
    },
    /// The CUDA driver refused a launch.
    #[cfg(feature = "cuda")]
    #[error(
        "launch of {kernel} with grid {grid}, block {block} and {shared_bytes} bytes of shared memory: {what}"
    )]
    Launch {
        /// The kernel.
        kernel: String,
        /// Blocks.
        grid: u32,
        /// Threads of a block.
        block: u32,
        /// Dynamic shared memory of a block.
        shared_bytes: u32,
        /// What the driver answered.
        what: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// An [`Error::File`] about `file`.
    pub fn file(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::File { file: file.into(), what: what.into() }
    }

    /// An [`Error::Weights`] about `tensor` of `file`.
    pub fn weights(file: impl Into<String>, tensor: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Weights { file: file.into(), tensor: tensor.into(), what: what.into() }
    }

    /// An [`Error::Image`] about `file`.
    pub fn image(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Image { file: file.into(), what: what.into() }
    }

    /// An [`Error::Spec`] about `spec`.
    pub fn spec(spec: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Spec { spec: spec.into(), what: what.into() }
    }

    /// An [`Error::Model`].
    pub fn model(what: impl Into<String>) -> Self {
        Self::Model { what: what.into() }
    }

    /// An [`Error::Argument`] of operation `op`.
    pub fn argument(op: &'static str, what: impl Into<String>) -> Self {
        Self::Argument { op, what: what.into() }
    }
}
