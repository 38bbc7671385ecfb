//! A file that is written and read past the page cache where the file system allows it, from pooled aligned buffers.
//!
//! With O_DIRECT a download costs no second copy in the page cache, and what is written is on the device when fsync(2) is
//! asked for it. Where the file system refuses (tmpfs, some network file systems), and for the last bytes that do not fill a
//! block, the same calls go through the page cache. It must not know of blobs and digests.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use km_host::Error as HostError;
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// What offsets, lengths and addresses are multiples of. open(2): the logical block size, which is 512 or 4096 on all disks.
pub(super) const BLOCK: usize = 4096;

/// Bytes moved at once. Larger ones are not faster, and every stream has one.
pub(super) const BUFFER: usize = 512 << 10;

/// Files below this go through the page cache: a direct write waits for the device, which thousands of small files would
/// each do on their own.
const DIRECT_FROM: u64 = 4 << 20;

/// Buffers that are kept for the next stream. Fresh ones cost page faults and resident memory.
const POOLED: usize = 12;

static POOL: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// [`BUFFER`] bytes at an address that direct I/O takes; back to the pool when dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Box<[u8]>,
    start: usize,
    filled: usize,
}

impl Buffer {
    pub(super) fn take() -> Buffer {
        // A poisoned pool only means that nothing is recycled.
        let pooled = POOL.lock().ok().and_then(|mut pool| pool.pop());
        let memory = pooled.unwrap_or_else(|| vec![0; BUFFER + BLOCK].into_boxed_slice());
        // `align_offset` may refuse, by its contract; then the address does not fit and the kernel says so.
        let start = match memory.as_ptr().align_offset(BLOCK) {
            start if start < BLOCK => start,
            _ => 0,
        };
        Buffer {
            memory,
            start,
            filled: 0,
        }
    }

    pub(super) fn filled(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.filled]
    }

    pub(super) fn is_full(&self) -> bool {
        self.filled == BUFFER
    }

    /// Takes as many bytes as fit, and says how many.
    pub(super) fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BUFFER - self.filled);
        let at = self.start + self.filled;
        self.memory[at..at + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        taken
    }

    pub(super) fn clear(&mut self) {
        self.filled = 0;
    }

    /// Forgets what is behind the first `len` bytes.
    pub(super) fn truncate(&mut self, len: usize) {
        self.filled = self.filled.min(len);
    }

    /// Room for `len` bytes, at most [`BUFFER`], to be read into.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        self.filled = len.min(BUFFER);
        &mut self.memory[self.start..self.start + self.filled]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Ok(mut pool) = POOL.lock()
            && pool.len() < POOLED
        {
            pool.push(std::mem::take(&mut self.memory));
        }
    }
}

/// An open file; see the module's documentation.
#[derive(Debug)]
pub(super) struct DirectFile {
    plain: File,
    direct: Option<File>,
    /// The file system took O_DIRECT at open(2) and refuses it now.
    refused: AtomicBool,
    path: PathBuf,
}

