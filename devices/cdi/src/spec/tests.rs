//! What CDI takes and what it refuses; any set of devices gives a spec that it takes.

use km_vfio::Address;
use proptest::prelude::*;

use super::*;
use crate::names;

const GOOD: &str = r#"
cdiVersion: "0.5.0"
kind: nvidia.com/pgpu
containerEdits: {}
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/vfio/10
"#;

fn problem(text: &str) -> String {
    Spec::parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn the_documented_file_is_taken() {
    let spec = Spec::parse(GOOD.as_bytes()).unwrap();
    assert_eq!(spec.kind, "nvidia.com/pgpu");
    assert_eq!(
        spec.devices[0].nodes().collect::<Vec<_>>(),
        ["/dev/vfio/10"]
    );
    let json = "{\n\t\"cdiVersion\": \"0.5.0\",\n\t\"kind\": \"a.b/c\",\n\t\"devices\": [{\"name\": \"x\",\n\t\"containerEdits\": {\"deviceNodes\": [{\"path\": \"/dev/a\", \"hostPath\": \"/dev/b\"}]}}]}";
    let spec = Spec::parse(json.as_bytes()).unwrap();
    assert_eq!(spec.devices[0].host_nodes().collect::<Vec<_>>(), ["/dev/b"]);
}

#[test]
fn every_part_of_the_specification_is_known() {
    let all = r#"
cdiVersion: "1.1.0"
kind: vendor.com/a.b
annotations: {example.com/x: y}
containerEdits: {env: [A=b], additionalGids: [1]}
devices:
- name: a:b
  annotations: {x: y}
  containerEdits:
    env: ["A="]
    deviceNodes: [{path: /a, hostPath: /b, type: c, major: 1, minor: 3, fileMode: 420, permissions: rwm, uid: 1, gid: 2}, {path: /c, permissions: none}]
    netDevices: [{hostInterfaceName: eth0, name: eth1}]
    hooks: [{hookName: createContainer, path: /bin/true, args: [a], env: [A=b], timeout: 3}]
    mounts: [{hostPath: /a, containerPath: /b, type: tmpfs, options: [ro]}]
    intelRdt: {closID: a, l3CacheSchema: b, memBwSchema: c, schemata: [d], enableMonitoring: true}
    additionalGids: [5]
"#;
    Spec::parse(all.as_bytes()).unwrap();
}

#[test]
fn what_cdi_refuses_is_refused() {
    for (from, to, why) in [
        ("0.5.0", "0.9.9", "no released version"),
        ("0.5.0", "0.4.0", "need 0.5.0"),
        ("nvidia.com/pgpu", "pgpu", "<vendor>/<class>"),
        (
            "nvidia.com/pgpu",
            "nvidia.com/9gpu",
            "does not begin with a letter",
        ),
        ("nvidia.com/pgpu", "nvidia.com/", "is empty"),
        ("nvidia.com/pgpu", "nvidia.com/p.gpu", "need 0.6.0"),
        ("nvidia.com/pgpu", "a/b/c", "a character"),
        ("\"0\"", "\"0 1\"", "a character"),
        ("\"0\"", "\"-0\"", "does not begin"),
        ("\"0\"", "\"\"", "is empty"),
        ("path: /dev/vfio/10", "path: ''", "without a path"),
        (
            "- path: /dev/vfio/10",
            "- {path: /a, type: x}",
            "of the type",
        ),
        (
            "- path: /dev/vfio/10",
            "- {path: /a, permissions: x}",
            "permissions",
        ),
        (
            "containerEdits: {}",
            "containerEdits: {env: [x]}",
            "NAME=VALUE",
        ),
        (
            "containerEdits: {}",
            "containerEdits: {hooks: [{hookName: x, path: /x}]}",
            "there is not",
        ),
        (
            "containerEdits: {}",
            "containerEdits: {mounts: [{hostPath: '', containerPath: /x}]}",
            "mount without",
        ),
        (
            "containerEdits: {}",
            "containerEdits: {additionalGids: [1]}",
            "need 0.7.0",
        ),
        (
            "containerEdits: {}",
            "containerEdits: {netDevices: [{hostInterfaceName: a, name: b}]}",
            "need 1.1.0",
        ),
        ("containerEdits: {}", "annotations: {a: b}", "need 0.6.0"),
        ("containerEdits: {}", "something: new", "something"),
        ("kind: nvidia.com/pgpu\n", "", "kind"),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD);
        assert!(problem(&text).contains(why), "{to}: {}", problem(&text));
    }
    let entry = GOOD.split_once("devices:\n").unwrap().1;
    assert!(problem(&format!("{GOOD}{entry}")).contains("listed twice"));
    assert!(problem("cdiVersion: 0.5.0\nkind: a/b\ndevices: []\n").contains("is empty"));
    assert!(
        problem("cdiVersion: 0.5.0\nkind: a/b\ndevices: [{name: a, containerEdits: {}}]\n")
            .contains("changes nothing")
    );
    let with = |edits: &str| {
        problem(&format!(
            "cdiVersion: 1.1.0\nkind: a/b\ndevices: [{{name: a, containerEdits: {{{edits}}}}}]\n"
        ))
    };
    let one = "{hostInterfaceName: a, name: b}";
    let other = "{hostInterfaceName: c, name: b}";
    assert!(with(&format!("netDevices: [{one}, {other}]")).contains("of one name"));
    assert!(with("intelRdt: {enableMBM: true}").contains("no more"));
}

