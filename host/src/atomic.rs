//! Changes that are all or nothing, and durable when they return.
//!
//! A file is replaced by writing a temporary file beside it, syncing it, renaming it over the old one and syncing the
//! folder. The temporary file's name is fixed for a given target (`.<name>.kata-manager.tmp`), so that a leftover of a
//! killed process is replaced by the next write and found by [`remove_leftover`].

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, XattrFlags};

use crate::Error;

/// Creates or replaces a file.
///
/// A file that is there keeps its owner, mode and extended attributes (SELinux labels among them); a new one gets
/// `new_mode` and this process's owner. A final symlink is followed, never replaced.
///
/// # Errors
/// When any step fails; the old file is then untouched and the temporary file removed.
pub fn write(path: &Path, bytes: &[u8], new_mode: u32) -> Result<(), Error> {
    write_parts(path, &[bytes], new_mode)
}

/// Creates or replaces a file by parts that follow each other, as [`write()`] does.
///
/// # Errors
/// As [`write()`].
pub fn write_parts(path: &Path, parts: &[&[u8]], new_mode: u32) -> Result<(), Error> {
    let target = follow(path)?;
    let temporary = leftover_path(&target);
    remove_file_quietly(&temporary)?;
    let result = write_temporary(&target, &temporary, parts, new_mode)
        .and_then(|()| rename(&temporary, &target));
    if result.is_err() {
        // The first error is the one to report; a leftover is replaced by the next write.
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write_temporary(
    target: &Path,
    temporary: &Path,
    parts: &[&[u8]],
    new_mode: u32,
) -> Result<(), Error> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(temporary)
        .map_err(Error::io("create", temporary))?;
    for part in parts {
        file.write_all(part)
            .map_err(Error::io("write", temporary))?;
    }
    match File::open(target) {
        Ok(old) => copy_attributes(&old, &file)
            .map_err(Error::io("copy owner, mode and attributes to", temporary))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => file
            .set_permissions(fs::Permissions::from_mode(new_mode))
            .map_err(Error::io("set mode of", temporary))?,
        Err(error) => return Err(Error::io("open", target)(error)),
    }
    file.sync_all().map_err(Error::io("sync", temporary))
}

fn copy_attributes(old: &File, new: &File) -> io::Result<()> {
    let meta = old.metadata()?;
    let mine = new.metadata()?;
    if (meta.uid(), meta.gid()) != (mine.uid(), mine.gid()) {
        std::os::unix::fs::fchown(new, Some(meta.uid()), Some(meta.gid()))?;
    }
    new.set_permissions(meta.permissions())?;
    copy_xattrs(old, new)
}

fn copy_xattrs(old: &File, new: &File) -> io::Result<()> {
    let length = match rustix::fs::flistxattr_query(old) {
        Ok(length) => length,
        // File systems without extended attributes have none to keep.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    if length == 0 {
        return Ok(());
    }
    let mut names = vec![0; length];
    let got = rustix::fs::flistxattr(old, names.as_mut_slice())?;
    for name in names[..got]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; rustix::fs::fgetxattr_query(old, name)?];
        let got = if value.is_empty() {
            0
        } else {
            rustix::fs::fgetxattr(old, name, value.as_mut_slice())?
        };
        rustix::fs::fsetxattr(new, name, &value[..got], XattrFlags::empty())?;
    }
    Ok(())
}

/// Creates a symlink, or points an existing one elsewhere, by one rename.
///
/// # Errors
/// When `link` is there and is no symlink, or a step fails.
pub fn symlink(target: &Path, link: &Path) -> Result<(), Error> {
    match fs::symlink_metadata(link) {
        Ok(meta) if !meta.is_symlink() => {
            return Err(Error::io("replace by a symlink", link)(io::Error::from(
                io::ErrorKind::AlreadyExists,
            )));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("look at", link)(error)),
    }
    let temporary = leftover_path(link);
    remove_file_quietly(&temporary)?;
    std::os::unix::fs::symlink(target, &temporary)
        .map_err(Error::io("create symlink", &temporary))?;
    rename(&temporary, link)
}

