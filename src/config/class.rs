//! `runtimeClasses`: each class, its guest artifact, and its handler's settings in containerd.

use std::collections::BTreeMap;

use km_artifacts::reference::Reference;
use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::signatures::Verify;

/// A runtime class and what its virtual machines boot.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct RuntimeClass {
    /// The class's name, and its handler's unless `handler` says otherwise.
    pub(crate) name: String,
    /// Labels of the nodes that have this class; goes into the RuntimeClass object.
    #[serde(default)]
    pub(crate) node_selector: BTreeMap<String, String>,
    /// The guest artifact. May be left out only when `runtimeType` is given.
    #[serde(default)]
    pub(crate) artifacts: Option<Artifacts>,
    /// The name of the runtime handler in containerd.
    #[serde(default)]
    pub(crate) handler: Option<String>,
    /// The class of the catalogue that a class of another name follows.
    #[serde(default)]
    pub(crate) like: Option<String>,
    /// A containerd runtime type to put behind the handler in place of Kata, such as `io.containerd.runc.v2`.
    #[serde(default)]
    pub(crate) runtime_type: Option<String>,
    /// The shim behind ours: Kata's, unless this says otherwise. With `runtimeType`, ours stands before it only when this is given.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) inner_shim: Option<HostPath>,
    /// What is done with each launch of the class's QEMU; checked when left out.
    #[serde(default)]
    pub(crate) launch: Option<Launch>,
    /// When a tag's new digest is taken.
    #[serde(default)]
    pub(crate) update: Update,
    /// Settings of the handler in containerd that differ from the class's own.
    #[serde(default)]
    pub(crate) handler_settings: HandlerSettings,
}

/// Settings of a handler in containerd, by containerd's own names. What is left out is as the class has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct HandlerSettings {
    /// `runtime_path`: the shim's binary. containerd 1.6 is told it as `runtime_type`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) runtime_path: Option<HostPath>,
    /// `options.ConfigPath`: the file that the shim reads.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) config_path: Option<HostPath>,
    /// `pod_annotations`: patterns of pod annotations that reach the sandbox, besides the class's own.
    #[serde(default)]
    pub(crate) pod_annotations: Vec<String>,
    /// `container_annotations`: patterns of container annotations that reach the container, besides the class's own.
    #[serde(default)]
    pub(crate) container_annotations: Vec<String>,
    /// `privileged_without_host_devices`.
    #[serde(default)]
    pub(crate) privileged_without_host_devices: Option<bool>,
    /// `snapshotter` of this handler's containers (containerd 1.7 and later).
    #[serde(default)]
    pub(crate) snapshotter: Option<String>,
}

impl RuntimeClass {
    /// The name of the handler in containerd.
    pub(crate) fn handler(&self) -> &str {
        self.handler.as_deref().unwrap_or(&self.name)
    }

    /// What is done with each launch of its QEMU.
    pub(crate) fn launch(&self) -> Launch {
        self.launch.unwrap_or_default()
    }
}

/// What is done with each launch of a class's QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Launch {
    /// What is done.
    #[serde(default)]
    pub(crate) mode: LaunchMode,
    /// With `tune`: the clique of GPUs of legacy groups, so that the guest's driver tries peer-to-peer between them. Whether the host's
    /// switches can do that is for you to know.
    #[serde(default)]
    #[schemars(range(min = 0, max = 15))]
    pub(crate) clique: Option<u8>,
}

/// What is done with a launch of QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum LaunchMode {
    /// It is held against what the sandbox was given, and refused when something is wrong.
    #[default]
    Check,
    /// Devices that Kata did not attach are added; then it is checked. Not for confidential guests.
    Inject,
    /// It is checked, and devices get properties that Kata cannot give them. Not for confidential guests.
    Tune,
    /// Nothing: Kata starts QEMU itself.
    None,
}

/// A guest artifact in a registry.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Artifacts {
    /// Its reference: `registry/repository:tag`, or with `@sha256:...` to pin it.
    #[schemars(with = "String")]
    pub(crate) url: Url,
    /// Where `url` names a container image and no artifact: the folder of it with the guest; `/` is all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) image_folder: Option<String>,
    /// A Kubernetes secret with credentials. Without a cluster it is not looked up: use `registry.credentialsFile`.
    #[serde(default)]
    pub(crate) pull_secret: String,
    /// The signatures that it must have; as the top-level `verify` says when left out.
    #[serde(default)]
    pub(crate) verify: Option<Verify>,
}

/// A reference as the user wrote it, and what it means.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Url {
    text: String,
    pub(crate) reference: Reference,
}

impl TryFrom<String> for Url {
    type Error = String;

    fn try_from(text: String) -> Result<Url, String> {
        let reference = text
            .parse()
            .map_err(|error| format!("{text:?} is no reference to an artifact: {error}"))?;
        Ok(Url { text, reference })
    }
}

impl From<Url> for String {
    fn from(url: Url) -> String {
        url.text
    }
}

/// When a tag's new digest is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Update {
    /// At the next `apply`.
    #[default]
    OnDigestChange,
    /// Never: what is here stays.
    Never,
}
