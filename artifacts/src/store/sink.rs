//! Writes one stream of known length into a temporary file: space reserved before the first byte, hashed and written in large
//! aligned pieces past the page cache, synced when it is placed. A large file has threads that write.
//!
//! It must not know where the bytes come from. Blobs from a registry, which can be taken up again, are in `partial.rs`.

use std::io;
use std::sync::Arc;

use super::direct::{Buffer, DirectFile};
use super::writer::Writer;
use super::{Store, TempFile};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};

/// What a hole is hashed as.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A temporary file that is being written; dropping it removes the file.
#[derive(Debug)]
pub(crate) struct FileSink {
    file: Arc<DirectFile>,
    temp: TempFile,
    /// None for a small file.
    writer: Option<Writer>,
    hasher: Hasher,
    buffer: Buffer,
    size: u64,
    /// Bytes written, left out or handed to the writer; those in the buffer come behind them.
    written: u64,
}

impl FileSink {
    /// Creates the file and reserves its whole size.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when there is no room; other errors of the disk.
    pub(crate) fn create(store: &Store, what: &str, size: u64) -> Result<FileSink> {
        let (file, temp) = store.temp_file(what)?;
        let file = Arc::new(DirectFile::new(file, temp.path(), size));
        file.reserve(size)?;
        FileSink::new(file, temp, size)
    }

    /// Creates a file that may have holes: nothing is reserved, and it goes through the page cache, since its parts begin
    /// anywhere.
    ///
    /// # Errors
    /// Errors of the disk.
    pub(crate) fn create_sparse(store: &Store, what: &str, size: u64) -> Result<FileSink> {
        let (file, temp) = store.temp_file(what)?;
        let file = Arc::new(DirectFile::new(file, temp.path(), 0));
        let sized = file.plain().set_len(size);
        sized.map_err(|error| file.error("set the size of", size, error))?;
        FileSink::new(file, temp, size)
    }

    fn new(file: Arc<DirectFile>, temp: TempFile, size: u64) -> Result<FileSink> {
        let writer = if file.is_direct() {
            let started = Writer::start(Arc::clone(&file), |_, _| {});
            Some(started.map_err(|error| file.error("write", size, error))?)
        } else {
            None
        };
        Ok(FileSink {
            file,
            temp,
            writer,
            hasher: Hasher::new(),
            buffer: Buffer::take(),
            size,
            written: 0,
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// When the disk fails, or when there are more bytes than were announced.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        let got = self.taken() + bytes.len() as u64;
        if got > self.size {
            return Err(self.wrong_size(got));
        }
        while !bytes.is_empty() {
            let taken = self.buffer.fill(bytes);
            bytes = &bytes[taken..];
            if self.buffer.is_full() {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Leaves out bytes, which are zero then; only of a file that may have holes.
    ///
    /// # Errors
    /// As for [`FileSink::write`].
    pub(crate) fn hole(&mut self, bytes: u64) -> Result<()> {
        let got = self.taken().saturating_add(bytes);
        if got > self.size {
            return Err(self.wrong_size(got));
        }
        self.flush()?;
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..piece as usize]);
            left -= piece;
        }
        self.written += bytes;
        Ok(())
    }

    /// Writes what is buffered and hands the file over, with its SHA-256 digest. It is synced when it is placed under its
    /// final name.
    ///
    /// # Errors
    /// When the disk fails, or when fewer bytes came than were announced.
    pub(crate) fn finish(mut self) -> Result<(TempFile, Digest)> {
        self.flush()?;
        if self.written != self.size {
            return Err(self.wrong_size(self.written));
        }
        if let Some(writer) = &self.writer {
            writer.drain().map_err(|error| self.error(error))?;
        }
        Ok((self.temp, self.hasher.finish()))
    }

    fn error(&self, error: io::Error) -> Error {
        self.file.error("write", self.size, error)
    }

    fn taken(&self) -> u64 {
        self.written + self.buffer.filled().len() as u64
    }

    fn wrong_size(&self, got: u64) -> Error {
        Error::Size {
            path: self.temp.path().to_owned(),
            expected: self.size,
            got,
        }
    }

    fn flush(&mut self) -> Result<()> {
        let (at, taken) = (self.written, self.taken());
        self.hasher.update(self.buffer.filled());
        let written = match &self.writer {
            Some(writer) => {
                let full = std::mem::replace(&mut self.buffer, Buffer::take());
                writer.submit(at, full)
            }
            None => self.file.write_at(at, self.buffer.filled()),
        };
        written.map_err(|error| self.error(error))?;
        self.buffer.clear();
        self.written = taken;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::direct::BUFFER;
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
        let bytes: Vec<u8> = (0..5_500_000u32).map(|n| (n % 251) as u8).collect();
        for piece in [1_000, 70_000, BUFFER, BUFFER + 1, bytes.len()] {
            let mut sink = FileSink::create(&store, "t", bytes.len() as u64).unwrap();
            for piece in bytes.chunks(piece) {
                sink.write(piece).unwrap();
            }
            let (temp, digest) = sink.finish().unwrap();
            assert!(fs::read(temp.path()).unwrap() == bytes, "{piece}");
            assert_eq!(digest, Digest::of(&bytes), "{piece}");
        }
    }

    #[test]
    fn a_file_with_holes_has_them_and_the_digest_of_the_whole() {
        use std::os::unix::fs::MetadataExt;
        let (_dir, store) = store();
        let (first, last) = (vec![1; BUFFER + 700], vec![2; 5000]);
        let size = 64 << 20;
        let mut sink = FileSink::create_sparse(&store, "t", size).unwrap();
        sink.write(&first).unwrap();
        sink.hole(30 << 20).unwrap();
        sink.write(&last).unwrap();
        let rest = size - (30 << 20) - (first.len() + last.len()) as u64;
        assert!(sink.hole(rest + 1).is_err(), "past its end");
        sink.hole(rest).unwrap();
        let (temp, digest) = sink.finish().unwrap();
        let bytes = fs::read(temp.path()).unwrap();
        let mut whole = first.clone();
        whole.resize(first.len() + (30 << 20), 0);
        whole.extend_from_slice(&last);
        whole.resize(size as usize, 0);
        assert!(bytes == whole);
        assert_eq!(digest, Digest::of(&whole));
        let on_disk = fs::metadata(temp.path()).unwrap().blocks() * 512;
        assert!(on_disk < 2 << 20, "{on_disk} bytes for less than one MiB");
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
        let (_dir, store) = store();
        let huge = 1 << 60;
        let digest = crate::digest::Digest::of(b"huge");
        let error = store.make_room(&[(&digest, huge)]).unwrap_err();
        assert!(matches!(error, Error::DiskFull { needed, .. } if needed == huge));
        let text = error.to_string();
        assert!(
            text.contains("bytes are needed") && text.contains("artifactsDir"),
            "{text}"
        );
        store.make_room(&[(&digest, 1)]).unwrap();
        // Past the largest file or the free space: either way an error and no file.
        assert!(FileSink::create(&store, "t", huge).is_err());
        let left: Vec<_> = fs::read_dir(store.under("tmp"))
            .unwrap()
            .flat_map(|session| fs::read_dir(session.unwrap().path()).unwrap())
            .collect();
        assert!(left.is_empty());
    }
}