impl DirectFile {
    /// Wraps a file that is open for reading and writing; `size` is what it will have.
    pub(super) fn new(plain: File, path: &Path, size: u64) -> DirectFile {
        let direct = (size >= DIRECT_FROM)
            .then(|| {
                let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or_default();
                let mut options = OpenOptions::new();
                options.read(true).write(true).custom_flags(flags);
                // Refused: through the page cache then.
                options.open(path).ok()
            })
            .flatten();
        DirectFile {
            plain,
            direct,
            refused: AtomicBool::new(false),
            path: path.to_owned(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is large enough to be written past the page cache, on a file system that can.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    pub(super) fn plain(&self) -> &File {
        &self.plain
    }

    /// The direct file, if `offset` allows it, and how many of `len` bytes can go there.
    fn direct(&self, offset: u64, len: usize) -> Option<(&File, usize)> {
        let direct = self.direct.as_ref()?;
        let whole = len - len % BLOCK;
        let usable = offset.is_multiple_of(BLOCK as u64)
            && whole > 0
            && !self.refused.load(Ordering::Relaxed);
        usable.then_some((direct, whole))
    }

    /// Whether an error says that direct I/O is not for this file.
    fn refuses(&self, error: &io::Error) -> bool {
        let refuses = error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
        if refuses {
            self.refused.store(true, Ordering::Relaxed);
        }
        refuses
    }

    /// Writes all bytes at `offset`. They should be a [`Buffer`]'s, or nothing of them goes directly.
    pub(super) fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        if let Some((direct, whole)) = self.direct(offset, bytes.len()) {
            match direct.write_all_at(&bytes[..whole], offset) {
                Ok(()) => done = whole,
                Err(error) if self.refuses(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if done == bytes.len() {
            return Ok(());
        }
        self.plain
            .write_all_at(&bytes[done..], offset + done as u64)
    }

    /// Reads `len` bytes, at most [`BUFFER`], from `offset` into a buffer.
    pub(super) fn read_at(&self, offset: u64, len: usize, buffer: &mut Buffer) -> io::Result<()> {
        let room = buffer.room(len);
        let mut done = 0;
        if let Some((direct, whole)) = self.direct(offset, room.len()) {
            match direct.read_exact_at(&mut room[..whole], offset) {
                Ok(()) => done = whole,
                Err(error) if self.refuses(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if done < room.len() {
            self.plain
                .read_exact_at(&mut room[done..], offset + done as u64)?;
        }
        Ok(())
    }

    /// Reserves the whole size with fallocate(2). A file system that cannot is no reason to stop: the write finds out later.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when there is no room.
    pub(super) fn reserve(&self, size: u64) -> Result<()> {
        if size == 0 {
            return Ok(());
        }
        loop {
            match rustix::fs::fallocate(&self.plain, FallocateFlags::empty(), 0, size) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    let error = HostError::io("reserve space for", &self.path)(errno);
                    return Err(Error::host_on(parent(&self.path), size, error));
                }
            }
        }
    }

    /// An error of this file as the store tells it.
    pub(super) fn error(&self, operation: &'static str, size: u64, error: io::Error) -> Error {
        let error = HostError::io(operation, &self.path)(error);
        Error::host_on(parent(&self.path), size, error)
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(dir: &Path, size: u64) -> DirectFile {
        let path = dir.join("file");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        DirectFile::new(options.open(&path).unwrap(), &path, size)
    }

    /// The temporary folder's file system, and one that has no disk below it.
    fn folders() -> [tempfile::TempDir; 2] {
        [
            tempfile::tempdir().unwrap(),
            tempfile::tempdir_in("/dev/shm").unwrap(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_written_is_read(pieces in proptest::collection::vec((0..3 * BUFFER as u64, 1..BUFFER, any::<u8>()), 1..6)) {
            for dir in folders() {
                let file = file(dir.path(), DIRECT_FROM);
                let mut expected = vec![0; 4 * BUFFER];
                file.reserve(expected.len() as u64).unwrap();
                for (offset, len, byte) in &pieces {
                    // Every second one begins where a block does.
                    let offset = if len % 2 == 0 { offset - offset % BLOCK as u64 } else { *offset };
                    let mut buffer = Buffer::take();
                    buffer.room(*len).fill(*byte);
                    file.write_at(offset, buffer.filled()).unwrap();
                    expected[offset as usize..offset as usize + len].fill(*byte);
                }
                let mut buffer = Buffer::take();
                for (n, part) in expected.chunks(BUFFER).enumerate() {
                    file.read_at((n * BUFFER) as u64, part.len(), &mut buffer).unwrap();
                    prop_assert!(buffer.filled() == part);
                }
            }
        }
    }

    #[test]
    fn buffers_are_aligned_and_come_back() {
        for _ in 0..3 {
            let buffers: Vec<_> = (0..POOLED + 2).map(|_| Buffer::take()).collect();
            for buffer in &buffers {
                assert_eq!(
                    buffer.memory[buffer.start..].as_ptr().align_offset(BLOCK),
                    0
                );
                assert_eq!(buffer.memory.len() - BLOCK, BUFFER);
            }
        }
        assert!(POOL.lock().unwrap().len() <= POOLED);
    }
}
