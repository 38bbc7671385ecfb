//! Keys, signatures' manifests, bundles and payloads from strangers. Nothing that was not signed may count.

use km_artifacts::digest::Digest;
use km_artifacts::trust::{Evidence, PublicKey, Subject, verify_bundle, verify_simple};

/// A key whose private half nobody has kept.
const KEY: &[u8] = include_bytes!("../../../artifacts/src/trust/tests/cosign.pub");

pub(crate) fn run(bytes: &[u8]) {
    let _ = PublicKey::from_pem(bytes);
    let _ = PublicKey::from_spki(bytes);
    let _ = Evidence::parts(bytes);
    let keys = PublicKey::from_pem(KEY).expect("a key");
    let digest = Digest::of(b"nobody has signed this");
    let subjects = [Subject {
        digest: &digest,
        bytes: b"nobody has signed this",
    }];
    assert!(verify_bundle(bytes, &subjects, &keys).is_err());
    let (payload, signature) = bytes.split_at(bytes.len() / 2);
    assert!(
        verify_simple(
            payload,
            &String::from_utf8_lossy(signature),
            &subjects,
            &keys
        )
        .is_err()
    );
}
