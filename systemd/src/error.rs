//! What can go wrong between us and systemd, told apart as far as a caller acts differently on it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zbus::{DBusError, fdo};

use crate::unit::UnitState;

/// Why a unit was not restarted, or its state not learnt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no message bus at the socket.
    #[error(
        "connect to the system bus at {socket}: no message bus answers there; is this a host that runs systemd and \
         dbus? If not, restart containerd by a command of your own or by hand"
    )]
    NoBus {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the operating system said.
        #[source]
        why: io::Error,
    },

    /// The message bus is there, and systemd is not on it.
    #[error(
        "ask systemd over the bus at {socket}: systemd is not there ({message}); the host was not booted with it, or \
         this is the bus of a container. Restart containerd by a command of your own or by hand"
    )]
    NoSystemd {
        /// The bus's socket.
        socket: PathBuf,
        /// What the bus said.
        message: String,
    },

    /// The bus's or systemd's policy does not let us.
    #[error(
        "{operation}: not permitted ({message}); this needs root on the host, or a polkit rule that allows it"
    )]
    Denied {
        /// What was tried.
        operation: String,
        /// What the bus or systemd said.
        message: String,
    },

    /// systemd knows no such unit.
    #[error(
        "systemd has no unit {unit}; `systemctl list-units --all` on the host names those that it has"
    )]
    NoSuchUnit {
        /// The name that was asked for.
        unit: String,
    },

    /// systemd refused for another reason: the unit is masked, its file is broken, its name is not one.
    #[error("{operation}: systemd refused: {message} ({name})")]
    Refused {
        /// What was tried.
        operation: String,
        /// The D-Bus error's name.
        name: String,
        /// systemd's own message.
        message: String,
    },

    /// systemd tried, and the unit did not come up.
    #[error(
        "restart {unit}: systemd's job ended with {job_result:?}{}",
        now(state)
    )]
    JobFailed {
        /// The unit.
        unit: String,
        /// `failed`, `timeout`, `canceled`, `dependency`, `skipped`, ...
        job_result: String,
        /// The unit's state after the job, when it could be learnt.
        state: Option<Box<UnitState>>,
    },

    /// The answer or the end of the job did not come in time. A job that was started goes on.
    #[error("{operation}: not done within {after:?}{}", now(state))]
    Timeout {
        /// What was tried.
        operation: String,
        /// How long was waited.
        after: Duration,
        /// The unit's state at the deadline, when it could be learnt.
        state: Option<Box<UnitState>>,
    },

    /// The connection broke, or what came over it was not what systemd documents.
    #[error("{operation}: the talk with systemd over the bus broke")]
    Bus {
        /// What was tried.
        operation: String,
        /// What broke.
        #[source]
        why: zbus::Error,
    },
}

fn now(state: &Option<Box<UnitState>>) -> String {
    state
        .as_ref()
        .map(|state| format!("; the unit is now {state}"))
        .unwrap_or_default()
}

impl Error {
    pub(crate) fn timeout(operation: &str, after: Duration) -> Error {
        Error::Timeout {
            operation: operation.to_owned(),
            after,
            state: None,
        }
    }

    /// Sorts an error reply by its name; everything else is the connection's.
    pub(crate) fn from_bus(operation: &str, socket: &Path, why: zbus::Error) -> Error {
        match reply(&why) {
            Some((name, message)) => Error::from_reply(operation, socket, name, message),
            None => Error::Bus {
                operation: operation.to_owned(),
                why,
            },
        }
    }

    fn from_reply(operation: &str, socket: &Path, name: String, message: String) -> Error {
        let operation = operation.to_owned();
        match name.strip_prefix("org.freedesktop.DBus.Error.") {
            // Nobody has the name; or the bus tried to start its owner, which for systemd is /bin/false.
            Some("ServiceUnknown" | "NameHasNoOwner") => Error::NoSystemd {
                socket: socket.to_path_buf(),
                message,
            },
            Some(name) if name.starts_with("Spawn.") => Error::NoSystemd {
                socket: socket.to_path_buf(),
                message,
            },
            Some("AccessDenied" | "InteractiveAuthorizationRequired" | "AuthFailed") => {
                Error::Denied { operation, message }
            }
            _ => Error::Refused {
                operation,
                name,
                message,
            },
        }
    }
}

/// The name and the message of an error reply.
fn reply(error: &zbus::Error) -> Option<(String, String)> {
    match error {
        zbus::Error::MethodError(name, message, _) => Some((
            name.to_string(),
            message
                .clone()
                .unwrap_or_else(|| "no reason given".to_owned()),
        )),
        zbus::Error::FDO(error) => match &**error {
            fdo::Error::ZBus(inner) => reply(inner),
            other => Some((
                other.name().to_string(),
                other.description().unwrap_or("no reason given").to_owned(),
            )),
        },
        _ => None,
    }
}
