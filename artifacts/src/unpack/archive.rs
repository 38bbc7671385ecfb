//! From a stream to files and links: walks the entries, judges each, hands contents on.

use std::collections::HashMap;
use std::io::{self, Read};

use super::header::{self, Header, HeaderError, Kind};
use super::path::normalise;
use super::stream::{Leashed, refusal};
use super::{Format, Limits, Refusal, Refused, Shape, UnpackError};

/// Bytes handed to the output at once.
const COPY_BUFFER: usize = 256 << 10;

/// Where contents go: one file after the other, in pieces.
pub trait Output {
    /// A file that is being written.
    type Open;
    /// What a finished file is known by.
    type File: Clone;
    /// Why it failed.
    type Error: std::error::Error + 'static;
    /// Starts a file of `size` bytes; `executable` when any execute bit is set.
    ///
    /// # Errors
    /// When there is no place for it.
    fn begin(&mut self, size: u64, executable: bool) -> Result<Self::Open, Self::Error>;
    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// When they cannot be kept.
    fn write(&mut self, open: &mut Self::Open, bytes: &[u8]) -> Result<(), Self::Error>;
    /// Ends the file.
    ///
    /// # Errors
    /// When it cannot be kept.
    fn end(&mut self, open: Self::Open) -> Result<Self::File, Self::Error>;
}

/// What an archive holds. Paths are normalised; empty folders are not kept.
#[derive(Debug)]
pub struct Unpacked<F> {
    /// Regular files, hard links among them as files of their own.
    pub files: Vec<(String, F)>,
    /// Symlinks: path and target as written.
    pub links: Vec<(String, String)>,
}

/// Unpacks a whole archive, to the end of the stream. `tap` sees every decompressed byte once, in order.
///
/// # Errors
/// When an entry is refused, a limit is passed, the stream is damaged or the output fails. What the output took by then
/// is for its owner to drop.
pub fn unpack<O: Output>(
    input: impl Read,
    format: Format,
    limits: &Limits,
    output: &mut O,
    tap: &mut dyn FnMut(&[u8]),
) -> Result<Unpacked<O::File>, UnpackError<O::Error>> {
    let leashed = Leashed::new(input, format, limits).map_err(|source| UnpackError::Damaged {
        entry: String::new(),
        source,
    })?;
    let mut walk = Walk {
        input: Tapped {
            inner: leashed,
            tap,
        },
        output,
        shape: Shape::new(limits.entries),
        budget: limits.entries,
        limits,
        found: Unpacked {
            files: Vec::new(),
            links: Vec::new(),
        },
        index: HashMap::new(),
        last: String::new(),
        buffer: vec![0; COPY_BUFFER],
    };
    walk.entries()?;
    walk.rest()?;
    walk.shape.finish()?;
    Ok(walk.found)
}

struct Walk<'a, O: Output> {
    input: Tapped<'a>,
    output: &'a mut O,
    shape: Shape,
    /// Entries that may still come; repeated folders count too.
    budget: usize,
    limits: &'a Limits,
    found: Unpacked<O::File>,
    /// Where in `found.files` a path is, for hard links.
    index: HashMap<String, usize>,
    /// The entry that is being looked at.
    last: String,
    buffer: Vec<u8>,
}

