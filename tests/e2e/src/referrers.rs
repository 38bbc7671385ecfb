//! The referrers API (OCI distribution specification 1.1, "Listing Referrers") over a real registry's storage.
//!
//! No registry that Debian has serves it: docker-registry 2.8 keeps manifests with a `subject` and does not list them. This reads
//! what it keeps.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::http::Request;
use crate::images;

/// The media type of the answer.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The answer to a request for referrers; none when it is a request for something else.
pub(crate) fn answer(storage: &Path, request: &Request) -> Option<Vec<u8>> {
    let path = request.path.split('?').next()?;
    let (repository, digest) = path.strip_prefix("/v2/")?.split_once("/referrers/")?;
    let kind = request.query("artifactType").pop();
    let answer = match list(storage, repository, digest, kind.as_deref()) {
        Ok(manifests) => {
            let body = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
            let filtered = match kind {
                Some(_) => "OCI-Filters-Applied: artifactType\r\n",
                None => "",
            };
            response("200 OK", filtered, &body.to_string())
        }
        Err(error) => response("500 Internal Server Error", "", &format!("{error:#}")),
    };
    Some(answer)
}

fn response(status: &str, more: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {INDEX}\r\n{more}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The descriptors of what refers to a digest.
fn list(storage: &Path, repository: &str, of: &str, kind: Option<&str>) -> Result<Vec<Value>> {
    let revisions = storage
        .join("repositories")
        .join(repository)
        .join("_manifests/revisions/sha256");
    let mut found = Vec::new();
    for revision in fs::read_dir(&revisions).with_context(|| revisions.display().to_string())? {
        let hex = revision?.file_name().to_string_lossy().into_owned();
        let blob = storage
            .join("blobs/sha256")
            .join(&hex[..2])
            .join(&hex)
            .join("data");
        let bytes = fs::read(&blob).with_context(|| blob.display().to_string())?;
        let manifest: Value = serde_json::from_slice(&bytes)?;
        // What has no artifact type of its own is of its configuration's.
        let own = match &manifest["artifactType"] {
            Value::Null => &manifest["config"]["mediaType"],
            own => own,
        };
        if manifest["subject"]["digest"] == of && kind.is_none_or(|kind| own == kind) {
            found.push(json!({
                "mediaType": manifest["mediaType"],
                "digest": images::sha256(&bytes),
                "size": bytes.len(),
                "artifactType": own,
                "annotations": manifest["annotations"],
            }));
        }
    }
    Ok(found)
}
