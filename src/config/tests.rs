//! What the configuration file may say, and what is said when it says something else.

use super::*;
use crate::failure::Kind;

/// As NVIDIA's documentation of the GPU Operator shows it.
const NVIDIA: &str = "artifactsDir: /opt/nvidia-gpu-operator/artifacts/runtimeclasses
runtimeClasses:
- artifacts:
    pullSecret: \"\"
    url: nvcr.io/nvidia/cloud-native/kata-gpu-artifacts:ubuntu22.04-525
  name: kata-qemu-nvidia-gpu
  nodeSelector: {}
- artifacts:
    pullSecret: \"\"
    url: nvcr.io/nvidia/cloud-native/kata-gpu-artifacts:ubuntu22.04-535-snp
  name: kata-qemu-nvidia-gpu-snp
  nodeSelector: {}
";

fn error(text: &str) -> String {
    let error = parse(text).unwrap_err();
    assert_eq!(crate::failure::kind(&error), Kind::Configuration);
    format!("{error:#}")
}

#[test]
fn nvidias_file_works_unchanged() {
    let config = parse(NVIDIA).unwrap();
    assert_eq!(config.artifacts_dir.as_str(), DEFAULT_ARTIFACTS_DIR);
    assert_eq!(config.runtime_classes.len(), 2);
    assert_eq!(
        config.runtime_classes[1].handler(),
        "kata-qemu-nvidia-gpu-snp"
    );
    assert_eq!(config.containerd.restart.mode, RestartMode::Systemd);
    assert_eq!(parse("").unwrap().runtime_classes.len(), 0);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_key() {
    let text = error(&NVIDIA.replace("artifactsDir", "artifactDir"));
    assert!(
        text.contains("`artifactDir`") && text.contains("did you mean `artifactsDir`"),
        "{text}"
    );
    let text = error(&format!("{NVIDIA}containerd:\n  sockett: /run/x\n"));
    assert!(
        text.contains("`sockett`") && text.contains("`socket`?") && text.contains("line 14"),
        "{text}"
    );
}

#[test]
fn wrong_classes_are_named() {
    let text = error(&NVIDIA.replace("gpu-snp", "gpu"));
    assert!(text.contains("twice") && text.contains("line 11"), "{text}");
    let text = error(&NVIDIA.replace(
        "name: kata-qemu-nvidia-gpu-snp",
        "name: kata-qemu-nvidia-gpu-spn",
    ));
    assert!(
        text.contains("did you mean \"kata-qemu-nvidia-gpu-snp\""),
        "{text}"
    );
    let text = error(
        "runtimeClasses:\n- name: kata-qemu-nvidia-gpu\n  artifacts:\n    url: \"Not A Reference\"\n",
    );
    assert!(text.contains("line 4"), "{text}");
    let text = error("runtimeClasses:\n- name: kata-qemu-nvidia-gpu\n");
    assert!(text.contains("artifacts.url"), "{text}");
    let text = error("runtimeClasses:\n- name: ../x\n  runtimeType: io.containerd.runc.v2\n");
    assert!(text.contains("line 2"), "{text}");
}

#[test]
fn a_class_has_its_own_keys_or_everybodys() {
    let class = |verify: &str| {
        format!(
            "runtimeClasses:\n- name: kata-qemu-nvidia-gpu\n  artifacts:\n    url: r.example/a:1\n{verify}"
        )
    };
    let keys = |text: &str| {
        let config = parse(text).unwrap();
        let own = config.runtime_classes[0].artifacts.clone().unwrap().verify;
        let keys = config.signing_keys(own.as_ref());
        keys.map(|keys| keys.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let top = "verify: {policy: key, keys: [/etc/top.pub]}\n";
    assert_eq!(keys(&class("")), None);
    assert_eq!(keys(&class(top)).unwrap(), ["/etc/top.pub"]);
    let none = "    verify: {policy: none}\n";
    assert_eq!(keys(&class(&format!("{none}{top}"))), None);
    let own = "    verify: {policy: key, keys: [/etc/own.pub]}\n";
    assert_eq!(
        keys(&class(&format!("{own}{top}"))).unwrap(),
        ["/etc/own.pub"]
    );
    let inherited = "    verify: {policy: key}\n";
    let spare = "verify: {policy: none, keys: [/etc/top.pub]}\n";
    assert_eq!(
        keys(&class(&format!("{inherited}{spare}"))).unwrap(),
        ["/etc/top.pub"]
    );
    let text = error(&class(inherited));
    assert!(
        text.contains("no keys") && text.contains("kata-qemu-nvidia-gpu"),
        "{text}"
    );
    let text = error(&class("    verify: {policy: none, keys: [/k]}\n"));
    assert!(text.contains("asks nobody"), "{text}");
    assert!(error("verify: {policy: key}\n").contains("no keys"));
    assert!(error("verify: {keys: [/k]}\n").contains("policy"));
}

#[test]
fn a_launch_is_checked_unless_a_class_says_otherwise() {
    let class = |name: &str, more: &str| {
        format!("runtimeClasses:\n- name: {name}\n  artifacts: {{url: r.example/a:1}}\n{more}")
    };
    let gpu = |more: &str| class("kata-qemu-nvidia-gpu", more);
    let launch = |text: &str| parse(text).unwrap().runtime_classes[0].launch();
    assert_eq!(launch(&gpu("")), Launch::default());
    assert_eq!(launch(&gpu("")).mode, LaunchMode::Check);
    let tuned = launch(&gpu("  launch: {mode: tune, clique: 15}\n"));
    assert_eq!((tuned.mode, tuned.clique), (LaunchMode::Tune, Some(15)));
    assert_eq!(
        launch(&gpu("  launch: {mode: none}\n")).mode,
        LaunchMode::None
    );
    for confidential in ["kata-qemu-nvidia-gpu-snp", "kata-qemu-nvidia-gpu-tdx"] {
        for mode in ["tune", "inject"] {
            let text = error(&class(
                confidential,
                &format!("  launch: {{mode: {mode}}}\n"),
            ));
            assert!(
                text.contains("line 2") && text.contains("measured"),
                "{text}"
            );
        }
        for mode in ["check", "none"] {
            parse(&class(
                confidential,
                &format!("  launch: {{mode: {mode}}}\n"),
            ))
            .unwrap();
        }
    }
    for (more, word) in [
        ("  launch: {mode: tune, clique: 16}\n", "0 to 15"),
        ("  launch: {mode: check, clique: 1}\n", "goes with mode"),
        ("  launch: {clique: 1}\n", "goes with mode"),
        ("  launch: {mode: tun}\n", "did you mean `tune`"),
        ("  launch: {cliqe: 1}\n", "did you mean `clique`"),
        (
            "  launch: {mode: check}\n  handlerSettings: {runtimePath: /x/shim}\n",
            "handlerSettings.runtimePath",
        ),
    ] {
        let text = error(&gpu(more));
        assert!(text.contains(word), "{text}");
    }
    let text = error(
        "runtimeClasses:\n- name: x\n  runtimeType: io.containerd.runc.v2\n  launch: {mode: check}\n",
    );
    assert!(text.contains("no QEMU"), "{text}");
}

#[test]
fn the_schema_knows_every_key() {
    let schema = serde_json::to_string(&schemars::schema_for!(Config)).unwrap();
    for key in [
        "artifactsDir",
        "pullSecret",
        "nodeSelector",
        "runtimeType",
        "credentialsFile",
        "readyTimeoutSeconds",
        "clique",
    ] {
        assert!(schema.contains(key), "{key}");
    }
}
