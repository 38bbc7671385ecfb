//! What the stand-in knows: plugins with their lists, and pods with what they were given. Data and locks only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

/// A device as a plugin listed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) healthy: bool,
    pub(crate) numa: Vec<i64>,
}

/// A resource that a plugin has registered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resource {
    pub(crate) endpoint: String,
    /// Which registration this is, of all that ever were.
    pub(crate) serial: u64,
    /// How often it was registered since this kubelet started.
    pub(crate) registrations: u64,
    /// Whether it answers `GetPreferredAllocation`.
    pub(crate) prefers: bool,
    pub(crate) channel: Option<Channel>,
    pub(crate) devices: Vec<Device>,
    /// How many lists came since this kubelet started.
    pub(crate) lists: u64,
    /// When the last one came, in milliseconds since 1970.
    pub(crate) listed_at: u64,
    /// Whether a stream of lists is open.
    pub(crate) connected: bool,
    /// What went wrong last.
    pub(crate) problem: Option<String>,
}

/// Devices of one resource in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) container: String,
    pub(crate) resource: String,
    pub(crate) ids: BTreeSet<String>,
}

/// A claim of dynamic resource allocation that a container has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claimed {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) container: String,
    pub(crate) claim: String,
    /// CDI devices by their whole names, as the driver prepared them.
    pub(crate) cdi: Vec<String>,
}

/// How PodResources is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Service {
    /// All of it, as from Kubernetes 1.34 on.
    #[default]
    Whole,
    /// Without `Get`, as before that without the feature gate.
    WithoutGet,
    /// Calls are taken and never answered.
    Stalled,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) resources: BTreeMap<String, Resource>,
    pub(crate) given: Vec<Given>,
    pub(crate) claimed: Vec<Claimed>,
    pub(crate) service: Service,
    /// How many registrations there were.
    pub(crate) serial: u64,
}

/// The state, shared between the servers and the command loop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(Arc<Mutex<State>>);

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a resource, unless a later registration has taken its place.
    pub(crate) fn resource(&self, name: &str, serial: u64, change: impl FnOnce(&mut Resource)) {
        if let Some(resource) = self.lock().resources.get_mut(name)
            && resource.serial == serial
        {
            change(resource);
        }
    }
}

impl State {
    /// The healthy devices of a resource that no container has.
    pub(crate) fn free(&self, resource: &str) -> Vec<String> {
        let taken: BTreeSet<&String> = self
            .given
            .iter()
            .filter(|given| given.resource == resource)
            .flat_map(|given| &given.ids)
            .collect();
        let devices = self
            .resources
            .get(resource)
            .map(|one| one.devices.as_slice());
        devices
            .unwrap_or_default()
            .iter()
            .filter(|device| device.healthy && !taken.contains(&device.id))
            .map(|device| device.id.clone())
            .collect()
    }
}
