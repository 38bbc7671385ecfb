//! References to artifacts, as people write them: `registry/repository:tag@digest`.
//!
//! The grammar and the normalisation are those of the docker client (github.com/distribution/reference, `regexp.go` and
//! `normalize.go`): a first component counts as a registry only when it has a dot, a colon or upper-case letters or is
//! `localhost`; everything else is on Docker Hub.
//!
//! It must not know of the network.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError};

/// Longest repository name (distribution/reference, `RepositoryNameTotalLengthMax`).
const REPOSITORY_MAX: usize = 255;

/// Longest tag (OCI distribution specification, "Pulling manifests").
const TAG_MAX: usize = 128;

/// Longest text that is looked at. No well-formed reference is longer: registry, repository, tag and a sha512 digest.
const TEXT_MAX: usize = 1024;

/// The registry of names without one.
const DOCKER_HUB: &str = "docker.io";

/// Docker Hub's older name.
const DOCKER_HUB_INDEX: &str = "index.docker.io";

/// The folder of Docker Hub's own repositories.
const DOCKER_LIBRARY: &str = "library";

/// The tag when neither tag nor digest is given.
const DEFAULT_TAG: &str = "latest";

/// A parsed and normalised reference. It has a tag or a digest, or both; the digest then decides.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Host, and port if one was given: `docker.io`, `registry.example.com:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Path of the repository, without the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if any.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest that the reference is pinned to, if any.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Another tag of the same repository. The tag must be well formed.
    pub(crate) fn with_tag(&self, tag: &str) -> Reference {
        Reference {
            tag: Some(tag.to_owned()),
            digest: None,
            ..self.clone()
        }
    }

    /// The same reference, pinned to a digest. The tag is kept: it tells a person where the digest came from.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference {
            digest: Some(digest),
            ..self.clone()
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Why a text is no reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing.
    #[error("the reference is empty; write registry/repository:tag")]
    Empty,
    /// More than any reference needs.
    #[error("the reference is longer than {TEXT_MAX} bytes")]
    TooLong,
    /// `oci://`, `https://` and the like.
    #[error("a reference has no scheme: write {rest:?} without {scheme:?}")]
    Scheme {
        /// What to leave out.
        scheme: String,
        /// What would be left.
        rest: String,
    },
    /// The part before the first slash.
    #[error("registry {0:?} is not a host name or address with an optional port")]
    Registry(String),
    /// The part between registry and tag.
    #[error(
        "repository {0:?} is not valid: lower-case letters and digits, separated by '/', '.', '_', '__' or dashes, at most {REPOSITORY_MAX} bytes"
    )]
    Repository(String),
    /// The part after the colon.
    #[error(
        "tag {0:?} is not valid: letters, digits, '_', '.' and '-', not starting with '.' or '-', at most {TAG_MAX}"
    )]
    Tag(String),
    /// The part after the at sign.
    #[error("the reference's digest is not valid")]
    Digest(#[source] DigestError),
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.len() > TEXT_MAX {
            return Err(ReferenceError::TooLong);
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            return Err(ReferenceError::Scheme {
                scheme: format!("{scheme}://"),
                rest: rest.to_owned(),
            });
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(ReferenceError::Digest)?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        let (name, tag) = split_tag(rest);
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(ReferenceError::Tag(tag.to_owned()));
        }
        let (registry, repository) = split_registry(name);
        if !is_registry(&registry) {
            return Err(ReferenceError::Registry(registry));
        }
        if !is_repository(&repository) {
            return Err(ReferenceError::Repository(repository));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Reference {
            registry,
            repository,
            tag,
            digest,
        })
    }
}

/// A colon begins a tag only behind the last slash; before it, a port.
fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    }
}

/// distribution/reference, `splitDockerDomain`.
fn split_registry(name: &str) -> (String, String) {
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if looks_like_host(first) => (first, rest),
        _ => (DOCKER_HUB, name),
    };
    if registry != DOCKER_HUB && registry != DOCKER_HUB_INDEX {
        return (registry.to_owned(), repository.to_owned());
    }
    let repository = if repository.contains('/') {
        repository.to_owned()
    } else {
        format!("{DOCKER_LIBRARY}/{repository}")
    };
    (DOCKER_HUB.to_owned(), repository)
}

fn looks_like_host(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.chars().any(|c| c.is_ascii_uppercase())
}

/// `domain-name` or bracketed IPv6 address, with an optional port.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match rest.strip_prefix(':') {
                Some(port) => ("ipv6", Some(port)),
                None if rest.is_empty() => ("ipv6", None),
                None => return false,
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port_fits = port.is_none_or(|port| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    // RFC 1035, 2.3.4: 255 octets at most.
    port_fits && host.len() <= 255 && host.split('.').all(is_domain_component)
}