/// Gives a file another name in the same file system, by one rename; what has that name is replaced.
///
/// # Errors
/// When the file is not there, or a step fails.
pub fn hard_link(file: &Path, name: &Path) -> Result<(), Error> {
    let temporary = leftover_path(name);
    remove_file_quietly(&temporary)?;
    fs::hard_link(file, &temporary).map_err(Error::io("create link", &temporary))?;
    rename(&temporary, name)?;
    // Between two names of one file rename(2) does nothing, and leaves both.
    remove_file_quietly(&temporary)?;
    Ok(())
}

/// Renames and syncs the folders concerned. An existing file at `to` is replaced.
///
/// # Errors
/// When the rename or a sync fails.
pub fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(Error::io("rename to", to))?;
    sync_parents(from, to)
}

/// Exchanges two paths in one step (renameat2(2), `RENAME_EXCHANGE`) and syncs their folders.
///
/// # Errors
/// When one is missing, they lie on different file systems, or the file system cannot exchange.
pub fn exchange(a: &Path, b: &Path) -> Result<(), Error> {
    rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)
        .map_err(Error::io("exchange", a))?;
    sync_parents(a, b)
}

/// Removes a file or symlink; an absent one is fine.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove_file(path: &Path) -> Result<(), Error> {
    if remove_file_quietly(path)? {
        sync_dir(parent(path))
    } else {
        Ok(())
    }
}

/// Removes a folder with all that is in it, never following symlinks; an absent one is fine.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove_dir_all(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Ok(()) => sync_dir(parent(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("remove folder", path)(error)),
    }
}

/// Removes a folder if it is there and empty. Returns whether it is gone.
///
/// # Errors
/// When it is empty and cannot be removed.
pub fn remove_dir_if_empty(path: &Path) -> Result<bool, Error> {
    match fs::remove_dir(path) {
        Ok(()) => sync_dir(parent(path)).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(error) => Err(Error::io("remove folder", path)(error)),
    }
}

/// Creates a folder and its missing parents. Returns those that it made, outermost first.
///
/// # Errors
/// When one cannot be made, or a part of the path is no folder.
pub fn create_dir_all(path: &Path, mode: u32) -> Result<Vec<PathBuf>, Error> {
    let mut missing = Vec::new();
    let mut at = path;
    while !at.is_dir() {
        missing.push(at.to_owned());
        match at.parent() {
            Some(up) if !up.as_os_str().is_empty() => at = up,
            _ => break,
        }
    }
    missing.reverse();
    for dir in &missing {
        match rustix::fs::mkdir(dir, rustix::fs::Mode::from_raw_mode(mode)) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) if dir.is_dir() => {}
            Err(errno) => return Err(Error::io("create folder", dir)(errno)),
        }
    }
    // Together: file systems with a journal write it once for all of them.
    for dir in &missing {
        sync_dir(parent(dir))?;
    }
    Ok(missing)
}

/// Makes a folder's entries durable.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("sync folder", path))
}

/// Removes what a killed [`write()`] or [`symlink`] of `path` may have left beside it.
///
/// # Errors
/// When a leftover is there and cannot be removed.
pub fn remove_leftover(path: &Path) -> Result<(), Error> {
    remove_file(&leftover_path(path))
}

fn leftover_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".kata-manager.tmp");
    path.with_file_name(name)
}

fn remove_file_quietly(path: &Path) -> Result<bool, Error> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}

fn follow(path: &Path) -> Result<PathBuf, Error> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_symlink() => path
            .canonicalize()
            .map_err(Error::io("follow symlink", path)),
        _ => Ok(path.to_owned()),
    }
}

