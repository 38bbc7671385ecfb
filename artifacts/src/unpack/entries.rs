//! The entries of an archive, one at a time: a header, and its content as a stream that ends where the next entry begins.
//!
//! It must not judge names or links.

use std::io::{self, Read};

use super::header::{self, Header, HeaderError};
use super::stream::refusal;
use super::{Refusal, Refused, UnpackError};

/// Bytes that are passed over at once.
const SKIP_BUFFER: usize = 64 << 10;

/// Why there is no next entry.
pub(super) enum Stop {
    Refused(Refused),
    Damaged { entry: String, source: io::Error },
}

impl<E: std::error::Error + 'static> From<Stop> for UnpackError<E> {
    fn from(stop: Stop) -> UnpackError<E> {
        match stop {
            Stop::Refused(refused) => refused.into(),
            Stop::Damaged { entry, source } => UnpackError::Damaged { entry, source },
        }
    }
}

/// Walks an archive. Reading gives the content of the entry at hand, and fails where the archive ends within it.
pub(super) struct Entries<R> {
    input: R,
    /// The entry that is being looked at.
    last: String,
    /// Bytes of its content that were not read.
    left: u64,
    padding: usize,
}

impl<R: Read> Entries<R> {
    pub(super) fn new(input: R) -> Entries<R> {
        Entries {
            input,
            last: String::new(),
            left: 0,
            padding: 0,
        }
    }

    /// The next header; what was not read of the entry before is passed over. None at the archive's end.
    pub(super) fn next(&mut self) -> Result<Option<Header>, Stop> {
        self.pass().map_err(|error| self.damaged(error))?;
        let header = match header::next(&mut self.input) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(None),
            Err(HeaderError::Io(error)) => return Err(self.damaged(error)),
            Err(HeaderError::Refused(name, reason)) => {
                self.last = String::from_utf8_lossy(&name).into_owned();
                return Err(self.refused(reason));
            }
        };
        self.last = String::from_utf8_lossy(&header.name).into_owned();
        (self.left, self.padding) = (header.size, header::padding(header.size));
        Ok(Some(header))
    }

    /// Reads what follows the end of the archive (padding, as a rule): the stream's own checksum and digest cover it.
    pub(super) fn rest(&mut self) -> Result<(), Stop> {
        let mut buffer = vec![0; SKIP_BUFFER];
        loop {
            match self.input.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.damaged(error)),
            }
        }
    }

    pub(super) fn refused(&self, reason: Refusal) -> Stop {
        Stop::Refused(Refused::new(self.last.clone(), reason))
    }

    pub(super) fn damaged(&self, source: io::Error) -> Stop {
        match refusal(&source) {
            Some(reason) => self.refused(reason.clone()),
            None => Stop::Damaged {
                entry: self.last.clone(),
                source,
            },
        }
    }

    fn pass(&mut self) -> io::Result<()> {
        if self.left > 0 {
            let mut buffer = vec![0; SKIP_BUFFER];
            while self.read(&mut buffer)? > 0 {}
        }
        let mut padding = [0; header::BLOCK];
        self.input.read_exact(&mut padding[..self.padding])?;
        self.padding = 0;
        Ok(())
    }
}

impl<R: Read> Read for Entries<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if want == 0 {
            return Ok(0);
        }
        loop {
            match self.input.read(&mut buffer[..want]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    self.left -= got as u64;
                    return Ok(got);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
