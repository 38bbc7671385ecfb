//! Whether somebody whom the user trusts has signed an artifact.
//!
//! The signatures are those that cosign makes with a key pair, in both forms in which registries have them:
//!
//! - a referrer of the artifact (OCI distribution specification 1.1, "Listing Referrers", with its fallback tag
//!   `sha256-<hex>`) whose layer is a sigstore bundle (`bundle`), as cosign 3 makes it;
//! - the older tag `sha256-<hex>.sig` with simple-signing payloads (`simple`), as cosign 1 and 2 make it.
//!
//! What is verified, and all that is verified: one of the user's public keys made the signature, and what was signed names
//! the artifact's digest. No certificate, transparency log or timestamp is asked, so it works without any network once the
//! signature is here. The signed digest may be the one that the reference has (of the index, where there is one) or that
//! of the manifest chosen from it: an index's signature covers its manifests, because it names their digests.
//!
//! Cryptography is AWS-LC's (aws-lc-rs, which TLS uses already). The sigstore crates are not used: what they add is
//! Fulcio, Rekor and TUF, none of which a key of the user's needs, at the price of some hundred further crates.
//!
//! Everything here but `fetch` is a pure function of bytes, so it can be asked again later of what the store keeps.
//! It must not know of classes, configuration files or the disk.

mod bundle;
mod fetch;
mod key;
mod simple;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use oci_spec::image::ImageManifest;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hasher};

pub use fetch::{Verified, fetch};
pub(crate) use fetch::{subjects, untrusted};
pub use key::{KeyError, PublicKey};

/// The type of a sigstore bundle (sigstore protobuf-specs, sigstore_bundle.proto, "media_type").
pub const BUNDLE_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// The type of a simple-signing payload (cosign, specs/SIGNATURE_SPEC.md, "Payload formats").
pub const SIMPLE_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The annotation with the signature of a simple-signing payload (cosign, specs/SIGNATURE_SPEC.md, "Storage").
const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";

/// The most bytes of a signature's manifest, payload, bundle or configuration. A real one has less than 20 KiB.
pub(crate) const PART_MAX: u64 = 256 << 10;
/// The most signatures in one manifest that are looked at.
pub(crate) const LAYERS_MAX: usize = 32;

/// What a class demands of an artifact.
#[derive(Clone, Debug, Default)]
pub enum Policy {
    /// Nothing.
    #[default]
    None,
    /// A signature by one of these keys.
    Keys(Vec<PublicKey>),
}

impl Policy {
    /// The keys, when signatures are demanded.
    pub fn keys(&self) -> Option<&[PublicKey]> {
        match self {
            Policy::None => None,
            Policy::Keys(keys) => Some(keys),
        }
    }
}

/// What may have been signed: a manifest or an index, with its digest, which is verified.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Of `bytes`.
    pub digest: &'a Digest,
    /// What was signed.
    pub bytes: &'a [u8],
}

/// How a signature is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Form {
    /// A sigstore bundle.
    Bundle,
    /// A simple-signing payload.
    SimpleSigning,
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Form::Bundle => "sigstore bundle",
            Form::SimpleSigning => "simple signing",
        })
    }
}

/// A signature that was verified. A generation's metadata keeps it; `manifest` finds the signature itself in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Signer {
    /// The key: the SHA-256 digest of its SubjectPublicKeyInfo (RFC 5280, in DER).
    pub key: Digest,
    /// What was signed: the artifact's manifest, or the index that led to it.
    pub signed: Digest,
    /// How it is written.
    pub form: Form,
    /// The signature's own manifest.
    pub manifest: Digest,
}

/// A signature that does not count, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its manifest's digest, or where it was looked for.
    pub signature: String,
    /// Why.
    pub reason: String,
}

impl std::fmt::Display for Rejected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.signature, self.reason)
    }
}

/// A manifest that holds signatures, with all that it names. Its digests are verified, nothing else is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// Digest of `bytes`.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Its `artifactType`.
    pub artifact_type: Option<String>,
    /// The manifest.
    pub bytes: Vec<u8>,
    /// Its layers and its configuration.
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    /// The artifact that it belongs to, by its place in the registry.
    pub of: Digest,
    /// With the older scheme: the tag that it has.
    pub tag: Option<String>,
}

/// What became of all the signatures that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The signatures that count.
    pub signers: Vec<Signer>,
    /// Those that do not.
    pub rejected: Vec<Rejected>,
}

impl Evidence {
    /// Parses a signature's manifest and gives the blobs that it needs: digest and size.
    ///
    /// # Errors
    /// Why it is none: its form, or a bound that it passes.
    pub fn parts(bytes: &[u8]) -> Result<Vec<(Digest, u64)>, String> {
        let manifest = parse(bytes)?;
        let mut parts = BTreeMap::new();
        for descriptor in manifest.layers().iter().chain([manifest.config()]) {
            if descriptor.size() > PART_MAX {
                return Err(format!(
                    "one of its parts has {} bytes, a signature has at most {PART_MAX}",
                    descriptor.size()
                ));
            }
            let digest: Digest = descriptor
                .digest()
                .to_string()
                .parse()
                .map_err(|error| format!("one of its parts has no usable digest: {error}"))?;
            parts.insert(digest, descriptor.size());
        }
        Ok(parts.into_iter().collect())
    }