impl<O: Output> Walk<'_, O> {
    fn entries(&mut self) -> Result<(), UnpackError<O::Error>> {
        loop {
            let header = match header::next(&mut self.input) {
                Ok(Some(header)) => header,
                Ok(None) => return Ok(()),
                Err(HeaderError::Io(error)) => return Err(self.damaged(error)),
                Err(HeaderError::Refused(name, reason)) => {
                    self.last = String::from_utf8_lossy(&name).into_owned();
                    return Err(self.refused(reason));
                }
            };
            self.last = String::from_utf8_lossy(&header.name).into_owned();
            if self.budget == 0 {
                return Err(self.refused(Refusal::TooManyEntries {
                    limit: self.limits.entries,
                }));
            }
            self.budget -= 1;
            self.entry(&header)?;
        }
    }

    fn entry(&mut self, header: &Header) -> Result<(), UnpackError<O::Error>> {
        let path = self.judge(header).map_err(|reason| self.refused(reason))?;
        match header.kind {
            Kind::Folder => Ok(()),
            Kind::Symlink => {
                let target = String::from_utf8_lossy(&header.target).into_owned();
                self.found.links.push((path, target));
                Ok(())
            }
            Kind::HardLink => {
                // `judge` has seen that it names an earlier file.
                let target = normalise(&header.target).map_err(|reason| self.refused(reason))?;
                if let Some(at) = self.index.get(&target) {
                    let file = self.found.files[*at].1.clone();
                    self.keep(path, file);
                }
                Ok(())
            }
            Kind::File => {
                let file = self.content(header)?;
                self.keep(path, file);
                Ok(())
            }
        }
    }

    fn keep(&mut self, path: String, file: O::File) {
        self.index.insert(path.clone(), self.found.files.len());
        self.found.files.push((path, file));
    }

    /// Decides whether the entry is acceptable, and notes its path.
    fn judge(&mut self, header: &Header) -> Result<String, Refusal> {
        let path = normalise(&header.name)?;
        if header.kind != Kind::Symlink && header.mode & 0o7000 != 0 {
            return Err(Refusal::SpecialBits { mode: header.mode });
        }
        match header.kind {
            Kind::Folder => self.shape.folder(&path)?,
            Kind::File => {
                if header.size > self.limits.unpacked_bytes {
                    return Err(Refusal::TooLarge {
                        limit: self.limits.unpacked_bytes,
                    });
                }
                self.shape.file(&path)?;
            }
            Kind::Symlink => {
                let target = std::str::from_utf8(&header.target).map_err(|_| Refusal::NotUtf8)?;
                self.shape.link(&path, target)?;
            }
            Kind::HardLink => {
                let target = normalise(&header.target).map_err(|_| Refusal::LinkOutside {
                    target: String::from_utf8_lossy(&header.target).into_owned(),
                })?;
                if !self.shape.is_file(&target) {
                    return Err(Refusal::HardLinkTarget { target });
                }
                self.shape.file(&path)?;
            }
        }
        Ok(path)
    }

    fn content(&mut self, header: &Header) -> Result<O::File, UnpackError<O::Error>> {
        let executable = header.mode & 0o111 != 0;
        let mut open = self
            .output
            .begin(header.size, executable)
            .map_err(UnpackError::Output)?;
        let mut left = header.size;
        while left > 0 {
            let want = usize::try_from(left).map_or(COPY_BUFFER, |left| left.min(COPY_BUFFER));
            let got = match self.input.read(&mut self.buffer[..want]) {
                Ok(0) => return Err(self.damaged(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.damaged(error)),
            };
            self.output
                .write(&mut open, &self.buffer[..got])
                .map_err(UnpackError::Output)?;
            left -= got as u64;
        }
        let file = self.output.end(open).map_err(UnpackError::Output)?;
        let mut padding = [0; header::BLOCK];
        self.input
            .read_exact(&mut padding[..header::padding(header.size)])
            .map_err(|error| self.damaged(error))?;
        Ok(file)
    }

    /// Reads what follows the end of the archive (padding, as a rule): the stream's own checksum and digest cover it.
    fn rest(&mut self) -> Result<(), UnpackError<O::Error>> {
        loop {
            match self.input.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.damaged(error)),
            }
        }
    }

    fn refused(&self, reason: Refusal) -> UnpackError<O::Error> {
        Refused::new(self.last.clone(), reason).into()
    }

    fn damaged(&self, source: io::Error) -> UnpackError<O::Error> {
        match refusal(&source) {
            Some(reason) => self.refused(reason.clone()),
            None => UnpackError::Damaged {
                entry: self.last.clone(),
                source,
            },
        }
    }
}

struct Tapped<'a> {
    inner: Leashed<'a>,
    tap: &'a mut dyn FnMut(&[u8]),
}

impl Read for Tapped<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        (self.tap)(&buffer[..got]);
        Ok(got)
    }
}

#[cfg(test)]
mod tests;
