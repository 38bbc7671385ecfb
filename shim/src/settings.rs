//! What the shim and the launcher must know of their handler: `/etc/kata-manager/handlers/<handler>.json`, which `apply` writes.
//! [`Settings::parse`] and [`Settings::render`] are pure; [`load`] and [`list`] read.

use std::path::Path;

use km_host::{HostPath, Root};
use km_topology::Kata;
use serde::{Deserialize, Serialize};

use crate::launch::Launch;
use crate::table::Containerd;

/// The folder of these files, on the host.
pub const DIR: &str = "/etc/kata-manager/handlers";

/// The largest file that is read, in bytes. One has some hundred.
pub const LIMIT: u64 = 64 << 10;

/// Kata's shim where kata-deploy puts it: what is run for calls other than `start` when the settings are gone, so that a sandbox that
/// outlives them can be ended.
pub const DEFAULT_INNER: &str = "/opt/kata/bin/containerd-shim-kata-v2";

/// The longest that the kubelet is waited for unless told otherwise, in milliseconds. containerd gives a shim's `start` no deadline of
/// its own, and the kubelet gives all of a sandbox's start two minutes (kubelet, `runtimeRequestTimeout`).
pub const KUBELET_TIMEOUT_MS: u64 = 1500;

/// The settings of a handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// The handler's name in containerd.
    pub handler: String,
    /// The runtime class behind it.
    pub class: String,
    /// The shim that is run in the end.
    pub inner_shim: HostPath,
    /// The QEMU that is run in the end; `None` for a class that has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<HostPath>,
    /// Whether the guest's memory is encrypted (SEV-SNP or TDX).
    #[serde(default)]
    pub confidential: bool,
    /// Which Kata the inner shim is.
    pub kata: Kata,
    /// Which containerd calls.
    pub containerd: Containerd,
    /// The class's link to its live generation, whose number goes into claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_link: Option<HostPath>,
    /// The kubelet's PodResources socket.
    pub kubelet_socket: HostPath,
    /// The longest that the kubelet is waited for, in milliseconds.
    #[serde(default = "kubelet_timeout")]
    pub kubelet_timeout_ms: u64,
    /// What happens when something is missing that goes with a pod's devices.
    #[serde(default)]
    pub companions: Companions,
    /// What is done with the launch of its QEMU.
    #[serde(default)]
    pub launch: Launch,
}

fn kubelet_timeout() -> u64 {
    KUBELET_TIMEOUT_MS
}

/// What happens when a function is missing that goes with a pod's devices: another of its IOMMU group, or an NVSwitch of a pod that
/// has all GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Companions {
    /// The pod does not start.
    #[default]
    Refuse,
    /// It is added where the table allows a device to be written; else the pod does not start.
    Add,
}

/// Why the settings of a handler cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The name that the program was called by has no handler in it.
    #[error(
        "{0:?} is no name of this shim: it is called as containerd-shim-<handler>-v2, and finds its settings by that"
    )]
    Name(String),
    /// The file cannot be read.
    #[error(
        "the settings of the handler {handler} cannot be read from {path}: {why}; \"kata-manager apply\" writes them"
    )]
    Unreadable {
        /// The handler.
        handler: String,
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
}

impl Settings {
    /// Reads settings.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Settings, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The bytes of the file; the same settings give the same bytes.
    ///
    /// # Errors
    /// Only when memory runs out.
    pub fn render(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// Reads the settings of a handler, which must be a name that [`handler_of`] could give.
///
/// # Errors
/// [`SettingsError`], with what is wrong.
pub fn load(root: &Root, handler: &str) -> Result<Settings, SettingsError> {
    if !is_plain(handler) {
        return Err(SettingsError::Name(handler.chars().take(100).collect()));
    }
    let path = Path::new(DIR).join(file_name(handler));
    read(root, &path).map_err(|why| SettingsError::Unreadable {
        handler: handler.to_owned(),
        path: path.display().to_string(),
        why,
    })
}

/// The handlers that have settings, in order.
///
/// # Errors
/// When the folder cannot be listed; an absent one has none.
pub fn list(root: &Root) -> Result<Vec<String>, km_host::Error> {
    let dir = Path::new(DIR);
    let wrong = |error| km_host::Error::io("name", dir)(std::io::Error::other(error));
    let ours = root.resolve(&HostPath::new(DIR).map_err(wrong)?)?;
    let entries = match std::fs::read_dir(&ours) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(km_host::Error::io("list", &ours)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry
            .map_err(km_host::Error::io("list", &ours))?
            .file_name();
        let name = name.to_str().and_then(|name| name.strip_suffix(".json"));
        names.extend(name.filter(|name| is_plain(name)).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

fn read(root: &Root, path: &Path) -> Result<Settings, String> {
    let bytes = root.read(path, LIMIT).map_err(|error| error.to_string())?;
    Settings::parse(&bytes).map_err(|error| error.to_string())
}

/// The handler that a program's name stands for: `containerd-shim-<handler>-v2`. What cannot be a file's name is none.
pub fn handler_of(program: &str) -> Option<&str> {
    let name = program.rsplit('/').next()?;
    let handler = name.strip_prefix("containerd-shim-")?.strip_suffix("-v2")?;
    is_plain(handler).then_some(handler)
}

/// Whether a handler's name is a file's name, too.
fn is_plain(handler: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !handler.is_empty() && !handler.starts_with('.') && handler.bytes().all(plain)
}

/// Where a handler's settings are, relative to [`DIR`].
pub fn file_name(handler: &str) -> String {
    format!("{handler}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handler_is_in_the_name() {
        for (program, handler) in [
            (
                "/opt/kata-manager/bin/containerd-shim-kata-qemu-nvidia-gpu-snp-v2",
                Some("kata-qemu-nvidia-gpu-snp"),
            ),
            ("containerd-shim-a.b_c-v2", Some("a.b_c")),
            ("containerd-shim--v2", None),
            ("containerd-shim-..-v2", None),
            ("containerd-shim-a\nb-v2", None),
            ("kata-manager", None),
            ("", None),
        ] {
            assert_eq!(handler_of(program), handler, "{program:?}");
        }
    }

    #[test]
    fn settings_and_back() {
        let text = r#"{"handler": "h", "class": "c", "innerShim": "/opt/kata/bin/shim", "kata": {"flavor": "rust", "version": "4.1.0"},
            "containerd": "1.7", "kubeletSocket": "/k.sock", "later": 1}"#;
        let settings = Settings::parse(text.as_bytes()).unwrap();
        assert_eq!(settings.kubelet_timeout_ms, KUBELET_TIMEOUT_MS);
        assert_eq!(settings.companions, Companions::Refuse);
        assert_eq!(
            Settings::parse(&settings.render().unwrap()).unwrap(),
            settings
        );
        assert!(Settings::parse(br#"{"innerShim": "relative"}"#).is_err());
    }
}
