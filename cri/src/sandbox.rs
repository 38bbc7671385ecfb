//! Which pod sandboxes containerd has, and on which runtime handler.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::client::Client;
use crate::error::Error;
use crate::wire;

/// A pod sandbox: for Kata, one virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// containerd's identifier.
    pub id: String,
    /// The pod's name.
    pub name: String,
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// The pod's UID in Kubernetes.
    pub uid: String,
    /// The runtime handler that the pod asked for; empty when it left the choice to containerd.
    pub handler: String,
    /// Whether it runs.
    pub state: SandboxState,
    /// When it was created, by containerd's clock.
    pub created_at: SystemTime,
    /// The pod's labels.
    pub labels: BTreeMap<String, String>,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Whether a sandbox runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxState {
    /// It runs.
    Ready,
    /// It stopped, or its processes died; it is still there.
    NotReady,
    /// A state that this program does not know. Take it for one that runs.
    Unknown,
}

/// Which sandboxes to list. Everything that is set must match; the default matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxFilter {
    /// An identifier, or a prefix of one that is unique.
    pub id: Option<String>,
    /// [`SandboxState::Unknown`] is not a filter and matches all.
    pub state: Option<SandboxState>,
    /// Labels that the pod has with exactly these values.
    pub labels: BTreeMap<String, String>,
}

impl Client {
    /// Every sandbox, whatever its state.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn sandboxes(&self) -> Result<Vec<Sandbox>, Error> {
        self.sandboxes_where(&SandboxFilter::default()).await
    }

    /// The sandboxes that a filter matches. containerd cannot filter by handler: look at [`Sandbox::handler`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn sandboxes_where(&self, filter: &SandboxFilter) -> Result<Vec<Sandbox>, Error> {
        let request = wire::ListPodSandboxRequest {
            filter: Some(filter.to_wire()),
        };
        let answer = self
            .call("ListPodSandbox", self.runtime().list_pod_sandbox(request))
            .await?;
        answer.items.into_iter().map(Sandbox::from_list).collect()
    }
}

impl SandboxFilter {
    fn to_wire(&self) -> wire::PodSandboxFilter {
        let state = match self.state {
            Some(SandboxState::Ready) => Some(wire::PodSandboxState::SandboxReady),
            Some(SandboxState::NotReady) => Some(wire::PodSandboxState::SandboxNotready),
            Some(SandboxState::Unknown) | None => None,
        };
        wire::PodSandboxFilter {
            id: self.id.clone().unwrap_or_default(),
            state: state.map(|state| wire::PodSandboxStateValue {
                state: state.into(),
            }),
            label_selector: self.labels.clone(),
        }
    }
}

impl SandboxState {
    pub(crate) fn from_wire(number: i32) -> SandboxState {
        match wire::PodSandboxState::try_from(number) {
            Ok(wire::PodSandboxState::SandboxReady) => SandboxState::Ready,
            Ok(wire::PodSandboxState::SandboxNotready) => SandboxState::NotReady,
            Err(_) => SandboxState::Unknown,
        }
    }
}

impl Sandbox {
    fn from_list(item: wire::PodSandbox) -> Result<Sandbox, Error> {
        let call = "ListPodSandbox";
        let metadata = metadata(call, &item.id, item.metadata)?;
        Ok(Sandbox {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            handler: item.runtime_handler,
            state: SandboxState::from_wire(item.state),
            created_at: time(call, &item.id, item.created_at)?,
            id: item.id,
            labels: item.labels,
            annotations: item.annotations,
        })
    }

    pub(crate) fn from_status(status: wire::PodSandboxStatus) -> Result<Sandbox, Error> {
        // The two messages say the same with different field numbers.
        Sandbox::from_list(wire::PodSandbox {
            id: status.id,
            metadata: status.metadata,
            state: status.state,
            created_at: status.created_at,
            labels: status.labels,
            annotations: status.annotations,
            runtime_handler: status.runtime_handler,
        })
    }
}

fn metadata(
    call: &'static str,
    id: &str,
    metadata: Option<wire::PodSandboxMetadata>,
) -> Result<wire::PodSandboxMetadata, Error> {
    metadata.ok_or_else(|| Error::Malformed {
        call,
        what: format!("sandbox {id:?} has no metadata"),
    })
}

/// The CRI counts nanoseconds since 1970.
pub(crate) fn time(call: &'static str, id: &str, nanoseconds: i64) -> Result<SystemTime, Error> {
    u64::try_from(nanoseconds)
        .ok()
        .and_then(|since| UNIX_EPOCH.checked_add(Duration::from_nanos(since)))
        .ok_or_else(|| Error::Malformed {
            call,
            what: format!("{id:?} has the time {nanoseconds} ns, before 1970"),
        })
}
