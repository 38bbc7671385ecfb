//! Whether an artifact is complete, and what it is made of: manifest, layers, records of unpacked layers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use km_host::Error as HostError;
use serde::{Deserialize, Serialize};

use super::Store;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::{Artifact, ArtifactFile, ArtifactLink, FILE_MODE, Layer};
use crate::layers::{Part, PartError, Role, parse, parts};
use crate::unpack::{Refused, Shape};

/// What an archive layer unpacked to: `.store/unpacked/sha256/<layer>.json`. Its files are in `.store/files`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Record {
    /// Digest of the layer's blob.
    pub(crate) layer: Digest,
    /// Digest of the uncompressed tar.
    pub(crate) content: Digest,
    /// In the archive's order.
    pub(crate) files: Vec<ArtifactFile>,
    pub(crate) links: Vec<ArtifactLink>,
}

impl Store {
    /// The artifact with that manifest, when the manifest and every file of it are here; `None` when something lacks.
    /// Presence, type and size are looked at; [`Store::check`] looks deeper.
    ///
    /// # Errors
    /// When the manifest is no artifact's, its layers do not fit together, or the disk fails.
    pub fn artifact(&self, manifest: &Digest) -> Result<Option<Artifact>> {
        let Some(bytes) = self.manifest_bytes(manifest)? else {
            return Ok(None);
        };
        self.assemble(manifest, &bytes)
    }

    /// The artifact that a manifest's bytes describe, when all its layers are here; whether the manifest itself is does not
    /// matter.
    pub(crate) fn assemble(&self, manifest: &Digest, bytes: &[u8]) -> Result<Option<Artifact>> {
        let usable = |problem| Error::Manifest {
            manifest: manifest.clone(),
            problem,
        };
        let parsed = parse(bytes).map_err(usable)?;
        let config =
            crate::layers::digest(parsed.config()).map_err(|error| part_error(manifest, error))?;
        if !self.has_blob(&config, parsed.config().size())? {
            return Ok(None);
        }
        let mut artifact = Artifact {
            manifest: manifest.clone(),
            artifact_type: parsed.artifact_type().as_ref().map(ToString::to_string),
            annotations: parsed
                .annotations()
                .clone()
                .unwrap_or_default()
                .into_iter()
                .collect(),
            layers: Vec::new(),
            files: Vec::new(),
            links: Vec::new(),
        };
        for part in parts(&parsed).map_err(|error| part_error(manifest, error))? {
            if !self.add_part(&mut artifact, &part)? {
                return Ok(None);
            }
        }
        fit_together(&mut artifact)?;
        Ok(Some(artifact))
    }

    /// Where the content of an artifact's file is, to be read and never written.
    pub fn file_path(&self, file: &ArtifactFile) -> PathBuf {
        self.content_path(&file.digest, file.executable)
    }

    fn add_part(&self, artifact: &mut Artifact, part: &Part) -> Result<bool> {
        match &part.role {
            Role::Raw { path } => {
                if !self.has_content(&part.digest, part.size, false)?
                    || !self.has_blob(&part.digest, part.size)?
                {
                    return Ok(false);
                }
                artifact.files.push(ArtifactFile {
                    path: path.clone(),
                    digest: part.digest.clone(),
                    size: part.size,
                    executable: false,
                });
            }
            Role::Archive { content, .. } => {
                let Some(record) = self.unpacked(&part.digest, content.as_ref())? else {
                    return Ok(false);
                };
                artifact.files.extend(record.files);
                artifact.links.extend(record.links);
            }
        }
        artifact.layers.push(Layer {
            digest: part.digest.clone(),
            size: part.size,
            media_type: part.media_type.clone(),
            unpacked: matches!(part.role, Role::Archive { .. }),
        });
        Ok(true)
    }

    /// The record of an unpacked layer, when all its files are here and the tar in it was the one that is expected.
    pub(crate) fn unpacked(
        &self,
        layer: &Digest,
        content: Option<&Digest>,
    ) -> Result<Option<Record>> {
        let Some(record) = self.read_record(layer)? else {
            return Ok(None);
        };
        if content.is_some_and(|content| *content != record.content) {
            return Ok(None);
        }
        for file in &record.files {
            if !self.has_content(&file.digest, file.size, file.executable)? {
                return Ok(None);
            }
        }
        Ok(Some(record))
    }

    /// Writes down what a layer unpacked to; its files must be in place.
    pub(crate) fn write_record(&self, record: &Record) -> Result<()> {
        let path = self.record_path(&record.layer);
        self.write_file(&path, &to_json(&path, record)?, FILE_MODE)
    }

    fn read_record(&self, layer: &Digest) -> Result<Option<Record>> {
        let path = self.record_path(layer);
        let Some(bytes) = read(&path)? else {
            return Ok(None);
        };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) if record.layer == *layer => Ok(Some(record)),
            // Unpacking again makes it anew.
            Ok(_) | Err(_) => {
                tracing::warn!(path = %path.display(), "unusable record of an unpacked layer; it will be unpacked again");
                Ok(None)
            }
        }
    }

    /// A manifest's bytes, when they are here and right.
    pub(crate) fn manifest_bytes(&self, manifest: &Digest) -> Result<Option<Vec<u8>>> {
        let path = self.blob_path(manifest);
        let Some(bytes) = read(&path)? else {
            return Ok(None);
        };
        if Digest::with(manifest.algorithm(), &bytes) == *manifest {
            return Ok(Some(bytes));
        }
        tracing::warn!(path = %path.display(), "manifest does not match its digest; it will be fetched again");
        Ok(None)
    }
}

/// Checks all layers of an artifact together and sorts their paths.
fn fit_together(artifact: &mut Artifact) -> Result<()> {
    check_shape(artifact).map_err(|source| Error::Hostile {
        origin: format!("manifest {}", artifact.manifest),
        source,
    })?;
    artifact.files.sort_by(|a, b| a.path.cmp(&b.path));
    artifact.links.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(())
}

fn check_shape(artifact: &Artifact) -> std::result::Result<(), Refused> {
    // How many paths each layer may have was checked when it was unpacked.
    let mut shape = Shape::new(usize::MAX);
    for file in &artifact.files {
        shape
            .file(&file.path)
            .map_err(|reason| Refused::new(&file.path, reason))?;
    }
    for link in &artifact.links {
        shape
            .link(&link.path, &link.target)
            .map_err(|reason| Refused::new(&link.path, reason))?;
    }
    shape.finish()
}

pub(crate) fn part_error(manifest: &Digest, error: PartError) -> Error {
    match error {
        PartError::Unusable(problem) => Error::Manifest {
            manifest: manifest.clone(),
            problem,
        },
        PartError::Refused(source) => Error::Hostile {
            origin: format!("manifest {manifest}"),
            source,
        },
    }
}

/// A file's bytes; `None` when it is absent.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HostError::io("read", path)(error).into()),
    }
}

/// Pretty JSON with a newline at the end: people read these files.
pub(super) fn to_json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| HostError::io("encode", path)(io::Error::from(error)))?;
    bytes.push(b'\n');
    Ok(bytes)
}
