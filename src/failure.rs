//! Exit codes: which error ends the program with which.

use std::fmt;

/// What kind of failure ended the program. The numbers are part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In use, conflict, missing prerequisite, lock held: the node is left alone.
    Refused = 3,
    /// The configuration or the command line.
    Configuration = 4,
    /// Registry or network.
    Registry = 5,
    /// Digest or hostile content.
    Verification = 6,
    /// Disk, permission, file system.
    Host = 7,
    /// containerd.
    Containerd = 8,
    /// A device, or the kernel's part in handing it over.
    Device = 9,
    /// A mistake of ours.
    Bug = 70,
}

/// An error that knows its kind, and what to do next where that is not in its text. It stands in an `anyhow` chain.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// Refused: nothing was changed, and the message says what to do.
    pub(crate) fn refused(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Refused, message)
    }

    /// A failure with its cause.
    pub(crate) fn because(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Failure {
        Failure {
            kind,
            message: message.into(),
            source: Some(source.into()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// The kind of an error: the outermost one in its chain that tells.
pub(crate) fn kind(error: &anyhow::Error) -> Kind {
    // One that was given as a context is found by anyhow alone: the chain shows it as anyhow's own type.
    let context = error.downcast_ref::<Failure>().map(|failure| failure.kind);
    let told = || error.chain().find_map(kind_of);
    context.or_else(told).unwrap_or(Kind::Bug)
}

fn kind_of(error: &(dyn std::error::Error + 'static)) -> Option<Kind> {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return Some(failure.kind);
    }
    if let Some(error) = error.downcast_ref::<km_artifacts::Error>() {
        return Some(artifact_kind(error));
    }
    if let Some(error) = error.downcast_ref::<km_artifacts::registry::Error>() {
        return Some(registry_kind(error));
    }
    if let Some(error) = error.downcast_ref::<km_host::lock::LockError>() {
        return Some(match error {
            km_host::lock::LockError::Held { .. } => Kind::Refused,
            km_host::lock::LockError::Io(_) => Kind::Host,
        });
    }
    if let Some(error) = error.downcast_ref::<km_containerd_config::transaction::TransactionError>()
    {
        return Some(transaction_kind(error));
    }
    if let Some(error) = error.downcast_ref::<km_containerd_config::edit::EditError>() {
        return Some(edit_kind(error));
    }
    if let Some(error) = error.downcast_ref::<km_containerd_config::place::PlaceError>() {
        return Some(place_kind(error));
    }
    if let Some(error) = error.downcast_ref::<km_containerd_config::effective::ReadError>() {
        return Some(read_kind(error));
    }
    if error.is::<km_containerd_config::shim::ShimError>()
        || error.is::<km_runtimeclasses::ConfigError>()
    {
        return Some(Kind::Refused);
    }
    if error.is::<km_cri::Error>() || error.is::<km_systemd::Error>() {
        return Some(Kind::Containerd);
    }
    if let Some(error) = error.downcast_ref::<km_vfio::apply::ApplyError>() {
        return Some(match error.is_refusal() {
            true => Kind::Refused,
            false => Kind::Device,
        });
    }
    if let Some(error) = error.downcast_ref::<km_plugin::Error>() {
        return Some(match error.is_refusal() {
            true => Kind::Refused,
            false => Kind::Host,
        });
    }
    if error.is::<km_host::Error>() || error.is::<km_host::command::CommandError>() {
        return Some(Kind::Host);
    }
    None
}

fn artifact_kind(error: &km_artifacts::Error) -> Kind {
    if error.is_verification() {
        Kind::Verification
    } else if error.is_configuration() {
        Kind::Configuration
    } else if error.is_registry() {
        Kind::Registry
    } else if error.is_refused() {
        Kind::Refused
    } else {
        Kind::Host
    }
}

fn registry_kind(error: &km_artifacts::registry::Error) -> Kind {
    if error.is_verification() {
        Kind::Verification
    } else if error.is_configuration() {
        Kind::Configuration
    } else if error.is_local() {
        Kind::Host
    } else {
        Kind::Registry
    }
}

fn edit_kind(error: &km_containerd_config::edit::EditError) -> Kind {
    match error {
        km_containerd_config::edit::EditError::NotAsMeant { .. } => Kind::Bug,
        _ => Kind::Refused,
    }
}

fn place_kind(error: &km_containerd_config::place::PlaceError) -> Kind {
    use km_containerd_config::place::PlaceError as E;
    match error {
        E::Edit { source, .. } => edit_kind(source),
        E::Read(error) => read_kind(error),
        E::Host(_) => Kind::Host,
        _ => Kind::Refused,
    }
}

fn read_kind(error: &km_containerd_config::effective::ReadError) -> Kind {
    match error {
        km_containerd_config::effective::ReadError::Host(_) => Kind::Host,
        _ => Kind::Refused,
    }
}

fn transaction_kind(error: &km_containerd_config::transaction::TransactionError) -> Kind {
    use km_containerd_config::transaction::TransactionError as E;
    match error {
        E::Stale { .. } => Kind::Refused,
        E::Host(_) | E::Journal(_) | E::BadBackup { .. } | E::HalfWritten { .. } => Kind::Host,
        E::NotRunning { .. }
        | E::ValidationFailed { .. }
        | E::NotRestored(_)
        | E::RolledBack { .. } => Kind::Containerd,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_failure_tells_its_kind_wherever_it_stands() {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let failure = || Failure::new(Kind::Configuration, "no such file");
        let plain = anyhow::Error::from(failure());
        let under = plain.context("while it was read");
        let context = Err::<(), _>(missing()).with_context(failure).unwrap_err();
        let both = Err::<(), _>(missing())
            .context(failure())
            .context("above")
            .unwrap_err();
        for error in [under, context, both] {
            assert!(matches!(kind(&error), Kind::Configuration), "{error:?}");
        }
        assert!(matches!(kind(&anyhow::Error::from(missing())), Kind::Bug));
    }
}
