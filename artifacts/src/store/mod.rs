//! The store below `artifactsDir`: contents by digest, immutable generations, one symlink a class.
//!
//! ```text
//! <class>                           relative symlink to the live generation
//! .store/oci/                       an OCI image layout; signatures are manifests in it (see `signatures`)
//! .store/files/sha256/<hex>         contents, mode 0444; a raw layer's blob is the same inode
//! .store/files/sha256/<hex>.x       the same for executables, mode 0555
//! .store/unpacked/sha256/<hex>.json what an archive layer unpacked to
//! .store/generations/<class>/<n>/   hard links, derived files, .generation.json
//! .store/displaced/<class>          what was there under the class's name and is not ours
//! .store/state/                     lock, journal
//! .store/partial/                   blobs that were not fetched to their end; the next pull goes on with them
//! .store/tmp/<session>/             everything else that is unfinished; swept when the lock is next taken
//! ```
//!
//! A final name is only ever given by rename(2), link(2) or symlink(2) to something complete and synced. Writers hold
//! [`Store::lock`]; readers need nothing. The store must not know of registries, containerd or Kata.

mod activate;
mod check;
mod collect;
mod complete;
mod direct;
mod follow;
mod generations;
mod oci;
mod partial;
mod place;
mod ranges;
mod signatures;
mod sink;
mod temp;
#[cfg(test)]
mod tests;
mod unpacking;
mod verity;
mod writer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use km_host::lock::{Lock, LockError};
use km_host::{Error as HostError, atomic};

use crate::digest::{Algorithm, Digest};
use crate::error::{Error, Result};

pub(crate) use check::hash_file;
pub use collect::Unreferenced;
pub(crate) use complete::{Record, part_error};
pub(crate) use oci::NamedManifest;
pub(crate) use partial::{PartWriter, PartialBlob};
pub(crate) use sink::FileSink;
pub(crate) use temp::TempFile;
pub(crate) use unpacking::UnpackedLayer;

/// The one folder in `artifactsDir` that is ours besides the classes' symlinks.
pub(crate) const STORE: &str = ".store";

/// Mode of every folder here: the files are public guest images, and containerd's clients may read their configuration.
const DIR_MODE: u32 = 0o755;

/// The longest class name: a RuntimeClass is named by a DNS subdomain (RFC 1123; Kubernetes, "Object Names and IDs").
const CLASS_MAX: usize = 253;

/// A store; see the module's documentation.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    /// Blobs of archives stay after they were unpacked.
    keep_blobs: bool,
}

impl Store {
    /// Opens the store below a folder, as this process sees it. Nothing is created or read; an absent folder is an empty
    /// store.
    ///
    /// # Errors
    /// When the path is there and is no folder.
    pub fn open(dir: &Path) -> Result<Store> {
        match fs::metadata(dir) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => {
                return Err(HostError::io("use as a folder", dir)(io::Error::from(
                    io::ErrorKind::NotADirectory,
                ))
                .into());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(HostError::io("look at", dir)(error).into()),
        }
        Ok(Store {
            dir: dir.to_owned(),
            keep_blobs: false,
        })
    }

    /// Says whether the blobs of archives stay after they were unpacked, so that they can be exported.
    #[must_use]
    pub fn with_blobs_kept(self, keep_blobs: bool) -> Store {
        Store { keep_blobs, ..self }
    }

    /// Creates what is missing of the layout. Returns the folders that it made, outermost first.
    ///
    /// # Errors
    /// When a folder or file cannot be created.
    pub fn init(&self) -> Result<Vec<PathBuf>> {
        let mut made = Vec::new();
        for dir in [
            self.state_dir(),
            self.blobs_dir(Algorithm::Sha256),
            self.files_dir(Algorithm::Sha256),
            self.records_dir(Algorithm::Sha256),
            self.under("generations"),
            self.under("tmp"),
        ] {
            made.extend(atomic::create_dir_all(&dir, DIR_MODE)?);
        }
        self.init_oci()?;
        Ok(made)
    }

