//! Reads a layout in a tar, of which nothing is believed: a table of contents first, then each blob where it lies, hashed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use km_host::Error as HostError;
use oci_spec::image::ImageManifest;
use serde_json::Value;

use super::{CHUNK, Index, MANIFEST_TYPE};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::pull::{Blobs, Download};
use crate::reference::Reference;
use crate::registry::BlobSink as _;
use crate::trust::Evidence;

/// The most entries of a file that are read: an artifact has tens of blobs.
const ENTRIES_MAX: usize = 100_000;

/// The largest `index.json`, manifest or signature that is read, in bytes.
const DOCUMENT_MAX: u64 = 4 << 20;

/// A file's table of contents.
pub(super) struct Layout {
    path: PathBuf,
    index: Index,
    /// Offset and size of each blob in the file.
    blobs: BTreeMap<Digest, (u64, u64)>,
}

impl Layout {
    pub(super) fn open(path: &Path) -> Result<Layout> {
        let file = File::open(path).map_err(HostError::io("open", path))?;
        let refused = |problem: String| Error::Layout {
            path: path.to_owned(),
            problem,
        };
        let unreadable = |error: io::Error| refused(format!("it cannot be read as a tar: {error}"));
        let mut archive = tar::Archive::new(file);
        let mut layout = None;
        let mut index = None;
        let mut blobs = BTreeMap::new();
        for (count, entry) in archive.entries_with_seek().map_err(unreadable)?.enumerate() {
            if count >= ENTRIES_MAX {
                return Err(refused(format!("it has more than {ENTRIES_MAX} entries")));
            }
            let mut entry = entry.map_err(unreadable)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let name = name
                .strip_prefix("./")
                .unwrap_or(&name)
                .trim_end_matches('/');
            let kind = entry.header().entry_type();
            if kind.is_dir() || kind.is_pax_global_extensions() {
                continue;
            }
            if !kind.is_file() {
                return Err(refused(format!("its entry {name:?} is no regular file")));
            }
            let mut small = || -> Result<Vec<u8>> {
                let mut bytes = Vec::new();
                (&mut entry)
                    .take(DOCUMENT_MAX + 1)
                    .read_to_end(&mut bytes)
                    .map_err(unreadable)?;
                if bytes.len() as u64 > DOCUMENT_MAX {
                    return Err(refused(format!(
                        "{name} has more than {DOCUMENT_MAX} bytes"
                    )));
                }
                Ok(bytes)
            };
            match name.strip_prefix("blobs/") {
                None if name == "oci-layout" => layout = Some(small()?),
                None if name == "index.json" => index = Some(small()?),
                Some(blob) => {
                    let digest: Digest = blob.replacen('/', ":", 1).parse().map_err(|error| {
                        refused(format!("its entry {name:?} is no blob's: {error}"))
                    })?;
                    blobs.insert(digest, (entry.raw_file_position(), entry.size()));
                }
                None => return Err(refused(format!("its entry {name:?} is none of a layout's"))),
            }
        }
        let version: Option<Value> = layout.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if version.is_none_or(|version| version["imageLayoutVersion"] != "1.0.0") {
            return Err(refused("it has no oci-layout of version 1.0.0".to_owned()));
        }
        let index = index.ok_or_else(|| refused("it has no index.json".to_owned()))?;
        let index = serde_json::from_slice(&index)
            .map_err(|error| refused(format!("its index.json is none: {error}")))?;
        Ok(Layout {
            path: path.to_owned(),
            index,
            blobs,
        })
    }

    /// The artifacts by name: manifests with a whole reference for a name that are no signatures.
    pub(super) fn artifacts(&self) -> Result<BTreeMap<Reference, Digest>> {
        let mut found = BTreeMap::new();
        for entry in &self.index.manifests {
            let Some(name) = entry.name().filter(|name| !is_signature_tag(name)) else {
                continue;
            };
            let reference: Reference = name.parse().map_err(|error| {
                self.refused(format!(
                    "its manifest {} is named {name:?}, which is no whole reference ({error}); name it registry/repository:tag",
                    entry.digest
                ))
            })?;
            let digest = entry.digest.parse().map_err(|error| {
                self.refused(format!("{name} has the digest {:?}: {error}", entry.digest))
            })?;
            if entry.media_type != MANIFEST_TYPE {
                return Err(self.refused(format!(
                    "{name} is a {:?}; export the manifest of one platform",
                    entry.media_type
                )));
            }
            found.insert(reference, digest);
        }
        if found.is_empty() {
            return Err(self.refused("it names no artifact".to_owned()));
        }
        Ok(found)
    }

    fn refused(&self, problem: String) -> Error {
        Error::Layout {
            path: self.path.clone(),
            problem,
        }
    }

