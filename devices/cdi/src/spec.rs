//! One CDI spec: rendered for our devices, read from the bytes of strangers, and judged as CDI's own library judges it. Bytes in,
//! bytes out.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::devices::Device;
use crate::files::MARK;
use crate::names::{self, Class};

/// The largest spec that is read, in bytes. One of NVIDIA's toolkit for a machine of eight GPUs with MIG has about 100 KiB.
pub const LIMIT: usize = 1 << 20;

/// How deep a spec may nest. The deepest that CDI knows is six: spec, devices, device, edits, nodes, node.
const DEPTH: usize = 16;

/// Characters that end a line for readers of YAML 1.1 alone, as containerd's is (YAML 1.1, section 5.4; YAML 1.2.2, section 5.4).
const BREAKS: [char; 3] = ['\u{85}', '\u{2028}', '\u{2029}'];

/// The version of our specs: the first that takes names of devices that begin with a digit (CDI, SPEC.md, "Released versions"), the
/// one that NVIDIA's documents show, and the last that containerd 1.7.0 knows.
const VERSION: Version = (0, 5, 0);

type Version = (u8, u8, u8);

/// The released versions (CDI, SPEC.md, "Released versions").
const RELEASED: &[Version] = &[
    (0, 1, 0),
    (0, 2, 0),
    (0, 3, 0),
    (0, 4, 0),
    (0, 5, 0),
    (0, 6, 0),
    (0, 7, 0),
    (0, 8, 0),
    (1, 0, 0),
    (1, 1, 0),
];

/// Why bytes are no spec that CDI takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The file could not be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// Longer than [`LIMIT`].
    #[error("it is longer than {LIMIT} bytes")]
    TooLong,
    /// Neither YAML nor JSON of a spec's form.
    #[error("it is no CDI spec: {0}")]
    Malformed(String),
    /// Of the form, with something that CDI refuses.
    #[error("{place} {problem}")]
    Invalid {
        /// The part of the spec: `kind`, `device "0"`.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// A spec. Fields are those of CDI 1.1.0 (SPEC.md); others are an error, as in CDI's own library.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// The version that it says it follows, such as `0.5.0`.
    pub cdi_version: String,
    /// `<vendor>/<class>`.
    pub kind: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    /// Its devices.
    pub devices: Vec<Entry>,
    #[serde(default)]
    container_edits: Option<Edits>,
}

/// A device of a spec.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// Its name.
    pub name: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    container_edits: Edits,
}

