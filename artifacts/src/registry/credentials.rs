//! Credentials from the content of a docker `config.json` (docs.docker.com, "docker login", and containers-auth.json(5)).
//!
//! The same content comes out of a Kubernetes secret of type `kubernetes.io/dockerconfigjson`. Nothing here is ever shown:
//! Debug output and errors name registries and keys, never values, and not the parser's own message, which quotes them.
//!
//! It must not know of files, programs or the network.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

/// The key that docker writes for Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Padding is left out by some writers.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn new(text: String) -> Secret {
        Secret(text)
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Who we are to one registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Credential {
    /// A name and a password.
    Basic { username: Secret, password: Secret },
    /// An OAuth2 refresh token, exchanged at the token server (docker's `identitytoken`).
    Identity(Secret),
}

impl Credential {
    /// Value of the `Authorization` header for HTTP basic authentication (RFC 7617), if this is a name and a password.
    pub(super) fn basic(&self) -> Option<String> {
        let Credential::Basic { username, password } = self else {
            return None;
        };
        let pair = format!("{}:{}", username.0, password.0);
        Some(format!("Basic {}", BASE64.encode(pair)))
    }
}

/// One key of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// As it was written, to name it in messages.
    key: String,
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Here(Credential),
    /// Left to a program of this name.
    Helper(String),
}

/// What is known of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// The key and what it holds.
    Credential(&'a str, &'a Credential),
    /// The file leaves it to a helper.
    Helper {
        /// What follows `docker-credential-` in the program's name.
        name: &'a str,
        /// What it is to be asked for.
        server: String,
    },
    /// Nothing.
    Nothing,
}

/// Credentials of any number of registries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// By host, and path prefix if there is one: `registry.example.com:5000/team`.
    entries: BTreeMap<String, Entry>,
    /// The helper for everything else.
    store: Option<String>,
}

/// Why the content cannot be used. It names keys, never values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// Not JSON, or not of docker's form.
    #[error(
        "the credentials are not in the form of docker's config.json: {problem} at line {line}, column {column}"
    )]
    Json {
        /// What is wrong.
        problem: &'static str,
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
    },
    /// One entry is not usable.
    #[error("auths.{key:?} in the credentials is not usable: {problem}")]
    Entry {
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: &'static str,
    },
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: Option<BTreeMap<String, Option<FileEntry>>>,
    #[serde(default, rename = "credHelpers")]
    helpers: Option<BTreeMap<String, String>>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
struct FileEntry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default, rename = "identitytoken")]
    identity: Option<String>,
}

impl Credentials {
    /// No credentials at all.
    pub fn anonymous() -> Credentials {
        Credentials::default()
    }

    /// From the content of a docker `config.json`.
    ///
    /// # Errors
    /// When it is not of that form, or an entry's `auth` is not base64 of `name:password`.
    pub fn from_docker_config(content: &[u8]) -> Result<Credentials, CredentialsError> {
        let file: File =
            serde_json::from_slice(content).map_err(|error| CredentialsError::Json {
                problem: match error.classify() {
                    serde_json::error::Category::Data => "a value is of the wrong type",
                    serde_json::error::Category::Eof => "it ends too early",
                    _ => "it is not JSON",
                },
                line: error.line(),
                column: error.column(),
            })?;
        let mut entries = BTreeMap::new();
        let helpers = file.helpers.unwrap_or_default().into_iter();
        for (key, helper) in helpers.filter(|(_, helper)| !helper.is_empty()) {
            let source = Source::Helper(helper);
            entries.insert(normalise(&key), Entry { key, source });
        }
        for (key, entry) in file.auths.unwrap_or_default() {
            // Docker leaves empty entries behind for what a helper holds.
            if let Some(credential) = credential(&key, entry.unwrap_or_default())? {
                let source = Source::Here(credential);
                entries.insert(normalise(&key), Entry { key, source });
            }
        }
        Ok(Credentials {
            entries,
            store: file.store.filter(|store| !store.is_empty()),
        })
    }

    /// From the content of a Kubernetes secret of type `kubernetes.io/dockerconfigjson`, its key `.dockerconfigjson` decoded.
    /// Helpers that it names are not used: who may write a secret may not choose programs of this host.
    ///
    /// # Errors
    /// As [`Credentials::from_docker_config`].
    pub fn from_kubernetes_secret(content: &[u8]) -> Result<Credentials, CredentialsError> {
        let mut all = Credentials::from_docker_config(content)?;
        all.store = None;
        let here = |_: &String, entry: &mut Entry| matches!(entry.source, Source::Here(_));
        all.entries.retain(here);
        Ok(all)
    }

    /// One name and password for one registry, `host` or `host:port`.
    pub fn basic(registry: &str, username: &str, password: &str) -> Credentials {
        let source = Source::Here(Credential::Basic {
            username: Secret(username.to_owned()),
            password: Secret(password.to_owned()),
        });
        let key = registry.to_owned();
        Credentials {
            entries: BTreeMap::from([(normalise(registry), Entry { key, source })]),
            store: None,
        }
    }

