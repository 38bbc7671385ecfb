//! The OCI image layout (image specification, image-layout.md): `oci-layout`, `index.json` and the names in it.
//!
//! `index.json` helps other tools to find manifests, and says what a reference led to last. What is live never depends on it: one
//! that is lost or damaged is made anew from the generations.

use std::collections::BTreeSet;

use oci_spec::image::ImageManifest;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::Store;
use super::complete::{read, to_json};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::GenerationManifest;
use crate::index::{Entry, REF_NAME};
use crate::reference::Reference;
use crate::registry::{Manifest, Resolved};
use crate::trust::{Evidence, Form};

/// The media type of a manifest that does not say its own (image specification, manifest.md).
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A manifest to be found in the layout.
#[derive(Clone, Debug)]
pub(crate) struct NamedManifest<'a> {
    pub(crate) reference: &'a str,
    pub(crate) digest: &'a Digest,
    pub(crate) size: u64,
    pub(crate) media_type: &'a str,
    pub(crate) artifact_type: Option<&'a str>,
}

#[derive(Debug, PartialEq, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: String,
    manifests: Vec<Entry>,
}

impl Index {
    fn empty() -> Index {
        Index {
            schema_version: 2,
            media_type: "application/vnd.oci.image.index.v1+json".to_owned(),
            manifests: Vec::new(),
        }
    }

    /// Moves the name to this manifest. The one that had it stays findable by its digest.
    fn name(&mut self, new: &NamedManifest<'_>) {
        for entry in &mut self.manifests {
            if entry.name() == Some(new.reference) {
                entry.annotations.remove(REF_NAME);
            }
        }
        let digest = new.digest.to_string();
        self.manifests
            .retain(|entry| entry.digest != digest || entry.name().is_some());
        let mut annotations = Map::new();
        annotations.insert(REF_NAME.to_owned(), new.reference.into());
        self.manifests.push(Entry {
            media_type: new.media_type.to_owned(),
            digest,
            size: new.size,
            artifact_type: new.artifact_type.map(str::to_owned),
            annotations,
        });
        self.tidy();
    }

    /// One nameless entry for a manifest is enough, and none when it has a name; the order does not depend on history.
    fn tidy(&mut self) {
        let named: BTreeSet<String> = self
            .manifests
            .iter()
            .filter(|entry| entry.name().is_some())
            .map(|entry| entry.digest.clone())
            .collect();
        self.manifests
            .retain(|entry| entry.name().is_some() || !named.contains(&entry.digest));
        self.manifests
            .sort_by_key(|entry| (entry.digest.clone(), entry.name().map(str::to_owned)));
        self.manifests
            .dedup_by_key(|entry| (entry.digest.clone(), entry.name().map(str::to_owned)));
    }
}

impl Store {
    /// Writes `oci-layout` and an empty `index.json` where they lack.
    pub(super) fn init_oci(&self) -> Result<()> {
        let layout = self.oci_dir().join("oci-layout");
        let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
        if read(&layout)?.as_deref() != Some(version) {
            self.write_file(&layout, version, 0o644)?;
        }
        if self.read_index()?.is_none() {
            self.write_index(&self.rebuilt()?)?;
        }
        Ok(())
    }

    /// The index as the generations tell it: their manifests, the newest of each reference by name, and the signatures that they
    /// record.
    fn rebuilt(&self) -> Result<Index> {
        let mut index = Index::empty();
        for class in self.classes()? {
            for number in self.numbers(&class)? {
                // One that cannot be read is told of by whoever needs it.
                if let Ok(generation) = self.generation(&class, number) {
                    self.list_again(&generation.manifest, &mut index)?;
                }
            }
        }
        index.tidy();
        Ok(index)
    }

    fn list_again(&self, generation: &GenerationManifest, index: &mut Index) -> Result<()> {
        let Ok(reference) = generation.reference.parse::<Reference>() else {
            return Ok(());
        };
        self.list_one(&generation.manifest, Some(reference.to_string()), index)?;
        for signer in &generation.signers {
            let name = match signer.form {
                Form::Bundle => None,
                Form::SimpleSigning => {
                    let tag = Evidence::legacy_tag(&signer.signed);
                    Some(reference.with_tag(&tag).to_string())
                }
            };
            self.list_one(&signer.manifest, name, index)?;
        }
        Ok(())
    }

