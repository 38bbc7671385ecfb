//! Reads answers: bounded bodies, and the registry's own words made fit to be shown.
//!
//! It must not know of tokens, manifests or blobs.

use std::time::Duration;

use reqwest::{Response, StatusCode};
use serde::Deserialize;

use super::retry::{Failure, of_status};
use super::transport::{Answer, Transport};
use super::{Error, Result};

/// The most of an error's body that is read.
const REASON_BODY_MAX: u64 = 64 * 1024;

/// The most characters of a registry's words that are shown.
const REASON_MAX: usize = 300;

/// How long an error's body may take: the error itself is known already.
const REASON_WAIT: Duration = Duration::from_secs(5);

/// A small body may come slowly, but not for ever: so many times the time that may pass without a byte.
const WHOLE_FACTOR: u32 = 4;

/// OCI distribution specification, "Error Codes".
#[derive(Deserialize)]
struct Errors {
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: Option<String>,
}

impl Transport {
    /// A whole body of at most `limit` bytes.
    pub(super) async fn read_all(
        &self,
        answer: Answer,
        limit: u64,
        action: &str,
        what: &str,
    ) -> Result<Vec<u8>, Failure> {
        let too_large = || Error::TooLarge {
            what: what.to_owned(),
            limit,
        };
        let host = answer.host;
        if answer
            .response
            .content_length()
            .is_some_and(|length| length > limit)
        {
            return Err(too_large().into());
        }
        let mut stream = BodyStream::new(answer.response, self.options.read_timeout);
        let all = async {
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.next(&host, action, what).await? {
                if (bytes.len() + chunk.len()) as u64 > limit {
                    return Err(too_large().into());
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(bytes)
        };
        let after = self.options.read_timeout * WHOLE_FACTOR;
        tokio::time::timeout(after, all).await.unwrap_or_else(|_| {
            let action = action.to_owned();
            let host = host.clone();
            Err(Failure::soon(Error::Timeout {
                host,
                action,
                after,
            }))
        })
    }

    /// Turns every answer that is no success into an error.
    pub(super) async fn success(
        &self,
        answer: Answer,
        action: &str,
        what: &str,
        hint: impl FnOnce() -> String,
    ) -> Result<Answer, Failure> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let again = of_status(status, answer.response.headers());
        let (host, ours) = (answer.host.clone(), answer.ours);
        let plain = answer.response.url().scheme() == "http";
        let reason = reason(answer.response).await;
        let action = action.to_owned();
        let error = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if ours => Error::Unauthorized {
                host,
                action,
                reason,
                hint: hint(),
            },
            StatusCode::NOT_FOUND => Error::NotFound {
                host,
                what: what.to_owned(),
                reason,
            },
            _ => Error::Status {
                host,
                action,
                status: status.as_u16(),
                reason,
                hint: status_hint(status, plain),
            },
        };
        // A storage service refuses an address that is too old; the registry makes a new one.
        if !ours && matches!(status.as_u16(), 401 | 403) {
            return Err(Failure::soon(error));
        }
        Err(Failure::new(error, again))
    }
}

fn status_hint(status: StatusCode, plain: bool) -> String {
    // What Go's and nginx's servers say to plain HTTP on a TLS port.
    if plain && status == StatusCode::BAD_REQUEST {
        return "; it was asked without TLS: if it speaks TLS, say so in the settings".to_owned();
    }
    String::new()
}

/// A body piece by piece, each with a deadline.
pub(super) struct BodyStream {
    response: Response,
    wait: Duration,
    /// Bytes so far.
    got: u64,
}

impl BodyStream {
    pub(super) fn new(response: Response, wait: Duration) -> BodyStream {
        BodyStream {
            response,
            wait,
            got: 0,
        }
    }

    /// The next piece, or None at the end.
    pub(super) async fn next(
        &mut self,
        host: &str,
        action: &str,
        what: &str,
    ) -> Result<Option<impl std::ops::Deref<Target = [u8]> + use<>>, Failure> {
        match tokio::time::timeout(self.wait, self.response.chunk()).await {
            Ok(Ok(Some(chunk))) => {
                self.got += chunk.len() as u64;
                Ok(Some(chunk))
            }
            Ok(Ok(None)) => Ok(None),
            Ok(Err(error)) => Err(Failure::soon(Error::Broken {
                host: host.to_owned(),
                what: what.to_owned(),
                got: self.got,
                source: error.without_url(),
            })),
            Err(_) => Err(Failure::soon(Error::Timeout {
                host: host.to_owned(),
                action: action.to_owned(),
                after: self.wait,
            })),
        }
    }
}

/// The registry's words in an answer that is no success; empty when there are none that can be shown.
async fn reason(mut response: Response) -> String {
    let mut bytes = Vec::new();
    let read = async {
        // However it ends: what came is looked at, and the status alone is an error to report.
        while let Ok(Some(chunk)) = response.chunk().await {
            if (bytes.len() + chunk.len()) as u64 > REASON_BODY_MAX {
                break;
            }
            bytes.extend_from_slice(&chunk);
        }
    };
    // Late words are left out.
    let _ = tokio::time::timeout(REASON_WAIT, read).await;
    words(&bytes)
}

/// The specification's form: codes and messages. Other bodies are pages for browsers.
fn words(body: &[u8]) -> String {
    let Ok(Errors { errors }) = serde_json::from_slice(body) else {
        return String::new();
    };
    let all: Vec<_> = errors
        .iter()
        .take(3)
        .map(|error| match error.message.as_deref() {
            Some(message) if !message.is_empty() => format!("{}: {message}", error.code),
            _ => error.code.clone(),
        })
        .collect();
    clean(&all.join("; "))
}

/// Text from outside, short and on one line, without characters that a terminal acts on or that hide.
pub(crate) fn clean(text: &str) -> String {
    let is_hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
            || matches!(c, '\u{e0000}'..='\u{e0fff}')
    };
    let visible: String = text
        .chars()
        .take(4 * REASON_MAX)
        .map(|c| if is_hidden(c) { ' ' } else { c })
        .collect();
    let words: Vec<_> = visible.split_whitespace().collect();
    let line = words.join(" ");
    if line.chars().count() <= REASON_MAX {
        return line;
    }
    let mut short: String = line.chars().take(REASON_MAX).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_registrys_words_are_shown() {
        let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{"x":1}},{"code":"DENIED"}]}"#;
        assert_eq!(words(body), "MANIFEST_UNKNOWN: manifest unknown; DENIED");
        for other in [
            &b"<html>404</html>"[..],
            b"",
            b"{}",
            b"{\"errors\":{}}",
            b"[]",
            b"\xff",
        ] {
            assert_eq!(words(other), "");
        }
    }

    #[test]
    fn what_a_terminal_acts_on_is_gone() {
        let evil = "a\u{1b}[31mred\u{1b}]0;t\u{7}\r\n\tb\u{202e}c\u{200b}\u{0}\u{9b}d";
        assert_eq!(clean(evil), "a [31mred ]0;t b c d");
        assert_eq!(clean(&"x".repeat(5_000)).chars().count(), REASON_MAX + 1);
    }

    proptest! {
        #[test]
        fn cleaned_text_is_short_and_plain(text in "\\PC*|.*") {
            let shown = clean(&text);
            prop_assert!(shown.chars().count() <= REASON_MAX + 1);
            prop_assert!(!shown.chars().any(char::is_control));
        }
    }
}
