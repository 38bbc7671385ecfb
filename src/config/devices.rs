//! `devices`: how the node's GPUs and NVSwitches are named and given away.

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fixed;

/// How the node's GPUs and NVSwitches are named and given away.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Devices {
    /// The class of GPUs, as in `nvidia.com/pgpu`; empty: each model is a class, such as `GH100_H100_PCIE`.
    #[serde(default = "default_gpu_alias")]
    pub(crate) gpu_alias: String,
    /// The class of NVSwitches; empty: each model is a class.
    #[serde(default = "default_nvswitch_alias")]
    pub(crate) nvswitch_alias: String,
    /// The folder of our CDI specs.
    #[serde(default = "default_cdi_dir")]
    #[schemars(with = "String")]
    pub(crate) cdi_dir: HostPath,
    /// Which nodes give a device to a virtual machine.
    #[serde(default)]
    pub(crate) backend: Backend,
}

impl Default for Devices {
    fn default() -> Devices {
        Devices {
            gpu_alias: default_gpu_alias(),
            nvswitch_alias: default_nvswitch_alias(),
            cdi_dir: default_cdi_dir(),
            backend: Backend::Auto,
        }
    }
}

/// Which nodes give a device to a virtual machine.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Backend {
    /// Those of iommufd where the host has them, the group's elsewhere.
    #[default]
    Auto,
    /// The group's: /dev/vfio/GROUP and /dev/vfio/vfio.
    Group,
    /// Those of iommufd, /dev/vfio/devices/vfioN, and no others: confidential guests need them.
    Iommufd,
}

fn default_gpu_alias() -> String {
    "pgpu".to_owned()
}

fn default_nvswitch_alias() -> String {
    "nvswitch".to_owned()
}

fn default_cdi_dir() -> HostPath {
    fixed(km_cdi::DIR)
}
