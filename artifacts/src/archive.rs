//! Artifacts in one file: an OCI image layout in a tar (image specification, image-layout.md), for sites without a network.
//!
//! [`export`] writes blobs as they are in the store, with the signatures that belong to them. [`import`] trusts nothing of a
//! file: its entries may only be a layout's, every blob is hashed before anything is made of it, and then it goes the way of
//! a pulled one, with the same refusals.
//!
//! It must not know of registries and classes.

mod layout;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write as _};
use std::path::{Path, PathBuf};

use km_host::{Error as HostError, atomic};
use oci_spec::image::ImageManifest;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use layout::Layout;

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::index::{Entry, REF_NAME};
use crate::layers;
use crate::progress::{Item, Progress};
use crate::pull::{Root, pull_from};
use crate::reference::Reference;
use crate::store::Store;
use crate::unpack::Limits;

/// Media type of a manifest (image specification, media-types.md).
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// What `oci-layout` says (image specification, image-layout.md).
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// Bytes copied at once.
const CHUNK: usize = 256 * 1024;

/// An artifact to export.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Export {
    /// The name that it has in the file, and by which it is found after the import.
    pub reference: Reference,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Digest of what the reference led to: of the index if there was one.
    pub source: Digest,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Blobs, manifests among them.
    pub blobs: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// Manifests of signatures among the blobs.
    pub signatures: usize,
}

/// An artifact that was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Its name.
    pub reference: Reference,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Bytes of its files.
    pub bytes: u64,
    /// Manifests of signatures that came with it; none of them is believed before it is verified.
    pub signatures: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    #[serde(default)]
    manifests: Vec<Entry>,
}

/// What goes into a file: small documents, and blobs that are files of the store.
#[derive(Default)]
struct Content {
    entries: Vec<Entry>,
    documents: BTreeMap<Digest, Vec<u8>>,
    blobs: BTreeMap<Digest, u64>,
    signatures: usize,
}

/// Writes artifacts into one file, which appears whole or not at all. The same artifacts give the same bytes.
///
/// # Errors
/// [`Error::Dropped`] when the blob of an archive layer is not here any more; the disk's errors.
pub fn export(
    store: &Store,
    wanted: &[Export],
    to: &Path,
    progress: &dyn Progress,
) -> Result<Exported> {
    let content = gather(store, wanted)?;
    let total = content.blobs.values().sum();
    progress.begin(&[Item {
        name: to.display().to_string(),
        bytes: total,
    }]);
    let (folder, name) = match (to.parent(), to.file_name()) {
        (Some(folder), Some(name)) if folder != Path::new("") => (folder.to_owned(), name),
        (_, Some(name)) => (PathBuf::from("."), name),
        _ => {
            return Err(
                HostError::io("write", to)(io::Error::from(io::ErrorKind::IsADirectory)).into(),
            );
        }
    };
    let temp = folder.join(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    let written = write_layout(store, &content, &temp, progress)
        .and_then(|bytes| Ok(atomic::rename(&temp, to).map(|()| bytes)?));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temp);
    }
    progress.done(0);
    Ok(Exported {
        blobs: content.blobs.len() + content.documents.len(),
        bytes: written?,
        signatures: content.signatures,
    })
}

fn gather(store: &Store, wanted: &[Export]) -> Result<Content> {
    let mut content = Content::default();
    let mut dropped = BTreeSet::new();
    for export in wanted {
        let bytes = store
            .manifest_bytes(&export.manifest)?
            .ok_or_else(|| Error::Dropped {
                reference: export.reference.to_string(),
                blobs: vec![export.manifest.clone()],
            })?;
        let manifest = layers::parse(&bytes).map_err(|problem| Error::Manifest {
            manifest: export.manifest.clone(),
            problem,
        })?;
        for part in manifest.layers().iter().chain([manifest.config()]) {
            let digest = layers::digest(part)
                .map_err(|error| crate::store::part_error(&export.manifest, error))?;
            if store.has_blob(&digest, part.size())? {
                content.blobs.insert(digest, part.size());
            } else {
                dropped.insert(digest);
            }
        }
        if !dropped.is_empty() {
            return Err(Error::Dropped {
                reference: export.reference.to_string(),
                blobs: dropped.into_iter().collect(),
            });
        }
        let entry = listing(&export.manifest, &bytes, Some(export.reference.to_string()));
        content.entries.push(entry);
        content.documents.insert(export.manifest.clone(), bytes);
        if let Some(index) = store.manifest_bytes(&export.source)? {
            content.documents.insert(export.source.clone(), index);
        }
        let of = BTreeSet::from([export.manifest.clone(), export.source.clone()]);
        for evidence in store.signatures_of(&of)? {
            let name = evidence.tag.as_ref();
            let name = name.map(|tag| export.reference.with_tag(tag).to_string());
            content
                .entries
                .push(listing(&evidence.digest, &evidence.bytes, name));
            content.signatures += 1;
            content.documents.extend(evidence.blobs);
            content.documents.insert(evidence.digest, evidence.bytes);
        }
    }
    let documents = &content.documents;
    content
        .blobs
        .retain(|digest, _| !documents.contains_key(digest));
    content
        .entries
        .sort_by_key(|entry| (entry.digest.clone(), entry.name().map(str::to_owned)));
    content
        .entries
        .dedup_by_key(|entry| (entry.digest.clone(), entry.name().map(str::to_owned)));
    Ok(content)
}

