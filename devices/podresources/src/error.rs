//! What can go wrong between us and the kubelet, told apart as far as a caller acts differently on it.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::{Code, Status};

/// The longest message of the kubelet's that an error repeats, in characters.
const LONGEST: usize = 300;

/// Why the kubelet gave no answer, or none that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing accepts connections on the socket.
    #[error("connect to the kubelet's PodResources API at {socket}: {hint}")]
    NotRunning {
        /// The socket that was tried.
        socket: PathBuf,
        /// What this failure usually means, and what to do.
        hint: &'static str,
        /// What the operating system said.
        #[source]
        why: io::Error,
    },

    /// The deadline is over.
    #[error(
        "{call} at {socket}: no answer within {}; the kubelet is overloaded or stuck", seconds(*after)
    )]
    Timeout {
        /// What was tried.
        call: &'static str,
        /// The socket that it went to.
        socket: PathBuf,
        /// How long was waited for everything together.
        after: Duration,
    },

    /// The connection ended, or what came over it was not gRPC, before the answer was whole.
    #[error(
        "{call} at {socket}: the connection ended before the answer was whole ({what}); did the kubelet restart?"
    )]
    Disconnected {
        /// What was tried.
        call: &'static str,
        /// The socket that it went to.
        socket: PathBuf,
        /// What the connection reported.
        what: String,
    },

    /// The kubelet refused the call or failed at it.
    #[error("{call}: the kubelet answered {code:?}: {message}")]
    Rpc {
        /// The call.
        call: &'static str,
        /// The gRPC status code.
        code: Code,
        /// The kubelet's own message.
        message: String,
    },

    /// The answer breaks the API.
    #[error("{call}: cannot use the kubelet's answer: {what}")]
    Malformed {
        /// The call.
        call: &'static str,
        /// What is wrong with it.
        what: String,
    },
}

impl Error {
    /// Whether the kubelet does not serve this call: before Kubernetes 1.34, `Get` is behind a feature gate
    /// (`KubeletPodResourcesGet`), and it says so with an unknown error (kubelet, pkg/kubelet/apis/podresources/server_v1.go).
    pub fn is_unsupported(&self) -> bool {
        match self {
            Error::Rpc { code, message, .. } => {
                *code == Code::Unimplemented || message.contains("method disabled")
            }
            _ => false,
        }
    }

    /// Whether the kubelet says that it has no such pod.
    pub fn is_not_found(&self) -> bool {
        match self {
            Error::Rpc { code, message, .. } => {
                // Older kubelets say it with an unknown error.
                *code == Code::NotFound
                    || (*code == Code::Unknown && message.ends_with("not found"))
            }
            _ => false,
        }
    }

    /// Whether the kubelet had too many questions at once: it takes 100 a second, and 10 at a time
    /// (kubelet, pkg/kubelet/apis/podresources/constants.go).
    pub(crate) fn is_throttled(&self) -> bool {
        matches!(self, Error::Rpc { code, .. } if *code == Code::ResourceExhausted)
    }

    /// Whether there is no socket at all: no kubelet has run here since the boot, or its root directory is elsewhere.
    pub fn is_absent(&self) -> bool {
        matches!(self, Error::NotRunning { why, .. } if why.kind() == io::ErrorKind::NotFound)
    }

    pub(crate) fn not_running(socket: &Path, why: io::Error) -> Error {
        let hint = match why.kind() {
            io::ErrorKind::NotFound => {
                "there is no such socket; the kubelet is not running, or its root directory is elsewhere"
            }
            io::ErrorKind::ConnectionRefused => {
                "nothing listens on this socket; the kubelet is not running"
            }
            io::ErrorKind::PermissionDenied => "this needs root",
            io::ErrorKind::WouldBlock => {
                "its queue of waiting connections is full; the kubelet is stuck"
            }
            _ => "this is not a socket that accepts connections",
        };
        Error::NotRunning {
            socket: socket.to_path_buf(),
            hint,
            why,
        }
    }

    /// Sorts a failed call. A status that the kubelet sent has no source; one that our side made up has.
    pub(crate) fn from_status(call: &'static str, socket: &Path, status: &Status) -> Error {
        if let Some(source) = status.source() {
            return Error::disconnected(call, socket, source);
        }
        let (code, message) = (status.code(), plain(status.message()));
        // Our own limit, which tonic tells like this.
        if code == Code::OutOfRange {
            return Error::Malformed {
                call,
                what: message,
            };
        }
        Error::Rpc {
            call,
            code,
            message,
        }
    }

    pub(crate) fn disconnected(
        call: &'static str,
        socket: &Path,
        why: &dyn std::error::Error,
    ) -> Error {
        let mut what = why.to_string();
        let mut next = why.source();
        while let Some(cause) = next {
            what = format!("{what}: {cause}");
            next = cause.source();
        }
        Error::Disconnected {
            call,
            socket: socket.to_path_buf(),
            what: plain(&what),
        }
    }
}

/// A stranger's words, bounded, on one line.
fn plain(text: &str) -> String {
    let plain = |char: char| if char.is_control() { ' ' } else { char };
    text.chars().map(plain).take(LONGEST).collect()
}

fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}
