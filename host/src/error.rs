//! The error of every file-system operation: what was tried, where, and the system's answer.

use std::io;
use std::path::{Path, PathBuf};

/// A file-system operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused; `source` has its answer.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried, as a verb phrase: "create folder", "sync".
        operation: &'static str,
        /// On which path, as this process sees it.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// Builds the error of an operation on a path; made for `map_err`.
    pub fn io<E: Into<io::Error>>(
        operation: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io {
            operation,
            path,
            source: source.into(),
        }
    }

    /// The kind of the system's answer.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Error::Io { source, .. } => source.kind(),
        }
    }

    /// The number of the system's answer (errno(3)), where it is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } => source.raw_os_error(),
        }
    }
}