impl Entry {
    /// The paths of its device nodes, as a container sees them.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        let nodes = self.container_edits.device_nodes.iter().flatten();
        nodes.map(|node| node.path.as_str())
    }

    /// The paths of its device nodes, as the host sees them.
    pub fn host_nodes(&self) -> impl Iterator<Item = &str> {
        let nodes = self.container_edits.device_nodes.iter().flatten();
        nodes.map(|node| {
            node.host_path
                .as_deref()
                .filter(|path| !path.is_empty())
                .unwrap_or(&node.path)
        })
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Edits {
    env: Option<Vec<String>>,
    device_nodes: Option<Vec<Node>>,
    net_devices: Option<Vec<NetDevice>>,
    hooks: Option<Vec<Hook>>,
    mounts: Option<Vec<Mount>>,
    intel_rdt: Option<IntelRdt>,
    additional_gids: Option<Vec<u32>>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    path: String,
    host_path: Option<String>,
    r#type: Option<String>,
    major: Option<i64>,
    minor: Option<i64>,
    file_mode: Option<u32>,
    permissions: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NetDevice {
    host_interface_name: String,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Hook {
    hook_name: String,
    path: String,
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    timeout: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Mount {
    host_path: String,
    container_path: String,
    r#type: Option<String>,
    options: Option<Vec<String>>,
}

/// What Intel RDT is told. Only whether it is there, and what came or went with 1.1.0, matters here.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct IntelRdt {
    #[serde(rename = "closID")]
    clos_id: Option<String>,
    #[serde(rename = "l3CacheSchema")]
    l3_cache_schema: Option<String>,
    mem_bw_schema: Option<String>,
    schemata: Option<Vec<String>>,
    enable_monitoring: Option<bool>,
    #[serde(rename = "enableCMT")]
    enable_cmt: Option<bool>,
    #[serde(rename = "enableMBM")]
    enable_mbm: Option<bool>,
}

/// The text of the spec that lists these devices of a class. Devices come by address and every name once: the same devices give the
/// same bytes. Below its first line it is JSON, which YAML has in it (YAML 1.2.2, section 1.3): a sandbox's start waits for it to be read, and
/// reading sixteen devices as YAML takes most of a millisecond. A device has one line, so that `grep` finds all of it.
pub fn render(class: &Class, devices: &[&Device]) -> String {
    let (major, minor, patch) = VERSION;
    let entry = |device: &Device, name: &str| {
        let nodes = device.nodes.iter().map(|node| {
            let path = quoted(node);
            format!("{{\"path\": {path}, \"permissions\": \"rw\"}}")
        });
        let nodes: Vec<String> = nodes.collect();
        format!(
            "    {{\"name\": {}, \"containerEdits\": {{\"deviceNodes\": [{}]}}}}",
            quoted(name),
            nodes.join(", ")
        )
    };
    let entries = devices
        .iter()
        .flat_map(|device| device.names().into_iter().map(|name| entry(device, &name)));
    let entries: Vec<String> = entries.collect();
    format!(
        "{MARK}, which writes it anew: edits are lost. A file without this line is left alone.\n\
         {{\n  \"cdiVersion\": {},\n  \"kind\": {},\n  \"devices\": [\n{}\n  ]\n}}\n",
        quoted(&format!("{major}.{minor}.{patch}")),
        quoted(&class.kind()),
        entries.join(",\n")
    )
}

/// A text in double quotes, as JSON and YAML have it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

impl Spec {
    /// Reads and judges a spec, YAML or JSON.
    ///
    /// # Errors
    /// [`SpecError`], with the first thing that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Spec, SpecError> {
        if bytes.len() > LIMIT {
            return Err(SpecError::TooLong);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| malformed("it is not UTF-8"))?;
        // They are outside ASCII, and searching for them goes from character to character.
        if !text.is_ascii() && text.contains(BREAKS) {
            return Err(malformed(
                "it has U+0085, U+2028 or U+2029, which end a line in YAML 1.1 and not in 1.2: readers would see different specs",
            ));
        }
        // JSON is YAML, but for details such as tabs; and its reader does no more than it must.
        let body = after_mark(text).unwrap_or(text);
        let json = || serde_json::from_str(body).ok();
        let spec: Spec = match body.trim_start().starts_with('{').then(json).flatten() {
            Some(spec) => spec,
            None => from_yaml(text)?,
        };
        spec.check()?;
        Ok(spec)
    }

    /// The whole names of its devices, such as `nvidia.com/pgpu=0`.
    pub fn qualified(&self) -> impl Iterator<Item = String> {
        let devices = self.devices.iter();
        devices.map(|device| format!("{}={}", self.kind, device.name))
    }

    fn check(&self) -> Result<(), SpecError> {
        let version = self.version()?;
        let (vendor, class) = self
            .kind
            .split_once('/')
            .ok_or_else(|| invalid("kind", format!("{:?} is not <vendor>/<class>", self.kind)))?;
        for (what, name) in [("vendor", vendor), ("class", class)] {
            names::vendor_or_class(name).map_err(|problem| {
                invalid("kind", format!("{:?}: the {what} {problem}", self.kind))
            })?;
        }
        annotations("the spec", self.annotations.as_ref())?;
        if let Some(edits) = &self.container_edits {
            edits.check("containerEdits")?;
        }
        if self.devices.is_empty() {
            return Err(invalid("devices", "is empty".to_owned()));
        }
        let mut seen = BTreeSet::new();
        for device in &self.devices {
            let place = format!("device {:?}", device.name);
            names::device(&device.name)
                .map_err(|problem| invalid(&place, format!("has a name that {problem}")))?;
            if !seen.insert(&device.name) {
                return Err(invalid(&place, "is listed twice".to_owned()));
            }
            annotations(&place, device.annotations.as_ref())?;
            if device.container_edits.is_empty() {
                return Err(invalid(
                    &place,
                    "changes nothing: its containerEdits are empty".to_owned(),
                ));
            }
            device.container_edits.check(&place)?;
        }
        if version >= (1, 1, 0) && self.uses_old_monitoring() {
            return Err(invalid(
                "intelRdt",
                "has enableCMT or enableMBM, which 1.1.0 has no more".to_owned(),
            ));
        }
        let (needed, why) = self.needs();
        if version < needed {
            let (major, minor, patch) = needed;
            return Err(invalid(
                "cdiVersion",
                format!(
                    "is {}, and {why} need {major}.{minor}.{patch}",
                    self.cdi_version
                ),
            ));
        }
        Ok(())
    }

    /// Whether it has the settings of Intel RDT whose place `enableMonitoring` took (CDI, SPEC.md, "Released versions", 1.1.0).
    fn uses_old_monitoring(&self) -> bool {
        let devices = self.devices.iter().map(|device| &device.container_edits);
        let mut settings = devices
            .chain(&self.container_edits)
            .filter_map(|edits| edits.intel_rdt.as_ref());
        settings.any(|rdt| rdt.enable_cmt.is_some() || rdt.enable_mbm.is_some())
    }

    fn version(&self) -> Result<Version, SpecError> {
        let told = self
            .cdi_version
            .strip_prefix('v')
            .unwrap_or(&self.cdi_version);
        let released = RELEASED
            .iter()
            .find(|(major, minor, patch)| *told == format!("{major}.{minor}.{patch}"));
        released.copied().ok_or_else(|| {
            invalid(
                "cdiVersion",
                format!("{:?} is no released version", self.cdi_version),
            )
        })
    }

    /// The earliest version that has all that it uses, and what needs it (CDI, SPEC.md, "Released versions").
    fn needs(&self) -> (Version, &'static str) {
        let edits = || {
            let devices = self.devices.iter().map(|device| &device.container_edits);
            devices.chain(&self.container_edits)
        };
        let annotated = |annotations: &Option<BTreeMap<String, String>>| {
            annotations
                .as_ref()
                .is_some_and(|annotations| !annotations.is_empty())
        };
        let rdt = || edits().filter_map(|edits| edits.intel_rdt.as_ref());
        if edits().any(|edits| some(&edits.net_devices))
            || rdt().any(|rdt| rdt.schemata.is_some() || rdt.enable_monitoring.is_some())
        {
            return ((1, 1, 0), "network devices and these settings of Intel RDT");
        }
        if rdt().next().is_some() || edits().any(|edits| some(&edits.additional_gids)) {
            return ((0, 7, 0), "Intel RDT and additional groups");
        }
        let dotted = self
            .kind
            .split_once('/')
            .is_some_and(|(_, class)| class.contains('.'));
        if dotted
            || annotated(&self.annotations)
            || self
                .devices
                .iter()
                .any(|device| annotated(&device.annotations))
        {
            return ((0, 6, 0), "annotations and classes with a dot");
        }
        let digit = |device: &Entry| {
            !device
                .name
                .starts_with(|first: char| first.is_ascii_alphabetic())
        };
        let nodes = || edits().flat_map(|edits| edits.device_nodes.iter().flatten());
        let host_path = |node: &Node| node.host_path.as_ref().is_some_and(|path| !path.is_empty());
        if self.devices.iter().any(digit) || nodes().any(host_path) {
            return (
                (0, 5, 0),
                "names that begin with a digit and host paths of nodes",
            );
        }
        let mut mounts = edits().flat_map(|edits| edits.mounts.iter().flatten());
        if mounts.any(|mount| mount.r#type.as_ref().is_some_and(|kind| !kind.is_empty())) {
            return ((0, 4, 0), "types of mounts");
        }
        ((0, 1, 0), "all specs")
    }
}

/// What is after a first line like ours. One with anything else than letters of ASCII in it is left to YAML, which ends lines in more ways.
fn after_mark(text: &str) -> Option<&str> {
    let (line, rest) = text.split_once('\n')?;
    let plain = line.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    (plain && line.starts_with(MARK)).then_some(rest)
}

fn from_yaml(text: &str) -> Result<Spec, SpecError> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! { max_depth: DEPTH, max_documents: 1, max_aliases: 1000, max_anchors: 1000 },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let error = error.without_snippet().to_string();
        malformed(error.lines().next().unwrap_or_default())
    })
}