fn sync_parents(a: &Path, b: &Path) -> Result<(), Error> {
    sync_dir(parent(b))?;
    if parent(a) == parent(b) {
        Ok(())
    } else {
        sync_dir(parent(a))
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn write_keeps_mode_and_attributes_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        write(&path, b"one", 0o640).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
        let labelled = rustix::fs::setxattr(&path, "user.label", b"x", XattrFlags::empty()).is_ok();
        let old = path.metadata().unwrap().ino();

        write(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o604);
        assert_ne!(
            path.metadata().unwrap().ino(),
            old,
            "a reader of the old file keeps it"
        );
        if labelled {
            let mut value = [0; 8];
            let length = rustix::fs::getxattr(&path, "user.label", &mut value[..]).unwrap();
            assert_eq!(&value[..length], b"x");
        }
        assert_eq!(names(dir.path()), ["config.toml"]);
    }

    #[test]
    fn a_second_name_is_given_again_and_moved() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let [one, two, name] = ["one", "two", "name"].map(|name| dir.path().join(name));
        write(&one, b"1", 0o755).unwrap();
        write(&two, b"2", 0o755).unwrap();
        for file in [&one, &one, &two] {
            hard_link(file, &name).unwrap();
            let ino = |path: &Path| fs::metadata(path).unwrap().ino();
            assert_eq!(ino(file), ino(&name));
            assert_eq!(names(dir.path()), ["name", "one", "two"]);
        }
        assert!(hard_link(&dir.path().join("none"), &name).is_err());
    }

    #[test]
    fn write_follows_a_final_symlink() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        write(&dir.path().join("real/c"), b"old", 0o644).unwrap();
        std::os::unix::fs::symlink("real/c", dir.path().join("c")).unwrap();
        write(&dir.path().join("c"), b"new", 0o644).unwrap();
        assert!(
            fs::symlink_metadata(dir.path().join("c"))
                .unwrap()
                .is_symlink()
        );
        assert_eq!(fs::read(dir.path().join("real/c")).unwrap(), b"new");
    }

    #[test]
    fn a_leftover_of_a_killed_write_is_replaced_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(dir.path().join(".f.kata-manager.tmp"), b"half").unwrap();
        write(&path, b"whole", 0o644).unwrap();
        assert_eq!(names(dir.path()), ["f"]);
        fs::write(dir.path().join(".f.kata-manager.tmp"), b"half").unwrap();
        remove_leftover(&path).unwrap();
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[test]
    fn symlinks_switch_but_never_replace_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("live");
        symlink(Path::new("a"), &link).unwrap();
        symlink(Path::new("b"), &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("b"));
        fs::create_dir(dir.path().join("folder")).unwrap();
        let error = symlink(Path::new("a"), &dir.path().join("folder")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(dir.path().join("folder").is_dir());
    }

    #[test]
    fn created_folders_are_told_and_removed_only_when_empty() {
        let dir = tempfile::tempdir().unwrap();
        let made = create_dir_all(&dir.path().join("a/b/c"), 0o755).unwrap();
        assert_eq!(
            made,
            ["a", "a/b", "a/b/c"].map(|name| dir.path().join(name))
        );
        assert_eq!(
            create_dir_all(&dir.path().join("a/b/c"), 0o755).unwrap(),
            Vec::<PathBuf>::new()
        );
        assert!(!remove_dir_if_empty(&dir.path().join("a")).unwrap());
        assert!(remove_dir_if_empty(&dir.path().join("a/b/c")).unwrap());
        assert!(remove_dir_if_empty(&dir.path().join("never")).unwrap());
    }

    #[test]
    fn exchange_swaps_a_folder_and_a_link() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("class")).unwrap();
        fs::write(dir.path().join("class/user-file"), b"kept").unwrap();
        std::os::unix::fs::symlink("gen", dir.path().join("link")).unwrap();
        exchange(&dir.path().join("class"), &dir.path().join("link")).unwrap();
        assert!(
            fs::symlink_metadata(dir.path().join("class"))
                .unwrap()
                .is_symlink()
        );
        assert_eq!(
            fs::read(dir.path().join("link/user-file")).unwrap(),
            b"kept"
        );
    }
}
