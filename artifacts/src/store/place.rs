//! Gives complete, synced files their final names.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use km_host::{Error as HostError, atomic};

use super::{DIR_MODE, STORE, Store, TempFile, look};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::{Artifact, EXECUTABLE_MODE, FILE_MODE};
use crate::unpack::{Refusal, Refused};

/// Up to so many files are synced each on its own; syncfs(2) would wait for everybody's writes as well.
const SYNC_ONE_BY_ONE: usize = 32;

impl Store {
    /// Whether a blob of that size is there under its final name.
    pub(crate) fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool> {
        has(&self.blob_path(digest), size)
    }

    /// Whether a content of that size is there under its final name.
    pub(crate) fn has_content(&self, digest: &Digest, size: u64, executable: bool) -> Result<bool> {
        has(&self.content_path(digest, executable), size)
    }

    /// Places a verified, synced temporary file as a blob.
    pub(crate) fn place_blob(&self, from: &Path, digest: &Digest) -> Result<()> {
        self.place(from, &self.blob_path(digest), FILE_MODE)
    }

    /// Places a verified, synced temporary file as a content.
    pub(crate) fn place_content(
        &self,
        from: &Path,
        digest: &Digest,
        executable: bool,
    ) -> Result<()> {
        let mode = if executable {
            EXECUTABLE_MODE
        } else {
            FILE_MODE
        };
        self.place(from, &self.content_path(digest, executable), mode)
    }

    /// Places many verified temporary files as contents. Many files are synced at once, with syncfs(2), and their folders
    /// once: a tree of kernel modules has thousands.
    pub(super) fn place_contents(&self, pending: Vec<(TempFile, Digest, bool)>) -> Result<()> {
        if pending.len() <= SYNC_ONE_BY_ONE {
            for (temp, digest, executable) in pending {
                self.place_content(temp.path(), &digest, executable)?;
            }
            return Ok(());
        }
        for (temp, _, executable) in &pending {
            let mode = if *executable {
                EXECUTABLE_MODE
            } else {
                FILE_MODE
            };
            fs::set_permissions(temp.path(), fs::Permissions::from_mode(mode))
                .map_err(HostError::io("set mode of", temp.path()))?;
        }
        let store = self.store_dir();
        let dir = fs::File::open(&store).map_err(HostError::io("open", &store))?;
        rustix::fs::syncfs(&dir).map_err(HostError::io("sync file system of", &store))?;
        let mut folders = BTreeSet::new();
        for (temp, digest, executable) in pending {
            let to = self.content_path(&digest, executable);
            make_folder_of(&to)?;
            fs::rename(temp.path(), &to).map_err(HostError::io("rename to", &to))?;
            folders.extend(to.parent().map(Path::to_owned));
        }
        for folder in folders {
            atomic::sync_dir(&folder)?;
        }
        Ok(())
    }

    /// Makes a raw layer's blob and its content one inode, from whichever of the two is there. Returns whether one was.
    pub(crate) fn join_raw(&self, digest: &Digest, size: u64) -> Result<bool> {
        let (blob, content) = (self.blob_path(digest), self.content_path(digest, false));
        match (has(&blob, size)?, has(&content, size)?) {
            (true, true) => Ok(true),
            (true, false) => self.link_as(&blob, &content).map(|()| true),
            (false, true) => self.link_as(&content, &blob).map(|()| true),
            (false, false) => Ok(false),
        }
    }

    /// Puts an artifact's files and links into the folder that the store was opened with, as further names of what the store
    /// has. What is there under their names is replaced, each in one step, unless it is the same already; nothing else is
    /// touched. The lock must be held.
    ///
    /// # Errors
    /// [`Error::Hostile`] when a path lies in the store itself; when the disk fails, or a folder is where a file should be.
    pub fn lay_out(&self, artifact: &Artifact) -> Result<()> {
        let paths = artifact.files.iter().map(|file| &file.path);
        for path in paths.chain(artifact.links.iter().map(|link| &link.path)) {
            if Path::new(path).starts_with(STORE) {
                return Err(Error::Hostile {
                    origin: format!("manifest {}", artifact.manifest),
                    source: Refused::new(path, Refusal::Reserved),
                });
            }
        }
        for file in &artifact.files {
            let (from, to) = (self.file_path(file), self.dir().join(&file.path));
            if !same(&from, &to)? {
                self.link_as(&from, &to)?;
            }
        }
        for link in &artifact.links {
            let to = self.dir().join(&link.path);
            if fs::read_link(&to).is_ok_and(|target| target == Path::new(&link.target)) {
                continue;
            }
            make_folder_of(&to)?;
            let staged = self.temp_path("link")?;
            atomic::symlink(Path::new(&link.target), &staged)?;
            atomic::rename(&staged, &to)?;
        }
        Ok(())
    }

    /// Drops a blob whose content is kept otherwise.
    pub(crate) fn drop_blob(&self, digest: &Digest) -> Result<()> {
        Ok(atomic::remove_file(&self.blob_path(digest))?)
    }

    /// Gives `from` a second name, replacing what is there. Where the file system has no hard links, or no more of them
    /// for this file, it is copied; copy_file_range(2) makes that a reflink where there are such.
    pub(super) fn link_as(&self, from: &Path, to: &Path) -> Result<()> {
        make_folder_of(to)?;
        let staged = self.temp_path("link")?;
        link_or_copy(from, &staged)?;
        atomic::rename(&staged, to)?;
        // Renaming one name of an inode over another of the same inode does nothing (rename(2)).
        Ok(atomic::remove_file(&staged)?)
    }

    /// Creates or replaces a file in one step. Unlike km_host's write it stages in `.store/tmp`, so that a killed process
    /// leaves nothing beside the file.
    pub(super) fn write_file(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
        let (mut file, temp) = self.temp_file("write")?;
        file.write_all(bytes)
            .map_err(HostError::io("write", temp.path()))?;
        drop(file);
        self.place(temp.path(), path, mode)
    }

    fn place(&self, from: &Path, to: &Path, mode: u32) -> Result<()> {
        make_folder_of(to)?;
        let file = fs::File::open(from).map_err(HostError::io("open", from))?;
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(HostError::io("set mode of", from))?;
        file.sync_all().map_err(HostError::io("sync", from))?;
        Ok(atomic::rename(from, to)?)
    }
}

/// Links, or copies where that cannot be done. A copy is synced; the folder is not.
pub(super) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => return Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::TooManyLinks
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::Unsupported
            ) => {}
        Err(error) => return Err(HostError::io("link to", to)(error).into()),
    }
    fs::copy(from, to).map_err(HostError::io("copy to", to))?;
    let copy = fs::File::open(to).map_err(HostError::io("open", to))?;
    Ok(copy.sync_all().map_err(HostError::io("sync", to))?)
}

/// The folder of an algorithm that is rarely seen is made when it is needed.
fn make_folder_of(path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        atomic::create_dir_all(folder, DIR_MODE)?;
    }
    Ok(())
}

/// Whether two paths are names of one inode.
fn same(a: &Path, b: &Path) -> Result<bool> {
    let inode = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let (a, b) = (look(a)?.map(inode), look(b)?.map(inode));
    Ok(a.is_some() && a == b)
}

fn has(path: &Path, size: u64) -> Result<bool> {
    Ok(look(path)?.is_some_and(|meta| meta.is_file() && meta.len() == size))
}
