//! The files of a transaction: the configuration and its backup.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use km_host::{Error, atomic};

use super::{Change, Journal, Owed, RestoreError, TransactionError};
use crate::digest::Digest;

/// Mode of a configuration that was not there before, as distributions install it.
const NEW_MODE: u32 = 0o644;
/// Mode of a backup: a configuration can hold a registry's password.
const BACKUP_MODE: u32 = 0o600;
/// Mode of folders that are made.
const FOLDER_MODE: u32 = 0o755;

/// The bytes of a file; `None` if it is not there.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

pub(super) fn require_unchanged(
    path: &Path,
    expected: Option<&[u8]>,
) -> Result<(), TransactionError> {
    if read(path)?.as_deref() == expected {
        return Ok(());
    }
    Err(TransactionError::Stale {
        path: path.to_owned(),
    })
}

/// Backs the file up and replaces or removes it.
pub(super) fn write(
    change: &Change,
    owed: &mut Owed,
    journal: &mut dyn Journal,
) -> Result<(), TransactionError> {
    if let Some(before) = &change.before {
        back_up(&change.backup, before)?;
    }
    match &change.after {
        Some(after) => {
            let missing = missing_folders(&change.path);
            if !missing.is_empty() {
                owed.made_folders.extend(missing);
                journal
                    .restoration_owed(owed)
                    .map_err(TransactionError::Journal)?;
                make_folders(&change.path)?;
            }
            atomic::write(&change.path, after, NEW_MODE)?;
        }
        None => {
            atomic::remove_file(&change.path)?;
            remove_folders(&owed.made_folders)?;
            owed.made_folders.clear();
        }
    }
    Ok(())
}

fn back_up(backup: &Path, bytes: &[u8]) -> Result<(), TransactionError> {
    make_folders(backup)?;
    atomic::write(backup, bytes, BACKUP_MODE)?;
    if read(backup)?.as_deref() != Some(bytes) {
        return Err(TransactionError::BadBackup {
            path: backup.to_owned(),
        });
    }
    Ok(())
}

/// Puts the bytes from before back, unless someone else has changed the file since.
pub(super) fn restore(owed: &Owed) -> Result<(), RestoreError> {
    let found = read(&owed.path)?.as_deref().map(Digest::of);
    if found == owed.before {
        if owed.before.is_none() {
            remove_folders(&owed.made_folders)?;
        }
        return Ok(());
    }
    if found != owed.after {
        return Err(RestoreError::Changed {
            path: owed.path.clone(),
            backup: owed.backup.clone(),
        });
    }
    let Some(before) = &owed.before else {
        atomic::remove_file(&owed.path)?;
        remove_folders(&owed.made_folders)?;
        return Ok(());
    };
    let bytes = read(&owed.backup)?.filter(|bytes| Digest::of(bytes) == *before);
    let Some(bytes) = bytes else {
        return Err(RestoreError::BadBackup {
            backup: owed.backup.clone(),
        });
    };
    make_folders(&owed.path)?;
    atomic::write(&owed.path, &bytes, NEW_MODE)?;
    Ok(())
}

fn missing_folders(path: &Path) -> Vec<PathBuf> {
    let ancestors = path.ancestors().skip(1);
    let mut missing: Vec<PathBuf> = ancestors
        .filter(|folder| !folder.as_os_str().is_empty())
        .take_while(|folder| !folder.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

fn make_folders(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(parent) => atomic::create_dir_all(parent, FOLDER_MODE).map(|_| ()),
        None => Ok(()),
    }
}

/// Removes folders, innermost first, as long as they are empty.
fn remove_folders(folders: &[PathBuf]) -> Result<(), Error> {
    for folder in folders.iter().rev() {
        if !atomic::remove_dir_if_empty(folder)? {
            break;
        }
    }
    Ok(())
}
