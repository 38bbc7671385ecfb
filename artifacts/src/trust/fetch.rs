//! Signatures from a registry: where they are looked for, and how much is taken from strangers.
//!
//! For each digest that may have been signed, in this order: the referrers API and its fallback tag, then the older scheme's
//! tag. The first place with a signature that counts ends it.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::image::Descriptor;

use super::{
    BUNDLE_TYPE, Evidence, Judgement, PART_MAX, PublicKey, Rejected, Signer, Subject, has_digest,
};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;
use crate::registry::{self, Client, Resolved};

/// The most referrers of one digest that are looked at.
const REFERRERS_MAX: usize = 64;

/// cosign's fallback index gives its bundles the type of their empty configuration.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// What a bundle's manifest says that it holds (cosign, specs/BUNDLE_SPEC.md).
const PREDICATE_ANNOTATION: &str = "dev.sigstore.bundle.predicateType";

/// Signatures that count, with what they consist of.
#[derive(Clone, Debug, Default)]
pub struct Verified {
    /// Who signed.
    pub signers: Vec<Signer>,
    /// To be kept with the artifact.
    pub evidence: Vec<Evidence>,
}

/// Finds and verifies signatures of what a reference was resolved to.
///
/// # Errors
/// [`Error::Untrusted`] when none counts, with what was found; the registry's and the network's errors, since then it is
/// not known what there is.
pub async fn fetch(
    client: &Client,
    reference: &Reference,
    resolved: &Resolved,
    keys: &[PublicKey],
) -> Result<Verified> {
    let subjects = subjects(resolved);
    let mut search = Search {
        client,
        reference,
        subjects: &subjects,
        keys,
        judgement: Judgement::default(),
        verified: Verified::default(),
    };
    for subject in &subjects {
        search.referrers(subject.digest).await?;
        if search.verified.signers.is_empty() {
            search.legacy(subject.digest).await?;
        }
        if !search.verified.signers.is_empty() {
            return Ok(search.verified);
        }
    }
    let judgement = search.judgement;
    Err(untrusted(reference, resolved, keys, judgement))
}

/// The error of an artifact that no trusted key has signed.
pub(crate) fn untrusted(
    reference: &Reference,
    resolved: &Resolved,
    keys: &[PublicKey],
    judgement: Judgement,
) -> Error {
    Error::Untrusted {
        what: reference.to_string(),
        sign: format!(
            "{}/{}@{}",
            reference.registry(),
            reference.repository(),
            resolved.digest
        ),
        keys: keys.iter().map(|key| key.id().clone()).collect(),
        rejected: judgement.rejected,
    }
}

/// What may have been signed: what the reference names, and the manifest that was chosen from it.
pub(crate) fn subjects(resolved: &Resolved) -> Vec<Subject<'_>> {
    let index = resolved.index.as_ref();
    let index = index.map(|(digest, bytes)| Subject { digest, bytes });
    let manifest = Subject {
        digest: &resolved.manifest.digest,
        bytes: &resolved.manifest.bytes,
    };
    index.into_iter().chain([manifest]).collect()
}

struct Search<'a> {
    client: &'a Client,
    reference: &'a Reference,
    subjects: &'a [Subject<'a>],
    keys: &'a [PublicKey],
    judgement: Judgement,
    verified: Verified,
}

