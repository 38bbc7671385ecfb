//! Writes the pieces of one file on threads of its own, so that who receives or unpacks does not wait for the disk.
//!
//! It must not know what the pieces are.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::direct::{Buffer, DirectFile};

/// Pieces that are written at the same time. A disk is far from full with one write at a time, and full with a few.
const THREADS: usize = 2;

/// Pieces that wait to be written. It bounds memory, and smooths a disk that is slow for a moment.
const WAITING: usize = 4;

/// Threads that write to one file. Dropping it waits for what was handed over.
#[derive(Debug)]
pub(super) struct Writer {
    state: Arc<State>,
    /// Away when it is time to end.
    pieces: Option<SyncSender<(u64, Buffer)>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    progress: Mutex<Progress>,
    written: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    /// Pieces handed over and not written.
    pending: usize,
    failed: Option<io::Error>,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        // Every change is one assignment.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// The error that ended it, for everyone who asks.
    fn check(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(error) => Err(match error.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(error.kind(), error.to_string()),
            }),
        }
    }
}

impl Writer {
    /// Starts the threads. `written` is called on them with each piece once it is in the file; the order is not that of
    /// the pieces.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub(super) fn start(
        file: Arc<DirectFile>,
        written: impl Fn(u64, &[u8]) + Send + Sync + 'static,
    ) -> io::Result<Writer> {
        let state = Arc::new(State::default());
        let (pieces, queue) = sync_channel(WAITING);
        let (queue, written) = (Arc::new(Mutex::new(queue)), Arc::new(written));
        let mut writer = Writer {
            state,
            pieces: Some(pieces),
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let (file, queue, written) =
                (Arc::clone(&file), Arc::clone(&queue), Arc::clone(&written));
            let state = Arc::clone(&writer.state);
            let thread = std::thread::Builder::new()
                .name("file-write".to_owned())
                .spawn(move || write_all(&file, &queue, &state, &*written))?;
            writer.threads.push(thread);
        }
        Ok(writer)
    }

    /// Hands a piece over; waits when there are many.
    ///
    /// # Errors
    /// When one of the pieces before could not be written.
    pub(super) fn submit(&self, offset: u64, piece: Buffer) -> io::Result<()> {
        {
            let mut progress = self.state.lock();
            progress.check()?;
            progress.pending += 1;
        }
        let sent = self.pieces.as_ref().map(|to| to.send((offset, piece)));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(io::Error::other("the thread that writes is gone")),
        }
    }

    /// Waits until everything that was handed over is written.
    ///
    /// # Errors
    /// When a piece could not be written.
    pub(super) fn drain(&self) -> io::Result<()> {
        let mut progress = self.state.lock();
        while progress.pending > 0 && progress.failed.is_none() {
            progress = self
                .state
                .written
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
        progress.check()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.pieces = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that writes a file panicked");
            }
        }
    }
}

/// A thread's work, until nobody hands over any more.
fn write_all(
    file: &DirectFile,
    queue: &Mutex<Receiver<(u64, Buffer)>>,
    state: &State,
    written: &(impl Fn(u64, &[u8]) + ?Sized),
) {
    // Whatever ends this, nobody is to wait for it.
    let _ended = Ended(state);
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((offset, piece)) = next else { return };
        if state.lock().failed.is_some() {
            continue;
        }
        let result = file.write_at(offset, piece.filled());
        if result.is_ok() {
            written(offset, piece.filled());
        }
        let mut progress = state.lock();
        progress.pending -= 1;
        if let Err(error) = result {
            progress.failed.get_or_insert(error);
        }
        state.written.notify_all();
    }
}

struct Ended<'a>(&'a State);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // By a panic: what it had in hand is not written.
        if std::thread::panicking() {
            let error = io::Error::other("a thread that writes has ended");
            self.0.lock().failed.get_or_insert(error);
        }
        self.0.written.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::path::Path;

    fn open(path: &Path) -> std::fs::File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    fn piece(byte: u8) -> Buffer {
        let mut buffer = Buffer::take();
        buffer.room(4096).fill(byte);
        buffer
    }

    #[test]
    fn pieces_are_written_and_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![0; 40 * 4096]).unwrap();
        let file = Arc::new(DirectFile::new(open(&path), &path, 40 * 4096));
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = Arc::clone(&told);
        let writer = Writer::start(file, move |offset, bytes| {
            tell.lock().unwrap().push((offset / 4096, bytes[0]));
        });
        let writer = writer.unwrap();
        for n in 0..40u8 {
            writer.submit(u64::from(n) * 4096, piece(n)).unwrap();
        }
        writer.drain().unwrap();
        let expected: Vec<_> = (0..40u8).map(|n| (u64::from(n), n)).collect();
        told.lock().unwrap().sort_unstable();
        assert_eq!(*told.lock().unwrap(), expected);
        let bytes = std::fs::read(&path).unwrap();
        assert!((0..40).all(|n| {
            bytes[n * 4096..(n + 1) * 4096]
                .iter()
                .all(|b| *b == n as u8)
        }));
    }

    #[test]
    fn a_full_disk_is_told_to_everyone() {
        // Linux, full(4): every write fails with ENOSPC.
        let path = Path::new("/dev/full");
        let file = Arc::new(DirectFile::new(open(path), path, 0));
        let writer = Writer::start(file, |_, _| panic!("nothing was written")).unwrap();
        let mut failed = 0;
        for n in 0..20 {
            failed += usize::from(writer.submit(n * 4096, piece(1)).is_err());
        }
        assert!(failed > 0, "it takes pieces for ever");
        for _ in 0..2 {
            let error = writer.drain().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
    }

    #[test]
    fn what_was_handed_over_is_written_when_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![0; 4 * 4096]).unwrap();
        let file = Arc::new(DirectFile::new(open(&path), &path, 4 * 4096));
        let writer = Writer::start(file, |_, _| {}).unwrap();
        for n in 0..4 {
            writer.submit(n * 4096, piece(9)).unwrap();
        }
        drop(writer);
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 9));
    }
}