fn malformed(problem: &str) -> SpecError {
    // Words of strangers may be in it, and be as long as the file.
    let plain = |char: char| if char.is_control() { ' ' } else { char };
    SpecError::Malformed(problem.chars().map(plain).take(300).collect())
}

fn invalid(place: &str, problem: String) -> SpecError {
    let cut = |text: &str| text.chars().take(300).collect();
    SpecError::Invalid {
        place: cut(place),
        problem: cut(&problem),
    }
}

fn some<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// Keys of annotations are names as Kubernetes has them; all of them together have at most 256 KiB.
fn annotations(
    place: &str,
    annotations: Option<&BTreeMap<String, String>>,
) -> Result<(), SpecError> {
    let mut total = 0;
    for (key, value) in annotations.into_iter().flatten() {
        total += key.len() + value.len();
        names::annotation(key).map_err(|problem| {
            let key: String = key.chars().take(100).collect();
            invalid(
                place,
                format!("has an annotation whose key {key:?} {problem}"),
            )
        })?;
    }
    match total > 256 << 10 {
        true => Err(invalid(
            place,
            "has more than 256 KiB of annotations".to_owned(),
        )),
        false => Ok(()),
    }
}

impl Edits {
    fn is_empty(&self) -> bool {
        !(some(&self.env)
            || some(&self.device_nodes)
            || some(&self.net_devices)
            || some(&self.hooks)
            || some(&self.mounts)
            || some(&self.additional_gids)
            || self.intel_rdt.is_some())
    }

