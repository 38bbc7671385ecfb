//! Making an edit of containerd's configuration live, or putting everything back.
//!
//! The steps, in order: the file still is what the edit was made from; containerd's own reading of the new file is as
//! meant (`check`); what would be owed after a crash is recorded in the caller's [`Journal`]; the old file is backed up
//! with its digest; the new one replaces it in one rename; containerd is restarted, and asked until it reports every
//! wanted handler. If it does not within the deadline, the backup is restored, containerd restarted again, and the error
//! tells both the cause and how the restoration went.
//!
//! containerd reads its configuration only when it starts. It is never sent SIGHUP: that ends it.
//!
//! This module knows no D-Bus and no CRI: the caller's [`Daemon`] does. It does not choose what is written either:
//! [`crate::edit`] does.

mod check;
mod error;
mod files;
mod ready;
mod resume;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use check::copy_path;
pub use error::{Cause, Restoration, RestoreError, TransactionError};
pub use resume::{Resumed, resume};

use crate::digest::Digest;
use crate::edit::Edited;
use crate::handler::Handler;
use crate::live::LiveHandlers;
use ready::Previous;

/// An error of the caller's, at the seam.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The containerd that the configuration belongs to.
pub trait Daemon: Sync {
    /// Restarts it, and returns when the service manager says that the restart is done. Never by SIGHUP.
    fn restart(&self) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// The runtime handlers that it reports (CRI `Status`, verbose; [`LiveHandlers::from_cri_config`]). An error when it
    /// does not answer, or its CRI plugin did not load.
    fn handlers(&self) -> impl Future<Output = Result<LiveHandlers, BoxError>> + Send;

    /// What `containerd --config <config> config dump` of the binary that runs prints; if there is no such file, what
    /// `containerd config default` prints. `config` is a path as this process sees it. `None` when the binary cannot be run
    /// from here; an error when it ran and refused the file.
    fn dump(&self, config: &Path) -> impl Future<Output = Result<Option<String>, BoxError>> + Send;
}

/// Where the caller keeps what would be owed if this process ended now. Each call must be durable when it returns.
pub trait Journal: Send {
    /// The file is about to be written: until [`Journal::settled`], a crash leaves [`Owed`] to be resumed.
    ///
    /// # Errors
    /// When the record cannot be made durable; nothing is changed then.
    fn restoration_owed(&mut self, owed: &Owed) -> Result<(), BoxError>;

    /// containerd is about to be restarted; `owed` replaces the record before.
    ///
    /// # Errors
    /// When the record cannot be made durable.
    fn restart_owed(&mut self, owed: &Owed) -> Result<(), BoxError>;

    /// Nothing is owed any more.
    ///
    /// # Errors
    /// When the record cannot be removed.
    fn settled(&mut self) -> Result<(), BoxError>;
}

/// How far a transaction is, for a progress display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// containerd reads the new file in a dry run.
    Checking,
    /// The dry run was left out: containerd's binary cannot be run from here.
    NotChecked,
    /// The file is backed up and replaced.
    Writing,
    /// containerd is restarted.
    Restarting,
    /// containerd was restarted and is asked until this holds.
    Waiting(String),
    /// It failed; the old file is put back.
    Restoring,
}

/// Receives [`Progress`].
pub type Reporter<'a> = &'a mut (dyn FnMut(Progress) + Send);

/// Whether containerd is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Restart {
    /// It is, when the file changes or a restart is owed.
    IfNeeded,
    /// It is not: the user does that. Nothing is waited for.
    Never,
}

/// How long each step may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Deadlines {
    /// One dry run.
    pub dump: Duration,
    /// One restart. systemd's own limit for stopping and for starting a unit is 90 s each (`DefaultTimeoutStartSec`).
    pub restart: Duration,
    /// From a restart until every handler is live.
    pub ready: Duration,
    /// One question to containerd.
    pub answer: Duration,
}

impl Default for Deadlines {
    fn default() -> Deadlines {
        Deadlines {
            dump: Duration::from_secs(30),
            restart: Duration::from_secs(180),
            ready: Duration::from_secs(60),
            answer: Duration::from_secs(10),
        }
    }
}

/// A file beside the main one that a change writes or removes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherFile {
    /// The file, with no symlink left to follow outside the host's root.
    pub path: PathBuf,
    /// The bytes that the edit was made from; `None` if there was no file.
    pub before: Option<Vec<u8>>,
    /// The bytes to write; `None` to remove the file.
    pub after: Option<Vec<u8>>,
    /// Where the old bytes are kept.
    pub backup: PathBuf,
}

/// What containerd is to read in a dry run, where that is more than the new main file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DryRun {
    /// The main file as it is to be, importing copies in place of files that are not written yet.
    pub main: Vec<u8>,
    /// The copies: files beside the main one, and what is put into them while the dry run lasts.
    pub copies: Vec<(PathBuf, Vec<u8>)>,
}

/// The handlers that the files say are in force, by our reading of them: containerd's own must be the same.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Understood {
    /// Before the change.
    pub now: Vec<String>,
    /// After it.
    pub then: Vec<String>,
}

