//! One writer at a time.
//!
//! flock(2) on a file: the kernel drops it when the holder dies, however it dies. The file's content is never written, so
//! taking the lock changes nothing on disk once the file exists; who holds it is read from `/proc/locks`
//! (proc_locks(5)).

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::Error;

/// Between two looks at a lock that someone else holds.
const RETRY: Duration = Duration::from_millis(50);

/// An exclusive lock, held until dropped.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Drop for Lock {
    /// Lets go by itself, and not by closing: flock(2) holds for as long as any copy of the descriptor is open, and a child that another
    /// thread has forked has one until it executes its program.
    fn drop(&mut self) {
        // Closing is what remains when this fails, and it follows in any case.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// The process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id, in our process-id namespace.
    pub pid: u32,
    /// Its command line, when it can be read.
    pub command: Option<String>,
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Someone else held it until the wait was over.
    #[error("{} is locked by {}; wait until it is done, or give a longer --lock-timeout", path.display(), describe(holder.as_ref()))]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, when that can be found.
        holder: Option<Holder>,
    },
    /// The lock file cannot be used.
    #[error(transparent)]
    Io(#[from] Error),
}

fn describe(holder: Option<&Holder>) -> String {
    match holder {
        Some(Holder {
            pid,
            command: Some(command),
        }) => format!("process {pid} ({command})"),
        Some(Holder { pid, command: None }) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

impl Lock {
    /// Takes the lock, waiting for at most `wait`. The file is created if it is absent; its folder must exist.
    ///
    /// # Errors
    /// [`LockError::Held`] when the wait is over, [`LockError::Io`] when the file cannot be opened.
    pub fn acquire(path: &Path, wait: Duration) -> Result<Lock, LockError> {
        let deadline = Instant::now() + wait;
        loop {
            let file = open(path)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // A holder may have removed the file, with all of the state, before it let go: then this is no lock.
                Ok(()) if !is_at(&file, path)? => {}
                Ok(()) => return Ok(Lock { file }),
                Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(RETRY);
                }
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(LockError::Held {
                        path: path.to_owned(),
                        holder: holder(&file),
                    });
                }
                Err(errno) => return Err(Error::io("lock", path)(errno).into()),
            }
        }
    }
}

fn open(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("open lock", path))
}

fn is_at(file: &File, path: &Path) -> Result<bool, Error> {
    let mine = file.metadata().map_err(Error::io("look at lock", path))?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (mine.dev(), mine.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at lock", path)(error)),
    }
}

fn holder(file: &File) -> Option<Holder> {
    let meta = file.metadata().ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let pid = parse_holder(&locks, meta.dev(), meta.ino())?;
    let command = fs::read(format!("/proc/{pid}/cmdline"))
        .ok()
        .filter(|line| !line.is_empty())
        .map(|line| {
            let words: Vec<_> = line
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty())
                .collect();
            words
                .iter()
                .map(|word| String::from_utf8_lossy(word))
                .collect::<Vec<_>>()
                .join(" ")
        });
    Some(Holder { pid, command })
}

/// Finds the process that holds an flock on a file in the text of `/proc/locks`:
/// `1: FLOCK  ADVISORY  WRITE 1234 fe:00:123456 0 EOF`.
fn parse_holder(locks: &str, dev: u64, inode: u64) -> Option<u32> {
    let file = format!(
        "{:02x}:{:02x}:{inode}",
        rustix::fs::major(dev),
        rustix::fs::minor(dev)
    );
    locks.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            [_, "FLOCK", _, _, pid, at, ..] if *at == file => pid.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_taker_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, Duration::ZERO).unwrap();
        let error = Lock::acquire(&path, Duration::from_millis(60)).unwrap_err();
        let LockError::Held { holder, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(
            holder.as_ref().map(|holder| holder.pid),
            Some(std::process::id()),
            "{error}"
        );
        assert!(error.to_string().contains("--lock-timeout"));
        drop(first);
        Lock::acquire(&path, Duration::ZERO).unwrap();
    }

    #[test]
    fn waits_until_the_holder_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, Duration::ZERO).unwrap();
        let waiter = {
            let path = path.clone();
            std::thread::spawn(move || Lock::acquire(&path, Duration::from_secs(30)).map(drop))
        };
        drop(first);
        waiter.join().unwrap().unwrap();
    }

    #[test]
    fn a_copy_of_the_descriptor_does_not_keep_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, Duration::ZERO).unwrap();
        let copy = first.file.try_clone().unwrap();
        drop(first);
        drop(Lock::acquire(&path, Duration::ZERO).unwrap());
        drop(copy);
    }

    #[test]
    fn a_lock_whose_file_was_removed_is_taken_on_the_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path, Duration::ZERO).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Lock::acquire(&path, Duration::ZERO).unwrap();
        drop(first);
        let error = Lock::acquire(&path, Duration::ZERO).unwrap_err();
        assert!(matches!(error, LockError::Held { .. }), "{error}");
        drop(second);
    }

    #[test]
    fn other_kinds_of_locks_are_passed_over() {
        let text = "1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF\n2: -> FLOCK ADVISORY WRITE 12 fe:00:77 0 EOF\n\
                    3: FLOCK  ADVISORY  WRITE 13 fe:00:77 0 EOF\ngarbage\n";
        assert_eq!(
            parse_holder(text, rustix::fs::makedev(0xfe, 0), 77),
            Some(13)
        );
        assert_eq!(parse_holder(text, rustix::fs::makedev(0xfe, 1), 77), None);
    }
}
