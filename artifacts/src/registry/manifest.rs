//! What a reference leads to: digests and manifests, verified.
//!
//! OCI distribution specification, "Pulling manifests" and "Checking if content exists in the registry".
//!
//! It must not know of layers' content.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, IF_NONE_MATCH};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::answer::clean;
use super::authorize::{Access, Session, Target};
use super::platform::Platform;
use super::transport::{Answer, Request};
use super::{Error, Manifest, Resolved, Result};
use crate::digest::{Digest, Hasher};
use crate::reference::Reference;

/// OCI distribution specification, "Pushing Manifests": the size that registries should accept at least, and that clients
/// keep to.
pub(super) const MANIFEST_MAX: u64 = 4 << 20;

/// OCI image specification, media-types.md, and Docker's image manifest version 2, schema 2.
const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// What a registry says of content that it does not know.
const VAGUE_TYPES: [&str; 4] = [
    "",
    "application/json",
    "application/octet-stream",
    "text/plain",
];

/// The digest of the content, in answers (OCI distribution specification, "Pulling manifests").
pub(super) const CONTENT_DIGEST: &str = "docker-content-digest";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Manifest,
    Index,
}

/// A document as it came, verified.
pub(super) struct Fetched {
    pub(super) digest: Digest,
    kind: Kind,
    pub(super) media_type: String,
    pub(super) bytes: Vec<u8>,
}

/// What tells a manifest from an index. A document that is both means different things to different readers (OCI image
/// specification, GHSA-77vh-xpmg-72qh), and is refused.
#[derive(Deserialize)]
struct Shape {
    #[serde(default, rename = "mediaType")]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
    #[serde(default)]
    layers: Option<IgnoredAny>,
    #[serde(default)]
    config: Option<IgnoredAny>,
}

impl Session {
    pub(super) async fn digest(&self, reference: &Reference) -> Result<Digest> {
        if let Some(pinned) = reference.digest() {
            return Ok(pinned.clone());
        }
        let target = self.target(reference, Access::Pull)?;
        let action = format!("read the digest of {reference}");
        let what = reference.to_string();
        let url = target.url(&format!("manifests/{}", name(reference)));
        let mut request = Request::new(Method::HEAD, url, &action, &what);
        request.headers.insert(ACCEPT, accepted());
        let answer = self.request(&target, &request).await?;
        match announced(answer.response.headers()) {
            Some(digest) => Ok(digest),
            // The header is only a SHOULD.
            None => Ok(self
                .fetch(&target, reference, reference, MANIFEST_MAX)
                .await?
                .digest),
        }
    }

    /// What a reference leads to. When that is `known` it costs an answer without a body, or no request if the reference is
    /// pinned: what has the digest cannot have changed.
    pub(super) async fn resolve(
        &self,
        reference: &Reference,
        platform: &Platform,
        known: Option<&Resolved>,
    ) -> Result<Resolved> {
        if let Some(known) = known.filter(|known| reference.digest() == Some(&known.digest)) {
            return Ok(known.clone());
        }
        let target = self.target(reference, Access::Pull)?;
        let unless = known.map(|known| &known.digest);
        let first = self.fetch_unless(&target, reference, (reference, MANIFEST_MAX), unless);
        let first = match (first.await?, known) {
            (Some(first), _) => first,
            (None, Some(known)) => return Ok(known.clone()),
            (None, None) => return Err(malformed(reference, "it is called unchanged")),
        };
        if first.kind == Kind::Manifest {
            return Ok(Resolved {
                digest: first.digest.clone(),
                manifest: parsed(first, reference)?,
                index: None,
            });
        }
        let (digest, size) = choose(&first.bytes, reference, platform)?;
        let same = known.map(|known| &known.manifest);
        if let Some(same) = same.filter(|same| same.digest == digest) {
            return Ok(Resolved {
                digest: first.digest.clone(),
                manifest: same.clone(),
                index: Some((first.digest, first.bytes)),
            });
        }
        let inner = reference.with_digest(digest);
        let second = self.fetch(&target, &inner, reference, size).await?;
        if second.kind == Kind::Index {
            return Err(malformed(
                reference,
                "its index leads to another index, which is not supported",
            ));
        }
        if second.bytes.len() as u64 != size {
            return Err(malformed(
                reference,
                "its index names another size for a manifest than it has",
            ));
        }
        Ok(Resolved {
            digest: first.digest.clone(),
            manifest: parsed(second, reference)?,
            index: Some((first.digest, first.bytes)),
        })
    }

