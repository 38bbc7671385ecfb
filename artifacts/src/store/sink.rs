//! Writes one stream of known length into a temporary file: space reserved before the first byte, written in large pieces
//! from pooled buffers, synced at the end.
//!
//! Callers see `write` and `finish` only, so that direct I/O, ranges and resuming can come behind them.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;

use km_host::Error as HostError;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Store, TempFile};
use crate::error::{Error, Result, free_bytes};

/// Bytes written at once. Recycled: fresh buffers for each stream cost page faults and resident memory.
const BUFFER: usize = 1 << 20;

/// Buffers that are kept for the next stream; more than run at once are of no use.
const POOLED: usize = 4;

static POOL: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A temporary file that is being written; dropping it removes the file.
#[derive(Debug)]
pub(crate) struct FileSink {
    file: File,
    temp: TempFile,
    buffer: Vec<u8>,
    size: u64,
    written: u64,
}

impl FileSink {
    /// Creates the file and reserves its whole size.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when there is no room; other errors of the disk.
    pub(crate) fn create(store: &Store, what: &str, size: u64) -> Result<FileSink> {
        let (file, temp) = store.temp_file(what)?;
        reserve(&file, temp.path(), size)?;
        Ok(FileSink {
            file,
            temp,
            buffer: take_buffer(),
            size,
            written: 0,
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// When the disk fails, or when there are more bytes than were announced.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        if self.written > self.size {
            return Err(self.wrong_size());
        }
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        if bytes.len() >= BUFFER {
            return self.file.write_all(bytes).map_err(|e| self.error(e));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Starts over: what was written is forgotten.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.buffer.clear();
        self.written = 0;
        io::Seek::rewind(&mut self.file).map_err(|e| self.error(e))
    }

    /// Writes what is buffered and hands the file over. It is synced when it is placed under its final name.
    ///
    /// # Errors
    /// When the disk fails, or when fewer bytes came than were announced.
    pub(crate) fn finish(mut self) -> Result<TempFile> {
        self.flush()?;
        if self.written != self.size {
            return Err(self.wrong_size());
        }
        give_buffer(std::mem::take(&mut self.buffer));
        Ok(self.temp)
    }

    fn wrong_size(&self) -> Error {
        Error::Size {
            path: self.temp.path().to_owned(),
            expected: self.size,
            got: self.written,
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.file
            .write_all(&self.buffer)
            .map_err(|error| self.error(error))?;
        self.buffer.clear();
        Ok(())
    }

    fn error(&self, error: io::Error) -> Error {
        let path = self.temp.path();
        Error::host_on(parent(path), self.size, HostError::io("write", path)(error))
    }
}

/// Reserves space with fallocate(2). A file system that cannot is no reason to stop: the write finds out later.
fn reserve(file: &File, path: &Path, size: u64) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => {
                let error = HostError::io("reserve space for", path)(errno);
                return Err(Error::host_on(parent(path), size, error));
            }
        }
    }
}

/// Says so when the file system has not enough room for `needed` bytes.
pub(crate) fn check_space(dir: &Path, needed: u64) -> Result<()> {
    let free = free_bytes(dir)?;
    if needed > free {
        return Err(Error::DiskFull {
            path: dir.to_owned(),
            needed,
            free,
        });
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

fn take_buffer() -> Vec<u8> {
    let pooled = POOL.lock().ok().and_then(|mut pool| pool.pop());
    pooled.unwrap_or_else(|| Vec::with_capacity(BUFFER))
}

fn give_buffer(mut buffer: Vec<u8>) {
    buffer.clear();
    // A poisoned pool only means that the buffer is not recycled.
    if let Ok(mut pool) = POOL.lock()
        && pool.len() < POOLED
    {
        pool.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.init().unwrap();
        (dir, store)
    }

    #[test]
    fn pieces_of_every_size_arrive_in_order() {
        let (_dir, store) = store();
        let bytes: Vec<u8> = (0..3_500_000u32).map(|n| (n % 251) as u8).collect();
        for piece in [1_000, 70_000, BUFFER, BUFFER + 1, 3_500_000] {
            let mut sink = FileSink::create(&store, "t", bytes.len() as u64).unwrap();
            for piece in bytes.chunks(piece) {
                sink.write(piece).unwrap();
            }
            let temp = sink.finish().unwrap();
            assert!(fs::read(temp.path()).unwrap() == bytes, "{piece}");
        }
    }

    #[test]
    fn a_restart_forgets_the_first_attempt() {
        let (_dir, store) = store();
        let mut sink = FileSink::create(&store, "t", 6).unwrap();
        sink.write(b"wrong").unwrap();
        sink.restart().unwrap();
        sink.write(b"second").unwrap();
        assert_eq!(fs::read(sink.finish().unwrap().path()).unwrap(), b"second");
    }

    #[test]
    fn other_lengths_than_announced_are_errors_and_leave_nothing() {
        let (_dir, store) = store();
        let mut sink = FileSink::create(&store, "t", 3).unwrap();
        let path = sink.temp.path().to_owned();
        assert!(sink.write(b"long").is_err());
        drop(sink);
        assert!(!path.exists());
        let mut sink = FileSink::create(&store, "t", 3).unwrap();
        sink.write(b"a").unwrap();
        let path = sink.temp.path().to_owned();
        assert!(sink.finish().is_err());
        assert!(!path.exists());
    }

    #[test]
    fn a_full_disk_is_told_before_the_first_byte() {
        let (dir, store) = store();
        let huge = 1 << 60;
        let error = check_space(dir.path(), huge).unwrap_err();
        assert!(matches!(error, Error::DiskFull { needed, .. } if needed == huge));
        let text = error.to_string();
        assert!(
            text.contains("bytes are needed") && text.contains("artifactsDir"),
            "{text}"
        );
        check_space(dir.path(), 1).unwrap();
        // Past the largest file or the free space: either way an error and no file.
        assert!(FileSink::create(&store, "t", huge).is_err());
        let left: Vec<_> = fs::read_dir(store.under("tmp"))
            .unwrap()
            .flat_map(|session| fs::read_dir(session.unwrap().path()).unwrap())
            .collect();
        assert!(left.is_empty());
    }
}
