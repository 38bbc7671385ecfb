//! Simple signing (cosign, specs/SIGNATURE_SPEC.md; the payload is containers/image's container-signature.5): a JSON payload
//! that names a manifest's digest, and a signature of exactly its bytes.
//!
//! The payload also names the image that was signed (`docker-reference`). It is not compared: artifacts are mirrored and
//! moved, and the digest says what they are.

use serde::Deserialize;

use super::{PublicKey, Subject, base64, shown, signed_by, subject};
use crate::digest::Digest;

/// The type that cosign writes (specs/SIGNATURE_SPEC.md, "Simple Signing").
const PAYLOAD_TYPE: &str = "cosign container image signature";

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// See [`super::verify_simple`].
pub(super) fn verify(
    payload: &[u8],
    signature: &str,
    subjects: &[Subject<'_>],
    keys: &[PublicKey],
) -> Result<(Digest, Digest), String> {
    let key = signed_by(payload, &base64(signature, "its signature")?, keys)?;
    let parsed: Payload = serde_json::from_slice(payload)
        .map_err(|error| format!("its payload cannot be read: {error}"))?;
    let critical = parsed.critical;
    if critical.kind != PAYLOAD_TYPE {
        return Err(format!(
            "its payload is a {:?}, not a {PAYLOAD_TYPE:?}",
            shown(&critical.kind)
        ));
    }
    let hex = critical.image.digest.strip_prefix("sha256:");
    let signed = hex.and_then(|hex| subject(hex, subjects));
    signed.map_or_else(
        || {
            Err(format!(
                "it is for {}, another artifact",
                shown(&critical.image.digest)
            ))
        },
        |subject| Ok((key, subject.digest.clone())),
    )
}