/// containerd's reader ends a comment in more ways than at a line feed, and takes the first of several documents.
#[test]
fn below_our_mark_is_json_and_below_other_words_is_yaml() {
    let spec = |name: &str| {
        format!(
            r#"{{"cdiVersion": "0.5.0", "kind": "a.com/b", "devices": [{{"name": "{name}", "containerEdits": {{"env": ["A=b"]}}}}]}}"#
        )
    };
    let names = |text: &str| -> Vec<String> {
        let parsed = Spec::parse(text.as_bytes());
        parsed.map_or_else(|_| Vec::new(), |spec| spec.qualified().collect())
    };
    let (one, two) = (spec("1"), spec("2"));
    assert_eq!(names(&format!("{MARK}.\n{one}\n")), ["a.com/b=1"]);
    assert_eq!(names(&format!("# Of another\n\n{one}\n")), ["a.com/b=1"]);
    for end in ['\r', '\u{85}', '\u{2028}', '\u{2029}'] {
        let both = format!("{MARK}{end}{one}{end}--- #\n{two}\n");
        assert_ne!(names(&both), ["a.com/b=2"], "{both:?}");
    }
    assert!(names(&format!("{MARK}\u{a0}\n\u{a0}{one}\n")).is_empty());
    let doubled = one.replace("\"kind\"", "\"kind\": \"c.com/d\", \"kind\"");
    assert!(names(&format!("{MARK}.\n{doubled}\n")).is_empty());
}

#[test]
fn hostile_bytes_are_refused_with_short_words() {
    let deep = format!(
        "{{\"cdiVersion\": {}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let laughs: String = (1..30)
        .map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9)))
        .collect();
    let laughs = format!("a0: &a0 [x]\n{laughs}");
    let long = format!("kind: {}\n", "x".repeat(LIMIT - 100));
    let control = "kind: \"\\e[2J\"\nx: 1\n";
    for text in [
        deep.as_str(),
        &laughs,
        &long,
        control,
        "",
        "{",
        "[]",
        "- - -",
        "\u{feff}",
        "a: *b",
    ] {
        assert!(problem(text).chars().count() < 800, "{}", problem(text));
        assert!(
            !problem(text).contains(char::is_control),
            "{}",
            problem(text)
        );
    }
    assert_eq!(Spec::parse(&vec![b'x'; LIMIT + 1]), Err(SpecError::TooLong));
    assert!(Spec::parse(b"\xff").is_err());
}

fn device(class: Class, slot: u8, indices: Vec<usize>, group: u32, nodes: Vec<String>) -> Device {
    let name = Address {
        domain: 0,
        bus: slot,
        device: 0,
        function: 0,
    };
    Device {
        class,
        name,
        indices,
        group,
        nodes,
        functions: vec![name],
        model: "a model".to_owned(),
        numa_node: None,
    }
}

proptest! {
    #[test]
    fn any_devices_give_a_valid_spec(
        model in "\\PC{0,60}",
        slots in proptest::collection::btree_set(any::<u8>(), 1..20),
        groups in proptest::collection::vec(any::<u32>(), 20),
        cdev: bool,
    ) {
        let class = Class::of_model(Some(&model), 1);
        let devices: Vec<Device> = slots.iter().enumerate().map(|(at, slot)| {
            let nodes = match cdev {
                true => vec![format!("/dev/vfio/devices/vfio{at}")],
                false => vec![format!("/dev/vfio/{}", groups[at]), "/dev/vfio/vfio".to_owned()],
            };
            device(class.clone(), *slot, vec![at], groups[at], nodes)
        }).collect();
        let text = render(&class, &devices.iter().collect::<Vec<_>>());
        let spec = Spec::parse(text.as_bytes());
        prop_assert!(spec.is_ok(), "{spec:?}\n{text}");
        let spec = spec.unwrap();
        prop_assert_eq!(&spec.kind, &class.kind());
        let names: BTreeSet<&str> = spec.devices.iter().map(|device| device.name.as_str()).collect();
        prop_assert_eq!(names.len(), 2 * devices.len());
        for device in &devices {
            for name in device.names() {
                let entry = spec.devices.iter().find(|entry| entry.name == name).unwrap();
                let nodes: Vec<&str> = entry.nodes().collect();
                prop_assert_eq!(&nodes, &device.nodes);
            }
        }
        prop_assert!(text.starts_with(MARK));
    }

    #[test]
    fn any_text_is_a_spec_or_an_error(text in "\\PC{0,200}", bytes: Vec<u8>) {
        let _ = Spec::parse(text.as_bytes());
        let _ = Spec::parse(&bytes);
        let _ = Spec::parse(GOOD.replacen("pgpu", &text, 1).as_bytes());
        let _ = names::device(&text);
    }
}