    /// A small blob, verified.
    pub(super) fn document(&self, digest: &Digest) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (mut from, size) = self.blob(digest)?;
        if size > DOCUMENT_MAX {
            return Err(self.refused(format!("{digest} has more than {DOCUMENT_MAX} bytes")));
        }
        from.read_to_end(&mut bytes)
            .map_err(HostError::io("read", &self.path))?;
        let got = Digest::with(digest.algorithm(), &bytes);
        if got == *digest {
            return Ok(bytes);
        }
        Err(Error::Digest {
            what: format!("a blob of {}", self.path.display()),
            expected: digest.clone(),
            got,
        })
    }

    fn blob(&self, digest: &Digest) -> Result<(io::Take<File>, u64)> {
        let Some((offset, size)) = self.blobs.get(digest) else {
            return Err(self.refused(format!("blob {digest} is not in it")));
        };
        let mut file = File::open(&self.path).map_err(HostError::io("open", &self.path))?;
        file.seek(SeekFrom::Start(*offset))
            .map_err(HostError::io("read", &self.path))?;
        Ok((file.take(*size), *size))
    }

    /// The index that names a manifest, where the file has it beside.
    pub(super) fn index_of(&self, manifest: &Digest) -> Result<Option<(Digest, Vec<u8>)>> {
        let listed: BTreeSet<&str> = self
            .index
            .manifests
            .iter()
            .map(|entry| entry.digest.as_str())
            .collect();
        for (digest, (_, size)) in &self.blobs {
            if *size > DOCUMENT_MAX || listed.contains(digest.to_string().as_str()) {
                continue;
            }
            let bytes = self.document(digest)?;
            let index: Option<Index> = serde_json::from_slice(&bytes).ok();
            let wanted = manifest.to_string();
            let names = |index: Index| index.manifests.iter().any(|one| one.digest == wanted);
            if index.is_some_and(names) {
                return Ok(Some((digest.clone(), bytes)));
            }
        }
        Ok(None)
    }

    /// The signatures of these digests.
    pub(super) fn evidence(&self, of: &BTreeSet<Digest>) -> Result<Vec<Evidence>> {
        let mut found = Vec::new();
        for entry in &self.index.manifests {
            let Ok(digest) = entry.digest.parse::<Digest>() else {
                continue;
            };
            let tagged = of.iter().find_map(|of| {
                let tag = Evidence::legacy_tag(of);
                let name = entry.name()?;
                name.ends_with(&format!(":{tag}"))
                    .then(|| (of.clone(), Some(tag)))
            });
            let bytes = match (&tagged, entry.name()) {
                (None, Some(_)) => continue,
                _ => self.document(&digest)?,
            };
            let Some((of, tag)) = tagged.or_else(|| {
                let subject = subject(&bytes)?;
                of.contains(&subject).then_some((subject, None))
            }) else {
                continue;
            };
            let Ok(parts) = Evidence::parts(&bytes) else {
                continue;
            };
            let mut blobs = BTreeMap::new();
            for (part, _) in parts {
                let bytes = self.document(&part)?;
                blobs.insert(part, bytes);
            }
            found.push(Evidence {
                digest,
                media_type: entry.media_type.clone(),
                artifact_type: entry.artifact_type.clone(),
                bytes,
                blobs,
                of,
                tag,
            });
        }
        Ok(found)
    }
}

fn subject(manifest: &[u8]) -> Option<Digest> {
    let manifest: ImageManifest = serde_json::from_slice(manifest).ok()?;
    let subject = manifest.subject().as_ref()?;
    subject.digest().to_string().parse().ok()
}

fn is_signature_tag(name: &str) -> bool {
    let tag = name.rsplit(':').next().unwrap_or_default();
    Evidence::of_legacy_tag(tag).is_some()
}

impl Blobs for Layout {
    fn is_only_source(&self) -> bool {
        true
    }

    async fn fetch(&self, digest: &Digest, size: u64, into: &mut Download<'_>) -> Result<()> {
        let (mut from, held) = self.blob(digest)?;
        if held != size {
            return Err(self.refused(format!(
                "blob {digest} has {held} bytes, its manifest says {size}"
            )));
        }
        let mut hasher = Hasher::like(digest);
        let mut buffer = vec![0; CHUNK];
        loop {
            let got = from
                .read(&mut buffer)
                .map_err(HostError::io("read", &self.path))?;
            if got == 0 {
                break;
            }
            hasher.update(&buffer[..got]);
            into.write(&buffer[..got])
                .map_err(|error| match error.downcast::<Error>() {
                    Ok(ours) => ours,
                    Err(error) => HostError::io("store a blob of", &self.path)(error).into(),
                })?;
        }
        let got = hasher.finish();
        if got == *digest {
            return Ok(());
        }
        Err(Error::Digest {
            what: format!("a blob of {}", self.path.display()),
            expected: digest.clone(),
            got,
        })
    }
}