    /// What is known for a repository: the longest matching key wins, as containers-auth.json(5) has it.
    pub(super) fn find(&self, registry: &str, repository: &str) -> Found<'_> {
        let full = format!("{}/{repository}", normalise(registry));
        let mut key = full.as_str();
        loop {
            if let Some(entry) = self.entries.get(key) {
                return match &entry.source {
                    Source::Here(credential) => Found::Credential(&entry.key, credential),
                    Source::Helper(name) => Found::Helper {
                        name,
                        server: entry.key.clone(),
                    },
                };
            }
            match key.rsplit_once('/') {
                Some((shorter, _)) => key = shorter,
                None => break,
            }
        }
        match &self.store {
            Some(name) => Found::Helper {
                name,
                server: usual_key(registry).to_owned(),
            },
            None => Found::Nothing,
        }
    }

    /// What a person may do when this repository's registry wants other credentials. Begins in the middle of a sentence.
    pub(super) fn hint(&self, registry: &str, repository: &str) -> String {
        let key = usual_key(registry);
        match self.find(registry, repository) {
            Found::Credential(key, _) => format!(
                "the credentials under auths.{key:?} were sent; check that they are right, not expired, and allowed to do this"
            ),
            Found::Helper { name, server } => format!(
                "the credential helper \"docker-credential-{name}\" was asked for {server:?}; check that it knows it, or put credentials under auths.{key:?}"
            ),
            Found::Nothing => format!(
                "no credentials are known for it; if it needs some, put them under auths.{key:?} in the credentials file, as docker login does"
            ),
        }
    }
}

/// The key under which docker itself keeps a registry's credentials.
fn usual_key(registry: &str) -> &str {
    if normalise(registry) == "docker.io" {
        DOCKER_HUB_KEY
    } else {
        registry
    }
}

fn credential(key: &str, entry: FileEntry) -> Result<Option<Credential>, CredentialsError> {
    let wrong = |problem| CredentialsError::Entry {
        key: key.to_owned(),
        problem,
    };
    if let Some(token) = filled(entry.identity) {
        return Ok(Some(Credential::Identity(Secret(token))));
    }
    let (username, password) = match filled(entry.auth) {
        Some(auth) => {
            let pair = BASE64
                .decode(auth.trim())
                .map_err(|_| wrong("auth is not base64"))?;
            let pair = String::from_utf8(pair).map_err(|_| wrong("auth is not text in base64"))?;
            let (username, password) = pair
                .split_once(':')
                .ok_or_else(|| wrong("auth is not base64 of name:password"))?;
            // Docker itself takes off NUL bytes behind the password (cli, config/configfile, decodeAuth).
            let password = password.trim_end_matches('\0');
            (username.to_owned(), password.to_owned())
        }
        None => match (filled(entry.username), entry.password) {
            (Some(username), password) => (username, password.unwrap_or_default()),
            (None, _) => return Ok(None),
        },
    };
    if username.is_empty() {
        return Err(wrong("the name in auth is empty"));
    }
    Ok(Some(Credential::Basic {
        username: Secret(username),
        password: Secret(password),
    }))
}