    /// Fetches what `reference` names and verifies it; errors speak of `asked`.
    pub(super) async fn fetch(
        &self,
        target: &Target,
        reference: &Reference,
        asked: &Reference,
        limit: u64,
    ) -> Result<Fetched> {
        let fetched = self.fetch_unless(target, reference, (asked, limit), None);
        // Nothing was asked that "not modified" is an answer to.
        let unasked = || malformed(asked, "it is called unchanged");
        fetched.await?.ok_or_else(unasked)
    }

    /// As [`Session::fetch`]; none when it is what `unless` says, if the registry knows of conditions (RFC 9110, 13.1.2: the
    /// digest is the entity tag, as distribution/distribution has it). Others send it, and it is read.
    async fn fetch_unless(
        &self,
        target: &Target,
        reference: &Reference,
        (asked, limit): (&Reference, u64),
        unless: Option<&Digest>,
    ) -> Result<Option<Fetched>> {
        let action = format!("read the manifest of {reference}");
        let what = reference.to_string();
        let url = target.url(&format!("manifests/{}", name(reference)));
        let mut request = Request::new(Method::GET, url, &action, &what);
        request.headers.insert(ACCEPT, accepted());
        let tag = unless.and_then(|digest| HeaderValue::try_from(format!("\"{digest}\"")).ok());
        if let Some(tag) = tag {
            request.headers.insert(IF_NONE_MATCH, tag);
        }
        let Some((headers, bytes)) = self.document(target, &request, limit).await? else {
            return Ok(None);
        };
        let digest = verify(reference, &headers, &bytes)?;
        let (kind, media_type) = kind(asked, &headers, &bytes)?;
        Ok(Some(Fetched {
            digest,
            kind,
            media_type,
            bytes,
        }))
    }

    /// A small body; none when the request has a condition, and the answer is that nothing has changed.
    pub(super) async fn document(
        &self,
        target: &Target,
        request: &Request<'_>,
        limit: u64,
    ) -> Result<Option<(HeaderMap, Vec<u8>)>> {
        let mut tries = self.tries();
        let content = format!("the manifest of {}", request.what);
        let conditional = request.headers.contains_key(IF_NONE_MATCH);
        loop {
            let tried = async {
                let answer: Answer = self.send(target, request).await?;
                if conditional && answer.status() == StatusCode::NOT_MODIFIED {
                    return Ok(None);
                }
                let answer = self.checked(target, answer, request).await?;
                let headers = answer.response.headers().clone();
                let body = self
                    .transport
                    .read_all(answer, limit, request.action, &content);
                Ok(Some((headers, body.await?)))
            };
            match tried.await {
                Ok(read) => return Ok(read),
                Err(failure) => tries.pause(failure).await?,
            }
        }
    }
}

/// The last part of a manifest's URL.
pub(super) fn name(reference: &Reference) -> String {
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => digest.to_string(),
        // A reference always has one of the two.
        (None, tag) => tag.unwrap_or_default().to_owned(),
    }
}

fn accepted() -> HeaderValue {
    HeaderValue::from_static(concat!(
        "application/vnd.oci.image.manifest.v1+json, ",
        "application/vnd.oci.image.index.v1+json, ",
        "application/vnd.docker.distribution.manifest.v2+json, ",
        "application/vnd.docker.distribution.manifest.list.v2+json"
    ))
}

