//! Signatures as cosign made them, and as an attacker would like them.
//!
//! `tests/` holds what Debian's cosign 3.1.1 (`cosign3.bundle.json`) and 2.5.0 (`cosign2.*`) made with one key for one
//! artifact. End-to-end tests run cosign itself.

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
    KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaKeyPair, RsaPssSaltLength,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const BUNDLE: &[u8] = include_bytes!("tests/cosign3.bundle.json");
const PAYLOAD: &[u8] = include_bytes!("tests/cosign2.payload.json");
const SIGNATURE: &str = include_str!("tests/cosign2.signature");
const PEM: &[u8] = include_bytes!("tests/cosign.pub");
const SIGNED: &str = "sha256:54600cc7a0dbade23e0cc55ce13c160a68ef2f8d25a07123d28282dafee64391";

type Sign = Box<dyn Fn(&[u8]) -> Vec<u8>>;

fn pem(spki: &[u8]) -> Vec<u8> {
    let text = STANDARD.encode(spki);
    format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n").into_bytes()
}

/// A key pair of each kind, and how it signs.
fn pairs() -> Vec<(&'static str, PublicKey, Sign)> {
    let ecdsa = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
    let ecdsa_key = ecdsa.public_key().as_der().unwrap().as_ref().to_vec();
    let ed = Ed25519KeyPair::generate().unwrap();
    let ed_key = ed.public_key().as_der().unwrap().as_ref().to_vec();
    let rsa = std::rc::Rc::new(RsaKeyPair::generate(KeySize::Rsa2048).unwrap());
    let rsa_key: Vec<u8> = rsa.public_key().as_der().unwrap().as_ref().to_vec();
    let signer = |encoding: &'static dyn aws_lc_rs::signature::RsaEncoding| -> Sign {
        let rsa = rsa.clone();
        Box::new(move |message| {
            let mut signature = vec![0; rsa.public_modulus_len()];
            rsa.sign(encoding, &SystemRandom::new(), message, &mut signature)
                .unwrap();
            signature
        })
    };
    let key = |spki: &[u8]| PublicKey::from_pem(&pem(spki)).unwrap().remove(0);
    vec![
        (
            "ECDSA",
            key(&ecdsa_key),
            Box::new(move |message: &[u8]| {
                let random = SystemRandom::new();
                ecdsa.sign(&random, message).unwrap().as_ref().to_vec()
            }) as Sign,
        ),
        (
            "Ed25519",
            key(&ed_key),
            Box::new(move |message: &[u8]| ed.sign(message).as_ref().to_vec()),
        ),
        ("RSA PKCS #1", key(&rsa_key), signer(&RSA_PKCS1_SHA256)),
        ("RSA PSS", key(&rsa_key), signer(&RSA_PSS_SHA256)),
        (
            "RSA PSS, longest salt",
            key(&rsa_key),
            signer(&const { RSA_PSS_SHA256.with_pss_salt_length(RsaPssSaltLength::Max) }),
        ),
    ]
}

fn cosign() -> Vec<PublicKey> {
    PublicKey::from_pem(PEM).unwrap()
}

fn signed() -> Digest {
    SIGNED.parse().unwrap()
}

fn statement(hex: &str, predicate: &str) -> Vec<u8> {
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{ "digest": { "sha256": hex } }],
        "predicateType": predicate, "predicate": {},
    })
    .to_string()
    .into_bytes()
}

fn envelope(payload: &[u8], sign: &Sign) -> Value {
    let kind = "application/vnd.in-toto+json";
    let signature = sign(&bundle::pae(kind, payload));
    json!({
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": { "publicKey": { "hint": "" } },
        "dsseEnvelope": {
            "payload": STANDARD.encode(payload), "payloadType": kind,
            "signatures": [{ "sig": STANDARD.encode(signature) }],
        },
    })
}

fn message(bytes: &[u8], sign: &Sign) -> Value {
    json!({
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": { "publicKey": {} },
        "messageSignature": { "signature": STANDARD.encode(sign(bytes)) },
    })
}

const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";

