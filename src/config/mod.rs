//! The configuration file: NVIDIA Kata Manager's `config.yaml`, with keys of ours beside its own.
//!
//! Each part of the file has a module of its own with its structs and defaults; the JSON Schema that `config schema` prints comes from
//! the same structs. [`parse()`] reads a text and is pure; [`load()`] reads a file.

mod check;
mod class;
mod containerd;
mod devices;
mod hint;
mod load;
mod parse;
mod provider;
mod registry;
mod shim;
mod signatures;
#[cfg(test)]
mod tests;

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use class::{Artifacts, HandlerSettings, Launch, LaunchMode, RuntimeClass, Update};
pub(crate) use containerd::{Containerd, Flavor, RestartMode};
pub(crate) use devices::{Backend, Devices};
pub(crate) use load::{load, load_if_there};
pub(crate) use parse::parse;
#[cfg(test)]
pub(crate) use provider::KataVersion;
pub(crate) use provider::{KataRuntime, Provider};
pub(crate) use registry::{RATE_LIMIT_MIN, Registry};
pub(crate) use shim::{Companions, Shim};
pub(crate) use signatures::{Verify, VerifyPolicy};

/// Where the file is unless told otherwise.
pub(crate) const DEFAULT_PATH: &str = "/etc/kata-manager/config.yaml";

/// Where guest artifacts are kept by NVIDIA's Kata Manager, and by us unless told otherwise.
const DEFAULT_ARTIFACTS_DIR: &str = "/opt/nvidia-gpu-operator/artifacts/runtimeclasses";

/// The configuration of kata-manager. A `config.yaml` of NVIDIA's Kata Manager works unchanged.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Config {
    /// The folder for guest artifacts. Each class has a link of its name in it.
    #[serde(default = "default_artifacts_dir")]
    #[schemars(with = "String")]
    pub(crate) artifacts_dir: HostPath,
    /// Keep the blobs of archive layers after they are unpacked, so that their artifacts can be exported. Takes their size
    /// again on disk.
    #[serde(default)]
    pub(crate) keep_blobs: bool,
    /// The runtime classes of this node.
    #[serde(default)]
    pub(crate) runtime_classes: Vec<RuntimeClass>,
    /// Where Kata itself comes from.
    #[serde(default)]
    pub(crate) provider: Provider,
    /// The shim that stands before Kata's.
    #[serde(default)]
    pub(crate) shim: Shim,
    /// The containerd to register handlers in.
    #[serde(default)]
    pub(crate) containerd: Containerd,
    /// How the node's GPUs and NVSwitches are named and given away.
    #[serde(default)]
    pub(crate) devices: Devices,
    /// How registries are reached.
    #[serde(default)]
    pub(crate) registry: Registry,
    /// The signatures that artifacts must have, unless a class says otherwise.
    #[serde(default)]
    pub(crate) verify: Verify,
}

fn default_artifacts_dir() -> HostPath {
    fixed(DEFAULT_ARTIFACTS_DIR)
}

fn fixed(path: &'static str) -> HostPath {
    #[expect(
        clippy::expect_used,
        reason = "a constant of this file, read by every test"
    )]
    HostPath::new(path).expect("an absolute path")
}
