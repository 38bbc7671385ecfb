//! Unpacks a layer into the store: contents into temporary files, and all of them placed only after the whole archive was
//! found acceptable.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;

use km_host::Error as HostError;

use super::sink::FileSink;
use super::{Record, Store, TempFile};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::generation::{ArtifactFile, ArtifactLink};
use crate::unpack::{Format, Limits, NewFile, Output, UnpackError, Unpacked, unpack};

/// The content that an archive has for one file.
#[derive(Clone, Debug)]
struct Kept {
    digest: Digest,
    size: u64,
    executable: bool,
}

/// A content that is being written.
struct Open {
    sink: FileSink,
    size: u64,
    executable: bool,
}

struct StoreOutput<'a> {
    store: &'a Store,
    /// What is to be placed; a content that is here twice is placed once.
    pending: Vec<(TempFile, Digest, bool)>,
    seen: HashSet<(Digest, bool)>,
}

impl<'a> StoreOutput<'a> {
    fn new(store: &'a Store) -> StoreOutput<'a> {
        StoreOutput {
            store,
            pending: Vec::new(),
            seen: HashSet::new(),
        }
    }
}

impl Output for StoreOutput<'_> {
    type Open = Open;
    type File = Kept;
    type Error = Error;

    fn begin(&mut self, file: &NewFile) -> Result<Open> {
        let create = match file.sparse {
            true => FileSink::create_sparse,
            false => FileSink::create,
        };
        Ok(Open {
            sink: create(self.store, "file", file.size)?,
            size: file.size,
            executable: file.executable,
        })
    }

    fn write(&mut self, open: &mut Open, bytes: &[u8]) -> Result<()> {
        open.sink.write(bytes)
    }

    fn hole(&mut self, open: &mut Open, bytes: u64) -> Result<()> {
        open.sink.hole(bytes)
    }

    fn end(&mut self, open: Open) -> Result<Kept> {
        let (size, executable) = (open.size, open.executable);
        let (temp, digest) = open.sink.finish()?;
        let present = self.store.has_content(&digest, size, executable)?;
        if !present && self.seen.insert((digest.clone(), executable)) {
            self.pending.push((temp, digest.clone(), executable));
        }
        Ok(Kept {
            digest,
            size,
            executable,
        })
    }
}

/// What a layer unpacked to, in temporary files; dropping it removes them.
pub(crate) struct UnpackedLayer {
    pending: Vec<(TempFile, Digest, bool)>,
    record: Record,
}

impl Store {
    /// Unpacks a layer whose blob is in the store, and writes down what it held. With `content`, the uncompressed tar must
    /// have that digest. Blocks for as long as it takes.
    ///
    /// # Errors
    /// When the archive is hostile or damaged, the digest differs, or the disk fails. Nothing is placed then.
    pub(crate) fn unpack_layer(
        &self,
        layer: &Digest,
        format: Format,
        content: Option<&Digest>,
        limits: &Limits,
    ) -> Result<Record> {
        let path = self.blob_path(layer);
        let blob = File::open(&path).map_err(HostError::io("open", &path))?;
        let length = blob
            .metadata()
            .map_err(HostError::io("look at", &path))?
            .len();
        let limits = limits.of_layer(format, length);
        self.keep_unpacked(self.unpack_stream(blob, layer, format, content, &limits)?)
    }

    /// Unpacks a layer into temporary files, and places nothing. The layer's own digest is its caller's to verify. Blocks for
    /// as long as it takes.
    ///
    /// # Errors
    /// As [`Store::unpack_layer`].
    pub(crate) fn unpack_stream(
        &self,
        blob: impl Read + Send,
        layer: &Digest,
        format: Format,
        content: Option<&Digest>,
        limits: &Limits,
    ) -> Result<UnpackedLayer> {
        let mut output = StoreOutput::new(self);
        let mut hasher = content.map_or_else(Hasher::new, Hasher::like);
        let unpacked = unpack(blob, format, limits, &mut output, &mut |bytes| {
            hasher.update(bytes);
        })
        .map_err(|error| layer_error(layer, error))?;
        let got = hasher.finish();
        if let Some(expected) = content.filter(|content| **content != got) {
            return Err(Error::Digest {
                what: format!("the tar inside layer {layer}"),
                expected: expected.clone(),
                got,
            });
        }
        Ok(UnpackedLayer {
            pending: output.pending,
            record: record(layer, got, unpacked),
        })
    }

    /// Places what a layer unpacked to and writes it down. The layer must have been verified.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn keep_unpacked(&self, unpacked: UnpackedLayer) -> Result<Record> {
        let UnpackedLayer { pending, record } = unpacked;
        let mut lacking = Vec::new();
        for (temp, digest, executable) in pending {
            // Another layer may have brought it meanwhile.
            let meta = fs::metadata(temp.path()).map_err(HostError::io("look at", temp.path()))?;
            if !self.has_content(&digest, meta.len(), executable)? {
                lacking.push((temp, digest, executable));
            }
        }
        self.place_contents(lacking)?;
        self.write_record(&record)?;
        Ok(record)
    }

    /// Unpacks a tar that is made while it is read, and writes down what it held as if it had been a layer: gives the layer's
    /// digest and size. `origin` says in errors what it is. Blocks for as long as it takes.
    ///
    /// # Errors
    /// As [`Store::unpack_layer`].
    pub(crate) fn unpack_tar(
        &self,
        tar: impl Read + Send,
        origin: &str,
        limits: &Limits,
    ) -> Result<(Digest, u64)> {
        let mut output = StoreOutput::new(self);
        let mut hasher = Hasher::new();
        let mut size = 0;
        let unpacked = unpack(tar, Format::Tar, limits, &mut output, &mut |bytes| {
            hasher.update(bytes);
            size += bytes.len() as u64;
        });
        let layer = hasher.finish();
        let unpacked = unpacked.map_err(|error| match error {
            UnpackError::Refused(source) => Error::Hostile {
                origin: origin.to_owned(),
                source,
            },
            other => layer_error(&layer, other),
        })?;
        self.place_contents(output.pending)?;
        self.write_record(&record(&layer, layer.clone(), unpacked))?;
        Ok((layer, size))
    }
}

fn record(layer: &Digest, content: Digest, unpacked: Unpacked<Kept>) -> Record {
    let files = unpacked.files.into_iter().map(|(path, kept)| ArtifactFile {
        path,
        digest: kept.digest,
        size: kept.size,
        executable: kept.executable,
    });
    let links = unpacked
        .links
        .into_iter()
        .map(|(path, target)| ArtifactLink { path, target });
    Record {
        layer: layer.clone(),
        content,
        files: files.collect(),
        links: links.collect(),
    }
}

fn layer_error(layer: &Digest, error: UnpackError<Error>) -> Error {
    match error {
        UnpackError::Refused(source) => Error::Hostile {
            origin: format!("layer {layer}"),
            source,
        },
        UnpackError::Damaged { entry, source } => Error::Archive {
            layer: layer.clone(),
            entry,
            source,
        },
        UnpackError::Output(error) => error,
    }
}
