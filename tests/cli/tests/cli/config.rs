//! The configuration file: right, wrong and missing; its schema; the objects printed from it.

use insta::assert_snapshot;

use crate::place::{GPU, Place};

#[test]
fn a_missing_configuration() {
    let place = Place::new(None);
    assert_snapshot!("missing_config_as_text", place.run(&["plan"]));
    assert_snapshot!(
        "missing_config_as_json",
        place.run(&["plan", "--output", "json"])
    );
}

#[test]
fn wrong_configurations() {
    let cases = [
        ("unknown key", GPU.replace("artifactsDir", "artifactDir")),
        (
            "unknown nested key",
            GPU.replace("pullSecret", "pullSecrets"),
        ),
        ("class twice", GPU.replace("gpu-snp", "gpu")),
        ("class unknown", GPU.replace("gpu-snp", "gpu-spn")),
        (
            "bad reference",
            GPU.replace("registry.example/kata/guest:v1\n", "Not A Reference\n"),
        ),
        (
            "relative folder",
            GPU.replace("/opt/artifacts", "opt/artifacts"),
        ),
        (
            "not yaml",
            GPU.replace("runtimeClasses:", "runtimeClasses: {"),
        ),
        (
            "no restart command",
            format!("{GPU}containerd: {{restart: {{mode: command}}}}\n"),
        ),
    ];
    for (name, text) in cases {
        let place = Place::new(Some(&text));
        let said = place.run(&["config", "check"]);
        assert_eq!(said.code, 4, "{name}: {said}");
        assert_snapshot!(format!("config_with_{}", name.replace(' ', "_")), said);
        for command in ["plan", "apply", "status", "uninstall"] {
            let other = place.run(&[command]);
            assert_eq!((other.code, &other.stderr), (4, &said.stderr), "{command}");
        }
        let json = place.run(&["plan", "--output", "json"]);
        let error: serde_json::Value = serde_json::from_str(&json.stderr).unwrap();
        assert_eq!(error["kind"], "Error");
        assert_eq!(error["apiVersion"], "kata-manager/v1");
        assert_eq!(error["exitCode"], 4);
        assert!(error["message"].is_string() && error["causes"].is_array());
    }
    let place = Place::new(Some(&GPU.replace("artifactsDir", "artifactDir")));
    assert_snapshot!(
        "config_with_unknown_key_as_json",
        place.run(&["apply", "--output", "json"])
    );
}

#[test]
fn files_that_the_configuration_names_are_checked() {
    for (name, more) in [
        (
            "no_such_key",
            "verify: {policy: key, keys: [/etc/kata-manager/none.pub]}\n",
        ),
        (
            "no_such_authority",
            "registry: {caFile: /etc/kata-manager/none.pem}\n",
        ),
    ] {
        let place = Place::new(Some(&format!("{GPU}{more}")));
        let said = place.run(&["config", "check"]);
        assert_eq!(said.code, 4, "{said}");
        assert_snapshot!(format!("config_with_{name}"), said);
    }
}

#[test]
fn a_right_configuration() {
    let place = Place::new(Some(GPU));
    assert_snapshot!("config_check", place.run(&["config", "check"]));
    assert_snapshot!(
        "config_check_as_json",
        place.run(&["config", "check", "--output", "json"])
    );
}

#[test]
fn the_schema() {
    let said = Place::new(None).run(&["config", "schema"]);
    assert_eq!(said.code, 0, "{said}");
    serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap();
    assert_snapshot!("config_schema", said.stdout);
}

#[test]
fn runtime_classes() {
    let place = Place::new(Some(GPU));
    assert_snapshot!(
        "runtimeclasses_print",
        place.run(&["runtimeclasses", "print"])
    );
    let one = place.run(&[
        "runtimeclasses",
        "print",
        "kata-qemu-nvidia-gpu-snp",
        "--output",
        "json",
    ]);
    assert_snapshot!("runtimeclasses_print_of_one_as_json", one);
    let none = place.run(&["runtimeclasses", "print", "nobody"]);
    assert_snapshot!("runtimeclasses_print_of_an_unknown_class", none);
}
