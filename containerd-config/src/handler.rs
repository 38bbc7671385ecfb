//! What a runtime handler is, and what a version of containerd makes of it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One runtime handler: a table `runtimes.<name>` in the configuration of containerd's CRI plugin.
///
/// Field names are those of containerd's documentation (`docs/cri/config.md` in containerd/containerd).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Handler {
    /// The handler's name, which a `RuntimeClass` object refers to.
    pub name: String,
    /// `runtime_type`: a shim's name such as `io.containerd.kata.v2`, or the absolute path of a shim binary.
    pub runtime_type: String,
    /// `runtime_path`: the absolute path of the shim binary. The CRI plugin of containerd 1.6 ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_path: Option<String>,
    /// `options.ConfigPath`: the configuration file that the shim is told to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_path: Option<String>,
    /// `pod_annotations`: patterns of the pod annotations that reach the sandbox; containerd passes no others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_annotations: Vec<String>,
    /// `container_annotations`: patterns of the container annotations that reach the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub container_annotations: Vec<String>,
    /// `privileged_without_host_devices`: a privileged container does not get every device of the host.
    #[serde(default)]
    pub privileged_without_host_devices: bool,
    /// `snapshotter`: the snapshotter of this handler's containers, where it is not the default one (containerd 1.7).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshotter: Option<String>,
}

/// The settings of a handler's table, as JSON values by TOML key.
pub type Settings = Map<String, Value>;

impl Handler {
    /// The table that stands for this handler. A setting at its default (absent, empty, false) is left out.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::new();
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                settings.insert(key.to_owned(), value);
            }
        };
        let text = |text: &Option<String>| text.clone().map(Value::String);
        let list = |list: &Vec<String>| (!list.is_empty()).then(|| Value::from(list.clone()));
        put("runtime_type", Some(Value::from(self.runtime_type.clone())));
        put("runtime_path", text(&self.runtime_path));
        put(
            "privileged_without_host_devices",
            self.privileged_without_host_devices
                .then_some(Value::Bool(true)),
        );
        put("pod_annotations", list(&self.pod_annotations));
        put("container_annotations", list(&self.container_annotations));
        put("snapshotter", text(&self.snapshotter));
        put(
            "options",
            self.config_path
                .as_ref()
                .map(|path| serde_json::json!({ "ConfigPath": path })),
        );
        settings
    }

    /// Reads a table as a handler, as far as it goes: settings that a [`Handler`] does not have, or of another type than
    /// containerd's, are left out.
    pub fn from_settings(name: &str, settings: &Settings) -> Handler {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let list = |key: &str| -> Vec<String> {
            let values = settings.get(key).and_then(Value::as_array);
            values
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        };
        Handler {
            name: name.to_owned(),
            runtime_type: text(settings.get("runtime_type")).unwrap_or_default(),
            runtime_path: text(settings.get("runtime_path")),
            config_path: text(settings.get("options").and_then(|o| o.get("ConfigPath"))),
            pod_annotations: list("pod_annotations"),
            container_annotations: list("container_annotations"),
            privileged_without_host_devices: settings
                .get("privileged_without_host_devices")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            snapshotter: text(settings.get("snapshotter")),
        }
    }

    /// The handler as this version of containerd must be told it.
    ///
    /// The CRI plugin before 1.7 ignores `runtime_path`, but takes an absolute path as `runtime_type`.
    pub fn for_version(&self, version: ContainerdVersion) -> Handler {
        let mut handler = self.clone();
        if version < ContainerdVersion::new(1, 7, 0)
            && let Some(path) = handler.runtime_path.take()
        {
            handler.runtime_type = path;
        }
        handler
    }
}

/// A version of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerdVersion {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number; 0 where none is given.
    pub patch: u32,
}

/// A text that has no version in it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("there is no version of containerd in {0:?}")]
pub struct VersionError(String);

impl ContainerdVersion {
    /// A version from its numbers.
    pub const fn new(major: u32, minor: u32, patch: u32) -> ContainerdVersion {
        ContainerdVersion {
            major,
            minor,
            patch,
        }
    }

    /// The `version` of the configuration to write where there is none: 2 for containerd 1.x, 3 from 2.0 on.
    pub fn config_version(self) -> u32 {
        if self.major < 2 { 2 } else { 3 }
    }
}

impl fmt::Display for ContainerdVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for ContainerdVersion {
    type Err = VersionError;

    /// Takes the first word that looks like a version, so that CRI's `v1.7.24`, Debian's `1.6.20~ds1` and the whole line
    /// that `containerd --version` prints are all read.
    fn from_str(text: &str) -> Result<ContainerdVersion, VersionError> {
        text.split_whitespace()
            .find_map(parse_word)
            .ok_or_else(|| VersionError(text.chars().take(200).collect()))
    }
}

fn parse_word(word: &str) -> Option<ContainerdVersion> {
    let mut parts = word.strip_prefix('v').unwrap_or(word).splitn(3, '.');
    let major = parts.next()?.parse().ok()?;
    let minor = leading_number(parts.next()?)?;
    let patch = parts.next().and_then(leading_number).unwrap_or(0);
    Some(ContainerdVersion::new(major, minor, patch))
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_containerd_prints() {
        for (text, want) in [
            ("v1.7.24", (1, 7, 24)),
            ("1.6.20~ds1", (1, 6, 20)),
            ("2.1.9+ds1", (2, 1, 9)),
            ("v2.0.0-rc.1", (2, 0, 0)),
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
                (1, 6, 20),
            ),
            ("containerd containerd.io v2.2.0 abcdef", (2, 2, 0)),
        ] {
            let got: ContainerdVersion = text.parse().unwrap();
            assert_eq!((got.major, got.minor, got.patch), want, "{text}");
        }
        assert!("containerd".parse::<ContainerdVersion>().is_err());
        assert!("99999999999.1".parse::<ContainerdVersion>().is_err());
    }

    #[test]
    fn an_old_cri_plugin_gets_the_path_as_the_type() {
        let handler = Handler {
            name: "kata".into(),
            runtime_type: "io.containerd.kata.v2".into(),
            runtime_path: Some("/opt/kata/bin/shim".into()),
            ..Handler::default()
        };
        let old = handler.for_version(ContainerdVersion::new(1, 6, 38));
        assert_eq!(old.runtime_type, "/opt/kata/bin/shim");
        assert_eq!(old.runtime_path, None);
        assert_eq!(
            handler.for_version(ContainerdVersion::new(1, 7, 0)),
            handler
        );
    }

    #[test]
    fn settings_and_back_is_the_same_handler() {
        let full = Handler {
            name: "kata".into(),
            runtime_type: "io.containerd.kata.v2".into(),
            runtime_path: Some("/shim".into()),
            config_path: Some("/c.toml".into()),
            pod_annotations: vec!["io.katacontainers.*".into()],
            container_annotations: vec!["cdi.k8s.io/*".into()],
            privileged_without_host_devices: true,
            snapshotter: Some("nydus".into()),
        };
        for handler in [
            full,
            Handler {
                name: "a".into(),
                ..Handler::default()
            },
        ] {
            assert_eq!(
                Handler::from_settings(&handler.name, &handler.settings()),
                handler
            );
        }
    }
}
