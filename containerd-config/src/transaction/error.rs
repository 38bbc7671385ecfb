//! Why a transaction was refused or rolled back.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::BoxError;

/// A transaction that did not end as meant.
#[derive(Debug, thiserror::Error)]
pub enum TransactionError {
    /// The file is not what the edit was made from. Nothing was changed.
    #[error("{} was changed by someone else since the plan was made; nothing was written. Plan again", path.display())]
    Stale {
        /// The file.
        path: PathBuf,
    },
    /// containerd does not answer, so it could not be seen whether the change is good. Nothing was changed.
    #[error(
        "containerd does not answer, so a change of its configuration could not be verified; nothing was written. \
         Start it and try again, or choose the restart mode `none` to write only"
    )]
    NotRunning {
        /// Its answer, or the lack of one.
        source: BoxError,
    },
    /// containerd's own reading of the new file is not as meant. Nothing was changed.
    #[error("containerd would not read the new {} as meant; nothing was written: {problem}", path.display())]
    ValidationFailed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What containerd said, if it refused.
        source: Option<BoxError>,
    },
    /// A file operation failed before the configuration was touched, or while it was replaced, which is all or nothing.
    #[error("the configuration of containerd was not changed")]
    Host(#[from] km_host::Error),
    /// The record of what is owed could not be written.
    #[error("the journal cannot be written")]
    Journal(#[source] BoxError),
    /// The backup does not read back as it was written. Nothing was changed.
    #[error("the backup {} does not read back as it was written; the configuration was not changed", path.display())]
    BadBackup {
        /// The backup.
        path: PathBuf,
    },
    /// Replacing the file failed part way.
    #[error("replacing the configuration of containerd failed part way. {restoration}")]
    HalfWritten {
        /// What failed.
        #[source]
        cause: Box<TransactionError>,
        /// How the way back went.
        restoration: Restoration,
    },
    /// An earlier, interrupted change could not be taken back.
    #[error(
        "an earlier change of containerd's configuration was interrupted and could not be taken back"
    )]
    NotRestored(#[source] Box<RestoreError>),
    /// containerd did not take the new configuration; `restoration` says whether the old one is back.
    #[error("containerd did not take its new configuration. {restoration}")]
    RolledBack {
        /// Why.
        #[source]
        cause: Cause,
        /// How the way back went.
        restoration: Restoration,
    },
}

/// Why a written configuration was given up.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// containerd could not be restarted.
    #[error("containerd could not be restarted")]
    RestartFailed(#[source] BoxError),
    /// It was restarted, but the handlers were not as wanted in time.
    #[error(
        "after the restart containerd was not as wanted within {} s: {problem}",
        waited.as_secs()
    )]
    NotLive {
        /// Which handlers were missing, different, or still there, or that it did not answer.
        problem: String,
        /// How long it was asked.
        waited: Duration,
        /// Its last answer, if that was an error.
        source: Option<BoxError>,
    },
    /// The record of what is owed could not be written, so nothing was restarted.
    #[error("the journal cannot be written")]
    Journal(#[source] BoxError),
}

/// How a restoration ended.
#[derive(Debug)]
pub enum Restoration {
    /// The old file is back, and the handlers that were live before are live again.
    Done,
    /// It is not all back.
    Failed(Box<RestoreError>),
}

impl fmt::Display for Restoration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Restoration::Done => f.write_str(
                "The old configuration was restored, and the handlers from before are live again",
            ),
            Restoration::Failed(error) => {
                // This error is nobody's source: its whole chain is told here.
                write!(f, "Restoring the old configuration FAILED too: {error}")?;
                let mut source = std::error::Error::source(error.as_ref());
                while let Some(error) = source {
                    write!(f, ": {error}")?;
                    source = error.source();
                }
                Ok(())
            }
        }
    }
}

/// Why a restoration failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Someone else changed the file in the meantime; their bytes are left alone.
    #[error("{} was changed by someone else in the meantime and is left as it is; the bytes from before are in {}", path.display(), backup.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// The copy of the bytes from before.
        backup: PathBuf,
    },
    /// The copy of the old bytes is gone or damaged.
    #[error("the backup {} is not what was backed up; the configuration is left as it is", backup.display())]
    BadBackup {
        /// The copy.
        backup: PathBuf,
    },
    /// A file operation failed.
    #[error("the old file cannot be put back")]
    Host(#[from] km_host::Error),
    /// The old file is back, but containerd could not be restarted with it.
    #[error("the old file is back, but containerd could not be restarted: restart it by hand")]
    Restart(#[source] BoxError),
    /// The old file is back and containerd restarted, but it is not as before.
    #[error(
        "the old file is back and containerd was restarted, but within {} s it was not as before: {problem}",
        waited.as_secs()
    )]
    NotBack {
        /// What is missing.
        problem: String,
        /// How long it was asked.
        waited: Duration,
        /// Its last answer, if that was an error.
        source: Option<BoxError>,
    },
    /// Everything is back, but the journal still says otherwise.
    #[error("everything is back, but the journal cannot be settled")]
    Journal(#[source] BoxError),
}
