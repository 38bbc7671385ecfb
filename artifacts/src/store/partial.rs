//! A blob on its way from a registry: `.store/partial/<algorithm>-<hex>`, written at any offset, hashed in order, and kept when
//! the process ends before it is whole.
//!
//! The file has its full size from the beginning and is reserved, not written: which of its bytes are there is asked of the
//! file system (lseek(2), SEEK_DATA and SEEK_HOLE), which marks a block as written no sooner than its bytes are. So there
//! is no second record that could be ahead of the bytes or behind them. What is there is hashed again before it counts, and
//! the whole blob's digest decides.
//!
//! Bytes that come in order are hashed out of the buffer that is written then. What comes before its turn, or was there
//! before, is read back and hashed by a thread of its own, so memory does not grow with the blob. Who wants the bytes before
//! they are all there follows them (`follow`), and must not trust them before the digest is known.
//!
//! Stale ones go when the store is locked and they are older than [`STALE`], and whenever their space is needed.

use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use km_host::{Error as HostError, atomic};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::sync::Notify;

use super::direct::{BLOCK, BUFFER, Buffer, DirectFile};
use super::follow::Following;
use super::ranges::Ranges;
use super::writer::Writer;
use super::{Store, names};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, free_bytes};

/// A pull that is not taken up for so long is not taken up any more: its artifact has moved on, or a person has.
pub(super) const STALE: Duration = Duration::from_secs(3 * 24 * 60 * 60);

/// Less than this is not worth a file that stays.
const WORTH_KEEPING: u64 = 1 << 20;

/// See the module's documentation. Dropping it keeps the file if it can be taken up again.
#[derive(Debug)]
pub(crate) struct PartialBlob {
    shared: Arc<Shared>,
    /// Writes; none for a small blob.
    writer: Option<Writer>,
    /// Hashes what was not hashed in passing; started when there is something to do for it.
    reader: Mutex<Option<JoinHandle<()>>>,
    /// The file system tells what was written.
    tells: bool,
    placed: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) file: Arc<DirectFile>,
    pub(super) size: u64,
    digest: Digest,
    state: Mutex<State>,
    /// More is written, or the hasher is free, or it is time to end.
    changed: Condvar,
    /// For who waits for the digest.
    hashed: Notify,
}

#[derive(Debug)]
struct State {
    written: Ranges,
    /// Away while somebody hashes with it.
    hasher: Option<Hasher>,
    /// Up to where it has come.
    at: u64,
    /// How often everything was forgotten.
    restarts: u64,
    end: bool,
    failed: Option<io::Error>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment: the state is whole between any two.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hashes bytes that are about to be written, if it is their turn. Says whether it was; else somebody has to read them.
    fn hash_in_turn(&self, offset: u64, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        let turn = state.at == offset;
        let Some(mut hasher) = state.hasher.take_if(|_| turn) else {
            return false;
        };
        drop(state);
        hasher.update(bytes);
        self.give_back(hasher, offset + bytes.len() as u64);
        true
    }

    /// Bytes were written.
    fn account(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.lock();
        state.written.insert(offset..offset + bytes.len() as u64);
        self.changed.notify_all();
    }

    fn give_back(&self, hasher: Hasher, at: u64) {
        let mut state = self.lock();
        state.hasher = Some(hasher);
        state.at = at;
        self.changed.notify_all();
        if at == self.size {
            self.hashed.notify_waiters();
        }
    }

    /// The reader's work: until everything is hashed, or nobody wants it.
    fn read_back(&self) {
        let mut buffer = Buffer::take();
        while let Some((mut hasher, part)) = self.next_part() {
            let len = usize::try_from(part.end - part.start).unwrap_or(BUFFER);
            match self.file.read_at(part.start, len, &mut buffer) {
                Ok(()) => {
                    hasher.update(buffer.filled());
                    self.give_back(hasher, part.end);
                }
                Err(error) => {
                    self.lock().failed = Some(error);
                    self.hashed.notify_waiters();
                    return;
                }
            }
        }
    }

