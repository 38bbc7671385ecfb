//! The runtime handlers that a running containerd reports.
//!
//! The CRI call `Status` with `verbose` set gives, as `info["config"]`, the configuration that the CRI plugin started with,
//! as JSON. It is the only report that all of containerd 1.6, 1.7 and 2.x give; the field names are the JSON tags of
//! `Runtime` in containerd's `pkg/cri/config/config.go` (2.x: `internal/cri/config/config.go`).

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::handler::Handler;

/// The handlers that are live, by name. What a handler's report leaves out is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LiveHandlers(pub BTreeMap<String, LiveHandler>);

/// One live handler, as far as it is reported.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LiveHandler {
    /// `runtime_type`.
    pub runtime_type: Option<String>,
    /// `runtime_path`; `Some("")` where it is reported and not set.
    pub runtime_path: Option<String>,
    /// `options.ConfigPath`; `Some("")` where options are reported and have none.
    pub config_path: Option<String>,
    /// `pod_annotations`.
    pub pod_annotations: Option<Vec<String>>,
    /// `container_annotations`.
    pub container_annotations: Option<Vec<String>>,
    /// `privileged_without_host_devices`.
    pub privileged_without_host_devices: Option<bool>,
    /// `snapshotter`; not reported by 1.6.
    pub snapshotter: Option<String>,
}

/// A handler that is not live as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotLive {
    /// The handler.
    pub name: String,
    /// The setting that differs and what containerd reports for it; `None` if the handler is not there at all.
    pub differs: Option<(&'static str, String)>,
}

impl fmt::Display for NotLive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.differs {
            None => write!(f, "{} is missing", self.name),
            Some((setting, found)) => {
                write!(f, "{} still has {setting} = {found}", self.name)
            }
        }
    }
}

impl LiveHandlers {
    /// Reads the CRI plugin's configuration, the value of `info["config"]`. A report in an unknown form has no handlers.
    pub fn from_cri_config(config: &Value) -> LiveHandlers {
        let runtimes = config
            .get("containerd")
            .and_then(|containerd| containerd.get("runtimes"))
            .and_then(Value::as_object);
        let handlers = runtimes
            .into_iter()
            .flatten()
            .map(|(name, report)| (name.clone(), LiveHandler::from_report(report)));
        LiveHandlers(handlers.collect())
    }

    /// The names of all live handlers.
    pub fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    /// Those of `wanted` that are missing or differ in something that containerd reports.
    pub fn not_live(&self, wanted: &[Handler]) -> Vec<NotLive> {
        wanted
            .iter()
            .filter_map(|handler| {
                let differs = match self.0.get(&handler.name) {
                    None => None,
                    Some(live) => Some(live.difference(handler)?),
                };
                Some(NotLive {
                    name: handler.name.clone(),
                    differs,
                })
            })
            .collect()
    }
}

impl LiveHandler {
    fn from_report(report: &Value) -> LiveHandler {
        let text = |key: &str| report.get(key).and_then(Value::as_str).map(str::to_owned);
        let list = |key: &str| -> Option<Vec<String>> {
            let values = match report.get(key)? {
                // Go writes a list that was never set as null.
                Value::Null => return Some(Vec::new()),
                values => values.as_array()?,
            };
            Some(
                values
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect(),
            )
        };
        LiveHandler {
            runtime_type: text("runtimeType"),
            runtime_path: text("runtimePath"),
            config_path: report.get("options").map(|options| {
                let path = options.get("ConfigPath").and_then(Value::as_str);
                path.unwrap_or_default().to_owned()
            }),
            pod_annotations: list("PodAnnotations"),
            container_annotations: list("ContainerAnnotations"),
            privileged_without_host_devices: report
                .get("privileged_without_host_devices")
                .and_then(Value::as_bool),
            snapshotter: text("snapshotter"),
        }
    }