fn filled(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// Brings a key to `host[:port][/path]`: no scheme, no API version, one name for Docker Hub.
fn normalise(key: &str) -> String {
    let lower = key.trim().to_ascii_lowercase();
    let bare = lower
        .strip_prefix("https://")
        .or_else(|| lower.strip_prefix("http://"))
        .unwrap_or(&lower)
        .trim_end_matches('/');
    let bare = bare
        .strip_suffix("/v1")
        .or_else(|| bare.strip_suffix("/v2"))
        .unwrap_or(bare);
    let (host, path) = match bare.split_once('/') {
        Some((host, path)) => (host, Some(path)),
        None => (bare, None),
    };
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => "docker.io",
        other => other,
    };
    match path {
        Some(path) => format!("{host}/{path}"),
        None => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(json: &str) -> Credentials {
        Credentials::from_docker_config(json.as_bytes()).unwrap()
    }

    fn user_at(credentials: &Credentials, registry: &str, repository: &str) -> Option<String> {
        match credentials.find(registry, repository) {
            Found::Credential(_, Credential::Basic { username, password }) => {
                Some(format!("{}:{}", username.0, password.0))
            }
            Found::Credential(_, Credential::Identity(token)) => Some(format!("={}", token.0)),
            _ => None,
        }
    }

    #[test]
    fn every_form_of_an_entry() {
        // "bob:pa:ss" and "bob:pass\0", in base64.
        let all = parse(
            r#"{"auths":{
              "a.example":{"auth":"Ym9iOnBhOnNz"},
              "b.example:5000":{"username":"eve","password":"x"},
              "c.example":{"auth":"Ym9iOnBhc3MA","identitytoken":"refresh"},
              "d.example":{"auth":"Ym9iOnBhc3MA"},
              "empty.example":{}, "null.example":null},
              "other":[1]}"#,
        );
        assert_eq!(user_at(&all, "a.example", "x").unwrap(), "bob:pa:ss");
        assert_eq!(user_at(&all, "b.example:5000", "x").unwrap(), "eve:x");
        assert_eq!(user_at(&all, "c.example", "x").unwrap(), "=refresh");
        assert_eq!(user_at(&all, "d.example", "x").unwrap(), "bob:pass");
        for none in [
            "b.example",
            "a.example:443",
            "empty.example",
            "null.example",
        ] {
            assert_eq!(all.find(none, "x"), Found::Nothing, "{none}");
        }
    }

    #[test]
    fn a_key_may_be_a_url_an_older_name_or_a_path() {
        let all = parse(
            r#"{"auths":{
              "https://index.docker.io/v1/":{"username":"hub","password":"x"},
              "https://Reg.example/v2/":{"username":"all","password":"x"},
              "reg.example/team":{"username":"team","password":"x"},
              "reg.example/team/image":{"username":"image","password":"x"}}}"#,
        );
        assert_eq!(user_at(&all, "docker.io", "library/a").unwrap(), "hub:x");
        assert_eq!(user_at(&all, "reg.example", "teams/a").unwrap(), "all:x");
        assert_eq!(user_at(&all, "reg.example", "team/a").unwrap(), "team:x");
        assert_eq!(
            user_at(&all, "reg.example", "team/image").unwrap(),
            "image:x"
        );
    }

    #[test]
    fn helpers_are_known_by_name_and_told() {
        let all = parse(r#"{"credsStore":"pass","credHelpers":{"gcr.io":"gcloud"}}"#);
        let helper = |registry: &str| match all.find(registry, "a") {
            Found::Helper { name, server } => (name.to_owned(), server),
            other => panic!("{other:?}"),
        };
        let expect = |name: &str, server: &str| (name.to_owned(), server.to_owned());
        assert_eq!(helper("gcr.io"), expect("gcloud", "gcr.io"));
        assert_eq!(helper("quay.io"), expect("pass", "quay.io"));
        assert_eq!(helper("docker.io"), expect("pass", DOCKER_HUB_KEY));
        assert!(all.hint("gcr.io", "a").contains("docker-credential-gcloud"));
        let none = Credentials::anonymous();
        assert!(none.hint("docker.io", "a").contains(DOCKER_HUB_KEY));
        assert!(none.hint("r:5000", "a").contains("auths.\"r:5000\""));
    }

    #[test]
    fn a_secret_of_kubernetes_chooses_no_programs() {
        let json = br#"{"auths":{"r.example":{"username":"bob","password":"x"}},
            "credsStore":"pass","credHelpers":{"gcr.io":"gcloud"}}"#;
        let all = Credentials::from_kubernetes_secret(json).unwrap();
        assert_eq!(user_at(&all, "r.example", "a").unwrap(), "bob:x");
        assert_eq!(all.find("gcr.io", "a"), Found::Nothing);
        assert_eq!(all.find("quay.io", "a"), Found::Nothing);
    }

    #[test]
    fn errors_and_debug_output_name_keys_and_hide_values() {
        let cases = [
            (
                r#"{"auths":{"r.example":{"auth":"s3cret!"}}}"#,
                "not base64",
            ),
            (
                r#"{"auths":{"r.example":{"auth":"czNjcmV0"}}}"#,
                "name:password",
            ),
            (
                r#"{"auths":{"r.example":"s3cret"}}"#,
                "wrong type at line 1",
            ),
            (r#"{"auths":{"#, "ends too early"),
            ("s3cret", "not JSON"),
        ];
        for (json, expected) in cases {
            let text = Credentials::from_docker_config(json.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(text.contains(expected), "{text}");
            assert!(
                !text.contains("s3cret") && !text.contains("czNjcmV0"),
                "{text}"
            );
        }
        let shown = format!(
            "{:?}",
            Credentials::basic("r.example", "bob-s3cret", "s3cret")
        );
        assert!(
            shown.contains("r.example") && !shown.contains("s3cret"),
            "{shown}"
        );
    }

    #[test]
    fn basic_authentication_is_the_pair_in_base64() {
        // RFC 7617, section 2.
        let all = Credentials::basic("r", "Aladdin", "open sesame");
        let Found::Credential(_, credential) = all.find("r", "x") else {
            panic!("not found");
        };
        assert_eq!(
            credential.basic().unwrap(),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_credentials(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Credentials::from_docker_config(&bytes);
        }

        #[test]
        fn any_key_and_value_of_the_right_form(key in "\\PC*", value in "\\PC*", name in "auth|username|identitytoken|x") {
            let json = serde_json::json!({ "auths": { key.clone(): { name: value } } }).to_string();
            if let Ok(all) = Credentials::from_docker_config(json.as_bytes()) {
                let _ = all.find(&key, "a/b");
            }
        }
    }
}
