//! Signatures that are kept with artifacts, as an OCI layout keeps them: a signature's manifest, its layers and its
//! configuration are blobs in `.store/oci`, and the manifest is listed in `index.json`:
//!
//! - a sigstore bundle's manifest without a name, since its `subject` says what it belongs to (image specification,
//!   manifest.md, "subject"; `oras cp -r` and `oras discover` find it so);
//! - a manifest of the older scheme under the name `<registry>/<repository>:sha256-<hex>.sig`.
//!
//! The index that led to a multi-platform artifact's manifest is a blob too when a signature is of it. Whoever exports an
//! artifact takes [`Store::signatures_of`] along; whoever imports one stores them with [`Store::keep_signatures`]. A
//! generation's metadata records who signed ([`crate::GenerationManifest::signers`]); that record is never believed: the
//! signatures are verified again.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::image::{ImageIndex, ImageManifest};

use super::sink::FileSink;
use super::{Store, look};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::generation::{Generation, GenerationManifest};
use crate::reference::Reference;
use crate::registry::Resolved;
use crate::trust::{self, Evidence, Judgement, PART_MAX, Policy, Signer, Subject, Verified};

impl Store {
    /// Stores signatures, and `index` if one of them is of it. The lock must be held.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn keep_signatures(
        &self,
        reference: &Reference,
        index: Option<(&Digest, &[u8])>,
        evidence: &[Evidence],
    ) -> Result<()> {
        if let Some((digest, bytes)) = index
            && !evidence.is_empty()
        {
            self.put_blob(digest, bytes)?;
        }
        for one in evidence {
            for (digest, bytes) in &one.blobs {
                self.put_blob(digest, bytes)?;
            }
            self.put_blob(&one.digest, &one.bytes)?;
            let name = one
                .tag
                .as_ref()
                .map(|tag| reference.with_tag(tag).to_string());
            self.name_signature(
                &one.digest,
                &one.media_type,
                one.artifact_type.as_deref(),
                one.bytes.len() as u64,
                name.as_deref(),
            )?;
        }
        Ok(())
    }

    /// The signatures in the store of any of these digests, verified or not. What is damaged is left out.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn signatures_of(&self, of: &BTreeSet<Digest>) -> Result<Vec<Evidence>> {
        let mut found = BTreeMap::new();
        for (digest, size, name) in self.listed()? {
            if size > PART_MAX || found.contains_key(&digest) {
                continue;
            }
            if let Some(evidence) = self.evidence(&digest, name.as_deref(), of)? {
                found.insert(digest, evidence);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Who has signed a generation's artifact, by what the store keeps: no network, no trust in what was recorded. Without
    /// a demand for signatures these are none.
    ///
    /// # Errors
    /// [`Error::Untrusted`] when signatures are demanded and none counts; the disk's errors.
    pub fn signers(&self, generation: &Generation, policy: &Policy) -> Result<Vec<Signer>> {
        let Some(keys) = policy.keys() else {
            return Ok(Vec::new());
        };
        let judgement = self.judge(&generation.manifest, keys)?;
        if !judgement.signers.is_empty() {
            return Ok(judgement.signers);
        }
        let manifest = &generation.manifest;
        let sign = manifest.reference.parse::<Reference>().map_or_else(
            |_| manifest.source.to_string(),
            |reference| {
                format!(
                    "{}/{}@{}",
                    reference.registry(),
                    reference.repository(),
                    manifest.source
                )
            },
        );
        Err(Error::Untrusted {
            what: format!(
                "generation {} of {} ({})",
                manifest.number, manifest.class, manifest.source
            ),
            sign,
            keys: keys.iter().map(|key| key.id().clone()).collect(),
            rejected: judgement.rejected,
        })
    }

    /// As [`trust::fetch`], by what the store keeps: no network.
    ///
    /// # Errors
    /// [`Error::Untrusted`] when no signature here counts; the disk's errors.
    pub fn verify_resolved(
        &self,
        reference: &Reference,
        resolved: &Resolved,
        keys: &[trust::PublicKey],
    ) -> Result<Verified> {
        let subjects = trust::subjects(resolved);
        let of = subjects.iter().map(|one| one.digest.clone()).collect();
        let evidence = self.signatures_of(&of)?;
        let judgement = trust::judge(&evidence, &subjects, keys);
        if judgement.signers.is_empty() {
            return Err(trust::untrusted(reference, resolved, keys, judgement));
        }
        Ok(Verified {
            signers: judgement.signers,
            evidence,
        })
    }

    /// The index that is kept because a signature is of it, when it names this manifest.
    pub(super) fn signed_index(&self, manifest: &Digest) -> Result<Option<(Digest, Vec<u8>)>> {
        for (digest, size, name) in self.listed()? {
            if size > PART_MAX {
                continue;
            }
            let tag = name.as_deref().and_then(|name| name.rsplit(':').next());
            let tagged = tag.and_then(Evidence::of_legacy_tag);
            let subject = match (tagged, &name) {
                (Some(of), _) => Some(of),
                (None, Some(_)) => None,
                (None, None) => self.manifest_bytes(&digest)?.as_deref().and_then(subject),
            };
            if let Some(subject) = subject
                && let Some(bytes) = self.manifest_bytes(&subject)?
                && names(&bytes, manifest)
            {
                return Ok(Some((subject, bytes)));
            }
        }
        Ok(None)
    }

    fn judge(&self, manifest: &GenerationManifest, keys: &[trust::PublicKey]) -> Result<Judgement> {
        let of = BTreeSet::from([manifest.source.clone(), manifest.manifest.clone()]);
        let mut evidence = self.signatures_of(&of)?;
        // `index.json` may have been made anew; the record remembers.
        for signer in &manifest.signers {
            let known = evidence.iter().any(|one| one.digest == signer.manifest);
            if !known
                && let Some(one) = self.read_evidence(&signer.manifest, &signer.signed, None)?
            {
                evidence.push(one);
            }
        }
        let mut kept = Vec::new();
        for digest in &of {
            if let Some(bytes) = self.manifest_bytes(digest)?
                // An index vouches for a manifest only by naming it.
                && (*digest == manifest.manifest || names(&bytes, &manifest.manifest))
            {
                kept.push((digest, bytes));
            }
        }
        let subjects: Vec<Subject<'_>> = kept
            .iter()
            .map(|(digest, bytes)| Subject { digest, bytes })
            .collect();
        Ok(trust::judge(&evidence, &subjects, keys))
    }

    /// A listed manifest, if it is a signature of one of these.
    fn evidence(
        &self,
        digest: &Digest,
        name: Option<&str>,
        of: &BTreeSet<Digest>,
    ) -> Result<Option<Evidence>> {
        if let Some(name) = name {
            let tagged = of.iter().find_map(|of| {
                let tag = Evidence::legacy_tag(of);
                name.ends_with(&format!(":{tag}")).then_some((of, tag))
            });
            return match tagged {
                Some((of, tag)) => self.read_evidence(digest, of, Some(tag)),
                None => Ok(None),
            };
        }
        let Some(bytes) = self.manifest_bytes(digest)? else {
            return Ok(None);
        };
        let subject = subject(&bytes);
        match subject {
            Some(subject) if of.contains(&subject) => self.read_evidence(digest, &subject, None),
            _ => Ok(None),
        }
    }

    fn read_evidence(
        &self,
        digest: &Digest,
        of: &Digest,
        tag: Option<String>,
    ) -> Result<Option<Evidence>> {
        let Some(bytes) = self.manifest_bytes(digest)? else {
            return Ok(None);
        };
        let Ok(parts) = Evidence::parts(&bytes) else {
            return Ok(None);
        };
        let mut blobs = BTreeMap::new();
        for (part, size) in parts {
            let length = look(&self.blob_path(&part))?.map(|meta| meta.len());
            if length == Some(size)
                && let Some(bytes) = self.manifest_bytes(&part)?
            {
                blobs.insert(part, bytes);
            }
        }
        let manifest: Option<ImageManifest> = serde_json::from_slice(&bytes).ok();
        let text = |kind: &oci_spec::image::MediaType| kind.to_string();
        Ok(Some(Evidence {
            digest: digest.clone(),
            media_type: manifest
                .as_ref()
                .and_then(|manifest| manifest.media_type().as_ref().map(text))
                .unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".to_owned()),
            artifact_type: manifest
                .as_ref()
                .and_then(|manifest| manifest.artifact_type().as_ref().map(text)),
            bytes,
            blobs,
            of: of.clone(),
            tag,
        }))
    }

    /// Stores a small blob whose digest is verified.
    pub(crate) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.manifest_bytes(digest)?.is_some() {
            return Ok(());
        }
        let mut sink = FileSink::create(self, "blob", bytes.len() as u64)?;
        sink.write(bytes)?;
        let (temp, _) = sink.finish()?;
        self.place_blob(temp.path(), digest)
    }
}

/// What a manifest says that it belongs to.
fn subject(manifest: &[u8]) -> Option<Digest> {
    let manifest: ImageManifest = serde_json::from_slice(manifest).ok()?;
    let subject = manifest.subject().as_ref()?;
    subject.digest().to_string().parse().ok()
}

/// Whether an index names a manifest.
fn names(index: &[u8], manifest: &Digest) -> bool {
    let index: Option<ImageIndex> = serde_json::from_slice(index).ok();
    let wanted = manifest.to_string();
    index.is_some_and(|index| {
        let mut entries = index.manifests().iter();
        entries.any(|entry| entry.digest().to_string() == wanted)
    })
}