/// A change of containerd's configuration. Paths are as this process sees them.
#[derive(Debug, Clone)]
pub struct Change {
    /// The main file, with no symlink left to follow outside the host's root. It may stay as it is.
    pub path: PathBuf,
    /// Other files that change with it. All of them are written, or none: those that come into being or change are written
    /// before the main file, those that go are removed after it.
    pub others: Vec<OtherFile>,
    /// What the dry run reads; `None` for the new main file.
    pub dry_run: Option<DryRun>,
    /// What is in force by our own reading; `None` to compare nothing.
    pub understood: Option<Understood>,
    /// The path that containerd is told, if a symlink leads to `path`: relative imports count from its folder, so the dry
    /// run's copy is put there.
    pub told_path: Option<PathBuf>,
    /// The bytes that the edit was made from; `None` if there was no file.
    pub before: Option<Vec<u8>>,
    /// The bytes to write; `None` to remove the file.
    pub after: Option<Vec<u8>>,
    /// Handlers that must be live afterwards, as written.
    pub want_live: Vec<Handler>,
    /// Names of handlers of ours that must be gone afterwards ([`crate::edit::Edited::gone`]).
    pub want_gone: Vec<String>,
    /// Names of adopted handlers that the edit gives back ([`crate::edit::Edited::given_back`]): live afterwards, as
    /// whatever their owner wrote.
    pub given_back: Vec<String>,
    /// Defaults of containerd that the edit writes out or takes out again ([`crate::edit::Edited::restated`]).
    pub restated: Vec<String>,
    /// Settings of the CRI plugin that the edit writes or takes out: keys whose values may differ afterwards.
    pub settings: Vec<String>,
    /// Where the old bytes are kept. Never removed by the transaction.
    pub backup: PathBuf,
    /// Whether containerd is restarted.
    pub restart: Restart,
    /// Go on though containerd would read other settings of the file differently afterwards. Only for someone who has seen
    /// which: [`TransactionError::ValidationFailed`] lists them.
    pub accept_other_settings: bool,
    /// A restart is owed although the file may be right already: it was changed without one.
    pub restart_owed: bool,
    /// Folders that we once made for the file, outermost first: removed with it when empty.
    pub made_folders: Vec<PathBuf>,
    /// How long each step may take.
    pub deadlines: Deadlines,
}

impl Change {
    /// The change that an edit stands for, with containerd restarted if needed and the default deadlines.
    ///
    /// `before` is the file as it was read for the edit, and `want_live` the handlers that were wanted. The backup is written
    /// to `backup`.
    pub fn from_edit(
        path: PathBuf,
        before: Option<Vec<u8>>,
        edited: &Edited,
        want_live: Vec<Handler>,
        backup: PathBuf,
    ) -> Change {
        Change {
            path,
            others: Vec::new(),
            dry_run: None,
            understood: None,
            told_path: None,
            before,
            after: (!edited.remove_file).then(|| edited.text.clone().into_bytes()),
            want_live,
            want_gone: edited.gone(),
            given_back: edited.given_back.clone(),
            restated: edited.restated.clone(),
            settings: Vec::new(),
            backup,
            restart: Restart::IfNeeded,
            accept_other_settings: false,
            restart_owed: false,
            made_folders: Vec::new(),
            deadlines: Deadlines::default(),
        }
    }

    /// Whether any file changes.
    fn differs(&self) -> bool {
        self.before != self.after || self.others.iter().any(|file| file.before != file.after)
    }
}

/// A file of [`Owed`] beside the main one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwedFile {
    /// The file.
    pub path: PathBuf,
    /// Digest of the bytes before; `None` if there was no file.
    pub before: Option<Digest>,
    /// Digest of the bytes that were to be written; `None` if the file was to be removed.
    pub after: Option<Digest>,
    /// The copy of the bytes before.
    pub backup: PathBuf,
}

/// What a crash leaves to be done. Only what cannot be observed; see [`resume`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owed {
    /// The configuration.
    pub path: PathBuf,
    /// Digest of the bytes before; `None` if there was no file.
    pub before: Option<Digest>,
    /// Digest of the bytes that were to be written; `None` if the file was to be removed.
    pub after: Option<Digest>,
    /// The copy of the bytes before.
    pub backup: PathBuf,
    /// The other files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<OwedFile>,
    /// Handlers that were to be live.
    pub want_live: Vec<Handler>,
    /// Handlers that were to be gone.
    pub want_gone: Vec<String>,
    /// Handlers of others that were to be back.
    pub given_back: Vec<String>,
    /// Handlers that were live before, if containerd answered.
    pub live_before: Option<Vec<String>>,
    /// Folders that were made for the file, outermost first.
    pub made_folders: Vec<PathBuf>,
    /// containerd is not restarted by us.
    pub restart: Restart,
    /// A restart had begun, or was about to.
    pub restarting: bool,
    /// How long each step may take.
    pub deadlines: Deadlines,
}

