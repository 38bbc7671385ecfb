//! From a stream to files and links: walks the entries, judges each, hands contents on.

use std::collections::HashMap;
use std::io::Read;

use super::ahead::Ahead;
use super::entries::Entries;
use super::header::{Header, Kind};
use super::path::normalise;
use super::stream::Leashed;
use super::{Format, Limits, Refusal, Shape, UnpackError};

/// Bytes handed to the output at once.
const COPY_BUFFER: usize = 256 << 10;

/// A file as an archive announces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Its bytes, holes included.
    pub size: u64,
    /// Any execute bit is set.
    pub executable: bool,
    /// There may be holes in it ([`Output::hole`]).
    pub sparse: bool,
}

/// Where contents go: one file after the other, in pieces.
pub trait Output {
    /// A file that is being written.
    type Open;
    /// What a finished file is known by.
    type File: Clone;
    /// Why it failed.
    type Error: std::error::Error + 'static;
    /// Starts a file.
    ///
    /// # Errors
    /// When there is no place for it.
    fn begin(&mut self, file: &NewFile) -> Result<Self::Open, Self::Error>;
    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// When they cannot be kept.
    fn write(&mut self, open: &mut Self::Open, bytes: &[u8]) -> Result<(), Self::Error>;
    /// Leaves out the next `bytes` bytes of the file: they are zero.
    ///
    /// # Errors
    /// When they cannot be left out.
    fn hole(&mut self, open: &mut Self::Open, bytes: u64) -> Result<(), Self::Error>;
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

/// Unpacks a whole archive, to the end of the stream. `tap` sees every decompressed byte once, in order, on a thread of its
/// own.
///
/// # Errors
/// When an entry is refused, a limit is passed, the stream is damaged or the output fails. What the output took by then
/// is for its owner to drop.
pub fn unpack<O: Output>(
    input: impl Read + Send,
    format: Format,
    limits: &Limits,
    output: &mut O,
    tap: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<Unpacked<O::File>, UnpackError<O::Error>> {
    std::thread::scope(move |scope| {
        let damaged = |source| UnpackError::<O::Error>::Damaged {
            entry: String::new(),
            source,
        };
        let leashed = Leashed::new(input, format, limits).map_err(damaged)?;
        let input = Ahead::start(scope, leashed, tap).map_err(damaged)?;
        let mut walk = Walk {
            entries: Entries::new(input),
            output,
            shape: Shape::new(limits.entries),
            budget: limits.entries,
            sparse_budget: limits.sparse_bytes,
            limits,
            found: Unpacked {
                files: Vec::new(),
                links: Vec::new(),
            },
            index: HashMap::new(),
            buffer: vec![0; COPY_BUFFER],
        };
        while let Some(header) = walk.entries.next()? {
            walk.entry(&header)?;
        }
        walk.entries.rest()?;
        walk.shape.finish()?;
        Ok(walk.found)
    })
}

struct Walk<'a, O: Output> {
    entries: Entries<Ahead>,
    output: &'a mut O,
    shape: Shape,
    /// Entries that may still come; repeated folders count too.
    budget: usize,
    /// Bytes that sparse files may still have.
    sparse_budget: u64,
    limits: &'a Limits,
    found: Unpacked<O::File>,
    /// Where in `found.files` a path is, for hard links.
    index: HashMap<String, usize>,
    buffer: Vec<u8>,
}

impl<O: Output> Walk<'_, O> {
    fn entry(&mut self, header: &Header) -> Result<(), UnpackError<O::Error>> {
        if self.budget == 0 {
            return Err(self.refused(Refusal::TooManyEntries {
                limit: self.limits.entries,
            }));
        }
        self.budget -= 1;
        let path = self.judge(header).map_err(|reason| self.refused(reason))?;
        match header.kind {
            // `judge` has refused what is nothing of the kind.
            Kind::Folder | Kind::Other(_) => Ok(()),
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
        if let Kind::Other(what) = header.kind {
            return Err(Refusal::Kind { what });
        }
        let path = normalise(&header.name)?;
        if header.kind != Kind::Symlink && header.mode & 0o7000 != 0 {
            return Err(Refusal::SpecialBits { mode: header.mode });
        }
        match header.kind {
            Kind::Folder | Kind::Other(_) => self.shape.folder(&path)?,
            Kind::File => {
                if header.size > self.limits.unpacked_bytes {
                    return Err(Refusal::TooLarge {
                        limit: self.limits.unpacked_bytes,
                    });
                }
                if let Some(sparse) = &header.sparse {
                    let left = self.sparse_budget.checked_sub(sparse.size);
                    let limit = self.limits.sparse_bytes;
                    self.sparse_budget = left.ok_or(Refusal::TooLarge { limit })?;
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
        let sparse = header.sparse.as_ref();
        let file = NewFile {
            size: sparse.map_or(header.size, |sparse| sparse.size),
            executable: header.mode & 0o111 != 0,
            sparse: sparse.is_some(),
        };
        let mut open = self.output.begin(&file).map_err(UnpackError::Output)?;
        let whole = [(0, header.size)];
        let parts = sparse.map_or(&whole[..], |sparse| &sparse.parts);
        let mut at = 0;
        for &(offset, length) in parts {
            self.hole(&mut open, offset - at)?;
            self.copy(&mut open, length)?;
            at = offset + length;
        }
        self.hole(&mut open, file.size - at)?;
        self.output.end(open).map_err(UnpackError::Output)
    }

    fn hole(&mut self, open: &mut O::Open, bytes: u64) -> Result<(), UnpackError<O::Error>> {
        if bytes == 0 {
            return Ok(());
        }
        let left = self.output.hole(open, bytes);
        left.map_err(UnpackError::Output)
    }

    /// Hands on so many bytes of the entry at hand, or as many as it has.
    fn copy(&mut self, open: &mut O::Open, bytes: u64) -> Result<(), UnpackError<O::Error>> {
        let mut left = bytes;
        while left > 0 {
            let most = usize::try_from(left).map_or(COPY_BUFFER, |left| left.min(COPY_BUFFER));
            let got = self.entries.read(&mut self.buffer[..most]);
            let got = got.map_err(|error| self.entries.damaged(error))?;
            if got == 0 {
                break;
            }
            left -= got as u64;
            let written = self.output.write(open, &self.buffer[..got]);
            written.map_err(UnpackError::Output)?;
        }
        Ok(())
    }

    fn refused(&self, reason: Refusal) -> UnpackError<O::Error> {
        self.entries.refused(reason).into()
    }
}

#[cfg(test)]
mod tests;
