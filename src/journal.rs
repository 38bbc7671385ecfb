//! What observation cannot see, kept in `.store/state/journal.json`.
//!
//! A restart or a restoration owed, the handlers as we last wrote them, the folders that we created, the classes that
//! `rollback` holds, and whether a change still has to clean up after itself. Everything else is found by looking at the node
//! again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use km_containerd_config::Handler;
use km_containerd_config::transaction::{BoxError, Journal as Owing, Owed};
use km_host::atomic;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};

/// The journal's file and what is in it.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    record: Record,
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Record {
    /// An unfinished transaction on containerd's configuration.
    pub(crate) owed: Option<Owed>,
    /// The handlers as we last wrote them.
    pub(crate) handlers: Vec<Handler>,
    /// Folders that we made for containerd's configuration, outermost first.
    pub(crate) config_folders: Vec<PathBuf>,
    /// Folders that we made for the store, outermost first.
    pub(crate) store_folders: Vec<PathBuf>,
    /// Classes that `rollback` holds at a generation: `apply` does not move them.
    pub(crate) held: BTreeMap<String, u64>,
    /// Classes moved, and what they left behind has not been removed yet.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) collect: bool,
}

impl Journal {
    /// Reads the journal in a state folder; an absent one is empty.
    pub(crate) fn open(state_dir: &Path) -> Result<Journal> {
        let path = state_dir.join("journal.json");
        let record = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let message = format!(
                    "the journal {} cannot be read; it is written by rename, so something else changed it: move it away to go on \
                     without what it remembers",
                    path.display()
                );
                Failure::because(Kind::Host, message, error)
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Record::default(),
            Err(error) => return Err(km_host::Error::io("read", &path)(error).into()),
        };
        Ok(Journal { path, record })
    }

    /// What it says.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Changes it, and writes it if that made a difference.
    pub(crate) fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut record = self.record.clone();
        change(&mut record);
        if record == self.record {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(&record).context("write the journal")?;
        atomic::write(&self.path, &text, 0o600)?;
        self.record = record;
        Ok(())
    }
}

impl Owing for Journal {
    fn restoration_owed(&mut self, owed: &Owed) -> Result<(), BoxError> {
        Ok(self.update(|record| record.owed = Some(owed.clone()))?)
    }

    fn restart_owed(&mut self, owed: &Owed) -> Result<(), BoxError> {
        Ok(self.update(|record| record.owed = Some(owed.clone()))?)
    }

    fn settled(&mut self) -> Result<(), BoxError> {
        // What was to be live is now what we wrote.
        Ok(self.update(|record| {
            if let Some(owed) = record.owed.take() {
                record.config_folders = owed.made_folders;
            }
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_only_when_something_changed_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.update(|_| {}).unwrap();
        assert!(!dir.path().join("journal.json").exists());
        journal
            .update(|record| record.store_folders.push("/opt/x".into()))
            .unwrap();
        assert_eq!(
            Journal::open(dir.path()).unwrap().record(),
            journal.record()
        );
    }

    #[test]
    fn a_damaged_one_is_an_error_that_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        atomic::write(&dir.path().join("journal.json"), b"{", 0o600).unwrap();
        let error = Journal::open(dir.path()).unwrap_err();
        assert!(format!("{error:#}").contains("move it away"), "{error:#}");
    }
}
