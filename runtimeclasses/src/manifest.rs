//! The RuntimeClass object (`node.k8s.io/v1`).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::ClassKind;

/// What a sandbox costs beside its containers: memory and CPU (Kata 4.1, `runtimeclasses.yaml` of its Helm chart).
const OVERHEAD: (&str, &str) = ("10240Mi", "1");

/// The RuntimeClass of a class. `kind` is `None` for a class outside the catalogue, which has no overhead unless one is given
/// as (memory, cpu).
///
/// It never carries the label `nvidia.com/kata-runtime-class`: the GPU Operator deletes the classes that do.
pub fn runtime_class_manifest(
    class: &str,
    handler: &str,
    kind: Option<&ClassKind>,
    node_selector: &BTreeMap<String, String>,
    overhead: Option<(&str, &str)>,
) -> Value {
    let mut manifest = json!({
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {
            "name": class,
            "labels": { "app.kubernetes.io/managed-by": "kata-manager" },
        },
        "handler": handler,
    });
    if let Some((memory, cpu)) = overhead.or(kind.map(|_| OVERHEAD)) {
        manifest["overhead"] = json!({ "podFixed": { "memory": memory, "cpu": cpu } });
    }
    if !node_selector.is_empty() {
        manifest["scheduling"] = json!({ "nodeSelector": node_selector });
    }
    manifest
}

/// An object as YAML. JSON strings, numbers and the flow of nested collections are YAML 1.2 as they are; only block layout
/// is added, for people.
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

fn write(value: &Value, indent: usize, out: &mut String) {
    let Value::Object(map) = value else {
        out.push_str(&format!("{value}\n"));
        return;
    };
    for (key, value) in map {
        out.push_str(&" ".repeat(indent));
        out.push_str(&scalar(key));
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                out.push_str(":\n");
                write(value, indent + 2, out);
            }
            Value::String(text) => out.push_str(&format!(": {}\n", scalar(text))),
            _ => out.push_str(&format!(": {value}\n")),
        }
    }
}

/// A string plain where nobody can read it as something else, else as JSON has it.
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    if plain {
        text.to_owned()
    } else {
        Value::from(text).to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Strings that a careless writer gets wrong, and any printable ones.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            "(true|No|null|~|1e5|0x1F|1:30|2026-01-02|- a|a: b|a #b|&a|\\*a|\\{\\}|\\[|'|\"|%a|@a|\\||  a |---|\\.inf|inf|nan|)",
            "[ -~\n\t\u{a0}-\u{d7ff}]{0,16}",
        ]
    }

    proptest! {
        #[test]
        fn yaml_reads_back_as_it_was(class in text(), handler in text(), selector in prop::collection::btree_map(text(), text(), 0..4)) {
            let kind = crate::find("kata-qemu-nvidia-gpu");
            let manifest = runtime_class_manifest(&class, &handler, kind, &selector, None);
            let back: Value = serde_saphyr::from_str(&to_yaml(&manifest)).unwrap();
            prop_assert_eq!(back, manifest);
        }
    }

    #[test]
    fn the_label_by_which_the_gpu_operator_deletes_is_never_set() {
        for kind in crate::catalogue() {
            let manifest =
                runtime_class_manifest(kind.name, kind.name, Some(kind), &BTreeMap::new(), None);
            assert_eq!(
                manifest["metadata"]["labels"],
                json!({ "app.kubernetes.io/managed-by": "kata-manager" })
            );
            assert_eq!(
                manifest["overhead"],
                json!({ "podFixed": { "memory": "10240Mi", "cpu": "1" } })
            );
            assert_eq!(manifest.get("scheduling"), None);
        }
    }

    #[test]
    fn a_catalogue_class_as_yaml() {
        let selector =
            BTreeMap::from([("nvidia.com/cc.ready.state".to_owned(), "true".to_owned())]);
        let kind = crate::find("kata-qemu-nvidia-gpu-snp");
        let manifest =
            runtime_class_manifest("kata-qemu-nvidia-gpu-snp", "handler", kind, &selector, None);
        assert_eq!(
            to_yaml(&manifest),
            "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata:\n  name: kata-qemu-nvidia-gpu-snp\n  labels:\n    \
             app.kubernetes.io/managed-by: kata-manager\nhandler: handler\noverhead:\n  podFixed:\n    memory: \"10240Mi\"\n    \
             cpu: \"1\"\nscheduling:\n  nodeSelector:\n    nvidia.com/cc.ready.state: \"true\"\n"
        );
    }

    #[test]
    fn a_class_outside_the_catalogue_has_no_overhead_unless_given() {
        let none = runtime_class_manifest("demo", "demo", None, &BTreeMap::new(), None);
        assert_eq!(none.get("overhead"), None);
        let some =
            runtime_class_manifest("demo", "demo", None, &BTreeMap::new(), Some(("1Gi", "2")));
        assert_eq!(some["overhead"]["podFixed"]["cpu"], "2");
    }
}
