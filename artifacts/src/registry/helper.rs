//! Credential helpers: programs of the host that keep credentials (github.com/docker/docker-credential-helpers).
//!
//! A helper is `docker-credential-<name>`, found on the PATH of the host's root and called with the one word `get`. It reads
//! the server's name from its standard input and answers with JSON on standard output. So nothing secret is ever on a
//! command line, and what it prints to standard output is never shown.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use km_host::Root;
use km_host::command;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::answer::clean;
use super::credentials::{Credential, Secret};
use super::{Error, Result};

/// How long a helper may take. Some ask a cloud's API.
const DEADLINE: Duration = Duration::from_secs(30);

/// The most bytes that a helper may print. Tokens have some thousand.
const OUTPUT_MAX: u64 = 1 << 20;

/// What helpers print when they know nothing of a server (docker-credential-helpers, `credentials.NewErrCredentialsNotFound`).
const NOT_FOUND: &str = "credentials not found in native keychain";

/// The user name that says that the secret is an identity token (docker-credential-helpers, README, "Development").
const TOKEN_USER: &str = "<token>";

/// What a helper prints.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Runs helpers, each once for a server.
#[derive(Debug, Default)]
pub(super) struct Helpers(Mutex<HashMap<(String, String), Option<Credential>>>);

impl Helpers {
    /// What a helper knows of a server. Whoever asks for the same meanwhile waits for the answer.
    pub(super) async fn get(
        &self,
        root: Option<&Arc<Root>>,
        name: &str,
        server: &str,
    ) -> Result<Option<Credential>> {
        let Some(root) = root.map(Arc::clone) else {
            return Ok(None);
        };
        let key = (name.to_owned(), server.to_owned());
        let mut known = self.0.lock().await;
        if let Some(known) = known.get(&key) {
            return Ok(known.clone());
        }
        let (name, server) = key.clone();
        let asked = tokio::task::spawn_blocking(move || ask(&root, &name, &server));
        let credential = asked
            .await
            .map_err(|_| failed(&key.0, &key.1, "its thread ended early".to_owned(), None))??;
        known.insert(key, credential.clone());
        Ok(credential)
    }
}

fn ask(root: &Root, name: &str, server: &str) -> Result<Option<Credential>> {
    let wrong = |problem: &str| failed(name, server, problem.to_owned(), None);
    if !is_plain_name(name) {
        return Err(wrong(
            "its name is not that of a file: letters, digits, '.', '_' and '-'",
        ));
    }
    let program = format!("docker-credential-{name}");
    let output = command::run_with_input(
        root,
        &[program.as_str(), "get"],
        server.as_bytes(),
        OUTPUT_MAX,
        DEADLINE,
    )
    .map_err(|source| {
        let problem = "it cannot be run to its end".to_owned();
        failed(name, server, problem, Some(source))
    })?;
    if !output.status.success() {
        if String::from_utf8_lossy(&output.stdout).trim() == NOT_FOUND {
            return Ok(None);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = clean(said.lines().last().unwrap_or_default());
        let said = if said.is_empty() {
            String::new()
        } else {
            format!(", and said {said:?}")
        };
        return Err(wrong(&format!("it ended with {}{said}", output.status)));
    }
    read(&output.stdout).map_err(wrong)
}

/// A helper's answer.
pub(super) fn read(stdout: &[u8]) -> Result<Option<Credential>, &'static str> {
    let answer: Answer = serde_json::from_slice(stdout)
        .map_err(|_| "what it printed is not the JSON of a user name and a secret")?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    if answer.username == TOKEN_USER {
        return Ok(Some(Credential::Identity(Secret::new(answer.secret))));
    }
    if answer.username.is_empty() {
        return Err("the user name that it printed is empty");
    }
    Ok(Some(Credential::Basic {
        username: Secret::new(answer.username),
        password: Secret::new(answer.secret),
    }))
}

/// Whether a name leads to no other folder and is no option.
fn is_plain_name(name: &str) -> bool {
    let usual = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= 100 && name.bytes().all(usual)
}

fn failed(
    name: &str,
    server: &str,
    problem: String,
    source: Option<command::CommandError>,
) -> Error {
    Error::Helper {
        helper: format!("docker-credential-{}", clean(name)),
        server: clean(server),
        problem,
        source: source.map(Box::new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Root {
        Root::new("/").unwrap()
    }

    #[test]
    fn every_form_of_an_answer() {
        let basic = read(br#"{"ServerURL":"r","Username":"bob","Secret":"s3cret"}"#);
        let basic = basic.unwrap().unwrap();
        assert_eq!(basic.basic().unwrap(), "Basic Ym9iOnMzY3JldA==");
        let token = read(br#"{"Username":"<token>","Secret":"t"}"#)
            .unwrap()
            .unwrap();
        assert!(matches!(token, Credential::Identity(_)));
        assert_eq!(read(br#"{"Username":"bob","Secret":""}"#), Ok(None));
        for wrong in [
            &b""[..],
            b"{}",
            b"[]",
            b"\xff",
            br#"{"Username":"","Secret":"s3cret"}"#,
        ] {
            let error = read(wrong).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_name_that_is_a_path_is_never_run() {
        for name in ["", "../../bin/sh", "a/b", "a b", "a\0b", "ä"] {
            let error = ask(&root(), name, "r.example").unwrap_err();
            assert!(matches!(error, Error::Helper { .. }), "{error:?}");
            assert!(error.to_string().contains("not that of a file"), "{error}");
            assert!(error.is_configuration());
        }
    }

    #[test]
    fn a_helper_that_is_not_there_is_named() {
        let error = ask(&root(), "km-no-such-helper", "r.example").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("\"docker-credential-km-no-such-helper\""),
            "{error}"
        );
    }

    #[tokio::test]
    async fn without_a_root_no_helper_is_run() {
        let helpers = Helpers::default();
        let got = helpers.get(None, "km-no-such-helper", "r.example").await;
        assert_eq!(got.unwrap(), None);
    }
}