fn is_domain_component(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_repository(text: &str) -> bool {
    text.len() <= REPOSITORY_MAX && text.split('/').all(is_path_component)
}

/// `[a-z0-9]+ ((\.|_|__|-+) [a-z0-9]+)*` (OCI distribution specification, "Pulling manifests", `<name>`).
fn is_path_component(text: &str) -> bool {
    let mut rest = text;
    loop {
        let word = rest.trim_start_matches(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        if word.len() == rest.len() {
            return false;
        }
        if word.is_empty() {
            return true;
        }
        let next = word.trim_start_matches('-');
        rest = if next.len() < word.len() {
            next
        } else if let Some(next) = ["__", "_", "."].iter().find_map(|s| word.strip_prefix(s)) {
            next
        } else {
            return false;
        };
    }
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= TAG_MAX
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Reference, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|error| match error {
            // A deserializer's error has no causes.
            ReferenceError::Digest(ref cause) => {
                serde::de::Error::custom(format!("{error}: {cause}"))
            }
            other => serde::de::Error::custom(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn parse(text: &str) -> Result<String, ReferenceError> {
        text.parse::<Reference>()
            .map(|reference| reference.to_string())
    }

    #[test]
    fn names_are_read_as_the_docker_client_reads_them() {
        let cases = [
            ("kata", "docker.io/library/kata:latest"),
            ("team/kata:1", "docker.io/team/kata:1"),
            ("docker.io/kata", "docker.io/library/kata:latest"),
            ("index.docker.io/team/kata", "docker.io/team/kata:latest"),
            ("localhost/kata", "localhost/kata:latest"),
            ("localhost:5000", "docker.io/library/localhost:5000"),
            ("localhost:5000/kata", "localhost:5000/kata:latest"),
            ("Host/kata", "Host/kata:latest"),
            (
                "r.example/a/b-c--d__e_f.g:V1.0-x_",
                "r.example/a/b-c--d__e_f.g:V1.0-x_",
            ),
            ("127.0.0.1:5000/a:b", "127.0.0.1:5000/a:b"),
            ("[fd00::1]:5000/a:b", "[fd00::1]:5000/a:b"),
            ("[fd00::1]/a", "[fd00::1]/a:latest"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).as_deref(), Ok(expected), "{text}");
            assert_eq!(parse(expected).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_digest_needs_no_tag_and_keeps_one() {
        let pinned = format!("r.example/a@{DIGEST}");
        assert_eq!(parse(&pinned).as_deref(), Ok(pinned.as_str()));
        let both: Reference = format!("r.example/a:v1@{DIGEST}").parse().unwrap();
        assert_eq!(both.tag(), Some("v1"));
        assert_eq!(
            both.digest().map(ToString::to_string).as_deref(),
            Some(DIGEST)
        );
        let tagged: Reference = "r.example/a:v1".parse().unwrap();
        assert_eq!(tagged.with_digest(DIGEST.parse().unwrap()), both);
    }

    #[test]
    fn json_is_the_text_and_its_errors_are_whole() {
        let reference: Reference = serde_json::from_str("\"r.example/a\"").unwrap();
        assert_eq!(
            serde_json::to_string(&reference).unwrap(),
            "\"r.example/a:latest\""
        );
        let error = serde_json::from_str::<Reference>("\"r.example/a@md5:00\"").unwrap_err();
        assert!(
            error.to_string().contains("\"md5\" is not supported"),
            "{error}"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = format!("r.example/{}", "a".repeat(256));
        let huge = "a".repeat(2_000);
        let tag = format!("a:{}", "t".repeat(129));
        let cases: [(&str, &str); 23] = [
            ("", "empty"),
            (&huge, "longer than"),
            ("oci://r.example/a", "without \"oci://\""),
            ("https://r.example/a", "without \"https://\""),
            ("r.example/A", "repository"),
            ("r.example/", "repository"),
            ("r.example//a", "repository"),
            ("r.example/a/../b", "repository"),
            ("r.example/a___b", "repository"),
            ("r.example/-a", "repository"),
            ("r.example/a.", "repository"),
            ("r.example/a?x=1", "repository"),
            ("r.example/a%2e", "repository"),
            (&long, "repository"),
            ("r.example/a:", "tag"),
            ("r.example/a:-x", "tag"),
            (&tag, "tag"),
            ("r.example:0/a", "registry"),
            ("r.example:99999/a", "registry"),
            ("u@r.example/a", "digest"),
            ("u:p@r.example/a", "digest"),
            ("-r.example/a", "registry"),
            ("[::g]/a", "registry"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_error_or_comes_back(text in "\\PC{0,80}|[a-zA-Z0-9.:/@\\[\\]_-]{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let shown = reference.to_string();
                prop_assert_eq!(shown.parse::<Reference>(), Ok(reference));
            }
        }

        #[test]
        fn every_reference_of_the_grammar_comes_back(
            host in "([a-z0-9]{1,5}\\.[a-z0-9]{1,5}|localhost)(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,4}){0,2}",
            tag in proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,20}"),
            content in proptest::option::of(any::<[u8; 4]>()),
        ) {
            let mut text = format!("{host}/{path}");
            if let Some(tag) = &tag {
                text += &format!(":{tag}");
            }
            if let Some(content) = content {
                text += &format!("@{}", Digest::of(&content));
            }
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(reference.registry(), host);
            prop_assert_eq!(reference.repository(), path);
            let default = (tag.is_none() && content.is_none()).then(|| "latest".to_owned());
            let expected = tag.or(default);
            prop_assert_eq!(reference.tag(), expected.as_deref());
        }
    }
}