impl Search<'_> {
    async fn referrers(&mut self, of: &Digest) -> Result<()> {
        let listed = self.client.referrers(self.reference, of, BUNDLE_TYPE).await;
        let listed = match listed {
            Err(error) if error.is_verification() => {
                self.reject(format!("referrers of {of}"), error.to_string());
                return Ok(());
            }
            other => other?,
        };
        let (digests, more) = candidates(&listed);
        for digest in digests {
            let at = self.reference.with_digest(digest);
            self.look(&at, of, None).await?;
        }
        if more {
            self.reject(
                format!("referrers of {of}"),
                format!("there are more than {REFERRERS_MAX}; the rest was not looked at"),
            );
        }
        Ok(())
    }

    async fn legacy(&mut self, of: &Digest) -> Result<()> {
        let tag = Evidence::legacy_tag(of);
        let at = self.reference.with_tag(&tag);
        self.look(&at, of, Some(tag)).await
    }

    /// Fetches one signature manifest with its parts, and judges it. What is wrong with it is noted; only the registry's
    /// failures are errors.
    async fn look(&mut self, at: &Reference, of: &Digest, tag: Option<String>) -> Result<()> {
        let expected = tag.is_none();
        let name = at
            .digest()
            .map_or_else(|| at.to_string(), Digest::to_string);
        match self.evidence(at, of, tag).await {
            Ok(Some(evidence)) => {
                let mut judgement = Judgement::default();
                evidence.judge(self.subjects, self.keys, &mut judgement);
                self.judgement.rejected.append(&mut judgement.rejected);
                if !judgement.signers.is_empty() {
                    self.verified.signers.append(&mut judgement.signers);
                    self.verified.evidence.push(evidence);
                }
                Ok(())
            }
            Ok(None) if expected => {
                self.reject(name, "it is listed and not there".to_owned());
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(Problem::Content(reason)) => {
                self.reject(name, reason);
                Ok(())
            }
            Err(Problem::Registry(error)) => Err(error.into()),
        }
    }

    async fn evidence(
        &self,
        at: &Reference,
        of: &Digest,
        tag: Option<String>,
    ) -> std::result::Result<Option<Evidence>, Problem> {
        let Some(document) = self.client.small_manifest(at, PART_MAX).await? else {
            return Ok(None);
        };
        let parts = Evidence::parts(&document.bytes).map_err(Problem::Content)?;
        let mut blobs = BTreeMap::new();
        for (digest, size) in parts {
            let bytes = self.client.small_blob(at, &digest, size).await?;
            if !has_digest(&bytes, &digest) {
                return Err(Problem::Content(format!("{digest} is not what it says")));
            }
            blobs.insert(digest, bytes);
        }
        let artifact_type = super::parse(&document.bytes)
            .ok()
            .and_then(|manifest| manifest.artifact_type().as_ref().map(ToString::to_string));
        Ok(Some(Evidence {
            digest: document.digest,
            media_type: document.media_type,
            artifact_type,
            bytes: document.bytes,
            blobs,
            of: of.clone(),
            tag,
        }))
    }

    fn reject(&mut self, signature: String, reason: String) {
        self.judgement.rejected.push(Rejected { signature, reason });
    }
}

/// Why there is no evidence: a stranger's content, or the way to it.
enum Problem {
    Content(String),
    Registry(registry::Error),
}

impl From<registry::Error> for Problem {
    fn from(error: registry::Error) -> Problem {
        match error {
            registry::Error::NotFound { what, .. } => {
                Problem::Content(format!("{what} is not there"))
            }
            error if error.is_verification() => Problem::Content(error.to_string()),
            error => Problem::Registry(error),
        }
    }
}

/// The referrers that may be signatures, each once, those that say so first; and whether there are more than are looked at.
fn candidates(listed: &[Descriptor]) -> (Vec<Digest>, bool) {
    let says_signature = |descriptor: &Descriptor| {
        let annotations = descriptor.annotations().as_ref();
        let predicate = annotations.and_then(|all| all.get(PREDICATE_ANNOTATION));
        predicate.is_some_and(|predicate| predicate.ends_with("/cosign/sign/v1"))
    };
    let may_be = |descriptor: &&Descriptor| {
        let kind = descriptor.artifact_type().as_ref().map(ToString::to_string);
        kind.is_none_or(|kind| kind == BUNDLE_TYPE || kind == EMPTY_TYPE)
    };
    let mut seen = BTreeSet::new();
    let mut sorted: Vec<&Descriptor> = listed.iter().filter(may_be).collect();
    sorted.sort_by_key(|descriptor| !says_signature(descriptor));
    let mut digests: Vec<Digest> = sorted
        .into_iter()
        .filter_map(|descriptor| descriptor.digest().to_string().parse().ok())
        .filter(|digest: &Digest| seen.insert(digest.clone()))
        .collect();
    let more = digests.len() > REFERRERS_MAX;
    digests.truncate(REFERRERS_MAX);
    (digests, more)
}
