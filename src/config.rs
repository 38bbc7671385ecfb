//! The configuration file: NVIDIA Kata Manager's `config.yaml`, with keys of ours beside its own.
//!
//! [`parse`] is pure; [`load`] reads. The JSON Schema that `config schema` prints comes from the same structs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result};
use km_artifacts::reference::Reference;
use km_host::HostPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};

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

/// The signatures that an artifact must have.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Verify {
    /// Whether a signature is demanded.
    pub(crate) policy: VerifyPolicy,
    /// Files with public keys (PEM): ECDSA P-256, Ed25519 or RSA. A signature by one of them is enough. A class that lists
    /// none has those of the top-level `verify`.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub(crate) keys: Vec<HostPath>,
}

/// Whether a signature is demanded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) enum VerifyPolicy {
    /// No: the digest is verified, and nothing else.
    #[default]
    None,
    /// Yes: by one of the keys, as cosign makes it.
    Key,
}

impl Config {
    /// The keys one of which must have signed a class's artifact, and the setting that they are from; `None` when no
    /// signature is demanded.
    pub(crate) fn signing_keys<'a>(&'a self, own: Option<&'a Verify>) -> Option<&'a [HostPath]> {
        let verify = own.unwrap_or(&self.verify);
        match verify.policy {
            VerifyPolicy::None => None,
            VerifyPolicy::Key if verify.keys.is_empty() => Some(&self.verify.keys),
            VerifyPolicy::Key => Some(&verify.keys),
        }
    }
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

/// The least `registry.rateLimit`: below it a blob takes days, and a stall cannot be told from it.
pub(crate) const RATE_LIMIT_MIN: u64 = 64 << 10;

/// How registries are reached.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Registry {
    /// Certificates (PEM) that are trusted besides the system's.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) ca_file: Option<HostPath>,
    /// Our own certificate (PEM), for registries that ask for one.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) client_certificate_file: Option<HostPath>,
    /// The key of our own certificate (PEM, unencrypted).
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) client_key_file: Option<HostPath>,
    /// containerd's folder of `hosts.toml` files, which name mirrors. When left out, `/etc/containerd/certs.d` if it exists.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) config_path: Option<HostPath>,
    /// Credentials in the form of docker's `config.json`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub(crate) credentials_file: Option<HostPath>,
    /// Registries without TLS, as `host` or `host:port`. Those on this machine need not be listed.
    #[serde(default)]
    pub(crate) plain_http: Vec<String>,
    /// Registries on this machine that do speak TLS.
    #[serde(default)]
    pub(crate) https: Vec<String>,
    /// The most bytes a second that are received of blobs, at least 65536. No limit when left out.
    #[serde(default)]
    #[schemars(range(min = 65536))]
    pub(crate) rate_limit: Option<u64>,
}

fn default_artifacts_dir() -> HostPath {
    fixed(DEFAULT_ARTIFACTS_DIR)
}

fn default_kubelet_socket() -> HostPath {
    fixed("/var/lib/kubelet/pod-resources/kubelet.sock")
}

fn default_kubelet_timeout() -> u64 {
    km_shim::settings::KUBELET_TIMEOUT_MS
}

fn default_prefix() -> HostPath {
    fixed("/opt/kata")
}

fn default_containerd_config() -> HostPath {
    fixed("/etc/containerd/config.toml")
}

fn default_containerd_socket() -> HostPath {
    fixed("/run/containerd/containerd.sock")
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

fn default_unit() -> String {
    "containerd.service".to_owned()
}

fn default_ready_timeout() -> u64 {
    60
}

fn fixed(path: &'static str) -> HostPath {
    #[expect(
        clippy::expect_used,
        reason = "a constant of this file, read by every test"
    )]
    HostPath::new(path).expect("an absolute path")
}

/// Reads the file. A missing one is an error that says how to begin.
pub(crate) fn load(path: &Path) -> Result<(Config, Vec<u8>)> {
    let bytes = std::fs::read(path).map_err(|error| {
        let hint = if error.kind() == std::io::ErrorKind::NotFound {
            "; write one (NVIDIA Kata Manager's config.yaml works; \"kata-manager config schema\" lists every key), or name \
             another with --config"
        } else {
            ""
        };
        let message = format!("cannot read the configuration {}{hint}", path.display());
        Failure::because(Kind::Configuration, message, error)
    })?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        Failure::because(
            Kind::Configuration,
            format!("{} is not UTF-8 text", path.display()),
            error,
        )
    })?;
    let config = parse(text).with_context(|| {
        Failure::new(
            Kind::Configuration,
            format!("{} is not usable", path.display()),
        )
    })?;
    Ok((config, bytes))
}

