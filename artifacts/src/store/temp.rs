//! Unfinished things: one folder for each process's lifetime below `.store/tmp`, swept by the next holder of the lock.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use km_host::{Error as HostError, atomic};

use super::{DIR_MODE, Store, names};
use crate::error::Result;

/// This process's folder name. Process ids repeat (a container's first process is always 1), so it is random.
fn session() -> &'static str {
    static SESSION: OnceLock<String> = OnceLock::new();
    SESSION.get_or_init(|| {
        let random = RandomState::new().build_hasher().finish();
        format!("{random:016x}-{}", std::process::id())
    })
}

impl Store {
    /// A path in this process's temporary folder that nothing has yet. `what` helps whoever looks.
    pub(crate) fn temp_path(&self, what: &str) -> Result<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let dir = self.under("tmp").join(session());
        atomic::create_dir_all(&dir, 0o700)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(dir.join(format!("{number}-{what}")))
    }

    /// A new empty temporary file, removed when dropped.
    pub(crate) fn temp_file(&self, what: &str) -> Result<(File, TempFile)> {
        let path = self.temp_path(what)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(HostError::io("create", &path))?;
        Ok((file, TempFile { path }))
    }

    /// A new empty temporary folder; the caller renames or removes it.
    pub(super) fn temp_dir(&self, what: &str) -> Result<PathBuf> {
        let path = self.temp_path(what)?;
        atomic::create_dir_all(&path, DIR_MODE)?;
        Ok(path)
    }

    /// Removes a folder in one step as far as anyone sees: by renaming it away first.
    pub(super) fn remove_at_once(&self, dir: &Path) -> Result<()> {
        if super::look(dir)?.is_none() {
            return Ok(());
        }
        let away = self.temp_path("removed")?;
        atomic::rename(dir, &away)?;
        Ok(atomic::remove_dir_all(&away)?)
    }

    /// Removes this process's temporary folder if nothing is in it, so that the next holder of the lock has nothing to
    /// sweep. Called when the work under the lock is done.
    ///
    /// # Errors
    /// When it is empty and cannot be removed.
    pub fn end_session(&self) -> Result<()> {
        let dir = self.under("tmp").join(session());
        if super::look(&dir)?.is_some() {
            atomic::remove_dir_if_empty(&dir)?;
        }
        Ok(())
    }

    /// Removes what other processes left unfinished; the lock must be held.
    pub(super) fn sweep(&self) -> std::result::Result<(), HostError> {
        let tmp = self.under("tmp");
        let leftovers = match names(&tmp) {
            Ok(names) => names,
            Err(crate::Error::Host(error)) => return Err(error),
            Err(_) => Vec::new(),
        };
        for name in leftovers.iter().filter(|name| *name != session()) {
            tracing::debug!(name, "removing what an earlier process left unfinished");
            atomic::remove_dir_all(&tmp.join(name))?;
        }
        Ok(())
    }
}

/// A temporary file's name; dropping it removes the file, if it was not renamed.
#[derive(Debug)]
pub(crate) struct TempFile {
    path: PathBuf,
}

impl TempFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            // The next sweep tries again.
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a temporary file");
        }
    }
}