/// What a transaction did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing: the file is as wanted and no restart is owed.
    Unchanged,
    /// The file is as wanted, containerd was restarted, and the handlers are live.
    Live {
        /// The file was written or removed.
        written: bool,
        /// Folders that were made for the file, outermost first.
        made_folders: Vec<PathBuf>,
    },
    /// The file was written or removed; containerd was not restarted, because [`Restart::Never`] says so.
    Written {
        /// Folders that were made for the file, outermost first.
        made_folders: Vec<PathBuf>,
    },
}

/// Carries a change out. See the module's text for the steps.
///
/// # Errors
/// [`TransactionError`]; where something had been written, it says whether the node is as it was before.
pub async fn run<D: Daemon>(
    change: &Change,
    daemon: &D,
    journal: &mut dyn Journal,
    report: Reporter<'_>,
) -> Result<Outcome, TransactionError> {
    files::require_unchanged(change)?;
    let differs = change.differs();
    let restart = change.restart == Restart::IfNeeded;
    let restart_owed = restart && change.restart_owed;
    if !differs && !restart_owed {
        return Ok(Outcome::Unchanged);
    }
    let previous = ready::previous(daemon, change).await?;
    if differs {
        check::check(change, daemon, report).await?;
        files::require_unchanged(change)?;
    }
    let mut owed = record(change, &previous);
    journal
        .restoration_owed(&owed)
        .map_err(TransactionError::Journal)?;
    if differs {
        report(Progress::Writing);
        if let Err(error) = files::write(change, &mut owed, journal) {
            return Err(give_up(&owed, journal, error));
        }
    }
    if !restart {
        journal.settled().map_err(TransactionError::Journal)?;
        return Ok(Outcome::Written {
            made_folders: owed.made_folders,
        });
    }
    finish(&mut owed, daemon, journal, report).await?;
    Ok(Outcome::Live {
        written: differs,
        made_folders: owed.made_folders,
    })
}

/// Settles a write that failed, if the file is as it was; else what is owed stays in the journal.
fn give_up(owed: &Owed, journal: &mut dyn Journal, error: TransactionError) -> TransactionError {
    let undone =
        files::restore(owed).and_then(|()| journal.settled().map_err(RestoreError::Journal));
    match undone {
        Ok(()) => error,
        Err(undo) => TransactionError::HalfWritten {
            cause: Box::new(error),
            restoration: Restoration::Failed(Box::new(undo)),
        },
    }
}

/// Removes what a process that was killed may have left beside the configuration. `path` is the one that containerd is
/// told, if that is another.
///
/// # Errors
/// When something is there and cannot be removed.
pub fn remove_leftovers(path: &Path) -> Result<(), km_host::Error> {
    let copy = copy_path(path);
    for path in [path, copy.as_path()] {
        km_host::atomic::remove_leftover(path)?;
    }
    km_host::atomic::remove_file(&copy)
}

fn record(change: &Change, previous: &Previous) -> Owed {
    Owed {
        path: change.path.clone(),
        before: change.before.as_deref().map(Digest::of),
        after: change.after.as_deref().map(Digest::of),
        backup: change.backup.clone(),
        others: change.others.iter().map(owed_file).collect(),
        want_live: change.want_live.clone(),
        want_gone: change.want_gone.clone(),
        given_back: change.given_back.clone(),
        live_before: previous.as_ref().map(LiveHandlers::names),
        made_folders: change.made_folders.clone(),
        restart: change.restart,
        restarting: false,
        deadlines: change.deadlines,
    }
}

fn owed_file(file: &OtherFile) -> OwedFile {
    OwedFile {
        path: file.path.clone(),
        before: file.before.as_deref().map(Digest::of),
        after: file.after.as_deref().map(Digest::of),
        backup: file.backup.clone(),
    }
}

/// Restarts, waits, settles; or rolls back and tells why.
async fn finish<D: Daemon>(
    owed: &mut Owed,
    daemon: &D,
    journal: &mut dyn Journal,
    report: Reporter<'_>,
) -> Result<(), TransactionError> {
    let cause = match restart_and_wait(owed, daemon, journal, report).await {
        Ok(()) => return journal.settled().map_err(TransactionError::Journal),
        Err(cause) => cause,
    };
    tracing::warn!(%cause, "containerd did not take the new configuration: restoring the old one");
    report(Progress::Restoring);
    let restoration = match resume::restore(owed, daemon, journal).await {
        Ok(()) => Restoration::Done,
        Err(error) => Restoration::Failed(Box::new(error)),
    };
    Err(TransactionError::RolledBack { cause, restoration })
}

async fn restart_and_wait<D: Daemon>(
    owed: &mut Owed,
    daemon: &D,
    journal: &mut dyn Journal,
    report: Reporter<'_>,
) -> Result<(), Cause> {
    owed.restarting = true;
    journal.restart_owed(owed).map_err(Cause::Journal)?;
    report(Progress::Restarting);
    ready::restart(daemon, &owed.deadlines)
        .await
        .map_err(Cause::RestartFailed)?;
    ready::wait_live(owed, daemon, report).await
}
