//! What refers to a manifest: the referrers API of the OCI distribution specification 1.1 ("Listing Referrers") and its
//! fallback tag ("Referrers Tag Schema"), which registries without the API serve.
//!
//! It must not know what a referrer means.

use oci_spec::image::{Descriptor, ImageIndex};
use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderValue};

use super::authorize::{Access, Session};
use super::transport::Request;
use super::{Document, Error, Result};
use crate::digest::Digest;
use crate::reference::Reference;

/// The most bytes of a list of referrers: as for every manifest.
const LIST_MAX: u64 = 4 << 20;

impl Session {
    /// The referrers of an artifact type, as the API has them; `None` where the registry has no such API.
    pub(super) async fn referrers(
        &self,
        reference: &Reference,
        digest: &Digest,
        artifact_type: &str,
    ) -> Result<Option<Vec<Descriptor>>> {
        let target = self.target(reference, Access::Pull)?;
        let action = format!("list what refers to {digest}");
        let what = format!("the list of what refers to {digest}");
        let mut url = target.url(&format!("referrers/{digest}"));
        url.query_pairs_mut()
            .append_pair("artifactType", artifact_type);
        let mut request = Request::new(Method::GET, url, &action, &what);
        request.headers.insert(
            ACCEPT,
            HeaderValue::from_static("application/vnd.oci.image.index.v1+json"),
        );
        match self.document(&target, &request, LIST_MAX).await {
            Ok(answer) => Ok(answer.and_then(|(_, bytes)| list(&bytes))),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The referrers that the fallback tag lists; none where there is no such tag.
    pub(super) async fn tagged_referrers(
        &self,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<Vec<Descriptor>> {
        let tag = format!("{}-{}", digest.algorithm(), digest.hex());
        let found = self.small(&reference.with_tag(&tag), LIST_MAX).await;
        match found {
            Ok(document) => Ok(list(&document.bytes).unwrap_or_default()),
            Err(error) if is_absent(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// A manifest or index of at most `limit` bytes, verified, whatever it is for.
    pub(super) async fn small(&self, reference: &Reference, limit: u64) -> Result<Document> {
        let target = self.target(reference, Access::Pull)?;
        let fetched = self.fetch(&target, reference, reference, limit).await?;
        Ok(Document {
            digest: fetched.digest,
            media_type: fetched.media_type,
            bytes: fetched.bytes,
        })
    }
}

/// Whether an error says that there is no such thing, or no such API: registries answer unknown paths in many ways.
pub(super) fn is_absent(error: &Error) -> bool {
    match error {
        Error::NotFound { .. } => true,
        Error::Status { status, .. } => matches!(status, 400 | 405 | 406 | 410 | 501),
        _ => false,
    }
}

/// The entries of an index. What is no index, such as some page of a web server, is none of this API.
fn list(bytes: &[u8]) -> Option<Vec<Descriptor>> {
    let index: ImageIndex = serde_json::from_slice(bytes).ok()?;
    Some(index.manifests().clone())
}
