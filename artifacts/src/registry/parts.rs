//! Where a blob's bytes go: at their offsets, from several streams, or in order.

use std::future::{Future, ready};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::BlobSink;
use crate::digest::{Digest, Hasher};

/// Takes a blob's bytes at their offsets, from several streams at once. What it has may be from an earlier process.
pub trait BlobParts: Sync {
    /// What lacks, ascending.
    fn missing(&self) -> Vec<Range<u64>>;

    /// Takes bytes from `offset` on, where a missing range begins, or a multiple of 4096 in one.
    fn part(&self, offset: u64) -> Box<dyn BlobPart + Send + '_>;

    /// The digest of the whole, when nothing lacks.
    fn digest(&self) -> Pin<Box<dyn Future<Output = io::Result<Digest>> + Send + '_>>;

    /// Forgets everything: the transfer begins again. No part is being written then.
    ///
    /// # Errors
    /// Whatever keeps it from it.
    fn restart(&self) -> io::Result<()>;

    /// The most parts that are written at the same time.
    fn streams(&self) -> usize;
}

/// Takes the bytes of one stream.
pub trait BlobPart {
    /// Appends bytes.
    ///
    /// # Errors
    /// Whatever keeps them from being stored; the transfer ends with [`super::Error::Sink`].
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// No more bytes come. What was taken is missing no more, but for a few bytes at the end, perhaps.
    ///
    /// # Errors
    /// As for [`BlobPart::write`].
    fn end(&mut self) -> io::Result<()>;
}

/// A sink that takes bytes in order, as one part.
pub(super) struct InOrder<'a> {
    size: u64,
    digest: Digest,
    state: Mutex<State<'a>>,
}

struct State<'a> {
    sink: &'a mut (dyn BlobSink + Send),
    hasher: Hasher,
    got: u64,
}

impl<'a> InOrder<'a> {
    pub(super) fn new(
        sink: &'a mut (dyn BlobSink + Send),
        digest: &Digest,
        size: u64,
    ) -> InOrder<'a> {
        InOrder {
            size,
            digest: digest.clone(),
            state: Mutex::new(State {
                sink,
                hasher: Hasher::like(digest),
                got: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        // After a panic in the sink the whole transfer is lost, and with it this.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobParts for InOrder<'_> {
    fn missing(&self) -> Vec<Range<u64>> {
        let got = self.lock().got;
        let rest = (got < self.size).then_some(got..self.size);
        rest.into_iter().collect()
    }

    fn part(&self, _offset: u64) -> Box<dyn BlobPart + Send + '_> {
        // There is one stream, and it begins where the last one ended.
        Box::new(Rest(self))
    }

    fn digest(&self) -> Pin<Box<dyn Future<Output = io::Result<Digest>> + Send + '_>> {
        Box::pin(ready(Ok(self.lock().hasher.clone().finish())))
    }

    fn restart(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.hasher = Hasher::like(&self.digest);
        state.got = 0;
        state.sink.restart()
    }

    fn streams(&self) -> usize {
        1
    }
}

struct Rest<'a, 'b>(&'a InOrder<'b>);

impl BlobPart for Rest<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock();
        state.hasher.update(bytes);
        state.sink.write(bytes)?;
        state.got += bytes.len() as u64;
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}