#[test]
fn what_cosign_made_is_verified() {
    let digest = signed();
    let subjects = [Subject {
        digest: &digest,
        bytes: b"",
    }];
    let keys = cosign();
    let want = Ok((keys[0].id().clone(), digest.clone()));
    assert_eq!(verify_bundle(BUNDLE, &subjects, &keys), want);
    assert_eq!(verify_simple(PAYLOAD, SIGNATURE, &subjects, &keys), want);
    // cosign's hint is the same digest of the key.
    let bundle: Value = serde_json::from_slice(BUNDLE).unwrap();
    let hint = bundle["verificationMaterial"]["publicKey"]["hint"].as_str();
    let raw = STANDARD.decode(hint.unwrap()).unwrap();
    let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(keys[0].id().hex(), hex);
}

#[test]
fn a_signature_of_another_artifact_is_none_of_this_one() {
    let digest = Digest::of(b"another");
    let subjects = [Subject {
        digest: &digest,
        bytes: b"another",
    }];
    for reason in [
        verify_bundle(BUNDLE, &subjects, &cosign()).unwrap_err(),
        verify_simple(PAYLOAD, SIGNATURE, &subjects, &cosign()).unwrap_err(),
    ] {
        assert!(
            reason.contains("another artifact") && reason.contains(SIGNED),
            "{reason}"
        );
    }
}

#[test]
fn every_kind_of_key_signs_in_every_form() {
    let bytes = b"{a manifest}";
    let digest = Digest::of(bytes);
    let subjects = [Subject {
        digest: &digest,
        bytes,
    }];
    let all = pairs();
    for (name, key, sign) in &all {
        let keys = [key.clone()];
        let want = Ok((key.id().clone(), digest.clone()));
        let dsse = envelope(&statement(digest.hex(), SIGN), sign).to_string();
        assert_eq!(
            verify_bundle(dsse.as_bytes(), &subjects, &keys),
            want,
            "{name}"
        );
        let plain = message(bytes, sign).to_string();
        assert_eq!(
            verify_bundle(plain.as_bytes(), &subjects, &keys),
            want,
            "{name}"
        );
        let payload = json!({ "critical": {
            "identity": { "docker-reference": "anywhere" },
            "image": { "docker-manifest-digest": digest },
            "type": "cosign container image signature",
        }, "optional": null })
        .to_string();
        let signature = STANDARD.encode(sign(payload.as_bytes()));
        assert_eq!(
            verify_simple(payload.as_bytes(), &signature, &subjects, &keys),
            want,
            "{name}"
        );
        // And nobody else's key takes it.
        let others: Vec<_> = all
            .iter()
            .filter(|(_, other, _)| other.id() != key.id())
            .map(|(_, other, _)| other.clone())
            .chain(cosign())
            .collect();
        for text in [&dsse, &plain] {
            let reason = verify_bundle(text.as_bytes(), &subjects, &others).unwrap_err();
            assert!(
                reason.contains("none of the trusted keys"),
                "{name}: {reason}"
            );
        }
    }
}

