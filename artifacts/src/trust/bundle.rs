//! Sigstore bundles (sigstore protobuf-specs, sigstore_bundle.proto, in its JSON form; cosign, specs/BUNDLE_SPEC.md) that
//! were made with a key.
//!
//! A bundle signs in one of two ways. Either it is a DSSE envelope (secure-systems-lab/dsse, protocol.md) around an in-toto
//! statement, whose subject is the artifact's digest; or it is a signature of the artifact's bytes themselves. Only a
//! statement that says "signed" counts: with the same key people sign SBOMs and scan results too, and none of these says
//! that the artifact may run.

use serde::Deserialize;

use super::{BUNDLE_TYPE, PublicKey, Subject, base64, shown, signed_by, subject};
use crate::digest::Digest;

/// in-toto attestation, spec/v1/envelope.md.
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// in-toto attestation, spec/v1/statement.md.
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// What `cosign sign` writes (cosign, pkg/types, `CosignSignPredicateType`).
const SIGN_PREDICATE: &str = "https://sigstore.dev/cosign/sign/v1";

/// The most subjects of a statement that are looked at.
const SUBJECTS_MAX: usize = 1024;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Material,
    #[serde(default)]
    dsse_envelope: Option<Envelope>,
    #[serde(default)]
    message_signature: Option<MessageSignature>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    #[serde(default)]
    public_key: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MessageSignature {
    #[serde(default)]
    message_digest: Option<MessageDigest>,
    signature: String,
}

#[derive(Deserialize)]
struct MessageDigest {
    algorithm: String,
    digest: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<StatementSubject>,
    predicate_type: String,
}

#[derive(Deserialize)]
struct StatementSubject {
    #[serde(default)]
    digest: StatementDigest,
}

#[derive(Default, Deserialize)]
struct StatementDigest {
    #[serde(default)]
    sha256: Option<String>,
}

/// See [`super::verify_bundle`].
pub(super) fn verify(
    bytes: &[u8],
    subjects: &[Subject<'_>],
    keys: &[PublicKey],
) -> Result<(Digest, Digest), String> {
    let bundle: Bundle = serde_json::from_slice(bytes)
        .map_err(|error| format!("its bundle cannot be read: {error}"))?;
    if bundle.media_type != BUNDLE_TYPE {
        return Err(format!(
            "its bundle is {:?}, and only {BUNDLE_TYPE} is known",
            shown(&bundle.media_type)
        ));
    }
    if bundle.verification_material.public_key.is_none() {
        return Err(
            "it was made with a certificate (keyless), not with a key of its own".to_owned(),
        );
    }
    match (bundle.dsse_envelope, bundle.message_signature) {
        (Some(envelope), None) => envelope.verify(subjects, keys),
        (None, Some(signature)) => signature.verify(subjects, keys),
        _ => Err("its bundle holds not exactly one signature".to_owned()),
    }
}

impl Envelope {
    fn verify(
        &self,
        subjects: &[Subject<'_>],
        keys: &[PublicKey],
    ) -> Result<(Digest, Digest), String> {
        // sigstore_bundle.proto: "DSSE envelopes in a bundle MUST have exactly one signature".
        let [signature] = self.signatures.as_slice() else {
            return Err("its envelope holds not exactly one signature".to_owned());
        };
        if self.payload_type != PAYLOAD_TYPE {
            return Err(format!(
                "its envelope holds {:?}, not an in-toto statement",
                shown(&self.payload_type)
            ));
        }
        let payload = base64(&self.payload, "its payload")?;
        let signature = base64(&signature.sig, "its signature")?;
        let key = signed_by(&pae(&self.payload_type, &payload), &signature, keys)?;
        Ok((key, stated(&payload, subjects)?))
    }
}

impl MessageSignature {
    fn verify(
        &self,
        subjects: &[Subject<'_>],
        keys: &[PublicKey],
    ) -> Result<(Digest, Digest), String> {
        let signature = base64(&self.signature, "its signature")?;
        let mut subjects = subjects.iter();
        let signed = subjects.find_map(|subject| {
            let key = signed_by(subject.bytes, &signature, keys).ok()?;
            Some((key, subject.digest.clone()))
        });
        signed.ok_or_else(|| self.why_not())
    }

    /// The digest in the bundle is a hint, not signed; it only serves to say what is wrong.
    fn why_not(&self) -> String {
        let hint = self.message_digest.as_ref();
        let hint = hint.filter(|hint| hint.algorithm == "SHA2_256");
        let raw = hint.and_then(|hint| base64(&hint.digest, "").ok());
        match raw {
            Some(raw) if raw.len() == 32 => {
                let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
                format!(
                    "none of the trusted keys made it for this artifact (it says that it is for sha256:{hex})"
                )
            }
            _ => "none of the trusted keys made it for this artifact".to_owned(),
        }
    }
}

/// Which subject a statement names; its signature is verified already.
fn stated(payload: &[u8], subjects: &[Subject<'_>]) -> Result<Digest, String> {
    let statement: Statement = serde_json::from_slice(payload)
        .map_err(|error| format!("its statement cannot be read: {error}"))?;
    if statement.kind != STATEMENT_TYPE {
        return Err(format!(
            "its statement is {:?}, and only {STATEMENT_TYPE} is known",
            shown(&statement.kind)
        ));
    }
    if statement.predicate_type != SIGN_PREDICATE {
        return Err(format!(
            "it is an attestation ({}), not a signature",
            shown(&statement.predicate_type)
        ));
    }
    if statement.subject.len() > SUBJECTS_MAX {
        return Err(format!("it names more than {SUBJECTS_MAX} artifacts"));
    }
    let mut named = statement
        .subject
        .iter()
        .filter_map(|one| one.digest.sha256.as_deref());
    let found = named
        .clone()
        .find_map(|hex| subject(hex, subjects))
        .map(|subject| subject.digest.clone());
    found.ok_or_else(|| match named.next() {
        Some(hex) => format!("it is for sha256:{}, another artifact", shown(hex)),
        None => "it names no artifact".to_owned(),
    })
}

/// What a DSSE signature covers (dsse, protocol.md, "PAE").
pub(super) fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    );
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}