/// As [`load`]; without a file at the usual place everything is as by default. For work that is not about the node.
pub(crate) fn load_if_there(path: &Path) -> Result<(Config, Vec<u8>)> {
    if path == Path::new(DEFAULT_PATH) && matches!(path.try_exists(), Ok(false)) {
        return Ok((parse("")?, Vec::new()));
    }
    load(path)
}

/// Reads a configuration from its text, and checks what the types cannot say.
pub(crate) fn parse(text: &str) -> Result<Config> {
    let options = serde_saphyr::options! { with_snippet: false };
    let config: Config = if text.trim().is_empty() {
        serde_json::from_str("{}").context("the defaults")?
    } else {
        serde_saphyr::from_str_with_options(text, options).map_err(|error| explain(&error))?
    };
    check(text, &config)?;
    Ok(config)
}

fn explain(error: &serde_saphyr::Error) -> Failure {
    let error = error.without_snippet();
    let message = error.to_string();
    let first = message.lines().next().unwrap_or_default();
    // serde's own words for deny_unknown_fields: unknown field `x`, expected one of a, b, c
    let unknown = first
        .split_once("unknown field `")
        .or_else(|| first.split_once("unknown variant `"));
    let unknown = unknown.and_then(|(_, rest)| rest.split_once('`'));
    let nearest = unknown.and_then(|(unknown, rest)| {
        let (_, expected) = rest.split_once("expected ")?;
        let expected = expected.split(" at line ").next().unwrap_or_default();
        let known: Vec<&str> = expected
            .trim_start_matches("one of ")
            .split([',', ' '])
            .map(|name| name.trim_matches('`'))
            .filter(|name| !name.is_empty() && *name != "or")
            .collect();
        nearest(unknown, &known)
    });
    // The parser says the place last; it reads better first.
    let said = first
        .rsplit_once(" at line ")
        .map_or(first, |(said, _)| said);
    let line = error
        .location()
        .filter(|at| at.line() > 0)
        .map(|at| format!("line {}: ", at.line()))
        .unwrap_or_default();
    let hint = nearest
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default();
    Failure::new(Kind::Configuration, format!("{line}{said}{hint}"))
}

/// The known name nearest to what was written, if any is near enough to be meant.
fn nearest<'a>(written: &str, known: &[&'a str]) -> Option<&'a str> {
    let (name, distance) = known
        .iter()
        .map(|name| {
            (
                *name,
                strsim::osa_distance(&written.to_lowercase(), &name.to_lowercase()),
            )
        })
        .min_by_key(|(_, distance)| *distance)?;
    (distance <= 1 + written.chars().count() / 3).then_some(name)
}

