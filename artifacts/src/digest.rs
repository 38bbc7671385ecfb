//! Digests of content and the hashing that makes them.
//!
//! Only the two algorithms that the OCI image specification registers (descriptor.md, "Registered algorithms") are known:
//! sha256 and sha512. Everything else is refused when it is parsed, so that whoever holds a [`Digest`] can verify with it.
//!
//! It must not know of registries or files.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest as sha;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A registered digest algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256 (RFC 6234), the default everywhere.
    Sha256,
    /// SHA-512 (RFC 6234).
    Sha512,
}

impl Algorithm {
    /// The name in front of the colon.
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// Hexadecimal characters of a digest.
    fn hex_len(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }

    fn engine(self) -> &'static sha::Algorithm {
        match self {
            Algorithm::Sha256 => &sha::SHA256,
            Algorithm::Sha512 => &sha::SHA512,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `algorithm:hex`, checked: known algorithm, right length, lower-case hexadecimal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    hex: Box<str>,
}

impl Digest {
    /// The SHA-256 digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest::with(Algorithm::Sha256, bytes)
    }

    /// The digest of `bytes` by the given algorithm.
    pub fn with(algorithm: Algorithm, bytes: &[u8]) -> Digest {
        Digest::from_raw(algorithm, sha::digest(algorithm.engine(), bytes).as_ref())
    }

    /// The algorithm in front of the colon.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The lower-case hexadecimal characters behind the colon.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Digest {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut hex = String::with_capacity(raw.len() * 2);
        for byte in raw {
            hex.push(char::from(HEX[usize::from(byte >> 4)]));
            hex.push(char::from(HEX[usize::from(byte & 15)]));
        }
        Digest {
            algorithm,
            hex: hex.into_boxed_str(),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Why a text is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Nothing before a colon.
    #[error("a digest is written algorithm:hex, for example sha256:e3b0…")]
    Form,
    /// Another algorithm.
    #[error("digest algorithm {0:?} is not supported, only sha256 and sha512 are")]
    Algorithm(String),
    /// The hexadecimal part is too short or too long.
    #[error("a {algorithm} digest has {expected} hexadecimal characters, this one has {got}")]
    Length {
        /// The algorithm named.
        algorithm: Algorithm,
        /// Characters that it needs.
        expected: usize,
        /// Characters that were there.
        got: usize,
    },
    /// The hexadecimal part has another character.
    #[error("a digest has only the characters 0-9 and a-f after the colon")]
    Character,
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Digest, DigestError> {
        let (name, hex) = text.split_once(':').ok_or(DigestError::Form)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            "" => return Err(DigestError::Form),
            other => return Err(DigestError::Algorithm(other.chars().take(32).collect())),
        };
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(DigestError::Character);
        }
        if hex.len() != algorithm.hex_len() {
            return Err(DigestError::Length {
                algorithm,
                expected: algorithm.hex_len(),
                got: hex.len(),
            });
        }
        Ok(Digest {
            algorithm,
            hex: hex.into(),
        })
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Hashes a stream piece by piece.
#[derive(Clone)]
pub struct Hasher {
    algorithm: Algorithm,
    context: sha::Context,
}

impl Hasher {
    /// A SHA-256 hasher, for content that we name ourselves.
    pub fn new() -> Hasher {
        Hasher::with(Algorithm::Sha256)
    }

    /// A hasher for a given algorithm.
    pub fn with(algorithm: Algorithm) -> Hasher {
        Hasher {
            algorithm,
            context: sha::Context::new(algorithm.engine()),
        }
    }

    /// A hasher whose result can be compared with `digest`.
    pub fn like(digest: &Digest) -> Hasher {
        Hasher::with(digest.algorithm())
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(self) -> Digest {
        Digest::from_raw(self.algorithm, self.context.finish().as_ref())
    }
}

impl Default for Hasher {
    fn default() -> Hasher {
        Hasher::new()
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hasher({})", self.algorithm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // FIPS 180-4 test vectors for "abc".
    const ABC_256: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const ABC_512: &str = "sha512:ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                           2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";

    #[test]
    fn known_answers() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC_256);
        assert_eq!(Digest::with(Algorithm::Sha512, b"abc").to_string(), ABC_512);
        for text in [ABC_256, ABC_512] {
            let expected: Digest = text.parse().unwrap();
            let mut hasher = Hasher::like(&expected);
            hasher.update(b"a");
            hasher.update(b"");
            hasher.update(b"bc");
            assert_eq!(hasher.finish(), expected);
            assert_eq!(expected.to_string(), text);
            assert_eq!(
                text.len(),
                expected.algorithm().as_str().len() + 1 + expected.hex().len()
            );
        }
    }

    #[test]
    fn other_texts_are_refused_with_a_reason() {
        let upper = ABC_256.to_uppercase().replace("SHA256", "sha256");
        let cases: [(&str, DigestError); 7] = [
            ("", DigestError::Form),
            ("sha256", DigestError::Form),
            (":00", DigestError::Form),
            ("md5:00", DigestError::Algorithm("md5".into())),
            (&upper, DigestError::Character),
            ("sha256:../../../etc/passwd", DigestError::Character),
            (
                "sha256:00",
                DigestError::Length {
                    algorithm: Algorithm::Sha256,
                    expected: 64,
                    got: 2,
                },
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Digest>().unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn json_is_the_text() {
        let digest = Digest::of(b"abc");
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(json, format!("{ABC_256:?}"));
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
        assert!(serde_json::from_str::<Digest>("\"sha256:1\"").is_err());
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC*") {
            if let Ok(digest) = text.parse::<Digest>() {
                assert_eq!(digest.to_string(), text);
            }
        }
    }
}