    /// Takes the store's lock, waiting for at most `wait`, and sweeps what a killed process left unfinished.
    /// [`Store::init`] must have been called.
    ///
    /// # Errors
    /// As [`Lock::acquire`]; [`LockError::Io`] too when a leftover cannot be removed.
    pub fn lock(&self, wait: Duration) -> std::result::Result<Lock, LockError> {
        let lock = Lock::acquire(&self.state_dir().join("lock"), wait)?;
        self.sweep()?;
        self.sweep_partial()?;
        Ok(lock)
    }

    /// See [`Store::with_blobs_kept`].
    pub(crate) fn keeps_blobs(&self) -> bool {
        self.keep_blobs
    }

    /// The folder that the store was opened with.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `.store`.
    pub fn store_dir(&self) -> PathBuf {
        self.dir.join(STORE)
    }

    /// Where the lock is and the caller keeps its journal.
    pub fn state_dir(&self) -> PathBuf {
        self.under("state")
    }

    /// The folder of a generation, whether it is there or not.
    pub fn generation_dir(&self, class: &str, number: u64) -> PathBuf {
        self.class_dir(class).join(number.to_string())
    }

    /// The symlink that users and containerd look at.
    pub fn class_link(&self, class: &str) -> PathBuf {
        self.dir.join(class)
    }

    fn under(&self, name: &str) -> PathBuf {
        self.store_dir().join(name)
    }

    fn class_dir(&self, class: &str) -> PathBuf {
        self.under("generations").join(class)
    }

    fn displaced_path(&self, class: &str) -> PathBuf {
        self.under("displaced").join(class)
    }

    fn oci_dir(&self) -> PathBuf {
        self.under("oci")
    }

    fn blobs_dir(&self, algorithm: Algorithm) -> PathBuf {
        self.oci_dir().join("blobs").join(algorithm.as_str())
    }

    fn files_dir(&self, algorithm: Algorithm) -> PathBuf {
        self.under("files").join(algorithm.as_str())
    }

    fn records_dir(&self, algorithm: Algorithm) -> PathBuf {
        self.under("unpacked").join(algorithm.as_str())
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs_dir(digest.algorithm()).join(digest.hex())
    }

    pub(crate) fn content_path(&self, digest: &Digest, executable: bool) -> PathBuf {
        let suffix = if executable { ".x" } else { "" };
        self.files_dir(digest.algorithm())
            .join(format!("{}{suffix}", digest.hex()))
    }

    fn record_path(&self, layer: &Digest) -> PathBuf {
        self.records_dir(layer.algorithm())
            .join(format!("{}.json", layer.hex()))
    }
}

/// Checks a class's name: it becomes a folder's name and a RuntimeClass's.
///
/// # Errors
/// [`Error::ClassName`].
pub fn check_class(name: &str) -> Result<()> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ok = !name.is_empty()
        && name.len() <= CLASS_MAX
        && name
            .bytes()
            .all(|byte| inner(byte) || matches!(byte, b'-' | b'.'))
        && name.bytes().next().is_some_and(inner)
        && name.bytes().last().is_some_and(inner)
        && !name.contains("..");
    if ok {
        Ok(())
    } else {
        Err(Error::ClassName {
            name: name.to_owned(),
        })
    }
}

/// Runs disk-bound work off the async workers.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|source| Error::Worker { what, source })?
}

/// The entries of a folder by name, sorted; none when it is absent.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(HostError::io("list", dir)(error).into()),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(HostError::io("list", dir))?;
        // Nothing of ours has another kind of name, and what is not ours is not touched.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// A path's own metadata, a symlink not followed; `None` when it is absent.
fn look(path: &Path) -> Result<Option<fs::Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some(meta)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(HostError::io("look at", path)(error).into()),
    }
}