    fn difference(&self, wanted: &Handler) -> Option<(&'static str, String)> {
        fn check<T: PartialEq + fmt::Debug>(
            setting: &'static str,
            found: Option<&T>,
            wanted: &T,
        ) -> Option<(&'static str, String)> {
            let found = found.filter(|found| *found != wanted)?;
            Some((setting, format!("{found:?}")))
        }
        let path = wanted.runtime_path.clone().unwrap_or_default();
        let config = wanted.config_path.clone().unwrap_or_default();
        // Where no snapshotter is wanted, the default one may be reported.
        let snapshotter = self.snapshotter.as_ref().zip(wanted.snapshotter.as_ref());
        [
            check(
                "runtime_type",
                self.runtime_type.as_ref(),
                &wanted.runtime_type,
            ),
            check("runtime_path", self.runtime_path.as_ref(), &path),
            check("options.ConfigPath", self.config_path.as_ref(), &config),
            check(
                "pod_annotations",
                self.pod_annotations.as_ref(),
                &wanted.pod_annotations,
            ),
            check(
                "container_annotations",
                self.container_annotations.as_ref(),
                &wanted.container_annotations,
            ),
            check(
                "privileged_without_host_devices",
                self.privileged_without_host_devices.as_ref(),
                &wanted.privileged_without_host_devices,
            ),
            snapshotter.and_then(|(found, wanted)| check("snapshotter", Some(found), wanted)),
        ]
        .into_iter()
        .flatten()
        .next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wanted() -> Handler {
        Handler {
            name: "kata".into(),
            runtime_type: "io.containerd.kata.v2".into(),
            config_path: Some("/c.toml".into()),
            pod_annotations: vec!["io.katacontainers.*".into()],
            ..Handler::default()
        }
    }

    fn report() -> Value {
        json!({ "containerd": { "runtimes": { "runc": { "runtimeType": "io.containerd.runc.v2" }, "kata": {
            "runtimeType": "io.containerd.kata.v2", "runtimePath": "", "PodAnnotations": ["io.katacontainers.*"],
            "ContainerAnnotations": null, "options": { "ConfigPath": "/c.toml" },
            "privileged_without_host_devices": false, "baseRuntimeSpec": "", "snapshotter": ""
        } } } })
    }

    #[test]
    fn a_handler_is_live_when_all_that_is_reported_is_as_wanted() {
        let live = LiveHandlers::from_cri_config(&report());
        assert_eq!(live.names(), ["kata", "runc"]);
        assert_eq!(live.not_live(&[wanted()]), []);
        let sparse = json!({ "containerd": { "runtimes": { "kata": {} } } });
        assert_eq!(
            LiveHandlers::from_cri_config(&sparse).not_live(&[wanted()]),
            []
        );
    }

    #[test]
    fn what_is_missing_or_old_is_told() {
        let live = LiveHandlers::from_cri_config(&report());
        for (change, told) in [
            (
                Handler {
                    name: "gone".into(),
                    ..wanted()
                },
                "gone is missing",
            ),
            (
                Handler {
                    config_path: None,
                    ..wanted()
                },
                "kata still has options.ConfigPath = \"/c.toml\"",
            ),
            (
                Handler {
                    runtime_type: "new".into(),
                    ..wanted()
                },
                "kata still has runtime_type = \"io.containerd.kata.v2\"",
            ),
            (
                Handler {
                    snapshotter: Some("nydus".into()),
                    ..wanted()
                },
                "kata still has snapshotter = \"\"",
            ),
            (
                Handler {
                    pod_annotations: vec![],
                    ..wanted()
                },
                "kata still has pod_annotations = [\"io.katacontainers.*\"]",
            ),
        ] {
            assert_eq!(live.not_live(&[change])[0].to_string(), told);
        }
    }

    #[test]
    fn a_report_in_another_form_has_no_handlers() {
        for report in [json!(null), json!([]), json!({ "containerd": 3 })] {
            assert_eq!(
                LiveHandlers::from_cri_config(&report),
                LiveHandlers::default()
            );
        }
    }
}