#[test]
fn what_is_signed_and_means_something_else_does_not_count() {
    let digest = Digest::of(b"m");
    let subjects = [Subject {
        digest: &digest,
        bytes: b"m",
    }];
    let (_, key, sign) = pairs().remove(1);
    let keys = [key];
    let hex = digest.hex();
    let good = envelope(&statement(hex, SIGN), &sign);
    let changed = |pointer: &str, value: Value| {
        let mut bundle = good.clone();
        *bundle.pointer_mut(pointer).unwrap() = value;
        bundle
    };
    let with = |statement: &[u8]| envelope(statement, &sign);
    let mut both = good.clone();
    both["messageSignature"] = message(b"m", &sign)["messageSignature"].clone();
    let mut certificate = good.clone();
    certificate["verificationMaterial"] = json!({ "certificate": { "rawBytes": "" } });
    let one = good["dsseEnvelope"]["signatures"][0].clone();
    for (bundle, want) in [
        (with(&statement(hex, "https://spdx.dev/Document")), "attestation (https://spdx.dev/Document)"),
        (with(&statement(&"0".repeat(64), SIGN)), "another artifact"),
        (with(b"{}"), "statement cannot be read"),
        (with(b"not json"), "statement cannot be read"),
        (with(br#"{"_type":"x","subject":[],"predicateType":"y"}"#), "statement is \"x\""),
        (
            with(format!(r#"{{"_type":"https://in-toto.io/Statement/v1","subject":[],"predicateType":"{SIGN}"}}"#).as_bytes()),
            "names no artifact",
        ),
        (changed("/dsseEnvelope/payloadType", json!("text/plain")), "not an in-toto statement"),
        (changed("/dsseEnvelope/signatures", json!([])), "not exactly one"),
        (changed("/dsseEnvelope/signatures", json!([one, one])), "not exactly one"),
        (changed("/dsseEnvelope/signatures/0/sig", json!("!")), "not base64"),
        (changed("/dsseEnvelope/signatures/0/sig", json!("")), "none of the trusted keys"),
        (changed("/mediaType", json!("application/x")), "only application/vnd.dev.sigstore"),
        (both, "not exactly one"),
        (certificate, "certificate"),
        (message(b"n", &sign), "none of the trusted keys"),
        (json!([]), "cannot be read"),
    ] {
        let reason = verify_bundle(bundle.to_string().as_bytes(), &subjects, &keys).unwrap_err();
        assert!(reason.contains(want), "{reason:?} lacks {want:?}");
    }
    // Signed bytes that are moved from one form into the other.
    let statement = statement(hex, SIGN);
    let signature = STANDARD.encode(sign(&statement));
    let reason = verify_simple(&statement, &signature, &subjects, &keys).unwrap_err();
    assert!(reason.contains("payload cannot be read"), "{reason}");
}

#[test]
fn files_that_hold_no_usable_public_key_say_why() {
    let p384 = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_ASN1_SIGNING).unwrap();
    let p384 = p384.public_key().as_der().unwrap().as_ref().to_vec();
    let private = b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n";
    let wrong = |pem: &[u8]| PublicKey::from_pem(pem).unwrap_err();
    assert_eq!(wrong(private), KeyError::Private);
    assert_eq!(wrong(&pem(&p384)), KeyError::Kind);
    assert_eq!(wrong(&pem(&[4; 65])), KeyError::Kind);
    assert_eq!(wrong(&pem(&[7; 32])), KeyError::Kind);
    assert_eq!(wrong(&pem(&[])), KeyError::Kind);
    assert_eq!(wrong(b""), KeyError::NoKey(""));
    assert_eq!(wrong(b"no pem"), KeyError::NoKey(""));
    assert_eq!(wrong(&vec![b'a'; 70_000]), KeyError::TooLarge);
    assert!(matches!(
        wrong(b"-----BEGIN PUBLIC KEY-----\n!!\n-----END PUBLIC KEY-----\n"),
        KeyError::Pem(_)
    ));
    let two = [
        PEM,
        &pairs().remove(1).1.id().to_string().into_bytes(),
        b"\n",
        PEM,
    ]
    .concat();
    assert_eq!(PublicKey::from_pem(&two).unwrap().len(), 2);
}

proptest! {
    #[test]
    fn nothing_that_is_changed_counts(at in 0usize..10_000, to in any::<u8>()) {
        let digest = signed();
        let subjects = [Subject { digest: &digest, bytes: b"" }];
        let keys = cosign();
        // Either refused, or what was changed has no meaning (a space, an unknown key): then it says the same.
        let want = (keys[0].id().clone(), digest.clone());
        let mut bundle = BUNDLE.to_vec();
        let place = at % bundle.len();
        bundle[place] = to;
        if let Ok(got) = verify_bundle(&bundle, &subjects, &keys) {
            prop_assert_eq!(got, want);
        }
        let mut payload = PAYLOAD.to_vec();
        let place = at % payload.len();
        let same = payload[place] == to;
        payload[place] = to;
        prop_assert_eq!(verify_simple(&payload, SIGNATURE, &subjects, &keys).is_ok(), same);
    }

    #[test]
    fn bytes_of_any_kind_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let digest = signed();
        let subjects = [Subject { digest: &digest, bytes: b"" }];
        prop_assert!(verify_bundle(&bytes, &subjects, &cosign()).is_err());
        prop_assert!(verify_simple(&bytes, SIGNATURE, &subjects, &cosign()).is_err());
        prop_assert!(Evidence::parts(&bytes).is_err());
        let _ = PublicKey::from_pem(&bytes);
    }
}
