//! `provider`: where Kata itself comes from, and which Kata it is.

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fixed;

/// Where Kata itself (its shim, QEMU and firmware) comes from.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Provider {
    /// How it gets there.
    #[serde(default)]
    pub(crate) kind: ProviderKind,
    /// The folder that it is in.
    #[serde(default = "default_prefix")]
    #[schemars(with = "String")]
    pub(crate) prefix: HostPath,
    /// Which of Kata's two runtimes it is whose configurations are written.
    #[serde(default)]
    pub(crate) runtime: KataRuntime,
    /// Kata's version, such as `4.1`; read from the file VERSION in its folder when left out.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) version: Option<KataVersion>,
}

/// One of Kata's runtimes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum KataRuntime {
    /// The one in Go, which Kata's GPU profile uses.
    #[default]
    Go,
    /// runtime-rs.
    Rust,
}

/// A version of Kata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(transparent)]
pub(crate) struct KataVersion(pub(crate) km_topology::Version);

impl Default for Provider {
    fn default() -> Provider {
        Provider {
            kind: ProviderKind::Existing,
            prefix: default_prefix(),
            runtime: KataRuntime::Go,
            version: None,
        }
    }
}

/// How Kata gets onto the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum ProviderKind {
    /// Somebody else puts it there: kata-deploy, or a package.
    #[default]
    Existing,
}

fn default_prefix() -> HostPath {
    fixed("/opt/kata")
}
