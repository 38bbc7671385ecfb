//! `containerd`: where containerd's files are, where handlers go in them, and who restarts it.

use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fixed;

/// The containerd to register handlers in.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Containerd {
    /// Its configuration file.
    #[serde(default = "default_containerd_config")]
    #[schemars(with = "String")]
    pub(crate) config: HostPath,
    /// Its socket.
    #[serde(default = "default_containerd_socket")]
    #[schemars(with = "String")]
    pub(crate) socket: HostPath,
    /// Its program, for a dry run of the configuration; found from the running process when left out.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) binary: Option<HostPath>,
    /// Which distribution's containerd it is.
    #[serde(default)]
    pub(crate) flavor: Flavor,
    /// Whether containerd injects CDI devices, where its files do not say so. Left out: yes for containerd 1.7 when a class of
    /// the catalogue is configured (its default is no), and as it is for others. A value that somebody set stays.
    #[serde(default)]
    pub(crate) enable_cdi: Option<bool>,
    /// Folders of CDI specs, where containerd's files name none.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(crate) cdi_spec_dirs: Vec<HostPath>,
    /// Where the handlers are written.
    #[serde(default)]
    pub(crate) placement: Placement,
    /// Leave handlers of ours as somebody edited them, as `apply --keep-drift` does; else they are put right.
    #[serde(default)]
    pub(crate) keep_drift: bool,
    /// How it is restarted.
    #[serde(default)]
    pub(crate) restart: Restart,
}

/// Which distribution's containerd a node runs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Flavor {
    /// Found out.
    #[default]
    Auto,
    /// containerd as a package or archive installs it.
    Stock,
    /// The one that k3s brings.
    K3s,
    /// The one that RKE2 brings.
    Rke2,
}

/// Where handlers are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Placement {
    /// Where they are; else in a drop-in on containerd 2.x, and in the main file on 1.x.
    #[default]
    Auto,
    /// In the main file.
    Main,
    /// In a drop-in that the main file imports. Only containerd 2.x: 1.x would lose every other handler and setting.
    DropIn,
}

impl From<Placement> for km_containerd_config::place::Placement {
    fn from(placement: Placement) -> Self {
        match placement {
            Placement::Auto => Self::Auto,
            Placement::Main => Self::Main,
            Placement::DropIn => Self::DropIn,
        }
    }
}

impl Default for Containerd {
    fn default() -> Containerd {
        Containerd {
            config: default_containerd_config(),
            socket: default_containerd_socket(),
            binary: None,
            flavor: Flavor::Auto,
            enable_cdi: None,
            cdi_spec_dirs: Vec::new(),
            placement: Placement::Auto,
            keep_drift: false,
            restart: Restart::default(),
        }
    }
}

/// How containerd is restarted.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Restart {
    /// By whom.
    #[serde(default)]
    pub(crate) mode: RestartMode,
    /// With `systemd`: the unit.
    #[serde(default = "default_unit")]
    pub(crate) unit: String,
    /// With `command`: the program and its arguments.
    #[serde(default)]
    pub(crate) command: Vec<String>,
    /// How long the handlers may take to be live after a restart, in seconds.
    #[serde(default = "default_ready_timeout")]
    pub(crate) ready_timeout_seconds: u64,
}

impl Default for Restart {
    fn default() -> Restart {
        Restart {
            mode: RestartMode::Systemd,
            unit: default_unit(),
            command: Vec::new(),
            ready_timeout_seconds: default_ready_timeout(),
        }
    }
}

/// Who restarts containerd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum RestartMode {
    /// systemd, over D-Bus.
    #[default]
    Systemd,
    /// A command of yours.
    Command,
    /// You do, by hand.
    None,
}

fn default_containerd_config() -> HostPath {
    fixed("/etc/containerd/config.toml")
}

fn default_containerd_socket() -> HostPath {
    fixed("/run/containerd/containerd.sock")
}

fn default_unit() -> String {
    "containerd.service".to_owned()
}

fn default_ready_timeout() -> u64 {
    60
}
