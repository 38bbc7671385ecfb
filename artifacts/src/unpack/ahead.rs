//! Reads ahead on a thread of its own: decompression is most of the work of unpacking, and need not wait for the rest. What
//! was read passes somebody else's thread on its way, who hashes it.
//!
//! It must not know what the bytes are.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, Scope};

/// Bytes handed over at once.
const PIECE: usize = 256 << 10;

/// Pieces that may be ahead. It bounds memory.
const PIECES: usize = 6;

/// What another thread has read, in order, and its error where it had one.
pub(super) struct Ahead {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

impl Ahead {
    /// Starts the threads. They end with the source, or soon after this is dropped: when the source has given what it was
    /// asked for. `tap` sees every piece before it can be read here.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        source: impl Read + Send + 'scope,
        tap: &'scope mut (dyn FnMut(&[u8]) + Send),
    ) -> io::Result<Ahead> {
        let (to_tap, untapped) = sync_channel(PIECES);
        let (to_reader, full) = sync_channel(PIECES);
        let (empty, from_reader) = sync_channel(PIECES);
        for _ in 0..PIECES {
            // There is room for all of them.
            let _sent = empty.send(Vec::new());
        }
        Builder::new()
            .name("decompress".to_owned())
            .spawn_scoped(scope, move || read_all(source, &from_reader, &to_tap))?;
        Builder::new()
            .name("tar-hash".to_owned())
            .spawn_scoped(scope, move || pass_on(&untapped, tap, &to_reader))?;
        Ok(Ahead {
            full,
            empty,
            current: Vec::new(),
            at: 0,
        })
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.current.len() {
            // The thread may have ended, and needs no buffer then.
            let _sent = self.empty.send(std::mem::take(&mut self.current));
            self.at = 0;
            match self.full.recv() {
                Ok(piece) => self.current = piece?,
                // It has ended, and everything was taken.
                Err(_) => return Ok(0),
            }
        }
        let taken = buffer.len().min(self.current.len() - self.at);
        buffer[..taken].copy_from_slice(&self.current[self.at..self.at + taken]);
        self.at += taken;
        Ok(taken)
    }
}

/// The thread's work, until the source ends or nobody reads any more.
fn read_all(
    mut source: impl Read,
    empty: &Receiver<Vec<u8>>,
    full: &SyncSender<io::Result<Vec<u8>>>,
) {
    for mut piece in empty {
        piece.resize(PIECE, 0);
        let result = fill(&mut source, &mut piece);
        let (filled, error) = match result {
            Ok(filled) => (filled, None),
            Err((filled, error)) => (filled, Some(error)),
        };
        let ended = filled < PIECE;
        piece.truncate(filled);
        // What came before an error counts; the reader may refuse it for a reason of its own.
        let sent = filled == 0 || full.send(Ok(piece)).is_ok();
        if let Some(error) = error {
            let _sent = full.send(Err(error));
            return;
        }
        if ended || !sent {
            return;
        }
    }
}

/// The second thread's work: shows each piece and hands it on.
fn pass_on(
    from: &Receiver<io::Result<Vec<u8>>>,
    tap: &mut (dyn FnMut(&[u8]) + Send),
    to: &SyncSender<io::Result<Vec<u8>>>,
) {
    for piece in from {
        if let Ok(bytes) = &piece {
            tap(bytes);
        }
        if to.send(piece).is_err() {
            // Nobody reads any more.
            return;
        }
    }
}

/// Reads until the piece is full or the source ends; an error comes with the bytes before it.
fn fill(source: &mut impl Read, piece: &mut [u8]) -> Result<usize, (usize, io::Error)> {
    let mut filled = 0;
    while filled < piece.len() {
        match source.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err((filled, error)),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives bytes in small pieces, interrupted now and then, and an error at its end.
    struct Source<'a>(&'a [u8], usize, Option<io::ErrorKind>);

    impl Read for Source<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(7) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let len = buffer.len().min(50_000).min(self.0.len());
            if len == 0
                && let Some(kind) = self.2
            {
                return Err(kind.into());
            }
            buffer[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }

    fn read(bytes: &[u8], error: Option<io::ErrorKind>) -> (Vec<u8>, io::Result<usize>) {
        let mut tapped = Vec::new();
        let mut tap = |bytes: &[u8]| tapped.extend_from_slice(bytes);
        let read = std::thread::scope(|scope| {
            let mut ahead = Ahead::start(scope, Source(bytes, 0, error), &mut tap).unwrap();
            let mut got = Vec::new();
            let result = ahead.read_to_end(&mut got);
            (got, result)
        });
        assert!(tapped == read.0, "the tap sees what is read");
        read
    }

    #[test]
    fn everything_comes_in_order() {
        for size in [0, 1, PIECE - 1, PIECE, PIECE + 1, 9 * PIECE + 5] {
            let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            let (got, result) = read(&bytes, None);
            assert!(result.is_ok() && got == bytes, "{size}");
        }
    }

    #[test]
    fn an_error_comes_behind_the_bytes_before_it() {
        let bytes = vec![3; PIECE + 100];
        let (got, result) = read(&bytes, Some(io::ErrorKind::InvalidData));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(got, bytes);
    }

    #[test]
    fn who_reads_may_stop_anywhere() {
        let mut tap = |_: &[u8]| {};
        std::thread::scope(|scope| {
            let mut ahead = Ahead::start(scope, io::repeat(1), &mut tap).unwrap();
            let mut some = [0; 10];
            ahead.read_exact(&mut some).unwrap();
        });
    }
}