fn check(text: &str, config: &Config) -> Result<(), Failure> {
    let bad = |message: String| Err(Failure::new(Kind::Configuration, message));
    if let Some(rate) = config.registry.rate_limit
        && rate < RATE_LIMIT_MIN
    {
        return bad(format!(
            "registry.rateLimit is {rate} bytes a second; it must be {RATE_LIMIT_MIN} or more"
        ));
    }
    let devices = &config.devices;
    if let Err(error) = km_cdi::devices::Naming::new(&devices.gpu_alias, &devices.nvswitch_alias) {
        return bad(format!(
            "devices.gpuAlias or devices.nvswitchAlias: {error}"
        ));
    }
    let mut names = BTreeSet::new();
    let mut handlers = BTreeMap::new();
    check_verify(config, None, "verify")?;
    for class in &config.runtime_classes {
        let own = class.artifacts.as_ref();
        if let Some(own) = own.and_then(|artifacts| artifacts.verify.as_ref()) {
            check_verify(
                config,
                Some(own),
                &format!("artifacts.verify of the class {:?}", class.name),
            )?;
        }
        let name = &class.name;
        let in_image = own.is_some_and(|artifacts| artifacts.image_folder.is_some());
        let own = own.and_then(|artifacts| artifacts.verify.as_ref());
        if in_image && config.signing_keys(own).is_some() {
            // A signature of an image says nothing of a part of it, once the rest is gone.
            return bad(format!(
                "{}the class {name:?} has an artifacts.imageFolder, and signatures are demanded of it: they are of whole images, and cannot be verified again for a folder; publish the folder as a signed artifact, or pin the image by its digest and set the class's artifacts.verify.policy to \"none\"",
                line_of(text, name, 1)
            ));
        }
        if let Err(error) = km_artifacts::check_class(name) {
            return Err(Failure::because(
                Kind::Configuration,
                format!(
                    "{}the class name {name:?} cannot be used",
                    line_of(text, name, 1)
                ),
                error,
            ));
        }
        if !names.insert(name) {
            return bad(format!(
                "{}the class {name:?} is there twice: each class needs a name of its own",
                line_of(text, name, 2)
            ));
        }
        if let Some(other) = handlers.insert(class.handler().to_owned(), name) {
            return bad(format!(
                "the classes {other:?} and {name:?} have the same handler {:?}: give one of them another \"handler\"",
                class.handler()
            ));
        }
        check_kind(text, class)?;
    }
    if config.registry.client_certificate_file.is_some()
        != config.registry.client_key_file.is_some()
    {
        return bad("registry.clientCertificateFile and registry.clientKeyFile belong together: give both or neither".to_owned());
    }
    if config.containerd.restart.mode == RestartMode::Command
        && config.containerd.restart.command.is_empty()
    {
        return bad("containerd.restart.mode is \"command\", and containerd.restart.command is empty: give the program and its arguments".to_owned());
    }
    Ok(())
}

fn check_verify(config: &Config, own: Option<&Verify>, setting: &str) -> Result<(), Failure> {
    let verify = own.unwrap_or(&config.verify);
    let problem = match verify.policy {
        VerifyPolicy::None if own.is_some() && !verify.keys.is_empty() => {
            "lists keys, and its policy \"none\" asks nobody: set policy to \"key\", or leave the keys out"
        }
        VerifyPolicy::Key if config.signing_keys(own).is_some_and(<[_]>::is_empty) => {
            "has policy \"key\" and no keys: list the files with your public keys"
        }
        _ => return Ok(()),
    };
    Err(Failure::new(
        Kind::Configuration,
        format!("{setting} {problem}"),
    ))
}

fn check_kind(text: &str, class: &RuntimeClass) -> Result<(), Failure> {
    let known: Vec<&str> = km_runtimeclasses::catalogue()
        .iter()
        .map(|kind| kind.name)
        .collect();
    let name = &class.name;
    let bad = |message: String| {
        Err(Failure::new(
            Kind::Configuration,
            format!("{}{message}", line_of(text, name, 1)),
        ))
    };
    let wanted = class.like.as_deref().unwrap_or(name);
    let is_known = km_runtimeclasses::find(wanted).is_some();
    let hint = nearest(wanted, &known)
        .map(|near| format!(" (did you mean {near:?}?)"))
        .unwrap_or_default();
    match (&class.runtime_type, &class.artifacts) {
        (Some(_), _) if class.like.is_some() => bad(format!(
            "the class {name:?} has both \"like\" and \"runtimeType\": keep one of them"
        )),
        (Some(_), _) => Ok(()),
        (None, _) if !is_known => bad(format!(
            "the class {wanted:?} is not in the catalogue{hint}: use one of {}, or set \"like\" to one of them, or give a \"runtimeType\"",
            known.join(", ")
        )),
        (None, None) => bad(format!(
            "the class {name:?} has no artifacts.url: say which guest artifact it boots"
        )),
        (None, Some(_)) => Ok(()),
    }
}

/// "line N: " of the n-th place where a class's name stands as a value of `name`.
fn line_of(text: &str, name: &str, nth: usize) -> String {
    text.lines()
        .enumerate()
        .filter(|(_, line)| {
            let line = line.trim_start().trim_start_matches("- ").trim_start();
            line.strip_prefix("name:")
                .is_some_and(|value| value.trim().trim_matches(['"', '\'']) == name)
        })
        .nth(nth - 1)
        .map(|(index, _)| format!("line {}: ", index + 1))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
