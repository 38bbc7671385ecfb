//! A small client of the kubelet's PodResources API (`v1.PodResourcesLister`,
//! <https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/#monitoring-device-plugin-resources>)
//! on its unix socket: which devices the kubelet gave to which pod, by device plugins and by dynamic resource allocation.
//!
//! A [`Client`] lives for one errand and has one deadline for all of it. An answer is bounded before it is decoded. What comes
//! back is plain data.
//!
//! This crate knows nothing of CDI, PCI, Kata or our configuration, and it links nothing that speaks to Kubernetes' API server.
//! With the feature `server`, `wire` has the other side of the API, for a stand-in of the kubelet in tests.

mod client;
mod conversation;
mod error;
#[cfg(not(any(test, feature = "server")))]
mod wire;
#[cfg(any(test, feature = "server"))]
pub mod wire;

#[cfg(any(test, feature = "server"))]
pub use client::decode_list;
pub use client::{Client, MAX_ANSWER};
pub use error::Error;
/// The status code of a failed call, as gRPC numbers them.
pub use tonic::Code;

/// Where the kubelet serves the API (Kubernetes, "Device Plugins", "Monitoring device plugin resources").
pub const SOCKET: &str = "/var/lib/kubelet/pod-resources/kubelet.sock";

/// What a pod was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its containers, as the kubelet lists them: those that have ended, and init containers that are no sidecars, are not in it.
    pub containers: Vec<Container>,
}

/// What a container was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Devices of device plugins.
    pub devices: Vec<Devices>,
    /// Devices of dynamic resource allocation (DRA). Empty where the kubelet does not tell them: before Kubernetes 1.34 that is
    /// behind a feature gate (`KubeletPodResourcesDynamicResources`).
    pub claims: Vec<ClaimDevice>,
}

/// Devices of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// The resource, such as `nvidia.com/pgpu`.
    pub resource: String,
    /// The plugin's IDs of the devices.
    pub ids: Vec<String>,
    /// The NUMA nodes of all of them together; empty where the plugin tells none.
    pub numa_nodes: Vec<i64>,
}

/// A device that a claim of dynamic resource allocation got.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClaimDevice {
    /// The claim's name.
    pub claim: String,
    /// The claim's namespace.
    pub namespace: String,
    /// The driver, such as `gpu.nvidia.com`; empty from kubelets that do not tell it.
    pub driver: String,
    /// The driver's pool that the device is of.
    pub pool: String,
    /// The device's name in its pool.
    pub device: String,
    /// Whole CDI names, such as `k8s.gpu.nvidia.com/claim=0`.
    pub cdi: Vec<String>,
}

impl Pod {
    /// The devices of its device plugins, over all containers: resource and ID.
    pub fn plugin_devices(&self) -> impl Iterator<Item = (&str, &str)> {
        let devices = self
            .containers
            .iter()
            .flat_map(|container| &container.devices);
        devices.flat_map(|devices| {
            let ids = devices.ids.iter();
            ids.map(|id| (devices.resource.as_str(), id.as_str()))
        })
    }

    /// The devices of its claims, over all containers.
    pub fn claim_devices(&self) -> impl Iterator<Item = &ClaimDevice> {
        self.containers
            .iter()
            .flat_map(|container| &container.claims)
    }
}