    fn check(&self, place: &str) -> Result<(), SpecError> {
        let fail = |problem: String| Err(invalid(place, problem));
        environment(place, self.env.as_ref())?;
        for node in self.device_nodes.iter().flatten() {
            if node.path.is_empty() {
                return fail("has a device node without a path".to_owned());
            }
            let kind = node.r#type.as_deref().unwrap_or_default();
            if !matches!(kind, "" | "b" | "c" | "u" | "p") {
                return fail(format!(
                    "has the node {:?} of the type {kind:?}; b, c, u or p it may be",
                    node.path
                ));
            }
            let permissions = node.permissions.as_deref().unwrap_or_default();
            if permissions != "none" && !permissions.chars().all(|char| "rwm".contains(char)) {
                return fail(format!(
                    "has the node {:?} with the permissions {permissions:?}; r, w and m there are",
                    node.path
                ));
            }
        }
        for hook in self.hooks.iter().flatten() {
            // OCI runtime specification, "POSIX-platform Hooks".
            const HOOKS: &[&str] = &[
                "prestart",
                "createRuntime",
                "createContainer",
                "startContainer",
                "poststart",
                "poststop",
            ];
            if !HOOKS.contains(&hook.hook_name.as_str()) {
                return fail(format!(
                    "has a hook {:?}, which there is not",
                    hook.hook_name
                ));
            }
            if hook.path.is_empty() {
                return fail(format!("has a hook {:?} without a path", hook.hook_name));
            }
            environment(place, hook.env.as_ref())?;
        }
        let bare = |mount: &Mount| mount.host_path.is_empty() || mount.container_path.is_empty();
        if self.mounts.iter().flatten().any(bare) {
            return fail("has a mount without a path".to_owned());
        }
        let nameless =
            |device: &NetDevice| device.host_interface_name.is_empty() || device.name.is_empty();
        if self.net_devices.iter().flatten().any(nameless) {
            return fail("has a network device without a name".to_owned());
        }
        let twice = |name: fn(&NetDevice) -> &str| {
            let mut seen = BTreeSet::new();
            let mut devices = self.net_devices.iter().flatten();
            devices.any(|device| !seen.insert(name(device)))
        };
        if twice(|device| &device.host_interface_name) || twice(|device| &device.name) {
            return fail("has two network devices of one name".to_owned());
        }
        // Linux, Documentation/arch/x86/resctrl.rst: the ID is a folder's name.
        let clos = self
            .intel_rdt
            .as_ref()
            .and_then(|rdt| rdt.clos_id.as_deref())
            .unwrap_or_default();
        if clos.len() >= 4096 || matches!(clos, "." | "..") || clos.contains(['/', '\n']) {
            return fail("has a class of service of Intel RDT that is no folder's name".to_owned());
        }
        Ok(())
    }
}

fn environment(place: &str, variables: Option<&Vec<String>>) -> Result<(), SpecError> {
    let named = |variable: &&String| {
        variable
            .split_once('=')
            .is_none_or(|(name, _)| name.is_empty())
    };
    match variables.into_iter().flatten().find(named) {
        Some(variable) => Err(invalid(
            place,
            format!("has the variable {variable:?}, which is not NAME=VALUE"),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