fn listing(digest: &Digest, bytes: &[u8], name: Option<String>) -> Entry {
    let manifest: Option<ImageManifest> = serde_json::from_slice(bytes).ok();
    let manifest = manifest.as_ref();
    let media_type = manifest.and_then(|manifest| manifest.media_type().as_ref());
    let artifact_type = manifest.and_then(|manifest| manifest.artifact_type().as_ref());
    let mut annotations = Map::new();
    if let Some(name) = name {
        annotations.insert(REF_NAME.to_owned(), name.into());
    }
    Entry {
        media_type: media_type.map_or_else(|| MANIFEST_TYPE.to_owned(), ToString::to_string),
        digest: digest.to_string(),
        size: bytes.len() as u64,
        artifact_type: artifact_type.map(ToString::to_string),
        annotations,
    }
}

fn write_layout(
    store: &Store,
    content: &Content,
    temp: &Path,
    progress: &dyn Progress,
) -> Result<u64> {
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(temp)
        .map_err(HostError::io("create", temp))?;
    let failed = |error: io::Error| Error::from(HostError::io("write", temp)(error));
    let mut tar = tar::Builder::new(BufWriter::with_capacity(CHUNK, file));
    let index = Index {
        schema_version: 2,
        manifests: content.entries.clone(),
    };
    let index = serde_json::to_vec_pretty(&index).map_err(|error| failed(error.into()))?;
    append(&mut tar, "oci-layout", LAYOUT.len() as u64, LAYOUT).map_err(failed)?;
    append(&mut tar, "index.json", index.len() as u64, &index[..]).map_err(failed)?;
    for (digest, bytes) in &content.documents {
        append(&mut tar, &blob_name(digest), bytes.len() as u64, &bytes[..]).map_err(failed)?;
    }
    for (digest, size) in &content.blobs {
        let path = store.blob_path(digest);
        let blob = File::open(&path).map_err(HostError::io("open", &path))?;
        let mut counted = Counted {
            inner: blob,
            hasher: Hasher::like(digest),
            progress,
        };
        append(&mut tar, &blob_name(digest), *size, &mut counted).map_err(failed)?;
        let got = counted.hasher.finish();
        if got != *digest {
            return Err(Error::Digest {
                what: format!("blob {}", path.display()),
                expected: digest.clone(),
                got,
            });
        }
    }
    let file = tar
        .into_inner()
        .and_then(|mut writer| {
            writer.flush()?;
            writer.into_inner().map_err(io::IntoInnerError::into_error)
        })
        .map_err(failed)?;
    file.sync_all().map_err(failed)?;
    Ok(file.metadata().map_err(failed)?.len())
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex())
}

/// Nothing in a header depends on when or where it was written.
fn append(
    tar: &mut tar::Builder<impl io::Write>,
    name: &str,
    size: u64,
    from: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, name, from.take(size))
}

/// Hashes and counts what is read.
struct Counted<'a> {
    inner: File,
    hasher: Hasher,
    progress: &'a dyn Progress,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..got]);
        self.progress.advance(0, got as u64);
        Ok(got)
    }
}

/// Brings every named artifact of a file into the store, with its signatures. Its blobs are read where they are: nothing is
/// unpacked beside it. The store must be initialised and its lock held.
///
/// # Errors
/// [`Error::Layout`] when the file is no layout; content that does not verify; the disk's errors. Of what failed nothing is
/// under a final name.
pub async fn import(
    store: &Store,
    from: &Path,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Vec<Imported>> {
    let layout = Layout::open(from)?;
    let mut imported = Vec::new();
    for (reference, digest) in layout.artifacts()? {
        let bytes = layout.document(&digest)?;
        let name = reference.to_string();
        let root = Root {
            reference: &name,
            digest: &digest,
            media_type: MANIFEST_TYPE,
            bytes: &bytes,
        };
        let artifact = pull_from(store, &layout, root, limits, progress).await?;
        let mut of = BTreeSet::from([digest.clone()]);
        let index = layout.index_of(&digest)?;
        of.extend(index.iter().map(|(digest, _)| digest.clone()));
        let evidence = layout.evidence(&of)?;
        let index = index.as_ref().map(|(digest, bytes)| (digest, &bytes[..]));
        store.keep_signatures(&reference, index, &evidence)?;
        imported.push(Imported {
            reference,
            bytes: artifact.bytes(),
            manifest: digest,
            signatures: evidence.len(),
        });
    }
    Ok(imported)
}

#[cfg(test)]
mod tests;
