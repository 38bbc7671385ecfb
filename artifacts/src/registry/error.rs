//! Why a registry did not give or take what was asked.
//!
//! A caller maps an error to an exit code by asking in this order: is it the content ([`Error::is_verification`]), our own
//! settings ([`Error::is_configuration`]), the disk on our side ([`Error::is_local`])? What is left is the registry or the
//! network. Nothing here ever holds a credential, a token or the query of a URL.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use km_host::HostPath;
use km_host::command::CommandError;

use super::Platform;
use super::hosts::HostsError;
use crate::digest::Digest;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection, or it broke before an answer came.
    #[error(
        "cannot reach {host} to {action}; check the host's name, its port, the network and the proxy settings"
    )]
    Unreachable {
        /// Host and port that were asked.
        host: String,
        /// What the request was for.
        action: String,
        /// The network's answer.
        source: reqwest::Error,
    },
    /// The TLS handshake failed.
    #[error("no trusted TLS connection to {host}; {hint}")]
    Tls {
        /// Host and port.
        host: String,
        /// What helps.
        hint: &'static str,
        /// What TLS says.
        source: reqwest::Error,
    },
    /// Nothing came for too long.
    #[error("cannot {action}: nothing came from {host} for {} s; try again, and check the network if it happens again", after.as_secs_f32())]
    Timeout {
        /// Host and port.
        host: String,
        /// What the request was for.
        action: String,
        /// How long was waited.
        after: Duration,
    },
    /// Who we are, or that we said nothing of it, is not enough.
    #[error("{host} does not let us {action}{}; {hint}", detail(reason))]
    Unauthorized {
        /// Host and port that refused: the registry or its token server.
        host: String,
        /// What the request was for.
        action: String,
        /// The server's words, shortened and cleaned; may be empty.
        reason: String,
        /// Which credentials were looked up and what to do.
        hint: String,
    },
    /// The registry does not have it.
    #[error(
        "{what} is not at {host}{}; check the spelling, or whether it was deleted",
        detail(reason)
    )]
    NotFound {
        /// Host and port.
        host: String,
        /// Reference, or blob and repository.
        what: String,
        /// The registry's words, shortened and cleaned; may be empty.
        reason: String,
    },
    /// An answer that is no success.
    #[error(
        "{host} answered {status} to the request to {action}{}{hint}",
        detail(reason)
    )]
    Status {
        /// Host and port.
        host: String,
        /// What the request was for.
        action: String,
        /// The HTTP status.
        status: u16,
        /// The registry's words, shortened and cleaned; may be empty.
        reason: String,
        /// What helps; empty, or begins with a semicolon.
        hint: String,
    },
    /// The registry asks for more patience than we have.
    #[error("{host} is too busy to {action} and asks to come back in {} s; run this again then", after.as_secs())]
    Busy {
        /// Host and port.
        host: String,
        /// What the request was for.
        action: String,
        /// From its `Retry-After`.
        after: Duration,
    },
    /// The connection broke in the middle of an answer, on every try.
    #[error("the connection to {host} broke after {got} bytes of {what}; try again")]
    Broken {
        /// Host and port.
        host: String,
        /// Which content.
        what: String,
        /// Bytes that came.
        got: u64,
        /// What the connection said.
        source: reqwest::Error,
    },
    /// A blob ended early, on every try.
    #[error(
        "{what} from {host} ended after {got} of {expected} bytes; the connection or the registry is broken, try again"
    )]
    Truncated {
        /// Host and port.
        host: String,
        /// Which content.
        what: String,
        /// Bytes announced by the descriptor.
        expected: u64,
        /// Bytes that came.
        got: u64,
        /// What the connection said, if it said something.
        source: Option<reqwest::Error>,
    },
    /// An answer that the OCI distribution specification does not allow.
    #[error(
        "{host} gave an answer that no registry should give to the request to {action}: {problem}"
    )]
    Protocol {
        /// Host and port.
        host: String,
        /// What the request was for.
        action: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// A redirect that must not be followed.
    #[error("{host} redirects the request to {action} to where we do not go: {problem}")]
    Redirect {
        /// Host and port.
        host: String,
        /// What the request was for.
        action: String,
        /// Why not.
        problem: String,
    },
    /// The index has nothing for this machine.
    #[error("{reference} has nothing for {wanted}; it has {available}")]
    NoPlatform {
        /// What was asked for.
        reference: String,
        /// The platform that was looked for.
        wanted: Platform,
        /// The platforms that it names, shortened.
        available: String,
    },
    /// The receiver of a blob's bytes failed.
    #[error("cannot store {what}")]
    Sink {
        /// Which content.
        what: String,
        /// The receiver's error; an error of another kind is inside ([`io::Error::get_ref`]).
        source: io::Error,
    },
    /// A file to publish cannot be read.
    #[error("cannot read {} to publish it", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file to publish is not what was announced.
    #[error("{} changed while it was published: {problem}; publish again", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
        /// In which way.
        problem: String,
    },
    /// The certificates handed in cannot be used.
    #[error("the registry CA is not usable: {problem}; it must be one or more certificates in PEM")]
    Ca {
        /// What is wrong.
        problem: String,
        /// What the parser said, if it said something.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Our own certificate cannot be used.
    #[error(
        "the registry client certificate is not usable; it must be a certificate and its own unencrypted private key, both in PEM"
    )]
    ClientCertificate {
        /// What the parser said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A `hosts.toml`, or a file that it names.
    #[error(
        "{path} cannot be used to find out how {registry} is reached{}; correct it as containerd's docs/hosts.md has it",
        problem.as_deref().map(|problem| format!(": {problem}")).unwrap_or_default()
    )]
    Hosts {
        /// The file, as the host sees it.
        path: HostPath,
        /// The registry that was looked up.
        registry: String,
        /// What is wrong, unless the cause says it.
        problem: Option<String>,
        /// The cause.
        source: Option<Box<HostsCause>>,
    },
    /// A credential helper did not give what it should.
    #[error("the credential helper {helper:?} gave no credentials for {server:?}: {problem}")]
    Helper {
        /// The program's name.
        helper: String,
        /// What it was asked for.
        server: String,
        /// What went wrong; nothing of what it printed to standard output.
        problem: String,
        /// Why it could not be run.
        source: Option<Box<CommandError>>,
    },
    /// The HTTP client cannot be made.
    #[error("cannot prepare the HTTP client: {problem}")]
    Setup {
        /// What was wrong.
        problem: &'static str,
        /// What it said.
        source: reqwest::Error,
    },
    /// Content that is not what its digest says.
    #[error(
        "{what} has digest {got} where {expected} was expected; it was damaged or tampered with, and is not used"
    )]
    DigestMismatch {
        /// Which content.
        what: String,
        /// From the reference, the descriptor or the registry's header.
        expected: Digest,
        /// Computed here.
        got: Digest,
    },
    /// More bytes than allowed or announced.
    #[error("{what} is larger than {limit} bytes, which is the most that is accepted for it")]
    TooLarge {
        /// Which content.
        what: String,
        /// The most that is read.
        limit: u64,
    },
    /// A manifest or index that cannot be used.
    #[error("the manifest of {reference} is not usable: {problem}")]
    MalformedManifest {
        /// What was asked for.
        reference: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A manifest of another kind.
    #[error(
        "{reference} is of media type {media_type:?}, which is not supported: only image manifests and image indexes (OCI, or Docker schema 2) are"
    )]
    UnsupportedMediaType {
        /// What was asked for.
        reference: String,
        /// What the registry calls it.
        media_type: String,
    },
}

impl Error {
    /// Whether the content is to blame: it does not verify, or must not be used.
    pub fn is_verification(&self) -> bool {
        matches!(
            self,
            Error::DigestMismatch { .. }
                | Error::TooLarge { .. }
                | Error::MalformedManifest { .. }
                | Error::UnsupportedMediaType { .. }
        )
    }

    /// Whether our own settings are to blame.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Error::Ca { .. }
                | Error::ClientCertificate { .. }
                | Error::Hosts { .. }
                | Error::Helper { .. }
        )
    }

    /// Whether this machine's disk is to blame: the receiver of a blob, or the file to publish.
    pub fn is_local(&self) -> bool {
        matches!(
            self,
            Error::Sink { .. } | Error::Source { .. } | Error::SourceChanged { .. }
        )
    }
}

/// Why a `hosts.toml` or a file that it names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostsCause {
    /// Its text.
    #[error(transparent)]
    Text(#[from] HostsError),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A certificate that it names.
    #[error(transparent)]
    Certificate(Box<Error>),
    /// It cannot be found.
    #[error(transparent)]
    Host(#[from] km_host::Error),
}

fn detail(reason: &str) -> String {
    if reason.is_empty() {
        String::new()
    } else {
        format!(" ({reason})")
    }
}
