//! The files of a transaction: the configuration, its drop-in, and their backups.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use km_host::{Error, atomic};

use super::{Change, Journal, OtherFile, Owed, OwedFile, RestoreError, TransactionError};
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

pub(super) fn require_unchanged(change: &Change) -> Result<(), TransactionError> {
    let main = (&change.path, &change.before);
    let others = change.others.iter().map(|file| (&file.path, &file.before));
    for (path, expected) in std::iter::once(main).chain(others) {
        if read(path)? != *expected {
            return Err(TransactionError::Stale { path: path.clone() });
        }
    }
    Ok(())
}

/// Backs the files up, and replaces or removes them: the main one after those that come into being, before those that go.
pub(super) fn write(
    change: &Change,
    owed: &mut Owed,
    journal: &mut dyn Journal,
) -> Result<(), TransactionError> {
    let main = OtherFile {
        path: change.path.clone(),
        before: change.before.clone(),
        after: change.after.clone(),
        backup: change.backup.clone(),
    };
    let (come, go): (Vec<&OtherFile>, Vec<&OtherFile>) =
        change.others.iter().partition(|file| file.after.is_some());
    let files = come.into_iter().chain([&main]).chain(go);
    let files: Vec<&OtherFile> = files.filter(|file| file.before != file.after).collect();
    for file in &files {
        if let Some(before) = &file.before {
            back_up(&file.backup, before)?;
        }
    }
    for file in files {
        match &file.after {
            Some(after) => write_one(&file.path, after, owed, journal)?,
            None => {
                atomic::remove_file(&file.path)?;
                remove_folders(&mut owed.made_folders)?;
            }
        }
    }
    Ok(())
}

fn write_one(
    path: &Path,
    bytes: &[u8],
    owed: &mut Owed,
    journal: &mut dyn Journal,
) -> Result<(), TransactionError> {
    let missing = missing_folders(path);
    if !missing.is_empty() {
        owed.made_folders.extend(missing);
        journal
            .restoration_owed(owed)
            .map_err(TransactionError::Journal)?;
        make_folders(path)?;
    }
    Ok(atomic::write(path, bytes, NEW_MODE)?)
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

/// Puts the bytes from before back, unless someone else has changed a file since: that one is left alone, and told.
pub(super) fn restore(owed: &Owed) -> Result<(), RestoreError> {
    let main = OwedFile {
        path: owed.path.clone(),
        before: owed.before.clone(),
        after: owed.after.clone(),
        backup: owed.backup.clone(),
    };
    // The other way round than written: what the main file needs is there before it, and goes after it.
    let (gone, made): (Vec<&OwedFile>, Vec<&OwedFile>) =
        owed.others.iter().partition(|file| file.before.is_some());
    let mut result = Ok(());
    for file in gone.into_iter().chain([&main]).chain(made) {
        let one = restore_one(file);
        if result.is_ok() {
            result = one;
        }
    }
    result?;
    remove_folders(&mut owed.made_folders.clone())?;
    Ok(())
}

fn restore_one(file: &OwedFile) -> Result<(), RestoreError> {
    let found = read(&file.path)?.as_deref().map(Digest::of);
    if found == file.before {
        return Ok(());
    }
    if found != file.after {
        return Err(RestoreError::Changed {
            path: file.path.clone(),
            backup: file.backup.clone(),
        });
    }
    let Some(before) = &file.before else {
        return Ok(atomic::remove_file(&file.path)?);
    };
    let bytes = read(&file.backup)?.filter(|bytes| Digest::of(bytes) == *before);
    let Some(bytes) = bytes else {
        return Err(RestoreError::BadBackup {
            backup: file.backup.clone(),
        });
    };
    make_folders(&file.path)?;
    Ok(atomic::write(&file.path, &bytes, NEW_MODE)?)
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

/// Removes those of the folders that are empty, innermost first, and forgets them.
fn remove_folders(folders: &mut Vec<PathBuf>) -> Result<(), Error> {
    let mut left = Vec::new();
    for folder in folders.iter().rev() {
        if !atomic::remove_dir_if_empty(folder)? {
            left.insert(0, folder.clone());
        }
    }
    *folders = left;
    Ok(())
}
