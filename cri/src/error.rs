//! What can go wrong between us and containerd's CRI, told apart as far as a caller acts differently on it.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::{Code, Status};

/// Why a call of the CRI gave no answer, or none that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing accepts connections on the socket.
    #[error("connect to containerd at {socket}: {hint}")]
    NotRunning {
        /// The socket that was tried.
        socket: PathBuf,
        /// What this failure usually means, and what to do.
        hint: &'static str,
        /// What the operating system said.
        #[source]
        why: io::Error,
    },

    /// containerd runs and answers, but without its CRI plugin.
    #[error(
        "containerd answers at {socket} but serves no CRI ({message}): its CRI plugin is disabled or failed to load. \
         Look in the configuration that containerd was started with (/etc/containerd/config.toml unless its command \
         line says otherwise) for disabled_plugins with \"cri\", and for a default_runtime_name that has no runtime; \
         containerd's log has the cause in a line with \"failed to load plugin\""
    )]
    NoCri {
        /// The socket that answered.
        socket: PathBuf,
        /// What containerd said.
        message: String,
    },

    /// The connection ended, or what came over it was not gRPC, before the answer was whole.
    #[error(
        "{call} at {socket}: the connection ended before the answer was whole; did containerd stop or restart?"
    )]
    Disconnected {
        /// The CRI call.
        call: &'static str,
        /// The socket that it went to.
        socket: PathBuf,
        /// What the connection reported.
        #[source]
        why: Box<Status>,
    },

    /// No answer came in time. Whether the call took effect is unknown.
    #[error(
        "{call} at {socket}: no answer within {after:?}; containerd may be overloaded or stuck"
    )]
    Timeout {
        /// The CRI call.
        call: &'static str,
        /// The socket that it went to.
        socket: PathBuf,
        /// How long was waited.
        after: Duration,
    },

    /// containerd refused the call or failed at it.
    #[error("{call}: containerd answered {code:?}: {message}")]
    Rpc {
        /// The CRI call.
        call: &'static str,
        /// The gRPC status code.
        code: Code,
        /// containerd's own message.
        message: String,
    },

    /// containerd's answer breaks the CRI, or is not shaped as any containerd that we know shapes it.
    #[error("{call}: cannot use containerd's answer: {what}")]
    Malformed {
        /// The CRI call.
        call: &'static str,
        /// What is wrong with it, and where in it.
        what: String,
    },
}

impl Error {
    /// Whether the same call may succeed soon because containerd is still starting, restarting or busy.
    /// [`Error::NoCri`] is not such a case: containerd loads all plugins before it accepts its first connection.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::NotRunning { why, .. } => why.kind() != io::ErrorKind::PermissionDenied,
            Error::Disconnected { .. } | Error::Timeout { .. } => true,
            Error::Rpc { code, message, .. } => *code == Code::Unavailable || is_starting(message),
            Error::NoCri { .. } | Error::Malformed { .. } => false,
        }
    }

    /// Whether containerd says that what the call names does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Error::Rpc {
                code: Code::NotFound,
                ..
            }
        )
    }

    pub(crate) fn not_running(socket: &Path, why: io::Error) -> Error {
        let hint = match why.kind() {
            io::ErrorKind::NotFound => {
                "there is no such socket; containerd is not running, or listens elsewhere (grpc.address in its \
                 configuration)"
            }
            io::ErrorKind::ConnectionRefused => {
                "nothing listens on this socket; containerd is not running"
            }
            io::ErrorKind::PermissionDenied => "this needs root, or the group that owns the socket",
            io::ErrorKind::WouldBlock => {
                "its queue of waiting connections is full; containerd is stuck"
            }
            _ => "this is not a socket that accepts connections",
        };
        Error::NotRunning {
            socket: socket.to_path_buf(),
            hint,
            why,
        }
    }

    pub(crate) fn timeout(call: &'static str, socket: &Path, after: Duration) -> Error {
        Error::Timeout {
            call,
            socket: socket.to_path_buf(),
            after,
        }
    }

    /// Sorts a failed call. A status that containerd sent has no source; one that our side made up has.
    pub(crate) fn from_status(call: &'static str, socket: &Path, status: Status) -> Error {
        if let Some(why) = connect_failure(&status) {
            return Error::not_running(socket, why);
        }
        if status.source().is_some() {
            return Error::Disconnected {
                call,
                socket: socket.to_path_buf(),
                why: Box::new(status),
            };
        }
        let (code, message) = (status.code(), status.message().to_owned());
        // grpc-go's words for a service that nobody registered; "unknown method" is another case.
        if code == Code::Unimplemented && message.starts_with("unknown service") {
            return Error::NoCri {
                socket: socket.to_path_buf(),
                message,
            };
        }
        Error::Rpc {
            call,
            code,
            message,
        }
    }
}

/// The words with which containerd's CRI plugin refuses calls until it has recovered its state after a start. The code
/// that goes with them is Unknown in older releases and Unavailable in newer ones.
fn is_starting(message: &str) -> bool {
    message.contains("server is not initialized yet")
}

/// The operating system's error when a call had to connect anew and could not.
fn connect_failure(status: &Status) -> Option<io::Error> {
    let mut next = status.source();
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return os_connect_error(error);
        }
        next = error.source();
    }
    None
}

/// connect(2)'s errors only: those of a connection that broke later have other kinds.
pub(crate) fn os_connect_error(error: &io::Error) -> Option<io::Error> {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied, WouldBlock};
    match (error.kind(), error.raw_os_error()) {
        (NotFound | ConnectionRefused | PermissionDenied | WouldBlock, Some(code)) => {
            Some(io::Error::from_raw_os_error(code))
        }
        _ => None,
    }
}
