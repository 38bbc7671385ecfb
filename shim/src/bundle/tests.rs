use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn read(text: &str) -> Result<Facts, BundleError> {
    Bundle::read(text).map(|bundle| bundle.facts)
}

fn with_nodes(text: &str, nodes: &[Node]) -> Result<String, BundleError> {
    Bundle::read(text)?
        .with_nodes(nodes)
        .map(|parts| parts.concat())
}

fn nodes() -> Vec<Node> {
    vec![
        Node {
            path: "/dev/vfio/12".to_owned(),
            number: (243, 12),
        },
        Node {
            path: "/dev/vfio/devices/vfio3".to_owned(),
            number: (511, 3),
        },
    ]
}

fn pod(more: &Value) -> String {
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "annotations": {
            CONTAINER_TYPE: "sandbox", SANDBOX_NAME: "train", SANDBOX_NAMESPACE: "lab",
            "cdi.k8s.io/gpu": "nvidia.com/pgpu=0,nvidia.com/pgpu=1", "cdi.k8s.io/more": "nvidia.com/pgpu=1",
        },
    });
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec.to_string()
}

#[test]
fn facts_of_a_sandbox() {
    let linux = json!({"devices": [
        {"path": "/dev/vfio/vfio"}, {"path": "/dev/vfio/7", "type": "c"}, {"path": "/dev/null"}, {"path": "/dev/vfio/devices/vfio1"},
    ]});
    let facts = read(&pod(&json!({ "linux": linux }))).unwrap();
    assert_eq!(facts.role, Role::Sandbox);
    assert_eq!(facts.pod, Some(("lab".to_owned(), "train".to_owned())));
    assert_eq!(facts.annotated, ["nvidia.com/pgpu=0", "nvidia.com/pgpu=1"]);
    assert_eq!(facts.nodes, ["/dev/vfio/7", "/dev/vfio/devices/vfio1"]);
}

#[test]
fn other_roles() {
    let facts = read("{}").unwrap();
    assert_eq!((facts.role, facts.pod), (Role::Sandbox, None));
    let container = json!({"annotations": {CONTAINER_TYPE: "container", SANDBOX_NAME: "a", SANDBOX_NAMESPACE: "b"}});
    assert_eq!(read(&container.to_string()).unwrap().role, Role::Container);
    let nameless = json!({"annotations": {CONTAINER_TYPE: "sandbox"}});
    assert!(read(&nameless.to_string()).is_err());
}

#[test]
fn hostile_specifications_are_refused() {
    let deep = "[".repeat(100_000);
    for text in [
        "",
        "[]",
        "{",
        "null",
        "7",
        &deep,
        r#"{"linux": 7}"#,
        r#"{"linux": []}"#,
        r#"{"linux": {"devices": {}}}"#,
        r#"{"linux": {"devices": [7]}}"#,
        r#"{"linux": {}, "linux": {}}"#,
        r#"{"linux": {"devices": [], "devices": []}}"#,
        r#"{"annotations": {"a": 7}}"#,
        r#"{"annotations": []}"#,
    ] {
        assert!(read(text).is_err(), "{}", &text[..text.len().min(80)]);
    }
    for name in [
        "",
        "x",
        "a/b",
        "a/b=",
        "../b=c",
        "nvidia.com/pgpu=0,",
        "nvidia.com/pgpu=a b",
    ] {
        let text = json!({"annotations": {"cdi.k8s.io/x": name}}).to_string();
        assert!(
            matches!(read(&text), Err(BundleError::Annotation { .. })),
            "{name:?}"
        );
    }
}

#[test]
fn nodes_come_after_what_is_there() {
    for linux in [
        json!({"devices": [{"path": "/dev/null"}], "resources": {"devices": [{"allow": false}], "cpu": {}}}),
        json!({"devices": [], "resources": {"devices": []}}),
        json!({"devices": null, "resources": {"devices": null}}),
        json!({"resources": {"cpu": {"shares": 2}}}),
        json!({"resources": null}),
        json!({}),
        Value::Null,
    ] {
        let before = pod(&json!({ "linux": linux }));
        let after = with_nodes(&before, &nodes()).unwrap();
        added(&before, &after);
    }
    let before = pod(&json!({}));
    added(&before, &with_nodes(&before, &nodes()).unwrap());
    assert_eq!(with_nodes(&before, &[]).unwrap(), before);
    assert!(with_nodes(r#"{"linux": {"resources": 7}}"#, &nodes()).is_err());
}

/// Holds that `after` is `before` with the nodes, and nothing else.
fn added(before: &str, after: &str) {
    assert_eq!(
        read(after).unwrap().nodes,
        [
            read(before).unwrap().nodes,
            nodes().into_iter().map(|node| node.path).collect()
        ]
        .concat()
    );
    let list = |value: &Value, keys: &[&str]| -> Vec<Value> {
        let found = keys.iter().fold(value, |value, key| &value[*key]);
        found.as_array().cloned().unwrap_or_default()
    };
    let (old, new): (Value, Value) = (
        serde_json::from_str(before).unwrap(),
        serde_json::from_str(after).unwrap(),
    );
    for keys in [
        &["linux", "devices"][..],
        &["linux", "resources", "devices"],
    ] {
        let (old, new) = (list(&old, keys), list(&new, keys));
        assert_eq!(new[..old.len()], old);
        assert_eq!(new.len(), old.len() + nodes().len());
    }
    // Without the two lists, and what had to be made for them, both are the same.
    let stripped = |mut value: Value| {
        let strip = |map: &mut Value, key: &str| {
            let made = match &map[key] {
                Value::Array(_) => true,
                Value::Object(inside) => inside.is_empty(),
                other => other.is_null(),
            };
            if let (true, Some(map)) = (made, map.as_object_mut()) {
                map.remove(key);
            }
        };
        if value["linux"]["resources"].is_object() {
            strip(&mut value["linux"]["resources"], "devices");
        }
        if value["linux"].is_object() {
            strip(&mut value["linux"], "resources");
            strip(&mut value["linux"], "devices");
        }
        strip(&mut value, "linux");
        value
    };
    assert_eq!(stripped(new), stripped(old));
}

#[test]
fn every_other_byte_stays() {
    let before = "{ \"x\":1e400, \"y\" : 123456789012345678901234567890,\t\"linux\":{\"seccomp\":{\"a\":[1.10]},\"devices\":[\n]}\n}\n";
    let after = with_nodes(before, &nodes()[..1]).unwrap();
    let device = r#"{"path":"/dev/vfio/12","type":"c","major":243,"minor":12,"fileMode":384,"uid":0,"gid":0}"#;
    let rule = r#"{"allow":true,"type":"c","major":243,"minor":12,"access":"rwm"}"#;
    let expected = before.replace("[\n]", &format!("[\n{device}]")).replace(
        "\"seccomp\"",
        &format!("\"resources\":{{\"devices\":[{rule}]}},\"seccomp\""),
    );
    assert_eq!(after, expected);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let key = prop_oneof![
            Just("linux".to_owned()),
            Just("devices".to_owned()),
            Just("resources".to_owned()),
            "\\PC{0,5}"
        ];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(key, inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn anything_is_edited_or_refused(linux in any_json(), other in any_json()) {
        let before = pod(&json!({ "linux": linux, "other": other }));
        if let (Ok(_), Ok(after)) = (read(&before), with_nodes(&before, &nodes())) {
            added(&before, &after);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
        let _ = read(&text);
        let _ = with_nodes(&text, &nodes());
    }
}