    /// Lists a manifest, if it is here.
    fn list_one(&self, digest: &Digest, name: Option<String>, index: &mut Index) -> Result<()> {
        let Some(bytes) = self.manifest_bytes(digest)? else {
            return Ok(());
        };
        let parsed: Option<ImageManifest> = serde_json::from_slice(&bytes).ok();
        let parsed = parsed.as_ref();
        let media_type = parsed.and_then(|parsed| parsed.media_type().as_ref());
        let media_type = media_type.map_or_else(|| MANIFEST.to_owned(), ToString::to_string);
        let artifact_type = parsed.and_then(|parsed| parsed.artifact_type().as_ref());
        let artifact_type = artifact_type.map(ToString::to_string);
        let size = bytes.len() as u64;
        match name {
            Some(name) => index.name(&NamedManifest {
                reference: &name,
                digest,
                size,
                media_type: &media_type,
                artifact_type: artifact_type.as_deref(),
            }),
            None => index.manifests.push(Entry {
                media_type,
                digest: digest.to_string(),
                size,
                artifact_type,
                annotations: Map::new(),
            }),
        }
        Ok(())
    }

    /// Makes a manifest findable under its reference; its blobs must be in place.
    pub(crate) fn name_manifest(&self, manifest: &NamedManifest<'_>) -> Result<()> {
        self.change_index(|index| index.name(manifest))
    }

    /// Makes a signature's manifest findable: by its `subject` when it has one, else by the name that its tag gives it in
    /// the repository of `reference`.
    pub(super) fn name_signature(
        &self,
        digest: &Digest,
        media_type: &str,
        artifact_type: Option<&str>,
        size: u64,
        name: Option<&str>,
    ) -> Result<()> {
        self.change_index(|index| {
            if let Some(name) = name {
                return index.name(&NamedManifest {
                    reference: name,
                    digest,
                    size,
                    media_type,
                    artifact_type,
                });
            }
            index.manifests.push(Entry {
                media_type: media_type.to_owned(),
                digest: digest.to_string(),
                size,
                artifact_type: artifact_type.map(str::to_owned),
                annotations: Map::new(),
            });
            index.tidy();
        })
    }

    /// The manifests in `index.json`: digest, size, name. Entries that make no sense are left out.
    pub(crate) fn listed(&self) -> Result<Vec<(Digest, u64, Option<String>)>> {
        let index = self.read_index()?.unwrap_or_else(Index::empty);
        let entries = index.manifests.iter();
        Ok(entries
            .filter_map(|entry| {
                let digest = entry.digest.parse().ok()?;
                Some((digest, entry.size, entry.name().map(str::to_owned)))
            })
            .collect())
    }

    /// What a reference led to when it was last pulled or imported, if all of it is here: what stands in for a registry that
    /// cannot be reached. `Resolved::digest` is the
    /// index's when that is kept for its signature, else the manifest's.
    ///
    /// # Errors
    /// When the disk fails, or the artifact cannot be used.
    pub fn resolved(&self, reference: &Reference) -> Result<Option<Resolved>> {
        let name = reference.to_string();
        let listed = self.listed()?;
        let named = |(_, _, found): &&(_, _, Option<String>)| found.as_ref() == Some(&name);
        let Some((digest, _, _)) = listed.iter().find(named) else {
            return Ok(None);
        };
        if self.artifact(digest)?.is_none() {
            return Ok(None);
        }
        let Some(bytes) = self.manifest_bytes(digest)? else {
            return Ok(None);
        };
        let parsed = crate::layers::parse(&bytes).map_err(|problem| Error::Manifest {
            manifest: digest.clone(),
            problem,
        })?;
        let media_type = parsed
            .media_type()
            .as_ref()
            .map_or_else(|| MANIFEST.to_owned(), ToString::to_string);
        let index = self.signed_index(digest)?;
        Ok(Some(Resolved {
            digest: index
                .as_ref()
                .map_or_else(|| digest.clone(), |(index, _)| index.clone()),
            manifest: Manifest {
                digest: digest.clone(),
                media_type,
                bytes,
                parsed,
            },
            index,
        }))
    }

    /// Forgets every manifest that is not to be kept.
    pub(super) fn keep_manifests(&self, keep: &BTreeSet<Digest>) -> Result<()> {
        let keep: BTreeSet<String> = keep.iter().map(ToString::to_string).collect();
        self.change_index(|index| index.manifests.retain(|entry| keep.contains(&entry.digest)))
    }

    fn change_index(&self, change: impl FnOnce(&mut Index)) -> Result<()> {
        let old = self.read_index()?;
        let mut new = match &old {
            Some(old) => old.clone(),
            None => self.rebuilt()?,
        };
        change(&mut new);
        if old.as_ref() == Some(&new) {
            return Ok(());
        }
        self.write_index(&new)
    }

    fn read_index(&self) -> Result<Option<Index>> {
        let path = self.oci_dir().join("index.json");
        let Some(bytes) = read(&path)? else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(index) => Ok(Some(index)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "unusable index.json; it is made anew");
                Ok(None)
            }
        }
    }

    fn write_index(&self, index: &Index) -> Result<()> {
        let path = self.oci_dir().join("index.json");
        self.write_file(&path, &to_json(&path, index)?, 0o644)
    }
}