    /// Waits for bytes at `from`, and says where they end; none when they will not come: since then everything was forgotten,
    /// or nobody wants the blob any more.
    pub(super) fn wait_for(&self, from: u64, restarts: u64) -> Option<u64> {
        let mut state = self.lock();
        while !state.end && state.restarts == restarts {
            let end = state.written.end_from(from);
            if end > from {
                return Some(end);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// How often everything was forgotten.
    pub(super) fn restarts(&self) -> u64 {
        self.lock().restarts
    }

    /// Waits for bytes whose turn it is.
    fn next_part(&self) -> Option<(Hasher, Range<u64>)> {
        let mut state = self.lock();
        loop {
            if state.end || state.at == self.size {
                return None;
            }
            let at = state.at;
            let end = state.written.end_from(at).min(at + BUFFER as u64);
            if end > at
                && let Some(hasher) = state.hasher.take()
            {
                return Some((hasher, at..end));
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes a blob from one offset on.
#[derive(Debug)]
pub(crate) struct PartWriter {
    buffer: Buffer,
    at: u64,
}

impl PartWriter {
    /// From where a missing range of the blob begins, or a block in one.
    pub(crate) fn new(offset: u64) -> PartWriter {
        PartWriter {
            buffer: Buffer::take(),
            at: offset,
        }
    }

    /// Appends bytes; returns how many of all bytes came to be kept by this call.
    ///
    /// # Errors
    /// When the disk fails, or when there are more bytes than the blob has.
    pub(crate) fn write(&mut self, blob: &PartialBlob, mut bytes: &[u8]) -> Result<u64> {
        let got = self.at + (self.buffer.filled().len() + bytes.len()) as u64;
        if got > blob.shared.size {
            return Err(blob.wrong_size(got));
        }
        let mut kept = 0;
        while !bytes.is_empty() {
            let taken = self.buffer.fill(bytes);
            bytes = &bytes[taken..];
            if self.buffer.is_full() {
                kept += self.flush(blob, BUFFER)?;
            }
        }
        Ok(kept)
    }

    /// Keeps what is buffered, but for a part of a block that is not the file's last. Returns how many bytes came to be kept.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn end(&mut self, blob: &PartialBlob) -> Result<u64> {
        let filled = self.buffer.filled().len();
        let last = self.at + filled as u64 == blob.shared.size;
        let len = if last {
            filled
        } else {
            filled - filled % BLOCK
        };
        let kept = self.flush(blob, len)?;
        blob.drain()?;
        Ok(kept)
    }

    fn flush(&mut self, blob: &PartialBlob, len: usize) -> Result<u64> {
        self.buffer.truncate(len);
        if len > 0 {
            if !blob.shared.hash_in_turn(self.at, self.buffer.filled()) {
                blob.start_reader()?;
            }
            blob.write(self.at, &mut self.buffer)?;
        }
        self.buffer.clear();
        self.at += len as u64;
        Ok(len as u64)
    }
}

impl PartialBlob {
    /// Takes up what an earlier process left of a blob, or begins. Its whole size is reserved.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when there is no room; other errors of the disk.
    pub(crate) fn open(store: &Store, digest: &Digest, size: u64) -> Result<PartialBlob> {
        let path = store.partial_path(digest);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        // A symlink in its place is nobody's of ours.
        options
            .mode(0o600)
            .custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or_default());
        if let Some(dir) = path.parent() {
            atomic::create_dir_all(dir, 0o700)?;
        }
        let file = options.open(&path).map_err(HostError::io("open", &path))?;
        let length = file.metadata().map_err(HostError::io("look at", &path))?;
        let mut blob = PartialBlob {
            shared: Arc::new(Shared {
                file: Arc::new(DirectFile::new(file, &path, size)),
                size,
                digest: digest.clone(),
                state: Mutex::new(State {
                    written: Ranges::default(),
                    hasher: Some(Hasher::like(digest)),
                    at: 0,
                    restarts: 0,
                    end: false,
                    failed: None,
                }),
                changed: Condvar::new(),
                hashed: Notify::new(),
            }),
            writer: None,
            reader: Mutex::new(None),
            tells: false,
            placed: false,
        };
        blob.start_writer()?;
        if length.len() == size && size > 0 {
            let written = blob.written()?;
            if written.len() > 0 {
                tracing::debug!(%digest, bytes = written.len(), "taking up what an earlier pull left");
                blob.tells = true;
                blob.shared.lock().written = written;
                blob.start_reader()?;
                return Ok(blob);
            }
        }
        blob.begin()?;
        blob.tells = blob.written()?.len() == 0;
        Ok(blob)
    }

    /// Makes the file one of which nothing is there.
    fn begin(&self) -> Result<()> {
        let (file, size) = (&self.shared.file, self.shared.size);
        let set = |len| file.plain().set_len(len);
        set(0).map_err(|error| file.error("empty", size, error))?;
        file.reserve(size)?;
        // Where nothing can be reserved it is one large hole.
        set(size).map_err(|error| file.error("set the size of", size, error))
    }

    /// What the file system says was written, without parts of blocks.
    fn written(&self) -> Result<Ranges> {
        let (file, size) = (&self.shared.file, self.shared.size);
        let mut written = Ranges::default();
        let mut at = 0;
        while at < size {
            let data = match rustix::fs::seek(file.plain(), SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => break,
                // Without an answer nothing is there.
                Err(Errno::INVAL | Errno::NOTSUP) => return Ok(Ranges::default()),
                Err(errno) => return Err(file.error("seek in", size, errno.into())),
            };
            let hole = rustix::fs::seek(file.plain(), SeekFrom::Hole(data))
                .map_err(|errno| file.error("seek in", size, errno.into()))?;
            let block = BLOCK as u64;
            let end = if hole >= size {
                size
            } else {
                hole - hole % block
            };
            let start = data.next_multiple_of(block);
            if start < end {
                written.insert(start..end);
            }
            at = hole.max(at + 1);
        }
        Ok(written)
    }

    /// A small blob is written by who receives it: a thread would cost more than it saves.
    fn start_writer(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let file = Arc::clone(&shared.file);
        if !file.is_direct() {
            return Ok(());
        }
        let written = move |offset, bytes: &[u8]| shared.account(offset, bytes);
        let started = Writer::start(file, written);
        self.writer = Some(started.map_err(|error| self.error("write", error))?);
        Ok(())
    }

    /// Has what is in a buffer written, and leaves an empty one.
    fn write(&self, offset: u64, buffer: &mut Buffer) -> Result<()> {
        let shared = &self.shared;
        let written = match &self.writer {
            Some(writer) => writer.submit(offset, std::mem::replace(buffer, Buffer::take())),
            None => {
                let written = shared.file.write_at(offset, buffer.filled());
                written.map(|()| shared.account(offset, buffer.filled()))
            }
        };
        written.map_err(|error| self.error("write", error))
    }

    /// Waits until everything is written that was handed over.
    fn drain(&self) -> Result<()> {
        let drained = self.writer.as_ref().map_or(Ok(()), Writer::drain);
        drained.map_err(|error| self.error("write", error))
    }

    fn error(&self, operation: &'static str, error: io::Error) -> Error {
        self.shared.file.error(operation, self.shared.size, error)
    }

    fn start_reader(&self) -> Result<()> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if reader.is_none() {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new()
                .name("blob-hash".to_owned())
                .spawn(move || shared.read_back())
                .map_err(|error| self.error("hash", error))?;
            *reader = Some(spawned);
        }
        Ok(())
    }

    fn end_reader(&self) {
        self.shared.lock().end = true;
        self.shared.changed.notify_all();
        let reader = self
            .reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(reader) = reader
            && reader.join().is_err()
        {
            tracing::error!("the thread that hashes a blob panicked");
        }
    }

    /// Reads the bytes in order while they come. Once this is dropped, or begins again, there are no more.
    pub(crate) fn follow(&self) -> Following {
        Following::new(Arc::clone(&self.shared))
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        self.shared.file.path()
    }

    /// Bytes that are there.
    pub(crate) fn kept(&self) -> u64 {
        self.shared.lock().written.len()
    }

    /// What lacks, ascending. Every range begins at a block.
    pub(crate) fn missing(&self) -> Vec<Range<u64>> {
        self.shared.lock().written.missing(self.shared.size)
    }

    /// That other bytes came than the blob has.
    pub(crate) fn wrong_size(&self, got: u64) -> Error {
        Error::Size {
            path: self.path().to_owned(),
            expected: self.shared.size,
            got,
        }
    }

    /// Forgets everything; there must be no writer.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn restart(&self) -> Result<()> {
        self.drain()?;
        self.end_reader();
        {
            let mut state = self.shared.lock();
            state.written = Ranges::default();
            state.hasher = Some(Hasher::like(&self.shared.digest));
            state.at = 0;
            state.restarts += 1;
            state.end = false;
            state.failed = None;
        }
        self.shared.changed.notify_all();
        self.begin()
    }

    /// The digest of the whole, once all of it is there and every part has ended.
    ///
    /// # Errors
    /// When it cannot be read back.
    pub(crate) async fn digest(&self) -> Result<Digest> {
        loop {
            let hashed = self.shared.hashed.notified();
            tokio::pin!(hashed);
            // From here on no notification is lost.
            hashed.as_mut().enable();
            {
                let mut state = self.shared.lock();
                if let Some(error) = state.failed.take() {
                    return Err(self.error("read back", error));
                }
                if state.at == self.shared.size
                    && let Some(hasher) = &state.hasher
                {
                    return Ok(hasher.clone().finish());
                }
            }
            hashed.await;
        }
    }

    /// It is verified, and its caller gives it its final name.
    pub(crate) fn placed(mut self) {
        self.placed = true;
    }

    /// It is not what its digest says.
    pub(crate) fn discard(mut self) {
        self.tells = false;
    }
}

impl Drop for PartialBlob {
    fn drop(&mut self) {
        self.end_reader();
        // Its thread is not to write any more when the file is judged.
        self.writer = None;
        if self.placed || (self.tells && self.kept() >= WORTH_KEEPING) {
            return;
        }
        if let Err(error) = fs::remove_file(self.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            // It goes when it is stale.
            tracing::warn!(path = %self.path().display(), %error, "cannot remove a part of a blob");
        }
    }
}

impl Store {
    fn partial_dir(&self) -> PathBuf {
        self.under("partial")
    }

    fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.partial_dir()
            .join(format!("{}-{}", digest.algorithm().as_str(), digest.hex()))
    }

    /// Removes what is there of a blob that nobody needs.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn drop_partial(&self, digest: &Digest) -> Result<()> {
        Ok(atomic::remove_file(&self.partial_path(digest))?)
    }

    /// Bytes of the disk that parts of a blob hold already.
    fn reserved(&self, digest: &Digest) -> u64 {
        let blocks = fs::symlink_metadata(self.partial_path(digest)).map(|meta| meta.blocks());
        // stat(2): blocks of 512 bytes.
        blocks.map_or(0, |blocks| blocks.saturating_mul(512))
    }

    /// Sees to it that blobs of these sizes find room, at the cost of parts of other blobs.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when there is none.
    pub(crate) fn make_room(&self, wanted: &[(&Digest, u64)]) -> Result<()> {
        let lacks = |&(digest, size): &(&Digest, u64)| size.saturating_sub(self.reserved(digest));
        let needed = wanted.iter().map(lacks).sum();
        if needed > free_bytes(self.dir())? {
            for name in names(&self.partial_dir())? {
                let path = self.partial_dir().join(name);
                if !wanted
                    .iter()
                    .any(|(digest, _)| self.partial_path(digest) == path)
                {
                    tracing::debug!(path = %path.display(), "removing a part of another blob to make room");
                    atomic::remove_file(&path)?;
                }
            }
        }
        let free = free_bytes(self.dir())?;
        if needed > free {
            return Err(Error::DiskFull {
                path: self.dir().to_owned(),
                needed,
                free,
            });
        }
        Ok(())
    }

    /// Removes parts of blobs that nobody took up for [`STALE`]; the lock must be held.
    pub(super) fn sweep_partial(&self) -> std::result::Result<(), HostError> {
        let dir = self.partial_dir();
        let all = match names(&dir) {
            Ok(names) => names,
            Err(Error::Host(error)) => return Err(error),
            Err(_) => Vec::new(),
        };
        for name in all {
            let path = dir.join(name);
            let modified = fs::symlink_metadata(&path).and_then(|meta| meta.modified());
            let age = modified.map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
            if age.is_ok_and(|age| age > STALE) {
                tracing::debug!(path = %path.display(), "removing a part of a blob that nobody took up");
                atomic::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tests/partial.rs"]
mod tests;
