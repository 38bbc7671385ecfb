//! Reads a blob from its beginning while it is still being fetched, in whatever order its parts come.
//!
//! The bytes are not verified: nothing of what is made of them may be kept before the whole blob's digest is known. It must
//! not know what they are.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::direct::{BUFFER, Buffer};
use super::partial::Shared;

/// See the module's documentation. It reads back what was written: memory does not grow when it is slow.
pub(crate) struct Following {
    blob: Arc<Shared>,
    /// As many restarts as there were when it began to read; after another one the bytes are others.
    restarts: u64,
    /// Where the next piece begins.
    at: u64,
    piece: Buffer,
    /// Bytes of the piece that were handed out.
    taken: usize,
    lost: Arc<AtomicBool>,
}

impl Following {
    pub(super) fn new(blob: Arc<Shared>) -> Following {
        Following {
            restarts: blob.restarts(),
            blob,
            at: 0,
            piece: Buffer::take(),
            taken: 0,
            lost: Arc::default(),
        }
    }

    /// Becomes true before reading fails for a reason that says nothing of the bytes.
    pub(crate) fn lost(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.lost)
    }

    fn next_piece(&mut self) -> io::Result<()> {
        self.piece.clear();
        self.taken = 0;
        if self.at == self.blob.size {
            return Ok(());
        }
        let Some(end) = self.blob.wait_for(self.at, self.restarts) else {
            return Err(self.lose(io::Error::other("no more of the blob comes")));
        };
        let len = usize::try_from(end - self.at).map_or(BUFFER, |len| len.min(BUFFER));
        if let Err(error) = self.blob.file.read_at(self.at, len, &mut self.piece) {
            self.piece.clear();
            return Err(self.lose(error));
        }
        if self.blob.restarts() != self.restarts {
            self.piece.clear();
            return Err(self.lose(io::Error::other("the blob has begun again")));
        }
        self.at += len as u64;
        Ok(())
    }

    fn lose(&self, error: io::Error) -> io::Error {
        self.lost.store(true, Ordering::Release);
        error
    }
}

impl Read for Following {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.piece.filled().len() {
            self.next_piece()?;
        }
        let left = &self.piece.filled()[self.taken..];
        let taken = buffer.len().min(left.len());
        buffer[..taken].copy_from_slice(&left[..taken]);
        self.taken += taken;
        Ok(taken)
    }
}

#[cfg(test)]
#[path = "tests/follow.rs"]
mod tests;
