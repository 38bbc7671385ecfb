//! The user's public keys: PEM, SubjectPublicKeyInfo, one of three kinds.
//!
//! It must not know of signatures' formats.

use std::fmt;

use aws_lc_rs::rsa::PublicEncryptingKey;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA256, RsaPssSaltLength, VerificationAlgorithm,
};
use rustls::pki_types::pem::{PemObject as _, SectionKind};

use crate::digest::Digest;

/// The most bytes of a file with keys.
const FILE_MAX: usize = 64 << 10;

/// RSA keys that are accepted, in bits: AWS-LC's bounds for `RSA_*_2048_8192_*`.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// The RSA signatures that are accepted, all with SHA-256. cosign makes PKCS #1 v1.5. PSS comes from key management
/// services: with a salt as long as the digest (RFC 8017, section 9.1), or as long as fits (Go's default when signing).
const RSA: [&dyn VerificationAlgorithm; 3] = [
    &RSA_PKCS1_2048_8192_SHA256,
    &RSA_PSS_2048_8192_SHA256,
    &const { RSA_PSS_2048_8192_SHA256.with_pss_salt_length(RsaPssSaltLength::Max) },
];

/// Why a file gives no keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not PEM.
    #[error("it is not PEM: {0}")]
    Pem(String),
    /// Too long for keys.
    #[error("it has more than {FILE_MAX} bytes, which no file of public keys has")]
    TooLarge,
    /// PEM, and no public key in it.
    #[error(
        "there is no \"PUBLIC KEY\" in it{0}; give the file that \"cosign generate-key-pair\" calls cosign.pub"
    )]
    NoKey(&'static str),
    /// A secret where it does not belong.
    #[error(
        "it holds a private key, which belongs on no node; give the public one (\"cosign public-key --key FILE\" prints it)"
    )]
    Private,
    /// A key of another kind.
    #[error(
        "its key is of a kind that is not supported; ECDSA P-256, Ed25519, and RSA with 2048 to 8192 bits are"
    )]
    Kind,
}

/// A public key that may sign artifacts.
#[derive(Clone)]
pub struct PublicKey {
    id: Digest,
    kind: &'static str,
    /// The same key for each algorithm that its kind allows.
    ways: Vec<ParsedPublicKey>,
}

impl PublicKey {
    /// The keys in a PEM file; one as a rule.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pem(pem: &[u8]) -> Result<Vec<PublicKey>, KeyError> {
        if pem.len() > FILE_MAX {
            return Err(KeyError::TooLarge);
        }
        let mut keys = Vec::new();
        let mut other = "";
        for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(pem) {
            let (kind, der) = section.map_err(|error| KeyError::Pem(error.to_string()))?;
            match kind {
                SectionKind::PublicKey => keys.push(PublicKey::from_spki(&der)?),
                SectionKind::RsaPrivateKey
                | SectionKind::PrivateKey
                | SectionKind::EcPrivateKey => {
                    return Err(KeyError::Private);
                }
                SectionKind::Certificate => other = " (there is a certificate)",
                _ => other = " (there is something else)",
            }
        }
        // cosign's own private keys have a label that PEM readers pass over.
        if find(pem, b"PRIVATE KEY-----") {
            return Err(KeyError::Private);
        }
        if keys.is_empty() {
            return Err(KeyError::NoKey(other));
        }
        Ok(keys)
    }

    /// A key from its SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// [`KeyError::Kind`].
    pub fn from_spki(der: &[u8]) -> Result<PublicKey, KeyError> {
        // AWS-LC takes bare keys too; their digest would be no key's id.
        const SEQUENCE: u8 = 0x30;
        if der.first() != Some(&SEQUENCE) {
            return Err(KeyError::Kind);
        }
        let parsed = |algorithms: &[&'static dyn VerificationAlgorithm]| {
            let all = algorithms.iter();
            all.map(|algorithm| ParsedPublicKey::new(*algorithm, der))
                .collect::<Result<Vec<_>, _>>()
        };
        let rsa = || {
            let key = PublicEncryptingKey::from_der(der).ok()?;
            let fits = RSA_BITS.contains(&key.key_size_bits());
            fits.then(|| parsed(&RSA).ok()).flatten()
        };
        let (kind, ways) = if let Ok(ways) = parsed(&[&ECDSA_P256_SHA256_ASN1]) {
            ("ECDSA P-256", ways)
        } else if let Ok(ways) = parsed(&[&ED25519]) {
            ("Ed25519", ways)
        } else {
            ("RSA", rsa().ok_or(KeyError::Kind)?)
        };
        Ok(PublicKey {
            id: Digest::of(der),
            kind,
            ways,
        })
    }

    /// The SHA-256 digest of its SubjectPublicKeyInfo.
    pub fn id(&self) -> &Digest {
        &self.id
    }

    /// Whether this key made the signature over the message. One whose form is wrong was not made by it.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let mut ways = self.ways.iter();
        ways.any(|way| way.verify_sig(message, signature).is_ok())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}, {})", self.kind, self.id)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.id, self.kind)
    }
}

fn find(text: &[u8], what: &[u8]) -> bool {
    text.windows(what.len()).any(|window| window == what)
}
