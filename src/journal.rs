//! What observation cannot see, kept in `.store/state/journal.json`.
//!
//! A restart or a restoration owed, the handlers as we last wrote them, the folders that we created, the classes that
//! `rollback` holds, and whether a change still has to clean up after itself. Everything else is found by looking at the node
//! again.
//!
//! Paths in the file are the host's, so that a run in a container and one on the host understand each other; in memory they are as
//! this process sees them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use km_containerd_config::Handler;
use km_containerd_config::transaction::{BoxError, Journal as Owing, Owed};
use km_host::{Root, atomic};
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};

/// The journal's file and what is in it.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    /// The host's root, as this process sees it.
    root: PathBuf,
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

impl Record {
    /// Changes every path in it.
    fn map_paths(&mut self, change: impl Fn(&Path) -> PathBuf) {
        let mut paths: Vec<&mut PathBuf> = Vec::new();
        if let Some(owed) = &mut self.owed {
            paths.extend([&mut owed.path, &mut owed.backup]);
            for other in &mut owed.others {
                paths.extend([&mut other.path, &mut other.backup]);
            }
            paths.extend(&mut owed.made_folders);
        }
        paths.extend(&mut self.config_folders);
        paths.extend(&mut self.store_folders);
        for path in paths {
            *path = change(path);
        }
    }

    /// As it is written: with the host's paths. A path outside the root stays as it is.
    fn for_host(mut self, root: &Path) -> Record {
        self.map_paths(|path| match path.strip_prefix(root) {
            Ok(relative) => Path::new("/").join(relative),
            Err(_) => path.to_owned(),
        });
        self
    }

    /// As this process sees it.
    fn seen_from(mut self, root: &Path) -> Record {
        self.map_paths(|path| root.join(path.strip_prefix("/").unwrap_or(path)));
        self
    }
}

impl Journal {
    /// Reads the journal in a state folder; an absent one is empty.
    pub(crate) fn open(root: &Root, state_dir: &Path) -> Result<Journal> {
        let root = root.path().to_owned();
        let path = state_dir.join("journal.json");
        let record: Record = match std::fs::read(&path) {
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
        let record = record.seen_from(&root);
        Ok(Journal { path, root, record })
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
        let text = serde_json::to_vec_pretty(&record.clone().for_host(&self.root));
        let text = text.context("write the journal")?;
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
        let root = Root::new("/").unwrap();
        let mut journal = Journal::open(&root, dir.path()).unwrap();
        journal.update(|_| {}).unwrap();
        assert!(!dir.path().join("journal.json").exists());
        journal
            .update(|record| record.store_folders.push("/opt/x".into()))
            .unwrap();
        assert_eq!(
            Journal::open(&root, dir.path()).unwrap().record(),
            journal.record()
        );
    }

    #[test]
    fn what_a_container_writes_the_host_reads() {
        let host = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let container = Root::new(host.path()).unwrap();
        let made = container.path().join("opt/x");
        let mut journal = Journal::open(&container, state.path()).unwrap();
        journal
            .update(|record| record.store_folders.push(made.clone()))
            .unwrap();
        let folders = |root: &Root| {
            let journal = Journal::open(root, state.path()).unwrap();
            journal.record().store_folders.clone()
        };
        assert_eq!(folders(&container), [made]);
        assert_eq!(folders(&Root::new("/").unwrap()), [Path::new("/opt/x")]);
    }

    #[test]
    fn a_damaged_one_is_an_error_that_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        atomic::write(&dir.path().join("journal.json"), b"{", 0o600).unwrap();
        let root = Root::new("/").unwrap();
        let error = Journal::open(&root, dir.path()).unwrap_err();
        assert!(format!("{error:#}").contains("move it away"), "{error:#}");
    }
}
