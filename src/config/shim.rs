//! `shim`: the shim that stands before Kata's, and what it does for a pod's devices.

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fixed;

/// The shim that handlers name: it checks a pod's devices and prepares them, then becomes Kata's own.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Shim {
    /// The program to install, where this program sees it; `../libexec/kata-manager/` beside it when left out. Where there is none,
    /// handlers name Kata's own shim.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) program: Option<std::path::PathBuf>,
    /// What happens when something is missing that goes with a pod's devices: another function of an IOMMU group, or an NVSwitch of a
    /// pod that has all GPUs.
    #[serde(default)]
    pub(crate) companions: Companions,
    /// The kubelet's PodResources socket.
    #[serde(default = "default_kubelet_socket")]
    #[schemars(with = "String")]
    pub(crate) kubelet_socket: HostPath,
    /// The longest that a pod's start waits for the kubelet, in milliseconds. After that it fails.
    #[serde(default = "default_kubelet_timeout")]
    #[schemars(range(min = 50, max = 10000))]
    pub(crate) kubelet_timeout_milliseconds: u64,
}

impl Default for Shim {
    fn default() -> Shim {
        Shim {
            program: None,
            companions: Companions::Refuse,
            kubelet_socket: default_kubelet_socket(),
            kubelet_timeout_milliseconds: default_kubelet_timeout(),
        }
    }
}

/// What happens when something is missing that goes with a pod's devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Companions {
    /// The pod does not start.
    #[default]
    Refuse,
    /// It is added, where this Kata lets it; else the pod does not start.
    Add,
}

fn default_kubelet_socket() -> HostPath {
    fixed("/var/lib/kubelet/pod-resources/kubelet.sock")
}

fn default_kubelet_timeout() -> u64 {
    km_shim::settings::KUBELET_TIMEOUT_MS
}
