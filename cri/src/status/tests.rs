//! The recorded answers of three containerds, and what must be refused.

use proptest::prelude::*;

use super::*;
use crate::fake::recorded;

const KATA: &str = "kata-qemu-nvidia-gpu";

fn with_config(config: &str) -> wire::StatusResponse {
    let mut answer = recorded("2.1");
    answer.info.insert("config".to_owned(), config.to_owned());
    answer
}

fn refusal(answer: wire::StatusResponse) -> String {
    Status::from_wire(answer).unwrap_err().to_string()
}

#[test]
fn every_release_shows_the_same_handler() {
    for version in ["1.6", "1.7", "2.1"] {
        let status = Status::from_wire(recorded(version)).unwrap();
        let names: Vec<&str> = status.handlers.keys().map(String::as_str).collect();
        assert_eq!(names, ["bare", KATA, "runc"], "{version}");
        let want = LiveHandler {
            runtime_type: "io.containerd.kata-qemu-nvidia-gpu.v2".to_owned(),
            runtime_path: Some("/opt/kata-manager/bin/containerd-shim-kata-qemu-nvidia-gpu-v2".into()),
            pod_annotations: vec!["io.katacontainers.*".to_owned(), "cdi.k8s.io/*".to_owned()],
            container_annotations: vec!["io.katacontainers.*".to_owned()],
            privileged_without_host_devices: true,
            config_path: Some(
                "/opt/nvidia-gpu-operator/artifacts/runtimeclasses/kata-qemu-nvidia-gpu/configuration.toml".into(),
            ),
            // 1.6 does not know the setting, and does not show it.
            snapshotter: (version != "1.6").then(|| "overlayfs".to_owned()),
        };
        assert_eq!(status.handlers[KATA], want, "{version}");
        assert_eq!(
            status.handlers["bare"],
            LiveHandler {
                runtime_type: "io.containerd.runc.v2".to_owned(),
                ..LiveHandler::default()
            },
            "{version}"
        );
        assert_eq!(status.default_handler.as_deref(), Some("runc"), "{version}");
    }
}

#[test]
fn readiness_and_other_conditions_are_told_apart() {
    let status = Status::from_wire(recorded("1.7")).unwrap();
    assert!(status.runtime_ready.status);
    assert!(!status.network_ready.status);
    assert_eq!(status.network_ready.reason, "NetworkPluginNotReady");
    let others: Vec<&str> = status
        .conditions
        .iter()
        .map(|condition| condition.kind.as_str())
        .collect();
    assert_eq!(others, ["ContainerdHasNoDeprecationWarnings"]);
}

#[test]
fn cdi_is_unknown_to_1_6() {
    let cdi = |version| {
        Status::from_wire(recorded(version))
            .map(|status| (status.enable_cdi, status.cdi_spec_dirs.len()))
    };
    assert_eq!(cdi("1.6").unwrap(), (None, 0));
    assert_eq!(cdi("1.7").unwrap(), (Some(true), 2));
    assert_eq!(cdi("2.1").unwrap(), (Some(true), 2));
}

#[test]
fn only_2_x_lists_handlers_in_the_cri_s_own_field() {
    assert!(
        Status::from_wire(recorded("1.7"))
            .unwrap()
            .advertised
            .is_empty()
    );
    assert_eq!(
        Status::from_wire(recorded("2.1")).unwrap().advertised,
        ["", "bare", KATA, "runc"]
    );
}

#[test]
fn registry_credentials_are_left_out() {
    let answer = recorded("1.6");
    assert!(answer.info["config"].contains("not-for-logs"));
    let status = Status::from_wire(answer).unwrap();
    assert!(!format!("{status:?}").contains("not-for-logs"));
    assert_eq!(status.config["cni"]["confDir"], "/etc/cni/net.d");
}

#[test]
fn key_spelling_does_not_matter_and_exact_keys_win() {
    let answer = with_config(
        r#"{"enable_cdi": false, "containerd": {"runtimes": {"k": {
            "RuntimeType": "loose", "runtime_type": "exact", "pod_annotations": ["a"],
            "PrivilegedWithoutHostDevices": true, "options": {"config_path": "/c"}}}}}"#,
    );
    let status = Status::from_wire(answer).unwrap();
    let handler = &status.handlers["k"];
    assert_eq!(
        (handler.runtime_type.as_str(), status.enable_cdi),
        ("exact", Some(false))
    );
    assert_eq!(
        (
            handler.pod_annotations.len(),
            handler.privileged_without_host_devices
        ),
        (1, true)
    );
    assert_eq!(handler.config_path.as_deref(), Some("/c".as_ref()));
}

#[test]
fn a_handler_of_nothing_is_a_handler() {
    let status =
        Status::from_wire(with_config(r#"{"containerd": {"runtimes": {"k": {}}}}"#)).unwrap();
    assert_eq!(status.handlers["k"], LiveHandler::default());
    assert!(
        Status::from_wire(with_config("{}"))
            .unwrap()
            .handlers
            .is_empty()
    );
}

#[test]
fn what_is_shaped_otherwise_is_refused_with_its_place() {
    let message = |config: &str| refusal(with_config(config));
    assert!(message("[]").contains(r#"info["config"] is a list, not an object"#));
    assert!(message("{").contains("not JSON"));
    assert!(
        message(r#"{"containerd": 1}"#).contains("config.containerd is a number, not an object")
    );
    assert!(
        message(r#"{"containerd": {"runtimes": {"k": "x"}}}"#)
            .contains("config.containerd.runtimes.k is a string, not an object")
    );
    assert!(
        message(r#"{"containerd": {"runtimes": {"k": {"PodAnnotations": [1]}}}}"#).contains(
            "config.containerd.runtimes.k.pod_annotations is a number, not a list of strings"
        )
    );
    assert!(
        message(
            r#"{"containerd": {"runtimes": {"k": {"privileged_without_host_devices": "yes"}}}}"#
        )
        .contains("k.privileged_without_host_devices is a string, not true or false")
    );
}

#[test]
fn another_runtime_or_a_broken_one_is_refused() {
    let mut answer = recorded("2.1");
    answer.info.clear();
    assert!(refusal(answer).contains("is this containerd?"));
    let mut answer = recorded("2.1");
    answer.status = None;
    assert!(refusal(answer).contains("no condition RuntimeReady"));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    let key = prop_oneof![
        Just("containerd".to_owned()),
        Just("runtimes".to_owned()),
        Just("options".to_owned()),
        Just("PodAnnotations".to_owned()),
        Just("enableCDI".to_owned()),
        "[a-zA-Z_]{0,4}",
    ];
    leaf.prop_recursive(5, 64, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((key.clone(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever the JSON, reading it ends with a status that shows each runtime, or with an error that names its place.
    #[test]
    fn any_configuration_is_read_or_refused(config in json()) {
        match Status::from_wire(with_config(&config.to_string())) {
            Ok(status) => {
                let runtimes = config["containerd"]["runtimes"].as_object();
                for name in runtimes.into_iter().flatten().map(|(name, _)| name) {
                    prop_assert!(status.handlers.contains_key(name));
                }
            }
            Err(error) => prop_assert!(error.to_string().contains("config")),
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,64}") {
        let result = Status::from_wire(with_config(&text));
        prop_assert_eq!(result.is_ok(), serde_json::from_str::<Map<String, Value>>(&text).is_ok());
    }
}
