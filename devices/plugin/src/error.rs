//! Why the plugin does not run.

use km_cdi::files::Conflict;

use crate::conflict::Other;

/// Why the plugin does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else serves a resource of ours.
    #[error(
        "{resource} is served already, by {other}; stop that, or give another alias: two plugins would take the resource from each other for ever"
    )]
    Served {
        /// The resource.
        resource: String,
        /// Who it is.
        other: Other,
    },
    /// Somebody else's CDI specs are in the way.
    #[error("cannot write the CDI specs: {}", all(.0))]
    Cdi(Vec<Conflict>),
    /// The host did not let us.
    #[error(transparent)]
    Host(#[from] km_host::Error),
    /// Another kata-manager has the devices' lock.
    #[error(transparent)]
    Lock(#[from] km_host::lock::LockError),
    /// The operating system did not let us.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// Whether something of others has to be settled first.
    pub fn is_refusal(&self) -> bool {
        use km_host::lock::LockError;
        matches!(
            self,
            Error::Served { .. } | Error::Cdi(_) | Error::Lock(LockError::Held { .. })
        )
    }

    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::System { what, source }
    }
}

fn all(conflicts: &[Conflict]) -> String {
    let all: Vec<String> = conflicts.iter().map(ToString::to_string).collect();
    all.join("; ")
}