    /// The older scheme's tag for the signatures of a digest (cosign, specs/SIGNATURE_SPEC.md, "Discovery").
    pub fn legacy_tag(of: &Digest) -> String {
        format!("{}-{}.sig", of.algorithm(), of.hex())
    }

    /// The digest that a tag of the older scheme is made of.
    pub(crate) fn of_legacy_tag(tag: &str) -> Option<Digest> {
        let (algorithm, hex) = tag.strip_suffix(".sig")?.split_once('-')?;
        format!("{algorithm}:{hex}").parse().ok()
    }

    /// Verifies every signature in here.
    pub fn judge(&self, subjects: &[Subject<'_>], keys: &[PublicKey], into: &mut Judgement) {
        let mut reject = |reason: String| {
            into.rejected.push(Rejected {
                signature: self.digest.to_string(),
                reason,
            });
        };
        let manifest = match parse(&self.bytes) {
            Ok(manifest) => manifest,
            Err(reason) => return reject(reason),
        };
        for layer in manifest.layers() {
            let found = layer
                .digest()
                .to_string()
                .parse()
                .ok()
                .and_then(|digest: Digest| self.blobs.get(&digest));
            let Some(content) = found else {
                reject("a part of it is missing".to_owned());
                continue;
            };
            let annotation = layer
                .annotations()
                .as_ref()
                .and_then(|all| all.get(SIGNATURE_ANNOTATION));
            let (form, verified) = match layer.media_type().to_string().as_str() {
                BUNDLE_TYPE => (Form::Bundle, bundle::verify(content, subjects, keys)),
                SIMPLE_TYPE => (
                    Form::SimpleSigning,
                    match annotation {
                        Some(signature) => simple::verify(content, signature, subjects, keys),
                        None => Err(format!("it has no annotation {SIGNATURE_ANNOTATION}")),
                    },
                ),
                _ => {
                    reject("it is neither a sigstore bundle nor simple signing".to_owned());
                    continue;
                }
            };
            match verified {
                Ok((key, signed)) => into.signers.push(Signer {
                    key,
                    signed,
                    form,
                    manifest: self.digest.clone(),
                }),
                Err(reason) => reject(reason),
            }
        }
    }
}

/// Verifies all of it.
pub fn judge(evidence: &[Evidence], subjects: &[Subject<'_>], keys: &[PublicKey]) -> Judgement {
    let mut judgement = Judgement::default();
    for one in evidence {
        one.judge(subjects, keys, &mut judgement);
    }
    judgement
}

/// Verifies one sigstore bundle: the key that made it, and what it signs.
///
/// # Errors
/// Why it does not count.
pub fn verify_bundle(
    bundle: &[u8],
    subjects: &[Subject<'_>],
    keys: &[PublicKey],
) -> Result<(Digest, Digest), String> {
    bundle::verify(bundle, subjects, keys)
}

/// Verifies one simple-signing payload with its signature in base64: the key that made it, and what it signs.
///
/// # Errors
/// Why it does not count.
pub fn verify_simple(
    payload: &[u8],
    signature: &str,
    subjects: &[Subject<'_>],
    keys: &[PublicKey],
) -> Result<(Digest, Digest), String> {
    simple::verify(payload, signature, subjects, keys)
}

fn parse(bytes: &[u8]) -> Result<ImageManifest, String> {
    if bytes.len() as u64 > PART_MAX {
        return Err(format!("its manifest has more than {PART_MAX} bytes"));
    }
    let manifest: ImageManifest = serde_json::from_slice(bytes)
        .map_err(|error| format!("its manifest cannot be read: {error}"))?;
    if manifest.layers().len() > LAYERS_MAX {
        return Err(format!("it holds more than {LAYERS_MAX} signatures"));
    }
    Ok(manifest)
}

/// The key that made the signature over `message`.
fn signed_by(message: &[u8], signature: &[u8], keys: &[PublicKey]) -> Result<Digest, String> {
    let made = keys.iter().find(|key| key.verifies(message, signature));
    made.map(|key| key.id().clone())
        .ok_or_else(|| "none of the trusted keys made it".to_owned())
}

/// The subject that has this digest.
fn subject<'a>(hex: &str, subjects: &[Subject<'a>]) -> Option<Subject<'a>> {
    let same = |subject: &&Subject<'_>| subject.digest.to_string() == format!("sha256:{hex}");
    subjects.iter().find(same).copied()
}

/// Standard base64 (RFC 4648, section 4), which is what JSON protobuf and cosign write.
fn base64(text: &str, what: &str) -> Result<Vec<u8>, String> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .map_err(|_| format!("{what} is not base64"))
}

/// Text from outside, short and on one line.
fn shown(text: &str) -> String {
    crate::registry::clean(text)
}

/// Whether bytes are what a digest says.
pub(crate) fn has_digest(bytes: &[u8], digest: &Digest) -> bool {
    let mut hasher = Hasher::like(digest);
    hasher.update(bytes);
    hasher.finish() == *digest
}