/// The digest in the answer's header, if it is one.
pub(super) fn announced(headers: &HeaderMap) -> Option<Digest> {
    headers.get(CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// The digest of `bytes`, once they are what the reference and the registry's header say.
fn verify(reference: &Reference, headers: &HeaderMap, bytes: &[u8]) -> Result<Digest> {
    let pinned = reference.digest().cloned();
    for expected in [pinned.clone(), announced(headers)].into_iter().flatten() {
        let mut hasher = Hasher::like(&expected);
        hasher.update(bytes);
        let got = hasher.finish();
        if got != expected {
            return Err(Error::DigestMismatch {
                what: format!("the manifest of {reference}"),
                expected,
                got,
            });
        }
    }
    Ok(pinned
        .or_else(|| announced(headers))
        .unwrap_or_else(|| Digest::of(bytes)))
}

/// Manifest or index: by the document's own word, else by the header, else by its form.
pub(super) fn kind(asked: &Reference, headers: &HeaderMap, bytes: &[u8]) -> Result<(Kind, String)> {
    let shape: Shape = serde_json::from_slice(bytes)
        .map_err(|_| malformed(asked, "it is not a JSON object of the expected form"))?;
    let is_index = shape.manifests.is_some();
    let is_manifest = shape.layers.is_some() || shape.config.is_some();
    if is_index && is_manifest {
        return Err(malformed(asked, "it is a manifest and an index at once"));
    }
    let header = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    // Parameters such as a character set follow a semicolon.
    let header = header
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default();
    let header = header.trim().to_ascii_lowercase();
    let vague = VAGUE_TYPES.contains(&header.as_str());
    let media_type = match shape.media_type {
        Some(own) if !vague && own != header => {
            let problem = format!(
                "it calls itself {} and the registry calls it {}",
                clean(&own),
                clean(&header)
            );
            return Err(malformed(asked, &problem));
        }
        Some(own) => own,
        None if !vague => header,
        None if is_manifest => MANIFEST_TYPES[0].to_owned(),
        None if is_index => INDEX_TYPES[0].to_owned(),
        None => header,
    };
    let kind = if MANIFEST_TYPES.contains(&media_type.as_str()) {
        Kind::Manifest
    } else if INDEX_TYPES.contains(&media_type.as_str()) {
        Kind::Index
    } else {
        return Err(Error::UnsupportedMediaType {
            reference: asked.to_string(),
            media_type: clean(&media_type),
        });
    };
    if (kind == Kind::Manifest && is_index) || (kind == Kind::Index && is_manifest) {
        return Err(malformed(asked, "its media type and its form do not fit"));
    }
    Ok((kind, media_type))
}

fn parsed(fetched: Fetched, asked: &Reference) -> Result<Manifest> {
    let parsed: ImageManifest = serde_json::from_slice(&fetched.bytes)
        .map_err(|error| malformed(asked, &clean(&error.to_string())))?;
    if parsed.schema_version() != 2 {
        return Err(malformed(asked, "its schemaVersion is not 2"));
    }
    Ok(Manifest {
        digest: fetched.digest,
        media_type: fetched.media_type,
        bytes: fetched.bytes,
        parsed,
    })
}

/// The manifest in an index that is for the platform: its digest and size.
pub(super) fn choose(
    bytes: &[u8],
    asked: &Reference,
    platform: &Platform,
) -> Result<(Digest, u64)> {
    let index: ImageIndex = serde_json::from_slice(bytes)
        .map_err(|error| malformed(asked, &clean(&error.to_string())))?;
    let all = index.manifests();
    let fits = |d: &&Descriptor| d.platform().as_ref().is_some_and(|p| platform.takes(p));
    // Artifacts are often for no platform in particular: a single one is meant.
    let only = || match all.as_slice() {
        [only] if only.platform().is_none() => Some(only),
        _ => None,
    };
    let chosen = all
        .iter()
        .find(fits)
        .or_else(only)
        .ok_or_else(|| Error::NoPlatform {
            reference: asked.to_string(),
            wanted: platform.clone(),
            available: available(all),
        })?;
    let digest = chosen.digest().to_string().parse();
    let digest = digest.map_err(|error| malformed(asked, &format!("in its index: {error}")))?;
    if chosen.size() > MANIFEST_MAX {
        return Err(Error::TooLarge {
            what: format!("the manifest that the index of {asked} names"),
            limit: MANIFEST_MAX,
        });
    }
    Ok((digest, chosen.size()))
}

fn available(all: &[Descriptor]) -> String {
    let mut names: Vec<_> = all
        .iter()
        .filter_map(|descriptor| descriptor.platform().as_ref())
        .map(|platform| Platform::from(platform).to_string())
        .collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return format!("{} manifests for no platform", all.len());
    }
    clean(&names.join(", "))
}

fn malformed(reference: &Reference, problem: &str) -> Error {
    Error::MalformedManifest {
        reference: reference.to_string(),
        problem: problem.to_owned(),
    }
}
